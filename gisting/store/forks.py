"""Locks that are free whenever the process forks.

Place in the flow: below the index and the opened caches, which threads share and forked children inherit. A child has
only the thread that forked: a lock that another thread held, such as one of SQLite's own, would stay locked forever,
and a connection to SQLite must not be used on both sides (sqlite.org/howtocorrupt.html, section 2.6). So a fork waits
until every lock here is free, and the owners are notified in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType

__all__ = ["ForkLock"]

_registry = threading.RLock()
_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()
_held: list[ForkLock] = []


class ForkLock:
    """A lock for ``with`` that is free in a forked child.

    A thread must hold only one of them at a time, so that forks cannot deadlock.

    Args:
        in_child: called in a forked child before anything else can take the lock.
    """

    def __init__(self, in_child: Callable[[], None] | None = None) -> None:
        self._lock = threading.RLock()
        self._in_child = in_child
        with _registry:
            _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


def _before() -> None:
    _registry.acquire()
    _held[:] = _locks
    for lock in _held:
        lock._lock.acquire()


def _after(*, is_child: bool) -> None:
    for lock in _held:
        if is_child and lock._in_child is not None:
            lock._in_child()
        lock._lock.release()
    _held.clear()
    _registry.release()


os.register_at_fork(
    before=_before,
    after_in_parent=lambda: _after(is_child=False),
    after_in_child=lambda: _after(is_child=True),
)
