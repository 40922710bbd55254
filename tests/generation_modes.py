"""Every way in which transformers generates, for several families: it gives the answer of the plain run, or is
refused.

``python -m tests.generation_modes`` writes the table into docs/generation.md. A plain run has no cache: for every
token, stock ``generate`` reads the full text (prompt, gist, input, answer so far) again, under the gist's interval
mask. Every mode is compared with the plain run that decodes in the same way, on three ragged rows, each with a
different k. Sampled modes run row by row. "static cache, beam search", the quantised cache and settings that look back
at ids are compared with other runs, which docs/generation.md names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    pipeline,
)
from transformers.cache_utils import DynamicLayer

import gisting
from benchmarks.pages import write_between
from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.generation import converse
from gisting.models import decoder, encoder_decoder
from gisting.padding import pad_rows
from gisting.pipeline import GistTextGenerationPipeline
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS
from tests import tiny

FAMILIES = ("llama", "qwen3", "gemma3_text", "mistral-window", "gpt_neox", "mixtral", "t5", "umt5")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "generation.md"
MARK = "generation modes"

# Windows are 8 tokens: two of the rows leave them.
PROMPTS = [tiny.words(20, 1), tiny.words(3, 2), tiny.words(11, 3)]
INPUTS = [tiny.words(2, 4), tiny.words(9, 5), tiny.words(5, 6)]
NEXT = [tiny.words(4, 7), tiny.words(1, 8), tiny.words(6, 9)]
COUNTS = [2, 1, 3]
LENGTH = 8
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.5}


@contextmanager
def rereading_everything(model: PreTrainedModel, tokenizer: GistTokenizer) -> Iterator[None]:
    """Make each forward pass of a decoder, in a block, read the full text under the gist's interval mask."""

    def add_mask(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert kwargs.get(cache_argument()) is None
        args, kwargs = (), {**kwargs, **({"input_ids": args[0]} if args else {})}
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        is_token = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        visibility = CONDITIONS["gist"](ids == tokenizer.gist_token_id, is_token)
        return args, {
            **kwargs,
            "attention_mask": visibility.as_attention_mask(),
            "position_ids": visibility.position_ids,
        }

    hook = model.register_forward_pre_hook(add_mask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def plain(model: PreTrainedModel, tokenizer: GistTokenizer, rows: list[list[int]], **settings: Any) -> list[list[int]]:
    """Answer full texts with stock ``generate`` and no cache; each answer ends with its end of sequence."""
    generate: Any = model.generate
    settings = {"max_new_tokens": LENGTH, "pad_token_id": tokenizer.pad_token_id, "use_cache": False, **settings}
    if tokenizer.is_encoder_decoder:
        encodings = [tokenizer.locate(row) for row in rows]
        answers = generate(**encoder_decoder.prepare_full_generation(model, tokenizer, encodings, "gist"), **settings)
    else:
        ids, is_token = pad_rows(rows, tokenizer.pad_token_id, left=True)
        with rereading_everything(model, tokenizer):
            answers = generate(ids, attention_mask=is_token.long(), **settings)[:, ids.shape[1] :]
    end = settings.get("eos_token_id", tokenizer.eos_token_id)
    return [row[: row.index(end) + 1] if end in row else row for row in answers.tolist()]


class Rounded(DynamicLayer):
    """A layer of a dynamic cache that rounds what it keeps to 8-bit floats. The first states set the scale, with room
    for states eight times as large, and enter attention unrounded.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        is_first = not self.is_initialized
        if is_first:
            self.scales = [states.abs().amax() * 8 / 448 for states in (key_states, value_states)]
        rounded = [
            (states / scale).to(torch.float8_e4m3fn).float() * scale
            for states, scale in zip((key_states, value_states), self.scales, strict=True)
        ]
        keys, values = super().update(rounded[0], rounded[1])
        return (key_states, value_states) if is_first else (keys, values)


@dataclass(frozen=True)
class Case:
    """One family: a patched model and its compressed prompts; the tokenizer may have more words."""

    name: str
    more_words: tuple[str, ...] = ()

    @cached_property
    def _both(self) -> tuple[PreTrainedModel, GistTokenizer]:
        is_encoder_decoder = self.name in tiny.ENCODER_DECODERS
        tokenizer = GistTokenizer(tiny.word_tokenizer(self.more_words), "plain", is_encoder_decoder=is_encoder_decoder)
        return gisting.patch(tiny.model(self.name), tokenizer), tokenizer

    @property
    def model(self) -> Any:
        return self._both[0]

    @property
    def tokenizer(self) -> GistTokenizer:
        return self._both[1]

    @cached_property
    def assistant(self) -> PreTrainedModel:
        """The model with noise in its weights: it drafts some tokens right and some wrong."""
        model = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02 * weight.abs().mean())
        return model

    @cached_property
    def cache(self) -> GistCache:
        return gisting.compress(self.model, self.tokenizer, PROMPTS, COUNTS)

    @cached_property
    def rows(self) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch(PROMPTS, INPUTS, num_gist_tokens=COUNTS)
        return [encoding.input_ids for encoding in encodings]

    @cached_property
    def starts(self) -> list[int]:
        """The number of prompt and gist ids in each row; 0 for an encoder-decoder, whose answer continues other ids."""
        if self.tokenizer.is_encoder_decoder:
            return [0] * len(self.rows)
        rests = self.tokenizer.encode_continuations(INPUTS)
        return [len(row) - len(rest) for row, rest in zip(self.rows, rests, strict=True)]

    @cached_property
    def greedy(self) -> list[list[int]]:
        return self.plain(self.rows, do_sample=False)

    def plain(self, rows: list[list[int]], **settings: Any) -> list[list[int]]:
        return plain(self.model, self.tokenizer, rows, **settings)

    def texts(self, answers: list[list[int]]) -> list[str]:
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    def generate(self, inputs: list[str] = INPUTS, cache: GistCache | None = None, **settings: Any) -> list[str]:
        settings = {"max_new_tokens": LENGTH, "do_sample": False, **settings}
        return gisting.generate(self.model, self.tokenizer, inputs, cache=cache or self.cache, **settings)

    def stock(self, ids: list[int], row: int = 0, **settings: Any) -> list[str]:
        """Stock ``generate`` from the cache of one row."""
        given = torch.tensor([ids])
        past = {cache_argument(): self.cache[row].as_past_key_values()}
        settings = {"max_new_tokens": LENGTH, "do_sample": False, **settings}
        tokens = self.model.generate(given, attention_mask=torch.ones_like(given), **past, **settings)
        return self.texts(tokens[:, len(ids) :].tolist())

    def is_greedy(self, **settings: Any) -> bool:
        return self.generate(**settings) == self.texts(self.greedy)


def _sampled(case: Case, **settings: Any) -> bool:
    """Compare row by row, because rows that a window keeps apart draw random numbers one after another."""
    equal, rows, caches = True, case.rows, [case.cache[row] for row in range(3)]
    for row, text in enumerate(INPUTS):
        torch.manual_seed(row)
        found = case.generate([text], caches[row], **SAMPLING, **settings)
        torch.manual_seed(row)
        equal &= found == case.texts(case.plain([rows[row]], **SAMPLING, **settings))
    return equal


def _beams(case: Case) -> bool:
    settings = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    wanted = [text for row in case.rows for text in case.texts(case.plain([row], **settings))]
    return case.generate(**settings) == wanted


class After(LogitsProcessor):
    """A processor that does not see the first ids, of prompt and gist, as a cache holds none of them."""

    def __init__(self, inner: LogitsProcessor, start: int) -> None:
        self.inner = inner
        self.start = start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self.inner(input_ids[:, self.start :], scores)


def _looking_back(case: Case, processor: LogitsProcessor, **settings: Any) -> bool:
    """Compare with a plain run whose processor sees input and answer only, as ours does."""
    wanted = [
        case.plain([row], do_sample=False, logits_processor=[After(processor, start)])[0]
        for row, start in zip(case.rows, case.starts, strict=True)
    ]
    assert wanted != case.greedy, "the setting changes nothing"
    return case.generate(**settings) == case.texts(wanted)


def allowed(row: int, ids: Tensor) -> list[int]:
    """A different third of the words for each row and place."""
    return [token for token in range(4, 64) if token % 3 == (row + len(ids)) % 3]


def _constrained(case: Case) -> bool:
    """Compare with a plain run whose function sees input and answer only, as ours does."""

    def of(row: int) -> Callable[[int, Tensor], list[int]]:
        return lambda _, ids: allowed(row, ids[case.starts[row] :])

    wanted = [
        case.plain([ids], do_sample=False, prefix_allowed_tokens_fn=of(row))[0] for row, ids in enumerate(case.rows)
    ]
    assert wanted != case.greedy, "the constraint changes nothing"
    return case.generate(prefix_allowed_tokens_fn=allowed) == case.texts(wanted)


def _guided(case: Case) -> bool:
    found = case.generate(guidance_scale=1.5)
    wanted = [case.plain([row], do_sample=False, guidance_scale=1.5)[0] for row in case.rows]
    assert wanted != case.greedy, "the setting changes nothing"
    return found == case.texts(wanted)


def _stopped(case: Case) -> bool:
    """Use a tokenizer with the word that transformers tries out on it."""
    case = Case(case.name, ("abcdef",))
    stop = case.texts(case.greedy)[0].split()[1]
    criteria = StoppingCriteriaList([StopStringCriteria(case.tokenizer.tokenizer, [stop])])
    wanted = case.plain(case.rows, do_sample=False, stopping_criteria=criteria)
    assert wanted != case.greedy, "nothing was stopped"
    return case.generate(stop_strings=[stop]) == case.texts(wanted)


def compile_config(**settings: Any) -> Any:
    """Settings that compile without graph breaks, and on the CPU too, where transformers does not compile by itself."""
    config: Any = CompileConfig(fullgraph=True, **{"mode": None, **settings})
    config._compile_all_devices = True
    return config


def _compiled(case: Case) -> bool:
    config = compile_config(backend="eager")
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        equal = case.is_greedy(cache_implementation="static", compile_config=config)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    finally:
        torch._dynamo.reset()
    return equal


def _quantized(case: Case) -> bool:
    equal = True
    for row, text in enumerate(INPUTS):
        cache = case.cache[row]
        found = case.generate([text], cache, cache_implementation="quantized", cache_config={"backend": "fp8"})
        arguments, given = decoder.prepare_generation(
            case.model, case.tokenizer, cache, case.tokenizer.encode_continuations([text])
        )
        rounded = DynamicCache()
        rounded.layer_class_to_replicate = Rounded
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            rounded.update(keys, values, layer)
        arguments[cache_argument()] = rounded
        tokens = case.model.generate(**arguments, max_new_tokens=LENGTH, do_sample=False)
        equal &= found == case.texts(tokens[:, given:].tolist())
    return equal


def _assisted(case: Case, *, has_gists: bool) -> bool:
    cache = gisting.compress(case.assistant, case.tokenizer, PROMPTS, [3, 1, 2]) if has_gists else None
    return case.is_greedy(assistant_model=case.assistant, assistant_cache=cache)


def _streamed(case: Case) -> bool:
    equal = True
    for skip_prompt in (True, False):
        streamer = TextIteratorStreamer(
            case.tokenizer.tokenizer, skip_prompt=skip_prompt, timeout=60, skip_special_tokens=True
        )
        thread = Thread(target=case.generate, args=(INPUTS[1:2], case.cache[1]), kwargs={"streamer": streamer})
        thread.start()
        equal &= "".join(streamer).strip() == case.texts(case.greedy)[1]
        thread.join()
    return equal


def _piped(case: Case) -> bool:
    build: Any = pipeline
    pipe = build(
        "text-generation", model=case.model, tokenizer=case.tokenizer, pipeline_class=GistTextGenerationPipeline
    )
    results = pipe(INPUTS, cache=case.cache, do_sample=False, max_new_tokens=LENGTH)
    return [[one["generated_text"] for one in result] for result in results] == [
        [text] for text in case.texts(case.greedy)
    ]


def _turns(case: Case) -> bool:
    settings = {"max_new_tokens": LENGTH, "do_sample": False}
    first = converse(case.model, case.tokenizer, INPUTS, cache=case.cache, **settings)
    second = converse(case.model, case.tokenizer, NEXT, cache=first.cache, **settings)
    rests = case.tokenizer.encode_continuations(NEXT)
    rows = [row + said + rest for row, said, rest in zip(case.rows, case.greedy, rests, strict=True)]
    wanted = case.plain(rows, do_sample=False)
    return first.texts + second.texts == case.texts(case.greedy + wanted)


def _sampled_turns(case: Case) -> bool:
    """Two answers to one input are two conversations."""
    settings = {**SAMPLING, "max_new_tokens": LENGTH}
    cache, row = case.cache[0], case.rows[0]
    torch.manual_seed(3)
    first = converse(case.model, case.tokenizer, INPUTS[:1], cache=cache, num_return_sequences=2, **settings)
    second = case.generate(NEXT[:2], first.cache)
    torch.manual_seed(3)
    said = case.plain([row], num_return_sequences=2, **SAMPLING)
    rests = case.tokenizer.encode_continuations(NEXT[:2])
    rows = [row + one + rest for one, rest in zip(said, rests, strict=True)]
    wanted = [case.plain([row], do_sample=False)[0] for row in rows]
    return first.texts + second == case.texts(said + wanted)


def _turns_of_beams(case: Case) -> bool:
    converse(case.model, case.tokenizer, INPUTS, cache=case.cache, num_beams=2)
    return False


def _stock(case: Case, **settings: Any) -> bool:
    rests = case.tokenizer.encode_continuations(INPUTS)
    found = [
        case.stock([case.tokenizer.gist_token_id] * k + rest, row, **settings)[0]
        for row, (k, rest) in enumerate(zip(COUNTS, rests, strict=True))
    ]
    return found == case.texts(case.greedy)


def _stock_without_gist_tokens(case: Case) -> bool:
    return case.stock(case.tokenizer.encode_continuations(INPUTS)[0]) == case.texts(case.greedy[:1])


MODES: dict[str, Callable[[Case], bool]] = {
    "greedy": lambda case: case.is_greedy(),
    "sampling": _sampled,
    "`num_return_sequences`, sampled": lambda case: _sampled(case, num_return_sequences=2),
    "beam search": _beams,
    "prefill in chunks": lambda case: case.is_greedy(prefill_chunk_size=2),
    "`use_cache=False`": lambda case: case.is_greedy(use_cache=False),
    "static cache": lambda case: case.is_greedy(cache_implementation="static"),
    "static cache, compiled": _compiled,
    "static cache, beam search": lambda case: (
        case.generate(cache_implementation="static", num_beams=3) == case.generate(num_beams=3)
    ),
    "`repetition_penalty`": lambda case: _looking_back(
        case, RepetitionPenaltyLogitsProcessor(1.5), repetition_penalty=1.5
    ),
    "`no_repeat_ngram_size`": lambda case: _looking_back(case, NoRepeatNGramLogitsProcessor(2), no_repeat_ngram_size=2),
    "`encoder_repetition_penalty`": lambda case: case.is_greedy(encoder_repetition_penalty=1.5),
    "`prefix_allowed_tokens_fn`": _constrained,
    "`guidance_scale`": _guided,
    "`stop_strings`": _stopped,
    "quantised cache (fp8)": _quantized,
    "offloaded cache, on the CPU": lambda case: case.is_greedy(cache_implementation="offloaded"),
    "assisted, the assistant has gists": lambda case: _assisted(case, has_gists=True),
    "assisted, the assistant has none": lambda case: _assisted(case, has_gists=False),
    "prompt look-up": lambda case: case.is_greedy(prompt_lookup_num_tokens=3),
    "drafts of its own layers": lambda case: case.is_greedy(assistant_early_exit=1),
    "streaming": _streamed,
    '`pipeline("text-generation")`': _piped,
    "two turns": _turns,
    "two turns, sampled": _sampled_turns,
    "two turns, beam search": _turns_of_beams,
    "stock `generate`": _stock,
    "stock `generate`, prompt look-up": lambda case: _stock(case, prompt_lookup_num_tokens=3),
    "stock `generate`, no gist tokens in front": _stock_without_gist_tokens,
}


def outcome(mode: str, case: Case) -> str:
    """Return ``"equal"``, ``"differs"``, or the text of the refusal."""
    try:
        return "equal" if MODES[mode](case) else "differs"
    except GistError as error:
        return str(error).replace(case.model.config.model_type, "MODEL")


def table() -> str:
    """Return the outcomes as Markdown, followed by a list of the refusals."""
    reasons: list[str] = []
    lines = [f"| | {' | '.join(FAMILIES)} |", "|---" * (len(FAMILIES) + 1) + "|"]
    cases = [Case(name) for name in FAMILIES]
    for mode in MODES:
        cells = []
        for case in cases:
            found = outcome(mode, case)
            if found not in ("equal", "differs"):
                if found not in reasons:
                    reasons.append(found)
                found = f"refused ({reasons.index(found) + 1})"
            cells.append(found)
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def documented() -> dict[tuple[str, str], str]:
    """Read the outcomes back from docs/generation.md, by mode and family."""
    text = DOCUMENT.read_text(encoding="utf-8")
    inside = text.split(f"<!-- {MARK} -->\n", 1)[1].split(f"\n<!-- end of {MARK} -->", 1)[0]
    lines, reasons = inside.split("\n\n")
    (_, *families), _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    refusals = {f"refused ({number})": text for number, text in re.findall(r"^(\d+)\. (.*)$", reasons, re.M)}
    return {
        (mode, family): refusals.get(cell, cell)
        for mode, *cells in rows
        for family, cell in zip(families, cells, strict=True)
    }


if __name__ == "__main__":
    write_between(DOCUMENT, MARK, table())
