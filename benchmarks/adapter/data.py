"""Build the prompts and inputs that the adapter is trained on, from sources that allow its weights to be shipped.

Place in the flow: **data** -> answers that the model samples (:mod:`gisting.train.self_distil`) -> training. Four
sources: composed system prompts and instructions of this repository, self-instruct's seed tasks and the templates of T0
(both Apache-2.0, if the file is there), and what the model itself writes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks.adapter.prompts import Composed, compose, compose_instruction, ordinary, passages
from gisting.data.records import Record, load_records, save_records
from gisting.generation.sampling import sample_answers
from gisting.tokens import GistTokenizer

__all__ = ["SIZES", "Sizes", "build_pairs"]


class Sizes(NamedTuple):
    """How many prompts come from each source.

    Args:
        composed: composed system prompts.
        instructions: composed instructions.
        seeds: tasks of self-instruct.
        templates: templates of T0.
        written: prompts that the model writes.
        inputs: inputs of each prompt.
    """

    composed: int = 6400
    instructions: int = 600
    seeds: int = 170
    templates: int = 300
    written: int = 96
    inputs: int = 4


#: What the recipe makes. The shipped adapter was trained on an earlier, smaller set, which SOURCES.md describes.
SIZES = Sizes()
# What the model is asked to write prompts about.
_SUBJECTS = (
    "gardening,a railway company,cooking for families,learning Spanish,a video game shop,a public library,bird "
    "watching,first aid courses,a film club,old maps,a bank for students,yoga,a zoo,home insurance,a theatre,chess "
    "lessons,a ski resort,house plants,a newspaper,a science museum,knitting,a farm shop,weather reports,a car "
    "rental,philosophy,wedding planning,a radio station,a bakery,a bookshop,astronomy,a school for adults,a hospital"
).split(",")
_ASKED = (
    "Write the system prompt of a chat assistant for {}. Say who the assistant is, and give it four rules.",
    "You are told to set up a chat bot for {}. Write its instructions.",
    "Write a detailed description of a character who knows everything about {}, addressed to that character as you.",
)


def build_pairs(
    model: Any,
    tokenizer: GistTokenizer,
    path: Path,
    *,
    sizes: Sizes = SIZES,
    tasks: Path | None = None,
    exclude: Collection[str] = (),
    seed: int = 0,
    batch_size: int = 32,
) -> list[Record]:
    """Build the pairs of prompts and inputs, or read them if they were built before.

    Args:
        model: a patched model, which writes some of the prompts.
        tokenizer: the tokenizer it was patched for.
        path: a JSONL file for the pairs.
        sizes: how many prompts of each source.
        tasks: self-instruct's seeds and T0's templates, with ``instruction``, ``input`` and ``source``; None to leave
            both out.
        exclude: prompts that are held out.
        seed: seed of everything that is drawn.
        batch_size: how many texts the model writes together.

    Returns:
        Records without outputs, whose source names where the prompt is from.
    """
    if path.exists():
        return _read(path)
    random = Random(f"pairs {seed}")
    found = [*compose(sizes.composed, seed), *compose_instruction(sizes.instructions, seed)]
    found += _tasks(tasks, sizes, random) if tasks is not None else []
    found += _written(model, tokenizer, sizes.written, seed, batch_size)
    random.shuffle(found)  # so that the first part of the answers is a mixture too
    pairs = []
    for kind, prompt, inputs in found:
        if prompt in exclude:
            continue
        about = random.sample(inputs, min(len(inputs), sizes.inputs))
        # Instructions come with their own inputs; system prompts also get a question that has nothing to do with them.
        if kind not in ("instruction", "seed", "template"):
            about = about[: max(sizes.inputs - 1, 1)]
            about += random.sample(ordinary(False), sizes.inputs - len(about))
        pairs += [Record(prompt, text, "", kind) for text in about]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"whole-{path.name}")
    save_records(pairs, whole)
    whole.rename(path)  # so that whoever waits for the file finds all of it
    return pairs


def _read(path: Path) -> list[Record]:
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _tasks(path: Path, sizes: Sizes, random: Random) -> list[Composed]:
    """Self-instruct's seed tasks with their own inputs, and T0's templates with texts of this repository."""
    seeds: dict[str, list[str]] = {}
    templates: dict[str, None] = {}
    for record in load_records(path):
        if record.source.startswith("self-instruct"):
            seeds.setdefault(record.instruction, []).append(str(record.input))
        else:
            templates.setdefault(record.instruction)
    texts = passages(False)
    chosen = random.sample(list(templates), min(sizes.templates, len(templates)))
    return [
        *(Composed("seed", prompt, inputs) for prompt, inputs in [*seeds.items()][: sizes.seeds]),
        *(Composed("template", prompt, random.sample(texts, sizes.inputs)) for prompt in chosen),
    ]


def _written(model: Any, tokenizer: GistTokenizer, number: int, seed: int, batch_size: int) -> list[Composed]:
    """Prompts and questions that the model writes about given subjects."""
    subjects = [(form.format(subject), subject) for form in _ASKED for subject in _SUBJECTS][:number]
    if not subjects:
        return []
    system = "You are a helpful writer. You write exactly what you are asked for, without a comment."
    how: dict[str, Any] = {"temperature": 0.8, "seed": seed, "batch_size": batch_size}
    said = sample_answers(model, tokenizer, [(system, asked) for asked, _ in subjects], max_new_tokens=140, **how)
    wanted = [
        (system, f"Write one short question that a visitor would ask an expert on {subject}. Number {place}.")
        for _, subject in subjects
        for place in (1, 2, 3)
    ]
    asked = sample_answers(model, tokenizer, wanted, max_new_tokens=32, **how)
    found = []
    for place, one in enumerate(said):
        end = max(one.output.rfind(mark) for mark in ".!?\n")
        questions = [each.output for each in asked[3 * place : 3 * place + 3] if each.output]
        if end > 60:
            found.append(Composed("written", one.output[: end + 1].strip(), questions))
    return found
