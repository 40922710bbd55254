"""Processes that end with the tests, even if the tests are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# Reads until the process at the other end of the pipe has ended for any reason.
_WATCH = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"


class Tied:
    """A process with all that it starts, in a separate group that is killed when this process ends, if not before."""

    def __init__(self, words: Sequence[Any], **settings: Any) -> None:
        self.process = subprocess.Popen(words, start_new_session=True, **settings)
        watch = [sys.executable, "-c", _WATCH, str(self.process.pid)]
        self._watcher = subprocess.Popen(
            watch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the group and wait for its first process."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
        self.process.wait(60)
        self._watcher.kill()
        self._watcher.wait(60)
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()
