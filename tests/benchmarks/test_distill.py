"""Five system prompts distilled: the command on a tiny model, and what is committed for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.__main__ import run
from benchmarks.distill import PROMPTS, distill_table, read_prompt
from gisting.measure.rows import read_rows


def test_the_benchmark_of_distilling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows with every control; a second run measures nothing again, and a third goes on with another k."""
    output = tmp_path / "distill.jsonl"
    command = ["distill", "--smoke", "--output", str(output), "--directory", str(tmp_path / "runs")]
    command += ["--prompts", "sql,persona", "--seeds", "0,1"]
    assert run([*command, "--sizes", "2"]) == 0
    rows = read_rows(output)
    assert [(row["prompt"], row["seed"]) for row in rows] == [("sql", 0), ("sql", 1), ("persona", 0)]
    for row in rows:
        assert set(row["held_out"]) == {"gist", "first", "none", "swapped"}
        assert row["held_out"]["gist"] != row["held_out"]["swapped"]
        assert row["steps"] == 2
        assert row["kept"] == 1 - row["held_out"]["gist"]["kl_median"] / row["held_out"]["none"]["kl_median"]
    assert run([*command, "--sizes", "2"]) == 0
    assert len(read_rows(output)) == 3
    assert run([*command, "--sizes", "2,3"]) == 0
    assert len(read_rows(output)) == 6
    assert run([*command, "--sizes", "2,3", "--name", "other"]) == 0
    assert [row["model"] for row in read_rows(output)] == ["random"] * 6 + ["other"] * 6
    assert distill_table(read_rows(output)) == "\n\n".join(
        distill_table(read_rows(output)[part]) for part in (slice(6), slice(6, None))
    )
    shown = capsys.readouterr().out
    assert "sql, k = 2, seed 1: " in shown
    assert re.search(r"^\| persona \(\d+\) \| 3 \|", distill_table(read_rows(output)), re.MULTILINE)


def test_a_model_or_a_smoke_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["distill"]) == 1
    assert "give either --model or --smoke" in capsys.readouterr().err
    assert run(["distill", "--smoke", "--prompts", "sql"]) == 1
    assert "at least two prompts, for the swapped control" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_questions(name: str) -> None:
    """Sixty different questions or more to each prompt of 150 words or more."""
    text, questions = read_prompt(name)
    assert len(set(questions)) == len(questions) >= 60
    assert 100 <= len(text.split()) <= 300
