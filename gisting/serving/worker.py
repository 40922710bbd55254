"""The worker side of the connector: writes the states of gists into the paged cache.

Place in the flow: :mod:`gisting.serving.steps` -> **worker** -> the paged cache. Uses only the attributes of
vLLM's attention layers, so it imports no vLLM. Trusts the scheduler side's choice of gist, and checks what it reads.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gisting.errors import GistError
from gisting.serving.gists import StoredGists, head_shard, slots_of
from gisting.serving.steps import Load, Step
from gisting.store.index import StoreEntry
from gisting.store.lru import BoundedLRU

__all__ = ["WorkerSide"]

_logger = logging.getLogger("vllm.gisting")


class WorkerSide:
    """Loads the gists of each step, and keeps prepared ones in memory.

    Args:
        gists: the gists of the store.
        max_bytes: how many bytes of prepared gists to keep.
        block_size: positions in a block of the paged cache.
        dtype: the dtype that the model computes in.
        rank_and_size: returns this process's rank in its tensor parallel group and the size of the group. Called when
            the first gist is prepared, by which time the group exists.
        counts: where to count, by the names of :data:`gisting.serving.steps.COUNTERS`.

    Raises:
        GistError: ``max_bytes`` is negative.
    """

    def __init__(
        self,
        gists: StoredGists,
        *,
        max_bytes: int,
        block_size: int,
        dtype: torch.dtype,
        rank_and_size: Callable[[], tuple[int, int]],
        counts: Counter[str],
    ) -> None:
        self._gists = gists
        self._block_size = block_size
        self._dtype = dtype
        self._rank_and_size = rank_and_size
        self._counts = counts
        #: Keys and values of each layer, ``(k, G, D)``, by the checksum of the gist's file.
        self.prepared: BoundedLRU[str, list[tuple[Tensor, Tensor]]] = BoundedLRU(max_bytes)
        #: The attention layers, first to last.
        self.layers: Sequence[Any] = ()
        self._invalid_blocks: set[int] = set()
        self._ended: set[str] = set()

    def run(self, step: Step) -> None:
        """Write the states of this step's gists, before anything reads them."""
        for load in step.loads:
            try:
                self._write(load)
            except Exception as error:  # such as out of memory: only this request fails
                is_known = isinstance(error, (GistError, OSError))
                _logger.error("gist %s cannot be loaded: %s", load.entry.key, error, exc_info=not is_known)
                self._counts["failed"] += 1
                self._invalid_blocks.update(load.block_ids[load.first // self._block_size :])
        for name, block_ids in step.refused.items():
            self._ended.add(name)
            self._invalid_blocks.update(block_ids)

    def take_ended(self) -> set[str]:
        """Return the refused requests since the last call, which need not wait any longer."""
        ended, self._ended = self._ended, set()
        return ended

    def take_invalid_blocks(self) -> set[int]:
        """Return the blocks since the last call that could not be written."""
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def _write(self, load: Load) -> None:
        states = self.prepared.get(load.entry.sha256)
        counter = "hits"
        if states is None:
            states, counter = self.prepare(load.entry), "loads"
            num_bytes = sum(tensor.nbytes for pair in states for tensor in pair)
            self.prepared.put(load.entry.sha256, states, num_bytes)
        self._counts[counter] += 1
        k, first = load.entry.num_gist_tokens, load.first
        slots = slots_of(load.block_ids, self._block_size, first, k).to(states[0][0].device)
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            # Each backend has its own page layout; a layer uses this call to write what it has computed itself.
            layer.impl.do_kv_cache_update(layer, keys[first:], values[first:], layer.kv_cache, slots)
            self._counts["bytes"] += (k - first) * (keys[0].nbytes + values[0].nbytes)
        self._counts["tokens"] += k - first

    def prepare(self, entry: StoreEntry) -> list[tuple[Tensor, Tensor]]:
        """Read keys and values ``(k, G, D)`` of each layer: this worker's heads, on its device, in the model's dtype.

        Raises:
            FileNotFoundError: the gist was removed meanwhile.
            GistError: its file is damaged, or it does not fit the layers of this worker.
        """
        cache = self._gists.load(entry)
        if len(cache.keys) != len(self.layers):
            raise GistError(f"the gist has {len(cache.keys)} layers, this worker {len(self.layers)}")
        rank, size = self._rank_and_size()
        prepared = []
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            heads = head_shard(keys.shape[1], rank, size)
            if len(heads) != layer.num_kv_heads or keys.shape[3] != layer.head_size:
                raise GistError(
                    f"the gist has {len(heads)} key heads of size {keys.shape[3]} for this worker, the model "
                    f"{layer.num_kv_heads} of {layer.head_size}"
                )
            value_size = getattr(layer, "head_size_v", layer.head_size)
            if values.shape[3] != value_size:
                raise GistError(
                    f"the gist has values of {values.shape[3]} numbers for each head, the model's have {value_size}; "
                    "compress the prompt again with the model that is served"
                )
            # (1, G, k, D) -> (k, G of this worker, D)
            keys, values = (states[0, heads.start : heads.stop].transpose(0, 1) for states in (keys, values))
            device = layer.kv_cache.device
            prepared.append((keys.to(device, self._dtype).contiguous(), values.to(device, self._dtype).contiguous()))
        return prepared
