"""Training methods from one base model: the command with a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import run
from benchmarks.methods import methods_table
from gisting.measure.rows import read_rows
from gisting.train.methods import METHODS


def test_the_benchmark_of_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a few steps, every method has a row, and the table is made from the rows."""
    output = tmp_path / "methods.jsonl"
    sizes = "--base-steps 2 --steps 2 --records 4 --rank 4 --lora-rate 0.001".split()
    assert run(["methods", "--output", str(output), "--checkpoints", str(tmp_path / "runs"), *sizes]) == 0
    rows = {row["method"]: row for row in read_rows(output)}
    assert list(rows) == ["base", *METHODS]
    assert {name: row["is_text_unchanged"] for name, row in rows.items()} == {
        "base": True, "full": False, "lora": False, "gist-lora": True, "embeddings": True
    }  # fmt: skip
    assert rows["full"]["num_trainable_parameters"] == rows["full"]["num_parameters"]
    assert rows["embeddings"]["num_trainable_parameters"] == 2 * 128
    # A row of its own for each of the two tokens of a gist, not one for all.
    more = rows["gist-lora"]["num_trainable_parameters"] - rows["lora"]["num_trainable_parameters"]
    assert more == 128
    assert (rows["lora"]["learning_rate"], rows["gist-lora"]["learning_rate"]) == (0.001, 0.005)
    assert set(rows["lora"]["exact_match"]) == {
        f"{split}/{condition}" for split in ("seen", "unseen") for condition in ("gist", "positive", "negative")
    }
    table = methods_table(list(rows.values()))
    assert "| gist-lora |" in table
    assert "| same bits |" in table
    assert "gist-lora: 2 steps" in capsys.readouterr().out
