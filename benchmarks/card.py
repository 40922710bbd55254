"""Measure everything that needs a GPU, in one command that is planned to take less than four minutes on an H100.

Place in the flow: kernels, training and generation -> **card** -> rows and plots in docs/results/card. Each part runs
in a separate process with its share of ``--seconds``. A row is printed and written as soon as it is known, so a part
that is cut off keeps what it has.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import TrainerCallback

import gisting
from benchmarks.command import names, say
from benchmarks.models import SMOLLM2, letters
from gisting.data.collate import IGNORED
from gisting.data.packing import GistPackingCollator, group_by_instruction
from gisting.data.records import Record
from gisting.measure.latency import wait
from gisting.measure.models import random_llama
from gisting.measure.rows import append_row, new_figure, read_rows
from gisting.train.finetune import finetune, published_arguments
from gisting.train.objective import Objective

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
#: Each part's share of the time.
PARTS = {"kernels": 0.5, "training": 0.3, "inference": 0.2}
ALL_PARTS = {"tiles": 0.5, **PARTS, "compiled": 0.3}
#: Exit status of the benchmark ``kernels`` where the kernels are found to be wrong.
RED_GATE = 3
NUM_GIST_TOKENS = 4
#: Training runs: name, method, weight of the distillation.
RUNS = (("plain", "full", 0.0), ("distillation", "gist-lora", 1.0))
COMPILED = (("plain, compiled", "full", 0.0),)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, of a training step and of an answer.

    By default the model is as large as SmolLM2-135M and the instructions are of realistic length: some 10,000 ids a
    step, of which a fifth have labels.
    """

    model: Mapping[str, Any] = field(default_factory=lambda: SMOLLM2)
    row: int = 1024
    groups: int = 32
    prompt: int = 146
    question: int = 30
    answer: int = 14
    warmup: int = 5
    steps: int = 40
    read: int = 512
    new_tokens: int = 64
    repeats: int = 3


SMOKE = Sizes(
    {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_key_heads": 1, "intermediate_size": 48, "vocabulary": 99},
    row=128, groups=4, prompt=16, question=4, answer=4, warmup=1, steps=2, read=24, new_tokens=3, repeats=1,
)  # fmt: skip


# -- what the parts share ----------------------------------------------------------------------------------------------


def keep(directory: Path, row: dict[str, Any], device: Any, sizes: Sizes) -> None:
    """Print a row and append it to the file of its part."""
    append_row(directory / f"{row['part']}.jsonl", row | ({"smoke": True} if sizes == SMOKE else {}), device)
    shown = (f"{name} {value:,.6g}" for name, value in row.items() if isinstance(value, int | float))
    say(f"{row['part']}, {row['name']}: {', '.join(shown)}")


# -- training ----------------------------------------------------------------------------------------------------------


def make_records(sizes: Sizes, num_groups: int) -> list[Record]:
    """Make groups of four answers, each group with its own prompt. All have the same length, so all batches do."""
    chance, records = random.Random(0), []
    for _ in range(num_groups):
        prompt = letters(chance, sizes.prompt)
        records += [Record(prompt, letters(chance, sizes.question), letters(chance, sizes.answer)) for _ in range(4)]
    return records


def training(directory: Path, device: Any, sizes: Sizes, seconds: float, *, is_compiled: bool = False) -> int:
    """Train each way for its part of the time, or for the steps of ``sizes``; return how many ways failed."""
    runs = COMPILED if is_compiled else RUNS
    records = make_records(sizes, sizes.groups * (sizes.warmup + sizes.steps))
    num_failed, start = 0, time.monotonic()
    for number, (name, method, distillation) in enumerate(runs, 1):
        # Loading and saving take time too.
        end = start + seconds * (number / len(runs) - 0.1)
        try:
            row = train(records, device, sizes, end, method=method, distillation=distillation, is_compiled=is_compiled)
            keep(directory, {"part": "training", "name": name, "method": method, **row}, device, sizes)
        except Exception as error:  # noqa: BLE001  the other way is measured all the same
            num_failed += 1
            say(f"training, {name}: failed, {type(error).__name__}: {error}")
    return num_failed


def train(
    records: Sequence[Record],
    device: Any,
    sizes: Sizes,
    end: float,
    *,
    method: str,
    distillation: float,
    is_compiled: bool = False,
) -> dict[str, Any]:
    """Measure one run of ``finetune``, which is stock Trainer.

    Args:
        records: all of one length, four in a row for each instruction.
        device: to train on.
        sizes: sizes of the model and of a step.
        end: the ``time.monotonic`` at which training stops; at least ten steps are timed.
        method: training method, as for ``finetune``.
        distillation: its weight in the objective.
        is_compiled: whether Trainer compiles the model.
    """
    model, tokenizer = random_llama(**sizes.model, device=device)
    layout: dict[str, Any] = {"max_length": sizes.row, "pack_length": sizes.row}
    collate = GistPackingCollator(tokenizer, NUM_GIST_TOKENS, with_teacher=distillation > 0, **layout)
    groups = group_by_instruction(records, 4)
    collate_ms, batch = [], {}
    for step in range(min(8, sizes.warmup + sizes.steps)):
        start = time.perf_counter()
        batch = collate(groups[step * sizes.groups : (step + 1) * sizes.groups])
        collate_ms.append(1000 * (time.perf_counter() - start))
    clock = Clock(device, sizes, end)
    with tempfile.TemporaryDirectory() as folder:
        arguments = published_arguments(
            folder,
            batch_size=sizes.groups,
            per_device_batch_size=sizes.groups,
            max_steps=sizes.warmup + sizes.steps,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            torch_compile=is_compiled,
        )
        finetune(
            model,
            tokenizer,
            records,
            arguments,
            method=method,
            num_gist_tokens=NUM_GIST_TOKENS,
            max_per_group=4,
            objective=Objective(distillation=distillation),
            callbacks=[clock],
            **layout,
        )
    first, last = batch["attention_mask"][:, 0].unbind(1)
    num_tokens = int((last > first).sum())  # without padding
    return {
        "tokens_per_s": num_tokens * clock.num_timed / clock.took_s,
        "step_ms": 1000 * clock.took_s / clock.num_timed,
        "num_steps": clock.num_timed,
        "peak_bytes": clock.peak_bytes,
        "collate_ms": statistics.median(collate_ms),
        "num_workers": arguments.dataloader_num_workers,
        "num_tokens": num_tokens,
        "num_labels": int((batch["labels"] != IGNORED).sum()),
        "num_rows": len(batch["input_ids"]),
        "row_length": batch["input_ids"].shape[1],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


class Clock(TrainerCallback):
    """Time the steps after the warm-up, without waiting for the device between them, and stop when time is up."""

    def __init__(self, device: torch.device, sizes: Sizes, end: float) -> None:
        self.device, self.steps, self.end = device, sizes.steps, end
        self.num_timed, self.took_s, self.start = -sizes.warmup, 0.0, 0.0
        self.peak_bytes: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step; start or stop the clock."""
        self.num_timed += 1
        is_over = self.num_timed == self.steps or (self.num_timed >= 10 and time.monotonic() > self.end)
        if self.num_timed != 0 and not is_over:
            return
        wait(self.device)
        if self.num_timed == 0:
            self.start = time.perf_counter()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            return
        self.took_s = time.perf_counter() - self.start
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        control.should_training_stop = True


# -- inference ---------------------------------------------------------------------------------------------------------


def inference(directory: Path, device: Any, sizes: Sizes, seconds: float) -> int:
    """Compress a prompt and answer one request, then eight at once, with gist tokens and with the whole prompt.

    Returns how many conditions failed.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, tokenizer = random_llama(**sizes.model, device=device, dtype=dtype)
    model.eval()
    chance, num_failed = random.Random(1), 0
    prompt = letters(chance, sizes.read)
    questions = [letters(chance, sizes.question) for _ in range(8)]

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        """Return the median of the seconds after one untimed run, and the result."""
        times, result = [], run()
        for _ in range(sizes.repeats):
            start = time.perf_counter()
            result = run()
            wait(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times), result

    for condition in ("gist", "positive"):
        try:
            compress_s, cache = timed(
                lambda condition=condition: gisting.compress(
                    model, tokenizer, [prompt], NUM_GIST_TOKENS, condition=condition
                )
            )
            for batch in (1, 8):
                generate_s, _ = timed(
                    lambda cache=cache, batch=batch: gisting.generate(
                        model,
                        tokenizer,
                        questions[:batch],
                        cache=cache,
                        max_new_tokens=sizes.new_tokens,
                        min_new_tokens=sizes.new_tokens,
                    )
                )
                row = {
                    "part": "inference",
                    "name": f"{condition}, {batch} at once",
                    "condition": condition,
                    "batch": batch,
                    "tokens_per_s": batch * sizes.new_tokens / generate_s,
                    "generate_ms": 1000 * generate_s,
                    "compress_ms": 1000 * compress_s,
                    "prompt_tokens": sizes.read,
                    "new_tokens": sizes.new_tokens,
                    "num_repeats": sizes.repeats,
                }
                keep(directory, row, device, sizes)
        except Exception as error:  # noqa: BLE001  the other condition is measured all the same
            num_failed += 1
            say(f"inference, {condition}: failed, {type(error).__name__}: {error}")
    return num_failed


# -- command -----------------------------------------------------------------------------------------------------------


def draw(directory: Path) -> None:
    """Draw tokens per second as a PNG, training and answers, from the last row of each name and device."""
    figure = new_figure(9, 4)
    parts = [part for part in ("training", "inference") if (directory / f"{part}.jsonl").exists()]
    axes: Any = figure.subplots(1, max(len(parts), 1), squeeze=False)
    for axis, part in zip(axes[0], parts, strict=False):
        bars = {
            f"{row['name']}\n{row['device']}": row["tokens_per_s"] for row in read_rows(directory / f"{part}.jsonl")
        }
        axis.bar(range(len(bars)), list(bars.values()), 0.6)
        axis.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right")
        axis.set_ylabel("tokens per second")
        axis.set_title(part)
    figure.savefig(directory / "card.png", dpi=110)


def run_part(part: str, directory: Path, seconds: float, *, is_smoke: bool) -> int:
    """Run a part in a separate process; return its exit status, or 1 where it was cut off."""
    command = [sys.executable, "-m", "benchmarks"]
    if part == "kernels":
        command += ["kernels", "--quick", "--step", *(["--smoke"] if is_smoke else ["--repeats", "15"])]
        command += ["--output", str(directory / "kernels.jsonl"), "--plot", str(directory / "kernels.png")]
    elif part == "tiles":
        command += ["tune", *(["--smoke"] if is_smoke else ["--bits", "16", "--seconds", str(0.9 * seconds)])]
    else:
        command += ["card", "--part", part, "--seconds", str(seconds), "--directory", str(directory)]
        command += ["--smoke"] * is_smoke
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # A separate process group, so that the processes it starts end with it.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        say(f"{part}: cut off after {seconds:.0f} s; the rows written so far are kept")
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(
    directory: Annotated[
        Path | None,
        typer.Option(help="Where rows and plots go. By default docs/results/card, or build/card with --smoke."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for all parts together.")] = 230.0,
    only: Annotated[str | None, typer.Option(help=f"Parts to run, comma-separated: {', '.join(ALL_PARTS)}.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Run tiny sizes on the CPU; measures nothing.")] = False,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> int:
    """Kernels, training and generation on a GPU, planned for four minutes.

    kernels: the gate (kernels against the float64 oracle), a few cases against torch's attention, a training step of a
    LLaMA with 10^9 parameters.

    training: stock Trainer on packed rows of 1,024 ids with a random LLaMA as large as SmolLM2-135M: plain, and
    gist-lora with distillation.

    inference: the same model compresses a prompt and answers from the cache, and from a cache of the whole prompt.

    compiled: plain training under torch.compile; runs only where --only names it.

    tiles: times the tile sizes and paths of the kernels, and writes the winners into their table; runs before the other
    parts, only where --only names it, and needs some minutes of its own.

    Nothing more is timed after a failed gate. After another failure, or a cut-off, the next part runs. Exits with 1
    where a part failed or was cut off, and with 2 where there is no CUDA device.

    Example: python -m benchmarks card --only training

    Example: python -m benchmarks card --only tiles,kernels --seconds 700

    Example: python -m benchmarks card --smoke
    """
    if directory is None:
        directory = ROOT / "build" / "card" if smoke else RESULTS / "card"
    if not seconds > 0:
        raise typer.BadParameter(f"--seconds must be positive, got {seconds}")
    if smoke and directory.resolve().is_relative_to(RESULTS):
        raise typer.BadParameter(f"--smoke measures nothing, so it does not write to docs/results; got {directory}")
    if part is not None:
        device, sizes = torch.device("cpu" if smoke else "cuda:0"), SMOKE if smoke else Sizes()
        if part == "inference":
            return 1 if inference(directory, device, sizes, seconds) else 0
        return 1 if training(directory, device, sizes, seconds, is_compiled=part == "compiled") else 0
    if not smoke and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: nothing was measured (--smoke runs the code on a CPU)\n")
        return 2
    wanted = PARTS if only is None else names("--only", only, tuple(ALL_PARTS))
    return run_parts([one for one in ALL_PARTS if one in wanted], directory, seconds, is_smoke=smoke)


def run_parts(parts: Sequence[str], directory: Path, seconds: float, *, is_smoke: bool) -> int:
    """Run parts one after another within the time; return 1 where one failed."""
    directory.mkdir(parents=True, exist_ok=True)
    start, failed = time.monotonic(), []
    for number, part in enumerate(parts):
        began = time.monotonic()
        # Time that one part does not use goes to the next ones.
        left = seconds - (began - start)
        share = ALL_PARTS[part] / sum(ALL_PARTS[other] for other in parts[number:])
        say(f"== {part}, at most {left * share:.0f} s")
        status = run_part(part, directory, left * share, is_smoke=is_smoke)
        say(f"== {part}: {'done' if status == 0 else 'FAILED'} after {time.monotonic() - began:.0f} s")
        if status != 0:
            failed.append(part)
        if part == "kernels" and status == RED_GATE:
            say("the kernels may be wrong on this device: nothing else is timed (--only times it anyway)")
            break
    try:
        draw(directory)
    except Exception as error:  # noqa: BLE001  the rows are there all the same
        say(f"no plot: {error}")
    say(f"{time.monotonic() - start:.0f} s, {', '.join(failed) or 'no part'} failed; rows in {directory}")
    return 1 if failed else 0
