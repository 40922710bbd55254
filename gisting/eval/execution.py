"""pass@1 of generated Python: the code and its tests run in a process of their own, never in the calling one.

Place in the flow: generated code, tests -> **execution** -> passed or not. Knows processes; knows no model.

This guards against what a model writes by mistake: endless loops, memory and process bombs, reading standard input,
writing where it should not, waiting for a network, ending before the tests. **It is no security boundary against code
that means harm**: it runs as the calling user, who may read files, and with effort the guards inside Python can be gone
round. For a model that you do not trust, run all of it in a container or a virtual machine without a network.

What holds the child:

    process       fresh ``python -I``, a session of its own, killed with its group; on Linux it ends with its parent,
                  and where the system lets it, it runs in a PID namespace, which no descendant can leave
    folder        an empty temporary one, deleted afterwards; writing elsewhere is refused (audit hook)
    environment   nothing of the caller's
    time          wall clock (kill) and processor time (RLIMIT_CPU)
    memory        address space (RLIMIT_AS; macOS has no such limit)
    files         of at most 1 MiB each (RLIMIT_FSIZE), at most 64 open, no core dump
    processes     others are refused (audit hook); at most 32 with threads (RLIMIT_NPROC, from which root is exempt)
    network       connecting, binding, sending and looking up names are refused (audit hook); on Linux, where the system
                  lets it, there is none either (network namespace)
    streams       standard input is empty, output goes nowhere

``Execution.isolation`` says whether there were namespaces. Passed is what the runner says behind the last test, with a
random number that the code is not told: neither an exit status nor anything printed counts.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gisting.errors import GistError

__all__ = ["ISOLATION", "OUTCOMES", "Execution", "pass_at_1", "run_many", "run_python"]

#: ``failed``: an assertion of a test did not hold. ``error``: anything else was raised, or the process ended early.
OUTCOMES = ("passed", "failed", "error", "timeout", "memory")
#: What keeps the network away: the kernel and the hook, or the hook alone.
ISOLATION = ("namespaces", "audit hook")

_MIN_MEMORY_MB = 64
_MAX_DETAIL = 500
_MAX_REPORT_BYTES = 16_384
# Each thread of numpy's would take address space.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_RUNNER = Path(__file__).with_name("execution_child.py")


@dataclass(frozen=True)
class Execution:
    """What became of one piece of code.

    Args:
        outcome: one of ``OUTCOMES``.
        detail: which test, and what was raised, in a line of at most 500 characters; empty where it passed.
        isolation: one of ``ISOLATION``, or empty where the process ended before it could say.
    """

    outcome: str
    detail: str
    isolation: str

    @property
    def passed(self) -> bool:
        """Whether every test held."""
        return self.outcome == "passed"


def run_python(
    code: str, tests: Sequence[str], *, timeout_s: float = 5.0, max_memory_mb: int = 512, use_namespaces: bool = True
) -> Execution:
    """Run code, then its tests in its namespace, in a process of their own.

    Args:
        code: a module; ``__name__`` is ``"solution"``, so what stands under ``if __name__ == "__main__"`` is not run.
        tests: statements, such as ``assert f(1) == 2``, each run by itself in order until one fails.
        timeout_s: how long all of it may take, the start of the interpreter (0.05 s and more) included.
        max_memory_mb: address space in MiB, at least 64.
        use_namespaces: try to take network and process table away by Linux namespaces as well.

    Returns:
        The outcome. No code raises.

    Raises:
        GistError: there is no test, an argument is out of range, or the system is not POSIX.
    """
    if os.name != "posix":
        raise GistError(
            f"run_python limits the child by POSIX means, which {sys.platform} lacks; run it in a container"
        )
    if isinstance(tests, str) or not tests:
        raise GistError(f"tests must be a list of statements, and some, got {tests!r}")
    if not 0 < timeout_s < math.inf:
        raise GistError(f"timeout_s must be above 0, got {timeout_s}")
    if max_memory_mb < _MIN_MEMORY_MB:
        raise GistError(
            f"max_memory_mb must be at least {_MIN_MEMORY_MB}, which the interpreter needs, got {max_memory_mb}"
        )
    nonce = secrets.token_hex(16)
    task = {
        "nonce": nonce,
        "code": code,
        "tests": list(tests),
        "cpu_s": math.ceil(timeout_s) + 1,
        "memory": max_memory_mb << 20,
        "max_detail": _MAX_DETAIL,
        "use_namespaces": use_namespaces,
    }
    with (
        tempfile.TemporaryDirectory(prefix="gisting-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as report,
    ):
        given.write(json.dumps(task).encode())
        given.seek(0)
        status = _run(folder, given, report, timeout_s)
        report.seek(0)
        isolation, *said = report.read(_MAX_REPORT_BYTES).decode("utf-8", errors="replace").splitlines() or [""]
    for line in said:
        found, _, verdict = line.partition(" ")
        # The runner's word, so it counts even where the time was up right behind it.
        if found == nonce:
            outcome, detail = json.loads(verdict)
            return Execution(outcome, detail, isolation)
    if isolation not in ISOLATION:
        isolation = ""
    if status is None:
        return Execution("timeout", f"not done after {timeout_s:g} s", isolation)
    return Execution("error", f"the process ended, with status {status}, before its tests were done", isolation)


def run_many(
    codes: Sequence[str],
    tests: Sequence[Sequence[str]],
    *,
    workers: int = 1,
    progress: Callable[[int], Any] | None = None,
    **settings: Any,
) -> list[Execution]:
    """:func:`run_python` of several codes.

    Args:
        codes: N modules, one for each problem.
        tests: N lists of tests.
        workers: processes at once. More than there are free cores makes code time out that would not have.
        progress: called with 1 for each code, from several threads.
        **settings: as for :func:`run_python`.

    Returns:
        N outcomes, in order.

    Raises:
        GistError: the numbers differ, there are none, or as :func:`run_python`.
    """
    if len(codes) != len(tests) or not codes:
        raise GistError(f"codes must be as many as tests, and some, got {len(codes)} and {len(tests)}")
    if workers < 1:
        raise GistError(f"workers must be at least 1, got {workers}")

    def one(number: int) -> Execution:
        done = run_python(codes[number], tests[number], **settings)
        if progress is not None:
            progress(1)
        return done

    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(one, range(len(codes))))
    finally:
        # After an error, or when it is interrupted, what has not begun is not begun.
        pool.shutdown(cancel_futures=True)


def pass_at_1(codes: Sequence[str], tests: Sequence[Sequence[str]], **settings: Any) -> float:
    """The share of problems of which the one answer passes all tests.

    Args:
        codes: N modules, one for each problem.
        tests: N lists of tests.
        **settings: as for :func:`run_many`, which gives the outcome of each.

    Returns:
        A share in 0..1.

    Raises:
        GistError: as :func:`run_many`.
    """
    done = run_many(codes, tests, **settings)
    return sum(one.passed for one in done) / len(done)


def _run(folder: str, given: IO[bytes], report: IO[bytes], timeout_s: float) -> int | None:
    """Run the child and return its status, 128 and more for a signal, or None where the time was up."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-B", str(_RUNNER)],
        cwd=folder,
        env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, **_ONE_THREAD},
        stdin=given,
        stdout=report,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = child.wait(timeout_s)
        return status if status >= 0 else 128 - status
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Where there is no namespace, descendants outlive a leader that ended by itself.
        with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS: nobody but the dead
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
