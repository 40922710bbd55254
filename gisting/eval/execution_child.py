"""The other end of ``execution.py``: limits its own process, runs code and tests, reports. Started as a script.

Place in the flow: standard input, one JSON object -> **child** -> lines on what was standard output. Imports the
standard library alone, and nothing of ours: it starts for every answer, and runs beside code that nobody has read.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable

_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000  # CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET
_PR_SET_PDEATHSIG = 1
_MAX_FILE_BYTES = 1 << 20
_MAX_OPEN_FILES = 64
_MAX_PROCESSES = 32
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of what changes files: all their arguments that are paths must be in the folder.
_CHANGES = {
    *("os.chflags", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename"),
    *("os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime"),
    *("shutil.chown", "shutil.move", "shutil.rmtree", "sqlite3.connect"),
}
_REFUSED = {
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "subprocess.Popen"),
    *("os.kill", "os.killpg", "signal.pthread_kill", "resource.prlimit", "resource.setrlimit"),
    *("socket.bind", "socket.connect", "socket.sendmsg", "socket.sendto", "socket.sethostname"),
    *("socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname", "socket.getnameinfo"),
}


def main() -> None:
    """Read the task, close the doors, run, report, and end without whatever the code left to be done at exit."""
    task = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    nonce = task.pop("nonce")
    # Taken now: the code may put something else in their places.
    write, end, dumps, run = os.write, os._exit, json.dumps, _outcome

    isolation = "namespaces" if _in_namespaces(task["use_namespaces"]) else "audit hook"
    # Without the number, which the code could read there.
    write(report, f"{isolation}\n".encode())
    _limit(task["cpu_s"], task["memory"])
    sys.addaudithook(_hook(os.getcwd()))
    outcome, detail = run(task["code"], task["tests"], task["max_detail"])
    write(report, f"{nonce} {dumps([outcome, detail])}\n".encode())
    end(0)


def _in_namespaces(is_wanted: bool) -> bool:
    """Go on in a process that has no network and is the first of its process table, so that all others end with it."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not is_wanted or library.unshare(_NAMESPACES) != 0:
        return False
    child = os.fork()
    if child == 0:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return True
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _limit(cpu_s: int, memory: int) -> None:
    wanted = {
        "RLIMIT_CPU": cpu_s,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": _MAX_FILE_BYTES,
        "RLIMIT_NOFILE": _MAX_OPEN_FILES,
        "RLIMIT_NPROC": _MAX_PROCESSES,
        "RLIMIT_CORE": 0,
    }
    for name, most in wanted.items():
        which = getattr(resource, name)
        allowed = resource.getrlimit(which)[1]
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        try:
            resource.setrlimit(which, (most, most))
        except (ValueError, OSError):
            # macOS knows the name of the address space and refuses any number.
            if sys.platform.startswith("linux"):
                raise


def _hook(folder: str) -> Callable[[str, tuple], None]:
    """Refuses, as ``PermissionError``, what generated code has no business with."""
    inside = os.path.realpath(folder)
    real, fsdecode = os.path.realpath, os.fsdecode

    def is_outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a descriptor that is open already, or no path at all
        where = real(fsdecode(path))
        return where != inside and not where.startswith(inside + os.sep) and where != os.devnull

    def hook(event: str, arguments: tuple) -> None:
        if event in _REFUSED:
            raise PermissionError(f"{event} is refused here")
        if event == "open":
            path, mode, flags = arguments
            writes = any(sign in mode for sign in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITES)
            if writes and is_outside(path):
                raise PermissionError(f"writing outside the working folder is refused here: {path!r}")
        elif event in _CHANGES and any(is_outside(path) for path in arguments):
            raise PermissionError(f"{event} outside the working folder is refused here")

    return hook


def _outcome(code: str, tests: list[str], max_detail: int) -> tuple[str, str]:
    """What came of code and tests, and a line about it."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    # Taken now: a code that puts something else in the place of exec would pass every test.
    compiled, executed, describe = compile, exec, traceback.format_exception_only
    for number, text in enumerate([code, *tests]):
        where = f"test {number}" if number else "code"
        try:
            executed(compiled(text, f"<{where}>", "exec", dont_inherit=True), module.__dict__)
        except MemoryError:
            return "memory", f"{where}: MemoryError"
        except BaseException as error:  # noqa: BLE001  SystemExit and KeyboardInterrupt are no way out either
            outcome = "failed" if number and isinstance(error, AssertionError) else "error"
            try:
                line = " ".join(describe(type(error), error)[-1].split())
            except BaseException:  # noqa: BLE001  it cannot be written down
                line = type(error).__name__
            return outcome, f"{where}: {line}"[:max_detail]
    return "passed", ""


if __name__ == "__main__":
    main()
