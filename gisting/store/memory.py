"""Open caches, as many as a number of bytes allows; the one used longest ago goes first.

Place in the flow: below the store, which asks here before it opens a file. Knows nothing of files.
"""

from __future__ import annotations

from collections import OrderedDict

from gisting.cache import GistCache
from gisting.store.forks import ForkLock

__all__ = ["OpenCaches"]

# What a cache takes beside its states: objects of Python and torch, measured as 0.9 KB a tensor and 5.5 KB in all.
_TENSOR_BYTES = 1024
_CACHE_BYTES = 8192


class OpenCaches:
    """Caches by key and version, for many threads.

    Args:
        max_bytes: what they may take together; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._caches: OrderedDict[str, tuple[str, GistCache, int]] = OrderedDict()
        self._lock = ForkLock()

    def __len__(self) -> int:
        return len(self._caches)

    def get(self, key: str, version: str) -> GistCache | None:
        """The cache of ``key``, if it is held in this ``version``."""
        with self._lock:
            found = self._caches.get(key)
            if found is None or found[0] != version:
                return None
            self._caches.move_to_end(key)
            return found[1]

    def put(self, key: str, version: str, cache: GistCache) -> None:
        """Hold a cache in place of any other version; one that is larger than all there may be is not held.

        Args:
            key: of its entry.
            version: changes with what the key stands for.
            cache: what is held, and must not be written to.
        """
        size = cache.num_bytes + 2 * len(cache.keys) * _TENSOR_BYTES + _CACHE_BYTES
        with self._lock:
            self._drop(key)
            if size > self.max_bytes:
                return
            self._caches[key] = (version, cache, size)
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._caches)))

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._caches.clear()
            self.num_bytes = 0

    def _drop(self, key: str) -> None:
        found = self._caches.pop(key, None)
        if found is not None:
            self.num_bytes -= found[2]
