"""Four ways to train side by side: from one base model that knows the task, in as many steps each.

The base model learns the built-in task as the positive control does: prompt in view, gist tokens in place and of no
use. Each method then teaches a copy of it to gist, with the same records in the same order; learning rates differ, for
an adapter bears more than a whole model, and none was searched for. No row is written for a method that promises to
keep ordinary text and changes a bit of it.

    python -m benchmarks.methods --output docs/results/methods.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import set_seed

from gisting.data.tasks import LETTERS, LetterTask, task_tokenizer
from gisting.errors import GistError
from gisting.eval.statistics import Interval
from gisting.measure.progress import tracked
from gisting.measure.rows import append_row
from gisting.measure.task import BATCH_SIZE, SPLITS, task_accuracy, task_arguments, task_model
from gisting.models.load import load
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer
from gisting.train.finetune import finetune
from gisting.train.methods import METHODS, Method

__all__ = ["LEARNING_RATES", "MethodRow", "measure", "methods_table"]

NUM_GIST_TOKENS = 2
#: The peak of the schedule by method.
LEARNING_RATES = {"full": 1e-3, "lora": 5e-3, "gist-lora": 5e-3, "embeddings": 5e-2}
_KEEPS_TEXT = ("gist-lora", "embeddings")


@dataclass(frozen=True)
class MethodRow:
    """One method, or the base model (``"base"``, of which ``num_steps`` is its own training).

    ``exact_match`` is by ``split/condition``, in 0..1 with intervals of 95 %. ``is_text_unchanged`` says whether logits
    of text without gist tokens have the base model's bits. Times are in seconds.
    """

    method: str
    seed: int
    num_steps: int
    learning_rate: float
    rank: int | None
    num_gist_tokens: int
    num_trainable_parameters: int
    num_parameters: int
    num_records: int
    exact_match: dict[str, Interval]
    is_text_unchanged: bool
    train_s: float


def measure(
    directory: str | Path,
    methods: Sequence[str] = METHODS,
    *,
    base_steps: int = 1800,
    steps: int = 1800,
    seed: int = 0,
    num_records: int = 512,
    rank: int = 16,
    learning_rates: Mapping[str, float] = LEARNING_RATES,
    progress: Callable[[str], Any] | None = None,
) -> list[MethodRow]:
    """Train the base model, then a copy of it by each method, and evaluate them.

    Args:
        directory: where a folder for each is made.
        methods: names of ``METHODS``.
        base_steps: optimiser steps of ``BATCH_SIZE`` rows for the base model.
        steps: the same for each method.
        seed: of the held-out combinations, the weights and the data.
        num_records: records of each split.
        rank: of LoRA.
        learning_rates: by method.
        progress: called with what is about to be done.

    Returns:
        A row for the base model, and one for each method.

    Raises:
        GistError: there is no such method, or one that promises to keep ordinary text changes it.
    """
    wanted = [Method(name, rank=rank) for name in methods]
    task, tokenizer, folder = LetterTask(seed=seed), task_tokenizer(), Path(directory)
    splits = {split: task.records(split, num_records, seed + 1) for split in SPLITS}

    def row(
        model: Any,
        method: str,
        rate: float,
        rank: int | None,
        metrics: dict[str, float],
        steps: int,
        is_text_unchanged: bool,
    ) -> MethodRow:
        if progress is not None:
            progress(f"{method}: answering")
        return MethodRow(
            method=method,
            seed=seed,
            num_steps=steps,
            learning_rate=rate,
            rank=rank,
            num_gist_tokens=NUM_GIST_TOKENS,
            num_trainable_parameters=int(metrics["num_trainable_parameters"]),
            num_parameters=int(metrics["num_parameters"]),
            num_records=num_records,
            exact_match=task_accuracy(model, tokenizer, splits, NUM_GIST_TOKENS, task.length + 3),
            is_text_unchanged=is_text_unchanged,
            train_s=round(metrics["train_runtime"], 1),
        )

    if progress is not None:
        progress(f"base: {base_steps} steps")
    set_seed(seed)
    model = task_model(tokenizer)
    arguments = task_arguments(folder / "base", base_steps, seed)
    records = task.records("seen", base_steps * BATCH_SIZE, seed)
    metrics = finetune(model, tokenizer, records, arguments, num_gist_tokens=NUM_GIST_TOKENS, conditions="positive")
    text = _text_logits(model, tokenizer)
    rows = [row(model, "base", arguments.learning_rate, None, metrics, base_steps, True)]
    # Other records than the base model's.
    records = task.records("seen", steps * BATCH_SIZE, seed + 2)
    for method in tracked(wanted, "training"):
        if progress is not None:
            progress(f"{method.name}: {steps} steps")
        model, _ = load(folder / "base")
        rate = learning_rates[method.name]
        arguments = task_arguments(folder / method.name, steps, seed)
        arguments.learning_rate = rate
        metrics = finetune(model, tokenizer, records, arguments, method=method, num_gist_tokens=NUM_GIST_TOKENS)
        is_unchanged = torch.equal(_text_logits(model, tokenizer), text)
        if method.name in _KEEPS_TEXT and not is_unchanged:
            raise GistError(f"{method.name} changed the logits of text without gist tokens; nothing is reported")
        rank_of = rank if "lora" in method.name else None
        rows.append(row(model, method.name, rate, rank_of, metrics, steps, is_unchanged))
    return rows


def methods_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the JSONL file as Markdown."""
    lines = [
        "| method | learns | seen: gist | unseen: gist | unseen: prompt in view | ordinary text | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        learns = f"{row['num_trainable_parameters']:,} ({row['num_trainable_parameters'] / row['num_parameters']:.1%})"
        found = (_cell(row["exact_match"][name]) for name in ("seen/gist", "unseen/gist", "unseen/positive"))
        text = "same bits" if row["is_text_unchanged"] else "changes"
        cells = (row["method"], learns, *found, text, f"{row['train_s']:,.0f} s")
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Exact match in per cent with its 95 % interval on {first['num_records']:,} records, k = "
        f"{first['num_gist_tokens']} (seed {first['seed']}; {first['device']}, torch {first['torch']}, transformers "
        f"{first['transformers']}).",
    ]
    return "\n".join(lines)


@torch.no_grad()
def _text_logits(model: Any, tokenizer: GistTokenizer) -> Tensor:
    """Of a few texts without gist tokens."""
    tokens: Any = tokenizer.tokenizer
    texts = [" ".join(LETTERS[start:] + LETTERS[:start]) for start in range(len(LETTERS))]
    ids = torch.tensor(tokens(texts)["input_ids"], device=input_weight(model).device)
    return model.eval()(input_ids=ids).logits.cpu()


def _cell(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['value']:.1f} ({100 * interval['low']:.1f}–{100 * interval['high']:.1f})"


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description="Four ways to train, from one base model, side by side."
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/methods.jsonl"), help="JSONL file, added to")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/methods"), help="where models are saved")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="which")
    parser.add_argument("--base-steps", type=int, default=1800, help="training steps of the base model")
    parser.add_argument("--steps", type=int, default=1800, help="training steps of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=int, default=512, help="records of each split")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    for name, rate in LEARNING_RATES.items():
        parser.add_argument(f"--{name}-rate", type=float, default=rate, help=f"learning rate of {name}, {rate:g}")
    options = parser.parse_args(arguments)
    console = Console()
    rows = measure(
        options.checkpoints,
        options.methods,
        base_steps=options.base_steps,
        steps=options.steps,
        seed=options.seed,
        num_records=options.records,
        rank=options.rank,
        learning_rates={name: vars(options)[f"{name.replace('-', '_')}_rate"] for name in LEARNING_RATES},
        progress=lambda what: console.print(what, highlight=False),
    )
    table = Table("method", "learns", "seen: gist", "unseen: gist", "unseen: prompt in view", "text", "training, s")
    for row in rows:
        append_row(options.output, asdict(row))
        shown = (_cell(asdict(row.exact_match[name])) for name in ("seen/gist", "unseen/gist", "unseen/positive"))
        text = "same bits" if row.is_text_unchanged else "changes"
        table.add_row(row.method, f"{row.num_trainable_parameters:,}", *shown, text, f"{row.train_s:,.0f}")
    console.print(table)


if __name__ == "__main__":
    _main()
