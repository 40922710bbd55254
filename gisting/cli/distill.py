"""``gisting distill``: one prompt into a gist, for a model that was never trained to gist."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gisting.cli.caches import StorageOption, shares_told
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
from gisting.measure.progress import phase_bars, progress_bar
from gisting.tokens.text import read_text

if TYPE_CHECKING:
    from gisting.cache import GistCache
    from gisting.distillation import Distilled, Progress
    from gisting.eval.check import GistCheck, GistChecker
    from gisting.tokens import GistTokenizer

__all__ = ["distill"]

_PHASES = {
    "questions": "writing questions",
    "answers": "sampling answers",
    "teacher": "reading them with the whole prompt",
    "start": "making the first slots",
    "training": "training the slots",
}
_SOURCES = {"none": "no prompt", "first": "first k tokens", "gist": "the gist"}


def distill(
    model: ModelArgument,
    prompt_file: Annotated[Path, typer.Option(help="A text file with the prompt.")],
    output: Annotated[Path, typer.Option(help="File for the gist, such as support.gist.safetensors.")],
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="What users say: a text file with one input per line, or records with an input (JSON, JSON lines, "
            "CSV, Parquet). Without it the model writes questions itself."
        ),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Inputs to measure with, likewise. By default a fifth of --inputs, at most 20.")
    ] = None,
    num_gist_tokens: Annotated[
        int | None, typer.Option("--num-gist-tokens", "-k", help="Tokens that the gist takes. By default 16.")
    ] = None,
    at_least: Annotated[
        float | None,
        typer.Option(
            help="Instead of -k: take the smallest of 4, 8, 16 and 32 gist tokens with which a gist keeps this share "
            "of what the prompt does, such as 0.8, as `gisting check` measures it on the held-out inputs; exit with "
            "code 1 if none does."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="What the slots start from: first (tokens of the prompt), attended (tokens of it that answers look "
            "at), matched (the attended tokens, then fitted so that attention gives the answers what the whole prompt "
            "gives) or gist (what a model that was trained to gist makes). By default matched, or first where "
            "attention cannot be matched, as in encoder-decoders."
        ),
    ] = None,
    num_answers: Annotated[
        int | None, typer.Option(min=1, help="Answers to learn from. By default one to each input, and at least 200.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sampled answer at most.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="For sampling answers.")] = 0.8,
    steps: Annotated[int, typer.Option(min=0, help="Optimiser steps at most; 0 to take the slots as they start.")] = 75,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers in a step.")] = 8,
    key_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Learning rate of the keys, relative to their size.")
    ] = 0.005,
    value_rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Learning rate of the values, likewise.")] = 0.015,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop after this many measurements in a row without a lower divergence.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Directory for the answers and the state of the run. By default OUTPUT.distill."),
    ] = None,
    storage: StorageOption = None,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[
        bool,
        json_option("one object, with the measurements and the seconds of each phase; quality is what the file keeps"),
    ] = False,
) -> None:
    """Press one prompt into a gist file by gradient descent, without training the model.

    The model answers the inputs with the whole prompt in view, and the gist learns to lead to the same answers. These
    are kept beside the output, as lines that can be read; a run that was stopped goes on when the command is repeated.

    Example: gisting distill ./model --prompt-file system.txt --inputs questions.txt -k 16 --output
    system.gist.safetensors

    Example: gisting distill ./model --prompt-file system.txt --output system.gist.safetensors --at-least 0.8
    """
    from gisting.data.prompts import load_inputs
    from gisting.distillation import distill as run
    from gisting.eval.check import COUNTS, check_at_least, smallest_gist
    from gisting.storage import STORAGES

    if storage is not None and storage not in STORAGES:
        raise GistError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    check_at_least(at_least)
    if at_least is not None and num_gist_tokens is not None:
        raise GistError("--at-least finds the number of gist tokens; leave out -k")
    check_new(output)
    texts = None if inputs is None else load_inputs(inputs)
    measured = None if held_out is None else load_inputs(held_out)
    prompt = read_text(prompt_file)
    folder = work_dir or output.with_name(output.name + ".distill")
    loaded, tokenizer = load_patched(model, template, dtype, device, is_to_be_trained=True)
    if texts is None:
        err.print("note: without --inputs, the model writes the questions itself (self-study)", soft_wrap=True)
    made: dict[int, Distilled] = {}

    def make(k: int) -> GistCache:
        with _shown() as shown:
            made[k] = run(
                loaded,
                tokenizer,
                prompt,
                texts,
                k,
                held_out=measured,
                start=start,
                num_answers=num_answers,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                steps=steps,
                batch_size=batch_size,
                key_rate=key_rate,
                value_rate=value_rate,
                patience=patience,
                seed=seed,
                directory=folder,
                progress=shown,
            )
        return made[k].cache

    told = ""
    if at_least is None:
        cache = make(16 if num_gist_tokens is None else num_gist_tokens)
    else:
        number = tokenizer.encode_prompts([prompt], 1)[0].num_prompt_tokens
        counts = [k for k in COUNTS if k < number] or [COUNTS[0]]
        check = _Check(loaded, tokenizer, prompt, made, seed)
        cache, checks = smallest_gist(make, check, at_least, counts)
        told = shares_told(counts, checks)
        if cache is None:
            raise GistError(
                f"keep the whole prompt: no gist keeps {at_least:g} of what it does ({told}); nothing was written"
            )
    found = replace(made[cache.num_slots], cache=cache)
    found.cache.to("cpu").save(output, storage)
    if as_json:
        print_json({"output": str(output), "quality": (cache.about[0] or {})["quality"], **found.to_row()})
        return
    _print(found)
    if told:
        out.print(f"as `gisting check` measures it, the gist keeps {told}", highlight=False, soft_wrap=True)
    out.print(
        f"saved in {output} ({output.stat().st_size} bytes); answers and state in {folder}",
        highlight=False,
        soft_wrap=True,
    )


class _Check:
    """Checks gists on the inputs that they were not taught; the full prompt's answers are sampled once for all k."""

    def __init__(
        self, model: Any, tokenizer: GistTokenizer, prompt: str, made: dict[int, Distilled], seed: int
    ) -> None:
        self.model, self.tokenizer, self.prompt, self.made, self.seed = model, tokenizer, prompt, made, seed
        self.checker: GistChecker | None = None

    def __call__(self, cache: GistCache) -> GistCheck:
        from gisting.eval.check import FEWEST_INPUTS, GistChecker

        inputs = [answer.input for answer in self.made[cache.num_slots].teacher.answers]
        # Of fewer, no figure can be relied on; the built-in ones are taken.
        asked = inputs if len(inputs) >= FEWEST_INPUTS else None
        steps = GistChecker.num_steps(self.prompt, asked, num_checks=1)
        if self.checker is not None:  # what all checks share is there
            steps = GistChecker.num_steps(self.prompt, asked, num_checks=2) - steps
        with progress_bar("checking", steps) as advance:
            if self.checker is None:
                self.checker = GistChecker(
                    self.model, self.tokenizer, self.prompt, asked, seed=self.seed, progress=advance
                )
            self.checker.progress = advance
            return self.checker.check(cache)


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """Show a bar for each phase, and a line for each measurement."""
    begun: dict[str, tuple[float, int]] = {}
    with phase_bars(_PHASES) as bars:

        def show(progress: Progress) -> None:
            bars(progress.phase, progress.done, progress.total)
            begin, first = begun.setdefault(progress.phase, (time.perf_counter(), progress.done))
            if progress.measured is not None:
                one = progress.measured.held_out
                seconds = time.perf_counter() - begin
                done = progress.done - first
                left = f", {seconds / done * (progress.total - progress.done):.0f} s left" if done else ""
                err.print(
                    f"step {progress.measured.step} of {progress.total}: held out, KL median {one.median:.4f}, mean "
                    f"{one.mean:.4f} nats a token, agreement {one.mean_agreement:.3f}{left}",
                    highlight=False,
                    soft_wrap=True,
                )

        yield show


def _print(found: Distilled) -> None:
    from gisting.eval.check import FEWEST_INPUTS

    number = len(found.held_out["gist"].kl)
    table = Table(
        box=SIMPLE_HEAD,
        title=f"KL divergence from the full prompt, nats a token, {number} held-out answers",
        min_width=70,
    )
    for name in ("", "median", "quartiles", "mean", "agreement"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, label in _SOURCES.items():
        one = found.held_out[name]
        table.add_row(
            label,
            f"{one.median:.4f}",
            " ".join(f"{value:.4f}" for value in one.quartiles),
            f"{one.mean:.4f}",
            f"{one.mean_agreement:.3f}",
        )
    out.print(table)
    gist = found.held_out["gist"]
    loops, plain = sum(gist.is_loop), gist.mean_without_loops
    about = (found.cache.about[0] or {})["distilled"]
    lines = [
        f"{found.num_prompt_tokens} tokens of the prompt in {found.cache.num_slots}; {found.kept:.0%} of the median "
        "divergence without a prompt is gone",
        f"learned from {about['answers']} answers to {about['inputs']} inputs"
        + (" that the model wrote itself (self-study)" if about["self_study"] else "")
        + f", {about['steps']} steps, start {about['start']}, seed {about['seed']}",
        *(
            [f"only {number} held-out inputs: the figures say little; give --held-out, or at least 20 --inputs"]
            if number < FEWEST_INPUTS
            else []
        ),
        *(
            [f"{loops} held-out answers repeat themselves (loops); without them the gist's mean is {plain or 0:.4f}"]
            if loops
            else []
        ),
        "time: " + ", ".join(f"{_PHASES[name]} {seconds:.0f} s" for name, seconds in found.seconds.items()),
    ]
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True)
