"""What the commands share: options, lists given with commas, and rows that are written as soon as they are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gisting.measure.rows import append_row, environment

__all__ = [
    "CheckpointsOption",
    "OutputOption",
    "RecordsOption",
    "Rows",
    "SeedOption",
    "names",
    "numbers",
    "part_of",
    "say",
    "where",
]

OutputOption = Annotated[Path | None, typer.Option(help="JSONL file to append the rows to.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the weights and the data.")]
CheckpointsOption = Annotated[Path, typer.Option(help="Directory for the trained models.")]
RecordsOption = Annotated[int, typer.Option(min=1, help="Records to evaluate on, for each split.")]


class Rows:
    """The rows of one run, each written to ``output`` when it is added.

    Args:
        name: name of the benchmark, for the rows' ``command``.
        output: a JSONL file, or None.
        device: the measured device, as for :func:`gisting.measure.rows.environment`.
    """

    def __init__(self, name: str, output: Path | None, device: str | None = None) -> None:
        self.command = f"python -m benchmarks {name}"
        self.output, self.device = output, device
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: Iterable[Any]) -> None:
        """Add rows, which are dataclass instances or dictionaries."""
        for found in rows:
            row = {"command": self.command, **(asdict(found) if is_dataclass(found) else found)}  # pyright: ignore[reportArgumentType]
            if self.output is not None:
                append_row(self.output, row, self.device)
            self.rows.append({**row, **environment(self.device)})

    def show(self, *tables: Callable[[list[dict[str, Any]]], str]) -> None:
        """Print the tables of the rows, as Markdown."""
        for table in tables if self.rows else ():
            print(table(self.rows), end="\n\n")


def say(what: str) -> None:
    """Print a line at once."""
    print(what, flush=True)


def numbers(option: str, text: str) -> list[int]:
    """Read comma-separated whole numbers, such as ``0,1,2``.

    Raises:
        typer.BadParameter: the text of ``option`` is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} must be comma-separated whole numbers, got {text!r}") from None


def part_of(text: str) -> tuple[int, int]:
    """Read which part of the work a process takes, such as ``2/5``: the second of five.

    Args:
        text: the number of the part, from 1, and how many there are.

    Raises:
        typer.BadParameter: it is something else.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise typer.BadParameter(
            f"--part must be the number of a part and how many there are, such as 2/5, got {text!r}"
        )
    return int(number), int(count)


def names(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """Read names separated by semicolons or commas; None means all known names.

    Raises:
        typer.BadParameter: a name in the text of ``option`` is not known.
    """
    if text is None:
        return list(known)
    found = [part.strip() for part in text.split(";" if any("," in one for one in known) else ",")]
    if unknown := [name for name in found if name not in known]:
        raise typer.BadParameter(f"{option} must be names of {', '.join(known)}, got {unknown[0]!r}")
    return found


def where(row: Mapping[str, Any], *columns: str) -> str:
    """Describe for a caption what a row was measured on, such as ``2 CPU cores, x86_64, 2 threads, torch 2.13``.

    Args:
        row: a measured row.
        columns: what to say besides the device; by default threads, torch and transformers.
    """
    parts = [
        f"{row[name]} threads" if name == "threads" else f"{name} {row[name]}"
        for name in columns or ("threads", "torch", "transformers")
    ]
    return ", ".join([row["device"], *parts])
