"""What a gist keeps, for every k, on the built-in task: three conditions x seen and unseen instructions x k.

One checkpoint is trained with k drawn anew for each row, and evaluated at each k, with intervals. With ``--alone``, a
model is also trained for each k by itself, from the same weights, on the same records in as many steps; both answer the
same records, so that the difference is a paired one. Checkpoints and results files stay in ``--checkpoints``; a report
with plots: ``gisting eval --results runs/quality/k1-8/results.json --report DIR --metric exact_match``.

    python -m benchmarks.quality --output docs/results/quality.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from gisting.data.tasks import LetterTask, task_tokenizer
from gisting.errors import GistError
from gisting.eval.report import gap_kept
from gisting.eval.results import Evaluation, evaluate_splits
from gisting.eval.statistics import Interval, difference
from gisting.measure.rows import append_row, environment, interval_cell, markdown_table
from gisting.measure.task import ANSWERS_AT_ONCE, BATCH_SIZE, CONDITIONS, SPLITS, task_arguments, task_model
from gisting.train.finetune import finetune

__all__ = ["QualityRow", "measure", "quality_table"]


@dataclass(frozen=True)
class QualityRow:
    """One model at one k, on one split under one condition. Intervals are 95 %; scores are in 0..1, times in seconds.

    ``trained_k`` is the range from which training drew k. ``gap_kept`` is there for the gist where the controls were
    evaluated and are apart; ``difference`` is what the checkpoint of every k scores more than this one, which was
    trained for its k alone.
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
    progress: Callable[[str, int, int], Any] | None = None,
) -> list[QualityRow]:
    """Train and evaluate.

    Args:
        directory: where a folder for each model is made, with checkpoint and results file.
        counts: the k to evaluate at; training draws from 1 to the largest.
        steps: optimiser steps of ``BATCH_SIZE`` rows, for each model.
        seed: of the held-out combinations, the weights and the data.
        num_records: records of each split.
        is_alone_too: also a model for each k, trained for it alone.
        progress: called with what is being done, how much of it is done, and the whole.

    Returns:
        A row for each model, split, condition and k.

    Raises:
        GistError: there is no k or one less than 1.
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
        bars = [_Bar(progress, f"training {name}", steps), _Bar(progress, f"answering {name}", total)]
        set_seed(seed)
        model = task_model(tokenizer)
        metrics = finetune(
            model,
            tokenizer,
            training,
            task_arguments(folder, steps, seed),
            num_gist_tokens=(low, high),
            # Each row draws its condition: the same weights then serve as the positive control.
            conditions={"gist": 3, "positive": 1},
            callbacks=[_Steps(bars[0])],
        )
        started = time.perf_counter()
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
            progress=bars[1].advance,
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
    """Rows of the JSONL file as Markdown: the three conditions for each k, then each k beside a model trained for it
    alone, where there are such.
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
            f"checkpoint of {first['num_parameters'] / 1e6:.2f} million parameters, trained from nothing with k drawn "
            f"from {first['trained_k'][0]} to {first['trained_k'][1]} in {first['num_steps']:,} steps (seed {seed}): "
            f"{first['train_s']:,.0f} s of training and {first['eval_s']:,.0f} s of evaluation ({first['device']}, "
            f"torch {first['torch']}, transformers {first['transformers']}).",
            "",
        ]
        if alone:
            beside = {(row["split"], row["num_gist_tokens"]): row for row in alone}
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
                            interval_cell(beside[split, k]["exact_match"]),
                            interval_cell(beside[split, k]["difference"], sign="+"),
                        )
                    ),
                ]
                for k in ks
                if ("seen", k) in beside
            ]
            lines += [*markdown_table(["k", *columns], body), ""]
    return "\n".join(lines).strip()


class _Bar:
    """How far one thing is."""

    def __init__(self, progress: Callable[[str, int, int], Any] | None, what: str, total: int) -> None:
        self.progress, self.what, self.total, self.done = progress, what, total, 0

    def advance(self, done: int) -> None:
        self.done += done
        if self.progress is not None:
            self.progress(self.what, self.done, self.total)


class _Steps(TrainerCallback):
    def __init__(self, bar: _Bar) -> None:
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.advance(1)


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Three conditions x splits x k on the built-in task."
    )
    parser.add_argument("--output", type=Path, help="JSONL file to which the rows are added")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/quality"), help="where models are saved")
    parser.add_argument("--k", default="1,2,4,8", help="numbers of gist tokens to evaluate at")
    parser.add_argument("--steps", type=int, default=3600, help="training steps of 32 rows")
    parser.add_argument("--records", type=int, default=512, help="records of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="also train a model for each k alone")
    options = parser.parse_args(arguments)
    console = Console()
    disable_progress_bar()  # transformers' own, for the one small file it writes
    with Progress(console=console) as shown:
        bars: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=total)
            shown.update(bars[what], completed=done)

        rows = measure(
            options.checkpoints,
            [int(k) for k in options.k.split(",")],
            steps=options.steps,
            seed=options.seed,
            num_records=options.records,
            is_alone_too=options.alone,
            progress=progress,
        )
    about = environment()
    for row in rows:
        if options.output is not None:
            append_row(options.output, {"command": "python -m benchmarks.quality", **asdict(row)})
    table = quality_table([{**asdict(row), **about} for row in rows])
    console.print(table, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    _main()
