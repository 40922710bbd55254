"""Progress bars of the benchmarks: with the time that is left, on standard error, and only where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["progress_bar", "tracked"]

_T = TypeVar("_T")


@contextmanager
def progress_bar(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar for the time of the block.

    Args:
        what: stands in front of it.
        total: how much there is to do, in any unit.

    Yields:
        A function that is told how much has been done since it was last called.
    """
    console = Console(stderr=True, markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Drawn twice a second: more would take time from what is measured.
    quiet = {"transient": True, "refresh_per_second": 2, "disable": not console.is_terminal}
    with Progress(*columns, console=console, **quiet) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda done: progress.advance(bar, done)


def tracked(items: Iterable[_T], what: str) -> Iterator[_T]:
    """The items in turn, a bar beside them."""
    items = items if isinstance(items, Sized) else list(items)
    with progress_bar(what, len(items)) as advance:
        for item in items:
            yield item
            advance(1)
