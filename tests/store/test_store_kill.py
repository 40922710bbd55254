"""Writers that are killed at any moment: what was acknowledged is there, nothing is torn, no lock is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gisting.store import GistStore
from tests.store.made import is_same, made
from tests.store.writers import NUM_WRITERS, SHARED, k_of

NUM_KILLS = 200


def possible(log: Path) -> tuple[dict[str, set[int | None]], int, int]:
    """What names may mean after a writer's log, {name: seeds, None for nothing}; how many writes it began and how many
    it acknowledged.

    After an end, what was acknowledged and nothing else; after a begin without its end, that or what was before.
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
def test_killed_writers(tmp_path: Path) -> None:
    """200 times kill -9 while four processes write; a process of its own forks them, since pytest may have threads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.store.writers", str(tmp_path), str(NUM_KILLS), "0"]
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
            # What all write may be of any of them, but it is there, for nobody removes it.
            wanted = {0, 1, 2} if name in SHARED else seeds
            if name in held:
                found = store[name]
                assert any(seed is not None and is_same(found, made(seed, k_of(seed))) for seed in wanted), name
            else:
                assert None in seeds, f"{name} was acknowledged with {seeds} and is lost"
    assert total > NUM_KILLS, "hardly anything was written between the kills"
    assert interrupted > NUM_KILLS // 10, "hardly any write was cut off"

    store.gc()
    assert store.verify() == []
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
