"""How much of a template, and how many examples, each stage keeps.

Place in the flow: **schedule** -> what a stage's data hold -> training. Pure arithmetic: knows no text and no model.
The kept share falls from stage to stage to exactly 0, so that the last stage trains on the bare query; the number of
examples falls with it. Four stages, in per cent of the template, and the examples of at most 5::

                    share               examples
    linear          100  67  33   0     5 3 1 0      PromptIntern, arXiv 2407.02211; SKIntern, arXiv 2409.13183
    exponential     100  33   9   0     5 1 0 0      falls fast first
    inverse         100  91  67   0     5 4 3 0      falls slowly first: the mirror image

SKIntern found linear best (BIG-bench Hard: 69.3, exponential 64.8, inverse 59.5), and four stages better than three or
seven.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from gisting.errors import GistError

__all__ = ["SCHEDULES", "Schedule"]

#: The names that :meth:`Schedule.named` knows.
SCHEDULES = ("linear", "exponential", "inverse")
# 3 * (1 / 3) in floating point may fall short of 1; no schedule has shares as close together as this.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Schedule:
    """The kept share of the template in each stage.

    Args:
        shares: at least two; the first above 0 and at most 1, none above the one before it, the last exactly 0.

    Raises:
        GistError: they are not.
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        shares = tuple(float(share) for share in self.shares)
        object.__setattr__(self, "shares", shares)
        shown = ", ".join(f"{share:g}" for share in shares) or "none"
        if len(shares) < 2:
            raise GistError(f"shares must be at least two, such as 1, 0.5, 0, got {shown}")
        if not 0 < shares[0] <= 1:
            raise GistError(f"shares must begin above 0 and at most at 1, the whole template, got {shown}")
        if not all(after <= before for before, after in itertools.pairwise(shares)):
            raise GistError(f"shares must not rise from one stage to the next, got {shown}")
        if shares[-1] != 0:
            raise GistError(
                f"shares must end at exactly 0, for the last stage trains on the bare query, got {shown}; add a 0"
            )

    @property
    def num_stages(self) -> int:
        """How many stages there are, the one with nothing left among them."""
        return len(self.shares)

    @classmethod
    def linear(cls, num_stages: int = 4) -> Schedule:
        """From 1 to 0 in equal steps.

        Args:
            num_stages: at least 2.

        Raises:
            GistError: it is less.
        """
        return cls(_along(num_stages, lambda place: 1 - place))

    @classmethod
    def exponential(cls, num_stages: int = 4, rate: float = 3.0) -> Schedule:
        """From 1 to 0 as ``exp(-rate x)`` falls, moved and stretched so that it ends at 0: fast first.

        Args:
            num_stages: at least 2.
            rate: above 0; near 0 it is linear.

        Raises:
            GistError: one of them is less.
        """
        fall = _exponential(rate)
        return cls(_along(num_stages, fall))

    @classmethod
    def inverse(cls, num_stages: int = 4, rate: float = 3.0) -> Schedule:
        """The mirror image of :meth:`exponential`: what that has lost at a place, this keeps at the opposite one.

        Args:
            num_stages: at least 2.
            rate: above 0; near 0 it is linear.

        Raises:
            GistError: one of them is less.
        """
        fall = _exponential(rate)
        return cls(_along(num_stages, lambda place: 1 - fall(1 - place)))

    @classmethod
    def named(cls, name: str, num_stages: int = 4) -> Schedule:
        """A schedule by its name.

        Args:
            name: one of ``SCHEDULES``.
            num_stages: at least 2.

        Raises:
            GistError: the name is unknown, or there are fewer stages.
        """
        if name not in SCHEDULES:
            raise GistError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}; or give a Schedule(shares)")
        return getattr(cls, name)(num_stages)

    def example_counts(self, max_examples: int) -> tuple[int, ...]:
        """How many examples stand in a prompt of each stage: the share of ``max_examples``, rounded down.

        Args:
            max_examples: what the share 1 stands for, at least 0.

        Returns:
            A number for each stage; the last is 0.

        Raises:
            GistError: ``max_examples`` is negative.
        """
        if max_examples < 0:
            raise GistError(f"max_examples must be at least 0, got {max_examples}")
        return tuple(math.floor(max_examples * share + _ROUNDING) for share in self.shares)


def _along(num_stages: int, share: Callable[[float], float]) -> tuple[float, ...]:
    """A share at each of the equally spaced places from 0 to 1; the ends are exact whatever rounding does."""
    if num_stages < 2:
        raise GistError(f"num_stages must be at least 2, one with the template and one without, got {num_stages}")
    between = (share(stage / (num_stages - 1)) for stage in range(1, num_stages - 1))
    return (1.0, *between, 0.0)


def _exponential(rate: float) -> Callable[[float], float]:
    if not 0 < rate < math.inf:
        raise GistError(f"rate must be above 0, got {rate}")
    # expm1 keeps the digits where the rate is small.
    return lambda place: 1 - math.expm1(-rate * place) / math.expm1(-rate)
