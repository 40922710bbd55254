"""Distil five system prompts of a real chat model, and compare each gist with the full prompt on held-out questions.

The prompts and questions are in ``benchmarks/prompts/``. Beside each gist are its controls, at the same held-out
answers: no prompt, the first k tokens of the prompt as they are, and the gist of another prompt (the next in the list,
at the same k). Gists and answers are kept, so a run that was stopped goes on where it was; rows that are in the output
are not measured again.
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

from benchmarks.command import CheckpointsOption, OutputOption, Rows, names, numbers, say, where
from gisting.cli.shared import read_dtype
from gisting.data.tasks import LETTERS
from gisting.distillation import Distilled, distill
from gisting.errors import GistError
from gisting.eval.divergence import measure_divergence
from gisting.markdown import markdown_table
from gisting.measure.models import random_llama
from gisting.measure.rows import read_rows
from gisting.models.load import load
from gisting.models.weights import input_weight
from gisting.storage import write_atomically
from gisting.tokens import GistTokenizer

__all__ = ["PROMPTS", "DistillRow", "distill_table", "main", "measure", "read_prompt"]

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
_KEY = ("model", "dtype", "wanted_steps", "prompt", "num_gist_tokens", "seed")


@dataclass(frozen=True)
class DistillRow:
    """One gist. Divergences are ``Divergence.summary()`` by source, in nats a token; ``seconds`` by phase.

    ``steps`` were done, of ``wanted_steps`` or, if that is None, of as many as ``distill`` does. ``seconds`` has no
    sampling where the answers were there already: all k of a prompt and seed share them.
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
    held_out: dict[str, Any]
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
        directory: for gists, answers and states.
        prompts: text and questions by name, at least two.
        sizes: every k.
        seeds: by name of the prompt.
        settings: more arguments of :func:`gisting.distill`.
        done: rows that are there already.
        add: called with each row as soon as it is measured.
        progress: called with a line for each gist.
    """
    dtype = str(input_weight(model).dtype).removeprefix("torch.")
    there = {tuple(row.get(column) for column in _KEY) for row in done}
    folder, order = Path(directory), list(prompts)
    for k in sizes:
        for place, name in enumerate(order):
            for seed in seeds[name]:
                if (model_name, dtype, settings.get("steps"), name, k, seed) in there:
                    continue
                begin = time.perf_counter()
                found, seconds = _distilled(model, tokenizer, folder, name, prompts[name], k, seed, settings)
                other = order[(place + 1) % len(order)]
                swapped, _ = _distilled(model, tokenizer, folder, other, prompts[other], k, seeds[other][0], settings)
                sources = {
                    **found.held_out,
                    "swapped": measure_divergence(model, tokenizer, found.teacher, swapped.cache),
                }
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
                    held_out={source: one.summary() for source, one in sources.items()},
                    seconds=seconds,
                )
                add(row)
                progress(
                    f"{name}, k = {k}, seed {seed}: {row.kept:.0%} of the median divergence is gone "
                    f"({time.perf_counter() - begin:.0f} s)"
                )


def _distilled(
    model: Any,
    tokenizer: GistTokenizer,
    folder: Path,
    name: str,
    prompt: tuple[str, list[str]],
    k: int,
    seed: int,
    settings: dict[str, Any],
) -> tuple[Distilled, dict[str, float]]:
    """Distil a prompt, or read what an earlier run made of it; and the seconds that it took then."""
    directory = folder / f"{name}-{seed}"
    text, questions = prompt
    found = distill(model, tokenizer, text, questions, k, seed=seed, directory=directory, **settings)
    times = directory / f"k-{k}" / "seconds.json"
    if not times.exists():
        write_atomically(times, json.dumps({part: round(took, 1) for part, took in found.seconds.items()}).encode())
    return found, json.loads(times.read_text(encoding="utf-8"))


def distill_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown: one line for each prompt and k, the mean over its seeds.

    Rows of another model, dtype or number of steps have a table of their own.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in _KEY[:3]), []).append(row)
    return "\n\n".join(map(_table, groups.values()))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name in dict.fromkeys(row["prompt"] for row in rows):
        for k in sorted({row["num_gist_tokens"] for row in rows if row["prompt"] == name}):
            found = [row for row in rows if (row["prompt"], row["num_gist_tokens"]) == (name, k)]
            medians = {
                source: _mean(row["held_out"][source]["kl_median"] for row in found)
                for source in ("none", "swapped", "first", "gist")
            }
            kept = [row["kept"] for row in found]
            lines.append(
                [
                    f"{PROMPTS.get(name, name)} ({found[0]['num_prompt_tokens']})",
                    k,
                    *(f"{median:.3f}" for median in medians.values()),
                    f"{_mean(row['held_out']['gist']['kl_mean'] for row in found):.3f}",
                    f"{min(kept):.0%}" + (f" to {max(kept):.0%}" if len(kept) > 1 else ""),
                    f"{_mean(row['held_out']['gist']['agreement'] for row in found):.2f}",
                    f"{_mean(row['seconds'].get('training', 0) for row in found):.0f} s",
                ]
            )
    first = rows[0]
    columns = ("prompt (tokens)", "k", "no prompt", "swapped", "first k", "gist", "gist, mean", "gone", "agreement")
    seeds = sorted({row["seed"] for row in rows})
    text = [
        *markdown_table((*columns, "training"), lines),
        "",
        "KL divergence from the full prompt in nats a token, median over "
        f"{first['held_out']['gist']['num_answers']} "
        f"held-out answers of {first['model']} ({first['dtype']}), without a prompt, from the gist of another prompt "
        "(swapped), from the first k tokens of the prompt, and from its gist. Gone: of the median without a prompt. "
        "Agreement: tokens at which gist and full prompt have the same first choice. Seeds "
        f"{', '.join(map(str, seeds))}; {where(first)}.",
    ]
    return "\n".join(text)


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
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; by default those of distill.")] = None,
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
    settings: dict[str, Any] = {} if steps is None else {"steps": steps}
    if model is None:
        loaded, tokenizer = random_llama(64, 2, vocabulary=128)
        wanted = {name: _as_letters(*prompt) for name, prompt in wanted.items()}
        settings = {"steps": 2, "num_answers": 8, "max_new_tokens": 4, "evaluate_every": 1}
    else:
        loaded, tokenizer = load(model, dtype=read_dtype(dtype))
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
        settings=settings,
        done=done,
        add=lambda row: rows.add([row]),
        progress=say,
    )
    rows.rows = [*done, *rows.rows]
    rows.show(distill_table)
    return None


def _as_letters(text: str, questions: Sequence[str]) -> tuple[str, list[str]]:
    """Words of the built-in task's tokenizer in place of those of a text."""

    def letters(text: str) -> str:
        return " ".join(LETTERS[ord(character) % len(LETTERS)] for character in text[:60])

    return letters(text), list(dict.fromkeys(map(letters, questions)))
