"""Rows that describe themselves, their table and their picture.

Place in the flow: attention (the benchmark) -> **report**.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

IMPLEMENTATIONS = ("triton", "flex", "sdpa", "flash")
PASSES = ("forward", "both")


def environment(*, is_smoke: bool) -> dict[str, Any]:
    """What every row says of where it comes from."""
    import triton

    from gisting.measure.rows import environment as common

    found = {**common(), "triton": triton.__version__, "cuda": torch.version.cuda, "dtype": "bfloat16"}
    for name in ("transformers", "threads"):
        del found[name]
    return found | ({"smoke": True} if is_smoke else {})


def merge_rows(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows, those of the same case, implementation and device replaced."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["case"], row["implementation"], row["device"]

    merged = {key(row): row for row in old}
    merged.update({key(row): row for row in new})
    return list(merged.values())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_rows(path: Path, new: Iterable[dict[str, Any]]) -> None:
    """Merge rows into a JSONL file; whole or not at all."""
    old = read_rows(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in merge_rows(old, new))
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def by_case(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by case and implementation."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["implementation"]] = row
    return found


def ratio(ours: dict[str, Any], peer: dict[str, Any], name: str) -> float | None:
    """How many times as long the peer takes, or None where one of them has no number."""
    if ours.get(name) is None or peer.get(name) is None:
        return None
    return peer[name] / ours[name]


def table_of(rows: Sequence[dict[str, Any]]) -> Any:
    """A rich table: visible TFLOP/s of each implementation, and how many times as long the others take as we do."""
    from rich.table import Table

    table = Table(title="visible TFLOP/s, forward | forward and backward; x: time of the other over ours")
    table.add_column("case")
    for name in IMPLEMENTATIONS:
        table.add_column(name, justify="right")
    table.add_column("share of matmul", justify="right")
    table.add_column("visited/visible", justify="right")
    table.add_column("plan ms", justify="right")
    for name in ("flex", "sdpa"):
        table.add_column(f"x {name}", justify="right")
    for case, found in by_case(row for row in rows if "step_ms" not in row).items():
        ours = found.get("triton", {})
        table.add_row(
            case,
            *(_pair(found.get(name, {}), "tflops", "{:.0f}") for name in IMPLEMENTATIONS),
            _pair(ours, "share", "{:.0%}"),
            _number(ours.get("visited_over_visible"), "{:.2f}"),
            _number(ours.get("plan_ms"), "{:.2f}"),
            *(
                " | ".join(_number(ratio(ours, found.get(name, {}), f"{which}_ms"), "{:.2f}") for which in PASSES)
                for name in ("flex", "sdpa")
            ),
        )
    return table


def step_table_of(rows: Sequence[dict[str, Any]]) -> Any:
    """A rich table of the training step."""
    from rich.table import Table

    table = Table(title="one training step")
    for name in ("case", "attention", "ms", "quartiles", "peak GB", "x ours"):
        table.add_column(name, justify="left" if name in ("case", "attention") else "right")
    for case, found in by_case(rows).items():
        for impl, row in found.items():
            if row["status"] != "measured":
                table.add_row(case, impl, row["status"], row["reason"], "", "")
                continue
            peak = row["peak_bytes"]
            table.add_row(
                case,
                impl,
                f"{row['step_ms']:.1f}",
                f"{row['step_ms_low']:.1f} .. {row['step_ms_high']:.1f}",
                _number(None if peak is None else peak / 1e9, "{:.2f}"),
                _number(ratio(found.get("triton", {}), row, "step_ms"), "{:.2f}"),
            )
    return table


def _pair(row: dict[str, Any], name: str, form: str) -> str:
    if row.get("status") != "measured":
        return row.get("status", "-")
    return " | ".join(_number(row.get(f"{which}_{name}"), form) for which in PASSES)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A PNG: above forward, below forward and backward; lines over N for the gist masks, bars for the others."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("forward_ms") is not None]
    shares = sorted({row["prompt_percent"] for row in rows if row["mask"] == "gist"})
    bars = [case for case in by_case(rows) if by_case(rows)[case].popitem()[1]["mask"] != "gist"]
    figure = Figure(figsize=(4 * len(shares) + 7, 8), layout="constrained")
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
                    if row["case"].count("/") == 2  # the head sizes and heads of the whole row of lengths
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
            heights = [by_case(rows)[case].get(name, {}).get(f"{which}_tflops", 0.0) for case in bars]
            places = [i + 0.2 * (i_name - 1.5) for i in range(len(bars))]
            axes.bar(places, heights, 0.2, color=colors[name], label=labels[name])
        axes.set_xticks(range(len(bars)), labels=bars, rotation=30, ha="right")
        axes.set_title(f"other masks: {title}")
        axes.legend()
    where = {f"{row['device']}, torch {row['torch']}, triton {row['triton']}, {row['commit']}" for row in rows}
    figure.suptitle("; ".join(sorted(where)))
    figure.savefig(path, dpi=110, format="png")


def line_of(row: dict[str, Any]) -> str:
    """A row in a line."""
    start = f"{row['case']} {row['implementation']}: "
    if row["status"] != "measured":
        return f"{start}{row['status']}, {row['reason']}"
    shown = [f"{which} {row[f'{which}_ms']:.3f} ms" for which in PASSES if f"{which}_ms" in row]
    return start + ", ".join([*shown, *([f"plan {row['plan_ms']:.3f} ms"] if "plan_ms" in row else [])])
