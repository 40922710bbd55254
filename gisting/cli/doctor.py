"""``gisting doctor``: what works here, and whether a checkpoint, a store or a cache file is whole."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer
from rich.table import Table

from gisting.cli.shared import json_option, out, plain, print_json
from gisting.errors import GistError

__all__ = ["doctor"]


def doctor(
    path: Annotated[
        str | None,
        typer.Argument(help="A checkpoint (directory or repository on the hub), a store or a cache file to examine."),
    ] = None,
    as_json: Annotated[bool, json_option("an object for each finding, with topic, name, value and is_fault")] = False,
) -> None:
    """Say what works here: versions, optional packages, devices, which attention would run and why.

    A version below its floor is a fault; one that is newer than the newest that was tested is noted.

    With a path: what lies there, whether it is whole, whether a model of its family can be gisted, its gist token,
    template and k. Exit code 1 where something is broken.

    Example: gisting doctor

    Example: gisting doctor runs/demo
    """
    from gisting.doctor import examine_here, examine_path

    findings = examine_here() if path is None else examine_path(path)
    if as_json:
        for finding in findings:
            print_json(asdict(finding))
    else:
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for topic, group in groupby(findings, lambda finding: finding.topic):
            table.add_section()
            table.add_row(topic, "", style="bold")
            for finding in group:
                sign = "BROKEN: " if finding.is_fault else ""
                table.add_row(f"  {plain(finding.name)}", sign + plain(finding.value), style="red" if sign else None)
        out.print(table)
    num_faults = sum(finding.is_fault for finding in findings)
    if num_faults:
        where = "here" if path is None else f"in {path}"
        raise GistError(f"{num_faults} of {len(findings)} findings {where} are faults")
