"""Where a gist starts from before it learns: states that the model itself computes for the prompt.

Place in the flow: prompt -> **start** -> training of its slots. What learns is not known here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from gisting.cache import CacheOrigin, GistCache
from gisting.distillation.matching import match_attention
from gisting.errors import GistError
from gisting.eval.divergence import Teacher
from gisting.generation import compress
from gisting.generation.compression import whole_prompt
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["STARTS", "make_start"]

#: ``first``: the states of the prompt's first k tokens, to which models attend most wherever they look at nothing in
#: particular (attention sinks, arXiv 2309.17453). ``attended``: in every layer and key head, the k tokens of the prompt
#: to which the answers attend most, in their order. ``matched``: these, fitted so that attention gives the answers what
#: it gives them with the whole prompt (``matching``). ``gist``: what a model that was trained to gist makes of the
#: prompt.
STARTS = ("first", "attended", "matched", "gist")

_FIT_STEPS = 100


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
        GistError: the start is unknown, or cannot be made for this model.
    """
    if start not in STARTS:
        raise GistError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    if start == "gist":
        return replace(compress(model, tokenizer, [teacher.prompt], num_gist_tokens), origin=origin)
    if tokenizer.is_encoder_decoder and start != "first":
        raise GistError(
            f"start={start!r} is for decoders: the states of an encoder's tokens depend on all others; use "
            "start='first'"
        )
    whole = whole_prompt(model, tokenizer, teacher.prompt, origin)
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
    keys, values = match_attention(model, tokenizer, teacher, whole, k, steps)
    return replace(whole, keys=tuple(keys), values=tuple(values), lengths=torch.tensor([k]), origin=origin)
