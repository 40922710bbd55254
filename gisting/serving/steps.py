"""What the scheduler side of the connector passes to the worker side for one step, and what both of them count.

Place in the flow: :mod:`gisting.serving.scheduler` -> **steps** -> :mod:`gisting.serving.worker`. Plain data that is
pickled between processes. Imports no server.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gisting.store.index import StoreEntry

__all__ = ["COUNTERS", "Load", "Step"]

#: Name and help text of each counter.
COUNTERS = {
    "requests": "Requests that name a gist and were accepted",
    "refused": "Requests that the engine refused because they do not fit the gist that they name",
    "hits": "Gists that were in memory when they were needed",
    "loads": "Gists that were read from the store",
    "failed": "Gists that could not be read when they were needed",
    "bytes": "Bytes of keys and values written into the paged cache",
    "tokens": "Gist tokens whose keys and values were written into the paged cache",
}


@dataclass(frozen=True)
class Load:
    """States to write before a step: positions ``first .. entry.num_gist_tokens - 1`` of a request.

    Args:
        entry: the gist.
        first: the first position to write.
        block_ids: the blocks of the paged cache that hold the gist, in order.
    """

    entry: StoreEntry
    first: int
    block_ids: list[int]


@dataclass
class Step:
    """What the workers do before one step.

    Args:
        loads: the states to write.
        refused: the blocks of each refused request, by its id.
    """

    loads: list[Load] = field(default_factory=list)
    refused: dict[str, list[int]] = field(default_factory=dict)
