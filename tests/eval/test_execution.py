"""Generated code in a process of its own: what passes, what does not, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gisting import GistError
from gisting.eval.execution import ISOLATION, OUTCOMES, Execution, pass_at_1, run_many, run_python

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the child is limited by POSIX means")
requires_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")

RIGHT = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(2) == 4", "assert double('a') == 'aa'"]


def run(code: str, tests: list[str] | None = None, **settings) -> Execution:
    """With enough time for a busy machine where time is not what is tested."""
    return run_python(code, tests or TESTS, **{"timeout_s": 30, **settings})


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the temporary folders of this test are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def processes_in(folder: Path) -> list[int]:
    """Processes that were started with their home below a folder; the dead that nobody waited for do not count."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"HOME={folder}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until_gone(folder: Path, seconds: float = 10) -> list[int]:
    end = time.monotonic() + seconds
    while (found := processes_in(folder)) and time.monotonic() < end:
        time.sleep(0.02)
    return found


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "outcome", "detail"),
    [
        (RIGHT, "passed", ""),
        (RIGHT.replace("2 *", "3 *"), "failed", "test 1: AssertionError"),
        ("def double(x):\n    return 4", "failed", "test 2: AssertionError"),
        ("assert False, 'no\\nno'", "error", "code: AssertionError: no no"),
        ("def double(x)", "error", "code: SyntaxError: expected ':'"),
        ("double = 3", "error", "test 1: TypeError: 'int' object is not callable"),
        ("", "error", "test 1: NameError: name 'double' is not defined"),
        ("\0", "error", "code: SyntaxError: source code string cannot contain null bytes"),
        ("x = '\ud800'", "error", "code: UnicodeEncodeError: "),
        ("x = input()", "error", "code: EOFError: EOF when reading a line"),
        ("import sys\nassert sys.stdin.read() == ''\n" + RIGHT, "passed", ""),
        ("x = [0] * 10**9", "memory", "code: MemoryError"),
        ("x = []\nwhile True: x.append(bytes(10**8))", "memory", "code: MemoryError"),
        ("open('a', 'wb').write(bytes(2 << 20))", "error", "code: OSError: [Errno 27] File too large"),
        ("def double(x): return double(x)", "error", "test 1: RecursionError: maximum recursion depth exceeded"),
        ("print('x' * 10**7)\n" + RIGHT, "passed", ""),
        (RIGHT + "if __name__ == '__main__': raise ValueError", "passed", ""),
        ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A: x: int\n" + RIGHT,
         "passed", ""),
    ],
)  # fmt: skip
def test_verdicts(code: str, outcome: str, detail: str) -> None:
    done = run(code)
    assert (done.outcome, done.passed) == (outcome, outcome == "passed")
    assert done.detail.startswith(detail)
    assert bool(done.detail) is not done.passed
    assert done.outcome in OUTCOMES
    assert done.isolation in ISOLATION


TO_ALL_DESCRIPTORS = """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, {!r})
    except OSError:
        pass
"""


# What was reported up to there may be read, and is no help.
READ_BACK = """
import os
for descriptor in range(3, 64):
    try:
        found = os.pread(descriptor, 1000, 0).split()[0]
        os.write(descriptor, found + b' ["passed", ""]\\n')
    except (OSError, IndexError):
        pass
os._exit(0)
"""


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "print('passed'); exit(0)",
        "import builtins; builtins.exec = builtins.compile = lambda *a, **k: None",
        TO_ALL_DESCRIPTORS.format(b'{"outcome": "passed"}\n'),
        TO_ALL_DESCRIPTORS.format(b"x" * 10**5),
        READ_BACK,
        "import ctypes; ctypes.string_at(0)",
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
    ],
)
def test_no_way_out_passes(code: str) -> None:
    """However a code ends, or whatever it says, before its tests; and the same where a test does it."""
    assert run(code).outcome == "error"
    assert run("", [code, "assert False"], use_namespaces=False).outcome in ("error", "failed")


def test_an_assertion_that_says_much_is_cut() -> None:
    assert len(run("", ["assert False, 'x' * 10**6"]).detail) == 500


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_up(code: str) -> None:
    start = time.perf_counter()
    done = run(code, timeout_s=0.5)
    assert (done.outcome, done.detail) == ("timeout", "not done after 0.5 s")
    assert time.perf_counter() - start < 10


# -- what it can reach -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_namespaces", [True, False])
def test_no_network(use_namespaces: bool) -> None:
    """A server of this very test, on this machine: what connects is refused, whether it gives up or not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        done = run(f"import socket; socket.create_connection({address!r})", use_namespaces=use_namespaces)
        assert done.outcome == "error"
        assert "socket.getaddrinfo is refused here" in done.detail
        done = run(f"import socket; socket.socket().connect({address!r})", use_namespaces=use_namespaces)
        assert "socket.connect is refused here" in done.detail
        assert run("import urllib.request; urllib.request.urlopen('http://localhost')").outcome == "error"
        with pytest.raises(TimeoutError):
            server.accept()


def test_namespaces_hold_without_the_hook() -> None:
    """By the C library, which no hook sees, a server of this test cannot be reached."""
    if run(RIGHT).isolation != "namespaces":
        pytest.skip("this system gives no namespaces")
    code = """
import ctypes, os, struct
library = ctypes.CDLL(None)
def reaches(port):
    address = struct.pack("=H", 2) + struct.pack("!H4B8x", port, 127, 0, 0, 1)
    return library.connect(library.socket(2, 1, 0), address, len(address)) == 0
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(code, [f"assert not reaches({port})"]).passed
        assert not run(code, [f"assert not reaches({port})"], use_namespaces=False).passed, "the test can tell"
    assert run("import os", ["assert os.getpid() == 1"]).passed


def test_files_stay_in_the_folder(own_folder: Path) -> None:
    kept = own_folder / "kept"
    kept.mkdir()
    (kept / "a").write_text("mine")
    for code in (
        f"open({str(kept / 'b')!r}, 'w')",
        f"import os; os.open({str(kept / 'b')!r}, os.O_WRONLY | os.O_CREAT)",
        f"import os; os.remove({str(kept / 'a')!r})",
        f"import os; os.chdir({str(kept)!r}); os.remove('a')",
        f"import os; os.symlink({str(kept)!r}, 'link')",
        f"import shutil; shutil.rmtree({str(kept)!r})",
        f"import sqlite3; sqlite3.connect({str(kept / 'b')!r})",
    ):
        done = run(code)
        assert (done.outcome, "is refused here" in done.detail) == ("error", True), (code, done)
    inside = """
import os, shutil, tempfile
assert os.listdir('.') == [] and os.environ['HOME'] == os.getcwd()
os.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.rename('a/b/c', 'd'); shutil.rmtree('a')
with tempfile.TemporaryDirectory() as folder: open(folder + '/e', 'w').write('x')
open(os.devnull, 'w').write('x')
"""
    assert run(inside + RIGHT) == run(RIGHT)
    assert [path.name for path in own_folder.iterdir()] == ["kept"]
    assert [path.name for path in kept.iterdir()] == ["a"]


def test_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "key")
    monkeypatch.setenv("PYTHONPATH", "here")
    assert run("import os, sys", ["assert 'SECRET' not in os.environ", "assert 'here' not in sys.path"]).passed


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import os; os.kill(os.getppid(), 9)",
    ],
)
def test_other_processes_are_refused(code: str) -> None:
    done = run(code)
    assert (done.outcome, "is refused here" in done.detail) == ("error", True), done


@requires_proc
@pytest.mark.parametrize(("use_namespaces", "leaves_group"), [(True, True), (False, False)])
@pytest.mark.parametrize("ends", [True, False], ids=["ends by itself", "times out"])
def test_descendants_go_too(own_folder: Path, use_namespaces: bool, leaves_group: bool, ends: bool) -> None:
    """A small fork bomb by the C library, which no hook sees; its processes leave the group where a namespace holds."""
    if use_namespaces and run(RIGHT).isolation != "namespaces":
        pytest.skip("this system gives no namespaces")
    code = f"""
import ctypes, os, time
fork = ctypes.PyDLL(None).fork
for _ in range(4):
    if fork() == 0:
        if {leaves_group}: os.setsid()
        time.sleep(60)
        os._exit(0)
if not {ends}: time.sleep(60)
"""
    done = run(code + RIGHT, timeout_s=30 if ends else 1, use_namespaces=use_namespaces)
    assert done.outcome == ("passed" if ends else "timeout")
    assert wait_until_gone(own_folder) == []


@requires_proc
def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """Who runs it is killed, and has no time to kill."""
    code = f"""
import tempfile
from gisting.eval.execution import run_python
tempfile.tempdir = {str(tmp_path)!r}
run_python("import time; open('ready', 'w'); time.sleep(60)", ["pass"], timeout_s=60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    end = time.monotonic() + 60
    while not list(tmp_path.glob("*/ready")) and time.monotonic() < end:
        time.sleep(0.02)
    assert processes_in(tmp_path)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_until_gone(tmp_path) == []


def test_threads_are_no_processes() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\ndef double(x):\n    with ThreadPoolExecutor(2) as pool:\n"
    )
    assert run(code + "        return next(iter(pool.map(lambda y: 2 * y, [x])))\n").passed


# -- many --------------------------------------------------------------------------------------------------------------


def test_pass_at_1() -> None:
    codes = [RIGHT, RIGHT.replace("2", "3"), "(", RIGHT]
    done: list[int] = []
    found = run_many(codes, [TESTS] * 4, workers=2, timeout_s=30, progress=done.append)
    assert [one.outcome for one in found] == ["passed", "failed", "error", "passed"]
    assert done == [1] * 4
    assert pass_at_1(codes[:2], [TESTS] * 2, timeout_s=30) == 0.5


def test_real_problems(shared: Path) -> None:
    """MBPP: its own solutions pass its tests; with the numbers of a test changed they do not."""
    lines = (shared / "data" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines[:4]]
    codes = [f"{one['test_setup_code']}\n{one['code']}" for one in problems]
    assert pass_at_1(codes, [one["test_list"] for one in problems], timeout_s=30) == 1
    wrong = [[*one["test_list"], f"assert not ({one['test_list'][0].removeprefix('assert ')})"] for one in problems]
    assert pass_at_1(codes, wrong, timeout_s=30) == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tests": []}, r"tests must be a list of statements, and some, got \[\]"),
        ({"tests": "assert f()"}, "tests must be a list of statements, and some, got 'assert f"),
        ({"timeout_s": 0}, "timeout_s must be above 0, got 0"),
        ({"max_memory_mb": 8}, "max_memory_mb must be at least 64, which the interpreter needs, got 8"),
    ],
)
def test_errors(settings: dict, says: str) -> None:
    with pytest.raises(GistError, match=says):
        run_python(RIGHT, **{"tests": TESTS, **settings})


def test_errors_of_many() -> None:
    with pytest.raises(GistError, match="codes must be as many as tests, and some, got 1 and 2"):
        pass_at_1([RIGHT], [TESTS, TESTS])
    with pytest.raises(GistError, match="workers must be at least 1, got 0"):
        run_many([RIGHT], [TESTS], workers=0)


def test_the_least_memory_is_enough() -> None:
    assert run(RIGHT, max_memory_mb=64).passed
