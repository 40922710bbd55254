"""Examples for a query: similar, in a fixed order, and without leaks."""

from __future__ import annotations

import random
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gisting import GistError, Record
from gisting.internalize import examples
from gisting.internalize.examples import ExamplePool


def record(query: str, answer: str = "yes") -> Record:
    return Record("prompt", query, answer)


def queries(found: list[Record]) -> list[str]:
    return [one.input for one in found]


# -- order -------------------------------------------------------------------------------------------------------------


def test_the_most_similar_comes_last() -> None:
    pool = ExamplePool([record(text) for text in ("red fish", "blue bird", "blue fish swims", "old stone")])
    assert queries(pool.retrieve(record("a blue fish"), 3)) == ["blue bird", "red fish", "blue fish swims"]
    assert queries(pool.retrieve(record("a blue fish"), 1)) == ["blue fish swims"]
    assert pool.retrieve(record("a blue fish"), 0) == []
    assert len(pool.retrieve(record("a blue fish"), 99)) == len(pool) == 4


def test_ties_go_by_the_order_of_the_pool() -> None:
    pool = ExamplePool([record(f"common {name}") for name in "abcdef"])
    assert queries(pool.retrieve(record("common thing"), 3)) == ["common c", "common b", "common a"]


@pytest.mark.parametrize("query", ["nothing known", "", "?!", "\n"])
def test_a_query_without_a_known_word_gets_the_first_of_the_pool(query: str) -> None:
    pool = ExamplePool([record(name) for name in ("one", "two", "three")])
    assert queries(pool.retrieve(record(query), 2)) == ["two", "one"]


def test_a_pool_without_words() -> None:
    pool = ExamplePool([record(text) for text in ("+", "-", "", "+")])
    assert queries(pool.retrieve(record("+"), 4)) == ["", "-"]


def test_retrieving_many_is_retrieving_one_by_one() -> None:
    pool = pool_of(40)
    found = pool.retrieve_many(pool.records, 3)
    assert found == [pool.retrieve(one, 3) for one in pool.records]
    assert found == ExamplePool(pool.records).retrieve_many(pool.records, 3)


# -- leaks -------------------------------------------------------------------------------------------------------------

NOUNS = "table river engine window garden letter planet mirror bottle ladder".split()
VERBS = "count paint carry weigh follow repair collect measure divide polish".split()


def pool_of(number: int) -> ExamplePool:
    return ExamplePool(originals(number))


@cache
def originals(number: int) -> list[Record]:
    """Make queries of ten words and answers of seven, any two of which differ in at least two words."""
    draw = random.Random(0)

    def task() -> str:
        return f"{draw.choice(VERBS)} the {draw.choice(NOUNS)}"

    return [
        record(f"please {task()} and {task()} {n} {7 * n}", f"do {task()} at last {3 * n} {11 * n}")
        for n in range(number)
    ]


PLANTED = {
    "repeated": lambda one, n: one,
    "other case": lambda one, n: record(one.input.upper(), f"a quite different answer {n}"),
    "other punctuation": lambda one, n: record(f"«{one.input.replace(' ', ', ')}»!", f"a quite different answer {n}"),
    "other white space": lambda one, n: record(one.input.replace(" ", " \n"), f"a quite different answer {n}"),
    "a word changed": lambda one, n: record(one.input.replace("please", "kindly"), f"a quite different answer {n}"),
    "a word more": lambda one, n: record(f"{one.input} quickly", f"a quite different answer {n}"),
    "a word less": lambda one, n: record(one.input.replace("please ", ""), f"a quite different answer {n}"),
    "same answer": lambda one, n: record(f"{' '.join(one.input.split()[3:8])} unlike {n}", one.output),
    "answer in capitals": lambda one, n: record(f"unlike {n} {one.input[20:40]}", f"{one.output.upper()}."),
}


def planted() -> tuple[list[Record], dict[int, set[int]]]:
    """Make 300 records, including ten leaks of each kind, and for each original the places of its leaks."""
    records = list(originals(300 - 10 * len(PLANTED)))
    leaks: dict[int, set[int]] = {}
    for kind, make in enumerate(PLANTED.values()):
        for n in range(10):
            source = 20 * n + kind
            leaks.setdefault(source, set()).add(len(records))
            records.append(make(records[source], 20 * n + kind))
    order = list(range(len(records)))
    random.Random(1).shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    return [records[old] for old in order], {
        place[source]: {place[leak] for leak in found} for source, found in leaks.items()
    }


def leaks_found(pool: ExamplePool, leaks: dict[int, set[int]]) -> list[tuple[int, int]]:
    """List the pairs of a record and its example that are the same, or of which one was made from the other."""
    number_of = {id(one): number for number, one in enumerate(pool.records)}
    pairs = {(source, leak) for source, several in leaks.items() for leak in several}
    pairs |= {(leak, source) for source, leak in pairs} | {(number, number) for number in range(len(pool))}
    return [
        (number, number_of[id(example)])
        for number, one in enumerate(pool.records)
        for example in pool.retrieve(one, 5)
        if (number, number_of[id(example)]) in pairs
    ]


def test_no_planted_leak_is_retrieved() -> None:
    records, leaks = planted()
    assert len(records) == 300
    assert sum(map(len, leaks.values())) == 90
    pool = ExamplePool([Record(*vars(one).values()) for one in records])
    assert leaks_found(pool, leaks) == []
    assert all(len(pool.retrieve(one, 5)) == 5 for one in pool.records)


def test_without_the_guard_the_planted_leaks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show that the test above can fail: without the guard, leaks of each kind are found, and each record itself."""
    records, leaks = planted()
    pool = ExamplePool([Record(*vars(one).values()) for one in records])
    monkeypatch.setattr(examples, "_is_nearly_the_same", lambda *_: False)
    found = set(leaks_found(pool, leaks))
    assert {(number, number) for number in range(300)} <= found
    kinds = dict.fromkeys(PLANTED, 0)
    for source, several in leaks.items():
        for leak in several:
            kind = next(
                name for name, make in PLANTED.items() for n in range(200) if make(records[source], n) == records[leak]
            )
            kinds[kind] += (source, leak) in found
    assert all(number > 0 for number in kinds.values()), kinds


def test_examples_of_a_prompt_are_no_near_duplicates_of_each_other() -> None:
    twins = [record(f"count the red apples in basket number {n} before the night falls today") for n in range(6)]
    others = [record(f"count {n} apples") for n in range(3)]
    found = queries(ExamplePool([*twins, *others]).retrieve(record("count red apples"), 5))
    assert [text for text in found if text in queries(twins)] == [twins[0].input]
    assert sorted(text for text in found if text in queries(others)) == queries(others)


def test_the_search_continues_if_everything_similar_is_a_duplicate() -> None:
    pool = ExamplePool([*[record("count the apples")] * 200, record("the pears"), record("no")])
    assert queries(pool.retrieve(record("count the apples"), 5)) == ["no", "the pears"]


def test_short_answers_may_be_shared() -> None:
    pool = ExamplePool([record("a warm day", "good"), record("a cold day", "bad"), record("A warm, day!", "good")])
    assert queries(pool.retrieve(record("warm sun", "good"), 3)) == ["a cold day", "a warm day"]
    strict = ExamplePool(pool.records, min_answer_words=1)
    assert queries(strict.retrieve(record("warm sun", "Good."), 3)) == ["a cold day"]


def test_a_long_answer_under_another_query_is_a_leak() -> None:
    pool = ExamplePool([record("show it", "find . -type f -name '*.c'"), record("show them", "ls")])
    assert queries(pool.retrieve(record("which are there", "find . -type f -name *.c"), 2)) == ["show them"]
    assert queries(pool.retrieve(record("which are there", ""), 2)) == ["show them", "show it"]


@pytest.mark.parametrize(
    ("text", "is_near"),
    [
        ("List all files in the folder, newest first; please now!", True),
        ("list all files in the folder , oldest first , please now", True),
        ("list all files in a folder , oldest first , please now", False),
        ("list all files in the folder , newest first , please", True),
        ("all list files in the folder , newest first , please now", False),
        ("list files", False),
        ("", False),
    ],
)
def test_the_table_of_the_docstring(text: str, is_near: bool) -> None:
    first = "list all files in the folder , newest first , please now"
    one, other = examples._words_of(first), examples._words_of(text)
    assert examples._is_nearly_the_same(one, other, 0.9) is is_near
    assert examples._is_nearly_the_same(other, one, 0.9) is is_near


def distance(one: str, other: str) -> int:
    """Compute the Levenshtein distance by its definition."""

    @cache
    def of(a: int, b: int) -> int:
        if not a or not b:
            return a + b
        return min(of(a - 1, b) + 1, of(a, b - 1) + 1, of(a - 1, b - 1) + (one[a - 1] != other[b - 1]))

    return of(len(one), len(other))


@given(st.text("abc", max_size=12), st.text("abc", max_size=12), st.floats(0.01, 1))
def test_nearly_the_same_is_the_edit_distance(one: str, other: str, near_duplicate: float) -> None:
    allowed = (1 - near_duplicate) * max(len(one), len(other))
    found = examples._is_nearly_the_same(
        examples._words_of(" ".join(one)), examples._words_of(" ".join(other)), near_duplicate
    )
    assert found is (distance(one, other) <= allowed + 1e-9)


# -- real data, speed, errors ------------------------------------------------------------------------------------------


def test_real_commands(shared: Path) -> None:
    """Check on NL2Bash that no example has the record's query, whatever its case and punctuation."""
    data = shared / "data"
    lines = zip(
        (data / "nl2bash.nl").read_text(encoding="utf-8").splitlines(),
        (data / "nl2bash.cm").read_text(encoding="utf-8").splitlines(),
        strict=True,
    )
    records = [record(query, command) for query, command in list(lines)[:2000]]
    pool = ExamplePool(records, min_answer_words=1)
    start = time.perf_counter()
    found = pool.retrieve_many(records[:400], 5)
    assert time.perf_counter() - start < 20
    plain = lambda text: "".join(one for one in text.casefold() if one.isalnum())  # noqa: E731
    for one, several in zip(records, found, strict=False):
        assert len(several) == 5
        assert all(plain(other.input) != plain(one.input) for other in several)
        assert len({plain(other.input) for other in several}) == 5


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GistError, match="records is empty"):
        ExamplePool([])
    with pytest.raises(GistError, match="near_duplicate must be above 0 and at most 1, got 0"):
        ExamplePool([record("a")], near_duplicate=0)
    with pytest.raises(GistError, match="min_answer_words must be at least 1, got 0"):
        ExamplePool([record("a")], min_answer_words=0)
    with pytest.raises(GistError, match="count must be at least 0, got -1"):
        ExamplePool([record("a")]).retrieve(record("b"), -1)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(
        GistError, match=r"ExamplePool needs the package bm25s; run: pip install 'gist-tokens\[internalize"
    ):
        ExamplePool([record("a")])
