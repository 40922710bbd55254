"""The settings of a call of ``generate`` or ``converse``: collected in one place, and checked.

Place in the flow: before ``answers`` runs a model. Each way of decoding either gives the answer of the plain run or is
refused here with the reason (docs/generation.md).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gisting._compat import num_constraint_numbers
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.generation.checks import check_count, check_num_rows, check_origin
from gisting.generation.streaming import check_streamer
from gisting.models.architecture import Architecture, architecture_of
from gisting.models.state import end_with, require_patched
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["Call", "prepare_call"]

# Arguments that generate makes from inputs and cache.
_MADE_HERE = {
    *("input_ids", "attention_mask", "past_key_values", "position_ids", "encoder_outputs", "inputs", "inputs_embeds"),
    *("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "cache_position", "tokenizer"),
    "custom_generate",
}
# Drafts from the model's own layers or heads: they would read the placeholders without the cache.
_SELF_DRAFTING = ("assistant_early_exit", "use_mtp", "speculation_type")
# Settings that read the ids of the prompt, and the values at which they do nothing.
_READS_THE_PROMPT = {"encoder_repetition_penalty": (None, 1), "encoder_no_repeat_ngram_size": (None, 0)}
# Arguments that may hold something for each row of a batch, and cannot be split with the rows.
_FOR_ONE_BATCH = ("logits_processor", "negative_prompt_ids", "negative_prompt_attention_mask")


@dataclass(frozen=True)
class Call:
    """How to generate: what stock ``generate`` receives in addition to ids and states.

    Args:
        architecture: what the model's family needs.
        config: a ``GenerationConfig`` with all settings, and with the gist token suppressed.
        past: how to make the cache that generation starts from, for ``GistCache.as_past_key_values``.
        extra: arguments that are not settings: ``streamer``, ``stopping_criteria``, ...
        assistant_model: the model that drafts, or None.
        assistant_cache: the prompts as the assistant compressed them, or None.
    """

    architecture: Architecture
    config: Any
    past: dict[str, Any]
    extra: dict[str, Any]
    assistant_model: PreTrainedModel | None
    assistant_cache: GistCache | None

    @property
    def num_copies(self) -> int:
        """The number of rows that stock ``generate`` makes of one."""
        return max(self.config.num_beams or 1, self.config.num_return_sequences or 1)

    @property
    def is_assisted(self) -> bool:
        """Whether answers are drafted, which transformers does for one row at a time."""
        return self.assistant_model is not None or self.config.prompt_lookup_num_tokens is not None

    @property
    def takes_padding(self) -> bool:
        """Whether padding may precede an input. It may not if something looks at several consecutive ids."""
        config = self.config
        return not (
            (config.no_repeat_ngram_size or 0) > 1
            or config.sequence_bias
            or config.bad_words_ids
            or self.extra.get("prefix_allowed_tokens_fn")
        )

    @property
    def has_criteria(self) -> bool:
        """Whether a row may end without an end of sequence before the others do."""
        return bool(self.config.stop_strings or self.config.max_time or self.extra.get("stopping_criteria"))

    def past_for(self, num_columns: int) -> dict[str, Any]:
        """Return ``past`` for a batch of ``num_columns``, which a static cache must hold."""
        if "max_cache_len" not in self.past:
            return self.past
        return {**self.past, "max_cache_len": max(self.past["max_cache_len"], num_columns)}

    def extra_for(self, rows: Sequence[int], gist_token_id: int) -> dict[str, Any]:
        """Return ``extra`` for a group of ``rows``.

        A ``prefix_allowed_tokens_fn`` is called with the rows' own numbers, and without the ids before an input.
        """
        allowed = self.extra.get("prefix_allowed_tokens_fn")
        if allowed is None:
            return self.extra
        each = num_constraint_numbers(self.config.num_beams or 1, self.config.num_return_sequences or 1)

        def of_row(number: int, ids: torch.Tensor) -> list[int]:
            return allowed(rows[number // each] * each + number % each, ids[ids != gist_token_id])

        return {**self.extra, "prefix_allowed_tokens_fn": of_row}

    def check_num_groups(self, num_groups: int) -> None:
        """Raise if an argument is for one batch, and the rows run in ``num_groups`` batches.

        Raises:
            GistError: there is such an argument.
        """
        for name in _FOR_ONE_BATCH if num_groups > 1 else ():
            if self.extra.get(name) is not None and len(self.extra[name]):
                raise GistError(
                    f"{name} is for the rows of one batch, but these rows run in {num_groups} batches because of a "
                    "sliding window, drafts, a setting that looks at several consecutive ids, or stopping criteria in "
                    "converse; give one input at a time"
                )


def prepare_call(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[Any],
    max_new_tokens: int | None,
    generate_kwargs: dict[str, Any],
    assistant_cache: GistCache | None,
) -> Call:
    """Check the arguments that do not concern states, and collect the settings.

    All settings go into one ``generation_config``, because stock ``generate`` takes either that or keywords.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        inputs: the texts or chats to answer.
        max_new_tokens: the largest number of tokens in an answer, or None.
        generate_kwargs: the caller's arguments for stock ``generate``.
        assistant_cache: the prompts as the assistant compressed them, or None.

    Returns:
        The settings.

    Raises:
        GistError: an argument is invalid, or this way of generating is not supported.
        CacheMismatchError: ``assistant_cache`` does not belong to the assistant.
    """
    architecture = architecture_of(require_patched(model, tokenizer))
    reserved = _MADE_HERE & generate_kwargs.keys()
    if reserved:
        raise GistError(
            f"{', '.join(sorted(reserved))} cannot be given: generate makes them from inputs and cache; to pass your "
            "own, call model.generate"
        )
    settings = generate_kwargs.get("generation_config")
    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
        for value in (
            max_new_tokens if name == "max_new_tokens" else generate_kwargs.get(name),
            getattr(settings, name, None),
        ):
            if value is not None:
                check_count(name, value)
    if generate_kwargs.get("max_length") is not None:
        raise GistError("max_length also counts the tokens before an answer; give max_new_tokens")
    if not inputs:
        raise GistError('inputs is empty; give at least one text, "" if the prompt needs no input')

    given = generate_kwargs.pop("generation_config", None)
    is_end_given = "eos_token_id" in generate_kwargs or getattr(given, "eos_token_id", None) is not None
    assistant_model = generate_kwargs.pop("assistant_model", None)
    implementation = generate_kwargs.pop("cache_implementation", None)
    own: Any = model.generation_config
    config: Any = copy.deepcopy(own if given is None else given)
    extra = config.update(**generate_kwargs)
    # Filled in here as stock generate would, so that the checks below see the final settings.
    config.update(**own.to_dict(), defaults_only=True)
    if not is_end_given:
        end_with(config, tokenizer)
    suppressed = {*(config.suppress_tokens or ()), *(own.suppress_tokens or ()), tokenizer.gist_token_id}
    if max_new_tokens is None:
        max_new_tokens = 128 if given is None or given.max_new_tokens is None else given.max_new_tokens
    config.update(max_new_tokens=max_new_tokens, suppress_tokens=sorted(suppressed))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.return_dict_in_generate:
        raise GistError("return_dict_in_generate changes what is returned; call model.generate for scores and states")
    # Configurations on the Hub say "hybrid" for what is now the default; stock generate reads it so as well.
    implementation = implementation or config.cache_implementation
    implementation = "dynamic" if implementation in (None, "hybrid") else implementation
    past = architecture.take_cache_settings(model, config, implementation)
    architecture.check_settings(model, config, assistant_model)
    if config.stop_strings:
        extra["tokenizer"] = tokenizer.tokenizer
    if extra.get("streamer") is not None:
        check_streamer(len(inputs), config)
    call = Call(architecture, config, past, extra, assistant_model, assistant_cache)
    _check_processors(call)
    _check_assistance(model, tokenizer, len(inputs), call)
    return call


def _check_processors(call: Call) -> None:
    """Refuse settings that look at ids which are not there: the prompt's, or rejected drafts."""
    for name, neutral in _READS_THE_PROMPT.items():
        if getattr(call.config, name) not in neutral:
            raise GistError(f"{name} looks at the prompt's tokens, but a cache holds none; set {name}={neutral[1]}")
    if call.config.guidance_scale not in (None, 1) and call.is_assisted:
        raise GistError("guidance_scale must be 1 with drafts: transformers' guidance remembers rejected drafts")


def _check_assistance(model: PreTrainedModel, tokenizer: GistTokenizer, num_inputs: int, call: Call) -> None:
    for name in _SELF_DRAFTING:
        if getattr(call.config, name, None):
            raise GistError(
                f"{name} drafts with parts of the model itself, which would read the gist's placeholders without its "
                "states; use assistant_model or prompt_lookup_num_tokens"
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
            "assisted decoding discards rejected drafts, which only cache_implementation='dynamic' supports, got "
            f"{call.past['cache_implementation']!r}"
        )
    if assistant is None:
        return
    if "assistant_tokenizer" in call.extra:
        raise GistError("assistant_tokenizer is not supported; use an assistant_model with the model's own tokenizer")
    try:
        require_patched(assistant, tokenizer)
    except GistError as error:
        raise GistError(f"assistant_model does not fit: {error}") from error
    sizes = [one.config.get_text_config().vocab_size for one in (model, assistant)]
    if sizes[0] != sizes[1]:
        raise GistError(
            f"assistant_model has {sizes[1]} embedding rows, the model {sizes[0]}; they must be equal, because "
            "transformers compares their predictions row by row"
        )
    if call.assistant_cache is not None:
        check_origin(assistant, tokenizer, call.assistant_cache)
        check_num_rows("assistant_cache", len(call.assistant_cache), num_inputs)
