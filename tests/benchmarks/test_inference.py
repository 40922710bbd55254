"""Markdown tables of requests that share a prompt, checked by eye."""

from __future__ import annotations

import pytest

from benchmarks.inference import inference_table, losses_table
from gisting import GistError
from gisting.measure.inference import GIST, NO_CACHE, PREFIX, STATIC
from tests.measure.test_inference import ROWS, row


def test_the_inference_tables_by_eye() -> None:
    lines = inference_table(ROWS).splitlines()
    assert [line for line in lines if line.startswith(("| 26", "| 2,000"))] == [
        "| 26 | 8 | 60.0 (59.0–61.0) | 50.0 (49.0–51.0) | 40.0 (39.0–41.0) | 50.0 (49.0–51.0) "
        "| 1.20x | 1.00x | 0.80x |",
        "| 2,000 | 8 | 2,500 (2,499–2,501) | 100.0 (99.0–101.0) | 80.0 (79.0–81.0) | 50.0 (49.0–51.0) "
        "| 50.0x | 2.00x | 1.60x |",
        "| 26 | 8 | 100.0 (99.0–101.0) | 100.0 (99.0–101.0) | 0.60x | 1.00x |",
        "| 2,000 | 8 | 200.0 (199.0–201.0) | 100.0 (99.0–101.0) | 25.0x | 2.00x |",
        "| 26 | 8 | 30.0 (29.0–31.0) | 41.0 (40.0–42.0) | 40.0 (39.0–41.0) | 40.0 (39.0–41.0) "
        "| 1.33x | 0.98x | 1.00x |",
        "| 2,000 | 8 | not run: it would take about 70 s | 20.0 (19.0–21.0) | 70.0 (69.0–71.0) | 210.0 (209.0–211.0) "
        "| - | 10.5x | 3.00x |",
        "| 26 | 8 | 26.0 kB | 584.0 kB | 4.0 kB | 6.5x | 2.5 MB | 2.5 MB | 2.5 MB | 2.5 MB |",
        "| 2,000 | 8 | 2.0 MB | 16.4 MB | 4.0 kB | 500.0x | - | 2.5 MB | 2.5 MB | 2.5 MB |",
    ]
    assert lines[-1].startswith(
        "m, 100 million parameters, float32; k = 4, inputs of 16 tokens, answers of 32; medians"
    )
    assert "of 2 to 30 alternating runs" in lines[-1]


def test_several_processes_by_eye() -> None:
    """Modes are compared within each process; the table shows the median over the processes."""
    again = [row(NO_CACHE, 26, None, None, not_run="it would take about 70 s")]
    again += [row(PREFIX, 26, 80, 30), row(STATIC, 26, 40, 45), row(GIST, 26, 40, 45)]
    more = [row(NO_CACHE, 26, 90, 30), row(PREFIX, 26, 60, 20), row(STATIC, 26, 40, 30), row(GIST, 26, 20, 60)]
    ended = [row(NO_CACHE, 26, 1, 1), row(PREFIX, 26, 1, 1), row(NO_CACHE, 3, 1, 1)]
    runs = [{**one, "run": name} for name, found in (("b", again), ("c", more), ("d", ended)) for one in found]
    lines = inference_table(ROWS + runs).splitlines()
    assert [line for line in lines if line.startswith("| 26")][:3] == [
        "| 26 | 8 | 75.0 (59.0–91.0) | 60.0 (49.0–81.0) | 40.0 (39.0–41.0) | 40.0 (19.0–51.0) "
        "| 2.85x | 2.00x | 1.00x |",
        "| 26 | 8 | 120.0 (99.0–161.0) | 80.0 (39.0–101.0) | 1.43x | 2.00x |",
        "| 26 | 8 | 30.0 (29.0–31.0) | 30.0 (19.0–42.0) | 40.0 (29.0–46.0) | 45.0 (39.0–61.0) "
        "| 1.67x | 1.50x | 1.00x |",
    ]
    assert (
        "in brackets; for 26 x 8, the medians over 3 processes, with the lowest and the highest quartile (d, "
        in lines[-1]
    )
    assert not any(line.startswith("| 3 |") for line in lines)


def test_rows_of_other_settings_are_no_table() -> None:
    other = [{**one, "run": "b", "num_gist_tokens": 1} for one in ROWS]
    with pytest.raises(GistError, match="the rows of one table must have the same num_gist_tokens, got 1, 4; use a"):
        inference_table(ROWS + other)


def test_losses_are_the_cells_without_gain() -> None:
    assert losses_table(ROWS).splitlines()[2:] == [
        "| 26 | 8 | time to the first token | prefix cache | 50.0 (49.0–51.0) | 50.0 (49.0–51.0) | 1.00x |",
        "| 26 | 8 | time to the first token | static prefix cache | 40.0 (39.0–41.0) | 50.0 (49.0–51.0) | 0.80x |",
        "| 26 | 8 | tokens per second | prefix cache | 41.0 (40.0–42.0) | 40.0 (39.0–41.0) | 0.98x |",
        "| 26 | 8 | tokens per second | static prefix cache | 40.0 (39.0–41.0) | 40.0 (39.0–41.0) | 1.00x |",
    ]
    assert losses_table(ROWS[:4]) == "None of the cells above."
