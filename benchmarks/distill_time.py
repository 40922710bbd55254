"""How long ``gisting distill`` takes as a user runs it: from the start of the command to the file, with sampling."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import OutputOption, Rows, say, where
from benchmarks.distill import PROMPTS, read_prompt
from gisting.errors import GistError
from gisting.markdown import markdown_table

__all__ = ["distill_time_table", "main"]

#: What a row has of the command's own report.
_REPORTED = ("num_prompt_tokens", "num_gist_tokens", "start", "inputs", "answers", "steps", "kept", "held_out")


def main(
    model: Annotated[Path, typer.Option(help="Directory of a chat model.")],
    output: OutputOption = None,
    name: Annotated[str | None, typer.Option(help="What rows call the model; by default its last part.")] = None,
    prompt: Annotated[str, typer.Option(help=f"One of {', '.join(PROMPTS)}.")] = "persona",
    num_gist_tokens: Annotated[int, typer.Option("--num-gist-tokens", "-k", min=1, help="Gist tokens.")] = 16,
    steps: Annotated[int | None, typer.Option(min=0, help="Optimiser steps; by default those of distill.")] = None,
    num_answers: Annotated[
        int | None, typer.Option(min=1, help="Answers; by default as many as distill takes.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Floating point type of the weights.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Device to run on.")] = "cpu",
) -> int | None:
    """The time of gisting distill on one prompt, from the start of the command to the file.

    Example: python -m benchmarks distill-time --model ./SmolLM2-135M-Instruct --output docs/results/distill_time.jsonl
    """
    if prompt not in PROMPTS:
        raise GistError(f"--prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
    text, questions = read_prompt(prompt)
    options = {"--steps": steps, "--num-answers": num_answers}
    with tempfile.TemporaryDirectory() as folder:
        system, inputs, gist = (Path(folder) / part for part in ("system.txt", "questions.txt", "a.gist.safetensors"))
        system.write_text(text, encoding="utf-8")
        inputs.write_text("\n".join(questions), encoding="utf-8")
        command = [sys.executable, "-m", "gisting", "distill", str(model), "--prompt-file", str(system)]
        command += ["--inputs", str(inputs), "-k", str(num_gist_tokens), "--output", str(gist), "--json"]
        command += ["--dtype", dtype, "--device", device]
        command += [word for option, value in options.items() if value is not None for word in (option, str(value))]
        begin = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        total = time.perf_counter() - begin
    if done.returncode:
        raise GistError(f"gisting distill ended with status {done.returncode}; see its message above")
    found = json.loads(done.stdout)
    rows = Rows("distill-time", output, device)
    row = {
        "model": name or model.name,
        "dtype": dtype,
        "prompt": prompt,
        **{column: found[column] for column in _REPORTED},
        "seconds": {part: round(took, 1) for part, took in found["seconds"].items()},
        "total_s": round(total, 1),
    }
    rows.add([row])
    say(f"{total:.0f} s; {found['kept']:.0%} of the median divergence is gone")
    rows.show(distill_time_table)
    return None


def distill_time_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown, one line each."""
    lines = [
        [
            f"{PROMPTS[row['prompt']]} ({row['num_prompt_tokens']})",
            row["num_gist_tokens"],
            f"{row['answers']}, {row['steps']}",
            *(f"{row['seconds'].get(part, 0):.0f} s" for part in ("answers", "teacher", "training")),
            f"{row['total_s']:.0f} s",
            f"{row['held_out']['none']['kl_median']:.3f}, {row['held_out']['gist']['kl_median']:.3f}",
            f"{row['kept']:.0%}",
            f"{row['held_out']['none']['kl_mean']:.3f}, {row['held_out']['gist']['kl_mean']:.3f}",
            where(row),
        ]
        for row in rows
    ]
    phases = ("sampling", "teacher", "training", "from start to file")
    columns = ("prompt (tokens)", "k", "answers, steps", *phases, "median KL", "gone", "mean KL", "where")
    first = rows[0]
    text = [
        *markdown_table(columns, lines),
        "",
        f"`gisting distill` on {first['model']} ({first['dtype']}), KL in nats a token over "
        f"{first['held_out']['gist']['num_answers']} held-out answers, without a prompt and from the gist. From start "
        "to file: with the start of Python, loading of the model, and the measurements at the end.",
    ]
    return "\n".join(text)
