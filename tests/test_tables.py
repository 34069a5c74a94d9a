import pytest

from sparse_ft.tables import format_table


def test_figures_are_right_aligned_and_text_is_left_aligned():
    table = format_table(["name", "ms"], [["a", "10.5"], ["long", "-2"]], footer=["sum", "8.5"])
    assert table.splitlines() == [
        "name    ms",
        "----  ----",
        "a     10.5",
        "long    -2",
        "----  ----",
        "sum    8.5",
    ]


def test_no_rows():
    assert format_table(["a", "b"], []) == "a  b\n-  -"


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="2 columns, but a row has 1 cells"):
        format_table(["a", "b"], [["1"]])
