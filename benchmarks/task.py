"""Scores on the built-in task, for the benchmarks that train :func:`gisting.demo.task_model` on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gisting.data.records import Record
from gisting.demo import ANSWERS_AT_ONCE
from gisting.eval.conditions import evaluate
from gisting.eval.statistics import Interval
from gisting.tokens import GistTokenizer

__all__ = ["CONDITIONS", "MIXED_CONDITIONS", "SPLITS", "task_accuracy"]

SPLITS = ("seen", "unseen")
CONDITIONS = ("positive", "gist", "negative")
#: Each training row draws its condition with these weights, so that the same model also serves as the positive control.
MIXED_CONDITIONS = {"gist": 3, "positive": 1}


def task_accuracy(
    model: Any, tokenizer: GistTokenizer, splits: Mapping[str, list[Record]], num_gist_tokens: int, length: int
) -> dict[str, Interval]:
    """Return the exact match by ``split/condition``.

    Args:
        model: a trained model.
        tokenizer: the tokenizer it was patched for.
        splits: records by name.
        num_gist_tokens: k.
        length: maximum number of tokens of an answer.
    """
    model.eval()
    return {
        f"{split}/{result.condition}": result.interval("exact_match")
        for split, records in splits.items()
        for result in evaluate(
            model,
            tokenizer,
            records,
            num_gist_tokens,
            conditions=CONDITIONS,
            max_new_tokens=length,
            batch_size=ANSWERS_AT_ONCE,
            with_rouge=False,
        )
    }
