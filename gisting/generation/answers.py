"""Answer inputs from compressed prompts, once or turn by turn.

Place in the flow: cache -> **answers** -> text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gisting._compat import cache_argument
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import GistError
from gisting.generation.call import Call, prepare_call
from gisting.generation.checks import check_condition, check_num_rows, check_origin, check_positions, chosen_k, listed
from gisting.generation.compression import compress_encodings
from gisting.generation.streaming import ends_its_streamer
from gisting.models import decoder, encoder_decoder
from gisting.models.mode import evaluating
from gisting.tokens import ChatTemplate, GistTokenizer, Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Turn", "answer_ends", "answer_from", "converse", "generate", "up_to_end"]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Args:
        texts: the answers, as :func:`generate` returns them.
        cache: what the next turn starts from, with a row for each text: the states that the turn started from, of the
            input, and of the answer, including its end of sequence if it has one. Under the template ``"chat"`` the
            end is left out, because the next turn begins with it.
    """

    texts: list[str]
    cache: GistCache


@ends_its_streamer
def generate(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str | Sequence[Message]],
    *,
    cache: GistCache | None = None,
    prompts: Sequence[str] | None = None,
    num_gist_tokens: int | Sequence[int] | None = None,
    condition: str = "gist",
    chunk_length: int | None = None,
    max_new_tokens: int | None = None,
    cache_implementation: str | None = None,
    assistant_model: PreTrainedModel | None = None,
    assistant_cache: GistCache | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """Answer each input after its compressed prompt.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        inputs: B texts; "" if the prompt needs no input. Under the template ``"chat"`` an input may also be the list of
            messages after the prompt (:meth:`gisting.GistTokenizer.encode_continuations`).
        cache: the compressed prompts, one for all inputs or one each. It is not changed.
        prompts: instead of ``cache``, the prompts themselves, one for all or one each; they are run under
            ``condition``.
        num_gist_tokens: k, if ``prompts`` are given, as for :func:`gisting.compress`.
        condition: ``"gist"``, ``"positive"`` or ``"negative"``, if ``prompts`` are given.
        chunk_length: as for :func:`gisting.compress`, if ``prompts`` are given.
        max_new_tokens: the largest number of tokens in an answer; None for the one in a given ``generation_config``, or
            128.
        cache_implementation: which transformers cache generation continues in: ``"dynamic"``, ``"static"`` (for
            ``torch.compile``), ``"offloaded"``, ``"offloaded_static"`` or ``"quantized"`` (with ``cache_config``, as in
            a ``GenerationConfig``); None for the one in the ``generation_config``, or ``"dynamic"``.
        assistant_model: a smaller model for assisted decoding, patched for the same tokenizer. Inputs are then answered
            one by one, as with ``prompt_lookup_num_tokens``.
        assistant_cache: the prompts as the assistant compressed them, one for all inputs or one each; without it, the
            assistant drafts from the inputs alone. Drafts never change a greedy answer, only its speed.
        **generate_kwargs: arguments for ``model.generate``: ``do_sample``, ``num_beams``, ``num_return_sequences``, ...
            A ``streamer`` receives one answer and nothing before it; it ends after an error too. Settings that look
            back at ids (``repetition_penalty``, ``no_repeat_ngram_size``, ``prefix_allowed_tokens_fn``, ...) see the
            input and the answer, not what the cache was made from.

    Returns:
        B texts, or B times ``num_return_sequences``, with the answers to one input together.

    Raises:
        GistError: the model is not patched, numbers of rows do not fit, an input exceeds the model's positions, or this
            way of generating is not supported; the message says why.
        CacheMismatchError: the cache belongs to another model, tokenizer or template, or has another dtype, device or
            batch size.
    """
    inputs = listed("inputs", inputs)
    kinds = {"cache_implementation": cache_implementation, "assistant_model": assistant_model}
    call = prepare_call(model, tokenizer, inputs, max_new_tokens, {**generate_kwargs, **kinds}, assistant_cache)
    check_condition(condition)
    if (cache is None) == (prompts is None):
        raise GistError("give either cache or prompts: generate(..., cache=compress(model, tokenizer, prompts))")
    if cache is not None and chunk_length is not None:
        raise GistError(
            f"chunk_length ({chunk_length}) is for prompts, but cache holds prompts that are already compressed; give "
            "it to compress"
        )
    tokenizer.check_chunk_length(chunk_length)
    if cache is not None:
        check_origin(model, tokenizer, cache)
        return _answer(model, tokenizer, cache, inputs, call).texts
    prompts = listed("prompts", () if prompts is None else prompts)
    check_num_rows("prompts", len(prompts), len(inputs))
    num_gist_tokens = chosen_k(model, num_gist_tokens)
    if not call.architecture.has_prefix_states(condition):
        return _answer_from_text(model, tokenizer, inputs, prompts, num_gist_tokens, condition, call)
    encodings = tokenizer.encode_prompts(prompts, num_gist_tokens, chunk_length)
    # The caller never sees this cache, and the fingerprint of a large model takes time.
    cache = compress_encodings(model, tokenizer, encodings, CacheOrigin("", "", "", condition))
    return _answer(model, tokenizer, cache, inputs, call).texts


@ends_its_streamer
def answer_from(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str | Sequence[Message]],
    cache: GistCache,
    *,
    max_new_tokens: int,
    **generate_kwargs: Any,
) -> list[str]:
    """Answer as :func:`generate` does, from a cache that the caller has just made with this model.

    Its origin is not checked, because the fingerprint of a large model takes time.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        inputs: B texts.
        cache: the compressed prompts, one each.
        max_new_tokens: as for :func:`generate`.
        **generate_kwargs: as for :func:`generate`.

    Returns:
        B texts.

    Raises:
        GistError: as :func:`generate`.
    """
    call = prepare_call(model, tokenizer, inputs, max_new_tokens, generate_kwargs, None)
    return _answer(model, tokenizer, cache, inputs, call).texts


@ends_its_streamer
def converse(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str | Sequence[Message]],
    *,
    cache: GistCache,
    max_new_tokens: int | None = None,
    **generate_kwargs: Any,
) -> Turn:
    """Answer inputs as :func:`generate` does, and keep the states for the next turn.

    The next turn is ``converse(..., cache=turn.cache)``. Each turn reads only its own input. Between an answer, which
    keeps its end of sequence, and the next input is what the template puts before an input. Under the template
    ``"chat"``, the ids of all turns are those of the tokenizer's ``apply_chat_template``: each answer ends once, also
    one that was cut at ``max_new_tokens``, and the next input has the header of a later turn. ``turn.cache`` is an
    ordinary ``GistCache`` that grows with every turn: it can be saved, selected and joined, and its ``num_gist_tokens``
    count everything it holds. In a later turn the model sees what it would see in one long text after the gist.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        inputs: B texts.
        cache: what the turn starts from, one for all inputs or one each: compressed prompts, or an earlier turn's
            cache. It is not changed.
        max_new_tokens: as in :func:`generate`.
        **generate_kwargs: as in :func:`generate`. With ``num_return_sequences``, every answer starts a separate
            conversation, and the next turn has that many times as many inputs.

    Returns:
        The answers, and the cache for the next turn.

    Raises:
        GistError: as :func:`generate`; or the model is an encoder-decoder, whose encoder does not read answers; or the
            chat template rewrites earlier answers, so that their states cannot be kept; or the call uses beams, a
            cache other than the dynamic one, or stopping criteria with several answers to one input, none of which
            keep the states of each answer separate.
        CacheMismatchError: as :func:`generate`.
    """
    inputs = listed("inputs", inputs)
    assistant_cache = generate_kwargs.pop("assistant_cache", None)
    call = prepare_call(model, tokenizer, inputs, max_new_tokens, generate_kwargs, assistant_cache)
    call.architecture.check_can_converse(model)
    if (call.config.num_beams or 1) > 1:
        raise GistError(
            f"converse takes num_beams=1, got {call.config.num_beams}: beam search does not keep the states of the "
            "winning answer; sample with num_return_sequences, or call generate"
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


def _answer(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    cache: GistCache,
    inputs: Sequence[str | Sequence[Message]],
    call: Call,
    *,
    keep_states: bool = False,
) -> Turn:
    """Answer in the order of the inputs. With ``keep_states``, the turn's cache is the one for the next turn."""
    check_num_rows("cache", len(cache), len(inputs))
    if len(cache) == 1 and len(inputs) > 1:
        cache = cache.select([0] * len(inputs))
    continuations = cache.encode_inputs(tokenizer, inputs)
    new_tokens = call.config.max_new_tokens
    groups = call.architecture.group_rows(model, cache, continuations, new_tokens, takes_padding=call.takes_padding)
    lengths = [held + len(ids) + new_tokens for held, ids in zip(cache.num_gist_tokens, continuations, strict=True)]
    check_positions(model, lengths, "input", f"its cached prefix and {new_tokens} new tokens")
    # In a batch, a row that stops without an end of sequence cannot be told from its padding.
    if call.is_assisted or (keep_states and call.has_criteria):
        groups = [[row] for row in range(len(inputs))]

    def prepare(rows: list[int]) -> tuple[dict[str, Any], int]:
        part = cache if len(rows) == len(inputs) else cache.select(rows)
        ids = [continuations[row] for row in rows]
        past = call.past_for(part.num_slots + max(map(len, ids)) + new_tokens - 1)
        arguments, given = call.architecture.prepare_generation(model, tokenizer, part, ids, call.num_copies, **past)
        if call.assistant_model is not None:
            drafts = call.assistant_cache
            drafts = drafts if drafts is None or len(drafts) == 1 else drafts.select(rows)
            arguments["assistant_model"] = decoder.Assistant(
                call.assistant_model, drafts, part.num_slots, tokenizer.gist_token_id
            )
        return arguments, given

    ends = answer_ends(call.config, model)

    def keep(rows: list[int], output: Any, answers: list[list[int]]) -> GistCache:
        kept = [tokenizer.without_end(answer) if answer[-1] in ends else answer for answer in answers]
        ids = [continuations[row] for row in rows]
        after = decoder.continued(model, cache.select(rows), output[cache_argument()], ids, kept)
        return replace(after, has_answers=isinstance(tokenizer.template, ChatTemplate))

    answers, after = _run(model, tokenizer, call, groups, prepare, keep if keep_states else None)
    return Turn(answers, cache if after is None else after)


def _answer_from_text(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str | Sequence[Message]],
    prompts: Sequence[str],
    num_gist_tokens: int | Sequence[int],
    condition: str,
    call: Call,
) -> list[str]:
    """Answer from full texts, under a condition whose prompts leave no states to cache. Decoders have none."""
    if len(prompts) == 1:
        prompts = [prompts[0]] * len(inputs)
        if not isinstance(num_gist_tokens, int) and len(num_gist_tokens) == 1:
            num_gist_tokens = num_gist_tokens[0]
    encodings = tokenizer.encode_batch(prompts, inputs, num_gist_tokens=num_gist_tokens)
    rows = range(len(inputs))

    def prepare(rows: list[int]) -> tuple[dict[str, Any], int]:
        part = [encodings[row] for row in rows]
        return encoder_decoder.prepare_full_generation(model, tokenizer, part, condition), 0

    groups = [[row] for row in rows] if call.is_assisted else [list(rows)]
    return _run(model, tokenizer, call, groups, prepare)[0]


def _run(
    model: Any,
    tokenizer: GistTokenizer,
    call: Call,
    groups: list[list[int]],
    prepare: Callable[[list[int]], tuple[dict[str, Any], int]],
    keep: Callable[[list[int], Any, list[list[int]]], GistCache] | None = None,
) -> tuple[list[str], GistCache | None]:
    """Run stock ``generate`` on groups of rows and put the answers in the order of the rows.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        call: the settings.
        groups: row numbers, grouped by batch.
        prepare: makes the arguments for a group, and says how many columns of the result come before the answer.
        keep: makes a cache from the row number of each answer, the output of ``generate`` and the answers' ids.

    Returns:
        The answers, and what ``keep`` made, if it is given.
    """
    call.check_num_groups(len(groups))
    ends = answer_ends(call.config, model)
    config = copy.copy(call.config)
    config.return_dict_in_generate = True
    order: list[int] = []
    answers: list[list[int]] = []
    caches: list[GistCache] = []
    models = [model] if call.assistant_model is None else [model, call.assistant_model]
    with evaluating(*models):
        for rows in groups:
            arguments, given = prepare(rows)
            extra = call.extra_for(rows, tokenizer.gist_token_id)
            output = model.generate(**arguments, **extra, generation_config=config)
            said = [up_to_end(answer, ends) for answer in output.sequences[:, given:].tolist()]
            row_of = [row for row in rows for _ in range(len(said) // len(rows))]
            order += row_of
            answers += said
            if keep is not None:
                caches.append(keep(row_of, output, said))
    back = sorted(range(len(order)), key=lambda place: order[place])
    texts = [tokenizer.decode(answers[place]).strip() for place in back]
    return texts, GistCache.cat(caches).select(back) if caches else None


def answer_ends(config: Any, model: PreTrainedModel) -> set[int]:
    """The ids that end an answer."""
    own: Any = model.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else own.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def up_to_end(answer: list[int], ends: set[int]) -> list[int]:
    """An answer up to its first end of sequence, without the padding after it, which may be any id."""
    return next((answer[: place + 1] for place, token in enumerate(answer) if token in ends), answer)
