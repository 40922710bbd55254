"""``gisting apply-difference``: recover a model that was published as a difference from its base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gisting.cli.shared import err, json_option, out, print_json
from gisting.measure.progress import progress_bar

__all__ = ["apply_difference"]


def apply_difference(
    difference: Annotated[
        str, typer.Argument(help="The weight difference: a directory, or a repository on the Hugging Face hub.")
    ],
    base: Annotated[str, typer.Option(help="The base model: a directory, or a repository on the Hugging Face hub.")],
    output: Annotated[Path, typer.Option(help="New directory for the checkpoint.")],
    dtype: Annotated[str, typer.Option(help="Type of the written weights: float32, bfloat16 or float16.")] = "float32",
    expected_sum: Annotated[
        float | None,
        typer.Option(help="The sum that all weights must have. By default the known sum of a published checkpoint."),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="How far the sum may be off.")] = 0.1,
    as_json: Annotated[bool, json_option("one object")] = False,
) -> None:
    """Add a weight difference to its base model, check the result and write it as a checkpoint.

    Example: gisting apply-difference jayelm/llama-7b-gist-1 --base llama-7b --output llama-7b-gist
    """
    from gisting.models.weight_difference import apply_weight_difference

    with _progress() as on_progress:
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
            "note: this is not one of the published differences and no sum is known for it, so the base model could "
            "not be checked; if the publisher of the difference gives a sum, use --expected-sum",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    with ExitStack() as stack:
        shown = 0
        advance: Callable[..., None] | None = None

        def report(done: int, total: int) -> None:
            nonlocal shown, advance
            advance = advance or stack.enter_context(progress_bar("adding", total))
            advance(done - shown)
            shown = done

        yield report
