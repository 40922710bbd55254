"""Distil the held-out system prompts on top of the adapter: each gist before and after, beside its controls.

Place in the flow: the shipped adapter and held-out prompts -> **on_top** -> rows. A gist is distilled as a user does,
from questions that the model writes itself, and measured at answers to the prompt's own six inputs, which are not
learned from. ``swapped`` is the gist of the prompt before it in the list, made in the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks.adapter.evaluation import HeldOut, system_prompts
from benchmarks.adapter.recipe import BASE
from benchmarks.command import OutputOption, Rows, names, part_of, say, where
from gisting.cache import GistCache
from gisting.distillation import Distilled, distill
from gisting.distillation.starts import STARTS
from gisting.errors import GistError
from gisting.eval.divergence import Divergence, measure_divergence
from gisting.generation import compress
from gisting.markdown import markdown_table
from gisting.models import adapters
from gisting.models.load import load

__all__ = ["main", "on_top_table"]

_ADAPTER = Path(__file__).parents[2] / "gisting" / "adapters" / "smollm2-135m-instruct"
_GISTS = ("adapter", "start", "gist")
_PARTS = (("questions", "answers", "teacher"), ("start",), ("training",))


def on_top_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown: one line for each start and k, means over its prompts."""
    lines = []
    for start, k, steps in dict.fromkeys(map(_kind, rows)):
        found = [row for row in rows if _kind(row) == (start, k, steps)]
        mean, median = (
            {
                source: statistics.fmean(row[figure][source] for row in found)
                for source in ("none", "first", *_GISTS, *(f"{one}_swapped" for one in _GISTS))
            }
            for figure in ("kl_mean", "kl_median")
        )
        kept = [1 - mean[one] / mean[f"{one}_swapped"] for one in _GISTS]
        kept_median = [1 - median[one] / median[f"{one}_swapped"] for one in _GISTS]
        seconds = [
            statistics.fmean(sum(row["seconds"].get(part, 0) for part in parts) for row in found) for parts in _PARTS
        ]
        lines.append(
            [
                start,
                k,
                steps,
                len(found),
                *(f"{mean[source]:.3f}" for source in ("none", "first")),
                *(f"{mean[f'{one}_swapped']:.3f}, {mean[one]:.3f}" for one in _GISTS),
                *(f"{share:.0%}, {other:.0%}" for share, other in zip(kept, kept_median, strict=True)),
                " + ".join(f"{part:.0f}" for part in seconds) + " s",
            ]
        )
    columns = ("start", "k", "steps", "prompts", "no prompt", "first k", "adapter: swapped, own", "start: swapped, own")
    columns += ("distilled: swapped, own", "kept of swapped: adapter", "start", "distilled", "answers + start + steps")
    first = rows[0]
    text = (
        "KL from the untouched model with the whole prompt in nats a token, means over the prompts and the sampled "
        "answers to their six inputs: of the adapter's gists, of the slots that distilling starts from, and after the "
        f"steps of `distill`, on {first['answers']} answers to questions that the model wrote "
        "itself. Swapped: the gist of another prompt, made in the same way. Kept of swapped: by these means, and by "
        f"the means over prompts of the medians ({where(first)})."
    )
    return "\n".join([*markdown_table(columns, lines), "", text])


def _kind(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["start"], row["num_gist_tokens"], row["wanted_steps"]


class _Made(NamedTuple):
    """The gists of a prompt: the adapter's, and the distilled one of each start."""

    adapter: GistCache
    distilled: dict[str, Distilled]


def _make(model: Any, tokenizer: Any, one: HeldOut, k: int, starts: Sequence[str], settings: dict[str, Any]) -> _Made:
    """Distil one prompt from each start; answers and what the model says at them are made once."""
    found: dict[str, Distilled] = {}
    with TemporaryDirectory() as folder:
        for start in starts:
            found[start] = distill(
                model, tokenizer, one.prompt, None, k, start=start, held_out=one.inputs, directory=folder, **settings
            )
    return _Made(compress(model, tokenizer, [one.prompt], k), found)


def _rows(model: Any, tokenizer: Any, place: int, steps: int, own: _Made, other: _Made) -> Iterator[dict[str, Any]]:
    """Measure the gists of a prompt and those of another one, a row for each start."""
    teacher = next(iter(own.distilled.values())).teacher
    before = {
        "adapter": measure_divergence(model, tokenizer, teacher, own.adapter),
        "adapter_swapped": measure_divergence(model, tokenizer, teacher, other.adapter),
    }
    for start, found in own.distilled.items():
        swapped = {"start": other.distilled[start].start, "gist": other.distilled[start].cache}
        sources: dict[str, Divergence] = {
            **found.held_out,
            **before,
            "start": found.history[0].held_out,
            **{f"{one}_swapped": measure_divergence(model, tokenizer, teacher, its) for one, its in swapped.items()},
        }
        about = found.to_row()
        kl = {source: one.mean for source, one in sources.items()}
        say(
            f"prompt {place}, start {start}: {kl['none']:.3f} without, "
            + ", ".join(f"{one} {kl[one]:.3f} (another prompt's {kl[f'{one}_swapped']:.3f})" for one in _GISTS)
        )
        yield {
            "prompt": place,
            **{name: about[name] for name in ("num_prompt_tokens", "num_gist_tokens", "start", "steps", "answers")},
            "kl_mean": kl,
            "kl_median": {source: one.median for source, one in sources.items()},
            "agreement": {source: one.mean_agreement for source, one in sources.items()},
            "wanted_steps": steps,
            "seconds": {part: round(took, 1) for part, took in found.seconds.items()},
        }


def main(
    model: Annotated[str, typer.Option(help="The base model: a directory, or a repository on the hub.")] = BASE,
    output: OutputOption = None,
    adapter: Annotated[Path, typer.Option(help="Directory of the adapter.")] = _ADAPTER,
    part: Annotated[
        str, typer.Option(help="A part of the held-out prompts, such as 2/10: every tenth from the second on.")
    ] = "1/1",
    num_gist_tokens: Annotated[int, typer.Option("--num-gist-tokens", "-k", min=1, help="k.")] = 8,
    starts: Annotated[str, typer.Option(help=f"Some of {', '.join(STARTS)}.")] = "matched",
    steps: Annotated[int, typer.Option(min=0, help="Optimiser steps.")] = 60,
    num_answers: Annotated[int, typer.Option(min=1, help="Answers to learn from.")] = 64,
    dtype: Annotated[str, typer.Option(help="Type of the base model.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """The adapter's gists of the held-out system prompts before and after distilling.

    Example: python -m benchmarks adapter-distil --output docs/results/adapter_distil.jsonl
    """
    chosen = names("--starts", starts, STARTS)
    held_out = system_prompts()
    first, step = part_of(part)
    numbers = range(first - 1, len(held_out), step)
    loaded, tokenizer = load(model, "chat", dtype=getattr(torch, dtype))
    loaded.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    adapters.load(loaded, adapter)
    rows = Rows("adapter-distil", output)
    settings: dict[str, Any] = {"steps": steps, "num_answers": num_answers, "seed": seed}
    made: list[_Made] = []
    for number in numbers:
        made.append(_make(loaded, tokenizer, held_out[number], num_gist_tokens, chosen, settings))
        if len(made) > 1:
            rows.add(_rows(loaded, tokenizer, number, steps, made[-1], made[-2]))
    if len(made) < 2:
        raise GistError(f"--part must leave at least two prompts, for the swapped control, got {part}")
    rows.add(_rows(loaded, tokenizer, numbers[0], steps, made[0], made[-1]))
    rows.show(on_top_table)
