"""Encoder-decoders (T5): the same picture, with the encoder's states.

Place in the flow: attention -> **models** -> cache. A prompt with its gist is read once and leaves, for each encoder
layer, the keys and values of the gist, and its last hidden states. Later the encoder reads k placeholders and the
rest; its attention takes the first slots from the cache, and the cached hidden states replace its first outputs
before the decoder looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from gisting.cache import CacheOrigin, GistCache
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import ENCODER_CONDITIONS

__all__ = ["prefix_states", "prepare_full_generation", "prepare_generation"]


class _Recorder:
    """Keeps the last ``slots`` keys and values of each layer as they go by."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def exchange(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        start = key.shape[2] - self.slots
        self.layers[layer] = (key[:, :, start:].clone(), value[:, :, start:].clone())
        return key, value


class _Player:
    """Puts recorded keys and values in the first slots of each layer."""

    def __init__(self, cache: GistCache) -> None:
        self.cache = cache

    def exchange(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.cache.num_slots
        return (
            torch.cat([self.cache.keys[layer], key[:, :, slots:]], dim=2),
            torch.cat([self.cache.values[layer], value[:, :, slots:]], dim=2),
        )


def prefix_states(
    model: PreTrainedModel, tokenizer: GistTokenizer, encodings: Sequence[GistEncoding], origin: CacheOrigin
) -> GistCache:
    """Read a ragged batch of prompts with their gists and keep the gists' states.

    Args:
        model: a patched encoder-decoder.
        tokenizer: the tokenizer it was patched for.
        encodings: B prompts with their gists, and nothing behind them.
        origin: what the states will belong to; its condition says what is seen.

    Returns:
        A cache of B prompts, on the model's device.
    """
    ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id, left=True)
    visibility = ENCODER_CONDITIONS[origin.condition](ids == tokenizer.gist_token_id, is_token)
    lengths = visibility.survivors().sum(-1)
    slots = int(lengths.max())
    device = input_weight(model).device
    recorder = _Recorder(slots)
    with torch.no_grad():
        hidden = model.get_encoder()(
            input_ids=ids.to(device),
            attention_mask=visibility.as_attention_mask().to(device),
            gist_states=recorder,
        ).last_hidden_state
    layers = [recorder.layers[layer] for layer in sorted(recorder.layers)]
    return GistCache(
        tuple(key for key, _ in layers),
        tuple(value for _, value in layers),
        lengths,
        origin,
        hidden[:, hidden.shape[1] - slots :].clone(),
    )


def prepare_generation(
    model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, continuations: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The arguments with which stock ``generate`` answers a ragged batch: encoder outputs over gist and rest, and
    their mask.

    Args:
        model: a patched encoder-decoder.
        tokenizer: the tokenizer it was patched for.
        cache: B compressed prompts.
        continuations: ids that stand behind each.
    """
    device = input_weight(model).device
    ids, is_token = pad_rows(continuations, tokenizer.pad_token_id, left=False)
    held = cache.attention_mask
    placeholders = torch.where(held.bool(), tokenizer.gist_token_id, tokenizer.pad_token_id)
    ids = torch.cat([placeholders, ids.to(device)], dim=1)
    mask = torch.cat([held, is_token.long().to(device)], dim=1)
    with torch.no_grad():
        hidden = model.get_encoder()(input_ids=ids, attention_mask=mask, gist_states=_Player(cache)).last_hidden_state
    hidden = torch.cat([cache.last_hidden, hidden[:, cache.num_slots :]], dim=1)  # pyright: ignore[reportArgumentType]
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask}


def prepare_full_generation(
    model: PreTrainedModel, tokenizer: GistTokenizer, encodings: Sequence[GistEncoding], condition: str
) -> dict[str, Any]:
    """The same from the full text, prompt and all, under any condition; the decoder looks at what survives it.

    Args:
        model: a patched encoder-decoder.
        tokenizer: the tokenizer it was patched for.
        encodings: B prompts with gists and what stands behind them.
        condition: a name of ``ENCODER_CONDITIONS``.
    """
    device = input_weight(model).device
    ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id, left=False)
    visibility = ENCODER_CONDITIONS[condition](ids == tokenizer.gist_token_id, is_token).to(device)
    with torch.no_grad():
        outputs = model.get_encoder()(input_ids=ids.to(device), attention_mask=visibility.as_attention_mask())
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=outputs.last_hidden_state),
        "attention_mask": visibility.survivors().long(),
    }
