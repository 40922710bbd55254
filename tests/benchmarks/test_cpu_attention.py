"""Test the benchmark of attention on the CPU, by pieces against a dense mask."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import cpu_attention
from gisting.attention import sdpa
from gisting.attention.pieces import is_available
from gisting.errors import GistError
from gisting.measure.rows import append_row, read_rows
from gisting.visibility import Visibility

pytestmark = pytest.mark.skipif(not is_available(), reason="this torch has no fused attention on the CPU")


@pytest.mark.parametrize("layout", list(cpu_attention.LAYOUTS))
def test_rows(layout: str, tmp_path: Path) -> None:
    rows = cpu_attention.measure(layout, 512, repeats=2)
    assert [row.is_training for row in rows] == [False, True]
    for row in rows:
        assert row.pieces_ms_low <= row.pieces_ms <= row.pieces_ms_high
        assert row.dense_ms_low <= row.dense_ms <= row.dense_ms_high
        assert row.ratio == row.dense_ms / row.pieces_ms
        append_row(tmp_path / "rows.jsonl", asdict(row))
    table = cpu_attention.attention_table(read_rows(tmp_path / "rows.jsonl")).splitlines()
    assert [line.split(" | ")[1:3] for line in table[2:4]] == [["512", "forward"], ["512", "forward and backward"]]


def test_a_red_gate_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_key_too_many(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, **options: Any) -> Tensor:
        return sdpa.dense_attention(q, k, v, Visibility(visibility.first - 1, visibility.end), **options)

    monkeypatch.setattr(cpu_attention, "dense_attention", one_key_too_many)
    with pytest.raises(GistError, match=r"the output by pieces differs from dense by .* no time is reported"):
        cpu_attention.measure("gist", 512, repeats=1)


def test_a_layout_without_pieces_is_refused() -> None:
    with pytest.raises(GistError, match="pieces are not chosen for layout 'gist' at 34 tokens"):
        cpu_attention.measure("gist", 34, repeats=1)
