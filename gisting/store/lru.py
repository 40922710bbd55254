"""A least-recently-used cache bounded by bytes.

Place in the flow: below the store, which keeps opened caches in it, and below serving, which keeps prepared states.
Does not know what the values are; the caller says how many bytes each one takes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from gisting.errors import GistError
from gisting.store.forks import ForkLock

__all__ = ["BoundedLRU"]

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class BoundedLRU(Generic[_Key, _Value]):
    """Values by key, limited by their total size. The least recently used ones are evicted first.

    Safe to use from several threads and across forks.

    Args:
        max_bytes: the limit on the sum of all sizes; 0 keeps nothing.

    Raises:
        GistError: ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise GistError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._values: OrderedDict[_Key, tuple[_Value, int]] = OrderedDict()
        self._lock = ForkLock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        """Whether ``key`` is held. Does not count as a use."""
        return key in self._values

    def get(self, key: _Key) -> _Value | None:
        """Return the value of ``key`` and mark it as the most recently used, or return None if it is not held."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: _Key, value: _Value, num_bytes: int) -> None:
        """Hold ``value`` under ``key``, replacing any earlier value and evicting others as needed.

        Args:
            key: the key.
            value: the value. If it is larger than ``max_bytes`` on its own, it is not held.
            num_bytes: its size.
        """
        with self._lock:
            if key in self._values:
                self.num_bytes -= self._values.pop(key)[1]
            if num_bytes > self.max_bytes:
                return
            self._values[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                _, (_, evicted) = self._values.popitem(last=False)
                self.num_bytes -= evicted

    def clear(self) -> None:
        """Evict everything."""
        with self._lock:
            self._values.clear()
            self.num_bytes = 0
