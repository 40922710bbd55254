"""Compress prompts, and generate from what they were compressed to.

Place in the flow: cache -> **generation** -> text. ``compress`` runs prompts once; ``generate`` answers inputs from a
cache with stock ``model.generate``, ragged batches included. Checks that a cache belongs to the model at hand; knows
no family beyond its kind.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheMismatchError, GistError
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import CONDITIONS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["check_origin", "compress", "generate"]


def compress(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prompts: Sequence[str],
    num_gist_tokens: int | Sequence[int] = 1,
    *,
    condition: str = "gist",
    batch_size: int = 32,
) -> GistCache:
    """Press each prompt into the keys and values of its gist tokens (Gisting, section 3).

    Args:
        model: a patched model, on any device, in any floating dtype.
        tokenizer: the tokenizer it was patched for.
        prompts: B texts of any lengths.
        num_gist_tokens: k, one for all or one each. A model is good at the k it was trained with.
        condition: what a later text may see of the prompt: ``"gist"``, or for comparison on a decoder ``"positive"``
            (prompt and gist: ordinary prefix caching) and ``"negative"`` (nothing).
        batch_size: how many prompts are run at once; longer and shorter ones are run apart.

    Returns:
        One cache of B prompts, in their order.

    Raises:
        GistError: the model is not patched, there is no prompt or an empty one, or a prompt exceeds the model's
            positions.
        GistTokenError: a k is less than 1.
    """
    from gisting.models import decoder, encoder_decoder
    from gisting.models.mode import evaluating
    from gisting.models.patch import require_patched

    family = require_patched(model, tokenizer)
    _check_condition(condition)
    if batch_size < 1:
        raise GistError(f"batch_size must be at least 1, got {batch_size}")
    if family.is_encoder_decoder and condition != "gist":
        raise GistError(
            f"condition {condition!r} leaves no states to cache in an encoder, where prompt and rest read each "
            "other; use generate(prompts=..., condition=...)"
        )
    encodings = tokenizer.encode_prompts(prompts, num_gist_tokens)
    if not encodings:
        raise GistError("prompts is empty; give at least one prompt")
    _check_positions(model, [len(encoding.input_ids) for encoding in encodings], "prompt", "its gist")
    origin = _origin(model, tokenizer, condition)
    run = encoder_decoder.prefix_states if family.is_encoder_decoder else decoder.prefix_states
    # Sorted by length, so that a batch holds little padding.
    order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].input_ids))
    with evaluating(model):
        parts = [
            run(model, tokenizer, [encodings[row] for row in order[start : start + batch_size]], origin)
            for start in range(0, len(order), batch_size)
        ]
    if len(parts) == 1 and order == list(range(len(order))):
        return parts[0]
    back = sorted(range(len(order)), key=lambda place: order[place])
    return GistCache.cat(parts).select(back)


def generate(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str],
    *,
    cache: GistCache | None = None,
    prompts: Sequence[str] | None = None,
    num_gist_tokens: int | Sequence[int] = 1,
    condition: str = "gist",
    max_new_tokens: int | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """Answer inputs, each behind its compressed prompt.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        inputs: B texts; "" where the prompt says it all.
        cache: the compressed prompts, one for all inputs or one each. It is left as it is.
        prompts: in place of ``cache``, the prompts themselves, one for all or one each; they are run under
            ``condition``.
        num_gist_tokens: k, where ``prompts`` are given.
        condition: ``"gist"``, ``"positive"`` or ``"negative"``, where ``prompts`` are given.
        max_new_tokens: how many tokens an answer may have; None for what a given ``generation_config`` says, or 128.
        **generate_kwargs: for ``model.generate``: ``do_sample``, ``num_beams``, ``num_return_sequences``, ...

    Returns:
        B texts, or B times ``num_return_sequences``, those of an input together.

    Raises:
        GistError: the model is not patched, numbers do not fit, or an input exceeds the model's positions.
        CacheMismatchError: the cache belongs to another model, tokenizer or template, or has another dtype, device or
        batch size.
    """
    from gisting.models.mode import evaluating
    from gisting.models.patch import require_patched

    family = require_patched(model, tokenizer)
    _check_condition(condition)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise GistError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    reserved = {
        "input_ids",
        "attention_mask",
        "past_key_values",
        "position_ids",
        "encoder_outputs",
        "inputs",
    } & generate_kwargs.keys()
    if reserved:
        raise GistError(
            f"{', '.join(sorted(reserved))} are made from inputs and cache; call model.generate for your own"
        )
    if (cache is None) == (prompts is None):
        raise GistError("give either cache or prompts: generate(..., cache=compress(model, tokenizer, prompts))")
    if not inputs:
        raise GistError('inputs is empty; give at least one text, "" where the prompt says it all')
    if isinstance(prompts, str):
        raise GistError("prompts must be a list of texts, got one text; put it in a list")
    generate_kwargs = _settings(model, tokenizer, max_new_tokens, generate_kwargs)

    if cache is None:
        prompts = list(prompts or ())
        _check_rows("prompts", len(prompts), len(inputs))
        if family.is_encoder_decoder and condition != "gist":
            with evaluating(model):
                return _generate_from_text(
                    model, tokenizer, inputs, prompts, num_gist_tokens, condition, generate_kwargs
                )
        cache = compress(model, tokenizer, prompts, num_gist_tokens, condition=condition)
    else:
        check_origin(model, tokenizer, cache)
    _check_rows("cache", len(cache), len(inputs))
    if len(cache) == 1 and len(inputs) > 1:
        cache = cache.select([0] * len(inputs))
    continuations = tokenizer.encode_continuations(inputs)
    answer = _answer_encoder_decoder if family.is_encoder_decoder else _answer_decoder
    with evaluating(model):
        return answer(model, tokenizer, cache, continuations, generate_kwargs)


def check_origin(model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache) -> None:
    """Raise unless ``cache`` was made by this model and tokenizer and lies where the model does.

    Raises:
        CacheMismatchError: it does not; both sides are named.
    """
    from gisting.models.fingerprint import fingerprint
    from gisting.models.weights import input_weight

    weight = input_weight(model)
    if cache.dtype != weight.dtype:
        raise CacheMismatchError(
            f"cache has dtype {cache.dtype}, the model {weight.dtype}; compress the prompt again, or cast: "
            f"cache.to(dtype={weight.dtype})"
        )
    if cache.device != weight.device:
        raise CacheMismatchError(
            f"cache is on {cache.device}, the model on {weight.device}; move it: cache.to({str(weight.device)!r})"
        )
    origin = cache.origin
    if origin.tokenizer != tokenizer.fingerprint:
        raise CacheMismatchError(
            f"cache was made with tokenizer {origin.tokenizer} (template {origin.template}), this one is "
            f"{tokenizer.fingerprint} (template {tokenizer.template.name}); compress the prompt again"
        )
    found = fingerprint(model)
    if origin.model != found:
        raise CacheMismatchError(f"cache was made for {origin.model}, this model is {found}; compress the prompt again")


def _origin(model: PreTrainedModel, tokenizer: GistTokenizer, condition: str) -> CacheOrigin:
    from gisting.models.fingerprint import fingerprint

    return CacheOrigin(fingerprint(model), tokenizer.fingerprint, tokenizer.template.name, condition)


def _answer_decoder(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    cache: GistCache,
    continuations: list[list[int]],
    generate_kwargs: dict[str, Any],
) -> list[str]:
    from gisting.models import decoder
    from gisting.models.registry import sliding_windows

    for row, ids in enumerate(continuations):
        if not ids:
            raise GistError(
                f"inputs[{row}] leaves nothing behind the gist for the model to continue; give an input, or a "
                "template with text there"
            )
    config = generate_kwargs["generation_config"]
    new_tokens = config.max_new_tokens
    # Stock generate repeats ids for each beam or sample, but not a cache that it is given.
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    lengths = [held + len(ids) + new_tokens for held, ids in zip(cache.num_gist_tokens, continuations, strict=True)]
    _check_positions(model, lengths, "input", f"its cached prefix and {new_tokens} new tokens")
    if decoder.needs_equal_lengths(sliding_windows(model.config), cache.num_slots, continuations, new_tokens):
        groups: dict[tuple[int, int], list[int]] = {}
        for row, ids in enumerate(continuations):
            groups.setdefault((cache.num_gist_tokens[row], len(ids)), []).append(row)
    else:
        groups = {(0, 0): list(range(len(continuations)))}
    answers: list[list[str]] = [[] for _ in continuations]
    for rows in groups.values():
        arguments, given = decoder.prepare_generation(
            model, tokenizer, cache.select(rows) if len(groups) > 1 else cache, [continuations[row] for row in rows]
        )
        if copies > 1 and "past_key_values" in arguments:
            arguments["past_key_values"].batch_repeat_interleave(copies)
        texts = _texts(tokenizer, _run(model, arguments, generate_kwargs)[:, given:])
        for place, row in enumerate(rows):
            each = len(texts) // len(rows)
            answers[row] = texts[place * each : (place + 1) * each]
    return [text for each in answers for text in each]


def _answer_encoder_decoder(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    cache: GistCache,
    continuations: list[list[int]],
    generate_kwargs: dict[str, Any],
) -> list[str]:
    from gisting.models import encoder_decoder

    arguments = encoder_decoder.prepare_generation(model, tokenizer, cache, continuations)
    return _texts(tokenizer, _run(model, arguments, generate_kwargs))


def _generate_from_text(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str],
    prompts: Sequence[str],
    num_gist_tokens: int | Sequence[int],
    condition: str,
    generate_kwargs: dict[str, Any],
) -> list[str]:
    from gisting.models import encoder_decoder

    if len(prompts) == 1:
        prompts = [prompts[0]] * len(inputs)
        if not isinstance(num_gist_tokens, int) and len(num_gist_tokens) == 1:
            num_gist_tokens = num_gist_tokens[0]
    encodings: list[GistEncoding] = tokenizer.encode_batch(prompts, inputs, num_gist_tokens=num_gist_tokens)
    arguments = encoder_decoder.prepare_full_generation(model, tokenizer, encodings, condition)
    return _texts(tokenizer, _run(model, arguments, generate_kwargs))


def _run(model: Any, arguments: dict[str, Any], generate_kwargs: dict[str, Any]) -> torch.Tensor:
    """Stock ``generate``."""
    return model.generate(**arguments, **generate_kwargs)


def _settings(
    model: PreTrainedModel, tokenizer: GistTokenizer, max_new_tokens: int | None, generate_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All settings in one ``generation_config``, since stock generate takes that or keywords; other suppressions are
    kept.
    """
    own = model.generation_config
    given = generate_kwargs.get("generation_config")
    config = copy.deepcopy(own if given is None else given)
    rest = config.update(**{name: value for name, value in generate_kwargs.items() if name != "generation_config"})
    suppressed = {*(config.suppress_tokens or ()), *(own.suppress_tokens or ()), tokenizer.gist_token_id}
    if max_new_tokens is None:
        max_new_tokens = 128 if given is None or given.max_new_tokens is None else given.max_new_tokens
    config.update(max_new_tokens=max_new_tokens, suppress_tokens=sorted(suppressed))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.return_dict_in_generate:
        raise GistError("return_dict_in_generate changes what is returned; call model.generate for scores and states")
    return {**rest, "generation_config": config}


def _texts(tokenizer: GistTokenizer, ids: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row).strip() for row in ids.tolist()]


def _check_condition(condition: str) -> None:
    if condition not in CONDITIONS:
        raise GistError(f"condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")


def _check_rows(name: str, have: int, inputs: int) -> None:
    if have not in (1, inputs):
        raise CacheMismatchError(f"{name} must be one for all {inputs} inputs or one each, got {have}")


def _check_positions(model: PreTrainedModel, lengths: list[int], what: str, beside: str) -> None:
    from gisting.models.registry import position_limit

    limit = position_limit(model.config)
    for row, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise GistError(
                f"{what} {row} with {beside} takes {length} positions, {model.config.model_type} has {limit}; "
                "shorten it"
            )
