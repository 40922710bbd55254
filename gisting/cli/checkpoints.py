"""``gisting apply-difference`` and ``make-difference``: models published as what is added to their base model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gisting.cli.shared import err, json_option, out, print_json

__all__ = ["apply_difference", "make_difference"]

_BaseOption = Annotated[str, typer.Option(help="The base model: a directory, or a repository on the Hugging Face hub.")]
_JsonOption = Annotated[bool, json_option("one object")]


def apply_difference(
    difference: Annotated[
        str, typer.Argument(help="The weight difference: a directory, or a repository on the Hugging Face hub.")
    ],
    base: _BaseOption,
    output: Annotated[Path, typer.Option(help="New directory for the checkpoint.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the written weights: float32, bfloat16 or float16. By default as the difference says, or "
            "float32."
        ),
    ] = None,
    expected_sum: Annotated[
        float | None,
        typer.Option(help="What all weights must sum up to. By default what is known of published checkpoints."),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="How far the sum may be off.")] = 0.1,
    as_json: _JsonOption = False,
) -> None:
    """Add a weight difference to its base model, and check and write the checkpoint that comes out.

    Example: gisting apply-difference jayelm/llama-7b-gist-1 --base llama-7b --output llama-7b-gist
    """
    from gisting.models.weight_difference import apply_weight_difference

    with _progress("adding") as on_progress:
        found = apply_weight_difference(
            difference,
            base,
            output,
            dtype=dtype,
            expected_sum=expected_sum,
            tolerance=tolerance,
            on_progress=on_progress,
        )
    if as_json:
        print_json({**asdict(found), "directory": str(found.directory)})
    else:
        out.print(
            f"{found.directory}: {found.num_parameters:,} parameters in {found.dtype}, with the sum "
            f"{found.weight_sum:.4f}",
            highlight=False,
            soft_wrap=True,
        )
    if found.expected_sum is None:
        err.print(
            "note: no sum is known for this difference, and it is none of the published ones, so whether this was the "
            "right base model is not known; if the maker of the difference gave a sum, use --expected-sum",
            highlight=False,
            soft_wrap=True,
        )


def make_difference(
    model: Annotated[str, typer.Argument(help="The trained model: a directory, or a repository on the hub.")],
    base: _BaseOption,
    output: Annotated[Path, typer.Option(help="New directory for the difference.")],
    base_name: Annotated[
        str | None, typer.Option(help="What the difference calls the base model. By default its name on the hub.")
    ] = None,
    as_json: _JsonOption = False,
) -> None:
    """Write what has to be added to a base model to get a trained one, to publish it without the base model's weights.

    Example: gisting make-difference runs/mine --base llama-7b --output mine-difference
    """
    from gisting.models.weight_difference import make_weight_difference

    with _progress("subtracting") as on_progress:
        found = make_weight_difference(model, base, output, base_name=base_name, on_progress=on_progress)
    if as_json:
        print_json({**asdict(found), "directory": str(output)})
    else:
        out.print(
            f"{output}: to be added to {found.base or 'its base model'}; the sum of the weights that come out is "
            f"{found.weight_sum:.4f}, {found.num_inexact:,} of them rounded",
            highlight=False,
            soft_wrap=True,
        )


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)
