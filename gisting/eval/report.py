"""Reports from results files: tables in Markdown, and plots of quality against k and against compression.

Place in the flow: results -> **report**. Needs no model; the plots need matplotlib (the ``eval`` extra).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gisting.errors import GistError
from gisting.eval.results import Evaluation, Judgement, Split
from gisting.eval.statistics import Interval, gap_share
from gisting.markdown import markdown_table

__all__ = ["gap_kept", "markdown", "result_rows", "write_report"]

_SHARES = {"exact_match": "exact match", "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}
_NUMBERS = {"perplexity": "perplexity", "tokens": "tokens", "tokens_ratio": "tokens / reference"}
#: Column names of :func:`result_rows`.
COLUMNS = ("split", "k", "condition", "records", *_SHARES.values(), *_NUMBERS.values(), "gap kept", "gap kept, swapped")


def gap_kept(
    split: Split, num_gist_tokens: int, metric: str, *, against: str = "negative", **settings: Any
) -> Interval | None:
    """Compute the share of the gap between two controls that the gist keeps in a metric that is a mean of scores.

    Args:
        split: a split of an evaluation.
        num_gist_tokens: k.
        metric: the name of a score, such as ``"rouge_l"``.
        against: the lower control: ``"negative"``, no prompt; or ``"swapped"``, the gist of another prompt, which shows
            how much of the gist is this prompt and not the style of any gist.
        **settings: as for :func:`gisting.eval.statistics.gap_share`.

    Returns:
        The share with its interval; None if the metric or one of the conditions gist, positive and ``against`` was not
        evaluated, or if there is no clear gap (see :func:`gisting.eval.statistics.gap_share`).
    """
    names = ("gist", "positive", against)
    if not {*names} <= set(split.conditions):
        return None
    gist, positive, control = (split.result(name, num_gist_tokens).scores.get(metric) for name in names)
    if gist is None or positive is None or control is None:
        return None
    return gap_share(gist, positive, control, **settings)


def result_rows(evaluation: Evaluation, *, metric: str | None = None, **settings: Any) -> list[tuple[str, ...]]:
    """Return the cells of a table with the columns ``COLUMNS`` and a row for each split, k and condition.

    Args:
        evaluation: the evaluation to show.
        metric: the metric for the columns "gap kept": exact match or a ROUGE metric by name; by default ROUGE-L if it
            was scored, else exact match.
        **settings: of the intervals, as for :func:`gisting.eval.statistics.bootstrap`.

    Returns:
        The rows; the cell of a metric that was not scored is empty.
    """
    metric = _metric([evaluation], metric)
    rows = []
    for split in evaluation.splits:
        for result in split.results:
            found = {name: result.interval(name, **settings) for name in result.metrics}
            k = result.num_gist_tokens
            kept = [
                gap_kept(split, k, metric, against=against, **settings) if result.condition == "gist" else None
                for against in ("negative", "swapped")
            ]
            rows.append(
                (
                    split.name,
                    str(result.num_gist_tokens),
                    result.condition,
                    str(result.num_records),
                    *(_percent(found.get(name)) for name in _SHARES),
                    *(_number(found.get(name)) for name in _NUMBERS),
                    *map(_percent, kept),
                )
            )
    return rows


def markdown(evaluations: Sequence[Evaluation], *, metric: str | None = None, **settings: Any) -> str:
    """Return the text of the report, without plots. Arguments are as for :func:`result_rows`."""
    metric = _metric(evaluations, metric)
    confidence = settings.get("confidence", 0.95)
    lines = ["# Evaluation", ""]
    lines += [
        f"Brackets show the {100 * confidence:g} % interval of a percentile bootstrap over the records. Exact match, "
        "ROUGE, gap kept and win rate are percentages. Gap kept is (gist - negative) / (positive - negative) in "
        f"{_SHARES[metric]}, over the same resampled records in all three; it is empty unless the positive control is "
        "above the negative one in every resample. Gap kept, swapped has the gist of another prompt in place of the "
        "negative control: how much of the gist is its prompt, and not what any gist does to an answer.",
    ]
    for evaluation in evaluations:
        about, settings_shown = evaluation.model, ", ".join(f"{k} = {v}" for k, v in evaluation.settings.items())
        trained = about["num_gist_tokens"]
        lines += [
            "",
            f"## {about['name']}",
            "",
            f"- model `{about['fingerprint']}`, tokenizer `{about['tokenizer']}`, template {about['template']}, "
            + ("not trained for gisting" if trained is None else f"trained with k = {trained[0]} to {trained[1]}"),
            f"- {settings_shown}",
            f"- {', '.join(f'{name} {value}' for name, value in evaluation.environment.items() if name != 'format')}",
        ]
        lines += [
            f"- {split.name}: {len(split.records):,} records, prompts of {_mean(split.prompt_tokens):.1f} tokens on "
            f"average, SHA-256 `{split.data_hash[:16]}`"
            for split in evaluation.splits
        ]
        lines += ["", *_dense_table(COLUMNS, result_rows(evaluation, metric=metric, **settings))]
        if evaluation.judgements:
            header = ("split", "k", "first", "second", "win rate of the first", "ties", "unparsable", "judge")
            lines += ["", *_dense_table(header, [_judged(one, settings) for one in evaluation.judgements])]
    return "\n".join(lines) + "\n"


def write_report(
    evaluations: Sequence[Evaluation], directory: str | Path, *, metric: str | None = None, **settings: Any
) -> list[Path]:
    """Write ``report.md`` with its plots ``quality_by_k.png`` and ``quality_by_compression.png``.

    Args:
        evaluations: evaluations of one or several models, such as one checkpoint per k; each is a line in the plots.
        directory: where to write the files; created if missing.
        metric: the metric to plot and for which to show the kept gap, as for :func:`result_rows`.
        **settings: of the intervals, as for :func:`gisting.eval.statistics.bootstrap`.

    Returns:
        The paths of the files.

    Raises:
        GistError: there are no evaluations, the metric was not scored, or matplotlib is not installed.
    """
    metric = _metric(evaluations, metric)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plots = {
        "quality_by_k.png": ("gist tokens k", False),
        "quality_by_compression.png": ("compression: prompt tokens / k", True),
    }
    text = markdown(evaluations, metric=metric, **settings)
    for name, (label, is_compression) in plots.items():
        _plot(evaluations, directory / name, metric, label, is_compression, settings)
        text += f"\n![{_SHARES[metric]} against {label}]({name})\n"
    (directory / "report.md").write_text(text, encoding="utf-8")
    return [directory / "report.md", *(directory / name for name in plots)]


def _plot(
    evaluations: Sequence[Evaluation],
    path: Path,
    metric: str,
    label: str,
    is_compression: bool,
    settings: dict[str, Any],
) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GistError("the plots of a report need matplotlib; run: pip install 'gist-tokens[eval]'") from error
    names = list(dict.fromkeys(split.name for evaluation in evaluations for split in evaluation.splits))
    figure = Figure(figsize=(4.5 * len(names) + 1.5, 4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        ticks: set[float] = set()
        for evaluation in evaluations:
            for split in (one for one in evaluation.splits if one.name == name):
                places = [_mean(split.prompt_tokens) / k if is_compression else float(k) for k in split.counts]
                ticks |= set(places)
                for condition in split.conditions:
                    found = [split.result(condition, k).interval(metric, **settings) for k in split.counts]
                    middle = [100 * one.value for one in found]
                    line = condition if len(evaluations) == 1 else f"{condition}, {evaluation.model['name']}"
                    style = "-o" if condition == "gist" else "--."
                    (drawn,) = panel.plot(places, middle, style, label=line)
                    low, high = ([100 * getattr(one, side) for one in found] for side in ("low", "high"))
                    panel.fill_between(places, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(ticks), [f"{tick:.3g}" for tick in sorted(ticks)])
        panel.set(title=name, xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"{_SHARES[metric]} (%)")
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    figure.legend(handles=[*lines.values()], loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def _metric(evaluations: Sequence[Evaluation], wanted: str | None) -> str:
    """The metric to show, which every result must have."""
    results = [result for evaluation in evaluations for split in evaluation.splits for result in split.results]
    if not results:
        raise GistError("evaluations is empty; give at least one results file")
    scored = [name for name in _SHARES if all(name in result.scores for result in results)]
    if wanted is None:
        return "rouge_l" if "rouge_l" in scored else "exact_match"
    if wanted not in scored:
        raise GistError(f"metric must be one that all results have ({', '.join(scored)}), got {wanted!r}")
    return wanted


def _judged(judgement: Judgement, settings: dict[str, Any]) -> tuple[str, ...]:
    return (
        judgement.split,
        str(judgement.num_gist_tokens),
        judgement.first,
        judgement.second,
        _percent(judgement.win_rate(**settings)),
        str(judgement.num_ties),
        str(judgement.num_unparsable),
        judgement.judge,
    )


def _dense_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table without the columns in which every cell is empty."""
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return markdown_table([header[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _percent(found: Interval | None) -> str:
    return "" if found is None else f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _number(found: Interval | None) -> str:
    return "" if found is None else f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers)
