"""What ``gisting train`` leaves: the base's dtype on disk, nothing overwritten, a card with the facts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import TrainerCallback

import gisting
from gisting import GistError, Record
from gisting.data.records import save_records
from gisting.models.weights import to_dtype
from gisting.train.finetune import finetune, published_arguments
from gisting.train.recipe import Recipe, train_recipe
from tests import shell, tiny

RECORDS = [Record(f"w{number} w{number + 1}", "w50", tiny.words(1 + number % 4, number)) for number in range(8)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny patched bfloat16 checkpoint, in a folder with records."""
    model, tokenizer = tiny.patched("llama", attention_dropout=0.1)
    to_dtype(model, torch.bfloat16)
    gisting.save_pretrained(model, tokenizer, tmp_path / "base")
    save_records(RECORDS, tmp_path / "train.jsonl")
    return tmp_path / "base"


def recipe(base: Path, **changes: Any) -> Recipe:
    settings = {
        "model": str(base),
        "data": str(base.parent / "train.jsonl"),
        "num_gist_tokens": 2,
        "max_steps": 2,
        "save_steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
    }
    return Recipe(**{**settings, **changes})


def dtypes(path: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(path).values()}


# -- dtype -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "on_disk"),
    [
        ({}, torch.bfloat16),
        ({"save_dtype": "float32"}, torch.float32),
        ({"save_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "save_dtype": "float32"}, torch.float32),
    ],
    ids=["base", "float32", "float16", "trained in bfloat16"],
)
def test_the_dtype_on_disk(tmp_path: Path, base: Path, changes: dict[str, Any], on_disk: torch.dtype) -> None:
    """Weights are float32 while they are trained, in the base's dtype on disk; the returned model is what is there."""
    trained = train_recipe(recipe(base, **changes), tmp_path / "out")
    assert dtypes(tmp_path / "out" / "model.safetensors") == {on_disk}
    trained_in = {torch.bfloat16} if changes.get("dtype") == "bfloat16" else {torch.float32}
    assert dtypes(tmp_path / "out" / "checkpoint-2" / "model.safetensors") == trained_in
    loaded, _ = gisting.load(tmp_path / "out")
    assert loaded.dtype == on_disk
    state = trained.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    # Rotary frequencies are buffers, which 16 bits would spoil.
    assert {buffer.dtype for name, buffer in trained.model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_resumed_run_goes_on_in_float32(tmp_path: Path, base: Path) -> None:
    class Killed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    longer = recipe(base, max_steps=4)
    whole = train_recipe(longer, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_recipe(longer, tmp_path / "parts", callbacks=[Killed()])
    again = train_recipe(longer, tmp_path / "parts", resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_an_adapter_is_float32_on_disk(tmp_path: Path, base: Path) -> None:
    train_recipe(recipe(base, method="gist-lora"), tmp_path / "out")
    assert dtypes(tmp_path / "out" / "gist_adapter.safetensors") == {torch.float32}
    with pytest.raises(GistError, match=r"^save_dtype must be None for an adapter, which is float32 on disk, got 'bfl"):
        train_recipe(recipe(base, method="gist-lora", save_dtype="bfloat16"), tmp_path / "other")


# -- nothing is overwritten --------------------------------------------------------------------------------------------


def _run(folder: Path, base: Path) -> None:
    train_recipe(recipe(base, method="gist-lora"), folder)


def _file(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, base: Path) -> None:
        folder.mkdir()
        (folder / name).write_text("{}", encoding="utf-8")

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            _run,
            r"out holds another run \(gist-lora of \S+/base on \S+/train.jsonl\), which would be "
            r"overwritten; continue it with resume \(--resume\), give another output directory, or remove this one",
        ),
        (_file("config.json"), "out holds a checkpoint, which would be overwritten; give another output directory, or"),
        (_file("gist_adapter.json"), "out holds an adapter, which would be"),
        (_file("index.sqlite"), "out holds a store of compressed prompts, which would be"),
        (_file("settings.json"), "out holds an internalisation, which would be"),
        (_file("thesis.tex"), r"out holds other files \(thesis.tex\), which would be"),
        (lambda folder, base: folder.write_text(""), r"must be a directory, but \S+/out is a file; give another path"),
    ],
    ids=["run", "checkpoint", "adapter", "store", "internalisation", "other files", "file"],
)
def test_what_is_there_is_not_overwritten(
    tmp_path: Path, base: Path, make: Callable[[Path, Path], None], said: str
) -> None:
    make(tmp_path / "out", base)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(GistError, match=said):
        train_recipe(recipe(base), tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_base_is_not_overwritten_by_its_own_training(base: Path) -> None:
    with pytest.raises(GistError, match=r"base holds a checkpoint, which would be overwritten"):
        train_recipe(recipe(base), base)


def test_a_run_that_ended_before_its_first_checkpoint_can_be_started_again(tmp_path: Path, base: Path) -> None:
    (tmp_path / "out").mkdir()
    recipe(base, seed=3).save(tmp_path / "out" / "recipe.yaml")
    train_recipe(recipe(base), tmp_path / "out")
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == recipe(base)


def test_a_run_is_resumed_with_its_own_settings(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_recipe(recipe(base), tmp_path / "out")
    save_records(RECORDS, tmp_path / "other.jsonl")
    for changes, said in (
        ({"method": "lora"}, "method was full, is lora"),
        ({"num_gist_tokens": "1:2"}, "num_gist_tokens was 2, is 1:2"),
        ({"data": str(tmp_path / "other.jsonl")}, r"data was \S+/train.jsonl, is \S+/other.jsonl"),
        ({"model": "owner/name"}, r"model was \S+/base, is owner/name"),
        ({"seed": 7, "learning_rate": 1.0}, "learning_rate was 0.01, is 1.0; seed was 42, is 7"),
    ):
        with pytest.raises(GistError, match=f"with other settings: .*{said}.*; resume with those, or train into anoth"):
            train_recipe(recipe(base, **changes), tmp_path / "out", resume=True)
    # The same places under other names, and settings that do not change what is learned.
    monkeypatch.chdir(tmp_path)
    train_recipe(recipe(Path("base"), data="train.jsonl", max_steps=3, logging_steps=1), "out", resume=True)


def test_finetune_does_not_resume_another_run(tmp_path: Path) -> None:
    """``Trainer`` would leave the parameters that the checkpoint lacks as they are, and so start again."""

    def run(output: str, resume: bool = False, template: str = "alpaca", **settings: Any) -> None:
        model, tokenizer = tiny.patched("llama", template)
        arguments = published_arguments(
            tmp_path / output, batch_size=4, max_steps=2, save_steps=2, disable_tqdm=True, save_strategy="steps"
        )
        finetune(model, tokenizer, RECORDS, arguments, resume=resume, **{"num_gist_tokens": 2, **settings})

    run("full")
    run("full", resume=True)
    with pytest.raises(GistError, match=r"checkpoint-2 was written by a run with other settings: method was full, is"):
        run("full", resume=True, method="lora")
    with pytest.raises(GistError, match=r": num_gist_tokens was 2, is 1:3; resume with those"):
        run("full", resume=True, num_gist_tokens=(1, 3))
    with pytest.raises(GistError, match=r": template was alpaca, is plain; "):
        run("full", resume=True, template="plain")
    run("adapter", method="gist-lora")
    with pytest.raises(GistError, match=r": method was gist-lora, is embeddings"):
        run("adapter", resume=True, method="embeddings")


# -- the card ----------------------------------------------------------------------------------------------------------


def rows_of(text: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].replace("\\", ""): cells[1].replace("\\", "") for cells in lines if len(cells) == 2}


@pytest.mark.parametrize("method", ["full", "gist-lora"])
def test_the_card_says_what_was_trained_from_what(
    tmp_path: Path, base: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_records(RECORDS[:3], tmp_path / "held-out.jsonl")
    words = ["train", str(base), "--data", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "held-out.jsonl")]
    words += ["--output", str(tmp_path / "out"), "-k", "2", "--max-steps", "1", "--batch-size", "4", "--method", method]
    done = shell.call(monkeypatch, capsys, *words, "--max-new-tokens", "3", "--json")
    assert done.code == 0, done.err
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    found = rows_of(text)
    assert {name: found[name] for name in ("base", "data", "method", "max_steps", "num_gist_tokens", "eval")} == {
        "base": "base",
        "data": "train.jsonl",
        "method": method,
        "max_steps": "1",
        "num_gist_tokens": "2",
        "eval": "held-out.jsonl",
    }
    assert re.fullmatch(r"gisting \S+, torch \S+, transformers \S+", found["versions"])
    assert re.fullmatch(r"[\d,]+ of [\d,]+", found["trained parameters"])
    assert float(found["train_loss"]) == pytest.approx(json.loads(done.out)["metrics"]["train_loss"], rel=1e-5)
    assert "On held-out.jsonl:" in text
    assert re.search(r"^\| 2 \| negative \| 3 \| 0 \|", text, re.M)
    assert str(tmp_path) not in text, "the path is this computer's own"
    assert ("acts at gist tokens only" in text) == (method == "gist-lora")
    measured = [(one.dataset_name, one.metric_type) for one in ModelCard(text).data.eval_results or []]  # pyright: ignore[reportAttributeAccessIssue]
    assert {("train.jsonl", "train_loss"), ("held-out.jsonl", "exact_match")} <= set(measured)
