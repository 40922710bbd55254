"""Where a gist starts from before it learns: states that the model itself computes for the prompt.

Place in the flow: prompt -> **start** -> training of its slots. What learns is not known here.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from gisting.cache import CacheOrigin, GistCache
from gisting.distillation.matching import match_attention
from gisting.errors import GistError
from gisting.eval.divergence import Teacher
from gisting.generation import compress
from gisting.generation.checks import check_finite
from gisting.generation.compression import whole_prompt
from gisting.models.load import trained_num_gist_tokens
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["STARTS", "choose_start", "make_start"]

#: ``first``: the states of the prompt's first k tokens, to which models attend most wherever they look at nothing in
#: particular (attention sinks, arXiv 2309.17453). ``attended``: in every layer and key head, the k tokens of the prompt
#: to which the answers attend most, in their order. ``matched``: these, fitted so that attention gives the answers what
#: it gives them with the whole prompt (``matching``). ``gist``: what a model that was trained to gist makes of the
#: prompt.
STARTS = ("first", "attended", "matched", "gist")

_FIT_STEPS = 100
_NUM_ANSWERS = 64  # whose attention is looked at, in one pass; fewer after long prompts
_FEWEST_ANSWERS, _MOST_TOKENS = 8, 2**18


def choose_start(
    model: PreTrainedModel, tokenizer: GistTokenizer, prompt: str, start: str | None, origin: CacheOrigin
) -> str:
    """Return the start to take, before there are answers: the one that was asked for, or the usual one.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        prompt: the text.
        start: one of ``STARTS``; None for ``"matched"``, or ``"first"`` for a model whose attention cannot be matched.
        origin: what the slots will belong to.

    Raises:
        GistError: the start is unknown, or cannot be made for this model.
    """
    if start is None:
        try:
            _check_matching(model, tokenizer, prompt, "matched", origin)
        except GistError:
            return "first"
        return "matched"
    if start not in STARTS:
        raise GistError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    if start == "gist" and trained_num_gist_tokens(model) is None:
        raise GistError("start 'gist' needs a model that was trained to gist; take 'matched' or 'first'")
    if start in ("attended", "matched"):
        _check_matching(model, tokenizer, prompt, start, origin)
    return start


def _check_matching(
    model: PreTrainedModel, tokenizer: GistTokenizer, prompt: str, start: str, origin: CacheOrigin
) -> None:
    """Raise unless attention to the prompt can be followed, on a single token."""
    if tokenizer.is_encoder_decoder:
        raise GistError(
            f"start={start!r} is for decoders: the states of an encoder's tokens depend on all others; use "
            "start='first'"
        )
    whole = whole_prompt(model, tokenizer, prompt, origin)
    check_finite(whole)
    match_attention(model, [tokenizer.encode_prompts([prompt], 1)[0].chunks[0][-1:]], whole, 1, None)


def make_start(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    teacher: Teacher,
    num_gist_tokens: int,
    start: str,
    origin: CacheOrigin,
) -> GistCache:
    """Make the k slots that training starts from.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        teacher: answers with the whole prompt in view, whose attention ``"attended"`` and ``"matched"`` look at.
        num_gist_tokens: k, less than the number of the prompt's tokens.
        start: one of ``STARTS``.
        origin: what the slots will belong to.

    Returns:
        A cache of one prompt in the model's dtype.

    Raises:
        GistError: the slots hold NaN or infinity, or cannot be made for this model (:func:`choose_start`).
    """
    if start == "gist":
        return replace(compress(model, tokenizer, [teacher.prompt], num_gist_tokens), origin=origin)
    whole = whole_prompt(model, tokenizer, teacher.prompt, origin)
    check_finite(whole)
    k = num_gist_tokens
    if start == "first":
        return replace(
            whole,
            keys=tuple(keys[:, :, :k].clone() for keys in whole.keys),
            values=tuple(values[:, :, :k].clone() for values in whole.values),
            lengths=torch.tensor([k]),
            origin=origin,
            last_hidden=None if whole.last_hidden is None else whole.last_hidden[:, :k].clone(),
        )
    steps = _FIT_STEPS if start == "matched" else None
    keys, values = match_attention(model, _texts(tokenizer, teacher, whole.num_slots), whole, k, steps)
    slots = replace(whole, keys=tuple(keys), values=tuple(values), lengths=torch.tensor([k]), origin=origin)
    check_finite(slots)
    return slots


def _texts(tokenizer: GistTokenizer, teacher: Teacher, num_prompt_tokens: int) -> list[list[int]]:
    """Return ids of inputs with their answers: a random choice, as the first may all be about one thing."""
    befores = tokenizer.encode_continuations([answer.input for answer in teacher.answers])
    texts = [[*before, *answer.token_ids] for before, answer in zip(befores, teacher.answers, strict=True)]
    most = max(_FEWEST_ANSWERS, min(_NUM_ANSWERS, _MOST_TOKENS // (num_prompt_tokens + max(map(len, texts)))))
    return texts if len(texts) <= most else random.Random(0).sample(texts, most)
