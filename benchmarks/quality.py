"""Measure what a gist keeps, for every k, on the built-in task: three conditions, seen and unseen instructions, each k.

One checkpoint is trained with k drawn again for each row, and evaluated at each k, with intervals. With ``--alone``, a
model is also trained for each k by itself, from the same weights, on the same records with the same number of steps;
both answer the same records, so the difference is a paired one. Checkpoints and results files stay in
``--checkpoints``. For a report with plots: ``gisting eval --results runs/quality/k1-8/results.json --report DIR
--metric exact_match``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.cells import interval_cell
from benchmarks.command import CheckpointsOption, OutputOption, RecordsOption, Rows, SeedOption, numbers, where
from benchmarks.task import CONDITIONS, MIXED_CONDITIONS, SPLITS
from gisting.data.tasks import LetterTask, task_tokenizer
from gisting.demo import ANSWERS_AT_ONCE, BATCH_SIZE, task_arguments, task_model
from gisting.errors import GistError
from gisting.eval.report import gap_kept
from gisting.eval.results import Evaluation, evaluate_splits
from gisting.eval.statistics import Interval, difference
from gisting.markdown import markdown_table
from gisting.measure.progress import progress_bar
from gisting.measure.rows import environment
from gisting.train.finetune import finetune

__all__ = ["QualityRow", "main", "measure", "quality_table"]


@dataclass(frozen=True)
class QualityRow:
    """One model at one k, on one split under one condition. Intervals are 95 %; scores are in 0..1, times in seconds.

    ``trained_k`` is the range from which training drew k. ``gap_kept`` is set for the gist where the controls were
    evaluated and differ. ``difference`` is set for a model that was trained for one k alone: how much more the
    checkpoint of every k scores.
    """

    seed: int
    num_steps: int
    num_parameters: int
    trained_k: tuple[int, int]
    split: str
    condition: str
    num_gist_tokens: int
    num_records: int
    prompt_tokens: float
    exact_match: Interval
    gap_kept: Interval | None
    difference: Interval | None
    train_s: float
    eval_s: float


def measure(
    directory: str | Path,
    counts: Sequence[int] = (1, 2, 4, 8),
    *,
    steps: int = 3600,
    seed: int = 0,
    num_records: int = 512,
    is_alone_too: bool = False,
) -> list[QualityRow]:
    """Train and evaluate, with a progress bar for each step.

    Args:
        directory: for a folder per model, with checkpoint and results file.
        counts: the numbers of gist tokens to evaluate at; training draws k from 1 to the largest.
        steps: optimiser steps of ``BATCH_SIZE`` rows, for each model.
        seed: seed of the held-out combinations, the weights and the data.
        num_records: records of each split.
        is_alone_too: whether to train a model for each k alone as well.

    Returns:
        A row for each model, split, condition and k.

    Raises:
        GistError: ``counts`` is empty or has a number less than 1.
    """
    if not counts or min(counts) < 1:
        raise GistError(f"counts must be numbers of gist tokens, at least 1, got {list(counts)}")
    task, tokenizer = LetterTask(seed=seed), task_tokenizer()
    training = task.records("seen", steps * BATCH_SIZE, seed)
    splits = {split: task.records(split, num_records, seed + 1) for split in SPLITS}

    def rows_of(low: int, high: int, ks: Sequence[int], base: Evaluation | None) -> tuple[Evaluation, list[QualityRow]]:
        name = f"k{low}-{high}" if base is None else f"alone-k{high}"
        folder = Path(directory) / name
        conditions = CONDITIONS if base is None else ("gist",)
        total = len(ks) * len(conditions) * len(splits) * num_records
        set_seed(seed)
        model = task_model(tokenizer)
        with progress_bar(f"training {name}", steps) as advance:
            metrics = finetune(
                model,
                tokenizer,
                training,
                task_arguments(folder, steps, seed),
                num_gist_tokens=(low, high),
                conditions=MIXED_CONDITIONS,
                callbacks=[_Steps(advance)],
            )
        started = time.perf_counter()
        with progress_bar(f"answering {name}", total) as advance:
            evaluation = evaluate_splits(
                model,
                tokenizer,
                splits,
                ks,
                name=name,
                environment=environment(),
                conditions=conditions,
                max_new_tokens=task.length + 3,
                batch_size=ANSWERS_AT_ONCE,
                with_rouge=False,
                progress=advance,
            )
        evaluation.save(folder / "results.json")
        eval_s = time.perf_counter() - started
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        found = []
        for split in evaluation.splits:
            for result in split.results:
                k, of_gist = result.num_gist_tokens, result.condition == "gist"
                other = None if base is None else base.split(split.name).result("gist", k).scores["exact_match"]
                found.append(
                    QualityRow(
                        seed=seed,
                        num_steps=steps,
                        num_parameters=num_parameters,
                        trained_k=(low, high),
                        split=split.name,
                        condition=result.condition,
                        num_gist_tokens=k,
                        num_records=result.num_records,
                        prompt_tokens=round(sum(split.prompt_tokens) / len(split.prompt_tokens), 2),
                        exact_match=result.interval("exact_match"),
                        gap_kept=gap_kept(split, k, "exact_match") if of_gist else None,
                        difference=None if other is None else difference(other, result.scores["exact_match"]),
                        train_s=round(metrics["train_runtime"], 1),
                        eval_s=round(eval_s, 1),
                    )
                )
        return evaluation, found

    ks = sorted(set(counts))
    together, rows = rows_of(1, ks[-1], ks, None)
    for k in ks if is_alone_too else ():
        rows += rows_of(k, k, [k], together)[1]
    return rows


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown.

    The first table has the three conditions for each k. A second one compares each k with a model that was trained for
    it alone, where there is one.
    """
    lines: list[str] = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [row for row in rows if row["seed"] == seed]
        alone = [row for row in mine if row["difference"] is not None]
        together = {
            (row["split"], row["condition"], row["num_gist_tokens"]): row for row in mine if row["difference"] is None
        }
        first = next(iter(together.values()))
        ks = sorted({k for _, _, k in together})
        header = [f"{split}: {condition}" for split in SPLITS for condition in CONDITIONS]
        body = [
            [
                str(k),
                f"{together['unseen', 'gist', k]['prompt_tokens'] / k:.1f}",
                *(interval_cell(together[split, name, k]["exact_match"]) for split in SPLITS for name in CONDITIONS),
                *(interval_cell(together[split, "gist", k]["gap_kept"]) for split in SPLITS),
            ]
            for k in ks
        ]
        lines += [
            *markdown_table(["k", "compression", *header, *(f"{split}: gap kept" for split in SPLITS)], body),
            "",
            f"Exact match in per cent with its 95 % interval on {first['num_records']:,} records of each split, one "
            f"checkpoint of {first['num_parameters'] / 1e6:.2f} million parameters, trained from scratch with k drawn "
            f"from {first['trained_k'][0]} to {first['trained_k'][1]} in {first['num_steps']:,} steps (seed {seed}): "
            f"{first['train_s']:,.0f} s of training and {first['eval_s']:,.0f} s of evaluation "
            f"({where(first, 'torch', 'transformers')}).",
            "",
        ]
        if alone:
            alone_at = {(row["split"], row["num_gist_tokens"]): row for row in alone}
            columns = [
                f"{split}: {what}" for split in SPLITS for what in ("one checkpoint", "for this k alone", "difference")
            ]
            body = [
                [
                    str(k),
                    *(
                        cell
                        for split in SPLITS
                        for cell in (
                            interval_cell(together[split, "gist", k]["exact_match"]),
                            interval_cell(alone_at[split, k]["exact_match"]),
                            interval_cell(alone_at[split, k]["difference"], sign="+"),
                        )
                    ),
                ]
                for k in ks
                if ("seen", k) in alone_at
            ]
            lines += [*markdown_table(["k", *columns], body), ""]
    return "\n".join(lines).strip()


class _Steps(TrainerCallback):
    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(1)


def main(
    output: OutputOption = None,
    checkpoints: CheckpointsOption = Path("runs/quality"),
    k: Annotated[str, typer.Option(help="Numbers of gist tokens to evaluate at, comma-separated.")] = "1,2,4,8",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 32 rows.")] = 3600,
    records: RecordsOption = 512,
    alone: Annotated[bool, typer.Option("--alone", help="Also train a model for each k alone.")] = False,
    seed: SeedOption = 0,
) -> None:
    """Three conditions at several k, on seen and unseen instructions.

    Example: python -m benchmarks quality --output docs/results/quality.jsonl
    """
    disable_progress_bar()  # transformers' own, for the one small file it writes
    rows = Rows("quality", output)
    counts = numbers("--k", k)
    rows.add(measure(checkpoints, counts, steps=steps, seed=seed, num_records=records, is_alone_too=alone))
    rows.show(quality_table)
