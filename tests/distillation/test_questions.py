"""Questions that the model writes: what is asked for, and what is kept of what it writes."""

from __future__ import annotations

from typing import Any

import pytest

from gisting import GistError
from gisting.distillation import distill, questions
from gisting.distillation.questions import parts_of, write_questions
from gisting.generation.sampling import SampledAnswer
from tests import tiny

PROMPT = "You are Ada, who sells hats. " * 5 + "\n\nThe shop opens at nine.\nHats cost £5. Be brief!"


def test_parts_hold_every_word() -> None:
    parts = parts_of(PROMPT)
    assert " ".join(parts).split() == PROMPT.split()
    assert len(parts) == 2
    assert all(len(part.split()) <= 35 for part in parts)
    assert parts_of("one word " * 50) == [("one word " * 50).strip()]  # a sentence is not cut


class Written:
    """Stands for the sampling of a model that follows instructions."""

    def __init__(self, outputs: list[str]) -> None:
        self.outputs, self.pairs = outputs, []

    def __call__(self, model: Any, tokenizer: Any, pairs: list[tuple[str, str]], **settings: Any) -> Any:
        self.pairs += pairs
        outputs = self.outputs
        return [
            SampledAnswer(*pair, outputs[row % len(outputs)].replace("#", str(row)), [5])
            for row, pair in enumerate(pairs)
        ]


def test_two_thirds_are_about_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of the prompt is asked about; quotation marks, numbers and doubles go."""
    writer = Written(
        ['"When do you open on day #?"\nmore', "1. What is #?", "", "Question: Is it #?", "same", "x" * 300]
    )
    monkeypatch.setattr(questions, "sample_answers", writer)
    model, tokenizer = tiny.patched("llama")
    found = write_questions(model, tokenizer, PROMPT, 12)
    assert found[:4] == ["When do you open on day 0?", "What is 1?", "Is it 3?", "same"]
    assert len(found) == len(set(found)) == 11
    requests = [request for _, request in writer.pairs]
    for part in parts_of(PROMPT):
        assert sum(part in request for request in requests) >= 8
    assert sum("an assistant" in request and '"' not in request for request in requests) == 8


def test_too_few_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "sample_answers", Written(["", "a b c"]))
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match=r"the model wrote 1 questions that can be used, .* give inputs"):
        write_questions(model, tokenizer, PROMPT, 12)


def test_a_distillation_without_inputs_writes_them_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    writer = Written(["w# w1"])
    monkeypatch.setattr(questions, "sample_answers", writer)
    quick = {"num_answers": 8, "max_new_tokens": 4, "steps": 2, "directory": tmp_path}
    prompt = " ".join(f"w{number}" for number in range(3, 15))
    first = distill(*tiny.patched("llama"), prompt, None, 4, **quick)
    about = first.cache.about[0]
    assert about is not None
    assert about["distilled"]["self_study"] is True
    asked = len(writer.pairs)
    again = distill(*tiny.patched("llama"), prompt, None, 4, **quick)
    assert len(writer.pairs) == asked > 100
    assert again.history == first.history
    assert "questions" in first.seconds
    assert "questions" not in again.seconds
