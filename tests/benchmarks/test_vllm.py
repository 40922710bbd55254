"""Setup, gates and table of the vLLM benchmark. tests/vllm runs it with vLLM itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vllm as bench
from benchmarks.vllm import VllmRow, make_setup, measure, vllm_table
from gisting.errors import GistError
from gisting.measure.rows import environment, read_rows
from gisting.store import GistStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(tmp_path: Path) -> bench.Setup:
    sizes = {"num_layers": 2, "hidden_size": 64, "head_size": 32}
    return make_setup(tmp_path, prompt_length=9, num_prompts=3, num_gist_tokens=2, num_new_tokens=4, **sizes)


def test_a_setup_holds_what_is_measured(setup: bench.Setup) -> None:
    assert [len(prompt) for prompt in setup.prompts] == [9, 9, 9]
    assert len(setup.answer) == 4
    store = GistStore(setup.folder / "store")
    assert sorted(entry.name or "" for entry in store.list()) == ["0", "1", "2"]
    assert setup.token_bytes == store["1"].num_bytes // 2 == 2 * 2 * 2 * 32 * 4  # keys, values; layers; heads; size


def cells(answers: list[int]) -> list[dict[str, Any]]:
    times = [0.001 * number for number in range(1, 5)]
    return [
        {
            "concurrency": number,
            "num_requests": 4,
            "requests_per_s": 2.0,
            "first_token_s": times,
            "answers": [answers],
            "num_preemptions": 0,
            "hit_rate": 0.5,
        }
        for number in (1, 8)
    ]


def test_every_configuration_has_its_cache(setup: bench.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {}
    for configuration in bench.CONFIGURATIONS:
        monkeypatch.setattr(
            bench,
            "_in_a_process",
            lambda task, name=configuration: (
                tasks.setdefault(name, task) and cells(setup.answer if name == "gist" else setup.plain_answer)
            ),
        )
        rows = measure(setup, [(configuration, 32)], concurrencies=(1, 8), min_requests=4, repeats=2)
        assert [(row.concurrency, row.num_repeats) for row in rows] == [(1, 2), (8, 2)]
        assert (rows[0].first_token_p50_ms, rows[0].first_token_p99_ms) == (2.5, 4.0)
        assert [len(asked) for asked in tasks[configuration].requests] == [4, 24]
    assert [tasks[name].is_prefix_cached for name in bench.CONFIGURATIONS] == [False, True, True, True]
    assert [task.store is not None for task in tasks.values()] == [False, False, False, True]
    assert tasks["prefix, overflowing"].num_blocks < tasks["prefix"].num_blocks
    for number in range(2):
        requests = {name: task.requests[number] for name, task in tasks.items()}
        assert requests["gist"][0][0][:3] == [512, 512, setup.input[0]]
        # All use the same prompts, the checked one first, and the same inputs.
        asked = [gist for _, gist in requests["gist"]]
        assert asked[0] == "0"
        for name in bench.CONFIGURATIONS[:3]:
            assert [str(setup.prompts.index(ids[:9])) for ids, _ in requests[name]] == asked
        inputs = {name: [ids[-16:] for ids, _ in found] for name, found in requests.items()}
        assert len({str(found) for found in inputs.values()}) == 1
    first, second = tasks["none"].requests
    assert first[1:] != second[1:4], "requests of the run before would not be a fair sample"


def test_no_time_is_reported_for_wrong_answers(setup: bench.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_in_a_process", lambda task: cells([0, 0, 0, 0]))
    for configuration in bench.CONFIGURATIONS:
        with pytest.raises(GistError, match=f"{configuration}: vLLM answers with other tokens than transformers"):
            measure(setup, [(configuration, 32)])
    with pytest.raises(GistError, match="configuration must be one of none"):
        measure(setup, [("fast", 32)])
    with pytest.raises(GistError, match="repeats must be at least 1, got 0"):
        measure(setup, [("none", 32)], repeats=0)


def test_runs_take_turns_and_what_takes_long_is_not_repeated(
    setup: bench.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[bool, int]] = []
    rates = iter([4.0, 1.0, 5.0, 6.0])  # requests a second of each run

    def in_a_process(task: Any) -> list[dict[str, Any]]:
        ran.append((task.is_prefix_cached, task.block_size))
        return [{**cell, "requests_per_s": rate} for rate in [next(rates)] for cell in cells(setup.plain_answer)]

    monkeypatch.setattr(bench, "_in_a_process", in_a_process)
    found = [("prefix", 128), ("none", 32)]
    rows = measure(setup, found, concurrencies=(1, 8), repeats=3, max_s=7)  # none takes 8 s, the other at most 2
    assert ran == [(True, 128), (False, 32), (True, 128), (True, 128)]
    assert [(row.configuration, row.concurrency, row.num_repeats) for row in rows] == [
        ("prefix", 1, 3),
        ("prefix", 8, 3),
        ("none", 1, 1),
        ("none", 8, 1),
    ]
    assert (rows[0].requests_per_s_low, rows[0].requests_per_s, rows[0].requests_per_s_high) == (4, 5, 6)
    assert (rows[2].requests_per_s_low, rows[2].requests_per_s, rows[2].requests_per_s_high) == (1, 1, 1)


def test_a_failed_engine_is_reported(setup: bench.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    def run(words: list[str], **settings: Any) -> Any:
        return subprocess.CompletedProcess(words, 1, "", "out of memory")

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(GistError, match="vLLM failed: out of memory"):
        measure(setup, [("none", 32)])


def test_the_table_says_how_many_times() -> None:
    def row(configuration: str, concurrency: int, speed: float, held: int, repeats: int = 1) -> dict[str, Any]:
        made = VllmRow(
            configuration=configuration,
            block_size=32,
            prompt_length=1500,
            num_prompts=1,
            concurrency=concurrency,
            requests_per_s=speed,
            requests_per_s_low=speed - 0.5,
            requests_per_s_high=speed + 0.5,
            first_token_p50_ms=5,
            first_token_p99_ms=9,
            hit_rate=0.5,
            kv_bytes_per_prompt=held,
            cache_bytes=held,
            num_requests=64,
            num_repeats=repeats,
            num_new_tokens=32,
            num_gist_tokens=8,
            num_parameters=26_000_000,
            num_preemptions=0,
            vllm="vllm 0",
        )
        return {**asdict(made), **environment()}

    rows = [row("prefix", 1, 2, 480), row("prefix", 8, 1, 480), row("gist", 1, 2, 256, 3), row("gist", 8, 4, 256, 3)]
    table = vllm_table(rows).splitlines()
    assert table[2] == "| 1,500 | 1 | prefix | 32 | 480 | 2.00, gist 1.0x | 5 / 9 | 1.00, gist 4.0x | 5 / 9 |"
    assert table[3] == "| 1,500 | 1 | gist | 32 | 256 | 2.00 (1.50–2.50) | 5 / 9 | 4.00 (3.50–4.50) | 5 / 9 |"
    assert {line.count("|") for line in table[:4]} == {10}
    others = [{**other, "block_size": 128} for other in rows[2:]]
    assert ", gist" not in vllm_table([*rows[:2], *others]), "a gist with other blocks is not comparable"


def test_the_committed_rows_hold_what_is_promised() -> None:
    """Prompts of 1,500 tokens, vLLM's own block size: twice the requests per second of its warm prefix cache with 8 in
    flight, three times with 32, and six times where it cannot hold the prompts. Small blocks help the baseline.
    """
    rows = read_rows(ROOT / "docs" / "results" / "vllm.jsonl")
    rates = {
        (row["configuration"], row["block_size"], row["prompt_length"], row["num_prompts"], row["concurrency"]): row[
            "requests_per_s"
        ]
        for row in rows
    }

    def gain(other: str, length: int, num_prompts: int, concurrency: int, block_size: int = bench.BLOCK_SIZE) -> float:
        where = (block_size, length, num_prompts, concurrency)
        return rates["gist", *where] / rates[other, *where]

    assert gain("prefix", 1500, 1, 8) >= 2
    assert gain("prefix", 1500, 1, 32) >= 3
    assert gain("prefix, overflowing", 1500, 40, 32) >= 6
    assert gain("none", 1500, 1, 8) > gain("none", 512, 1, 8) > gain("none", 26, 1, 8)
    assert 1.2 < gain("prefix", 1500, 1, 32, bench.SMALL_BLOCK_SIZE) < gain("prefix", 1500, 1, 32)
    assert gain("prefix", 26, 1, 1) < 1.3, "the page also shows where it does not pay"
