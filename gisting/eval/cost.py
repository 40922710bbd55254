"""What a request costs, counted from a configuration alone: FLOPs of forward passes and bytes of caches, with no cache,
behind a prefix cache and behind a gist cache.

Place in the flow: beside the other measures, on a configuration in place of a model. No weights are made: the model is
built on the meta device, and torch's flop counter reads a few short passes, from which all others follow. Knows nothing
of time; that is measured by ``gisting.measure``.
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
    """FLOPs of every forward pass of one model, batch 1, as polynomials with whole coefficients.

    Rows that are run pay for themselves (projections, feed-forward, logits) and for each key that stands before them or
    among them, masked or not, for that is what a dense attention computes. A layer with a window holds ``window - 1``
    keys and lets go of earlier ones, as transformers' caches do.

    Args:
        constant: of a pass, whatever its length.
        row: of a row, without its attention.
        pair: of a row and a key, in all layers without a window.
        window_pair: of a row and a key, in all layers with one.
        window: positions that a row sees in layers with a window, itself among them; None where no layer has one.
        decoder: of an encoder-decoder, what its decoder costs; the rest is then its encoder's.
    """

    constant: int
    row: int
    pair: int
    window_pair: int = 0
    window: int | None = None
    decoder: DecoderFlopCounts | None = None

    def forward(self, num_tokens: int, num_cached: int = 0) -> int:
        """FLOPs of one pass up to the first token of an answer; arguments and errors as for :func:`forward_flops`."""
        _check_number("num_tokens", num_tokens, 1)
        _check_number("num_cached", num_cached, 0)
        flops = self.prefill(num_tokens, num_cached)
        return flops if self.decoder is None else flops + self.decoder.first(num_cached + num_tokens)

    def prefill(self, num_tokens: int, num_cached: int = 0) -> int:
        """The same without an encoder-decoder's decoder. Arguments as there, not checked."""
        held = num_cached if self.window is None else min(num_cached, self.window - 1)
        keys = self.pair * (num_cached + num_tokens) + self.window_pair * (held + num_tokens)
        return self.constant + num_tokens * (self.row + keys)

    def steps(self, num_tokens: int, num_steps: int) -> int:
        """FLOPs of ``num_steps`` decoding steps, one token each, behind ``num_tokens`` that the first pass had before
        it: cached ones and those that it ran.
        """
        if self.decoder is None:
            return sum(self.prefill(1, num_tokens + step) for step in range(num_steps))
        return sum(self.decoder.later(num_tokens, 1 + step) for step in range(num_steps))


@dataclass(frozen=True)
class DecoderFlopCounts:
    """FLOPs of an encoder-decoder's decoder for one token behind S encoder states.

    Args:
        first_constant: of the first step, which also projects the encoder's states to keys and values.
        first_source: of the first step, for each encoder state.
        later_constant: of a later step.
        later_source: of a later step, for each encoder state.
        pair: of a later step, for each decoder token before it.
    """

    first_constant: int
    first_source: int
    later_constant: int
    later_source: int
    pair: int

    def first(self, num_source: int) -> int:
        """The step that reads the start token, behind ``num_source`` encoder states."""
        return self.first_constant + self.first_source * num_source

    def later(self, num_source: int, num_cached: int) -> int:
        """A step behind ``num_source`` encoder states and ``num_cached`` decoder tokens, the start token among them."""
        return self.later_constant + self.later_source * num_source + self.pair * num_cached


@dataclass(frozen=True)
class RequestCost:
    """One way to answer a request: what it computes, what it keeps.

    FLOPs are of one request, with logits at every token that is run (:func:`forward_flops`). A decoding step costs its
    token alone; of an answer of N tokens the first comes from the first pass and N - 1 from steps.

    Args:
        mode: ``"no cache"``, ``"prefix cache"`` or ``"gist cache"``.
        num_cached_tokens: there before the request.
        num_new_tokens: read by the request.
        num_output_tokens: of the answer.
        batch_size: requests at once.
        dtype: of the states, such as ``"bfloat16"``.
        first_token_flops: up to the first token of the answer.
        answer_flops: of the whole answer, the first token included.
        fill_flops: to make what is kept, once for a prompt.
        prompt_bytes: kept for each prompt.
        batch_bytes: keys and values of ``batch_size`` requests at their last token, each with its own.
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
        """Prompts whose states fit into 10^9 bytes; None where nothing is kept."""
        return GB // self.prompt_bytes if self.prompt_bytes else None

    def storage_bytes(self, num_prompts: int) -> int:
        """Bytes that are kept for so many prompts.

        Raises:
            GistError: ``num_prompts`` is negative.
        """
        _check_number("num_prompts", num_prompts, 0)
        return num_prompts * self.prompt_bytes

    def pflops_per_day(self, requests_per_day: int) -> float:
        """FLOPs of a day's answers in 10^15, without those that fill the caches.

        Raises:
            GistError: ``requests_per_day`` is negative.
        """
        _check_number("requests_per_day", requests_per_day, 0)
        return requests_per_day * self.answer_flops / 1e15

    def saved(self, other: RequestCost) -> float:
        """The share of the FLOPs of ``other`` that this one does without, over whole answers; negative where it needs
        more. A day's traffic saves the same share.
        """
        return 1 - self.answer_flops / other.answer_flops

    def saved_to_first_token(self, other: RequestCost) -> float:
        """The same up to the first token. ``other`` is what it is compared with."""
        return 1 - self.first_token_flops / other.first_token_flops


def count_flops(config: PreTrainedConfig) -> FlopCounts:
    """Count a model once, for all lengths.

    Matrix products alone, two FLOPs for a multiplication with its addition, as torch's flop counter and the tables of
    Mu et al. (2023, arXiv:2304.08467) count them. Of a mixture of experts, those that a token is sent to.

    Args:
        config: configuration of a model of a supported family.

    Returns:
        Its polynomials, which :func:`forward_flops` evaluates.

    Raises:
        UnsupportedModelError: the model is of no supported family.
    """
    family_of(config)
    model = _meta_model(config)
    if config.is_encoder_decoder:
        one, two, three = (_encoder(model, length) for length in (1, 2, 3))
        pair = (three - 2 * two + one) // 2
        row = two - one - 3 * pair
        first, first_next = _decoder_step(model, 1, 0), _decoder_step(model, 2, 0)
        later, later_next = _decoder_step(model, 1, 1), _decoder_step(model, 2, 1)
        behind = _decoder_step(model, 1, 2) - later
        source = later_next - later
        decoder = DecoderFlopCounts(2 * first - first_next, first_next - first, later - source - behind, source, behind)
        return FlopCounts(one - row - pair, row, pair, decoder=decoder)
    none, one = _decoder(model, 1, 0), _decoder(model, 1, 1)
    both = one - none  # of a row and a key, in all layers
    row = _decoder(model, 2, 0) - none - 3 * both
    window, pair = sliding_windows(config), both
    if window is not None:
        pair = _decoder(model, 1, window) - _decoder(model, 1, window - 1)
    return FlopCounts(none - row - both, row, pair, both - pair, window)


def forward_flops(config: PreTrainedConfig, num_tokens: int, num_cached: int = 0) -> int:
    """FLOPs of one forward pass over ``num_tokens`` behind ``num_cached`` cached ones, batch 1.

    Counted as by :func:`count_flops`, with logits at every token that is run; for many lengths call that once. Of an
    encoder-decoder: the encoder reads ``num_tokens``, which also attend to the cached ones, and the decoder projects
    and attends to both and makes one token. (``gisting.generate`` lets the encoder read k placeholders as well, whose
    outputs are replaced; they are not counted.)

    Args:
        config: configuration of a model of a supported family.
        num_tokens: tokens that are run, at least 1; of an encoder-decoder, by the encoder.
        num_cached: tokens whose keys and values (of an encoder-decoder: and last hidden states) are there already.

    Raises:
        GistError: a number is out of range.
        UnsupportedModelError: the model is of no supported family.
    """
    _check_number("num_tokens", num_tokens, 1)
    _check_number("num_cached", num_cached, 0)
    return count_flops(config).forward(num_tokens, num_cached)


def format_bytes(number: int, digits: int = 2) -> str:
    """A number of bytes for people, in decimal units: ``format_bytes(245_760, 1)`` is ``"245.8 kB"``.

    Args:
        number: bytes.
        digits: behind the decimal point, from a kB on.
    """
    for unit, scale in (("GB", GB), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:,.{digits}f} {unit}"
    return f"{number} B"


def cache_bytes(
    config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype = torch.float32, *, is_windowed: bool = False
) -> int:
    """Bytes of the cached states of ``num_tokens`` in all layers, batch 1: keys and values of a decoder; those of the
    encoder and its last hidden states, of an encoder-decoder.

    Args:
        config: configuration of a model of a supported family.
        num_tokens: tokens, at least 0.
        dtype: of the states.
        is_windowed: layers with a window hold its last ``window - 1`` tokens alone, as in transformers' caches; a gist
            cache holds all of its tokens in every layer.

    Raises:
        GistError: ``num_tokens`` is negative.
        UnsupportedModelError: the model is of no supported family.
    """
    _check_number("num_tokens", num_tokens, 0)
    family_of(config)
    layers = config.num_hidden_layers
    held = layers * num_tokens
    window = sliding_windows(config)
    if is_windowed and window is not None:
        layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
        num_windowed = layer_types.count("sliding_attention")
        held = (layers - num_windowed) * num_tokens + num_windowed * min(num_tokens, window - 1)
    numbers = 2 * held * _key_heads(config) * _head_size(config)
    if config.is_encoder_decoder:
        numbers += num_tokens * config.d_model
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
    """What a request costs whose prompt is read anew, kept in full, or kept as a gist.

    Args:
        config: configuration of a model of a supported family.
        prompt_tokens: the prompt that repeats, at least 1.
        input_tokens: what follows it and is new, at least 1.
        num_gist_tokens: k, at least 1.
        output_tokens: the answer, at least 1, its end of sequence included.
        batch_size: requests at once, for ``batch_bytes``.
        dtype: of the states.

    Returns:
        Rows ``"no cache"``, ``"prefix cache"`` and ``"gist cache"``. The second is missing for an encoder-decoder: its
        encoder reads in both directions, so the states of a prompt depend on what follows.

    Raises:
        GistError: a number is out of range.
        UnsupportedModelError: the model is of no supported family.
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
    """Keys and values that the last of ``output_tokens`` attends to, behind ``num_tokens``."""
    if not config.is_encoder_decoder:
        return cache_bytes(config, num_tokens + output_tokens - 1, dtype, is_windowed=True)
    # Cross-attention holds the encoder's tokens; self-attention the start token and the answer but for its last.
    per_token = 2 * config.num_decoder_layers * _key_heads(config) * _head_size(config)
    return per_token * (num_tokens + output_tokens) * dtype.itemsize


def _key_heads(config: PreTrainedConfig) -> int:
    # Asked of the class: a config keeps settings that its family does not know, and does not read.
    grouped = getattr(config, "num_key_value_heads", None) if hasattr(type(config), "num_key_value_heads") else None
    return grouped or config.num_attention_heads


def _head_size(config: PreTrainedConfig) -> int:
    if config.is_encoder_decoder:
        return config.d_kv
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# -- counted on the meta device ----------------------------------------------------------------------------------------


def _meta_model(config: PreTrainedConfig) -> Any:
    """The model without weights, as its configuration says but for what must not be asked of numbers that are not
    there.
    """
    config = copy.deepcopy(config)
    if is_length_dependent(config):
        # These read the largest position, of which there is none; all rotary types have equal products.
        parameters: dict[str, Any] = config.rope_parameters  # pyright: ignore[reportAttributeAccessIssue]
        for part in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:
            part["rope_type"] = "default"
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Eager attention counts every product; the fused operators are counted by formulas that differ between versions.
    # Experts are looked up for each token, which is the one way that needs no numbers.
    settings = {"experts_implementation": "batched_mm"} if hasattr(type(config), "num_experts_per_tok") else {}
    with torch.device("meta"):
        return auto.from_config(config, attn_implementation="eager", dtype=torch.float32, **settings).eval()


def _run(model: Any, **inputs: Any) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def _ids(length: int) -> torch.Tensor:
    return torch.zeros(1, length, dtype=torch.long, device="meta")


def _fill(cache: Cache, config: PreTrainedConfig, num_layers: int, length: int) -> None:
    states = torch.zeros(1, _key_heads(config), length, _head_size(config), device="meta")
    for layer in range(num_layers if length else 0):
        cache.update(states, states, layer)


def _decoder(model: Any, num_tokens: int, num_cached: int) -> int:
    cache = DynamicCache(config=model.config)
    with torch.device("meta"):
        _fill(cache, model.config, model.config.num_hidden_layers, num_cached)
    return _run(model, input_ids=_ids(num_tokens), **{cache_argument(): cache}, use_cache=True)


def _encoder(model: Any, num_tokens: int) -> int:
    return _run(model.get_encoder(), input_ids=_ids(num_tokens))


def _decoder_step(model: Any, num_source: int, num_cached: int) -> int:
    config = model.config
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if num_cached:
        _fill(cache.self_attention_cache, config, config.num_decoder_layers, num_cached)
        _fill(cache.cross_attention_cache, config, config.num_decoder_layers, num_source)
        cache.is_updated = dict.fromkeys(range(config.num_decoder_layers), True)
    return _run(
        model,
        encoder_outputs=BaseModelOutput(torch.zeros(1, num_source, config.d_model, device="meta")),  # pyright: ignore[reportArgumentType]
        decoder_input_ids=_ids(1),
        **{cache_argument(): cache},
        use_cache=True,
    )
