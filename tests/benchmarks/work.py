"""Work for child processes, in a module that imports nothing heavy, because each child imports it."""

from __future__ import annotations

import os
import time


def reciprocal(number: float) -> float:
    return 1 / number


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def process_after(message: str) -> int:
    """Return the id of this process, or fail with the message, or die."""
    if message == "die":
        os._exit(7)
    if message:
        raise RuntimeError(f"{message} in process {os.getpid()}")
    return os.getpid()
