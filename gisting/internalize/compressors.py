"""A template in fewer words: what stands in its place in the stages between the whole of it and nothing.

Place in the flow: template, share -> **compressor** -> text -> a stage's data. A compressor is asked once for each
stage, before it is trained, for shares above 0 and below 1. What a share came to is measured with the tokenizer of the
model being trained (:func:`realised_share`), whatever the compressor counts in. Knows nothing of stages, examples or
queries.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from gisting.errors import GistError, UnsupportedModelError
from gisting.models.mode import evaluating
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer

__all__ = [
    "LLMLingua2",
    "NoCompression",
    "Rewrites",
    "SelfInformation",
    "TemplateCompressor",
    "compress_template",
    "realised_share",
]

_SAME_SHARE = 1e-6
_UNITS = ("phrase", "token")
_PHRASE_WORDS = 3
# Of any language: the end of a word, with the white space before it. What ends a phrase is punctuation before white
# space (not that of 3.5 or don't), full-width punctuation, and the end of a line.
_WORD = re.compile(r"\s*[^\s。，、；：！？]+[。，、；：！？]*|\s*[。，、；：！？]+")
_ENDS_PHRASE = re.compile(r"[^\w\s]$")
# Rows of logits turned to float32 at once: those of a whole template and a large vocabulary take gigabytes.
_ROWS = 256


class TemplateCompressor(Protocol):
    """What shortens a template."""

    @property
    def name(self) -> str:
        """What result files call it."""
        ...

    def compress(self, template: str, share: float) -> str:
        """``template`` in about ``share`` of its tokens, for 0 < share < 1."""
        ...


def compress_template(compressor: TemplateCompressor, template: str, share: float) -> str:
    """What is left of a template at a share; the compressor is asked only between the ends.

    Args:
        compressor: asked where 0 < share < 1.
        template: the whole text.
        share: from 0, nothing, to 1, the template as it is.

    Returns:
        The text.

    Raises:
        GistError: the share is not in 0..1, or as the compressor.
    """
    if not 0 <= share <= 1:
        raise GistError(f"share must be from 0, nothing, to 1, the whole template, got {share}")
    if share == 1 or not template:
        return template
    return "" if share == 0 else compressor.compress(template, share)


def realised_share(tokenizer: GistTokenizer, template: str, text: str) -> float:
    """The tokens of a compressed template, as a share of the template's.

    Args:
        tokenizer: the tokenizer of the model being trained.
        template: the whole template.
        text: what is left of it.

    Raises:
        GistError: the template has no token.
    """
    whole, part = tokenizer.encode_texts([template, text])
    if not whole:
        raise GistError("template has no token, so nothing is a share of it; give its text")
    return len(part) / len(whole)


class NoCompression:
    """The whole template at every share above 0: it goes at once, in the last stage."""

    name = "none"

    def compress(self, template: str, share: float) -> str:
        """``template`` as it is, whatever the ``share``."""
        return template


class Rewrites:
    """Shorter templates that somebody wrote, one for each share that the schedule asks for.

    Args:
        texts: by share, such as ``{0.6: "...", 0.3: "..."}``.

    Raises:
        GistError: there is none, or a share is not above 0 and below 1.
    """

    name = "rewrites"

    def __init__(self, texts: Mapping[float, str]) -> None:
        self.texts = {float(share): text for share, text in texts.items()}
        wrong = [share for share in self.texts if not 0 < share < 1]
        if wrong or not self.texts:
            raise GistError(
                "texts must be by shares above 0 and below 1, such as {0.6: ..., 0.3: ...}, got "
                f"{f'{wrong[0]:g}' if wrong else 'none'}"
            )

    def compress(self, template: str, share: float) -> str:
        """The text that was written for this ``share``; ``template`` is not read.

        Raises:
            GistError: none was.
        """
        for written, text in self.texts.items():
            if abs(written - share) <= _SAME_SHARE:
                return text
        there = ", ".join(f"{written:g}" for written in sorted(self.texts, reverse=True))
        raise GistError(
            f"there is no rewrite for the share {share:g}, there are some for {there}; write one, or give a schedule "
            "with these shares"
        )


class SelfInformation:
    """Leave out what the model being trained can guess (Selective Context, arXiv 2310.06201).

    The self-information of a token is ``-log p`` of it after the text before it. That of a unit is the *mean* over its
    tokens, not the sum: the budget is in tokens, and a sum would drop short units first, however much they say for
    their length. The most predictable units go first, and no more of them than must: until the text, encoded anew, has
    at most ``share`` of the template's tokens. Order is kept. Of equal units the later one goes first.

    Args:
        model: a decoder, as it is at the time of the call; it reads ordinary text without gist tokens, in eval mode and
            without gradients, and is left as it was.
        tokenizer: its tokenizer; must be fast, for it has to say where in the text its tokens stand.
        unit: ``"phrase"``, at most three words without an end of phrase between them, or ``"token"``. Phrases end at
            white space; text without any ends at its punctuation.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, which has no probability of a text that it reads.
        GistError: ``unit`` is unknown, or the tokenizer is slow.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: GistTokenizer, unit: str = "phrase") -> None:
        if tokenizer.is_encoder_decoder or model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"SelfInformation asks how probable each token of the template is, and {model.config.model_type} is an "
                "encoder-decoder, which does not say so of the text that it reads; use Rewrites or LLMLingua2"
            )
        if unit not in _UNITS:
            raise GistError(f"unit must be one of {', '.join(_UNITS)}, got {unit!r}")
        if not tokenizer.tokenizer.is_fast:
            raise GistError(
                f"SelfInformation needs a fast tokenizer, {type(tokenizer.tokenizer).__name__} cannot say where in the "
                "text its tokens stand; use Rewrites or LLMLingua2"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.unit = unit

    @property
    def name(self) -> str:
        """``self-information`` and the unit."""
        return f"self-information-{self.unit}"

    def compress(self, template: str, share: float) -> str:
        """``template`` without its most predictable units, in at most ``share`` of its tokens.

        Raises:
            GistError: the template has no token.
        """
        ids, starts = self._tokens(template)
        units = _tokens_of(template, starts) if self.unit == "token" else _phrases_of(template)
        information = _means(self._information(ids), starts, units)
        budget = math.floor(share * len(ids) + _SAME_SHARE)
        kept = [True] * len(units)
        text = template
        for number in sorted(range(len(units)), key=lambda number: (information[number], -number)):
            if len(self.tokenizer.encode_texts([text])[0]) <= budget:
                break
            kept[number] = False
            text = "".join(itertools.compress(units, kept)).lstrip()
        return text

    def _tokens(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and for each the character at which it starts, the white space before it included."""
        encoded: Any = self.tokenizer.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = [int(token) for token in encoded["input_ids"]]
        if not ids:
            raise GistError("template has no token, so there is nothing to compress; give its text")
        starts = (len(text[:start].rstrip()) for start, _ in encoded["offset_mapping"])
        return ids, list(itertools.accumulate(starts, max))

    def _information(self, ids: list[int]) -> list[float]:
        """``-log p`` of each id in nats; of the first, which nothing stands before, that of an even guess."""
        start = self.tokenizer.start_ids
        whole = torch.tensor([start + ids], device=input_weight(self.model).device)
        with evaluating(self.model), torch.no_grad():
            logits = self.model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[0]
            found = [
                cross_entropy(some.float(), following, reduction="none")
                for some, following in zip(logits[:-1].split(_ROWS), whole[0, 1:].split(_ROWS), strict=True)
            ]
        unconditional = [] if start else [math.log(logits.shape[-1])]
        behind = torch.cat(found).tolist() if found else []
        return unconditional + behind[len(behind) - len(ids) + len(unconditional) :]


class LLMLingua2:
    """LLMLingua-2 (arXiv 2403.12968): a small encoder, distilled from GPT-4, says which words to keep.

    Its shares are in its own tokens. The ``llmlingua`` package seeds every random generator of the process when it
    loads; they are put back, so that a training run draws what it would have drawn.

    Args:
        model_name: of the published compressors, on the hub or a directory; loaded on first use.
        device_map: where it runs.
    """

    name = "llmlingua2"

    def __init__(
        self,
        model_name: str = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank",
        device_map: str = "cpu",
    ) -> None:
        self.model_name = model_name
        self.device_map = device_map

    def compress(self, template: str, share: float) -> str:
        """``template`` in about ``share`` of its tokens, as LLMLingua-2 counts them.

        Raises:
            GistError: the package is not installed (the ``internalize`` extra).
        """
        with _random_state_kept():
            return self._compressor.compress_prompt([template], rate=share)["compressed_prompt"]

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
            # Its default is True: code from the hub would run.
            model_config={"trust_remote_code": False},
            use_llmlingua2=True,
        )


def _tokens_of(text: str, starts: list[int]) -> list[str]:
    """A text cut where tokens start; tokens that are parts of one character are one unit."""
    cuts = sorted({0, *(start for start in starts if 0 < start < len(text))})
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


def _phrases_of(text: str) -> list[str]:
    """A text cut into phrases, each with the white space before it."""
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
    """The mean information of the tokens that start in each unit; of one in which none starts, 0."""
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
    """Python's, numpy's and torch's generators, cuDNN's flags and the hash seed, as they were."""
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
