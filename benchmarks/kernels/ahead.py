"""Compile and check in several processes before anything is timed.

What a child process compiles stays in the on-disk caches of Triton and Inductor (``TRITON_CACHE_DIR``,
``TORCHINDUCTOR_CACHE_DIR``), where the process that times finds it.

Place in the flow: clocks -> **ahead** -> attention (the benchmark), tune. Independent of what the work is.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.clocks import first_line, free_bytes

# The most device memory that a process takes, for its context and the small inputs of a check.
PROCESS_BYTES = 1 << 30


@dataclass(frozen=True)
class Done:
    """A finished job: its result, or one line in ``trouble`` that says why it failed.

    ``is_inconclusive`` is set if memory ran out or the process died, which need not be the job's fault.
    """

    job: Any
    result: Any = None
    trouble: str | None = None
    is_inconclusive: bool = False


def default_processes(device: torch.device) -> int:
    """Count the cores that this process may use, limited by the free memory of ``device``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = free_bytes(device)
    return cores if free is None else max(min(cores, free // PROCESS_BYTES), 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on the host or the device. A tile that is too large does not count."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in text or "ALLOC_FAILED" in text


def is_device_error(error: BaseException) -> bool:
    """Return whether CUDA failed in a way that breaks the process, as after an illegal memory access."""
    return any(text in str(error) for text in ("CUDA error", "Triton Error [CUDA]"))


def run_ahead(
    work: Callable[[Any], Any], jobs: Sequence[Any], *, processes: int, deadline: float | None = None
) -> Iterator[Done]:
    """Do all jobs, and yield them in the order in which they finish.

    If a child process dies, only its current job fails. After a CUDA error, or when memory ran out, the child is
    replaced. With a single process, which is this one, a CUDA error ends the work.

    Args:
        work: a module-level function; with more than one process, it and the jobs are pickled.
        jobs: its arguments, the most important first.
        processes: the number of processes; with 1, the jobs run in this process.
        deadline: the time, by ``time.monotonic``, at which the remaining jobs are dropped and the children ended; None
            for no limit. In this process, a job that has started is finished.
    """
    if processes == 1:
        for job in jobs:
            if deadline is not None and time.monotonic() > deadline:
                return
            done, error = _attempt(work, job)
            yield done
            if error is not None and is_device_error(error):
                return
        return
    todo = collections.deque(jobs)
    idle: list[tuple[Any, Connection]] = []
    busy: dict[Connection, tuple[Any, Any]] = {}
    try:
        while todo or busy:
            while todo and len(busy) < processes:
                process, pipe = idle.pop() if idle else _start(work)
                job = todo.popleft()
                busy[pipe] = process, job
                with contextlib.suppress(OSError):  # if the child has died, receiving fails below
                    pipe.send(job)
            ready = wait_for_any(list(busy), None if deadline is None else max(deadline - time.monotonic(), 0.0))
            if not ready:
                return
            for pipe in [pipe for pipe in busy if pipe in ready]:
                process, job = busy.pop(pipe)
                try:
                    done, is_spent = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    trouble = f"its process ended with status {process.exitcode}"
                    done, is_spent = Done(job, trouble=trouble, is_inconclusive=True), True
                if is_spent:
                    pipe.close()
                    process.kill()  # a process with a broken CUDA context can hang at exit
                    process.join()
                else:
                    idle.append((process, pipe))
                yield done
    finally:
        for process in [process for process, _ in idle] + [process for process, _ in busy.values()]:
            process.kill()
            process.join()


def _start(work: Callable[[Any], Any]) -> tuple[Any, Connection]:
    """Start a process that does jobs, and return it with the pipe to it."""
    # Forking breaks a CUDA context. One thread each, because many children share the cores.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, there), daemon=True)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}):
        process.start()
    there.close()  # so the pipe closes when the child ends
    return process, here


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """Do jobs until the pipe closes or a job breaks the process."""
    torch.set_num_threads(1)
    is_spent = False
    while not is_spent:
        try:
            job = pipe.recv()
        except EOFError:
            return
        done, error = _attempt(work, job)
        is_spent = error is not None and (is_device_error(error) or is_out_of_memory(error))
        pipe.send((done, is_spent))


def _attempt(work: Callable[[Any], Any], job: Any) -> tuple[Done, Exception | None]:
    try:
        return Done(job, work(job)), None
    except Exception as error:  # noqa: BLE001  a failure is a result, with its reason
        return Done(job, trouble=first_line(error), is_inconclusive=is_out_of_memory(error)), error
