"""``gisting bench``: measure a model of your own on this device."""

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

bench_app = Commands(name="bench", help="Measure time and memory on this device.")

_HIDDEN_SIZE, _LAYERS = 640, 12  # of the model with random weights

OutputOption = Annotated[
    Path | None, typer.Option(help="JSONL file to append the rows to, with device, versions and commit.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option(help="Image file for a plot of the results, such as rows.png; needs matplotlib (gist-tokens[eval])."),
]


@bench_app.callback()
def _bench() -> None:
    pass


@bench_app.command("inference")
def bench_inference(
    model: Annotated[
        str | None,
        typer.Option(help="A decoder: a directory or a repository on the hub. By default a LLaMA with random weights."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompt, as comma-separated numbers.")
    ] = "26,128,512,2000,8000",
    batches: Annotated[str, typer.Option(help="Concurrent requests, as comma-separated numbers.")] = "1,8,32",
    num_gist_tokens: Annotated[int, typer.Option("--num-gist-tokens", "-k", min=1, help="Gist tokens.")] = 4,
    input_length: Annotated[int, typer.Option(min=1, help="Tokens of a request after the prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Maximum number of runs of each kind.")] = 30,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="Total seconds for each kind of run; at least 5 runs are made, or 3 slow ones."),
    ] = 8.0,
    max_seconds: Annotated[float, typer.Option(help="Skip a run that would take more seconds than this.")] = 25.0,
    max_memory: Annotated[
        float | None, typer.Option(help="Skip what would need more GB than this. By default 70 % of the free memory.")
    ] = None,
    hidden_size: Annotated[
        int, typer.Option(min=64, help="Width of the random model, a multiple of 64.")
    ] = _HIDDEN_SIZE,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the random model.")] = _LAYERS,
    device: DeviceOption = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Floating point type of the weights: float32, bfloat16, float16.")
    ] = "float32",
    output: OutputOption = None,
    plot: PlotOption = None,
    as_json: Annotated[bool, json_option("an object for each length, batch and way to answer")] = False,
) -> None:
    """Time requests that share a prompt: no cache, prefix cache, static prefix cache, gist cache.

    All four alternate in one process with stock transformers: one forward pass to the first token, and greedy generate
    for tokens per second. Nothing is reported unless the logits with every cache equal those without a cache. Caches
    are passed to the model without a copy; growing caches are also timed with the copy that transformers' recipe makes.
    Runs that would take too long or too much memory are left out, and the table says so. The default model is a LLaMA
    with about 100 million random weights, because the work does not depend on their values; the whole run takes about
    thirty minutes on two CPU cores.

    Example: gisting bench inference --lengths 26,512 --batches 1,8
    """
    from gisting.measure import inference, inference_results
    from gisting.measure.models import random_llama
    from gisting.measure.progress import progress_bar
    from gisting.measure.rows import append_row, environment
    from gisting.models.weights import input_weight

    if model is not None and (hidden_size, layers) != (_HIDDEN_SIZE, _LAYERS):
        raise GistError("--hidden-size and --layers are for the random model; leave them out with --model")
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
        loaded, tokenizer = random_llama(hidden_size, layers, device=place, dtype=weights_dtype)
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
    # A cell with more tokens takes longer, but not in proportion, because most of its time is limited.
    total = sum(_weight(length, batch) for length in wanted["lengths"] for batch in wanted["batches"])
    with progress_bar("measuring", total) as advance:
        for cell in found:
            rows += [asdict(row) for row in cell]
            if output is not None:
                for row in cell:
                    append_row(output, {"command": "gisting bench inference", "run": run, **asdict(row)}, used)
            advance(_weight(cell[0].prompt_tokens, cell[0].batch_size))
    rows = [{**row, **environment(used)} for row in rows]
    _show(rows, inference_results.narrow_tables(rows), as_json)
    if plot is not None:
        inference_results.plot(rows, plot)


@bench_app.command("training", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_training() -> None:
    """Say where this command went; to be removed in the next release."""
    raise GistError(
        "gisting bench training is not part of the package any more; in a checkout of its repository, run: python -m "
        "benchmarks training, with the same options"
    )


def _numbers(name: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise GistError(f"--{name} must be comma-separated whole numbers of at least 1, such as 26,512, got {text!r}")
    return found


def _weight(length: int, batch: int) -> float:
    return (length * batch) ** 0.5


def _check_plot(path: Path) -> None:
    """Check the path before hours of measuring, not after them."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise GistError("--plot needs matplotlib; pip install 'gist-tokens[eval]'") from error
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise GistError(f"--plot must have the suffix of an image, such as .png, got {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise GistError(f"--plot: there is no directory {path.parent}; create it first")


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
            if line[0]:
                table.add_section()
            table.add_row(*line)
        out.print(table)
