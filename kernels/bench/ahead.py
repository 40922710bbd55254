"""Work done ahead by several processes: what a child compiles stays in the on-disk caches of Triton and Inductor
(``TRITON_CACHE_DIR``, ``TORCHINDUCTOR_CACHE_DIR``), where the process that times things finds it.

Place in the flow: clocks -> **ahead** -> attention (the benchmark), tune. Knows nothing of what the work is.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from clocks import first_line


@dataclass(frozen=True)
class Done:
    """A job that ended: what the work returned, or in ``trouble`` a line about why it did not."""

    job: Any
    result: Any = None
    trouble: str | None = None


def run_ahead(
    work: Callable[[Any], Any], jobs: Sequence[Any], *, processes: int, deadline: float | None = None
) -> Iterator[Done]:
    """Do every job, in the order in which they end.

    Args:
        work: a function of a module; with more than one process it and the jobs are pickled.
        jobs: its arguments, the most important first.
        processes: how many; with 1 the jobs run in this process.
        deadline: what ``time.monotonic`` reads when the rest is given up, and the processes are ended; None for never.
            In this process a job that has begun is finished.
    """
    attempt = functools.partial(_attempt, work)
    if processes == 1 or not jobs:
        for job in jobs:
            if deadline is not None and time.monotonic() > deadline:
                return
            yield attempt(job)
        return
    # Forking a process that holds a CUDA context breaks it. Each child is one of many: threads would fight for cores.
    context = multiprocessing.get_context("spawn")
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with mock.patch.dict(os.environ, threads):
        pool = context.Pool(min(processes, len(jobs)), torch.set_num_threads, (1,))
    with pool:  # ends its processes
        results = pool.imap_unordered(attempt, jobs)
        for _ in jobs:
            try:
                yield results.next(None if deadline is None else max(deadline - time.monotonic(), 0.0))
            except multiprocessing.TimeoutError:
                return


def _attempt(work: Callable[[Any], Any], job: Any) -> Done:
    try:
        return Done(job, work(job))
    except Exception as error:  # noqa: BLE001  what fails is a result, with its reason
        return Done(job, trouble=first_line(error))
