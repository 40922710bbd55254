"""Train a small LLaMA to gist in a few minutes on a CPU, then compress a prompt it never saw and answer with it.

Place in the flow: all of it. Every step is a public function that a user would call; only the task, the model's size
and its training arguments belong to the demo. The benchmarks that train on a built-in task use the same model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from gisting.data.records import save_records
from gisting.data.tasks import LETTERS, Instruction, LetterTask, task_tokenizer
from gisting.eval.conditions import evaluate
from gisting.generation import compress, generate
from gisting.measure.latency import LatencyRow, first_token
from gisting.measure.progress import progress_bar
from gisting.models.patch import patch
from gisting.tokens import GistTokenizer
from gisting.train.finetune import finetune, published_arguments

__all__ = ["ANSWERS_AT_ONCE", "BATCH_SIZE", "DemoResult", "run_demo", "task_arguments", "task_model"]

NUM_GIST_TOKENS = 2
BATCH_SIZE = 32
ANSWERS_AT_ONCE = 128


def task_model(tokenizer: GistTokenizer, max_position_embeddings: int = 256, **sizes: int) -> PreTrainedModel:
    """Return the small LLaMA that learns a built-in task from scratch: patched, with fresh weights.

    Args:
        tokenizer: the task's tokenizer.
        max_position_embeddings: length of the longest sequence.
        **sizes: fields of its configuration to change, such as ``hidden_size``.
    """
    special: Any = tokenizer.tokenizer
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, **sizes}
    config = LlamaConfig(
        vocab_size=len(special),
        **shape,
        max_position_embeddings=max_position_embeddings,
        # The usual 0.02 suits wide models; this narrow one learns in half the steps from larger weights.
        initializer_range=0.06,
        pad_token_id=special.pad_token_id,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
    )
    return patch(AutoModelForCausalLM.from_config(config), tokenizer)


def task_arguments(output_dir: str | Path, steps: int, seed: int, batch_size: int = BATCH_SIZE) -> TrainingArguments:
    """Return the training arguments of :func:`task_model`; the published schedule is for pretrained models.

    Args:
        output_dir: directory for checkpoints.
        steps: optimiser steps.
        seed: seed of the order of the data.
        batch_size: rows of a step.
    """
    return published_arguments(
        output_dir,
        batch_size=batch_size,
        per_device_batch_size=batch_size,
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 4),
        weight_decay=0.05,
        adam_beta2=0.98,
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Args:
        seed: seed of data, weights and order.
        num_steps: optimiser steps.
        num_parameters: number of the model's parameters.
        num_gist_tokens: k.
        num_eval_records: records of each split that were answered.
        accuracy: exact match in 0..1 by ``split/condition``.
        fresh_correct: right answers with the fresh instruction.
        fresh_total: inputs it was tried on.
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
        """Return the row for a results file."""
        return {"command": "gisting demo --from-scratch", **asdict(self)}


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
        seed: seed of the held-out combinations, the weights and the data.
        eval_records: records for each split and condition.
        console: where to print; by default standard output.

    Returns:
        The printed numbers.
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
        f"[bold]2. Training[/] a LLaMA of {num_parameters / 1e6:.2f} million parameters from scratch to gist with k "
        f"= {NUM_GIST_TOKENS}: stock Trainer, {steps} steps of {BATCH_SIZE} rows."
    )
    train_s = _train(model, tokenizer, task, output_dir, steps, seed)

    console.print(f"\n[bold]3. Accuracy[/] (exact match, {eval_records} records each)")
    accuracy = _evaluate(model, tokenizer, task, seed, eval_records)
    _print_accuracy(accuracy, console)

    console.print("\n[bold]4. A fresh instruction[/], compressed once and used from its cache")
    # Not next to the weights: vLLM loads every *.safetensors file there.
    cache_path = output_dir / "gists" / "instruction.gist.safetensors"
    cache_path.parent.mkdir(exist_ok=True)
    correct, total, prompt = _fresh(model, tokenizer, task, cache_path, console)

    console.print("\n[bold]5. What a request costs[/] up to its first token (batch 1, median of alternating runs)")
    rows = first_token(model, tokenizer, prompt, " ".join(LETTERS[: task.length]), NUM_GIST_TOKENS)
    _print_costs(rows, console)

    unseen = output_dir / "unseen.jsonl"
    save_records(task.records("unseen", 64, seed + 3), unseen)
    console.print(
        f"\n[bold]6. Saved[/] in {output_dir}: the checkpoint, gists/{cache_path.name} ({cache_path.stat().st_size} "
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
    model: PreTrainedModel, tokenizer: GistTokenizer, task: LetterTask, output_dir: Path, steps: int, seed: int
) -> float:
    disable_progress_bar()  # transformers' own, for the one small file it writes
    with progress_bar("   training", steps) as advance:
        metrics = finetune(
            model,
            tokenizer,
            task.records("seen", steps * BATCH_SIZE, seed),
            task_arguments(output_dir, steps, seed),
            num_gist_tokens=NUM_GIST_TOKENS,
            # Each row draws its condition, so the same weights also serve as the positive control.
            conditions={"gist": 3, "positive": 1},
            callbacks=[_Report(advance)],
        )
    return metrics["train_runtime"]


class _Report(TrainerCallback):
    """Pass steps and losses to a progress bar, and keep Trainer from printing them."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.advance(0, f"loss {float(logs['loss']):.3f}")

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(1)


def _evaluate(
    model: PreTrainedModel, tokenizer: GistTokenizer, task: LetterTask, seed: int, count: int
) -> dict[str, float]:
    accuracy = {}
    with progress_bar("   answering", 6 * count) as advance:
        for split in ("seen", "unseen"):
            results = evaluate(
                model,
                tokenizer,
                task.records(split, count, seed + 1),
                NUM_GIST_TOKENS,
                max_new_tokens=task.length + 3,
                batch_size=ANSWERS_AT_ONCE,
                with_rouge=False,
                progress=advance,
            )
            accuracy |= {f"{split}/{result.condition}": result.exact_match for result in results}
    return accuracy


def _print_accuracy(accuracy: dict[str, float], console: Console) -> None:
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
        f"   Compared with no cache, the gist saves {100 * (1 - gist.flops / none.flops):.0f} % of the FLOPs; compared "
        f"with prefix caching, {100 * (1 - gist.flops / prefix.flops):.0f} %, and "
        f"{100 * (1 - gist.cache_bytes / prefix.cache_bytes):.0f} % of the bytes kept for each prompt. At batch 1 "
        "and with a prompt this short, the gain is in bytes: the time is hardly different from prefix caching."
    )
