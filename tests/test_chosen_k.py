"""Without k, as many gist tokens as the model was trained with; another k is used and reported once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import gisting
from gisting.data.records import Record
from gisting.eval.conditions import evaluate
from gisting.store import GistStore
from gisting.tokens import GistTokenizer
from tests import tiny


def trained(k: list[int] | None, name: str = "llama") -> tuple[Any, GistTokenizer]:
    model, tokenizer = tiny.patched(name)
    if k is not None:
        model.config.gist = {**model.config.gist, "num_gist_tokens": k}
    return model, tokenizer


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("k", "expected"), [([3, 3], 3), ([2, 4], 4), (None, 1)], ids=["one", "a range", "not recorded"]
)
def test_without_k(k: list[int] | None, expected: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trained(k)
    cache = gisting.compress(*made, ["w1 w2", "w3"])
    assert cache.num_gist_tokens == [expected] * 2
    assert GistStore(tmp_path).get_or_compress(*made, ["w1 w2"]).num_gist_tokens == [expected]
    answers = gisting.generate(*made, ["w5", "w6"], cache=cache, max_new_tokens=8)
    assert gisting.generate(*made, ["w5", "w6"], prompts=["w1 w2", "w3"], max_new_tokens=8) == answers
    results = evaluate(*made, [Record("w1 w2", "w5", "w7")], conditions=["gist"], max_new_tokens=8, with_rouge=False)
    assert [(one.num_gist_tokens, one.predictions) for one in results] == [(expected, answers[:1])]
    assert warnings(caplog) == []


def test_without_k_in_an_encoder(caplog: pytest.LogCaptureFixture) -> None:
    made = trained([3, 3], "t5")
    for condition in ("gist", "positive"):
        how: dict[str, Any] = {"prompts": ["w1 w2"], "condition": condition, "max_new_tokens": 8}
        given: list[dict[str, Any]] = [{}, {"num_gist_tokens": 3}, {"num_gist_tokens": 1}]
        said = [gisting.generate(*made, ["w5"], **how, **settings) for settings in given]
        assert said[0] == said[1]
    assert len(warnings(caplog)) == 1


def test_another_k_is_reported_once_for_a_model(caplog: pytest.LogCaptureFixture) -> None:
    made = trained([2, 4])
    for _ in range(2):
        assert gisting.compress(*made, ["w1"], 8).num_gist_tokens == [8]
        gisting.compress(*made, ["w1", "w2", "w3"], [8, 2, 1])
        gisting.generate(*made, ["w5"], prompts=["w1"], num_gist_tokens=8, max_new_tokens=1)
        gisting.compress(*made, ["w1"], 3)
    told = "but the model was trained with 2 to 4, so its answers may be much worse; leave num_gist_tokens out"
    first, second = warnings(caplog)
    assert first.startswith(f"num_gist_tokens is 8, {told}")
    assert second.startswith(f"num_gist_tokens is 1, {told}")
    gisting.compress(*trained([1, 1]), ["w1"], 8)
    assert "num_gist_tokens is 8, but the model was trained with 1, so" in warnings(caplog)[2]


def test_another_k_of_a_model_without_a_record_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    gisting.compress(*trained(None), ["w1"], 8)
    assert warnings(caplog) == []
