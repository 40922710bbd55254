"""Count what a request costs with no cache, a prefix cache and a gist cache: FLOPs of forward passes, bytes of caches.

Place in the flow: next to the other evaluations, but needs only a model's configuration. No weights are allocated: the
model is built on the meta device, and torch's FLOP counter measures a few short passes, from which all others follow.
Time is not counted here; ``gisting.measure`` measures it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from gisting._compat import cache_argument
from gisting.errors import GistError
from gisting.models.registry import family_of, is_length_dependent, sliding_windows

__all__ = [
    "DecoderFlopCounts",
    "FlopCounts",
    "RequestCost",
    "cache_bytes",
    "count_flops",
    "format_bytes",
    "forward_flops",
    "request_costs",
]

GB = 10**9


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs of any forward pass of one model at batch size 1, as polynomials with integer coefficients.

    Each row that is run costs a fixed number of FLOPs (projections, feed-forward, logits) and more for each key, cached
    or in the same pass, masked or not, because that is what dense attention computes. A layer with a sliding window
    keeps ``window - 1`` keys and drops earlier ones, as transformers' caches do. Latent attention also computes each
    key of a pass, cached or new, from what it caches.

    Args:
        constant: FLOPs of a pass, independent of its length.
        row: FLOPs of a row, without its attention.
        pair: FLOPs of a row and a key, in all layers without a sliding window.
        window_pair: FLOPs of a row and a key, in all layers with a sliding window.
        window: the number of positions that a row sees in a layer with a sliding window, including its own; None if no
            layer has one.
        decoder: the costs of an encoder-decoder's decoder, in which case the other fields are its encoder's.
        key: FLOPs of a key, cached or in the same pass, however many rows there are.
    """

    constant: int
    row: int
    pair: int
    window_pair: int = 0
    window: int | None = None
    decoder: DecoderFlopCounts | None = None
    key: int = 0

    def forward(self, num_tokens: int, num_cached: int = 0) -> int:
        """Count the FLOPs up to the first token of an answer; arguments and errors as for :func:`forward_flops`."""
        _check_number("num_tokens", num_tokens, 1)
        _check_number("num_cached", num_cached, 0)
        flops = self.prefill(num_tokens, num_cached)
        return flops if self.decoder is None else flops + self.decoder.first(num_cached + num_tokens)

    def prefill(self, num_tokens: int, num_cached: int = 0) -> int:
        """Count as :meth:`forward` does, without an encoder-decoder's decoder and without checks."""
        held = num_cached if self.window is None else min(num_cached, self.window - 1)
        keys = self.pair * (num_cached + num_tokens) + self.window_pair * (held + num_tokens)
        return self.constant + self.key * (num_cached + num_tokens) + num_tokens * (self.row + keys)

    def steps(self, num_tokens: int, num_steps: int) -> int:
        """Count the FLOPs of ``num_steps`` decoding steps of one token each.

        They follow a first pass that had ``num_tokens`` tokens, cached or run.
        """
        if self.decoder is None:
            return sum(self.prefill(1, num_tokens + step) for step in range(num_steps))
        return sum(self.decoder.later(num_tokens, 1 + step) for step in range(num_steps))


@dataclass(frozen=True)
class DecoderFlopCounts:
    """FLOPs of an encoder-decoder's decoder for one token, given S encoder states.

    Args:
        first_constant: FLOPs of the first step, which also projects the encoder states to keys and values.
        first_source: FLOPs of the first step, for each encoder state.
        later_constant: FLOPs of a later step.
        later_source: FLOPs of a later step, for each encoder state.
        pair: FLOPs of a later step, for each decoder token before it.
    """

    first_constant: int
    first_source: int
    later_constant: int
    later_source: int
    pair: int

    def first(self, num_source: int) -> int:
        """Count the FLOPs of the step that reads the start token, given ``num_source`` encoder states."""
        return self.first_constant + self.first_source * num_source

    def later(self, num_source: int, num_cached: int) -> int:
        """Count the FLOPs of a step after ``num_cached`` decoder tokens, including the start token.

        ``num_source`` is the number of encoder states.
        """
        return self.later_constant + self.later_source * num_source + self.pair * num_cached


@dataclass(frozen=True)
class RequestCost:
    """The costs of one way to answer a request.

    FLOPs are counted for one request, with logits at every token that is run (:func:`forward_flops`). The first token
    of an answer comes from the first pass; each of the others takes a decoding step.

    Args:
        mode: ``"no cache"``, ``"prefix cache"`` or ``"gist cache"``.
        num_cached_tokens: tokens that are in the cache before the request.
        num_new_tokens: tokens that the request adds.
        num_output_tokens: tokens of the answer.
        batch_size: number of concurrent requests.
        dtype: dtype of the cached states, such as ``"bfloat16"``.
        first_token_flops: FLOPs up to the first token of the answer.
        answer_flops: FLOPs of the whole answer, including the first token.
        fill_flops: FLOPs to fill the cache, once per prompt.
        prompt_bytes: bytes that are kept for each prompt.
        batch_bytes: bytes of the keys and values of ``batch_size`` requests at their last token, without sharing.
    """

    mode: str
    num_cached_tokens: int
    num_new_tokens: int
    num_output_tokens: int
    batch_size: int
    dtype: str
    first_token_flops: int
    answer_flops: int
    fill_flops: int
    prompt_bytes: int
    batch_bytes: int

    @property
    def prompts_per_gb(self) -> int | None:
        """The number of prompts whose states fit into 10^9 bytes; None if nothing is kept."""
        return GB // self.prompt_bytes if self.prompt_bytes else None

    def storage_bytes(self, num_prompts: int) -> int:
        """Return the bytes that are kept for ``num_prompts`` prompts.

        Raises:
            GistError: ``num_prompts`` is negative.
        """
        _check_number("num_prompts", num_prompts, 0)
        return num_prompts * self.prompt_bytes

    def pflops_per_day(self, requests_per_day: int) -> float:
        """Return the FLOPs of a day's answers in units of 10^15, without filling the caches.

        Raises:
            GistError: ``requests_per_day`` is negative.
        """
        _check_number("requests_per_day", requests_per_day, 0)
        return requests_per_day * self.answer_flops / 1e15

    def saved(self, other: RequestCost) -> float:
        """Return the share of the FLOPs of ``other`` that this way saves, negative if it needs more.

        FLOPs are counted over a whole answer, so the share is the same for a day's traffic.
        """
        return 1 - self.answer_flops / other.answer_flops

    def saved_to_first_token(self, other: RequestCost) -> float:
        """Return the share of the FLOPs of ``other`` that this way saves up to the first token."""
        return 1 - self.first_token_flops / other.first_token_flops


def count_flops(config: PreTrainedConfig) -> FlopCounts:
    """Count the FLOPs of a model once, for all lengths.

    Only matrix products count, with two FLOPs for a multiplication and its addition, as in torch's FLOP counter and in
    the tables of Mu et al. (2023, arXiv:2304.08467). In a mixture of experts, only the experts of each token count.

    Args:
        config: the configuration of a model of a supported family.

    Returns:
        The polynomials that :func:`forward_flops` evaluates.

    Raises:
        UnsupportedModelError: the model's family is not supported.
    """
    family_of(config)
    model = _meta_model(config)
    if config.is_encoder_decoder:
        one, two, three = (_encoder(model, length) for length in (1, 2, 3))
        pair = (three - 2 * two + one) // 2
        row = two - one - 3 * pair
        first, first_next = _decoder_step(model, 1, 0), _decoder_step(model, 2, 0)
        later, later_next = _decoder_step(model, 1, 1), _decoder_step(model, 2, 1)
        decoder_pair = _decoder_step(model, 1, 2) - later
        source = later_next - later
        decoder = DecoderFlopCounts(
            first_constant=2 * first - first_next,
            first_source=first_next - first,
            later_constant=later - source - decoder_pair,
            later_source=source,
            pair=decoder_pair,
        )
        return FlopCounts(one - row - pair, row, pair, decoder=decoder)
    none, one = _decoder(model, 1, 0), _decoder(model, 1, 1)
    two = _decoder(model, 2, 0)
    both = _decoder(model, 2, 1) - two - (one - none)  # FLOPs of a row and a key, in all layers
    key = one - none - both
    row = two - none - 3 * both - key
    window, pair = sliding_windows(config), both
    if window is not None:
        pair = _decoder(model, 1, window) - _decoder(model, 1, window - 1) - key
    return FlopCounts(none - row - both - key, row, pair, both - pair, window, key=key)


def forward_flops(config: PreTrainedConfig, num_tokens: int, num_cached: int = 0) -> int:
    """Count the FLOPs of a forward pass over ``num_tokens`` tokens after ``num_cached`` cached ones, at batch size 1.

    They are counted by :func:`count_flops`, with logits at every token that is run; for many lengths, call that once
    instead. In an encoder-decoder, the encoder reads ``num_tokens`` tokens, which also attend to the cached ones, and
    the decoder projects and attends to both and produces one token. (``gisting.generate`` also lets the encoder read k
    placeholders, whose outputs are replaced. They are not counted.)

    Args:
        config: the configuration of a model of a supported family.
        num_tokens: number of tokens that are run (in an encoder-decoder: by the encoder), at least 1.
        num_cached: number of tokens whose keys and values (in an encoder-decoder: also last hidden states) are cached.

    Raises:
        GistError: a number is out of range.
        UnsupportedModelError: the model's family is not supported.
    """
    _check_number("num_tokens", num_tokens, 1)
    _check_number("num_cached", num_cached, 0)
    return count_flops(config).forward(num_tokens, num_cached)


def format_bytes(number: int, digits: int = 2) -> str:
    """Format a number of bytes in decimal units: ``format_bytes(245_760, 1)`` returns ``"245.8 kB"``.

    Args:
        number: number of bytes.
        digits: digits after the decimal point, from 1 kB on.
    """
    for unit, scale in (("GB", GB), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:,.{digits}f} {unit}"
    return f"{number} B"


def cache_bytes(
    config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype = torch.float32, *, is_windowed: bool = False
) -> int:
    """Return the bytes of the cached states of ``num_tokens`` tokens in all layers, at batch size 1.

    The states are a decoder's keys and values, or an encoder's keys, values and last hidden states.

    Args:
        config: the configuration of a model of a supported family.
        num_tokens: number of tokens, at least 0.
        dtype: dtype of the states.
        is_windowed: whether layers with a sliding window keep only their last ``window - 1`` tokens, as transformers'
            caches do. A gist cache keeps all of its tokens in every layer.

    Raises:
        GistError: ``num_tokens`` is negative.
        UnsupportedModelError: the model's family is not supported.
    """
    _check_number("num_tokens", num_tokens, 0)
    family_of(config)
    if config.is_encoder_decoder:
        numbers = 2 * config.num_hidden_layers * _key_heads(config) * config.d_kv + config.d_model
        return numbers * num_tokens * dtype.itemsize
    shapes = _state_shapes(config)
    window = sliding_windows(config) if is_windowed else None
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(shapes)
    numbers = 0
    for (keys, values), layer_type in zip(shapes, layer_types, strict=True):
        held = num_tokens
        if window is not None and layer_type == "sliding_attention":
            held = min(num_tokens, window - 1)
        numbers += held * (keys.numel() + values.numel())
    return numbers * dtype.itemsize


def request_costs(
    config: PreTrainedConfig,
    prompt_tokens: int,
    input_tokens: int,
    num_gist_tokens: int = 1,
    *,
    output_tokens: int = 1,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> list[RequestCost]:
    """Count what a request costs if its prompt is read again, cached in full, or cached as a gist.

    Args:
        config: the configuration of a model of a supported family.
        prompt_tokens: length of the repeated prompt, at least 1.
        input_tokens: length of the new text after it, at least 1.
        num_gist_tokens: k, at least 1.
        output_tokens: length of the answer, including its end of sequence, at least 1.
        batch_size: number of concurrent requests, for ``batch_bytes``.
        dtype: dtype of the cached states.

    Returns:
        Rows for ``"no cache"``, ``"prefix cache"`` and ``"gist cache"``. An encoder-decoder has no prefix cache: its
        encoder reads in both directions, so the states of a prompt depend on the text after it.

    Raises:
        GistError: a number is out of range.
        UnsupportedModelError: the model's family is not supported.
    """
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("input_tokens", input_tokens),
        ("num_gist_tokens", num_gist_tokens),
        ("output_tokens", output_tokens),
        ("batch_size", batch_size),
    ):
        _check_number(name, value, 1)
    counts = count_flops(config)

    def row(mode: str, cached: int, new: int, fill: int, prompt_bytes: int) -> RequestCost:
        first = counts.forward(new, cached)
        return RequestCost(
            mode=mode,
            num_cached_tokens=cached,
            num_new_tokens=new,
            num_output_tokens=output_tokens,
            batch_size=batch_size,
            dtype=str(dtype).removeprefix("torch."),
            first_token_flops=first,
            answer_flops=first + counts.steps(cached + new, output_tokens - 1),
            fill_flops=fill and counts.prefill(fill),
            prompt_bytes=prompt_bytes,
            batch_bytes=batch_size * _answer_bytes(config, cached + new, output_tokens, dtype),
        )

    rows = [row("no cache", 0, prompt_tokens + input_tokens, 0, 0)]
    if not config.is_encoder_decoder:
        prefix_bytes = cache_bytes(config, prompt_tokens, dtype, is_windowed=True)
        rows.append(row("prefix cache", prompt_tokens, input_tokens, prompt_tokens, prefix_bytes))
    gist_bytes = cache_bytes(config, num_gist_tokens, dtype)
    rows.append(row("gist cache", num_gist_tokens, input_tokens, prompt_tokens + num_gist_tokens, gist_bytes))
    return rows


def _check_number(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GistError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _answer_bytes(config: PreTrainedConfig, num_tokens: int, output_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values that the last of ``output_tokens`` attends to, after ``num_tokens`` others."""
    if not config.is_encoder_decoder:
        return cache_bytes(config, num_tokens + output_tokens - 1, dtype, is_windowed=True)
    # Cross-attention has the encoder's tokens; self-attention has the start token and all but the answer's last token.
    per_token = 2 * config.num_decoder_layers * _key_heads(config) * config.d_kv
    return per_token * (num_tokens + output_tokens) * dtype.itemsize


def _key_heads(config: PreTrainedConfig) -> int:
    # The class is checked because a config also keeps settings that its family does not have and ignores.
    grouped = getattr(config, "num_key_value_heads", None) if hasattr(type(config), "num_key_value_heads") else None
    return grouped or config.num_attention_heads


_Shapes = tuple[torch.Size, torch.Size]
_known_shapes: dict[str, list[_Shapes]] = {}


def _state_shapes(config: PreTrainedConfig) -> list[_Shapes]:
    """What each layer of a decoder keeps of one token: the shapes ``(1, G, 1, D)`` of its keys and values.

    They are read off the model: heads and sizes may differ between layers, and between keys and values.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _known_shapes:
        cache = DynamicCache()
        _run(_meta_model(config), input_ids=_ids(1), **{cache_argument(): cache}, use_cache=True)
        layers: list[Any] = cache.layers
        _known_shapes[key] = [(layer.keys.shape, layer.values.shape) for layer in layers]
    return _known_shapes[key]


# -- counting on the meta device ---------------------------------------------------------------------------------------


def _meta_model(config: PreTrainedConfig) -> Any:
    """The model of a configuration without weights, changed only where its code would need real numbers."""
    config = copy.deepcopy(config)
    if is_length_dependent(config):
        # These rotary types read the largest position, which has no value here; all types cost the same products.
        parameters: dict[str, Any] = config.rope_parameters  # pyright: ignore[reportAttributeAccessIssue]
        for part in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:
            part["rope_type"] = "default"
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Eager attention counts every product; fused operators are counted by formulas that differ between versions.
    # Experts are gathered for each token, the only implementation that works without values.
    settings = {"experts_implementation": "batched_mm"} if hasattr(type(config), "num_experts_per_tok") else {}
    with torch.device("meta"):
        return auto.from_config(config, attn_implementation="eager", dtype=torch.float32, **settings).eval()


def _run(model: Any, **inputs: Any) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def _ids(length: int) -> torch.Tensor:
    return torch.zeros(1, length, dtype=torch.long, device="meta")


def _fill(cache: Cache, shapes: list[_Shapes], length: int) -> None:
    for layer, pair in enumerate(shapes if length else ()):
        keys, values = (torch.zeros(1, heads, length, size, device="meta") for _, heads, _, size in pair)
        cache.update(keys, values, layer)


def _decoder(model: Any, num_tokens: int, num_cached: int) -> int:
    cache = DynamicCache(config=model.config)
    with torch.device("meta"):
        _fill(cache, _state_shapes(model.config), num_cached)
    return _run(model, input_ids=_ids(num_tokens), **{cache_argument(): cache}, use_cache=True)


def _encoder(model: Any, num_tokens: int) -> int:
    return _run(model.get_encoder(), input_ids=_ids(num_tokens))


def _decoder_step(model: Any, num_source: int, num_cached: int) -> int:
    config = model.config
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if num_cached:
        state = torch.Size((1, _key_heads(config), 1, config.d_kv))
        _fill(cache.self_attention_cache, [(state, state)] * config.num_decoder_layers, num_cached)
        _fill(cache.cross_attention_cache, [(state, state)] * config.num_decoder_layers, num_source)
        cache.is_updated = dict.fromkeys(range(config.num_decoder_layers), True)
    return _run(
        model,
        encoder_outputs=BaseModelOutput(torch.zeros(1, num_source, config.d_model, device="meta")),  # pyright: ignore[reportArgumentType]
        decoder_input_ids=_ids(1),
        **{cache_argument(): cache},
        use_cache=True,
    )
