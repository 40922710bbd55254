"""The kept share and the number of examples of each stage."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gisting import GistError
from gisting.internalize.schedule import SCHEDULES, Schedule


@pytest.mark.parametrize(
    ("name", "per_cent", "examples"),
    [
        ("linear", [100, 67, 33, 0], (5, 3, 1, 0)),
        ("exponential", [100, 33, 9, 0], (5, 1, 0, 0)),
        ("inverse", [100, 91, 67, 0], (5, 4, 3, 0)),
    ],
)
def test_the_table_of_the_docstring(name: str, per_cent: list[int], examples: tuple[int, ...]) -> None:
    schedule = Schedule.named(name, 4)
    assert [round(100 * share) for share in schedule.shares] == per_cent
    assert schedule.example_counts(5) == examples
    assert schedule.num_stages == 4


def test_linear_shares_by_eye() -> None:
    assert Schedule.linear().shares == pytest.approx((1, 2 / 3, 1 / 3, 0))
    assert Schedule.linear(2).shares == (1, 0)
    assert Schedule.linear(3).shares == (1, 0.5, 0)
    # floor alone would lose one where 3 * (1 / 3) is less than 1.
    assert Schedule.linear().example_counts(3) == (3, 2, 1, 0)


@given(st.integers(2, 40), st.sampled_from(SCHEDULES), st.integers(0, 1000))
def test_every_schedule_falls_from_one_to_exactly_zero(num_stages: int, name: str, max_examples: int) -> None:
    schedule = Schedule.named(name, num_stages)
    assert len(schedule.shares) == num_stages
    assert (schedule.shares[0], schedule.shares[-1]) == (1.0, 0.0)
    assert all(after < before for before, after in itertools.pairwise(schedule.shares))
    counts = schedule.example_counts(max_examples)
    assert (counts[0], counts[-1]) == (max_examples, 0)
    assert all(after <= before for before, after in itertools.pairwise(counts))


@given(st.integers(2, 60), st.integers(0, 200))
def test_counts_are_exact_for_linear(num_stages: int, max_examples: int) -> None:
    """Compare with integer arithmetic, which has no rounding errors."""
    steps = num_stages - 1
    expected = tuple(max_examples * (steps - stage) // steps for stage in range(num_stages))
    assert Schedule.linear(num_stages).example_counts(max_examples) == expected


@given(st.integers(2, 30), st.floats(1e-3, 30))
def test_inverse_mirrors_exponential(num_stages: int, rate: float) -> None:
    fast, slow = Schedule.exponential(num_stages, rate).shares, Schedule.inverse(num_stages, rate).shares
    assert [1 - share for share in reversed(fast)] == pytest.approx(list(slow), abs=1e-12)
    line = Schedule.linear(num_stages).shares
    assert all(a <= b + 1e-12 and b <= c + 1e-12 for a, b, c in zip(fast, line, slow, strict=True))


def test_given_values() -> None:
    assert Schedule((1, 0.6, 0.3, 0)).example_counts(10) == (10, 6, 3, 0)
    assert Schedule((0.5, 0.5, 0.0)).shares == (0.5, 0.5, 0.0)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ((), "at least two shares, such as 1, 0.5, 0, got none"),
        ((0.0,), "at least two shares, such as 1, 0.5, 0, got 0"),
        ((1.5, 0.0), r"first share must be above 0 and at most 1 \(the whole prompt\), got 1.5, 0"),
        ((0.0, 0.0), "first share must be above 0"),
        ((math.nan, 0.0), "first share must be above 0"),
        ((1.0, 0.3, 0.6, 0.0), "must not rise from one stage to the next, got 1, 0.3, 0.6, 0"),
        ((1.0, math.nan, 0.0), "must not rise"),
        ((1.0, 0.5, 1e-12), "last share must be exactly 0, .* got 1, 0.5, 1e-12; add a 0"),
        ((1.0, 0.5, -0.1), "last share must be exactly 0"),
    ],
)
def test_shares_that_do_not_form_a_schedule(shares: tuple[float, ...], says: str) -> None:
    with pytest.raises(GistError, match=says):
        Schedule(shares)


def test_errors() -> None:
    with pytest.raises(GistError, match=r"num_stages must be at least 2, .* got 1"):
        Schedule.linear(1)
    with pytest.raises(GistError, match="rate must be above 0, got 0"):
        Schedule.exponential(4, rate=0)
    with pytest.raises(GistError, match="one of linear, exponential, inverse, got 'cosine'"):
        Schedule.named("cosine", 4)
    with pytest.raises(GistError, match="max_examples must be at least 0, got -1"):
        Schedule.linear().example_counts(-1)
