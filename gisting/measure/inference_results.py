"""Tables and a plot of the rows that :mod:`gisting.measure.inference` measures.

Place in the flow: rows -> **inference_results** -> cells, tables, an image. Depends only on rows, as dictionaries.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gisting.errors import GistError
from gisting.eval.cost import format_bytes
from gisting.measure.inference import GIST, MODES, NO_CACHE, PREFIX
from gisting.measure.rows import new_figure

__all__ = ["by_cell", "gain", "gain_cell", "narrow_tables", "plot", "result_tables", "size_ratio", "value_cell"]

_Rows = Sequence[dict[str, Any]]
_Runs = list[dict[str, dict[str, Any]]]  # the row of each mode, for each process that measured it
_FIRST = ("first_token_ms", "copied_first_token_ms")
_SETTINGS = (
    "model",
    "num_parameters",
    "dtype",
    "num_gist_tokens",
    "input_tokens",
    "answer_tokens",
    "device",
    "threads",
)
_COLORS = ("tab:gray", "tab:orange", "tab:brown", "tab:blue")


def by_cell(rows: _Rows) -> dict[tuple[int, int], _Runs]:
    """Return rows grouped by prompt length and batch size, then by the process (``run``) that wrote them.

    A group that a process left incomplete, because it was ended, is dropped.

    Raises:
        GistError: the rows were measured with different settings.
    """
    for name in _SETTINGS:
        if len(found := {row[name] for row in rows}) > 1:
            raise GistError(
                f"the rows of one table must have the same {name}, got {', '.join(sorted(map(str, found)))}; use a "
                "separate file for each"
            )
    cells: dict[tuple[int, int], dict[Any, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        runs = cells.setdefault((row["prompt_tokens"], row["batch_size"]), {})
        runs.setdefault(row.get("run"), {})[row["mode"]] = row
    whole = {cell: [run for run in runs.values() if run.keys() == set(MODES)] for cell, runs in cells.items()}
    return {cell: runs for cell, runs in sorted(whole.items()) if runs}


def gain(cell: _Runs, mode: str, key: str) -> float | None:
    """Return how many times as fast the gist cache is as another mode: the median over the processes.

    Without a cache, nothing is passed to the model, so there is only one time for the first token.
    """
    other_key = "first_token_ms" if mode == NO_CACHE and key in _FIRST else key
    found = []
    for run in cell:
        other, ours = run[mode][other_key], run[GIST][key]
        if other is not None and ours is not None:
            found.append(other / ours if key in _FIRST else ours / other)
    return statistics.median(found) if found else None


def size_ratio(cell: _Runs) -> float:
    """Return how many times as large the prefix cache is as the gist cache."""
    return cell[0][PREFIX]["cache_bytes"] / cell[0][GIST]["cache_bytes"]


def gain_cell(gain: float | None) -> str:
    """Return a gain as text, such as ``1.53x``; ``-`` where there is none."""
    return "-" if gain is None else f"{gain:,.1f}x" if gain >= 10 else f"{gain:.2f}x"


def value_cell(cell: _Runs, mode: str, key: str) -> str:
    """Return a median with its quartiles as text, or why the mode was not run."""
    found = _middle(cell, mode, key)
    if found is None:
        reason = cell[0][mode]["not_run"]
        return "-" if reason is None else f"not run: {reason}"
    low, median, high = (f"{value:,.{0 if found[1] >= 1000 else 1}f}" for value in found)
    return f"{median} ({low}–{high})"


def _middle(cell: _Runs, mode: str, key: str) -> tuple[float, float, float] | None:
    """The lowest lower quartile, the median and the highest upper quartile over the processes that ran the mode."""
    found = [run[mode] for run in cell if run[mode][key] is not None]
    if not found:
        return None
    low, high = min(row[f"{key}_low"] for row in found), max(row[f"{key}_high"] for row in found)
    return low, statistics.median(row[key] for row in found), high


def _bytes_cell(cell: _Runs, mode: str, key: str) -> str:
    found = max((run[mode][key] for run in cell if run[mode][key] is not None), default=None)
    return "-" if found is None else format_bytes(found, 1)


_TIMES = (
    ("Time to the first token in ms, with the cache passed without a copy", "first_token_ms"),
    ("Time to the first token in ms, with the cache copied for the requests first", "copied_first_token_ms"),
    ("Tokens per second, including the reading of the prompt or input", "tokens_per_s"),
)


def result_tables(rows: _Rows) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, columns and lines of each table: first tokens without and with copies, speed, memory.

    There is a line for each prompt length and batch size, which is wide: for pages.
    """
    cells = by_cell(rows)
    tables = []
    for title, key in _TIMES:
        is_copied = key == "copied_first_token_ms"
        shown = tuple(mode for mode in MODES if mode in (PREFIX, GIST)) if is_copied else MODES
        others = (NO_CACHE, PREFIX) if is_copied else MODES[:-1]
        lines = [
            [f"{length:,}", str(batch), *(value_cell(cell, mode, key) for mode in shown)]
            + [gain_cell(gain(cell, mode, key)) for mode in others]
            for (length, batch), cell in cells.items()
        ]
        tables.append((title, ["prompt", "batch", *shown, *(f"gist against {mode}" for mode in others)], lines))
    lines = [
        [
            f"{length:,}",
            str(batch),
            *(_bytes_cell(cell, mode, "cache_bytes") for mode in MODES[1:]),
            f"{size_ratio(cell):,.1f}x",
            *(_bytes_cell(cell, mode, "peak_bytes") for mode in MODES),
        ]
        for (length, batch), cell in cells.items()
    ]
    columns = ["prompt", "batch", *(f"kept: {mode}" for mode in MODES[1:]), "gist against prefix cache"]
    tables.append(("Memory", [*columns, *(f"peak: {mode}" for mode in MODES)], lines))
    return tables


def narrow_tables(rows: _Rows) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the tables of :func:`result_tables` with a line for each way to answer: for terminals of 80 columns.

    Prompt length and batch size stand in the first of their lines alone.
    """
    cells = by_cell(rows)
    tables = []
    for title, key in _TIMES:
        modes = (PREFIX, GIST) if key == "copied_first_token_ms" else MODES
        values = {
            cell: [
                [mode, value_cell(runs, mode, key), "" if mode == GIST else gain_cell(gain(runs, mode, key))]
                for mode in modes
            ]
            for cell, runs in cells.items()
        }
        tables.append(
            (title, ["prompt", "batch", "answered with", "median (quartiles)", "gist faster"], _labelled(values))
        )
    values = {
        cell: [
            [
                mode,
                _bytes_cell(runs, mode, "cache_bytes"),
                f"{size_ratio(runs):,.1f}x" if mode == PREFIX else "",
                _bytes_cell(runs, mode, "peak_bytes"),
            ]
            for mode in MODES
        ]
        for cell, runs in cells.items()
    }
    columns = ["prompt", "batch", "answered with", "kept", "gist smaller", "peak"]
    return [*tables, ("Memory", columns, _labelled(values))]


def _labelled(values: dict[tuple[int, int], list[list[str]]]) -> list[list[str]]:
    return [
        [*((f"{length:,}", str(batch)) if not number else ("", "")), *line]
        for (length, batch), lines in values.items()
        for number, line in enumerate(lines)
    ]


def plot(rows: _Rows, path: str | Path) -> None:
    """Draw the time to the first token and tokens per second over the prompt length, a column for each batch size.

    Args:
        rows: as :func:`gisting.measure.rows.read_rows` returns them.
        path: path of the image; its suffix determines the format.

    Raises:
        GistError: matplotlib is not installed.
    """
    cells = by_cell(rows)
    batches, lengths = (sorted({row[name] for row in rows}) for name in ("batch_size", "prompt_tokens"))
    figure = new_figure(4 * len(batches), 6.5)
    axes: Any = figure.subplots(2, len(batches), squeeze=False, sharex=True, sharey="row")
    for column, batch in enumerate(batches):
        for line, (key, label) in enumerate(
            (("first_token_ms", "time to the first token, ms"), ("tokens_per_s", "tokens per second"))
        ):
            axis = axes[line][column]
            for mode, color, mark in zip(MODES, _COLORS, "osvD", strict=True):
                measured = [length for length in lengths if (length, batch) in cells]
                found = {length: _middle(cells[length, batch], mode, key) for length in measured}
                shown = {length: values for length, values in found.items() if values is not None}
                axis.plot([*shown], [value for _, value, _ in shown.values()], color=color, marker=mark, label=mode)
                lows, highs = ([values[end] for values in shown.values()] for end in (0, 2))
                axis.fill_between([*shown], lows, highs, color=color, alpha=0.2, linewidth=0)
            axis.set_xscale("log")
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.minorticks_off()
            axis.set_yscale("log")
            axis.grid(visible=True, which="both", alpha=0.2)
            if not line:
                axis.set_title(f"batch {batch}")
            else:
                axis.set_xlabel("tokens of the prompt")
            if not column:
                axis.set_ylabel(label)
    axes[0][0].legend()
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['num_parameters'] / 1e6:.0f} million parameters, {first['dtype']}, k = "
        f"{first['num_gist_tokens']}; {first['device']}"
    )
    figure.savefig(path, dpi=110)
