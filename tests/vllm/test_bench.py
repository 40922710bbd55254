"""The benchmarks of vLLM at a small size."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from benchmarks.__main__ import run
from benchmarks.vllm import CONFIGURATIONS, make_setup, measure
from gisting.measure.rows import read_rows


@pytest.mark.slow
def test_all_configurations_run_and_answer_as_transformers_does(tmp_path: Path) -> None:
    """``measure`` compares the answers with transformers'; this checks that caches are hit where there are any."""
    setup = make_setup(
        tmp_path, prompt_length=70, num_prompts=4, num_new_tokens=6, num_layers=2, hidden_size=128, head_size=64
    )
    assert setup.answer != setup.plain_answer
    hits = {}
    for configuration in CONFIGURATIONS:
        rows = measure(setup, [(configuration, 32)], concurrencies=(1, 4), min_requests=8, repeats=1)
        assert [row.concurrency for row in rows] == [1, 4]
        assert all(row.requests_per_s > 0 for row in rows)
        assert all(0 < row.first_token_p50_ms <= row.first_token_p99_ms for row in rows)
        hits[configuration] = rows[0].hit_rate
    assert hits["none"] == 0
    assert 0 < hits["prefix, overflowing"] < hits["prefix"]


@pytest.mark.slow
def test_small_requests_beside_long_texts() -> None:
    """Both servers answer every small request, and refuse what is longer than the model can read."""
    words = ["flood", "--smoke", "--seconds", "3", "--clients", "2", "--mib", "1", "--output"]
    with tempfile.TemporaryDirectory() as folder:
        assert run([*words, f"{folder}/rows.jsonl"]) == 0
        rows = read_rows(Path(folder) / "rows.jsonl")
    assert [(row["server"], row["num_clients"]) for row in rows] == [
        (server, number) for server in ("stock", "gist") for number in (0, 2)
    ]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] <= row["slowest_ms"] for row in rows)
    assert all({*row["long_answers"]} <= {"400", "413"} for row in rows)
    assert all(bool(row["long_answers"]) == bool(row["num_clients"]) for row in rows)
