"""Distil five system prompts of a real chat model, and compare each gist with the full prompt on held-out questions.

The prompts and questions are in ``benchmarks/prompts/``. Beside each gist are its controls, at the same held-out
answers: no prompt, the first k tokens of the prompt as they are, and the gist of another prompt (the next in the list,
at the same k). Exact details of the prompt (names, numbers) are asked for with the full prompt, with the gist and
without a prompt, as ``gisting check`` asks for them, and counted. Gists and answers are kept, so a run that was stopped
goes on where it was; rows that are in the output are not measured again. Several processes can share the work
(``--part``), the directory and the output.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import CheckpointsOption, OutputOption, Rows, names, numbers, part_of, say, where
from gisting.cache import GistCache
from gisting.cli.shared import read_dtype
from gisting.data.records import Record
from gisting.data.tasks import LETTERS
from gisting.distillation import Distilled, distill
from gisting.distillation.starts import STARTS
from gisting.errors import GistError
from gisting.eval.check import ask_for_spans
from gisting.eval.conditions import evaluate
from gisting.eval.divergence import measure_divergence
from gisting.eval.spans import Span, find_spans
from gisting.markdown import markdown_table
from gisting.measure.models import random_llama
from gisting.measure.rows import read_rows
from gisting.models import adapters
from gisting.models.load import load
from gisting.models.weights import input_weight
from gisting.storage import write_atomically
from gisting.store.objects import locked
from gisting.tokens import GistTokenizer

__all__ = ["PROMPTS", "DistillRow", "distill_table", "main", "measure", "read_prompt", "starts_table"]

FOLDER = Path(__file__).resolve().parent / "prompts"
#: The prompts, by the names of their files, with what a table calls them.
PROMPTS = {
    "support": "support bot",
    "sql": "SQL of a schema",
    "translator": "translator, glossary",
    "extractor": "JSON extractor",
    "persona": "persona",
}
#: The columns of a row that say what it is about.
_KEY = ("model", "dtype", "wanted_steps", "start", "prompt", "num_gist_tokens", "seed")
_START = "matched"  # what distill takes for a decoder
_STARTS = {
    "first": "first, the states of the first k tokens",
    "attended": "attended, those of the most attended tokens",
    "matched": "matched, these fitted to the answers' attention",
    "gist": "gist, what the adapter of the package makes",
}
_DETAIL_TOKENS = 64  # of an answer to the question for a detail, as gisting check has them


@dataclass(frozen=True)
class DistillRow:
    """One gist. Divergences are ``Divergence.summary()`` by source, in nats a token; ``seconds`` by phase.

    ``steps`` were done, of ``wanted_steps`` or, if that is None, of as many as ``distill`` does. ``seconds`` has no
    sampling where the answers were there already: all k of a prompt and seed share them. ``start_median`` is the median
    divergence of the slots before they learned. ``details`` are counts: ``asked``, the answers with the full prompt
    (``prompt``), the gist and no prompt (``none``) that hold the detail, and those of the full prompt that the gist has
    ``lost``.
    """

    model: str
    dtype: str
    prompt: str
    num_prompt_tokens: int
    num_gist_tokens: int
    seed: int
    start: str
    inputs: int
    answers: int
    steps: int
    wanted_steps: int | None
    kept: float
    kept_of_swapped: float
    start_median: float
    held_out: dict[str, Any]
    details: dict[str, int]
    seconds: dict[str, float]


def read_prompt(name: str) -> tuple[str, list[str]]:
    """Return the text of a prompt, and its questions: those about it, and ordinary ones.

    Args:
        name: a name of ``PROMPTS``.
    """
    lines = [(FOLDER / f"{one}.questions.txt").read_text(encoding="utf-8").splitlines() for one in (name, "ordinary")]
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip(), [
        line for part in lines for line in part if line
    ]


def measure(
    model: Any,
    tokenizer: GistTokenizer,
    model_name: str,
    directory: str | Path,
    *,
    prompts: dict[str, tuple[str, list[str]]],
    sizes: Sequence[int],
    seeds: dict[str, Sequence[int]],
    start: str = _START,
    part: tuple[int, int] = (1, 1),
    settings: dict[str, Any],
    done: Sequence[dict[str, Any]] = (),
    add: Callable[[DistillRow], Any],
    progress: Callable[[str], Any],
) -> None:
    """Distil and measure every prompt, k and seed that is not done.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        model_name: what rows call it.
        directory: for gists, answers and states; processes with other parts may share it.
        prompts: text and questions by name, at least two.
        sizes: every k.
        seeds: by name of the prompt.
        start: what the slots start from.
        part: the number of this part, from 1, and how many parts there are: it has every prompt and seed whose place in
            the list is its own.
        settings: more arguments of :func:`gisting.distill`.
        done: rows that are there already.
        add: called with each row as soon as it is measured.
        progress: called with a line for each gist.
    """
    dtype = str(input_weight(model).dtype).removeprefix("torch.")
    there = {tuple(row.get(column) for column in _KEY) for row in done}
    order = list(prompts)
    mine = [(name, seed) for name in order for seed in seeds[name]][part[0] - 1 :: part[1]]
    gists = _Gists(model, tokenizer, Path(directory), prompts, {**settings, "start": start})
    details: dict[str, _Details] = {}
    for k in sizes:
        for name, seed in mine:
            if (model_name, dtype, settings.get("steps"), start, name, k, seed) in there:
                continue
            begin = time.perf_counter()
            found, seconds = gists.distil(name, k, seed)
            other = order[(order.index(name) + 1) % len(order)]
            swapped = gists.read(other, k, seeds[other][0])
            sources = {**found.held_out, "swapped": measure_divergence(model, tokenizer, found.teacher, swapped)}
            if name not in details:
                details[name] = _Details(model, tokenizer, prompts[name][0])
            about = found.to_row()
            row = DistillRow(
                model=model_name,
                dtype=dtype,
                wanted_steps=settings.get("steps"),
                prompt=name,
                num_prompt_tokens=found.num_prompt_tokens,
                num_gist_tokens=k,
                seed=seed,
                **{column: about[column] for column in ("start", "inputs", "answers", "steps", "kept")},
                kept_of_swapped=sources["gist"].kept(sources["swapped"]),
                start_median=found.history[0].held_out.median,
                held_out={source: one.summary() for source, one in sources.items()},
                details=details[name].counted(found.cache),
                seconds=seconds,
            )
            add(row)
            progress(
                f"{name}, k = {k}, seed {seed}: {row.kept:.0%} of the median divergence is gone "
                f"({time.perf_counter() - begin:.0f} s)"
            )


@dataclass(frozen=True)
class _Gists:
    """The gists of all prompts, which several processes may make in one folder."""

    model: Any
    tokenizer: GistTokenizer
    folder: Path
    prompts: dict[str, tuple[str, list[str]]]
    settings: dict[str, Any]

    def distil(self, name: str, k: int, seed: int) -> tuple[Distilled, dict[str, float]]:
        """Distil a prompt, or read what an earlier run made of it; and the seconds that it took then."""
        text, questions = self.prompts[name]
        slots = self._slots(name, k, seed)
        slots.mkdir(parents=True, exist_ok=True)
        # All processes begin with the first k, so that only one of them samples the answers.
        with locked(slots):
            found = distill(
                self.model, self.tokenizer, text, questions, k, seed=seed, directory=slots.parent, **self.settings
            )
            times = slots / "seconds.json"
            if not times.exists():
                found.cache.to("cpu").save(self._file(name, k, seed))
                took = {part: round(took, 1) for part, took in found.seconds.items()}
                write_atomically(times, json.dumps(took).encode())  # last: a run that is killed before saves both again
        return found, json.loads(times.read_text(encoding="utf-8"))

    def read(self, name: str, k: int, seed: int) -> GistCache:
        """Read a gist, or make it if no process has."""
        if not self._file(name, k, seed).exists():
            return self.distil(name, k, seed)[0].cache
        return GistCache.load(self._file(name, k, seed)).to(input_weight(self.model).device)

    def _slots(self, name: str, k: int, seed: int) -> Path:
        return self.folder / f"{name}-{seed}" / f"k-{k}-{self.settings['start']}"

    def _file(self, name: str, k: int, seed: int) -> Path:
        return self._slots(name, k, seed) / "gist.safetensors"


class _Details:
    """The exact details of a prompt, and the answers with the full prompt and without one, which all gists share."""

    def __init__(self, model: Any, tokenizer: GistTokenizer, prompt: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.spans: list[Span] = find_spans(prompt)
        self.has: dict[str, list[bool]] = {"prompt": [], "none": []}
        if not self.spans:
            return
        records = [Record(prompt, span.question, "") for span in self.spans]
        conditions = {"prompt": "prompt", "no-prompt": "none"}
        found = evaluate(
            model, tokenizer, records, conditions=[*conditions], max_new_tokens=_DETAIL_TOKENS, with_rouge=False
        )
        for one in found:
            self.has[conditions[one.condition]] = self._hold(one.predictions)

    def counted(self, cache: GistCache) -> dict[str, int]:
        """Return the counts of a row, with the answers from ``cache``."""
        answers = ask_for_spans(self.model, self.tokenizer, self.spans, cache, max_new_tokens=_DETAIL_TOKENS)
        gist = self._hold(answers)
        lost = [known and not kept for known, kept in zip(self.has["prompt"], gist, strict=True)]
        counts = {name: sum(one) for name, one in (*self.has.items(), ("gist", gist), ("lost", lost))}
        return {"asked": len(self.spans), **counts}

    def _hold(self, answers: Sequence[str]) -> list[bool]:
        return [span.is_in(answer) for span, answer in zip(self.spans, answers, strict=True)]


def distill_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown: one line for each prompt and k, the mean over its seeds.

    Rows of another model, dtype, number of steps or start have a table of their own, those of the default start first.
    """
    groups = _groups(rows, _KEY[:4])
    return "\n\n".join(map(_table, sorted(groups, key=lambda group: group[0]["start"] != _START)))


def _groups(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Rows that are alike in these columns."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in columns), []).append(row)
    return list(groups.values())


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name in _in_order(rows):
        for k in sorted({row["num_gist_tokens"] for row in rows if row["prompt"] == name}):
            found = [row for row in rows if (row["prompt"], row["num_gist_tokens"]) == (name, k)]
            medians = {
                source: _mean(row["held_out"][source]["kl_median"] for row in found)
                for source in ("none", "swapped", "first", "gist")
            }
            kept = [row["kept"] for row in found]
            counts = {name: _mean(row["details"][name] for row in found) for name in ("prompt", "lost", "none")}
            lines.append(
                [
                    _label(name, found[0]),
                    k,
                    *(f"{median:.3f}" for median in medians.values()),
                    f"{_mean(row['held_out']['gist']['kl_mean'] for row in found):.3f}",
                    f"{min(kept):.0%}" + (f" to {max(kept):.0%}" if len(kept) > 1 else ""),
                    f"{_mean(row['held_out']['gist']['agreement'] for row in found):.2f}",
                    f"{counts['prompt'] - counts['lost']:.3g} of {counts['prompt']:.3g} ({counts['none']:.3g})",
                    f"{_mean(row['seconds'].get('training', 0) for row in found):.0f} s",
                ]
            )
    first = rows[0]
    columns = ("prompt (tokens)", "k", "no prompt", "swapped", "first k", "gist", "gist, mean", "gone", "agreement")
    several = {name: len({row["seed"] for row in rows if row["prompt"] == name}) for name in _in_order(rows)}
    seeds = f"{first['seed']}" + "".join(
        f", {PROMPTS[name]} {count} seeds" for name, count in several.items() if count > 1
    )
    text = [
        *markdown_table((*columns, "details", "training"), lines),
        "",
        "KL divergence from the full prompt in nats a token, median over "
        f"{first['held_out']['gist']['num_answers']} "
        f"held-out answers of {first['model']} ({first['dtype']}), without a prompt, from the gist of another prompt "
        f"(swapped), from the first k tokens of the prompt, and from its gist (`--start {first['start']}`, at most "
        f"{max(row['steps'] for row in rows)} steps). Gone: of the median without a prompt. "
        "Agreement: tokens at which gist and full prompt have the same first choice. Details: names and numbers of the "
        "prompt that were asked for and are in the gist's answers, of those in the full prompt's (in brackets: in "
        f"answers without a prompt); {_asked(rows)} were asked for. Seed {seeds}; {_places(rows)}.",
    ]
    return "\n".join(text)


def _places(rows: Sequence[dict[str, Any]]) -> str:
    """Where the rows were measured, with the k of each place if there are several."""
    sizes: dict[str, set[int]] = {}
    for row in rows:
        sizes.setdefault(where(row), set()).add(row["num_gist_tokens"])
    if len(sizes) == 1:
        return next(iter(sizes))
    return "; ".join(f"k = {', '.join(map(str, sorted(found)))}: {place}" for place, found in sizes.items())


def _asked(rows: Sequence[dict[str, Any]]) -> str:
    """How many details of each prompt were asked for, such as ``9 to 16``."""
    asked = sorted({row["details"]["asked"] for row in rows})
    return f"{asked[0]}" if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"


def starts_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown: the same prompts, k and seeds from different starts."""
    tables = []
    for group in _groups(rows, _KEY[:3]):
        alike: dict[Any, dict[str, dict[str, Any]]] = {}
        for row in group:
            alike.setdefault((row["prompt"], row["num_gist_tokens"], row["seed"]), {})[row["start"]] = row
        compared = {key: found for key, found in alike.items() if len(found) > 1}
        if not compared:
            continue
        starts = [start for start in STARTS if any(start in found for found in compared.values())]
        lines = []
        for name in _in_order(group):
            for (prompt, k, _), found in sorted(compared.items(), key=lambda one: one[0][1:]):
                if prompt == name:
                    parts = (found.get(start) for start in starts)
                    lines.append([_label(name, next(iter(found.values()))), k, *map(_before_and_after, parts)])
        first = group[0]
        text = [
            *markdown_table(("prompt (tokens)", "k", *starts), lines),
            "",
            f"Median KL divergence from the full prompt over held-out answers of {first['model']} ({first['dtype']}), "
            f"in nats a token, before training and after at most {max(row['steps'] for row in group)} steps. Starts: "
            f"{'; '.join(_STARTS[start] for start in starts)}. {where(first)}.",
        ]
        tables.append("\n".join(text))
    return "\n\n".join(tables)


def _before_and_after(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['start_median']:.3f}, {row['held_out']['gist']['kl_median']:.3f}"


def _in_order(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the prompts, in the order of ``PROMPTS``: several processes write rows in any order."""
    return sorted({row["prompt"] for row in rows}, key=[*PROMPTS].index)


def _label(name: str, row: dict[str, Any]) -> str:
    return f"{PROMPTS[name]} ({row['num_prompt_tokens']})"


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def main(
    output: OutputOption = None,
    model: Annotated[
        str | None, typer.Option(help="A chat model: a directory, or a repository on the Hugging Face hub.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What rows call the model; by default its last part.")] = None,
    directory: CheckpointsOption = Path("runs/distill"),
    prompts: Annotated[str | None, typer.Option(help=f"Some of {', '.join(PROMPTS)}, comma-separated.")] = None,
    sizes: Annotated[str, typer.Option("--sizes", "-k", help="Numbers of gist tokens, comma-separated.")] = "4,8,16,32",
    seeds: Annotated[str, typer.Option(help="Seeds of the first prompt, comma-separated; others take the first.")] = (
        "0,1,2"
    ),
    dtype: Annotated[str, typer.Option(help="Floating point type of the weights.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Device to run on.")] = "cpu",
    steps: Annotated[int | None, typer.Option(min=0, help="Optimiser steps; by default those of distill.")] = None,
    start: Annotated[str, typer.Option(help=f"What the slots start from, one of {', '.join(STARTS)}.")] = _START,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter of the model, whose gist --start gist starts from.")
    ] = None,
    part: Annotated[
        str,
        typer.Option(help="The part of the prompts and seeds that this process takes, such as 2/5 beside four others."),
    ] = "1/1",
    smoke: Annotated[bool, typer.Option("--smoke", help="Run a random tiny model; measures nothing.")] = False,
) -> int | None:
    """Five system prompts distilled into k slots, beside their controls.

    Example: python -m benchmarks distill --model ./SmolLM2-135M-Instruct --output docs/results/distill.jsonl
    """
    if (model is None) != smoke:
        raise GistError("give either --model or --smoke")
    wanted = {name: read_prompt(name) for name in names("--prompts", prompts, tuple(PROMPTS))}
    if len(wanted) < 2:
        raise GistError(f"--prompts must name at least two prompts, for the swapped control, got {len(wanted)}")
    if start not in STARTS:
        raise GistError(f"--start must be one of {', '.join(STARTS)}, got {start!r}")
    own = part_of(part)
    settings: dict[str, Any] = {} if steps is None else {"steps": steps}
    if model is None:
        loaded, tokenizer = random_llama(64, 2, vocabulary=128)
        wanted = {name: _as_letters(*prompt) for name, prompt in wanted.items()}
        settings = {"steps": 2, "num_answers": 8, "max_new_tokens": 4, "evaluate_every": 1}
    else:
        loaded, tokenizer = load(model, dtype=read_dtype(dtype))
        if adapter is not None:
            adapters.load(loaded, adapter)
        loaded = loaded.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    several = numbers("--seeds", seeds)
    done = read_rows(output) if output is not None and output.exists() else []
    rows = Rows("distill", output, device)
    measure(
        loaded,
        tokenizer,
        name or ("random" if model is None else Path(model).name),
        directory,
        prompts=wanted,
        sizes=numbers("--sizes", sizes),
        seeds={name: several if place == 0 else several[:1] for place, name in enumerate(wanted)},
        start=start,
        part=own,
        settings=settings,
        done=done,
        add=lambda row: rows.add([row]),
        progress=say,
    )
    rows.rows = [*done, *rows.rows]
    rows.show(distill_table, starts_table)
    return None


def _as_letters(text: str, questions: Sequence[str]) -> tuple[str, list[str]]:
    """Words of the built-in task's tokenizer in place of those of a text."""

    def letters(text: str) -> str:
        return " ".join(LETTERS[ord(character) % len(LETTERS)] for character in text[:60])

    return letters(text), list(dict.fromkeys(map(letters, questions)))
