"""Where a gist starts from before it learns: states that the model itself computes for the prompt.

Place in the flow: prompt -> **start** -> training of its slots. What learns is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gisting._compat import cache_argument
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import GistError
from gisting.eval.divergence import Teacher
from gisting.generation import compress
from gisting.generation.compression import whole_prompt
from gisting.models.mode import evaluating
from gisting.models.prefix import PrefixStates
from gisting.models.registry import attention_name
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["STARTS", "make_start"]

#: ``first``: the states of the prompt's first k tokens, to which models attend most wherever they look at nothing in
#: particular (attention sinks, arXiv 2309.17453). ``attended``: in every layer and head, the k tokens of the prompt to
#: which the answers attend most, in their order, with keys moved to positions 0 to k - 1. ``gist``: what a model that
#: was trained to gist makes of the prompt.
STARTS = ("first", "attended", "gist")

_NUM_ANSWERS = 16  # whose attention is looked at


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
        teacher: answers with the whole prompt in view, whose attention ``"attended"`` looks at.
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
    if tokenizer.is_encoder_decoder and start == "attended":
        raise GistError(
            "start='attended' is for decoders: the states of an encoder's tokens depend on all others; use "
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
    if whole.rotary is None:
        raise GistError(
            f"start='attended' moves keys, but how {model.config.model_type} rotates them is not known; use "
            "start='first'"
        )
    keys, values = [], []
    for layer, received in enumerate(_attention_received(model, tokenizer, teacher, whole)):
        chosen = received.topk(k, dim=-1).indices.sort(dim=-1).values  # (G, k)
        index = chosen.to(whole.keys[layer].device)[None, :, :, None]
        taken = whole.keys[layer].take_along_dim(index, dim=2)[0][:, None]  # (G, 1, k, D): heads as rows
        moved = whole.rotary.rotate(layer, taken, torch.arange(k) - chosen)
        keys.append(moved[:, 0][None].contiguous())
        values.append(whole.values[layer].take_along_dim(index, dim=2).contiguous())
    return replace(whole, keys=tuple(keys), values=tuple(values), lengths=torch.tensor([k]), origin=origin)


def _attention_received(model: Any, tokenizer: GistTokenizer, teacher: Teacher, whole: GistCache) -> list[Tensor]:
    """Return for each layer how much attention each of the prompt's N tokens gets, ``(G, N)`` on the CPU.

    That is the sum over inputs and answers and over the query heads that share a key head.
    """
    answers = teacher.answers[:_NUM_ANSWERS]
    befores = tokenizer.encode_continuations([answer.input for answer in answers])
    num_slots, num_heads = whole.num_slots, whole.keys[0].shape[1]
    totals = [torch.zeros(num_heads, num_slots) for _ in whole.keys]
    device = input_weight(model).device
    with evaluating(model), _eager(model), torch.no_grad():
        for before, answer in zip(befores, answers, strict=True):
            past = PrefixStates()
            for layer, states in enumerate(zip(whole.keys, whole.values, strict=True)):
                past.update(states[0], states[1], layer)
            ids = torch.tensor([[*before, *answer.token_ids]], device=device)
            attentions: Sequence[Tensor] = model.base_model(
                input_ids=ids, **{cache_argument(): past}, use_cache=True, output_attentions=True
            ).attentions
            for layer, weights in enumerate(attentions):  # (1, H, T, N + T)
                totals[layer] += weights[0, :, :, :num_slots].float().sum(1).unflatten(0, (num_heads, -1)).sum(1).cpu()
    return totals


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Run the model's own eager attention within the block, which returns its weights."""
    stack = model.base_model
    before = stack.config._attn_implementation
    stack.set_attn_implementation(attention_name("eager"))
    try:
        yield
    finally:
        stack.set_attn_implementation(before)
