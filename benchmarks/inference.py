"""Markdown tables of what ``gisting bench inference`` measured, for the README and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.command import where
from gisting.markdown import markdown_table
from gisting.measure.inference import GIST, NO_CACHE, PREFIX, STATIC
from gisting.measure.inference_results import by_cell, gain, gain_cell, result_tables, size_ratio, value_cell

__all__ = ["highlights_table", "inference_table", "losses_table"]

_Rows = Sequence[dict[str, Any]]
_HIGHLIGHTS = ((26, 1), (512, 1), (512, 8), (2000, 8))
_NEAR = 1.1  # a cell with a smaller gain than this is listed as one without gain


def inference_table(rows: _Rows) -> str:
    """Format rows of the JSONL file as Markdown."""
    parts = []
    for title, columns, lines in result_tables(rows):
        parts += [f"{title}:", "", *markdown_table(columns, lines), ""]
    first = rows[0]
    fewest, most = (
        pick(row[name] for row in rows for name in ("num_first_token_repeats", "num_answer_repeats") if row[name])
        for pick in (min, max)
    )
    cells_of: dict[int, list[str]] = {}
    for (length, batch), runs in by_cell(rows).items():
        cells_of.setdefault(len(runs), []).append(f"{length:,} x {batch}")
    several = "".join(
        f"; for {', '.join(cells)}, the medians over {number} processes, with the lowest and the highest quartile"
        for number, cells in cells_of.items()
        if number > 1
    )
    parts.append(
        f"{first['model']}, {first['num_parameters'] / 1e6:.0f} million parameters, {first['dtype']}; k = "
        f"{first['num_gist_tokens']}, inputs of {first['input_tokens']} tokens, answers of {first['answer_tokens']}; "
        f"medians of {fewest} to {most} alternating runs, fewer for slower ones, quartiles in brackets{several} "
        f"({where(first)})."
    )
    return "\n".join(parts)


def losses_table(rows: _Rows) -> str:
    """List the cells in which a gist cache gains less than a tenth over a prefix cache, or loses, as Markdown."""
    lines = []
    for (length, batch), cell in by_cell(rows).items():
        for what, key in (("time to the first token", "first_token_ms"), ("tokens per second", "tokens_per_s")):
            for mode in (PREFIX, STATIC):
                found = gain(cell, mode, key)
                if found is not None and found < _NEAR:
                    both = (value_cell(cell, one, key) for one in (mode, GIST))
                    lines.append([f"{length:,}", str(batch), what, mode, *both, gain_cell(found)])
    if not lines:
        return "None of the cells above."
    columns = ("prompt", "batch", "measured", "baseline", "of the baseline", "of the gist cache", "gain")
    return "\n".join(markdown_table(columns, lines))


def highlights_table(rows: _Rows) -> str:
    """Format a few cells as Markdown: how many times as fast and as small a gist cache is. One cell has no gain."""
    shown = (
        ("first token, no cache", NO_CACHE, "first_token_ms"),
        ("first token, prefix cache", PREFIX, "first_token_ms"),
        ("first token, static prefix cache", STATIC, "first_token_ms"),
        ("tokens/s, prefix cache", PREFIX, "tokens_per_s"),
        ("tokens/s, static prefix cache", STATIC, "tokens_per_s"),
    )
    cells = by_cell(rows)
    lines = []
    for length, batch in _HIGHLIGHTS:
        if cell := cells.get((length, batch)):
            gains = (f"{gain_cell(gain(cell, mode, key))} as fast" for _, mode, key in shown)
            lines.append([f"{length:,}", str(batch), *gains, f"{size_ratio(cell):,.1f}x smaller"])
    return "\n".join(markdown_table(["prompt", "batch", *(title for title, _, _ in shown), "bytes"], lines))
