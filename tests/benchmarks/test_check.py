"""The benchmark of the check: its rows and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import run
from gisting.measure.rows import read_rows
from tests import tiny


def test_rows_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "Model")
    words = ["check", "--checkpoint", str(tmp_path / "Model"), "--dtypes", "bfloat16,float32", "--sizes", "tiny"]
    assert run([*words, "--device", "cpu", "--repeats", "2", "--output", str(tmp_path / "rows.jsonl")]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    shown = [("Model", "bfloat16"), ("Model", "float32"), ("random TINY", "bfloat16")]
    assert [(row["model"], row["dtype"]) for row in rows] == shown
    for row in rows:
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["cpu_seconds"] > 0
    assert all(row["is_right"] for row in rows[:2]), rows
    printed = capsys.readouterr().out
    assert "| Model | 0.00 | float32 | " in printed


def test_what_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gisting.models import registry

    right = registry._attention_forward

    def nudged(*args: object, **kwargs: object) -> object:
        out, weights = right(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        return out * 1.5, weights

    monkeypatch.setattr(registry, "_attention_forward", nudged)
    from benchmarks.check import measure

    row = measure(tiny.model("llama"), "nudged", 1)
    assert not row.is_right
    assert row.failed.startswith("mask failed, ")
