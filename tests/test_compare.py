"""Answers side by side, and a conversation in the terminal: what is compared is what stock transformers answers."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import gisting
from gisting import GistError
from gisting._compat import cache_argument
from gisting.generation.compression import full_prompt_cache
from gisting.measure.compare import Answer, Comparison, compare
from tests import tiny
from tests.shell import Ran

PER_TOKEN = 3 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, head size, bytes
PROMPT, INPUTS = tiny.words(20, 1), ["w1 w2", "w3 w4 w5"]


def stock_answer(model: Any, tokenizer: Any, ids: list[int], num_tokens: int) -> list[int]:
    """Greedy ids of an unpatched model with the same weights."""
    twin = tiny.stock_twin("llama", model)
    given = torch.tensor([ids])
    said = twin.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=num_tokens,
        do_sample=False,
        suppress_tokens=[tokenizer.gist_token_id],
        pad_token_id=0,
    )
    return said[0, len(ids) :].tolist()


# -- from Python -------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_gist_and_of_the_stock_model() -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, [PROMPT], 3)
    found = compare(model, tokenizer, INPUTS, prompt=PROMPT, cache=cache, max_new_tokens=6)
    assert [one.input for one in found] == INPUTS
    expected = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6, do_sample=False)
    assert [one.gist.text for one in found] == expected
    (head,) = tokenizer.encode_texts([tokenizer.template.prompt_text(PROMPT)])
    head = tokenizer.start_ids + head
    for one, rest in zip(found, tokenizer.encode_continuations(INPUTS), strict=True):
        assert one.prompt.token_ids == stock_answer(model, tokenizer, head + rest, 6)
        assert one.no_prompt.token_ids == stock_answer(model, tokenizer, tokenizer.start_ids + rest, 6)
        assert tokenizer.decode(one.gist.token_ids).strip() == one.gist.text
        assert one.gist.num_read_tokens == len(rest)
        assert one.prompt.num_read_tokens == len(head) + len(rest)
        assert one.no_prompt.num_read_tokens == len(tokenizer.start_ids) + len(rest)
        assert [answer.kept_bytes for answer in (one.gist, one.prompt, one.no_prompt)] == [
            3 * PER_TOKEN,
            len(head) * PER_TOKEN,
            0,
        ]
        assert all(0 < answer.first_token_ms < answer.total_ms for answer in (one.gist, one.prompt, one.no_prompt))
    assert not model.get_input_embeddings()._forward_pre_hooks, "nothing is left on the model"


def test_an_encoder_decoder_is_compared_too() -> None:
    model, tokenizer = tiny.patched("t5")
    cache = gisting.compress(model, tokenizer, [PROMPT], 2)
    (one,) = compare(model, tokenizer, ["w1 w2"], prompt=PROMPT, cache=cache, max_new_tokens=4)
    assert one.gist.text == gisting.generate(model, tokenizer, ["w1 w2"], cache=cache, max_new_tokens=4)[0]
    assert 0 < one.gist.first_token_ms < one.gist.total_ms
    assert one.prompt.num_read_tokens > 20 > one.no_prompt.num_read_tokens


@pytest.mark.parametrize(
    ("gist", "prompt", "parts_at", "agreement"),
    [
        ([5, 6, 2], [5, 6, 2], None, 1.0),
        ([5, 6, 2], [5, 7, 2], 1, 2 / 3),
        ([5, 6], [5, 6, 7, 2], 2, 0.5),
        ([4], [5, 6], 0, 0.0),
        ([], [], None, 1.0),
    ],
)
def test_where_answers_part(gist: list[int], prompt: list[int], parts_at: int | None, agreement: float) -> None:
    ours, theirs = (Answer("", "", ids, 1, 1, 1.0, 1.0) for ids in (gist, prompt))
    found = Comparison("", ours, theirs, theirs)
    assert (found.parts_at, found.agreement) == (parts_at, pytest.approx(agreement))
    assert (found.to_row()["parts_at"], found.to_row()["gist"]["token_ids"]) == (parts_at, gist)


def test_what_cannot_be_compared() -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, [PROMPT, "w1"], 2)
    with pytest.raises(GistError, match=r"cache must hold one prompt, got 2; select it: cache\[0\]"):
        compare(model, tokenizer, ["w1"], prompt=PROMPT, cache=cache)
    with pytest.raises(GistError, match="inputs must be a list of at least one text"):
        compare(model, tokenizer, "w1", prompt=PROMPT, cache=cache[0])
    with pytest.raises(GistError, match="prompt 0 is empty"):
        compare(model, tokenizer, ["w1"], prompt="", cache=cache[0])


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3_text"])
def test_a_conversation_after_the_full_prompt_is_one_long_text(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    like = gisting.compress(model, tokenizer, [PROMPT], 2)
    cache = full_prompt_cache(model, tokenizer, PROMPT, like.origin)
    (head,) = tokenizer.encode_texts([tokenizer.template.prompt_text(PROMPT)])
    ids = torch.tensor([tokenizer.start_ids + head])
    assert cache.num_gist_tokens == [ids.shape[1]]
    rest = torch.tensor(tokenizer.encode_continuations(["w1 w2"]))
    with torch.no_grad():
        whole = model(torch.cat([ids, rest], dim=1)).logits[:, -1]
        continued = model(
            torch.cat([torch.full_like(ids, tokenizer.gist_token_id), rest], dim=1)[:, ids.shape[1] :],
            attention_mask=torch.ones(1, ids.shape[1] + rest.shape[1], dtype=torch.long),
            **{cache_argument(): cache.as_past_key_values()},
        ).logits[:, -1]
    torch.testing.assert_close(continued, whole)


# -- gisting compare ---------------------------------------------------------------------------------------------------


def test_compare_reads_at_80_columns(run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(
        *shlex.split("compare runs/demo --prompt 'please reverse the letters , answer plainly' -k 2"),
        *shlex.split("--input 'a b c d e' --input 'c d' --max-new-tokens 8"),
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.out, "nothing is cut"
    for word in ("input: a b c d e", "gist, k = 2", "full prompt", "no prompt", "tokens read", "bytes kept"):
        assert word in done.out
    assert len(re.findall("gist against full prompt: (the same|[0-9]+ of [0-9]+ tokens equal)", done.out)) == 2
    assert re.search("Mean agreement over 2 inputs: [0-9]+ %", done.out)


def test_compare_from_a_file_and_from_a_store(run, workplace: Path) -> None:
    run("compress", "runs/demo", "--prompt", "write capitals", "-k", "2", "--output", "one.st")
    run("compress", "runs/demo", "--prompt", "write capitals", "-k", "2", "--store", "gists", "--name", "capitals")
    Path("p.txt").write_text("write capitals", encoding="utf-8")
    rows = []
    for words in (
        "--cache one.st --prompt 'write capitals'",
        "--store gists --name capitals --prompt-file p.txt",
        "--prompt 'write capitals' -k 2",
    ):
        done = run(*shlex.split(f"compare runs/demo {words} --input 'a b' --max-new-tokens 4 --json"))
        assert done.code == 0, done.err
        rows.append(json.loads(done.out))
    for row in rows:
        assert {"input", "gist", "prompt", "no_prompt", "agreement", "parts_at"} == set(row)
        assert {"text", "token_ids", "num_read_tokens", "kept_bytes", "first_token_ms", "total_ms"} < set(row["gist"])
        for condition in ("gist", "prompt", "no_prompt"):
            assert row[condition]["token_ids"] == rows[0][condition]["token_ids"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compare runs/demo --cache one.st", "since neither a cache file nor a store keeps it"),
        ("compare runs/demo", "give the prompt's text for the full prompt's answers: --prompt TEXT"),
        ("compare runs/demo --cache one.st --prompt a --prompt-file b", "give either --prompt or --prompt-file"),
        ("compare runs/demo --cache one.st --prompt a -k 2", "-k is for a prompt that is compressed here"),
        ("compare runs/demo --prompt a --name x", "--name needs --store"),
        ("compare runs/demo --store gists --prompt a", "--store needs --name NAME"),
        (
            "compare runs/demo --store gists --name capitals --prompt 'write capitals and more'",
            "'capitals' was compressed from a prompt of 3 tokens, the prompt given has 5",
        ),
        ("chat runs/demo", "give either --cache FILE or --store DIR"),
        ("chat runs/demo --store gists", "--store needs --gist NAME"),
        ("chat runs/demo --cache one.st --gist x", "--gist needs --store"),
        ("chat runs/demo --cache two.st", "two.st holds 2 prompts; a conversation starts from one"),
    ],
)
def test_errors_are_one_line(run, workplace: Path, words: str, message: str) -> None:
    run("compress", "runs/demo", "--prompt", "write capitals", "--output", "one.st")
    run("compress", "runs/demo", "--prompt", "write capitals", "--prompt", "a", "--output", "two.st")
    run("compress", "runs/demo", "--prompt", "write capitals", "--store", "gists", "--name", "capitals")
    done = run(*shlex.split(words))
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert done.err.startswith("error: ")


# -- gisting chat ------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(run, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    """Hold a conversation through a pipe."""
    run("compress", "runs/demo", "--prompt", "write capitals", "-k", "2", "--store", "gists", "--name", "capitals")

    def hold(lines: str, *words: str) -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return run("chat", "runs/demo", "--store", "gists", "--gist", "capitals", "--max-new-tokens", "5", *words)

    return hold


def test_a_conversation_is_that_of_converse(chat) -> None:
    done = chat("a b\n\n  c d \n/quit\nnever read\n")
    assert done.code == 0, done.err
    model, tokenizer = gisting.load("runs/demo")
    cache, texts = gisting.GistStore("gists").get("capitals"), []
    for text in ("a b", "c d"):
        turn = gisting.converse(model, tokenizer, [text], cache=cache, max_new_tokens=5, do_sample=False)
        cache, texts = turn.cache, texts + turn.texts
    assert done.out == "".join(f"{text}\n" for text in texts)


def test_compare_shows_what_the_full_prompt_answers(chat) -> None:
    done = chat("a b\n/compare\nc d\ne\n/compare\n/compare\n", "--prompt", "write capitals", "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["input"], row["condition"]) for row in rows] == [
        ("a b", "gist"),
        ("a b", "prompt"),
        ("c d", "gist"),
        ("e", "gist"),
        ("e", "prompt"),
        ("e", "prompt"),
    ]
    model, tokenizer = gisting.load("runs/demo")
    cache = gisting.GistStore("gists").get("capitals")
    found = compare(model, tokenizer, ["a b"], prompt="write capitals", cache=cache, max_new_tokens=5)
    assert (rows[0]["output"], rows[1]["output"]) == (found[0].gist.text, found[0].prompt.text)
    assert rows[4] == rows[5]
    shown = chat("a b\n/compare\n/compare\n", "--prompt", "write capitals")
    assert shown.err.count("the full prompt's answer:") == 2
    assert shown.out.splitlines() == [rows[0]["output"], rows[1]["output"], rows[1]["output"]]


def test_a_gist_of_another_model_is_refused_before_the_first_input(run, workplace: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    gisting.compress(model, tokenizer, [PROMPT], 2).save("other.st")
    done = run("chat", "runs/demo", "--cache", "other.st")  # pytest's standard input cannot be read
    assert done.code == 1
    assert re.search("error: cache was made (with|for) ", done.err)


def test_what_a_conversation_says_about_commands(chat) -> None:
    done = chat("/compare\n/quti\n", "--prompt", "write capitals")
    assert (done.code, done.out) == (0, "")
    assert "/compare needs an answer to compare with; write an input first" in done.err
    assert "there is no /quti; there are /compare" in done.err
    assert "start with --prompt TEXT or --prompt-file FILE" in chat("a\n/compare\n").err


def test_answers_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from gisting.cli.chat import _Printed

    class Decodes:
        def decode(self, ids: list[int]) -> str:
            return " red \x1b[31m\n caf\N{LATIN SMALL LETTER E WITH ACUTE} "[: 4 * len(ids)]

    streamer = _Printed(Decodes())  # pyright: ignore[reportArgumentType]
    for ids in ([9, 9], [1], [1], [1], [1]):
        streamer.put(torch.tensor(ids))
    streamer.end()
    assert capsys.readouterr().out == "red \\x1b[31m\n caf\N{LATIN SMALL LETTER E WITH ACUTE}\n"
