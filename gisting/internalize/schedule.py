"""Decide how much of the prompt, and how many examples, each stage keeps.

Place in the flow: **schedule** -> the data of each stage -> training. Pure arithmetic, independent of texts and models.
The kept share falls from stage to stage to exactly 0, so that the last stage trains on the bare query; the number of
examples falls with it. For four stages, in per cent of the prompt, and with at most 5 examples::

                    share               examples
    linear          100  67  33   0     5 3 1 0      PromptIntern, arXiv 2407.02211; SKIntern, arXiv 2409.13183
    exponential     100  33   9   0     5 1 0 0      falls fast at first
    inverse         100  91  67   0     5 4 3 0      falls slowly at first: the mirror image

SKIntern found that linear works best (69.3 on BIG-bench Hard; exponential 64.8, inverse 59.5), and four stages better
than three or seven.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from gisting.errors import GistError

__all__ = ["SCHEDULES", "Schedule"]

#: The names that :meth:`Schedule.named` accepts.
SCHEDULES = ("linear", "exponential", "inverse")
# 3 * (1 / 3) in floating point may be less than 1; no schedule has shares as close together as this.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Schedule:
    """The kept share of the prompt in each stage.

    Args:
        shares: at least two; the first above 0 and at most 1, none above the one before it, the last exactly 0.

    Raises:
        GistError: ``shares`` breaks one of these rules.
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        shares = tuple(float(share) for share in self.shares)
        object.__setattr__(self, "shares", shares)
        shown = ", ".join(f"{share:g}" for share in shares) or "none"
        if len(shares) < 2:
            raise GistError(f"there must be at least two shares, such as 1, 0.5, 0, got {shown}")
        if not 0 < shares[0] <= 1:
            raise GistError(f"the first share must be above 0 and at most 1 (the whole prompt), got {shown}")
        if not all(after <= before for before, after in itertools.pairwise(shares)):
            raise GistError(f"shares must not rise from one stage to the next, got {shown}")
        if shares[-1] != 0:
            raise GistError(
                f"the last share must be exactly 0, because the last stage trains on the bare query, "
                f"got {shown}; add a 0"
            )

    @property
    def num_stages(self) -> int:
        """The number of stages, including the last one, at share 0."""
        return len(self.shares)

    @classmethod
    def linear(cls, num_stages: int = 4) -> Schedule:
        """Fall from 1 to 0 in equal steps.

        Args:
            num_stages: at least 2.

        Raises:
            GistError: ``num_stages`` is less than 2.
        """
        return cls(_along(num_stages, lambda place: 1 - place))

    @classmethod
    def exponential(cls, num_stages: int = 4, rate: float = 3.0) -> Schedule:
        """Fall from 1 to 0 like ``exp(-rate x)``, shifted and scaled to end at 0: fast at first.

        Args:
            num_stages: at least 2.
            rate: above 0; near 0 the schedule is linear.

        Raises:
            GistError: ``num_stages`` or ``rate`` is out of range.
        """
        fall = _exponential(rate)
        return cls(_along(num_stages, fall))

    @classmethod
    def inverse(cls, num_stages: int = 4, rate: float = 3.0) -> Schedule:
        """Fall like the mirror image of :meth:`exponential`: slowly at first.

        Args:
            num_stages: at least 2.
            rate: above 0; near 0 the schedule is linear.

        Raises:
            GistError: ``num_stages`` or ``rate`` is out of range.
        """
        fall = _exponential(rate)
        return cls(_along(num_stages, lambda place: 1 - fall(1 - place)))

    @classmethod
    def named(cls, name: str, num_stages: int = 4) -> Schedule:
        """Make a schedule by its name.

        Args:
            name: one of ``SCHEDULES``.
            num_stages: at least 2.

        Raises:
            GistError: the name is unknown, or ``num_stages`` is less than 2.
        """
        if name not in SCHEDULES:
            raise GistError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}; or use Schedule(shares)")
        return getattr(cls, name)(num_stages)

    def example_counts(self, max_examples: int) -> tuple[int, ...]:
        """Count the examples in a prompt of each stage: the share of ``max_examples``, rounded down.

        Args:
            max_examples: the number of examples at share 1, at least 0.

        Returns:
            A count for each stage; the last is 0.

        Raises:
            GistError: ``max_examples`` is negative.
        """
        if max_examples < 0:
            raise GistError(f"max_examples must be at least 0, got {max_examples}")
        return tuple(math.floor(max_examples * share + _ROUNDING) for share in self.shares)


def _along(num_stages: int, share: Callable[[float], float]) -> tuple[float, ...]:
    """Compute the share at equally spaced places from 0 to 1; the two ends are exact, without rounding."""
    if num_stages < 2:
        raise GistError(f"num_stages must be at least 2, one with the prompt and one without, got {num_stages}")
    between = (share(stage / (num_stages - 1)) for stage in range(1, num_stages - 1))
    return (1.0, *between, 0.0)


def _exponential(rate: float) -> Callable[[float], float]:
    if not 0 < rate < math.inf:
        raise GistError(f"rate must be above 0, got {rate}")
    # expm1 stays accurate for small rates.
    return lambda place: 1 - math.expm1(-rate * place) / math.expm1(-rate)
