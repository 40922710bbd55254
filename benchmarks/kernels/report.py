"""Write the rows of the kernels' benchmark, print them, and draw them.

Place in the flow: attention (the benchmark) -> **report**. The Markdown tables are in ``benchmarks/card_tables.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gisting.measure.rows import environment as common_environment
from gisting.measure.rows import new_figure, read_rows

__all__ = ["IMPLEMENTATIONS", "PASSES", "draw", "environment", "line_of", "write_rows"]

IMPLEMENTATIONS = ("triton", "flex", "sdpa", "flash")
PASSES = ("forward", "both")


def environment(*, is_smoke: bool) -> dict[str, Any]:
    """Describe where the rows come from."""
    import triton

    found = {**common_environment(), "triton": triton.__version__, "cuda": torch.version.cuda, "dtype": "bfloat16"}
    for name in ("transformers", "threads"):
        del found[name]
    return found | ({"smoke": True} if is_smoke else {})


def write_rows(path: Path, new: Iterable[dict[str, Any]]) -> None:
    """Write rows to a JSONL file in one step, replacing rows of the same case, implementation and device."""
    old = read_rows(path) if path.exists() else []
    merged = {(row["case"], row["implementation"], row["device"]): row for row in [*old, *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in merged.values()), encoding="utf-8")
    part.replace(path)


def line_of(row: dict[str, Any]) -> str:
    """Describe a row in one line."""
    start = f"{row['case']} {row['implementation']}: "
    if row["status"] != "measured":
        return f"{start}{row['status']}, {row['reason']}"
    shown = [f"{name} {row[f'{name}_ms']:.3f} ms" for name in (*PASSES, "step", "plan") if f"{name}_ms" in row]
    if row.get("peak_bytes") is not None:
        shown.append(f"peak {row['peak_bytes'] / 1e9:.2f} GB")
    return start + ", ".join(shown)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a PNG: forward above, forward and backward below; lines over N for gist masks, bars for other masks."""
    rows = [row for row in rows if row.get("forward_ms") is not None]
    shares = sorted({row["prompt_percent"] for row in rows if row["mask"] == "gist"})
    bars = list(dict.fromkeys(row["case"] for row in rows if row["mask"] != "gist"))
    rates = {(row["case"], row["implementation"]): row for row in rows}
    figure = new_figure(4 * len(shares) + 7, 8)
    widths = [4.0] * len(shares) + [7.0]
    grid: Any = figure.subplots(2, len(widths), squeeze=False, width_ratios=widths)
    labels = {
        "triton": "ours",
        "flex": "FlexAttention",
        "sdpa": "SDPA, dense mask",
        "flash": "flash, causal or full (a ceiling)",
    }
    colors = {"triton": "C3", "flex": "C0", "sdpa": "C7", "flash": "C2"}
    for i_pass, which in enumerate(PASSES):
        title = "forward" if which == "forward" else "forward and backward"
        for i_share, share in enumerate(shares):
            axes = grid[i_pass][i_share]
            for name in IMPLEMENTATIONS:
                points = sorted(
                    (row["rows"], row[f"{which}_tflops"])
                    for row in rows
                    if row["case"].count("/") == 2  # the shape that is measured at every length
                    and (row["mask"], row["prompt_percent"], row["implementation"]) == ("gist", share, name)
                    and f"{which}_tflops" in row
                )
                style = "--" if name == "flash" else "-"
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    style,
                    marker="o",
                    color=colors[name],
                    label=labels[name],
                )
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_title(f"gist, {share} % prompt: {title}")
            axes.set_xlabel("tokens of a sequence")
            axes.set_ylabel("visible TFLOP/s")
        axes = grid[i_pass][-1]
        for i_name, name in enumerate(IMPLEMENTATIONS):
            heights = [rates.get((case, name), {}).get(f"{which}_tflops", 0.0) for case in bars]
            places = [i + 0.2 * (i_name - 1.5) for i in range(len(bars))]
            axes.bar(places, heights, 0.2, color=colors[name], label=labels[name])
        axes.set_xticks(range(len(bars)), labels=bars, rotation=30, ha="right")
        axes.set_title(f"other masks: {title}")
        axes.legend()
    where = {f"{row['device']}, torch {row['torch']}, triton {row['triton']}, {row['commit']}" for row in rows}
    figure.suptitle("; ".join(sorted(where)))
    figure.savefig(path, dpi=110, format="png")
