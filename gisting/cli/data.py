"""``gisting data``: training data, made from public sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gisting.cli.shared import Commands, json_option, out, print_json
from gisting.data.alpaca_plus import SIZES, SOURCES, alpaca_plus, read_source, save_splits
from gisting.errors import GistError

__all__ = ["data_app"]

data_app = Commands(name="data", help="Make training data from public sources.")


@data_app.callback()
def _data() -> None:
    pass


@data_app.command("alpaca-plus")
def data_alpaca_plus(
    output: Annotated[Path, typer.Option(help="Directory for the four files.")],
    alpaca: Annotated[str, typer.Option(help="Stanford Alpaca: a path or an address.")] = SOURCES["alpaca"],
    self_instruct: Annotated[str, typer.Option(help="Self-Instruct, generated.")] = SOURCES["self_instruct"],
    human: Annotated[str, typer.Option(help="Self-Instruct, written by people.")] = SOURCES["human"],
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Write splits that have other sizes than the published ones.")
    ] = False,
    as_json: Annotated[bool, json_option("an object for each split")] = False,
) -> None:
    """Rebuild Alpaca+, the data of the Gisting paper, from its three sources, and check the sizes of its splits.

    The data are under Alpaca's licence (CC BY-NC 4.0): research only.

    Example: gisting data alpaca-plus --output data --alpaca alpaca_data.json
    """
    splits = alpaca_plus(read_source(alpaca), read_source(self_instruct), read_source(human))
    sizes = {name: len(records) for name, records in splits.items()}
    if sizes != SIZES and not any_size:
        found = ", ".join(f"{name} {size:,} (published {SIZES[name]:,})" for name, size in sizes.items())
        raise GistError(
            f"the splits have other sizes than the published ones: {found}; take the sources at the named "
            "commits, or write them all the same: --any-size"
        )
    table = Table("split", "records", "file")
    for name, path in save_splits(splits, output).items():
        if as_json:
            print_json({"split": name, "num_records": sizes[name], "file": str(path)})
        else:
            table.add_row(name, f"{sizes[name]:,}", str(path))
    if not as_json:
        out.print(table)
