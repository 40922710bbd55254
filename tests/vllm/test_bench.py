"""The load benchmark at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.vllm import CONFIGURATIONS, make_setup, measure


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
