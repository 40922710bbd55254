"""Compare finished runs: the staged run with its controls, the full prompt and prefix caching.

Place in the flow: directories of finished runs, a user's prices -> **comparison** -> report. Tokens are counted with
the runs' tokenizer in the evaluation requests, which are also the requests that were scored. An answer counts as many
tokens as its reference, with the end of sequence, so that all runs are billed for the same answers. A prefix cache
holds what all full prompts begin with: the prompt without its examples, which differ for every query and are read each
time.

Reads files and counts tokens; loads no model. Times are measured elsewhere (:mod:`gisting.measure.requests`) and passed
in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from gisting._deprecated import renamed_arguments
from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.eval.metrics import exact_matches
from gisting.eval.statistics import bootstrap
from gisting.internalize.directory import (
    DATA_NAME,
    EVAL_NAME,
    STAGE_NAME,
    STUDY_NAME,
    read_answers,
    read_prompt,
    read_records,
)
from gisting.internalize.prices import Prices
from gisting.internalize.result import Internalized, StageResult, load_internalized, prompt_hash
from gisting.tokens import GistTokenizer

__all__ = [
    "BARE_QUERY",
    "FULL_PROMPT",
    "PREFIX_CACHE",
    "Comparison",
    "FinishedRun",
    "RequestRow",
    "StageRow",
    "Times",
    "compare",
    "num_rows_read",
    "shared_prefix",
]

#: Ways to send a request that do not depend on a run, under the names in a report and a measurement of their time: the
#: prompt with its examples.
FULL_PROMPT = "full prompt"
#: The same, with the prompt in a prefix cache.
PREFIX_CACHE = "prefix cache"
#: The query alone.
BARE_QUERY = "bare query"
# Settings that runs must have in common to be compared, and settings that they should have in common.
_SAME = {"prompt_sha256": "prompt", "eval_records": "evaluation records", "tokenizer": "tokenizer"}
_ALIKE = ("model", "records", "weights", "arguments")
_ALIKE_WITH_PROMPTS = (*_ALIKE, "max_examples", "pool", "prompt_format", "max_length")
# Settings in which repeated runs differ on purpose.
_DRAWS = ("seed", "data_seed")


# -- counting ----------------------------------------------------------------------------------------------------------


@renamed_arguments(template="prompt")
def shared_prefix(tokenizer: GistTokenizer, prompt: str, sources: Sequence[Sequence[int]]) -> int:
    """Count the ids of a prompt that a prefix cache can hold for all of the given requests.

    Args:
        tokenizer: the tokenizer of the requests.
        prompt: the text that they begin with.
        sources: at least one request, as :func:`gisting.data.plain.plain_sources` makes them.

    Returns:
        The number of the prompt's ids with which every request begins; 0 if they have none in common. At least the last
        id of each request is not counted, because its logits are needed for the answer.
    """
    front = tokenizer.encode_prompts([prompt], 1)[0].chunks[0]
    count = min(len(front), *(len(source) - 1 for source in sources))
    for source in sources:
        count = next((place for place in range(count) if source[place] != front[place]), max(count, 0))
    return count


def num_rows_read(num_records: int, num_steps: int, batch_size: int, drop_last: bool = False) -> int:
    """Count the records that ``Trainer`` reads in a number of optimiser steps.

    Args:
        num_records: number of records in an epoch.
        num_steps: number of optimiser steps.
        batch_size: rows of one optimiser step.
        drop_last: whether a smaller last batch of an epoch is left out.
    """
    if drop_last and num_records >= batch_size:
        return num_steps * batch_size
    num_epochs, rest = divmod(num_steps, -(-num_records // batch_size))
    return num_epochs * num_records + min(rest * batch_size, num_records)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run in its directory, whose requests and tokens can be counted.

    Args:
        directory: the output directory.
        result: what :func:`gisting.internalize.result.load_internalized` reads from it.
    """

    directory: Path
    result: Internalized

    @property
    def control(self) -> str | None:
        """The control that the run is, or None for the stages."""
        return self.result.settings.get("control")

    @property
    def method(self) -> str:
        """How the prompt was taught: in stages, or another way."""
        return self.result.settings.get("method", "stages")

    @cached_property
    def tokenizer(self) -> GistTokenizer:
        """The tokenizer that the run was trained with."""
        return GistTokenizer.from_pretrained(self.directory)

    def records(self, number: int, name: str) -> list[Record]:
        """Read a stage's ``eval.jsonl`` or ``data.jsonl``."""
        path = self.directory / f"stage-{number}" / name
        found = read_records(path)
        if not found:
            raise GistError(f"{path} is missing or empty; a report needs the files that the run wrote for its stages")
        return found

    def full_prompts(self) -> tuple[str, list[Record]] | None:
        """Return the whole prompt, and the evaluation requests with it; None if no stage and no teacher read it."""
        if self.method != "stages":
            prompt = self._whole_prompt(self.directory / STUDY_NAME)
            return prompt, [replace(record, instruction=prompt) for record in self.records(1, EVAL_NAME)]
        for stage in self.result.stages:
            if stage.share == 1 and stage.num_gist_tokens is None:
                prompt = self._whole_prompt(self.directory / f"stage-{stage.number}")
                return prompt, self.records(stage.number, EVAL_NAME)
        return None

    def _whole_prompt(self, directory: Path) -> str:
        prompt = read_prompt(directory)
        if prompt_hash(prompt) != self.result.prompt_sha256:
            raise GistError(f"{directory / STAGE_NAME} has another prompt than the one the run was trained on")
        return prompt

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
        """Count the tokens of the training: prompts, gist tokens, queries and answers of all steps.

        What a teacher reads, and what is sampled to learn from, is not trained on and not counted.
        """
        settings = self.result.settings
        total = 0.0
        for stage, num_steps in zip(self.result.stages, settings["steps"], strict=True):
            records = self.records(stage.number, DATA_NAME)
            prompted = self.tokens(records, "no-prompt" if stage.condition == "no-prompt" else "prompt", stage)
            # On-policy, the answers are other ones in every step; they are taken to be as long as the references.
            answered = self.records(stage.number, EVAL_NAME) if self.method == "on-policy" else records
            each = prompted + (stage.num_gist_tokens or 0) + self.output_tokens(answered)
            drop_last = settings["arguments"]["dataloader_drop_last"]
            total += num_rows_read(len(records), num_steps, settings["batch_size"], drop_last) * each
        return total

    def score(self, metric: str, condition: str) -> tuple[float, float | None, float | None]:
        """Return the score of the finished model, for exact match with its 95 % interval."""
        value = self.result.metrics[metric]
        if metric != "exact_match":
            return value, None, None
        said, references = read_answers(self.directory / f"stage-{self.result.stages[-1].number}", condition)
        found = bootstrap([exact_matches(said, references)])
        # The caller may have passed a metric of their own under this name.
        return (value, found.low, found.high) if math.isclose(found.value, value) else (value, None, None)


# -- the comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequestRow:
    """One way to send requests: to a finished run, or with the full prompt to a model that was not trained for it.

    Args:
        name: name of the run's directory, or "-" without a run.
        trained: what the run was trained on; None without a run.
        run_on: what a request consists of.
        mode: its name in a measurement of time; None if it is not timed.
        tokens: mean tokens of a request, including cached ones.
        cached_tokens: how many of them are in a cache: tokens of the prompt, or k gist tokens.
        output_tokens: mean tokens of the reference answers.
        saved: the share of the full prompt's tokens that is saved.
        score: score by the report's metric; None without a run.
        score_low: lower end of its 95 % interval; None if there is no interval.
        score_high: upper end of that interval.
        cost: cost of a request in the currency of the prices; None without prices.
        training_tokens: tokens that were trained on; None without a run or without a price for training.
        training_cost: their cost; None likewise.
        pays_after_full_prompt: number of requests after which training and requests have cost no more than the full
            prompt with a model that needs no training; infinite if a request is not cheaper, None for the full prompt.
        pays_after_prefix_cache: the same in comparison with the full prompt with a prefix cache.
        time_ms: median time of a request with its answer; None if it was not measured.
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
        stage: number of the stage.
        reads: the condition of the stage's requests, with k for a gist.
        kept: share of the prompt's tokens that were kept.
        examples: mean number of examples in a training request.
        tokens: mean tokens of an evaluation request of the stage.
        score_bare: score on the bare query.
        score_as_read: score on the stage's own requests.
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
        ms: median and quartiles in milliseconds by mode.
        about: a description of the measurement.
    """

    ms: Mapping[str, tuple[float, float, float]]
    about: str


@dataclass(frozen=True)
class Comparison:
    """A comparison of finished runs.

    Args:
        rows: the runs in order, then the full prompt if no run is trained on it, and prefix caching.
        stages: the stages of the staged runs.
        metric: the metric of the scores.
        num_records: number of evaluation requests.
        prices: prices, or None.
        times: measured times, or None.
        notes: what a reader must know to compare the rows.
        prompt: the prompt that was internalised.
        full: the evaluation requests with the full prompt.
        shorter: the evaluation requests of runs on a shorter prompt, by ``mode``.
    """

    rows: tuple[RequestRow, ...]
    stages: tuple[StageRow, ...]
    metric: str
    num_records: int
    prices: Prices | None = None
    times: Times | None = None
    notes: tuple[str, ...] = ()
    prompt: str = field(default="", repr=False)
    full: tuple[Record, ...] = field(default=(), repr=False)
    shorter: Mapping[str, tuple[Record, ...]] = field(default_factory=dict, repr=False)

    def timed(self, times: Times) -> Self:
        """Return a copy with measured ``times``, assigned to the rows by their mode."""
        rows = []
        for row in self.rows:
            ms = times.ms.get(row.mode or "")
            rows.append(row if ms is None else replace(row, time_ms=ms[0], time_ms_low=ms[1], time_ms_high=ms[2]))
        return replace(self, rows=tuple(rows), times=times)

    def noted(self, note: str) -> Self:
        """Return a copy with one more ``note``."""
        return replace(self, notes=(*self.notes, note))

    def items(self) -> list[dict[str, Any]]:
        """Convert to JSON: an object for each row, then one for each stage, each with its ``kind``.

        ``pays_after`` fields are None for training that never pays for itself, and where there was no training; only in
        the latter case is ``training_cost`` None too.
        """
        about = {"metric": self.metric, "num_records": self.num_records}
        prices = None if self.prices is None else asdict(self.prices)
        return [
            *({"kind": "requests", **_finite(asdict(row)), **about, "prices": prices} for row in self.rows),
            *({"kind": "stage", **_finite(asdict(row)), **about} for row in self.stages),
        ]


def compare(
    directories: Sequence[str | Path], prices: Prices | None = None, *, metric: str | None = None
) -> Comparison:
    """Compare finished runs of :func:`gisting.internalize.stages.internalize`: staged ones and controls.

    Args:
        directories: their output directories. At least one of the runs must have a stage with the full prompt: a staged
            run whose schedule begins at 1, or the control ``full`` or ``full-run-bare``.
        prices: prices of tokens, or None for a comparison without costs.
        metric: a metric by which all runs were scored; None for the first one that all of them have.

    Raises:
        GistError: a directory holds no finished run, or one without evaluation records; the runs have different
            evaluation records, prompts or tokenizers, or no metric in common; or no run read the full prompt.
    """
    runs = [FinishedRun(Path(directory), load_internalized(directory)) for directory in directories]
    if not runs:
        raise GistError("directories is empty; pass at least one finished internalisation")
    names = _names(runs)
    _check_same(runs, names)
    metric = _metric(runs, names, metric)
    source, prompt, full = _full_prompts(runs)
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
    if control is None and len({_num_examples(run) for run in runs if run.full_prompts() is not None}) > 1:
        notes.append(
            f"The full prompt is that of {names[source]}, with its examples; a run with --control full would settle it."
        )
    if first.tokenizer.is_encoder_decoder:
        notes.append("An encoder reads prompt and query together, so there is no prefix cache to compare with.")
    else:
        cached = float(shared_prefix(first.tokenizer, prompt, sources))
        with_cache = f"{FULL_PROMPT} with a {PREFIX_CACHE}"
        rows.append(replace(baseline, run_on=with_cache, mode=PREFIX_CACHE, cached_tokens=cached))
    if prices is not None:
        rows = _priced(rows, prices)
    shorter = {
        row.mode: tuple(run.records(run.result.stages[-1].number, EVAL_NAME))
        for row, run in zip(rows, runs, strict=False)
        if row.mode not in (None, FULL_PROMPT, BARE_QUERY)
    }
    stages = [row for run, name in zip(runs, names, strict=True) for row in _stage_rows(run, name, metric)]
    return Comparison(
        tuple(rows), tuple(stages), metric, len(full), prices, None, tuple(notes), prompt, tuple(full), shorter
    )


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """Name runs after their directories, by the last part of the path if that is unique."""
    paths = [run.directory.resolve() for run in runs]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise GistError(f"directories has {runs[place].directory} twice; pass each once")
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(run.directory) for run in runs]


def _check_same(runs: Sequence[FinishedRun], names: Sequence[str]) -> None:
    for run, name in zip(runs, names, strict=True):
        if run.result.settings.get("eval_records") is None or not run.result.metrics:
            raise GistError(f"{name} was trained without evaluation records, so it has no score; run it with --eval")
    first = runs[0].result.settings
    for run, name in zip(runs[1:], names[1:], strict=True):
        found = run.result.settings
        differ = [what for key, what in _SAME.items() if first.get(key) != found.get(key)]
        if differ:
            raise GistError(
                f"{names[0]} and {name} cannot be compared, because they differ in {' and '.join(differ)}; compare "
                "runs that were evaluated on the same requests"
            )


def _notes(runs: Sequence[FinishedRun], names: Sequence[str]) -> list[str]:
    """Note the settings in which runs differ although they should be the same."""
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
            notes.append(f"{names[0]} and {name} were trained differently: they differ in {', '.join(differ)}.")
    if taught := [name for run, name in zip(runs, names, strict=True) if run.method != "stages"]:
        notes.append(
            f"The cost of training {' and '.join(taught)} lacks what was sampled to learn from, and what the teacher "
            "read with the full prompt."
        )
    return notes


def _metric(runs: Sequence[FinishedRun], names: Sequence[str], wanted: str | None) -> str:
    common = [metric for metric in runs[0].result.metrics if all(metric in run.result.metrics for run in runs)]
    if wanted is None and common:
        return common[0]
    if wanted is None or wanted not in common:
        scored = "; ".join(f"{name}: {', '.join(run.result.metrics)}" for name, run in zip(names, runs, strict=True))
        raise GistError(f"metric must be one by which all runs were scored ({scored}), got {wanted!r}")
    return wanted


def _num_examples(run: FinishedRun) -> int:
    return run.result.settings.get("max_examples", 0)


def _full_prompts(runs: Sequence[FinishedRun]) -> tuple[int, str, list[Record]]:
    """Take the full prompts from the control that is run on them, or else from the run with the most examples.

    Returns:
        The number of that run, the prompt, and the evaluation requests with it.

    Raises:
        GistError: no run read the full prompt.
    """

    def order(number: int) -> tuple[bool, int]:
        return runs[number].control != "full", -_num_examples(runs[number])

    for number in sorted(range(len(runs)), key=order):
        found = runs[number].full_prompts()
        if found is not None:
            return number, *found
    raise GistError(
        "no run read the full prompt, so there is nothing to compare with; pass the staged run, or the control full"
    )


def _run_row(
    run: FinishedRun, name: str, metric: str, full_tokens: float, output_tokens: float, prices: Prices | None
) -> RequestRow:
    result, last = run.result, run.result.stages[-1]
    records = run.records(last.number, EVAL_NAME)
    tokens = run.tokens(records, result.condition, last)
    score, low, high = run.score(metric, result.condition)
    by_method = f"in {len(result.stages)} stages" if run.method == "stages" else run.method
    trained = {None: by_method, "bare": BARE_QUERY, "full": FULL_PROMPT}
    trained |= {"full-run-bare": FULL_PROMPT, "shortened": "shortened prompt"}
    run_on, mode, cached = "shortened prompt", f"shortened prompt of {name}", 0.0
    if result.condition == "no-prompt":
        run_on = mode = BARE_QUERY
    elif result.condition == "gist":
        # The gist's keys and values exist before the request is made.
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
    # Savings are relative to the model before finetuning, at the prices without the factor.
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


def _stage_rows(run: FinishedRun, name: str, metric: str) -> list[StageRow]:
    if run.control is not None or run.method != "stages":
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


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replace infinity, which JSON does not have, by None."""
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in row.items()}
