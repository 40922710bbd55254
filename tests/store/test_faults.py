"""Faults that must not spread: a failed open, a full disk, a file that cannot be deleted, a lock that fails, forks."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gisting.errors import StoreError
from gisting.store import GistStore
from gisting.store import index as index_module
from gisting.store import objects as objects_module
from gisting.store.index import INDEX
from tests.store.made import made


def test_a_failed_open_breaks_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's object exists before it is opened, and is dropped half-made."""
    store = GistStore(tmp_path / "good")
    with monkeypatch.context() as patched:

        def half(*_: object, factory: Any, **__: object) -> None:
            factory.__new__(factory)
            raise sqlite3.OperationalError("unable to open database file")

        patched.setattr(index_module.sqlite3, "connect", half)
        with pytest.raises(StoreError):
            GistStore(tmp_path / "bad")
    assert len(GistStore(tmp_path / "good")) == 0
    store.put("a", made(1))


FULL = """
import os, sys
from gisting.errors import StoreError
from gisting.store import GistStore
from tests.store.made import made
store = GistStore("store")
names = []
for seed in range(10_000):
    try:
        store.put(f"name {seed}", made(seed, 64))
    except (StoreError, OSError) as error:
        break
    names.append(f"name {seed}")
else:
    sys.exit("the disk never filled")
try:
    with open("ballast", "wb") as file:
        while True:
            file.write(b"x")
            file.flush()
except OSError:
    pass
store = GistStore("store")
store.remove(names[0])
store.remove(names[1:3])
assert names[0] not in store and names[2] not in store
assert [fault for fault in store.verify() if not fault.is_harmless] == []
print("done", len(names))
"""


def test_remove_on_a_full_disk(tmp_path: Path) -> None:
    mount = ["unshare", "-rm", "bash", "-c", 'mount -t tmpfs -o size=2m none "$0" && cd "$0" && exec "$@"', tmp_path]
    try:
        can = subprocess.run([*mount, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        can = False
    if not can:
        pytest.skip("needs to mount a small disk: unshare -rm, mount -t tmpfs")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*mount, sys.executable, "-c", FULL],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout[:4]) == (0, "done"), done.stderr


def test_gc_passes_a_file_that_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = GistStore(tmp_path / "store")
    store.put_many({str(seed): made(seed) for seed in range(4)})
    files = sorted((store.path / "objects").rglob("*.safetensors"))
    stock = Path.unlink

    def unlink(path: Path, **settings: bool) -> None:
        if path == files[1]:
            raise PermissionError(errno.EPERM, "not permitted", str(path))
        stock(path, **settings)

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Path, "unlink", unlink)
        store.remove([entry.key for entry in store.list()])
        assert [path.exists() for path in files] == [False, True, False, False]
        store.gc()
        assert f"{files[1]} cannot be deleted" in caplog.text
    assert [fault.kind for fault in store.verify()] == ["orphan"]
    assert store.gc() > 0
    assert store.verify() == []


def test_a_lock_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GistStore(tmp_path / "store")
    handles = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with monkeypatch.context() as patched:

        def flock(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks available")

        patched.setattr(objects_module.fcntl, "flock", flock)
        for _ in range(5):
            with pytest.raises(OSError, match="no locks"):
                store.put("a", made(1))
    assert [*(store.path / "tmp").iterdir()] == []
    if handles:
        assert len(os.listdir("/proc/self/fd")) == handles
    store.put("a", made(1))


def test_a_fork_does_not_wait_for_the_lock_of_another_process(tmp_path: Path) -> None:
    store = GistStore(tmp_path / "store")
    store.put("a", made(1))
    other = sqlite3.connect(store.path / INDEX, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    waiting = threading.Thread(target=store.rename, args=("a", "b"))
    waiting.start()
    time.sleep(0.3)
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(0)
    took = time.perf_counter() - start
    os.waitpid(child, 0)
    is_waiting = waiting.is_alive()
    other.execute("ROLLBACK")
    other.close()
    waiting.join(30)
    assert is_waiting
    assert took < 5
    assert "b" in store


def test_a_lock_that_is_held_for_too_long_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_TIMEOUT_S", 0.2)
    store = GistStore(tmp_path / "store")
    store.put("a", made(1))
    other = sqlite3.connect(store.path / INDEX, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="was locked by another process"):
        store.rename("a", "b")
    other.close()
    store.rename("a", "b")
