"""Compare four training methods, each from the same base model that knows the task, with the same number of steps.

The base model learns the built-in task as the positive control does, with the prompt in view and gist tokens in place
but of no use. Each method then teaches a copy of it to gist, with the same records in the same order. Learning rates
differ, because an adapter tolerates a higher one than a whole model; none was tuned. No row is written for a method
that promises to leave ordinary text unchanged and changes any bit of its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import set_seed

from benchmarks.command import CheckpointsOption, OutputOption, RecordsOption, Rows, SeedOption, names, say, where
from benchmarks.task import SPLITS, task_accuracy
from gisting.data.tasks import LETTERS, LetterTask, task_tokenizer
from gisting.demo import BATCH_SIZE, task_arguments, task_model
from gisting.errors import GistError
from gisting.eval.statistics import Interval
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.models.load import load
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer
from gisting.train.finetune import finetune
from gisting.train.methods import METHODS, Method

__all__ = ["LEARNING_RATES", "MethodRow", "main", "measure", "methods_table"]

NUM_GIST_TOKENS = 2
#: Peak learning rate by method.
LEARNING_RATES = {"full": 1e-3, "lora": 5e-3, "gist-lora": 5e-3, "embeddings": 5e-2}
_KEEPS_TEXT = ("gist-lora", "embeddings")


@dataclass(frozen=True)
class MethodRow:
    """One method, or the base model (``"base"``, whose ``num_steps`` are its own).

    ``exact_match`` is by ``split/condition``, in 0..1 with 95 % intervals. ``is_text_unchanged`` says whether the
    logits of text without gist tokens are bit for bit the base model's. Times are in seconds.
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
    """Train the base model, then a copy of it with each method, and evaluate them all.

    Args:
        directory: for a folder per model.
        methods: names of ``METHODS``.
        base_steps: optimiser steps of ``BATCH_SIZE`` rows for the base model.
        steps: optimiser steps of each method.
        seed: seed of the held-out combinations, the weights and the data.
        num_records: records of each split.
        rank: rank of LoRA's matrices.
        learning_rates: by method.
        progress: called with a description of each step before it starts.

    Returns:
        A row for the base model, and one for each method.

    Raises:
        GistError: a method is unknown, or one that promises to leave ordinary text unchanged changes it.
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
    # Not the base model's records.
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
    """Format rows of the JSONL file as Markdown."""
    lines = []
    for row in rows:
        learns = f"{row['num_trainable_parameters']:,} ({row['num_trainable_parameters'] / row['num_parameters']:.1%})"
        found = (_cell(row["exact_match"][name]) for name in ("seen/gist", "unseen/gist", "unseen/positive"))
        text = "same bits" if row["is_text_unchanged"] else "changes"
        lines.append([row["method"], learns, *found, text, f"{row['train_s']:,.0f} s"])
    scores = ("seen: gist", "unseen: gist", "unseen: prompt in view")
    first = rows[0]
    text = [
        *markdown_table(("method", "trained parameters", *scores, "ordinary text", "training"), lines),
        "",
        f"Exact match in per cent with its 95 % interval on {first['num_records']:,} records, k = "
        f"{first['num_gist_tokens']} (seed {first['seed']}; {where(first, 'torch', 'transformers')}).",
    ]
    return "\n".join(text)


@torch.no_grad()
def _text_logits(model: Any, tokenizer: GistTokenizer) -> Tensor:
    """The logits of a few texts without gist tokens."""
    tokens: Any = tokenizer.tokenizer
    texts = [" ".join(LETTERS[start:] + LETTERS[:start]) for start in range(len(LETTERS))]
    ids = torch.tensor(tokens(texts)["input_ids"], device=input_weight(model).device)
    return model.eval()(input_ids=ids).logits.cpu()


def _cell(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['value']:.1f} ({100 * interval['low']:.1f}–{100 * interval['high']:.1f})"


def main(
    output: OutputOption = None,
    checkpoints: CheckpointsOption = Path("runs/methods"),
    methods: Annotated[str | None, typer.Option(help=f"Some of {', '.join(METHODS)}, comma-separated.")] = None,
    base_steps: Annotated[int, typer.Option(min=1, help="Training steps of the base model.")] = 1800,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each method.")] = 1800,
    records: RecordsOption = 512,
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA.")] = 16,
    full_rate: Annotated[float, typer.Option(help="Learning rate of full.")] = LEARNING_RATES["full"],
    lora_rate: Annotated[float, typer.Option(help="Learning rate of lora.")] = LEARNING_RATES["lora"],
    gist_lora_rate: Annotated[float, typer.Option(help="Learning rate of gist-lora.")] = LEARNING_RATES["gist-lora"],
    embeddings_rate: Annotated[float, typer.Option(help="Learning rate of embeddings.")] = LEARNING_RATES["embeddings"],
    seed: SeedOption = 0,
) -> None:
    """Training methods (full, LoRA, gist-lora, embeddings) from one base model.

    Example: python -m benchmarks methods --output docs/results/methods.jsonl
    """
    rows = Rows("methods", output)
    rates = (full_rate, lora_rate, gist_lora_rate, embeddings_rate)
    rows.add(
        measure(
            checkpoints,
            names("--methods", methods, METHODS),
            base_steps=base_steps,
            steps=steps,
            seed=seed,
            num_records=records,
            rank=rank,
            learning_rates=dict(zip(LEARNING_RATES, rates, strict=True)),
            progress=say,
        )
    )
    rows.show(methods_table)
