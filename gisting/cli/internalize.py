"""``gisting internalize``: train a prompt into the weights, stage by stage."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gisting.cli.options import takes_settings
from gisting.cli.shared import err, json_option, load_patched, out, print_json
from gisting.errors import GistError
from gisting.internalize.settings import InternalizeSettings, StageSettings
from gisting.tokens.text import read_text

__all__ = ["internalize"]

_RUN_ON = {"no-prompt": "the bare query", "prompt": "the prompt", "gist": "the gist of the prompt"}
_OLD_NAMES = r".*(will be removed in the next release|is now called)"


def _notes_old_names(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command to print a note about each old name that it is given."""

    @functools.wraps(command)
    def call(**values: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", _OLD_NAMES, DeprecationWarning)
            warnings.showwarning = lambda message, *_: err.print(f"note: {message}", highlight=False, soft_wrap=True)
            command(**values)

    return call


@_notes_old_names
@takes_settings
def internalize(
    settings: InternalizeSettings,
    compressor: Annotated[str | None, typer.Option(hidden=True)] = None,
    layout: Annotated[str | None, typer.Option(hidden=True)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False,
    as_json: Annotated[bool, json_option("one object, with settings, stages and their scores")] = False,
) -> None:
    """Finetune a model in stages in which the prompt and its examples shrink to nothing.

    After the last stage the bare query is enough. Steps, epochs and batches are counted over all stages together. The
    records that each stage reads are in OUTPUT/stage-N/data.jsonl.

    Example: gisting internalize ./llama --prompt-file prompt.txt --data train.jsonl --eval held-out.jsonl --examples 3
    --output runs/internalized

    Example: gisting internalize ./llama --prompt-file prompt.txt --data train.jsonl --control full --output runs/full

    Example: gisting internalize ./llama --prompt-file prompt.txt --method self-study --eval held-out.jsonl
    --output runs/studied
    """
    import yaml

    from gisting.data.records import load_records
    from gisting.internalize.examples import ExamplePool
    from gisting.internalize.stages import internalize as run
    from gisting.measure.training import ShownTraining
    from gisting.train.methods import Method

    for old, value, new in (("compressor", compressor, "shortener"), ("layout", layout, "template")):
        if value is not None:
            warnings.warn(f"--{old} is now called --{new}", DeprecationWarning, stacklevel=2)
            settings = settings.updated(**{new: value})
    needed = ("model", "prompt_file", *(("data",) if settings.method == "stages" else ()), "output")
    required = {name: getattr(settings, name) for name in needed}
    missing = [name for name, value in required.items() if value is None]
    if missing:
        raise GistError(f"{' and '.join(missing)} must be given, on the command line or in a recipe")
    output = Path(required["output"])
    scores = {settings.metric: _metric(settings.metric)}
    shares = _schedule(settings.schedule, settings.stages)
    if settings.control == "shortened" and settings.control_share is None:
        raise GistError("--control shortened needs --share, the kept share of the prompt, such as --share 0.5")
    prompt = read_text(Path(required["prompt_file"]))
    how: dict[str, Any] = {"needs_instruction": False, "columns": settings.columns}
    records = [] if settings.data is None else load_records(settings.data, **how)
    asked = None if settings.eval is None else load_records(settings.eval, **how)
    model, tokenizer = load_patched(required["model"], settings.template, settings.dtype, is_to_be_trained=True)
    arguments = settings.arguments(output, is_encoder_decoder=tokenizer.is_encoder_decoder)
    arguments.disable_tqdm = True  # ShownTraining shows progress
    with ShownTraining() as shown:
        result = run(
            model,
            tokenizer,
            prompt,
            records,
            arguments,
            schedule=shares,
            shortener=_shortener(settings.shortener, settings.rewrites, model, tokenizer),
            pool=ExamplePool(records, min_answer_words=settings.min_answer_words) if settings.max_examples else None,
            eval_records=asked,
            edits=None if settings.edits is None else load_records(settings.edits, columns=settings.columns),
            metrics=scores,
            weights=Method(settings.weights, rank=settings.lora_rank),
            resume=resume,
            callbacks=[shown],
            on_stage=_report if arguments.process_index == 0 else None,
            **{each.name: getattr(settings, each.name) for each in fields(StageSettings)},
        )
    if arguments.process_index > 0:
        return
    text = yaml.safe_dump(settings.written(), sort_keys=False, allow_unicode=True)
    (output / "recipe.yaml").write_text(text, encoding="utf-8")
    if as_json:
        print_json({**asdict(result), "directory": str(output), "tokens": result.tokens})
    else:
        out.print(_table(result, settings.metric))
    out.print(
        f"saved in {output}; run it on {_RUN_ON[result.condition]}: {result.tokens:.1f} tokens per request (mean of "
        "the training requests)",
        highlight=False,
        soft_wrap=True,
    )


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


def _shortener(name: str | None, rewrites: str | None, model: Any, tokenizer: Any) -> Any:
    from gisting.data.records import parse_json
    from gisting.internalize.shorteners import LLMLingua2, NoShortening, Rewrites, SelfInformation

    name = name or ("none" if rewrites is None else "rewrites")
    if (name == "rewrites") != (rewrites is not None):
        raise GistError("--shortener rewrites goes with --rewrites FILE; give both, or neither")
    if rewrites is not None:
        texts = parse_json(read_text(Path(rewrites)), rewrites)
        try:
            return Rewrites({float(key): str(text) for key, text in texts.items()})
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(error, GistError):
                raise
            raise GistError(
                f'{rewrites} must map shares to texts: {{"0.6": "..."}}, got {json.dumps(texts)[:60]}'
            ) from None
    if name == "self-information":
        return SelfInformation(model, tokenizer)
    return LLMLingua2() if name == "llmlingua2" else NoShortening()


def _metric(name: str) -> Any:
    from gisting.eval import metrics

    score = getattr(metrics, name)
    score(["a b"], ["a b"])  # fails now, not after the first stage, if a package is missing
    return score


def _table(result: Any, metric: str) -> Table:
    scale = 1 if metric == "bleu" else 100
    table = Table(
        *("stage", "reads", "asked", "kept", "examples", "tokens", "bare", "as read"),
        title=f"share of the prompt, tokens of a request, {metric}",
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
