"""Decoders: run a prefix once, keep what survives it, go on from there with stock ``generate``.

Place in the flow: attention -> **models** -> cache. Positions are anchored (``Visibility.position_ids``): what
survives stands at ``0 .. P-1``, so it is an ordinary transformers cache of length P, whatever it was made from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from gisting._compat import cache_argument
from gisting.cache import CacheOrigin, GistCache
from gisting.device import on_each_device
from gisting.models.rotary import rotary_of
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import CONDITIONS

__all__ = ["Assistant", "continued", "needs_equal_lengths", "prefix_states", "prepare_generation"]


def prefix_states(
    model: PreTrainedModel, tokenizer: GistTokenizer, encodings: Sequence[GistEncoding], origin: CacheOrigin
) -> GistCache:
    """Run a ragged batch of prompts with their gists and keep what survives under ``origin.condition``, its columns
    moved together: the gists of a prompt in chunks stand apart.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        encodings: B prompts with their gists, and nothing behind them.
        origin: what the states will belong to; its condition says what is seen.

    Returns:
        A cache of B prompts, on the model's device.
    """
    ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id, left=True)
    visibility = CONDITIONS[origin.condition](ids == tokenizer.gist_token_id, is_token)
    kept = visibility.survivors()
    lengths = kept.sum(-1)
    columns = on_each_device(_last_columns(kept, int(lengths.max())))
    device = input_weight(model).device
    # Without a config every layer keeps all keys, sliding ones too; whoever goes on from here applies the window.
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(
            input_ids=ids.to(device),
            attention_mask=visibility.as_attention_mask().to(device),
            position_ids=visibility.position_ids.to(device),  # pyright: ignore[reportOptionalMemberAccess]
            **{cache_argument(): cache},
            use_cache=True,
        )
    layers: list[Any] = list(cache.layers)
    return GistCache(
        tuple(_gather(layer.keys, columns) for layer in layers),
        tuple(_gather(layer.values, columns) for layer in layers),
        lengths,
        origin,
        rotary=rotary_of(model),
    )


def prepare_generation(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    cache: GistCache,
    continuations: Sequence[Sequence[int]],
    num_copies: int = 1,
    **past_settings: Any,
) -> tuple[dict[str, Any], int]:
    """The arguments with which stock ``generate`` continues a ragged batch, and how many columns of its result were
    given.

    Columns: the P slots of the cache, padding, the continuation. What stock ``generate`` does to ids that it has seen
    (``repetition_penalty``) is to touch no others for those in front: in the slots stands the gist id, which is
    suppressed in every answer, and in the padding, which often has the id of the end of sequence, the first id of the
    row's own continuation. Stock ``generate`` repeats ids for each beam or sample, but not a cache that it is given:
    that one is made with ``num_copies`` of each row, by ``GistCache.as_past_key_values(**past_settings)``.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        cache: B compressed prompts.
        continuations: ids that stand behind each, one or more.
        num_copies: beams or samples of each row.
        **past_settings: as for ``GistCache.as_past_key_values``.
    """
    device = input_weight(model).device
    ids, is_token = pad_rows(continuations, tokenizer.pad_token_id, left=True)
    ids = torch.where(is_token, ids, torch.tensor([row[0] for row in continuations])[:, None])
    held = cache.attention_mask
    ids = torch.cat([torch.full_like(held, tokenizer.gist_token_id).to(device), ids.to(device)], dim=1)
    mask = torch.cat([held.to(device), is_token.long().to(device)], dim=1)
    if num_copies > 1:
        cache = cache.select([row for row in range(len(cache)) for _ in range(num_copies)])
    past = cache.as_past_key_values(**past_settings)
    return {cache_argument(): past, "input_ids": ids, "attention_mask": mask}, ids.shape[1]


def continued(
    model: PreTrainedModel,
    cache: GistCache,
    past: Any,
    continuations: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> GistCache:
    """The cache behind the answers: what each row was given and what it said, nothing between.

    Args:
        model: the model that answered.
        cache: what the rows began with, P slots.
        past: the ``DynamicCache`` that stock ``generate`` left, its columns those of :func:`prepare_generation` and
            the new tokens.
        continuations: the ids behind each row's gist.
        answers: the ids that each row said, at least one.

    Positions are ``0, 1, 2, ...`` in every row, padding or not, so keys stay right when their columns are moved
    together. The state of a row's last token is missing where generation ended with it; it is computed for all.
    """
    given = pad_rows(continuations, 0, left=True)[1]
    said = pad_rows([answer[:-1] for answer in answers], 0, left=False)[1]
    kept = torch.cat([cache.attention_mask.bool().cpu(), given, said], dim=1)
    lengths = kept.sum(-1)
    slots = int(lengths.max())
    columns = on_each_device(_last_columns(kept, slots))
    is_empty = on_each_device((torch.arange(slots)[None] < slots - lengths[:, None])[:, None, :, None])

    def gather(states: torch.Tensor) -> torch.Tensor:
        return _gather(states, columns).masked_fill(is_empty(states.device), 0)

    before = replace(
        cache,
        keys=tuple(gather(layer.keys) for layer in past.layers),
        values=tuple(gather(layer.values) for layer in past.layers),
        lengths=lengths,
    )
    after = before.as_past_key_values()
    mask = before.attention_mask
    with torch.no_grad():
        model.base_model(
            input_ids=torch.tensor([answer[-1:] for answer in answers], device=cache.device),
            attention_mask=torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
            position_ids=lengths[:, None].to(cache.device),
            **{cache_argument(): after},
            use_cache=True,
        )
    layers: list[Any] = list(after.layers)
    return replace(
        cache,
        keys=tuple(layer.keys for layer in layers),
        values=tuple(layer.values for layer in layers),
        lengths=lengths + 1,
    )


def _last_columns(kept: torch.Tensor, slots: int) -> torch.Tensor:
    """Where the last ``slots`` columns come from when those that are ``kept``, bool ``(B, N)``, move to the right end
    in their order: int64 ``(B, slots)``.
    """
    return kept.long().argsort(dim=1, stable=True)[:, kept.shape[1] - slots :]


def _gather(states: torch.Tensor, columns: Callable[[torch.device], torch.Tensor]) -> torch.Tensor:
    """``states`` ``(B, G, N, D)`` at ``columns`` ``(B, P)``, copied, so that a gist of k keeps no whole prompt's keys
    alive. On the device of the layer, as a model may be spread over several.
    """
    return states.take_along_dim(columns(states.device)[:, None, :, None], dim=2)


class Assistant:
    """A draft model for assisted decoding that reads gists of its own.

    transformers gives a draft model the main model's ids, the P placeholders in front included, without a cache, and
    measures the cache that comes back by those ids. Here the draft model gets its own cache and as many placeholders
    as that has slots, or none of both; what it returns looks as transformers expects it.

    Args:
        model: the draft model, patched for the main model's tokenizer.
        cache: one prompt, compressed by the draft model, or None: then it drafts from the continuation alone.
        num_slots: P of the main model.
        gist_token_id: of their tokenizer.
    """

    def __init__(self, model: PreTrainedModel, cache: GistCache | None, num_slots: int, gist_token_id: int) -> None:
        self.model = model
        self.cache = cache
        self.num_slots = num_slots
        self.gist_token_id = gist_token_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Draft; mask and positions, which are the main model's, are made anew.

        Args:
            input_ids: int64 ``(1, P + T)``, the main model's.
            attention_mask: int64, of the shape of ``input_ids``; not read.
            position_ids: int64, of the shape of ``input_ids``; not read.
            generation_config: of transformers, how to draft.
            **kwargs: settings that go into it, and arguments of stock ``generate``; among them, as the cache, what the
                last call returned, or None.

        Returns:
            What stock ``generate`` returns, with the main model's columns.
        """
        num_own = 0 if self.cache is None else self.cache.num_slots
        placeholders = input_ids.new_full((1, num_own), self.gist_token_id)
        own_ids = torch.cat([placeholders, input_ids[:, self.num_slots :]], dim=1)
        shifted: _Shifted | None = kwargs.pop(cache_argument(), None)
        past = None if shifted is None else shifted.past
        if past is None and self.cache is not None:
            past = self.cache.as_past_key_values()
        # Settings beside a generation_config are deprecated, and transformers gives both.
        config = copy.copy(generation_config)
        rest = config.update(**kwargs)
        model: Any = self.model
        drafted = model.generate(
            input_ids=own_ids,
            attention_mask=torch.ones_like(own_ids),
            **{cache_argument(): past},
            generation_config=config,
            **rest,
        )
        drafted.sequences = torch.cat([input_ids[:, : self.num_slots], drafted.sequences[:, num_own:]], dim=1)
        drafted[cache_argument()] = _Shifted(drafted[cache_argument()], self.num_slots - num_own)
        return drafted


class _Shifted:
    """A cache as transformers' candidate generator uses it, as long as the main model's ids are."""

    def __init__(self, past: Any, shift: int) -> None:
        self.past = past
        self.shift = shift

    def get_seq_length(self) -> int:
        return self.past.get_seq_length() + self.shift

    def crop(self, tokens_to_remove: int) -> None:
        self.past.crop(tokens_to_remove)


def needs_equal_lengths(
    window: int | None, slots: int, continuations: Sequence[Sequence[int]], new_tokens: int
) -> bool:
    """Whether padding between prefix and continuation would shift a sliding window, which counts columns, not
    tokens.

    Args:
        window: the smallest of the model, or None.
        slots: P of the cache.
        continuations: ids that stand behind each prompt.
        new_tokens: how many are generated at most.
    """
    longest = max(len(row) for row in continuations)
    return window is not None and slots + longest + new_tokens > window
