"""Decoders: run a prefix once, keep what survives it, and continue from there with stock ``generate``.

Place in the flow: attention -> **models** -> cache. Implements :class:`gisting.models.architecture.Architecture`.
Positions are anchored (``Visibility.position_ids``): what survives is at positions ``0 .. P-1``, so it is an ordinary
transformers cache of length P, whatever it was made from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from gisting._compat import cache_argument
from gisting.cache import CacheOrigin, GistCache
from gisting.device import on_each_device
from gisting.errors import GistError
from gisting.models.head import logits_at
from gisting.models.prefix import PrefixStates
from gisting.models.registry import sliding_windows
from gisting.models.rotary import rotary_of
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import CONDITIONS

__all__ = [
    "Assistant",
    "answer_logits",
    "check_can_converse",
    "check_settings",
    "continued",
    "group_rows",
    "has_prefix_states",
    "needs_equal_lengths",
    "prefix_states",
    "prepare_generation",
    "take_cache_settings",
]


def has_prefix_states(condition: str) -> bool:
    """Return True: under every ``condition``, what survives a causal prefix is an ordinary prefix cache."""
    return True


def prefix_states(
    model: PreTrainedModel, tokenizer: GistTokenizer, encodings: Sequence[GistEncoding], origin: CacheOrigin
) -> GistCache:
    """Run a ragged batch of prompts with their gists and keep what survives under ``origin.condition``.

    Surviving columns are moved together, because the gists of a prompt in chunks are apart.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.prefix_states`.

    Returns:
        A cache of B prompts on the model's device.
    """
    ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id, left=True)
    visibility = CONDITIONS[origin.condition](ids == tokenizer.gist_token_id, is_token)
    kept = visibility.survivors()
    lengths = kept.sum(-1)
    columns = on_each_device(_last_columns(kept, int(lengths.max())))
    device = input_weight(model).device
    # Without a config every layer keeps all keys, sliding ones too; the window is applied when generation continues.
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(
            input_ids=ids.to(device),
            attention_mask=visibility.as_attention_mask().to(device),
            position_ids=visibility.position_ids.to(device),  # pyright: ignore[reportOptionalMemberAccess]
            **{cache_argument(): cache},
            use_cache=True,
        )
    layers: list[Any] = list(cache.layers)
    return GistCache(
        tuple(_gather(layer.keys, columns) for layer in layers),
        tuple(_gather(layer.values, columns) for layer in layers),
        lengths,
        origin,
        rotary=rotary_of(model),
    )


def check_settings(model: PreTrainedModel, config: Any, assistant_model: PreTrainedModel | None) -> None:
    """Raise if a decoder cannot generate with these settings.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.check_settings`.

    Raises:
        GistError: ``use_cache`` is False, or ``min_length`` is set.
    """
    if config.use_cache is False:
        raise GistError("use_cache must be True: without a cache, nothing holds the gist")
    if config.min_length:
        raise GistError("min_length also counts the tokens before an answer; give min_new_tokens")


def take_cache_settings(model: PreTrainedModel, config: Any, implementation: str) -> dict[str, Any]:
    """Move the cache settings out of ``config``: the gist's cache is made here, not by stock ``generate``.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.take_cache_settings`.

    Returns:
        Arguments for ``GistCache.as_past_key_values``.
    """
    past: dict[str, Any] = {"cache_implementation": implementation}
    if implementation in ("static", "offloaded_static"):
        past |= {"config": model.config, "max_cache_len": config.max_cache_len or 0}
    elif implementation == "quantized":
        past |= {"config": model.config, "cache_config": config.cache_config}
    config.cache_implementation = config.max_cache_len = config.cache_config = None
    return past


def check_can_converse(model: PreTrainedModel) -> None:
    """Allow every ``model``: :func:`continued` keeps the states of answers."""


def group_rows(
    model: PreTrainedModel,
    cache: GistCache,
    continuations: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    takes_padding: bool,
) -> list[list[int]]:
    """Put all rows in one batch, or only rows of equal lengths where padding would change an answer.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.group_rows`.

    Returns:
        Row numbers, grouped by batch.

    Raises:
        GistError: a continuation is empty.
    """
    for row, ids in enumerate(continuations):
        if not ids:
            raise GistError(
                f"inputs[{row}] leaves nothing after the gist for the model to continue; give an input, or a "
                "template with text there"
            )
    rows = range(len(continuations))
    window = sliding_windows(model.config)
    if takes_padding and not needs_equal_lengths(window, cache.num_slots, continuations, new_tokens):
        return [list(rows)]
    groups: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        groups.setdefault((cache.num_gist_tokens[row], len(continuations[row])), []).append(row)
    return list(groups.values())


def prepare_generation(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    cache: GistCache,
    continuations: Sequence[Sequence[int]],
    num_copies: int = 1,
    **past_settings: Any,
) -> tuple[dict[str, Any], int]:
    """Make the arguments with which stock ``generate`` continues a ragged batch.

    The columns are the P slots of the cache, padding, and the continuation. Stock ``generate`` repeats ids for each
    beam or sample, but not a cache it is given, so the cache is made here with ``num_copies`` of each row.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.prepare_generation`.

    Returns:
        The arguments, and how many columns of the result come before the answer.
    """
    given = cache.columns(tokenizer, continuations, input_weight(model).device)
    if num_copies > 1:
        cache = cache.select([row for row in range(len(cache)) for _ in range(num_copies)])
    past = cache.as_past_key_values(**past_settings)
    return {cache_argument(): past, **given}, given["input_ids"].shape[1]


def answer_logits(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prefix: GistCache | None,
    befores: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Run answers after what comes before them.

    Rows begin right after the prefix and are padded on the right, where causal attention hides the padding, so a
    sliding window counts tokens alone.

    Arguments as for :meth:`~gisting.models.architecture.Architecture.answer_logits`.

    Returns:
        The logits that predict each token of the answers.
    """
    rows = [[*before, *answer[:-1]] for before, answer in zip(befores, answers, strict=True)]
    ids, _ = pad_rows(rows, tokenizer.pad_token_id, left=False)
    num_rows, width = ids.shape
    places = [
        row * width + len(before) - 1 + place
        for row, (before, answer) in enumerate(zip(befores, answers, strict=True))
        for place in range(len(answer))
    ]
    device = input_weight(model).device
    past, held = PrefixStates(), 0
    if prefix is not None:
        held = prefix.num_slots
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            past.update(keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1), layer)
    with logits_at(model, torch.tensor(places, device=device)):
        return model(
            input_ids=ids.to(device),
            position_ids=torch.arange(held, held + width, device=device).expand(num_rows, -1),
            **({} if prefix is None else {cache_argument(): past}),
            use_cache=prefix is not None,
        ).logits[0]


def continued(
    model: PreTrainedModel,
    cache: GistCache,
    past: Any,
    continuations: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> GistCache:
    """Make the cache for the next turn: what each row started with, was given and answered, without gaps.

    Positions are ``0, 1, 2, ...`` in every row, whether it is padded or not, so keys stay right when their columns are
    moved together. Generation ends before a row's last token is run; the state of the last token that is kept is
    computed here for all rows.

    Args:
        model: the model that answered.
        cache: what the rows started with, P slots.
        past: the ``DynamicCache`` that stock ``generate`` left; its columns are those of :func:`prepare_generation`
            and the new tokens.
        continuations: the ids that follow each row's gist.
        answers: the ids of each row's answer that are kept: all, or those before some place.

    Returns:
        A cache with a row for each answer.
    """
    last = [(answer or ids)[-1] for ids, answer in zip(continuations, answers, strict=True)]
    given = pad_rows(continuations, 0, left=True)[1]
    given[:, -1] &= torch.tensor([bool(answer) for answer in answers])
    said = pad_rows([answer[:-1] for answer in answers], 0, left=False)[1]
    kept = torch.cat([cache.attention_mask.bool().cpu(), given, said], dim=1)
    lengths = kept.sum(-1)
    slots = int(lengths.max())
    columns = on_each_device(_last_columns(kept, slots))
    is_empty = on_each_device((torch.arange(slots)[None] < slots - lengths[:, None])[:, None, :, None])

    def gather(states: torch.Tensor) -> torch.Tensor:
        return _gather(states, columns).masked_fill(is_empty(states.device), 0)

    before = replace(
        cache,
        keys=tuple(gather(layer.keys) for layer in past.layers),
        values=tuple(gather(layer.values) for layer in past.layers),
        lengths=lengths,
    )
    after = before.as_past_key_values()
    mask = before.attention_mask
    with torch.no_grad():
        model.base_model(
            input_ids=torch.tensor(last, device=cache.device)[:, None],
            attention_mask=torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
            position_ids=lengths[:, None].to(cache.device),
            **{cache_argument(): after},
            use_cache=True,
        )
    layers: list[Any] = list(after.layers)
    return replace(
        cache,
        keys=tuple(layer.keys for layer in layers),
        values=tuple(layer.values for layer in layers),
        lengths=lengths + 1,
    )


def _last_columns(kept: torch.Tensor, slots: int) -> torch.Tensor:
    """Where the last ``slots`` columns come from, int64 ``(B, slots)``.

    The columns ``kept``, bool ``(B, N)``, move to the right end in order.
    """
    return kept.long().argsort(dim=1, stable=True)[:, kept.shape[1] - slots :]


def _gather(states: torch.Tensor, columns: Callable[[torch.device], torch.Tensor]) -> torch.Tensor:
    """``states`` ``(B, G, N, D)`` at ``columns`` ``(B, P)``, on the layer's own device.

    They are copied, so that a gist of k tokens does not keep a whole prompt's keys alive.
    """
    return states.take_along_dim(columns(states.device)[:, None, :, None], dim=2)


class Assistant:
    """A draft model for assisted decoding that reads its own gists.

    transformers gives a draft model the main model's ids, including the P placeholders in front, but no cache, and
    measures the cache it returns against those ids. Here the draft model gets its own cache with one placeholder for
    each of its slots, or neither; what it returns has the shape that transformers expects.

    Args:
        model: the draft model, patched for the main model's tokenizer.
        cache: one prompt, compressed by the draft model, or None to draft from the continuation alone.
        num_slots: P of the main model.
        gist_token_id: the gist token id of their tokenizer.
    """

    def __init__(self, model: PreTrainedModel, cache: GistCache | None, num_slots: int, gist_token_id: int) -> None:
        self.model = model
        self.cache = cache
        self.num_slots = num_slots
        self.gist_token_id = gist_token_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """Draft, with the draft model's own mask and positions.

        Args:
            input_ids: int64 ``(1, P + T)``, the main model's.
            attention_mask: int64, of the shape of ``input_ids``; not read.
            position_ids: int64, of the shape of ``input_ids``; not read.
            generation_config: transformers' settings for drafting.
            **kwargs: more settings, and arguments of stock ``generate``; among them, as the cache, what the last call
                returned, or None.

        Returns:
            What stock ``generate`` returns, with the main model's columns.
        """
        num_own = 0 if self.cache is None else self.cache.num_slots
        placeholders = input_ids.new_full((1, num_own), self.gist_token_id)
        own_ids = torch.cat([placeholders, input_ids[:, self.num_slots :]], dim=1)
        shifted: _Shifted | None = kwargs.pop(cache_argument(), None)
        past = None if shifted is None else shifted.past
        if past is None and self.cache is not None:
            past = self.cache.as_past_key_values()
        # Settings next to a generation_config are deprecated, and transformers gives both.
        config = copy.copy(generation_config)
        rest = config.update(**kwargs)
        model: Any = self.model
        drafted = model.generate(
            input_ids=own_ids,
            attention_mask=torch.ones_like(own_ids),
            **{cache_argument(): past},
            generation_config=config,
            **rest,
        )
        drafted.sequences = torch.cat([input_ids[:, : self.num_slots], drafted.sequences[:, num_own:]], dim=1)
        drafted[cache_argument()] = _Shifted(drafted[cache_argument()], self.num_slots - num_own)
        return drafted


class _Shifted:
    """A cache as transformers' candidate generator uses it, as long as the main model's ids are."""

    def __init__(self, past: Any, shift: int) -> None:
        self.past = past
        self.shift = shift

    def get_seq_length(self) -> int:
        return self.past.get_seq_length() + self.shift

    def crop(self, tokens_to_remove: int) -> None:
        self.past.crop(tokens_to_remove)


def needs_equal_lengths(
    window: int | None, slots: int, continuations: Sequence[Sequence[int]], new_tokens: int
) -> bool:
    """Return whether padding between prefix and continuation would shift a sliding window.

    A window counts columns, not tokens.

    Args:
        window: the smallest window of the model, or None.
        slots: P of the cache.
        continuations: the ids that follow each gist.
        new_tokens: the largest number of new tokens.
    """
    longest = max(len(row) for row in continuations)
    return window is not None and slots + longest + new_tokens > window
