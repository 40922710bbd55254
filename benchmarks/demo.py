"""The table of what ``gisting demo --from-scratch`` measured, and what ``gisting demo`` prints."""

from __future__ import annotations

from typing import Any

from benchmarks.command import where
from gisting.markdown import markdown_table

__all__ = ["demo_table", "museum_excerpt", "museum_output"]


def museum_excerpt(rows: list[dict[str, Any]]) -> str:
    """Return the part of what the last run of ``gisting demo`` printed that shows the distilled gist's answers."""
    printed = rows[-1]["printed"].strip()
    after = printed[printed.index("\n3. ") + 1 :] if rows[-1]["adapter"] else printed[printed.index("\n2. ") + 1 :]
    return f"```text\n{after.strip()}\n```\n\n{where(rows[-1])}."


def museum_output(rows: list[dict[str, Any]]) -> str:
    """Return what the last run of ``gisting demo`` printed, as a block of Markdown, and where it ran."""
    row = rows[-1]
    return f"```text\n{row['printed'].strip()}\n```\n\n{where(row)}."


def demo_table(rows: list[dict[str, Any]]) -> str:
    """Format the demo's rows as Markdown: accuracies for each seed, then the cost of a request."""
    lines = []
    for row in rows:
        found = (f"{100 * row['accuracy'][f'unseen/{name}']:.1f} %" for name in ("positive", "gist", "negative"))
        times = (f"{row[name]:.0f} s" for name in ("train_s", "total_s"))
        lines.append([str(row["seed"]), f"{row['num_steps']:,}", *found, *times])
    columns = ("seed", "steps", "positive control", "gist", "negative control", "training", "whole demo")
    first = rows[0]
    costs = [
        [
            row["mode"],
            str(row["num_new_tokens"]),
            str(row["num_cached_tokens"]),
            f"{row['cache_bytes']:,}",
            f"{row['flops'] / 1e6:.1f}",
            f"{row['latency_ms']:.2f}",
        ]
        for row in first["latency"]
    ]
    text = [
        *markdown_table(columns, lines),
        "",
        f"Exact match on {first['num_eval_records']} records of instructions that training never used, k = "
        f"{first['num_gist_tokens']}, {first['num_parameters'] / 1e6:.2f} million parameters. "
        f"Up to the first token of an answer (seed {first['seed']}, batch 1, median of "
        f"{first['latency'][0]['num_repeats']} alternating runs):",
        "",
        *markdown_table(("request", "tokens read", "tokens cached", "cache bytes", "MFLOPs", "ms"), costs),
        "",
        f"({where(first, 'torch', 'transformers')})",
    ]
    return "\n".join(text)
