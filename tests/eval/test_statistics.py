"""Bootstrap intervals: computed by hand, and how often they contain the true value."""

from __future__ import annotations

import math

import pytest
import torch

from gisting import GistError
from gisting.eval.statistics import Interval, bootstrap, difference, gap_share


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coverage(intervals: list[Interval], truth: float) -> float:
    return sum(one.low <= truth <= one.high for one in intervals) / len(intervals)


def test_resamples_of_two_records_by_eye() -> None:
    """A resample of the records 0 and 1 has mean 0, 1/2 or 1, with odds 1 : 2 : 1."""
    found = bootstrap([[0.0, 1.0]], confidence=0.4)
    assert found == Interval(0.5, 0.5, 0.5)
    assert bootstrap([[0.0, 1.0]], confidence=0.6) == Interval(0.5, 0.0, 1.0)
    one = bootstrap([[0.0, 1.0, 2.0, 4.0]], num_resamples=1)
    assert one.low == one.high != one.value  # the interval comes from the resamples alone
    assert bootstrap([[3.0]]) == Interval(3.0, 3.0, 3.0)


def test_a_seed_gives_the_same_interval_again() -> None:
    scores = normal(40).tolist()
    assert bootstrap([scores], seed=3) == bootstrap([scores], seed=3) != bootstrap([scores], seed=4)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = normal(40).tolist()
    expected = bootstrap([scores, scores], lambda means: means.sum(0))
    monkeypatch.setattr("gisting.eval.statistics._BLOCK", 700)
    assert bootstrap([scores, scores], lambda means: means.sum(0)) == expected


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    """Mean +- 1.96 standard errors; 8 % is the noise in a tail quantile of 2,000 resamples."""
    scores = normal(400)
    error = (scores.std(correction=0) / math.sqrt(400)).item()
    found = bootstrap([scores.tolist()], num_resamples=2000)
    assert found.value == pytest.approx(scores.mean().item())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.08 * 2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.08 * 2 * error)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_coverage_of_a_mean(confidence: float) -> None:
    """In 400 data sets of 60 draws, the interval contains the truth as often as promised: within three standard errors
    of that count, plus the point by which a percentile interval of 60 draws is too narrow.
    """
    found = [bootstrap([row], confidence=confidence, num_resamples=400) for row in normal(400, 60).tolist()]
    noise = 3 * math.sqrt(confidence * (1 - confidence) / 400)
    assert coverage(found, 0.0) == pytest.approx(confidence, abs=noise + 0.01)


def test_coverage_of_a_paired_difference() -> None:
    """For two conditions that share most of their variation, the interval of the difference is as narrow as the rest
    allows, and still contains the truth.
    """
    shared, first, second = normal(400, 60), normal(400, 60, seed=1), normal(400, 60, seed=2)
    firsts, seconds = (shared + 0.1 * first + 0.3).tolist(), (shared + 0.1 * second).tolist()
    found = [difference(a, b, num_resamples=400) for a, b in zip(firsts, seconds, strict=True)]
    assert coverage(found, 0.3) == pytest.approx(0.95, abs=0.045)
    width = sum(one.high - one.low for one in found) / 400
    assert width == pytest.approx(2 * 1.96 * 0.1 * math.sqrt(2 / 60), rel=0.05)
    unpaired = bootstrap([firsts[0]])
    assert unpaired.high - unpaired.low > 3 * width


def test_coverage_of_the_gap_share() -> None:
    """With 0.9, 0.82 and 0.1 right answers under positive, gist and negative, the gist keeps 0.9 of the gap."""
    drawn = torch.rand(300, 3, 100, generator=torch.Generator().manual_seed(0))
    right = (drawn < torch.tensor([0.82, 0.9, 0.1])[:, None]).double().tolist()
    found = [gap_share(*columns, num_resamples=400) for columns in right]
    assert coverage([one for one in found if one is not None], 0.9) == pytest.approx(0.95, abs=0.05)
    assert None not in found


def test_gap_share_by_hand() -> None:
    found = gap_share([1, 1, 0, 0] * 25, [1, 1, 1, 0] * 25, [0, 0, 0, 0] * 25)
    assert found is not None
    assert found.value == pytest.approx(2 / 3)
    assert 0.5 < found.low < found.value < found.high < 0.8


@pytest.mark.parametrize(
    ("positive", "negative"),
    [([1.0, 0.0], [1.0, 0.0]), ([0.0, 0.0], [1.0, 1.0]), ([1.0, 0.0, 0.0], [0.0, 0.0, 0.5])],
    ids=["none", "the wrong way", "one that a resample closes"],
)
def test_no_share_of_a_gap_that_may_not_exist(positive: list[float], negative: list[float]) -> None:
    assert gap_share([1.0] * len(positive), positive, negative) is None


def test_statistics_errors() -> None:
    with pytest.raises(GistError, match=r"columns must all have the same length, at least 1, got \[1, 2\]"):
        bootstrap([[1.0], [1.0, 2.0]])
    with pytest.raises(GistError, match=r"columns must all have the same length, at least 1, got \[0\]"):
        bootstrap([[]])
    with pytest.raises(GistError, match="columns must all have the same length, at least 1, got no column"):
        bootstrap([])
    with pytest.raises(GistError, match="confidence must be between 0 and 1, got 95"):
        bootstrap([[1.0]], confidence=95)
    with pytest.raises(GistError, match="num_resamples must be at least 1, got 0"):
        bootstrap([[1.0]], num_resamples=0)
