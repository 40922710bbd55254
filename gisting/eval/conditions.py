"""A model under the three conditions of the paper: gist, positive control, negative control.

The positive control bounds what a gist can reach, the negative control shows what the model knows without the prompt;
a gist is worth the share of the gap between them that it closes (Gisting, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gisting.data.records import Record
from gisting.errors import GistError
from gisting.eval.metrics import exact_match, rouge_l
from gisting.generation import generate
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ConditionResult", "evaluate"]


@dataclass(frozen=True)
class ConditionResult:
    """Scores of one condition, in 0..1, and what the model said."""

    condition: str
    num_records: int
    exact_match: float
    rouge_l: float | None
    predictions: list[str]


def evaluate(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    num_gist_tokens: int = 1,
    *,
    conditions: Sequence[str] = tuple(CONDITIONS),
    max_new_tokens: int = 128,
    batch_size: int = 32,
    with_rouge: bool = True,
    progress: Callable[[int], Any] | None = None,
    **generate_kwargs: Any,
) -> list[ConditionResult]:
    """Answer every record under each condition, greedily unless told otherwise, from caches.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        records: what to answer; the output is the reference.
        num_gist_tokens: k.
        conditions: names, each gives a result.
        max_new_tokens: length of an answer.
        batch_size: records at once.
        with_rouge: also ROUGE-L (needs the ``eval`` extra).
        progress: called with the number of records answered since the last call.
        **generate_kwargs: for ``model.generate``.

    Returns:
        A result for each condition.

    Raises:
        GistError: there is no record, or as :func:`gisting.generate`.
    """
    if not records:
        raise GistError("records is empty; give at least one")
    references = [record.output for record in records]
    results = []
    for condition in conditions:
        predictions: list[str] = []
        for start in range(0, len(records), batch_size):
            part = records[start : start + batch_size]
            predictions += generate(
                model,
                tokenizer,
                [record.input for record in part],
                prompts=[record.instruction for record in part],
                num_gist_tokens=num_gist_tokens,
                condition=condition,
                max_new_tokens=max_new_tokens,
                **{"do_sample": False, "num_beams": 1, **generate_kwargs},
            )
            if progress is not None:
                progress(len(part))
        rouge = rouge_l(predictions, references) if with_rouge else None
        results.append(
            ConditionResult(condition, len(records), exact_match(predictions, references), rouge, predictions)
        )
    return results
