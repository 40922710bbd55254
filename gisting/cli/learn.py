"""``gisting demo``, ``train``, ``eval`` and ``show``: what a model learns, and how well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from gisting.cli.options import takes_settings
from gisting.cli.shared import (
    DeviceOption,
    DtypeOption,
    TemplateOption,
    err,
    json_option,
    load_patched,
    out,
    print_json,
    wanted_k,
)
from gisting.errors import GistError
from gisting.train.settings import Recipe

if TYPE_CHECKING:
    from gisting.tokens import GistTokenizer

__all__ = ["demo", "evaluate", "show", "train"]


def demo(
    output: Annotated[Path, typer.Option(help="Directory for checkpoint, data and the compressed instruction.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 32 rows.")] = 2400,
    seed: Annotated[int, typer.Option(help="Seed of held-out combinations, weights and data.")] = 0,
    results: Annotated[Path | None, typer.Option(help="JSONL file to add the run's numbers to.")] = None,
    as_json: Annotated[bool, json_option("one object, with the run's numbers")] = False,
) -> None:
    """Watch the main job, in a few minutes on a CPU.

    A small LLaMA learns from nothing to gist, an instruction that it never saw is compressed and used, and its cost
    is measured beside no cache and prefix caching.

    Example: gisting demo --seed 1
    """
    from gisting.demo import run_demo
    from gisting.measure.rows import append_row

    result = run_demo(output, steps=steps, seed=seed)  # in a console of its own, with markup
    if results is not None:
        append_row(results, result.to_row())
    if as_json:
        print_json(result.to_row())
    out.print(f"\n   {result.total_s:.0f} s in all, {result.train_s:.0f} s of them training.", highlight=False)


@takes_settings
def train(
    settings: Recipe,
    output: Annotated[Path, typer.Option(help="Directory for the trained checkpoint.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output directory.")
    ] = False,
    as_json: Annotated[
        bool, json_option("one object: where the checkpoint is, what Trainer measured, and the evaluations")
    ] = False,
) -> None:
    """Finetune a model to gist, with the published hyper-parameters unless told otherwise.

    The settings of a run are saved beside its checkpoint, as recipe.yaml. For several processes: accelerate launch
    --config_file recipes/accelerate/fsdp2.yaml "$(command -v gisting)" train ...

    Example: gisting train ./llama --data alpaca.jsonl --eval unseen.jsonl --output runs/llama-gist -k 1:10

    Example: gisting train --recipe recipes/llama-7b.yaml --output runs/llama-7b --num-gist-tokens 10
    """
    from gisting.data.records import load_records
    from gisting.train.recipe import train_recipe

    evals = {path: load_records(path) for path in settings.eval}
    trained = train_recipe(settings, output, resume=resume)
    if trained.arguments.process_index > 0:
        return
    out.print(
        f"trained in {trained.metrics['train_runtime']:.0f} s, loss {trained.metrics['train_loss']:.4f}; saved in "
        f"{output}",
        highlight=False,
    )
    if trained.arguments.world_size > 1:
        # Sharded weights answer in all processes together or not at all.
        for path in evals:
            out.print(f"evaluate with: gisting eval {output} --data {path}", highlight=False, soft_wrap=True)
        evals = {}
    k = settings.num_gist_tokens[1]
    scored = {
        path: _evaluate(trained.model, trained.tokenizer, held_out, k, settings.chunk_length, settings.max_new_tokens)
        for path, held_out in evals.items()
    }
    if as_json:
        rows = [{"data": path, **result.summary()} for path, results in scored.items() for result in results]
        print_json({"directory": str(output), "metrics": trained.metrics, "evaluations": rows})
        return
    for path, results in scored.items():
        _print_conditions(path, results)


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory of a checkpoint, or a repository on the Hugging Face hub.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Records, .jsonl or .json: instruction, input, output. Or NAME=FILE, to call the split something else "
            "than its file; may be repeated."
        ),
    ] = None,
    num_gist_tokens: Annotated[
        str | None,
        typer.Option(
            "--num-gist-tokens",
            "-k",
            help="Gist tokens for each prompt: a number, several as in 1,2,4,8, or a range such as 1:4. By default the "
            "most that the checkpoint was trained with.",
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="gist, positive, negative, truncated (the first k tokens of the instruction in place of the gist), "
            "prompt (the whole instruction, without gist tokens) or no-prompt (the input alone); may be repeated. "
            "[default: the first three]"
        ),
    ] = None,
    chunk_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Give longer prompts a gist for each chunk. By default as the checkpoint was trained."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records of each split.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Records at once.")] = 32,
    perplexity: Annotated[bool, typer.Option(help="Also the perplexity of the references.")] = True,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="In place of model and data: a file that --output wrote; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for everything: model, data, settings, answers and scores (JSON).")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Directory for a report: tables with intervals, and plots.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="exact_match, rouge_1, rouge_2 or rouge_l for the plots and the kept gap. [default: rouge_l where it "
            "is installed]"
        ),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Have gist and positive control compared by a model behind this OpenAI-compatible URL."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's model.")] = None,
    judge_key: Annotated[
        str | None, typer.Option(envvar="GISTING_JUDGE_KEY", help="The judge's API key.", show_envvar=True)
    ] = None,
    judge_cache: Annotated[Path, typer.Option(help="Directory in which the judge's replies are kept.")] = Path(
        "runs/judge"
    ),
    seed: Annotated[int, typer.Option(help="Seed of intervals, and of the order in which a judge reads.")] = 0,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("an object for each split, k and condition, with the predictions")] = False,
) -> None:
    """Score a model under gist, positive control, negative control and baselines, for any k.

    Exact match with its 95 % interval, ROUGE, perplexity and lengths; a results file, and a report made from results
    files alone.

    Example: gisting eval runs/demo --data runs/demo/unseen.jsonl -k 1,2 --output runs/eval.json --report runs/report
    """
    from gisting.eval.judge import Judge
    from gisting.eval.report import write_report
    from gisting.eval.results import Evaluation
    from gisting.models.load import trained_chunk_length
    from gisting.visibility import CONDITIONS

    if results and (model or data):
        raise GistError("give either a model with --data, or --results; a results file holds what was answered")
    if results and output is not None and len(results) > 1:
        raise GistError("--output takes one evaluation; give one --results with it")
    if (judge_url is None) != (judge_model is None):
        raise GistError("a judge needs both --judge-url and --judge-model")
    if results:
        found = [Evaluation.load(path) for path in results]
    elif model and data:
        splits = _splits(data, limit)
        loaded, tokenizer = load_patched(model, template, dtype, device)
        counts = [wanted_k(loaded, None)] if num_gist_tokens is None else _parse_counts(num_gist_tokens)
        settings = {
            "conditions": condition or list(CONDITIONS),
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
        with _bar("judging", total) as progress:
            found = [one.judged(judge, progress=progress) for one in found]
    if output is not None:
        found[0].save(output)
    files = [] if report is None else write_report(found, report, metric=metric, seed=seed)
    for one in found:
        for split in one.splits:
            if as_json:
                for result in split.results:
                    row = {"split": split.name, **result.summary(), "predictions": result.predictions}
                    print_json(row)
            else:
                _print_conditions(
                    split.name if len(found) == 1 else f"{split.name}, {one.model['name']}", split.results
                )
        for judgement in one.judgements if not as_json else ():
            _print_judgement(judgement, seed)
    for path in ([output] if output is not None else []) + files:
        err.print(f"saved {path}", highlight=False, soft_wrap=True)


def show(
    prompt: Annotated[str, typer.Argument(help="Words before the gist.")] = "a b c",
    input: Annotated[str, typer.Argument(help="Words behind it.")] = "d e",
    num_gist_tokens: Annotated[
        int, typer.Option("--num-gist-tokens", "-k", min=1, help="Gist tokens between them.")
    ] = 2,
    condition: Annotated[str, typer.Option(help="gist, positive or negative.")] = "gist",
    encoder: Annotated[bool, typer.Option("--encoder", help="The mask of an encoder (T5), not of a decoder.")] = False,
    window: Annotated[int | None, typer.Option(min=1, help="Sliding window of so many rows.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw it to this file.")] = None,
    as_json: Annotated[bool, json_option("one object, with labels, positions and the mask row by row")] = False,
) -> None:
    """Draw a mask: 1 where a row sees a key. Each word stands for a token.

    Example: gisting show 'translate to French' 'good morning' -k 2
    """
    import torch

    from gisting.visibility import CONDITIONS, ENCODER_CONDITIONS, Condition

    table: dict[str, Condition] = ENCODER_CONDITIONS if encoder else CONDITIONS
    if condition not in table:
        raise GistError(f"condition must be one of {', '.join(table)}, got {condition!r}")
    before, behind = prompt.split(), input.split()
    labels = [*before, *["<G>"] * num_gist_tokens, *behind]
    is_gist = torch.tensor([[len(before) <= j < len(before) + num_gist_tokens for j in range(len(labels))]])
    visibility = table[condition](is_gist)
    if window is not None:
        visibility = visibility.windowed(window)
    positions = None if visibility.position_ids is None else visibility.position_ids[0].tolist()
    if as_json:
        mask = visibility.to_dense()[0].int().tolist()
        print_json({"labels": labels, "position_ids": positions, "mask": mask})
    else:
        print(visibility.draw(labels))
        if positions is not None:
            print("positions " + " ".join(map(str, positions)))
    if png is not None:
        visibility.save_drawing(png, labels)
        print(f"saved in {png}")


def _evaluate(
    model: Any,
    tokenizer: GistTokenizer,
    records: list[Any],
    k: int,
    chunk_length: int | None,
    max_new_tokens: int,
) -> list[Any]:
    from gisting.eval.conditions import evaluate as run
    from gisting.visibility import CONDITIONS

    with _bar("answering", len(records) * len(CONDITIONS)) as progress:
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
    with _bar("answering", total) as progress:
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


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress

    with Progress(console=err, transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda done: progress.advance(bar, done)


def _has_rouge() -> bool:
    from importlib.util import find_spec

    return find_spec("rouge_score") is not None


def _splits(items: list[str], limit: int | None) -> dict[str, list[Any]]:
    """Records by the name of their split: the file's own, unless it is given as NAME=FILE."""
    from gisting.data.records import load_records

    splits = {}
    for item in items:
        name, is_named, path = item.partition("=")
        if not is_named or Path(item).exists():
            name, path = Path(item).stem, item
        if name in splits:
            raise GistError(f"--data names split {name!r} twice; call one something else: NAME={path}")
        splits[name] = load_records(path)[:limit]
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


def _print_conditions(title: str, results: list[Any]) -> None:
    headers = {"rouge_l": "ROUGE-L", "perplexity": "perplexity"}
    shown = {name: header for name, header in headers.items() if name in results[0].metrics}
    table = Table("k", "condition", "records", "exact match \\[95 %]", *shown.values(), title=title)
    table.columns[3].no_wrap = True
    for result in results:
        exact = result.interval("exact_match")
        values = {name: result.interval(name, num_resamples=1).value for name in shown}
        table.add_row(
            str(result.num_gist_tokens),
            result.condition,
            str(result.num_records),
            f"{100 * exact.value:.1f} % \\[{100 * exact.low:.1f}, {100 * exact.high:.1f}]",
            *(f"{value:.4g}" if name == "perplexity" else f"{100 * value:.1f}" for name, value in values.items()),
        )
    out.print(table)


def _print_judgement(judgement: Any, seed: int) -> None:
    rate = judgement.win_rate(seed=seed)
    said = "- no reply could be read -"
    if rate is not None:
        said = f"in {100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    out.print(
        f"{judgement.split}, k = {judgement.num_gist_tokens}: {judgement.first} wins over {judgement.second} {said} "
        f"({judgement.num_ties} ties, {judgement.num_unparsable} unparsable; {judgement.judge})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
