"""Decoders: run a prefix once, keep what survives it, go on from there with stock ``generate``.

Place in the flow: attention -> **models** -> cache. Positions are anchored (``Visibility.position_ids``): what
survives stands at ``0 .. P-1``, so it is an ordinary transformers cache of length P, whatever it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from gisting.cache import CacheOrigin, GistCache
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import CONDITIONS

__all__ = ["needs_equal_lengths", "prefix_states", "prepare_generation"]


def prefix_states(
    model: PreTrainedModel, tokenizer: GistTokenizer, encodings: Sequence[GistEncoding], origin: CacheOrigin
) -> GistCache:
    """Run a ragged batch of prompts with their gists and keep what survives under ``origin.condition``."""
    # On the left, so that all gists stand in the last columns.
    ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id, left=True)
    visibility = CONDITIONS[origin.condition](ids == tokenizer.gist_token_id, is_token)
    lengths = visibility.survivors().sum(-1)
    start = ids.shape[1] - int(lengths.max())
    device = input_weight(model).device
    # Without a config every layer keeps all keys, sliding ones too; whoever goes on from here applies the window.
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(
            input_ids=ids.to(device),
            attention_mask=visibility.as_attention_mask().to(device),
            position_ids=visibility.position_ids.to(device),  # pyright: ignore[reportOptionalMemberAccess]
            past_key_values=cache,
            use_cache=True,
        )
    layers: list[Any] = list(cache.layers)
    # Cloned: a slice would keep the whole prompt's keys alive behind a gist of k.
    return GistCache(
        tuple(layer.keys[:, :, start:].clone() for layer in layers),
        tuple(layer.values[:, :, start:].clone() for layer in layers),
        lengths,
        origin,
    )


def prepare_generation(
    model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, continuations: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], int]:
    """The arguments with which stock ``generate`` continues a ragged batch, and how many columns of its result were
    given.

    Columns: the P slots of the cache (gist ids where a slot holds a token), padding, the continuation.
    """
    device = input_weight(model).device
    ids, is_token = pad_rows(continuations, tokenizer.pad_token_id, left=True)
    ids, mask = ids.to(device), is_token.long().to(device)
    arguments: dict[str, Any] = {}
    if cache.num_slots:
        held = cache.attention_mask
        ids = torch.cat([torch.where(held.bool(), tokenizer.gist_token_id, tokenizer.pad_token_id), ids], dim=1)
        mask = torch.cat([held, mask], dim=1)
        arguments["past_key_values"] = cache.as_past_key_values()
    return {**arguments, "input_ids": ids, "attention_mask": mask}, ids.shape[1]


def needs_equal_lengths(
    window: int | None, slots: int, continuations: Sequence[Sequence[int]], new_tokens: int
) -> bool:
    """Whether padding between prefix and continuation would shift a sliding window, which counts columns, not
    tokens.
    """
    longest = max(len(row) for row in continuations)
    return window is not None and slots + longest + new_tokens > window
