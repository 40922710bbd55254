"""``gisting internalize``: a template goes into the weights, stage by stage."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gisting.cli.shared import err, json_option, load_patched, out, print_json, read_text
from gisting.errors import GistError

__all__ = ["internalize"]

_COMPRESSORS = ("none", "self-information", "llmlingua2", "rewrites")
_METRICS = ("exact_match", "bleu", "rouge_l")
# What says where the other values come from, or goes on with a run, is no setting of it.
_NO_SETTINGS = ("recipe", "resume", "json", "help")


def _read_recipe(ctx: typer.Context, recipe: Path | None) -> Path | None:
    """Take the settings of a file as defaults of the options with these names."""
    if recipe is None or ctx.resilient_parsing:
        return recipe
    import yaml

    names = _settings_of(ctx)
    try:
        values = yaml.safe_load(read_text(recipe))
    except yaml.YAMLError as error:
        raise GistError(f"{recipe} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise GistError(f"{recipe} must hold settings, one 'name: value' a line, got {type(values).__name__}")
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a recipe has {', '.join(names)}"
            raise GistError(f"{recipe}: there is no setting {name!r}; {hint}")
    ctx.default_map = {names[name]: value for name, value in values.items() if value is not None}
    return recipe


def _settings_of(ctx: typer.Context) -> dict[str, Any]:
    """The parameters of the command by the names that a recipe has for them: their long options, or an argument's."""
    named = {}
    for parameter in ctx.command.params:
        long = max(parameter.opts, key=len).removeprefix("--").replace("-", "_")
        if long not in _NO_SETTINGS:
            named[long] = parameter.name
    return named


def internalize(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Directory of a checkpoint, or a repository on the Hugging Face hub.")],
    template: Annotated[Path, typer.Option(help="Text file with the template that every request would begin with.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Training records, .jsonl or .json: input (the query) and output; instructions are not read."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Directory for the checkpoint, and for what each stage read.")],
    recipe: Annotated[
        Path | None,
        typer.Option(
            callback=_read_recipe,
            is_eager=True,
            help="YAML file with these settings by their names; options given here override it.",
        ),
    ] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option("--eval", help="Records that are answered after each stage, bare and with its prompt."),
    ] = None,
    stages: Annotated[int, typer.Option(min=2, help="How many stages.")] = 4,
    schedule: Annotated[
        str, typer.Option(help="Kept share of the template: linear, exponential, inverse, or shares as in 1,0.6,0.3,0.")
    ] = "linear",
    compressor: Annotated[
        str | None,
        typer.Option(
            help="What shortens the template: none, self-information, llmlingua2 or rewrites. [default: none, or "
            "rewrites where they are given]"
        ),
    ] = None,
    rewrites: Annotated[
        Path | None, typer.Option(help='JSON file with shorter templates by their share: {"0.6": "...", "0.3": "..."}.')
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Most similar training records in a full prompt; fewer with each stage.")
    ] = 0,
    min_answer_words: Annotated[
        int,
        typer.Option(
            min=1,
            help="No example has nearly the record's own answer; answers of fewer words may be alike. 1 for commands "
            "and other short texts, as far as they are free text.",
        ),
    ] = 4,
    tail: Annotated[str, typer.Option(help="What is left in the end: none, or gist (k tokens).")] = "none",
    num_gist_tokens: Annotated[
        int, typer.Option("--num-gist-tokens", "-k", min=1, help="With --tail gist: gist tokens.")
    ] = 1,
    gist_stages: Annotated[int, typer.Option(min=1, help="With --tail gist: how many stages read a gist.")] = 1,
    control: Annotated[
        str | None,
        typer.Option(help="In place of the stages, one of as many epochs: bare, full, full-run-bare or compressed."),
    ] = None,
    share: Annotated[float | None, typer.Option(help="With --control compressed: the share of the template.")] = None,
    method: Annotated[str, typer.Option(help="What learns: full or lora.")] = "full",
    lora_rank: Annotated[int, typer.Option(min=1, help="With --method lora.")] = 16,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data, of all stages together. [default: 3 for a decoder]")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of all stages together, in place of epochs.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of an optimiser step. [default: 128; 16 for an encoder-decoder]")
    ] = None,
    per_device_batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a forward pass.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: 2e-5; 5e-5 for an encoder-decoder]")] = None,
    lr_scheduler_type: Annotated[str | None, typer.Option(help="Of each stage. [default: cosine]")] = None,
    warmup_steps: Annotated[
        float | None, typer.Option(help="Of each stage: steps, or below 1 a share of them. [default: 0.03]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: 0]")] = None,
    max_length: Annotated[
        int, typer.Option(min=1, help="Longest request with its answer, in tokens; examples are dropped until it fits.")
    ] = 512,
    max_target_length: Annotated[int, typer.Option(min=1, help="Longest answer of an encoder-decoder.")] = 256,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints to resume from.")] = 500,
    metric: Annotated[str, typer.Option(help="How answers are scored: exact_match, bleu or rouge_l.")] = "exact_match",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in the evaluation.")] = 128,
    layout: Annotated[
        str | None,
        typer.Option(help="Layout of query and answer: alpaca, alpaca-t5, plain or chat. [default: the checkpoint's]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of order and of an adapter's weights.")] = 42,
    dtype: Annotated[str, typer.Option(help="Type of the trained weights.")] = "float32",
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 arithmetic. [default: where a GPU has it]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    as_json: Annotated[bool, json_option("one object, with settings, stages and their scores")] = False,
) -> None:
    """Finetune a model in stages in which template and examples of its prompt shrink to nothing.

    In the end the bare query is enough. What each stage reads lies in OUTPUT/stage-N/data.jsonl.

    Example: gisting internalize ./llama --template template.txt --data train.jsonl --eval held-out.jsonl --examples 3
    --output runs/internalized

    Example: gisting internalize ./llama --template template.txt --data train.jsonl --control full --output runs/full
    """
    from dataclasses import asdict

    import yaml

    from gisting.data.records import load_records
    from gisting.internalize.examples import ExamplePool
    from gisting.internalize.stages import internalize as run
    from gisting.train.methods import Method
    from gisting.train.recipe import Recipe

    settings = Recipe(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        per_device_batch_size=per_device_batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler_type,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        save_steps=save_steps,
        seed=seed,
        bf16=bf16,
    )
    scores = {metric: _metric(metric)}
    shares = _schedule(schedule, stages)
    if control == "compressed" and share is None:
        raise GistError("--control compressed goes with --share, the kept share of the template: --share 0.5")
    records = load_records(data, needs_instruction=False)
    asked = None if eval_data is None else load_records(eval_data, needs_instruction=False)
    loaded, tokenizer = load_patched(model, layout, dtype, is_to_be_trained=True)
    result = run(
        loaded,
        tokenizer,
        read_text(template).rstrip("\n"),
        records,
        settings.arguments(output, is_encoder_decoder=tokenizer.is_encoder_decoder),
        schedule=shares,
        compressor=_compressor(compressor, rewrites, loaded, tokenizer),
        max_examples=examples,
        pool=ExamplePool(records, min_answer_words=min_answer_words) if examples else None,
        eval_records=asked,
        metrics=scores,
        max_new_tokens=max_new_tokens,
        method=Method(method, rank=lora_rank),
        max_length=max_length,
        max_target_length=max_target_length,
        tail=tail,
        num_gist_tokens=num_gist_tokens,
        num_gist_stages=gist_stages,
        control=control,
        control_share=share,
        resume=resume,
        on_stage=_report,
    )
    values = {name: ctx.params[key] for name, key in _settings_of(ctx).items() if ctx.params[key] is not None}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    (output / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if as_json:
        print_json({**asdict(result), "directory": str(output), "tokens": result.tokens})
    else:
        out.print(_table(result, metric))
    out.print(
        f"saved in {output}; run it on {_RUN_ON[result.condition]}: {result.tokens:.1f} tokens a request",
        highlight=False,
        soft_wrap=True,
    )


_RUN_ON = {"no-prompt": "the bare query", "prompt": "the prompt", "gist": "the gist of the template"}


def _report(stage: Any) -> None:
    err.print(f"stage {stage.number}: loss {stage.train_loss:.4f}, {stage.seconds:.0f} s", highlight=False)


def _schedule(text: str, num_stages: int) -> Any:
    from gisting.internalize.schedule import SCHEDULES, Schedule

    if text in SCHEDULES:
        return Schedule.named(text, num_stages)
    try:
        return Schedule(tuple(float(part) for part in text.split(",")))
    except GistError:
        raise
    except ValueError:
        raise GistError(
            f"schedule must be one of {', '.join(SCHEDULES)}, or shares such as 1,0.6,0.3,0, got {text!r}"
        ) from None


def _compressor(name: str | None, rewrites: Path | None, model: Any, tokenizer: Any) -> Any:
    from gisting.data.records import parse_json
    from gisting.internalize.compressors import LLMLingua2, NoCompression, Rewrites, SelfInformation

    name = name or ("none" if rewrites is None else "rewrites")
    if name not in _COMPRESSORS:
        raise GistError(f"compressor must be one of {', '.join(_COMPRESSORS)}, got {name!r}")
    if (name == "rewrites") != (rewrites is not None):
        raise GistError("--compressor rewrites goes with --rewrites FILE; give both, or neither")
    if rewrites is not None:
        texts = parse_json(read_text(rewrites), str(rewrites))
        try:
            return Rewrites({float(key): str(text) for key, text in texts.items()})
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(error, GistError):
                raise
            raise GistError(
                f'{rewrites} must hold texts by their share: {{"0.6": "..."}}, got {json.dumps(texts)[:60]}'
            ) from None
    if name == "self-information":
        return SelfInformation(model, tokenizer)
    return LLMLingua2() if name == "llmlingua2" else NoCompression()


def _metric(name: str) -> Any:
    from gisting.eval import metrics

    if name not in _METRICS:
        raise GistError(f"metric must be one of {', '.join(_METRICS)}, got {name!r}")
    score = getattr(metrics, name)
    score(["a b"], ["a b"])  # what it needs is missed now, not after the first stage
    return score


def _table(result: Any, metric: str) -> Table:
    scale = 1 if metric == "bleu" else 100
    table = Table(
        *("stage", "reads", "asked", "kept", "examples", "tokens", "bare", "as read"),
        title=f"share of the template, tokens of a request, {metric}",
    )
    for one in result.stages:
        table.add_row(
            str(one.number),
            one.condition if one.num_gist_tokens is None else f"gist, k = {one.num_gist_tokens}",
            f"{100 * one.share:.0f} %",
            f"{100 * one.realised_share:.0f} %",
            f"{one.mean_examples:.1f}",
            f"{one.tokens:.1f}",
            *(
                f"{scale * one.metrics[condition][metric]:.1f}" if condition in one.metrics else "-"
                for condition in ("no-prompt", one.condition)
            ),
        )
    return table
