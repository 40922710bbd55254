"""Internalise a prompt on real data, English requests to bash commands, next to every control.

The data are NL2Bash (arXiv 1802.08979): two files of aligned lines, requests and commands, which are not part of the
project (their licence is the GPL). A hash of a request's words decides whether it belongs to the held-out split, so the
split is the same for every order, seed and model, and no held-out request is in training, whatever its case,
punctuation and white space. A command may be in both splits, exactly or nearly, for requests in other words, as in the
published split: scores are for requests in new words, not for new commands.

Every way to train starts from the same weights and takes the same number of steps: a small LLaMA with random weights
and a tokenizer trained on the training split, or a checkpoint. It is too small to be good at this; its scores are
reported unchanged, stage by stage, together with the cost of a request.
"""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import set_seed

from benchmarks.cells import interval_cell
from benchmarks.command import CheckpointsOption, OutputOption, Rows, SeedOption, names, say, where
from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.demo import ANSWERS_AT_ONCE, task_model
from gisting.errors import GistError
from gisting.eval.metrics import bleu, exact_match
from gisting.eval.statistics import Interval, bootstrap
from gisting.internalize.directory import read_answers
from gisting.internalize.examples import ExamplePool
from gisting.internalize.requests import PromptFormat
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import Rewrites
from gisting.internalize.stages import internalize
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.models.load import load
from gisting.tokens import GistTokenizer
from gisting.train.finetune import published_arguments

__all__ = [
    "PROMPT",
    "RUNS",
    "Nl2BashRow",
    "bleu_interval",
    "command_tokenizer",
    "main",
    "measure",
    "nl2bash_table",
    "read_pairs",
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
#: Every way to train, with its arguments of ``internalize``.
RUNS: dict[str, dict[str, Any]] = {
    "in stages": {},
    "bare query": {"control": "bare"},
    "full prompt": {"control": "full"},
    "full prompt, run bare": {"control": "full-run-bare"},
    "shortened prompt": {"control": "shortened", "control_share": 1 / 3},
}

FROM_SCRATCH = "from nothing"  # the name in committed rows
VOCABULARY = 2000
MAX_EXAMPLES = 3
# The most ids of an answer, including its end; there is room for it after the longest prompt.
MAX_ANSWER = 96
POSITIONS = 512
HELD_OUT_SHARE = 0.05
# Examples have the format of the query, so that an answer follows the query as it follows theirs.
_FORMAT = PromptFormat(example="{input}\n{output}", separator="\n\n", gap="\n\n")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Nl2BashRow:
    """One way to train.

    ``num_records`` are trained on and ``num_eval_records`` answered; ``num_dropped`` records of both splits did not fit
    with the prompt, even without examples. ``tokens`` is the mean number of tokens of a request to the finished
    model, over the training records. BLEU is computed over all held-out answers together, in 0..100, and exact match is
    in 0..1, both under ``condition``, BLEU with a 95 % interval. For each stage, ``stages`` has the share asked for and
    the realised share, examples, tokens of a request, BLEU of the bare query (``bare``) and of the stage's own prompt
    (``as_read``), and seconds, including the answers.
    """

    run: str
    seed: int
    model: str
    vocabulary: int
    num_parameters: int
    num_steps: int
    batch_size: int
    learning_rate: float
    template_tokens: int
    max_length: int
    max_examples: int
    num_records: int
    num_eval_records: int
    num_dropped: int
    condition: str
    tokens: float
    query_tokens: float
    bleu: Interval
    exact_match: float
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


def measure(
    pairs: Sequence[tuple[str, str]],
    directory: str | Path,
    *,
    model: str | Path | None = None,
    seed: int = 0,
    steps: int = 480,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    num_records: int = 300,
    runs: Sequence[str] = tuple(RUNS),
    progress: Callable[[str], Any] | None = None,
    on_row: Callable[[Nl2BashRow], Any] | None = None,
) -> list[Nl2BashRow]:
    """Train a copy of the same model in each way, and let each answer the same held-out requests.

    Args:
        pairs: requests with their commands.
        directory: for a folder per way; folders of the same name are replaced.
        model: a checkpoint to start from; None for random weights and a tokenizer trained on the training split.
        seed: seed of the weights and of the order of the data; the splits do not depend on it.
        steps: optimiser steps of each way, over all its stages.
        batch_size: requests of a step.
        learning_rate: the peak, in each stage.
        num_records: maximum number of held-out requests.
        runs: names of ``RUNS``.
        progress: called with a description of each run before it starts.
        on_row: called with each way's row as soon as it is known.

    Returns:
        A row for each way.

    Raises:
        GistError: a way is unknown, a split has no record, or a package of the ``internalize`` or ``eval`` extra is
            missing.
    """
    unknown = [name for name in runs if name not in RUNS]
    if unknown or not runs:
        raise GistError(f"runs must be names of {', '.join(RUNS)}, got {unknown[0] if unknown else 'none'!r}")
    tell = progress or (lambda what: None)
    splits = split_pairs(pairs)
    set_seed(seed)
    if model is None:
        tokenizer = command_tokenizer(splits[0])
        base = task_model(tokenizer, max_position_embeddings=POSITIONS)
    else:
        base, tokenizer = load(model, "plain")
    positions: int = base.config.max_position_embeddings
    max_length = min(positions, POSITIONS) - MAX_ANSWER
    fitting = [_fitting(tokenizer, split, max_length) for split in splits]
    training, held_out = fitting[0], fitting[1][:num_records]
    if not training or not held_out:
        raise GistError(
            f"pairs must leave records to train on and records to answer, got {len(training)} and {len(held_out)} from "
            f"{len(pairs)} pairs that fit in {max_length} ids with the prompt; pass more pairs"
        )
    pool = ExamplePool(training, min_answer_words=1)
    rows = []
    for name in tracked(runs, "training"):
        tell(f"{name}: {steps} steps")
        folder = Path(directory) / name
        shutil.rmtree(folder, ignore_errors=True)
        result = internalize(
            copy.deepcopy(base),
            tokenizer,
            PROMPT,
            training,
            published_arguments(
                folder,
                batch_size=batch_size,
                per_device_batch_size=batch_size,
                per_device_eval_batch_size=ANSWERS_AT_ONCE,
                max_steps=steps,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(20, steps // 10),
                weight_decay=0.05,
                adam_beta2=0.98,
                save_strategy="no",
                logging_steps=50,
                disable_tqdm=True,
                seed=seed,
            ),
            schedule=Schedule.linear(4),
            shortener=Rewrites(_SHORTER),
            max_examples=MAX_EXAMPLES,
            pool=pool,
            prompt_format=_FORMAT,
            eval_records=held_out,
            metrics={"bleu": bleu, "exact_match": exact_match},
            max_new_tokens=MAX_ANSWER,
            max_length=max_length,
            **RUNS[name],
        )
        answers, references = read_answers(folder / f"stage-{len(result.stages)}", result.condition)
        rows.append(
            Nl2BashRow(
                run=name,
                seed=seed,
                model=FROM_SCRATCH if model is None else Path(model).name,
                vocabulary=len(tokenizer.tokenizer),
                num_parameters=result.num_parameters,
                num_steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                template_tokens=len(tokenizer.encode_texts([PROMPT])[0]),
                max_length=max_length,
                max_examples=MAX_EXAMPLES,
                num_records=len(training),
                num_eval_records=len(held_out),
                num_dropped=sum(map(len, splits)) - sum(map(len, fitting)),
                condition=result.condition,
                tokens=result.tokens,
                query_tokens=result.stages[-1].query_tokens,
                bleu=bleu_interval(answers, references),
                exact_match=exact_match(answers, references),
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
            )
        )
        if on_row is not None:
            on_row(rows[-1])
    return rows


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
            [BLEU.compute_bleu(one[:4], one[4:8], one[8], one[9]).score for one in sums], dtype=torch.float64
        )

    return bootstrap(columns, of_counts)


def nl2bash_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as Markdown, for each model: every way with tokens and scores, then the stages of the first way."""
    models = dict.fromkeys(row["model"] for row in rows)
    return "\n\n".join(_table([row for row in rows if row["model"] == model]) for model in models)


def _table(rows: list[dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    # A request with the whole prompt: the first stage's, or that of the control that keeps it.
    full = next((row["stages"][0]["tokens"] for row in rows if row["stages"][0]["share"] == 1), None)
    lines = []
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = {row["seed"]: row for row in rows if row["run"] == name}
        first = next(iter(mine.values()))
        lines.append(
            [
                name,
                {"no-prompt": "the bare query", "prompt": "its prompt"}[first["condition"]],
                f"{first['tokens']:.1f}",
                _saved(first["tokens"], full),
                *(interval_cell(mine[seed]["bleu"] if seed in mine else None, scale=1) for seed in seeds),
                f"{max(row['seconds'] for row in mine.values()) / 60:.1f}",
            ]
        )
    scores = (f"BLEU, seed {seed}" for seed in seeds)
    text = markdown_table(("trained", "run on", "tokens of a request", "saved", *scores, "minutes"), lines)
    if staged := [row for row in rows if row["run"] == next(iter(RUNS))]:
        stages = staged[0]["stages"]
        kept = [
            ["prompt kept", *(f"{100 * stage['realised_share']:.0f} %" for stage in stages)],
            ["examples, mean", *(f"{stage['mean_examples']:.2f}" for stage in stages)],
            ["tokens of a request", *(f"{stage['tokens']:.1f}" for stage in stages)],
            ["saved", *(_saved(stage["tokens"], full) for stage in stages)],
        ]
        for row in staged:
            for what, name in (("the stage's prompt", "as_read"), ("the bare query", "bare")):
                kept.append([f"BLEU of {what}, seed {row['seed']}", *(f"{stage[name]:.1f}" for stage in row["stages"])])
        text += ["", *markdown_table(("in stages", *(f"stage {n}" for n in range(1, len(stages) + 1))), kept)]
    first = rows[0]
    began = "random weights" if first["model"] == FROM_SCRATCH else first["model"]
    text += [
        "",
        f"BLEU (0 to 100, sacrebleu) with its 95 % interval on {first['num_eval_records']} held-out requests; "
        f"{first['num_records']:,} records to train on; {first['num_dropped']} of both splits were left out, because "
        f"they do not fit in {first['max_length']} tokens with the prompt ({first['template_tokens']}). Each way: "
        f"{first['num_steps']:,} steps of {first['batch_size']} requests from {began}, "
        f"{first['num_parameters'] / 1e6:.2f} million parameters, {first['vocabulary']:,} tokens in the vocabulary "
        f"({where(first)}).",
    ]
    return "\n".join(text)


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
    output: OutputOption = None,
    checkpoints: CheckpointsOption = Path("runs/nl2bash"),
    runs: Annotated[
        str | None, typer.Option(help=f"Ways to train, separated by semicolons: {'; '.join(RUNS)}.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each way.")] = 480,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate in each stage.")] = 3e-3,
    records: Annotated[int, typer.Option(min=1, help="Held-out requests.")] = 300,
    seed: SeedOption = 0,
) -> None:
    """Internalisation on NL2Bash next to its controls.

    Example: python -m benchmarks nl2bash --queries nl2bash.nl --commands nl2bash.cm --output docs/results/nl2bash.jsonl
    """
    rows = Rows(f"nl2bash --queries {queries.name} --commands {commands.name}", output)
    measure(
        read_pairs(queries, commands),
        checkpoints / (FROM_SCRATCH if model is None else model.name) / str(seed),
        model=model,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        num_records=records,
        runs=names("--runs", runs, tuple(RUNS)),
        progress=lambda what: say(f"seed {seed}, {what}"),
        on_row=lambda row: rows.add([row]),
    )
    rows.show(nl2bash_table)
