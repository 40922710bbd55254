"""Score predictions against references: one number per record, and for BLEU also one number for all records.

Place in the flow: texts in, numbers out, independent of any model. Averaging is left to reports, because intervals
(``statistics.py``) need the scores of the records. ROUGE (Lin, 2004, aclanthology.org/W04-1013) is computed by
``rouge-score``, BLEU (Papineni et al., 2002, aclanthology.org/P02-1040) by ``sacrebleu``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gisting.errors import GistError

__all__ = ["ROUGE", "bleu", "bleu_scores", "exact_match", "exact_matches", "rouge", "rouge_l"]

#: Names of the ROUGE metrics here, and their names in ``rouge-score``.
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Score each prediction 1 if it equals its reference, ignoring white space at both ends, else 0.

    Args:
        predictions: answers, one for each reference.
        references: the expected answers, in the same order.

    Returns:
        A score for each prediction.

    Raises:
        GistError: the numbers of predictions and references differ, or there are none.
    """
    _check(predictions, references)
    return [float(a.strip() == b.strip()) for a, b in zip(predictions, references, strict=True)]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Compute the mean of :func:`exact_matches`. Arguments and errors are as for that function."""
    scores = exact_matches(predictions, references)
    return sum(scores) / len(scores)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Compute ROUGE-1, ROUGE-2 and ROUGE-L: F-measures of the decoded texts with stemming, as in the Gisting paper.

    Args:
        predictions: answers, one for each reference.
        references: the expected answers, in the same order.

    Returns:
        For each name in ``ROUGE``, a score in 0..1 for each prediction.

    Raises:
        GistError: the numbers of predictions and references differ, there are none, or ``rouge-score`` is not
            installed (the ``eval`` extra).
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
    """Compute the mean ROUGE-L of :func:`rouge`. Arguments and errors are as for that function."""
    scores = rouge(predictions, references)["rouge_l"]
    return sum(scores) / len(scores)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Compute the BLEU of all predictions together.

    The settings are sacrebleu's defaults: 13a tokens, case-sensitive, exponential smoothing. N-grams are counted over
    all records before dividing, so this is not the mean of :func:`bleu_scores`.

    Args:
        predictions: answers, one for each reference.
        references: the expected answers, in the same order.

    Returns:
        A score in 0..100; 0 if no prediction has four tokens.

    Raises:
        GistError: the numbers of predictions and references differ, there are none, or ``sacrebleu`` is not installed
            (the ``eval`` extra).
    """
    _check(predictions, references)
    return _sacrebleu().corpus_bleu(list(predictions), [list(references)]).score


def bleu_scores(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Compute the smoothed BLEU of each prediction by itself, with sacrebleu. Arguments as for :func:`bleu`.

    A text of fewer than four tokens is scored over the n-grams that it has.

    Returns:
        A score in 0..100 for each prediction.

    Raises:
        GistError: as for :func:`bleu`.
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
            f"predictions and references must be equally many and at least 1, got {len(predictions)} and "
            f"{len(references)}"
        )
