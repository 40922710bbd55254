"""``gisting doctor``: examine this environment, or check that a checkpoint, a store or a cache file is intact."""

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
        typer.Argument(help="What to examine: a checkpoint (directory or repository on the hub), a store, or a cache."),
    ] = None,
    as_json: Annotated[bool, json_option("an object for each finding, with topic, name, value and is_fault")] = False,
) -> None:
    """Show what works here: versions, optional packages, devices, which attention would run and why.

    A version that is too old is a fault; one that is newer than the newest tested one is noted.

    With a path, show what is there, whether it is intact, whether a model of its family can be gisted, and its gist
    token, template and k. The exit code is 1 if something is broken.

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
                mark = "BROKEN: " if finding.is_fault else ""
                table.add_row(f"  {plain(finding.name)}", mark + plain(finding.value), style="red" if mark else None)
        out.print(table)
    num_faults = sum(finding.is_fault for finding in findings)
    if num_faults:
        where = "here" if path is None else f"in {path}"
        raise GistError(f"{num_faults} of {len(findings)} findings {where} are faults")
