"""Make the adapter that comes with the library, from nothing to its table: data, answers, training, evaluation.

Each part keeps what it made in the directory of the run, and a run that was interrupted goes on where it stopped. The
adapter is ``gist-lora``, so the base model stays as it is. It learns by distillation alone: the untouched model answers
with the whole prompt in view, and the gist learns to give the same distributions.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import set_seed

from benchmarks.adapter.data import SIZES, Sizes, build_pairs
from benchmarks.adapter.evaluation import HeldOut, instructions, measure, side_by_side, system_prompts
from benchmarks.command import OutputOption, Rows, numbers, say, where
from gisting.data.records import Record
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

__all__ = ["BASE", "adapter_table", "main", "ship", "train"]

#: The base model, by its name on the hub.
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FOLDER = Path(__file__).parent
#: Of so many prompts, one is left out of the training, for checks while it runs.
_ONE_IN, _MOST = 33, 24
_SETTINGS: dict[str, Any] = {
    "method": Method("gist-lora", rank=16),
    "objective": Objective(language_model=0.0, distillation=1.0, top_k=64),
    "num_gist_tokens": (1, 16),
    "max_length": 700,
    "pack_length": 1024,
    "max_per_group": 4,
}
#: The settings of the answers that the adapter is trained on.
ANSWER_TOKENS, ANSWER_BATCH = 32, 48


def train(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    directory: Path,
    *,
    steps: int,
    seed: int,
    batch_size: int = 4,
) -> dict[str, float]:
    """Train the adapter on self-distilled records, from its last checkpoint if there is one.

    Args:
        model: the patched base model, in bfloat16; the adapter's weights are float32.
        tokenizer: its tokenizer.
        records: the records.
        directory: for checkpoints and the adapter.
        steps: optimiser steps.
        seed: seed of the weights, the order and the draws.
        batch_size: prompts of each step, with up to four inputs each.

    Returns:
        What ``Trainer`` measured.
    """
    set_seed(seed)
    arguments = published_arguments(
        directory,
        batch_size=batch_size,
        per_device_batch_size=batch_size,
        learning_rate=3e-3,
        max_steps=steps,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        save_steps=40,
        save_total_limit=1,
        logging_steps=10,
        seed=seed,
        report_to="none",
    )
    arguments.disable_tqdm = True
    has_checkpoint = any(directory.glob("checkpoint-*"))
    with ShownTraining() as shown:
        return finetune(model, tokenizer, records, arguments, resume=has_checkpoint, callbacks=[shown], **_SETTINGS)


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
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 840,
    ks: Annotated[str, typer.Option(help="Gist tokens to evaluate with, comma-separated.")] = "4,8,16",
    answer_with: Annotated[int, typer.Option(min=1, help="Gist tokens with which greedy answers are compared.")] = 8,
    scale: Annotated[float, typer.Option(help="Share of the data and of the evaluation, for a quick run.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Type of the base model.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """The adapter that comes with the library: data, answers, training, evaluation.

    Example: python -m benchmarks adapter --output docs/results/adapter.jsonl
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(*(max(int(scale * size), 2) for size in SIZES[:-1]), inputs=SIZES.inputs)
    loaded, tokenizer = load(model, "chat", dtype=getattr(torch, dtype))
    with _timed("prompts and inputs", directory):
        held_out = system_prompts()
        exclude = {one.prompt for one in held_out}
        pairs = build_pairs(
            loaded, tokenizer, directory / "pairs.jsonl", sizes=sizes, tasks=tasks, exclude=exclude, seed=seed
        )
    with _timed("answers", directory), progress_bar("answering with the prompt in view", len(pairs)) as progress:
        records = self_distil(
            loaded,
            tokenizer,
            [(pair.instruction, str(pair.input)) for pair in pairs],
            directory / "answers.jsonl",
            max_new_tokens=ANSWER_TOKENS,
            batch_size=ANSWER_BATCH,
            seed=seed,
            progress=progress,
        )
    checked = held_out_for_checks(records)
    trained, shipped = directory / "adapter", ship_to or directory / "adapter-bfloat16"
    with _timed("training", directory):
        if not (trained / "gist_adapter.json").exists():  # which is written last
            train(
                loaded,
                tokenizer,
                [one for one in records if one.instruction not in checked],
                trained,
                steps=steps,
                seed=seed,
            )
            adapters.detach(loaded)
        ship(trained, shipped)
    adapters.load(loaded, shipped)
    rows = Rows("adapter", output)
    number = max(int(scale * 60), 2)
    with _timed("evaluation", directory):
        sets: dict[str, list[HeldOut]] = {"system prompts": held_out[: max(int(scale * len(held_out)), 2)]}
        for split in ("unseen", "human"):
            path = None if alpaca_plus is None else alpaca_plus / f"alpaca_plus_validation_{split}.json"
            if path is None or not path.exists():
                say(f"{split} instructions are skipped: there is no {path or '--alpaca-plus'}")
                continue
            sets[f"{split} instructions"] = instructions(path, number)
        for name, prompts in sets.items():
            rows.add(measure(loaded, tokenizer, name, prompts, numbers("--ks", ks), answer_with=answer_with, say=say))
    if answers is not None:
        shown = side_by_side(loaded, tokenizer, sets["system prompts"], answer_with)
        answers.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in shown), encoding="utf-8")
    sizes_of = {"num_prompts": len({one.instruction for one in records}), "num_records": len(records)}
    weights = next(shipped.glob("*.safetensors")).stat().st_size
    times = json.loads((directory / "times.json").read_text(encoding="utf-8"))
    rows.add([{"set": "run", "steps": steps, "seed": seed, **sizes_of, "num_bytes": weights, "seconds": times}])
    rows.show(adapter_table)
