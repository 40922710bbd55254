"""Internalisation on the built-in task: the tables by eye, and the command with a few steps."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import codes, internalize
from benchmarks.__main__ import run
from benchmarks.codes import codes_table
from benchmarks.internalize import internalize_table, measure, serving_table
from gisting import GistError
from gisting.demo import task_model
from gisting.measure.rows import read_rows
from gisting.store.objects import locked

ABOUT = {"device": "d", "threads": 2, "torch": "t", "transformers": "f"}


def trained(run: str, seed: int, condition: str, tokens: float, value: float, time: float) -> dict[str, Any]:
    stage = {"realised_share": 0.66, "tokens": 50.0, "bare": 0.25}
    return {
        "run": run,
        "seed": seed,
        "num_steps": 400,
        "base_steps": 1000,
        "num_parameters": 660_000,
        "num_records": 256,
        "condition": condition,
        "tokens": tokens,
        "query_tokens": 6.0,
        "exact_match": {"value": value, "low": value - 0.01, "high": value + 0.01},
        "unasked": {"value": 0.25, "low": 0.2, "high": 0.3},
        "edited": {"value": 0.5, "low": 0.4, "high": 0.6} if condition == "prompt" else None,
        "stages": [stage, {"realised_share": 0.0, "tokens": 6.0, "bare": value}],
        "base_seconds": 100.0,
        "seconds": time,
        **ABOUT,
    }


def test_the_tables_by_eye() -> None:
    rows = [
        trained("in stages", 0, "no-prompt", 6.0, 0.98, 60.0),
        trained("full prompt", 0, "prompt", 110.0, 0.99, 70.0),
        trained("in stages", 1, "no-prompt", 6.0, 0.97, 62.0),
    ]
    lines = internalize_table([*rows, {"mode": "full prompt"}]).splitlines()
    assert lines[:9] == [
        "| trained | run on | tokens of a request | seed 0 | seed 1 | unasked names | edited prompt | seconds |",
        "|---|---|---|---|---|---|---|---|",
        "| in stages | the bare query | 6.0 | 98.0 [97.0, 99.0] | 97.0 [96.0, 98.0] | 25.0, 25.0 | - | 60–62 |",
        "| full prompt | its prompt | 110.0 | 99.0 [98.0, 100.0] | - | 25.0 | 50.0 | 70 |",
        "",
        "| in stages | stage 1 | stage 2 |",
        "|---|---|---|",
        "| prompt kept (seed 0) | 66 % | 0 % |",
        "| tokens of a request | 50.0 | 6.0 |",
    ]
    served = [
        {
            "mode": mode,
            "batch_size": 8,
            "num_cached_tokens": 70 if mode == "prefix cache" else 0,
            "num_new_tokens": 6.0,
            "num_answer_tokens": 7,
            "num_parameters": 660_000,
            "requests_per_s": rate,
            "requests_per_s_low": rate - 1,
            "requests_per_s_high": rate + 1,
            "num_repeats": 30,
            **ABOUT,
        }
        for mode, rate in (("full prompt", 100), ("prefix cache", 150), ("bare query", 300))
    ]
    assert serving_table([*rows, *served]).splitlines()[2:5] == [
        "| 0.7 M | 8 | full prompt | 0 | 6.0 | 100 (99–101) | 1.00x |",
        "| 0.7 M | 8 | prefix cache | 70 | 6.0 | 150 (149–151) | 1.50x |",
        "| 0.7 M | 8 | bare query | 0 | 6.0 | 300 (299–301) | 3.00x |",
    ]


def test_the_command_with_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("in stages", "in stages, gist at the end", "full prompt", "full prompt, run bare")
    monkeypatch.setattr(internalize, "measure", lambda *args, **kwargs: measure(*args, runs=names, **kwargs))
    # The model of 26 million parameters would take most of the time.
    monkeypatch.setattr(internalize, "task_model", lambda tokenizer, positions=512, **sizes: task_model(tokenizer, 512))
    output = tmp_path / "rows.jsonl"
    words = f"--output {output} --checkpoints {tmp_path / 'models'} --seeds 3"
    assert run(["internalize", *words.split(), *"--base-steps 2 --steps 4 --records 8 --repeats 2".split()]) == 0
    rows = read_rows(output)
    found = {row["run"]: row for row in rows if "run" in row}
    assert [(name, row["condition"], len(row["stages"])) for name, row in found.items()] == [
        (names[0], "no-prompt", 4),
        (names[1], "gist", 4),
        (names[2], "prompt", 1),
        (names[3], "no-prompt", 1),
    ]
    assert [row["edited"] is not None for row in found.values()] == [False, True, True, False]
    first = found[names[0]]
    assert first["tokens"] == first["query_tokens"] < 0.1 * first["stages"][0]["tokens"]
    shares = [stage["realised_share"] for stage in first["stages"]]
    assert shares[0] == 1
    assert shares[3] == 0
    assert 0.5 < shares[1] <= 2 / 3
    served = [row for row in rows if "mode" in row]
    assert [(row["batch_size"], row["mode"]) for row in served] == 2 * [
        (size, mode) for size in (1, 8) for mode in ("full prompt", "prefix cache", "bare query")
    ]
    assert all(row["requests_per_s"] > 0 for row in served)
    assert "| in stages | the bare query |" in capsys.readouterr().out


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GistError, match=r"runs must be names of in stages, .*, got 'by magic'"):
        measure(tmp_path, runs=["by magic"])


# -- codes that only the prompt has ------------------------------------------------------------------------------------


def scored(run: str, seed: int, value: float, **changes: Any) -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.1, "high": value + 0.1}
    row = {
        "run": run,
        "model": "m",
        "seed": seed,
        "num_steps": 200,
        "base_steps": 600,
        "num_edits": 2000,
        "seconds": 9.6,
    }
    row |= {"num_queries": 128, "tokens": 6.0, "asked": interval, "unasked": interval, "changed": None, "kept": None}
    return {**row, **ABOUT, **changes}


def test_the_table_of_codes_by_eye() -> None:
    read = {"changed": scored("", 0, 0.5)["asked"], "kept": scored("", 0, 0.25)["asked"], "tokens": 14.0}
    rows = [
        scored("stages, then a gist", 0, 1.0, **read),
        scored("self-study", 1, 0.75, num_steps=400, device="a card"),
        scored("self-study", 0, 0.5),
        scored("not trained, no prompt", 0, 0.0, num_steps=0, tokens=None),
    ]
    assert codes_table(rows).splitlines() == [
        "| m: trained | steps | tokens | asked | unasked | changed code | kept code | seconds |",
        "|---|---|---|---|---|---|---|---|",
        "| not trained, no prompt | 0 | - | 0.0 | 0.0 | - | - | 10 |",
        "| self-study | 200–400 | 6 | 50.0, 75.0 | 50.0, 75.0 | - | - | 10 |",
        "| stages, then a gist | 200 | 14 | 100.0 | 100.0 | 50.0 | 25.0 | 10 |",
        "",
        "Right answers in per cent, one for each seed (0, 1); 128 queries for the codes that are asked for, with a "
        "95 % interval of ±10 on average. Steps of 32 requests, from a base of 600 steps on random tables (d, 2 "
        "threads, torch t, transformers f; a card, 2 threads, torch t, transformers f). Without a row so far: "
        "untouched model, full prompt; not trained, full prompt; full prompt; bare query; in stages; on-policy; "
        "on-policy, own questions; stages, then a gist of edits.",
    ]
    last = codes_table([*rows, scored("stages, then a gist of edits", 0, 1.0, **read)]).splitlines()[-1]
    assert "600 steps on random tables; 2,000 versions of the prompt to learn from (d" in last


def test_versions_of_the_table_differ_where_they_say() -> None:
    problem = codes._BuiltIn()
    split = problem.split(3, 40, 16)
    names = {code.partition("-")[0]: code for code in split.prompt.split() if "-" in code}
    unasked = {name for name in names if not any(name in str(one.input).split() for one in split.training)}
    assert len(unasked) == 2
    for record in (*split.edits, *split.changed, *split.kept):
        assert unasked.isdisjoint(str(record.input).split())
        own = {code.partition("-")[0]: code for code in record.instruction.split() if "-" in code}
        assert own.keys() == names.keys()
        assert 1 <= sum(own[name] != names[name] for name in names) <= 4
        changed = [name for name in str(record.input).split() if own[name] != names[name]]
        assert all(own[name] in record.output for name in str(record.input).split())
        assert record in split.edits or bool(changed) == (record in split.changed)
    assert all(not unasked.isdisjoint(str(one.input).split()) for one in split.unasked)
    assert split.prompt not in {one.instruction for one in split.edits}
    assert not {one.instruction for one in split.changed} & {one.instruction for one in split.edits}


def test_rooms_that_no_training_query_asks_for(tmp_path: Path) -> None:
    problem = object.__new__(codes._Rooms)
    split = problem.split(1, 10, 6)
    rooms = {record.output.split()[4] for record in split.training}
    assert len(rooms) == 12
    assert {record.output.split()[4] for record in split.asked} == rooms
    others = {record.output.split()[4] for record in split.unasked}
    assert len(others) == 4
    assert others.isdisjoint(rooms)
    for record in (*split.training, *split.asked, *split.unasked, *split.edits, *split.changed, *split.kept):
        assert record.output in record.instruction
    assert not {record.input for record in split.training} & {record.input for record in split.asked}
    assert all(record.output not in split.prompt for record in split.changed)
    assert all(record.output in split.prompt for record in split.kept)
    assert problem.is_right("It is 123.", "The code of room Amber is 123.")
    assert not problem.is_right("It is 123 or 124.", "The code of room Amber is 123.")
    asking = [record for record in problem.lookups(60, 0) if record.instruction.startswith("You write")]
    assert 5 <= len(asking) <= 25
    assert all(record.output.split(" room ")[-1].rstrip("?.") for record in asking)


def test_codes_are_measured_with_a_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "internalize --part codes --seeds 0 --base-steps 2 --steps 4 --records 4 --edits 6 --questions 8"
    ways = "untouched model, full prompt;not trained, full prompt;on-policy, own questions;self-study;"
    ways += "stages, then a gist of edits"
    output = ["--output", str(tmp_path / "rows.jsonl"), "--checkpoints", str(tmp_path / "runs")]
    assert run([*words.split(), *output, "--runs", ways]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["run"] for row in rows] == ways.split(";")
    assert [row["changed"] is not None for row in rows] == [True, True, False, False, True]
    assert "| built-in task: trained | steps | tokens | asked |" in capsys.readouterr().out
    assert run([*words.split(), *output, "--runs", "bare query", "--seconds", "0"]) == 0
    assert "bare query: not started, the time is over" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "rows.jsonl")) == 5
    assert run([*words.split(), "--runs", "nothing"]) == 2


def test_the_base_is_trained_once_for_each_number_of_steps_and_by_one_process(tmp_path: Path) -> None:
    """The process that holds the lock trains the base; another one waits for it, and then finds the base there."""
    problem, said = codes._BuiltIn(), []

    def base(steps: int) -> Any:
        return codes._base(problem, tmp_path, steps, 0, said.append).get_input_embeddings().weight

    first = base(1)
    assert base(1).equal(first)
    assert not base(2).equal(first)
    assert said == ["base: 1 steps", "base: 2 steps"]
    (made,) = tmp_path.glob("base-*-1-0")
    (made / "done").unlink()
    with ThreadPoolExecutor(1) as pool:
        with locked(made):
            waiting = pool.submit(base, 1)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            (made / "done").touch()  # by the process that holds the lock
        assert waiting.result(timeout=30).equal(first)
    assert said == ["base: 1 steps", "base: 2 steps"]
