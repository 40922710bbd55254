"""`gisting demo` and `gisting try` with a tiny chat model, through the code that runs the real one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import gisting
from gisting.demo import museum
from gisting.demo.base_model import HUB_NAME, fetch, is_base_model
from gisting.demo.museum import run_museum, shipped_adapter
from gisting.demo.trial import Question, read_questions, run_trial
from gisting.errors import GistError
from gisting.models import adapters
from gisting.tokens.text import plain, read_text

FOLDER = Path(museum.__file__).parent
QUICK = {"steps": 2, "num_gist_tokens": 4, "num_answers": 4, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def checkpoint(chat_checkpoint: Path) -> Path:
    return chat_checkpoint


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a gist-lora adapter of the tiny model, with random updates."""
    model, tokenizer = gisting.load(checkpoint, "chat")
    adapters.attach(model, adapters.Adapter("gist-lora", rank=2))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.config.gist = {**model.config.gist, "num_gist_tokens": [1, 16]}
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapters.save(model, tokenizer, folder)
    return folder


def test_questions_are_not_among_what_is_learned() -> None:
    questions = read_questions(FOLDER / "museum_questions.jsonl")
    inputs = read_text(FOLDER / "museum_inputs.txt").splitlines()
    assert len(set(inputs)) == len(inputs) > 100
    assert not {question.text.lower() for question in questions} & {text.lower() for text in inputs}
    assert [question.is_detail for question in questions].count(False) == 3
    prompt = read_text(FOLDER / "museum.txt")
    assert all(question.is_right(prompt) for question in questions), "the prompt says what a right answer contains"
    assert not any(question.is_right("I do not know.") for question in questions)


def test_museum_without_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80, record=True)
    result = run_museum(tmp_path / "out", model=checkpoint, console=console, **QUICK)
    text = shown.getvalue()
    lines = [line for line in text.splitlines() if not line.startswith("  gisting ")]
    assert max(map(len, lines)) <= 80, "all but the commands to copy"
    assert result.printed == text
    assert f"gisting chat {tmp_path / 'out' / 'model'} --cache" in text
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    assert "There is no adapter for it here" in text
    assert "Welcome aboard!" in text, "the whole prompt is shown"
    assert "gist, before" not in text
    for words in ("Where is the museum?", "distilled gist", "full prompt", "no prompt", "questions about details"):
        assert words in text
    assert result.trial.before is None
    assert len(result.trial.after) == 3
    assert len(result.trial.details) == 6
    row = json.loads(json.dumps(result.to_row()))
    assert (row["adapter"], row["num_gist_tokens"], len(row["after"])) == (False, 4, 3)
    assert {"fetch", "load", "distil", "answers again", "details"} == set(row["seconds"])

    held = gisting.GistCache.load(tmp_path / "out" / "museum.gist.safetensors")
    model, tokenizer = gisting.load(checkpoint, "chat", dtype="auto")
    (answer,) = gisting.generate(
        model, tokenizer, ["Where is the museum?"], cache=held, max_new_tokens=6, do_sample=False
    )
    assert answer == result.trial.after[0].gist.text, "what is saved is what answered"


def test_museum_with_an_adapter(
    checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(museum, "shipped_adapter", lambda name: adapter)
    shown = io.StringIO()
    result = run_museum(tmp_path, model=checkpoint, console=Console(file=shown, width=80), **QUICK)
    text = shown.getvalue()
    assert "Compressed into 4 gist tokens" in text
    assert "gist, before" in text
    before, after = result.trial.before, result.trial.after
    assert before is not None
    assert len(before) == len(after) == 3
    assert [one.prompt for one in before] == [one.prompt for one in after], "the controls answer once"
    assert result.trial.gist_bytes == before[0].gist.kept_bytes
    assert result.trial.divergence["start"]["kl_median"] > 0


def test_a_model_of_the_hub_has_no_directory_to_link_to(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = museum.load
    monkeypatch.setattr(museum, "load", lambda name, *arguments, **options: load(checkpoint, *arguments, **options))
    shown = io.StringIO()
    run_museum(tmp_path, model="org/name", console=Console(file=shown, width=80), **QUICK)
    assert "gisting chat org/name --cache" in shown.getvalue()
    assert not (tmp_path / "model").is_symlink()


def test_verdicts_are_printed_for_every_column(checkpoint: Path) -> None:
    model, tokenizer = gisting.load(checkpoint, "chat")
    shown = io.StringIO()
    questions = [
        Question("hello", ("a", "e", "i", "o", "u", " ", "x")),
        Question("bye", ("never said",)),
        Question("why", ("never said",), is_detail=True),
    ]
    run_trial(
        model,
        tokenizer,
        "a b c d e f g",
        questions,
        inputs=["one", "two", "three"],
        console=Console(file=shown),
        **QUICK,
    )
    text = shown.getvalue()
    assert text.count("wrong") >= 3
    assert "0 answers with the full prompt are right, and 0 with the distilled" in " ".join(text.split())


def test_the_detail_that_the_gist_loses_is_shown(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = gisting.load(checkpoint, "chat")
    monkeypatch.setattr("gisting.demo.trial.generate", lambda *_, **__: ["something else"])
    shown = io.StringIO()
    questions = [Question("hello"), Question("where", ("",), is_detail=True)]  # every answer contains the empty text
    result = run_trial(
        model, tokenizer, "a b c d e f g", questions, inputs=["one", "two"], console=Console(file=shown), **QUICK
    )
    assert result.details[0]["gist_is_right"]
    assert "None that the full prompt has right is wrong" in shown.getvalue()
    questions[1] = Question("where", (result.details[0]["prompt"],), is_detail=True)
    shown = io.StringIO()
    run_trial(model, tokenizer, "a b c d e f g", questions, inputs=["one", "two"], console=Console(file=shown), **QUICK)
    assert "distilled gist: wrong" in shown.getvalue()
    assert "something else" in shown.getvalue()


@pytest.mark.parametrize(
    ("questions", "inputs", "message"),
    [
        ([], ["a", "b"], "questions must hold at least one"),
        ([Question("a", is_detail=True)], ["a", "b"], "questions must hold at least one"),
        ([Question("a")], ["a", "b"], "'a' is a question and one of the inputs"),
    ],
)
def test_what_cannot_be_tried(checkpoint: Path, questions: list[Question], inputs: list[str], message: str) -> None:
    model, tokenizer = gisting.load(checkpoint, "chat")
    with pytest.raises(GistError, match=message):
        run_trial(model, tokenizer, "a b c d e f", questions, inputs=inputs, **QUICK)


def test_a_short_prompt_takes_fewer_tokens_than_it_has(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a k that is no less is refused before anything is answered."""
    model, tokenizer = gisting.load(checkpoint, "chat")
    number = tokenizer.encode_prompts(["a b"], 1)[0].num_prompt_tokens
    assert 2 < number <= 16
    settings = {name: value for name, value in QUICK.items() if name != "num_gist_tokens"}
    console, asked = Console(file=io.StringIO()), {"questions": [Question("hello")], "inputs": ["one", "two"]}
    found = run_trial(model, tokenizer, "a b", **asked, console=console, **settings)
    assert found.num_gist_tokens == found.cache.num_slots == number - 1
    monkeypatch.setattr("gisting.demo.trial.distill", None)
    monkeypatch.setattr("gisting.demo.trial.compress", None)
    monkeypatch.setattr("gisting.demo.trial.trained_num_gist_tokens", lambda model: (1, 16))
    with pytest.raises(
        GistError, match=f"num_gist_tokens must be less than the prompt's {number} tokens, got {number}"
    ):
        run_trial(model, tokenizer, "a b", **asked, num_gist_tokens=number, console=console, **settings)


def test_the_adapter_is_for_its_base_model_only(
    checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(museum, "_ADAPTER", adapter)
    assert shipped_adapter(HUB_NAME) == adapter
    assert shipped_adapter(checkpoint) is None, "its wheel is another"
    assert shipped_adapter("gpt2") is None
    monkeypatch.setattr(museum, "_ADAPTER", tmp_path)
    assert shipped_adapter(HUB_NAME) is None, "an installation without the files of the adapter"
    assert is_base_model(HUB_NAME)


def test_plain_text_may_keep_its_lines() -> None:
    assert plain("a\nb\x1b[31m\tc\u202e é", keeps_lines=True) == "a\nb\\x1b[31m\\tc\\u202e é"


# -- the commands ------------------------------------------------------------------------------------------------------


def test_try_on_a_model_without_a_gist(run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("prompt.txt").write_text("You are a [bold]pirate[/bold].\nYou like gold.\n", encoding="utf-8")
    Path("questions.txt").write_text(
        "\n".join(["who?", "what?", "why?", "where?", "when?", "", "who?"]), encoding="utf-8"
    )
    words = ("try", str(checkpoint), "--prompt-file", "prompt.txt", "--inputs", "questions.txt", "-k", "3")
    done = run(*words, "--steps", "2", "--max-new-tokens", "4", "--output", "pirate.st")
    assert done.code == 0, done.err
    for text in ("[bold]pirate[/bold]", "who?", "why?", "gist, k = 3", "s were distillation"):
        assert text in done.out
    assert "where?" not in done.out, "what it is distilled on is not asked"
    assert max(map(len, done.out.splitlines())) <= 80
    done = run("generate", str(checkpoint), "--cache", "pirate.st", "--input", "who?", "--max-new-tokens", "4")
    assert done.code == 0, done.err

    done = run(*words, "--input", "where?", "--steps", "1", "--max-new-tokens", "2", "--json")
    row = json.loads(done.out)
    assert [one["input"] for one in row["after"]] == ["where?"]
    assert row["before"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--input a", "give the prompt: --prompt TEXT or --prompt-file FILE"),
        ("--prompt a", "give at least one question: --input TEXT, or a file of them: --inputs FILE"),
        ("--prompt a --prompt-file p.txt --input a", "give either --prompt or --prompt-file"),
        ("--prompt a --input a --inputs few.txt", "few.txt must hold at least two different questions"),
        ("--prompt a --inputs few.txt", "few.txt must hold at least two different questions"),
        ("--prompt a --inputs none.txt", "none.txt"),
        ("--prompt a --input a --output missing/x.st", "missing is not a directory; make it first"),
        ("--prompt a --input a --output few.txt", "few.txt exists already; remove it, or name another output"),
    ],
)
def test_mistakes_in_try(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("a\nb\n", encoding="utf-8")
    done = run("try", "nobody/nothing", *words.split())
    assert done.code == 1
    assert message in done.err


def test_demo_without_a_source_names_the_way_out(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setattr("gisting.demo.base_model._in_hub_cache", lambda name: None)
    monkeypatch.setattr(
        "gisting.demo.base_model.cached_assets_path", lambda *_, **__: tmp_path.joinpath("assets").mkdir() or tmp_path
    )
    done = run("demo")
    assert done.code == 1
    assert "gisting demo --from-scratch" in done.err
    assert "Traceback" not in done.err
    done = run("demo", "--from-scratch", "-k", "3")
    assert done.code == 1
    assert "-k is for the demo without --from-scratch" in done.err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_demo(tmp_path: Path) -> None:
    """The real model, with the real questions: what it must show on every machine."""
    try:
        fetch()
    except (GistError, ImportError) as error:
        pytest.skip(f"the model can be had from nowhere: {error}")
    shown = io.StringIO()
    result = run_museum(tmp_path, console=Console(file=shown, width=80))
    print(shown.getvalue())
    trial = result.trial
    assert 250 <= trial.num_prompt_tokens <= 350
    assert trial.prompt_bytes > 15 * trial.gist_bytes
    questions = read_questions(FOLDER / "museum_questions.jsonl")
    judged = [question for question in questions if not question.is_detail]
    right = {
        name: sum(q.is_right(getattr(one, name).text) for q, one in zip(judged, trial.after, strict=True))
        for name in ("gist", "prompt", "no_prompt")
    }
    assert right["prompt"] > right["no_prompt"]
    assert right["gist"] > right["no_prompt"]
    kl = {name: one["kl_median"] for name, one in trial.divergence.items()}
    assert kl["gist"] < 0.5 * kl["none"]
    assert kl["gist"] < kl["first"]
