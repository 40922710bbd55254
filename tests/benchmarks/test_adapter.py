"""The recipe of the adapter that comes with the library: its data, its table, and the whole of it with a tiny model."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gisting
from benchmarks.__main__ import run
from benchmarks.adapter import data, on_top, recipe, values
from benchmarks.adapter.evaluation import instructions, system_prompts
from benchmarks.adapter.prompts import compose, compose_instruction, ordinary, passages
from benchmarks.adapter.recipe import adapter_table
from gisting.data.records import Record, save_records
from gisting.distillation import distill
from gisting.measure.rows import read_rows
from gisting.models import adapters
from tests import chats, tiny

ROOT = Path(__file__).resolve().parents[2]


def test_prompts_are_composed_alike_from_a_seed_and_held_out_ones_share_no_names() -> None:
    trained = compose(220, 0)
    assert len({one.prompt for one in trained}) == 220
    assert {one.prompt for one in trained} == {one.prompt for one in compose(220, 0)}
    assert {one.prompt for one in trained} != {one.prompt for one in compose(220, 1)}
    assert all(one.inputs for one in trained)
    assert not any("{" in text for one in trained for text in (one.prompt, *one.inputs))
    held_out = compose(110, 0, is_held_out=True)
    own = values.LAST_NAMES[-len(values.LAST_NAMES) // 5 :]
    assert not any(name in one.prompt for one in trained for name in own)
    assert any(name in one.prompt for one in held_out for name in own)
    assert len({one.prompt for one in compose_instruction(130, 0)}) == 130


def test_held_out_questions_are_not_trained_on() -> None:
    assert not set(ordinary(True)) & set(ordinary(False))
    assert not set(passages(True)) & set(passages(False))
    assert min(len(ordinary(True)), len(passages(True))) > 5


def test_the_held_out_system_prompts() -> None:
    found = system_prompts()
    assert len({one.prompt for one in found}) == 30
    assert all(len(one.inputs) == 6 for one in found)
    assert all(300 < len(one.prompt) < 2500 for one in found)
    assert not {one.prompt for one in found} & {one.prompt for one in compose(520, 0)}


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 30), (0.1, 3), (0.03, 2), (0.001, 2)])
def test_a_share_of_the_prompts_leaves_another_for_the_swapped_control(scale: float, expected: int) -> None:
    assert len(range(30)[:: recipe._every(scale, 30)]) == expected


def test_instructions_are_taken_evenly(tmp_path: Path) -> None:
    save_records([Record(f"do {n // 2}", f"{n}", "x") for n in range(40)], tmp_path / "a.jsonl")
    found = instructions(tmp_path / "a.jsonl", 5)
    assert [one.prompt for one in found] == ["do 0", "do 4", "do 8", "do 12", "do 16"]
    assert found[1].inputs == ["9"]


def row(name: str, k: int, **more: Any) -> dict[str, Any]:
    sources = {"none": 0.2, "swapped": 0.1, "gist": 0.04}
    kept = {"none": 0.8, "swapped": 0.6}
    agreement = {"none": 0.7, "swapped": 0.8, "gist": 0.9}
    return {
        "set": name,
        "num_gist_tokens": k,
        "num_prompts": 3,
        "kl": sources,
        "kept": kept,
        "agreement": agreement,
    } | more


def test_the_table_by_eye() -> None:
    rouge = {"none": 0.3, "swapped": 0.4, "gist": 0.55}
    device = {"device": "d", "threads": 1, "torch": "t", "transformers": "f"}
    run_row = {"set": "run", "seconds": {"answers": 90.0, "training": 3600}, "num_bytes": 9_820_000, "steps": 840}
    run_row |= {"num_records": 3470, "num_prompts": 995}
    rows = [row("system prompts", 8, rouge_l=rouge, **device), row("human instructions", 4), run_row]
    assert adapter_table(rows).splitlines() == [
        "| prompts | k | KL: no prompt | swapped | gist | kept: of no prompt | of swapped | agreement: no prompt | "
        "swapped | gist | ROUGE-L: no prompt | swapped | gist |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| 3 system prompts | 8 | 0.200 | 0.100 | 0.040 | 80 % | 60 % | 70 % | 80 % | 90 % | 0.30 | 0.40 | 0.55 |",
        "| 3 human instructions | 4 | 0.200 | 0.100 | 0.040 | 80 % | 60 % | 70 % | 80 % | 90 % | - | - | - |",
        "",
        "KL from the untouched model with the whole prompt, in nats a token, means over sampled answers; agreement of "
        "the likeliest tokens; ROUGE-L of greedy answers with those of the whole prompt (d, 1 threads, torch t, "
        "transformers f).",
        "Trained for 840 steps on 3,470 answers to 995 prompts, 9.8 MB; answers 2 min, training 60 min.",
    ]


def test_the_whole_recipe_with_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = chats.CHATS["chatml"].tokenizer()
    torch.manual_seed(0)
    model = tiny.model("llama", vocab_size=len(wrapped), max_position_embeddings=8192)
    model.save_pretrained(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "base")
    save_records(
        [Record("Say no.", "yes", "no", "self-instruct-seed"), Record("Title:", "x", "y", "t0:a")],
        tmp_path / "tasks.jsonl",
    )
    save_records([Record(f"do {n}", f"{n}", "x") for n in range(4)], tmp_path / "alpaca_plus_validation_unseen.jsonl")
    (tmp_path / "alpaca_plus_validation_unseen.json").write_text(
        json.dumps([{"instruction": f"do {n}", "input": str(n), "output": "x"} for n in range(4)]), encoding="utf-8"
    )
    words = (
        f"adapter --model {tmp_path}/base --directory {tmp_path}/run --output {tmp_path}/rows.jsonl --dtype float32 "
    )
    words += f"--tasks {tmp_path}/tasks.jsonl --alpaca-plus {tmp_path} --answers {tmp_path}/side.jsonl "
    words += f"--ship-to {tmp_path}/shipped --steps 2 --scale 0.06 --ks 1,2 --answer-with 2"
    monkeypatch.setattr(recipe, "SIZES", data.Sizes(20, 5, 10, 5, 2))
    assert run(words.split()) == 0
    printed = capsys.readouterr().out
    assert "human instructions are skipped: there is no" in printed
    assert "| 2 system prompts | 2 |" in printed
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [one["set"] for one in rows] == [*["system prompts"] * 2, *["unseen instructions"] * 2, "run"]
    assert [one["num_gist_tokens"] for one in rows[:-1]] == [1, 2, 1, 2]
    assert rows[0]["kept"].keys() == {"none", "swapped", "first"}
    assert rows[-1]["seconds"].keys() == {"prompts and inputs", "answers", "training", "evaluation"}
    side = [json.loads(line) for line in (tmp_path / "side.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(side) == 12
    assert side[0].keys() == {"prompt", "input", "full", "gist", "none"}
    held = load_file(tmp_path / "shipped" / "gist_adapter.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert {"README.md", "SOURCES.md", "gist.json"} <= {path.name for path in (tmp_path / "shipped").iterdir()}
    about = json.loads((tmp_path / "shipped" / "gist_adapter.json").read_text(encoding="utf-8"))
    assert (about["base"], about["num_gist_tokens"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", [1, 16])
    # A second run with the same seed and machine gives the same file; one in the same directory finds everything made.
    weights = (tmp_path / "shipped" / "gist_adapter.safetensors").read_bytes()
    assert run(words.replace(f"{tmp_path}/run", f"{tmp_path}/again").split()) == 0
    assert (tmp_path / "shipped" / "gist_adapter.safetensors").read_bytes() == weights
    # The settings are there before the adapter, so a run that is killed after either can go on.
    settings = tmp_path / "run" / "adapter" / "settings.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    assert kept["steps"] == 2
    assert settings.stat().st_mtime_ns <= (tmp_path / "run" / "adapter" / "gist_adapter.json").stat().st_mtime_ns
    # An adapter that is there is evaluated alike.
    again = (
        f"adapter --model {tmp_path}/base --directory {tmp_path}/run --output {tmp_path}/again.jsonl --dtype float32"
    )
    assert run(f"{again} --evaluate {tmp_path}/shipped --scale 0.06 --ks 1,2 --answer-with 0".split()) == 0
    for one, other in zip(read_rows(tmp_path / "again.jsonl"), rows, strict=False):
        assert one["kl"] == pytest.approx(other["kl"])
    base, tokenizer = gisting.load(tmp_path / "base", "chat")
    adapters.load(base, tmp_path / "shipped")
    assert len(gisting.compress(base, tokenizer, ["You are kind."], 2)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--part 0/3 --name a", "--part must be the number of a part and how many there are, such as 2/5, got '0/3'"),
        ("--part 1/3", "give each a --name"),
        ("--trained-k x", "such as 1:16"),
    ],
)
def test_options_that_cannot_be_read(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["adapter", "--directory", str(tmp_path), "--model", str(tmp_path), *words.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_adapter_in_the_package() -> None:
    folder = Path(gisting.__file__).parent / "adapters" / "smollm2-135m-instruct"
    about = adapters.read_about(folder)
    assert about is not None
    assert (about["base"], about["num_gist_tokens"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", [1, 16])
    assert (about["adapter"]["kind"], about["adapter"]["rank"]) == ("gist-lora", 16)
    file = folder / adapters.weights_name(about)
    assert file.stat().st_size <= 11_000_000
    held = load_file(file)
    assert len(held) == 30 * 7 * 2 + 1
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in held.values())
    for name in ("README.md", "SOURCES.md"):
        source = Path(__file__).resolve().parents[2] / "benchmarks" / "adapter" / name.replace("README", "CARD")
        assert (folder / name).read_text(encoding="utf-8") == source.read_text(encoding="utf-8")


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers five pairs in pieces of two, as one of two processes, by a clock whose sleep is a step."""
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(recipe, "time", SimpleNamespace(time=lambda: now, sleep=sleep))
    monkeypatch.setattr(recipe, "_PIECE", 2)
    wrapped = chats.CHATS["chatml"].tokenizer()
    model = tiny.model("llama", vocab_size=len(wrapped), max_position_embeddings=8192)
    tokenizer = gisting.GistTokenizer(wrapped, "chat")
    gisting.patch(model, tokenizer)
    pairs = [Record(f"say {n}", "now", "") for n in range(5)]

    def answer(number: int, end: float | None) -> list[str]:
        found = recipe.answered(
            model, tokenizer, pairs, tmp_path, batch_size=2, seed=0, part=(number, 2), end=end and now + end
        )
        return [one.instruction for one in found]

    return answer


def test_processes_share_the_answers(pieces: Any, tmp_path: Path) -> None:
    """Each answers its own pieces and waits for the others'; when the time is over, what is there is taken."""
    assert pieces(1, 5.0) == ["say 0", "say 1", "say 4"]
    assert pieces(2, None) == [f"say {n}" for n in range(5)]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == [f"answers-00{n}.jsonl" for n in range(3)]


@pytest.mark.parametrize(("number", "expected"), [(1, ["say 0", "say 1"]), (2, ["say 2", "say 3"])])
def test_a_process_answers_one_piece_when_the_time_is_over(pieces: Any, number: int, expected: list[str]) -> None:
    assert pieces(number, -1.0) == expected


def test_the_rate_falls_by_the_clock_and_the_training_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(recipe.time, "time", lambda: now)
    clock, control = recipe.ByTheClock(200.0), SimpleNamespace(should_training_stop=False)
    optimizer, arguments = SimpleNamespace(param_groups=[{"lr": 1.0}]), SimpleNamespace(learning_rate=2.0)
    clock.on_train_begin(arguments, None, control)
    rates = []
    for step, at in enumerate((100.0, 150.0, 199.9), 20):
        now = at
        clock.on_step_begin(arguments, SimpleNamespace(global_step=step), control, optimizer)
        clock.on_step_end(arguments, None, control)
        rates.append(round(optimizer.param_groups[0]["lr"], 3))
    assert rates == [2.0, 1.0, 0.0]
    assert not control.should_training_stop
    clock.on_step_begin(arguments, SimpleNamespace(global_step=0), control, optimizer)
    now = 200.0
    clock.on_step_end(arguments, None, control)
    assert control.should_training_stop


def test_what_the_rows_on_top_hold() -> None:
    """Every held-out prompt, and on most the fitted slots are nearer than the adapter's gist, though not on each."""
    rows = read_rows(ROOT / "docs" / "results" / "adapter_distil.jsonl")
    assert {(row["start"], row["num_gist_tokens"], row["wanted_steps"]) for row in rows} == {("matched", 8, 60)}
    assert sorted(row["prompt"] for row in rows) == list(range(30))
    for figure, least, factor in (("kl_mean", 0.65, 1.5), ("kl_median", 0.8, 1.5)):
        mean = {source: statistics.fmean(row[figure][source] for row in rows) for source in rows[0][figure]}
        kept = {source: 1 - mean[source] / mean[f"{source}_swapped"] for source in ("adapter", "start", "gist")}
        assert kept["start"] > max(least, factor * kept["adapter"])
        assert kept["gist"] > kept["start"]
        assert mean["gist"] < min(mean["first"], mean["none"]) / 3
    assert sum(row["kl_median"]["start"] < row["kl_median"]["adapter"] for row in rows) >= 27


@pytest.mark.parametrize("part", ["0/10", "3", "11/10", "a/b"])
def test_a_part_of_the_prompts_that_there_is_not(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["adapter-distil", "--model", str(tmp_path), "--part", part]) == 2
    assert f"--part must be the number of a part and how many there are, such as 2/5, got '{part}'" in " ".join(
        capsys.readouterr().err.split()
    )


def test_distilling_on_top_with_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = chats.CHATS["chatml"].tokenizer()
    model = tiny.model("llama", vocab_size=len(wrapped), max_position_embeddings=8192)
    model.save_pretrained(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "base")
    loaded, tokenizer = gisting.load(tmp_path / "base", "chat")
    adapters.attach(loaded, adapters.Adapter("gist-lora", 2, rank=2))
    loaded.config.gist = {**loaded.config.gist, "num_gist_tokens": [1, 2]}
    adapters.save(loaded, tokenizer, tmp_path / "adapter")

    def with_questions(model: Any, tokenizer: Any, prompt: str, inputs: None, *more: Any, **settings: Any) -> Any:
        return distill(model, tokenizer, prompt, ordinary(False)[:4], *more, **settings)  # It cannot write its own.

    monkeypatch.setattr(on_top, "distill", with_questions)
    words = f"adapter-distil --model {tmp_path}/base --adapter {tmp_path}/adapter --output {tmp_path}/rows.jsonl -k 2 "
    words += "--part 3/15 --starts gist,matched --steps 2 --num-answers 4 --dtype float32"
    assert run(words.split()) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(one["prompt"], one["start"]) for one in rows] == [
        (17, "gist"), (17, "matched"), (2, "gist"), (2, "matched"),
    ]  # fmt: skip
    for one in rows:
        gists = {"adapter", "start", "gist"}
        assert one["kl_mean"].keys() == {"none", "first", *gists, *(f"{name}_swapped" for name in gists)}
        assert one["kl_mean"]["start"] != one["kl_mean"]["gist"]
        assert one["kl_mean"]["adapter"] != one["kl_mean"]["adapter_swapped"]
    assert rows[0]["kl_mean"]["adapter"] == rows[1]["kl_mean"]["adapter"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:4] for line in printed if line.startswith("| gist")] == [[" gist ", " 2 ", " 2 "]]
