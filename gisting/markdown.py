"""Markdown tables and the cells that several of them have.

Place in the flow: below everything that writes a table. Knows text and numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["interval_cell", "markdown_table", "spread_cell"]


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table.

    Args:
        columns: the header.
        lines: the cells of each line, one for each column.
    """
    head, *rest = ("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in (columns, *lines))
    return [head, "|---" * len(columns) + "|", *rest]


def interval_cell(found: Mapping[str, float] | None, sign: str = "", scale: float = 100) -> str:
    """Write a value with its interval, such as ``98.0 [97.0, 99.0]``; ``-`` where there is none.

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
    """Write a median with its quartiles, such as ``3.2 (3.1–3.3)``, from three columns of a row.

    Args:
        row: holds ``name``, ``name_low`` and ``name_high``.
        name: the column of the median.
        digits: decimal places.
        scale: what the numbers are multiplied by, such as 1000 for milliseconds from seconds.
    """
    median, low, high = (f"{scale * row[name + end]:,.{digits}f}" for end in ("", "_low", "_high"))
    return f"{median} ({low}–{high})"
