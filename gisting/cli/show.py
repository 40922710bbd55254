"""``gisting show``: draw a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gisting.cli.shared import json_option, print_json
from gisting.errors import GistError

__all__ = ["show"]


def show(
    prompt: Annotated[str, typer.Argument(help="Words before the gist.")] = "a b c",
    input: Annotated[str, typer.Argument(help="Words after it.")] = "d e",
    num_gist_tokens: Annotated[
        int, typer.Option("--num-gist-tokens", "-k", min=1, help="Gist tokens between them.")
    ] = 2,
    condition: Annotated[str, typer.Option(help="gist, positive or negative.")] = "gist",
    encoder: Annotated[
        bool, typer.Option("--encoder", help="The mask of an encoder (T5) instead of a decoder.")
    ] = False,
    window: Annotated[int | None, typer.Option(min=1, help="Sliding window of this many rows.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw it to this file.")] = None,
    as_json: Annotated[bool, json_option("one object, with labels, positions and the mask row by row")] = False,
) -> None:
    """Draw a mask: 1 where a row sees a key. Each word stands for a token.

    Example: gisting show 'translate to French' 'good morning' -k 2
    """
    import torch

    from gisting.visibility import CONDITIONS, ENCODER_CONDITIONS, Condition

    table: dict[str, Condition] = ENCODER_CONDITIONS if encoder else CONDITIONS
    if condition not in table:
        raise GistError(f"condition must be one of {', '.join(table)}, got {condition!r}")
    before, after = prompt.split(), input.split()
    labels = [*before, *["<G>"] * num_gist_tokens, *after]
    is_gist = torch.tensor([[len(before) <= j < len(before) + num_gist_tokens for j in range(len(labels))]])
    visibility = table[condition](is_gist)
    if window is not None:
        visibility = visibility.windowed(window)
    positions = None if visibility.position_ids is None else visibility.position_ids[0].tolist()
    if as_json:
        mask = visibility.to_dense()[0].int().tolist()
        print_json({"labels": labels, "position_ids": positions, "mask": mask})
    else:
        print(visibility.draw(labels))
        if positions is not None:
            print("positions " + " ".join(map(str, positions)))
    if png is not None:
        visibility.save_drawing(png, labels)
        print(f"saved in {png}")
