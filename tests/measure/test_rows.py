"""Rows, their quartiles, and the progress bar."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from gisting.measure.progress import progress_bar, tracked
from gisting.measure.rows import append_row, read_rows, spread


def test_a_row_describes_itself(tmp_path: Path) -> None:
    append_row(tmp_path / "new" / "rows.jsonl", {"command": "x", "value": 1})
    append_row(tmp_path / "new" / "rows.jsonl", {"command": "x", "value": 2})
    rows = read_rows(tmp_path / "new" / "rows.jsonl")
    assert [row["value"] for row in rows] == [1, 2]
    assert {"format", "device", "threads", "python", "torch", "transformers", "gisting", "commit"} <= rows[0].keys()
    json.dumps(rows)


def test_spread_stays_within_what_was_measured() -> None:
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    stream = Stream()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert list(tracked(iter("abc"), "letters")) == ["a", "b", "c"]
    with progress_bar("halves", 2) as advance:
        advance(1)
    shown = stream.getvalue()
    assert [word in shown for word in ("letters", "halves", "left")] == [is_terminal] * 3
