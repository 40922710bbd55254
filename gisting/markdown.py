"""Write Markdown tables, and the cells that several of them share.

Place in the flow: below every report, card and page that contains a table; no other module writes them. Independent of
what the cells mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gisting.errors import GistError

__all__ = ["interval_cell", "markdown_table", "spread_cell"]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    r"""Write a table as Markdown.

    Cells are written with ``str``. A ``|`` in a cell is escaped unless it already is (``\|``), and line breaks become
    spaces, so no text can break the table. Other Markdown in a cell is left alone.

    Args:
        columns: the header's cells.
        rows: for each row, one cell per column.

    Returns:
        The lines of the table.

    Raises:
        GistError: a row does not have one cell per column.
    """
    lines = [_line(columns), "|---" * len(columns) + "|"]
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise GistError(f"row {number} has {len(row)} cells for {len(columns)} columns: {list(row)}")
        lines.append(_line(row))
    return lines


def interval_cell(found: Mapping[str, float] | None, sign: str = "", scale: float = 100) -> str:
    """Return a value with its interval as text, such as ``98.0 [97.0, 99.0]``; ``-`` where there is none.

    Args:
        found: ``value``, ``low`` and ``high``, or None.
        sign: ``"+"`` writes the sign of positive numbers too, for differences.
        scale: what the numbers are multiplied by; 100 makes percentages of shares.
    """
    if found is None:
        return "-"
    value, low, high = (scale * found[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def spread_cell(row: Mapping[str, Any], name: str, digits: int, scale: float = 1) -> str:
    """Return a median with its quartiles as text, such as ``3.2 (3.1–3.3)``, from three columns of a row.

    Args:
        row: holds ``name``, ``name_low`` and ``name_high``.
        name: the column of the median.
        digits: decimal places.
        scale: what the numbers are multiplied by, such as 1000 for milliseconds from seconds.
    """
    median, low, high = (f"{scale * row[name + end]:,.{digits}f}" for end in ("", "_low", "_high"))
    return f"{median} ({low}–{high})"


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: object) -> str:
    one_line = re.sub(r"\s*[\r\n]\s*", " ", str(value))
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\\|", one_line)
