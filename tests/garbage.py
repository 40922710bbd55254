"""Quick garbage collection, for tests that train many times."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen() -> Iterator[None]:
    """accelerate collects garbage behind every training: a quarter of a second where so much is imported. What is there
    already is not looked through.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
