"""The reference of all modifiers, for docs/recipes.md and the command line, from their declarations."""

from typing import Any

from sparse_ft.methods import Field, Modifier, modifiers


def modifier_reference() -> str:
    """Markdown: a section for every modifier that runs here, and a table of those that do not."""
    supported = {name: cls for name, cls in modifiers().items() if not cls.unsupported}
    others = {name: cls for name, cls in modifiers().items() if cls.unsupported}
    parts = [_section(name, cls) for name, cls in supported.items()]
    parts.append("### Read, but not run\n\n| modifier | what to do |\n|---|---|")
    parts[-1] += "".join(f"\n| `{name}` | {_cell(cls.unsupported)} |" for name, cls in others.items())
    return "\n\n".join(parts) + "\n"


def modifier_lines() -> list[list[str]]:
    """Name, what it does in a line, and source of every modifier."""
    return [
        [name, _summary(cls) if not cls.unsupported else "(not run here)", cls.source]
        for name, cls in modifiers().items()
    ]


def _section(name: str, cls: type[Modifier]) -> str:
    text = " ".join(line.strip() for line in (cls.__doc__ or "").strip().splitlines() if line.strip())
    rows = "".join(f"\n| {' | '.join(map(_cell, _cells(field)))} |" for field in cls.fields.values())
    header = "| field | value | unit | default | meaning |\n|---|---|---|---|---|"
    return f"### {name}\n\n{text} Source: {cls.source}.\n\n{header}{rows}"


def _cells(field: Field) -> list[str]:
    default = "required" if field.required else f"`{_plain(field.default)}`"
    return [f"`{field.name}`", field.kind.what, field.unit, default, field.doc]


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _summary(cls: type[Modifier]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
