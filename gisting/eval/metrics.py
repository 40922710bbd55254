"""Scores of predictions against references, one number for each record; BLEU also one for all of them.

Place in the flow: texts in, numbers out; knows no model. Means stay with whoever reports them: intervals
(``statistics.py``) need the scores of the records. ROUGE is Lin's (2004, aclanthology.org/W04-1013) as ``rouge-score``
computes it, BLEU that of Papineni and others (2002, aclanthology.org/P02-1040) as ``sacrebleu`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gisting.errors import GistError

__all__ = ["ROUGE", "bleu", "bleu_scores", "exact_match", "exact_matches", "rouge", "rouge_l"]

#: Our names of the published metrics, and the names that ``rouge-score`` has for them.
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each prediction that equals its reference, white space at the ends aside, else 0.

    Args:
        predictions: answers, one for each reference.
        references: what they should have been, in the same order.

    Raises:
        GistError: the numbers differ, or there are none.
    """
    _check(predictions, references)
    return [float(a.strip() == b.strip()) for a, b in zip(predictions, references, strict=True)]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean of :func:`exact_matches`. Arguments and errors as there."""
    scores = exact_matches(predictions, references)
    return sum(scores) / len(scores)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """ROUGE-1, ROUGE-2 and ROUGE-L: F-measures with stemming of the decoded texts, as the Gisting paper scores them.

    Args:
        predictions: answers, one for each reference.
        references: what they should have been, in the same order.

    Returns:
        For each name of ``ROUGE``, a score in 0..1 for each prediction.

    Raises:
        GistError: the numbers differ, there are none, or ``rouge-score`` is not installed (the ``eval`` extra).
    """
    _check(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise GistError("ROUGE needs the rouge-score package; run: pip install 'gist-tokens[eval]'") from error
    scorer = RougeScorer([*ROUGE.values()], use_stemmer=True)
    scores = [scorer.score(b, a) for a, b in zip(predictions, references, strict=True)]
    return {name: [score[theirs].fmeasure for score in scores] for name, theirs in ROUGE.items()}


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean ROUGE-L of :func:`rouge`. Arguments and errors as there."""
    scores = rouge(predictions, references)["rouge_l"]
    return sum(scores) / len(scores)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all predictions together, by sacrebleu with its own settings (13a tokens, case, exponential smoothing).

    N-grams are counted over all records before anything is divided, so this is no mean of :func:`bleu_scores`.

    Args:
        predictions: answers, one for each reference.
        references: what they should have been, in the same order.

    Returns:
        A score in 0..100; 0 where no prediction has four tokens.

    Raises:
        GistError: the numbers differ, there are none, or ``sacrebleu`` is not installed (the ``eval`` extra).
    """
    _check(predictions, references)
    return _sacrebleu().corpus_bleu(list(predictions), [list(references)]).score


def bleu_scores(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """BLEU of each prediction by itself, by sacrebleu, smoothed; where a text is shorter than four tokens, of the
    n-grams that it has. Arguments as :func:`bleu`.

    Returns:
        A score in 0..100 for each prediction.

    Raises:
        GistError: as :func:`bleu`.
    """
    _check(predictions, references)
    sentence_bleu = _sacrebleu().sentence_bleu
    return [sentence_bleu(a, [b]).score for a, b in zip(predictions, references, strict=True)]


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise GistError("BLEU needs the sacrebleu package; run: pip install 'gist-tokens[eval]'") from error
    return sacrebleu


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise GistError(
            f"predictions must be as many as references, and some, got {len(predictions)} and {len(references)}"
        )
