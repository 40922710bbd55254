"""Ten thousand prompts: the store opens in less than a second, and a batch of 64 is returned in less than 5 ms."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.__main__ import run
from benchmarks.store import measure, store_table
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.measure.rows import read_rows
from gisting.store import GistStore
from gisting.table import GistTable


@pytest.mark.parametrize("num_caches", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_prompts(num_caches: int, tmp_path: Path) -> None:
    """The bounds are what a store promises. They are met by far, so that a busy machine does not fail them."""
    row = measure("tiny", tmp_path / "store", num_caches=num_caches, repeats=15)
    assert row.open_ms < 1000
    assert row.gather_ms < 5
    with GistStore(tmp_path / "store") as store:
        assert len(store) == num_caches
        assert row.file_bytes == sum(entry.num_bytes for entry in store.list())
        assert row.state_bytes == store["prompt 0"].num_bytes


def test_rows_and_table(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    words = f"--output {output} --caches 70 --repeats 2 --shapes tiny --storage int8"
    assert run(["store", *words.split()]) == 0
    (row,) = read_rows(output)
    assert (row["num_caches"], row["storage"], row["num_repeats"], row["batch_size"]) == (70, "int8", 2, 64)
    assert row["state_bytes"] == 2 * 3 * 2 * 4 * 8 * 4  # keys and values, layers, heads, k, head size, bytes
    assert json.dumps(row)
    lines = store_table([row]).splitlines()
    assert lines[2].startswith("| 70 | 1.5 KiB | int8 | ")
    assert lines[-1].startswith("k = 4, random batches by name")


def test_no_time_is_reported_of_wrong_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = GistTable.gather

    def gather(self: GistTable, rows: list[str]) -> GistCache:
        return inner(self, [*rows[1:], rows[0]])

    monkeypatch.setattr(GistTable, "gather", gather)
    with pytest.raises(GistError, match=r"^gather: the states differ from what was put in; no time is reported$"):
        measure("tiny", tmp_path / "store", num_caches=70, repeats=1)


def test_an_unknown_shape(tmp_path: Path) -> None:
    with pytest.raises(GistError, match=r"^shape must be one of tiny, small, got 'huge'$"):
        measure("huge", tmp_path / "store")


def test_a_row_of_one_repeat(tmp_path: Path) -> None:
    row = asdict(measure("small", tmp_path / "store", num_caches=3, repeats=1))
    assert row["files_ms_low"] == row["files_ms"] == row["files_ms_high"] > 0
