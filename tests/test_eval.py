"""Metrics, the three conditions, measured latency, result rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import gisting
from gisting import GistError, GistTokenizer, Record
from gisting.eval.conditions import evaluate
from gisting.eval.metrics import exact_match, rouge, rouge_l
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def model(tokenizer: GistTokenizer):
    return gisting.patch(tiny.model("llama"), tokenizer)


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_exact_match_by_eye() -> None:
    assert exact_match(["a b", " c\n", "d"], ["a b", "c", "D"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("split", [pytest.param("seen", marks=pytest.mark.slow), "human"])
@pytest.mark.parametrize(
    "condition", ["gist", *(pytest.param(f"{name}_control", marks=pytest.mark.slow) for name in ("pos", "neg"))]
)
def test_rouge_l_is_the_published_one(shared: Path, condition: str, split: str) -> None:
    """The published scores, computed again from the published outputs.

    The published number is the median of a bootstrap over the records, ours the mean that it estimates; 0.15 points are
    its noise.
    """
    folder = shared / "data" / "published_outputs"
    with (folder / "rouge.csv").open(encoding="utf-8") as file:
        (published,) = [
            float(row["value"])
            for row in csv.DictReader(file)
            if (row["model"], row["condition"], row["num_gist_tokens"], row["split"])
            == ("LLaMA", condition, "1", split)
        ]
    with (folder / f"LLaMA-{condition}-1-{split}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    score = 100 * rouge_l([row["y_pred"] for row in rows], [row["y_true"] for row in rows])
    assert score == pytest.approx(published, abs=0.15)


def test_rouge_by_eye() -> None:
    """By stemming, cats = cat. "the cat sat" and "the sat cat" share three words, no pair, and two words in order."""
    scores = rouge(["the cats sat", "x"], ["the sat cat", "y"])
    assert scores == {
        "rouge_1": [pytest.approx(1.0), 0.0],
        "rouge_2": [0.0, 0.0],
        "rouge_l": [pytest.approx(2 / 3), 0.0],
    }


def test_metric_errors() -> None:
    with pytest.raises(GistError, match="predictions and references must be equally many and at least 1, got 1 and 2"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(GistError, match="got 0 and 0"):
        rouge_l([], [])


# -- conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_evaluate_answers_as_generate_does(name: str) -> None:
    tokenizer = GistTokenizer(tiny.word_tokenizer(), "plain", is_encoder_decoder=name == "t5")
    model = gisting.patch(tiny.model(name), tokenizer)
    records = [Record(tiny.words(3 + n, n), tiny.words(1 + n % 3, 40 + n), "w1") for n in range(7)]
    done: list[int] = []
    results = evaluate(
        model, tokenizer, records, 2, max_new_tokens=5, batch_size=3, with_rouge=False, progress=done.append
    )
    assert [result.condition for result in results] == ["gist", "positive", "negative"]
    assert sum(done) == 21
    for result in results:
        expected = [
            gisting.generate(
                model,
                tokenizer,
                [record.input],
                prompts=[record.instruction],
                num_gist_tokens=2,
                condition=result.condition,
                max_new_tokens=5,
                do_sample=False,
            )[0]
            for record in records
        ]
        assert result.predictions == expected
        assert result.num_records == 7
        assert result.exact_match == exact_match(expected, ["w1"] * 7)
    assert results[0].predictions != results[2].predictions


def test_evaluate_wants_records(model, tokenizer: GistTokenizer) -> None:
    with pytest.raises(GistError, match="records is empty"):
        evaluate(model, tokenizer, [])
