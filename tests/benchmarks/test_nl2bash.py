"""Internalisation on requests and commands: the split, files that differ, the table by eye, the command with a
few steps. All lines are made up here.
"""

from __future__ import annotations

import gc
import random
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import nl2bash
from benchmarks.__main__ import run
from benchmarks.nl2bash import (
    PROMPT,
    RUNS,
    Task,
    bleu_interval,
    command_tokenizer,
    measure,
    nl2bash_costs_table,
    nl2bash_requests_table,
    nl2bash_table,
    read_pairs,
    split_pairs,
)
from gisting import GistError
from gisting.data.records import Record
from gisting.eval.metrics import bleu
from gisting.measure.rows import read_rows

NUMBERS = range(160)
QUERIES = [f"Show the last {number} lines of log{number}.txt" for number in NUMBERS]
COMMANDS = [f"tail -n {number} log{number}.txt" for number in NUMBERS]
# The n for which the SHA-256 of "show the last n lines of logn txt" is in the lowest 5 % of its range.
HELD_OUT = [7, 32, 37, 85, 88, 139, 146]
PAIRS = list(zip(QUERIES, COMMANDS, strict=True))
# Words, case, punctuation and white space from a small set, so that requests often differ in these alone.
REQUESTS = st.lists(
    st.tuples(
        st.from_regex(r"[ab][ .,]{1,2}[aB][ !]?", fullmatch=True), st.from_regex(r"ls( -[alh])?", fullmatch=True)
    ),
    max_size=12,
)


def words(record: Record) -> tuple[str, ...]:
    return tuple(re.findall("[a-z0-9]+", record.input.lower()))


def test_the_split_is_fixed() -> None:
    training, held_out = split_pairs(PAIRS)
    assert sorted(int(record.output.split()[2]) for record in held_out) == HELD_OUT
    assert len(training) + len(held_out) == len(PAIRS)


def test_about_the_share_is_held_out_and_a_larger_one_holds_out_more_of_the_same() -> None:
    pairs = [(f"request {number}", "true") for number in range(2000)]
    some, more = ({record.input for record in split_pairs(pairs, share)[1]} for share in (0.05, 0.2))
    assert 70 < len(some) < 130
    assert 340 < len(more) < 460
    assert some < more
    assert [len(split) for split in split_pairs(pairs, 0.0)] == [2000, 0]
    assert [len(split) for split in split_pairs(pairs, 1.0)] == [0, 2000]


def test_of_one_request_in_two_spellings_the_least_command_stays() -> None:
    pairs = [("List files!", "ls -l"), ("list  FILES", "ls"), ("?!", "b"), ("? !", "a"), ("list file", "ls")]
    found = [record for split in split_pairs(pairs) for record in split]
    assert sorted((record.input, record.output) for record in found) == [
        ("? !", "a"),
        ("?!", "b"),
        ("list  FILES", "ls"),
        ("list file", "ls"),
    ]


@given(REQUESTS, st.randoms(use_true_random=False), st.floats(0, 1))
def test_the_split_does_not_depend_on_order_and_shares_no_request(
    pairs: list[tuple[str, str]], generator: random.Random, share: float
) -> None:
    splits = split_pairs(pairs, share)
    assert split_pairs(generator.sample(pairs, len(pairs)), share) == splits
    training, held_out = ({words(record) for record in split} for split in splits)
    assert not training & held_out
    assert len(training) + len(held_out) == sum(map(len, splits))
    assert training | held_out == {words(Record("", *pair)) for pair in pairs}
    # Adding pairs moves no request to the other split.
    later = split_pairs([*pairs, ("c", "ls"), ("d", "ls")], share)
    assert all(
        part <= {words(record) for record in split} for part, split in zip((training, held_out), later, strict=True)
    )


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(GistError, match=r"held_out_share must be from 0 to 1, got 1\.5"):
        split_pairs(PAIRS, 1.5)


def written(folder: Path, queries: str, commands: str) -> tuple[Path, Path]:
    found = folder / "made.nl", folder / "made.cm"
    for path, text in zip(found, (queries, commands), strict=True):
        path.write_text(text, encoding="utf-8")
    return found


def test_lines_are_read_in_pairs(tmp_path: Path) -> None:
    # A form feed and U+2028 do not end a line.
    paths = written(tmp_path, " a \n\nb\u2028b\nc\n", "ls\nls -l\necho '\f'\n \n")
    assert read_pairs(*paths) == [("a", "ls"), ("b\u2028b", "echo '\f'")]


@pytest.mark.parametrize(
    ("queries", "commands", "message"),
    [
        ("a\nb\n", "ls\n", r"as many lines as queries, got 1 lines in .*made\.cm and 2 in .*made\.nl; use the two"),
        ("\n\n", "ls\n\n", r"made\.nl and .*made\.cm contain no request with a command"),
    ],
    ids=["other numbers of lines", "nothing"],
)
def test_files_that_give_no_pairs_are_refused(tmp_path: Path, queries: str, commands: str, message: str) -> None:
    with pytest.raises(GistError, match=message):
        read_pairs(*written(tmp_path, queries, commands))


def test_the_tokenizer_writes_any_text() -> None:
    tokenizer = command_tokenizer([Record("", *pair) for pair in PAIRS], 600)
    texts = [PROMPT, COMMANDS[7], "awk '{print $2}' 'ü — 日' \t\\;"]
    ids = tokenizer.encode_texts(texts)
    assert [tokenizer.tokenizer.decode(row) for row in ids] == texts
    assert len(ids[0]) < 0.5 * len(PROMPT.encode())
    assert len(tokenizer.tokenizer) == 600


def test_bleu_with_its_interval() -> None:
    references = ["find . -name '*.txt' -print", "ls -l", "sort a.txt | uniq -c", "tail -n 5 log.txt"] * 5
    predictions = ["find . -name '*.c' -print", "ls -a", "sort a.txt | uniq -d", "tail -n 5 log.txt"] * 5
    found = bleu_interval(predictions, references)
    assert found.value == pytest.approx(bleu(predictions, references))
    assert 20 < found.low < found.value < found.high < 95
    # No four words in a row are right, and no three.
    poor = ["find x -name y", "ls -z"], ["find . -name '*.txt'", "ls -l"]
    assert bleu_interval(*poor).value == pytest.approx(bleu(*poor))
    assert bleu(*poor) > 0
    same = bleu_interval(references, references)
    assert (same.low, same.value, same.high) == pytest.approx((100, 100, 100))


PRICES = {
    "currency": "EUR",
    "input_per_million": 2.0,
    "cached_input_per_million": 1.0,
    "output_per_million": 10.0,
    "training_per_million": 5.0,
    "finetuned_factor": 1.0,
}


def trained(run: str, seed: int, condition: str, stages: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    """A row whose stages are given as share, tokens, BLEU bare and BLEU as read."""
    return {
        "run": run,
        "seed": seed,
        "model": "from nothing",
        "template": "plain",
        "weights": "full",
        "dtype": "float32",
        "vocabulary": 2000,
        "num_parameters": 1_150_000,
        "num_steps": 400,
        "batch_size": 16,
        "prompt_tokens": 117,
        "max_length": 416,
        "max_answer": 48,
        "num_records": 10_000,
        "num_eval_records": 300,
        "num_dropped": 21,
        "condition": condition,
        "tokens": stages[-1][1] if condition == "prompt" else 20.0,
        "cached_tokens": 0.0,
        "query_tokens": 20.0,
        "answer_tokens": 10.0,
        "bleu": {"value": stages[-1][3], "low": stages[-1][3] - 1, "high": stages[-1][3] + 1.5},
        "exact_match": {"value": 0.125, "low": 0.1, "high": 0.15},
        "training_tokens": 1e6,
        "prices": None,
        "stages": [
            {"share": share, "realised_share": share, "mean_examples": 3 * share, "tokens": tokens, "bare": bare}
            | {"as_read": read}
            for share, tokens, bare, read in stages
        ],
        "seconds": 90.0 + 60 * seed,
        "device": "d",
        "threads": 1,
        "torch": "t",
        "transformers": "f",
    }


def test_the_table_by_eye() -> None:
    stages = [(1.0, 250.0, 1.5, 4.0), (0.5, 125.0, 2.5, 5.0), (0.0, 20.0, 7.0, 7.0)]
    rows = [
        trained("in stages", 0, "no-prompt", stages),
        trained("shortened prompt", 0, "prompt", [(0.3, 100.0, 0.5, 6.0)]),
        trained("in stages", 1, "no-prompt", [*stages[:2], (0.0, 20.0, 8.0, 8.0)]),
    ]
    lines = nl2bash_table([*rows, {**rows[1], "model": "other"}]).splitlines()
    assert lines[:14] == [
        "| trained | run on | tokens of a request | saved | answers | BLEU, seed 0 | BLEU, seed 1 "
        "| exact match, seed 0 | exact match, seed 1 | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| in stages | the bare query | 20.0 | 92 % | 300 | 7.0 [6.0, 8.5] | 8.0 [7.0, 9.5] | 12.5 [10.0, 15.0] "
        "| 12.5 [10.0, 15.0] | 2.5 |",
        "| shortened prompt | its prompt | 100.0 | 60 % | 300 | 6.0 [5.0, 7.5] | - | 12.5 [10.0, 15.0] | - | 1.5 |",
        "",
        "| in stages | stage 1 | stage 2 | stage 3 |",
        "|---|---|---|---|",
        "| prompt kept | 100 % | 50 % | 0 % |",
        "| examples, mean | 3.00 | 1.50 | 0.00 |",
        "| tokens of a training request | 250.0 | 125.0 | 20.0 |",
        "| saved | 0 % | 50 % | 92 % |",
        "| BLEU of the stage's prompt, seed 0 | 4.0 | 5.0 | 7.0 |",
        "| BLEU of the bare query, seed 0 | 1.5 | 2.5 | 7.0 |",
        "| BLEU of the stage's prompt, seed 1 | 4.0 | 5.0 | 8.0 |",
    ]
    # The other model has no full prompt to compare with.
    (other,) = (line for line in lines[16:] if line.startswith("| shortened prompt"))
    assert other == "| shortened prompt | its prompt | 100.0 | - | 300 | 6.0 [5.0, 7.5] | 12.5 [10.0, 15.0] | 1.5 |"
    assert "10,000 records to train on; 21 more were left out" in lines[-1]
    assert "16 requests from other, all weights trained, float32, template plain, 1.15 million parameters" in lines[-1]


def test_the_table_of_costs_by_hand() -> None:
    full = {**trained("full prompt", 0, "prompt", [(1.0, 250.0, 1.5, 4.0)]), "cached_tokens": 150.0}
    gist = trained("in stages, gist at the end", 0, "gist", [(1.0, 250.0, 1.5, 4.0), (1.0, 28.0, 7.0, 7.0)])
    rows = [
        trained("in stages", 0, "no-prompt", [(1.0, 250.0, 1.5, 4.0), (0.0, 20.0, 7.0, 7.0)]),
        {**gist, "cached_tokens": 8.0, "tokens": 28.0},
        {**gist, "run": "in stages, gist of another prompt"},
        full,
        {**full, "run": "not trained, full prompt", "num_steps": 0, "stages": [], "training_tokens": 0.0},
        {**full, "seed": 1},
    ]
    assert nl2bash_costs_table(rows) == ""  # without prices
    lines = nl2bash_costs_table([{**row, "prices": PRICES} for row in rows]).splitlines()
    # A thousand requests: 20 x 2 + 10 x 10 = 140 EUR a million, so 0.140; the full prompt 250 x 2 + 100 = 600; cached
    # 100 x 2 + 150 + 100 = 450. A million tokens of training cost 5: 5 / 0.00046 = 10,870 requests, 5 / 0.00031.
    assert lines[:8] == [
        "| trained | tokens | cached | EUR for 1,000 requests | cheaper | training, EUR | pays after "
        "| pays after (prefix cache) |",
        "|---|---|---|---|---|---|---|---|",
        "| in stages | 20.0 | - | 0.140 | 77 % | 5.00 | 10,870 | 16,130 |",
        "| in stages, gist at the end | 28.0 | 8 | 0.148 | 75 % | 5.00 | 11,062 | 16,557 |",
        "| full prompt | 250.0 | - | 0.600 | 0 % | 5.00 | never | never |",
        "| not trained, full prompt | 250.0 | - | 0.600 | 0 % | - | - | - |",
        "| not trained, full prompt, prefix cache | 250.0 | 150 | 0.450 | 25 % | - | - | - |",
        "",
    ]
    assert "cost 1 times as much" in lines[-1]
    dearer = {**PRICES, "finetuned_factor": 3.0}
    (staged,) = (
        line
        for line in nl2bash_costs_table([{**row, "prices": dearer} for row in rows]).splitlines()
        if line.startswith("| in stages |")
    )
    assert staged == "| in stages | 20.0 | - | 0.420 | 30 % | 5.00 | 27,778 | 166,667 |"


def test_the_command_with_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nl2bash, "MAX_ANSWER", 16)  # an untrained model answers up to the limit
    # The answer to the last request is too long.
    queries, commands = written(
        tmp_path, "\n".join([*QUERIES, "too long"]), "\n".join([*COMMANDS, "echo " + "é1 " * 9])
    )
    output = tmp_path / "rows.jsonl"
    words = f"--queries {queries} --commands {commands} --output {output} --checkpoints {tmp_path / 'models'}"
    words += " --steps 4 --batch-size 2 --records 4 --part training"
    assert run(["nl2bash", *words.split(), "--runs", "in stages;full prompt, run bare"]) == 0
    staged, control = read_rows(output)
    assert [(row["run"], row["condition"], len(row["stages"])) for row in (staged, control)] == [
        ("in stages", "no-prompt", 4),
        ("full prompt, run bare", "no-prompt", 1),
    ]
    assert staged["num_dropped"] == 1
    assert (staged["num_records"], staged["num_eval_records"]) == (len(PAIRS) - len(HELD_OUT), 4)
    stages = staged["stages"]
    assert [stage["mean_examples"] for stage in stages] == [3, 2, 1, 0]
    assert [stage["tokens"] for stage in stages] == sorted((stage["tokens"] for stage in stages), reverse=True)
    assert 0.5 < stages[1]["realised_share"] < 0.75
    assert 0.2 < stages[2]["realised_share"] < 0.4
    assert stages[0]["tokens"] == control["stages"][0]["tokens"]
    assert staged["tokens"] == staged["query_tokens"] == control["tokens"] == control["query_tokens"]
    assert control["bleu"]["value"] == pytest.approx(control["stages"][0]["bare"])
    assert all(0 <= stage[name] <= 100 for stage in stages for name in ("bare", "as_read"))
    assert staged["command"] == "python -m benchmarks nl2bash --queries made.nl --commands made.cm"
    assert "| in stages | the bare query |" in capsys.readouterr().out


def test_the_ways_start_from_the_checkpoint(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nl2bash, "MAX_ANSWER", 20)
    task = Task.make(
        PAIRS,
        model=shared / "models" / "stories260K",
        template="plain",
        dtype="bfloat16",
        num_train_records=24,
        num_records=7,
    )
    runs = [name for name, way in RUNS.items() if way.training not in ({}, RUNS["bare query"].training)]
    runs.remove("shortened prompt")
    found = measure(task, tmp_path, weights="lora", steps=4, batch_size=2, gradient_checkpointing=True, runs=runs)
    rows = {row.run: row for row in found}
    assert list(rows) == runs
    assert {(row.model, row.vocabulary, row.num_parameters) for row in found} == {("stories260K", 512, 260_096)}
    assert {(row.weights, row.dtype, row.num_records) for row in found} == {("lora", "bfloat16", 24)}
    bare, full = rows["not trained, bare query"], rows["not trained, full prompt"]
    assert (bare.num_steps, bare.stages, bare.training_tokens, bare.cached_tokens) == (0, [], 0, 0)
    assert bare.tokens == bare.query_tokens == rows["full prompt, run bare"].tokens
    assert full.tokens == rows["full prompt"].tokens > bare.tokens
    assert full.prompt_tokens <= full.cached_tokens == rows["full prompt"].cached_tokens < full.tokens
    tail, other = rows["in stages, gist at the end"], rows["in stages, gist of another prompt"]
    assert (tail.condition, tail.cached_tokens) == ("gist", 8)
    assert tail.tokens == other.tokens
    # One training for both ways to ask.
    assert (tail.training_tokens, tail.stages, tail.seconds) == (other.training_tokens, other.stages, other.seconds)
    assert rows["full prompt"].training_tokens == rows["full prompt, run bare"].training_tokens > 0
    assert rows["full prompt"].training_tokens > tail.training_tokens


def test_the_gist_of_another_prompt_is_what_is_read(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nl2bash, "MAX_ANSWER", 16)
    asked = []
    answers = Task.answers

    def kept(task: Task, model: Any, records: list[Record], condition: str, num_gist_tokens: int = 1) -> list[str]:
        asked.append((condition, num_gist_tokens, {record.instruction for record in records}))
        return answers(task, model, records, condition, num_gist_tokens)

    monkeypatch.setattr(Task, "answers", kept)
    task = Task.make(PAIRS, num_train_records=24, num_records=4)
    runs = ["in stages, gist of another prompt", "not trained, full prompt", "not trained, bare query"]
    rows = measure(task, tmp_path, steps=4, batch_size=2, runs=runs)
    assert [row.run for row in rows] == runs
    other = RUNS[runs[0]].prompt
    assert asked[0] == ("gist", 8, {other})
    assert other != PROMPT
    assert [condition for condition, _, _ in asked[1:]] == ["prompt", "no-prompt"]
    assert all(text.startswith(PROMPT) for text in asked[1][2])


def test_a_trained_copy_is_kept_for_the_ways_that_need_it_alone(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nl2bash, "MAX_ANSWER", 16)
    copies: list[Any] = []
    run_stages, alive = nl2bash.internalize, []

    def spied(model: Any, *more: Any, **settings: Any) -> Any:
        copies.append(weakref.ref(model))
        return run_stages(model, *more, **settings)

    def seen(row: Any) -> None:
        gc.collect()
        alive.append(sum(copy() is not None for copy in copies))

    monkeypatch.setattr(nl2bash, "internalize", spied)
    task = Task.make(PAIRS, num_train_records=24, num_records=4)
    runs = [nl2bash.FULL, "bare query", "full prompt, run bare"]
    measure(task, tmp_path, steps=4, batch_size=2, runs=runs, on_row=seen)
    assert len(copies) == 2
    assert alive == [1, 1, 0]


def test_a_stopped_training_goes_on(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nl2bash, "MAX_ANSWER", 16)
    task = Task.make(PAIRS, num_train_records=24, num_records=4)
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "runs": [nl2bash.STAGED], "resume": True}
    (whole,) = measure(task, tmp_path / "whole", **settings)
    scores: list[float] = []

    def stopping(predictions: list[str], references: list[str]) -> float:
        if len(scores) == 5:  # in the third stage
            raise KeyboardInterrupt
        scores.append(bleu(predictions, references))
        return scores[-1]

    with monkeypatch.context() as patch:
        patch.setattr(nl2bash, "bleu", stopping)
        with pytest.raises(KeyboardInterrupt):
            measure(task, tmp_path / "stopped", **settings)
    folder = tmp_path / "stopped" / nl2bash.STAGED
    first = (folder / "stage-1" / "result.json").stat().st_mtime_ns
    (row,) = measure(task, tmp_path / "stopped", **settings)
    assert (folder / "stage-1" / "result.json").stat().st_mtime_ns == first
    resumed, uninterrupted = (
        replace(one, seconds=0, stages=[{**stage, "seconds": 0} for stage in one.stages]) for one in (row, whole)
    )
    assert resumed == uninterrupted


def test_requests_are_timed(tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [(f"Show the last {number} lines", f"tail -n {number}") for number in range(400)]
    queries, commands = written(tmp_path, *("\n".join(side) for side in zip(*lines, strict=True)))
    words = f"--queries {queries} --commands {commands} --model {shared / 'models' / 'stories260K'} --template plain"
    words += f" --part requests --repeats 2 --output {tmp_path / 'rows.jsonl'}"
    assert run(["nl2bash", *words.split()]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["batch_size"], row["mode"]) for row in rows] == [
        (size, mode) for size in (1, 8) for mode in ("full prompt", "prefix cache", "bare query")
    ]
    assert {row["model"] for row in rows} == {"stories260K"}
    full, cached, bare = rows[:3]
    assert full["num_new_tokens"] > cached["num_new_tokens"] > bare["num_new_tokens"]
    assert nl2bash_requests_table(rows) in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GistError, match=r"runs must be names of in stages, .*, got 'by magic'"):
        measure(Task.make(PAIRS), tmp_path, runs=["by magic"])
    with pytest.raises(
        GistError, match=r"pairs must leave records to train on and records to answer, got 1 and 0 from 1 pairs"
    ):
        Task.make(PAIRS[1:2])
