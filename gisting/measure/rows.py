"""Rows that describe themselves: what ran, where, on which versions, at which commit."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from gisting._version import __version__
from gisting.errors import GistError

__all__ = [
    "append_row",
    "demo_table",
    "environment",
    "interval_cell",
    "markdown_table",
    "new_figure",
    "page_tables",
    "read_rows",
    "spread",
    "write_between",
]

FORMAT = 1


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Device, versions and commit of this process.

    Args:
        device: what was measured; None for the card where there is one.
    """
    is_card = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name() if is_card else f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gisting": __version__,
        "commit": _commit(),
    }


def append_row(path: str | Path, row: dict[str, Any], device: torch.device | str | None = None) -> None:
    """Add one row, with its environment, to a JSONL file.

    Args:
        path: of the file; its directory is made.
        row: what was measured.
        device: as for :func:`environment`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **environment(device)}) + "\n")


@functools.cache
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


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of repeated measurements, none of them beyond what was measured; of a
    single one, that three times.
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def demo_table(rows: list[dict[str, Any]]) -> str:
    """The demo's rows as Markdown: accuracies of each seed, then the cost of a request."""
    lines = [
        "| seed | steps | positive control | gist | negative control | training | whole demo |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = (f"{100 * row['accuracy'][f'unseen/{name}']:.1f} %" for name in ("positive", "gist", "negative"))
        cells = (
            str(row["seed"]),
            f"{row['num_steps']:,}",
            *found,
            f"{row['train_s']:.0f} s",
            f"{row['total_s']:.0f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Exact match on {first['num_eval_records']} records of instructions that training never used, k = "
        f"{first['num_gist_tokens']}, {first['num_parameters'] / 1e6:.2f} million parameters. "
        f"Up to the first token of an answer (seed {first['seed']}, batch 1, median of "
        f"{first['latency'][0]['num_repeats']} alternating runs):",
        "",
        "| | tokens read | tokens cached | cache bytes | MFLOPs | ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in first["latency"]:
        lines.append(
            f"| {row['mode']} | {row['num_new_tokens']} | {row['num_cached_tokens']} | {row['cache_bytes']:,} | "
            f"{row['flops'] / 1e6:.1f} | {row['latency_ms']:.2f} |"
        )
    lines += ["", f"({first['device']}, torch {first['torch']}, transformers {first['transformers']})"]
    return "\n".join(lines)


def interval_cell(found: Mapping[str, float] | None, sign: str = "") -> str:
    """A share in 0..1 with its interval as a cell in per cent, ``"-"`` where there is none; ``sign="+"`` for one that
    may be negative.
    """
    if found is None:
        return "-"
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Its lines: the columns' names, the rule, the cells."""
    head, *rest = (f"| {' | '.join(line)} |" for line in (columns, *lines))
    return [head, "|---" * len(columns) + "|", *rest]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches, that no window shows.

    Raises:
        GistError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GistError("plots need matplotlib; pip install 'gist-tokens[eval]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def write_between(path: str | Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->`` in a Markdown file.

    Raises:
        GistError: the marks are not there.
    """
    path = Path(path)
    whole = path.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if start not in whole or end not in whole:
        raise GistError(f"{path} must hold the lines {start.strip()} and {end}")
    head, rest = whole.split(start, 1)
    path.write_text(head + start + text + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")


def page_tables() -> list[tuple[str, str, str, Callable[[list[dict[str, Any]]], str]]]:
    """Every table of the README and of docs/ that is made from committed rows: page, mark, file of rows, function."""
    from benchmarks.card_tables import kernels_table, real_model_table, step_table
    from benchmarks.cpu_attention import attention_table
    from benchmarks.distillation import distillation_table
    from benchmarks.internalize import internalize_table
    from benchmarks.methods import methods_table
    from benchmarks.nl2bash import nl2bash_table
    from benchmarks.objective import objective_table
    from benchmarks.quality import quality_table
    from benchmarks.storage import storage_table
    from benchmarks.store import store_table
    from benchmarks.training import training_table
    from benchmarks.vllm import vllm_highlights, vllm_table
    from gisting.measure.inference import highlights_table, inference_table, losses_table
    from gisting.measure.requests import serving_table

    return [
        ("README.md", "demo results", "demo.jsonl", demo_table),
        ("README.md", "inference highlights", "inference.jsonl", highlights_table),
        ("README.md", "vllm highlights", "vllm.jsonl", vllm_highlights),
        ("docs/benchmarks.md", "cpu attention results", "cpu_attention.jsonl", attention_table),
        ("docs/benchmarks.md", "kernels results", "kernels.jsonl", kernels_table),
        ("docs/benchmarks.md", "step results", "kernels.jsonl", step_table),
        ("docs/benchmarks.md", "inference results", "inference.jsonl", inference_table),
        ("docs/benchmarks.md", "inference losses", "inference.jsonl", losses_table),
        ("docs/stores.md", "storage results", "storage.jsonl", storage_table),
        ("docs/stores.md", "store results", "store.jsonl", store_table),
        ("docs/evaluation.md", "quality results", "quality.jsonl", quality_table),
        ("docs/training.md", "training results", "training.jsonl", training_table),
        ("docs/training.md", "methods results", "methods.jsonl", methods_table),
        ("docs/training.md", "real model results", "smollm2.jsonl", real_model_table),
        ("docs/training.md", "objective results", "objective.jsonl", objective_table),
        ("docs/training.md", "distillation results", "distillation.jsonl", distillation_table),
        ("docs/internalisation.md", "internalize results", "internalize.jsonl", internalize_table),
        ("docs/internalisation.md", "requests results", "internalize.jsonl", serving_table),
        ("docs/internalisation.md", "nl2bash results", "nl2bash.jsonl", nl2bash_table),
        ("docs/vllm.md", "vllm results", "vllm.jsonl", vllm_table),
    ]


if __name__ == "__main__":
    # python -m gisting.measure.rows: writes them, and the plot, in the root of the repository.
    from gisting.measure import inference

    results = Path("docs/results")
    for page, name, file, table in page_tables():
        write_between(page, name, table(read_rows(results / file)))
    inference.plot(read_rows(results / "inference.jsonl"), results / "inference.png")
