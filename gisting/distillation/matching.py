"""Slots that give every attention head what the whole prompt gives it, fitted layer by layer (Attention Matching).

Place in the flow: answers to a prompt, and its states -> **matching** -> slots to start from. No gradient passes
through the model: each layer's slots are fitted to the queries of a single forward pass over the answers, in which each
layer already reads what the fitted slots of the layers before it gave.

For a query q, attention over N prompt tokens and over the text after them is a mean of two parts, weighted by their
masses ``Z = sum_j exp(q k_j)``. k slots take the place of the N tokens if they have the same mass and the same mean
value. Following Attention Matching (arXiv 2602.16284, sections 3 and 4), the slots begin as the tokens that get most
attention, and their values are the solution of a least-squares problem. Two things differ: there is no bias for each
slot, which an ordinary cache could not hold; and the keys are fitted as well, by Adam on the same squared error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.models.mode import evaluating
from gisting.models.prefix import PrefixStates
from gisting.models.registry import attention_name, register_as
from gisting.models.weights import input_weight
from gisting.padding import pad_rows

__all__ = ["match_attention"]

_NAME = "gist_matching"
_NUM_QUERIES = 2500  # of each key head in a step of the fit
_RATE, _WARMUP, _BETAS = 0.1, 10, (0.9, 0.95)  # of Adam; the rate is relative to the size of keys and of values
_RIDGE = 1e-3  # relative to the mean of the diagonal
_HIDDEN = -1e30  # the score of what is not seen; of infinity, gradients would not be numbers


class _Queries(NamedTuple):
    """The M queries of a layer for each of G key heads: what they see after the prompt, and what they should get."""

    queries: Tensor  # (G, M, D), scaled
    softcap: float | None
    hidden: Tensor | None  # (M, k), whether a slot is too far away to be seen through a sliding window
    rest_mass: Tensor  # (G, M), the logarithm of the mass of the text after the prompt
    rest: Tensor  # (G, M, Dv), the mean value over that text
    target: Tensor  # (G, M, Dv), the output with the whole prompt

    def weights(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of slots with these keys, ``(G, M, k)``, and that of the rest, ``(G, M, 1)``."""
        scores = _capped(self.queries @ keys.mT, self.softcap)
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden, _HIDDEN)
        mass = torch.logaddexp(scores.logsumexp(-1), self.rest_mass)
        return (scores - mass[..., None]).exp(), (self.rest_mass - mass).exp()[..., None]

    def parts(self, number: int) -> list[_Queries]:
        """Divide the queries at random into as few parts as have at most ``number`` queries each."""
        size = self.queries.shape[1]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(self.queries.device)
        return [self._taken(index) for index in order.chunk(math.ceil(size / number))]

    def _taken(self, index: Tensor) -> _Queries:
        hidden = None if self.hidden is None else self.hidden[index]
        rest = (one[:, index] for one in (self.rest_mass, self.rest, self.target))
        return _Queries(self.queries[:, index], self.softcap, hidden, *rest)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


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
    model: Any, rows: Sequence[Sequence[int]], prompt: GistCache, num_slots: int, steps: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Fit k slots in every layer and key head to what texts get from the whole prompt.

    Args:
        model: a patched decoder.
        rows: B lists of ids that follow the prompt, such as inputs with their answers. All run in one pass.
        prompt: the states of the whole prompt of N tokens, one row.
        num_slots: k, at most N.
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
    ids, is_token = pad_rows(rows, 0, left=False)
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
    register_as(_NAME, _attention, like="eager")
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
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface, ``(B, H, T, D)`` in and ``(B, T, H, Dv)`` out: fits a layer's slots."""
    run = _pass.get(None)
    if run is None:  # another thread, which runs the same model
        from transformers import AttentionInterface

        return AttentionInterface()[attention_name("eager")](module, query, key, value, attention_mask, **settings)
    layer, num_tokens = len(run.keys), run.prompt.num_slots
    is_cached = layer < len(run.prompt.keys) and torch.equal(key[0, :, :num_tokens], run.prompt.keys[layer][0])
    if not is_cached or attention_mask is None or settings.get("position_bias") is not None:
        why = "it does not read the prompt's keys as they are cached"
        raise GistError(_cannot_follow(type(module).__name__, why))
    scaling = settings.get("scaling")
    query = query.float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    softcap, sinks, window = (settings.get(name) for name in ("softcap", "s_aux", "sliding_window"))
    found, received = _queries(run, query, key, value, attention_mask, softcap, sinks, window)
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
    window: int | None,
) -> tuple[_Queries, Tensor]:
    """Split the attention of every query into the prompt's part and the rest, a row at a time.

    Queries are ordered by token, then by query head within the group that shares a key head.

    Returns:
        The queries, and how much attention each of the prompt's tokens gets, ``(G, N)``.
    """
    groups, num_tokens = key.shape[1], run.prompt.num_slots
    prompt_keys, prompt_values = (states[0, :, None, :num_tokens].float() for states in (key, value))
    parts: list[tuple[Tensor, ...]] = []
    received = query.new_zeros(groups, num_tokens)
    for row, length in enumerate(run.is_token.sum(-1).tolist()):
        own = query[row, :, :length].unflatten(0, (groups, -1))  # (G, R, T, D)
        text_keys, text_values = (states[row, :, None, num_tokens:].float() for states in (key, value))
        scores = _capped(torch.cat([own @ prompt_keys.mT, own @ text_keys.mT], dim=-1), softcap)
        scores = scores + mask[row, :, :length].float()
        sink = None if sinks is None else sinks.float().view(groups, -1, 1)
        whole, rest = scores.logsumexp(-1), scores[..., num_tokens:].logsumexp(-1)
        text = (scores[..., num_tokens:] - rest[..., None]).exp() @ text_values
        if sink is not None:  # one more column, without a value
            before, rest = rest, torch.logaddexp(rest, sink)
            text, whole = text * (before - rest).exp()[..., None], torch.logaddexp(whole, sink)
        weights = (scores[..., :num_tokens] - whole[..., None]).exp()
        received += weights.sum((1, 2))
        target = weights @ prompt_values + (rest - whole).exp()[..., None] * text
        parts.append(tuple(one.transpose(1, 2).flatten(1, 2) for one in (own, rest[..., None], text, target)))
    queries, mass, text, target = (torch.cat(one, dim=1) for one in zip(*parts, strict=True))
    return _Queries(queries, softcap, _too_far(run, window, query), mass[..., 0], text, target), received


def _too_far(run: _Pass, window: int | None, query: Tensor) -> Tensor | None:
    """Return which slots a sliding window hides from each query, ``(M, k)``; None if it hides none."""
    lengths = run.is_token.sum(-1)
    if window is None or run.num_slots + int(lengths.max()) <= window:
        return None
    per_token = query.shape[1] // run.prompt.keys[0].shape[1]
    places = torch.cat([torch.arange(length) for length in lengths.tolist()]).repeat_interleave(per_token)
    ages = run.num_slots + places[:, None] - torch.arange(run.num_slots)
    return (ages >= window).to(query.device)


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
    """Solve for the values that fit best with these keys; a small ridge keeps them near ``values``."""
    weights, rest = found.weights(keys)
    gram = weights.mT @ weights
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], device=gram.device)
    missing = found.target - rest * found.rest - weights @ values
    return values + torch.linalg.solve(gram, weights.mT @ missing)
