"""Plain-text tables for the terminal and for `str()` of the reports."""

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, footer: Sequence[str] | None = None) -> str:
    """Text of a table, one line per row: columns of figures right-aligned, others left-aligned, no trailing blanks.

    A column is one of figures if every cell of it, footer apart, is empty or starts with a digit or a sign.

    Args:
        headers: Column titles.
        rows: Cells, already formatted, as many in each row as there are headers.
        footer: A last row below a rule of its own, for totals.

    Raises:
        ValueError: A row has another number of cells than there are headers.
    """
    body = [[str(cell) for cell in row] for row in rows]
    tail = [] if footer is None else [[str(cell) for cell in footer]]
    for row in body + tail:
        if len(row) != len(headers):
            raise ValueError(f"table has {len(headers)} columns, but a row has {len(row)} cells: {row}")
    columns = list(zip(headers, *body, *tail, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    figures = [bool(body) and all(_is_figure(row[i]) for row in body) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, figures, strict=True)
        ]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [line(headers), rule, *map(line, body)]
    if tail:
        lines += [rule, line(tail[0])]
    return "\n".join(lines)


def _is_figure(cell: str) -> bool:
    return not cell or cell[0].isdigit() or (cell[0] in "+-" and cell[1:2].isdigit()) or cell == "-"
