"""Measure requests that share one prompt, in four ways: no cache, a prefix cache, a static prefix cache, a gist cache.

Place in the flow: a patched decoder -> **inference** -> rows. The four ways alternate in one process, over prompt
lengths and batch sizes. Prompts and inputs are English text, because on text a model's rounding is small: on random
ids, a bfloat16 model with an untrained gist differs from itself by several logits. Where the tokenizer cannot read
English they are random ids; the work is the same. Everything that is timed is stock transformers: one forward pass up
to the first token, and greedy ``generate``. Growing caches are passed to the model without a copy
(``latency.cache_view``), and for the first token also by transformers' own recipe, which copies; the static cache is
rewound. Measures time and memory, not quality.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from gisting._compat import cache_argument
from gisting.cache import CacheOrigin
from gisting.errors import GistError
from gisting.eval.cost import FlopCounts, cache_bytes, count_flops, format_bytes
from gisting.measure.latency import cache_view, check_logits, wait
from gisting.measure.memory import free_bytes, give_back, peak_of_allocator
from gisting.measure.rows import spread
from gisting.models.decoder import prefix_states
from gisting.models.mode import evaluating
from gisting.models.registry import position_limit
from gisting.models.state import require_patched
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer
from gisting.visibility import gist

__all__ = [
    "BATCHES",
    "GIST",
    "LENGTHS",
    "MODES",
    "NO_CACHE",
    "PREFIX",
    "STATIC",
    "InferenceRow",
    "measure",
]

NO_CACHE, PREFIX, STATIC, GIST = MODES = ("no cache", "prefix cache", "static prefix cache", "gist cache")
LENGTHS, BATCHES = (26, 128, 512, 2000, 8000), (1, 8, 32)
_CALIBRATION = 512  # tokens of the text that is read to estimate the speed
_TEXT_CHARACTERS, _TEXT_TOKENS = 200_000, 10_000  # of the text that is read, and what it must give at least
_GATE_TOKENS = 8  # tokens of an answer whose logits are compared
_LEAST_REPEATS, _LEAST_SLOW_REPEATS, _SLOW_S = 5, 3, 5.0
_SHARE_OF_MEMORY = 0.7  # of what is free at the start

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class InferenceRow:
    """One way to answer ``batch_size`` requests that share a prompt. What was not run is None; ``not_run`` says why.

    Times are in milliseconds, medians with their quartiles. ``copied_first_token_ms`` starts with transformers' recipe
    for a kept cache, ``copy.deepcopy`` and then a copy for each request; the other times pass views to the model, or
    rewind a static cache, which is kept for all requests at once. ``cache_bytes`` is kept for the prompt between
    requests. ``held_bytes`` is the size of all keys and values at the last token of the answers, with a copy of the
    prompt's for each request. ``peak_bytes`` is the most that torch's allocator had given out at once while the answers
    were made, including ``cache_bytes`` but not the weights.
    """

    mode: str
    prompt_tokens: int
    batch_size: int
    input_tokens: int
    answer_tokens: int
    num_gist_tokens: int
    model: str
    num_parameters: int
    dtype: str
    cache_bytes: int
    held_bytes: int
    first_token_ms: float | None = None
    first_token_ms_low: float | None = None
    first_token_ms_high: float | None = None
    num_first_token_repeats: int = 0
    copied_first_token_ms: float | None = None
    copied_first_token_ms_low: float | None = None
    copied_first_token_ms_high: float | None = None
    tokens_per_s: float | None = None
    tokens_per_s_low: float | None = None
    tokens_per_s_high: float | None = None
    num_answer_repeats: int = 0
    peak_bytes: int | None = None
    not_run: str | None = None


@dataclass(frozen=True)
class _Settings:
    num_gist_tokens: int
    input_tokens: int
    answer_tokens: int
    repeats: int
    seconds: float
    max_seconds: float
    max_bytes: int
    name: str


@dataclass(frozen=True)
class _Prompt:
    """A prompt with its two caches of one row, and how long reading it once took."""

    ids: Tensor  # (1, P)
    gist_ids: Tensor  # (1, k)
    prefix: Any
    gist: Any
    read_s: float


def measure(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    *,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    num_gist_tokens: int = 4,
    input_tokens: int = 16,
    answer_tokens: int = 32,
    repeats: int = 30,
    seconds: float = 8.0,
    max_seconds: float = 25.0,
    max_bytes: int | None = None,
    name: str = "random LLaMA",
) -> Iterator[list[InferenceRow]]:
    """Measure every prompt length with every batch size, all four ways alternating in one process.

    Nothing is reported for a length and batch size before all caches pass a gate. For every request, the logits of the
    first token in the batch must equal those of the request run alone. For the first request, the logits of eight
    answer tokens must equal those of a forward pass over the whole text without a cache, which must choose the same
    tokens.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        lengths: tokens of the prompt, which all requests of a batch share.
        batches: numbers of concurrent requests.
        num_gist_tokens: k.
        input_tokens: tokens of each request after the prompt; every request has different ones.
        answer_tokens: tokens that ``generate`` makes for each request.
        repeats: maximum number of runs of each kind.
        seconds: the time that each kind of run may take in total. Five runs are made in any case, or three where one
            takes more than five seconds, but never more than ``repeats``.
        max_seconds: a single run that would take longer is left out. The gate still runs, with the first token of each
            request and eight tokens of an answer.
        max_bytes: what would need more memory is left out; None for seven tenths of the free memory.
        name: name of the model, for the rows.

    Returns:
        An iterator over the rows of :data:`MODES`, one list for each length and batch size. ``static prefix cache`` is
        not run for a model with sliding windows, whose static cache cannot be rewound.

    Raises:
        GistError: an argument is out of range, the model is an encoder-decoder, or a gate fails.
    """
    whole = {"num_gist_tokens": num_gist_tokens, "input_tokens": input_tokens, "answer_tokens": answer_tokens}
    for argument, values in {**{key: [value] for key, value in whole.items()}, "repeats": [repeats]}.items():
        _check_numbers(argument, values)
    _check_numbers("lengths", lengths)
    _check_numbers("batches", batches)
    if seconds < 0 or max_seconds <= 0:
        raise GistError(
            f"seconds must be at least 0 and max_seconds greater than 0, got {seconds} and {max_seconds}; the defaults "
            "are 8 and 25"
        )
    if require_patched(model, tokenizer).is_encoder_decoder:
        raise GistError(
            "inference measures decoders only, because an encoder-decoder has no prefix cache to compare with"
        )
    if max_bytes is None:
        free = free_bytes(input_weight(model).device)
        max_bytes = 2**62 if free is None else int(_SHARE_OF_MEMORY * free)
    settings = _Settings(num_gist_tokens, input_tokens, answer_tokens, repeats, seconds, max_seconds, max_bytes, name)
    return _cells(_Bench(model, tokenizer, settings), sorted(set(lengths)), sorted(set(batches)))


def _cells(bench: _Bench, lengths: list[int], batches: list[int]) -> Iterator[list[InferenceRow]]:
    for length in lengths:
        prompt, reason = bench.read_prompt(length)
        for batch_size in batches:
            give_back()
            rows = {mode: bench.empty_row(mode, length, batch_size) for mode in MODES}
            if prompt is None:
                yield [replace(row, not_run=reason) for row in rows.values()]
            else:
                yield _Cell(bench, prompt, batch_size).measure(rows)


class _Bench:
    """The model, and what all lengths and batch sizes share."""

    def __init__(self, model: PreTrainedModel, tokenizer: GistTokenizer, settings: _Settings) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.device, self.dtype = input_weight(model).device, input_weight(model).dtype
        self.counts: FlopCounts = count_flops(model.config)
        special = {*tokenizer.tokenizer.all_special_ids, tokenizer.gist_token_id}
        self.text = _english(tokenizer)
        self.words = torch.tensor([word for word in range(len(input_weight(model))) if word not in special])
        self.flops_per_s: float | None = None

    def empty_row(self, mode: str, length: int, batch_size: int) -> InferenceRow:
        config, settings = self.model.config, self.settings
        in_front = settings.num_gist_tokens if mode == GIST else length
        last = in_front + settings.input_tokens + settings.answer_tokens - 1
        held = batch_size * cache_bytes(config, last, self.dtype, is_windowed=True)
        if mode == STATIC:
            kept_bytes = held
        else:
            kept = {NO_CACHE: 0, PREFIX: length, GIST: settings.num_gist_tokens}[mode]
            kept_bytes = cache_bytes(config, kept, self.dtype, is_windowed=mode == PREFIX)
        return InferenceRow(
            mode=mode,
            prompt_tokens=length,
            batch_size=batch_size,
            input_tokens=settings.input_tokens,
            answer_tokens=settings.answer_tokens,
            num_gist_tokens=settings.num_gist_tokens,
            model=settings.name,
            num_parameters=self.model.num_parameters(),
            dtype=str(self.dtype).removeprefix("torch."),
            cache_bytes=kept_bytes,
            held_bytes=held,
        )

    def draw(self, rows: int, columns: int, seed: int) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        if self.text is None:
            return self.words[torch.randint(len(self.words), (rows, columns), generator=chance)].to(self.device)
        starts = torch.randperm(len(self.text), generator=chance)[:rows, None]
        return self.text[(starts + torch.arange(columns)) % len(self.text)].to(self.device)

    def timed(self, run: Callable[[], Any]) -> float:
        wait(self.device)
        start = time.perf_counter()
        run()
        wait(self.device)
        return time.perf_counter() - start

    def _rate(self, num_tokens: int) -> float:
        some = self.draw(1, num_tokens, 0)
        self.model(some, logits_to_keep=1)  # warms up
        return self.counts.forward(num_tokens) / self.timed(lambda: self.model(some, logits_to_keep=1))

    def _first_rate(self, length: int) -> float:
        """Estimate FLOPs per second.

        A short text is read at a lower rate, so a longer text is timed before a long prompt is skipped for that rate.
        """
        rate, limit = self._rate(64), self.settings.max_seconds
        if self.counts.forward(length) / rate > limit > self.counts.forward(_CALIBRATION) / rate:
            return self._rate(_CALIBRATION)
        return rate

    def read_prompt(self, length: int) -> tuple[_Prompt | None, str | None]:
        """Return a prompt with its two caches, or the reason why it is left out."""
        limit, settings = position_limit(self.model.config), self.settings
        longest = length + max(settings.num_gist_tokens, settings.input_tokens + settings.answer_tokens)
        if limit is not None and longest > limit:
            return None, f"the model's positions end at {limit:,}"
        with evaluating(self.model), torch.inference_mode():
            if self.flops_per_s is None:
                self.flops_per_s = self._first_rate(length)
            if (estimate := self.counts.forward(length) / self.flops_per_s) > settings.max_seconds:
                return None, _too_slow("reading the prompt once", estimate)
            if (need := 2 * cache_bytes(self.model.config, length, self.dtype)) > settings.max_bytes:
                return None, _too_large(need, settings.max_bytes)
            ids = self.draw(1, length, length)
            start = self.tokenizer.start_ids[:length]
            ids[0, : len(start)] = ids.new_tensor(start)
            found: list[Any] = []
            read_s = self.timed(lambda: found.append(self.model(ids, use_cache=True, logits_to_keep=1)))
            self.flops_per_s = self.counts.forward(length) / read_s
            gist_ids = ids.new_full((1, settings.num_gist_tokens), self.tokenizer.gist_token_id)
            encoding = self.tokenizer.locate(torch.cat([ids, gist_ids], dim=1)[0].tolist())
            compressed = prefix_states(self.model, self.tokenizer, [encoding], CacheOrigin("", "", "", "gist"))
            return _Prompt(ids, gist_ids, found[0][cache_argument()], compressed, read_s), None


class _Cell:
    """One prompt length and batch size."""

    def __init__(self, bench: _Bench, prompt: _Prompt, batch_size: int) -> None:
        self.bench, self.prompt, self.batch_size = bench, prompt, batch_size
        self.inputs = bench.draw(batch_size, bench.settings.input_tokens, 1)
        in_front = dict.fromkeys(MODES, prompt.ids) | {GIST: prompt.gist_ids}
        self.whole = {
            mode: torch.cat([ids.expand(batch_size, -1), self.inputs], dim=1) for mode, ids in in_front.items()
        }
        self.kept = {PREFIX: prompt.prefix, GIST: prompt.gist.as_past_key_values()}

    def past(self, mode: str) -> Any:
        if mode == STATIC:
            for layer in self.static.layers:
                layer.cumulative_length.fill_(self.prompt.ids.shape[1])
            return self.static
        return None if mode == NO_CACHE else cache_view(self.kept[mode], self.batch_size)

    @cached_property
    def static(self) -> Any:
        """A transformers cache with the prompt's states for each request and room for inputs and answers after them.

        States left there by the previous run are hidden by the causal mask until they are overwritten. The cache is
        made on first use, when it is known to fit.
        """
        settings = self.bench.settings
        last = self.prompt.ids.shape[1] + settings.input_tokens + settings.answer_tokens - 1
        made: Any = StaticCache(self.bench.model.config, last)
        for layer, kept in zip(made.layers, self.prompt.prefix.layers, strict=True):
            layer.update(*(states.expand(self.batch_size, -1, -1, -1) for states in (kept.keys, kept.values)))
        return made

    def can_be_static(self) -> bool:
        return all(type(layer) is StaticLayer for layer in StaticCache(self.bench.model.config, 1).layers)

    def first_logits(self, mode: str) -> Tensor:
        """Return ``(B, V)`` logits from one forward pass."""
        ids = self.whole[mode] if mode == NO_CACHE else self.inputs
        past = self.past(mode)
        return self.bench.model(ids, **{cache_argument(): past}, use_cache=True, logits_to_keep=1).logits[:, -1]

    def first_token(self, mode: str) -> Tensor:
        return self.first_logits(mode).argmax(-1)

    def copied_first_token(self, mode: str) -> Tensor:
        """Follow the recipe of transformers' documentation: a deep copy of the cache, then a copy for each request."""
        past = copy.deepcopy(self.kept[mode])
        past.batch_repeat_interleave(self.batch_size)
        given = {"input_ids": self.inputs, cache_argument(): past}
        return self.bench.model(**given, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

    def answers(self, mode: str, num_tokens: int, **more: Any) -> Any:
        ids = self.whole[mode]
        return self.bench.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{cache_argument(): self.past(mode)},
            do_sample=False,
            num_beams=1,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            disable_compile=True,  # on CUDA, transformers would compile for the static cache alone
            pad_token_id=self.bench.tokenizer.pad_token_id,
            **more,
        )

    def measure(self, rows: dict[str, InferenceRow]) -> list[InferenceRow]:
        bench, settings = self.bench, self.bench.settings
        with evaluating(bench.model), torch.inference_mode():
            first_s, step_s = self._gated(rows)
            # Without a cache the prompt is read once for each request; after that, a step costs what it costs with a
            # prefix cache, because the same number of keys and values is held.
            length = self.prompt.ids.shape[1]
            longer = bench.counts.forward(length + settings.input_tokens) / bench.counts.forward(length)
            first_s[NO_CACHE] = self.batch_size * self.prompt.read_s * longer
            step_s[NO_CACHE] = step_s.get(PREFIX, 0.0)
            firsts, answers = {}, {}
            for mode, row in rows.items():
                if row.not_run is not None:
                    continue
                answer_s = first_s[mode] + (settings.answer_tokens - 1) * step_s[mode]
                if first_s[mode] > settings.max_seconds:
                    rows[mode] = replace(row, not_run=_too_slow("the first token", first_s[mode]))
                    continue
                firsts[mode] = partial(self.first_token, mode)
                if answer_s > settings.max_seconds:
                    rows[mode] = replace(row, not_run=_too_slow("the answers", answer_s))
                    continue
                answers[mode] = partial(self.answers, mode, settings.answer_tokens)
            for mode, run in answers.items():  # warms up as well
                rows[mode] = replace(
                    rows[mode], peak_bytes=rows[mode].cache_bytes + peak_of_allocator(bench.device, run)
                )
            copied = {
                mode: partial(self.copied_first_token, mode)
                for mode in firsts
                if mode in self.kept and 2 * rows[mode].held_bytes <= settings.max_bytes
            }
            copied_s = {mode: bench.timed(run) for mode, run in copied.items()}  # warms up as well
            # One alternation for views and copies, so that the two can be compared.
            runs = {(mode, "first_token_ms"): run for mode, run in firsts.items()}
            runs |= {(mode, "copied_first_token_ms"): run for mode, run in copied.items()}
            seconds = {(mode, key): (first_s if key == "first_token_ms" else copied_s)[mode] for mode, key in runs}
            for (mode, key), times in self._alternating(runs, seconds).items():
                low, median, high = (1000 * value for value in spread(times))
                found: dict[str, Any] = {key: median, f"{key}_low": low, f"{key}_high": high}
                if key == "first_token_ms":
                    found["num_first_token_repeats"] = len(times)
                rows[mode] = replace(rows[mode], **found)
            num_tokens = self.batch_size * settings.answer_tokens
            answer_s = {mode: first_s[mode] + (settings.answer_tokens - 1) * step_s[mode] for mode in answers}
            for mode, times in self._alternating(answers, answer_s).items():
                low, median, high = spread([num_tokens / value for value in times])
                rows[mode] = replace(
                    rows[mode],
                    tokens_per_s=median,
                    tokens_per_s_low=low,
                    tokens_per_s_high=high,
                    num_answer_repeats=len(times),
                )
        return list(rows.values())

    def _gated(self, rows: dict[str, InferenceRow]) -> tuple[dict[str, float], dict[str, float]]:
        """Check all caches and return the seconds of a first token and of a step with each. Mark what does not fit."""
        first_s, step_s = {}, {}
        limit = self.bench.settings.max_bytes
        needs = {mode: self._bytes_needed(row) for mode, row in rows.items()}
        # The static cache stays in memory while the others run.
        needs[STATIC] += max((need for mode, need in needs.items() if mode != STATIC and need <= limit), default=0)
        for mode, row in rows.items():
            if needs[mode] > limit:
                rows[mode] = replace(row, not_run=_too_large(needs[mode], limit))
            elif mode == STATIC and not self.can_be_static():
                rows[mode] = replace(row, not_run="a static cache with a sliding window cannot be rewound")
            elif mode != NO_CACHE:
                self._gate(mode)
                first_s[mode] = self.bench.timed(lambda mode=mode: self.first_token(mode))
                count = min(_GATE_TOKENS, self.bench.settings.answer_tokens)
                answers_s = self.bench.timed(lambda mode=mode, count=count: self.answers(mode, count))
                step_s[mode] = max(0.0, answers_s - first_s[mode]) / max(1, count - 1)
        return first_s, step_s

    def _gate(self, mode: str) -> None:
        together, dtype = self.first_logits(mode), self.bench.dtype
        for number in range(self.batch_size):
            row = slice(number, number + 1)
            past = copy.copy(self.past(mode))
            past.layers = [copy.copy(layer) for layer in past.layers]
            for layer in past.layers:
                layer.keys, layer.values = layer.keys[row], layer.values[row]
                if mode == STATIC:
                    layer.cumulative_length = layer.cumulative_length.clone()
            alone = self.bench.model(self.inputs[row], **{cache_argument(): past}, logits_to_keep=1).logits[:, -1]
            check_logits(f"{mode}, request {number} of {self.batch_size}", together[row], alone)
        count = min(_GATE_TOKENS, self.bench.settings.answer_tokens)
        found = self.answers(mode, count, output_logits=True, output_scores=True, return_dict_in_generate=True)
        answer = found.sequences[:1, -count:]
        expected = self._uncached(mode, answer)
        # generate returns float32 for every dtype, but rounding is that of the weights.
        logits = torch.stack([step[0] for step in found.logits]).to(dtype)
        check_logits(mode, logits, expected)
        # The chosen tokens must be the best of those that generate may choose, up to rounding.
        is_allowed = torch.stack([step[0] for step in found.scores]).isfinite()
        best = expected.float().masked_fill(~is_allowed, -torch.inf).amax(-1)
        chosen = expected.float().gather(1, answer.T)[:, 0]
        check_logits(f"{mode}, the logits of its greedy tokens,", chosen.to(dtype), best.to(dtype))

    def _uncached(self, mode: str, answer: Tensor) -> Tensor:
        """Return ``(N, V)``: the logits that predict each of the N answer tokens of the first request.

        They come from one forward pass over the whole text.
        """
        rest = torch.cat([self.inputs[:1], answer[:, :-1]], dim=1)
        call: dict[str, Any] = {"use_cache": False, "logits_to_keep": answer.shape[1]}
        if mode == GIST:
            ids = torch.cat([self.prompt.ids, self.prompt.gist_ids, rest], dim=1)
            visibility = gist(ids == self.bench.tokenizer.gist_token_id)
            call |= {"attention_mask": visibility.as_attention_mask(), "position_ids": visibility.position_ids}
        else:
            ids = torch.cat([self.prompt.ids, rest], dim=1)
        return self.bench.model(ids, **call).logits[0]

    def _bytes_needed(self, row: InferenceRow) -> int:
        """Estimate the memory that generating the answers takes.

        It holds all keys and values, those of one layer twice while they grow, the activations of the widest layer and
        the logits of the first pass.
        """
        config = self.bench.model.config
        width = 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size) + 8 * config.hidden_size
        tokens = self.batch_size * (row.input_tokens + (row.prompt_tokens if row.mode == NO_CACHE else 0))
        grown = 0 if row.mode == STATIC else row.held_bytes + 2 * row.held_bytes // config.num_hidden_layers
        states = row.cache_bytes + grown
        logits = 12 * self.batch_size * config.vocab_size
        return states + tokens * width * self.bench.dtype.itemsize + logits

    def _alternating(self, runs: dict[_Key, Callable[[], Any]], seconds: dict[_Key, float]) -> dict[_Key, list[float]]:
        """Return the seconds of each run.

        Slow runs are made less often, spread over the rounds. Each round starts with a different run, in rotation.
        """
        settings = self.bench.settings
        counts = {}
        for key in runs:
            least = _LEAST_REPEATS if seconds[key] < _SLOW_S else _LEAST_SLOW_REPEATS
            counts[key] = min(settings.repeats, max(least, int(settings.seconds / max(seconds[key], 1e-6))))
        times: dict[_Key, list[float]] = {key: [] for key in runs}
        keys, rounds = list(runs), max(counts.values(), default=0)
        for number in range(rounds):
            first = number % len(keys)
            for key in keys[first:] + keys[:first]:
                if (number + 1) * counts[key] // rounds > number * counts[key] // rounds:
                    times[key].append(self.bench.timed(runs[key]))
        return times


def _english(tokenizer: GistTokenizer) -> Tensor | None:
    """Return ids of English text, int64 ``(N,)``, or None if the tokenizer does not read it.

    The text is Python's manual, which every installation has.
    """
    from pydoc_data.topics import topics

    (ids,) = tokenizer.encode_texts([" ".join(" ".join(topics.values())[:_TEXT_CHARACTERS].split())])
    found = torch.tensor(ids)
    unknown: Any = tokenizer.tokenizer.unk_token_id
    is_read = len(found) >= _TEXT_TOKENS and (unknown is None or (found == unknown).double().mean() < 0.1)
    return found if is_read else None


def _check_numbers(name: str, values: Sequence[int]) -> None:
    if not values or any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
        shown = values[0] if len(values) == 1 else list(values)
        raise GistError(f"{name} must be whole numbers of at least 1, got {shown!r}")


def _too_slow(what: str, seconds: float) -> str:
    return f"{what} would take about {seconds:,.0f} s"


def _too_large(need: int, limit: int) -> str:
    return f"would need {format_bytes(need, 1)}, the limit is {format_bytes(limit, 1)}"
