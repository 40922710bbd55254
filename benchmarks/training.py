"""Measure training steps with three layouts of the batches.

The layouts: a padded row for each completion, rows packed with several completions, and completions packed after one
copy of their prompt. All layouts train the built-in task's model on the same completions, alternating in one process. A
step includes collating, forward, backward and the optimiser. No time is reported unless all layouts have the same loss
and gradients.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import set_seed

from benchmarks.cells import spread_cell
from benchmarks.command import OutputOption, Rows, numbers, where
from gisting.data.collate import IGNORED, Example, GistCollator
from gisting.data.packing import Document, GistPackingCollator
from gisting.data.records import Record
from gisting.data.tasks import LetterTask, task_tokenizer
from gisting.demo import task_model
from gisting.errors import GistError
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.measure.rows import new_figure, spread
from gisting.tokens import GistTokenizer

__all__ = ["LAYOUTS", "TrainingRow", "main", "measure", "plot", "training_table"]

NUM_GIST_TOKENS = 2
LAYOUTS = ("padded", "packed", "shared prompt")


@dataclass(frozen=True)
class TrainingRow:
    """One layout of a step of ``num_prompts * per_prompt`` completions.

    ``num_tokens`` does not count padding. Times are in seconds per step, median and quartiles.
    """

    mode: str
    num_prompts: int
    per_prompt: int
    prompt_tokens: int
    num_parameters: int
    num_rows: int
    row_length: int
    num_tokens: int
    step_s: float
    step_s_low: float
    step_s_high: float
    completions_per_s: float
    num_repeats: int


def measure(
    *, num_prompts: int = 8, per_prompt: int = 8, prompt_tokens: int = 64, repeats: int = 30, warmup: int = 3
) -> list[TrainingRow]:
    """Time whole optimiser steps.

    Args:
        num_prompts: prompts of a step.
        per_prompt: completions of each prompt.
        prompt_tokens: ids of a prompt; an instruction of the task is repeated up to this length.
        repeats: measured rounds; in each, all layouts take a step on the same completions.
        warmup: unmeasured rounds before them.

    Returns:
        A row for each of ``LAYOUTS``.

    Raises:
        GistError: a number is too small, or the layouts differ in loss or gradients.
    """
    for name, value, low in (
        ("num_prompts", num_prompts, 1),
        ("per_prompt", per_prompt, 1),
        ("prompt_tokens", prompt_tokens, 3),
        ("repeats", repeats, 1),
    ):
        if value < low:
            raise GistError(f"{name} must be at least {low}, got {value}")
    task, tokenizer = LetterTask(), task_tokenizer()
    steps = [
        _step_records(task, tokenizer, num_prompts, per_prompt, prompt_tokens, number)
        for number in range(repeats + warmup)
    ]
    longest = max(len(_ids(tokenizer, record)) for records in steps for record in records)
    # One row holds a prompt with all its completions.
    whole = prompt_tokens + NUM_GIST_TOKENS + per_prompt * (longest - prompt_tokens - NUM_GIST_TOKENS)
    collators: dict[str, Callable[[list[Record]], dict[str, Tensor]]] = {
        "padded": GistCollator(tokenizer, NUM_GIST_TOKENS, max_length=longest),
        "packed": _OwnPrompts(tokenizer, NUM_GIST_TOKENS, max_length=longest, pack_length=whole),
        "shared prompt": GistPackingCollator(tokenizer, NUM_GIST_TOKENS, max_length=longest, pack_length=whole),
    }
    set_seed(0)
    model = task_model(tokenizer)
    _gate(model, {mode: collate(steps[0]) for mode, collate in collators.items()})
    models = {mode: copy.deepcopy(model).train() for mode in collators}
    optimizers = {mode: torch.optim.AdamW(models[mode].parameters(), lr=1e-3, fused=True) for mode in collators}
    times: dict[str, list[float]] = {mode: [] for mode in collators}
    for number, records in enumerate(steps):
        for mode, collate in collators.items():
            start = time.perf_counter()
            models[mode](**collate(records), use_cache=False).loss.backward()
            optimizers[mode].step()
            optimizers[mode].zero_grad()
            if number >= warmup:
                times[mode].append(time.perf_counter() - start)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for mode, collate in collators.items():
        batch = collate(steps[0])
        low, median, high = spread(times[mode])
        first, end = batch["attention_mask"][:, 0].unbind(1)
        rows.append(
            TrainingRow(
                mode=mode,
                num_prompts=num_prompts,
                per_prompt=per_prompt,
                prompt_tokens=prompt_tokens,
                num_parameters=num_parameters,
                num_rows=len(batch["input_ids"]),
                row_length=batch["input_ids"].shape[1],
                num_tokens=int((end > first).sum()),
                step_s=median,
                step_s_low=low,
                step_s_high=high,
                completions_per_s=num_prompts * per_prompt / median,
                num_repeats=repeats,
            )
        )
    return rows


class _OwnPrompts(GistPackingCollator):
    """Pack as usual, but with a copy of the prompt for each completion."""

    def _documents(self, examples: list[Example], instructions: list[int]) -> list[tuple[int, Document]]:
        alone = (
            super(_OwnPrompts, self)._documents([one], [number])
            for one, number in zip(examples, instructions, strict=True)
        )
        return [document for documents in alone for document in documents]


def training_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown."""
    lines = []
    padded: dict[str, Any] = {}
    for row in rows:
        padded = row if row["mode"] == "padded" else padded
        lines.append(
            [
                row["mode"],
                f"{row['num_prompts']} x {row['per_prompt']}",
                str(row["prompt_tokens"]),
                f"{row['num_tokens']:,}",
                f"{row['num_rows']} x {row['row_length']}",
                spread_cell(row, "step_s", 0, scale=1000),
                f"{row['completions_per_s']:,.0f}",
                f"{row['completions_per_s'] / padded['completions_per_s']:.1f}x",
            ]
        )
    sizes = ("prompts x completions", "tokens of a prompt", "tokens of a step", "rows x length")
    columns = ("layout", *sizes, "ms per step", "completions per second", "against padded")
    first = rows[0]
    text = [
        *markdown_table(columns, lines),
        "",
        f"Whole optimiser steps of the built-in task's model ({first['num_parameters'] / 1e6:.2f} million parameters), "
        f"k = {NUM_GIST_TOKENS}, including collating; medians of {first['num_repeats']} alternating steps, quartiles "
        f"in brackets ({where(first)}).",
    ]
    return "\n".join(text)


def plot(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw completions per second as bars, a group for each shape of a step.

    Args:
        rows: as :func:`gisting.measure.rows.read_rows` returns them.
        path: path of the image; its suffix determines the format.

    Raises:
        GistError: matplotlib is not installed.
    """
    figure = new_figure(8, 4)
    axis: Any = figure.subplots()
    shapes = list(dict.fromkeys((row["prompt_tokens"], row["num_prompts"], row["per_prompt"]) for row in rows))
    layouts = [layout for layout in LAYOUTS if any(row["mode"] == layout for row in rows)]
    width = 0.8 / len(layouts)
    for number, layout in enumerate(layouts):
        shown = [row for row in rows if row["mode"] == layout]
        places = [
            shapes.index((row["prompt_tokens"], row["num_prompts"], row["per_prompt"])) + number * width
            for row in shown
        ]
        axis.bar(places, [row["completions_per_s"] for row in shown], width, label=layout)
    labels = [f"{tokens} tokens\n{prompts} x {each}" for tokens, prompts, each in shapes]
    axis.set_xticks([place + (len(layouts) - 1) * width / 2 for place in range(len(shapes))], labels)
    axis.set_ylabel("completions per second")
    axis.set_xlabel("tokens of a prompt, prompts x completions")
    axis.legend()
    first = rows[0]
    axis.set_title(f"{first['num_parameters'] / 1e6:.2f} million parameters; {first['device']}")
    figure.savefig(path, dpi=110)


def _step_records(
    task: LetterTask, tokenizer: GistTokenizer, num_prompts: int, per_prompt: int, prompt_tokens: int, seed: int
) -> list[Record]:
    """Draw the completions of a step, grouped by prompt; every prompt has ``prompt_tokens`` ids."""
    around = tokenizer.encode_prompts(["a"], 1)[0].gist_start - 1
    found: dict[str, list[Record]] = {}
    for record in task.records("seen", 100 * num_prompts * per_prompt, seed):
        words = itertools.islice(itertools.cycle(record.instruction.split()), prompt_tokens - around)
        group = found.setdefault(" ".join(words), [])
        if len(group) < per_prompt:
            group.append(record)
    full = {prompt: group for prompt, group in found.items() if len(group) == per_prompt}
    if len(full) < num_prompts:
        raise GistError(
            f"num_prompts must be at most {len(full)}, the number of the task's instructions, got {num_prompts}"
        )
    return [
        replace(record, instruction=prompt)
        for prompt, group in itertools.islice(full.items(), num_prompts)
        for record in group
    ]


def _ids(tokenizer: GistTokenizer, record: Record) -> list[int]:
    return tokenizer.encode(record.instruction, record.input, record.output, num_gist_tokens=NUM_GIST_TOKENS).input_ids


def _gate(model: Any, batches: dict[str, dict[str, Tensor]]) -> None:
    """Check that all layouts have the same completions, the same loss and the same gradients."""
    losses, gradients, counts = [], [], []
    for batch in batches.values():
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        counts.append(int((batch["labels"] != IGNORED).sum()))
    model.zero_grad()
    first, *others = gradients
    apart = max(float((one - its).abs().max()) for other in others for one, its in zip(first, other, strict=True))
    if len(set(counts)) > 1 or max(losses) - min(losses) > 1e-5 or apart > 1e-5:
        raise GistError(
            f"the layouts differ: {counts} labels, losses {losses}, gradients by {apart:.1e}; no time is reported"
        )


def main(
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of a prompt, comma-separated.")] = "16,64,256",
    per_prompt: Annotated[str, typer.Option(help="Completions of a prompt, comma-separated.")] = "1,8",
    completions: Annotated[int, typer.Option(min=1, help="Completions of a step.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured steps of each layout.")] = 30,
    output: OutputOption = None,
    image: Annotated[
        Path | None, typer.Option("--plot", help="Image file for a plot, such as rows.png; needs matplotlib.")
    ] = None,
) -> None:
    """Training steps: padded rows, packed rows, and completions packed after shared prompts.

    Example: python -m benchmarks training --prompt-tokens 64 --per-prompt 8
    """
    rows = Rows("training", output, "cpu")
    shapes = itertools.product(numbers("--prompt-tokens", prompt_tokens), numbers("--per-prompt", per_prompt))
    for length, shared in tracked(list(shapes), "measuring"):
        num_prompts = max(1, completions // max(1, shared))
        rows.add(measure(num_prompts=num_prompts, per_prompt=shared, prompt_tokens=length, repeats=repeats))
    rows.show(training_table)
    if image is not None:
        plot(rows.rows, image)
