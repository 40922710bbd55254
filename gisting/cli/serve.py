"""``gisting serve``: print the vLLM command line and run it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gisting.cli.shared import ModelArgument, out

__all__ = ["SERVE_SETTINGS", "serve"]

#: For ``app.command``: options that are not defined here are passed on to vLLM.
SERVE_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: ModelArgument,
    store: Annotated[Path, typer.Option(help="Directory of the store whose gists requests may name.")],
    max_bytes: Annotated[
        int | None, typer.Option(min=0, help="Memory for loaded gists in each worker. By default 256 MiB.")
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(help="The checkpoint's fingerprint, from its card. By default it is computed from the weights."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command line and stop.")] = False,
) -> None:
    """Serve a checkpoint and its gists with vLLM, over the OpenAI-compatible routes.

    All other options are passed on to `vllm serve`.

    Example: gisting serve runs/demo --store gists --port 8001 --max-model-len 4096

    Example: gisting serve runs/demo --store gists --dry-run
    """
    from gisting.serving.command import require_vllm, serve_command, served_fingerprints

    def command(known: str | Sequence[str] | None) -> list[str]:
        return serve_command(model, store, max_bytes=max_bytes, fingerprint=known, others=context.args)

    words = command(fingerprint)  # checks them before the weights are read
    if fingerprint is None:
        words = command(served_fingerprints(model, context.args))
    out.print(shlex.join(words), highlight=False, soft_wrap=True)
    if not dry_run:
        require_vllm()
        os.execvp(words[0], words)
