"""How time is taken: on a CUDA device by events and in turns, elsewhere by the wall clock.

Place in the flow: **clocks** -> attention (the benchmark), step, tune.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """What all cases share."""

    device: torch.device
    repeats: int
    warmup: int
    matmul_tflops: float
    about: dict[str, Any]

    def clock(self, run: Callable[[], Any]) -> float:
        """Wall-clock milliseconds of what is made before."""
        return wall_ms(run, self.device, repeats=min(self.repeats, 10), warmup=self.warmup)


def time_alternating(
    runs: dict[str, Callable[[], Any]], device: torch.device, *, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of each run, in turns.

    On a CUDA device by events: between two of them lies the work of one run on the device. What is written to memory
    before it leaves none of its inputs in the L2 cache, and takes long enough (some 1 ms) that the host has queued the
    run by then, so that the device does not wait for Python.
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
    """Median milliseconds from the call to the end of its work on the device: for what the host takes part in."""
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
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, none of them beyond what was measured."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return low, median, high


def matrix_rate(device: torch.device, size: int, *, repeats: int, warmup: int) -> float:
    """TFLOP/s of a product of bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    times = time_alternating({"matmul": lambda: a @ b}, device, repeats=repeats, warmup=warmup)["matmul"]
    return 2 * size**3 / statistics.median(times) / 1e9


def release(device: torch.device) -> None:
    """Give back what torch holds for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Of the device, or None where it does not matter."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def first_line(error: BaseException) -> str:
    """A failure in a line, for a row."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
