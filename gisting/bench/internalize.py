"""Internalisation on the built-in task: a template's table goes into the weights, beside every control.

A small LLaMA first learns to look names up in random tables (and nothing of the task's own). From there the task's own
table, which stands in the template of every request, is internalised in stages; each control is trained from the same
base, on the same records, in as many steps. Then requests are served in turn: the full prompt, the full prompt behind a
prefix cache of its template, the bare query.

    python -m gisting.bench.internalize --output docs/results/internalize.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, set_seed

from gisting.bench.report import append_row, environment, interval_cell
from gisting.bench.task import ANSWERS_AT_ONCE, task_arguments, task_model
from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.data.tasks import CodeTask, code_tokenizer
from gisting.errors import GistError
from gisting.eval.conditions import ConditionResult
from gisting.eval.metrics import exact_matches
from gisting.eval.statistics import Interval
from gisting.models.mode import evaluating
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer
from gisting.train.finetune import finetune, published_arguments
from gisting.train.internalize.compressors import SelfInformation
from gisting.train.internalize.directory import read_records
from gisting.train.internalize.schedule import Schedule
from gisting.train.internalize.stages import internalize

__all__ = ["RUNS", "InternalizeRow", "ServingRow", "internalize_table", "measure", "serving", "serving_table"]

NUM_GIST_TOKENS = 8
MAX_EXAMPLES = 4
#: Every way to train, with what it asks of ``internalize``.
RUNS: dict[str, dict[str, Any]] = {
    "in stages": {},
    "in stages, gist at the end": {"tail": "gist", "num_gist_tokens": NUM_GIST_TOKENS},
    "bare query": {"control": "bare"},
    "full prompt": {"control": "full"},
    "full prompt, run bare": {"control": "full-run-bare"},
    "compressed prompt": {"control": "compressed", "control_share": 0.5},
}


@dataclass(frozen=True)
class InternalizeRow:
    """One way to train. ``tokens`` are those of a request to the finished model, means; scores are exact matches on
    held-out queries in 0..1 with intervals of 95 %; ``seconds`` are of training and of what is asked after each stage.
    ``stages`` has, for each, the share of the template that was kept, its tokens and the bare query's score.
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
    stages: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class ServingRow:
    """Requests served one way, answers and all; median and quartiles over alternating rounds."""

    mode: str
    batch_size: int
    num_cached_tokens: int
    num_new_tokens: float
    requests_per_s: float
    requests_per_s_low: float
    requests_per_s_high: float
    num_repeats: int


def measure(
    directory: str | Path,
    *,
    seed: int = 0,
    base_steps: int = 1000,
    steps: int = 400,
    num_records: int = 256,
    runs: Sequence[str] = tuple(RUNS),
    progress: Callable[[str], Any] | None = None,
) -> tuple[list[InternalizeRow], list[ServingRow]]:
    """Train the base model, then a copy of it each way, and evaluate them; time requests to the first of them.

    Args:
        directory: where a folder for each is made; what is there of them is replaced.
        seed: of the task's table, the weights and the data.
        base_steps: optimiser steps of the base model, of eight random tables with eight queries each.
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
    task, tokenizer, folder = CodeTask(seed=seed), code_tokenizer(), Path(directory)
    training, held_out = task.records("train", 512, seed), task.records("eval", num_records, seed)
    say(f"base: {base_steps} steps")
    base = _base(task, tokenizer, folder / "base", base_steps, seed)
    rows, served = [], []
    for name in runs:
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
                batch_size=32,
                per_device_batch_size=32,
                per_device_eval_batch_size=ANSWERS_AT_ONCE,
                max_steps=steps,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                weight_decay=0.05,
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            ),
            schedule=Schedule.linear(4),
            compressor=SelfInformation(base, tokenizer),
            max_examples=MAX_EXAMPLES,
            eval_records=held_out,
            max_new_tokens=2 * task.length + 2,
            max_length=192,
            **RUNS[name],
        )
        answered = _answered(folder / name / f"stage-{len(result.stages)}", result.condition)
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
                exact_match=answered.interval("exact_match"),
                stages=[
                    {
                        "realised_share": stage.realised_share,
                        "tokens": stage.tokens,
                        "bare": stage.metrics["no-prompt"]["exact_match"],
                    }
                    for stage in result.stages
                ],
                seconds=round(result.seconds, 1),
            )
        )
        if not served:
            say("serving")
            full = read_records(folder / name / "stage-1" / "eval.jsonl") or []
            served = [
                row for size in (1, 8) for row in serving(model, tokenizer, full, task.table.text(), batch_size=size)
            ]
    return rows, served


def serving(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    template: str,
    *,
    batch_size: int,
    num_new_tokens: int = 4,
    repeats: int = 30,
    warmup: int = 3,
) -> list[ServingRow]:
    """Serve the same requests three ways, in turn, with stock ``generate``.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        records: full prompts, all of which begin with the template, and queries.
        template: what a prefix cache holds; examples are others for each query and are read anew.
        batch_size: requests at once.
        num_new_tokens: length of every answer, whatever it says.
        repeats: measured rounds.
        warmup: rounds before that.

    Raises:
        GistError: the prefix cache does not give the logits of the full prompt.
    """
    rows = list(records)[:batch_size]
    inputs = [record.input for record in rows]
    full = plain_sources(tokenizer, [record.instruction for record in rows], inputs)
    bare = plain_sources(tokenizer, [""] * len(rows), inputs)
    shared = tokenizer.encode_prompts([template], 1)[0].chunks[0]
    num_cached = next(
        (place for place, pair in enumerate(zip(shared, full[0], strict=False)) if pair[0] != pair[1]), len(shared)
    )
    settings: dict[str, Any] = {"do_sample": False, "min_new_tokens": num_new_tokens, "max_new_tokens": num_new_tokens}
    with evaluating(model), torch.inference_mode():
        kept: Any = model(torch.tensor([shared[:num_cached]]), use_cache=True).past_key_values
        prefix = [(layer.keys, layer.values) for layer in kept.layers]

        def behind_prefix() -> DynamicCache:
            cache = DynamicCache()
            for layer, states in enumerate(prefix):
                cache.update(*(one.repeat(batch_size, 1, 1, 1) for one in states), layer)
            return cache

        def run_prefix() -> Tensor:
            # The cached columns stand in front, so padding goes between them and the rest.
            ids, is_token = pad_rows([row[num_cached:] for row in full], tokenizer.pad_token_id, left=True)
            front = torch.tensor([shared[:num_cached]]).repeat(batch_size, 1)
            mask = torch.cat([torch.ones_like(front), is_token.long()], dim=1)
            return run(torch.cat([front, ids], dim=1), mask, past_key_values=behind_prefix())

        def run_plain(sources: list[list[int]]) -> Tensor:
            ids, is_token = pad_rows(sources, tokenizer.pad_token_id, left=True)
            return run(ids, is_token.long())

        def run(ids: Tensor, mask: Tensor, **states: Any) -> Tensor:
            generating: Any = model
            said = generating.generate(input_ids=ids, attention_mask=mask, **settings, **states)
            return said[:, ids.shape[1] :]

        ways: dict[str, Callable[[], Tensor]] = {
            "full prompt": lambda: run_plain(full),
            "prefix cache": run_prefix,
            "bare query": lambda: run_plain(bare),
        }
        if not torch.equal(ways["full prompt"](), ways["prefix cache"]()):
            raise GistError("the prefix cache gives other answers than the full prompt; no time is reported")
        times: dict[str, list[float]] = {mode: [] for mode in ways}
        for number in range(warmup + repeats):
            for mode, way in ways.items():
                start = time.perf_counter()
                way()
                if number >= warmup:
                    times[mode].append(batch_size / (time.perf_counter() - start))
    lengths = {"full prompt": full, "prefix cache": [row[num_cached:] for row in full], "bare query": bare}
    found = []
    for mode, rates in times.items():
        low, median, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
        new = sum(map(len, lengths[mode])) / batch_size
        cached = num_cached if mode == "prefix cache" else 0
        found.append(ServingRow(mode, batch_size, cached, round(new, 1), median, low, high, len(rates)))
    return found


def internalize_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of trainings as Markdown: each way for each seed, then the bare query's score stage by stage."""
    rows = [row for row in rows if "run" in row]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"| trained | run on | tokens of a request | {' | '.join(f'seed {seed}' for seed in seeds)} | seconds |",
        "|---" * (4 + len(seeds)) + "|",
    ]
    run_on = {"no-prompt": "the bare query", "prompt": "its prompt", "gist": "k gist tokens"}
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = {row["seed"]: row for row in rows if row["run"] == name}
        first = next(iter(mine.values()))
        tokens = sum(row["tokens"] for row in mine.values()) / len(mine)
        times = "–".join(
            f"{one:,.0f}"
            for one in sorted({min(r["seconds"] for r in mine.values()), max(r["seconds"] for r in mine.values())})
        )
        cells = " | ".join(interval_cell(mine[seed]["exact_match"]) if seed in mine else "-" for seed in seeds)
        lines.append(f"| {name} | {run_on[first['condition']]} | {tokens:.1f} | {cells} | {times} |")
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
    lines += [
        "",
        f"Exact match in per cent with its 95 % interval on {first['num_records']} held-out queries, "
        f"{first['num_parameters'] / 1e6:.2f} million parameters, {first['num_steps']:,} steps of 32 requests for each "
        f"way, from a base of {first['base_steps']:,} steps on random tables ({first['device']}, {first['threads']} "
        f"threads, torch {first['torch']}, transformers {first['transformers']}).",
    ]
    return "\n".join(lines)


def serving_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of requests served as Markdown."""
    rows = [row for row in rows if "mode" in row]
    lines = ["| batch | | tokens cached | tokens read | requests a second | against full prompt |", "|---" * 6 + "|"]
    full: dict[int, float] = {row["batch_size"]: row["requests_per_s"] for row in rows if row["mode"] == "full prompt"}
    for row in rows:
        spread = "–".join(f"{row[f'requests_per_s_{end}']:,.0f}" for end in ("low", "high"))
        lines.append(
            f"| {row['batch_size']} | {row['mode']} | {row['num_cached_tokens']} | {row['num_new_tokens']:.1f} | "
            f"{row['requests_per_s']:,.0f} ({spread}) | {row['requests_per_s'] / full[row['batch_size']]:.2f}x |"
        )
    first = rows[0]
    lines += [
        "",
        f"Four tokens answered greedily with stock `generate`; medians of {first['num_repeats']} alternating rounds, "
        f"quartiles in brackets ({first['device']}, {first['threads']} threads, torch {first['torch']}, transformers "
        f"{first['transformers']}).",
    ]
    return "\n".join(lines)


def _base(task: CodeTask, tokenizer: GistTokenizer, folder: Path, steps: int, seed: int) -> PreTrainedModel:
    """A model that looks up in whichever table is in its prompt."""
    set_seed(seed)
    model = task_model(tokenizer, max_position_embeddings=512)
    groups, per_group = 8, 8
    finetune(
        model,
        tokenizer,
        task.lookups(steps * groups, per_group, seed),
        task_arguments(folder, steps, seed, batch_size=groups),
        num_gist_tokens=NUM_GIST_TOKENS,
        conditions="positive",
        max_length=128,
        pack_length=240,
        max_per_group=per_group,
    )
    return model


def _answered(directory: Path, condition: str) -> ConditionResult:
    """What a stage left of the answers under a condition."""
    lines = [json.loads(line) for line in (directory / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    predictions = [line[condition] for line in lines]
    scores = {"exact_match": exact_matches(predictions, [line["output"] for line in lines])}
    return ConditionResult(condition, NUM_GIST_TOKENS, predictions, scores)


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gisting.bench.internalize",
        description="Internalisation beside its controls, and requests served.",
    )
    parser.add_argument("--output", type=Path, help="JSONL file to which the rows are added")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/internalize"), help="where models are saved")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base-steps", type=int, default=1000, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each way")
    parser.add_argument("--records", type=int, default=256, help="held-out queries")
    options = parser.parse_args(arguments)
    console = Console(markup=False, highlight=False)
    found: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows, served = measure(
            options.checkpoints / str(seed),
            seed=seed,
            base_steps=options.base_steps,
            steps=options.steps,
            num_records=options.records,
            progress=lambda what, seed=seed: console.print(f"seed {seed}, {what}"),
        )
        for row in [*rows, *(served if seed == options.seeds[0] else [])]:
            found.append({"command": "python -m gisting.bench.internalize", **asdict(row)})
            if options.output is not None:
                append_row(options.output, found[-1])
    shown = [{**row, **environment()} for row in found]
    console.print(internalize_table(shown), soft_wrap=True)
    console.print()
    console.print(serving_table(shown), soft_wrap=True)


if __name__ == "__main__":
    _main()
