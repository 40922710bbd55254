"""The table of what low-bit storage costs, from a checkpoint of the demo."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import storage as bench
from benchmarks.__main__ import run
from gisting.cache import GistCache
from gisting.data.records import Record
from gisting.data.tasks import LetterTask
from gisting.errors import GistError
from gisting.measure.rows import read_rows
from gisting.models.load import load
from gisting.storage import STORAGES
from gisting.tokens import GistTokenizer
from tests import tiny

RECORDS = LetterTask().records("unseen", 20, 1)


@pytest.fixture(scope="module")
def trained(demo_checkpoint: Path) -> tuple[PreTrainedModel, GistTokenizer]:
    return load(demo_checkpoint)


@pytest.fixture(scope="module")
def rows(trained: tuple[PreTrainedModel, GistTokenizer]) -> dict[str, bench.StorageRow]:
    found = bench.measure(*trained, RECORDS)
    assert [row.storage for row in found] == list(STORAGES)
    return {row.storage: row for row in found}


def test_bytes(rows: dict[str, bench.StorageRow]) -> None:
    """3 layers x keys and values x k 2 x 128 numbers; 4 heads each with a scale of 4 bytes."""
    numbers, scales = 3 * 2 * 2 * 128, 3 * 2 * 4 * 4
    assert {name: row.tensor_bytes for name, row in rows.items()} == {
        "float32": 4 * numbers,
        "bfloat16": 2 * numbers,
        "float16": 2 * numbers,
        "float8_e4m3": numbers + scales,
        "int8": numbers + scales,
    }
    assert all(row.tensor_bytes + 500 < row.file_bytes < row.tensor_bytes + 3000 for row in rows.values())


def test_errors(rows: dict[str, bench.StorageRow]) -> None:
    """No error where nothing is lost; the fewer bits, the larger it is."""
    exact = rows["float32"]
    assert (exact.logit_error_mean, exact.logit_error_max, exact.kl) == (0, 0, 0)
    by_error = sorted(STORAGES, key=lambda name: rows[name].logit_error_mean)
    assert by_error == ["float32", "float16", "bfloat16", "int8", "float8_e4m3"]
    for row in rows.values():
        assert row.logit_error_mean <= row.logit_error_max < row.logit_mean
        assert -1e-6 < row.kl < 0.01
        assert (row.num_records, row.num_prompts, row.num_gist_tokens) == (20, len({r.instruction for r in RECORDS}), 2)
        assert row.num_places == sum(len(record.output.split()) + 1 for record in RECORDS)


def test_logits_are_those_of_the_whole_text(trained: tuple[PreTrainedModel, GistTokenizer]) -> None:
    """Cached, ragged and padded, against one record at a time from the text, without a cache."""
    from gisting.generation import compress
    from gisting.visibility import gist

    model, tokenizer = trained
    records = [RECORDS[0], Record(RECORDS[1].instruction, "a b", "c d e f g", "unseen"), RECORDS[2]]
    cache = compress(model, tokenizer, [record.instruction for record in records], [2, 1, 2])
    expected = []
    for record, k in zip(records, cache.num_gist_tokens, strict=True):
        encoding = tokenizer.encode(record.instruction, record.input, record.output, num_gist_tokens=k)
        ids = torch.tensor([encoding.input_ids])
        visibility = gist(ids == tokenizer.gist_token_id)
        with torch.no_grad():
            logits = model(
                ids, attention_mask=visibility.as_attention_mask(), position_ids=visibility.position_ids
            ).logits
        expected.append(logits[0, encoding.completion_start - 1 : -1])
    torch.testing.assert_close(
        bench._logits(model, tokenizer, cache, records), torch.cat(expected), atol=1e-4, rtol=1e-4
    )


def test_exact_match_counts_right_answers(
    trained: tuple[PreTrainedModel, GistTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[record.output for record in RECORDS[:3]] + ["no"], ["no"] * 4] + [
        ["no", RECORDS[1].output, "", "a"]
    ] * 3
    outputs = iter(answers)
    monkeypatch.setattr(bench, "generate", lambda *_, **__: next(outputs))
    assert [row.exact_match for row in bench.measure(*trained, RECORDS[:4])] == [0.75, 0, 0.25, 0.25, 0.25]


def test_gate(trained: tuple[PreTrainedModel, GistTokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """States that come back changed by one bit in one place: nothing is reported."""
    load_file = GistCache.load

    def altered(path: Path) -> GistCache:
        cache = load_file(path)
        cache.values[0].mul_(1 + 2**-20)
        return cache

    monkeypatch.setattr(GistCache, "load", altered)
    with pytest.raises(
        GistError, match=r"^storage 'float32', which keeps every bit, changes a logit by .*; nothing is"
    ):
        bench.measure(*trained, RECORDS[:2])


def test_what_is_not_measured(trained: tuple[PreTrainedModel, GistTokenizer]) -> None:
    with pytest.raises(GistError, match=r"^records is empty; pass at least one$"):
        bench.measure(*trained, [])
    with pytest.raises(GistError, match=r"^measure compares logits after a decoder's cache, which an encoder-decoder"):
        bench.measure(*tiny.patched("t5"), RECORDS)
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match=r"^the model's dtype must be one of the storages, got float64; load it"):
        bench.measure(model.double(), tokenizer, RECORDS)


def test_command_and_table(demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["storage", str(demo_checkpoint), "--output", str(tmp_path / "rows.jsonl"), "--records", "4"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in STORAGES)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["storage"] for row in rows] == list(STORAGES)
    assert all(row["model"].startswith("llama/") and math.isfinite(row["kl"]) and row["torch"] for row in rows)
    table = bench.storage_table(rows).splitlines()
    assert table[0] == ("| storage | file bytes | of which states | logit error, mean | max | KL, nats | exact match |")
    assert table[1] == "|---|---|---|---|---|---|---|"
    assert table[2].startswith("| float32 | ")
    assert " | 6,144 | 0 | 0 | 0 | 0.0 % |" in table[2]
    assert len(table) == 2 + len(STORAGES) + 2
    assert "k = 2; 4 records of instructions that training never used, " in table[-1]
