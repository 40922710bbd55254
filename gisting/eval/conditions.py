"""Evaluate a model under the paper's three conditions, with the gist of another prompt, and without gist tokens.

Place in the flow: records -> answers and the loss of the references -> scores of each record. The positive control
bounds what a gist can reach; the negative control shows what the model can do without the prompt. The share of the gap
between them that a gist keeps measures how good it is (Gisting, section 5). Part of that may be style that any gist of
this model gives; the swapped control shows how much. What an answer sees:

    gist         k gist tokens, then the input
    swapped      the k gist tokens of another record's instruction, then the input
    positive     prompt and gist tokens, then the input
    negative     the input alone, at the positions it has after a gist
    truncated    the first k tokens of the instruction in place of the gist tokens: the baseline of equal cost
    no-prompt    the input alone
    prompt       the whole instruction, then the input; without an instruction, the input alone

``swapped`` takes the next record with a different instruction, after the last one the first again. ``positive`` and
``negative`` are defined in :mod:`gisting.visibility`. The last three are ordinary texts without gist tokens, which a
patched model runs as it did before it was patched. ``prompt`` is the template's text without the gist. ``truncated``
and ``no-prompt`` are the start ids (``<s>``, if the tokenizer adds it), the k tokens of the instruction (tokenised by
itself, without the template's words around it) or none, and the template's continuation. An encoder that would
otherwise have no token reads the end of sequence. Under the template ``"chat"`` all of them are conversations: for
``truncated`` with a system message of k tokens, for ``no-prompt`` and ``negative`` without one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gisting.cache import CacheOrigin, GistCache
from gisting.data.collate import IGNORED, GistCollator
from gisting.data.plain import plain_batch, plain_sources
from gisting.data.records import Record, to_records
from gisting.errors import GistError
from gisting.eval.metrics import exact_matches, rouge
from gisting.eval.statistics import Interval, bootstrap
from gisting.generation import generate
from gisting.generation.answers import answer_from
from gisting.generation.checks import chosen_k, listed
from gisting.generation.compression import compress_encodings
from gisting.models.mode import evaluating
from gisting.models.state import end_with, require_patched
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import ChatTemplate, GistTokenizer
from gisting.visibility import CONDITIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BASELINES",
    "DEFAULT_CONDITIONS",
    "EVAL_CONDITIONS",
    "METRICS",
    "ConditionResult",
    "Metric",
    "default_conditions",
    "evaluate",
]

#: Ordinary texts without gist tokens: as many tokens of the instruction as a gist has, and none.
BASELINES = ("truncated", "no-prompt")
#: All conditions that an evaluation can run.
EVAL_CONDITIONS = (*CONDITIONS, "swapped", *BASELINES, "prompt")
#: What ``gisting eval`` runs unless told otherwise.
DEFAULT_CONDITIONS = ("gist", "positive", "prompt", "negative", "swapped")
# What the answer sees does not depend on k, so each is run once for all k.
_WITHOUT_K = ("negative", "no-prompt", "prompt")
# No sequence is cut: the loss of a part is not the loss of the reference.
_NO_LIMIT = 1 << 30


class Metric(NamedTuple):
    """How a metric is computed from the scores of the records: as a statistic of the means of some columns.

    Args:
        needs: name of the score without which the metric cannot be computed.
        columns: selects from the scores by name the columns to average; each has one number per record.
        statistic: maps means, float64 ``(columns, R)``, to R numbers.
    """

    needs: str
    columns: Callable[[Mapping[str, list[float]]], list[list[float]]]
    statistic: Callable[[Tensor], Tensor]


def _mean_of(name: str) -> Metric:
    return Metric(name, lambda scores: [scores[name]], lambda means: means[0])


def _ratio(above: str, below: str, outer: Callable[[Tensor], Tensor] = lambda ratio: ratio) -> Metric:
    return Metric(above, lambda scores: [scores[above], scores[below]], lambda means: outer(means[0] / means[1]))


#: The metrics that are reported. ``exact_match`` and ROUGE are means in 0..1. ``perplexity`` is exp of the mean loss
#: over all tokens of all references; ``record_perplexity`` is exp of the mean over records of each record's mean loss,
#: so that long references count no more than short ones. Both include the end of sequence. Lengths are means over the
#: answers and exclude it; ``_ratio`` is the total length of the answers divided by that of the references.
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
    """The answers of a model under one condition, and the scores of every record.

    Args:
        condition: a name of ``EVAL_CONDITIONS``.
        num_gist_tokens: k.
        predictions: the answers, in the order of the records.
        scores: by name, one number per record: ``exact_match``, ``tokens``, ``characters``, ``reference_tokens`` and
            ``reference_characters``; if requested, ``rouge_1``, ``rouge_2`` and ``rouge_l`` in 0..1, and ``nll``, the
            loss of the reference in nats, summed over its ``nll_tokens``.
    """

    condition: str
    num_gist_tokens: int
    predictions: list[str]
    scores: dict[str, list[float]]

    @property
    def num_records(self) -> int:
        """The number of records that were answered."""
        return len(self.predictions)

    @property
    def exact_match(self) -> float:
        """The share of answers that equal their reference, in 0..1."""
        return self.interval("exact_match", num_resamples=1).value

    @property
    def rouge_l(self) -> float | None:
        """The mean ROUGE-L (Lin, 2004) in 0..1, or None if it was not requested."""
        return self.interval("rouge_l", num_resamples=1).value if "rouge_l" in self.scores else None

    @property
    def metrics(self) -> list[str]:
        """The names in ``METRICS`` for which there are scores."""
        return [name for name, metric in METRICS.items() if metric.needs in self.scores]

    def interval(self, metric: str, **settings: Any) -> Interval:
        """Compute a metric with its interval over resampled records.

        Args:
            metric: a name in ``METRICS``.
            **settings: as for :func:`gisting.eval.statistics.bootstrap`.

        Returns:
            The value with its interval.

        Raises:
            GistError: the metric was not scored.
        """
        if metric not in self.metrics:
            raise GistError(f"metric must be one of those scored ({', '.join(self.metrics)}), got {metric!r}")
        _, columns, statistic = METRICS[metric]
        return bootstrap(columns(self.scores), statistic, **settings)

    def summary(self) -> dict[str, Any]:
        """Return condition, k, number of records and every metric's value; None for a perplexity that overflows."""
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
    records: Iterable[Record | Mapping[str, Any]],
    num_gist_tokens: int | Sequence[int] | None = None,
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
    """Answer every record under each condition and score the answers.

    Decoding is greedy by default. The gist and control conditions are answered from caches; a prompt that is needed for
    ``gist`` and ``swapped`` is compressed once.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        records: the records to answer, or mappings with the same keys, as a list or ``datasets.Dataset``; their outputs
            are the references.
        num_gist_tokens: k, or several values, each of which is evaluated; None as for :func:`gisting.compress`.
        conditions: names in ``EVAL_CONDITIONS``.
        chunk_length: as for :func:`gisting.generate`, for a model that was trained in chunks.
        max_new_tokens: maximum length of an answer.
        batch_size: number of records processed together.
        with_rouge: whether to compute ROUGE (needs the ``eval`` extra).
        with_perplexity: whether to compute the loss of the references, with teacher forcing.
        progress: called with the number of records answered since the last call; every record counts once for each k
            and condition.
        **generate_kwargs: passed to ``model.generate``.

    Returns:
        A result for each k and, within it, each condition. The results of ``"negative"``, ``"no-prompt"`` and
        ``"prompt"`` are the same for every k.

    Raises:
        GistError: there are no records, a condition or k is invalid, ``"swapped"`` finds no second instruction, or as
            :func:`gisting.generate`.
    """
    require_patched(model, tokenizer)
    records, conditions = to_records(records, tokenizer), listed("conditions", conditions, "names")
    chosen = chosen_k(model, num_gist_tokens)
    counts = [chosen] if isinstance(chosen, int) else list(chosen)
    _check(records, counts, conditions, batch_size)
    shown = {name: _swapped(records) if name == "swapped" else records for name in conditions}
    results: list[ConditionResult] = []
    for k in counts:
        gists = _Gists(model, tokenizer, k, chunk_length)
        known = {one.condition: one for one in results if one.condition in _WITHOUT_K}
        wanted = [name for name in dict.fromkeys(conditions) if name not in known]
        runs = [_Run(model, tokenizer, name, k, chunk_length, gists) for name in wanted]
        predictions: dict[str, list[str]] = {name: [] for name in conditions}
        losses: dict[str, list[tuple[float, float]]] = {name: [] for name in conditions}
        for start in range(0, len(records), batch_size):
            # All conditions of a batch before the next, so that the gists of its instructions are still there.
            for run in runs:
                part = shown[run.condition][start : start + batch_size]
                predictions[run.condition] += run.answers(part, max_new_tokens, generate_kwargs)
                losses[run.condition] += run.losses(part) if with_perplexity else []
                if progress is not None:
                    progress(len(part))
        for name in conditions:
            if name in known:
                results.append(replace(known[name], num_gist_tokens=k))
                if progress is not None:
                    progress(len(records))
                continue
            scores = _scores(tokenizer, predictions[name], [record.output for record in records], with_rouge)
            if with_perplexity:
                scores |= {"nll": [nll for nll, _ in losses[name]], "nll_tokens": [count for _, count in losses[name]]}
            results.append(ConditionResult(name, k, predictions[name], scores))
    return results


def default_conditions(*splits: Sequence[Record]) -> tuple[str, ...]:
    """Return ``DEFAULT_CONDITIONS``, without ``"swapped"`` if all records of a split have the same instruction.

    Args:
        *splits: the records of each split.
    """
    is_mixed = all(len({record.instruction for record in records}) > 1 for records in splits)
    return tuple(name for name in DEFAULT_CONDITIONS if is_mixed or name != "swapped")


def _swapped(records: Sequence[Record]) -> list[Record]:
    """Return the records with the instruction of the next record that has a different one."""
    found: list[Record] = []
    other = 0
    for row, record in enumerate(records):
        other = max(other, row + 1)
        while records[other % len(records)].instruction == record.instruction:
            other += 1
            if other - row >= len(records):
                raise GistError(
                    f"condition 'swapped' takes the gist of another record's instruction, but all {len(records)} "
                    "records have the same; leave it out, or use `gisting check`, which compares the gist of one "
                    "prompt with that of another"
                )
        found.append(replace(record, instruction=records[other % len(records)].instruction))
    return found


class _Gists:
    """The gists of a batch's instructions, each compressed once for all conditions that read it."""

    def __init__(self, model: Any, tokenizer: GistTokenizer, k: int, chunk_length: int | None) -> None:
        self.model, self.tokenizer, self.k, self.chunk_length = model, tokenizer, k, chunk_length
        self.kept: dict[str, GistCache] = {}

    def of(self, instructions: Sequence[str]) -> GistCache:
        """Return a cache of one prompt for each instruction."""
        missing = [text for text in dict.fromkeys(instructions) if text not in self.kept]
        if missing:
            encodings = self.tokenizer.encode_prompts(missing, self.k, self.chunk_length)
            # The caller never sees this cache, and the fingerprint of a large model takes time.
            made = compress_encodings(self.model, self.tokenizer, encodings, CacheOrigin("", "", "", "gist"))
            self.kept |= dict(zip(missing, [*made], strict=True))
        self.kept = {text: self.kept[text] for text in dict.fromkeys(instructions)}
        return GistCache.cat([self.kept[text] for text in instructions])


@dataclass(frozen=True)
class _Run:
    """Run a model under one condition."""

    model: Any
    tokenizer: GistTokenizer
    condition: str
    k: int
    chunk_length: int | None
    gists: _Gists

    @property
    def mask(self) -> str:
        """The condition in ``CONDITIONS`` under which it runs, if it has gist tokens."""
        return "gist" if self.condition == "swapped" else self.condition

    def answers(self, records: Sequence[Record], max_new_tokens: int, generate_kwargs: dict[str, Any]) -> list[str]:
        settings = {"do_sample": False, "num_beams": 1, **generate_kwargs}
        inputs = [record.input for record in records]
        if self.mask == "gist":
            cache = self.gists.of([record.instruction for record in records])
            return answer_from(self.model, self.tokenizer, inputs, cache, max_new_tokens=max_new_tokens, **settings)
        if self.condition in CONDITIONS:
            return generate(
                self.model,
                self.tokenizer,
                inputs,
                prompts=[record.instruction for record in records],
                num_gist_tokens=self.k,
                condition=self.condition,
                chunk_length=self.chunk_length,
                max_new_tokens=max_new_tokens,
                **settings,
            )
        given = settings.pop("generation_config", None)
        is_end_given = "eos_token_id" in settings or getattr(given, "eos_token_id", None) is not None
        config: Any = copy.deepcopy(given or self.model.generation_config)
        extra = config.update(**settings)
        suppressed = {*(config.suppress_tokens or ()), self.tokenizer.gist_token_id}
        config.update(max_new_tokens=max_new_tokens, suppress_tokens=sorted(suppressed))
        if not is_end_given:
            end_with(config, self.tokenizer)
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
        """For each record, the summed loss of its reference in nats and the number of its tokens."""
        batch = self._taught(records)
        numbers = (batch["labels"] != IGNORED).sum(-1)
        width = int(numbers.max())
        # The labels are inspected before they go to an accelerator: the sums are all that is read back from it.
        batch = {name: tensor.to(input_weight(self.model).device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        # Not inference mode: there, nothing derived from a mask is remembered, and every layer would plan it again.
        with evaluating(self.model), torch.no_grad():
            if self.tokenizer.is_encoder_decoder:
                targets = labels
                shifted = self.model.prepare_decoder_input_ids_from_labels(labels)
                logits = self.model(**batch, decoder_input_ids=shifted, use_cache=False).logits
            else:
                # Completions end in the last column; each token is predicted in the column before its own.
                targets = labels[:, labels.shape[1] - width :]
                logits = self.model(**batch, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
            # Row by row, because a whole batch's float32 logits over a large vocabulary take gigabytes.
            sums = [
                cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="sum")
                for row, target in zip(logits, targets, strict=True)
            ]
            found: list[float] = torch.stack(sums).tolist()
        return list(zip(found, numbers.double().tolist(), strict=True))

    def _taught(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """Inputs of a forward pass over the records with their references, and ``labels``, on the CPU."""
        if self.mask in CONDITIONS:
            collator = GistCollator(
                self.tokenizer,
                self.k,
                conditions=self.mask,
                chunk_length=self.chunk_length,
                max_length=_NO_LIMIT,
                max_target_length=_NO_LIMIT,
            )
            # The collator samples k and condition, although there is only one of each here; a training run around this
            # evaluation must not lose random numbers to it.
            with torch.random.fork_rng(devices=[]):
                return collator(records)
        sources = self._sources(records)
        answers = self.tokenizer.encode_completions(
            [record.input for record in records], [record.output for record in records]
        )
        return plain_batch(self.tokenizer, sources, answers)

    def _sources(self, records: Sequence[Record]) -> list[list[int]]:
        """Ids of the records as text without gist tokens, up to where the answer begins."""
        tokenizer, inputs = self.tokenizer, [record.input for record in records]
        if self.condition == "truncated":
            prompts = [tokenizer.as_text(record.instruction) for record in records]
            before = [ids[: self.k] for ids in tokenizer.encode_texts(prompts)]
            after = tokenizer.encode_continuations(inputs)
            start = tokenizer.start_ids
            if isinstance(tokenizer.template, ChatTemplate):  # a system message, cut short
                start = tokenizer.encode_texts([tokenizer.template.prompt.partition("{prompt}")[0]])[0]
            sources = [start + first + rest for first, rest in zip(before, after, strict=True)]
        else:
            is_shown = self.condition == "prompt"
            sources = plain_sources(tokenizer, [record.instruction if is_shown else "" for record in records], inputs)
        for record, source in zip(records, sources, strict=True):
            if not source and tokenizer.is_encoder_decoder:
                source.append(tokenizer.eos_token_id)
            elif not source:
                raise GistError(
                    f"condition {self.condition!r} leaves no text for the model to continue in a record without input "
                    f"({record.instruction!r}); give it an input, or use a template whose continuation has text"
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


def _check(records: Sequence[Record], counts: Sequence[int], conditions: Sequence[str], batch_size: int) -> None:
    if not records:
        raise GistError("records is empty; give at least one record")
    if batch_size < 1:
        raise GistError(f"batch_size must be at least 1, got {batch_size}")
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise GistError(f"num_gist_tokens must be a number of at least 1, or several different ones, got {counts}")
    unknown = [name for name in conditions if name not in EVAL_CONDITIONS]
    if unknown or not conditions:
        raise GistError(
            f"condition must be one of {', '.join(EVAL_CONDITIONS)}, got {unknown[0] if unknown else 'none'!r}"
        )
