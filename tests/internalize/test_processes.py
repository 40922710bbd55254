"""Stages in two processes: they train like one, share the evaluation, and a killed run ends with the same bits.

This file is also the script that the processes run, on a CPU, over gloo. No test needs an accelerator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

import gisting
from gisting import Record
from gisting.internalize.result import load_internalized
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import Rewrites
from gisting.internalize.stages import internalize
from gisting.train.finetune import published_arguments
from gisting.train.methods import Method
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "w50 w51 w52 w53 w54 w55"
# Answers differ in length, so that processes differ in their number of targets. Three whole batches: to one that is not
# whole, accelerate adds rows from the beginning.
RECORDS = [Record("", f"w{number} w{number + 10}", tiny.words(1 + number % 4, number)) for number in range(24)]
NUM_ASKED = 5  # not a multiple of the processes

pytestmark = [
    pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate"),
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    ),
]


class DieAt(TrainerCallback):
    """End the process at the third step of the second stage."""

    def on_step_end(self, args, state, control, **kwargs):
        if Path(str(args.output_dir)).name == "stage-2" and state.global_step == 3:
            os._exit(3)


def train(output: Path, kind: str) -> None:
    """Train for 9 steps of 8 rows in three stages; ``kind`` is full, lora, lora-killed or lora-resumed."""
    torch.set_num_threads(1)
    set_seed(0)
    model, tokenizer = tiny.patched("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    is_lora = kind != "full"
    settings: dict[str, Any] = {"weights": Method("lora", rank=4, dropout=0.1), "tail": "gist"} if is_lora else {}
    internalize(
        model,
        tokenizer,
        PROMPT,
        RECORDS,
        published_arguments(
            output,
            batch_size=8,
            max_steps=9,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            warmup_steps=0,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        ),
        schedule=Schedule((1.0, 0.5, 0.0)),
        shortener=Rewrites({0.5: "w50 w52 w54"}),
        max_examples=1,
        eval_records=RECORDS[:NUM_ASKED],
        max_new_tokens=4,
        resume=kind == "lora-resumed",
        callbacks=[DieAt()] if kind == "lora-killed" else [],
        **settings,
    )


def launch(output: Path, kind: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *launcher, "-m", "tests.internalize.test_processes", str(output), kind]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)


def answers(folder: Path, number: int) -> list[dict[str, str]]:
    text = (folder / f"stage-{number}" / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, "full")
    done = launch(two, "full")
    assert done.returncode == 0, done.stderr[-4000:]
    expected, found = load_internalized(one), load_internalized(two)
    for stage, other in zip(found.stages, expected.stages, strict=True):
        assert stage.train_loss == pytest.approx(other.train_loss, rel=1e-5)
        assert stage.metrics == other.metrics
        said = answers(two, stage.number)
        assert said == answers(one, stage.number)
        assert [line["input"] for line in said] == [record.input for record in RECORDS[:NUM_ASKED]]
    assert found.stages[-1].train_loss < found.stages[0].train_loss - 0.3
    assert found.settings["batch_size"] == expected.settings["batch_size"] == 8
    assert found.settings["steps"] == expected.settings["steps"]
    weights, reference = (gisting.load(folder)[0].state_dict() for folder in (two, one))
    for name, tensor in reference.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-3)  # Adam turns rounding into steps
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert not [*two.glob("stage-*/checkpoint-*"), *two.glob("stage-*/model")]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """With LoRA, whose gist token learns in the last stage only."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(whole, "lora").returncode == 0
    assert launch(killed, "lora-killed").returncode != 0
    assert (killed / "stage-2" / "checkpoint-2").is_dir()
    assert not (killed / "internalized.json").exists()
    done = launch(killed, "lora-resumed")
    assert done.returncode == 0, done.stderr[-4000:]
    name = "adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert answers(killed, 3) == answers(whole, 3)


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # threads of gloo that are still running at exit abort the process
