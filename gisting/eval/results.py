"""An evaluation as a value and as a file: the model, the data, the settings, and every answer with its scores.

Place in the flow: conditions -> **results** -> judge and report, which need nothing else. The file is JSON, so that any
program can read it. The means in it are for readers; on loading they are computed again from the scores of the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisting.data.records import Record, to_records
from gisting.errors import GistError
from gisting.eval.conditions import ConditionResult, evaluate
from gisting.eval.statistics import Interval, bootstrap
from gisting.models.fingerprint import fingerprint
from gisting.models.load import trained_num_gist_tokens
from gisting.storage import write_atomically
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gisting.eval.judge import Judge

__all__ = ["FORMAT", "Evaluation", "Judgement", "Split", "evaluate_splits"]

#: Version of the file format; increased when older files can no longer be read unchanged.
FORMAT = 1
_KIND = "gisting evaluation"


@dataclass(frozen=True)
class Split:
    """The records of one data set and the model's answers to them.

    Args:
        name: the name of the data set, such as ``"unseen"``.
        records: the records that were answered; their outputs are the references.
        prompt_tokens: for each record, the number of tokens before its gist, which are the ones that are compressed.
        results: one result for each k and condition.
    """

    name: str
    records: list[Record]
    prompt_tokens: list[int]
    results: list[ConditionResult]

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 of the records, in hex: of their four fields as a JSON list of lists, UTF-8."""
        rows = [[record.instruction, record.input, record.output, record.source] for record in self.records]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def counts(self) -> list[int]:
        """Every evaluated k, in ascending order."""
        return sorted({result.num_gist_tokens for result in self.results})

    @property
    def conditions(self) -> list[str]:
        """Every evaluated condition, in the order of the evaluation."""
        return list(dict.fromkeys(result.condition for result in self.results))

    def result(self, condition: str, num_gist_tokens: int) -> ConditionResult:
        """Find the result for a condition and k.

        Args:
            condition: a name in ``EVAL_CONDITIONS``.
            num_gist_tokens: k.

        Returns:
            The result.

        Raises:
            GistError: this combination was not evaluated.
        """
        for one in self.results:
            if (one.condition, one.num_gist_tokens) == (condition, num_gist_tokens):
                return one
        raise GistError(
            f"split {self.name!r} has no result for condition {condition!r} with k = {num_gist_tokens}; it has "
            f"{', '.join(self.conditions)} with k = {', '.join(map(str, self.counts))}"
        )


@dataclass(frozen=True)
class Judgement:
    """A judge's comparison of the answers of two conditions to the records of a split.

    Args:
        split: the name of the split.
        num_gist_tokens: k.
        first: the condition whose wins are counted.
        second: the condition it is compared with.
        judge: the name of the judge's model.
        scores: for each record, 1 if the first condition wins, 0.5 for a tie, 0 if the second wins, and None if the
            judge's reply had no verdict.
    """

    split: str
    num_gist_tokens: int
    first: str
    second: str
    judge: str
    scores: list[float | None]

    @property
    def num_unparsable(self) -> int:
        """The number of replies without a verdict, which count for neither condition."""
        return self.scores.count(None)

    @property
    def num_ties(self) -> int:
        """The number of ties."""
        return self.scores.count(0.5)

    def win_rate(self, **settings: Any) -> Interval | None:
        """The share of replies with a verdict that the first condition wins, ties counting half, with its interval.

        Args:
            **settings: as for :func:`gisting.eval.statistics.bootstrap`.

        Returns:
            The interval; None if no reply had a verdict.
        """
        read = [score for score in self.scores if score is not None]
        return bootstrap([read], **settings) if read else None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one model.

    Args:
        model: ``name``, ``fingerprint``, ``tokenizer`` (its fingerprint), ``template`` (its name) and
            ``num_gist_tokens``, the range with which the model says it was trained, or None.
        settings: how answers were generated, such as ``max_new_tokens``.
        environment: device, versions and commit.
        splits: the data sets with their results.
        judgements: the comparisons by a judge, if there are any.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    splits: list[Split]
    judgements: list[Judgement] = field(default_factory=list)

    def split(self, name: str) -> Split:
        """Find a split by its ``name``.

        Returns:
            The split.

        Raises:
            GistError: there is no such split.
        """
        for one in self.splits:
            if one.name == name:
                return one
        raise GistError(f"split must be one of {', '.join(one.name for one in self.splits)}, got {name!r}")

    def judged(
        self,
        judge: Judge,
        first: str = "gist",
        second: str = "positive",
        *,
        progress: Callable[[int], Any] | None = None,
    ) -> Evaluation:
        """Let a judge compare two conditions, for each split and k.

        Args:
            judge: the judge.
            first: the condition whose wins are counted.
            second: the condition it is compared with.
            progress: called with the number of records judged since the last call, from several threads.

        Returns:
            A copy of the evaluation with the judgements added.

        Raises:
            GistError: a condition was not evaluated, or as :meth:`gisting.eval.judge.Judge.compare`.
        """
        pairs = [
            (split, k, split.result(first, k).predictions, split.result(second, k).predictions)
            for split in self.splits
            for k in split.counts
        ]
        added = [
            Judgement(
                split.name, k, first, second, judge.model, judge.compare(split.records, one, other, progress=progress)
            )
            for split, k, one, other in pairs
        ]
        return replace(self, judgements=[*self.judgements, *added])

    def save(self, path: str | Path) -> None:
        """Write the evaluation to ``path``, completely or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        state = {
            "kind": _KIND,
            "format": FORMAT,
            "model": self.model,
            "settings": self.settings,
            "environment": self.environment,
            "splits": [
                {
                    "name": split.name,
                    "data_hash": split.data_hash,
                    "records": [asdict(record) for record in split.records],
                    "prompt_tokens": split.prompt_tokens,
                    "results": [
                        {**result.summary(), "scores": result.scores, "predictions": result.predictions}
                        for result in split.results
                    ],
                }
                for split in self.splits
            ],
            "judgements": [asdict(judgement) for judgement in self.judgements],
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(state, ensure_ascii=False, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read a file, ``path``, that :meth:`save` wrote.

        Returns:
            The evaluation.

        Raises:
            GistError: the file is not a complete results file, has another format, or its records are not the ones
                that were evaluated.
            OSError: the file cannot be read.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise GistError(f"{path} is not a results file: it is not JSON ({error})") from error
        if not isinstance(state, dict) or state.get("kind") != _KIND:
            raise GistError(f"{path} is not a results file; give a file written by `gisting eval --output`")
        if state.get("format") != FORMAT:
            raise GistError(
                f"{path} has format {state.get('format')}, this version reads {FORMAT}; upgrade gisting: pip install "
                "-U gist-tokens"
            )
        try:
            found = cls(
                state["model"],
                state["settings"],
                state["environment"],
                [_split(one, f"{path}, split {one['name']!r}") for one in state["splits"]],
                [Judgement(**one) for one in state["judgements"]],
            )
        except (KeyError, TypeError) as error:
            raise GistError(f"{path} is not a complete results file ({type(error).__name__}: {error})") from error
        return found


def evaluate_splits(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    splits: Mapping[str, Iterable[Record | Mapping[str, Any]]],
    num_gist_tokens: int | Sequence[int] | None = None,
    *,
    name: str,
    environment: Mapping[str, Any],
    conditions: Sequence[str] = tuple(CONDITIONS),
    chunk_length: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    with_rouge: bool = True,
    with_perplexity: bool = True,
    progress: Callable[[int], Any] | None = None,
    **generate_kwargs: Any,
) -> Evaluation:
    """Evaluate a model on several data sets with :func:`~gisting.eval.conditions.evaluate`.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        splits: the records of each data set by its name, as for ``evaluate``; a ``datasets.DatasetDict`` will do.
        num_gist_tokens: k, or several values; None as for :func:`gisting.compress`.
        name: what to call the model, such as the path it was loaded from.
        environment: device, versions and commit, as ``gisting.measure.rows.environment()`` gives them.
        conditions: names in ``EVAL_CONDITIONS``.
        chunk_length: as for ``evaluate``; recorded in the settings.
        max_new_tokens: maximum length of an answer.
        batch_size: number of records processed together.
        with_rouge: whether to compute ROUGE.
        with_perplexity: whether to compute perplexity.
        progress: called with the number of records answered since the last call.
        **generate_kwargs: passed to ``model.generate``; plain values, because they are written to the file.

    Returns:
        The evaluation, with everything that a results file contains.

    Raises:
        GistError: there are no splits, or as ``evaluate``.
    """
    if not splits:
        raise GistError("splits is empty; give at least one data set with a name")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, **generate_kwargs}
    if chunk_length is not None:
        settings["chunk_length"] = chunk_length
    evaluated = []
    for split, given in splits.items():
        records = to_records(given, tokenizer)
        results = evaluate(
            model,
            tokenizer,
            records,
            num_gist_tokens,
            conditions=conditions,
            with_rouge=with_rouge,
            with_perplexity=with_perplexity,
            progress=progress,
            **settings,
        )
        encodings = tokenizer.encode_prompts([record.instruction for record in records], 1)
        evaluated.append(Split(split, records, [encoding.num_prompt_tokens for encoding in encodings], results))
    trained = trained_num_gist_tokens(model)
    about = {
        "name": name,
        "fingerprint": fingerprint(model),
        "tokenizer": tokenizer.fingerprint,
        "template": tokenizer.template.name,
        "num_gist_tokens": None if trained is None else list(trained),
    }
    return Evaluation(about, settings, dict(environment), evaluated)


def _split(state: dict[str, Any], where: str) -> Split:
    results = [
        ConditionResult(one["condition"], one["num_gist_tokens"], one["predictions"], one["scores"])
        for one in state["results"]
    ]
    split = Split(state["name"], [Record(**one) for one in state["records"]], state["prompt_tokens"], results)
    if split.data_hash != state["data_hash"]:
        raise GistError(f"{where} contains other records than were evaluated (their hash differs); evaluate again")
    for result in results:
        if {len(result.predictions), *map(len, result.scores.values())} != {len(split.records)}:
            raise GistError(
                f"{where}, condition {result.condition!r} must have one prediction and one value of each score for "
                f"each of the {len(split.records)} records; evaluate again"
            )
    return split
