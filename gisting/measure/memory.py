"""Memory of the measured device: how much is free, the peak of a run, and giving back what was freed.

Place in the flow: below the measurements. Independent of models.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gisting.measure.latency import wait

__all__ = ["free_bytes", "give_back", "peak_of_allocator"]


def give_back() -> None:
    """Return freed memory to the system.

    Caches that grow token by token leave holes that the next size does not fit into, and the C library keeps them:
    gigabytes, with prompts of 8,000 tokens.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory may be taken, or None where the system does not report it."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak_of_allocator(device: torch.device, run: Callable[[], Any]) -> int:
    """Return the most bytes that torch's allocator had given out at once during a run, beyond what it had before.

    On a CPU, torch's profiler records every allocation and release, including those inside operators. The size of the
    process would say less, because pages stay with a process once it has touched them.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        profiler.start()
    try:
        run()
    finally:
        with _quiet_stderr():
            profiler.stop()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide what the profiler's C++ code prints when it starts and stops, which would break a progress bar."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
