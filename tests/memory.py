"""How much memory a part of a test takes at its peak: a process's own high-water mark, set back where it begins."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["CAN_TELL_PEAK", "held_mb", "peak_growth_mb", "requires_peak"]

_PROCESS = Path("/proc/self")


def held_mb(what: str) -> float:
    """``"VmRSS"``, what this process holds, or ``"VmHWM"``, the most that it did."""
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
    """Within it and behind it, a call tells how many MB more than at its beginning were held at once."""
    # What earlier tests have freed would be used again without a trace: it goes back to the system.
    ctypes.CDLL(None).malloc_trim(0)
    _set_back()
    before = held_mb("VmRSS")
    yield lambda: held_mb("VmHWM") - before
