"""Training steps a second: a row for each completion, or completions packed behind one copy of their prompt.

Both ways train the built-in task's model on the same completions, alternating in one process; a step is all of it:
collating, forward, backward and the optimiser. No time is reported unless both have the same loss and gradients.

    python -m gisting.bench.training --output docs/results/training.jsonl
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import set_seed

from gisting.bench.report import append_row, environment
from gisting.bench.task import task_model
from gisting.data.collate import IGNORED, GistCollator
from gisting.data.packing import GistPackingCollator
from gisting.data.records import Record
from gisting.data.tasks import LetterTask, task_tokenizer
from gisting.errors import GistError
from gisting.tokens import GistTokenizer

__all__ = ["TrainingRow", "measure", "training_table"]

NUM_GIST_TOKENS = 2


@dataclass(frozen=True)
class TrainingRow:
    """One way to lay out a step of ``num_prompts * per_prompt`` completions.

    ``num_tokens`` counts what is no padding, ``num_columns`` everything; times are in seconds a step, median and
    quartiles.
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
        per_prompt: completions of each.
        prompt_tokens: ids of a prompt; an instruction of the task is said over and over up to there.
        repeats: measured rounds; in each, both ways take a step on the same completions.
        warmup: rounds before that.

    Raises:
        GistError: a number is too small, or the two ways differ in loss or gradients.
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
    # A row for each prompt with its completions.
    whole = prompt_tokens + NUM_GIST_TOKENS + per_prompt * (longest - prompt_tokens - NUM_GIST_TOKENS)
    collators: dict[str, Callable[[list[Record]], dict[str, Tensor]]] = {
        "padded": GistCollator(tokenizer, NUM_GIST_TOKENS, max_length=longest),
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
        low, median, high = statistics.quantiles(times[mode], n=4) if repeats > 1 else times[mode] * 3
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


def training_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the JSONL file as Markdown."""
    lines = [
        "| layout | prompts x completions | tokens of a prompt | tokens of a step | rows x length | ms a step | "
        "completions a second | against padded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    padded: dict[str, Any] = {}
    for row in rows:
        padded = row if row["mode"] == "padded" else padded
        spread = "–".join(f"{1000 * row[f'step_s_{end}']:.0f}" for end in ("low", "high"))
        lines.append(
            f"| {row['mode']} | {row['num_prompts']} x {row['per_prompt']} | {row['prompt_tokens']} | "
            f"{row['num_tokens']:,} | {row['num_rows']} x {row['row_length']} | {1000 * row['step_s']:.0f} ({spread}) "
            f"| {row['completions_per_s']:,.0f} | {row['completions_per_s'] / padded['completions_per_s']:.1f}x |"
        )
    first = rows[0]
    lines += [
        "",
        f"Whole optimiser steps of the built-in task's model ({first['num_parameters'] / 1e6:.2f} million parameters), "
        f"k = {NUM_GIST_TOKENS}, collating included; medians of {first['num_repeats']} alternating steps, quartiles in "
        f"brackets ({first['device']}, {first['threads']} threads, torch {first['torch']}, transformers "
        f"{first['transformers']}).",
    ]
    return "\n".join(lines)


def _step_records(
    task: LetterTask, tokenizer: GistTokenizer, num_prompts: int, per_prompt: int, prompt_tokens: int, seed: int
) -> list[Record]:
    """Completions of a step, those of a prompt together; every prompt has ``prompt_tokens`` ids."""
    around = tokenizer.encode_prompts(["a"], 1)[0].gist_start - 1
    found: dict[str, list[Record]] = {}
    for record in task.records("seen", 100 * num_prompts * per_prompt, seed):
        words = itertools.islice(itertools.cycle(record.instruction.split()), prompt_tokens - around)
        group = found.setdefault(" ".join(words), [])
        if len(group) < per_prompt:
            group.append(record)
    full = {prompt: group for prompt, group in found.items() if len(group) == per_prompt}
    if len(full) < num_prompts:
        raise GistError(f"num_prompts must be at most {len(full)}, the instructions of the task, got {num_prompts}")
    return [
        replace(record, instruction=prompt)
        for prompt, group in itertools.islice(full.items(), num_prompts)
        for record in group
    ]


def _ids(tokenizer: GistTokenizer, record: Record) -> list[int]:
    return tokenizer.encode(record.instruction, record.input, record.output, num_gist_tokens=NUM_GIST_TOKENS).input_ids


def _gate(model: Any, batches: dict[str, dict[str, Tensor]]) -> None:
    """The same completions, the same loss, the same gradients."""
    losses, gradients, counts = [], [], []
    for batch in batches.values():
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        counts.append(int((batch["labels"] != IGNORED).sum()))
    model.zero_grad()
    apart = max(float((one - other).abs().max()) for one, other in zip(*gradients, strict=True))
    if counts[0] != counts[1] or abs(losses[0] - losses[1]) > 1e-5 or apart > 1e-5:
        raise GistError(
            f"the layouts differ: {counts} labels, losses {losses}, gradients by {apart:.1e}; no time is reported"
        )


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gisting.bench.training", description="Training steps, padded and packed behind shared prompts."
    )
    parser.add_argument("--output", type=Path, help="JSONL file to which the rows are added")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[16, 64, 256], help="lengths of a prompt")
    parser.add_argument("--per-prompt", type=int, nargs="+", default=[1, 8], help="completions of a prompt")
    parser.add_argument("--completions", type=int, default=64, help="completions of a step")
    parser.add_argument("--repeats", type=int, default=30, help="measured steps of each layout")
    options = parser.parse_args(arguments)
    rows = []
    for prompt_tokens, per_prompt in itertools.product(options.prompt_tokens, options.per_prompt):
        rows += measure(
            num_prompts=max(1, options.completions // per_prompt),
            per_prompt=per_prompt,
            prompt_tokens=prompt_tokens,
            repeats=options.repeats,
        )
    for row in rows:
        if options.output is not None:
            append_row(options.output, asdict(row))
    table = training_table([{**asdict(row), **environment()} for row in rows])
    Console().print(table, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    _main()
