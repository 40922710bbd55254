"""The pages of docs/ as written: every command runs and every Python line does what it can without a GPU."""

from __future__ import annotations

import copy
import shlex
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import garbage, shell
from tests.test_repository import fences_in

ROOT = Path(__file__).resolve().parents[1]


def fences(page: str, language: str) -> list[str]:
    found = fences_in((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [fence.text for fence in found if fence.language == language]


@pytest.fixture
def workplace(demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `gisting demo` has run."""
    shutil.copytree(demo_checkpoint, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_all(page: str, names: dict[str, Any], *, skip: str | None = None) -> dict[str, Any]:
    for number, text in enumerate(fences(page, "python")):
        if skip is None or skip not in text:
            exec(compile(text, f"docs/{page}, python {number}", "exec"), names)
    return names


def run_commands(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (commands,) = fences(page, "bash")
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        assert program == "gisting"
        done = shell.call(monkeypatch, capsys, *words)
        assert done.code == 0, f"{line}\n{done.err}"


def test_stores(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "answer plainly", "name": "plainly"}\n', encoding="utf-8")
    run_commands("stores.md", monkeypatch, capsys)
    names = run_all("stores.md", {})
    assert [entry.name for entry in names["store"].list()] == ["backwards", "capitals", "plainly", "reverse"]
    assert names["chain"].num_gist_tokens == [4]
    assert len(names["copy"]) == 4
    assert "license: apache-2.0" in Path("shared", "README.md").read_text(encoding="utf-8")


def test_training(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "recipes", "recipes")
    run_commands("training.md", monkeypatch, capsys)
    names = run_all("training.md", {})
    assert names["metrics"]["train_loss"] > 0
    made = {path.name for path in Path("runs").iterdir()}
    assert made == {"demo", "any-k", "packed", "distilled", "adapter", "recipe", "more"}


def test_internalisation(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "recipes", "recipes")
    with garbage.frozen():
        names = run_all("internalisation.md", {})
        run_commands("internalisation.md", monkeypatch, capsys)
    assert [stage.num_examples for stage in names["result"].stages] == [2, 1, 0]
    made = {path.name for path in Path("runs").iterdir()}
    assert made == {"demo", "reverse", "in-stages", "control", "by-recipe", "rewritten", "report.md"}
    assert "| full prompt behind a prefix cache |" in Path("runs/report.md").read_text(encoding="utf-8")


def test_generation(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextIteratorStreamer, pipeline

    import gisting

    torch.manual_seed(0)
    model, _ = gisting.load("runs/demo")
    names = {
        "prompts": ["please reverse the letters", "answer plainly"],
        "inputs": ["a b c", "d e"],
        "next_inputs": ["f", "g h"],
        "text": "a b c d",
        "small": gisting.unpatch(copy.deepcopy(model)),
        "TextIteratorStreamer": TextIteratorStreamer,
        "Thread": threading.Thread,
        "pipeline": pipeline,
        "torch": torch,
    }
    run_all("generation.md", names, skip='"cuda"')
    assert len(names["turn"].texts) == 2
    capsys.readouterr()


def test_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The two tables of the page are what its commands print."""
    monkeypatch.chdir(tmp_path)
    (config,) = fences("costs.md", "json")
    Path("llama-7b.json").write_text(config, encoding="utf-8")
    (commands,) = fences("costs.md", "bash")
    for command, expected in zip(commands.splitlines(), fences("costs.md", "text"), strict=True):
        done = shell.call(monkeypatch, capsys, *shlex.split(command)[1:])
        assert (done.code, done.err) == (0, "")
        assert [line.rstrip() for line in done.out.splitlines()] == expected.splitlines()
    names = run_all("costs.md", {})
    assert names["gist"].saved_to_first_token(names["none"]) > 0.4
    assert len(names["curve"]) == 999
    capsys.readouterr()
