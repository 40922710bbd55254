"""The benchmark of a training step's logits and prompts: the same work three ways, and no time where they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import objective
from benchmarks.objective import WAYS, WORKLOADS, Sizes, measure, objective_table
from gisting.errors import GistError
from gisting.measure.rows import environment, read_rows

TINY = {"hidden": 32, "layers": 2, "heads": 2, "key_heads": 1, "intermediate": 48, "vocabulary": 500}


def test_rows_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    objective._main(["--output", str(path), "--repeats", "1", "--sizes", json.dumps(TINY)])
    rows = read_rows(path)
    assert [(row["workload"], row["way"]) for row in rows] == [(one, way) for one in WORKLOADS for way in WAYS]
    for row, sizes in zip(rows[:: len(WAYS)], WORKLOADS.values(), strict=True):
        # <s> or the template's words come on top of what was asked for.
        assert row["num_prompt_tokens"] >= sizes["prompts"] * sizes["prompt"]
        assert row["num_targets"] >= sizes["prompts"] * sizes["completions"] * sizes["answer"]
        assert row["num_tokens"] > row["num_prompt_tokens"] + row["num_targets"]
    # What is never made takes no memory: logits of every token, then the prompts' activations.
    plain, targets, once = (row["peak_bytes"] for row in rows[-len(WAYS) :])
    assert plain > targets > once
    assert objective_table(rows) == capsys.readouterr().out.strip()


def test_ways_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = objective._Bench._every_token

    def wrong(self: Any, batch: Any) -> torch.Tensor:
        return 1.001 * inner(self, batch)

    monkeypatch.setattr(objective._Bench, "_every_token", wrong)
    with pytest.raises(GistError, match=r"the ways differ: losses .*; no time is reported"):
        measure("tiny", Sizes(**TINY, prompts=1, prompt=8, question=3, answer=3), repeats=1)


def test_a_faster_way_shows(tmp_path: Path) -> None:
    rows = [
        {"workload": "w", "way": way, "step_s": time, "step_s_low": time, "step_s_high": time, "peak_bytes": 2**30}
        | {"num_prompt_tokens": 1000, "num_tokens": 2000, "num_targets": 100, "num_parameters": 1e8, "vocabulary": 9}
        | {"num_repeats": 1, **environment("cpu")}
        for way, time in zip(WAYS, (8.0, 4.0, 2.0), strict=True)
    ]
    assert "| w | 1,000 of 2,000 | 100 | prompts once | 2.00 (2.00–2.00) | 4.00x | 1.00 |" in objective_table(rows)
