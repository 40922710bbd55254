"""A model under the conditions of the paper, two baselines without gist tokens, and the prompt as ordinary text.

Place in the flow: records -> answers and the loss of the references -> scores of each record. The positive control
bounds what a gist can reach, the negative control shows what the model knows without the prompt; a gist is worth the
share of the gap between them that it keeps (Gisting, section 5). What the rows of a record's answer can see:

    gist         k gist tokens, then the input
    positive     prompt and gist tokens, then the input
    negative     the input, at the place that it has behind a gist
    truncated    the first k tokens of the instruction in place of the gist tokens: the baseline of equal cost
    no-prompt    the input alone
    prompt       the whole instruction, then the input; where there is no instruction, the input alone

The first three are what :mod:`gisting.visibility` says. The others are ordinary texts without gist tokens, so a
patched model runs them as it did before. With the prompt, that is the template's text, its gist left out; without, what
the tokenizer puts before every text (``<s>``), the k tokens of the instruction, split alone and without the template's
words around it, and the template's continuation. An encoder that would be left without any token reads the end of
sequence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gisting.data.collate import IGNORED, GistCollator
from gisting.data.plain import plain_batch, plain_sources
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.eval.metrics import exact_matches, rouge
from gisting.eval.statistics import Interval, bootstrap
from gisting.generation import generate
from gisting.models.mode import evaluating
from gisting.models.patch import require_patched
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BASELINES", "EVAL_CONDITIONS", "METRICS", "ConditionResult", "Metric", "evaluate"]

#: Ordinary texts without gist tokens: as many tokens of the instruction as a gist has, and none.
BASELINES = ("truncated", "no-prompt")
#: All that an evaluation can run.
EVAL_CONDITIONS = (*CONDITIONS, *BASELINES, "prompt")
# What the answer sees does not depend on k, so it is run once for all k.
_WITHOUT_K = ("negative", "no-prompt", "prompt")
# No sequence is cut: a loss of a part would not be the reference's.
_NO_LIMIT = 1 << 30


class Metric(NamedTuple):
    """How a number comes from the scores of records: a statistic of the means of some columns.

    Args:
        needs: the score that must have been asked for.
        columns: from scores by name, the columns whose means are taken, a number for each record in each.
        statistic: from means, float64 ``(columns, R)``, R numbers.
    """

    needs: str
    columns: Callable[[Mapping[str, list[float]]], list[list[float]]]
    statistic: Callable[[Tensor], Tensor]


def _mean_of(name: str) -> Metric:
    return Metric(name, lambda scores: [scores[name]], lambda means: means[0])


def _ratio(above: str, below: str, outer: Callable[[Tensor], Tensor] = lambda ratio: ratio) -> Metric:
    return Metric(above, lambda scores: [scores[above], scores[below]], lambda means: outer(means[0] / means[1]))


#: What is reported. ``exact_match`` and ROUGE are means in 0..1. ``perplexity`` is exp of the mean loss over all tokens
#: of all references, ``record_perplexity`` exp of the mean over records of their mean loss, so that long references
#: count no more than short ones; both with the end of sequence. Lengths are means over answers, without it; ``_ratio``
#: is the length of all answers over that of all references.
METRICS: dict[str, Metric] = {
    **{name: _mean_of(name) for name in ("exact_match", "rouge_1", "rouge_2", "rouge_l")},
    "perplexity": _ratio("nll", "nll_tokens", torch.exp),
    "record_perplexity": Metric(
        "nll",
        lambda scores: [[a / b for a, b in zip(scores["nll"], scores["nll_tokens"], strict=True)]],
        lambda means: means[0].exp(),
    ),
    "tokens": _mean_of("tokens"),
    "tokens_ratio": _ratio("tokens", "reference_tokens"),
    "characters": _mean_of("characters"),
    "characters_ratio": _ratio("characters", "reference_characters"),
}


@dataclass(frozen=True)
class ConditionResult:
    """What a model said under one condition, and the scores of every record.

    Args:
        condition: a name of ``EVAL_CONDITIONS``.
        num_gist_tokens: k.
        predictions: the answers, in the records' order.
        scores: by name, a number for each record: ``exact_match``; ``tokens``, ``characters``, ``reference_tokens`` and
            ``reference_characters``; where asked for, ``rouge_1``, ``rouge_2`` and ``rouge_l`` in 0..1, and ``nll``,
            the loss of the reference summed over its ``nll_tokens``, in nats.
    """

    condition: str
    num_gist_tokens: int
    predictions: list[str]
    scores: dict[str, list[float]]

    @property
    def num_records(self) -> int:
        """How many records were answered."""
        return len(self.predictions)

    @property
    def exact_match(self) -> float:
        """Share of answers that equal their reference, in 0..1."""
        return self.interval("exact_match", num_resamples=1).value

    @property
    def rouge_l(self) -> float | None:
        """Mean ROUGE-L (Lin, 2004) in 0..1, or None where it was not asked for."""
        return self.interval("rouge_l", num_resamples=1).value if "rouge_l" in self.scores else None

    @property
    def metrics(self) -> list[str]:
        """The names of ``METRICS`` for which there are scores."""
        return [name for name, metric in METRICS.items() if metric.needs in self.scores]

    def interval(self, metric: str, **settings: Any) -> Interval:
        """A metric with its interval over resampled records.

        Args:
            metric: a name of ``METRICS``.
            **settings: as for :func:`gisting.eval.statistics.bootstrap`.

        Raises:
            GistError: there are no scores for it.
        """
        if metric not in self.metrics:
            raise GistError(f"metric must be one that was scored, {', '.join(self.metrics)}, got {metric!r}")
        _, columns, statistic = METRICS[metric]
        return bootstrap(columns(self.scores), statistic, **settings)

    def summary(self) -> dict[str, Any]:
        """Condition, k, number of records and every metric; a perplexity too large for a number is None."""
        found = {name: self.interval(name, num_resamples=1).value for name in self.metrics}
        return {
            "condition": self.condition,
            "num_gist_tokens": self.num_gist_tokens,
            "num_records": self.num_records,
            **{name: value if math.isfinite(value) else None for name, value in found.items()},
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    num_gist_tokens: int | Sequence[int] = 1,
    *,
    conditions: Sequence[str] = tuple(CONDITIONS),
    chunk_length: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    with_rouge: bool = True,
    with_perplexity: bool = False,
    progress: Callable[[int], Any] | None = None,
    **generate_kwargs: Any,
) -> list[ConditionResult]:
    """Answer every record under each condition, greedily unless told otherwise; gist and controls from caches.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        records: what to answer; the output is the reference.
        num_gist_tokens: k, or several, each of which is evaluated.
        conditions: names of ``EVAL_CONDITIONS``, each gives a result for each k.
        chunk_length: as for :func:`gisting.generate`, for a model that was trained in chunks.
        max_new_tokens: length of an answer.
        batch_size: records at once.
        with_rouge: also ROUGE (needs the ``eval`` extra).
        with_perplexity: also the loss of the references, with teacher forcing.
        progress: called with the number of records answered since the last call; there are as many for each k and
            condition.
        **generate_kwargs: for ``model.generate``.

    Returns:
        A result for each k and, within it, each condition. Those of ``"negative"``, ``"no-prompt"`` and ``"prompt"``
        are the same for every k.

    Raises:
        GistError: there is no record, a condition or k cannot be, or as :func:`gisting.generate`.
    """
    counts = [num_gist_tokens] if isinstance(num_gist_tokens, int) else list(num_gist_tokens)
    _check(model, tokenizer, records, counts, conditions, batch_size)
    results: list[ConditionResult] = []
    for k in counts:
        for condition in conditions:
            same = [one for one in results if one.condition == condition and condition in _WITHOUT_K]
            if same:
                results.append(replace(same[0], num_gist_tokens=k))
                if progress is not None:
                    progress(len(records))
                continue
            run = _Run(model, tokenizer, condition, k, chunk_length)
            predictions: list[str] = []
            losses: list[tuple[float, float]] = []
            for start in range(0, len(records), batch_size):
                part = records[start : start + batch_size]
                predictions += run.answers(part, max_new_tokens, generate_kwargs)
                losses += run.losses(part) if with_perplexity else []
                if progress is not None:
                    progress(len(part))
            scores = _scores(tokenizer, predictions, [record.output for record in records], with_rouge)
            if with_perplexity:
                scores |= {"nll": [nll for nll, _ in losses], "nll_tokens": [number for _, number in losses]}
            results.append(ConditionResult(condition, k, predictions, scores))
    return results


@dataclass(frozen=True)
class _Run:
    """A model under one condition."""

    model: Any
    tokenizer: GistTokenizer
    condition: str
    k: int
    chunk_length: int | None

    def answers(self, records: Sequence[Record], max_new_tokens: int, generate_kwargs: dict[str, Any]) -> list[str]:
        settings = {"do_sample": False, "num_beams": 1, **generate_kwargs}
        if self.condition in CONDITIONS:
            return generate(
                self.model,
                self.tokenizer,
                [record.input for record in records],
                prompts=[record.instruction for record in records],
                num_gist_tokens=self.k,
                condition=self.condition,
                chunk_length=self.chunk_length,
                max_new_tokens=max_new_tokens,
                **settings,
            )
        config: Any = copy.deepcopy(settings.pop("generation_config", None) or self.model.generation_config)
        extra = config.update(**settings)
        suppressed = {*(config.suppress_tokens or ()), self.tokenizer.gist_token_id}
        config.update(max_new_tokens=max_new_tokens, suppress_tokens=sorted(suppressed))
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        batch = self._plain(self._sources(records))
        with evaluating(self.model):
            said = self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config, **extra
            )
        start = 0 if self.tokenizer.is_encoder_decoder else batch["input_ids"].shape[1]
        return [self.tokenizer.decode(row).strip() for row in said[:, start:].tolist()]

    def losses(self, records: Sequence[Record]) -> list[tuple[float, float]]:
        """For each record, the summed loss of its reference in nats, and its number of tokens."""
        batch = self._taught(records)
        numbers = (batch["labels"] != IGNORED).sum(-1)
        width = int(numbers.max())
        # All that is asked of labels is asked before they lie on a card: the only read from it is that of the sums.
        batch = {name: tensor.to(input_weight(self.model).device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        # Not inference mode, in which nothing is remembered of a mask: every layer would plan it again.
        with evaluating(self.model), torch.no_grad():
            if self.tokenizer.is_encoder_decoder:
                targets = labels
                shifted = self.model.prepare_decoder_input_ids_from_labels(labels)
                logits = self.model(**batch, decoder_input_ids=shifted, use_cache=False).logits
            else:
                # Completions end in the last column; a token is predicted one column before it stands.
                targets = labels[:, labels.shape[1] - width :]
                logits = self.model(**batch, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
            # Row by row: float32 logits of a batch of a large vocabulary take gigabytes.
            sums = [
                cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="sum")
                for row, target in zip(logits, targets, strict=True)
            ]
            found: list[float] = torch.stack(sums).tolist()
        return list(zip(found, numbers.double().tolist(), strict=True))

    def _taught(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """Inputs of a forward pass with the references after them, and ``labels``, on the CPU."""
        if self.condition in CONDITIONS:
            collator = GistCollator(
                self.tokenizer,
                self.k,
                conditions=self.condition,
                chunk_length=self.chunk_length,
                max_length=_NO_LIMIT,
                max_target_length=_NO_LIMIT,
            )
            # The collator draws k and condition, of one each here; whoever trains meanwhile keeps their random numbers.
            with torch.random.fork_rng(devices=[]):
                return collator(records)
        sources = self._sources(records)
        answers = self.tokenizer.encode_completions(
            [record.input for record in records], [record.output for record in records]
        )
        return plain_batch(self.tokenizer, sources, answers)

    def _sources(self, records: Sequence[Record]) -> list[list[int]]:
        """The ids of a text without gist tokens, up to where the answer begins."""
        tokenizer, inputs = self.tokenizer, [record.input for record in records]
        if self.condition == "truncated":
            before = [ids[: self.k] for ids in tokenizer.encode_texts([record.instruction for record in records])]
            behind = tokenizer.encode_continuations(inputs)
            sources = [tokenizer.start_ids + first + rest for first, rest in zip(before, behind, strict=True)]
        else:
            is_shown = self.condition == "prompt"
            sources = plain_sources(tokenizer, [record.instruction if is_shown else "" for record in records], inputs)
        for record, source in zip(records, sources, strict=True):
            if not source and tokenizer.is_encoder_decoder:
                source.append(tokenizer.eos_token_id)
            elif not source:
                raise GistError(
                    f"condition {self.condition!r} leaves nothing for the model to continue in a record without input "
                    f"({record.instruction!r}); give an input, or a template with text there"
                )
        return sources

    def _plain(self, rows: list[list[int]]) -> dict[str, Tensor]:
        device = input_weight(self.model).device
        ids, is_token = pad_rows(rows, self.tokenizer.pad_token_id, left=not self.tokenizer.is_encoder_decoder)
        return {"input_ids": ids.to(device), "attention_mask": is_token.long().to(device)}


def _scores(
    tokenizer: GistTokenizer, predictions: list[str], references: list[str], with_rouge: bool
) -> dict[str, list[float]]:
    def lengths(texts: list[str]) -> list[float]:
        return [float(len(ids)) for ids in tokenizer.encode_texts(texts)]

    return {
        "exact_match": exact_matches(predictions, references),
        **(rouge(predictions, references) if with_rouge else {}),
        "tokens": lengths(predictions),
        "characters": [float(len(text)) for text in predictions],
        "reference_tokens": lengths(references),
        "reference_characters": [float(len(text)) for text in references],
    }


def _check(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    counts: Sequence[int],
    conditions: Sequence[str],
    batch_size: int,
) -> None:
    require_patched(model, tokenizer)
    if not records:
        raise GistError("records is empty; give at least one")
    if batch_size < 1:
        raise GistError(f"batch_size must be at least 1, got {batch_size}")
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise GistError(f"num_gist_tokens must be at least 1, or different such numbers, got {counts}")
    unknown = [name for name in conditions if name not in EVAL_CONDITIONS]
    if unknown or not conditions:
        raise GistError(
            f"condition must be one of {', '.join(EVAL_CONDITIONS)}, got {unknown[0] if unknown else 'none'!r}"
        )
