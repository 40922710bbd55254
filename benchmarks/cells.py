"""Write the cells that several tables of the benchmarks share: a value with its interval, a median with its quartiles.

Place in the flow: below every benchmark that writes a table; :mod:`gisting.markdown` makes the table of the cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["interval_cell", "spread_cell"]


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
