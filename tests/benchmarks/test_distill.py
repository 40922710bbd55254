"""Five system prompts distilled: the command on a tiny model, and what is committed for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import run
from benchmarks.distill import PROMPTS, distill_table, read_prompt, starts_table
from benchmarks.distill_time import distill_time_table
from gisting.cache import GistCache
from gisting.eval.check import COUNTS
from gisting.measure.rows import read_rows
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


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
        assert row["start"] == "matched"
        counts = row["details"]
        assert set(counts) == {"asked", "prompt", "gist", "none", "lost"}
        assert max(counts["prompt"], counts["gist"], counts["none"]) <= counts["asked"]
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


def test_the_table_says_where_each_k_was_measured() -> None:
    """The committed rows, some of them as if from another device."""
    rows = read_rows(ROOT / "docs" / "results" / "distill.jsonl")
    moved = [{**row, "num_gist_tokens": 64, "device": "another card"} for row in rows[:2]]
    text = distill_table([*rows, *moved])
    assert "; k = 64: another card, 1 threads, " in text
    assert "another card" not in distill_table(rows)


def test_details_are_those_of_the_full_prompt_that_the_gist_has_too() -> None:
    """Not all that the gist has: it may have one that the full prompt has not."""
    row = read_rows(ROOT / "docs" / "results" / "distill.jsonl")[0]
    row["details"] = {"asked": 9, "prompt": 5, "gist": 4, "none": 1, "lost": 2}
    assert "| 3 of 5 (1) |" in distill_table([row])


def test_a_run_that_is_killed_before_it_keeps_the_gist_keeps_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["distill", "--smoke", "--directory", str(tmp_path), "--prompts", "sql,persona", "--seeds", "0"]
    with monkeypatch.context() as patched:
        patched.setattr(GistCache, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([*command, "--sizes", "2"])
    assert run([*command, "--sizes", "2"]) == 0
    assert len([*tmp_path.glob("*/*/gist.safetensors")]) == 2


def test_what_the_committed_rows_hold() -> None:
    """At every k, every prompt: more than two thirds of the divergence are gone, and more than from each control.

    Only of 32 slots and the prompt's first 32 tokens, which are about an eighth of it, it is more than half.
    """
    rows = read_rows(ROOT / "docs" / "results" / "distill.jsonl")
    matched = {(row["prompt"], row["num_gist_tokens"]): row for row in rows if row["start"] == "matched"}
    assert {*matched} == {(name, k) for name in PROMPTS for k in (8, 16)}
    rows = [row for row in rows if row["start"] == "attended"]
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    assert {row["seed"] for row in rows if row["prompt"] == "support"} == {0, 1, 2}
    assert {(row["prompt"], row["num_gist_tokens"]) for row in rows} == {(name, k) for name in PROMPTS for k in COUNTS}
    for row in rows:
        median = {source: one["kl_median"] for source, one in row["held_out"].items()}
        assert median["gist"] < min(median["none"], median["swapped"]) / 3
        assert median["gist"] < median["first"] / (2 if row["num_gist_tokens"] == 32 else 3)
        assert median["gist"] < row["start_median"]
        better = matched.get((row["prompt"], row["num_gist_tokens"]))
        if better is not None:
            assert better["steps"] < row["steps"]
            assert better["held_out"]["gist"]["kl_median"] < median["gist"]


def test_the_default_start_is_the_best_one() -> None:
    """On every prompt compared it begins and, after equal steps, ends lower than each other start."""
    rows = read_rows(ROOT / "docs" / "results" / "distill_starts.jsonl")
    medians = {(row["prompt"], row["start"]): row["held_out"]["gist"]["kl_median"] for row in rows}
    assert len({(row["steps"], row["num_gist_tokens"], row["seed"]) for row in rows}) == 1
    compared = {prompt for prompt, _ in medians}
    assert len(compared) >= 2
    begins = {(row["prompt"], row["start"]): row["start_median"] for row in rows}
    for prompt in compared:
        for found in (begins, medians):
            assert found[prompt, "matched"] < min(found[prompt, start] for start in ("first", "attended", "gist"))


def test_several_processes_share_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two parts are the rows of one run, in any order, and another start has its own rows and table."""
    command = ["distill", "--smoke", "--prompts", "sql,persona", "--seeds", "0,1", "--sizes", "2"]

    def rows_of(name: str, *options: str) -> list[dict[str, Any]]:
        place = ["--output", str(tmp_path / f"{name}.jsonl"), "--directory", str(tmp_path / name)]
        assert run([*command, *place, *options]) == 0
        return [{**row, "seconds": None} for row in read_rows(tmp_path / f"{name}.jsonl")]

    whole = rows_of("whole")
    assert [row["seed"] for row in rows_of("shared", "--part", "2/2")] == [1]
    shared = rows_of("shared", "--part", "1/2")
    assert sorted(shared, key=str) == sorted(whole, key=str)
    assert starts_table(shared) == ""
    both = rows_of("shared", "--start", "first")
    assert [row["start"] for row in both] == ["matched"] * 3 + ["first"] * 3
    rows = read_rows(tmp_path / "shared.jsonl")
    assert distill_table([*rows[3:], *rows[:3]]) == "\n\n".join(map(distill_table, (rows[:3], rows[3:])))
    assert "from its gist (`--start first`, at most 2 steps)" in distill_table(rows[3:])
    first, matched = rows[4], rows[0]
    assert (first["prompt"], first["seed"]) == (matched["prompt"], matched["seed"])
    shown = [f"{row['start_median']:.3f}, {row['held_out']['gist']['kl_median']:.3f}" for row in (first, matched)]
    assert f"| 2 | {' | '.join(shown)} |" in starts_table(rows)
    assert starts_table(rows) in capsys.readouterr().out


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_a_part_that_is_none(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["distill", "--smoke", "--part", part]) == 2
    assert f"such as 2/5, got '{part}'" in " ".join(capsys.readouterr().err.split())


def test_the_time_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny.model("llama", max_position_embeddings=512), tiny.word_tokenizer()
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    command = ["distill-time", "--model", str(tmp_path / "chat"), "--output", str(tmp_path / "rows.jsonl"), "-k", "2"]
    assert run([*command, "--num-answers", "4", "--steps", "2", "--dtype", "float32"]) == 0
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert (row["steps"], row["answers"], row["num_gist_tokens"], row["prompt"]) == (2, 4, 2, "persona")
    assert sum(row["seconds"].values()) < row["total_s"]
    assert f"| {row['total_s']:.0f} s |" in distill_time_table([row])
    capsys.readouterr()
    assert run(["distill-time", "--model", str(tmp_path / "nothing")]) == 1
    assert "ended with status 1; see its message above" in " ".join(capsys.readouterr().err.split())
    assert run(["distill-time", "--model", "x", "--prompt", "poem"]) == 1
    assert "--prompt must be one of" in capsys.readouterr().err


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
