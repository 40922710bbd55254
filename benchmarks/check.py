"""Measure how long ``gisting.check_model`` takes: on a checkpoint, and on random models of 1 and 8 billion parameters.

Place in the flow: ``gisting.models.check`` -> **check** -> rows and a table. A first check in a process also loads the
kernels of the device; the others are what a second model of the same kind takes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import gisting
from benchmarks.cells import spread_cell
from benchmarks.command import OutputOption, Rows, names, say
from gisting.markdown import markdown_table
from gisting.measure.latency import wait
from gisting.measure.rows import spread

__all__ = ["SIZES", "CheckRow", "check_table", "main", "measure"]

#: Sizes of the random models, those of Llama 3.2 1B and Llama 3.1 8B.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}


@dataclass(frozen=True)
class CheckRow:
    """How long the check of one model takes; low and high are quartiles of the repeats after the first.

    ``cpu_seconds`` is the time of this process on all cores, the median too.
    """

    model: str
    parameters: int
    dtype: str
    is_right: bool
    failed: str
    first_seconds: float
    seconds: float
    seconds_low: float
    seconds_high: float
    cpu_seconds: float
    repeats: int


def measure(model: PreTrainedModel, name: str, repeats: int) -> CheckRow:
    """Check a model several times, each time from the start."""
    device = model.get_input_embeddings().weight.device
    seconds, on_cpu = [], []
    for _ in range(repeats + 1):
        wait(cast(torch.device, device))
        start, start_on_cpu = time.perf_counter(), time.process_time()
        failed = gisting.check_model(model).failed
        wait(cast(torch.device, device))
        seconds.append(time.perf_counter() - start)
        on_cpu.append(time.process_time() - start_on_cpu)
    low, median, high = spread(seconds[1:])
    return CheckRow(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        is_right=failed is None,
        failed="" if failed is None else str(failed),
        first_seconds=seconds[0],
        seconds=median,
        seconds_low=low,
        seconds_high=high,
        cpu_seconds=spread(on_cpu[1:])[1],
        repeats=repeats,
    )


def check_table(rows: Sequence[dict[str, Any]]) -> str:
    """Make the table of times, as Markdown."""
    cells = [
        (
            row["model"],
            f"{row['parameters'] / 1e9:.2f}",
            row["dtype"],
            f"{row['device']}, {row['threads']} threads" if "CPU" in row["device"] else row["device"],
            f"{row['first_seconds']:.2f}",
            spread_cell(row, "seconds", 2),
            f"{row['cpu_seconds']:.2f}",
            "passed" if row["is_right"] else "failed",
        )
        for row in rows
    ]
    header = (
        "model",
        "10⁹ parameters",
        "weights",
        "device",
        "first check, s",
        "next checks, s",
        "CPU time, s",
        "check",
    )
    return "\n".join(markdown_table(header, cells))


def main(
    output: OutputOption = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Directory of a checkpoint to check first.")] = None,
    sizes: Annotated[str, typer.Option(help="Random models, separated by commas; '' for none.")] = "1b",
    dtypes: Annotated[str, typer.Option(help="Weights of the checkpoint: bfloat16, float32.")] = "bfloat16",
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="By default the GPU if there is one.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Checks after the first.")] = 5,
) -> None:
    """Measure how long the check of a model takes.

    The rows of the page: python -m benchmarks check --checkpoint DIRECTORY --dtypes bfloat16,float32 --output
    docs/results/check.jsonl; on a GPU with --sizes 1b,8b.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = Rows("check", output, place)

    def add(model: PreTrainedModel, name: str) -> None:
        row = measure(model.eval(), name, repeats)
        say(f"{row.model}, {row.dtype}: {row.seconds:.2f} s, the first {row.first_seconds:.2f} s {row.failed}".rstrip())
        rows.add([row])

    if checkpoint is not None:
        for dtype in names("--dtypes", dtypes, ("bfloat16", "float32", "float16")):
            loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
            add(loaded.to(place), checkpoint.name)
    for size in names("--sizes", sizes, list(SIZES)) if sizes else ():
        torch.manual_seed(0)
        with torch.device(place):
            config = LlamaConfig(max_position_embeddings=32_768, **SIZES[size])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        add(model, f"random {size.upper()}")
    rows.show(check_table)
