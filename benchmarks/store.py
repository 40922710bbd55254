"""Measure a store of ten thousand prompts: how long it takes to fill, to open, and to return a random batch.

The states are random numbers in the shape of a model's, because their values change no time. A batch is returned in
three ways: from files that this process has not opened yet (though the system has read them before), from open caches,
and gathered from a table. Nothing is reported unless all three return the states that were put in.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.cells import spread_cell
from benchmarks.command import OutputOption, Rows, names, where
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import GistError
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.measure.rows import spread
from gisting.store import GistStore

__all__ = ["SHAPES", "StoreRow", "main", "measure", "store_table"]

#: Layers, key heads and head size of the tests' tiny model, and of one with about 100 million parameters.
SHAPES = {"tiny": (3, 2, 8), "small": (12, 4, 64)}
NUM_GIST_TOKENS = 4
BATCH_SIZE = 64
_PER_PUT = 1000
_ORIGIN = CacheOrigin("llama/000000000000", "000000000000", "plain", "gist")


@dataclass(frozen=True)
class StoreRow:
    """One shape of states, with median and quartiles of the times of a batch."""

    shape: str
    num_caches: int
    state_bytes: int  # of one prompt, in memory
    file_bytes: int  # of all files
    disk_bytes: int  # that the files and the index take on disk
    fill_s: float
    open_ms: float
    table_s: float  # to load all caches into a table
    files_ms: float
    files_ms_low: float
    files_ms_high: float
    open_caches_ms: float
    open_caches_ms_low: float
    open_caches_ms_high: float
    gather_ms: float
    gather_ms_low: float
    gather_ms_high: float
    num_repeats: int
    storage: str
    num_gist_tokens: int = NUM_GIST_TOKENS
    batch_size: int = BATCH_SIZE


def measure(
    shape: str, directory: Path, *, num_caches: int = 10_000, repeats: int = 50, storage: str | None = None
) -> StoreRow:
    """Fill a store and read random batches from it.

    Args:
        shape: one of ``SHAPES``.
        directory: directory of the store; it must not exist.
        num_caches: number of prompts.
        repeats: measured batches for each way.
        storage: as for :class:`gisting.store.GistStore`.

    Raises:
        GistError: a batch has other states than were put in, or the shape is unknown.
    """
    if shape not in SHAPES:
        raise GistError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    fill_s = 0.0
    with GistStore(directory, storage=storage) as store:
        for first in tracked(range(0, num_caches, _PER_PUT), "filling"):
            numbers = range(first, min(first + _PER_PUT, num_caches))
            named = {_name(number): _made(shape, number) for number in numbers}
            start = time.perf_counter()
            store.put_many(named)
            fill_s += time.perf_counter() - start
        entries = store.list()
    opened = [_timed(lambda: _opened(directory)) for _ in range(10)]
    store = _opened(directory)
    start = time.perf_counter()
    table = store.table()
    table_s = time.perf_counter() - start
    chance = random.Random(0)
    ways: dict[str, Callable[[list[str]], GistCache]] = {"open_caches": store.get, "gather": table.gather}
    times: dict[str, list[float]] = {"files": [], "open_caches": [], "gather": []}
    for number in tracked(range(repeats), "reading"):
        rows = chance.sample(range(num_caches), min(BATCH_SIZE, num_caches))
        names = [_name(row) for row in rows]
        with GistStore(directory) as fresh:
            for way, get in (("files", fresh.get), *ways.items()):
                if way == "open_caches":
                    get(names)  # opens them
                start = time.perf_counter()
                found = get(names)
                times[way].append(1000 * (time.perf_counter() - start))
                if number == 0:
                    _gate(way, found, GistCache.cat([_made(shape, row) for row in rows]), is_exact=storage is None)
    store.close()
    quartiles = {way: spread(found) for way, found in times.items()}
    held = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return StoreRow(
        shape=shape,
        num_caches=num_caches,
        state_bytes=_made(shape, 0).num_bytes,
        file_bytes=sum(entry.num_bytes for entry in entries),
        disk_bytes=sum(512 * state.st_blocks for state in held),
        fill_s=fill_s,
        open_ms=statistics.median(opened),
        table_s=table_s,
        files_ms=quartiles["files"][1],
        files_ms_low=quartiles["files"][0],
        files_ms_high=quartiles["files"][2],
        open_caches_ms=quartiles["open_caches"][1],
        open_caches_ms_low=quartiles["open_caches"][0],
        open_caches_ms_high=quartiles["open_caches"][2],
        gather_ms=quartiles["gather"][1],
        gather_ms_low=quartiles["gather"][0],
        gather_ms_high=quartiles["gather"][2],
        num_repeats=repeats,
        storage=entries[0].storage,
    )


def store_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown."""
    lines = [
        [
            f"{row['num_caches']:,}",
            f"{row['state_bytes'] / 1024:,.1f} KiB",
            row["storage"],
            f"{row['disk_bytes'] / 2**20:,.0f} MiB",
            f"{row['fill_s']:.1f} s",
            f"{row['open_ms']:.1f} ms",
            *(spread_cell(row, f"{way}_ms", 2) for way in ("files", "open_caches", "gather")),
        ]
        for row in rows
    ]
    ways = ("batch of 64: from files", "from open caches", "from a table")
    first = rows[0]
    text = [
        *markdown_table(("prompts", "states of one", "storage", "on disk", "fill", "open", *ways), lines),
        "",
        f"k = {first['num_gist_tokens']}, random batches by name, on the CPU; medians of {first['num_repeats']} in ms, "
        f"quartiles in brackets. The files had been read before, so they were in the system's memory "
        f"({where(first, 'threads', 'torch')}).",
    ]
    return "\n".join(text)


def _made(shape: str, number: int) -> GistCache:
    num_layers, num_heads, head_size = SHAPES[shape]
    generator = torch.Generator().manual_seed(number)
    states = torch.randn(2 * num_layers, 1, num_heads, NUM_GIST_TOKENS, head_size, generator=generator).unbind()
    return GistCache(states[:num_layers], states[num_layers:], torch.tensor([NUM_GIST_TOKENS]), _ORIGIN)


def _name(number: int) -> str:
    return f"prompt {number}"


def _opened(directory: Path) -> GistStore:
    store = GistStore(directory)
    len(store)
    return store


def _timed(run: Callable[[], GistStore]) -> float:
    start = time.perf_counter()
    store = run()
    elapsed = 1000 * (time.perf_counter() - start)
    store.close()
    return elapsed


def _gate(way: str, found: GistCache, expected: GistCache, *, is_exact: bool) -> None:
    for have, want in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
        # With few bits: an eighth of the largest number is allowed. That is twice the error of the coarsest storage,
        # float8_e4m3, which is a sixteenth of a number.
        allowed = 0.0 if is_exact else float(want.abs().max()) / 8
        if not float((have - want).abs().max()) <= allowed:
            raise GistError(f"{way}: the states differ from what was put in; no time is reported")


def main(
    output: OutputOption = None,
    shapes: Annotated[str | None, typer.Option(help=f"Some of {', '.join(SHAPES)}, comma-separated.")] = None,
    caches: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 10_000,
    repeats: Annotated[int, typer.Option(min=1, help="Measured batches for each way.")] = 50,
    storage: Annotated[str | None, typer.Option(help="How numbers are stored; by default without loss.")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where stores are made and removed; by default a temporary directory.")
    ] = None,
) -> None:
    """A store of ten thousand prompts: filling, opening, returning a batch.

    Example: python -m benchmarks store --output docs/results/store.jsonl
    """
    rows = Rows("store", output, "cpu")
    for shape in names("--shapes", shapes, tuple(SHAPES)):
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            rows.add([measure(shape, Path(folder) / "store", num_caches=caches, repeats=repeats, storage=storage)])
    rows.show(store_table)
