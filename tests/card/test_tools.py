"""Measurements and the doctor on a GPU: they name it, wait for it where time or memory is read, and find no fault."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gisting import Record, doctor
from gisting.eval.conditions import evaluate
from gisting.internalize.shorteners import SelfInformation
from gisting.measure import latency, memory
from gisting.measure.rows import environment
from tests import tiny
from tests.card.both import Place

pytestmark = pytest.mark.card
RECORDS = [Record("w1 w2 w3", "w4", "w5 w6"), Record("w7 w8", "w9 w10", "w11"), Record("w7", "w3 w8 w1", "w11 w12 w13")]


def test_doctor(place: Place) -> None:
    """The doctor compares every device with the reference, so this is also the shortest check of the kernels."""
    found = doctor.examine_here()
    assert [finding for finding in found if finding.is_fault and finding.topic in ("devices", "attention")] == []
    names = {finding.name for finding in found if finding.topic == "attention"}
    assert any(name.startswith(place.device.type) for name in names)


def test_rows_name_the_card(place: Place) -> None:
    name = environment(place.device)["device"]
    assert ("CPU cores" in name) is not place.is_card


def test_latency(place: Place) -> None:
    model, tokenizer = tiny.patched("llama")
    model.to(place.device)  # pyright: ignore[reportArgumentType]
    rows = latency.first_token(model, tokenizer, tiny.words(9, 1), tiny.words(3, 2), 2, repeats=1, warmup=1)
    assert len(rows) == 3


def test_memory(place: Place) -> None:
    free = memory.free_bytes(place.device)
    assert free is not None
    assert free > 0
    size = 2**20  # a multiple of the blocks of every allocator
    peak = memory.peak_of_allocator(place.device, lambda: torch.empty(size, dtype=torch.uint8, device=place.device))
    assert peak == size


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_evaluation(name: str, place: Place) -> None:
    model, tokenizer = tiny.patched(name)
    there: Any = copy.deepcopy(model).to(place.device)  # pyright: ignore[reportArgumentType]
    settings: Any = {"max_new_tokens": 4, "with_rouge": False, "with_perplexity": True}
    found, wanted = (evaluate(which, tokenizer, RECORDS, 2, **settings) for which in (there, model))
    for one, other in zip(found, wanted, strict=True):
        assert one.condition == other.condition
        assert one.scores["nll"] == pytest.approx(other.scores["nll"], rel=1e-3)


def test_self_information(place: Place) -> None:
    model, tokenizer = tiny.patched("llama")
    there: Any = copy.deepcopy(model).to(place.device)  # pyright: ignore[reportArgumentType]
    texts = [SelfInformation(which, tokenizer).shorten(tiny.words(12, 1), 0.5) for which in (there, model)]
    assert texts[0] == texts[1]
