"""Encoder-decoders (T5): run a prompt through the encoder once, and answer from the states of its gist.

Place in the flow: attention -> **models** -> cache. Implements :class:`gisting.models.architecture.Architecture`. A
prompt with its gist is read once and leaves the gist's keys and values in each encoder layer, and its last hidden
states. Later the encoder reads k placeholders and the input. Its attention takes the first slots from the cache, and
the cached hidden states replace its first outputs before the decoder reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from gisting.cache import CacheOrigin, GistCache
from gisting.errors import GistError
from gisting.models.head import logits_at
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import ENCODER_CONDITIONS

__all__ = [
    "answer_logits",
    "check_can_converse",
    "check_settings",
    "group_rows",
    "has_prefix_states",
    "prefix_states",
    "prepare_full_generation",
    "prepare_generation",
    "take_cache_settings",
    "text_states",
]


class _Recorder:
    """Records the last ``slots`` keys and values of each layer."""

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


def has_prefix_states(condition: str) -> bool:
    """Return whether a prompt has states under ``condition`` that do not depend on the input.

    An encoder reads in both directions, so only a gist hides the input from the prompt.
    """
    return condition == "gist"


def prefix_states(
    model: PreTrainedModel, tokenizer: GistTokenizer, encodings: Sequence[GistEncoding], origin: CacheOrigin
) -> GistCache:
    """Run a ragged batch of prompts with their gists through the encoder and keep the gists' states.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.prefix_states`.

    Returns:
        A cache of B prompts on the model's device.
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


def text_states(model: PreTrainedModel, ids: Sequence[int], origin: CacheOrigin) -> GistCache:
    """Read a text without gist tokens, and keep the states of all its tokens.

    They are not a prefix: in a longer text, every token of it would have read what follows.

    Args:
        model: a patched encoder-decoder.
        ids: N ids.
        origin: what the states will belong to.

    Returns:
        A cache of one prompt with N slots, on the model's device.
    """
    recorder = _Recorder(len(ids))
    batch = torch.tensor([list(ids)], device=input_weight(model).device)
    with torch.no_grad():
        hidden = model.get_encoder()(
            input_ids=batch, attention_mask=torch.ones_like(batch), gist_states=recorder
        ).last_hidden_state
    layers = [recorder.layers[layer] for layer in sorted(recorder.layers)]
    lengths = torch.tensor([len(ids)])
    return GistCache(tuple(key for key, _ in layers), tuple(value for _, value in layers), lengths, origin, hidden)


def check_settings(model: PreTrainedModel, config: Any, assistant_model: PreTrainedModel | None) -> None:
    """Raise if an encoder-decoder cannot generate with these settings.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.check_settings`.

    Raises:
        GistError: there is an ``assistant_model``, or a setting that transformers only supports for decoders.
    """
    model_type = model.config.model_type
    if assistant_model is not None:
        raise GistError(
            f"assistant_model works for decoders only: for {model_type}, an encoder-decoder, it would read the inputs "
            "with its own encoder; use prompt_lookup_num_tokens"
        )
    if config.prefill_chunk_size is not None:
        raise GistError(
            f"prefill_chunk_size works for decoders only: for {model_type}, transformers would cut the mask of the "
            "encoder's states"
        )
    if config.guidance_scale not in (None, 1):
        raise GistError(f"guidance_scale works for decoders only; transformers does not support it for {model_type}")


def take_cache_settings(model: PreTrainedModel, config: Any, implementation: str) -> dict[str, Any]:
    """Set ``config`` so that stock ``generate`` makes the decoder's cache; the gist is in the encoder's states.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.take_cache_settings`.

    Returns:
        The implementation alone.

    Raises:
        GistError: it is neither dynamic nor static.
    """
    if implementation not in ("dynamic", "static"):
        raise GistError(
            f"cache_implementation must be 'dynamic' or 'static' for {model.config.model_type}, because transformers "
            f"makes its decoder's cache, got {implementation!r}"
        )
    config.cache_implementation = None if implementation == "dynamic" else implementation
    config.max_cache_len = config.cache_config = None
    return {"cache_implementation": implementation}


def check_can_converse(model: PreTrainedModel) -> None:
    """Raise for every ``model``: an encoder does not read its decoder's answers.

    Raises:
        GistError: always.
    """
    raise GistError(
        f"{model.config.model_type} cannot converse: its encoder does not read its decoder's answers, so no cache "
        "holds them; put what was said into the next prompt or input"
    )


def group_rows(
    model: PreTrainedModel,
    cache: GistCache,
    continuations: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    takes_padding: bool,
) -> list[list[int]]:
    """Put all rows in one batch: decoders start every row at the first column.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.group_rows`.

    Returns:
        One group of row numbers.
    """
    return [list(range(len(continuations)))]


def prepare_generation(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    cache: GistCache,
    continuations: Sequence[Sequence[int]],
    num_copies: int = 1,
    **past_settings: Any,
) -> tuple[dict[str, Any], int]:
    """Make the arguments with which stock ``generate`` answers a ragged batch.

    ``num_copies`` and ``past_settings`` are not used: stock ``generate`` repeats encoder outputs for each beam or
    sample, and makes the decoder's cache.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.prepare_generation`.

    Returns:
        The encoder's outputs over gist and continuation, with their mask; and 0, because the decoder's result holds
        only the answer.
    """
    with torch.no_grad():
        return _encoded_after(model, tokenizer, cache, continuations), 0


def answer_logits(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prefix: GistCache | None,
    befores: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """Run answers through the decoder, after the encoder has read what comes before them.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.answer_logits`.

    Returns:
        The logits that predict each token of the answers.
    """
    device = input_weight(model).device
    if prefix is None:
        ids, is_token = pad_rows(befores, tokenizer.pad_token_id, left=False)
        arguments = {"input_ids": ids.to(device), "attention_mask": is_token.long().to(device)}
    else:
        arguments = _encoded_after(model, tokenizer, prefix.select([0] * len(befores)), befores)
    targets, is_target = pad_rows(answers, tokenizer.pad_token_id, left=False)
    own: Any = model
    shifted = own.prepare_decoder_input_ids_from_labels(targets.to(device))
    with logits_at(model, is_target.flatten().nonzero()[:, 0].to(device)):
        return model(**arguments, decoder_input_ids=shifted, use_cache=False).logits[0]


def _encoded_after(
    model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, continuations: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The encoder's outputs over the gists and what follows them, with their mask."""
    device = input_weight(model).device
    ids, is_token = pad_rows(continuations, tokenizer.pad_token_id, left=False)
    held = cache.attention_mask
    placeholders = torch.where(held.bool(), tokenizer.gist_token_id, tokenizer.pad_token_id)
    ids = torch.cat([placeholders, ids.to(device)], dim=1)
    mask = torch.cat([held, is_token.long().to(device)], dim=1)
    hidden = model.get_encoder()(input_ids=ids, attention_mask=mask, gist_states=_Player(cache)).last_hidden_state
    hidden = torch.cat([cache.last_hidden, hidden[:, cache.num_slots :]], dim=1)  # pyright: ignore[reportArgumentType]
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask}


def prepare_full_generation(
    model: PreTrainedModel, tokenizer: GistTokenizer, encodings: Sequence[GistEncoding], condition: str
) -> dict[str, Any]:
    """Make the arguments with which stock ``generate`` answers from full texts, under any condition.

    Args:
        model: a patched encoder-decoder.
        tokenizer: the tokenizer it was patched for.
        encodings: B prompts with their gists and continuations.
        condition: a name of ``ENCODER_CONDITIONS``.

    Returns:
        The encoder's outputs, and a mask of what survives, which is what the decoder sees.
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
