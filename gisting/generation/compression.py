"""Compress prompts: run each once and keep the states of its gist.

Place in the flow: tokens -> models -> **compression** -> cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gisting._compat import cache_argument
from gisting.cache import CacheOrigin, GistCache
from gisting.device import on_each_device
from gisting.errors import GistError
from gisting.generation.checks import check_condition, check_count, check_finite, check_positions, chosen_k, listed
from gisting.models.adapters import check_num_gist_tokens, checkpoint_name, reader_fingerprint
from gisting.models.architecture import architecture_of
from gisting.models.encoder_decoder import text_states
from gisting.models.mode import evaluating
from gisting.models.registry import family_of, is_length_dependent, sliding_windows
from gisting.models.rotary import rotary_of
from gisting.models.state import require_patched
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistEncoding, GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compress", "compress_encodings", "full_prompt_cache", "full_prompt_caches", "whole_prompt"]


def compress(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prompts: Sequence[str],
    num_gist_tokens: int | Sequence[int] | None = None,
    *,
    condition: str = "gist",
    batch_size: int = 32,
    chunk_length: int | None = None,
) -> GistCache:
    """Compress each prompt into the keys and values of its gist tokens (Gisting, section 3).

    Args:
        model: a patched model, on any device, in any floating dtype.
        tokenizer: the tokenizer it was patched for.
        prompts: B texts of any lengths.
        num_gist_tokens: k, one for all or one each; None for the largest that the model was trained with (1 if its
            config does not say). A k that it was not trained with is reported once, in a warning of the logger.
        condition: what a later text may see of the prompt: ``"gist"``, or for comparison on a decoder ``"positive"``
            (prompt and gist: ordinary prefix caching) or ``"negative"`` (nothing).
        batch_size: how many prompts to run at once. Prompts are sorted by length first.
        chunk_length: for long prompts: a prompt of more ids than this, including its template and start ids, is cut
            into chunks of nearly equal length (``tokens.cut_into_chunks``), each followed by k gist tokens. A chunk
            sees the gists before it and is hidden once its own are read, so the states equal those of running it chunk
            by chunk after a cache of gists. Neither a single chunk nor all gists together may exceed the model's
            positions. Decoders only.

    Returns:
        One cache of B prompts, in their order, with k tokens for each of a prompt's chunks. If the model has an adapter
        that acts at gist tokens only (``gist-lora``), the cache is its base model's, which reads it without the
        adapter, patched or stock.

    Raises:
        GistError: the model is not patched, there is no prompt or an empty one, a prompt exceeds the model's positions,
            ``chunk_length`` is invalid, or a prompt in chunks exceeds a sliding window.
        GistTokenError: a k is less than 1.
    """
    require_patched(model, tokenizer)
    check_condition(condition)
    check_count("batch_size", batch_size)
    prompts = listed("prompts", prompts)
    encodings = tokenizer.encode_prompts(prompts, chosen_k(model, num_gist_tokens), chunk_length)
    if not encodings:
        raise GistError("prompts is empty; give at least one prompt")
    origin = CacheOrigin(
        reader_fingerprint(model),
        tokenizer.fingerprint,
        tokenizer.template.name,
        condition,
        checkpoint_name(model),
    )
    return compress_encodings(model, tokenizer, encodings, origin, batch_size)


def compress_encodings(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    encodings: Sequence[GistEncoding],
    origin: CacheOrigin,
    batch_size: int = 32,
) -> GistCache:
    """Compress prompts that are already encoded.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        encodings: B prompts with their gists, and nothing after them.
        origin: what the states will belong to; its condition is the mask to use.
        batch_size: how many prompts to run at once.

    Returns:
        One cache of B prompts, in their order.

    Raises:
        GistError: a prompt or its gist does not fit the model, or the states hold NaN or infinity.
    """
    architecture = architecture_of(family_of(model.config))
    if not architecture.has_prefix_states(origin.condition):
        raise GistError(
            f"condition {origin.condition!r} leaves no states to cache in an encoder, where prompt and input read each "
            "other; use generate(prompts=..., condition=...)"
        )
    positions = [_num_positions(model, encoding, origin.condition) for encoding in encodings]
    check_positions(model, positions, "prompt", "its gist")
    if origin.condition == "gist":
        _check_window(model, encodings)
    check_num_gist_tokens(model, max(end - start for encoding in encodings for start, end in encoding.gist_spans))
    # Sorted by length, so that a batch holds little padding.
    order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].input_ids))
    parts: list[GistCache] = []
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = [encodings[row] for row in order[start : start + batch_size]]
            parts.append(architecture.prefix_states(model, tokenizer, batch, origin).blanked())
    cache = parts[0] if len(parts) == 1 else GistCache.cat(parts)
    if order != list(range(len(order))):
        cache = cache.select(sorted(range(len(order)), key=lambda place: order[place]))
    check_finite(cache)
    return cache


def full_prompt_cache(model: PreTrainedModel, tokenizer: GistTokenizer, prompt: str, origin: CacheOrigin) -> GistCache:
    """Return the states of the full prompt as ordinary text, which :func:`gisting.generate` continues from.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        prompt: the text.
        origin: what the states belong to, as in a cache of this model; its condition becomes ``"prompt"``.

    Returns:
        A cache of one prompt, with a slot for each of its tokens.

    Raises:
        GistError: the model is an encoder-decoder, or the prompt is empty or exceeds the model's positions.
    """
    return full_prompt_caches(model, tokenizer, [prompt], origin)


def full_prompt_caches(
    model: PreTrainedModel, tokenizer: GistTokenizer, prompts: Sequence[str], origin: CacheOrigin
) -> GistCache:
    """Return the states of several prompts as :func:`full_prompt_cache` does, from one forward pass.

    Rows are padded on the right, where causal attention hides the padding.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        prompts: B texts.
        origin: as for :func:`full_prompt_cache`.

    Returns:
        A cache of B prompts, with a slot for each token of the longest.

    Raises:
        GistError: as :func:`full_prompt_cache`.
    """
    from transformers import DynamicCache

    if not architecture_of(require_patched(model, tokenizer)).has_prefix_states("positive"):
        raise GistError("full_prompt_cache is for decoders; an encoder-decoder reads prompt and input together")
    rows = [encoding.chunks[0] for encoding in tokenizer.encode_prompts(list(prompts), 1)]
    lengths = torch.tensor([len(row) for row in rows])
    check_positions(model, lengths.tolist(), "prompt", "nothing after it")
    ids, is_token = pad_rows(rows, tokenizer.pad_token_id, left=False)
    past: Any = DynamicCache()  # without a config, so that every layer keeps all keys
    with evaluating(model), torch.no_grad():
        device = input_weight(model).device
        model.base_model(input_ids=ids.to(device), **{cache_argument(): past}, use_cache=True)
    # The slots of a cache are aligned on the right.
    order = (torch.arange(ids.shape[1]) - (ids.shape[1] - lengths)[:, None]).clamp(min=0)
    order_on = on_each_device(order[:, None, :, None])

    def aligned(states: torch.Tensor) -> torch.Tensor:
        return states if bool(is_token.all()) else states.take_along_dim(order_on(states.device), dim=2)

    return GistCache(
        tuple(aligned(layer.keys) for layer in past.layers),
        tuple(aligned(layer.values) for layer in past.layers),
        lengths,
        replace(origin, condition="prompt"),
        rotary=rotary_of(model),
    ).blanked()


def whole_prompt(model: PreTrainedModel, tokenizer: GistTokenizer, prompt: str, origin: CacheOrigin) -> GistCache:
    """Return the states of the full prompt as ordinary text, of any kind of model.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        prompt: the text.
        origin: what the states belong to; of a decoder, their condition becomes ``"prompt"``.

    Returns:
        A cache of one prompt, with a slot for each of its tokens.

    Raises:
        GistError: the prompt is empty or exceeds the model's positions.
    """
    if architecture_of(require_patched(model, tokenizer)).has_prefix_states("positive"):
        return full_prompt_cache(model, tokenizer, prompt, origin)
    with evaluating(model):
        return text_states(model, tokenizer.encode_prompts([prompt], 1)[0].chunks[0], origin)


def _num_positions(model: PreTrainedModel, encoding: GistEncoding, condition: str) -> int:
    """How many positions a prompt with its gists takes.

    Rotary embeddings depend only on the difference of two positions, so what counts is how far a row is from what it
    sees. A chunk is right before its gist, at positions that count back from it: the row of a gist sees at most its
    whole chunk, or the first gist. Where frequencies depend on the length, all positions of a sequence count together;
    they begin with the first chunk, and no chunk is longer than the first.
    """
    if condition != "gist":
        return len(encoding.input_ids)
    k, longest = encoding.gist_spans[0][1] - encoding.gist_start, max(map(len, encoding.chunks))
    if is_length_dependent(model.config):
        return longest + encoding.num_gist_tokens
    return max(longest + k, encoding.num_gist_tokens)


def _check_window(model: PreTrainedModel, encodings: Sequence[GistEncoding]) -> None:
    """Raise if a sliding window would cut a prompt in chunks."""
    # A window counts columns. With several chunks in a sequence, the columns between a gist and what follows a later
    # chunk hold that chunk; when prompts run chunk by chunk, and in the cache, they do not. This makes no difference as
    # long as the row after the prompt still sees the first gist.
    window = sliding_windows(model.config)
    for row, encoding in enumerate(encodings):
        reach = len(encoding.input_ids) - encoding.gist_start + 1
        if window is not None and len(encoding.gist_spans) > 1 and reach > window:
            raise GistError(
                f"prompt {row} has {len(encoding.gist_spans)} chunks and spans {reach} columns from its first gist to "
                f"what follows its last, more than the sliding window of {model.config.model_type}, {window}: how far "
                "a gist reaches would depend on the chunks in between, which no cache holds; raise chunk_length so "
                "that the prompt is one chunk, or shorten it"
            )
