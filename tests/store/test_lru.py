"""The least-recently-used cache, against a plain list that does the same slowly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gisting.errors import GistError
from gisting.store.lru import BoundedLRU

KEYS = st.sampled_from("abcd")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 12)),
        st.tuples(st.just("get"), KEYS, st.just(0)),
        st.tuples(st.just("clear"), st.just("a"), st.just(0)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(max_bytes=st.integers(0, 20), steps=STEPS)
def test_against_a_list(max_bytes: int, steps: list[tuple[str, str, int]]) -> None:
    lru: BoundedLRU[str, int] = BoundedLRU(max_bytes)
    held: list[tuple[str, int, int]] = []  # key, value and size; the most recently used is last
    for number, (step, key, size) in enumerate(steps):
        found = [one for one in held if one[0] == key]
        others = [one for one in held if one[0] != key]
        if step == "put":
            lru.put(key, number, size)
            held = others + ([(key, number, size)] if size <= max_bytes else [])
            while sum(one[2] for one in held) > max_bytes:
                held.pop(0)
        elif step == "get":
            assert lru.get(key) == (found[0][1] if found else None)
            held = others + found
        else:
            lru.clear()
            held = []
        assert [one for one in "abcd" if one in lru] == sorted(one[0] for one in held)
        assert len(lru) == len(held)
        assert lru.num_bytes == sum(one[2] for one in held) <= max_bytes


def test_the_least_recently_used_goes_first() -> None:
    lru: BoundedLRU[str, str] = BoundedLRU(30)
    for key in "abc":
        lru.put(key, key.upper(), 10)
    assert lru.get("a") == "A"
    lru.put("d", "D", 10)
    assert [key for key in "abcd" if key in lru] == ["a", "c", "d"]
    lru.put("too large", "E", 31)
    assert "too large" not in lru
    assert len(lru) == 3


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(GistError, match=r"^max_bytes must be at least 0, got -1$"):
        BoundedLRU(-1)
