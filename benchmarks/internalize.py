"""Internalisation on the built-in task: a template's table goes into the weights, beside every control.

A small LLaMA first learns to look names up in random tables (and nothing of the task's own). From there the task's own
table, which stands in the template of every request, is internalised in stages; each control is trained from the same
base, on the same records, in as many steps. Some names of the table no training query asks for: who answers them has
what only the template says. A model that still reads something is also given an edited table, in which every code is
another: in its prompt, or as a new gist; what is in the weights takes a new training. Then requests are served in turn:
the full prompt, the full prompt behind a prefix cache of its template, the bare query.

    python -m benchmarks.internalize --output docs/results/internalize.jsonl
"""

from __future__ import annotations

import argparse
import copy
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from gisting.data.plain import PlainCollator
from gisting.data.records import Record
from gisting.data.tasks import CodeTask, code_tokenizer
from gisting.errors import GistError
from gisting.eval.conditions import evaluate
from gisting.eval.metrics import exact_matches
from gisting.eval.statistics import Interval, bootstrap
from gisting.internalize.directory import EVAL_NAME, read_answers, read_prompt, read_records
from gisting.internalize.requests import PromptFormat
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import SelfInformation
from gisting.internalize.stages import internalize
from gisting.measure.progress import tracked
from gisting.measure.requests import ServingRow, serving, serving_table
from gisting.measure.rows import append_row, environment, interval_cell
from gisting.measure.task import ANSWERS_AT_ONCE, BATCH_SIZE, task_arguments, task_model
from gisting.models.load import load
from gisting.tokens import GistTokenizer
from gisting.train.finetune import published_arguments
from gisting.train.objective import ObjectiveTrainer

__all__ = ["RUNS", "InternalizeRow", "internalize_table", "measure", "requests"]

NUM_GIST_TOKENS = 8
MAX_EXAMPLES = 4
MAX_LENGTH = 192
NUM_UNASKED = 2
# Each name with its code, a last word, and the end.
ANSWER = 2 * CodeTask.length + 2
#: Every way to train, with what it asks of ``internalize``.
RUNS: dict[str, dict[str, Any]] = {
    "in stages": {},
    "in stages, gist at the end": {"tail": "gist", "num_gist_tokens": NUM_GIST_TOKENS},
    "bare query": {"control": "bare"},
    "full prompt": {"control": "full"},
    "full prompt, run bare": {"control": "full-run-bare"},
    "compressed prompt": {"control": "shortened", "control_share": 0.5},
}
#: Those whose model reads the whole template, as text or as a gist.
READERS = ("in stages, gist at the end", "full prompt")


@dataclass(frozen=True)
class InternalizeRow:
    """One way to train. ``tokens`` are those of a request to the finished model, means; scores are exact matches on
    held-out queries in 0..1 with intervals of 95 %; ``seconds`` are of training and of what is asked after each stage,
    ``base_seconds`` of the base model before.
    ``stages`` has, for each, the share of the template that was kept, its tokens and the bare query's score.
    ``unasked`` is the score on queries with a name that no training query has, ``edited`` that with a table of other
    codes in place of the trained one, None where none is read; both without examples.
    """

    run: str
    seed: int
    num_steps: int
    base_steps: int
    num_parameters: int
    num_records: int
    condition: str
    tokens: float
    query_tokens: float
    exact_match: Interval
    unasked: Interval
    edited: Interval | None
    stages: list[dict[str, Any]]
    base_seconds: float
    seconds: float


def measure(
    directory: str | Path,
    *,
    seed: int = 0,
    base_steps: int = 600,
    steps: int = 200,
    num_records: int = 256,
    runs: Sequence[str] = tuple(RUNS),
    progress: Callable[[str], Any] | None = None,
) -> list[InternalizeRow]:
    """Train the base model, then a copy of it each way, and evaluate them.

    Args:
        directory: where a folder for each is made; what is there of them is replaced.
        seed: of the task's table, the weights and the data.
        base_steps: optimiser steps of the base model, of 32 queries to a random table each.
        steps: the same for each way, of 32 requests, over all its stages.
        num_records: held-out queries.
        runs: names of ``RUNS``.
        progress: called with what is about to be done.

    Raises:
        GistError: there is no such way.
    """
    unknown = [name for name in runs if name not in RUNS]
    if unknown or not runs:
        raise GistError(f"runs must be names of {', '.join(RUNS)}, got {unknown[0] if unknown else 'none'!r}")
    say = progress or (lambda what: None)
    task, tokenizer, folder = CodeTask(seed=seed, num_unasked=NUM_UNASKED), code_tokenizer(), Path(directory)
    training, held_out = task.records("train", 512, seed), task.records("eval", num_records, seed)
    unasked, other = task.records("unasked", num_records, seed), task.table.edited()
    edited = [
        replace(one, instruction=other.text(), output=" ".join(other.answer(one.input.split()))) for one in held_out
    ]
    say(f"base: {base_steps} steps")
    start = time.perf_counter()
    base = _base(task, tokenizer, folder / "base", base_steps, seed)
    base_seconds = round(time.perf_counter() - start, 1)
    rows = []
    for name in tracked(runs, "training"):
        say(f"{name}: {steps} steps")
        shutil.rmtree(folder / name, ignore_errors=True)
        model = copy.deepcopy(base)
        result = internalize(
            model,
            tokenizer,
            task.table.text(),
            training,
            published_arguments(
                folder / name,
                batch_size=BATCH_SIZE,
                per_device_batch_size=BATCH_SIZE,
                per_device_eval_batch_size=ANSWERS_AT_ONCE,
                max_steps=steps,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                warmup_steps=min(10, steps // 8),
                weight_decay=0.05,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=seed,
            ),
            schedule=Schedule.linear(4),
            shortener=SelfInformation(base, tokenizer),
            max_examples=MAX_EXAMPLES,
            eval_records=held_out,
            max_new_tokens=ANSWER,
            max_length=MAX_LENGTH,
            callbacks=[TrainerCallback()],  # so that Trainer does not print
            **RUNS[name],
        )
        last = folder / name / f"stage-{len(result.stages)}"
        answers = read_answers(last, result.condition)
        read = read_prompt(last)
        untaught = [replace(one, instruction=read) for one in unasked]
        rows.append(
            InternalizeRow(
                run=name,
                seed=seed,
                num_steps=steps,
                base_steps=base_steps,
                num_parameters=result.num_parameters,
                num_records=num_records,
                condition=result.condition,
                tokens=result.tokens,
                query_tokens=result.stages[-1].query_tokens,
                exact_match=bootstrap([exact_matches(*answers)]),
                unasked=_score(model, tokenizer, untaught, result.condition),
                edited=_score(model, tokenizer, edited, result.condition) if name in READERS else None,
                stages=[
                    {
                        "realised_share": stage.realised_share,
                        "tokens": stage.tokens,
                        "bare": stage.metrics["no-prompt"]["exact_match"],
                    }
                    for stage in result.stages
                ],
                base_seconds=base_seconds,
                seconds=round(result.seconds, 1),
            )
        )
    return rows


def requests(directory: str | Path, run: str = "in stages", *, repeats: int = 30) -> list[ServingRow]:
    """Time requests, one and eight at once, to a model that ``measure`` saved, and to one of 26 million random
    parameters, for what is saved is arithmetic, and the small model does hardly any.

    Args:
        directory: the one that ``measure`` was given.
        run: which of its models; one that was asked full prompts in its first stage.
        repeats: measured rounds.

    Raises:
        GistError: there is no such model, or ``repeats`` is out of range.
    """
    folder = Path(directory) / run
    asked = read_records(folder / "stage-1" / EVAL_NAME)
    if asked is None:
        raise GistError(f"directory must hold what measure saved, got {directory}, which has no {run}/stage-1")
    small, tokenizer = load(folder)
    template = read_prompt(folder / "stage-1")
    (length,) = {len(ids) for ids in tokenizer.encode_completions([""] * len(asked), [one.output for one in asked])}
    set_seed(0)
    large = task_model(
        tokenizer, 512, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    )
    return [
        row
        for model in (small, large)
        for size in (1, 8)
        for row in serving(
            model, tokenizer, asked, template, batch_size=size, num_answer_tokens=length, repeats=repeats
        )
    ]


def internalize_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of trainings as Markdown: each way for each seed, then the bare query's score stage by stage."""
    rows = [row for row in rows if "run" in row]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"| trained | run on | tokens of a request | {' | '.join(f'seed {seed}' for seed in seeds)} "
        "| unasked names | edited template | seconds |",
        "|---" * (6 + len(seeds)) + "|",
    ]
    run_on = {"no-prompt": "the bare query", "prompt": "its prompt", "gist": "k gist tokens"}
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = {row["seed"]: row for row in rows if row["run"] == name}
        first = next(iter(mine.values()))
        tokens = sum(row["tokens"] for row in mine.values()) / len(mine)
        times = _span([row["seconds"] for row in mine.values()])
        cells = " | ".join(interval_cell(mine[seed]["exact_match"]) if seed in mine else "-" for seed in seeds)
        others = (
            ", ".join(f"{100 * row[what]['value']:.1f}" for row in mine.values() if row[what] is not None) or "-"
            for what in ("unasked", "edited")
        )
        lines.append(
            f"| {name} | {run_on[first['condition']]} | {tokens:.1f} | {cells} | {' | '.join(others)} | {times} |"
        )
    staged = [row for row in rows if row["run"] == next(iter(RUNS))]
    if staged:
        numbers = range(1, len(staged[0]["stages"]) + 1)
        lines += [
            "",
            f"| in stages | {' | '.join(f'stage {number}' for number in numbers)} |",
            "|---" * (1 + len(numbers)) + "|",
        ]
        kept = (f"{100 * stage['realised_share']:.0f} %" for stage in staged[0]["stages"])
        lines.append(f"| template kept (seed {staged[0]['seed']}) | {' | '.join(kept)} |")
        tokens = (f"{stage['tokens']:.1f}" for stage in staged[0]["stages"])
        lines.append(f"| tokens of a request | {' | '.join(tokens)} |")
        for row in staged:
            bare = (f"{100 * stage['bare']:.1f}" for stage in row["stages"])
            lines.append(f"| bare query answered, seed {row['seed']} | {' | '.join(bare)} |")
    first = rows[0]
    base_times = _span([row["base_seconds"] for row in rows])
    lines += [
        "",
        f"Exact match in per cent with its 95 % interval on {first['num_records']} held-out queries, "
        f"{first['num_parameters'] / 1e6:.2f} million parameters, {first['num_steps']:,} steps of 32 requests for each "
        f"way, from a base of {first['base_steps']:,} steps on random tables ({base_times} s). For each seed, "
        "without examples: queries with a name that no training query has, and the held-out ones with another code for "
        f"every name of the template ({first['device']}, {first['threads']} threads, torch {first['torch']}, "
        f"transformers {first['transformers']}).",
    ]
    return "\n".join(lines)


def _span(values: Sequence[float]) -> str:
    """The least and the largest, or the one that there is."""
    return "–".join(dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values))))


def _base(task: CodeTask, tokenizer: GistTokenizer, folder: Path, steps: int, seed: int) -> PreTrainedModel:
    """A model that looks up in whichever table is in its prompt, with examples of it behind it or without."""
    set_seed(seed)
    model = task_model(tokenizer, max_position_embeddings=512)
    prompt_format, chance, size = PromptFormat(), random.Random(f"base {seed}"), MAX_EXAMPLES + 1
    lookups = task.lookups(steps * BATCH_SIZE, size, seed)
    training: Any = []
    for start in range(0, len(lookups), size):
        query, *examples = lookups[start : start + size]
        prompt = prompt_format.prompt(query.instruction, examples[: chance.randint(0, MAX_EXAMPLES)])
        training.append(replace(query, instruction=prompt))
    trainer = ObjectiveTrainer(
        model=model,
        args=task_arguments(folder, steps, seed),
        train_dataset=training,
        data_collator=PlainCollator(tokenizer, MAX_LENGTH),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def _score(model: PreTrainedModel, tokenizer: GistTokenizer, records: Sequence[Record], condition: str) -> Interval:
    """How well a finished model answers other records."""
    settings: dict[str, Any] = {"max_new_tokens": ANSWER, "batch_size": ANSWERS_AT_ONCE, "with_rouge": False}
    (result,) = evaluate(model, tokenizer, records, NUM_GIST_TOKENS, conditions=[condition], **settings)
    return result.interval("exact_match")


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.internalize",
        description="Internalisation beside its controls, and requests served.",
    )
    parser.add_argument("--output", type=Path, help="JSONL file to which the rows are added")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/internalize"), help="where models are saved")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base-steps", type=int, default=600, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each way")
    parser.add_argument("--records", type=int, default=256, help="held-out queries")
    parser.add_argument("--repeats", type=int, default=30, help="measured rounds of requests")
    parser.add_argument("--part", choices=("both", "training", "requests"), default="both", help="what is measured")
    options = parser.parse_args(arguments)
    console = Console(markup=False, highlight=False)
    found: list[dict[str, Any]] = []

    def keep(rows: Sequence[Any]) -> None:
        for row in rows:
            found.append({"command": "python -m benchmarks.internalize", **asdict(row)})
            if options.output is not None:
                append_row(options.output, found[-1])

    for seed in options.seeds if options.part != "requests" else ():
        keep(
            measure(
                options.checkpoints / str(seed),
                seed=seed,
                base_steps=options.base_steps,
                steps=options.steps,
                num_records=options.records,
                progress=lambda what, seed=seed: console.print(f"seed {seed}, {what}"),
            )
        )
    if options.part != "training":
        console.print("requests")
        keep(requests(options.checkpoints / str(options.seeds[0]), repeats=options.repeats))
    shown = [{**row, **environment()} for row in found]
    if options.part != "requests":
        console.print(internalize_table(shown), soft_wrap=True)
        console.print()
    if options.part != "training":
        console.print(serving_table(shown), soft_wrap=True)


if __name__ == "__main__":
    _main()
