"""``evaluating``: eval mode inside, the former modes afterwards, also with several threads on one model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import gisting
from gisting.models import mode
from gisting.models.mode import evaluating
from tests import tiny


def test_blocks_that_overlap() -> None:
    """The first thread leaves while the second is inside, which enters when the model is in eval mode already."""
    model = tiny.model("llama").train()
    head: Any = model.get_output_embeddings()
    head.eval()  # one module that the user keeps in eval mode
    entered, left = threading.Event(), threading.Event()
    seen = []

    def second() -> None:
        with evaluating(model):
            entered.set()
            left.wait(10)
            seen.append(any(module.training for module in model.modules()))

    thread = threading.Thread(target=second)
    with evaluating(model):
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    assert seen == [False]
    assert model.training
    assert not head.training
    assert all(module.training for module in model.modules() if module is not head)
    assert not mode._inside


def test_a_block_in_a_block_and_an_error() -> None:
    model = tiny.model("llama").train()
    with evaluating(model):
        with pytest.raises(ZeroDivisionError), evaluating(model, model):
            raise ZeroDivisionError
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
    assert not mode._inside


def test_threads_answer_with_a_model_in_train_mode() -> None:
    model, tokenizer = tiny.patched("llama", attention_dropout=0.5)
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 2)
    inputs = [f"w{number} w{number + 1}" for number in range(6)]

    def answer(text: str) -> str:
        return gisting.generate(model, tokenizer, [text], cache=cache, max_new_tokens=8, min_new_tokens=8)[0]

    expected = [answer(text) for text in inputs]
    model.train()
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(answer, inputs * 3))
    assert found == expected * 3
    assert all(module.training for module in model.modules())
