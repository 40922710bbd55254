"""Writers to kill, run as a separate process: ``python -m tests.store.writers DIRECTORY NUMBER SEED``.

Four forked processes put, replace, read, remove and collect in a store. Each one records each write in its own log,
before it begins and after it has returned. NUMBER times, one of them is killed with SIGKILL after a random time and
started again. Each line of the log is appended with a single ``write``, so that a kill leaves complete lines.

A line is JSON, ``["begin", {name: seed}]`` or ``["end", {name: seed}]``; a seed of null removes the name.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from gisting.errors import StoreError
from gisting.store import GistStore
from tests.store.made import is_same, made

NUM_WRITERS = 4
SHARED = ("shared0", "shared1")


def k_of(seed: int) -> int:
    return 1 + seed % 3


def write_on(folder: Path, writer: int, life: int, seed: int) -> None:
    """Write until killed. A writer's own names are written by no other writer; the shared names by all of them."""
    chance = random.Random(f"{seed}.{writer}.{life}")
    store = GistStore(folder / "store")
    log = os.open(folder / f"log.{writer}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, wanted: dict[str, int] | dict[str, None]) -> None:
        os.write(log, f"{json.dumps([what, wanted])}\n".encode())

    for turn in range(10**9):
        number = (writer * 1000 + life) * 1000 + turn
        own = f"w{writer}.{chance.randrange(30)}"
        kind = chance.random()
        if kind < 0.55:
            wanted = {own: number}
        elif kind < 0.7:
            wanted = {f"w{writer}.{place}": number for place in chance.sample(range(30), 5)}
        elif kind < 0.8:
            # The same content as other writers write at the same time: one file, from the first of them.
            wanted = {own: turn % 3, chance.choice(SHARED): turn % 3}
        elif kind < 0.95:
            if own in store:
                note("begin", {own: None})
                store.remove(own)
                note("end", {own: None})
            continue
        else:
            store.gc()
            continue
        caches = {name: made(seed, k_of(seed)) for name, seed in wanted.items()}
        note("begin", wanted)
        store.put_many(caches)
        note("end", wanted)
        # No other writer changes its own names. Those of others can be read, unless they are removed meanwhile.
        for name, cache in caches.items():
            if name not in SHARED:
                assert is_same(store[name], cache)
        found = [entry.name for entry in store.list() if entry.name is not None]
        try:
            store.get(chance.sample(found, min(3, len(found))))
        except StoreError as error:
            if not re.search(r"has no entry|changed 3 times while read", str(error)):
                raise


def start(folder: Path, writer: int, life: int, seed: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        write_on(folder, writer, life, seed)
    except BaseException:  # noqa: BLE001 (the test fails if an error file exists)
        (folder / f"error.{writer}.{life}").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(1)


def main(folder: Path, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    lives = [0] * NUM_WRITERS
    children = [start(folder, writer, 0, seed) for writer in range(NUM_WRITERS)]
    for _ in range(num_kills):
        time.sleep(chance.choice((0.0, 0.01, 0.05, 0.3)) * chance.random())
        writer = chance.randrange(NUM_WRITERS)
        os.kill(children[writer], signal.SIGKILL)
        os.waitpid(children[writer], 0)
        lives[writer] += 1
        children[writer] = start(folder, writer, lives[writer], seed)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
