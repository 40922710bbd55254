"""Internalise a prompt on real data, English requests to bash commands, next to every control.

The data are NL2Bash (arXiv 1802.08979): two files of aligned lines, requests and commands, which are not part of the
project (their licence is the GPL). A hash of a request's words decides whether it belongs to the held-out split, so the
split is the same for every order, seed and model, and no held-out request is in training, whatever its case,
punctuation and white space. A command may be in both splits, exactly or nearly, for requests in other words, as in the
published split: scores are for requests in new words, not for new commands.

Every way to train starts from the same weights and takes the same number of steps: from a checkpoint, or, without one,
from a small LLaMA with random weights and a tokenizer trained on the training split, which is too small to be good at
this. Scores are reported unchanged, stage by stage, with the tokens and the cost of a request. Beside the ways to train
stand the checkpoint itself, with the full prompt and without, and the staged model that reads a gist, with the gist of
an unrelated prompt. A part of its own times requests to the checkpoint.
"""

# Over 600 lines because data, ways to train, costs and times of requests describe one experiment.

from __future__ import annotations

import copy
import hashlib
import math
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import set_seed

from benchmarks.cells import interval_cell
from benchmarks.command import CheckpointsOption, OutputOption, Rows, SeedOption, names, say, where
from benchmarks.internalize import serving_table
from gisting._compat import activation_checkpointing
from gisting.cli.shared import read_dtype
from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.demo import task_model
from gisting.errors import GistError
from gisting.eval.conditions import evaluate
from gisting.eval.metrics import bleu, exact_match, exact_matches
from gisting.eval.statistics import Interval, bootstrap
from gisting.internalize.comparison import FinishedRun, shared_prefix
from gisting.internalize.directory import EVAL_NAME, SETTINGS_NAME, read_answers
from gisting.internalize.examples import ExamplePool
from gisting.internalize.prices import Prices, load_prices
from gisting.internalize.requests import PromptFormat, Requests, make_requests
from gisting.internalize.result import Internalized
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import Rewrites
from gisting.internalize.stages import internalize
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.measure.requests import serving
from gisting.models.load import load
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer
from gisting.train.finetune import published_arguments

__all__ = [
    "PROMPT",
    "RUNS",
    "Nl2BashRow",
    "Task",
    "Way",
    "bleu_interval",
    "command_tokenizer",
    "main",
    "measure",
    "nl2bash_costs_table",
    "nl2bash_requests_table",
    "nl2bash_table",
    "read_pairs",
    "requests",
    "split_pairs",
]

#: The prompt of every request.
PROMPT = """\
Translate each request into one bash command for Linux.
Rules:
1. Print the command alone, on a single line, without comments.
2. Keep file names, paths, patterns, numbers and variables as the request writes them.
3. Search for files with find and quote the patterns.
4. Use pipes to join commands.
5. If the request names no directory, use the current directory."""
_SHORTER = {
    2 / 3: """\
Translate each request into one bash command for Linux.
Rules:
1. Print the command alone, on a single line.
2. Keep file names, paths and numbers as the request writes them.
3. Search for files with find and quote the patterns.""",
    1 / 3: """\
Translate each request into one bash command.
Keep file names, paths and numbers. Quote patterns.""",
}
# As long as PROMPT and of its form, about something else.
_OTHER = """\
Answer each visitor of the town library in one short sentence.
Rules:
1. Give the answer alone, in a friendly tone, without a greeting.
2. Keep titles, names, dates and shelf marks as the visitor writes them.
3. Search for books in the catalogue and name the floor.
4. Use the loan rules to give dates.
5. If the visitor names no branch, speak of the main branch."""
_TAIL: dict[str, Any] = {"tail": "gist", "num_gist_tokens": 8}


@dataclass(frozen=True)
class Way:
    """A model, and how it is asked.

    Args:
        training: arguments of ``internalize``; None for the model as it is before any training. Ways with the same
            training share one model.
        condition: the condition of the requests; None for the one that the training was for.
        prompt: a prompt to read in place of ``PROMPT``, without examples.
    """

    training: dict[str, Any] | None
    condition: str | None = None
    prompt: str | None = None


STAGED, FULL = "in stages", "full prompt"
#: Every way, with what comes of it. Those without training need no steps.
RUNS: dict[str, Way] = {
    STAGED: Way({}),
    "in stages, gist at the end": Way(_TAIL),
    "in stages, gist of another prompt": Way(_TAIL, prompt=_OTHER),
    "bare query": Way({"control": "bare"}),
    FULL: Way({"control": "full"}),
    "full prompt, run bare": Way({"control": "full"}, "no-prompt"),
    "shortened prompt": Way({"control": "shortened", "control_share": 1 / 3}),
    "not trained, full prompt": Way(None, "prompt"),
    "not trained, bare query": Way(None, "no-prompt"),
}

FROM_SCRATCH = "from nothing"  # the name in committed rows
VOCABULARY = 2000
MAX_EXAMPLES = 3
# The most ids of an answer, including its end; there is room for it after the longest prompt.
MAX_ANSWER = 48
POSITIONS = 512
# On a CPU fewer, so that two processes fit in 24 GiB.
ANSWERS_AT_ONCE = 320 if torch.cuda.is_available() else 64
HELD_OUT_SHARE = 0.05
# Examples have the format of the query, so that an answer follows the query as it follows theirs.
_FORMAT = PromptFormat(example="{input}\n{output}", separator="\n\n", gap="\n\n")
_WORD = re.compile(r"\w+")
_RUN_ON = {"no-prompt": "the bare query", "prompt": "its prompt", "gist": "k gist tokens"}


@dataclass(frozen=True)
class Nl2BashRow:
    """One way to train and to ask.

    ``num_records`` are trained on and ``num_eval_records`` answered; ``num_dropped`` more did not fit with the
    prompt, even without examples. ``tokens`` is the mean number of tokens of an evaluation request to the
    finished model, ``cached_tokens`` how many of them a cache can hold: the prompt without its examples, or the gist.
    ``query_tokens`` and ``answer_tokens`` are means over the same requests, of bare queries and references. BLEU is
    computed over all held-out answers together, in 0..100, and exact match is in 0..1, both under ``condition`` with
    95 % intervals. ``training_tokens`` were trained on, at ``prices`` if there are any. For each stage, ``stages`` has
    the share asked for and the realised share, examples, tokens of a training request, BLEU of the bare query
    (``bare``) and of the stage's own prompt (``as_read``), and seconds, including the answers. A way without training
    has no steps and no stages.
    """

    run: str
    seed: int
    model: str
    template: str
    weights: str
    dtype: str
    vocabulary: int
    num_parameters: int
    num_steps: int
    batch_size: int
    learning_rate: float
    prompt_tokens: int
    max_length: int
    max_answer: int
    max_examples: int
    num_records: int
    num_eval_records: int
    num_dropped: int
    condition: str
    tokens: float
    cached_tokens: float
    query_tokens: float
    answer_tokens: float
    bleu: Interval
    exact_match: Interval
    training_tokens: float
    prices: dict[str, Any] | None
    stages: list[dict[str, Any]]
    seconds: float


def read_pairs(queries: str | Path, commands: str | Path) -> list[tuple[str, str]]:
    """Read requests and their commands from two files whose lines belong together.

    Args:
        queries: a request on each line, UTF-8.
        commands: a command on each line.

    Returns:
        The pairs in which neither side is empty, without white space at the ends.

    Raises:
        GistError: the files have different numbers of lines, or there is no pair.
        OSError: a file cannot be read.
    """
    # Split at newlines alone: a command may contain other characters that str.splitlines takes for line ends.
    texts = (Path(path).read_text(encoding="utf-8") for path in (queries, commands))
    asked, answers = (text.removesuffix("\n").split("\n") for text in texts)
    if len(asked) != len(answers):
        raise GistError(
            f"commands must have as many lines as queries, got {len(answers)} lines in {commands} and {len(asked)} in "
            f"{queries}; use the two files of one release"
        )
    pairs = [(query.strip(), command.strip()) for query, command in zip(asked, answers, strict=True)]
    found = [pair for pair in pairs if all(pair)]
    if not found:
        raise GistError(f"{queries} and {commands} contain no request with a command")
    return found


def split_pairs(
    pairs: Sequence[tuple[str, str]], held_out_share: float = HELD_OUT_SHARE
) -> tuple[list[Record], list[Record]]:
    """Split pairs into training and held-out records, in the same way for any order of the pairs.

    Requests are compared without case, punctuation and white space. Of several pairs with one request, the pair whose
    command sorts first is kept. The SHA-256 of a request decides its split and its place in the split, so the first
    records of a split are a fair sample.

    Args:
        pairs: requests with their commands.
        held_out_share: the approximate share of requests to hold out, from 0 to 1.

    Returns:
        Training and held-out records, with the request as input.

    Raises:
        GistError: the share is out of range.
    """
    if not 0 <= held_out_share <= 1:
        raise GistError(f"held_out_share must be from 0 to 1, got {held_out_share}")
    least: dict[str, tuple[str, str]] = {}
    for query, command in pairs:
        digest = hashlib.sha256(_normalised(query).encode()).hexdigest()
        found = (command, query)
        least[digest] = min(found, least.get(digest, found))
    records = {digest: Record("", query, command) for digest, (command, query) in sorted(least.items())}
    is_held_out = {digest: int(digest[:8], 16) < held_out_share * 16**8 for digest in records}
    training, held_out = (
        [records[digest] for digest in records if is_held_out[digest] is side] for side in (False, True)
    )
    return training, held_out


def command_tokenizer(records: Sequence[Record], vocabulary: int = VOCABULARY) -> GistTokenizer:
    """Train a byte-level BPE on requests, commands and the prompt, which can encode any text.

    Args:
        records: records of the training split only.
        vocabulary: maximum number of ids, including special tokens and the 256 bytes.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(
        (text for record in (Record("", PROMPT, PROMPT), *records) for text in (record.input, record.output)),
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    return GistTokenizer(tokenizer, "plain")


@dataclass(frozen=True)
class Task:
    """The model before any training, and what it is trained on and asked.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        name: what rows call the model.
        training: records to train on, from which examples are chosen.
        held_out: records to answer.
        num_dropped: records of both splits that do not fit.
        max_length: maximum ids of a request with its answer.
    """

    model: Any
    tokenizer: GistTokenizer
    name: str
    training: list[Record]
    held_out: list[Record]
    num_dropped: int
    max_length: int

    @classmethod
    def make(
        cls,
        pairs: Sequence[tuple[str, str]],
        *,
        model: str | Path | None = None,
        template: str | None = None,
        dtype: str = "float32",
        seed: int = 0,
        num_train_records: int | None = None,
        num_records: int = 300,
    ) -> Task:
        """Load or make the model, and take the records of both splits that fit.

        Args:
            pairs: requests with their commands.
            model: a checkpoint to start from; None for random weights and a tokenizer trained on the training split.
            template: the template of the checkpoint's requests; None for its own.
            dtype: of the weights.
            seed: seed of random weights; the splits do not depend on it.
            num_train_records: number of records to train on, less those that do not fit; None for all.
            num_records: number of held-out requests, likewise.

        Raises:
            GistError: a split has no record, or the checkpoint cannot be loaded.
        """
        splits = split_pairs(pairs)
        weights = read_dtype(dtype)
        set_seed(seed)
        if model is None:
            tokenizer = command_tokenizer(splits[0])
            base: Any = task_model(tokenizer, max_position_embeddings=POSITIONS)
            base.to(weights)
        else:
            base, tokenizer = load(model, template, dtype=weights)
        max_length = min(int(base.config.max_position_embeddings), POSITIONS) - MAX_ANSWER
        taken = splits[0][:num_train_records], splits[1][:num_records]
        training, held_out = (_fitting(tokenizer, split, max_length) for split in taken)
        if not training or not held_out:
            raise GistError(
                f"pairs must leave records to train on and records to answer, got {len(training)} and {len(held_out)} "
                f"from {len(pairs)} pairs that fit in {max_length} ids with the prompt; pass more pairs"
            )
        num_dropped = sum(map(len, taken)) - len(training) - len(held_out)
        name = FROM_SCRATCH if model is None else Path(model).name
        return cls(base, tokenizer, name, training, held_out, num_dropped, max_length)

    @cached_property
    def pool(self) -> ExamplePool:
        """The examples: commands are short, and give away as much as long answers."""
        return ExamplePool(self.training, min_answer_words=1)

    @cached_property
    def full(self) -> Requests:
        """The held-out requests with the whole prompt and its examples, which are chosen by the request alone."""
        unanswered = [replace(record, output="") for record in self.held_out]
        return make_requests(
            self.tokenizer,
            self.held_out,
            PROMPT,
            self.pool.retrieve_many(unanswered, MAX_EXAMPLES),
            _FORMAT,
            max_length=self.max_length,
            max_target_length=MAX_ANSWER,
        )

    @cached_property
    def num_cached(self) -> int:
        """The number of ids of the full prompt that a prefix cache holds."""
        asked = self.full.records
        sources = plain_sources(self.tokenizer, [one.instruction for one in asked], [one.input for one in asked])
        return shared_prefix(self.tokenizer, PROMPT, sources)

    def answers(self, model: Any, records: Sequence[Record], condition: str, num_gist_tokens: int = 1) -> list[str]:
        """Let ``model`` answer records under a condition."""
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        (found,) = evaluate(
            model,
            self.tokenizer,
            records,
            num_gist_tokens,
            conditions=[condition],
            max_new_tokens=MAX_ANSWER,
            batch_size=ANSWERS_AT_ONCE,
            with_rouge=False,
        )
        return found.predictions


def measure(
    task: Task,
    directory: str | Path,
    *,
    seed: int = 0,
    weights: str = "full",
    steps: int = 480,
    batch_size: int = 16,
    per_device_batch_size: int | None = None,
    learning_rate: float = 3e-3,
    gradient_checkpointing: bool = False,
    resume: bool = False,
    runs: Sequence[str] = tuple(RUNS),
    prices: Prices | None = None,
    progress: Callable[[str], Any] | None = None,
    on_row: Callable[[Nl2BashRow], Any] | None = None,
) -> list[Nl2BashRow]:
    """Train a copy of the same model in each way, and let each answer the same held-out requests.

    Args:
        task: the model and the records; the model itself is not changed.
        directory: for a folder per training; folders of the same name are replaced, or continued with ``resume``.
        seed: seed of the order of the data, and of LoRA's weights.
        weights: what is trained: ``"full"`` or ``"lora"``.
        steps: optimiser steps of each way, over all its stages.
        batch_size: requests of a step.
        per_device_batch_size: requests of a forward pass; None for all of a step.
        learning_rate: the peak, in each stage.
        gradient_checkpointing: whether to compute activations again in the backward pass, which saves memory.
        resume: whether to go on with trainings that were stopped, from the last finished stage of each.
        runs: names of ``RUNS``.
        prices: prices of tokens, for the table of costs.
        progress: called with a description of each run before it starts.
        on_row: called with each way's row as soon as it is known.

    Returns:
        A row for each way.

    Raises:
        GistError: a way is unknown, or a package of the ``internalize`` or ``eval`` extra is missing.
    """
    unknown = [name for name in runs if name not in RUNS]
    if unknown or not runs:
        raise GistError(f"runs must be names of {', '.join(RUNS)}, got {unknown[0] if unknown else 'none'!r}")
    tell = progress or (lambda what: None)
    tokenizer, base = task.tokenizer, task.model
    common: dict[str, Any] = {
        "seed": seed,
        "model": task.name,
        "template": tokenizer.template.name,
        "weights": weights,
        "dtype": str(input_weight(base).dtype).removeprefix("torch."),
        "vocabulary": len(tokenizer.tokenizer),
        "num_parameters": base.num_parameters(),
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "prompt_tokens": len(tokenizer.encode_texts([PROMPT])[0]),
        "max_length": task.max_length,
        "max_answer": MAX_ANSWER,
        "max_examples": MAX_EXAMPLES,
        "num_records": len(task.training),
        "num_eval_records": len(task.held_out),
        "num_dropped": task.num_dropped,
        "prices": None if prices is None else asdict(prices),
    }
    rows = []
    trained: dict[str, tuple[Any, Internalized, Path]] = {}  # by the arguments of the training
    for place, name in enumerate(tracked(runs, "training")):
        way = RUNS[name]
        if way.training is None:
            tell(name)
            rows.append(_untrained(task, name, way, common))
        else:
            if repr(way.training) not in trained:
                tell(f"{name}: {steps} steps")
                folder = Path(directory) / name
                is_resumed = resume and (folder / SETTINGS_NAME).exists()
                if not is_resumed:
                    shutil.rmtree(folder, ignore_errors=True)
                model = copy.deepcopy(base)
                result = internalize(
                    model,
                    tokenizer,
                    PROMPT,
                    task.training,
                    published_arguments(
                        folder,
                        batch_size=batch_size,
                        per_device_batch_size=per_device_batch_size or batch_size,
                        per_device_eval_batch_size=ANSWERS_AT_ONCE,
                        max_steps=steps,
                        learning_rate=learning_rate,
                        lr_scheduler_type="cosine",
                        warmup_steps=min(20, steps // 10),
                        weight_decay=0.05,
                        adam_beta2=0.98,
                        dataloader_num_workers=0,
                        save_strategy="no",
                        logging_steps=50,
                        disable_tqdm=True,
                        seed=seed,
                        **activation_checkpointing(gradient_checkpointing),
                        **({"bf16": True} if common["dtype"] == "bfloat16" else {}),
                    ),
                    schedule=Schedule.linear(4),
                    shortener=Rewrites(_SHORTER),
                    weights=weights,
                    max_examples=MAX_EXAMPLES,
                    pool=task.pool,
                    prompt_format=_FORMAT,
                    eval_records=task.held_out,
                    metrics={"bleu": bleu, "exact_match": exact_match},
                    max_new_tokens=MAX_ANSWER,
                    max_length=task.max_length,
                    resume=is_resumed,
                    **way.training,
                )
                trained[repr(way.training)] = model, result, folder
                del model
            rows.append(_trained(task, name, way, trained[repr(way.training)], {**common, "num_steps": steps}))
            if all(RUNS[other].training != way.training for other in runs[place + 1 :]):
                del trained[repr(way.training)]  # a copy of the model, on its device
        if on_row is not None:
            on_row(rows[-1])
    return rows


def _untrained(task: Task, name: str, way: Way, common: Mapping[str, Any]) -> Nl2BashRow:
    start, full = time.perf_counter(), task.full
    condition = way.condition or "prompt"
    answers = task.answers(task.model, full.records, condition)
    references = [record.output for record in full.records]
    is_full = condition == "prompt"
    query_tokens = _mean(full.query_tokens)
    return Nl2BashRow(
        run=name,
        num_steps=0,
        condition=condition,
        tokens=query_tokens + (_mean(full.prompt_tokens) if is_full else 0.0),
        cached_tokens=float(task.num_cached) if is_full else 0.0,
        query_tokens=query_tokens,
        answer_tokens=_answer_tokens(task),
        bleu=bleu_interval(answers, references),
        exact_match=bootstrap([exact_matches(answers, references)]),
        training_tokens=0.0,
        stages=[],
        seconds=round(time.perf_counter() - start, 1),
        **common,
    )


def _trained(
    task: Task, name: str, way: Way, found: tuple[Any, Internalized, Path], common: Mapping[str, Any]
) -> Nl2BashRow:
    model, result, folder = found
    run, last = FinishedRun(folder, result), result.stages[-1]
    condition = way.condition or result.condition
    k = last.num_gist_tokens or 1
    if way.prompt is None:
        answers, references = read_answers(folder / f"stage-{last.number}", condition)
    else:
        asked = [replace(record, instruction=way.prompt) for record in task.held_out]
        answers, references = task.answers(model, asked, condition, k), [record.output for record in asked]
    asked = run.records(last.number, EVAL_NAME)
    cached = {"gist": k, "no-prompt": 0, "prompt": task.num_cached if last.share == 1 else 0}[condition]
    return Nl2BashRow(
        run=name,
        condition=condition,
        tokens=run.tokens(asked, condition, last),
        cached_tokens=float(cached),
        query_tokens=run.tokens(asked, "no-prompt", last),
        answer_tokens=_answer_tokens(task),
        bleu=bleu_interval(answers, references),
        exact_match=bootstrap([exact_matches(answers, references)]),
        training_tokens=run.training_tokens(),
        stages=[
            {
                "share": stage.share,
                "realised_share": stage.realised_share,
                "mean_examples": stage.mean_examples,
                "tokens": stage.tokens,
                "bare": stage.metrics["no-prompt"]["bleu"],
                "as_read": stage.metrics[stage.condition]["bleu"],
                "seconds": round(stage.seconds, 1),
            }
            for stage in result.stages
        ],
        seconds=round(result.seconds, 1),
        **common,
    )


def _answer_tokens(task: Task) -> float:
    inputs = [record.input for record in task.held_out]
    return _mean([*map(len, task.tokenizer.encode_completions(inputs, [one.output for one in task.held_out]))])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def requests(task: Task, *, repeats: int = 30, warmup: int = 3) -> list[dict[str, Any]]:
    """Time requests, one and eight at once, with answers as long as the mean reference, to the model as it is.

    A model that was trained whole, or whose LoRA is merged, takes as long.

    Args:
        task: the model and the held-out requests.
        repeats: measured rounds.
        warmup: unmeasured rounds before them.

    Raises:
        GistError: ``repeats`` is out of range, or a prefix cache does not give the logits of the full prompt.
    """
    task.model.to("cuda" if torch.cuda.is_available() else "cpu")
    about = {"model": task.name, "dtype": str(input_weight(task.model).dtype).removeprefix("torch.")}
    length = round(_answer_tokens(task))
    return [
        {**asdict(row), **about}
        for size in (1, 8)
        for row in serving(
            task.model,
            task.tokenizer,
            task.full.records,
            PROMPT,
            batch_size=size,
            num_answer_tokens=length,
            repeats=repeats,
            warmup=warmup,
        )
    ]


def bleu_interval(predictions: Sequence[str], references: Sequence[str]) -> Interval:
    """Compute :func:`gisting.eval.metrics.bleu` with its 95 % interval over resampled records.

    Raises:
        GistError: as ``bleu`` raises it.
    """
    bleu(predictions, references)  # raises where nothing can be scored
    from sacrebleu import corpus_bleu
    from sacrebleu.metrics.bleu import BLEU

    found = [corpus_bleu([a], [[b]]) for a, b in zip(predictions, references, strict=True)]
    # For each record: matching n-grams for n = 1 to 4, n-grams of the answer, and both lengths.
    columns = [*zip(*([*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found), strict=True)]

    def of_counts(means: Tensor) -> Tensor:
        sums = (means * len(found)).round().long().T.tolist()
        return torch.tensor(
            # Smoothed as corpus_bleu does it by default.
            [BLEU.compute_bleu(one[:4], one[4:8], one[8], one[9], "exp").score for one in sums],
            dtype=torch.float64,
        )

    return bootstrap(columns, of_counts)


def nl2bash_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as Markdown: every way with tokens and scores, then the stages of the first way.

    Rows of another model, other data or another device have a table of their own.
    """
    return "\n\n".join(map(_table, _groups(rows)))


def _groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of ways that can be compared: of one model, the same requests and one device."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if "run" in row:
            columns = ("model", "num_records", "num_eval_records", "device")
            groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return list(groups.values())


def _table(rows: list[dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    full = _full_tokens(rows)
    lines = []
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = {row["seed"]: row for row in rows if row["run"] == name}
        first = next(iter(mine.values()))
        lines.append(
            [
                name,
                _RUN_ON[first["condition"]],
                f"{first['tokens']:.1f}",
                _saved(first["tokens"], full),
                str(first["num_eval_records"]),
                *(interval_cell(mine[seed]["bleu"] if seed in mine else None, scale=1) for seed in seeds),
                *(interval_cell(mine[seed]["exact_match"] if seed in mine else None) for seed in seeds),
                f"{max(row['seconds'] for row in mine.values()) / 60:.1f}",
            ]
        )
    scores = (f"{what}, seed {seed}" for what in ("BLEU", "exact match") for seed in seeds)
    text = markdown_table(("trained", "run on", "tokens of a request", "saved", "answers", *scores, "minutes"), lines)
    if staged := [row for row in rows if row["run"] == STAGED]:
        stages = staged[0]["stages"]
        kept = [
            ["prompt kept", *(f"{100 * stage['realised_share']:.0f} %" for stage in stages)],
            ["examples, mean", *(f"{stage['mean_examples']:.2f}" for stage in stages)],
            ["tokens of a training request", *(f"{stage['tokens']:.1f}" for stage in stages)],
            ["saved", *(_saved(stage["tokens"], stages[0]["tokens"]) for stage in stages)],
        ]
        for row in staged:
            for what, name in (("the stage's prompt", "as_read"), ("the bare query", "bare")):
                kept.append([f"BLEU of {what}, seed {row['seed']}", *(f"{stage[name]:.1f}" for stage in row["stages"])])
        text += ["", *markdown_table((STAGED, *(f"stage {n}" for n in range(1, len(stages) + 1))), kept)]
    first = next((row for row in rows if row["num_steps"]), rows[0])
    began = "random weights" if first["model"] == FROM_SCRATCH else first["model"]
    trained, use = began, "take examples from"
    if first["num_steps"]:
        use = "train on"
        trained = f"Each way: {first['num_steps']:,} steps of {first['batch_size']} requests from {began}, " + (
            "LoRA" if first["weights"] == "lora" else "all weights trained"
        )
    text += [
        "",
        f"BLEU (0 to 100, sacrebleu) and exact match (per cent) with 95 % intervals on {first['num_eval_records']} "
        f"held-out requests; {first['num_records']:,} records to {use}; "
        f"{first['num_dropped']} more were left out, because they do not fit in {first['max_length']} tokens with the "
        f"prompt ({first['prompt_tokens']}) or have an answer of more than {first['max_answer']}. "
        f"{trained}, {first['dtype']}, template "
        f"{first['template']}, "
        f"{first['num_parameters'] / 1e6:.2f} million parameters, {first['vocabulary']:,} tokens in the vocabulary "
        f"({where(first)}).",
    ]
    return "\n".join(text)


def nl2bash_costs_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format what requests and trainings cost as Markdown, for the first seed of each model with prices.

    Rows that cannot be compared, as in :func:`nl2bash_table`, have a table of their own, at the same prices.
    """
    tables = []
    for group in _groups(rows):
        priced = (row["prices"] for row in rows if row.get("prices") and row["model"] == group[0]["model"])
        if (prices := next(priced, None)) is not None:
            tables.append(_costs(group, Prices(**prices)))
    return "\n\n".join(tables)


def _costs(rows: list[dict[str, Any]], prices: Prices) -> str:
    seed = min(row["seed"] for row in rows)
    # A swapped gist is a control of the answers; its requests cost what those with the right gist do.
    rows = [row for row in rows if row["seed"] == seed and RUNS[row["run"]].prompt is None]
    lines: list[tuple[str, dict[str, Any], float]] = [
        (row["run"], row, row["cached_tokens"] if row["condition"] == "gist" else 0.0) for row in rows
    ]
    untrained = next((row for row in rows if not row["num_steps"] and row["condition"] == "prompt"), None)
    rivals: list[float] = []
    if untrained is not None:
        lines.append((f"{untrained['run']}, prefix cache", untrained, untrained["cached_tokens"]))
        rivals = [_request(prices, untrained, cached) for cached in (0.0, untrained["cached_tokens"])]
    cells = []
    for name, row, cached in lines:
        cost = _request(prices, row, cached)
        training = prices.training(row["training_tokens"]) if row["num_steps"] else None
        cells.append(
            [
                name,
                f"{row['tokens']:.1f}",
                f"{cached:.0f}" if cached else "-",
                f"{1000 * cost:.3f}",
                "-" if not rivals else f"{100 * (1 - cost / rivals[0]):.0f} %",
                "-" if training is None else f"{training:.2f}",
                *(_pays_after(training, rival - cost) for rival in (rivals or [math.nan] * 2)),
            ]
        )
    money = prices.currency
    columns = ("tokens", "cached", f"{money} for 1,000 requests", "cheaper", f"training, {money}")
    text = markdown_table(("trained", *columns, "pays after", "pays after (prefix cache)"), cells)
    factor = prices.finetuned_factor
    text += [
        "",
        f"Prices of a million tokens, {money}: {prices.input_per_million:g} input, {prices.cached_input_per_million:g} "
        f"cached input, {prices.output_per_million:g} output"
        + ("" if prices.training_per_million is None else f", {prices.training_per_million:g} training")
        + f"; tokens of a trained model cost {factor:g} times as much. An answer is counted with the "
        f"{rows[0]['answer_tokens']:.1f} tokens of the mean reference. "
        + (_PAYS_AFTER if rivals and any(row["num_steps"] for row in rows) else "")
        + f"{rows[0]['num_eval_records']} held-out requests, {rows[0]['num_records']:,} records ({where(rows[0])}).",
    ]
    return "\n".join(text)


_PAYS_AFTER = (
    '"pays after" is the number of requests after which training and requests have cost less than the full prompt to '
    "the model that is not trained. "
)


def _request(prices: Prices, row: Mapping[str, Any], cached: float) -> float:
    return prices.request(row["tokens"], cached, row["answer_tokens"], is_finetuned=bool(row["num_steps"]))


def _pays_after(training: float | None, saved: float) -> str:
    if training is None or math.isnan(saved):
        return "-"
    return f"{math.ceil(training / saved):,}" if saved > 0 else "never"


def nl2bash_requests_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of timed requests as Markdown, a table for each device."""
    rows = [row for row in rows if "mode" in row]
    devices = dict.fromkeys((row["device"], row["dtype"]) for row in rows)
    return "\n\n".join(serving_table([row for row in rows if (row["device"], row["dtype"]) == one]) for one in devices)


def _full_tokens(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The tokens of a request with the whole prompt; None if no row has it."""
    for row in rows:
        if row["run"] in (FULL, "not trained, full prompt"):
            return row["tokens"]
    return next((row["stages"][0]["tokens"] for row in rows if row["stages"] and row["stages"][0]["share"] == 1), None)


def _normalised(query: str) -> str:
    """The words of a request, or its text without white space where there is only punctuation."""
    folded = unicodedata.normalize("NFKC", query).casefold()
    return " ".join(_WORD.findall(folded) or folded.split())


def _fitting(tokenizer: GistTokenizer, records: Sequence[Record], max_length: int) -> list[Record]:
    """The records that fit with the whole prompt, without examples, and whose answers are not too long."""
    queries = [record.input for record in records]
    sources = plain_sources(tokenizer, [PROMPT] * len(queries), queries)
    answers = tokenizer.encode_completions(queries, [record.output for record in records])
    return [
        record
        for record, source, answer in zip(records, sources, answers, strict=True)
        if len(answer) <= MAX_ANSWER and len(source) + len(answer) <= max_length
    ]


def _saved(tokens: float, full: float | None) -> str:
    return "-" if full is None else f"{100 * (1 - tokens / full):.0f} %"


def main(
    queries: Annotated[Path, typer.Option(help="File with a request on each line.")],
    commands: Annotated[Path, typer.Option(help="File with the command of each line.")],
    model: Annotated[Path | None, typer.Option(help="Checkpoint to start from; by default random weights.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Template of the checkpoint's requests; by default its own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32 or bfloat16.")] = "float32",
    weights: Annotated[str, typer.Option(help="What is trained: full or lora.")] = "full",
    output: OutputOption = None,
    checkpoints: CheckpointsOption = Path("runs/nl2bash"),
    runs: Annotated[
        str | None, typer.Option(help=f"Ways to train, separated by semicolons: {'; '.join(RUNS)}.")
    ] = None,
    part: Annotated[str, typer.Option(help="What to measure: both, training or requests.")] = "both",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each way.")] = 480,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of a step.")] = 16,
    per_device_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Requests of a forward pass; by default all of a step.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Save memory: compute activations again when needed.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with trainings that were stopped, stage by stage.")
    ] = False,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate in each stage.")] = 3e-3,
    train_records: Annotated[int | None, typer.Option(min=1, help="Records to train on; by default all.")] = None,
    records: Annotated[int, typer.Option(min=1, help="Held-out requests.")] = 300,
    prices: Annotated[Path | None, typer.Option(help="Price table, for the costs of requests and training.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds of requests.")] = 30,
    seed: SeedOption = 0,
) -> None:
    """Internalisation on NL2Bash next to its controls, and requests served.

    Example: python -m benchmarks nl2bash --queries nl2bash.nl --commands nl2bash.cm --output docs/results/nl2bash.jsonl
    """
    if part not in ("both", "training", "requests"):
        raise typer.BadParameter(f"--part must be both, training or requests, got {part!r}")
    chosen = names("--runs", runs, tuple(RUNS))
    table = None if prices is None else load_prices(prices)
    rows = Rows(f"nl2bash --queries {queries.name} --commands {commands.name}", output)
    task = Task.make(
        read_pairs(queries, commands),
        model=model,
        template=template,
        dtype=dtype,
        seed=seed,
        num_train_records=train_records,
        num_records=records,
    )
    if part != "requests":
        measure(
            task,
            checkpoints / task.name / str(seed),
            seed=seed,
            weights=weights,
            steps=steps,
            batch_size=batch_size,
            per_device_batch_size=per_device_batch_size,
            gradient_checkpointing=gradient_checkpointing,
            resume=resume,
            learning_rate=learning_rate,
            runs=chosen,
            prices=table,
            progress=lambda what: say(f"seed {seed}, {what}"),
            on_row=lambda row: rows.add([row]),
        )
    if part != "training":
        say("requests")
        rows.add(requests(task, repeats=repeats))
    tables = {
        "training": (nl2bash_table, *((nl2bash_costs_table,) if table else ())),
        "requests": (nl2bash_requests_table,),
    }
    tables["both"] = tables["training"] + tables["requests"]
    rows.show(*tables[part])
