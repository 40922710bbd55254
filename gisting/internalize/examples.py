"""Which solved examples stand in a query's prompt: the most similar ones of the training split, without leaks.

Place in the flow: training records, a query -> **examples** -> a stage's data. Similar is what BM25 (Robertson and
Zaragoza, 2009) says of the queries (the records' inputs). An example that gives the answer away teaches a model to
copy, so what is nearly the record itself never is one. Knows texts and nothing of tokens or prompts.

Two texts are *nearly the same* where few of their words differ: words are runs of letters and digits, compared without
regard to case, punctuation and white space, and the edit distance over words (Levenshtein: put in, left out, replaced)
is at most ``1 - near_duplicate`` of the longer text's words. At 0.9::

    list all files in the folder , newest first , please now      10 words
    List all files in the folder, newest first; please now!       0 edits: nearly the same
    list all files in the folder , oldest first , please now      1 edit of 10: nearly the same
    list all files in a    folder , oldest first , please now     2 edits of 10: another text
    list files                                                    short texts are equal or another

A script without spaces between words has long ones, so there texts are equal or another as well.

A candidate is left out where its query is nearly the record's, or its answer is nearly the record's answer. The latter
counts for answers of at least ``min_answer_words`` words: many queries rightly share a short one, a class, "yes" or a
code, and without it there would be no example of its class left. A short answer under a nearly equal query is left out
with the query. Where short answers are as telling as long ones, ``min_answer_words=1`` counts all of them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gisting.data.records import Record
from gisting.errors import GistError

__all__ = ["ExamplePool"]

_WORD = re.compile(r"\w+")
# 1 - 0.9 is a little less than 0.1 in floating point.
_ROUNDING = 1e-9


class ExamplePool:
    """The training records as a pool of examples, indexed by their queries.

    Args:
        records: of the training split only; nothing of an evaluation split may come in here.
        near_duplicate: the share of words from which on two texts are nearly the same, above 0, to 1: none differs.
        min_answer_words: answers of fewer words are no sign of a leak by themselves.

    Raises:
        GistError: there is no record, an argument is out of range, or ``bm25s`` is not installed (the ``internalize``
            extra).
    """

    def __init__(self, records: Sequence[Record], *, near_duplicate: float = 0.9, min_answer_words: int = 4) -> None:
        if not records:
            raise GistError("records is empty; an example pool is made of the training records, give some")
        if not 0 < near_duplicate <= 1:
            raise GistError(f"near_duplicate must be above 0 and at most 1, got {near_duplicate}")
        if min_answer_words < 1:
            raise GistError(f"min_answer_words must be at least 1, got {min_answer_words}")
        try:
            import bm25s
        except ImportError as error:
            raise GistError(
                "ExamplePool needs the package bm25s; run: pip install 'gist-tokens[internalize]'"
            ) from error
        self.records = tuple(records)
        self.near_duplicate = near_duplicate
        self.min_answer_words = min_answer_words
        self._cases = [self._case(record) for record in self.records]
        self._index: Any = None
        if any(case.query.words for case in self._cases):
            self._index = bm25s.BM25()
            self._index.index([list(case.query.words) for case in self._cases], show_progress=False)

    def __len__(self) -> int:
        """How many records it holds."""
        return len(self.records)

    def retrieve(self, record: Record, count: int) -> list[Record]:
        """The examples for one record.

        Args:
            record: of any split; its output counts only in what is left out (see the module), and need not be known.
            count: how many at most.

        Returns:
            The most similar last, of equally similar ones the earlier in the pool; none nearly the record itself, and
            no two nearly the same. Fewer than ``count`` where there are no more. A query without a known word is
            unlike all others, so that its examples are the first of the pool.

        Raises:
            GistError: ``count`` is negative.
        """
        if count < 0:
            raise GistError(f"count must be at least 0, got {count}")
        if count == 0:
            return []
        case = self._case(record)
        found: list[int] = []
        for number in self._ranked(case.query.words, count):
            candidate = self._cases[number]
            if any(self._is_near(candidate, other) for other in (case, *(self._cases[one] for one in found))):
                continue
            found.append(number)
            if len(found) == count:
                break
        return [self.records[number] for number in reversed(found)]

    def retrieve_many(self, records: Sequence[Record], count: int) -> list[list[Record]]:
        """The examples for each of several ``records``, ``count`` each, as :meth:`retrieve`. Raises as it does."""
        return [self.retrieve(record, count) for record in records]

    def _case(self, record: Record) -> _Case:
        return _Case(_words_of(record.input), _words_of(record.output))

    def _ranked(self, query: tuple[str, ...], count: int) -> Iterator[int]:
        """Numbers of records, the most similar first, ties in order: a few, and if these do not do, all."""
        scores = np.zeros(len(self)) if self._index is None or not query else self._index.get_scores(list(query))
        few = min(len(self), 4 * count + 16)
        least = np.partition(scores, len(self) - few)[len(self) - few]
        best = np.flatnonzero(scores >= least)
        yield from best[np.argsort(-scores[best], kind="stable")].tolist()
        rest = np.flatnonzero(scores < least)
        yield from rest[np.argsort(-scores[rest], kind="stable")].tolist()

    def _is_near(self, one: _Case, other: _Case) -> bool:
        if _is_nearly_the_same(one.query, other.query, self.near_duplicate):
            return True
        if min(len(one.answer.words), len(other.answer.words)) < self.min_answer_words:
            return False
        return _is_nearly_the_same(one.answer, other.answer, self.near_duplicate)


class _Text(NamedTuple):
    words: tuple[str, ...]
    distinct: frozenset[str]


class _Case(NamedTuple):
    query: _Text
    answer: _Text


def _words_of(text: str) -> _Text:
    """The words to compare; of a text of punctuation alone, what stands between its white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = tuple(_WORD.findall(folded) or folded.split())
    return _Text(words, frozenset(words))


def _is_nearly_the_same(one: _Text, other: _Text, near_duplicate: float) -> bool:
    if one.words == other.words:
        return True
    limit = math.floor((1 - near_duplicate) * max(len(one.words), len(other.words)) + _ROUNDING)
    # A word that the other text does not have takes an edit of its own; this settles almost every pair.
    if limit == 0 or len(one.distinct - other.distinct) > limit or len(other.distinct - one.distinct) > limit:
        return False
    return _is_within(one.words, other.words, limit)


def _is_within(one: tuple[str, ...], other: tuple[str, ...], limit: int) -> bool:
    """Whether the edit distance is at most ``limit``, looking at no cell further than that from the diagonal."""
    if abs(len(one) - len(other)) > limit:
        return False
    beyond = limit + 1
    row = [min(column, beyond) for column in range(len(other) + 1)]
    for number, word in enumerate(one, start=1):
        first, last = max(1, number - limit), min(len(other), number + limit)
        following = [beyond] * (len(other) + 1)
        following[0] = min(number, beyond)
        for column in range(first, last + 1):
            following[column] = min(
                row[column - 1] + (word != other[column - 1]), row[column] + 1, following[column - 1] + 1, beyond
            )
        row = following
        if min(row) > limit:
            return False
    return row[-1] <= limit
