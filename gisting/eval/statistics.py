"""Percentile bootstrap over the records: how uncertain a score is.

Place in the flow: scores of records in, intervals out, independent of models and texts. Everything that is reported is
a function of means over the records (a difference, a ratio, a perplexity), so one function is enough: it resamples the
records, averages all columns over the *same* resampled records, which makes comparisons paired, and passes the means to
the statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gisting.errors import GistError

__all__ = ["Interval", "bootstrap", "difference", "gap_share"]

# Numbers gathered at a time: 64 MB of float64, and as much again of indices.
_BLOCK = 1 << 23
# Means of equal columns differ only by rounding.
_NO_GAP = 1e-12


@dataclass(frozen=True)
class Interval:
    """A statistic of the sample, with the interval in which it lies when the records are resampled.

    Args:
        value: the statistic of the sample.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


def bootstrap(
    columns: Sequence[Sequence[float]],
    statistic: Callable[[Tensor], Tensor] = lambda means: means[0],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Compute the percentile interval of a statistic by resampling the records.

    See Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.

    Args:
        columns: M columns of N scores, one per record, with the records in the same order in every column.
        statistic: maps means, float64 ``(M, R)``, to R values; by default the mean of the first column.
        confidence: the share of the resamples that lies within the interval.
        num_resamples: R.
        seed: determines the resamples; equal seeds give equal intervals.

    Returns:
        The interval; NaN if the statistic is NaN for a resample.

    Raises:
        GistError: there are no records, the columns differ in length, or an argument is out of range.
    """
    lengths = sorted({len(column) for column in columns})
    if len(lengths) != 1 or lengths[0] == 0:
        raise GistError(f"columns must all have the same length, at least 1, got {lengths or 'no column'}")
    if not 0 < confidence < 1:
        raise GistError(f"confidence must be between 0 and 1, got {confidence}")
    if num_resamples < 1:
        raise GistError(f"num_resamples must be at least 1, got {num_resamples}")
    values, num_records = torch.tensor(columns, dtype=torch.float64), lengths[0]
    generator = torch.Generator().manual_seed(seed)
    means, block = [], max(1, _BLOCK // (num_records * len(columns)))
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn = torch.randint(num_records, (rows, num_records), generator=generator)
        means.append(values[:, drawn].mean(-1))
    found = statistic(torch.cat([values.mean(-1, keepdim=True), *means], dim=1))
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = found[1:].quantile(tails).tolist()
    return Interval(found[0].item(), low, high)


def difference(first: Sequence[float], second: Sequence[float], **settings: Any) -> Interval:
    """Compute the paired difference between two conditions: the mean of ``first`` minus the mean of ``second``.

    Both have one score each for the same N records. ``settings``, result and errors are as for :func:`bootstrap`.
    """
    return bootstrap([first, second], lambda means: means[0] - means[1], **settings)


def gap_share(
    gist: Sequence[float], positive: Sequence[float], negative: Sequence[float], **settings: Any
) -> Interval | None:
    """Compute the share of the gap between the controls that the gist keeps: (gist - negative) / (positive - negative).

    Args:
        gist: scores of N records; higher is better.
        positive: scores of the same records under the positive control.
        negative: scores of the same records under the negative control.
        **settings: as for :func:`bootstrap`, whose errors this raises.

    Returns:
        The share with its interval; 1 is the whole gap. None unless the positive control is above the negative one in
        the sample and in every resample: a share of a gap that may not exist is meaningless.
    """

    def share(means: Tensor) -> Tensor:
        gap = means[1] - means[2]
        return torch.where(gap > _NO_GAP, (means[0] - means[2]) / gap, torch.nan)

    found = bootstrap([gist, positive, negative], share, **settings)
    return None if math.isnan(found.value) or math.isnan(found.low) else found
