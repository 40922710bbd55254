"""Compare distillation with the plain loss on the built-in task: same weights, records and steps, several seeds.

Every row of a step draws its condition, so the teacher learns to read the prompt in the same run. Distilled steps read
each batch twice and take longer; the table shows the times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import set_seed

from benchmarks.cells import interval_cell
from benchmarks.command import CheckpointsOption, OutputOption, RecordsOption, Rows, numbers, say, where
from benchmarks.task import MIXED_CONDITIONS, SPLITS, task_accuracy
from gisting.data.tasks import LetterTask, task_tokenizer
from gisting.demo import BATCH_SIZE, task_arguments, task_model
from gisting.eval.statistics import Interval
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.train.finetune import finetune
from gisting.train.objective import Objective

__all__ = ["OBJECTIVES", "DistillationRow", "distillation_table", "main", "measure"]

NUM_GIST_TOKENS = 2
#: The objectives that are compared.
OBJECTIVES = {"plain": Objective(), "distilled": Objective(distillation=1.0)}


@dataclass(frozen=True)
class DistillationRow:
    """One run. ``exact_match`` is by ``split/condition``, in 0..1 with 95 % intervals; times are in seconds."""

    objective: str
    weight: float
    top_k: int
    seed: int
    num_steps: int
    num_gist_tokens: int
    num_records: int
    exact_match: dict[str, Interval]
    train_s: float


def measure(
    directory: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 1200,
    num_records: int = 512,
    objectives: Mapping[str, Objective] = OBJECTIVES,
    progress: Callable[[str], Any] | None = None,
) -> list[DistillationRow]:
    """Train and evaluate each objective with each seed.

    Args:
        directory: for a folder per run.
        seeds: seeds of the held-out combinations, the weights and the data.
        steps: optimiser steps of each run.
        num_records: records of each split.
        objectives: by name.
        progress: called with a description of each run before it starts.
    """
    tokenizer, rows = task_tokenizer(), []
    for seed in seeds:
        task = LetterTask(seed=seed)
        records = task.records("seen", steps * BATCH_SIZE, seed)
        splits = {split: task.records(split, num_records, seed + 1) for split in SPLITS}
        for name, objective in tracked(objectives.items(), f"training, seed {seed}"):
            if progress is not None:
                progress(f"seed {seed}, {name}: {steps} steps")
            set_seed(seed)
            model = task_model(tokenizer)
            metrics = finetune(
                model,
                tokenizer,
                records,
                task_arguments(Path(directory) / f"{name}-{seed}", steps, seed),
                num_gist_tokens=NUM_GIST_TOKENS,
                conditions=MIXED_CONDITIONS,
                objective=objective,
            )
            rows.append(
                DistillationRow(
                    objective=name,
                    weight=objective.distillation,
                    top_k=objective.top_k,
                    seed=seed,
                    num_steps=steps,
                    num_gist_tokens=NUM_GIST_TOKENS,
                    num_records=num_records,
                    exact_match=task_accuracy(model, tokenizer, splits, NUM_GIST_TOKENS, task.length + 3),
                    train_s=round(metrics["train_runtime"], 1),
                )
            )
    return rows


def distillation_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown."""
    shown = ("seen/gist", "unseen/gist", "unseen/positive", "unseen/negative")
    lines = [
        [
            str(row["seed"]),
            row["objective"],
            *(interval_cell(row["exact_match"][name]) for name in shown),
            f"{row['train_s']:,.0f} s",
        ]
        for row in rows
    ]
    for name in dict.fromkeys(row["objective"] for row in rows):
        mine = [row for row in rows if row["objective"] == name]
        means = (sum(row["exact_match"][one]["value"] for row in mine) / len(mine) for one in shown)
        time = sum(row["train_s"] for row in mine) / len(mine)
        lines.append(["mean", name, *(f"{100 * mean:.1f}" for mean in means), f"{time:,.0f} s"])
    columns = ("seed", "loss", *(name.replace("/", ": ") for name in shown), "training")
    first, last = rows[0], rows[-1]
    text = [
        *markdown_table(columns, lines),
        "",
        f"Exact match in per cent with its 95 % interval on {first['num_records']:,} records, k = "
        f"{first['num_gist_tokens']}, {first['num_steps']:,} steps from scratch; distilled with weight "
        f"{last['weight']:g} over the teacher's {last['top_k']} likeliest tokens "
        f"({where(first, 'torch', 'transformers')}).",
    ]
    return "\n".join(text)


def main(
    output: OutputOption = None,
    checkpoints: CheckpointsOption = Path("runs/distillation"),
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 1200,
    records: RecordsOption = 512,
) -> None:
    """Distillation against the plain loss, for several seeds.

    Example: python -m benchmarks distillation --output docs/results/distillation.jsonl
    """
    rows = Rows("distillation", output)
    rows.add(measure(checkpoints, seeds=numbers("--seeds", seeds), steps=steps, num_records=records, progress=say))
    rows.show(distillation_table)
