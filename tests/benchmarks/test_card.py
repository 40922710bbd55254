"""The benchmark ``card`` as far as a CPU can run it: its parts once, and what happens where one of them fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks import card
from gisting.data.collate import IGNORED
from gisting.data.packing import GistPackingCollator, group_by_instruction
from gisting.data.tasks import task_tokenizer
from gisting.measure.rows import read_rows
from tests.kernels.conftest import requires_interpreter

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "card", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_training_gives_a_row_for_each_way(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="gist-lora needs peft: pip install 'gist-tokens[train]'")
    assert card.training(tmp_path, CPU, card.SMOKE, 60.0) == 0
    plain, distilled = read_rows(tmp_path / "training.jsonl")
    assert [(row["name"], row["method"]) for row in (plain, distilled)] == [
        ("plain", "full"),
        ("distillation", "gist-lora"),
    ]
    for row in (plain, distilled):
        assert (row["num_steps"], row["num_rows"], row["smoke"]) == (card.SMOKE.steps, 4, True)
        assert row["num_labels"] == 4 * 4 * (card.SMOKE.answer + 1)  # groups, answers to each, ids with the end
        assert row["num_tokens"] == row["num_rows"] * row["row_length"]  # of one length, so there is no padding
        assert row["tokens_per_s"] * row["step_ms"] == pytest.approx(1000 * row["num_tokens"])
        assert row["collate_ms"] > 0
        assert {"device", "torch", "transformers", "commit"} <= row.keys()


def test_a_step_on_a_card_has_the_size_of_real_instructions() -> None:
    """Rows of almost 1,024 ids, some 10,000 a step, a fifth of them with labels (32 groups, as measured)."""
    sizes = card.Sizes()
    groups = group_by_instruction(card.make_records(sizes, sizes.groups), 4)
    collate = GistPackingCollator(task_tokenizer(), card.NUM_GIST_TOKENS, max_length=sizes.row, pack_length=sizes.row)
    batch = collate(groups)
    assert 1000 < batch["input_ids"].shape[1] <= 1024
    first, end = batch["attention_mask"][:, 0].unbind(1)
    num_tokens = int((end > first).sum())
    assert 9_000 < num_tokens < 12_000
    assert 0.15 < int((batch["labels"] != IGNORED).sum()) / num_tokens < 0.25


def test_inference_gives_a_row_for_each_condition_and_number(tmp_path: Path) -> None:
    assert card.inference(tmp_path, CPU, card.SMOKE, 60.0) == 0
    rows = read_rows(tmp_path / "inference.jsonl")
    assert [(row["condition"], row["batch"]) for row in rows] == [
        (condition, batch) for condition in ("gist", "positive") for batch in (1, 8)
    ]
    for row in rows:
        assert row["tokens_per_s"] * row["generate_ms"] == pytest.approx(1000 * row["batch"] * row["new_tokens"])
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'gist-tokens[eval]'")
    card.draw(tmp_path)
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")


def test_a_way_that_fails_is_reported_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(
        records: Any, device: Any, sizes: Any, end: float, *, method: str, distillation: float, is_compiled: bool
    ) -> dict[str, Any]:
        if method == "full":
            raise RuntimeError("out of memory")
        return {"tokens_per_s": 5.0}

    monkeypatch.setattr(card, "train", train)
    assert card.training(tmp_path, CPU, card.SMOKE, 60.0) == 1
    assert [row["name"] for row in read_rows(tmp_path / "training.jsonl")] == ["distillation"]
    assert "training, plain: failed, RuntimeError: out of memory" in capsys.readouterr().out


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        pytest.param({}, ["kernels", "training", "inference"], id="all-is-well"),
        pytest.param({"training": 1}, ["kernels", "training", "inference"], id="goes-on-after-a-failure"),
        pytest.param({"training": 3}, ["kernels", "training", "inference"], id="only-kernels-have-a-gate"),
        pytest.param({"kernels": 1}, ["kernels", "training", "inference"], id="kernels-failed-or-cut-off"),
        pytest.param({"kernels": -9}, ["kernels", "training", "inference"], id="kernels-killed"),
        pytest.param({"kernels": 3}, ["kernels"], id="red-gate"),
    ],
)
def test_what_runs_after_a_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: dict[str, int],
    expected: list[str],
) -> None:
    ran: list[str] = []
    seconds: list[float] = []

    def run_part(part: str, directory: Path, time_s: float, *, is_smoke: bool) -> int:
        ran.append(part)
        seconds.append(time_s)
        return failing.get(part, 0)

    monkeypatch.setattr(card, "run_part", run_part)
    monkeypatch.setattr(card, "draw", lambda directory: None)
    assert card.main(directory=tmp_path, seconds=100, smoke=True) == bool(failing)
    assert ran == expected
    assert ("the kernels may be wrong on this device" in capsys.readouterr().out) == (failing == {"kernels": 3})
    # Time that a part does not use goes to the next ones; the last one has all that is left.
    assert seconds[0] == pytest.approx(50, abs=1)
    assert seconds[-1] == pytest.approx(100, abs=1) or len(seconds) == 1


def test_tiles_are_timed_before_the_kernels_and_only_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **options: object) -> None:
            commands.append(command[3:])

        def wait(self, seconds: float) -> int:
            return 0

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(card.subprocess, "Popen", Process)
    monkeypatch.setattr(card, "draw", lambda directory: None)
    assert card.run_parts(["tiles", "kernels"], tmp_path, 100, is_smoke=False) == 0
    assert [command[0] for command in commands] == ["tune", "kernels"]
    assert commands[0][1:4] == ["--bits", "16", "--seconds"]
    assert float(commands[0][4]) == pytest.approx(45, abs=1)
    assert "tiles" not in card.PARTS


def test_the_status_of_a_failed_gate_is_the_one_of_the_benchmark() -> None:
    source = (ROOT / "benchmarks" / "kernels" / "attention.py").read_text()
    assert f"\nRED_GATE = {card.RED_GATE}\n" in source


def test_kernels_that_are_cut_off_while_they_compile_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of each part runs a command that takes long and writes nothing."""
    start = subprocess.Popen
    monkeypatch.setattr(
        card.subprocess, "Popen", lambda command, **options: start(["sleep", "60"], **options)
    )  # fmt: skip
    assert card.main(directory=tmp_path, seconds=0.6, smoke=True) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if "cut off after" in line] == ["kernels", "training", "inference"]


@pytest.mark.slow
def test_a_part_that_is_cut_off_is_reported(tmp_path: Path) -> None:
    done = run("--smoke", "--only", "inference", "--seconds", "0.2", "--directory", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "inference: cut off after 0 s; the rows written so far are kept" in done.stdout
    assert "inference failed; rows in" in done.stdout


def test_without_a_card_there_is_a_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.run(["card", "--directory", str(tmp_path / "rows")]) == 2
    line = "no CUDA device: nothing was measured (--smoke runs the code on a CPU)\n"
    assert capsys.readouterr() == ("", line)
    assert not (tmp_path / "rows").exists()


def test_a_dry_run_writes_no_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.run(["card", "--smoke", "--directory", "docs/results/card"]) == 2
    assert "--smoke measures nothing, so it does not write to docs/results" in capsys.readouterr().err


@pytest.mark.slow
@requires_interpreter
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install 'gist-tokens[kernels]'"
)
def test_the_whole_dry_run(tmp_path: Path) -> None:
    done = run("--smoke", "--directory", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {
        "kernels.jsonl", "kernels.png", "training.jsonl", "inference.jsonl", "card.png",
    }  # fmt: skip
    assert done.stdout.splitlines()[-1].endswith(f"s, no part failed; rows in {tmp_path}")
