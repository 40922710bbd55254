"""BLEU, by sacrebleu. (ROUGE and exact match are in tests/test_eval.py.)"""

from __future__ import annotations

import math
import sys

import pytest

from gisting import GistError
from gisting.eval.metrics import bleu, bleu_scores

CAT = "the cat sat on the mat"


def test_bleu_by_eye() -> None:
    """In "the cat sat on a mat", 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 fours are right. The lengths are
    equal, so there is no penalty.
    """
    expected = 100 * math.prod((5 / 6, 3 / 5, 2 / 4, 1 / 3)) ** (1 / 4)
    assert bleu(["the cat sat on a mat"], [CAT]) == pytest.approx(expected)
    assert bleu_scores(["the cat sat on a mat"], [CAT]) == [pytest.approx(expected)]


def test_short_predictions_are_penalised_and_long_ones_are_not() -> None:
    """All n-grams of "the cat sat on" are right, but it has 4 words instead of 6. The other way round, 4 of 6 words are
    right, and so on.
    """
    short = "the cat sat on"
    longer = 100 * math.prod((4 / 6, 3 / 5, 2 / 4, 1 / 3)) ** (1 / 4)
    for score in (bleu, lambda *texts: bleu_scores(*texts)[0]):
        assert score([short], [CAT]) == pytest.approx(100 * math.exp(1 - 6 / 4))
        assert score([CAT], [short]) == pytest.approx(longer)


def test_bleu_of_all_is_not_the_mean() -> None:
    """Together, 5 of 7 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 fours are right, in 7 words for 7."""
    predictions, references = ["the cat sat on a mat", "no"], [CAT, "yes"]
    assert bleu(predictions, references) == pytest.approx(100 * math.prod((5 / 7, 3 / 5, 2 / 4, 1 / 3)) ** (1 / 4))
    first, second = bleu_scores(predictions, references)
    assert first == pytest.approx(100 * math.prod((5 / 6, 3 / 5, 2 / 4, 1 / 3)) ** (1 / 4))
    assert second == 0


def test_extreme_values_of_bleu() -> None:
    assert bleu([CAT, "a b c d"], [CAT, "a b c d"]) == pytest.approx(100)
    assert bleu(["w x y z"], ["a b c d"]) == 0
    assert 0 < bleu(["a b y z"], ["a b c d"]) < 50, "no triple: smoothed, not 0"
    assert bleu(["find . -name a"], ["Find . -name a"]) < 100, "case counts"


def test_short_texts() -> None:
    """Two-word commands have no 4-grams: a corpus of nothing else has a BLEU of 0, but a single record does not."""
    assert bleu(["ls -l"], ["ls -l"]) == 0
    assert bleu_scores(["ls", "ls", ""], ["ls", "cd", "ls"]) == [pytest.approx(100), 0, 0]


def test_bleu_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for score in (bleu, bleu_scores):
        with pytest.raises(GistError, match="must be equally many and at least 1, got 1 and 2"):
            score(["a"], ["a", "b"])
        with pytest.raises(GistError, match="got 0 and 0"):
            score([], [])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(GistError, match=r"BLEU needs the sacrebleu package; run: pip install 'gist-tokens\[eval\]'"):
        bleu(["a"], ["a"])
