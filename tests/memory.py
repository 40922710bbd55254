"""Measure the peak memory of a part of a test, by the process's own high-water mark."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["CAN_TELL_PEAK", "held_mb", "peak_growth_mb", "requires_peak"]

_PROCESS = Path("/proc/self")


def held_mb(what: str) -> float:
    """Return the memory of this process in MB: ``"VmRSS"`` for now, ``"VmHWM"`` for the peak."""
    return int((_PROCESS / "status").read_text().split(f"{what}:")[1].split()[0]) / 1024


def _set_back() -> None:
    (_PROCESS / "clear_refs").write_text("5")


def _can_be_set_back() -> bool:
    try:
        _set_back()
        return held_mb("VmHWM") >= 0 and hasattr(ctypes.CDLL(None), "malloc_trim")
    except (OSError, IndexError):
        return False


CAN_TELL_PEAK = _can_be_set_back()
requires_peak = pytest.mark.skipif(
    not CAN_TELL_PEAK, reason="needs a high-water mark of memory that can be set back (/proc/self/clear_refs)"
)


@contextmanager
def peak_growth_mb() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the peak growth of memory since the block began, in MB."""
    # Return memory that earlier tests have freed to the system, because reusing it would not show.
    ctypes.CDLL(None).malloc_trim(0)
    _set_back()
    before = held_mb("VmRSS")
    yield lambda: held_mb("VmHWM") - before
