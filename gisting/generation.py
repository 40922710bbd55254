"""Compress prompts, and generate from what they were compressed to.

Place in the flow: cache -> **generation** -> text. ``compress`` runs prompts once; ``generate`` answers inputs from a
cache with stock ``model.generate``, ragged batches included; ``converse`` also gives back what the next turn starts
from. Checks that a cache belongs to the model at hand, and that a way of generating is one that gives the answer of the
plain run (docs/generation.md); knows no family beyond its kind.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from gisting._compat import cache_argument, num_constraint_numbers
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheMismatchError, GistError
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import CONDITIONS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["Turn", "check_origin", "compress", "converse", "generate"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# What generate makes itself from inputs and cache.
_MADE_HERE = {
    *("input_ids", "attention_mask", "past_key_values", "position_ids", "encoder_outputs", "inputs", "inputs_embeds"),
    *("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "cache_position", "tokenizer"),
    "custom_generate",
}
# Drafts that come from the model's own layers or heads: they would read the placeholders without the cache.
_DRAFTS_OF_ITS_OWN = ("assistant_early_exit", "use_mtp", "speculation_type")
# What stock generate reads off the ids of the prompt, and the values that leave it alone.
_READS_THE_PROMPT = {"encoder_repetition_penalty": (None, 1), "encoder_no_repeat_ngram_size": (None, 0)}
# What may hold something for each row of a batch, and cannot be parted with the rows.
_OF_ONE_BATCH = ("logits_processor", "negative_prompt_ids", "negative_prompt_attention_mask")


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Args:
        texts: the answers, as :func:`generate` returns them.
        cache: what the next turn starts from, a row for each text: the states that the turn began with, of what was
            put in, and of the answers with their end of sequence where they have one.
    """

    texts: list[str]
    cache: GistCache


def compress(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prompts: Sequence[str],
    num_gist_tokens: int | Sequence[int] = 1,
    *,
    condition: str = "gist",
    batch_size: int = 32,
    chunk_length: int | None = None,
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
        chunk_length: for long prompts: one of more ids than that, template and start ids among them, is cut into
            chunks of nearly equal length (``tokens.cut_into_chunks``) with k gist tokens behind each. A chunk sees the
            gists before it and is hidden once its own are read, so the states are those of running it chunk by chunk
            behind a cache of gists. No single chunk may exceed the model's positions, nor all gists together. Decoders
            only.

    Returns:
        One cache of B prompts, in their order, with k tokens for each of a prompt's chunks.

    Raises:
        GistError: the model is not patched, there is no prompt or an empty one, or a prompt exceeds the model's
            positions; ``chunk_length`` cannot be, or a prompt in chunks exceeds a sliding window.
        GistTokenError: a k is less than 1.
    """
    from gisting.models.patch import require_patched

    require_patched(model, tokenizer)
    _check_condition(condition)
    _check_count("batch_size", batch_size)
    encodings = tokenizer.encode_prompts(prompts, num_gist_tokens, chunk_length)
    if not encodings:
        raise GistError("prompts is empty; give at least one prompt")
    return _compress(model, tokenizer, encodings, _origin(model, tokenizer, condition), batch_size)


def _compress(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    encodings: list[GistEncoding],
    origin: CacheOrigin,
    batch_size: int = 32,
) -> GistCache:
    from gisting.models import decoder, encoder_decoder
    from gisting.models.adapters import check_num_gist_tokens
    from gisting.models.mode import evaluating
    from gisting.models.registry import family_of

    is_encoder_decoder = family_of(model.config).is_encoder_decoder
    if is_encoder_decoder and origin.condition != "gist":
        raise GistError(
            f"condition {origin.condition!r} leaves no states to cache in an encoder, where prompt and rest read each "
            "other; use generate(prompts=..., condition=...)"
        )
    positions = [_num_positions(model, encoding, origin.condition) for encoding in encodings]
    _check_positions(model, positions, "prompt", "its gist")
    if origin.condition == "gist":
        _check_window(model, encodings)
    check_num_gist_tokens(model, max(end - start for encoding in encodings for start, end in encoding.gist_spans))
    run = encoder_decoder.prefix_states if is_encoder_decoder else decoder.prefix_states
    # Sorted by length, so that a batch holds little padding.
    order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].input_ids))
    with evaluating(model):
        parts = [
            run(model, tokenizer, [encodings[row] for row in order[start : start + batch_size]], origin).blanked()
            for start in range(0, len(order), batch_size)
        ]
    if len(parts) == 1 and order == list(range(len(order))):
        return parts[0]
    back = sorted(range(len(order)), key=lambda place: order[place])
    return GistCache.cat(parts).select(back)


class _AnswerStreamer:
    """Hands on the answer alone: ids in front of it, which a streamer is given first, hold gist tokens that no
    tokenizer can decode. Ends once, however often it is told to.
    """

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.is_in_front = True
        self.is_ended = False

    def put(self, value: torch.Tensor) -> None:
        # Empty, not left out: a streamer with skip_prompt skips what comes first.
        self.streamer.put(value[:, :0] if self.is_in_front else value)
        self.is_in_front = False

    def end(self) -> None:
        if not self.is_ended:
            self.is_ended = True
            self.streamer.end()


def _ending_its_streamer(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """With an error the streamer ends as well: whoever reads from it in another thread would wait for ever."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if kwargs.get("streamer") is None:
            return function(*args, **kwargs)
        streamer = kwargs["streamer"] = _AnswerStreamer(kwargs["streamer"])
        try:
            return function(*args, **kwargs)
        except BaseException:
            streamer.end()
            raise

    return wrapper


@_ending_its_streamer
def generate(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str],
    *,
    cache: GistCache | None = None,
    prompts: Sequence[str] | None = None,
    num_gist_tokens: int | Sequence[int] = 1,
    condition: str = "gist",
    chunk_length: int | None = None,
    max_new_tokens: int | None = None,
    cache_implementation: str | None = None,
    assistant_model: PreTrainedModel | None = None,
    assistant_cache: GistCache | None = None,
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
        chunk_length: where ``prompts`` are given, as for :func:`compress`.
        max_new_tokens: how many tokens an answer may have; None for what a given ``generation_config`` says, or 128.
        cache_implementation: which transformers cache goes on from the gists: ``"dynamic"``, ``"static"`` (for
            ``torch.compile``), ``"offloaded"``, ``"offloaded_static"`` or ``"quantized"`` (with ``cache_config``, as in
            a ``GenerationConfig``); None for what the ``generation_config`` says, or ``"dynamic"``.
        assistant_model: a smaller model for assisted decoding, patched for the same tokenizer. Inputs are then answered
            one by one, as with ``prompt_lookup_num_tokens``.
        assistant_cache: the prompts as the assistant compressed them, one for all inputs or one each; without them it
            drafts from the inputs alone. Drafts never change a greedy answer, only how fast it comes.
        **generate_kwargs: for ``model.generate``: ``do_sample``, ``num_beams``, ``num_return_sequences``, ... With a
            ``streamer``, one answer is streamed, and nothing in front of it; it ends with an error too. What looks back
            at ids (``repetition_penalty``, ``no_repeat_ngram_size``, ``prefix_allowed_tokens_fn``, ...) sees input and
            answer, not what is in the cache.

    Returns:
        B texts, or B times ``num_return_sequences``, those of an input together.

    Raises:
        GistError: the model is not patched, numbers do not fit, an input exceeds the model's positions, or this way of
            generating is none that the library supports; the message says why.
        CacheMismatchError: the cache belongs to another model, tokenizer or template, or has another dtype, device or
            batch size.
    """
    from gisting.models.mode import evaluating

    kinds = {"cache_implementation": cache_implementation, "assistant_model": assistant_model}
    call = _prepare(model, tokenizer, inputs, max_new_tokens, {**generate_kwargs, **kinds}, assistant_cache)
    _check_condition(condition)
    if (cache is None) == (prompts is None):
        raise GistError("give either cache or prompts: generate(..., cache=compress(model, tokenizer, prompts))")
    if isinstance(prompts, str):
        raise GistError("prompts must be a list of texts, got one text; put it in a list")
    if cache is not None and chunk_length is not None:
        raise GistError(
            f"chunk_length ({chunk_length}) is for prompts, and cache holds some that were compressed before; give it "
            "to compress"
        )
    tokenizer.check_chunk_length(chunk_length)
    if cache is None:
        prompts = list(prompts or ())
        _check_rows("prompts", len(prompts), len(inputs))
        if call.is_encoder_decoder and condition != "gist":
            with evaluating(model):
                return _texts(
                    tokenizer,
                    _generate_from_text(model, tokenizer, inputs, prompts, num_gist_tokens, condition, call),
                )
        # This cache stays inside: nobody will ask whose it is, and the fingerprint of a large model takes its time.
        origin = CacheOrigin("", "", "", condition)
        cache = _compress(model, tokenizer, tokenizer.encode_prompts(prompts, num_gist_tokens, chunk_length), origin)
    else:
        check_origin(model, tokenizer, cache)
    return _answer(model, tokenizer, cache, inputs, call).texts


@_ending_its_streamer
def converse(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str],
    *,
    cache: GistCache,
    max_new_tokens: int | None = None,
    **generate_kwargs: Any,
) -> Turn:
    """Answer inputs as :func:`generate` does, and keep the states for a next turn: ``converse(..., cache=turn.cache)``.

    Every turn reads its own input and nothing twice. What stands between an answer and the next input is what the
    template puts in front of an input; the answer itself keeps its end of sequence. ``turn.cache`` is a ``GistCache``
    like any other, and grows by every turn: it may be saved, selected and joined, and ``num_gist_tokens`` counts all
    that it holds. The model sees in a later turn what it would see in one long text behind the gist.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        inputs: B texts.
        cache: what the turn starts from, one for all inputs or one each: compressed prompts, or an earlier turn's
            cache. It is left as it is.
        max_new_tokens: as in :func:`generate`.
        **generate_kwargs: as in :func:`generate`. With ``num_return_sequences``, every answer is a conversation of its
            own, and the next turn has that many times as many inputs.

    Returns:
        The answers, and the cache for the next turn.

    Raises:
        GistError: as :func:`generate`; or the model is an encoder-decoder, whose answers its encoder does not read; or
            the answers come from beams, from another than the dynamic cache, or several of one input from stopping
            criteria, which leave states that do not belong to them alone.
        CacheMismatchError: as :func:`generate`.
    """
    assistant_cache = generate_kwargs.pop("assistant_cache", None)
    call = _prepare(model, tokenizer, inputs, max_new_tokens, generate_kwargs, assistant_cache)
    if call.is_encoder_decoder:
        raise GistError(
            f"{model.config.model_type} cannot converse: its encoder does not read its decoder's answers, so no cache "
            "holds them; put what was said into the next prompt or input"
        )
    if (call.config.num_beams or 1) > 1:
        raise GistError(
            f"converse takes num_beams=1, got {call.config.num_beams}: beam search does not keep the states of the "
            "answer that wins; sample with num_return_sequences, or call generate"
        )
    if call.past["cache_implementation"] != "dynamic":
        raise GistError(
            f"converse takes cache_implementation='dynamic', got {call.past['cache_implementation']!r}, which does not "
            "keep every state as it was computed; call generate"
        )
    if call.has_criteria and call.num_copies > 1:
        raise GistError(
            "converse takes no stopping criteria (stop_strings, max_time, stopping_criteria) with "
            "num_return_sequences > 1; repeat the input instead"
        )
    check_origin(model, tokenizer, cache)
    return _answer(model, tokenizer, cache, inputs, call, keep_states=True)


def check_origin(model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache) -> None:
    """Raise unless ``cache`` was made by this ``model`` and ``tokenizer`` and lies where the model does.

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


@dataclass(frozen=True)
class _Call:
    """How to generate: what stock ``generate`` is given beside ids and states.

    Args:
        config: a ``GenerationConfig`` with all settings, other suppressions kept.
        past: how a decoder's cache is made, for ``GistCache.as_past_key_values``.
        extra: what is no setting: ``streamer``, ``stopping_criteria``, ...
        is_encoder_decoder: the model's kind.
        is_assisted: whether answers are drafted, which transformers does for one row at a time.
        assistant_model: who drafts, or None for look-up in the text.
        assistant_cache: its compressed prompts, or None.
    """

    config: Any
    past: dict[str, Any]
    extra: dict[str, Any]
    is_encoder_decoder: bool
    is_assisted: bool
    assistant_model: PreTrainedModel | None
    assistant_cache: GistCache | None

    @property
    def num_copies(self) -> int:
        """How many rows stock ``generate`` makes of one."""
        return max(self.config.num_beams or 1, self.config.num_return_sequences or 1)

    def extra_for(self, rows: Sequence[int], gist_token_id: int) -> dict[str, Any]:
        """``extra`` for a group of rows: a ``prefix_allowed_tokens_fn`` is asked by their own numbers, and without what
        stands in front of an input.
        """
        allowed = self.extra.get("prefix_allowed_tokens_fn")
        if allowed is None:
            return self.extra
        each = num_constraint_numbers(self.config.num_beams or 1, self.config.num_return_sequences or 1)

        def of_row(number: int, ids: torch.Tensor) -> list[int]:
            return allowed(rows[number // each] * each + number % each, ids[ids != gist_token_id])

        return {**self.extra, "prefix_allowed_tokens_fn": of_row}

    def check_num_groups(self, num_groups: int) -> None:
        """Raise if something is given for one batch and the rows are not run as one."""
        for name in _OF_ONE_BATCH if num_groups > 1 else ():
            if self.extra.get(name) is not None and len(self.extra[name]):
                raise GistError(
                    f"{name} is for the rows of one batch, but these are run in {num_groups}, as a sliding window, "
                    "drafts, what looks at several ids in a row, or stopping criteria in converse ask for; give one "
                    "input at a time"
                )

    @property
    def takes_no_padding(self) -> bool:
        """Whether something looks at several ids in a row, which padding before an input would be part of."""
        config = self.config
        return bool(
            (config.no_repeat_ngram_size or 0) > 1
            or config.sequence_bias
            or config.bad_words_ids
            or self.extra.get("prefix_allowed_tokens_fn")
        )

    @property
    def has_criteria(self) -> bool:
        """Whether a row may end without an end of sequence before the others do."""
        return bool(self.config.stop_strings or self.config.max_time or self.extra.get("stopping_criteria"))


def _prepare(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str],
    max_new_tokens: int | None,
    generate_kwargs: dict[str, Any],
    assistant_cache: GistCache | None,
) -> _Call:
    """Check the arguments that do not concern states, and put all settings into one ``generation_config``, since stock
    generate takes that or keywords.
    """
    from gisting.models.patch import require_patched

    family = require_patched(model, tokenizer)
    reserved = _MADE_HERE & generate_kwargs.keys()
    if reserved:
        raise GistError(
            f"{', '.join(sorted(reserved))} are made from inputs and cache; call model.generate for your own"
        )
    settings = generate_kwargs.get("generation_config")
    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
        for value in (
            max_new_tokens if name == "max_new_tokens" else generate_kwargs.get(name),
            getattr(settings, name, None),
        ):
            if value is not None:
                _check_count(name, value)
    if generate_kwargs.get("max_length") is not None:
        raise GistError("max_length counts what stands in front of an answer as well; give max_new_tokens")
    if not inputs:
        raise GistError('inputs is empty; give at least one text, "" where the prompt says it all')

    given = generate_kwargs.pop("generation_config", None)
    assistant_model = generate_kwargs.pop("assistant_model", None)
    implementation = generate_kwargs.pop("cache_implementation", None)
    own: Any = model.generation_config
    config: Any = copy.deepcopy(own if given is None else given)
    extra = config.update(**generate_kwargs)
    # Here as stock generate would, so that the checks below see what it will see.
    config.update(**own.to_dict(), defaults_only=True)
    suppressed = {*(config.suppress_tokens or ()), *(own.suppress_tokens or ()), tokenizer.gist_token_id}
    if max_new_tokens is None:
        max_new_tokens = 128 if given is None or given.max_new_tokens is None else given.max_new_tokens
    config.update(max_new_tokens=max_new_tokens, suppress_tokens=sorted(suppressed))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.return_dict_in_generate:
        raise GistError("return_dict_in_generate changes what is returned; call model.generate for scores and states")

    # "hybrid" stands in configurations on the Hub for what is the default now; stock generate reads it so as well.
    implementation = implementation or config.cache_implementation
    implementation = "dynamic" if implementation in (None, "hybrid") else implementation
    past = {"cache_implementation": implementation}
    if implementation in ("static", "offloaded_static"):
        past |= {"config": model.config, "max_cache_len": config.max_cache_len or 0}
    elif implementation == "quantized":
        past |= {"config": model.config, "cache_config": config.cache_config}
    config.cache_implementation = config.max_cache_len = config.cache_config = None
    if family.is_encoder_decoder:
        _check_encoder_decoder(model, implementation, assistant_model, config)
        config.cache_implementation = None if implementation == "dynamic" else implementation
    elif config.use_cache is False:
        raise GistError("use_cache must be True: without a cache there is nothing that holds the gist")
    if config.stop_strings:
        extra["tokenizer"] = tokenizer.tokenizer
    if extra.get("streamer") is not None:
        _check_streamer(len(inputs), config)
    is_assisted = assistant_model is not None or config.prompt_lookup_num_tokens is not None
    call = _Call(config, past, extra, family.is_encoder_decoder, is_assisted, assistant_model, assistant_cache)
    _check_processors(model, call)
    _check_assistance(model, tokenizer, len(inputs), call)
    return call


def _check_processors(model: PreTrainedModel, call: _Call) -> None:
    """Settings that look at ids which are not there: those of the prompt, or rows that are run apart."""
    config: Any = call.config
    for name, neutral in _READS_THE_PROMPT.items():
        if getattr(config, name) not in neutral:
            raise GistError(
                f"{name} looks at the tokens of the prompt, of which a cache holds none; set {name}={neutral[1]}"
            )
    if config.min_length and not call.is_encoder_decoder:
        raise GistError("min_length counts what stands in front of an answer as well; give min_new_tokens")
    if config.guidance_scale in (None, 1):
        return
    if call.is_encoder_decoder:
        raise GistError(f"guidance_scale is for decoders; transformers has none for {model.config.model_type}")
    if call.is_assisted:
        raise GistError(
            "guidance_scale must be 1 with drafts: transformers' guidance remembers drafts that were taken back"
        )


def _check_encoder_decoder(model: PreTrainedModel, implementation: str, assistant_model: Any, config: Any) -> None:
    if implementation not in ("dynamic", "static"):
        raise GistError(
            f"cache_implementation must be 'dynamic' or 'static' for {model.config.model_type}, whose decoder's cache "
            f"transformers makes, got {implementation!r}"
        )
    if assistant_model is not None:
        raise GistError(
            f"assistant_model drafts for decoders; {model.config.model_type} is an encoder-decoder, whose assistant "
            "would read the inputs with an encoder of its own; use prompt_lookup_num_tokens"
        )
    if config.prefill_chunk_size is not None:
        raise GistError(
            f"prefill_chunk_size is for decoders; for {model.config.model_type} transformers would cut the mask of the "
            "encoder's states"
        )


def _check_assistance(model: PreTrainedModel, tokenizer: GistTokenizer, num_inputs: int, call: _Call) -> None:
    from gisting.models.patch import require_patched

    for name in _DRAFTS_OF_ITS_OWN:
        if getattr(call.config, name, None):
            raise GistError(
                f"{name} drafts with parts of the model itself, which would read a gist's place without its states; "
                "use assistant_model or prompt_lookup_num_tokens"
            )
    assistant: Any = call.assistant_model
    if assistant is None and call.assistant_cache is not None:
        raise GistError("assistant_cache is given without assistant_model; give the model that compressed it")
    if not call.is_assisted:
        return
    if call.num_copies > 1:
        raise GistError(
            f"assisted decoding gives one answer to an input: num_beams=1 and num_return_sequences=1, got "
            f"{call.config.num_beams or 1} and {call.config.num_return_sequences or 1}"
        )
    if call.past["cache_implementation"] != "dynamic":
        raise GistError(
            f"assisted decoding takes back what a draft got wrong, which only cache_implementation='dynamic' can, got "
            f"{call.past['cache_implementation']!r}"
        )
    if assistant is None:
        return
    if "assistant_tokenizer" in call.extra:
        raise GistError("assistant_tokenizer is not supported; take an assistant_model with the model's own tokenizer")
    try:
        require_patched(assistant, tokenizer)
    except GistError as error:
        raise GistError(f"assistant_model does not fit: {error}") from error
    sizes = [one.config.get_text_config().vocab_size for one in (model, assistant)]
    if sizes[0] != sizes[1]:
        raise GistError(
            f"assistant_model has {sizes[1]} embedding rows, the model {sizes[0]}; transformers compares their "
            "predictions row by row"
        )
    if call.assistant_cache is not None:
        check_origin(assistant, tokenizer, call.assistant_cache)
        _check_rows("assistant_cache", len(call.assistant_cache), num_inputs)


def _check_streamer(num_inputs: int, config: Any) -> None:
    numbers = (num_inputs, config.num_beams or 1, config.num_return_sequences or 1)
    if numbers != (1, 1, 1):
        raise GistError(
            "streamer takes one answer: one input, num_beams=1 and num_return_sequences=1, got "
            f"{numbers[0]}, {numbers[1]} and {numbers[2]}"
        )


def _answer(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    cache: GistCache,
    inputs: Sequence[str],
    call: _Call,
    *,
    keep_states: bool = False,
) -> Turn:
    """The answers, in the order of the inputs, and with ``keep_states`` the cache behind them, else the one given."""
    from gisting.models.mode import evaluating

    _check_rows("cache", len(cache), len(inputs))
    if len(cache) == 1 and len(inputs) > 1:
        cache = cache.select([0] * len(inputs))
    continuations = tokenizer.encode_continuations(inputs)
    with ExitStack() as modes:
        modes.enter_context(evaluating(model))
        if call.assistant_model is not None:
            modes.enter_context(evaluating(call.assistant_model))
        if call.is_encoder_decoder:
            return Turn(_texts(tokenizer, _answer_encoder_decoder(model, tokenizer, cache, continuations, call)), cache)
        return _answer_decoder(model, tokenizer, cache, continuations, call, keep_states)


def _answer_decoder(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    cache: GistCache,
    continuations: list[list[int]],
    call: _Call,
    keep_states: bool,
) -> Turn:
    from gisting.models import decoder

    for row, ids in enumerate(continuations):
        if not ids:
            raise GistError(
                f"inputs[{row}] leaves nothing behind the gist for the model to continue; give an input, or a "
                "template with text there"
            )
    new_tokens, copies = call.config.max_new_tokens, call.num_copies
    lengths = [held + len(ids) + new_tokens for held, ids in zip(cache.num_gist_tokens, continuations, strict=True)]
    _check_positions(model, lengths, "input", f"its cached prefix and {new_tokens} new tokens")
    # A row that ends without an end of sequence is told from its padding where it is alone.
    is_apart = call.is_assisted or (keep_states and call.has_criteria)
    order, answers, caches = [], [], []
    groups = _groups(model, cache, continuations, new_tokens, is_apart, call.takes_no_padding)
    call.check_num_groups(len(groups))
    for rows in groups:
        part = cache if len(rows) == len(continuations) else cache.select(rows)
        ids = [continuations[row] for row in rows]
        past = call.past
        if "max_cache_len" in past:
            columns = part.num_slots + max(map(len, ids)) + new_tokens - 1
            past = {**past, "max_cache_len": max(past["max_cache_len"], columns)}
        arguments, given = decoder.prepare_generation(model, tokenizer, part, ids, copies, **past)
        if call.assistant_model is not None:
            drafts = call.assistant_cache
            drafts = drafts if drafts is None or len(drafts) == 1 else drafts.select(rows)
            arguments["assistant_model"] = decoder.Assistant(
                call.assistant_model, drafts, part.num_slots, tokenizer.gist_token_id
            )
        extra = call.extra_for(rows, tokenizer.gist_token_id)
        output = _run(model, arguments, extra, call.config, return_dict_in_generate=True)
        said: list[list[int]] = output.sequences[:, given:].tolist()
        each = len(said) // len(rows)
        order += [row * each + place for row in rows for place in range(each)]
        answers += said
        if keep_states:
            repeated = [row for row in range(len(rows)) for _ in range(each)]
            said = [_up_to_end(answer, call.config, model) for answer in said]
            caches.append(
                decoder.continued(
                    model, part.select(repeated), output[cache_argument()], [ids[row] for row in repeated], said
                )
            )
    back = sorted(range(len(order)), key=lambda place: order[place])
    texts = _texts(tokenizer, [answers[place] for place in back])
    return Turn(texts, GistCache.cat(caches).select(back) if keep_states else cache)


def _groups(
    model: PreTrainedModel,
    cache: GistCache,
    continuations: list[list[int]],
    new_tokens: int,
    is_apart: bool,
    is_without_padding: bool,
) -> list[list[int]]:
    """Which rows are run together."""
    from gisting.models import decoder
    from gisting.models.registry import sliding_windows

    rows = list(range(len(continuations)))
    if is_apart:
        return [[row] for row in rows]
    window = sliding_windows(model.config)
    if not (is_without_padding or decoder.needs_equal_lengths(window, cache.num_slots, continuations, new_tokens)):
        return [rows]
    groups: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        groups.setdefault((cache.num_gist_tokens[row], len(continuations[row])), []).append(row)
    return list(groups.values())


def _up_to_end(answer: list[int], config: Any, model: PreTrainedModel) -> list[int]:
    """An answer with its first end of sequence, and without the padding behind it."""
    own: Any = model.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else own.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return next((answer[: place + 1] for place, token in enumerate(answer) if token in ends), answer)


def _answer_encoder_decoder(
    model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, continuations: list[list[int]], call: _Call
) -> list[list[int]]:
    from gisting.models import encoder_decoder

    rows = range(len(continuations))
    groups = [[row] for row in rows] if call.is_assisted else [list(rows)]
    call.check_num_groups(len(groups))
    answers: list[list[int]] = []
    for group in groups:
        part = cache if len(groups) == 1 else cache.select(group)
        arguments = encoder_decoder.prepare_generation(model, tokenizer, part, [continuations[row] for row in group])
        answers += _run(model, arguments, call.extra_for(group, tokenizer.gist_token_id), call.config).tolist()
    return answers


def _generate_from_text(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str],
    prompts: Sequence[str],
    num_gist_tokens: int | Sequence[int],
    condition: str,
    call: _Call,
) -> list[list[int]]:
    from gisting.models import encoder_decoder

    if len(prompts) == 1:
        prompts = [prompts[0]] * len(inputs)
        if not isinstance(num_gist_tokens, int) and len(num_gist_tokens) == 1:
            num_gist_tokens = num_gist_tokens[0]
    encodings: list[GistEncoding] = tokenizer.encode_batch(prompts, inputs, num_gist_tokens=num_gist_tokens)
    rows = range(len(encodings))
    groups = [[row] for row in rows] if call.is_assisted else [list(rows)]
    call.check_num_groups(len(groups))
    answers: list[list[int]] = []
    for group in groups:
        part = [encodings[row] for row in group]
        arguments = encoder_decoder.prepare_full_generation(model, tokenizer, part, condition)
        answers += _run(model, arguments, call.extra_for(group, tokenizer.gist_token_id), call.config).tolist()
    return answers


def _run(
    model: Any,
    arguments: dict[str, Any],
    extra: dict[str, Any],
    config: Any,
    *,
    return_dict_in_generate: bool = False,
) -> Any:
    """Stock ``generate``."""
    if return_dict_in_generate:
        config = copy.copy(config)
        config.return_dict_in_generate = True
    return model.generate(**arguments, **extra, generation_config=config)


def _texts(tokenizer: GistTokenizer, answers: list[list[int]]) -> list[str]:
    return [tokenizer.decode(answer).strip() for answer in answers]


def _check_condition(condition: str) -> None:
    if condition not in CONDITIONS:
        raise GistError(f"condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise GistError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise GistError(f"{name} must be at least 1, got {value}")


def _check_rows(name: str, have: int, inputs: int) -> None:
    if have not in (1, inputs):
        raise CacheMismatchError(f"{name} must be one for all {inputs} inputs or one each, got {have}")


def _num_positions(model: PreTrainedModel, encoding: GistEncoding, condition: str) -> int:
    """How many positions a prompt with its gists takes.

    Rotary embeddings know two positions by their difference alone, so what counts is how far a row and what it sees lie
    apart. A chunk stands right before its gist, at positions that count back from it: the row of a gist sees at most
    its whole chunk, or the first gist of all. Where frequencies depend on the length, all positions of a sequence count
    together; they begin with the first chunk, which is a longest one.
    """
    from gisting.models.registry import is_length_dependent

    if condition != "gist":
        return len(encoding.input_ids)
    k, longest = encoding.gist_spans[0][1] - encoding.gist_start, max(map(len, encoding.chunks))
    if is_length_dependent(model.config):
        return longest + encoding.num_gist_tokens
    return max(longest + k, encoding.num_gist_tokens)


def _check_window(model: PreTrainedModel, encodings: Sequence[GistEncoding]) -> None:
    """Raise where a sliding window would cut a prompt in chunks.

    A window counts columns. With several chunks in a sequence, the columns between a gist and what stands behind a
    later chunk hold that chunk; run chunk by chunk, and in the cache, they do not. As long as the row behind the prompt
    still sees the first gist, nobody can tell.
    """
    from gisting.models.registry import sliding_windows

    window = sliding_windows(model.config)
    for row, encoding in enumerate(encodings):
        reach = len(encoding.input_ids) - encoding.gist_start + 1
        if window is not None and len(encoding.gist_spans) > 1 and reach > window:
            raise GistError(
                f"prompt {row} has {len(encoding.gist_spans)} chunks, and from its first gist to what follows its last "
                f"there are {reach} columns, more than the sliding window of {model.config.model_type}, {window}: how "
                "far a gist reaches would depend on the chunks between, which no cache holds; raise chunk_length so "
                "that the prompt is one chunk, or shorten it"
            )


def _check_positions(model: PreTrainedModel, lengths: list[int], what: str, beside: str) -> None:
    from gisting.models.registry import position_limit

    limit = position_limit(model.config)
    for row, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise GistError(
                f"{what} {row} with {beside} takes {length} positions, {model.config.model_type} has {limit}; "
                "shorten it"
            )
