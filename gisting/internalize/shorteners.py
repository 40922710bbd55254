"""Shorten a prompt: the text that replaces it in the stages between the whole prompt and nothing.

Place in the flow: prompt, share -> **shortener** -> text -> the data of a stage. A shortener is called once for each
stage before that stage is trained, for shares above 0 and below 1. The share that its text really has is measured with
the tokenizer of the model being trained (:func:`realised_share`), whatever the shortener itself counts. Independent of
stages, examples and queries.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from gisting._deprecated import renamed_arguments
from gisting.errors import GistError, UnsupportedModelError
from gisting.models.mode import evaluating
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer

__all__ = ["LLMLingua2", "NoShortening", "Rewrites", "SelfInformation", "Shortener", "realised_share", "shorten"]

_SAME_SHARE = 1e-6
_UNITS = ("phrase", "token")
_PHRASE_WORDS = 3
# For any language: a word with the white space before it. A phrase ends at punctuation that is followed by white space
# (unlike the punctuation in 3.5 or don't), at full-width punctuation, and at the end of a line.
_WORD = re.compile(r"\s*[^\s。，、；：！？]+[。，、；：！？]*|\s*[。，、；：！？]+")
_ENDS_PHRASE = re.compile(r"[^\w\s]$")
# How many rows of logits are converted to float32 at once: a whole prompt with a large vocabulary takes gigabytes.
_ROWS = 256


class Shortener(Protocol):
    """What shortens a prompt."""

    @property
    def name(self) -> str:
        """The name in result files."""
        ...

    def shorten(self, prompt: str, share: float) -> str:
        """Shorten ``prompt`` to about ``share`` of its tokens, with 0 < share < 1."""
        ...


@renamed_arguments(compressor="shortener", template="prompt")
def shorten(shortener: Shortener, prompt: str, share: float) -> str:
    """Shorten a prompt to a share of it; the shortener is called only for shares between 0 and 1.

    Args:
        shortener: called if 0 < share < 1.
        prompt: the whole text.
        share: from 0 (nothing) to 1 (the whole prompt).

    Returns:
        The shortened text.

    Raises:
        GistError: the share is not between 0 and 1, or the shortener raised it.
    """
    if not 0 <= share <= 1:
        raise GistError(f"share must be from 0 (nothing) to 1 (the whole prompt), got {share}")
    if share == 1 or not prompt:
        return prompt
    if share == 0:
        return ""
    if not hasattr(shortener, "shorten") and hasattr(shortener, "compress"):
        warnings.warn(
            f"{type(shortener).__name__} has a method compress, which will not be called in the next release; rename "
            "it to shorten",
            DeprecationWarning,
            stacklevel=2,
        )
        return shortener.compress(prompt, share)  # pyright: ignore[reportAttributeAccessIssue]
    return shortener.shorten(prompt, share)


@renamed_arguments(template="prompt")
def realised_share(tokenizer: GistTokenizer, prompt: str, text: str) -> float:
    """Compute which share of a prompt's tokens a shortened text has.

    Args:
        tokenizer: the tokenizer of the model being trained.
        prompt: the whole prompt.
        text: the shortened prompt.

    Raises:
        GistError: the prompt has no tokens.
    """
    whole, part = tokenizer.encode_texts([prompt, text])
    if not whole:
        raise GistError("prompt has no tokens, so there is no share of it; pass a text that is not empty")
    return len(part) / len(whole)


class _FormerlyCompress:
    """Keep the method's old name for one release."""

    def compress(self, template: str, share: float) -> str:
        warnings.warn(
            f"{type(self).__name__}.compress will be removed in the next release; use shorten",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.shorten(template, share)  # pyright: ignore[reportAttributeAccessIssue]


class NoShortening(_FormerlyCompress):
    """Keep the whole prompt at every share above 0, so that all of it disappears at once, in the last stage."""

    name = "none"

    def shorten(self, prompt: str, share: float) -> str:
        """Return ``prompt`` unchanged, whatever the ``share``."""
        return prompt


class Rewrites(_FormerlyCompress):
    """Use shorter prompts written by hand, one for each share in the schedule.

    Args:
        texts: the text for each share, such as ``{0.6: "...", 0.3: "..."}``.

    Raises:
        GistError: there are no texts, or a share is not above 0 and below 1.
    """

    name = "rewrites"

    def __init__(self, texts: Mapping[float, str]) -> None:
        self.texts = {float(share): text for share, text in texts.items()}
        wrong = [share for share in self.texts if not 0 < share < 1]
        if wrong or not self.texts:
            raise GistError(
                "texts must map shares above 0 and below 1 to texts, such as {0.6: ..., 0.3: ...}, got "
                f"{f'{wrong[0]:g}' if wrong else 'none'}"
            )

    def shorten(self, prompt: str, share: float) -> str:
        """Return the text written for this ``share``; ``prompt`` is not read.

        Raises:
            GistError: there is no text for this share.
        """
        for written, text in self.texts.items():
            if abs(written - share) <= _SAME_SHARE:
                return text
        there = ", ".join(f"{written:g}" for written in sorted(self.texts, reverse=True))
        raise GistError(
            f"there is no rewrite for the share {share:g}, only for {there}; write one, or use a schedule with these "
            "shares"
        )


class SelfInformation(_FormerlyCompress):
    """Leave out what the model being trained can predict (Selective Context, arXiv 2310.06201).

    The self-information of a token is ``-log p`` of it given the text before it. The self-information of a unit is the
    *mean* over its tokens, not the sum: the budget is in tokens, and with sums short units would be dropped first,
    however much they say for their length. The most predictable units are dropped, and no more of them than needed
    until the text, tokenised again, has at most ``share`` of the prompt's tokens. The order is kept. Of two equally
    predictable units, the later one is dropped first.

    Args:
        model: a decoder, with the weights that it has when ``shorten`` is called. It reads ordinary text without gist
            tokens, in eval mode and without gradients, and is left unchanged.
        tokenizer: its tokenizer; it must be a fast one, because the character offsets of the tokens are needed.
        unit: ``"phrase"``, at most three words without an end of phrase between them, or ``"token"``. Phrases end at
            white space; in text without white space they end at punctuation.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, which assigns no probability to a text that it reads.
        GistError: ``unit`` is unknown, or the tokenizer is slow.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: GistTokenizer, unit: str = "phrase") -> None:
        if tokenizer.is_encoder_decoder or model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                "SelfInformation needs the probability of each token of the prompt, and "
                f"{model.config.model_type} is an encoder-decoder, which assigns none to the text that it reads; use "
                "Rewrites or LLMLingua2"
            )
        if unit not in _UNITS:
            raise GistError(f"unit must be one of {', '.join(_UNITS)}, got {unit!r}")
        if not tokenizer.tokenizer.is_fast:
            raise GistError(
                f"SelfInformation needs a fast tokenizer, and {type(tokenizer.tokenizer).__name__} cannot report the "
                "character offsets of its tokens; use Rewrites or LLMLingua2"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.unit = unit

    @property
    def name(self) -> str:
        """``self-information`` and the unit."""
        return f"self-information-{self.unit}"

    def shorten(self, prompt: str, share: float) -> str:
        """Drop the most predictable units of ``prompt`` until at most ``share`` of its tokens are left.

        Raises:
            GistError: the prompt has no tokens.
        """
        ids, starts = self._tokens(prompt)
        units = _tokens_of(prompt, starts) if self.unit == "token" else _phrases_of(prompt)
        information = _means(self._information(ids), starts, units)
        budget = math.floor(share * len(ids) + _SAME_SHARE)
        kept = [True] * len(units)
        text = prompt
        for number in sorted(range(len(units)), key=lambda number: (information[number], -number)):
            if len(self.tokenizer.encode_texts([text])[0]) <= budget:
                break
            kept[number] = False
            text = "".join(itertools.compress(units, kept)).lstrip()
        return text

    def _tokens(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text, and the character at which each starts, including the white space before it."""
        encoded: Any = self.tokenizer.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = [int(token) for token in encoded["input_ids"]]
        if not ids:
            raise GistError("prompt has no tokens, so there is nothing to shorten; pass a text that is not empty")
        starts = (len(text[:start].rstrip()) for start, _ in encoded["offset_mapping"])
        return ids, list(itertools.accumulate(starts, max))

    def _information(self, ids: list[int]) -> list[float]:
        """Compute ``-log p`` of each id in nats; the first id, with nothing before it, counts as a uniform guess."""
        start = self.tokenizer.start_ids
        whole = torch.tensor([start + ids], device=input_weight(self.model).device)
        with evaluating(self.model), torch.no_grad():
            logits = self.model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[0]
            found = [
                cross_entropy(some.float(), following, reduction="none")
                for some, following in zip(logits[:-1].split(_ROWS), whole[0, 1:].split(_ROWS), strict=True)
            ]
        unconditional = [] if start else [math.log(logits.shape[-1])]
        conditional = torch.cat(found).tolist() if found else []
        return unconditional + conditional[len(conditional) - len(ids) + len(unconditional) :]


class LLMLingua2(_FormerlyCompress):
    """Shorten with LLMLingua-2 (arXiv 2403.12968), a small encoder that was distilled from GPT-4 to select words.

    It measures shares in its own tokens. The ``llmlingua`` package seeds every random generator of the process when it
    loads; their states are restored, so that a training run draws the same numbers as without it.

    Args:
        model_name: a published LLMLingua-2 model, on the hub or in a directory; loaded on first use.
        device_map: the device it runs on.
    """

    name = "llmlingua2"

    def __init__(
        self,
        model_name: str = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank",
        device_map: str = "cpu",
    ) -> None:
        self.model_name = model_name
        self.device_map = device_map

    def shorten(self, prompt: str, share: float) -> str:
        """Shorten ``prompt`` to about ``share`` of its tokens as LLMLingua-2 counts them.

        Raises:
            GistError: the package is not installed (the ``internalize`` extra).
        """
        with _random_state_kept():
            return self._compressor.compress_prompt([prompt], rate=share)["compressed_prompt"]

    @cached_property
    def _compressor(self) -> Any:
        try:
            from llmlingua import PromptCompressor  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise GistError(
                "LLMLingua2 needs the package llmlingua; run: pip install 'gist-tokens[internalize]'"
            ) from error
        return PromptCompressor(
            model_name=self.model_name,
            device_map=self.device_map,
            # The default is True, which would run code from the hub.
            model_config={"trust_remote_code": False},
            use_llmlingua2=True,
        )


def _tokens_of(text: str, starts: list[int]) -> list[str]:
    """Cut a text where tokens start; tokens that are parts of one character form one unit."""
    cuts = sorted({0, *(start for start in starts if 0 < start < len(text))})
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


def _phrases_of(text: str) -> list[str]:
    """Cut a text into phrases, each with the white space before it."""
    words = [match.group() for match in _WORD.finditer(text)]
    if not words:
        return [text]
    phrases = [words[0]]
    length = 1
    for before, word in itertools.pairwise(words):
        starts_line = "\n" in word[: len(word) - len(word.lstrip())]
        if length == _PHRASE_WORDS or starts_line or _ENDS_PHRASE.search(before):
            phrases.append(word)
            length = 1
        else:
            phrases[-1] += word
            length += 1
    phrases[-1] += text[sum(map(len, phrases)) :]
    return phrases


def _means(information: list[float], starts: list[int], units: list[str]) -> list[float]:
    """Average the information of the tokens that start in each unit; 0 for a unit in which no token starts."""
    ends = list(itertools.accumulate(map(len, units)))
    found: list[list[float]] = [[] for _ in units]
    number = 0
    for value, start in zip(information, starts, strict=True):
        while number < len(units) - 1 and start >= ends[number]:
            number += 1
        found[number].append(value)
    return [sum(values) / len(values) if values else 0.0 for values in found]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the generators of Python, numpy and torch, cuDNN's flags and the hash seed afterwards."""
    python, array, hash_seed = random.getstate(), np.random.get_state(), os.environ.get("PYTHONHASHSEED")
    cudnn = torch.backends.cudnn
    flags = (cudnn.deterministic, cudnn.benchmark)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        cudnn.deterministic, cudnn.benchmark = flags
        os.environ.pop("PYTHONHASHSEED", None)
        if hash_seed is not None:
            os.environ["PYTHONHASHSEED"] = hash_seed
