"""Rows that describe themselves: what ran, where, on which versions, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from gisting._version import __version__

__all__ = ["append_row", "environment"]

FORMAT = 1


def environment() -> dict[str, Any]:
    """Device, versions and commit of this process."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    )
    return {
        "format": FORMAT,
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gisting": __version__,
        "commit": _commit(),
    }


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Add one row, with its environment, to a JSONL file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **environment()}) + "\n")


def _commit() -> str | None:
    """The commit of the source that runs, with ``+`` where it has changes; None where it is installed without its
    repository.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
