"""Arguments as people have them: arrays, columns and generators for lists, numpy's numbers for numbers.

They give what plain lists and numbers give, or an error that names the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

import gisting
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.eval.conditions import evaluate
from gisting.store import GistStore
from gisting.tokens import GistTokenizer
from tests import tiny
from tests.test_tokens import byte_bpe

PROMPTS, INPUTS = ["w1 w2", "w3"], ["w5", "w6"]
AS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "array": np.array,
    "generator": lambda values: (value for value in values),
    "iterator": iter,
}


@pytest.mark.parametrize("kind", AS.values(), ids=AS)
def test_lists(kind: Callable[[list[Any]], Any], tmp_path: Path) -> None:
    made = tiny.patched("llama")
    expected = gisting.compress(*made, PROMPTS, [2, 1])
    answers = gisting.generate(*made, INPUTS, cache=expected, max_new_tokens=4)
    cache = gisting.compress(*made, kind(PROMPTS), kind([2, 1]))
    assert cache.num_gist_tokens == [2, 1]
    assert gisting.generate(*made, kind(INPUTS), cache=cache, max_new_tokens=4) == answers
    settings: dict[str, Any] = {"num_gist_tokens": kind([2, 1]), "max_new_tokens": 4}
    assert gisting.generate(*made, kind(INPUTS), prompts=kind(PROMPTS), **settings) == answers
    assert gisting.converse(*made, kind(INPUTS), cache=cache, max_new_tokens=4).texts == answers
    assert GistStore(tmp_path).get_or_compress(*made, kind(PROMPTS), kind([2, 1])).num_gist_tokens == [2, 1]
    records = [Record(prompt, input, "w7") for prompt, input in zip(PROMPTS, INPUTS, strict=True)]
    as_iterator: Any = iter(records)
    found = evaluate(*made, as_iterator, kind([2]), conditions=kind(["gist"]), max_new_tokens=4, with_rouge=False)
    assert [(one.num_gist_tokens, one.num_records) for one in found] == [(2, 2)]


@pytest.mark.parametrize("k", [np.int64(2), np.uint8(2), np.array([2, 2])], ids=lambda k: type(k).__name__)
def test_numbers(k: Any) -> None:
    model, tokenizer = tiny.patched("llama")
    assert gisting.compress(model, tokenizer, PROMPTS, k).num_gist_tokens == [2, 2]
    assert [each.num_gist_tokens for each in tokenizer.encode_prompts(PROMPTS, k)] == [2, 2]


@pytest.mark.parametrize("k", [[1.5], 1.5, [1, "2"], "2", True, [True], np.array([1.5]), {1: 2}], ids=repr)
def test_what_is_no_number_of_gist_tokens(k: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    calls: list[Callable[[], Any]] = [
        lambda: gisting.compress(model, tokenizer, ["w1"], k),
        lambda: gisting.generate(model, tokenizer, ["w1"], prompts=["w1"], num_gist_tokens=k),
        lambda: evaluate(model, tokenizer, [Record("w1", "w2", "w3")], k, with_rouge=False),
        lambda: GistStore(tmp_path).get_or_compress(model, tokenizer, ["w1"], k),
        lambda: tokenizer.encode_prompts(["w1"], k),
    ]
    for call in calls:
        with pytest.raises(GistError, match=r"^num_gist_tokens must be "):
            call()


@pytest.mark.parametrize("texts", ["w1", b"w1", None, 3, {"w1": 1}, {"w1"}, [1], [None], [["w1"]]], ids=repr)
def test_what_is_no_list_of_texts(texts: Any) -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1"])
    calls: dict[str, list[Callable[[], Any]]] = {
        "prompts": [lambda: gisting.compress(model, tokenizer, texts)],
        "inputs": [
            lambda: gisting.generate(model, tokenizer, texts, cache=cache),
            lambda: gisting.converse(model, tokenizer, texts, cache=cache),
        ],
    }
    for name, each in calls.items():
        for call in each:
            expected = rf"^{name}(\[0\])? must be a (list of texts|text(, or a list of messages)?), got "
            with pytest.raises(GistError, match=expected):
                call()


def test_a_tokenizer_refuses_a_generator_instead_of_emptying_it(tokenizer: GistTokenizer) -> None:
    with pytest.raises(GistError, match=r"^prompts must be a list of texts, got generator; make a list of it$"):
        tokenizer.encode_prompts((text for text in PROMPTS), 1)  # pyright: ignore[reportArgumentType]
    assert len(tokenizer.encode_prompts(np.array(PROMPTS), 1)) == 2  # pyright: ignore[reportArgumentType]


# -- a tokenizer that splits special tokens ----------------------------------------------------------------------------


SPLITTING: dict[str, Callable[[], Any]] = {
    "fast": byte_bpe,
    "fast, with a start": lambda: byte_bpe(start="<s>"),
    "fast, with a space before": lambda: byte_bpe(add_prefix_space=True),
}


@pytest.mark.parametrize("build", SPLITTING.values(), ids=SPLITTING)
def test_special_tokens_that_are_split(build: Callable[[], Any]) -> None:
    """Nothing of the private marker of the gist is left in the ids, and special tokens in a text are pieces."""
    inner = build()
    plain, split = GistTokenizer(build(), "plain"), GistTokenizer(inner, "plain")
    inner.split_special_tokens = True
    for k in (1, 3):
        texts = ("see how they run", "the cat", "a dog")
        assert split.encode(*texts, num_gist_tokens=k) == plain.encode(*texts, num_gist_tokens=k)
    assert split.start_ids == plain.start_ids
    (whole,), (pieces,) = plain.encode_texts(["cat</s>"]), split.encode_texts(["cat</s>"])
    assert plain.eos_token_id in whole
    assert plain.eos_token_id not in pieces
    assert split.decode(pieces).strip() == "cat</s>"
    assert split.encode("cat</s>", "x").input_ids[: split.encode("cat</s>").gist_start].count(plain.eos_token_id) == 0


def test_a_slow_tokenizer_that_splits_is_refused() -> None:
    """It looks for no added token at all, not even for the gist's marker."""
    inner = ByT5Tokenizer()
    inner.split_special_tokens = True
    with pytest.raises(GistError, match=r"^split_special_tokens=True needs a fast tokenizer, ByT5Tokenizer is a slow"):
        GistTokenizer(inner, "plain").encode("w1")


def test_the_fingerprint_says_whether_special_tokens_are_split() -> None:
    first, second, third = byte_bpe(), byte_bpe(), byte_bpe()
    first.split_special_tokens = second.split_special_tokens = True
    found = [GistTokenizer(inner, "plain").fingerprint for inner in (first, second, third)]
    assert found[0] == found[1] != found[2]
