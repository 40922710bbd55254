"""Shorten a prompt, with each of the shorteners."""

from __future__ import annotations

import math
import os
import random
import re
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import gisting
from gisting import GistError, GistTokenizer
from gisting.errors import UnsupportedModelError
from gisting.internalize import shorteners
from gisting.internalize.shorteners import (
    LLMLingua2,
    NoShortening,
    Rewrites,
    SelfInformation,
    realised_share,
    shorten,
)
from tests import tiny

# -- the ends, rewrites, shares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "text"), [(1, "a b"), (1.0, "a b"), (0.3, "a"), (0, "")])
def test_the_ends_call_no_shortener(share: float, text: str) -> None:
    assert shorten(Rewrites({0.3: "a"}), "a b", share) == text


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(GistError, match=r"share must be from 0 \(nothing\) to 1 \(the whole prompt\), got"):
        shorten(NoShortening(), "a", share)


def test_no_shortening() -> None:
    assert [shorten(NoShortening(), "a b", share) for share in (1, 0.1, 0)] == ["a b", "a b", ""]


def test_rewrites_by_share() -> None:
    rewrites = Rewrites({2 / 3: "long", 1 / 3: "short"})
    assert rewrites.shorten("x", 0.6666667) == "long"
    assert rewrites.shorten("x", 1 - 2 / 3) == "short"
    with pytest.raises(GistError, match=r"no rewrite for the share 0.5, only for 0.666667, 0.333333; write"):
        rewrites.shorten("x", 0.5)


@pytest.mark.parametrize(("texts", "got"), [({}, "none"), ({0.5: "a", 1.0: "b"}, "1"), ({0.0: "a"}, "0")])
def test_rewrites_are_for_shares_between(texts: dict[float, str], got: str) -> None:
    with pytest.raises(GistError, match=f"shares above 0 and below 1 to texts, .* got {got}$"):
        Rewrites(texts)


def test_realised_share_counts_tokens(tokenizer: GistTokenizer) -> None:
    assert realised_share(tokenizer, "w1 w2 w3 w4", "w9") == 0.25
    with pytest.raises(GistError, match="prompt has no tokens"):
        realised_share(tokenizer, " ", "")


# -- self-information --------------------------------------------------------------------------------------------------


class Guesser(torch.nn.Module):
    """Give each number the probability 0.9 after its predecessor and all others little: w1 w2 w3 is predictable."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False, model_type="guesser")
        self.embedding = torch.nn.Embedding(64, 2)
        self.modes: list[tuple[bool, bool]] = []

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        self.modes.append((self.training, torch.is_grad_enabled()))
        odds = torch.full((64, 64), 0.1 / 63)
        odds[torch.arange(63), torch.arange(1, 64)] = 0.9
        return SimpleNamespace(logits=odds.log()[input_ids])


def test_what_can_be_predicted_is_dropped_first(tokenizer: GistTokenizer) -> None:
    shortener = SelfInformation(Guesser(), tokenizer, "token")  # pyright: ignore[reportArgumentType]
    prompt = "w5 w6 w9 w10 w30 w31"
    # w6, w10 and w31 follow from the word before; of equal ones the later is dropped first.
    assert shortener.shorten(prompt, 5 / 6) == "w5 w6 w9 w10 w30"
    assert shortener.shorten(prompt, 4 / 6) == "w5 w6 w9 w30"
    assert shortener.shorten(prompt, 3 / 6) == "w5 w9 w30"
    # Nothing precedes w5, so it counts as a uniform guess, 1 in 64, which is likelier than w9 and w30.
    assert shortener.shorten(prompt, 0.49) == "w9 w30"
    assert shortener.shorten(prompt, 0.1) == ""


def test_phrases_are_dropped_whole_by_the_mean_of_their_tokens(tokenizer: GistTokenizer) -> None:
    """Compare two unpredictable words, 5.3 per token and 10.6 in total, with three words, 4.3 and 13.0."""
    shortener = SelfInformation(Guesser(), tokenizer)  # pyright: ignore[reportArgumentType]
    assert shortener.shorten("w20 w30\nw1 w2 w9", 0.6) == "w20 w30"
    assert shortener.shorten("w20 w30\nw1 w2 w9", 0.4) == "w20 w30"
    assert shortener.shorten("w20 w30\nw1 w2 w9", 0.3) == ""


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("Translate the text, then stop.", ["Translate the text,", " then stop."]),
        ("one two three four five", ["one two three", " four five"]),
        ("a = 3.5\nb = don't \n", ["a =", " 3.5", "\nb =", " don't \n"]),
        ("  lead", ["  lead"]),
        ("你好，世界。再见", ["你好，", "世界。", "再见"]),
        ("...", ["..."]),
        (" \n ", [" \n "]),
    ],
)
def test_phrases_by_eye(text: str, phrases: list[str]) -> None:
    assert shorteners._phrases_of(text) == phrases


@given(st.text("ab ,.\n。é'", max_size=40))
def test_phrases_are_the_text(text: str) -> None:
    phrases = shorteners._phrases_of(text)
    assert "".join(phrases) == text
    assert all(len(re.findall(r"\S+", phrase)) <= 3 for phrase in phrases)


def test_information_is_that_of_the_model(tokenizer: GistTokenizer) -> None:
    """Compare with one forward pass for each prefix."""
    model = gisting.patch(tiny.model("llama"), tokenizer)
    ids = tokenizer.encode_texts(["w3 w1 w4 w1 w5"])[0]
    with torch.no_grad():
        expected = [
            -model(torch.tensor([ids[:n]])).logits[0, -1].log_softmax(-1)[ids[n]].item() for n in range(1, len(ids))
        ]
    found = SelfInformation(model, tokenizer)._information(ids)
    assert found == pytest.approx([math.log(len(tokenizer)), *expected], abs=1e-5)


def test_the_start_of_a_text_is_read_but_not_counted() -> None:
    inner = tiny.word_tokenizer()
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = GistTokenizer(inner, "plain")
    assert tokenizer.start_ids == [1]
    model = gisting.patch(tiny.model("llama"), tokenizer)
    with torch.no_grad():
        expected = -model(torch.tensor([[1]])).logits[0, -1].log_softmax(-1)[9].item()
    assert SelfInformation(model, tokenizer)._information([9, 8])[0] == pytest.approx(expected, abs=1e-5)


def test_the_model_is_left_unchanged(tokenizer: GistTokenizer) -> None:
    model = Guesser().train()
    model.embedding.eval()
    state = torch.get_rng_state()
    SelfInformation(model, tokenizer).shorten("w1 w2 w3 w9", 0.5)  # pyright: ignore[reportArgumentType]
    assert model.modes == [(False, False)]
    assert (model.training, model.embedding.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)


def byte_tokenizer() -> GistTokenizer:
    """Make a byte-level tokenizer with some merges: a character may be several tokens, a token several characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), (",", "Ġ"), ("Ċ", "Ċ")]
    vocabulary = {word: n for n, word in enumerate(["</s>", *alphabet, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    inner.decoder = decoders.ByteLevel()
    return GistTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"), "plain")


BYTES = byte_tokenizer()


class Hash(Guesser):
    """Give arbitrary probabilities for any vocabulary."""

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        spread = (torch.arange(300) * 7919 + 31 * input_ids[..., None]) % 101
        return SimpleNamespace(logits=spread / 10)


@settings(max_examples=60, deadline=None)
@given(st.text("the a,.\n。é😀b", min_size=1, max_size=40), st.floats(0.05, 0.95), st.sampled_from(["phrase", "token"]))
def test_the_budget_holds_and_no_unit_too_many_is_dropped(text: str, share: float, unit: str) -> None:
    shortener = SelfInformation(Hash(), BYTES, unit)  # pyright: ignore[reportArgumentType]
    left = shortener.shorten(text, share)
    assert realised_share(BYTES, text, left) <= share + 1e-6
    # What is left is in the prompt, in this order.
    rest = iter(text)
    assert all(character in rest for character in left)
    ids, starts = shortener._tokens(text)
    assert ids == BYTES.encode_texts([text])[0]
    units = shorteners._tokens_of(text, starts) if unit == "token" else shorteners._phrases_of(text)
    assert "".join(units) == text
    dropped = len(text) - len(left)
    assert dropped > 0
    if unit == "phrase":
        # With one phrase fewer dropped, the text would exceed the budget.
        values = shorteners._means(shortener._information(ids), starts, units)
        order = sorted(range(len(units)), key=lambda n: (values[n], -n))
        for count in range(len(units) + 1):
            gone = set(order[:count])
            kept = "".join(one for n, one in enumerate(units) if n not in gone)
            kept = kept.lstrip() if count else kept
            if realised_share(BYTES, text, kept) <= share + 1e-9:
                assert left == kept
                break


def test_self_information_errors(tokenizer: GistTokenizer, t5_tokenizer: GistTokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match="t5 is an encoder-decoder, which assigns none to the text"):
        SelfInformation(tiny.model("t5"), t5_tokenizer)
    with pytest.raises(GistError, match="unit must be one of phrase, token, got 'sentence'"):
        SelfInformation(tiny.model("llama"), tokenizer, "sentence")
    slow = SimpleNamespace(is_encoder_decoder=False, tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(GistError, match="SelfInformation needs a fast tokenizer, and SimpleNamespace cannot report"):
        SelfInformation(tiny.model("llama"), slow)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GistError, match="prompt has no tokens"):
        SelfInformation(tiny.model("llama"), tokenizer).shorten(" ", 0.5)


# -- LLMLingua-2 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def llmlingua(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Replace the package by a class with the signature of 0.2.2, which keeps every other word and seeds everything."""
    made: list[dict] = []

    class PromptCompressor:
        def __init__(
            self,
            model_name="NousResearch/Llama-2-7b-hf",
            device_map="cuda",
            model_config={},  # noqa: B006
            open_api_config={},  # noqa: B006
            use_llmlingua2=False,
            llmlingua2_config={},  # noqa: B006
        ) -> None:
            made.append({"model_name": model_name, "device_map": device_map, "model_config": model_config})
            assert use_llmlingua2
            random.seed(42)
            np.random.seed(42)
            torch.manual_seed(42)
            os.environ["PYTHONHASHSEED"] = "42"
            torch.backends.cudnn.deterministic = True

        def compress_prompt(self, context: list[str], instruction="", question="", rate=0.5, target_token=-1) -> dict:
            assert isinstance(context, list)
            step = round(1 / rate)
            return {"compressed_prompt": "\n\n".join(" ".join(text.split()[::step]) for text in context)}

    module = types.ModuleType("llmlingua")
    module.PromptCompressor = PromptCompressor  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "llmlingua", module)
    return made


def test_llmlingua_2(llmlingua: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    shortener = LLMLingua2("small")
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # pyright: ignore
    assert not llmlingua, "loaded on first use"
    assert shorten(shortener, "a b c d", 0.5) == "a c"
    assert shorten(shortener, "a b c d", 0.25) == "a"
    assert llmlingua == [{"model_name": "small", "device_map": "cpu", "model_config": {"trust_remote_code": False}}], (
        "loaded once"
    )
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # pyright: ignore
    assert after == before
    assert "PYTHONHASHSEED" not in os.environ
    assert not torch.backends.cudnn.deterministic


def test_llmlingua_2_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(
        GistError, match=r"LLMLingua2 needs the package llmlingua; run: pip install 'gist-tokens\[internalize\]'"
    ):
        LLMLingua2().shorten("a", 0.5)


def test_names() -> None:
    assert [NoShortening.name, Rewrites.name, LLMLingua2.name] == ["none", "rewrites", "llmlingua2"]
    assert SelfInformation(Guesser(), BYTES).name == "self-information-phrase"  # pyright: ignore[reportArgumentType]


# -- old names ---------------------------------------------------------------------------------------------------------


class OldShortener:
    name = "old"

    def compress(self, template: str, share: float) -> str:
        return template[: int(share * len(template))]


def test_the_old_name_of_the_method_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="OldShortener has a method compress, .* rename it to shorten"):
        assert shorten(OldShortener(), "abcd", 0.5) == "ab"  # pyright: ignore[reportArgumentType]
    with pytest.warns(DeprecationWarning, match=r"Rewrites.compress will be removed in the next release; use shorten"):
        assert Rewrites({0.5: "a"}).compress("a b", 0.5) == "a"
