"""Internalisation on requests and commands: the split, files that differ, the table by eye, the command with a
few steps. All lines are made up here.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import nl2bash
from benchmarks.__main__ import run
from benchmarks.nl2bash import (
    PROMPT,
    bleu_interval,
    command_tokenizer,
    measure,
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
    same = bleu_interval(references, references)
    assert (same.low, same.value, same.high) == pytest.approx((100, 100, 100))


def trained(run: str, seed: int, condition: str, stages: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    """A row whose stages are given as share, tokens, BLEU bare and BLEU as read."""
    return {
        "run": run,
        "seed": seed,
        "model": "from nothing",
        "vocabulary": 2000,
        "num_parameters": 1_150_000,
        "num_steps": 400,
        "batch_size": 16,
        "template_tokens": 117,
        "max_length": 416,
        "num_records": 10_000,
        "num_eval_records": 300,
        "num_dropped": 21,
        "condition": condition,
        "tokens": stages[-1][1] if condition == "prompt" else 20.0,
        "query_tokens": 20.0,
        "bleu": {"value": stages[-1][3], "low": stages[-1][3] - 1, "high": stages[-1][3] + 1.5},
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
        "| trained | run on | tokens of a request | saved | BLEU, seed 0 | BLEU, seed 1 | minutes |",
        "|---|---|---|---|---|---|---|",
        "| in stages | the bare query | 20.0 | 92 % | 7.0 [6.0, 8.5] | 8.0 [7.0, 9.5] | 2.5 |",
        "| shortened prompt | its prompt | 100.0 | 60 % | 6.0 [5.0, 7.5] | - | 1.5 |",
        "",
        "| in stages | stage 1 | stage 2 | stage 3 |",
        "|---|---|---|---|",
        "| prompt kept | 100 % | 50 % | 0 % |",
        "| examples, mean | 3.00 | 1.50 | 0.00 |",
        "| tokens of a request | 250.0 | 125.0 | 20.0 |",
        "| saved | 0 % | 50 % | 92 % |",
        "| BLEU of the stage's prompt, seed 0 | 4.0 | 5.0 | 7.0 |",
        "| BLEU of the bare query, seed 0 | 1.5 | 2.5 | 7.0 |",
        "| BLEU of the stage's prompt, seed 1 | 4.0 | 5.0 | 8.0 |",
    ]
    # The other model has no full prompt to compare with.
    (other,) = (line for line in lines[16:] if line.startswith("| shortened prompt"))
    assert other == "| shortened prompt | its prompt | 100.0 | - | 6.0 [5.0, 7.5] | 1.5 |"
    assert "21 of both splits were left out" in lines[-1]
    assert "16 requests from other, 1.15 million parameters" in lines[-1]


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
    words += " --steps 4 --batch-size 2 --records 4"
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
    assert staged["tokens"] == stages[3]["tokens"] == control["tokens"] == control["query_tokens"]
    assert all(0 <= stage[name] <= 100 for stage in stages for name in ("bare", "as_read"))
    assert staged["command"] == "python -m benchmarks nl2bash --queries made.nl --commands made.cm"
    assert "| in stages | the bare query |" in capsys.readouterr().out


def test_all_ways_start_from_the_checkpoint(tmp_path: Path, shared: Path) -> None:
    (row,) = measure(
        PAIRS, tmp_path, model=shared / "models" / "stories260K", steps=2, batch_size=2, runs=["bare query"]
    )
    assert (row.model, row.vocabulary, row.num_parameters) == ("stories260K", 512, 260_096)
    assert row.tokens == row.query_tokens == row.stages[0]["tokens"]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GistError, match=r"runs must be names of in stages, .*, got 'by magic'"):
        measure(PAIRS, tmp_path, runs=["by magic"])
    with pytest.raises(
        GistError, match=r"pairs must leave records to train on and records to answer, got 1 and 0 from 1 pairs"
    ):
        measure(PAIRS[1:2], tmp_path)
