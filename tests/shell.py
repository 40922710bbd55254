"""Call the entry point as the shell would, in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from gisting.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path) -> Ran:
    """Run ``gisting`` with these words and return exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["gisting", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return Ran(code, captured.out, captured.err)
