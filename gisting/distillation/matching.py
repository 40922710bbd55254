"""Slots that give every attention head what the whole prompt gives it, fitted layer by layer (Attention Matching).

Place in the flow: answers with the whole prompt in view, and its states -> **matching** -> slots to start from. No
gradient passes through the model: each layer's slots are fitted to the queries of a single forward pass over the
answers, in which each layer already reads what the fitted slots of the layers before it gave.

For a query q, attention over N prompt tokens and over the text after them is a mean of two parts, weighted by their
masses ``Z = sum_j exp(q k_j)``. k slots take the place of the N tokens if they have the same mass and the same mean
value. Following Attention Matching (arXiv 2602.16284, sections 3 and 4), the slots begin as the tokens that get most
attention, and their values are the solution of a least-squares problem. Two things differ: there is no bias for each
slot, which an ordinary cache could not hold; and the keys are fitted as well, by Adam on the same squared error.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.eval.divergence import Teacher
from gisting.models.mode import evaluating
from gisting.models.prefix import PrefixStates
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer

__all__ = ["match_attention"]

_NAME = "gist_matching"
_NUM_ANSWERS = 64  # whose queries are looked at
_NUM_QUERIES = 2500  # of each key head in a step of the fit
_RATE, _WARMUP, _BETAS = 0.1, 10, (0.9, 0.95)  # of Adam; the rate is relative to the size of keys and of values
_RIDGE = 1e-3  # relative to the mean of the diagonal


class _Queries(NamedTuple):
    """What a layer's M queries of each of G key heads see besides the prompt, and what they should get in all."""

    queries: Tensor  # (G, M, D), scaled
    softcap: float | None
    rest_mass: Tensor  # (G, M), the logarithm of the mass of the text after the prompt
    rest: Tensor  # (G, M, Dv), the mean value over that text
    target: Tensor  # (G, M, Dv), the output with the whole prompt

    def weights(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of slots with these keys, ``(G, M, k)``, and that of the rest, ``(G, M, 1)``."""
        scores = self.queries @ keys.mT
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        mass = torch.logaddexp(scores.logsumexp(-1), self.rest_mass)
        return (scores - mass[..., None]).exp(), (self.rest_mass - mass).exp()[..., None]

    def parts(self, number: int) -> list[_Queries]:
        """Split the queries into as few parts as have at most ``number`` queries each, each taken evenly from all."""
        count = math.ceil(self.queries.shape[1] / number)
        queries, rest_mass, rest, target = (
            [one[:, start::count].contiguous() for start in range(count)]
            for one in (self.queries, self.rest_mass, self.rest, self.target)
        )
        return [_Queries(*one) for one in zip(queries, repeat(self.softcap), rest_mass, rest, target, strict=False)]


@dataclass
class _Pass:
    """One forward pass over B answers, and the slots of the layers that it has been through."""

    prompt: GistCache
    is_token: Tensor  # (B, T)
    num_slots: int
    steps: int | None
    keys: list[Tensor] = field(default_factory=list)  # (G, k, D), at the positions of the prompt
    values: list[Tensor] = field(default_factory=list)  # (G, k, Dv)


_pass: ContextVar[_Pass] = ContextVar("matching")


def match_attention(
    model: Any, tokenizer: GistTokenizer, teacher: Teacher, prompt: GistCache, num_slots: int, steps: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Fit k slots in every layer and key head to what answers get from the whole prompt.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        teacher: answers with the whole prompt in view; 64 of them, drawn at random, are looked at.
        prompt: the states of the whole prompt of N tokens, one row.
        num_slots: k, less than N.
        steps: steps of the fit of keys and values; None to take the k tokens that get most attention as they are.

    Returns:
        For each layer keys ``(1, G, k, D)`` and values ``(1, G, k, Dv)`` in the dtype of the prompt's. The keys are
        moved by k - N positions, so that text after k slots is as far from them as it was from the prompt's tokens.

    Raises:
        GistError: the attention of this model cannot be followed, or how its keys are rotated is not known.
    """
    if prompt.rotary is None:
        raise GistError(
            f"start='attended' and 'matched' move keys, but how {model.config.model_type} rotates them is not known; "
            "use start='first'"
        )
    answers = teacher.answers
    if len(answers) > _NUM_ANSWERS:  # Not the first, which may all be about a part of the prompt.
        answers = random.Random(0).sample(answers, _NUM_ANSWERS)
    befores = tokenizer.encode_continuations([answer.input for answer in answers])
    rows = [[*before, *answer.token_ids] for before, answer in zip(befores, answers, strict=True)]
    ids, is_token = pad_rows(rows, tokenizer.pad_token_id, left=False)
    device = input_weight(model).device
    past = PrefixStates()
    for layer, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        past.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
    run = _Pass(prompt, is_token, num_slots, steps)
    with evaluating(model), _attending(model, run), torch.no_grad():
        model.base_model(input_ids=ids.to(device), **{cache_argument(): past}, use_cache=True)
    if len(run.keys) != len(prompt.keys):
        seen = f"{len(run.keys)} of {len(prompt.keys)} layers were seen"
        raise GistError(_cannot_follow(model.config.model_type, seen))
    by = torch.tensor([num_slots - prompt.num_slots])
    moved = [prompt.rotary.rotate(layer, keys[None], by) for layer, keys in enumerate(run.keys)]
    dtype = prompt.dtype
    return [keys.to(dtype).contiguous() for keys in moved], [values[None].to(dtype) for values in run.values]


@contextmanager
def _attending(model: Any, run: _Pass) -> Iterator[None]:
    """Fit slots to the model's attention within the block."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    stack = model.base_model
    before, token = stack.config._attn_implementation, _pass.set(run)
    stack.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        stack.set_attn_implementation(before)
        _pass.reset(token)


def _cannot_follow(what: str, why: str) -> str:
    return f"start='attended' and 'matched' cannot follow the attention of {what} ({why}); use start='first'"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, ``(B, H, T, D)`` in and ``(B, T, H, Dv)`` out: fits a layer's slots."""
    run = _pass.get()
    layer, num_tokens = len(run.keys), run.prompt.num_slots
    is_cached = layer < len(run.prompt.keys) and torch.equal(key[0, :, :num_tokens], run.prompt.keys[layer][0])
    if not is_cached or attention_mask is None or position_bias is not None:
        why = "it does not read the prompt's keys as they are cached"
        raise GistError(_cannot_follow(type(module).__name__, why))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found, received = _queries(run, query.float() * scale, key.float(), value.float(), attention_mask, softcap, s_aux)
    chosen = received.topk(run.num_slots, dim=-1).indices.sort(dim=-1).values[..., None]
    keys, values = (
        states[0, :, :num_tokens].float().take_along_dim(chosen, dim=1) for states in (key, value)
    )  # (G, k, D)
    output = found.target
    if run.steps is not None:
        keys, values = _fit(found, keys, values, run.steps)
        weights, rest = found.weights(keys)
        output = weights @ values + rest * found.rest
    run.keys.append(keys)
    run.values.append(values)
    # Back to (B, T, H, Dv); padding gets zeros.
    num_heads, groups = query.shape[1], key.shape[1]
    result = value.new_zeros(*run.is_token.shape, num_heads, value.shape[-1])
    per_token = output.unflatten(1, (-1, num_heads // groups))  # (G, tokens, R, Dv)
    result[run.is_token.to(result.device)] = per_token.transpose(0, 1).flatten(1, 2).to(result.dtype)
    return result, None


def _queries(
    run: _Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[_Queries, Tensor]:
    """Split the attention of every query into the prompt's part and the rest, a row at a time.

    Queries are ordered by token, then by query head within the group that shares a key head.

    Returns:
        The queries, and how much attention each of the prompt's tokens gets, ``(G, N)``.
    """
    groups, num_tokens = key.shape[1], run.prompt.num_slots
    parts: list[_Queries] = []
    received = key.new_zeros(groups, num_tokens)
    for row, length in enumerate(run.is_token.sum(-1).tolist()):
        own = query[row, :, :length].unflatten(0, (groups, -1))  # (G, R, T, D)
        scores = own @ key[row][:, None].mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask[row, :, :length].float()
        sink = None if sinks is None else sinks.float().view(groups, -1, 1)
        whole, rest = scores.logsumexp(-1), scores[..., num_tokens:].logsumexp(-1)
        text = (scores[..., num_tokens:] - rest[..., None]).exp() @ value[row, :, None, num_tokens:]
        if sink is not None:  # one more column, without a value
            before, rest = rest, torch.logaddexp(rest, sink)
            text, whole = text * (before - rest).exp()[..., None], torch.logaddexp(whole, sink)
        weights = (scores[..., :num_tokens] - whole[..., None]).exp()
        received += weights.sum((1, 2))
        target = weights @ value[row, :, None, :num_tokens] + (rest - whole).exp()[..., None] * text
        by_token = (one.transpose(1, 2).flatten(1, 2) for one in (own, rest[..., None], text, target))
        queries, mass, text, target = by_token
        parts.append(_Queries(queries, softcap, mass[..., 0], text, target))
    queries, mass, text, target = (
        torch.cat(one, dim=1) for one in zip(*((p.queries, p.rest_mass, p.rest, p.target) for p in parts), strict=True)
    )
    return _Queries(queries, softcap, mass, text, target), received


def _fit(found: _Queries, keys: Tensor, values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Fit keys and values to the outputs: values in closed form, then both by Adam, then values again.

    A step of Adam looks at a part of the queries, the closed form at all of them.
    """
    values = _least_squares(found, keys, values)
    scales = [one.pow(2).mean().sqrt().clamp(min=1e-6) for one in (keys, values)]
    parameters = [(one / scale).requires_grad_() for one, scale in zip((keys, values), scales, strict=True)]
    optimiser = torch.optim.Adam(parameters, lr=_RATE, betas=_BETAS)
    parts = found.parts(_NUM_QUERIES)
    with torch.enable_grad():
        for step in range(steps):
            rise, fall = min(1.0, (step + 1) / _WARMUP), 0.5 * (1 + math.cos(math.pi * step / steps))
            optimiser.param_groups[0]["lr"] = _RATE * rise * (0.05 + 0.95 * fall)
            keys, values = (one * scale for one, scale in zip(parameters, scales, strict=True))
            part = parts[step % len(parts)]
            weights, rest = part.weights(keys)
            loss = (weights @ values + rest * part.rest - part.target).pow(2).sum()
            for one, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                one.grad = gradient
            optimiser.step()
    keys, values = (one.detach() * scale for one, scale in zip(parameters, scales, strict=True))
    return keys, _least_squares(found, keys, values)


def _least_squares(found: _Queries, keys: Tensor, values: Tensor) -> Tensor:
    """The values that fit best with these keys, drawn slightly towards ``values``."""
    weights, rest = found.weights(keys)
    gram = weights.mT @ weights
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], device=gram.device)
    missing = found.target - rest * found.rest - weights @ values
    return values + torch.linalg.solve(gram, weights.mT @ missing)
