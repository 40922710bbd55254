"""Requests behind one prompt, four ways in turn: the prompt read anew, a prefix cache that grows, one with room for the
whole answer, a gist cache; over lengths of the prompt and numbers of requests at once.

Place in the flow: a patched decoder -> **inference** -> rows, tables, a plot. Prompts and inputs are random ids, for
their values change no work. Everything that is timed is stock transformers: one forward pass up to the first token, and
greedy ``generate``. Caches that grow are handed over in the same way, without a copy (``latency.hand_over``), and for
the first token also by transformers' own recipe, which copies; the static one is wound back. Knows time and memory;
knows nothing of quality.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from gisting._compat import cache_argument
from gisting.cache import CacheOrigin
from gisting.data.tasks import task_tokenizer
from gisting.errors import GistError
from gisting.eval.cost import FlopCounts, cache_bytes, count_flops, format_bytes
from gisting.measure.latency import check_logits, hand_over, wait
from gisting.measure.rows import markdown_table, new_figure, spread
from gisting.models.decoder import prefix_states
from gisting.models.mode import evaluating
from gisting.models.patch import patch, require_patched
from gisting.models.registry import position_limit
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
    "highlights_table",
    "inference_table",
    "losses_table",
    "measure",
    "peak_of_allocator",
    "plot",
    "random_llama",
    "result_tables",
]

NO_CACHE, PREFIX, STATIC, GIST = MODES = ("no cache", "prefix cache", "static prefix cache", "gist cache")
LENGTHS, BATCHES = (26, 128, 512, 2000, 8000), (1, 8, 32)
_VOCABULARY, _HEAD_SIZE = 32_000, 64
_CALIBRATION = 512  # tokens of a text that is read to see how fast that goes
_GATE_TOKENS = 8  # of an answer whose logits are compared
_LEAST_REPEATS, _LEAST_SLOW_REPEATS, _SLOW_S = 5, 3, 5.0
_SHARE_OF_MEMORY = 0.7  # of what is free at the start
_HIGHLIGHTS = ((26, 1), (512, 1), (512, 8), (2000, 8))
_COLORS = ("tab:gray", "tab:orange", "tab:brown", "tab:blue")
_NEAR = 1.1  # up to this many times as fast as prefix caching, a cell is named as one without gain


_Key = TypeVar("_Key")


@dataclass(frozen=True)
class InferenceRow:
    """One way to answer ``batch_size`` requests behind one prompt. What was not run is None, and ``not_run`` says why.

    Times are in milliseconds, medians with their quartiles. ``copied_first_token_ms`` begins with transformers' recipe
    for a kept cache, ``copy.deepcopy`` and then a copy for each request; the other times hand over views, or wind a
    static cache back, which is kept for all requests at once. ``cache_bytes`` is kept for the prompt between requests,
    ``held_bytes`` are all keys and values at the last token of the answers, a copy of the prompt's for each request.
    ``peak_bytes`` is the most that torch's allocator had out at once while the answers were made, ``cache_bytes`` among
    it, the weights not.
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
    """A prompt, ``ids`` of shape ``(1, P)``, with what is kept of it, and how long reading it once took."""

    ids: Tensor
    gist_ids: Tensor  # (1, k)
    prefix: Any
    gist: Any  # of one row, as prefix
    read_s: float


def random_llama(
    hidden_size: int = 640,
    num_layers: int = 12,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, GistTokenizer]:
    """A patched LLaMA with random weights, about 100 million by default, and a tokenizer for it: a head for every 64 of
    the hidden size, keys and values in all of them, a vocabulary of 32,000, no tied embeddings.

    Raises:
        GistError: a size is out of range.
    """
    if hidden_size < _HEAD_SIZE or hidden_size % _HEAD_SIZE:
        raise GistError(f"hidden_size must be a multiple of {_HEAD_SIZE}, the size of a head, got {hidden_size}")
    if num_layers < 1:
        raise GistError(f"num_layers must be at least 1, got {num_layers}")
    tokenizer = task_tokenizer()
    special: Any = tokenizer.tokenizer
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // (3 * 64)) * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // _HEAD_SIZE,
        max_position_embeddings=32_768,
        pad_token_id=special.pad_token_id,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return patch(model.to(device), tokenizer), tokenizer


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
    """Measure every prompt length with every number of requests, all four ways in turn in one process.

    Nothing is reported of a cell before all caches pass a gate: of every request the logits of the first token in the
    batch are those of the request run alone, and of the first request the logits of eight tokens of its answer are
    those of a forward pass over the whole text without a cache, which would have chosen the same tokens.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        lengths: tokens of the prompt, which all requests of a batch share.
        batches: requests at once.
        num_gist_tokens: k.
        input_tokens: tokens of a request behind the prompt; each has others.
        answer_tokens: tokens that ``generate`` makes for each.
        repeats: the most runs of each kind.
        seconds: how long each kind of run may take in all, but it runs five times anyway, and three where one takes
            more than five seconds (never more than ``repeats``).
        max_seconds: a single run that would take longer is not run. The gate goes before, with a first token of each
            request and eight tokens of an answer.
        max_bytes: what would need more memory is not run; None for seven tenths of what is free.
        name: of the model, for the rows.

    Yields:
        Of each length and number the rows of :data:`MODES`. ``static prefix cache`` is not run for a model with sliding
        windows, whose static cache cannot be wound back.

    Raises:
        GistError: an argument is out of range, the model is an encoder-decoder, or a gate does not hold.
    """
    whole = {"num_gist_tokens": num_gist_tokens, "input_tokens": input_tokens, "answer_tokens": answer_tokens}
    for argument, values in {**{key: [value] for key, value in whole.items()}, "repeats": [repeats]}.items():
        _check_numbers(argument, values)
    _check_numbers("lengths", lengths)
    _check_numbers("batches", batches)
    if seconds < 0 or max_seconds <= 0:
        raise GistError(
            f"seconds must be at least 0 and max_seconds above it, got {seconds} and {max_seconds}; by default 8 and 25"
        )
    if require_patched(model, tokenizer).is_encoder_decoder:
        raise GistError("inference measures decoders, where a prompt has a prefix cache to compare with")
    if max_bytes is None:
        free = _free_bytes(input_weight(model).device)
        max_bytes = 2**62 if free is None else int(_SHARE_OF_MEMORY * free)
    settings = _Settings(num_gist_tokens, input_tokens, answer_tokens, repeats, seconds, max_seconds, max_bytes, name)
    return _cells(_Bench(model, tokenizer, settings), sorted(set(lengths)), sorted(set(batches)))


def _cells(bench: _Bench, lengths: list[int], batches: list[int]) -> Iterator[list[InferenceRow]]:
    for length in lengths:
        prompt, reason = bench.read_prompt(length)
        for batch_size in batches:
            _give_back()
            rows = {mode: bench.empty_row(mode, length, batch_size) for mode in MODES}
            if prompt is None:
                yield [replace(row, not_run=reason) for row in rows.values()]
            else:
                yield _Cell(bench, prompt, batch_size).measure(rows)


class _Bench:
    """The model, and what is the same for all cells."""

    def __init__(self, model: PreTrainedModel, tokenizer: GistTokenizer, settings: _Settings) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.device, self.dtype = input_weight(model).device, input_weight(model).dtype
        self.counts: FlopCounts = count_flops(model.config)
        special = {*tokenizer.tokenizer.all_special_ids, tokenizer.gist_token_id}
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
        places = torch.randint(len(self.words), (rows, columns), generator=torch.Generator().manual_seed(seed))
        return self.words[places].to(self.device)

    def timed(self, run: Callable[[], Any]) -> float:
        """Seconds."""
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
        """FLOPs a second. Few tokens are slow ones: before a long prompt is left out for them, a longer text says
        more.
        """
        rate, limit = self._rate(64), self.settings.max_seconds
        if self.counts.forward(length) / rate > limit > self.counts.forward(_CALIBRATION) / rate:
            return self._rate(_CALIBRATION)
        return rate

    def read_prompt(self, length: int) -> tuple[_Prompt | None, str | None]:
        """A prompt with its two caches, or why there is none."""
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
                return None, f"would need {_size(need)}, allowed are {_size(settings.max_bytes)}"
            ids = self.draw(1, length, length)
            found: list[Any] = []
            read_s = self.timed(lambda: found.append(self.model(ids, use_cache=True, logits_to_keep=1)))
            self.flops_per_s = self.counts.forward(length) / read_s
            gist_ids = ids.new_full((1, settings.num_gist_tokens), self.tokenizer.gist_token_id)
            encoding = self.tokenizer.locate(torch.cat([ids, gist_ids], dim=1)[0].tolist())
            compressed = prefix_states(self.model, self.tokenizer, [encoding], CacheOrigin("", "", "", "gist"))
            return _Prompt(ids, gist_ids, found[0][cache_argument()], compressed, read_s), None


class _Cell:
    """One prompt and a number of requests behind it."""

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
        return None if mode == NO_CACHE else hand_over(self.kept[mode], self.batch_size)

    @cached_property
    def static(self) -> Any:
        """A transformers cache with the prompt's states once for each request, and room for inputs and answers behind
        them. What stands there from the last time is hidden by the causal mask until it is written over. Made when
        first asked for, when it is known to fit.
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
        """``(B, V)``, of one forward pass."""
        ids = self.whole[mode] if mode == NO_CACHE else self.inputs
        past = self.past(mode)
        return self.bench.model(ids, **{cache_argument(): past}, use_cache=True, logits_to_keep=1).logits[:, -1]

    def first_token(self, mode: str) -> Tensor:
        return self.first_logits(mode).argmax(-1)

    def copied_first_token(self, mode: str) -> Tensor:
        """By the recipe of transformers' documentation: a deep copy of what is kept, then a copy for each request."""
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
            disable_compile=True,  # or on CUDA transformers would compile behind the static cache, and there alone
            pad_token_id=self.bench.tokenizer.pad_token_id,
            **more,
        )

    def measure(self, rows: dict[str, InferenceRow]) -> list[InferenceRow]:
        bench, settings = self.bench, self.bench.settings
        with evaluating(bench.model), torch.inference_mode():
            first_s, step_s = self._gated(rows)
            # Read anew, a prompt takes as many times as long as there are requests; then a step costs what it costs
            # behind a prefix cache, for as many keys and values are held.
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
            # One alternation for both ways of handing over, so that they can be compared with each other.
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
        """Check all caches; seconds of a first token and of a step behind each. What does not fit is marked."""
        first_s, step_s = {}, {}
        limit = self.bench.settings.max_bytes
        needs = {mode: self._bytes_needed(row) for mode, row in rows.items()}
        # What is static is there while the others run.
        needs[STATIC] += max((need for mode, need in needs.items() if mode != STATIC and need <= limit), default=0)
        for mode, row in rows.items():
            if needs[mode] > limit:
                rows[mode] = replace(row, not_run=f"would need {_size(needs[mode])}, allowed are {_size(limit)}")
            elif mode == STATIC and not self.can_be_static():
                rows[mode] = replace(row, not_run="a static cache with a sliding window cannot be wound back")
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
        # generate gives float32 whatever the weights are; rounding is that of the weights.
        logits = torch.stack([step[0] for step in found.logits]).to(dtype)
        check_logits(mode, logits, expected)
        # The choice, among what generate may choose: with equal logits up to rounding it is the same up to rounding.
        is_allowed = torch.stack([step[0] for step in found.scores]).isfinite()
        best = expected.float().masked_fill(~is_allowed, -torch.inf).amax(-1)
        chosen = expected.float().gather(1, answer.T)[:, 0]
        check_logits(f"{mode}, the logits of its greedy tokens,", chosen.to(dtype), best.to(dtype))

    def _uncached(self, mode: str, answer: Tensor) -> Tensor:
        """``(N, V)``: the logits before each of the N answered tokens of the first request, of one forward pass over
        the whole text.
        """
        behind = torch.cat([self.inputs[:1], answer[:, :-1]], dim=1)
        call: dict[str, Any] = {"use_cache": False, "logits_to_keep": answer.shape[1]}
        if mode == GIST:
            ids = torch.cat([self.prompt.ids, self.prompt.gist_ids, behind], dim=1)
            visibility = gist(ids == self.bench.tokenizer.gist_token_id)
            call |= {"attention_mask": visibility.as_attention_mask(), "position_ids": visibility.position_ids}
        else:
            ids = torch.cat([self.prompt.ids, behind], dim=1)
        return self.bench.model(ids, **call).logits[0]

    def _bytes_needed(self, row: InferenceRow) -> int:
        """About what the answers take: all keys and values, one layer of them twice while it grows, and the widest
        layer's activations and the logits of the first pass.
        """
        config = self.bench.model.config
        width = 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size) + 8 * config.hidden_size
        tokens = self.batch_size * (row.input_tokens + (row.prompt_tokens if row.mode == NO_CACHE else 0))
        grown = 0 if row.mode == STATIC else row.held_bytes + 2 * row.held_bytes // config.num_hidden_layers
        states = row.cache_bytes + grown
        logits = 12 * self.batch_size * config.vocab_size
        return states + tokens * width * self.bench.dtype.itemsize + logits

    def _alternating(self, runs: dict[_Key, Callable[[], Any]], seconds: dict[_Key, float]) -> dict[_Key, list[float]]:
        """Seconds of each run. Slow ones run less often, spread over the rounds; each round begins with another one."""
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


def _check_numbers(name: str, values: Sequence[int]) -> None:
    if not values or any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
        shown = values[0] if len(values) == 1 else list(values)
        raise GistError(f"{name} must be whole numbers of at least 1, got {shown!r}")


def _too_slow(what: str, seconds: float) -> str:
    return f"{what} would take about {seconds:,.0f} s"


def _give_back() -> None:
    """Return to the system what has been freed. Caches that grow by a token at a time leave holes that the next size
    does not fit into, and the C library keeps them: gigabytes, with prompts of 8,000 tokens.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _free_bytes(device: torch.device) -> int | None:
    """Memory that may be taken, or None where nobody says."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak_of_allocator(device: torch.device, run: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator gave out during a run and had not yet taken back.

    On a CPU its profiler notes every allocation and release, those inside of operators too; the size of the process
    would say less, for pages stay with it once it has touched them.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        profiler.start()
    try:
        run()
    finally:
        with _quiet_stderr():
            profiler.stop()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Without what the profiler's C++ writes there when it starts and stops, in the middle of a progress bar."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# -- shown -------------------------------------------------------------------------------------------------------------

_Rows = Sequence[dict[str, Any]]
_Runs = list[dict[str, dict[str, Any]]]  # of each process that measured it, the row of each way
_FIRST = ("first_token_ms", "copied_first_token_ms")
_SETTINGS = (
    "model",
    "num_parameters",
    "dtype",
    "num_gist_tokens",
    "input_tokens",
    "answer_tokens",
    "device",
    "threads",
)


def _by_cell(rows: _Rows) -> dict[tuple[int, int], _Runs]:
    """The rows of each length and number of requests, by the process (``run``) that wrote them. What a process that was
    ended has left half done is not among them.
    """
    for name in _SETTINGS:
        if len(found := {row[name] for row in rows}) > 1:
            raise GistError(
                f"rows of one table must have one {name}, these have {', '.join(sorted(map(str, found)))}; give each "
                "its own file"
            )
    cells: dict[tuple[int, int], dict[Any, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        runs = cells.setdefault((row["prompt_tokens"], row["batch_size"]), {})
        runs.setdefault(row.get("run"), {})[row["mode"]] = row
    whole = {cell: [run for run in runs.values() if run.keys() == set(MODES)] for cell, runs in cells.items()}
    return {cell: runs for cell, runs in sorted(whole.items()) if runs}


def _gain(cell: _Runs, mode: str, key: str) -> float | None:
    """How many times as fast the gist cache is as another way: the median of what each process found. Without a cache,
    nothing is handed over.
    """
    other_key = "first_token_ms" if mode == NO_CACHE and key in _FIRST else key
    found = []
    for run in cell:
        other, ours = run[mode][other_key], run[GIST][key]
        if other is not None and ours is not None:
            found.append(other / ours if key in _FIRST else ours / other)
    return statistics.median(found) if found else None


def _times(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:,.1f}x" if gain >= 10 else f"{gain:.2f}x"


def _middle(cell: _Runs, mode: str, key: str) -> tuple[float, float, float] | None:
    """Lowest lower quartile, median and highest upper quartile of the processes that ran it."""
    found = [run[mode] for run in cell if run[mode][key] is not None]
    if not found:
        return None
    low, high = min(row[f"{key}_low"] for row in found), max(row[f"{key}_high"] for row in found)
    return low, statistics.median(row[key] for row in found), high


def _value(cell: _Runs, mode: str, key: str) -> str:
    found = _middle(cell, mode, key)
    if found is None:
        reason = cell[0][mode]["not_run"]
        return "-" if reason is None else f"not run: {reason}"
    low, median, high = (f"{value:,.{0 if found[1] >= 1000 else 1}f}" for value in found)
    return f"{median} ({low}–{high})"


def _size(number: int | None) -> str:
    return "-" if number is None else format_bytes(number, 1)


def _bytes(cell: _Runs, mode: str, key: str) -> int | None:
    return max((run[mode][key] for run in cell if run[mode][key] is not None), default=None)


def _smaller(cell: _Runs) -> float:
    return cell[0][PREFIX]["cache_bytes"] / cell[0][GIST]["cache_bytes"]


def result_tables(rows: _Rows) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and lines of each table: first tokens with both ways of handing over, tokens a second, memory."""
    cells = _by_cell(rows)
    tables = []
    for title, key in (
        ("Time to the first token, ms, what is kept handed over without a copy", "first_token_ms"),
        ("Time to the first token, ms, copied for the requests first", "copied_first_token_ms"),
        ("Tokens a second, prompt or input read among it", "tokens_per_s"),
    ):
        is_copied = key == "copied_first_token_ms"
        shown, others = ((PREFIX, GIST), (NO_CACHE, PREFIX)) if is_copied else (MODES, MODES[:-1])
        lines = [
            [f"{length:,}", str(batch), *(_value(cell, mode, key) for mode in shown)]
            + [_times(_gain(cell, mode, key)) for mode in others]
            for (length, batch), cell in cells.items()
        ]
        columns = ["prompt", "batch", *shown, *(f"gist against {mode}" for mode in others)]
        tables.append((title, columns, lines))
    lines = []
    for (length, batch), cell in cells.items():
        kept = [_bytes(cell, mode, "cache_bytes") for mode in MODES[1:]]
        peaks = [_size(_bytes(cell, mode, "peak_bytes")) for mode in MODES]
        smaller = f"{_smaller(cell):,.1f}x"
        lines.append([f"{length:,}", str(batch), *map(_size, kept), smaller, *peaks])
    columns = ["prompt", "batch", *(f"kept: {mode}" for mode in MODES[1:]), "gist against prefix cache"]
    tables.append(("Memory", [*columns, *(f"peak: {mode}" for mode in MODES)], lines))
    return tables


def inference_table(rows: _Rows) -> str:
    """Rows of the JSONL file as Markdown."""
    parts = []
    for title, columns, lines in result_tables(rows):
        parts += [f"{title}:", "", *markdown_table(columns, lines), ""]
    first = rows[0]
    fewest, most = (
        pick(row[name] for row in rows for name in ("num_first_token_repeats", "num_answer_repeats") if row[name])
        for pick in (min, max)
    )
    cells_of: dict[int, list[str]] = {}
    for (length, batch), runs in _by_cell(rows).items():
        cells_of.setdefault(len(runs), []).append(f"{length:,} x {batch}")
    several = "".join(
        f"; of {number} processes ({', '.join(cells)}) the medians, and the lowest and the highest quartile"
        for number, cells in cells_of.items()
        if number > 1
    )
    parts.append(
        f"{first['model']}, {first['num_parameters'] / 1e6:.0f} million parameters, {first['dtype']}; k = "
        f"{first['num_gist_tokens']}, inputs of {first['input_tokens']} tokens, answers of {first['answer_tokens']}; "
        f"medians of {fewest} to {most} alternating runs, the slower the fewer, quartiles in brackets{several} "
        f"({first['device']}, {first['threads']} threads, torch {first['torch']}, transformers "
        f"{first['transformers']})."
    )
    return "\n".join(parts)


def losses_table(rows: _Rows) -> str:
    """The cells in which a gist cache gains less than a tenth over a prefix cache, or loses, as Markdown."""
    lines = []
    for (length, batch), cell in _by_cell(rows).items():
        for what, key in (("time to the first token", "first_token_ms"), ("tokens a second", "tokens_per_s")):
            for mode in (PREFIX, STATIC):
                gain = _gain(cell, mode, key)
                if gain is not None and gain < _NEAR:
                    both = (_value(cell, one, key) for one in (mode, GIST))
                    lines.append([f"{length:,}", str(batch), what, mode, *both, _times(gain)])
    if not lines:
        return "None of the cells above."
    return "\n".join(markdown_table(["prompt", "batch", "", "against", "that", GIST, "gist against that"], lines))


def highlights_table(rows: _Rows) -> str:
    """How many times a gist cache is as fast and as small, in few cells, as Markdown; among them one without gain."""
    shown = (
        ("first token, no cache", NO_CACHE, "first_token_ms"),
        ("first token, prefix cache", PREFIX, "first_token_ms"),
        ("first token, static prefix cache", STATIC, "first_token_ms"),
        ("tokens/s, prefix cache", PREFIX, "tokens_per_s"),
        ("tokens/s, static prefix cache", STATIC, "tokens_per_s"),
    )
    cells = _by_cell(rows)
    lines = []
    for length, batch in _HIGHLIGHTS:
        if cell := cells.get((length, batch)):
            gains = (f"{_times(_gain(cell, mode, key))} as fast" for _, mode, key in shown)
            lines.append([f"{length:,}", str(batch), *gains, f"{_smaller(cell):,.1f}x smaller"])
    return "\n".join(markdown_table(["prompt", "batch", *(title for title, _, _ in shown), "bytes"], lines))


def plot(rows: _Rows, path: str | Path) -> None:
    """Draw time to the first token and tokens a second over the length of the prompt, a column for each batch size.

    Args:
        rows: as :func:`gisting.measure.rows.read_rows` gives them.
        path: an image; its ending says which kind.

    Raises:
        GistError: matplotlib is not installed.
    """
    cells = _by_cell(rows)
    batches, lengths = (sorted({row[name] for row in rows}) for name in ("batch_size", "prompt_tokens"))
    figure = new_figure(4 * len(batches), 6.5)
    axes: Any = figure.subplots(2, len(batches), squeeze=False, sharex=True, sharey="row")
    for column, batch in enumerate(batches):
        for line, (key, label) in enumerate(
            (("first_token_ms", "time to the first token, ms"), ("tokens_per_s", "tokens a second"))
        ):
            axis = axes[line][column]
            for mode, color, mark in zip(MODES, _COLORS, "osvD", strict=True):
                measured = [length for length in lengths if (length, batch) in cells]
                found = {length: _middle(cells[length, batch], mode, key) for length in measured}
                shown = {length: values for length, values in found.items() if values is not None}
                axis.plot([*shown], [value for _, value, _ in shown.values()], color=color, marker=mark, label=mode)
                lows, highs = ([values[end] for values in shown.values()] for end in (0, 2))
                axis.fill_between([*shown], lows, highs, color=color, alpha=0.2, linewidth=0)
            axis.set_xscale("log")
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.minorticks_off()
            axis.set_yscale("log")
            axis.grid(visible=True, which="both", alpha=0.2)
            if not line:
                axis.set_title(f"batch {batch}")
            else:
                axis.set_xlabel("tokens of the prompt")
            if not column:
                axis.set_ylabel(label)
    axes[0][0].legend()
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['num_parameters'] / 1e6:.0f} million parameters, {first['dtype']}, k = "
        f"{first['num_gist_tokens']}; {first['device']}"
    )
    figure.savefig(path, dpi=110)
