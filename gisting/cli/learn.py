"""``gisting demo``, ``train``, ``eval`` and ``show``: what a model learns, and how well."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gisting.cli.shared import (
    DeviceOption,
    DtypeOption,
    KOption,
    ModelArgument,
    TemplateOption,
    err,
    load_patched,
    out,
    wanted_k,
)
from gisting.errors import GistError
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS, ENCODER_CONDITIONS, Condition

__all__ = ["demo", "evaluate", "show", "train"]


def demo(
    output: Annotated[Path, typer.Option(help="Directory for checkpoint, data and the compressed instruction.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 rows.")] = 1800,
    seed: Annotated[int, typer.Option(help="Seed of held-out combinations, weights and data.")] = 0,
    results: Annotated[Path | None, typer.Option(help="JSONL file to add the run's numbers to.")] = None,
) -> None:
    """Watch the main job, in a few minutes on a CPU.

    A small LLaMA learns from nothing to gist, an instruction that it never saw is compressed and used, and its cost
    is measured beside no cache and prefix caching.

    Example: gisting demo --seed 1
    """
    from gisting.bench.report import append_row
    from gisting.demo import run_demo

    result = run_demo(output, steps=steps, seed=seed, console=out)
    if results is not None:
        append_row(results, result.to_row())
    out.print(f"\n   {result.total_s:.0f} s in all, {result.train_s:.0f} s of them training.", highlight=False)


def train(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(help="Training records, .jsonl or .json: instruction, input, output.")],
    output: Annotated[Path, typer.Option(help="Directory for the trained checkpoint.")],
    num_gist_tokens: Annotated[
        str, typer.Option("--num-gist-tokens", "-k", help="k, or a range such as 1:10 from which each row draws.")
    ] = "1",
    eval_data: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="Records to evaluate on, under all three conditions; may be repeated."),
    ] = None,
    template: TemplateOption = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Condition to train under: gist, positive or negative, with a weight as in gist=3; may be repeated, "
                "then each row draws one."
            )
        ),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [default: 3 for a decoder]")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, in place of epochs. [default: 16000 for an encoder-decoder]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of an optimiser step. [default: 128; 16 for an encoder-decoder]")
    ] = None,
    per_device_batch_size: Annotated[
        int | None, typer.Option(help="Rows of a forward pass; gradients are accumulated up to the batch size.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: 2e-5; 5e-5 for an encoder-decoder]")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens. [default: 512; 128 for a source]")
    ] = None,
    max_target_length: Annotated[int, typer.Option(help="Longest target of an encoder-decoder, in tokens.")] = 256,
    part_separator: Annotated[
        str | None,
        typer.Option(help="Text at which instructions are cut into parts, to train a model to read chained gists."),
    ] = None,
    pack_length: Annotated[
        int | None,
        typer.Option(
            help="Pack records into rows of so many tokens, those with one instruction behind one copy of it. The "
            "batch size then counts instructions, with up to 8 records each."
        ),
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints to resume from.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 42,
    dtype: Annotated[
        str, typer.Option(help="Type of the trained weights; small steps round away in half precision.")
    ] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output directory.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in the evaluation.")] = 128,
) -> None:
    """Finetune a model to gist, with the published hyper-parameters unless told otherwise.

    Example: gisting train ./llama --data alpaca.jsonl --eval unseen.jsonl --output runs/llama-gist -k 1:10
    """
    from transformers import set_seed

    from gisting._compat import activation_checkpointing
    from gisting.data.records import load_records
    from gisting.train.finetune import finetune, published_arguments

    k = _parse_k(num_gist_tokens)
    records = load_records(data)
    evals = {path: load_records(path) for path in eval_data or []}
    set_seed(seed)
    loaded, tokenizer = load_patched(model, template, dtype, is_to_be_trained=True)
    changes = {
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "learning_rate": learning_rate,
    }
    arguments = published_arguments(
        output,
        is_encoder_decoder=tokenizer.is_encoder_decoder,
        batch_size=batch_size,
        per_device_batch_size=per_device_batch_size,
        save_steps=save_steps,
        save_total_limit=1,
        seed=seed,
        **{name: value for name, value in changes.items() if value is not None},
        **activation_checkpointing(gradient_checkpointing),
    )
    metrics = finetune(
        loaded,
        tokenizer,
        records,
        arguments,
        num_gist_tokens=k,
        conditions=_parse_conditions(condition or ["gist"]),
        max_length=max_length or (128 if tokenizer.is_encoder_decoder else 512),
        max_target_length=max_target_length,
        part_separator=part_separator,
        pack_length=pack_length,
        resume=resume,
    )
    out.print(
        f"trained in {metrics['train_runtime']:.0f} s, loss {metrics['train_loss']:.4f}; saved in {output}",
        highlight=False,
    )
    for path, held_out in evals.items():
        _print_conditions(f"{path}", _evaluate(loaded, tokenizer, held_out, k[1], list(CONDITIONS), max_new_tokens, 32))


def evaluate(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(help="Records, .jsonl or .json: instruction, input, output.")],
    num_gist_tokens: KOption = None,
    condition: Annotated[
        list[str] | None, typer.Option(help="gist, positive or negative; may be repeated. [default: all]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Records at once.")] = 32,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object for each condition, with the predictions.")
    ] = False,
) -> None:
    """Score a model under gist, positive control and negative control: exact match and ROUGE-L.

    Example: gisting eval runs/demo --data runs/demo/unseen.jsonl
    """
    from gisting.data.records import load_records

    records = load_records(data)[:limit]
    loaded, tokenizer = load_patched(model, template, dtype, device)
    results = _evaluate(
        loaded,
        tokenizer,
        records,
        wanted_k(loaded, num_gist_tokens),
        condition or list(CONDITIONS),
        max_new_tokens,
        batch_size,
    )
    if as_json:
        for result in results:
            print(json.dumps(asdict(result), ensure_ascii=False))
    else:
        _print_conditions(str(data), results)


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
) -> None:
    """Draw a mask: 1 where a row sees a key. Each word stands for a token.

    Example: gisting show 'translate to French' 'good morning' -k 2
    """
    import torch

    table: dict[str, Condition] = ENCODER_CONDITIONS if encoder else CONDITIONS
    if condition not in table:
        raise GistError(f"condition must be one of {', '.join(table)}, got {condition!r}")
    before, behind = prompt.split(), input.split()
    labels = [*before, *["<G>"] * num_gist_tokens, *behind]
    is_gist = torch.tensor([[len(before) <= j < len(before) + num_gist_tokens for j in range(len(labels))]])
    visibility = table[condition](is_gist)
    if window is not None:
        visibility = visibility.windowed(window)
    print(visibility.draw(labels))
    if visibility.position_ids is not None:
        print("positions " + " ".join(str(position) for position in visibility.position_ids[0].tolist()))
    if png is not None:
        visibility.save_drawing(png, labels)
        print(f"saved in {png}")


def _parse_k(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise GistError(f"num_gist_tokens must be a number or a range such as 1:10, got {text!r}") from None


def _parse_conditions(items: list[str]) -> dict[str, float]:
    weights = {}
    for item in items:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise GistError(f"condition must be a name or name=weight, got {item!r}") from None
    return weights


def _evaluate(
    model: Any,
    tokenizer: GistTokenizer,
    records: list[Any],
    k: int,
    conditions: list[str],
    max_new_tokens: int,
    batch_size: int,
) -> list[Any]:
    from importlib.util import find_spec

    from rich.progress import Progress

    from gisting.eval.conditions import evaluate as run

    with Progress(console=err, transient=True) as progress:
        bar = progress.add_task("answering", total=len(records) * len(conditions))
        return run(
            model,
            tokenizer,
            records,
            k,
            conditions=conditions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            with_rouge=find_spec("rouge_score") is not None,
            progress=lambda done: progress.advance(bar, done),
        )


def _print_conditions(title: str, results: list[Any]) -> None:
    table = Table("condition", "records", "exact match", "ROUGE-L", title=title)
    for result in results:
        rouge = "" if result.rouge_l is None else f"{100 * result.rouge_l:.1f}"
        table.add_row(result.condition, str(result.num_records), f"{100 * result.exact_match:.1f} %", rouge)
    out.print(table)
