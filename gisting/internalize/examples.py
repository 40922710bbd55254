"""Choose solved examples for a query's prompt: the most similar training records, without leaks.

Place in the flow: training records, a query -> **examples** -> the data of a stage. Similarity is the BM25 score
(Robertson and Zaragoza, 2009) of the queries (the records' inputs). An example that gives the answer away teaches a
model to copy, so a record that is nearly the same is never used as an example. Works on texts; independent of tokens
and prompts.

Two texts are *nearly the same* if few of their words differ: words are runs of letters and digits, compared without
regard to case, punctuation and white space, and their edit distance in words (Levenshtein: insert, delete, replace) is
at most ``1 - near_duplicate`` of the number of words of the longer text. At 0.9::

    list all files in the folder , newest first , please now      10 words
    List all files in the folder, newest first; please now!       0 edits: nearly the same
    list all files in the folder , oldest first , please now      1 edit of 10: nearly the same
    list all files in a    folder , oldest first , please now     2 edits of 10: different
    list files                                                    short texts are either equal or different

A script without spaces has long "words", so its texts are also either equal or different.

A candidate is left out if its query is nearly the same as the record's query, or its answer nearly the same as the
record's answer. Answers are compared only if they have at least ``min_answer_words`` words, because many queries
properly share a short answer, such as a class, "yes" or a code, and otherwise no example of that class would be left.
If short answers give as much away as long ones, set ``min_answer_words=1`` to compare all of them.
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
        records: records of the training split only; records of an evaluation split must not be included.
        near_duplicate: the share of equal words from which two texts are nearly the same, above 0 and at most 1 (all).
        min_answer_words: shorter answers alone do not count as a leak.

    Raises:
        GistError: there are no records, an argument is out of range, or ``bm25s`` is not installed (the ``internalize``
            extra).
    """

    def __init__(self, records: Sequence[Record], *, near_duplicate: float = 0.9, min_answer_words: int = 4) -> None:
        if not records:
            raise GistError("records is empty; pass the training records, from which examples are chosen")
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
        """The number of records."""
        return len(self.records)

    def retrieve(self, record: Record, count: int) -> list[Record]:
        """Choose the examples for one record.

        Args:
            record: a record of any split; its output only decides which candidates are left out (see the module), and
                may be empty.
            count: maximum number of examples.

        Returns:
            The examples, the most similar last; of equally similar records, those earlier in the pool are preferred.
            None is nearly the same as the record, and no two are nearly the same. Fewer than ``count`` if there are no
            more. A query without known words is equally unlike all others, so its examples are the first of the pool.

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
        """Choose ``count`` examples for each of several ``records``; see :meth:`retrieve`."""
        return [self.retrieve(record, count) for record in records]

    def _case(self, record: Record) -> _Case:
        return _Case(_words_of(str(record.input)), _words_of(record.output))

    def _ranked(self, query: tuple[str, ...], count: int) -> Iterator[int]:
        """Yield numbers of records, the most similar first, ties in order; only the best few are sorted at first."""
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
    """Split a text into the words to compare; a text of punctuation alone is split at white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = tuple(_WORD.findall(folded) or folded.split())
    return _Text(words, frozenset(words))


def _is_nearly_the_same(one: _Text, other: _Text, near_duplicate: float) -> bool:
    if one.words == other.words:
        return True
    limit = math.floor((1 - near_duplicate) * max(len(one.words), len(other.words)) + _ROUNDING)
    # Each word that the other text lacks takes at least one edit; this decides almost every pair.
    if limit == 0 or len(one.distinct - other.distinct) > limit or len(other.distinct - one.distinct) > limit:
        return False
    return _is_within(one.words, other.words, limit)


def _is_within(one: tuple[str, ...], other: tuple[str, ...], limit: int) -> bool:
    """Whether the edit distance is at most ``limit``; cells further than that from the diagonal are not computed."""
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
