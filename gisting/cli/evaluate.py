"""``gisting eval``: how well a model answers from gists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gisting.cli.shared import (
    DeviceOption,
    DtypeOption,
    TemplateOption,
    err,
    json_option,
    load_patched,
    out,
    plain,
    print_json,
    wanted_k,
)
from gisting.errors import GistError
from gisting.measure.progress import progress_bar

if TYPE_CHECKING:
    from gisting.tokens import GistTokenizer

__all__ = ["evaluate", "evaluate_split", "print_conditions"]

_SAMPLE = 240  # characters of a sample's text


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory of a checkpoint, or a repository on the Hugging Face hub.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Records, with instruction, input, output or with messages: a .json, .jsonl, .csv or .parquet file, "
            "or a data set on the hub. Or NAME=FILE, to give the split a name other than its file's; may be repeated."
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="What columns of the records are called, such as instruction=question,output=answer."),
    ] = None,
    num_gist_tokens: Annotated[
        str | None,
        typer.Option(
            "--num-gist-tokens",
            "-k",
            help="Gist tokens for each prompt: a number, several as in 1,2,4,8, or a range such as 1:4. By default the "
            "largest number that the checkpoint was trained with.",
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="gist, positive, prompt (the whole instruction, without gist tokens), negative, swapped (the gist of "
            "another record's instruction), truncated (the first k tokens of the instruction instead of the gist) or "
            "no-prompt (the input alone); may be repeated. [default: the first five]"
        ),
    ] = None,
    chunk_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Give longer prompts one gist for each chunk of this many tokens. By default as in training."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N records of each split.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per batch.")] = 32,
    perplexity: Annotated[bool, typer.Option(help="Also calculate the perplexity of the references.")] = True,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of model and data: a file that --output wrote; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the model, data, settings, answers and scores.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Directory for a report: tables with intervals, and plots.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="exact_match, rouge_1, rouge_2 or rouge_l for the plots and the gap kept. [default: rouge_l if "
            "it is installed]"
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Compare gist and positive control with a model at this OpenAI-compatible URL."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Name of the judge's model.")] = None,
    judge_key: Annotated[
        str | None, typer.Option(envvar="GISTING_JUDGE_KEY", help="The judge's API key.", show_envvar=True)
    ] = None,
    judge_cache: Annotated[Path, typer.Option(help="Directory that keeps the judge's replies.")] = Path("runs/judge"),
    samples: Annotated[int, typer.Option(min=0, help="Records of each split to show with their answers.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the intervals, and of the order in which the judge reads.")] = 0,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("an object for each split, k and condition, with the predictions")] = False,
) -> None:
    """Score a model with gists and with the controls, for any number of gist tokens.

    Prints exact match with its 95 % interval, ROUGE, perplexity, the share of the gap between the controls that the
    gist keeps, and the first answers. --output keeps everything in a results file;
    --report writes a report, which can also be made from results files alone.

    Example: gisting eval runs/demo --data runs/demo/unseen.jsonl -k 1,2 --output runs/eval.json --report runs/report
    """
    from gisting.eval.judge import Judge
    from gisting.eval.report import write_report
    from gisting.eval.results import Evaluation
    from gisting.models.load import load_tokenizer, trained_chunk_length

    if results and (model or data):
        raise GistError("give either a model with --data, or --results, whose files already hold the answers")
    if results and output is not None and len(results) > 1:
        raise GistError("--output writes one evaluation; give one --results with it, not several")
    if (judge_url is None) != (judge_model is None):
        raise GistError("a judge needs both --judge-url and --judge-model")
    if results:
        found = [Evaluation.load(path) for path in results]
    elif model and data:
        splits = _splits(data, limit, columns, functools.cache(functools.partial(load_tokenizer, model, template)))
        loaded, tokenizer = load_patched(model, template, dtype, device)
        counts = [wanted_k(loaded, None)] if num_gist_tokens is None else _parse_counts(num_gist_tokens)
        settings = {
            "conditions": condition or _default_conditions(splits),
            "chunk_length": chunk_length or trained_chunk_length(loaded),
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "with_perplexity": perplexity,
        }
        found = [_evaluate_splits(loaded, tokenizer, model, splits, counts, settings)]
    else:
        raise GistError("give a model and --data FILE, or --results FILE")
    if judge_url is not None and judge_model is not None:
        judge = Judge(judge_url, judge_model, judge_cache, judge_key, seed)
        total = sum(len(split.records) * len(split.counts) for one in found for split in one.splits)
        with progress_bar("judging", total) as progress:
            found = [one.judged(judge, progress=progress) for one in found]
    if output is not None:
        found[0].save(output)
    files = [] if report is None else write_report(found, report, metric=metric, seed=seed)
    for one in found:
        for split in one.splits:
            if as_json:
                for result in split.results:
                    kept = _kept(split, result, metric, seed) if result.condition == "gist" else {}
                    shares = {name: None if share is None else share.value for name, share in kept.items()}
                    print_json(
                        {
                            "split": split.name,
                            **result.summary(),
                            **({"gap_kept": shares} if kept else {}),
                            "predictions": result.predictions,
                        }
                    )
            else:
                title = split.name if len(found) == 1 else f"{split.name}, {one.model['name']}"
                print_conditions(title, split.results, split.records, metric=metric, samples=samples, seed=seed)
        for judgement in one.judgements if not as_json else ():
            _print_judgement(judgement, seed)
    for path in ([output] if output is not None else []) + files:
        err.print(f"saved {path}", highlight=False, soft_wrap=True)


def evaluate_split(
    model: Any,
    tokenizer: GistTokenizer,
    records: list[Any],
    k: int,
    chunk_length: int | None = None,
    max_new_tokens: int = 128,
) -> list[Any]:
    """Evaluate one list of records under the conditions, with a progress bar."""
    from gisting.eval.conditions import evaluate as run
    from gisting.visibility import CONDITIONS

    with progress_bar("answering", len(records) * len(CONDITIONS)) as progress:
        return run(
            model,
            tokenizer,
            records,
            k,
            chunk_length=chunk_length,
            max_new_tokens=max_new_tokens,
            with_rouge=_has_rouge(),
            progress=progress,
        )


def _default_conditions(splits: dict[str, list[Any]]) -> list[str]:
    from gisting.eval.conditions import DEFAULT_CONDITIONS, default_conditions

    found = default_conditions(*splits.values())
    if len(found) < len(DEFAULT_CONDITIONS):
        err.print(
            "note: all records of a split have the same instruction, so there is no gist of another one to compare "
            "with (swapped); `gisting check` brings one",
            highlight=False,
            soft_wrap=True,
        )
    return list(found)


def _evaluate_splits(
    model: Any,
    tokenizer: GistTokenizer,
    name: str,
    splits: dict[str, list[Any]],
    counts: list[int],
    settings: dict[str, Any],
) -> Any:
    from gisting.eval.results import evaluate_splits
    from gisting.measure.rows import environment

    total = sum(map(len, splits.values())) * len(settings["conditions"]) * len(counts)
    with progress_bar("answering", total) as progress:
        return evaluate_splits(
            model,
            tokenizer,
            splits,
            counts,
            name=name,
            environment=environment(),
            with_rouge=_has_rouge(),
            progress=progress,
            **settings,
        )


def _has_rouge() -> bool:
    from importlib.util import find_spec

    return find_spec("rouge_score") is not None


def _splits(
    items: list[str], limit: int | None, columns: str | None, tokenizer: Callable[[], GistTokenizer]
) -> dict[str, list[Any]]:
    """Read the records of each split, which is named after its file unless it is given as NAME=FILE."""
    from gisting.data.records import load_records
    from gisting.train.settings import COLUMNS

    try:
        renamed = None if columns is None else COLUMNS.read(columns)
    except ValueError:
        raise GistError(f"columns must be {COLUMNS.expected}, got {columns!r}") from None
    splits = {}
    for item in items:
        name, is_named, path = item.partition("=")
        if not is_named or Path(item).exists():
            name, path = Path(item).stem, item
        if name in splits:
            raise GistError(f"two --data files are called {name!r}; rename one: --data NAME={path}")
        splits[name] = load_records(path, columns=renamed, tokenizer=tokenizer)[:limit]
    return splits


def _parse_counts(text: str) -> list[int]:
    """``"4"``, ``"1,2,4"``, ``"1:4"``."""
    counts = []
    for part in text.split(","):
        low, _, high = part.partition(":")
        try:
            counts += range(int(low), int(high or low) + 1)
        except ValueError:
            raise GistError(
                f"num_gist_tokens must be a number, several as in 1,2,4, or a range such as 1:4, got {text!r}"
            ) from None
    return counts


def _kept(split: Any, result: Any, metric: str | None, seed: int) -> dict[str, Any]:
    """The share of the gap that a gist's result keeps against each lower control that was evaluated, as an interval."""
    from gisting.eval.report import gap_kept

    metric = metric or ("rouge_l" if "rouge_l" in result.scores else "exact_match")
    controls = [name for name in ("negative", "swapped") if name in split.conditions]
    return {name: gap_kept(split, result.num_gist_tokens, metric, against=name, seed=seed) for name in controls}


def print_conditions(
    title: str, results: list[Any], records: list[Any], *, metric: str | None = None, samples: int = 2, seed: int = 0
) -> None:
    """Print a table of the results under each condition, and the first answers.

    Args:
        title: what was answered.
        results: a result for each k and condition.
        records: the records that were answered.
        metric: metric of the gap kept; None for ROUGE-L if it was scored, else exact match.
        samples: how many records to show with their answers for the largest k.
        seed: seed of the intervals.
    """
    from gisting.eval.results import Split

    split = Split(title, records, [], results)
    metric = metric or ("rouge_l" if "rouge_l" in results[0].scores else "exact_match")
    headers = {"rouge_l": "ROUGE-L", "perplexity": "perplexity"}
    shown = {name: header for name, header in headers.items() if name in results[0].metrics}
    controls = {"negative": "gap kept", "swapped": "swapped"}
    controls = {name: header for name, header in controls.items() if name in split.conditions}
    columns = ["k", "condition", "exact match [95 %]", *shown.values(), *controls.values()]
    # At 80 columns, nothing is broken up.
    table = Table(
        *columns, title=f"{title}: {len(records):,} records", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    table.columns[2].no_wrap = True
    for result in results:
        exact = result.interval("exact_match")
        values = {name: result.interval(name, num_resamples=1).value for name in shown}
        kept = _kept(split, result, metric, seed) if result.condition == "gist" else {}
        table.add_row(
            str(result.num_gist_tokens),
            result.condition,
            f"{100 * exact.value:.1f} % [{100 * exact.low:.1f}, {100 * exact.high:.1f}]",
            *(f"{value:.4g}" if name == "perplexity" else f"{100 * value:.1f}" for name, value in values.items()),
            *("" if (share := kept.get(name)) is None else f"{100 * share.value:.1f} %" for name in controls),
        )
    out.print(table)
    if {"gist", "positive"} <= set(split.conditions) and controls:
        named = headers.get(metric, metric.replace("_", " "))
        out.print(
            f"Gap kept: (gist - negative) / (positive - negative) in {named}; left empty where positive is not clearly "
            "above negative."
            + (
                " Swapped: the same with the gist of another prompt instead of negative."
                if "swapped" in controls
                else ""
            ),
            highlight=False,
        )
    answers = [result for result in results if result.num_gist_tokens == split.counts[-1]]
    for number, record in enumerate(records[:samples]):
        sample = Table.grid(padding=(0, 2))
        sample.add_column(no_wrap=True)
        sample.add_column(overflow="fold")
        for label, text in (
            ("instruction", record.instruction),
            ("input", str(record.input)),
            ("reference", record.output),
            *((result.condition, result.predictions[number]) for result in answers),
        ):
            sample.add_row(label, plain(text if len(text) <= _SAMPLE else f"{text[: _SAMPLE - 3]}..."))
        out.print(f"\nrecord {number + 1}, k = {split.counts[-1]}", highlight=False)
        out.print(sample)


def _print_judgement(judgement: Any, seed: int) -> None:
    rate = judgement.win_rate(seed=seed)
    said = "- none of the replies could be read -"
    if rate is not None:
        said = f"in {100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    out.print(
        f"{judgement.split}, k = {judgement.num_gist_tokens}: {judgement.first} wins over {judgement.second} {said} "
        f"({judgement.num_ties} ties, {judgement.num_unparsable} unparsable; {judgement.judge})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
