"""Sample answers with the whole prompt in view, or without any, as training from prompts and measures of a gist need.

Place in the flow: prompts and inputs -> **sampling** -> answers, which a gist is then compared with or trained on. The
model answers ordinary text without gist tokens, as it did before it was patched (the condition ``"prompt"`` of
:mod:`gisting.eval.conditions`). The states of each prompt are computed once, whatever the number of its inputs.
A student that learns from its own answers has no prompt: it answers the bare query (the condition ``"no-prompt"``).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gisting.cache import CacheOrigin, GistCache
from gisting.errors import GistError
from gisting.generation.answers import answer_ends, up_to_end
from gisting.generation.call import Call, prepare_call
from gisting.generation.checks import check_count, check_positions, listed
from gisting.generation.compression import full_prompt_caches
from gisting.models.architecture import architecture_of
from gisting.models.mode import evaluating
from gisting.models.state import require_patched
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SampledAnswer", "sample_answers", "sample_bare_answers"]

# Tokens of prompts that are read in one pass, with padding; a prompt that is longer is read alone.
_TOKENS_AT_ONCE = 16_000


@dataclass(frozen=True)
class SampledAnswer:
    """An answer of the model with the whole prompt in view.

    Args:
        prompt: the prompt; of an answer to the bare query, the one that it is to be compared with, or "".
        input: the input.
        output: the text of the answer.
        token_ids: the ids that were sampled, with the id that ended the answer if it was reached.
    """

    prompt: str
    input: str
    output: str
    token_ids: list[int]


def sample_answers(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    pairs: Iterable[tuple[str, str]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> list[SampledAnswer]:
    """Answer inputs as the model does with the whole prompt in view, without gist tokens.

    Tokens are drawn from the model's whole distribution, not from its likeliest tokens, so that the answers show a
    student what the model would say. Each pair has random numbers of its own, made from the seed, its texts and how
    often the same pair came before, so the answers do not depend on the order of the pairs or on the other pairs. (The
    size of a batch still changes the last bits of logits, in 16 bits more than in 32, and with them now and then a
    token.)

    Args:
        model: a patched model. An adapter that acts at gist tokens only plays no part.
        tokenizer: the tokenizer it was patched for.
        pairs: a prompt and an input each; a pair that is repeated gets another answer.
        max_new_tokens: the largest number of tokens in an answer.
        temperature: 0 for greedy decoding, 1 for the model's own distribution.
        seed: a whole number.
        batch_size: how many answers to sample together. Pairs are sorted by prompt and by length first.
        progress: called with the number of answers sampled since the last call.

    Returns:
        An answer for each pair, in their order.

    Raises:
        GistError: the model is not patched, a pair is not two texts, a prompt is empty, a text with its answer exceeds
            the model's positions, or a setting is out of range.
    """
    family = require_patched(model, tokenizer)
    pairs = _checked(pairs)
    _check_settings(max_new_tokens, batch_size, temperature, seed)
    if not pairs:
        return []
    has_states = architecture_of(family).has_prefix_states("positive")  # of a whole prompt, which a decoder keeps
    kind = _FromStates if has_states else _FromText
    run = kind(model, tokenizer, pairs, _call(model, tokenizer, pairs, max_new_tokens))
    return _sampled(run, pairs, max_new_tokens, float(temperature), seed, batch_size, progress)


def sample_bare_answers(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Iterable[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> list[SampledAnswer]:
    """Answer inputs without any prompt, as a model does that has internalised one.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        inputs: the texts; one that is repeated gets another answer.
        max_new_tokens: as for :func:`sample_answers`; likewise the other settings.
        temperature: see there.
        seed: see there.
        batch_size: see there.
        progress: see there.

    Returns:
        An answer for each input, in their order, whose ``prompt`` is "".

    Raises:
        GistError: as for :func:`sample_answers`.
    """
    require_patched(model, tokenizer)
    pairs = [("", input) for input in listed("inputs", inputs)]
    if others := [row for row, (_, input) in enumerate(pairs) if not isinstance(input, str)]:
        raise GistError(f"inputs[{others[0]}] must be a text, got {type(pairs[others[0]][1]).__name__}")
    _check_settings(max_new_tokens, batch_size, temperature, seed)
    if not pairs:
        return []
    run = _FromText(model, tokenizer, pairs, _call(model, tokenizer, pairs, max_new_tokens))
    return _sampled(run, pairs, max_new_tokens, float(temperature), seed, batch_size, progress)


def _check_settings(max_new_tokens: int, batch_size: int, temperature: float, seed: int) -> None:
    check_count("max_new_tokens", max_new_tokens)
    check_count("batch_size", batch_size)
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise GistError(f"temperature must be a number of at least 0, got {temperature!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise GistError(f"seed must be a whole number, got {seed!r}")


def _call(model: Any, tokenizer: GistTokenizer, pairs: Sequence[tuple[str, str]], max_new_tokens: int) -> Call:
    settings = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    return prepare_call(model, tokenizer, [input for _, input in pairs], max_new_tokens, settings, None)


def _sampled(
    run: _FromStates | _FromText,
    pairs: Sequence[tuple[str, str]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    progress: Callable[[int], Any] | None,
) -> list[SampledAnswer]:
    draws = None if temperature == 0 else _draws(pairs, seed, max_new_tokens)
    found: dict[int, list[int]] = {}
    with evaluating(run.model):
        for start in range(0, len(pairs), batch_size):
            for rows in run.groups(run.order[start : start + batch_size]):
                pick = None if draws is None else [_Pick(draws[rows], temperature)]
                found.update(zip(rows, run.answers(rows, pick), strict=True))
                if progress is not None:
                    progress(len(rows))
    answers = [found[row] for row in range(len(pairs))]
    return [
        SampledAnswer(prompt, input, run.tokenizer.decode(ids).strip(), ids)
        for (prompt, input), ids in zip(pairs, answers, strict=True)
    ]


class _FromStates:
    """Continue from the states of each prompt, in a decoder."""

    def __init__(self, model: Any, tokenizer: GistTokenizer, pairs: Sequence[tuple[str, str]], call: Call) -> None:
        self.model, self.tokenizer, self.pairs, self.call = model, tokenizer, pairs, call
        prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
        self.heads = heads = {
            prompt: len(one.chunks[0])
            for prompt, one in zip(prompts, tokenizer.encode_prompts(prompts, 1), strict=True)
        }
        self.rest = tokenizer.encode_continuations([input for _, input in pairs])
        lengths = [
            heads[prompt] + len(ids) + call.config.max_new_tokens
            for (prompt, _), ids in zip(pairs, self.rest, strict=True)
        ]
        check_positions(model, lengths, "input", f"its prompt and {call.config.max_new_tokens} new tokens")
        number = {prompt: place for place, prompt in enumerate(prompts)}
        self.order = sorted(
            range(len(pairs)), key=lambda row: (heads[pairs[row][0]], number[pairs[row][0]], len(self.rest[row]))
        )
        self.kept: Any = None  # the states of the last batch's prompts
        self.place: dict[str, int] = {}  # the number of each of them

    def groups(self, rows: list[int]) -> list[list[int]]:
        """Rows to run in one batch each: all, except where padding would change an answer."""
        cache = self._states(rows)
        groups = self.call.architecture.group_rows(
            self.model,
            cache,
            [self.rest[row] for row in rows],
            self.call.config.max_new_tokens,
            takes_padding=self.call.takes_padding,
        )
        return [[rows[place] for place in group] for group in groups]

    def answers(self, rows: list[int], pick: list[_Pick] | None) -> list[list[int]]:
        """The ids of the answers to a group of rows."""
        cache, rest = self._states(rows), [self.rest[row] for row in rows]
        past = self.call.past_for(cache.num_slots + max(map(len, rest)) + self.call.config.max_new_tokens - 1)
        arguments, given = self.call.architecture.prepare_generation(self.model, self.tokenizer, cache, rest, 1, **past)
        said = self.model.generate(**arguments, generation_config=self.call.config, logits_processor=pick)
        ends = answer_ends(self.call.config, self.model)
        return [up_to_end(answer, ends) for answer in said[:, given:].tolist()]

    def _states(self, rows: list[int]) -> GistCache:
        wanted = list(dict.fromkeys(self.pairs[row][0] for row in rows))
        # Batches are sorted by prompt, so a prompt that is not in this batch has had its last input.
        kept = [prompt for prompt in wanted if prompt in self.place]
        new = [prompt for prompt in wanted if prompt not in self.place]
        if new:
            origin = CacheOrigin("", "", "", "prompt")
            states = [
                full_prompt_caches(self.model, self.tokenizer, group, origin) for group in self._groups_to_read(new)
            ]
            if kept:
                states.insert(0, self.kept.select([self.place[prompt] for prompt in kept]))
            self.kept = GistCache.cat(states) if len(states) > 1 else states[0]
            self.place = {prompt: number for number, prompt in enumerate([*kept, *new])}
        return self.kept.select([self.place[self.pairs[row][0]] for row in rows])

    def _groups_to_read(self, prompts: list[str]) -> list[list[str]]:
        """Prompts to read in one pass each, from the shortest to the longest, which they are padded to."""
        groups: list[list[str]] = []
        for prompt in prompts:
            if groups and (len(groups[-1]) + 1) * self.heads[prompt] <= _TOKENS_AT_ONCE:
                groups[-1].append(prompt)
            else:
                groups.append([prompt])
        return groups


class _FromText:
    """Read prompt and input together, in an encoder-decoder; or the input alone, where there is no prompt."""

    def __init__(self, model: Any, tokenizer: GistTokenizer, pairs: Sequence[tuple[str, str]], call: Call) -> None:
        self.model, self.tokenizer, self.call = model, tokenizer, call
        inputs = [input for _, input in pairs]
        if any(prompt for prompt, _ in pairs):
            heads = tokenizer.encode_prompts([prompt for prompt, _ in pairs], 1)
            rest = tokenizer.encode_continuations(inputs)
            self.sources = [head.chunks[0] + ids for head, ids in zip(heads, rest, strict=True)]
        else:
            self.sources = tokenizer.encode_bare(inputs)
        # A decoder continues what it reads.
        self.is_decoder = call.architecture.has_prefix_states("positive")
        if not self.is_decoder:
            self.sources = [source or [tokenizer.eos_token_id] for source in self.sources]
        if empty := [row for row, source in enumerate(self.sources) if not source]:
            raise GistError(f"inputs[{empty[0]}] leaves no text for the model to continue; give it some text")
        new, also = (call.config.max_new_tokens, "its answer") if self.is_decoder else (0, "its prompt")
        check_positions(model, [len(source) + new for source in self.sources], "input", also)
        self.order = sorted(range(len(pairs)), key=lambda row: len(self.sources[row]))

    def groups(self, rows: list[int]) -> list[list[int]]:
        """All rows in one batch, or those of equal lengths where padding would change an answer."""
        if not self.is_decoder or self.call.takes_padding:
            return [rows]
        return [[*group] for _, group in itertools.groupby(rows, key=lambda row: len(self.sources[row]))]

    def answers(self, rows: list[int], pick: list[_Pick] | None) -> list[list[int]]:
        """The ids of the answers to a group of rows."""
        device = input_weight(self.model).device
        ids, is_token = pad_rows([self.sources[row] for row in rows], self.tokenizer.pad_token_id, left=self.is_decoder)
        said = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=is_token.long().to(device),
            generation_config=self.call.config,
            logits_processor=pick,
        )
        ends = answer_ends(self.call.config, self.model)
        given = ids.shape[1] if self.is_decoder else 1  # the token that starts the decoder
        return [up_to_end(answer, ends) for answer in said[:, given:].tolist()]


class _Pick:
    """A logits processor that leaves one token possible, the one that a row's next random number falls on.

    It comes after the model's own processors, so a suppressed token is never drawn.
    """

    def __init__(self, draws: Tensor, temperature: float) -> None:
        self.draws, self.temperature, self.step = draws, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Each token has a piece of 0..1 as long as its probability; drawn is the one whose piece holds the number.
        ends = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        number = self.draws[:, self.step, None].to(ends.device) * ends[:, -1:]
        self.step += 1
        drawn = torch.searchsorted(ends, number, right=True).clamp(max=ends.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def _draws(pairs: Sequence[tuple[str, str]], seed: int, length: int) -> Tensor:
    """Random numbers in 0..1, float64 ``(pairs, length)``, which depend on each pair alone."""
    before: Counter[tuple[str, str]] = Counter()
    rows = []
    for pair in pairs:
        key = repr((seed, *pair, before[pair])).encode("utf-8", "surrogatepass")
        before[pair] += 1
        own = int.from_bytes(hashlib.sha256(key).digest()[:8], "big", signed=True)
        rows.append(torch.rand(length, generator=torch.Generator().manual_seed(own), dtype=torch.float64))
    return torch.stack(rows)


def _checked(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    found = []
    for row, pair in enumerate(listed("pairs", pairs, "pairs of texts")):
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise GistError(f"pairs[{row}] must be a prompt and an input, both texts, got {pair!r:.100}")
        if not pair[0]:
            raise GistError(f"pairs[{row}] has an empty prompt; an answer with the prompt in view needs one")
        found.append((pair[0], pair[1]))
    return found
