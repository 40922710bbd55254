"""Writers that are killed at any moment: acknowledged writes survive, nothing is torn, no lock is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gisting
from gisting.errors import CacheFormatError
from gisting.store import GistStore
from tests import tiny
from tests.store.made import is_same, made
from tests.store.repairers import open_again
from tests.store.writers import NUM_WRITERS, SHARED, k_of


def possible(log: Path) -> tuple[dict[str, set[int | None]], int, int]:
    """Return what names may refer to after a writer's log, and how many writes it began and acknowledged.

    The first is {name: seeds}, with None for no entry. After an end it is exactly what was acknowledged; after a begin
    without an end, that or what was there before.
    """
    meaning: dict[str, set[int | None]] = {}
    begun = acknowledged = 0
    for line in log.read_text(encoding="utf-8").splitlines():
        what, wanted = json.loads(line)
        begun += what == "begin"
        acknowledged += what == "end"
        for name, seed in wanted.items():
            meaning[name] = {seed} if what == "end" else {*meaning.get(name, {None}), seed}
    return meaning, begun, acknowledged


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_writers(tmp_path: Path, num_kills: int) -> None:
    """Kill writers with kill -9 while four processes write. A separate process forks them, because pytest may have
    threads.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.store.writers", str(tmp_path), str(num_kills), "0"]
    subprocess.run(command, check=True, env=environment, timeout=280)
    assert [path.read_text() for path in tmp_path.glob("error.*")] == []

    start = time.perf_counter()
    store = GistStore(tmp_path / "store")
    store.put("after", made(1))
    assert time.perf_counter() - start < 5, "a lock was left behind"
    faults = store.verify()
    assert [str(fault) for fault in faults if not fault.is_harmless] == []

    held = {entry.name for entry in store.list()}
    total = interrupted = 0
    for writer in range(NUM_WRITERS):
        meaning, begun, acknowledged = possible(tmp_path / f"log.{writer}")
        total += acknowledged
        interrupted += begun - acknowledged
        for name, seeds in meaning.items():
            # Shared names may come from any writer, but they must exist, because they are never removed.
            wanted = {0, 1, 2} if name in SHARED else seeds
            if name in held:
                found = store[name]
                assert any(seed is not None and is_same(found, made(seed, k_of(seed))) for seed in wanted), name
            else:
                assert None in seeds, f"{name} was acknowledged with {seeds} but is lost"
    assert total > num_kills, "hardly anything was written between the kills"
    assert interrupted > num_kills // 10, "hardly any write was cut off"

    store.gc()
    assert store.verify() == []
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def texts_after(log: Path) -> tuple[dict[str, set[str | None]], int]:
    """Return the texts that names may stand for after a log of :mod:`tests.store.repairers`, and the changes that
    returned.
    """
    meaning: dict[str, set[str | None]] = {}
    damaged: set[str] = set()  # whose process was killed before it was repaired; rebuilding leaves them out
    acknowledged = 0
    for line in log.read_text(encoding="utf-8").splitlines():
        what, name, other = json.loads(line)
        before = meaning.get(name, {None})
        acknowledged += what.startswith("end")
        match what:
            case "begin":
                meaning[name] = before | {other}
            case "end":
                meaning[name] = {other}
                damaged.discard(name)
            case "damage":
                meaning[name] = before | {None}
                damaged.add(name)
            case "begin rename":
                meaning[name], meaning[other] = before | {None}, before | {None}
            case "end rename":
                meaning[name], meaning[other] = {None}, before if name in damaged else before - {None}
                damaged |= {other} if name in damaged else set()
    return meaning, acknowledged


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_kills", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_repairs(tmp_path: Path, num_kills: int) -> None:
    """Kill processes that compress, rename, repair and rebuild: nothing acknowledged is lost, nothing torn is read."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.store.repairers", str(tmp_path), str(num_kills)]
    subprocess.run(command, check=True, env=environment, timeout=580)
    assert [path.read_text() for path in tmp_path.glob("error.*")] == []

    store = open_again(tmp_path)
    model, tokenizer = tiny.patched("llama")
    held = {entry.name for entry in store.list()}
    total = 0
    for log in tmp_path.glob("log.*"):
        meaning, acknowledged = texts_after(log)
        total += acknowledged
        for name, wanted in meaning.items():
            if name not in held:
                assert None in wanted, f"{name} was acknowledged with {wanted} but is lost"
                continue
            try:
                found = store[name]
            except CacheFormatError:
                assert None in wanted, f"{name} was acknowledged with {wanted} but is damaged"
                continue
            made = [gisting.compress(model, tokenizer, [text], 1) for text in wanted if text is not None]
            assert any(is_same(found, one) for one in made), name
    print(f"{num_kills} kills, {total} acknowledged changes")
    assert total > num_kills, "hardly anything was done between the kills"
    before = store.list()
    GistStore.rebuild(store.path)
    damaged = {fault.key for fault in store.verify() if not fault.is_harmless}
    assert damaged == set()
    # Files that a killed process had placed but not committed are entries now; what was one before is as it was.
    rebuilt, known = GistStore(store.path).list(), {entry.key for entry in before}
    kept = {entry.key for entry in rebuilt}
    assert [entry for entry in rebuilt if entry.key in known] == [entry for entry in before if entry.key in kept]
