"""Try a prompt on a real model: compress it, answer side by side, distil it, answer again, and say what it costs.

Place in the flow: a patched model, a prompt and questions -> **trial** -> what `gisting demo` and `gisting try` print.
Where an adapter has learned to press any prompt into gist tokens, its gist answers first; distillation
(arXiv 2112.00861) then improves it for this one prompt. Without an adapter there is only the distilled gist. Decoding
is greedy. What a right answer must contain is written down before the model answers, and full prompt and gist are
judged alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from gisting.cache import GistCache
from gisting.data.records import Record
from gisting.distillation import Distilled, distill
from gisting.distillation.distill import check_k
from gisting.errors import GistError
from gisting.eval.conditions import evaluate
from gisting.eval.cost import cache_bytes, format_bytes
from gisting.generation import compress, generate
from gisting.measure.compare import Answer, Comparison, answer_from_gist, compare
from gisting.measure.progress import phase_bars
from gisting.models import adapters
from gisting.models.load import trained_chunk_length, trained_num_gist_tokens
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer
from gisting.tokens.text import plain

__all__ = ["Question", "TrialResult", "read_questions", "run_trial"]

#: Tokens of a gist, where neither the caller nor training says how many.
NUM_GIST_TOKENS = 16
_PHASES = {
    "questions": "   the model writes questions",
    "answers": "   answers with the full prompt",
    "teacher": "   reading them with the full prompt",
    "start": "   making the first slots",
    "training": "   distilling",
}


@dataclass(frozen=True)
class Question:
    """A question, and what tells a right answer.

    Args:
        text: the question.
        expects: words of which a right answer contains one, in any case; empty if answers are not judged.
        is_detail: whether it is asked only at the end, about a detail of the prompt.
    """

    text: str
    expects: tuple[str, ...] = ()
    is_detail: bool = False

    def is_right(self, answer: str) -> bool:
        """Whether an answer contains what is expected."""
        return any(words.lower() in answer.lower() for words in self.expects)


@dataclass(frozen=True)
class TrialResult:
    """What a trial found.

    Args:
        num_prompt_tokens: tokens of the prompt.
        num_gist_tokens: k.
        prompt_bytes: bytes of the full prompt's states in a prefix cache.
        gist_bytes: bytes of the gist's states.
        before: the answers with the gist as an adapter or a trained model compresses it; None if there is neither.
        after: the same with the distilled gist.
        details: for each question about a detail, the full prompt's answer, the distilled gist's, and whether each is
            right.
        divergence: figures of :meth:`~gisting.eval.divergence.Divergence.summary` on held-out inputs, by source:
            ``"none"``, ``"first"`` and ``"gist"``, and ``"start"`` with the median KL before distilling.
        seconds: seconds of each part, by name.
        cache: the distilled gist.
    """

    num_prompt_tokens: int
    num_gist_tokens: int
    prompt_bytes: int
    gist_bytes: int
    before: list[Comparison] | None
    after: list[Comparison]
    details: list[dict[str, Any]]
    divergence: dict[str, Any]
    seconds: dict[str, float]
    cache: GistCache

    def to_row(self) -> dict[str, Any]:
        """Return everything but the cache as a dictionary for JSON."""
        row = {key: value for key, value in vars(self).items() if key not in ("before", "after", "cache")}
        before = None if self.before is None else [one.to_row() for one in self.before]
        return {**row, "before": before, "after": [one.to_row() for one in self.after]}


def read_questions(path: Path) -> list[Question]:
    """Read questions from a JSONL file of ``input``, and optionally ``expects`` and ``detail``.

    Args:
        path: the file.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(row["input"], tuple(row.get("expects", ())), row.get("detail", False)) for row in rows]


def run_trial(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prompt: str,
    questions: Sequence[Question],
    *,
    inputs: Sequence[str] | None = None,
    num_gist_tokens: int | None = None,
    adapter: Path | None = None,
    steps: int = 60,
    num_answers: int | None = None,
    max_new_tokens: int = 32,
    seed: int = 0,
    directory: Path | None = None,
    console: Console | None = None,
) -> TrialResult:
    """Compress a prompt, answer questions with full prompt, gist and no prompt, distil, answer again, and print it all.

    Args:
        model: a patched model; an adapter that is given is left attached.
        tokenizer: the tokenizer it was patched for.
        prompt: the text.
        questions: what to ask, at least one question that is not about a detail.
        inputs: what to distil on, without the questions; None to let the model write them.
        num_gist_tokens: k; None for as many as the model or the adapter was trained with, at most 16,
            and fewer than the prompt's tokens.
        adapter: directory of an adapter for this model, which compresses the prompt.
        steps: optimiser steps of the distillation.
        num_answers: answers that are sampled for it; None for one for each input.
        max_new_tokens: maximum length of an answer.
        seed: seed of the distillation.
        directory: where the distillation keeps its work, to go on after it was stopped.
        console: where to print; by default standard output.

    Returns:
        What was printed.

    Raises:
        GistError: there is no question, one of the questions is among the inputs, or as :func:`gisting.distill`.
    """
    console = Console() if console is None else console
    asked = [question for question in questions if not question.is_detail]
    if not asked:
        raise GistError("questions must hold at least one that is not about a detail")
    inputs = None if inputs is None else list(inputs)
    both = sorted({question.text for question in questions} & set(inputs or ()))
    if both:
        raise GistError(f"{both[0]!r} is a question and one of the inputs; an answer that was learned shows nothing")
    if adapter is not None:
        adapters.load(model, adapter)
    num_prompt_tokens = tokenizer.encode_prompts([prompt], 1)[0].num_prompt_tokens
    k = _wanted_k(model, num_gist_tokens, num_prompt_tokens)
    clock = _Clock()
    show = _Printer(console, k)

    prompt_bytes = cache_bytes(model.config, num_prompt_tokens, input_weight(model).dtype, is_windowed=True)
    show.prompt(prompt, num_prompt_tokens, prompt_bytes)
    texts = [question.text for question in asked]
    before = None
    if trained_num_gist_tokens(model) is not None:
        with clock.part("compress"):
            gist = compress(model, tokenizer, [prompt], k, chunk_length=trained_chunk_length(model))
        show.title(f"Compressed into {k} gist tokens in {clock.seconds['compress']:.2f} s: {_size(gist)}")
        with clock.part("answers"):
            before = compare(model, tokenizer, texts, prompt=prompt, cache=gist, max_new_tokens=max_new_tokens)
        for question, one in zip(asked, before, strict=True):
            show.answers(question, {"full prompt": one.prompt, "gist": one.gist, "no prompt": one.no_prompt})

    show.title(f"Distilled: only these {k} slots learn, the model stays as it is")
    with clock.part("distil"), phase_bars(_PHASES) as bars:
        distilled = distill(
            model,
            tokenizer,
            prompt,
            inputs,
            k,
            steps=steps,
            num_answers=num_answers if num_answers is not None or inputs is None else len(inputs),
            evaluate_every=max(1, steps // 3),
            seed=seed,
            directory=directory,
            progress=lambda one: bars(one.phase, one.done, one.total),
        )
    gist = distilled.cache
    show.distilled(distilled, clock.seconds["distil"])

    with clock.part("answers again"):
        after = _answer_again(model, tokenizer, prompt, texts, before, gist, max_new_tokens)
    for row, (question, one) in enumerate(zip(asked, after, strict=True)):
        columns = {"full prompt": one.prompt, "distilled gist": one.gist}
        other = ("no prompt", one.no_prompt) if before is None else ("gist, before", before[row].gist)
        show.answers(question, {**columns, other[0]: other[1]})
    with clock.part("details"):
        details = _details(model, tokenizer, prompt, questions, gist, max_new_tokens)
    show.details(details)
    show.costs(after)

    divergence: dict[str, Any] = {name: one.summary() for name, one in distilled.held_out.items()}
    divergence["start"] = {"kl_median": distilled.history[0].held_out.median}
    return TrialResult(
        num_prompt_tokens=num_prompt_tokens,
        num_gist_tokens=k,
        prompt_bytes=prompt_bytes,
        gist_bytes=gist.num_bytes,
        before=before,
        after=after,
        details=details,
        divergence=divergence,
        seconds=clock.seconds,
        cache=gist,
    )


def _wanted_k(model: Any, wanted: int | None, num_prompt_tokens: int) -> int:
    trained = trained_num_gist_tokens(model)
    if wanted is None:
        wanted = min(NUM_GIST_TOKENS, max(1, num_prompt_tokens - 1), *(() if trained is None else trained[1:]))
    check_k(wanted, num_prompt_tokens)
    return wanted


def _answer_again(
    model: Any,
    tokenizer: GistTokenizer,
    prompt: str,
    texts: list[str],
    before: list[Comparison] | None,
    gist: GistCache,
    max_new_tokens: int,
) -> list[Comparison]:
    """Answer with the distilled gist; the controls have answered already if there was a gist before."""
    if before is None:
        return compare(model, tokenizer, texts, prompt=prompt, cache=gist, max_new_tokens=max_new_tokens)
    return [
        replace(one, gist=answer_from_gist(model, tokenizer, one.input, gist, max_new_tokens=max_new_tokens))
        for one in before
    ]


def _details(
    model: Any,
    tokenizer: GistTokenizer,
    prompt: str,
    questions: Sequence[Question],
    gist: GistCache,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Ask about details, with the full prompt and with the gist, all at once."""
    asked = [question for question in questions if question.is_detail]
    if not asked:
        return []
    texts = [question.text for question in asked]
    records = [Record(prompt, text, "") for text in texts]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    (full,) = evaluate(model, tokenizer, records, conditions=["prompt"], with_rouge=False, **settings)
    answers = generate(model, tokenizer, texts, cache=gist, do_sample=False, num_beams=1, **settings)
    return [
        {
            "input": question.text,
            "expects": list(question.expects),
            "prompt": with_prompt,
            "gist": with_gist,
            "prompt_is_right": question.is_right(with_prompt),
            "gist_is_right": question.is_right(with_gist),
        }
        for question, with_prompt, with_gist in zip(asked, full.predictions, answers, strict=True)
    ]


class _Printer:
    """Prints the parts of a trial, numbered, so that they fit 80 columns."""

    def __init__(self, console: Console, k: int) -> None:
        self.console, self.k, self.number = console, k, 0

    def title(self, text: str) -> None:
        self.number += 1
        self.console.print(f"\n{self.number}. {text}", style="bold", markup=False, highlight=False)

    def line(self, text: str, **style: Any) -> None:
        self.console.print(text, markup=False, highlight=False, **style)

    def prompt(self, prompt: str, num_tokens: int, num_bytes: int) -> None:
        self.title(
            f"The prompt: {num_tokens} tokens, whose keys and values are {format_bytes(num_bytes, 1)} in a prefix cache"
        )
        for line in plain(prompt, keeps_lines=True).splitlines() or [""]:
            self.line(line)

    def answers(self, question: Question, columns: dict[str, Answer]) -> None:
        # A table without a title, because a title is centred and a question may be long.
        self.line(f"\n{plain(question.text, keeps_lines=True)}", style="italic")
        table = Table(expand=True)
        for name in columns:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(plain(answer.text, keeps_lines=True) for answer in columns.values()))
        if question.expects:
            table.add_section()
            table.add_row(*(_verdict(question.is_right(answer.text)) for answer in columns.values()))
        self.console.print(table, markup=False)

    def distilled(self, found: Distilled, seconds: float) -> None:
        about = (found.cache.about[0] or {})["distilled"]
        where = "that the model wrote itself" if about["self_study"] else "that are not the questions asked here"
        self.line(
            f"{about['answers']} answers to {about['inputs']} inputs {where}, {about['steps']} steps, "
            f"{seconds:.0f} s, {_size(found.cache)}."
        )
        number = len(found.held_out["gist"].kl)
        self.line(f"Divergence from the full prompt on {number} other inputs (KL, nats a token, median):")
        kl = {name: one.median for name, one in found.held_out.items()}
        rows = {
            "no prompt": kl["none"],
            f"the prompt's first {self.k} tokens as they are": kl["first"],
            "the slots at the start": found.history[0].held_out.median,
            "the distilled gist": kl["gist"],
        }
        for name, value in rows.items():
            self.line(f"  {name:41} {value:.3f}")

    def details(self, details: list[dict[str, Any]]) -> None:
        if not details:
            return
        count = {name: sum(one[f"{name}_is_right"] for one in details) for name in ("prompt", "gist")}
        self.title("What a gist loses: details")
        self.line(
            f"Of {len(details)} questions about details, {count['prompt']} answers with the full prompt are right, and "
            f"{count['gist']} with the distilled gist."
        )
        lost = [one for one in details if one["prompt_is_right"] and not one["gist_is_right"]]
        if not lost:
            self.line("None that the full prompt has right is wrong with the gist this time.")
            return
        one = lost[0]
        self.line(f"\n{plain(one['input'], keeps_lines=True)}", style="italic")
        table = Table("full prompt: right", "distilled gist: wrong", expand=True)
        table.add_row(plain(one["prompt"], keeps_lines=True), plain(one["gist"], keeps_lines=True))
        self.console.print(table, markup=False)

    def costs(self, answers: list[Comparison]) -> None:
        self.title("What an answer costs (one at a time, median over the questions)")
        table = Table("", "tokens read", "kept for the prompt", "first token", "whole answer")
        rows = (("full prompt", "prompt"), (f"gist, k = {self.k}", "gist"), ("no prompt", "no_prompt"))
        for name, field in rows:
            found = [getattr(one, field) for one in answers]
            table.add_row(
                name,
                f"{statistics.median_low(one.num_read_tokens for one in found):,}",
                format_bytes(found[0].kept_bytes, 1) + (" *" if field == "prompt" else ""),
                f"{statistics.median(one.first_token_ms for one in found):,.0f} ms",
                f"{statistics.median(one.total_ms for one in found):,.0f} ms",
            )
        self.console.print(table, markup=False)
        self.line("* in a prefix cache, with which it would read as few tokens as the gist does.")


def _verdict(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def _size(gist: GistCache) -> str:
    return f"{format_bytes(gist.num_bytes, 1)} of keys and values"


class _Clock:
    """The seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)
