"""Speed up garbage collection in tests that train many times."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen() -> Iterator[None]:
    """Leave objects that exist already out of garbage collection.

    accelerate collects garbage after every training, which takes a quarter of a second with so many modules imported.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
