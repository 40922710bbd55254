"""The progress bar: on standard error, with the time that is left, and only where that is a terminal.

Place in the flow: below everything that takes long. Depends only on amounts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["phase_bars", "progress_bar", "tracked"]

_T = TypeVar("_T")


@contextmanager
def progress_bar(what: str, total: float) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs.

    Args:
        what: the text before the bar.
        total: how much there is to do, in any unit.

    Yields:
        A function to call with the amount done since its last call, and optionally a ``note`` to show after the bar.
    """
    console = Console(stderr=True, markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # Twice a second: drawing more often would take time from what is measured.
    quiet = {"transient": True, "refresh_per_second": 2, "disable": not console.is_terminal}
    with Progress(*columns, console=console, **quiet) as progress:
        bar = progress.add_task(what, total=total, note="")

        def advance(done: float, note: str | None = None) -> None:
            progress.advance(bar, done)
            if note is not None:
                progress.update(bar, note=note)

        yield advance


@contextmanager
def phase_bars(labels: Mapping[str, str]) -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar after another while the block runs, one for each phase of the work.

    Args:
        labels: the text before each phase's bar, by its name.

    Yields:
        A function to call with the name of a phase, the amount of it that is done so far, and how much there is to do.
    """
    phase, before, advance = "", 0, lambda done: None
    with ExitStack() as bars:

        def show(name: str, done: int, total: int) -> None:
            nonlocal phase, before, advance
            if name != phase:
                bars.close()
                phase, before, advance = name, 0, bars.enter_context(progress_bar(labels[name], total))
            advance(done - before)
            before = done

        yield show


def tracked(items: Iterable[_T], what: str) -> Iterator[_T]:
    """Yield the items one after another while a bar shows how many are done.

    Args:
        items: items of any kind; an iterable without a length is read into a list first.
        what: the text before the bar.
    """
    items = items if isinstance(items, Sized) else list(items)
    with progress_bar(what, len(items)) as advance:
        for item in items:
            yield item
            advance(1)
