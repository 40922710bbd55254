"""Make the adapter that comes with the library, from nothing to its table: data, answers, training, evaluation.

Each part keeps what it made in the directory of the run, and a run that was interrupted goes on where it stopped. The
adapter is ``gist-lora``, so the base model stays as it is. It learns by distillation alone: the untouched model answers
with the whole prompt in view, and the gist learns to give the same distributions.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, set_seed

from benchmarks.adapter.data import SIZES, Sizes, build_pairs
from benchmarks.adapter.evaluation import HeldOut, instructions, measure, side_by_side, system_prompts
from benchmarks.command import OutputOption, Rows, numbers, part_of, say, where
from gisting.data.records import Record, load_records
from gisting.markdown import markdown_table
from gisting.measure.progress import progress_bar
from gisting.measure.training import ShownTraining
from gisting.models import adapters
from gisting.models.load import load
from gisting.train.arguments import published_arguments
from gisting.train.finetune import finetune
from gisting.train.methods import Method
from gisting.train.objective import Objective
from gisting.train.self_distil import self_distil

__all__ = ["BASE", "ByTheClock", "adapter_table", "answered", "main", "ship", "train"]

#: The base model, by its name on the hub.
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FOLDER = Path(__file__).parent
#: Of so many prompts, one is left out of the training, for checks while it runs.
_ONE_IN, _MOST = 33, 24
_SETTINGS: dict[str, Any] = {
    "method": Method("gist-lora", rank=16),
    "objective": Objective(language_model=0.0, distillation=1.0, top_k=64),
    "max_length": 700,
    "pack_length": 1024,
    "max_per_group": 4,
}
#: The longest answer that the adapter is trained on, in tokens.
ANSWER_TOKENS = 32
# Pairs that are answered at a time, with a file for each.
_PIECE = 2048
# Steps in which the learning rate rises to its peak, in a training by the clock.
_WARMUP = 20


class ByTheClock(TrainerCallback):
    """Let the learning rate fall along a cosine by the clock, and end the training when the time is over.

    Args:
        end: when the training ends, in seconds since the epoch.
    """

    def __init__(self, end: float) -> None:
        self.end, self.start = end, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.time()

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Set the rate of the step."""
        share = min((time.time() - self.start) / max(self.end - self.start, 1e-9), 1.0)
        rate = args.learning_rate * min((state.global_step + 1) / _WARMUP, 1.0) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the training in time."""
        control.should_training_stop = control.should_training_stop or time.time() >= self.end


def train(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    directory: Path,
    *,
    steps: int,
    seed: int,
    batch_size: int = 4,
    num_gist_tokens: tuple[int, int] = (1, 16),
    learning_rate: float = 3e-3,
    end: float | None = None,
    settings: dict[str, Any],
) -> None:
    """Train the adapter on self-distilled records, from its last checkpoint if there is one.

    Args:
        model: the patched base model, in bfloat16; the adapter's weights are float32.
        tokenizer: its tokenizer.
        records: the records.
        directory: for checkpoints and the adapter.
        steps: optimiser steps; with ``end`` the most that are taken.
        seed: seed of the weights, the order and the draws.
        batch_size: prompts of each step, with up to four inputs each.
        num_gist_tokens: the smallest and the largest k that is drawn.
        learning_rate: its peak.
        end: when the training ends, in seconds since the epoch, instead of after ``steps``. Such a run keeps no
            checkpoints.
        settings: written to ``settings.json`` with the number of steps, ``steps``, before the adapter is.
    """
    set_seed(seed)
    on_gpu = model.device.type == "cuda"
    arguments = published_arguments(
        directory,
        batch_size=batch_size,
        per_device_batch_size=batch_size,
        learning_rate=learning_rate,
        max_steps=steps,
        lr_scheduler_type="cosine" if end is None else "constant",
        warmup_steps=0.03 if end is None else 0,
        save_steps=40,
        save_strategy="steps" if end is None else "no",
        save_total_limit=1,
        logging_steps=10,
        seed=seed,
        report_to="none",
        dataloader_num_workers=2 if on_gpu else 0,
    )
    arguments.disable_tqdm = True
    has_checkpoint = any(directory.glob("checkpoint-*"))
    with ShownTraining() as shown:
        callbacks = [
            shown,
            _Settings(directory / "settings.json", settings),
            *([] if end is None else [ByTheClock(end)]),
        ]
        finetune(
            model,
            tokenizer,
            records,
            arguments,
            resume=has_checkpoint,
            callbacks=callbacks,
            num_gist_tokens=num_gist_tokens,
            **_SETTINGS,
        )


class _Settings(TrainerCallback):
    """Write the settings of a run with the number of its steps, also of those before it was resumed."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {**self.settings, "steps": state.global_step}
        self.path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def answered(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Record],
    directory: Path,
    *,
    batch_size: int,
    seed: int,
    part: tuple[int, int] = (1, 1),
    end: float | None = None,
) -> list[Record]:
    """Sample the answers to all pairs, piece by piece, together with the other processes of the run.

    Args:
        model: the patched base model.
        tokenizer: its tokenizer.
        pairs: the pairs.
        directory: for the files, one for each piece.
        batch_size: how many answers to sample together.
        seed: seed of the answers.
        part: the number of this process, from 1, and how many there are. Each does its own pieces and waits for those
            of the others.
        end: when to stop, in seconds since the epoch, with what is there by then, at least one piece; None for all.

    Returns:
        The records of all complete pieces, in the order of the pairs.
    """
    parts = [pairs[start : start + _PIECE] for start in range(0, len(pairs), _PIECE)]
    paths = [directory / f"answers-{place:03}.jsonl" for place in range(len(parts))]

    def is_late() -> bool:
        return end is not None and time.time() >= end

    mine = [*range(len(parts))][part[0] - 1 :: part[1]]
    with progress_bar("answering with the prompt in view", sum(len(parts[place]) for place in mine)) as progress:
        for place in mine:
            if is_late() and place != mine[0]:
                break
            self_distil(
                model,
                tokenizer,
                [(pair.instruction, str(pair.input)) for pair in parts[place]],
                paths[place],
                max_new_tokens=ANSWER_TOKENS,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )

    def is_complete(place: int) -> bool:
        wanted = len({(pair.instruction, pair.input) for pair in parts[place]})
        return paths[place].exists() and paths[place].read_bytes().count(b"\n") == wanted

    complete = [is_complete(place) for place in range(len(parts))]
    while not (all(complete) or (is_late() and any(complete))):
        time.sleep(0.5)
        complete = [is_complete(place) for place in range(len(parts))]
    return [one for place in range(len(parts)) if complete[place] for one in load_records(paths[place])]


def ship(trained: Path, directory: Path, base: str = BASE) -> None:
    """Copy a trained adapter in bfloat16, with the base model's name on the hub instead of a local directory.

    The tokenizer, which is the base model's, is left out, so the adapter is loaded onto a patched base model.

    Args:
        trained: what training wrote.
        directory: where to write; a directory that exists is replaced.
        base: the name of the base model.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shutil.copyfile(trained / "gist.json", directory / "gist.json")  # The tokenizer itself is the base model's.
    shutil.copyfile(_FOLDER / "CARD.md", directory / "README.md")
    shutil.copyfile(_FOLDER / "SOURCES.md", directory / "SOURCES.md")
    about = dict(adapters.read_about(trained) or {})
    weights = adapters.weights_name(about)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(trained / weights).items()}
    save_file(tensors, directory / weights, metadata={"format": "pt"})
    (directory / weights).chmod(0o644)
    (directory / "gist_adapter.json").write_text(json.dumps(about | {"base": base}, indent=2) + "\n", encoding="utf-8")


def held_out_for_checks(records: Sequence[Record]) -> set[str]:
    """Return the prompts that are left out of the training."""
    return set(list(dict.fromkeys(record.instruction for record in records))[::_ONE_IN][:_MOST])


def adapter_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f} %"

    measured = [row for row in rows if "kl" in row]
    sets = list(dict.fromkeys(row["set"] for row in measured))
    lines = [
        [
            f"{row['num_prompts']} {row['set']}",
            str(row["num_gist_tokens"]),
            *(f"{row['kl'][source]:.3f}" for source in ("none", "swapped", "gist")),
            share(row["kept"]["none"]),
            share(row["kept"]["swapped"]),
            *(share(row["agreement"][source]) for source in ("none", "swapped", "gist")),
            *(f"{row['rouge_l'][source]:.2f}" if "rouge_l" in row else "-" for source in ("none", "swapped", "gist")),
        ]
        for row in sorted(measured, key=lambda row: (sets.index(row["set"]), row["num_gist_tokens"]))
    ]
    columns = ("prompts", "k", "KL: no prompt", "swapped", "gist", "kept: of no prompt", "of swapped")
    columns += ("agreement: no prompt", "swapped", "gist", "ROUGE-L: no prompt", "swapped", "gist")
    text = [*markdown_table(columns, lines), ""]
    text.append(
        "KL from the untouched model with the whole prompt, in nats a token, means over sampled answers; agreement of "
        f"the likeliest tokens; ROUGE-L of greedy answers with those of the whole prompt ({where(rows[0])})."
    )
    for row in rows:
        if row["set"] == "run":
            parts = ", ".join(f"{part} {seconds / 60:,.0f} min" for part, seconds in row["seconds"].items())
            text.append(
                f"Trained for {row['steps']:,} steps on {row['num_records']:,} answers to {row['num_prompts']:,} "
                f"prompts, {row['num_bytes'] / 1e6:.1f} MB; {parts}."
            )
    return "\n".join(text)


def _every(scale: float, number: int) -> int:
    """How far apart the prompts of a share of them are, of which at least two are left: one is the other's control."""
    return min(max(round(1 / scale), 1), number // 2)


def _trained_sizes(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise typer.BadParameter(f"--trained-k must be a whole number or two, such as 1:16, got {text!r}") from None


@contextmanager
def _timed(what: str, directory: Path) -> Iterator[None]:
    """Add the seconds of a part to ``times.json``, so that a part which was interrupted has all of them."""
    path = directory / "times.json"
    start = time.perf_counter()
    say(f"{what} ...")
    yield
    seconds = time.perf_counter() - start
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before[what] = round(before.get(what, 0.0) + seconds, 1)
    path.write_text(json.dumps(before, indent=2) + "\n", encoding="utf-8")
    say(f"{what}: {seconds:,.0f} s")


def main(
    model: Annotated[str, typer.Option(help="The base model: a directory, or a repository on the hub.")] = BASE,
    output: OutputOption = None,
    directory: Annotated[Path, typer.Option(help="Directory of the run, which keeps what each part made.")] = Path(
        "runs/adapter"
    ),
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of self-instruct's seed tasks and T0's templates; without it, both "
            "are left out of the training."
        ),
    ] = None,
    alpaca_plus: Annotated[
        Path | None, typer.Option(help="Directory of Alpaca+ (alpaca_plus_validation_*.json), to evaluate on.")
    ] = None,
    answers: Annotated[Path | None, typer.Option(help="JSONL file for the 20 answers side by side.")] = None,
    ship_to: Annotated[Path | None, typer.Option(help="Directory for the adapter in bfloat16.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of each step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    trained_k: Annotated[str, typer.Option(help="Gist tokens in training, a range from which each row draws.")] = (
        "1:16"
    ),
    answer_batch: Annotated[int, typer.Option(min=1, help="Answers that are sampled together.")] = 48,
    ks: Annotated[str, typer.Option(help="Gist tokens to evaluate with, comma-separated.")] = "4,8,16",
    answer_with: Annotated[
        int, typer.Option(min=0, help="Gist tokens with which greedy answers are compared; 0 to leave that out.")
    ] = 8,
    scale: Annotated[float, typer.Option(help="Share of the data and of the evaluation, for a quick run.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Type of the base model.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the training, for several with the same answers; by default adapter."),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            help="Number of this process and how many share the answers, such as 1/3, at the same time. Each then "
            "trains an adapter of its own, so each needs a --name that no other has."
        ),
    ] = "1/1",
    answer_until: Annotated[
        float | None, typer.Option(help="When to stop answering, in seconds since the epoch; all are answered without.")
    ] = None,
    train_until: Annotated[
        float | None, typer.Option(help="When the training ends, in seconds since the epoch, instead of --steps.")
    ] = None,
    evaluated: Annotated[
        Path | None, typer.Option("--evaluate", help="Directory of an adapter to evaluate, instead of making one.")
    ] = None,
) -> None:
    """The adapter that comes with the library: data, answers, training, evaluation.

    Example: python -m benchmarks adapter --output docs/results/adapter.jsonl
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(*(max(int(scale * size), 2) for size in SIZES[:-1]), inputs=SIZES.inputs)
    own, of = part_of(part)
    if of > 1 and name is None:
        raise typer.BadParameter(f"with --part {part} several processes train in one --directory; give each a --name")
    name = name or "adapter"
    low, high = _trained_sizes(trained_k)
    rows, held_out = Rows("adapter", output), system_prompts()
    loaded, tokenizer = load(model, "chat", dtype=getattr(torch, dtype))
    loaded.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    everywhere: dict[str, list[HeldOut]] = {"system prompts": held_out[:: _every(scale, len(held_out))]}
    for split in ("unseen", "human"):
        path = None if alpaca_plus is None else alpaca_plus / f"alpaca_plus_validation_{split}.json"
        if path is None or not path.exists():
            say(f"{split} instructions are skipped: there is no {path or '--alpaca-plus'}")
            continue
        everywhere[f"{split} instructions"] = instructions(path, max(int(scale * 60), 2))

    def evaluate(path: Path) -> None:
        adapters.load(loaded, path)
        for kind, prompts in everywhere.items():
            found = measure(
                loaded, tokenizer, kind, prompts, numbers("--ks", ks), answer_with=answer_with or None, say=say
            )
            rows.add({**row, "adapter": name} for row in found)
        if answers is not None:
            shown = side_by_side(loaded, tokenizer, everywhere["system prompts"], answer_with or 8)
            answers.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in shown), encoding="utf-8")

    if evaluated is not None:
        evaluate(evaluated)
        rows.show(adapter_table)
        return
    trained = directory / name
    trained.mkdir(exist_ok=True)
    with _timed("prompts and inputs", trained):
        exclude = {one.prompt for one in held_out}
        while own > 1 and not (directory / "pairs.jsonl").exists():
            time.sleep(0.5)  # The first process makes them.
        pairs = build_pairs(
            loaded,
            tokenizer,
            directory / "pairs.jsonl",
            sizes=sizes,
            tasks=tasks,
            exclude=exclude,
            seed=seed,
            batch_size=answer_batch,
        )
    with _timed("answers", trained):
        records = answered(
            loaded,
            tokenizer,
            pairs,
            directory,
            batch_size=answer_batch,
            seed=seed,
            part=(own, of),
            end=answer_until,
        )
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # The states of many prompts at once are no longer needed.
    checked, shipped = held_out_for_checks(records), ship_to or directory / f"{name}-bfloat16"
    settings = {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "trained_k": trained_k,
        "rank": _SETTINGS["method"].rank,
        "seed": seed,
    }
    with _timed("training", trained):
        if not (trained / "gist_adapter.json").exists():  # which is written last
            train(
                loaded,
                tokenizer,
                [one for one in records if one.instruction not in checked],
                trained,
                steps=steps if train_until is None else 1_000_000,
                seed=seed,
                batch_size=batch_size,
                num_gist_tokens=(low, high),
                learning_rate=learning_rate,
                end=train_until,
                settings=settings,
            )
            adapters.detach(loaded)
        ship(trained, shipped)
    settings = json.loads((trained / "settings.json").read_text(encoding="utf-8"))
    with _timed("evaluation", trained):
        evaluate(shipped)
    sizes_of = {"num_prompts": len({one.instruction for one in records}), "num_records": len(records)}
    weights = next(shipped.glob("*.safetensors")).stat().st_size
    times = json.loads((trained / "times.json").read_text(encoding="utf-8"))
    rows.add([{"set": "run", "name": name, **settings, **sizes_of, "num_bytes": weights, "seconds": times}])
    rows.show(adapter_table)
