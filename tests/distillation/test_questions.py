"""Questions that the model writes: what is asked for, and what is kept of what it writes."""

from __future__ import annotations

import re
from collections import Counter
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


@pytest.mark.parametrize("num_parts", [5, 100])
def test_no_part_of_the_prompt_is_left_out(num_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long prompt, parts from everywhere are asked about; of a short one all, and equally often."""
    writer = Written(["Is it #?", "", "Is it # again?", "What is #?", "Why #?", "How #?", "Who #?"])
    monkeypatch.setattr(questions, "sample_answers", writer)
    prompt = " ".join(f"Part {number:03} is {'a word ' * 15}long." for number in range(num_parts))
    found = write_questions(*tiny.patched("llama"), prompt, 96)
    assert len(found) == 96
    rows = [int(re.findall(r"\d+", text)[0]) for text in found]
    requests = [writer.pairs[row][1] for row in rows[:64]]
    places = Counter(int(re.findall(r"Part (\d+)", request)[0]) for request in requests)
    if num_parts == 100:
        assert len(places) == 64
        assert max(places) > 80
    else:
        assert set(places) == set(range(5))
        assert max(places.values()) - min(places.values()) <= 1
    assert all(20 < sum(words in request for request in requests) < 44 for words in ("question", "request"))
    ordinary = " ".join(writer.pairs[row][1] for row in rows[64:])
    assert all(f"short {kind} about" in ordinary for kind in ("question", "request", "message"))
    requests, writer.pairs = writer.pairs, []
    write_questions(*tiny.patched("llama"), prompt, 96)
    assert writer.pairs == requests, "the seed decides"


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
