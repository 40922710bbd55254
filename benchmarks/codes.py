"""Codes that only the prompt has: which way of teaching a prompt brings them into the weights, or into a gist.

A prompt lists 16 names with made-up codes. Queries ask for some of the names; no training query asks for the others, so
a model that answers those knows what only the prompt says. Some ways also meet versions of the prompt in which rows are
swapped and one to four codes are others; they are then asked about versions that they have never seen. The base of all
ways first learns to read such prompts, and to ask about them, on random tables: a small model does not do it by itself.

Two bases: the small LLaMA of the built-in task, from random weights; or a pretrained chat model.
"""

from __future__ import annotations

import copy
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from benchmarks.cells import interval_cell
from benchmarks.command import where
from gisting.data.plain import PlainCollator
from gisting.data.records import Record
from gisting.data.tasks import NUM_CODES, CodeTable, CodeTask, code_tokenizer
from gisting.demo import BATCH_SIZE, task_model
from gisting.distillation.questions import WRITER, parts_of, requests_about
from gisting.errors import GistError
from gisting.eval.conditions import evaluate
from gisting.eval.statistics import Interval, bootstrap
from gisting.generation.sampling import sample_answers
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import SelfInformation
from gisting.internalize.stages import internalize
from gisting.markdown import markdown_table
from gisting.models.hub import save_pretrained
from gisting.models.load import load
from gisting.store.objects import locked
from gisting.train.finetune import published_arguments
from gisting.train.objective import ObjectiveTrainer

__all__ = ["RUNS", "CodesRow", "codes_table", "measure_codes"]

NUM_GIST_TOKENS = 8
#: Every way, with its arguments of ``internalize``; ``questions`` are the model's own. None for the base as it is, and
#: for the model that the base was made from, which may not be able to read such a prompt.
RUNS: dict[str, dict[str, Any] | None] = {
    "untouched model, full prompt": None,
    "not trained, full prompt": None,
    "not trained, no prompt": None,
    "full prompt": {"control": "full"},
    "bare query": {"control": "bare"},
    "in stages": {},
    "on-policy": {"method": "on-policy"},
    "on-policy, own questions": {"method": "on-policy", "questions": True},
    "self-study": {"method": "self-study", "questions": True},
    "stages, then a gist": {"tail": "gist", "num_gist_tokens": NUM_GIST_TOKENS, "num_gist_stages": 3},
    "stages, then a gist of edits": {
        "tail": "gist",
        "num_gist_tokens": NUM_GIST_TOKENS,
        "num_gist_stages": 3,
        "edits": True,
    },
}
_UNTOUCHED = next(iter(RUNS))
_MOST_CHANGED = 4


@dataclass(frozen=True)
class CodesRow:
    """One way of teaching a prompt.

    Scores are shares of right answers in 0..1 with 95 % intervals: ``asked`` on held-out queries for names that
    training asks for, ``unasked`` for the others; with a version of the prompt that was never seen, ``changed`` on
    queries for codes that differ from the prompt's and ``kept`` for the others, None where no prompt is read.
    ``tokens`` is the mean number of tokens of a request. ``seconds`` covers the training and what was sampled for it.
    """

    run: str
    model: str
    seed: int
    num_steps: int
    base_steps: int
    num_edits: int
    num_queries: int
    tokens: float | None
    asked: Interval
    unasked: Interval
    changed: Interval | None
    kept: Interval | None
    seconds: float


@dataclass(frozen=True)
class _Split:
    """A prompt with its queries, and versions of it."""

    prompt: str
    training: list[Record]
    asked: list[Record]
    unasked: list[Record]
    edits: list[Record]
    changed: list[Record]
    kept: list[Record]


class _BuiltIn:
    """The built-in task and its small LLaMA, which learns from random weights."""

    name, answer, max_length, rows, base_rate, rate = "built-in task", 8, 192, BATCH_SIZE, 2e-3, 1e-3

    def __init__(self) -> None:
        self.tokenizer = code_tokenizer()

    def model(self) -> Any:
        return task_model(self.tokenizer, max_position_embeddings=512)

    def lookups(self, number: int, seed: int) -> list[Record]:
        """Queries to random tables; one in eight asks for a query instead of an answer."""
        chance, found = random.Random(f"asking {seed}"), CodeTask(num_unasked=2).lookups(number, 1, seed)
        return [replace(one, input="", output=str(one.input)) if chance.random() < 0.125 else one for one in found]

    def questions(self, model: Any, prompt: str, number: int, seed: int) -> list[str]:
        """Queries that the model writes when it is asked for nothing."""
        said = sample_answers(
            model, self.tokenizer, [(prompt, "")] * number, max_new_tokens=self.answer, seed=seed, batch_size=256
        )
        return [one.output for one in said if one.output]

    def split(self, seed: int, num_edits: int, num_queries: int) -> _Split:
        task = CodeTask(seed=seed, num_unasked=2)
        training, asked = task.records("train", 512, seed), task.records("eval", num_queries, seed)
        chance = random.Random(f"edits {seed}")
        names = [name for name in task.table.names if name not in task.unasked]

        def version() -> tuple[CodeTable, list[str]]:
            codes = chance.sample(task.table.codes, len(task.table.codes))
            others = chance.sample(names, chance.randint(1, _MOST_CHANGED))
            for place, code in enumerate(codes):
                name, _, number = code.partition("-")
                if name in others:
                    codes[place] = f"{name}-{(int(number) + chance.randrange(1, NUM_CODES)) % NUM_CODES}"
            return replace(task.table, codes=tuple(codes)), others

        def about(table: CodeTable, query: list[str]) -> Record:
            return Record(table.text(), " ".join(query), " ".join(table.answer(query)))

        edits, changed, kept = [], [], []
        for _ in range(num_edits):
            table, others = version()
            query = [chance.choice(others if chance.random() < 0.3 else names) for _ in range(task.length)]
            edits.append(about(table, query))
        for _ in asked:
            table, others = version()
            rest = [name for name in names if name not in others]
            changed.append(about(table, [chance.choice(others), *chance.choices(rest, k=task.length - 1)]))
            kept.append(about(table, chance.choices(rest, k=task.length)))
        return _Split(
            task.table.text(), training, asked, task.records("unasked", num_queries, seed), edits, changed, kept
        )

    @staticmethod
    def is_right(said: str, reference: str) -> bool:
        return said.split() == reference.split()


_ROOMS = (
    *("Amber", "Birch", "Coral", "Delta", "Ember", "Fjord", "Grove", "Heron", "Indigo", "Jade", "Karst", "Larch"),
    *("Maple", "North", "Onyx", "Pearl", "Quartz", "Raven", "Slate", "Tundra", "Umber", "Violet", "Willow", "Zephyr"),
    *("Acorn", "Basil", "Cedar", "Daisy", "Eagle", "Falcon", "Garnet", "Hazel", "Ivory", "Juniper", "Kestrel", "Lotus"),
)
_ASKING = (
    *("What is the code of room {}?", "Which code has room {}?", "I need the code of room {}."),
    *("Tell me the code of room {}.", "What code opens room {}?"),
)
_HELD_OUT = ("Please give me the code for room {}.", "Room {}: what is its code?")
_NUM_ROOMS, _NUM_UNASKED = 16, 4


class _Rooms:
    """A house whose rooms have codes of three digits, and a pretrained chat model."""

    answer, max_length, rows, base_rate, rate = 16, 320, 8, 1.5e-4, 2e-4

    def __init__(self, directory: Path) -> None:
        self.name = directory.name
        self.pretrained, self.tokenizer = load(directory, template="chat", dtype="float32")

    def model(self) -> Any:
        return copy.deepcopy(self.pretrained)

    def lookups(self, number: int, seed: int) -> list[Record]:
        """Queries to random tables; one in four asks for a question about a part of the table."""
        chance, found = random.Random(f"rooms {seed}"), []
        for _ in range(number):
            codes = self._table(chance)
            prompt, name = self._prompt(codes), chance.choice([*codes])
            asking = chance.choice((*_ASKING, *_HELD_OUT)).format(name)
            if chance.random() < 0.25:
                part = chance.choice([part for part in parts_of(prompt) if f" {name} " in part])
                found.append(Record(WRITER, chance.choice(requests_about([part])), asking))
            else:
                found.append(Record(prompt, asking, self._answer(name, codes[name])))
        return found

    def questions(self, model: Any, prompt: str, number: int, seed: int) -> None:
        """Leave the questions to ``internalize``."""

    def split(self, seed: int, num_edits: int, num_queries: int) -> _Split:
        chance = random.Random(f"house {seed}")
        codes = self._table(chance)
        names = [*codes][_NUM_UNASKED:]
        chance.shuffle(names)
        unasked = [name for name in codes if name not in names]
        prompt = self._prompt(codes)

        def queries(asking: Sequence[str], whom: Sequence[str], number: int, text: str, table: dict[str, int]) -> Any:
            pairs = [(one, name) for one in asking for name in whom]
            chosen = [pairs[row % len(pairs)] for row in range(number)]
            return [Record(text, one.format(name), self._answer(name, table[name])) for one, name in chosen]

        def version() -> tuple[dict[str, int], list[str]]:
            others = chance.sample(names, chance.randint(1, _MOST_CHANGED))
            new = iter(chance.sample([code for code in range(100, 1000) if code not in codes.values()], len(others)))
            edited = {name: next(new) if name in others else codes[name] for name in codes}
            return {name: edited[name] for name in chance.sample([*edited], len(edited))}, others

        edits, changed, kept = [], [], []
        for _ in range(num_edits):
            table, others = version()
            name = chance.choice(others if chance.random() < 0.5 else names)
            edits += queries([chance.choice(_ASKING)], [name], 1, self._prompt(table), table)
        for row in range(num_queries):
            table, others = version()
            rest = [name for name in names if name not in others]
            asking = [_HELD_OUT[row % len(_HELD_OUT)]]
            changed += queries(asking, [chance.choice(others)], 1, self._prompt(table), table)
            kept += queries(asking, [chance.choice(rest)], 1, self._prompt(table), table)
        training, asked, unasked = (
            queries(asking, whom, len(asking) * len(whom), prompt, codes)
            for asking, whom in ((_ASKING, names), (_HELD_OUT, names), (_HELD_OUT, unasked))
        )
        return _Split(prompt, training, asked, unasked, edits, changed, kept)

    @staticmethod
    def is_right(said: str, reference: str) -> bool:
        return re.findall(r"\d+", said) == re.findall(r"\d+", reference)

    @staticmethod
    def _table(chance: random.Random) -> dict[str, int]:
        return dict(zip(chance.sample(_ROOMS, _NUM_ROOMS), chance.sample(range(100, 1000), _NUM_ROOMS), strict=True))

    @staticmethod
    def _prompt(codes: dict[str, int]) -> str:
        rows = " ".join(f"The code of room {name} is {code}." for name, code in codes.items())
        return f"You are the porter of an old house. Every room has a code. {rows}"

    @staticmethod
    def _answer(name: str, code: int) -> str:
        return f"The code of room {name} is {code}."


def measure_codes(
    directory: str | Path,
    *,
    model: str | Path | None = None,
    seed: int = 0,
    base_steps: int = 600,
    steps: int = 200,
    num_edits: int = 2000,
    num_queries: int = 128,
    num_questions: int = 256,
    runs: Sequence[str] = tuple(RUNS),
    until: float = float("inf"),
    add: Callable[[CodesRow], Any] = lambda row: None,
    progress: Callable[[str], Any] = lambda what: None,
) -> list[CodesRow]:
    """Train the base, unless another process that shares the directory has, then a copy of it in each way.

    Args:
        directory: for the base and a folder per way; folders of the same name are replaced.
        model: directory of a pretrained chat model; None for the built-in task and its model.
        seed: seed of the table, the data and the training.
        base_steps: optimiser steps of the base, each of 32 queries to random tables.
        steps: optimiser steps of each way, of 32 requests, over all its stages.
        num_edits: versions of the prompt to learn from.
        num_queries: the largest number of queries in a score.
        num_questions: how many queries the model writes itself.
        runs: names of ``RUNS``.
        until: no further way is started after this time, as ``time.time`` gives it.
        add: called with each row as soon as it is known.
        progress: called with a description of each step before it starts.

    Raises:
        GistError: a way is unknown.
    """
    if unknown := [name for name in runs if name not in RUNS]:
        raise GistError(f"runs must be names of {', '.join(RUNS)}, got {unknown[0]!r}")
    folder = Path(directory)
    problem: Any = _BuiltIn() if model is None else _Rooms(Path(model))
    base = None
    if any(name != _UNTOUCHED for name in runs):
        base = _base(problem, folder, base_steps, 0 if model is not None else seed, progress)
    split = problem.split(seed, num_edits, num_queries)
    rows = []
    for name in runs:
        if time.time() >= until:
            progress(f"{name}: not started, the time is over")
            continue
        progress(f"{name}: {steps} steps")
        row = _measure_one(
            problem, base, split, folder / f"{name} {seed}", name, seed, steps, base_steps, num_questions
        )
        add(row)
        rows.append(row)
    return rows


def _measure_one(
    problem: Any,
    base: Any,
    split: _Split,
    folder: Path,
    name: str,
    seed: int,
    steps: int,
    base_steps: int,
    num_questions: int,
) -> CodesRow:
    shutil.rmtree(folder, ignore_errors=True)
    chosen, tokens, start = RUNS[name], None, time.perf_counter()
    trained = problem.model() if name == _UNTOUCHED else copy.deepcopy(base)
    trained.to("cuda" if torch.cuda.is_available() else "cpu")
    condition = "prompt" if name.endswith("full prompt") else "no-prompt"
    if chosen is not None:
        more = {key: value for key, value in chosen.items() if key not in ("questions", "edits")}
        records = split.training
        if chosen.get("questions"):
            own = problem.questions(trained, split.prompt, num_questions, seed)
            # The built-in model cannot be asked for questions in words: what it writes takes the records' place.
            records = [] if own is None else [Record("", query, "") for query in own]
            more["num_questions"] = num_questions if own is None else 0
        elif chosen.get("method"):
            more["num_questions"] = 0
        result = internalize(
            trained,
            problem.tokenizer,
            split.prompt,
            records,
            _arguments(folder, steps, problem.rate, seed, BATCH_SIZE if "method" in chosen else problem.rows),
            # Methods without stages take no shortener.
            **({} if "method" in chosen else {"shortener": SelfInformation(trained, problem.tokenizer)}),
            schedule=Schedule.linear(4),
            edits=split.edits if chosen.get("edits") else None,
            max_new_tokens=problem.answer,
            max_length=problem.max_length,
            callbacks=[TrainerCallback()],  # keeps Trainer from printing
            **more,
        )
        condition, tokens = result.condition, result.tokens
    seconds = time.perf_counter() - start
    scores = {"asked": split.asked, "unasked": split.unasked}
    if condition != "no-prompt":
        scores |= {"changed": split.changed, "kept": split.kept}
    found = {what: _score(problem, trained, records, condition) for what, records in scores.items()}
    return CodesRow(
        run=name,
        model=problem.name,
        seed=seed,
        num_steps=0 if chosen is None else steps,
        base_steps=0 if name == _UNTOUCHED else base_steps,
        num_edits=len(split.edits),
        num_queries=len(split.asked),
        tokens=tokens,
        asked=found["asked"],
        unasked=found["unasked"],
        changed=found.get("changed"),
        kept=found.get("kept"),
        seconds=round(seconds, 1),
    )


def _score(problem: Any, model: Any, records: Sequence[Record], condition: str) -> Interval:
    settings: dict[str, Any] = {"max_new_tokens": problem.answer, "batch_size": 128, "with_rouge": False}
    (result,) = evaluate(model, problem.tokenizer, records, NUM_GIST_TOKENS, conditions=[condition], **settings)
    pairs = zip(result.predictions, records, strict=True)
    return bootstrap([[float(problem.is_right(said, record.output)) for said, record in pairs]])


def _arguments(folder: Path, steps: int, rate: float, seed: int, rows: int) -> TrainingArguments:
    return published_arguments(
        folder,
        batch_size=BATCH_SIZE,
        per_device_batch_size=rows,  # of a forward pass
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.05,
        dataloader_num_workers=0,  # batches are made in no time
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )


def _base(problem: Any, directory: Path, steps: int, seed: int, progress: Callable[[str], Any]) -> Any:
    """Load the base from ``directory``, or train it; the first of several processes does that, the others wait."""
    folder = directory / f"base-{problem.name}-{steps}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with locked(folder):
        if not done.exists():
            progress(f"base: {steps} steps")
            set_seed(seed)
            model = problem.model()
            trainer = ObjectiveTrainer(
                model=model,
                args=_arguments(folder, steps, problem.base_rate, seed, problem.rows),
                train_dataset=problem.lookups(steps * BATCH_SIZE, seed),
                data_collator=PlainCollator(problem.tokenizer, problem.max_length),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            save_pretrained(model, problem.tokenizer, folder)
            done.touch()
    return load(folder, dtype="float32")[0]


def codes_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as Markdown: for each model, each way with its scores for every seed."""
    text = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        lines = []
        for run in [run for run in RUNS if any(row["run"] == run for row in mine)]:
            own = sorted((row for row in mine if row["run"] == run), key=lambda row: row["seed"])
            tokens = [row["tokens"] for row in own if row["tokens"] is not None]
            mean = f"{sum(tokens) / len(tokens):.0f}" if tokens else "-"
            lines.append(
                [
                    run,
                    _range([row["num_steps"] for row in own]),
                    mean,
                    *(_cells(own, what) for what in ("asked", "unasked", "changed", "kept")),
                    _range([row["seconds"] for row in own]),
                ]
            )
        columns = ("steps", "tokens", "asked", "unasked", "changed code", "kept code", "seconds")
        seeds = map(str, sorted({row["seed"] for row in mine}))
        devices = "; ".join(dict.fromkeys(where(row) for row in mine))
        edited = [row["num_edits"] for row in mine if (RUNS[row["run"]] or {}).get("edits")]
        missing = [run for run in RUNS if all(row["run"] != run for row in mine)]
        text += [
            *markdown_table((f"{name}: trained", *columns), lines),
            "",
            f"Right answers in per cent, one for each seed ({', '.join(seeds)}); "
            f"{_range([row['num_queries'] for row in mine])} queries for the codes that are asked for, with a 95 % "
            f"interval of ±{_half_width(mine):.0f} on average. Steps of 32 requests, from a base of "
            f"{max(row['base_steps'] for row in mine):,} steps on random tables"
            + (f"; {max(edited):,} versions of the prompt to learn from" if edited else "")
            + f" ({devices})."
            + (f" Without a row so far: {'; '.join(missing)}." if missing else ""),
            "",
        ]
    return "\n".join(text[:-1])


def _range(values: Sequence[float]) -> str:
    return "–".join(dict.fromkeys(f"{value:,.0f}" for value in (min(values), max(values))))


def _cells(rows: Sequence[dict[str, Any]], what: str) -> str:
    found = [row[what] for row in rows if row[what] is not None]
    return ", ".join(interval_cell(one).partition(" ")[0] for one in found) or "-"


def _half_width(rows: Sequence[dict[str, Any]]) -> float:
    found = [row["asked"] for row in rows] + [row["unasked"] for row in rows]
    return 50 * sum(one["high"] - one["low"] for one in found) / len(found)
