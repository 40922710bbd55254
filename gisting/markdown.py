"""Write Markdown tables.

Place in the flow: below every report, card and page that contains a table; no other module writes them. Independent of
what the cells mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gisting.errors import GistError

__all__ = ["markdown_table"]


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


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: object) -> str:
    one_line = re.sub(r"\s*[\r\n]\s*", " ", str(value))
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\\|", one_line)
