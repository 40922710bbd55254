"""Rows that describe themselves: what ran, on which device, with which versions, at which commit.

Place in the flow: measurement -> **rows** -> JSONL files. Independent of what is measured.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from gisting._version import __version__
from gisting.errors import GistError

__all__ = ["append_row", "environment", "new_figure", "read_rows", "spread"]

FORMAT = 1


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Describe the device, the versions and the commit of this process.

    Args:
        device: the measured device; None for the GPU if there is one, otherwise the CPU.
    """
    is_card = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name() if is_card else f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
        "python": platform.python_version(),
        # Versions are recorded, not branched on.
        "torch": torch.__version__,  # noqa: TID251
        "transformers": transformers.__version__,  # noqa: TID251
        "gisting": __version__,
        "commit": _commit(),
    }


def append_row(path: str | Path, row: dict[str, Any], device: torch.device | str | None = None) -> None:
    """Append one row, with its environment, to a JSONL file.

    Args:
        path: path of the file; missing directories are made.
        row: what was measured.
        device: as for :func:`environment`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **environment(device)}) + "\n")


@functools.cache
def _commit() -> str | None:
    """The commit of the running source, with ``+`` for uncommitted changes; None outside a git checkout."""
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


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile of repeated measurements.

    All three lie within the measured range; a single measurement is returned three times.
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, sized in inches, that opens no window.

    Raises:
        GistError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GistError("plots need matplotlib; pip install 'gist-tokens[eval]'") from error
    return Figure(figsize=(width, height), layout="constrained")
