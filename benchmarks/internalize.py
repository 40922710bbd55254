"""Internalise the table of the built-in task, next to every control, and serve requests to the results.

A small LLaMA first learns to look names up in random tables, but sees nothing of the task's own table. From there that
table, which is in the prompt of every request, is internalised in stages. Each control is trained from the same base,
on the same records, with the same number of steps. No training query asks for some names of the table, so a model that
answers them knows what only the prompt says. A model that still reads something is also given an edited table, in which
every code is different: in its prompt, or as a new gist; what is in the weights would need a new training. Then
requests are served alternately: the full prompt, the full prompt with a prefix cache, the bare query.
"""

from __future__ import annotations

import copy
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from benchmarks.cells import interval_cell, spread_cell
from benchmarks.codes import RUNS as CODES
from benchmarks.codes import codes_table, measure_codes
from benchmarks.command import CheckpointsOption, OutputOption, Rows, names, numbers, say, where
from gisting.data.plain import PlainCollator
from gisting.data.records import Record
from gisting.data.tasks import CodeTask, code_tokenizer
from gisting.demo import ANSWERS_AT_ONCE, BATCH_SIZE, task_arguments, task_model
from gisting.errors import GistError
from gisting.eval.conditions import evaluate
from gisting.eval.metrics import exact_matches
from gisting.eval.statistics import Interval, bootstrap
from gisting.internalize.directory import EVAL_NAME, read_answers, read_prompt, read_records
from gisting.internalize.requests import PromptFormat
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import SelfInformation
from gisting.internalize.stages import internalize
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.measure.requests import FULL_PROMPT, ServingRow, serving
from gisting.models.load import load
from gisting.tokens import GistTokenizer
from gisting.train.finetune import published_arguments
from gisting.train.objective import ObjectiveTrainer

__all__ = ["RUNS", "InternalizeRow", "internalize_table", "main", "measure", "requests", "serving_table"]

NUM_GIST_TOKENS = 8
MAX_EXAMPLES = 4
MAX_LENGTH = 192
NUM_UNASKED = 2
# Tokens of an answer: each name with its code, a last word, and the end.
ANSWER = 2 * CodeTask.length + 2
#: Every way to train, with its arguments of ``internalize``.
RUNS: dict[str, dict[str, Any]] = {
    "in stages": {},
    "in stages, gist at the end": {"tail": "gist", "num_gist_tokens": NUM_GIST_TOKENS},
    "bare query": {"control": "bare"},
    "full prompt": {"control": "full"},
    "full prompt, run bare": {"control": "full-run-bare"},
    "shortened prompt": {"control": "shortened", "control_share": 0.5},
}
#: The ways whose model reads the whole prompt, as text or as a gist.
READERS = ("in stages, gist at the end", "full prompt")


@dataclass(frozen=True)
class InternalizeRow:
    """One way to train.

    ``tokens`` is the mean number of tokens of a request to the finished model. Scores are exact matches on held-out
    queries, in 0..1 with 95 % intervals. ``seconds`` covers the training and the questions after each stage,
    ``base_seconds`` the base model before them. For each stage, ``stages`` has the share of the prompt that was kept,
    its tokens, and the bare query's score. ``unasked`` is the score on queries for names that no training query has,
    ``edited`` the score with a table of other codes in place of the trained one, None where no table is read; both
    without examples.
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
    """Train the base model, then a copy of it in each way, and evaluate them all.

    Args:
        directory: for a folder per model; folders of the same name are replaced.
        seed: seed of the task's table, the weights and the data.
        base_steps: optimiser steps of the base model, each of 32 queries to random tables.
        steps: optimiser steps of each way, of 32 requests, over all its stages.
        num_records: held-out queries.
        runs: names of ``RUNS``.
        progress: called with a description of each step before it starts.

    Raises:
        GistError: a way is unknown.
    """
    unknown = [name for name in runs if name not in RUNS]
    if unknown or not runs:
        raise GistError(f"runs must be names of {', '.join(RUNS)}, got {unknown[0] if unknown else 'none'!r}")
    tell = progress or (lambda what: None)
    task, tokenizer, folder = CodeTask(seed=seed, num_unasked=NUM_UNASKED), code_tokenizer(), Path(directory)
    training, held_out = task.records("train", 512, seed), task.records("eval", num_records, seed)
    unasked, other = task.records("unasked", num_records, seed), task.table.edited()
    edited = [
        replace(one, instruction=other.text(), output=" ".join(other.answer(str(one.input).split())))
        for one in held_out
    ]
    tell(f"base: {base_steps} steps")
    start = time.perf_counter()
    base = _base(task, tokenizer, folder / "base", base_steps, seed)
    base_seconds = round(time.perf_counter() - start, 1)
    rows = []
    for name in tracked(runs, "training"):
        tell(f"{name}: {steps} steps")
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
            callbacks=[TrainerCallback()],  # keeps Trainer from printing
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
    """Time requests, one and eight at once, to a model that ``measure`` saved and to a larger random one.

    What is saved is arithmetic, and the small model does hardly any; the random model has 26 million parameters.

    Args:
        directory: the one that ``measure`` was given.
        run: which of its models; one whose first stage used full prompts.
        repeats: measured rounds.

    Raises:
        GistError: there is no such model, or ``repeats`` is out of range.
    """
    folder = Path(directory) / run
    asked = read_records(folder / "stage-1" / EVAL_NAME)
    if asked is None:
        raise GistError(f"directory must contain what measure saved, got {directory}, which has no {run}/stage-1")
    small, tokenizer = load(folder)
    prompt = read_prompt(folder / "stage-1")
    (length,) = {len(ids) for ids in tokenizer.encode_completions([""] * len(asked), [one.output for one in asked])}
    set_seed(0)
    large = task_model(
        tokenizer, 512, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    )
    return [
        row
        for model in (small, large)
        for size in (1, 8)
        for row in serving(model, tokenizer, asked, prompt, batch_size=size, num_answer_tokens=length, repeats=repeats)
    ]


def internalize_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of trainings as Markdown: each way for each seed, then the bare query's score stage by stage."""
    rows = [row for row in rows if "run" in row]
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    run_on = {"no-prompt": "the bare query", "prompt": "its prompt", "gist": "k gist tokens"}
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = {row["seed"]: row for row in rows if row["run"] == name}
        tokens = sum(row["tokens"] for row in mine.values()) / len(mine)
        others = (
            ", ".join(f"{100 * row[what]['value']:.1f}" for row in mine.values() if row[what] is not None) or "-"
            for what in ("unasked", "edited")
        )
        lines.append(
            [
                name,
                run_on[next(iter(mine.values()))["condition"]],
                f"{tokens:.1f}",
                *(interval_cell(mine[seed]["exact_match"] if seed in mine else None) for seed in seeds),
                *others,
                _span([row["seconds"] for row in mine.values()]),
            ]
        )
    scores = (*(f"seed {seed}" for seed in seeds), "unasked names", "edited prompt")
    text = markdown_table(("trained", "run on", "tokens of a request", *scores, "seconds"), lines)
    if staged := [row for row in rows if row["run"] == next(iter(RUNS))]:
        stages = staged[0]["stages"]
        kept = [
            [f"prompt kept (seed {staged[0]['seed']})", *(f"{100 * one['realised_share']:.0f} %" for one in stages)],
            ["tokens of a request", *(f"{one['tokens']:.1f}" for one in stages)],
        ]
        kept += [
            [f"bare query answered, seed {row['seed']}", *(f"{100 * one['bare']:.1f}" for one in row["stages"])]
            for row in staged
        ]
        columns = ("in stages", *(f"stage {number}" for number in range(1, len(stages) + 1)))
        text += ["", *markdown_table(columns, kept)]
    first = rows[0]
    base_times = _span([row["base_seconds"] for row in rows])
    text += [
        "",
        f"Exact match in per cent with its 95 % interval on {first['num_records']} held-out queries, "
        f"{first['num_parameters'] / 1e6:.2f} million parameters, {first['num_steps']:,} steps of 32 requests for each "
        f"way, from a base of {first['base_steps']:,} steps on random tables ({base_times} s). The last two scores, "
        "one for each seed, are without examples: queries for a name that no training query has, and the held-out "
        f"queries with a different code for every name of the prompt ({where(first)}).",
    ]
    return "\n".join(text)


def serving_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of served requests as Markdown."""
    rows = [row for row in rows if "mode" in row]
    full = {
        (row["num_parameters"], row["batch_size"]): row["requests_per_s"] for row in rows if row["mode"] == FULL_PROMPT
    }
    lines = [
        [
            f"{row['num_parameters'] / 1e6:.1f} M",
            str(row["batch_size"]),
            row["mode"],
            str(row["num_cached_tokens"]),
            f"{row['num_new_tokens']:.1f}",
            spread_cell(row, "requests_per_s", 0 if row["requests_per_s"] >= 100 else 1),
            f"{row['requests_per_s'] / full[row['num_parameters'], row['batch_size']]:.2f}x",
        ]
        for row in rows
    ]
    columns = ("tokens cached", "tokens read", "requests per second", "against full prompt")
    first = rows[0]
    text = [
        *markdown_table(("parameters", "batch", "request", *columns), lines),
        "",
        f"Greedy answers of {first['num_answer_tokens']} tokens with stock `generate`; medians of "
        f"{first['num_repeats']} alternating rounds, quartiles in brackets ({where(first)}).",
    ]
    return "\n".join(text)


def _span(values: Sequence[float]) -> str:
    """The smallest and the largest value, or one if they are the same."""
    return "–".join(dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values))))


def _base(task: CodeTask, tokenizer: GistTokenizer, folder: Path, steps: int, seed: int) -> PreTrainedModel:
    """Train a model to look names up in any table in its prompt, with and without examples after the table."""
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
    """Score a finished model on other records."""
    settings: dict[str, Any] = {"max_new_tokens": ANSWER, "batch_size": ANSWERS_AT_ONCE, "with_rouge": False}
    (result,) = evaluate(model, tokenizer, records, NUM_GIST_TOKENS, conditions=[condition], **settings)
    return result.interval("exact_match")


def main(
    output: OutputOption = None,
    checkpoints: CheckpointsOption = Path("runs/internalize"),
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0,1,2",
    base_steps: Annotated[int, typer.Option(min=1, help="Training steps of the base model.")] = 600,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each way.")] = 200,
    records: Annotated[int, typer.Option(min=1, help="Held-out queries.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds of requests.")] = 30,
    part: Annotated[str, typer.Option(help="What to measure: both, training, requests or codes.")] = "both",
    model: Annotated[Path | None, typer.Option(help="With codes: a pretrained chat model to start from.")] = None,
    runs: Annotated[str | None, typer.Option(help="With codes: its ways to train, separated by semicolons.")] = None,
    edits: Annotated[int, typer.Option(min=1, help="With codes: versions of the prompt to learn from.")] = 2000,
    questions: Annotated[int, typer.Option(min=8, help="With codes: queries that the model writes itself.")] = 256,
    seconds: Annotated[float, typer.Option(help="With codes: start no further way after this time.")] = float("inf"),
) -> None:
    """Internalisation on the built-in task next to its controls, and requests served; codes that only a prompt has.

    Example: python -m benchmarks internalize --output docs/results/internalize.jsonl

    Example: python -m benchmarks internalize --part codes --output docs/results/codes.jsonl
    """
    if part not in ("both", "training", "requests", "codes"):
        raise typer.BadParameter(f"--part must be both, training, requests or codes, got {part!r}")
    rows, all_seeds = Rows("internalize", output), numbers("--seeds", seeds)
    if part == "codes":
        until = time.time() + seconds
        for seed in all_seeds:
            measure_codes(
                # All seeds start from one pretrained base; the small model's base has a seed of its own.
                checkpoints / ("codes" if model is not None else f"codes-{seed}"),
                model=model,
                seed=seed,
                base_steps=base_steps,
                steps=steps,
                num_edits=edits,
                num_queries=records,
                num_questions=questions,
                runs=names("--runs", runs, tuple(CODES)),
                until=until,
                add=lambda row: rows.add([row]),
                progress=lambda what, seed=seed: say(f"seed {seed}, {what}"),
            )
        rows.show(codes_table)
        return
    for seed in all_seeds if part != "requests" else ():
        rows.add(
            measure(
                checkpoints / str(seed),
                seed=seed,
                base_steps=base_steps,
                steps=steps,
                num_records=records,
                progress=lambda what, seed=seed: say(f"seed {seed}, {what}"),
            )
        )
    if part != "training":
        say("requests")
        rows.add(requests(checkpoints / str(all_seeds[0]), repeats=repeats))
    tables = {"training": (internalize_table,), "requests": (serving_table,)}
    rows.show(*tables.get(part, (internalize_table, serving_table)))
