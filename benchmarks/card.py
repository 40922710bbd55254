"""Everything that is measured on a card, in one command that is planned to take less than four minutes on an H100.

    python benchmarks/card.py                       rows and plots in docs/results/card
    python benchmarks/card.py --only training       one part of it
    python benchmarks/card.py --smoke               on a CPU, tiny: shows that all of it runs, measures nothing

Parts, each in a process of its own with its share of ``--seconds``:

    kernels      the gate (kernels against the float64 oracle), a handful of cases beside torch's attention, a training
                 step of a LLaMA of 10^9 parameters: what benchmarks/kernels/attention.py does
    training     stock Trainer on packed rows of 1,024 ids, a random LLaMA of the sizes of SmolLM2-135M: plain, and
                 gist-lora with distillation
    inference    the same model compresses a prompt and answers from the cache; beside it the whole prompt as a cache
    compiled     only with --only compiled: plain training under torch.compile, which decides whether that pays

A row is printed and written as soon as it is known, so that a part that is cut off keeps what it has. Nothing more is
timed after a red gate; after another failure, or a cut-off, the next part runs. Exits with 1 where a part failed or was
cut off, with 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
# Shares of the time.
PARTS = {"kernels": 0.5, "training": 0.3, "inference": 0.2}
ALL_PARTS = {**PARTS, "compiled": 0.3}
# Exit status of benchmarks/kernels/attention.py where the kernels are not found right.
RED_GATE = 3
LETTERS = "abcdefgh"
NUM_GIST_TOKENS = 4
#: Training: name, method, weight of the distillation.
RUNS = (("plain", "full", 0.0), ("distillation", "gist-lora", 1.0))
COMPILED = (("plain, compiled", "full", 0.0),)


@dataclass(frozen=True)
class Sizes:
    """Of the model, of a training step and of an answer; by default those of SmolLM2-135M, and of real instructions:
    some 10,000 ids a step, of which a fifth have labels.
    """

    hidden: int = 576
    layers: int = 30
    heads: int = 9
    key_heads: int = 3
    intermediate: int = 1536
    vocabulary: int = 49_152
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


SMOKE = Sizes(32, 2, 2, 1, 48, 128, 128, 4, 16, 4, 4, 1, 2, 24, 3, 1)


# -- what the parts share ----------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """A line that is seen at once."""
    print(line, flush=True)


def letters(chance: random.Random, number: int) -> str:
    """So many words of one id each."""
    return " ".join(chance.choices(LETTERS, k=number))


def make_model(sizes: Sizes, device: Any, dtype: Any) -> tuple[Any, Any]:
    """A patched LLaMA with random weights, and the built-in task's tokenizer, which has an id for every word."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import gisting
    from gisting.data.tasks import task_tokenizer

    tokenizer = task_tokenizer()
    special: Any = tokenizer.tokenizer
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=special.pad_token_id,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return gisting.patch(model.to(device), tokenizer), tokenizer


def keep(directory: Path, row: dict[str, Any], device: Any, sizes: Sizes) -> None:
    """Print a row and add it to the file of its part, with versions and commit."""
    from gisting.measure.rows import append_row

    append_row(directory / f"{row['part']}.jsonl", row | ({"smoke": True} if sizes == SMOKE else {}), device)
    shown = (f"{name} {value:,.6g}" for name, value in row.items() if isinstance(value, int | float))
    say(f"{row['part']}, {row['name']}: {', '.join(shown)}")


# -- training ----------------------------------------------------------------------------------------------------------


def make_records(sizes: Sizes, num_groups: int) -> list[Any]:
    """Groups of four answers to a prompt of their own, all of one length: every batch has as many ids."""
    from gisting.data.records import Record

    chance, records = random.Random(0), []
    for _ in range(num_groups):
        prompt = letters(chance, sizes.prompt)
        records += [Record(prompt, letters(chance, sizes.question), letters(chance, sizes.answer)) for _ in range(4)]
    return records


def training(directory: Path, device: Any, sizes: Sizes, seconds: float, *, is_compiled: bool = False) -> int:
    """Train each way for its part of the time, or as many steps as ``sizes`` says; how many ways failed."""
    runs = COMPILED if is_compiled else RUNS
    records = make_records(sizes, sizes.groups * (sizes.warmup + sizes.steps))
    num_failed, start = 0, time.monotonic()
    for number, (name, method, distillation) in enumerate(runs, 1):
        # Loading before and saving after take their time too.
        end = start + seconds * (number / len(runs) - 0.1)
        try:
            row = train(records, device, sizes, end, method=method, distillation=distillation, is_compiled=is_compiled)
            keep(directory, {"part": "training", "name": name, "method": method, **row}, device, sizes)
        except Exception as error:  # noqa: BLE001  the other way is still measured
            num_failed += 1
            say(f"training, {name}: failed, {type(error).__name__}: {error}")
    return num_failed


def train(
    records: Sequence[Any],
    device: Any,
    sizes: Sizes,
    end: float,
    *,
    method: str,
    distillation: float,
    is_compiled: bool = False,
) -> dict[str, Any]:
    """The numbers of one run of ``finetune``, which is stock Trainer.

    Args:
        records: all of one length, four for each instruction, one after another.
        device: to train on.
        sizes: of model and step.
        end: what ``time.monotonic`` reads when training stops, though ten steps are always timed.
        method: of ``finetune``.
        distillation: weight of it in the objective.
        is_compiled: whether Trainer compiles the model.
    """
    import torch

    from gisting.data.collate import IGNORED
    from gisting.data.packing import GistPackingCollator, group_by_instruction
    from gisting.train.finetune import finetune, published_arguments
    from gisting.train.objective import Objective

    model, tokenizer = make_model(sizes, device, torch.float32)
    layout: dict[str, Any] = {"max_length": sizes.row, "pack_length": sizes.row}
    collate = GistPackingCollator(tokenizer, NUM_GIST_TOKENS, with_teacher=distillation > 0, **layout)
    groups = group_by_instruction(records, 4)
    collate_ms, batch = [], {}
    for step in range(min(8, sizes.warmup + sizes.steps)):
        start = time.perf_counter()
        batch = collate(groups[step * sizes.groups : (step + 1) * sizes.groups])
        collate_ms.append(1000 * (time.perf_counter() - start))
    clock = make_clock(device, sizes, end)
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


def make_clock(device: Any, sizes: Sizes, end: float) -> Any:
    """A callback that times the steps after the first, not waiting for the device between them, and stops in time."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        num_timed, took_s, peak_bytes = -sizes.warmup, 0.0, None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.num_timed += 1
            is_over = self.num_timed == sizes.steps or (self.num_timed >= 10 and time.monotonic() > end)
            if self.num_timed != 0 and not is_over:
                return
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if self.num_timed == 0:
                self.start = time.perf_counter()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                return
            self.took_s = time.perf_counter() - self.start
            if device.type == "cuda":
                self.peak_bytes = torch.cuda.max_memory_allocated(device)
            control.should_training_stop = True

    return Clock()


# -- inference ---------------------------------------------------------------------------------------------------------


def inference(directory: Path, device: Any, sizes: Sizes, seconds: float) -> int:
    """Compress a prompt, and answer one request, then eight at once; with gist tokens and with the whole prompt."""
    import torch

    import gisting

    model, tokenizer = make_model(sizes, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    model.eval()
    chance, num_failed = random.Random(1), 0
    prompt = letters(chance, sizes.read)
    questions = [letters(chance, sizes.question) for _ in range(8)]

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        """Median seconds after one run that is not timed, and the result."""
        times, result = [], run()
        for _ in range(sizes.repeats):
            start = time.perf_counter()
            result = run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
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
        except Exception as error:  # noqa: BLE001  the other condition is still measured
            num_failed += 1
            say(f"inference, {condition}: failed, {type(error).__name__}: {error}")
    return num_failed


# -- command -----------------------------------------------------------------------------------------------------------


def draw(directory: Path) -> None:
    """A PNG of ids a second: training on the left, answers on the right; the last row of each name and device."""
    from gisting.measure.rows import new_figure, read_rows

    figure = new_figure(9, 4)
    parts = [part for part in ("training", "inference") if (directory / f"{part}.jsonl").exists()]
    axes: Any = figure.subplots(1, max(len(parts), 1), squeeze=False)
    for axis, part in zip(axes[0], parts, strict=False):
        bars = {
            f"{row['name']}\n{row['device']}": row["tokens_per_s"] for row in read_rows(directory / f"{part}.jsonl")
        }
        axis.bar(range(len(bars)), list(bars.values()), 0.6)
        axis.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right")
        axis.set_ylabel("ids a second")
        axis.set_title(part)
    figure.savefig(directory / "card.png", dpi=110)


def run_part(part: str, options: argparse.Namespace, seconds: float) -> int:
    """Run a part in a process of its own; its exit status, or 1 where it was cut off."""
    if part == "kernels":
        more = ["--smoke"] if options.smoke else ["--repeats", "15"]
        files = ["--output", str(options.directory / "kernels.jsonl"), "--plot", str(options.directory / "kernels.png")]
        command = [str(ROOT / "benchmarks" / "kernels" / "attention.py"), "--quick", "--step", *more, *files]
    else:
        command = [__file__, "--part", part, "--seconds", str(seconds), "--directory", str(options.directory)]
        command += ["--smoke"] * options.smoke
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # A group of its own, so that the processes that it starts end with it.
    process = subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        say(f"{part}: cut off after {seconds:.0f} s; what it had written is kept")
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where rows and plots go (docs/results/card; build/card)")
    parser.add_argument("--seconds", type=float, default=230.0, help="for all parts together (230)")
    parser.add_argument("--only", nargs="+", choices=tuple(ALL_PARTS), default=list(PARTS), help="only these")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny: shows that it runs, measures nothing")
    parser.add_argument(
        "--part", choices=("training", "inference", "compiled"), help=argparse.SUPPRESS
    )  # in this process
    options = parser.parse_args(arguments)
    if options.directory is None:
        options.directory = ROOT / "build" / "card" if options.smoke else RESULTS / "card"
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    if options.smoke and options.directory.resolve().is_relative_to(RESULTS):
        parser.error(f"--smoke measures nothing, so it does not write to docs/results; got {options.directory}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts one after another; 1 where one failed, 2 without a CUDA device."""
    options = parse(arguments)
    if options.part is not None:
        import torch

        device = torch.device("cpu" if options.smoke else "cuda:0")
        compiled = functools.partial(training, is_compiled=True)
        part = {"training": training, "inference": inference, "compiled": compiled}[options.part]
        return 1 if part(options.directory, device, SMOKE if options.smoke else Sizes(), options.seconds) else 0
    if not options.smoke:
        import torch

        if not torch.cuda.is_available():
            sys.stderr.write("no CUDA device: nothing was measured (--smoke runs the code on a CPU)\n")
            return 2
    options.directory.mkdir(parents=True, exist_ok=True)
    start, failed = time.monotonic(), []
    parts = [part for part in ALL_PARTS if part in options.only]
    for number, part in enumerate(parts):
        began = time.monotonic()
        # What one part leaves of its time the next ones have.
        left = options.seconds - (began - start)
        share = ALL_PARTS[part] / sum(ALL_PARTS[other] for other in parts[number:])
        say(f"== {part}, at most {left * share:.0f} s")
        status = run_part(part, options, left * share)
        say(f"== {part}: {'done' if status == 0 else 'FAILED'} after {time.monotonic() - began:.0f} s")
        if status != 0:
            failed.append(part)
        if part == "kernels" and status == RED_GATE:
            say("the kernels are not known to be right on this device: nothing else is timed (--only does it anyway)")
            break
    sys.path.insert(0, str(ROOT))
    try:
        draw(options.directory)
    except Exception as error:  # noqa: BLE001  the rows are there all the same
        say(f"no plot: {error}")
    say(f"{time.monotonic() - start:.0f} s, {', '.join(failed) or 'no part'} failed; rows in {options.directory}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
