"""Format a comparison of finished runs: cells of tables, a legend, and a page of Markdown.

Place in the flow: comparison -> **report** -> a terminal or a file. Independent of how the numbers were computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from gisting.internalize.comparison import Comparison, RequestRow, compare
from gisting.internalize.prices import Prices
from gisting.markdown import markdown_table

__all__ = ["Report", "make_report"]

_PERCENT = ("exact_match", "rouge_1", "rouge_2", "rouge_l")


class Report(Comparison):
    """A comparison that can be shown as tables."""

    def request_cells(self) -> list[tuple[str, ...]]:
        """Make the table of requests, header first; columns without any value are left out."""
        has_training = any(row.training_cost is not None for row in self.rows)
        money = "" if self.prices is None else self.prices.currency
        columns = {
            "run": [row.name for row in self.rows],
            "trained": [row.trained or "-" for row in self.rows],
            "run on": [row.run_on for row in self.rows],
            "tokens": [f"{row.tokens:.1f}" for row in self.rows],
            "cached": [f"{row.cached_tokens:.1f}" if row.cached_tokens else "-" for row in self.rows],
            "saved": [f"{100 * row.saved:.0f} %" for row in self.rows],
            self.metric: [_score_cell(self.metric, row) for row in self.rows],
        }
        if self.prices is not None:
            columns[f"{money} for 1,000"] = [
                _money(1000 * row.cost) if row.cost is not None else "-" for row in self.rows
            ]
        if self.times is not None:
            columns["ms"] = [_time_cell(row) for row in self.rows]
        if has_training:
            columns[f"training, {money}"] = [_cell(row.training_cost, _money) for row in self.rows]
            columns["pays after"] = [_cell(row.pays_after_full_prompt, _whole) for row in self.rows]
            columns["pays after (prefix cache)"] = [_cell(row.pays_after_prefix_cache, _whole) for row in self.rows]
        return [tuple(columns), *zip(*columns.values(), strict=True)]

    def stage_cells(self) -> list[tuple[str, ...]]:
        """Make the table of stages, header first."""
        return [
            ("run", "stage", "reads", "kept", "examples", "tokens", "bare", "as read"),
            *(
                (
                    row.run,
                    str(row.stage),
                    row.reads,
                    f"{100 * row.kept:.0f} %",
                    f"{row.examples:.1f}",
                    f"{row.tokens:.1f}",
                    _scaled(self.metric, row.score_bare),
                    _scaled(self.metric, row.score_as_read),
                )
                for row in self.stages
            ),
        ]

    def legend(self) -> list[str]:
        """Explain the columns of the tables in sentences, followed by the notes."""
        unit = " in per cent" if self.metric in _PERCENT else ""
        interval = " with its 95 % interval" if self.metric == "exact_match" else ""
        lines = [
            f"Means over {self.num_records} evaluation requests, in tokens of the runs' tokenizer; answers have "
            f"{self.rows[0].output_tokens:.1f} tokens (the references, with their end of sequence). cached: tokens of "
            f"a request that are in a cache. saved: compared with the full prompt. {self.metric}{unit}{interval}."
        ]
        if self.prices is not None:
            prices = self.prices
            lines.append(
                f"Prices for a million tokens, {prices.currency}: {prices.input_per_million:g} input, "
                f"{prices.cached_input_per_million:g} cached input, {prices.output_per_million:g} output"
                + ("" if prices.training_per_million is None else f", {prices.training_per_million:g} training")
                + f"; tokens of a finetuned model cost {prices.finetuned_factor:g} times as much. The cost of storing "
                "a cache, or of hosting a model, is not included."
            )
        if any(row.training_cost is not None for row in self.rows):
            lines.append(
                "pays after: number of requests after which training and requests have cost less than the full prompt "
                "with a model that needs no training; (prefix cache): the same, compared with the full prompt in a "
                "prefix cache."
            )
        if self.times is not None:
            lines.append(f"ms: time of a request with its answer, {self.times.about}.")
        return [*lines, *self.notes]

    def markdown(self) -> str:
        """Write the report as a page of Markdown."""
        header, *rows = self.request_cells()
        lines = ["# Internalisation", "", *markdown_table(header, rows)]
        if self.stages:
            header, *rows = self.stage_cells()
            lines += ["", "## By stage", "", *markdown_table(header, rows)]
        for sentence in self.legend():
            lines += ["", sentence]
        return "\n".join(lines) + "\n"


def make_report(
    directories: Sequence[str | Path], prices: Prices | None = None, *, metric: str | None = None
) -> Report:
    """Compare finished runs as :func:`gisting.internalize.comparison.compare` does, and make a report of it.

    Args:
        directories: output directories of finished runs, at least one of which has a stage with the full prompt.
        prices: prices of tokens, or None for a report without costs.
        metric: a metric by which all runs were scored; None for the first one that all of them have.

    Raises:
        GistError: as :func:`gisting.internalize.comparison.compare`.
    """
    return Report(**vars(compare(directories, prices, metric=metric)))


def _scaled(metric: str, value: float) -> str:
    if metric in _PERCENT:
        return f"{100 * value:.1f}"
    return f"{value:.1f}" if metric == "bleu" else f"{value:.3g}"


def _score_cell(metric: str, row: RequestRow) -> str:
    if row.score is None:
        return "-"
    if row.score_low is None or row.score_high is None:
        return _scaled(metric, row.score)
    return f"{_scaled(metric, row.score)} [{_scaled(metric, row.score_low)}, {_scaled(metric, row.score_high)}]"


def _time_cell(row: RequestRow) -> str:
    if row.time_ms is None or row.time_ms_low is None or row.time_ms_high is None:
        return "-"
    return f"{row.time_ms:.1f} ({row.time_ms_low:.1f}–{row.time_ms_high:.1f})"


def _money(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _whole(value: float) -> str:
    return "never" if math.isinf(value) else f"{math.ceil(value):,}"


def _cell(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)
