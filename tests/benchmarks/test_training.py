"""Training steps a second: the layouts, their gate and the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.training import measure, training_table
from gisting import GistError


def row(mode: str, step_s: float) -> dict[str, Any]:
    return {
        "mode": mode,
        "num_prompts": 8,
        "per_prompt": 8,
        "prompt_tokens": 64,
        "num_parameters": 660_000,
        "num_rows": 64 if mode == "padded" else 8,
        "row_length": 80 if mode == "padded" else 178,
        "num_tokens": 5072 if mode == "padded" else 1376,
        "step_s": step_s,
        "step_s_low": step_s - 0.01,
        "step_s_high": step_s + 0.01,
        "completions_per_s": 64 / step_s,
        "num_repeats": 30,
        "device": "d",
        "threads": 2,
        "torch": "t",
        "transformers": "f",
    }


def test_the_table_by_eye() -> None:
    assert training_table([row("padded", 0.32), row("shared prompt", 0.1)]).splitlines()[2:4] == [
        "| padded | 8 x 8 | 64 | 5,072 | 64 x 80 | 320 (310–330) | 200 | 1.0x |",
        "| shared prompt | 8 x 8 | 64 | 1,376 | 8 x 178 | 100 (90–110) | 640 | 3.2x |",
    ]


def test_all_layouts_hold_the_same_completions() -> None:
    padded, packed, shared = rows = list(training.measure_all([20], [4], completions=8, repeats=2))
    assert [one.mode for one in rows] == ["padded", "packed", "shared prompt"]
    assert (padded.num_rows, shared.num_rows) == (8, 2)
    # Each its own prompt, several in a row as long as a prompt with its four completions.
    assert packed.num_tokens == padded.num_tokens
    assert 2 < packed.num_rows < 8
    assert packed.row_length <= padded.row_length + 3 * (padded.row_length - 22)
    # Six copies of prompt and gist less: two of eight are left.
    assert padded.num_tokens - shared.num_tokens == 6 * (20 + 2)
    assert all(one.completions_per_s == pytest.approx(8 / one.step_s) for one in rows)


def test_no_time_where_the_layouts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(training.GistPackingCollator):
        def __call__(self, records: Any) -> dict[str, torch.Tensor]:
            batch = super().__call__(records)
            return {**batch, "position_ids": batch["position_ids"] + (batch["labels"] != -100)}

    monkeypatch.setattr(training, "GistPackingCollator", Wrong)
    with pytest.raises(GistError, match="the layouts differ"):
        measure(num_prompts=2, per_prompt=2, prompt_tokens=16, repeats=1)


@pytest.mark.parametrize("name", ["num_prompts", "per_prompt", "prompt_tokens", "repeats"])
def test_numbers_too_small_are_refused(name: str) -> None:
    with pytest.raises(GistError, match=f"{name} must be at least"):
        measure(**{name: 0})
