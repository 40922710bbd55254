"""Training from prompts alone: the model's own answers, sampled once, and a gist that learns to give the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gisting import GistError, GistTokenizer
from gisting.cli import app
from gisting.data.prompts import load_inputs, load_prompts
from gisting.data.records import load_records
from gisting.errors import RecordError
from gisting.generation.sampling import sample_answers
from gisting.train import self_distil as module
from gisting.train.objective import Objective
from gisting.train.recipe import load_recipe
from gisting.train.self_distil import pair_up, self_distil
from gisting.train.settings import Recipe
from tests import tiny
from tests.chats import CHATS, WEATHER

PROMPTS = [tiny.words(9, 1), tiny.words(4, 2), tiny.words(13, 3)]
INPUTS = ["w1 w2", "w3 w4 w5", "w7", "w8 w9"]
PAIRS = pair_up(PROMPTS, INPUTS)
SHORT: dict[str, Any] = {"max_new_tokens": 5, "batch_size": 2}


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_every_prompt_gets_every_input_or_some_of_them() -> None:
    assert pair_up(["a", "b", "a"], ["x", "y", "y"]) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    drawn = pair_up(PROMPTS, INPUTS, inputs_per_prompt=2, seed=1)
    assert [prompt for prompt, _ in drawn] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert len(set(drawn)) == 6
    assert drawn == pair_up(PROMPTS, INPUTS, inputs_per_prompt=2, seed=1)
    assert drawn != pair_up(PROMPTS, INPUTS, inputs_per_prompt=2, seed=2)


@pytest.mark.parametrize(
    ("prompts", "inputs", "number", "message"),
    [
        ([], ["x"], None, "prompts is empty"),
        (["a"], [], None, "inputs is empty"),
        (["a", " "], ["x"], None, r"prompts\[1\] is empty"),
        (["a"], ["x", "y"], 3, "inputs_per_prompt must be between 1 and the number of different inputs, 2, got 3"),
        (["a"], ["x", "y"], 0, "inputs_per_prompt must be between 1"),
    ],
)
def test_what_cannot_be_paired(prompts: list[str], inputs: list[str], number: int | None, message: str) -> None:
    with pytest.raises(GistError, match=message):
        pair_up(prompts, inputs, inputs_per_prompt=number)


def test_prompts_of_a_directory_are_whole_files(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("two\nlines\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "notes.pdf").write_bytes(b"\xff")
    found = load_prompts(tmp_path)
    assert [(one.name, one.prompt) for one in found] == [("a", "one"), ("b", "two\nlines")]
    (tmp_path / "c.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"c\.txt must be an object with a non-empty string 'prompt'|c\.txt is empty"):
        load_prompts(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(RecordError, match=r"none contains no prompts; write each into a file named \.txt"):
        load_prompts(tmp_path / "none")


def test_inputs_are_lines_or_the_inputs_of_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\none\n", encoding="utf-8")
    assert load_inputs(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"instruction": "x", "input": "one", "output": "y"}\n"two"\n', encoding="utf-8")
    assert load_inputs(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"input": "one"}\n{"question": "two"}\n', encoding="utf-8")
    with pytest.raises(RecordError, match=r"b\.jsonl, line 2 must be a text, or an object with a string 'input'"):
        load_inputs(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"c\.txt contains no inputs; write one per line"):
        load_inputs(tmp_path / "c.txt")
    with pytest.raises(RecordError, match=r"one input per line"):
        load_inputs(tmp_path / "c.pdf")


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_records_are_the_sampled_answers(name: str, tmp_path: Path) -> None:
    model, tokenizer = tiny.patched(name)
    done: list[int] = []
    path = tmp_path / "new" / "answers.jsonl"
    records = self_distil(model, tokenizer, PAIRS, path, seed=3, progress=done.append, **SHORT)
    expected = sample_answers(model, tokenizer, PAIRS, max_new_tokens=5, seed=3)
    assert [(one.instruction, one.input, one.output) for one in records] == [
        (one.prompt, one.input, one.output) for one in expected
    ]
    assert load_records(path) == records
    assert sum(done) == len(PAIRS)


def test_a_killed_run_goes_on_and_a_complete_one_samples_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.patched("llama")
    path = tmp_path / "answers.jsonl"
    whole = self_distil(model, tokenizer, PAIRS, path, **SHORT)
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # killed in the middle of the sixth line
    asked: list[int] = []
    right = module.sample_answers
    monkeypatch.setattr(
        module,
        "sample_answers",
        lambda model, tokenizer, pairs, **k: asked.append(len(pairs)) or right(model, tokenizer, pairs, **k),
    )
    done: list[int] = []
    assert self_distil(model, tokenizer, PAIRS, path, progress=done.append, **SHORT) == whole
    assert path.read_bytes() == text
    assert sum(asked) == len(PAIRS) - 5
    assert sum(done) == len(PAIRS)
    asked.clear()
    assert self_distil(model, tokenizer, PAIRS, path, **SHORT) == whole
    assert not asked


def test_answers_of_another_run_are_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    path = tmp_path / "answers.jsonl"
    self_distil(model, tokenizer, PAIRS, path, **SHORT)
    with pytest.raises(GistError, match=r"has answers of another run \(seed 0 instead of 1\); remove it and answers"):
        self_distil(model, tokenizer, PAIRS, path, seed=1, **SHORT)
    with pytest.raises(GistError, match=r"another run \(pairs .*, num_pairs 12 instead of 11\)"):
        self_distil(model, tokenizer, PAIRS[1:], path, **SHORT)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(GistError, match="another run \\(model 'llama/"):
        self_distil(model, tokenizer, PAIRS, path, **SHORT)
    (tmp_path / "answers.jsonl.settings.json").unlink()
    with pytest.raises(GistError, match="was not written by self_distil"):
        self_distil(model, tokenizer, PAIRS, path, **SHORT)


def test_a_repeated_pair_counts_once(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    assert len(self_distil(model, tokenizer, [*PAIRS, *PAIRS], tmp_path / "a.jsonl", **SHORT)) == len(PAIRS)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model, tokenizer = tiny.patched("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts").mkdir()
    for place, prompt in enumerate(PROMPTS):
        (tmp_path / "prompts" / f"{place}.txt").write_text(prompt, encoding="utf-8")
    (tmp_path / "inputs.txt").write_text("\n".join(INPUTS), encoding="utf-8")
    return tmp_path


def train(directory: Path, output: str, *more: str) -> Any:
    command = ["train", str(directory / "model"), "--prompts", str(directory / "prompts")]
    command += ["--inputs", str(directory / "inputs.txt"), "--method", "gist-lora", "-k", "4", "--answer-tokens", "6"]
    command += ["--max-length", "64", "--batch-size", "6", "--output", str(directory / output), "--json", *more]
    return CliRunner().invoke(app, command)


def test_three_prompts_alone_teach_a_gist_to_answer_as_the_prompt_does(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[dict[str, float]] = []
    from gisting.train.objective import ObjectiveTrainer

    right = ObjectiveTrainer.log
    monkeypatch.setattr(
        ObjectiveTrainer,
        "log",
        lambda self, logs_, *args: (right(self, logs_, *args), logs.append(self.state.log_history[-1]))[0],
    )
    more = ("--max-steps", "60", "--learning-rate", "1e-2", "--logging-steps", "10", "--lr-scheduler-type", "constant")
    done = train(model_dir, "out", *more)
    assert done.exit_code == 0, done.output
    losses = [row["distillation_loss"] for row in logs if "distillation_loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert [row["loss"] for row in logs if "loss" in row] == pytest.approx(losses, rel=1e-3)
    records = load_records(model_dir / "out" / "answers.jsonl")
    assert len(records) == len(PAIRS)
    written = load_recipe(model_dir / "out" / "recipe.yaml")
    assert (written.prompts, written.data, written.language_model, written.distillation) == (
        str(model_dir / "prompts"), None, None, None,
    )  # fmt: skip
    assert written.weights == {"language_model": 0.0, "distillation": 1.0, "reconstruction": 0.0}


def test_a_run_that_ended_after_its_answers_goes_on_with_them(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--max-steps", "3", "--learning-rate", "1e-2")
    assert train(model_dir, "out", *more).exit_code == 0
    weights = (model_dir / "out" / "gist_adapter.safetensors").read_bytes()
    refused = train(model_dir, "out", *more)
    assert refused.exit_code == 1
    assert f"another run (gist-lora of {model_dir / 'model'} on {model_dir / 'prompts'})" in str(refused.exception)
    for path in (model_dir / "out").iterdir():  # what a run leaves that was killed before its first checkpoint
        if path.name not in ("recipe.yaml", "answers.jsonl", "answers.jsonl.settings.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(module, "sample_answers", lambda *args, **kwargs: pytest.fail("sampled again"))
        assert train(model_dir, "out", *more).exit_code == 0
    assert (model_dir / "out" / "gist_adapter.safetensors").read_bytes() == weights
    shutil.rmtree(model_dir / "out")
    assert train(model_dir, "out", *more).exit_code == 0
    assert (model_dir / "out" / "gist_adapter.safetensors").read_bytes() == weights


def test_records_go_to_json_lines(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match=r"must end in one of \.jsonl, \.ndjson, got .*answers\.json; rename it"):
        self_distil(model, tokenizer, PAIRS, tmp_path / "answers.json", **SHORT)
    assert not [*tmp_path.iterdir()]


def test_answers_that_were_cut_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny.patched("llama")
    self_distil(model, tokenizer, PAIRS, tmp_path / "answers.jsonl", **SHORT)
    assert re.search(rf"\d+ of {len(PAIRS)} answers were cut at 5 tokens", caplog.text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "p", "inputs": "i", "data": "d"}, "prompts and data cannot be combined"),
        ({"prompts": "p"}, "prompts and inputs belong together, got no inputs"),
        ({"inputs": "i"}, "prompts and inputs belong together, got no prompts"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GistError, match=message):
        Recipe(model="m", **settings)


def test_the_default_losses_depend_on_where_answers_come_from() -> None:
    with_data = Recipe(data="d").weights
    assert with_data == {"language_model": 1.0, "distillation": 0.0, "reconstruction": 0.0}
    for method, language_model in (("gist-lora", 0.0), ("embeddings", 0.0), ("lora", 1.0), ("full", 1.0)):
        found = Recipe(prompts="p", inputs="i", method=method).weights
        assert found == {"language_model": language_model, "distillation": 1.0, "reconstruction": 0.0}
    given = Recipe(prompts="p", inputs="i", language_model=0.5, distillation=2.0).weights
    assert given == {"language_model": 0.5, "distillation": 2.0, "reconstruction": 0.0}


def test_an_objective_needs_a_weight() -> None:
    with pytest.raises(GistError, match="are all 0, so nothing would be learned"):
        Objective(language_model=0.0)
    with pytest.raises(GistError, match="language_model must be a weight of at least 0, got -1"):
        Objective(language_model=-1)
    assert not Objective(language_model=0.5).is_plain


# -- gisting data self-distil ------------------------------------------------------------------------------------------


def test_the_command_writes_records_once(model_dir: Path, run: Any) -> None:
    command = f"data self-distil {model_dir}/model --prompts {model_dir}/prompts --inputs {model_dir}/inputs.txt "
    command += f"--output {model_dir}/records.jsonl --inputs-per-prompt 2 --max-new-tokens 5"
    done = run(*command.split(), "--json")
    assert done.code == 0, done.err
    file = str(model_dir / "records.jsonl")
    assert [json.loads(line) for line in done.out.splitlines()] == [{"num_records": 6, "num_prompts": 3, "file": file}]
    records = load_records(model_dir / "records.jsonl")
    assert {one.instruction for one in records} == set(PROMPTS)
    assert {one.source for one in records} == {"self-distilled"}
    text = (model_dir / "records.jsonl").read_bytes()
    done = run(*command.split())
    assert done.out.split() == f"6 answers to 3 prompts in {file}".split()
    assert (model_dir / "records.jsonl").read_bytes() == text
    done = run(*command.split(), "--seed", "1")
    assert done.code == 1
    assert "has answers of another run" in done.err


def test_prompts_with_tools_are_answered_and_trained_on(tmp_path: Path, run: Any) -> None:
    """Both commands lay tools out as the tokenizer's chat template does, as `compress --prompts` does."""
    wrapped = CHATS["qwen2.5"].tokenizer()
    tiny.model("llama", vocab_size=len(wrapped), max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    wrapped.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "be brief", "tools": [WEATHER]}), encoding="utf-8")
    (tmp_path / "inputs.txt").write_text("is it cold\nis it warm", encoding="utf-8")
    expected = {GistTokenizer(wrapped, "chat").prompt_with_tools("be brief", [WEATHER])}
    files = f"{tmp_path}/model --prompts {tmp_path}/prompts.jsonl --inputs {tmp_path}/inputs.txt"
    done = run(*f"data self-distil {files} --output {tmp_path}/records.jsonl --max-new-tokens 3".split())
    assert done.code == 0, done.err
    assert {one.instruction for one in load_records(tmp_path / "records.jsonl")} == expected
    words = f"train {files} --output {tmp_path}/out --method gist-lora --max-steps 1 --batch-size 2 --answer-tokens 3"
    done = run(*words.split(), "--max-length", "4096")
    assert done.code == 0, done.err
    assert {one.instruction for one in load_records(tmp_path / "out" / "answers.jsonl")} == expected
