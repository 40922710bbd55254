"""``gisting data``: prepare training data from public sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gisting.cli.shared import Commands, json_option, out, print_json
from gisting.data.alpaca_plus import SIZES, SOURCES, alpaca_plus, read_source, save_splits
from gisting.errors import GistError

__all__ = ["data_app"]

data_app = Commands(name="data", help="Prepare training data from public sources.")


@data_app.callback()
def _data() -> None:
    pass


@data_app.command("alpaca-plus")
def data_alpaca_plus(
    output: Annotated[Path, typer.Option(help="Directory to write the four files to.")],
    alpaca: Annotated[str, typer.Option(help="Stanford Alpaca: a path or a URL.")] = SOURCES["alpaca"],
    self_instruct: Annotated[str, typer.Option(help="Self-Instruct, generated: a path or a URL.")] = SOURCES[
        "self_instruct"
    ],
    human: Annotated[str, typer.Option(help="Self-Instruct, human-written tasks: a path or a URL.")] = SOURCES["human"],
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Write the splits even if their sizes differ from the published ones.")
    ] = False,
    as_json: Annotated[bool, json_option("an object per split")] = False,
) -> None:
    """Rebuild Alpaca+, the data of the Gisting paper, from its three sources, and check the sizes of its splits.

    The data are licensed for research only (Alpaca's CC BY-NC 4.0).

    Example: gisting data alpaca-plus --output data --alpaca alpaca_data.json
    """
    splits = alpaca_plus(read_source(alpaca), read_source(self_instruct), read_source(human))
    sizes = {name: len(records) for name, records in splits.items()}
    if sizes != SIZES and not any_size:
        found = ", ".join(f"{name} {size:,} (published {SIZES[name]:,})" for name, size in sizes.items())
        raise GistError(
            f"the sizes of the splits differ from the published ones: {found}; use the sources at the commits of the "
            "paper (the defaults), or pass --any-size to write these splits anyway"
        )
    table = Table("split", "records", "file")
    for name, path in save_splits(splits, output).items():
        if as_json:
            print_json({"split": name, "num_records": sizes[name], "file": str(path)})
        else:
            table.add_row(name, f"{sizes[name]:,}", str(path))
    if not as_json:
        out.print(table)
