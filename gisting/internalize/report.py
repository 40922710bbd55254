"""What finished runs cost and score: the staged one beside its controls, the full prompt and prefix caching.

Place in the flow: directories of finished runs, a user's prices -> **report** -> tables. Tokens are those of the
evaluation requests, which are also what was scored, counted with the runs' tokenizer; of an answer they are those of
the reference, with its end of sequence, so that all runs are billed for the same answers. A prefix cache holds what all
full prompts begin with, the template: examples are others for each query, and are read anew.

Knows files, tokens and prices; loads no model. Times are measured elsewhere (:mod:`gisting.measure.requests`) and
handed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.eval.metrics import exact_matches
from gisting.eval.statistics import bootstrap
from gisting.internalize.directory import (
    DATA_NAME,
    EVAL_NAME,
    STAGE_NAME,
    read_answers,
    read_records,
    read_template,
)
from gisting.internalize.prices import Prices
from gisting.internalize.result import Internalized, StageResult, load_internalized, template_hash
from gisting.tokens import GistTokenizer

__all__ = [
    "BARE_QUERY",
    "FULL_PROMPT",
    "PREFIX_CACHE",
    "Report",
    "RequestRow",
    "StageRow",
    "Times",
    "make_report",
    "num_rows_read",
    "shared_prefix",
]

#: Ways to ask that are no run's own, as a report and a measurement of their time name them.
FULL_PROMPT = "full prompt"
#: The same, its template behind a prefix cache.
PREFIX_CACHE = "prefix cache"
#: The query alone.
BARE_QUERY = "bare query"
# What runs must have in common to be compared, and what they should.
_SAME = {"template_sha256": "template", "eval_records": "evaluation records", "tokenizer": "tokenizer"}
_ALIKE = ("model", "records", "method", "arguments")
_ALIKE_WITH_PROMPTS = (*_ALIKE, "max_examples", "pool", "layout", "max_length")
# What makes two runs of one setting.
_DRAWS = ("seed", "data_seed")
_PERCENT = ("exact_match", "rouge_1", "rouge_2", "rouge_l")


# -- what is counted ---------------------------------------------------------------------------------------------------


def shared_prefix(tokenizer: GistTokenizer, template: str, sources: Sequence[Sequence[int]]) -> int:
    """How many ids of a template a prefix cache can hold for all of some requests.

    Args:
        tokenizer: that made the requests.
        template: what they begin with.
        sources: at least one request, as :func:`gisting.data.plain.plain_sources` makes them.

    Returns:
        The ids of the template with which each of them begins; at least the last id of each request is read anew, for
        the answer needs its logits. 0 where they have none in common.
    """
    front = tokenizer.encode_prompts([template], 1)[0].chunks[0]
    count = min(len(front), *(len(source) - 1 for source in sources))
    for source in sources:
        count = next((place for place in range(count) if source[place] != front[place]), max(count, 0))
    return count


def num_rows_read(num_records: int, num_steps: int, batch_size: int, drop_last: bool = False) -> int:
    """How many records ``Trainer`` reads in so many optimiser steps.

    Args:
        num_records: of an epoch.
        num_steps: optimiser steps.
        batch_size: rows of one of them.
        drop_last: whether the last batch of an epoch, where it is a smaller one, is left out.
    """
    if drop_last and num_records >= batch_size:
        return num_steps * batch_size
    num_epochs, rest = divmod(num_steps, -(-num_records // batch_size))
    return num_epochs * num_records + min(rest * batch_size, num_records)


@dataclass(frozen=True)
class _Run:
    """A finished run as it lies on the disk."""

    directory: Path
    result: Internalized

    @property
    def control(self) -> str | None:
        return self.result.settings.get("control")

    @cached_property
    def tokenizer(self) -> GistTokenizer:
        return GistTokenizer.from_pretrained(self.directory)

    def records(self, number: int, name: str) -> list[Record]:
        """A stage's ``eval.jsonl`` or ``data.jsonl``."""
        path = self.directory / f"stage-{number}" / name
        found = read_records(path)
        if not found:
            raise GistError(f"{path} is not there, or empty; a report needs what the run left of its stages")
        return found

    def full_prompts(self) -> tuple[str, list[Record]] | None:
        """The whole template, and the evaluation requests with it; None where no stage of the run read it."""
        for stage in self.result.stages:
            if stage.share == 1 and stage.num_gist_tokens is None:
                directory = self.directory / f"stage-{stage.number}"
                template = read_template(directory)
                if template_hash(template) != self.result.template_sha256:
                    raise GistError(
                        f"{directory / STAGE_NAME} has another template than the one that the run was trained on"
                    )
                return template, self.records(stage.number, EVAL_NAME)
        return None

    def tokens(self, records: Sequence[Record], condition: str, stage: StageResult) -> float:
        """Mean tokens of requests under a condition."""
        inputs = [record.input for record in records]
        if condition == "gist":
            lengths = [(stage.num_gist_tokens or 0) + len(ids) for ids in self.tokenizer.encode_continuations(inputs)]
        else:
            prompts = [record.instruction if condition == "prompt" else "" for record in records]
            lengths = [len(source) for source in plain_sources(self.tokenizer, prompts, inputs)]
        return sum(lengths) / len(lengths)

    def output_tokens(self, records: Sequence[Record]) -> float:
        """Mean tokens of the reference answers, with their end of sequence."""
        answers = self.tokenizer.encode_completions(
            [record.input for record in records], [record.output for record in records]
        )
        return sum(map(len, answers)) / len(answers)

    def training_tokens(self) -> float:
        """What it was trained on, in tokens: prompts, gist tokens, queries and answers of all steps."""
        settings = self.result.settings
        total = 0.0
        for stage, num_steps in zip(self.result.stages, settings["steps"], strict=True):
            records = self.records(stage.number, DATA_NAME)
            prompted = self.tokens(records, "no-prompt" if stage.condition == "no-prompt" else "prompt", stage)
            each = prompted + (stage.num_gist_tokens or 0) + self.output_tokens(records)
            total += (
                num_rows_read(
                    len(records), num_steps, settings["batch_size"], settings["arguments"]["dataloader_drop_last"]
                )
                * each
            )
        return total

    def score(self, metric: str, condition: str) -> tuple[float, float | None, float | None]:
        """Of the finished model, with an interval of 95 % where the metric is a mean that costs nothing to take."""
        value = self.result.metrics[metric]
        if metric != "exact_match":
            return value, None, None
        said, references = read_answers(self.directory / f"stage-{self.result.stages[-1].number}", condition)
        found = bootstrap([exact_matches(said, references)])
        # A metric of this name may be the caller's own.
        return (value, found.low, found.high) if math.isclose(found.value, value) else (value, None, None)


# -- the report --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestRow:
    """One way to ask: a finished run, or the full prompt as it would be asked without one.

    Args:
        name: of the run's directory, or what is asked without one.
        trained: how; None for no run.
        run_on: what a request is.
        mode: what a measurement of time calls it; None where there is none.
        tokens: mean of a request, cached ones included.
        cached_tokens: those of them that lie in a cache: the template's, or k gist tokens.
        output_tokens: mean of the reference answers.
        saved: 1 less the share of the full prompt's tokens.
        score: of the report's metric; None for no run.
        score_low: lower end of its interval of 95 %; None where there is no interval.
        score_high: upper end.
        cost: of a request, in the currency of the prices; None without them.
        training_tokens: None where prices for it are not given, and for no run.
        training_cost: the same.
        pays_after_full_prompt: requests after which training and requests have cost no more than the full prompt to a
            model that needs no training; infinite where a request is not cheaper, None where the full prompt is asked.
        pays_after_prefix_cache: the same for the full prompt behind a prefix cache.
        time_ms: of a request with its answer, median; None where it was not measured.
        time_ms_low: lower quartile.
        time_ms_high: upper quartile.
    """

    name: str
    trained: str | None
    run_on: str
    mode: str | None
    tokens: float
    cached_tokens: float
    output_tokens: float
    saved: float
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    cost: float | None = None
    training_tokens: float | None = None
    training_cost: float | None = None
    pays_after_full_prompt: float | None = None
    pays_after_prefix_cache: float | None = None
    time_ms: float | None = None
    time_ms_low: float | None = None
    time_ms_high: float | None = None


@dataclass(frozen=True)
class StageRow:
    """One stage of a staged run.

    Args:
        run: name of the run.
        stage: its number.
        reads: the condition under which the stage's requests are run, and k where that is a gist.
        kept: share of the template's tokens that were kept.
        examples: mean number of examples in a training request.
        tokens: mean of an evaluation request as the stage reads it.
        score_bare: of the bare query.
        score_as_read: of the request as the stage reads it.
    """

    run: str
    stage: int
    reads: str
    kept: float
    examples: float
    tokens: float
    score_bare: float
    score_as_read: float


@dataclass(frozen=True)
class Times:
    """Measured times of a request.

    Args:
        ms: by mode, median and quartiles in milliseconds.
        about: how they were taken, in words.
    """

    ms: Mapping[str, tuple[float, float, float]]
    about: str


@dataclass(frozen=True)
class Report:
    """The rows, and what they say of.

    Args:
        rows: the runs in their order, then the full prompt where no run is trained on it, and prefix caching.
        stages: of the staged runs.
        metric: of the scores.
        num_records: evaluation requests.
        prices: or None.
        times: or None.
        notes: what a reader must know to compare the rows.
        template: the text that was internalised.
        full: the evaluation requests with the full prompt.
        shorter: those of runs on a shorter prompt, by ``mode``.
    """

    rows: tuple[RequestRow, ...]
    stages: tuple[StageRow, ...]
    metric: str
    num_records: int
    prices: Prices | None = None
    times: Times | None = None
    notes: tuple[str, ...] = ()
    template: str = field(default="", repr=False)
    full: tuple[Record, ...] = field(default=(), repr=False)
    shorter: Mapping[str, tuple[Record, ...]] = field(default_factory=dict, repr=False)

    def timed(self, times: Times) -> Report:
        """The same with measured ``times``, given to the rows by their mode."""
        rows = []
        for row in self.rows:
            ms = times.ms.get(row.mode or "")
            rows.append(row if ms is None else replace(row, time_ms=ms[0], time_ms_low=ms[1], time_ms_high=ms[2]))
        return replace(self, rows=tuple(rows), times=times)

    def noted(self, note: str) -> Report:
        """The same with one more ``note``."""
        return replace(self, notes=(*self.notes, note))

    def items(self) -> list[dict[str, Any]]:
        """All of it as JSON can hold it: an object for each row, then one for each stage, each with its ``kind``. What
        never pays is None, as what has nothing to pay; the latter has no ``training_cost`` either.
        """
        about = {"metric": self.metric, "num_records": self.num_records}
        prices = None if self.prices is None else asdict(self.prices)
        return [
            *({"kind": "requests", **_finite(asdict(row)), **about, "prices": prices} for row in self.rows),
            *({"kind": "stage", **_finite(asdict(row)), **about} for row in self.stages),
        ]

    def request_cells(self) -> list[tuple[str, ...]]:
        """The table of rows: its header, then a line for each; columns of which nothing is known are left out."""
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
            columns[f"training, {money}"] = [_count(row.training_cost, _money) for row in self.rows]
            columns["pays after"] = [_count(row.pays_after_full_prompt, _whole) for row in self.rows]
            columns["pays after (prefix cache)"] = [_count(row.pays_after_prefix_cache, _whole) for row in self.rows]
        return [tuple(columns), *zip(*columns.values(), strict=True)]

    def stage_cells(self) -> list[tuple[str, ...]]:
        """The table of stages, its header first."""
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
        """What the tables' columns are, in sentences, and the notes."""
        unit = " in per cent" if self.metric in _PERCENT else ""
        interval = " with its 95 % interval" if self.metric == "exact_match" else ""
        lines = [
            f"Means over {self.num_records} evaluation requests, tokens of the runs' tokenizer; answers have "
            f"{self.rows[0].output_tokens:.1f} tokens (the references, with their end). cached: tokens of a request "
            f"that lie in a cache. saved: against the full prompt. {self.metric}{unit}{interval}."
        ]
        if self.prices is not None:
            prices = self.prices
            lines.append(
                f"Prices for a million tokens, {prices.currency}: {prices.input_per_million:g} input, "
                f"{prices.cached_input_per_million:g} cached input, {prices.output_per_million:g} output"
                + ("" if prices.training_per_million is None else f", {prices.training_per_million:g} training")
                + f"; of a finetuned model {prices.finetuned_factor:g} times as much. What is asked for keeping a "
                "cache, or for hosting a model, is not among them."
            )
        if any(row.training_cost is not None for row in self.rows):
            lines.append(
                "pays after: requests after which training and requests have cost less than the full prompt to a "
                "model that needs no training; (prefix cache): than that prompt behind a prefix cache."
            )
        if self.times is not None:
            lines.append(f"ms: a request with its answer, {self.times.about}.")
        return [*lines, *self.notes]

    def markdown(self) -> str:
        """The report as a Markdown page."""
        lines = ["# Internalisation", "", *_table(self.request_cells())]
        if self.stages:
            lines += ["", "## By stage", "", *_table(self.stage_cells())]
        for sentence in self.legend():
            lines += ["", sentence]
        return "\n".join(lines) + "\n"


def make_report(
    directories: Sequence[str | Path], prices: Prices | None = None, *, metric: str | None = None
) -> Report:
    """Compare finished runs of :func:`gisting.internalize.stages.internalize`, staged ones and controls.

    Args:
        directories: their output directories. One of them at least must have a stage with the full prompt: a staged run
            whose schedule begins at 1, or the control ``full`` or ``full-run-bare``.
        prices: or None for a report without money.
        metric: a name that the runs were scored by; None for the first that all of them have.

    Returns:
        Tokens, scores and money of each, side by side.

    Raises:
        GistError: a directory holds no finished run or one without evaluation records; the runs were asked other
            queries, with another template or another tokenizer; no run has the metric; or none read the full prompt.
    """
    runs = [_Run(Path(directory), load_internalized(directory)) for directory in directories]
    if not runs:
        raise GistError("directories is empty; give at least one finished internalisation")
    names = _names(runs)
    _check_same(runs, names)
    metric = _metric(runs, names, metric)
    template, full = _full_prompts(runs)
    first = runs[0]
    output_tokens = first.output_tokens(full)
    sources = plain_sources(first.tokenizer, [record.instruction for record in full], [record.input for record in full])
    full_tokens = sum(map(len, sources)) / len(sources)
    rows = [
        _run_row(run, name, metric, full_tokens, output_tokens, prices) for run, name in zip(runs, names, strict=True)
    ]
    control = next((row for row in rows if row.mode == FULL_PROMPT), None)
    baseline = RequestRow("-", None, FULL_PROMPT, FULL_PROMPT, full_tokens, 0.0, output_tokens, 0.0)
    if control is None:
        rows.append(baseline)
    else:
        baseline = replace(
            baseline,
            name=control.name,
            trained=control.trained,
            score=control.score,
            score_low=control.score_low,
            score_high=control.score_high,
        )
    notes = _notes(runs, names)
    if first.tokenizer.is_encoder_decoder:
        notes.append("An encoder reads prompt and query together, so there is no prefix cache to compare with.")
    else:
        cached = float(shared_prefix(first.tokenizer, template, sources))
        behind = f"{FULL_PROMPT} behind a {PREFIX_CACHE}"
        rows.append(replace(baseline, run_on=behind, mode=PREFIX_CACHE, cached_tokens=cached))
    if prices is not None:
        rows = _priced(rows, prices)
    shorter = {
        row.mode: tuple(run.records(run.result.stages[-1].number, EVAL_NAME))
        for row, run in zip(rows, runs, strict=False)
        if row.mode not in (None, FULL_PROMPT, BARE_QUERY)
    }
    stages = [row for run, name in zip(runs, names, strict=True) for row in _stage_rows(run, name, metric)]
    return Report(
        tuple(rows), tuple(stages), metric, len(full), prices, None, tuple(notes), template, tuple(full), shorter
    )


def _names(runs: Sequence[_Run]) -> list[str]:
    """Directories by their names where these tell them apart."""
    paths = [run.directory.resolve() for run in runs]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise GistError(f"directories has {runs[place].directory} twice; give each once")
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(run.directory) for run in runs]


def _check_same(runs: Sequence[_Run], names: Sequence[str]) -> None:
    for run, name in zip(runs, names, strict=True):
        if run.result.settings.get("eval_records") is None or not run.result.metrics:
            raise GistError(f"{name} was trained without evaluation records, so it has no score; run it with --eval")
    first = runs[0].result.settings
    for run, name in zip(runs[1:], names[1:], strict=True):
        found = run.result.settings
        differ = [what for key, what in _SAME.items() if first.get(key) != found.get(key)]
        if differ:
            raise GistError(
                f"{names[0]} and {name} cannot be compared: they differ in {' and '.join(differ)}; compare runs that "
                "were asked the same"
            )


def _notes(runs: Sequence[_Run], names: Sequence[str]) -> list[str]:
    """Settings in which runs differ that would better be the same."""
    notes = []
    first = runs[0].result.settings
    for run, name in zip(runs[1:], names[1:], strict=True):
        differ = []
        is_bare = "bare" in (runs[0].control, run.control)
        for key in _ALIKE if is_bare else _ALIKE_WITH_PROMPTS:
            was, now = first.get(key), run.result.settings.get(key)
            if isinstance(was, dict) and isinstance(now, dict):
                keys = [one for one in {**was, **now} if was.get(one) != now.get(one) and one not in _DRAWS]
                differ += [f"{one} ({was.get(one)} and {now.get(one)})" for one in keys]
            elif was != now:
                is_short = all(isinstance(one, int | str) and len(str(one)) < 16 for one in (was, now))
                differ.append(f"{key} ({was} and {now})" if is_short else key)
        if differ:
            notes.append(f"{names[0]} and {name} were not trained alike: they differ in {', '.join(differ)}.")
    return notes


def _metric(runs: Sequence[_Run], names: Sequence[str], wanted: str | None) -> str:
    common = [metric for metric in runs[0].result.metrics if all(metric in run.result.metrics for run in runs)]
    if wanted is None and common:
        return common[0]
    if wanted is None or wanted not in common:
        scored = "; ".join(f"{name}: {', '.join(run.result.metrics)}" for name, run in zip(names, runs, strict=True))
        raise GistError(f"metric must be one by which all runs were scored ({scored}), got {wanted!r}")
    return wanted


def _full_prompts(runs: Sequence[_Run]) -> tuple[str, list[Record]]:
    """Those of the control that is run on them, or of the first run with a stage of them."""
    for run in sorted(runs, key=lambda run: run.control != "full"):
        found = run.full_prompts()
        if found is not None:
            return found
    raise GistError(
        "no run read the full prompt, so there is nothing to compare with; give the staged run, or the control full"
    )


def _run_row(
    run: _Run, name: str, metric: str, full_tokens: float, output_tokens: float, prices: Prices | None
) -> RequestRow:
    result, last = run.result, run.result.stages[-1]
    records = run.records(last.number, EVAL_NAME)
    tokens = run.tokens(records, result.condition, last)
    score, low, high = run.score(metric, result.condition)
    trained = {None: f"in {len(result.stages)} stages", "bare": BARE_QUERY, "full": FULL_PROMPT}
    trained |= {"full-run-bare": FULL_PROMPT, "compressed": "compressed prompt"}
    run_on, mode, cached = "compressed prompt", f"compressed prompt of {name}", 0.0
    if result.condition == "no-prompt":
        run_on = mode = BARE_QUERY
    elif result.condition == "gist":
        # The gist's keys and values are there before the request is.
        run_on, mode, cached = f"{last.num_gist_tokens} gist tokens", None, float(last.num_gist_tokens or 0)
    elif run.control == "full":
        run_on = mode = FULL_PROMPT
    needs_training = prices is not None and prices.training_per_million is not None
    return RequestRow(
        name,
        trained[run.control],
        run_on,
        mode,
        tokens,
        cached,
        output_tokens,
        1 - tokens / full_tokens,
        score,
        low,
        high,
        training_tokens=run.training_tokens() if needs_training else None,
    )


def _priced(rows: Sequence[RequestRow], prices: Prices) -> list[RequestRow]:
    priced = [
        replace(
            row,
            cost=prices.request(row.tokens, row.cached_tokens, row.output_tokens, is_finetuned=row.trained is not None),
            training_cost=None if row.training_tokens is None else prices.training(row.training_tokens),
        )
        for row in rows
    ]
    # What is saved is saved against a model as it is.
    costs = {row.mode: prices.request(row.tokens, row.cached_tokens, row.output_tokens) for row in rows}

    def pays_after(row: RequestRow, mode: str) -> float | None:
        other = costs.get(mode)
        if row.training_cost is None or row.cost is None or other is None or row.mode == FULL_PROMPT:
            return None
        return row.training_cost / (other - row.cost) if other > row.cost else math.inf

    return [
        replace(
            row,
            pays_after_full_prompt=pays_after(row, FULL_PROMPT),
            pays_after_prefix_cache=pays_after(row, PREFIX_CACHE),
        )
        for row in priced
    ]


def _stage_rows(run: _Run, name: str, metric: str) -> list[StageRow]:
    if run.control is not None:
        return []
    rows = []
    for stage in run.result.stages:
        records = run.records(stage.number, EVAL_NAME)
        rows.append(
            StageRow(
                name,
                stage.number,
                stage.condition if stage.num_gist_tokens is None else f"gist, k = {stage.num_gist_tokens}",
                stage.realised_share,
                stage.mean_examples,
                run.tokens(records, stage.condition, stage),
                stage.metrics["no-prompt"][metric],
                stage.metrics[stage.condition][metric],
            )
        )
    return rows


# -- cells -------------------------------------------------------------------------------------------------------------


def _table(cells: Sequence[tuple[str, ...]]) -> list[str]:
    header, *rows = cells
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


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


def _count(value: float | None, show: Any) -> str:
    return "-" if value is None else show(value)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in row.items()}
