"""Processes to kill that compress, rename, repair and rebuild: ``python -m tests.store.repairers DIRECTORY NUMBER``.

Four forked processes work on names of their own in one store; NUMBER times, one of them is killed. Each change is noted
in the process's log before it begins and after it has returned, a line of JSON: ``[what, name, text or new name]``.
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

from gisting.errors import CacheFormatError, StoreError
from gisting.store import GistStore
from tests import tiny

NUM_PROCESSES = 4
# Another process rebuilds the index right now, was killed while it did, or has just finished.
AGAIN = r"was moved or deleted|is missing or empty|is not a store: it has no index|gisting store rebuild"


def open_again(folder: Path) -> GistStore:
    """Open the store; make its index again if a process was killed between removing the old and placing the new."""
    for _ in range(1000):
        try:
            return GistStore(folder / "store")
        except (CacheFormatError, StoreError) as error:
            if not re.search(AGAIN, str(error)):
                raise
            GistStore.rebuild(folder / "store")
    raise AssertionError("the store cannot be opened")


def work(folder: Path, process: int, life: int) -> None:
    """Work until killed."""
    chance = random.Random(f"{process}.{life}")
    model, tokenizer = tiny.patched("llama")
    store = open_again(folder)
    log = os.open(folder / f"log.{process}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*line: str) -> None:
        os.write(log, f"{json.dumps(line)}\n".encode())

    text_of: dict[str, str] = {}  # of this life

    for turn in range(10**9):
        # No two names have the same text, so that damage to a file concerns one name.
        text = f"w{process} w{life % 60} w{life // 60} w{turn % 60} w{turn // 60 % 60}"
        name, kind = f"p{process}.{chance.randrange(6)}", chance.random()
        try:
            held = {entry.name: entry for entry in store.list()}
            if kind < 0.5 or name not in held:
                note("begin", name, text)
                store.get_or_compress(model, tokenizer, [text], 1, names=[name])
                note("end", name, text)
                text_of[name] = text
            elif kind < 0.7:
                new = f"p{process}.{life}.{turn}"
                note("begin rename", name, new)
                store.rename(name, new)
                note("end rename", name, new)
                text_of.pop(name, None)
            elif kind < 0.95 and name in text_of:
                # Damage a file as a bad disk would. It is made again if it is asked for by its text.
                note("damage", name, "")
                path = store.path / "objects" / held[name].key[:2] / f"{held[name].key}.gist.safetensors"
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                (folder / f"spoilt.{process}").write_bytes(data)
                os.replace(folder / f"spoilt.{process}", path)
                store.close()
                store.get_or_compress(model, tokenizer, [text_of[name]], 1, names=[name])
                note("end", name, text_of[name])
            elif kind > 0.95:
                GistStore.rebuild(folder / "store")
        except (CacheFormatError, StoreError) as error:
            if not re.search(AGAIN, str(error)):
                raise
            store.close()
            store = open_again(folder)


def start(folder: Path, process: int, life: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work(folder, process, life)
    except BaseException:  # noqa: BLE001 (the test fails if an error file exists)
        (folder / f"error.{process}.{life}").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        os._exit(1)


def main(folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(num_kills)
    GistStore(folder / "store").close()
    lives = [0] * NUM_PROCESSES
    children = [start(folder, process, 0) for process in range(NUM_PROCESSES)]
    for _ in range(num_kills):
        time.sleep(chance.choice((0.05, 0.1, 0.3)) * (0.5 + chance.random()))
        process = chance.randrange(NUM_PROCESSES)
        os.kill(children[process], signal.SIGKILL)
        os.waitpid(children[process], 0)
        lives[process] += 1
        children[process] = start(folder, process, lives[process])
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
