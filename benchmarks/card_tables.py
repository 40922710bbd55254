"""Markdown tables of what was measured on a GPU: attention, a training step, a model of 135 million parameters.

Place in the flow: committed rows -> **card_tables** -> pages. The benchmarks ``kernels`` and ``card`` write the rows.
"""

from __future__ import annotations

from typing import Any

from benchmarks.cells import spread_cell
from gisting.markdown import markdown_table

__all__ = ["kernels_table", "real_model_table", "step_table"]

_NAMES = {
    "triton": "ours (Triton)",
    "flex": "FlexAttention",
    "sdpa": "SDPA, dense mask",
    "flash": "FlashAttention, causal",
}
_RUNS = {
    "base": "before training",
    "plain": "full finetuning",
    "distil": "full finetuning, distilled",
    "gistlora": "gist-lora, distilled",
}
_PASSES = ("forward", "both")


def kernels_table(rows: list[dict[str, Any]]) -> str:
    """Format the times of each attention in each case, and their ratio to ours where the visible pairs are the same."""
    rows = [row for row in rows if "forward_ms" in row]
    ours = _ours(rows)
    lines = []
    for row in rows:
        shape = f"{row['batch']} x {row['heads']}/{row['key_heads']} x {row['head_size']}"
        cells = [row["case"], shape, _NAMES[row["implementation"]]]
        for which in _PASSES:
            cells += [spread_cell(row, f"{which}_ms", 3), f"{row[f'{which}_tflops']:.0f}"]
        own = ours.get((row["case"], row["device"]))
        if own is None or own["visible_pairs"] != row["visible_pairs"]:
            cells.append("-")
        else:
            cells.append(" / ".join(f"{row[f'{which}_ms'] / own[f'{which}_ms']:.2f}x" for which in _PASSES))
        lines.append(cells)
    columns = ("case", "batch x heads/key heads x head size", "attention", "forward, ms", "TFLOP/s")
    rates = sorted({f"{row['matmul_tflops']:.0f}" for row in rows})
    about = (
        f"{rows[0]['dtype']}; TFLOP/s of visible pairs, against {' and '.join(rates)} in a plain matrix product; "
        f"medians, quartiles in brackets ({_where(rows)})."
    )
    return "\n".join(
        [*markdown_table((*columns, "forward and backward, ms", "TFLOP/s", "time over ours"), lines), "", about]
    )


def step_table(rows: list[dict[str, Any]]) -> str:
    """Format the time and memory of a training step with each attention."""
    rows = [row for row in rows if "step_ms" in row]
    ours = _ours(rows)
    lines = [
        [
            _NAMES[row["implementation"]],
            spread_cell(row, "step_ms", 1),
            f"{row['peak_bytes'] / 1e9:.1f}",
            f"{row['step_ms'] / ours[row['case'], row['device']]['step_ms']:.2f}x",
        ]
        for row in rows
    ]
    first = rows[0]
    about = (
        f"LLaMA of {first['num_parameters'] / 1e9:.2f} billion random parameters, {first['batch']} rows of "
        f"{first['rows']:,} tokens, gist mask with {first['prompt_percent']} % prompt, {first['dtype']}; medians of "
        f"{first['num_repeats']} steps, quartiles in brackets ({_where(rows)})."
    )
    return "\n".join([*markdown_table(("attention", "step, ms", "peak, GB", "time over ours"), lines), "", about])


def real_model_table(rows: list[dict[str, Any]]) -> str:
    """Format the nats per reference token under each condition, and how much of the prompt's gain a gist keeps."""
    found = {(row["run"], row["split"], row["condition"], row["k"]): row for row in rows}
    lines = []
    for run, name in _RUNS.items():
        for split in ("unseen", "human"):
            fixed = [found[run, split, which, 1]["nll"] for which in ("prompt", "no-prompt", "positive", "negative")]
            gists = [found[run, split, "gist", k] for k in (1, 4, 8)]
            nats = [f"{value:.3f}" for value in [*fixed, *(row["nll"] for row in gists)]]
            lines.append([name, split, *nats, f"{100 * gists[1]['kept']:.0f} %"])
    columns = (
        "training",
        "split",
        "prompt as text",
        "no prompt",
        "positive",
        "negative",
        "gist, k = 1",
        "k = 4",
        "k = 8",
    )
    return "\n".join(markdown_table((*columns, "kept, k = 4"), lines))


def _ours(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["case"], row["device"]): row for row in rows if row["implementation"] == "triton"}


def _where(rows: list[dict[str, Any]]) -> str:
    found = {f"{row['device']}, torch {row['torch']}, triton {row['triton']}, Python {row['python']}" for row in rows}
    return "; ".join(sorted(found))
