"""``gisting distill``: from a prompt and questions in files to a gist, in one command."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import gisting
from gisting import GistCache
from gisting.eval.check import GistCheck
from tests import tiny

PROMPT = " ".join(f"w{number}" for number in range(3, 15))
QUICK = "--num-answers 8 --max-new-tokens 4 --steps 4 --batch-size 4".split()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model that was never trained to gist, a prompt and questions."""
    model, tokenizer = tiny.model("llama", max_position_embeddings=512), tiny.word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "system.txt").write_text(PROMPT + "\n")
    (tmp_path / "questions.txt").write_text("\n\n".join(f"w{number} w{number + 1}" for number in range(20, 30)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(*more: str, model: str = "model") -> list[str]:
    command = f"distill {model} --template plain --prompt-file system.txt -k 4 --output x.gist.safetensors".split()
    return [*command, *QUICK, *more]


def test_from_files_to_a_gist(run, folder: Path) -> None:
    """The table has the controls; the file has the gist, how it was made, and how good it is."""
    done = run(*words("--inputs", "questions.txt"))
    assert done.code == 0
    for text in ("no prompt", "first k tokens", "the gist"):
        assert text in done.out
    assert "12 tokens of the prompt in 4; " in done.out
    assert "learned from 8 answers to 8 inputs, 4 steps, start matched, seed 0" in done.out
    assert "step 4 of 4: held out, KL median " in done.err
    cache = GistCache.load("x.gist.safetensors")
    assert cache.num_gist_tokens == [4]
    about = cache.about[0]
    assert about is not None
    assert about["distilled"]["answers"] == 8
    assert set(about["quality"]) >= {"kept_against_no_prompt", "kl_median", "agreement"}
    model, tokenizer = gisting.load("model", "plain")
    assert gisting.generate(model, tokenizer, ["w1"], cache=cache, max_new_tokens=2)
    assert len((folder / "x.gist.safetensors.distill" / "answers.jsonl").read_text().splitlines()) == 10
    assert "distilled" in run("inspect", "x.gist.safetensors").out


def test_a_distilled_gist_goes_into_a_store(run, folder: Path) -> None:
    assert run(*words("--inputs", "questions.txt", "--storage", "int8")).code == 0
    added = run("store", "add", "gists", "x.gist.safetensors", "--name", "support")
    assert (added.code, added.out) == (0, "added support to gists\n")
    (row,) = [json.loads(line) for line in run("store", "list", "gists", "--json").out.splitlines()]
    assert (row["name"], row["num_gist_tokens"], row["storage"]) == ("support", 4, "int8")
    assert row["about"]["distilled"]["answers"] == 8
    (line,) = [line for line in run("store", "list", "gists").out.splitlines() if line.startswith("support")]
    assert line.split()[-4:-2] == ["4", "12"], "gist tokens, prompt tokens"
    held, file = gisting.GistStore("gists").get("support"), GistCache.load("x.gist.safetensors")
    assert all(map(torch.equal, held.keys, file.keys))
    for names in ([], ["--name", "a", "--name", "b"]):
        refused = run("store", "add", "gists", "x.gist.safetensors", *names)
        assert refused.code == 1
        assert "give a different --name for each prompt of x.gist.safetensors, which holds 1, got " in refused.err


def test_few_held_out_inputs_are_told(run, folder: Path) -> None:
    """Of ten questions two are held out."""
    said = run(*words("--inputs", "questions.txt")).out
    assert "only 2 held-out inputs: the figures say little; give --held-out, or at least 20 --inputs" in said
    (folder / "others.txt").write_text("w1 w2\nw3\nw4\nw5 w1\n", encoding="utf-8")
    command = words("--inputs", "questions.txt", "--held-out", "others.txt", "--output", "y.gist.safetensors")
    assert "the figures say little" not in run(*command).out


def test_without_inputs_the_output_says_who_wrote_them(run, folder: Path) -> None:
    """A random model writes words, which are questions enough here."""
    done = run(*words())
    assert done.code == 0
    assert "note: without --inputs, the model writes the questions itself (self-study)" in " ".join(done.err.split())
    assert "inputs that the model wrote itself (self-study), 4 steps" in done.out
    assert (folder / "x.gist.safetensors.distill" / "questions.jsonl").exists()


def test_json_alone(run, folder: Path) -> None:
    done = run(*words("--inputs", "questions.txt", "--json", "--storage", "int8"))
    row = json.loads(done.out)
    assert row["num_gist_tokens"] == 4
    assert set(row["held_out"]) == {"gist", "first", "none"}
    assert [one["step"] for one in row["history"]] == [0, 4]
    assert set(row["seconds"]) == {"answers", "teacher", "start", "training"}


def without_k(*more: str) -> list[str]:
    command = words("--inputs", "questions.txt", *more)
    del command[command.index("-k") : command.index("-k") + 2]
    return command


def test_at_least_takes_the_smallest_that_keeps_enough(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 and 8, because the prompt has 12 tokens; and none is written where none keeps enough."""
    kept = {4: 0.3, 8: 0.8}
    monkeypatch.setattr(GistCheck, "kept", property(lambda found: kept[found.num_gist_tokens]))
    done = run(*without_k("--at-least", "0.9"))
    assert done.code == 1
    assert (
        "error: keep the whole prompt: no gist keeps 0.9 of what it does (0.30 with k = 4, 0.80 with k = 8); nothing "
        "was written" in " ".join(done.err.split())
    )
    assert not Path("x.gist.safetensors").exists()
    done = run(*without_k("--at-least", "0.5"))
    assert done.code == 0
    assert "as `gisting check` measures it, the gist keeps 0.30 with k = 4, 0.80 with k = 8" in done.out
    cache = GistCache.load("x.gist.safetensors")
    assert cache.num_gist_tokens == [8]
    assert cache.about[0] is not None
    assert cache.about[0]["quality"]["kept"] == 0.8
    assert cache.about[0]["distilled"]["answers"] == 8


def test_the_bar_of_each_check_is_filled(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full prompt's answers are sampled in the first alone."""
    bars: list[list[int]] = []

    @contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        bars.append([total, 0])

        def advance(count: int) -> None:
            bars[-1][1] += count

        yield advance

    monkeypatch.setattr(importlib.import_module("gisting.cli.distill"), "progress_bar", bar)
    (folder / "more.txt").write_text("w9 w8\nw7 w6\nw5 w4\nw3 w2\n")
    assert run(*without_k("--held-out", "more.txt", "--at-least", "1")).code == 1
    assert len(bars) == 2, "of 4 and 8 gist tokens"
    assert all(done == total for total, done in bars), bars
    assert bars[1][0] < bars[0][0]


def test_at_least_measures_as_check_does(run, folder: Path) -> None:
    """On the inputs that were held out, if there are enough of them."""
    (folder / "more.txt").write_text("w9 w8\nw7 w6\nw5 w4\nw3 w2\n")
    done = run(*without_k("--held-out", "more.txt", "--at-least", "0.001", "--json"))
    assert done.code == 0, done.err
    cache = GistCache.load("x.gist.safetensors")
    assert cache.about[0] is not None
    quality = cache.about[0]["quality"]
    assert json.loads(done.out)["quality"] == quality
    assert {"kept", "num_spans", "num_lost_spans"} <= set(quality)
    model, tokenizer = gisting.load("model", "plain")
    inputs = (folder / "more.txt").read_text().split("\n")[:4]
    assert quality == gisting.check_gist(model, tokenizer, cache, PROMPT, inputs).quality()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--inputs", "system.txt"], "inputs must hold at least 2 different texts, got 1"),
        (["--inputs", "nothing.txt"], "nothing.txt"),
        (["--inputs", "questions.txt", "-k", "12"], "num_gist_tokens must be less than the prompt's 12 tokens, got 12"),
        (["--inputs", "questions.txt", "-k", "0"], "num_gist_tokens must be at least 1, got 0"),
        (
            ["--inputs", "questions.txt", "--at-least", "0.9"],
            "--at-least finds the number of gist tokens; leave out -k",
        ),
        (["--inputs", "questions.txt", "--at-least", "1.5"], "at_least must be a share above 0 and up to 1"),
        (
            ["--inputs", "questions.txt", "--start", "end"],
            "start must be one of first, attended, matched, gist, got 'end'",
        ),
        (["--inputs", "questions.txt", "--storage", "int4"], "storage must be one of"),
        (["--inputs", "questions.txt", "--output", "none/x.st"], "none is not a directory; make it first"),
        (["--inputs", "questions.txt", "--output", "system.txt"], "system.txt exists already; remove it, or name"),
        (["--inputs", "questions.txt", "--prompt-file", "empty.txt"], "prompt 0 is empty"),
    ],
)
def test_errors_are_one_line(run, folder: Path, more: list[str], message: str) -> None:
    (folder / "empty.txt").write_text("\n")
    done = run(*words(*more))
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (folder / "x.gist.safetensors").exists()
