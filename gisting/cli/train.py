"""``gisting train``: finetune a model to gist."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from gisting.cli.evaluate import evaluate_split, print_conditions
from gisting.cli.options import takes_settings
from gisting.cli.shared import json_option, out, print_json
from gisting.settings import keywords_for
from gisting.train.settings import Recipe

__all__ = ["train"]


@takes_settings
def train(
    settings: Recipe,
    output: Annotated[
        Path, typer.Option(help="Directory for the trained checkpoint: a new or empty one, unless --resume is given.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in the output directory.")
    ] = False,
    as_json: Annotated[
        bool, json_option("one object: where the checkpoint is, what Trainer measured, and the evaluations")
    ] = False,
) -> None:
    """Finetune a model to gist, with the published hyper-parameters unless others are given.

    The settings of a run are saved with its checkpoint, as recipe.yaml, and with its results in its card, README.md. A
    directory that holds something else is refused. For several processes: accelerate launch
    --config_file recipes/accelerate/fsdp2.yaml "$(command -v gisting)" train ...

    Example: gisting train ./llama --data alpaca.jsonl --eval unseen.jsonl --output runs/llama-gist -k 1:10

    Example: gisting train ./smollm2 --prompts prompts/ --inputs questions.txt --method gist-lora -k 1:16
    --learning-rate 2e-3 --output runs/gist

    Example: gisting train --recipe recipes/llama-7b.yaml --output runs/llama-7b --num-gist-tokens 10
    """
    from gisting.data.records import load_records
    from gisting.measure.progress import progress_bar
    from gisting.measure.training import ShownTraining
    from gisting.models.load import load_tokenizer
    from gisting.train.output import write_card
    from gisting.train.recipe import train_recipe

    chat = functools.cache(functools.partial(load_tokenizer, settings.model or "", settings.template))
    evals = {path: load_records(path, columns=settings.columns, tokenizer=chat) for path in settings.eval}
    with ShownTraining() as shown:
        trained = train_recipe(
            settings,
            output,
            resume=resume,
            held_out=evals,
            callbacks=[shown],
            sampling=lambda total: progress_bar("answering with the prompt in view", total),
        )
    if trained.arguments.process_index > 0:
        return
    out.print(
        f"trained in {trained.metrics['train_runtime']:.0f} s, loss {trained.metrics['train_loss']:.4f}; saved in "
        f"{output}",
        highlight=False,
    )
    if trained.arguments.world_size > 1:
        # Sharded weights can only answer in all processes together.
        for path in evals:
            out.print(f"evaluate with: gisting eval {output} --data {path}", highlight=False, soft_wrap=True)
        evals = {}
    how = {"k": settings.num_gist_tokens[1], **keywords_for(evaluate_split, settings)}
    scored = {
        path: evaluate_split(trained.model, trained.tokenizer, held_out, **how) for path, held_out in evals.items()
    }
    if scored:
        summaries = {path: [result.summary() for result in results] for path, results in scored.items()}
        write_card(output, settings, trained.model, trained.tokenizer, trained.metrics, summaries)
    if as_json:
        rows = [{"data": path, **result.summary()} for path, results in scored.items() for result in results]
        print_json({"directory": str(output), "metrics": trained.metrics, "evaluations": rows})
        return
    for path, results in scored.items():
        print_conditions(path, results, evals[path])
