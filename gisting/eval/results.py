"""One evaluation as a value and as a file: which model, which data, which settings, and every answer with its scores.

Place in the flow: conditions -> **results** -> judge and report, which need nothing but this. The file is JSON, for any
program to read; means stand in it for readers, and are computed from the scores of the records when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisting.data.records import Record
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

#: Goes up when a file of the version before cannot be read as it stands.
FORMAT = 1
_KIND = "gisting evaluation"


@dataclass(frozen=True)
class Split:
    """The records of one data set and what the model said to them.

    Args:
        name: ``"unseen"``, ...
        records: what was asked; the output is the reference.
        prompt_tokens: for each record, the tokens in front of its gist: what is compressed.
        results: one for each k and condition.
    """

    name: str
    records: list[Record]
    prompt_tokens: list[int]
    results: list[ConditionResult]

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 over the records, in hex: their four fields as a JSON list of lists, UTF-8."""
        rows = [[record.instruction, record.input, record.output, record.source] for record in self.records]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def counts(self) -> list[int]:
        """Every k, in order."""
        return sorted({result.num_gist_tokens for result in self.results})

    @property
    def conditions(self) -> list[str]:
        """Every condition, in the order of the evaluation."""
        return list(dict.fromkeys(result.condition for result in self.results))

    def result(self, condition: str, num_gist_tokens: int) -> ConditionResult:
        """What was said under a condition with a k.

        Args:
            condition: a name of ``EVAL_CONDITIONS``.
            num_gist_tokens: k.

        Raises:
            GistError: it was not evaluated.
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
    """What a judge said about the answers of two conditions to the records of a split.

    Args:
        split: its name.
        num_gist_tokens: k.
        first: the condition whose wins are counted.
        second: the condition that it is compared with.
        judge: the judge's model.
        scores: for each record 1 where the first wins, 0.5 for a tie, 0 where the second wins, and None where the
            judge's reply could not be read.
    """

    split: str
    num_gist_tokens: int
    first: str
    second: str
    judge: str
    scores: list[float | None]

    @property
    def num_unparsable(self) -> int:
        """Replies that could not be read, which count neither way."""
        return self.scores.count(None)

    @property
    def num_ties(self) -> int:
        """Records to which both answers are equally good."""
        return self.scores.count(0.5)

    def win_rate(self, **settings: Any) -> Interval | None:
        """Wins and half the ties over the replies that could be read, with its interval; None if there is none.
        ``settings`` as for :func:`gisting.eval.statistics.bootstrap`.
        """
        read = [score for score in self.scores if score is not None]
        return bootstrap([read], **settings) if read else None


@dataclass(frozen=True)
class Evaluation:
    """A model's evaluation.

    Args:
        model: ``name``, ``fingerprint``, ``tokenizer`` (its fingerprint), ``template`` (its name) and
            ``num_gist_tokens``, the range that it says it was trained with, or None.
        settings: of the answers: ``max_new_tokens``, ...
        environment: device, versions and commit.
        splits: the data sets.
        judgements: what a judge said, if one was asked.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    splits: list[Split]
    judgements: list[Judgement] = field(default_factory=list)

    def split(self, name: str) -> Split:
        """A split by its ``name``.

        Raises:
            GistError: there is none.
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
        """The same evaluation with a judge's comparison of two conditions for each split and k.

        Args:
            judge: whom to ask.
            first: the condition whose wins are counted.
            second: the condition that it is compared with.
            progress: called with the number of records judged since the last call, from several threads.

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
        """Write the file ``path``, whole or not at all.

        Raises:
            OSError: it cannot be written.
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
        """The evaluation that :meth:`save` wrote to ``path``.

        Raises:
            GistError: it is no such file, of a later format, or its records are not those that were evaluated.
            OSError: it cannot be read.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise GistError(f"{path} is no results file: it is not JSON ({error})") from error
        if not isinstance(state, dict) or state.get("kind") != _KIND:
            raise GistError(f"{path} is no results file; give one that `gisting eval --output` wrote")
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
            raise GistError(f"{path} is no complete results file ({type(error).__name__}: {error})") from error
        return found


def evaluate_splits(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    splits: Mapping[str, Sequence[Record]],
    num_gist_tokens: int | Sequence[int] = 1,
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
    """:func:`~gisting.eval.conditions.evaluate` for several data sets, and all that a results file says.

    Args:
        model: as for ``evaluate``, and all others that are not named here.
        tokenizer: the tokenizer it was patched for.
        splits: records by the name of their data set.
        num_gist_tokens: k, or several.
        name: what to call the model: where it was loaded from.
        environment: what to say of device, versions and commit: ``gisting.measure.rows.environment()``.
        conditions: names of ``EVAL_CONDITIONS``.
        chunk_length: as for ``evaluate``; the settings say it.
        max_new_tokens: length of an answer.
        batch_size: records at once.
        with_rouge: also ROUGE.
        with_perplexity: also perplexity.
        progress: called with the number of records answered since the last call.
        **generate_kwargs: for ``model.generate``; plain values, since they are written to the file.

    Raises:
        GistError: there is no split, or as ``evaluate``.
    """
    if not splits:
        raise GistError("splits is empty; give at least one data set with its name")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, **generate_kwargs}
    if chunk_length is not None:
        settings["chunk_length"] = chunk_length
    evaluated = []
    for split, records in splits.items():
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
        evaluated.append(Split(split, list(records), [encoding.num_prompt_tokens for encoding in encodings], results))
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
        raise GistError(f"{where} holds other records than were evaluated: their hash differs; evaluate them again")
    for result in results:
        if {len(result.predictions), *map(len, result.scores.values())} != {len(split.records)}:
            raise GistError(
                f"{where}, condition {result.condition!r} must have one prediction and score for each of "
                f"{len(split.records)} records"
            )
    return split
