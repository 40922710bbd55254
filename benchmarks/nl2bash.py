"""Internalisation on real data: English requests to bash commands (NL2Bash, arXiv 1802.08979), beside every control.

The data are two files of aligned lines, requests and commands, which are not part of the project (their licence is the
GPL). A request belongs to the held-out split by a hash of its words, so that the split is the same in every order, for
every seed and model, and no held-out request is in training, whatever its case, punctuation and white space. A command
may be in both, exactly or nearly, under requests in other words, as in the published split: scores are of requests in
new words, not of new commands.

Every way to train starts from the same weights and takes as many steps: a small LLaMA with random weights and a
tokenizer of the training split, or a checkpoint. It is too small to be good at this; what it scores is reported as it
is, stage by stage, beside what a request costs.

    python -m benchmarks.nl2bash --queries nl2bash.nl --commands nl2bash.cm --output docs/results/nl2bash.jsonl
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import set_seed

from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.eval.metrics import bleu, exact_match
from gisting.eval.statistics import Interval, bootstrap
from gisting.internalize.directory import read_answers
from gisting.internalize.examples import ExamplePool
from gisting.internalize.requests import PromptFormat
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import Rewrites
from gisting.internalize.stages import internalize
from gisting.measure.progress import tracked
from gisting.measure.rows import append_row, environment, interval_cell
from gisting.measure.task import ANSWERS_AT_ONCE, task_model
from gisting.models.load import load
from gisting.tokens import GistTokenizer
from gisting.train.finetune import published_arguments

__all__ = [
    "RUNS",
    "TEMPLATE",
    "Nl2BashRow",
    "bleu_interval",
    "command_tokenizer",
    "measure",
    "nl2bash_table",
    "read_pairs",
    "split_pairs",
]

#: What every request would begin with.
TEMPLATE = """\
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
#: Every way to train, with what it asks of ``internalize``.
RUNS: dict[str, dict[str, Any]] = {
    "in stages": {},
    "bare query": {"control": "bare"},
    "full prompt": {"control": "full"},
    "full prompt, run bare": {"control": "full-run-bare"},
    "compressed prompt": {"control": "shortened", "control_share": 1 / 3},
}

FROM_NOTHING = "from nothing"
VOCABULARY = 2000
MAX_EXAMPLES = 3
# Ids of an answer at most, its end among them; behind the longest prompt there is room for it.
MAX_ANSWER = 96
POSITIONS = 512
HELD_OUT_SHARE = 0.05
# Examples look as the query does, so that what follows a query is what followed theirs.
_FORMAT = PromptFormat(example="{input}\n{output}", separator="\n\n", gap="\n\n")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Nl2BashRow:
    """One way to train.

    ``num_records`` is trained on, ``num_eval_records`` are answered; ``num_dropped`` of both splits had no room with
    the template and without examples. ``tokens`` are those of a request to the finished model, a mean over the training
    records; BLEU is of all held-out answers together in 0..100, exact match in 0..1, both under ``condition``, with
    intervals of 95 %. ``stages`` has, for each, share asked for and realised, examples, tokens of a request, BLEU of
    the bare query (``bare``) and of the stage's own prompt (``as_read``), and seconds, answers among them.
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
    """Requests and their commands, from files of which line n of one belongs to line n of the other.

    Args:
        queries: a request on each line, UTF-8.
        commands: a command on each line.

    Returns:
        Pairs without those of which either side is empty, white space at the ends aside.

    Raises:
        GistError: the files have different numbers of lines, or there is no pair.
        OSError: a file cannot be read.
    """
    # Only this ends a line: a command may hold what else str.splitlines takes for an end.
    texts = (Path(path).read_text(encoding="utf-8") for path in (queries, commands))
    asked, answers = (text.removesuffix("\n").split("\n") for text in texts)
    if len(asked) != len(answers):
        raise GistError(
            f"commands must have a line for each of queries, got {len(answers)} lines in {commands} and {len(asked)} "
            f"in {queries}; take the two files of one release"
        )
    pairs = [(query.strip(), command.strip()) for query, command in zip(asked, answers, strict=True)]
    found = [pair for pair in pairs if all(pair)]
    if not found:
        raise GistError(f"{queries} and {commands} hold no request with a command")
    return found


def split_pairs(
    pairs: Sequence[tuple[str, str]], held_out_share: float = HELD_OUT_SHARE
) -> tuple[list[Record], list[Record]]:
    """The training split and the held-out split, the same for any order of the pairs.

    A request is what is left of it without case, punctuation and white space; of several pairs with one request, that
    with the least command in the order of characters stays. The SHA-256 of a request decides its split, and its place
    in it, so that the first records of a split are a fair sample.

    Args:
        pairs: requests with their commands.
        held_out_share: about this share of the requests is held out, from 0 to 1.

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
    """A byte-level BPE of requests, commands and the template, so that there is no text that it cannot write.

    Args:
        records: of the training split only.
        vocabulary: ids at most, special ones and the 256 bytes among them.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(
        (text for record in (Record("", TEMPLATE, TEMPLATE), *records) for text in (record.input, record.output)),
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
    """Train a copy of the same model each way, and have each answer the same held-out requests.

    Args:
        pairs: requests with their commands.
        directory: where a folder for each way is made; what is there of them is replaced.
        model: a checkpoint to begin with; None for random weights and a tokenizer of the training split.
        seed: of the weights and the order of the data; the splits do not depend on it.
        steps: optimiser steps of each way, over all its stages.
        batch_size: requests of a step.
        learning_rate: at its highest, in each stage.
        num_records: held-out requests at most.
        runs: names of ``RUNS``.
        progress: called with what is about to be done.
        on_row: called with each way's row, as soon as there is one.

    Returns:
        A row for each way.

    Raises:
        GistError: there is no such way, a split is left with no record, or a package of the ``internalize`` or ``eval``
            extra is not installed.
    """
    unknown = [name for name in runs if name not in RUNS]
    if unknown or not runs:
        raise GistError(f"runs must be names of {', '.join(RUNS)}, got {unknown[0] if unknown else 'none'!r}")
    say = progress or (lambda what: None)
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
            f"pairs must leave records to train on and to ask, got {len(training)} and {len(held_out)} of "
            f"{len(pairs)} pairs that fit in {max_length} ids with the template; give more"
        )
    pool = ExamplePool(training, min_answer_words=1)
    rows = []
    for name in tracked(runs, "training"):
        say(f"{name}: {steps} steps")
        folder = Path(directory) / name
        shutil.rmtree(folder, ignore_errors=True)
        result = internalize(
            copy.deepcopy(base),
            tokenizer,
            TEMPLATE,
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
                model=FROM_NOTHING if model is None else Path(model).name,
                vocabulary=len(tokenizer.tokenizer),
                num_parameters=result.num_parameters,
                num_steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                template_tokens=len(tokenizer.encode_texts([TEMPLATE])[0]),
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
    """:func:`gisting.eval.metrics.bleu` with its 95 % interval over resampled records.

    Raises:
        GistError: as that one.
    """
    bleu(predictions, references)  # refuses what cannot be scored
    from sacrebleu import corpus_bleu
    from sacrebleu.metrics.bleu import BLEU

    found = [corpus_bleu([a], [[b]]) for a, b in zip(predictions, references, strict=True)]
    # One row for each record: n-grams in common for n = 1 to 4, n-grams of the answer, and both lengths.
    columns = [*zip(*([*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found), strict=True)]

    def of_counts(means: Tensor) -> Tensor:
        sums = (means * len(found)).round().long().T.tolist()
        return torch.tensor(
            [BLEU.compute_bleu(one[:4], one[4:8], one[8], one[9]).score for one in sums], dtype=torch.float64
        )

    return bootstrap(columns, of_counts)


def nl2bash_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown, for each model: every way with its tokens and scores, then the stages of the first way."""
    models = dict.fromkeys(row["model"] for row in rows)
    return "\n\n".join(_table([row for row in rows if row["model"] == model]) for model in models)


def _table(rows: list[dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    # A request before anything is left out: the first stage's, and the control's that keeps it so.
    full = next((row["stages"][0]["tokens"] for row in rows if row["stages"][0]["share"] == 1), None)
    scores = " | ".join(f"BLEU, seed {seed}" for seed in seeds)
    lines = [
        f"| trained | run on | tokens of a request | saved | {scores} | minutes |",
        "|---" * (5 + len(seeds)) + "|",
    ]
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = {row["seed"]: row for row in rows if row["run"] == name}
        first = next(iter(mine.values()))
        cells = (
            name,
            {"no-prompt": "the bare query", "prompt": "its prompt"}[first["condition"]],
            f"{first['tokens']:.1f}",
            _saved(first["tokens"], full),
            *(_cell(mine[seed]["bleu"]) if seed in mine else "-" for seed in seeds),
            f"{max(row['seconds'] for row in mine.values()) / 60:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    staged = [row for row in rows if row["run"] == next(iter(RUNS))]
    if staged:
        stages = staged[0]["stages"]
        lines += [
            "",
            f"| in stages | {' | '.join(f'stage {number}' for number in range(1, len(stages) + 1))} |",
            "|---" * (1 + len(stages)) + "|",
        ]
        kept = [
            ("template kept", [f"{100 * stage['realised_share']:.0f} %" for stage in stages]),
            ("examples, mean", [f"{stage['mean_examples']:.2f}" for stage in stages]),
            ("tokens of a request", [f"{stage['tokens']:.1f}" for stage in stages]),
            ("saved", [_saved(stage["tokens"], full) for stage in stages]),
        ]
        for row in staged:
            for what, name in (("the stage's prompt", "as_read"), ("the bare query", "bare")):
                scores = [f"{stage[name]:.1f}" for stage in row["stages"]]
                kept.append((f"BLEU of {what}, seed {row['seed']}", scores))
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in kept]
    first = rows[0]
    began = "random weights" if first["model"] == FROM_NOTHING else first["model"]
    lines += [
        "",
        f"BLEU (0 to 100, sacrebleu) with its 95 % interval on {first['num_eval_records']} held-out requests; "
        f"{first['num_records']:,} records to train on, {first['num_dropped']} of both splits left out, which do not "
        f"fit in {first['max_length']} tokens with the template ({first['template_tokens']}). Each way: "
        f"{first['num_steps']:,} steps of {first['batch_size']} requests from {began}, "
        f"{first['num_parameters'] / 1e6:.2f} million parameters, {first['vocabulary']:,} tokens in the vocabulary "
        f"({first['device']}, {first['threads']} threads, torch {first['torch']}, transformers "
        f"{first['transformers']}).",
    ]
    return "\n".join(lines)


def _normalised(query: str) -> str:
    """The words of a request; of one of punctuation alone, what stands between its white space."""
    folded = unicodedata.normalize("NFKC", query).casefold()
    return " ".join(_WORD.findall(folded) or folded.split())


def _fitting(tokenizer: GistTokenizer, records: Sequence[Record], max_length: int) -> list[Record]:
    """The records that have room with the whole template and without examples, and whose answers are not too long."""
    queries = [record.input for record in records]
    sources = plain_sources(tokenizer, [TEMPLATE] * len(queries), queries)
    answers = tokenizer.encode_completions(queries, [record.output for record in records])
    return [
        record
        for record, source, answer in zip(records, sources, answers, strict=True)
        if len(answer) <= MAX_ANSWER and len(source) + len(answer) <= max_length
    ]


def _saved(tokens: float, full: float | None) -> str:
    return "-" if full is None else f"{100 * (1 - tokens / full):.0f} %"


def _cell(found: dict[str, float]) -> str:
    # interval_cell is for shares in 0..1.
    return interval_cell({name: value / 100 for name, value in found.items()})


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nl2bash", description="Internalisation on NL2Bash, beside its controls."
    )
    parser.add_argument("--queries", type=Path, required=True, help="file with a request on each line")
    parser.add_argument("--commands", type=Path, required=True, help="file with the command of each line")
    parser.add_argument("--model", type=Path, help="checkpoint to begin with; without one, random weights")
    parser.add_argument("--output", type=Path, help="JSONL file to which the rows are added")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/nl2bash"), help="where models are saved")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], help="ways to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=480, help="training steps of each way")
    parser.add_argument("--batch-size", type=int, default=16, help="requests of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its highest, in each stage")
    parser.add_argument("--records", type=int, default=300, help="held-out requests")
    options = parser.parse_args(arguments)
    console = Console(markup=False, highlight=False)
    pairs = read_pairs(options.queries, options.commands)
    command = f"python -m benchmarks.nl2bash --queries {options.queries.name} --commands {options.commands.name}"
    found: list[dict[str, Any]] = []

    def keep(row: Nl2BashRow) -> None:
        found.append({"command": command, **asdict(row)})
        if options.output is not None:
            append_row(options.output, found[-1])

    measure(
        pairs,
        options.checkpoints / (FROM_NOTHING if options.model is None else options.model.name) / str(options.seed),
        model=options.model,
        seed=options.seed,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        num_records=options.records,
        runs=options.runs,
        progress=lambda what: console.print(f"seed {options.seed}, {what}"),
        on_row=keep,
    )
    console.print(nl2bash_table([{**row, **environment()} for row in found]), soft_wrap=True)


if __name__ == "__main__":
    _main()
