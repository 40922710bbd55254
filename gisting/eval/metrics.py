"""Scores of predictions against references."""

from __future__ import annotations

from collections.abc import Sequence

from gisting.errors import GistError

__all__ = ["exact_match", "rouge_l"]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference, white space at the ends aside, in 0..1.

    Raises:
        GistError: the numbers differ, or there are none.
    """
    _check(predictions, references)
    return sum(a.strip() == b.strip() for a, b in zip(predictions, references, strict=True)) / len(references)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure with stemming, as the Gisting paper reports it, in 0..1.

    Raises:
        GistError: the numbers differ, there are none, or ``rouge-score`` is not installed (the ``eval`` extra).
    """
    _check(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise GistError("ROUGE needs the rouge-score package; run: pip install 'gisting[eval]'") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores)


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise GistError(
            f"predictions must be as many as references, and some, got {len(predictions)} and {len(references)}"
        )
