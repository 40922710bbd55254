"""Take times: with CUDA events on a GPU, and with the wall clock on a CPU.

Place in the flow: **clocks** -> attention (the benchmark), step, tune.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """The settings that all cases share."""

    device: torch.device
    repeats: int
    warmup: int
    matmul_tflops: float
    about: dict[str, Any]

    def clock(self, run: Callable[[], Any]) -> float:
        """Take the wall-clock milliseconds of a preparation."""
        return wall_ms(run, self.device, repeats=min(self.repeats, 10), warmup=self.warmup)


def time_alternating(
    runs: dict[str, Callable[[], Any]], device: torch.device, *, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Take the milliseconds of each run, alternating between the runs.

    On a CUDA device, two events enclose the work of a run. Before each run, 12 writes of 256 MiB evict its inputs from
    the L2 cache. They take about 1 ms, long enough for the host to queue the run, so the device never waits for Python.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    if device.type != "cuda":
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(1000 * (time.perf_counter() - start))
        return times
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    events = {name: [] for name in runs}
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        for _ in range(repeats):
            for name, run in runs.items():
                for _ in range(12):
                    flush.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def wall_ms(run: Callable[[], Any], device: torch.device, *, repeats: int, warmup: int) -> float:
    """Take the median milliseconds from the call to the end of its work on the device, the host's share included."""
    times = []
    for number in range(warmup + repeats):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        if number >= warmup:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, size: int, *, repeats: int, warmup: int) -> float:
    """Measure the TFLOP/s of a product of bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    times = time_alternating({"matmul": lambda: a @ b}, device, repeats=repeats, warmup=warmup)["matmul"]
    return 2 * size**3 / statistics.median(times) / 1e9


def release(device: torch.device) -> None:
    """Return the memory that torch caches to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a CUDA device, or None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def first_line(error: BaseException) -> str:
    """Describe an error in one line, for a row."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
