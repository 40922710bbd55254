"""``gisting bench``: what is measured on the device at hand."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gisting.cli.shared import (
    Commands,
    DeviceOption,
    device_errors,
    json_option,
    load_patched,
    out,
    print_json,
    read_dtype,
)
from gisting.errors import GistError

__all__ = ["bench_app"]

bench_app = Commands(name="bench", help="Measure time and memory on the device at hand.")

_HIDDEN_SIZE, _LAYERS = 640, 12  # of the random model

OutputOption = Annotated[
    Path | None, typer.Option(help="JSONL file to which the rows are added, each with device, versions and commit.")
]
PlotOption = Annotated[
    Path | None, typer.Option(help="Image of the results, such as rows.png; needs matplotlib (gist-tokens[eval]).")
]


@bench_app.callback()
def _bench() -> None:
    pass


@bench_app.command("inference")
def bench_inference(
    model: Annotated[
        str | None,
        typer.Option(help="A decoder: directory or repository on the hub. By default a LLaMA with random weights."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompt, with commas between.")] = "26,128,512,2000,8000",
    batches: Annotated[str, typer.Option(help="Requests at once, with commas between.")] = "1,8,32",
    num_gist_tokens: Annotated[int, typer.Option("--num-gist-tokens", "-k", min=1, help="Gist tokens.")] = 4,
    input_length: Annotated[int, typer.Option(min=1, help="Tokens of a request behind the prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="The most runs of each kind.")] = 30,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="How long each kind of run may take in all; 5 runs are made anyway, of slow ones 3."),
    ] = 8.0,
    max_seconds: Annotated[float, typer.Option(help="A single run that would take longer is left out.")] = 25.0,
    max_memory: Annotated[
        float | None, typer.Option(help="GB; what would need more is left out. By default 70 % of what is free.")
    ] = None,
    hidden_size: Annotated[int, typer.Option(min=64, help="Of the random model: a multiple of 64.")] = _HIDDEN_SIZE,
    layers: Annotated[int, typer.Option(min=1, help="Of the random model.")] = _LAYERS,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16, float16.")] = "float32",
    output: OutputOption = None,
    plot: PlotOption = None,
    as_json: Annotated[bool, json_option("an object for each length, batch and way to answer")] = False,
) -> None:
    """Time requests that share a prompt: no cache, prefix cache, static prefix cache, gist cache.

    All four run in turn in one process with stock transformers: one forward pass to the first token, and greedy
    generate for tokens a second. Logits of all caches must be those without a cache, or nothing is reported. Caches are
    handed over without a copy, and the growing ones once more with the copy that transformers' recipe makes. What would
    take too long or too much memory is left out, and the table says so. By default a LLaMA with about 100 million
    random weights, for work does not depend on their values; on two CPU cores all of it takes some thirty minutes.

    Example: gisting bench inference --lengths 26,512 --batches 1,8
    """
    from gisting.measure import inference
    from gisting.measure.progress import progress_bar
    from gisting.measure.rows import append_row, environment
    from gisting.models.weights import input_weight

    if model is not None and (hidden_size, layers) != (_HIDDEN_SIZE, _LAYERS):
        raise GistError("--hidden-size and --layers are the random model's; leave them out beside --model")
    for name, value in (("max-memory", max_memory), ("seconds", seconds), ("max-seconds", max_seconds)):
        if value is not None and not (math.isfinite(value) and (value > 0 or name == "seconds")):
            raise GistError(f"--{name} must be a finite number above 0, got {value}")
    wanted = {"lengths": _numbers("lengths", lengths), "batches": _numbers("batches", batches)}
    if plot is not None:
        _check_plot(plot)
    weights_dtype = read_dtype(dtype)
    if model is None:
        import torch

        with device_errors(device):
            place = torch.empty(0, device=device).device
        loaded, tokenizer = inference.random_llama(hidden_size, layers, device=place, dtype=weights_dtype)
        name = f"random LLaMA of {layers} layers, hidden size {hidden_size}"
    else:
        loaded, tokenizer = load_patched(model, None, dtype, device, is_to_be_trained=True)
        name = Path(model).name
    found = inference.measure(
        loaded,
        tokenizer,
        **wanted,
        num_gist_tokens=num_gist_tokens,
        input_tokens=input_length,
        answer_tokens=new_tokens,
        repeats=repeats,
        seconds=seconds,
        max_seconds=max_seconds,
        max_bytes=None if max_memory is None else int(max_memory * 1e9),
        name=name,
    )
    rows, run, used = [], secrets.token_hex(4), input_weight(loaded).device
    # A cell takes longer with more tokens, though not in proportion: most of its time is limited.
    total = sum(_weight(length, batch) for length in wanted["lengths"] for batch in wanted["batches"])
    with progress_bar("measuring", total) as advance:
        for cell in found:
            rows += [asdict(row) for row in cell]
            if output is not None:
                for row in cell:
                    append_row(output, {"command": "gisting bench inference", "run": run, **asdict(row)}, used)
            advance(_weight(cell[0].prompt_tokens, cell[0].batch_size))
    rows = [{**row, **environment(used)} for row in rows]
    _show(rows, inference.result_tables(rows), as_json)
    if plot is not None:
        inference.plot(rows, plot)


@bench_app.command("training")
def bench_training(
    prompt_tokens: Annotated[str, typer.Option(help="Tokens of a prompt, with commas between.")] = "16,64,256",
    per_prompt: Annotated[str, typer.Option(help="Completions of a prompt, with commas between.")] = "1,8",
    completions: Annotated[int, typer.Option(min=1, help="Completions of a step.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured steps of each layout.")] = 30,
    output: OutputOption = None,
    plot: PlotOption = None,
    as_json: Annotated[bool, json_option("an object for each layout and length")] = False,
) -> None:
    """Time training steps: a padded row for each completion, rows packed, and packed behind shared prompts.

    Whole optimiser steps of the built-in task's model on the CPU, in turn in one process. Loss and gradients of all
    layouts must be the same, or nothing is reported.

    Example: gisting bench training --prompt-tokens 64 --per-prompt 8
    """
    from benchmarks import training
    from gisting.measure.rows import append_row, environment

    lengths, shared = _numbers("prompt-tokens", prompt_tokens), _numbers("per-prompt", per_prompt)
    if plot is not None:
        _check_plot(plot)
    rows = [asdict(row) for row in training.measure_all(lengths, shared, completions, repeats)]
    if output is not None:
        for row in rows:
            append_row(output, {"command": "gisting bench training", **row}, "cpu")
    rows = [{**row, **environment("cpu")} for row in rows]
    _show(rows, [training.result_table(rows)], as_json)
    if plot is not None:
        training.plot(rows, plot)


def _numbers(name: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise GistError(
            f"--{name} must be whole numbers of at least 1 with commas between, such as 26,512, got {text!r}"
        )
    return found


def _weight(length: int, batch: int) -> float:
    return (length * batch) ** 0.5


def _check_plot(path: Path) -> None:
    """Before hours of measuring, not behind them."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise GistError("--plot needs matplotlib; pip install 'gist-tokens[eval]'") from error
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise GistError(f"--plot must end with a kind of image, such as .png, got {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise GistError(f"--plot: there is no directory {path.parent}; make it first")


def _show(rows: list[dict[str, Any]], tables: list[tuple[str, list[str], list[list[str]]]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print_json(row)
        return
    for title, columns, lines in tables:
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for line in lines:
            table.add_row(*line)
        out.print(table)
