"""The benchmark of load, small."""

from __future__ import annotations

from pathlib import Path

from gisting.bench.vllm import CONFIGURATIONS, make_setup, measure


def test_all_configurations_run_and_answer_alike(tmp_path: Path) -> None:
    setup = make_setup(
        tmp_path, prompt_length=70, num_prompts=4, num_new_tokens=6, num_layers=2, hidden_size=128, head_size=64
    )
    answers = {}
    for configuration in CONFIGURATIONS:
        rows, answers[configuration] = measure(setup, configuration, concurrencies=(1, 4), num_requests=8)
        assert [row.concurrency for row in rows] == [1, 4]
        assert all(row.requests_per_s > 0 for row in rows)
        assert all(0 < row.first_token_p50_ms <= row.first_token_p99_ms for row in rows)
    assert answers["none"] == answers["prefix"] == answers["prefix, overflowing"]
    assert answers["gist"] != answers["none"]
