"""Measure the time to the first token with no cache, a prefix cache and a gist cache, alternating in one process.

Place in the flow: a patched decoder -> **latency** -> rows. The honest baseline of a gist cache is a *prefix cache*,
the prompt's keys and values kept in full. Both start from states in memory, and nothing is reported unless the cached
runs give the same logits as the uncached ones.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.eval.cost import cache_bytes, forward_flops
from gisting.generation import compress
from gisting.measure.rows import spread
from gisting.models.mode import evaluating
from gisting.models.state import require_patched
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer
from gisting.visibility import gist

__all__ = ["LatencyRow", "cache_view", "check_logits", "first_token", "wait"]


@dataclass(frozen=True)
class LatencyRow:
    """One way to reach the first token of an answer, at batch size 1."""

    mode: str
    num_cached_tokens: int
    num_new_tokens: int
    cache_bytes: int
    flops: int
    latency_ms: float
    latency_ms_low: float
    latency_ms_high: float
    num_repeats: int


def first_token(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prompt: str,
    input: str,
    num_gist_tokens: int = 1,
    *,
    repeats: int = 50,
    warmup: int = 5,
) -> list[LatencyRow]:
    """Measure one forward pass up to the first token of the answer, in three ways.

    ``no cache`` reads prompt and input as plain text, ``prefix cache`` has the prompt's keys and values, ``gist cache``
    has its gist's. Both are passed to the model by :func:`cache_view`, which is part of the time.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        prompt: the prompt that is cached.
        input: what follows it.
        num_gist_tokens: k.
        repeats: measured rounds; each round runs all three.
        warmup: unmeasured rounds before them.

    Returns:
        A row for each way, with median and quartiles over the repeats.

    Raises:
        GistError: the model is an encoder-decoder, or a cached run does not give the logits of its uncached one.
    """
    if require_patched(model, tokenizer).is_encoder_decoder:
        raise GistError(
            "first_token measures decoders only, because an encoder-decoder has no prefix cache to compare with"
        )
    if repeats < 1 or warmup < 0:
        raise GistError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    device = input_weight(model).device
    encoding = tokenizer.encode(prompt, input, num_gist_tokens=num_gist_tokens)
    prompt_ids = torch.tensor([encoding.input_ids[: encoding.gist_start]], device=device)
    rest_ids = torch.tensor([encoding.input_ids[encoding.gist_end :]], device=device)
    plain_ids = torch.cat([prompt_ids, rest_ids], dim=1)
    compressed = compress(model, tokenizer, [prompt], num_gist_tokens)
    with evaluating(model), torch.inference_mode():
        kept = model(prompt_ids, use_cache=True)[cache_argument()]
        kept_gist = compressed.as_past_key_values()

        def run_plain() -> Tensor:
            return model(plain_ids, use_cache=True, logits_to_keep=1).logits

        def run_prefix() -> Tensor:
            return model(rest_ids, **{cache_argument(): cache_view(kept)}, use_cache=True, logits_to_keep=1).logits

        def run_gist() -> Tensor:
            return model(rest_ids, **{cache_argument(): cache_view(kept_gist)}, use_cache=True, logits_to_keep=1).logits

        check_logits("prefix cache", run_prefix(), run_plain())
        check_logits("gist cache", run_gist(), _uncached_gist(model, tokenizer, encoding.input_ids, device))
        runs: dict[str, Callable[[], Tensor]] = {
            "no cache": run_plain,
            "prefix cache": run_prefix,
            "gist cache": run_gist,
        }
        times: dict[str, list[float]] = {mode: [] for mode in runs}
        for number in range(warmup + repeats):
            for mode, run in runs.items():
                wait(device)
                start = time.perf_counter()
                run()
                wait(device)
                if number >= warmup:
                    times[mode].append(1000 * (time.perf_counter() - start))
    return [
        _row(model, mode, cached, new, times[mode], compressed)
        for mode, cached, new in (
            ("no cache", 0, plain_ids.shape[1]),
            ("prefix cache", prompt_ids.shape[1], rest_ids.shape[1]),
            ("gist cache", num_gist_tokens, rest_ids.shape[1]),
        )
    ]


def cache_view(kept: Any, batch_size: int = 1) -> Any:
    """Return a transformers cache for one call that shares the states of ``kept`` and leaves ``kept`` unchanged.

    Nothing is copied: a dynamic cache grows by concatenating old and new states, which makes a copy, and never writes
    in place, so every call may start from the same tensors. This costs less than the ``copy.deepcopy`` in transformers'
    own recipe for prefix caching, so a prefix cache waits for nothing else. Layers of other kinds, which do write in
    place, are copied.

    Args:
        kept: a transformers cache of a decoder, of ``batch_size`` rows or of one.
        batch_size: rows of the call, all of which see a single kept row.
    """
    fresh = copy.copy(kept)
    fresh.layers = [
        copy.copy(layer) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else copy.deepcopy(layer)
        for layer in kept.layers
    ]
    for layer in fresh.layers:
        layer.keys, layer.values = (
            states if len(states) == batch_size else states.expand(batch_size, -1, -1, -1)
            for states in (layer.keys, layer.values)
        )
    # Tells a patched model, row by row, that the ids at the front are a gist's.
    if (mask := getattr(kept, "gist_mask", None)) is not None:
        fresh.gist_mask = mask.expand(batch_size, -1)
    return fresh


def _row(
    model: PreTrainedModel, mode: str, cached: int, new: int, times: list[float], compressed: GistCache
) -> LatencyRow:
    low, median, high = spread(times)
    size = compressed.num_bytes if mode == "gist cache" else cache_bytes(model.config, cached, compressed.dtype)
    return LatencyRow(mode, cached, new, size, forward_flops(model.config, new, cached), median, low, high, len(times))


def _uncached_gist(model: PreTrainedModel, tokenizer: GistTokenizer, ids: list[int], device: torch.device) -> Tensor:
    row = torch.tensor([ids], device=device)
    visibility = gist(row == tokenizer.gist_token_id)
    return model(
        row, attention_mask=visibility.as_attention_mask(), position_ids=visibility.position_ids, logits_to_keep=1
    ).logits


def check_logits(mode: str, found: Tensor, expected: Tensor) -> None:
    """Check that cached and uncached logits agree up to rounding, in machine epsilons of the largest logit.

    Rounding grows with depth. The limit is a thousand epsilons in single precision, and sixteen in half precision,
    where a larger limit would let anything pass.

    Args:
        mode: what made ``found``, for the message.
        found: logits of the cached run, floating, of any shape.
        expected: logits of the uncached run, of the same shape.

    Args:
        mode: name of the cached way, for the message.
        found: its logits, floating point, of any shape.
        expected: the uncached run's logits, floating point, of the same shape.

    Raises:
        GistError: they do not agree; the message names ``mode``.
    """
    eps = torch.finfo(expected.dtype).eps
    tolerance = (1000 if eps < 1e-6 else 16) * eps * expected.abs().max()
    difference = (found - expected).abs().max()
    if not difference <= tolerance:
        raise GistError(
            f"{mode} differs from its uncached run by {difference:.2e} (allowed {tolerance:.2e}); no time is reported"
        )


def wait(device: torch.device) -> None:
    """Wait until ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
