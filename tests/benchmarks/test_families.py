"""The sweep over every model type: what it finds, and what the committed rows hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import families
from benchmarks.families import FamilyRow, examine, families_table, model_types
from gisting.measure.rows import read_rows
from gisting.models.check import Comparison, ModelCheck


@pytest.mark.parametrize(
    ("kind", "model_type", "verdict", "check"),
    [
        ("decoder", "arcee", "right", ""),
        ("decoder", "cohere2", "right", ""),
        ("decoder", "ministral3", "refused", "positions"),
        ("decoder", "gptj", "refused", "positions"),
        ("decoder", "gpt_oss", "right", ""),
        ("decoder", "bart", "refused", "cache"),
        ("decoder", "phimoe", "refused", "window"),
        ("decoder", "mamba", "refused", "config"),
        ("encoder-decoder", "t5", "right", ""),
        ("encoder-decoder", "bart", "refused", "positions"),
        ("encoder-decoder", "glmasr", "right", ""),  # a decoder that reads sound
    ],
)
def test_types(kind: str, model_type: str, verdict: str, check: str) -> None:
    row = examine(kind, model_type)
    assert (row.verdict, row.check) == (verdict, check), row
    assert row.reason or verdict == "right"


def test_what_is_accepted_and_not_exact_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer texts do not believe the check."""
    passed = ModelCheck("any", (Comparison("mask", "", 0.0, 1.0),))
    monkeypatch.setattr(families.gisting, "check_model", lambda model: passed)
    monkeypatch.setattr(families.gisting, "patch", lambda *args: families_patch(*args, check=False))
    row = examine("decoder", "phimoe")
    assert row.verdict == "WRONG"
    assert row.error is not None
    assert row.error > 0.01


def families_patch(*args: Any, **kwargs: Any) -> Any:
    from gisting.models.patch import patch

    return patch(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "part"), [("decoder", 0), ("decoder", 1), ("decoder", 2), ("decoder", 3), ("encoder-decoder", 0)]
)
def test_no_type_is_accepted_and_wrong(kind: str, part: int) -> None:
    names = model_types(kind)[part::4] if kind == "decoder" else model_types(kind)
    rows = [examine(kind, name) for name in names]
    assert [row for row in rows if row.verdict == "WRONG"] == []
    # 47 decoder types at least, over all parts.
    floor = (12, 12, 11, 12)[part] if kind == "decoder" else 3
    assert sum(row.verdict == "right" for row in rows) >= floor


def test_the_committed_rows_hold_what_is_promised() -> None:
    rows = read_rows(Path(__file__).resolve().parents[2] / "docs" / "results" / "families.jsonl")
    assert [row["model_type"] for row in rows if row["verdict"] == "WRONG"] == []
    assert sum(row["kind"] == "decoder" and row["verdict"] == "right" for row in rows) >= 45
    assert all(row["reason"] for row in rows if row["verdict"] != "right")


def test_table() -> None:
    about = {"torch": "2.13.0", "transformers": "5.24.0"}
    rows = [
        {**about, **vars(FamilyRow("decoder", "llama", "right"))},
        {**about, **vars(FamilyRow("decoder", "gpt2", "refused", "positions", "absolute"))},
        {**about, **vars(FamilyRow("encoder-decoder", "t5", "right"))},
    ]
    assert families_table(rows).splitlines()[:6] == [
        "Decoders, 2 types of torch 2.13.0, transformers 5.24.0:",
        "",
        "| verdict | types | which |",
        "|---|---|---|",
        "| right | 1 | llama |",
        "| WRONG | 0 |  |",
    ]
