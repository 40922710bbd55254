"""The table of three conditions x splits x k: by eye, and its command with a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import run
from benchmarks.quality import measure, quality_table
from gisting import GistError
from gisting.eval.results import Evaluation
from gisting.measure.rows import read_rows


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def row(split: str, condition: str, value: float, *, alone: float | None = None) -> dict:
    return {
        "seed": 0,
        "num_steps": 3600,
        "num_parameters": 660_000,
        "trained_k": [1, 8] if alone is None else [2, 2],
        "split": split,
        "condition": condition,
        "num_gist_tokens": 2,
        "num_records": 512,
        "prompt_tokens": 20.0,
        "exact_match": interval(value),
        "gap_kept": interval(0.97) if condition == "gist" and alone is None else None,
        "difference": None if alone is None else interval(alone),
        "train_s": 300.0,
        "eval_s": 60.0,
        "device": "d",
        "torch": "t",
        "transformers": "f",
    }


ROWS = [
    row(split, condition, value)
    for split in ("seen", "unseen")
    for condition, value in (("gist", 0.95), ("positive", 0.98), ("negative", 0.05))
]


def test_the_table_by_eye() -> None:
    assert quality_table(ROWS) == (
        """\
| k | compression | seen: positive | seen: gist | seen: negative | unseen: positive | unseen: gist | \
unseen: negative | seen: gap kept | unseen: gap kept |
|---|---|---|---|---|---|---|---|---|---|
| 2 | 10.0 | 98.0 [97.0, 99.0] | 95.0 [94.0, 96.0] | 5.0 [4.0, 6.0] | 98.0 [97.0, 99.0] | 95.0 [94.0, 96.0] | \
5.0 [4.0, 6.0] | 97.0 [96.0, 98.0] | 97.0 [96.0, 98.0] |

Exact match in per cent with its 95 % interval on 512 records of each split, one checkpoint of 0.66 million \
parameters, trained from scratch with k drawn from 1 to 8 in 3,600 steps (seed 0): 300 s of training and 60 s of \
evaluation (d, torch t, transformers f)."""
    )


def test_the_table_beside_a_model_for_each_k() -> None:
    alone = [row(split, "gist", 0.94, alone=0.005) for split in ("seen", "unseen")]
    assert quality_table([*ROWS, *alone]).splitlines()[-3:] == [
        "| k | seen: one checkpoint | seen: for this k alone | seen: difference | unseen: one checkpoint | unseen: for "
        "this k alone | unseen: difference |",
        "|---|---|---|---|---|---|---|",
        "| 2 | 95.0 [94.0, 96.0] | 94.0 [93.0, 95.0] | +0.5 [-0.5, +1.5] | 95.0 [94.0, 96.0] | 94.0 [93.0, 95.0] | "
        "+0.5 [-0.5, +1.5] |",
    ]


def test_the_command_with_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        f"--output {tmp_path / 'rows.jsonl'} --checkpoints {tmp_path / 'models'} --k 1,2 --steps 2 --records 6 --alone"
    )
    assert run(["quality", *words.split()]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    together = [one for one in rows if one["trained_k"] == [1, 2]]
    assert [(one["split"], one["num_gist_tokens"], one["condition"]) for one in together] == [
        (split, k, condition)
        for split in ("seen", "unseen")
        for k in (1, 2)
        for condition in ("positive", "gist", "negative")
    ]
    alone = [one for one in rows if one["trained_k"] != [1, 2]]
    assert [(one["num_gist_tokens"], one["trained_k"]) for one in alone] == [
        *[(1, [1, 1])] * 2,
        *[(2, [2, 2])] * 2,
    ]
    assert all(one["difference"] is not None and one["condition"] == "gist" for one in alone)
    assert "| 2 | " in capsys.readouterr().out
    saved = Evaluation.load(tmp_path / "models" / "k1-2" / "results.json")
    assert saved.splits[0].counts == [1, 2]
    assert (tmp_path / "models" / "alone-k2" / "model.safetensors").is_file()


@pytest.mark.parametrize("counts", [[], [0, 1]])
def test_quality_wants_counts(tmp_path: Path, counts: list[int]) -> None:
    with pytest.raises(GistError, match="counts must be numbers of gist tokens, at least 1, got"):
        measure(tmp_path, counts)
