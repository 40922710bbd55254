"""The ``gisting`` command: parse, call one public function, print. Errors that a user can mend are one line and exit
code 1.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gisting._version import __version__
from gisting.cli import caches, checkpoints, cost, data, internalize, learn, report, serve
from gisting.cli.shared import err, out
from gisting.errors import GistError

__all__ = ["app", "main"]

# What needs torch models is imported by the command that runs it: `gisting --help` and `gisting show` stay quick.

app = typer.Typer(
    name="gisting",
    help="Press repeated prompts into a few cached gist tokens, for unmodified Hugging Face models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: run the command, and turn the errors that a user can mend into one line."""
    try:
        app()
    except (GistError, OSError, ImportError) as error:
        err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(1)


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


app.command()(learn.demo)
app.command()(learn.train)
app.command()(internalize.internalize)
app.command()(report.report)
app.command()(cost.cost)
app.command()(caches.compress)
app.command()(caches.generate)
app.command("eval")(learn.evaluate)
app.command()(learn.show)
app.command()(caches.inspect)
app.command()(checkpoints.apply_difference)
app.command()(checkpoints.make_difference)
app.command(context_settings=serve.SERVE_SETTINGS)(serve.serve)
app.add_typer(caches.store_app, name="store")
app.add_typer(data.data_app, name="data")
