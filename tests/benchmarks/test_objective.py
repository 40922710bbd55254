"""A training step computed in three ways: rows, table, and no time where the ways differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import objective
from benchmarks.__main__ import run
from benchmarks.objective import WAYS, WORKLOADS, Sizes, measure, objective_table
from gisting.errors import GistError
from gisting.measure.rows import environment, read_rows

TINY = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_key_heads": 1, "intermediate_size": 48, "vocabulary": 500
}  # fmt: skip


def test_rows_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    assert run(["objective", "--output", str(path), "--repeats", "1", "--sizes", json.dumps({"model": TINY})]) == 0
    rows = read_rows(path)
    assert [(row["workload"], row["way"]) for row in rows] == [(one, way) for one in WORKLOADS for way in WAYS]
    for row, sizes in zip(rows[:: len(WAYS)], WORKLOADS.values(), strict=True):
        # <s> and the template's words are counted in addition.
        assert row["num_prompt_tokens"] >= sizes["prompts"] * sizes["prompt"]
        assert row["num_targets"] >= sizes["prompts"] * sizes["completions"] * sizes["answer"]
        assert row["num_tokens"] > row["num_prompt_tokens"] + row["num_targets"]
    # Each way saves memory: the logits of every token, then the activations of the prompts.
    plain, targets, once = (row["peak_bytes"] for row in rows[-len(WAYS) :])
    assert plain > targets > once
    assert objective_table(rows) == capsys.readouterr().out.strip()


def test_ways_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = objective._Bench._every_token

    def wrong(self: Any, batch: Any) -> torch.Tensor:
        return 1.001 * inner(self, batch)

    monkeypatch.setattr(objective._Bench, "_every_token", wrong)
    with pytest.raises(GistError, match=r"the ways differ: losses .*; no time is reported"):
        measure("tiny", Sizes(TINY, prompts=1, prompt=8, question=3, answer=3), repeats=1)


def test_a_faster_way_shows(tmp_path: Path) -> None:
    rows = [
        {"workload": "w", "way": way, "step_s": time, "step_s_low": time, "step_s_high": time, "peak_bytes": 2**30}
        | {"num_prompt_tokens": 1000, "num_tokens": 2000, "num_targets": 100, "num_parameters": 1e8, "vocabulary": 9}
        | {"num_repeats": 1, **environment("cpu")}
        for way, time in zip(WAYS, (8.0, 4.0, 2.0), strict=True)
    ]
    assert "| w | 1,000 of 2,000 | 100 | prompts once | 2.00 (2.00–2.00) | 4.00x | 1.00 |" in objective_table(rows)
