"""``markdown_table``: its lines, and that no cell can break it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gisting.errors import GistError
from gisting.markdown import markdown_table


def test_lines() -> None:
    assert markdown_table(("name", "k"), [("gist", 2), ("a|b", "c\nd")]) == [
        "| name | k |",
        "|---|---|",
        "| gist | 2 |",
        r"| a\|b | c d |",
    ]
    assert markdown_table(("", ""), []) == ["|  |  |", "|---|---|"]


@pytest.mark.parametrize(
    ("cell", "written"),
    [("|", r"\|"), (r"\|", r"\|"), (r"\\|", r"\\\|"), (r"\\\|", r"\\\|"), ("||", r"\|\|"), ("**a**", "**a**")],
)
def test_bars(cell: str, written: str) -> None:
    assert markdown_table(["a"], [[cell]])[-1] == f"| {written} |"


@given(st.lists(st.text(alphabet="|\\ a\r\n"), min_size=1, max_size=3))
def test_no_cell_breaks_the_table(cells: list[str]) -> None:
    line = markdown_table(["c"] * len(cells), [cells])[-1]
    bare_bars = re.sub(r"\\.", "", line).count("|")
    # A trailing backslash of a cell is followed by the space before the bar, so it escapes nothing.
    assert bare_bars == len(cells) + 1
    assert "\n" not in line
    assert "\r" not in line


def test_a_row_of_the_wrong_length() -> None:
    with pytest.raises(GistError, match=r"^row 1 has 1 cells for 2 columns: \['c'\]$"):
        markdown_table(["x", "y"], [["a", "b"], ["c"]])
