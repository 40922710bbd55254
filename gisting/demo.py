"""The main job in a few minutes on a CPU: a small LLaMA learns to gist, a prompt it never saw is compressed and used.

Place in the flow: all of it. Every step is a public function that a user would call; only the task and the model's
size are the demo's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from gisting.data.records import save_records
from gisting.data.tasks import LETTERS, Instruction, LetterTask, task_tokenizer
from gisting.eval.conditions import evaluate
from gisting.generation import compress, generate
from gisting.measure.latency import LatencyRow, first_token
from gisting.measure.task import ANSWERS_AT_ONCE, BATCH_SIZE, task_arguments, task_model
from gisting.tokens import GistTokenizer
from gisting.train.finetune import finetune

__all__ = ["DemoResult", "run_demo"]

NUM_GIST_TOKENS = 2


@dataclass(frozen=True)
class DemoResult:
    """What the run showed.

    Args:
        seed: of data, weights and order.
        num_steps: optimiser steps.
        num_parameters: of the model.
        num_gist_tokens: k.
        num_eval_records: records of each split that were answered.
        accuracy: exact match in 0..1 by ``split/condition``.
        fresh_correct: right answers to the fresh instruction.
        fresh_total: inputs that it was given.
        train_s: seconds of training.
        total_s: seconds of the whole run.
        latency: time to the first token of an answer, with each kind of cache.
    """

    seed: int
    num_steps: int
    num_parameters: int
    num_gist_tokens: int
    num_eval_records: int
    accuracy: dict[str, float]
    fresh_correct: int
    fresh_total: int
    train_s: float
    total_s: float
    latency: list[LatencyRow]

    def to_row(self) -> dict[str, object]:
        """For a results file."""
        return {"command": "gisting demo", **asdict(self)}


def run_demo(
    output_dir: str | Path = "runs/demo",
    *,
    steps: int = 2400,
    seed: int = 0,
    eval_records: int = 512,
    console: Console | None = None,
) -> DemoResult:
    """Train, evaluate under the three conditions, compress a fresh instruction, answer with it, and measure.

    Args:
        output_dir: where checkpoint, data and the compressed instruction are saved.
        steps: optimiser steps of 32 rows.
        seed: of the held-out combinations, the weights and the data.
        eval_records: records for each split and condition.
        console: where to print; standard output by default.

    Returns:
        The numbers that were printed.
    """
    console = Console() if console is None else console
    started = time.perf_counter()
    output_dir = Path(output_dir)
    set_seed(seed)
    task = LetterTask(seed=seed)
    tokenizer = task_tokenizer()
    example = task.records("seen", 1, seed)[0]
    console.print("[bold]1. The task[/]: follow an instruction over letters. Some combinations are never trained on.")
    console.print(
        f"   instruction  {example.instruction}\n   input        {example.input}\n   output       {example.output}\n"
    )

    model = task_model(tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"[bold]2. Training[/] a LLaMA of {num_parameters / 1e6:.2f} million parameters from nothing to gist with k "
        f"= {NUM_GIST_TOKENS}: stock Trainer, {steps} steps of {BATCH_SIZE} rows."
    )
    train_s = _train(model, tokenizer, task, output_dir, steps, seed, console)

    console.print(f"\n[bold]3. Accuracy[/] (exact match, {eval_records} records each)")
    accuracy = _evaluate(model, tokenizer, task, seed, eval_records, console)

    console.print("\n[bold]4. A fresh instruction[/], compressed once and used from its cache")
    cache_path = output_dir / "instruction.gist.safetensors"
    correct, total, prompt = _fresh(model, tokenizer, task, cache_path, console)

    console.print("\n[bold]5. What a request costs[/] up to its first token (batch 1, median of alternating runs)")
    rows = first_token(model, tokenizer, prompt, " ".join(LETTERS[: task.length]), NUM_GIST_TOKENS)
    _print_costs(rows, console)

    unseen = output_dir / "unseen.jsonl"
    save_records(task.records("unseen", 64, seed + 3), unseen)
    console.print(
        f"\n[bold]6. Saved[/] in {output_dir}: the checkpoint, {cache_path.name} ({cache_path.stat().st_size} "
        f"bytes), {unseen.name}. "
        "Next:"
    )
    console.print(f"   gisting generate {output_dir} --cache {cache_path} --input 'h g f e d'", soft_wrap=True)
    console.print(
        f"   gisting compress {output_dir} --prompt 'please reverse the letters , drop the last letter and end with "
        "a bang' --output my.gist.safetensors",
        soft_wrap=True,
    )
    console.print(f"   gisting eval {output_dir} --data {unseen}", soft_wrap=True)
    return DemoResult(
        seed=seed,
        num_steps=steps,
        num_parameters=num_parameters,
        num_gist_tokens=NUM_GIST_TOKENS,
        num_eval_records=eval_records,
        accuracy=accuracy,
        fresh_correct=correct,
        fresh_total=total,
        train_s=round(train_s, 1),
        total_s=round(time.perf_counter() - started, 1),
        latency=rows,
    )


def _train(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    task: LetterTask,
    output_dir: Path,
    steps: int,
    seed: int,
    console: Console,
) -> float:
    arguments = task_arguments(output_dir, steps, seed)
    disable_progress_bar()  # transformers' own, for the one small file it writes
    with _progress(console) as progress:
        bar = progress.add_task("training", total=steps, loss="")
        metrics = finetune(
            model,
            tokenizer,
            task.records("seen", steps * BATCH_SIZE, seed),
            arguments,
            num_gist_tokens=NUM_GIST_TOKENS,
            # Each row draws its condition: the same weights then serve as the positive control.
            conditions={"gist": 3, "positive": 1},
            callbacks=[_Report(lambda step, loss: progress.update(bar, completed=step, loss=loss))],
        )
    return metrics["train_runtime"]


class _Report(TrainerCallback):
    """Hands step and loss to a progress bar, and keeps Trainer from printing them."""

    def __init__(self, update: Callable[[int, str], None]) -> None:
        self.update = update
        self.loss = ""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args, state, control, **kwargs):
        self.update(state.global_step, self.loss)


def _evaluate(
    model: PreTrainedModel, tokenizer: GistTokenizer, task: LetterTask, seed: int, count: int, console: Console
) -> dict[str, float]:
    accuracy = {}
    with _progress(console) as progress:
        bar = progress.add_task("answering", total=6 * count, loss="")
        for split in ("seen", "unseen"):
            results = evaluate(
                model,
                tokenizer,
                task.records(split, count, seed + 1),
                NUM_GIST_TOKENS,
                max_new_tokens=task.length + 3,
                batch_size=ANSWERS_AT_ONCE,
                with_rouge=False,
                progress=lambda done: progress.advance(bar, done),
            )
            accuracy |= {f"{split}/{result.condition}": result.exact_match for result in results}
    table = Table("condition", "what the answer can see", "seen instructions", "unseen instructions")
    for condition, sees in (
        ("positive", "prompt and gist (upper bound)"),
        ("gist", f"{NUM_GIST_TOKENS} gist tokens"),
        ("negative", "neither (control)"),
    ):
        table.add_row(
            condition, sees, *(f"{100 * accuracy[f'{split}/{condition}']:.1f} %" for split in ("seen", "unseen"))
        )
    console.print(table)
    return accuracy


def _fresh(
    model: PreTrainedModel, tokenizer: GistTokenizer, task: LetterTask, path: Path, console: Console
) -> tuple[int, int, str]:
    instruction: Instruction = task.unseen[0]
    prompt = instruction.text()
    cache = compress(model, tokenizer, [prompt], NUM_GIST_TOKENS)
    cache.save(path)
    num_tokens = tokenizer.encode_prompts([prompt], 1)[0].gist_start
    console.print(
        f"   {prompt}\n   {num_tokens} tokens -> {cache.num_gist_tokens[0]} gist tokens, {cache.num_bytes} bytes "
        f"of keys and values"
    )
    inputs = [" ".join(LETTERS[(start + step) % len(LETTERS)] for step in range(task.length)) for start in range(5)]
    answers = generate(model, tokenizer, inputs, cache=cache, max_new_tokens=task.length + 3, do_sample=False)
    correct = 0
    for text, answer in zip(inputs, answers, strict=True):
        expected = " ".join(instruction.answer(text.split()))
        correct += answer == expected
        verdict = "right" if answer == expected else f"wrong, expected {expected}"
        console.print(f"   {text}  ->  {answer}   ({verdict})", highlight=False)
    return correct, len(inputs), prompt


def _print_costs(rows: list[LatencyRow], console: Console) -> None:
    table = Table("", "tokens read", "tokens cached", "cache bytes", "MFLOPs", "ms", "quartiles")
    for row in rows:
        table.add_row(
            row.mode,
            str(row.num_new_tokens),
            str(row.num_cached_tokens),
            str(row.cache_bytes),
            f"{row.flops / 1e6:.1f}",
            f"{row.latency_ms:.2f}",
            f"{row.latency_ms_low:.2f} - {row.latency_ms_high:.2f}",
        )
    console.print(table)
    none, prefix, gist = rows
    console.print(
        f"   Against no cache the gist saves {100 * (1 - gist.flops / none.flops):.0f} % of the FLOPs; against "
        f"prefix caching {100 * (1 - gist.flops / prefix.flops):.0f} %, and "
        f"{100 * (1 - gist.cache_bytes / prefix.cache_bytes):.0f} % of the bytes kept for each prompt. At batch 1 "
        "and with a prompt this short, bytes are the gain: time hardly differs from prefix caching."
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("   {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
    )
