"""Distillation beside the plain loss on the built-in task: same weights, records and steps, several seeds.

Every row of a step draws its condition, so the teacher learns to read the prompt in the same run. Distilled steps read
each batch twice and take longer; the table has the times.

    python -m benchmarks.distillation --output docs/results/distillation.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from gisting.data.tasks import LetterTask, task_tokenizer
from gisting.eval.statistics import Interval
from gisting.measure.progress import tracked
from gisting.measure.rows import append_row, environment, interval_cell
from gisting.measure.task import BATCH_SIZE, SPLITS, task_accuracy, task_arguments, task_model
from gisting.train.finetune import finetune
from gisting.train.objective import Objective

__all__ = ["OBJECTIVES", "DistillationRow", "distillation_table", "measure"]

NUM_GIST_TOKENS = 2
#: What is compared.
OBJECTIVES = {"plain": Objective(), "distilled": Objective(distillation=1.0)}


@dataclass(frozen=True)
class DistillationRow:
    """One run. ``exact_match`` is by ``split/condition``, in 0..1 with intervals of 95 %; times are in seconds."""

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
    """Train and evaluate, each objective for each seed in turn.

    Args:
        directory: where a folder for each run is made.
        seeds: of the held-out combinations, the weights and the data.
        steps: optimiser steps of each run.
        num_records: records of each split.
        objectives: by name.
        progress: called with what is about to be done.
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
                conditions={"gist": 3, "positive": 1},
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
    """Rows of the JSONL file as Markdown."""
    shown = ("seen/gist", "unseen/gist", "unseen/positive", "unseen/negative")
    lines = [
        "| seed | loss | seen: gist | unseen: gist | unseen: positive | unseen: negative | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (interval_cell(row["exact_match"][name]) for name in shown)
        lines.append(f"| {row['seed']} | {row['objective']} | {' | '.join(cells)} | {row['train_s']:,.0f} s |")
    for name in dict.fromkeys(row["objective"] for row in rows):
        mine = [row for row in rows if row["objective"] == name]
        means = (sum(row["exact_match"][one]["value"] for row in mine) / len(mine) for one in shown)
        time = sum(row["train_s"] for row in mine) / len(mine)
        lines.append(f"| mean | {name} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} | {time:,.0f} s |")
    first, last = rows[0], rows[-1]
    lines += [
        "",
        f"Exact match in per cent with its 95 % interval on {first['num_records']:,} records, k = "
        f"{first['num_gist_tokens']}, {first['num_steps']:,} steps from nothing; distilled with weight "
        f"{last['weight']:g} over the teacher's {last['top_k']} likeliest tokens ({first['device']}, torch "
        f"{first['torch']}, transformers {first['transformers']}).",
    ]
    return "\n".join(lines)


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation", description="Distillation beside the plain loss, several seeds."
    )
    parser.add_argument("--output", type=Path, help="JSONL file to which the rows are added")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/distillation"), help="where models are saved")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each run")
    parser.add_argument("--records", type=int, default=512, help="records of each split")
    options = parser.parse_args(arguments)
    console = Console(markup=False, highlight=False)
    rows = measure(
        options.checkpoints,
        seeds=options.seeds,
        steps=options.steps,
        num_records=options.records,
        progress=console.print,
    )
    for row in rows:
        if options.output is not None:
            append_row(options.output, {"command": "python -m benchmarks.distillation", **asdict(row)})
    table = distillation_table([{**asdict(row), **environment()} for row in rows])
    console.print(table, soft_wrap=True)


if __name__ == "__main__":
    _main()
