"""Training steps a second: the layouts, their gate and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.__main__ import run
from benchmarks.training import measure, training_table
from gisting import GistError
from gisting.measure.rows import read_rows


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
    padded, packed, shared = rows = measure(num_prompts=2, per_prompt=4, prompt_tokens=20, repeats=1, warmup=1)
    assert [one.mode for one in rows] == ["padded", "packed", "shared prompt"]
    assert (padded.num_rows, shared.num_rows) == (8, 2)
    # Every completion has its own prompt, and a row is as long as a prompt with its four completions.
    assert packed.num_tokens == padded.num_tokens
    assert 2 < packed.num_rows < 8
    assert packed.row_length <= padded.row_length + 3 * (padded.row_length - 22)
    # Six of the eight copies of prompt and gist are saved.
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


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib: pip install 'gist-tokens[eval]'")
    words = "--prompt-tokens 20 --per-prompt 4 --completions 8 --repeats 2".split()
    output, image = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    assert run(["training", *words, "--output", str(output), "--plot", str(image)]) == 0
    rows = read_rows(output)
    assert [one["mode"] for one in rows] == list(training.LAYOUTS)
    assert training_table(rows) == capsys.readouterr().out.strip()
    assert image.read_bytes().startswith(b"\x89PNG")
