"""``gisting data``: prepare training data from public sources, or let a model write them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gisting.cli.shared import (
    Commands,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    TemplateOption,
    json_option,
    load_patched,
    out,
    print_json,
)
from gisting.data.alpaca_plus import SIZES, SOURCES, alpaca_plus, read_source, save_splits
from gisting.errors import GistError

__all__ = ["data_app"]

data_app = Commands(name="data", help="Prepare training data.")


@data_app.callback()
def _data() -> None:
    pass


@data_app.command("alpaca-plus")
def data_alpaca_plus(
    output: Annotated[Path, typer.Option(help="Directory to write the four files to.")],
    alpaca: Annotated[str, typer.Option(help="Stanford Alpaca: a path or a URL.")] = SOURCES["alpaca"],
    self_instruct: Annotated[str, typer.Option(help="Self-Instruct, generated: a path or a URL.")] = SOURCES[
        "self_instruct"
    ],
    human: Annotated[str, typer.Option(help="Self-Instruct, human-written tasks: a path or a URL.")] = SOURCES["human"],
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Write the splits even if their sizes differ from the published ones.")
    ] = False,
    as_json: Annotated[bool, json_option("an object per split")] = False,
) -> None:
    """Rebuild Alpaca+, the data of the Gisting paper, from its three sources, and check the sizes of its splits.

    The data are licensed for research only (Alpaca's CC BY-NC 4.0).

    Example: gisting data alpaca-plus --output data --alpaca alpaca_data.json
    """
    splits = alpaca_plus(read_source(alpaca), read_source(self_instruct), read_source(human))
    sizes = {name: len(records) for name, records in splits.items()}
    if sizes != SIZES and not any_size:
        found = ", ".join(f"{name} {size:,} (published {SIZES[name]:,})" for name, size in sizes.items())
        raise GistError(
            f"the sizes of the splits differ from the published ones: {found}; use the sources at the commits of the "
            "paper (the defaults), or pass --any-size to write these splits anyway"
        )
    table = Table("split", "records", "file")
    for name, path in save_splits(splits, output).items():
        if as_json:
            print_json({"split": name, "num_records": sizes[name], "file": str(path)})
        else:
            table.add_row(name, f"{sizes[name]:,}", str(path))
    if not as_json:
        out.print(table)


@data_app.command("self-distil")
def data_self_distil(
    model: ModelArgument,
    prompts: Annotated[Path, typer.Option(help="A directory of text files, each a prompt, or a file of prompts.")],
    inputs: Annotated[Path, typer.Option(help="A file of inputs: a text with one on each line, or data with input.")],
    output: Annotated[Path, typer.Option(help="JSONL file for the records.")],
    inputs_per_prompt: Annotated[
        int | None,
        typer.Option(min=1, help="How many inputs each prompt gets, drawn from all. By default all of them."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="1 samples what the model would say, 0 takes the likeliest tokens.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the answers and of the inputs that are drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that are sampled together.")] = 32,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("an object with the number of records and the file")] = False,
) -> None:
    """Let a model answer inputs with each prompt in view, and write the answers as training records, once.

    A gist that is trained on them with `gisting train --distillation 1 --language-model 0` learns to give what the
    whole prompt gives. A run that was interrupted goes on where it stopped; a complete file is left as it is.

    Example: gisting data self-distil ./smollm2 --prompts prompts/ --inputs questions.txt --output records.jsonl
    """
    from gisting.data.prompts import load_inputs, load_prompts
    from gisting.measure.progress import progress_bar
    from gisting.models.load import load_tokenizer
    from gisting.train.self_distil import pair_up, self_distil

    chat = functools.cache(functools.partial(load_tokenizer, model, template))
    texts = [one.prompt for one in load_prompts(prompts, chat)]
    pairs = pair_up(texts, load_inputs(inputs), inputs_per_prompt=inputs_per_prompt, seed=seed)
    loaded, tokenizer = load_patched(model, template, dtype, device, is_to_be_trained=True)
    with progress_bar("answering with the prompt in view", len(pairs)) as progress:
        records = self_distil(
            loaded,
            tokenizer,
            pairs,
            output,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    if as_json:
        print_json({"num_records": len(records), "num_prompts": len(set(texts)), "file": str(output)})
        return
    out.print(f"{len(records):,} answers to {len(set(texts)):,} prompts in {output}", highlight=False, soft_wrap=True)
