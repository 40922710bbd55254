"""Distillation against the plain loss: the table by eye, and the command with a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import run
from benchmarks.distillation import distillation_table
from gisting.measure.rows import read_rows


def row(objective: str, seed: int, value: float) -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.01, "high": value + 0.01}
    return {
        "objective": objective,
        "weight": float(objective == "distilled"),
        "top_k": 32,
        "seed": seed,
        "num_steps": 1200,
        "num_gist_tokens": 2,
        "num_records": 512,
        "exact_match": {
            f"{split}/{condition}": interval
            for split in ("seen", "unseen")
            for condition in ("gist", "positive", "negative")
        },
        "train_s": 100.0 + 60 * (objective == "distilled"),
        "device": "d",
        "torch": "t",
        "transformers": "f",
    }


def test_the_table_by_eye() -> None:
    rows = [row("plain", 0, 0.9), row("distilled", 0, 0.92), row("plain", 1, 0.8), row("distilled", 1, 0.9)]
    assert distillation_table(rows).splitlines() == [
        "| seed | loss | seen: gist | unseen: gist | unseen: positive | unseen: negative | training |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {seed} | {name} | {' | '.join([cell] * 4)} | {time} s |"
            for seed, name, cell, time in (
                (0, "plain", "90.0 [89.0, 91.0]", 100),
                (0, "distilled", "92.0 [91.0, 93.0]", 160),
                (1, "plain", "80.0 [79.0, 81.0]", 100),
                (1, "distilled", "90.0 [89.0, 91.0]", 160),
            )
        ),
        "| mean | plain | 85.0 | 85.0 | 85.0 | 85.0 | 100 s |",
        "| mean | distilled | 91.0 | 91.0 | 91.0 | 91.0 | 160 s |",
        "",
        "Exact match in per cent with its 95 % interval on 512 records, k = 2, 1,200 steps from scratch; distilled "
        "with weight 1 over the teacher's 32 likeliest tokens (d, torch t, transformers f).",
    ]


def test_the_command_with_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    words = f"--output {output} --checkpoints {tmp_path / 'models'} --seeds 3,4 --steps 2 --records 6"
    assert run(["distillation", *words.split()]) == 0
    rows = read_rows(output)
    assert [(one["seed"], one["objective"], one["weight"]) for one in rows] == [
        *((3, "plain", 0.0), (3, "distilled", 1.0)),
        *((4, "plain", 0.0), (4, "distilled", 1.0)),
    ]
    assert all(one["exact_match"]["unseen/gist"]["value"] <= 1 for one in rows)
    assert "seed 4, distilled: 2 steps" in capsys.readouterr().out
