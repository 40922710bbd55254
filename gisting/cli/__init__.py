"""The ``gisting`` command: parse, call one public function, print.

Exit codes: 0 for success; 1 for an error that a user can fix, which is reported in one line on standard error; 2 for
wrong usage; 130 for an interrupted command. A traceback is a bug in gisting.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from gisting._version import __version__
from gisting.cli import (
    bench,
    caches,
    chat,
    check,
    checkpoints,
    compare,
    cost,
    data,
    distill,
    doctor,
    evaluate,
    internalize,
    report,
    serve,
    show,
    train,
    trial,
)
from gisting.cli.shared import Commands, err, out, streams_put_back
from gisting.errors import GistError

__all__ = ["app", "main"]

# Modules that load torch models are imported by the command that needs them, so that `gisting --help` stays quick.

app = Commands(
    name="gisting",
    help="Press repeated prompts into a few cached gist tokens, for unmodified Hugging Face models.",
    epilog="Exit codes: 0 success, 1 an error reported in one line, 2 wrong usage, 130 interrupted.",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, and report errors that a user can fix in one line."""
    try:
        try:
            with streams_put_back():
                app(prog_name="gisting")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. Python would flush again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (GistError, OSError, ImportError, *_errors_of_libraries()) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        err.print(f"error: {' '.join(text.split())}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(1)


def _errors_of_libraries() -> list[Any]:
    """Errors of libraries that a user can fix and that are not subclasses of the errors above."""
    named = (("torch", "OutOfMemoryError"), ("safetensors", "SafetensorError"))
    return [getattr(sys.modules[module], name) for module, name in named if module in sys.modules]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(trial.demo)
app.command("try")(trial.try_prompt)
app.command()(train.train)
app.command()(internalize.internalize)
app.command()(report.report)
app.command()(cost.cost)
app.command()(caches.compress)
app.command()(distill.distill)
app.command()(caches.generate)
app.command()(chat.chat)
app.command()(compare.compare)
app.command()(check.check)
app.command("eval")(evaluate.evaluate)
app.command()(show.show)
app.command()(caches.inspect)
app.command()(checkpoints.apply_difference)
app.command(context_settings=serve.SERVE_SETTINGS)(serve.serve)
app.command()(doctor.doctor)
app.add_typer(caches.store_app, name="store")
app.add_typer(data.data_app, name="data")
app.add_typer(bench.bench_app, name="bench")
