"""Plan the stages of a training: an internalisation, one that ends in a gist, or a control to compare with.

Place in the flow: schedule -> **plan** -> the loop over its stages. Every way to train is a list of stages and a
condition under which the finished model is run, so that controls run through the same code:

=================== ========================================== ==================
control             stages                                     run on
=================== ========================================== ==================
none                the stages of the schedule                 the bare query
none, tail gist     the same, but the last ones read a gist    k gist tokens
``bare``            the bare query                             the bare query
``full``            the full prompt                            the full prompt
``full-run-bare``   the full prompt                            the bare query
``shortened``       the prompt at one fixed share              the same prompt
=================== ========================================== ==================

The full prompt is the whole prompt with all of its examples. Pure arithmetic, independent of texts and models.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from transformers import TrainingArguments

from gisting.errors import GistError
from gisting.internalize.schedule import Schedule

__all__ = ["CONTROLS", "TAILS", "Plan", "Stage", "make_plan", "num_steps", "split_steps", "warmup_of"]

#: What an internalisation is compared with.
CONTROLS = ("bare", "full", "full-run-bare", "shortened")
#: What is left of the prompt after the last stage.
TAILS = ("none", "gist")


@dataclass(frozen=True)
class Stage:
    """What a request contains in one stage.

    Args:
        share: share of the prompt that is kept, from 1 (all of it) to 0.
        num_examples: maximum number of examples after the prompt.
        num_gist_tokens: k if the prompt is read through a gist; None for ordinary text.
    """

    share: float
    num_examples: int
    num_gist_tokens: int | None = None

    @property
    def condition(self) -> str:
        """The condition under which an evaluation runs this stage's requests.

        One of ``"prompt"``, ``"no-prompt"`` and ``"gist"``.
        """
        if self.num_gist_tokens is not None:
            return "gist"
        return "prompt" if self.share or self.num_examples else "no-prompt"


@dataclass(frozen=True)
class Plan:
    """The stages in order, and the condition under which the finished model is run.

    Args:
        stages: one or more.
        condition: ``"prompt"``, ``"no-prompt"`` or ``"gist"``.
    """

    stages: tuple[Stage, ...]
    condition: str


def make_plan(
    schedule: Schedule,
    max_examples: int = 0,
    *,
    tail: str = "none",
    num_gist_tokens: int = 1,
    num_gist_stages: int = 1,
    control: str | None = None,
    control_share: float | None = None,
) -> Plan:
    """Make the stages of a training.

    Args:
        schedule: the kept share of the prompt in each stage; not used for a control.
        max_examples: number of examples in a full prompt.
        tail: ``"none"``, or ``"gist"``: the last stages read the whole prompt through its gist, whatever the schedule
            says. They have no examples, because examples differ for every query and one gist must serve all of them.
        num_gist_tokens: k of the stages that read a gist.
        num_gist_stages: number of these stages.
        control: a name of ``CONTROLS``, or None for the schedule.
        control_share: the share of ``"shortened"``, above 0 and below 1.

    Raises:
        GistError: a name is unknown, a number is out of range, or a control has a tail.
    """
    control = current_control(control)
    counts = schedule.example_counts(max_examples)
    if tail not in TAILS:
        raise GistError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if (control == "shortened") != (control_share is not None):
        raise GistError(f"control_share goes with control='shortened', got {control_share!r} with {control!r}")
    if control is not None:
        if tail != "none":
            raise GistError(f"control {control!r} has no stage for tail={tail!r}; leave one of them out")
        return _control(control, max_examples, control_share)
    stages = [Stage(share, count) for share, count in zip(schedule.shares, counts, strict=True)]
    if tail == "gist":
        if num_gist_tokens < 1:
            raise GistError(f"num_gist_tokens must be at least 1, got {num_gist_tokens}; 1 to 10 is usual")
        if not 1 <= num_gist_stages <= len(stages):
            raise GistError(f"num_gist_stages must be 1 to {len(stages)}, the number of stages, got {num_gist_stages}")
        stages[-num_gist_stages:] = [Stage(1.0, 0, num_gist_tokens)] * num_gist_stages
    return Plan(tuple(stages), stages[-1].condition)


def current_control(control: str | None) -> str | None:
    """Return the name of ``control``, with a ``DeprecationWarning`` where it is the old name of another."""
    if control != "compressed":
        return control
    warnings.warn(
        "the control 'compressed' will be removed in the next release; use 'shortened'",
        DeprecationWarning,
        stacklevel=3,
    )
    return "shortened"


def num_steps(arguments: TrainingArguments, num_records: int) -> int:
    """Count the optimiser steps of a training in one stage: ``max_steps``, or its epochs as ``Trainer`` counts them.

    Args:
        arguments: batch sizes, epochs, steps and the number of processes are read from them.
        num_records: number of records in an epoch.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    whole, rest = divmod(num_records, arguments.train_batch_size * arguments.world_size)
    num_batches = max(whole + bool(rest and not arguments.dataloader_drop_last), 1)
    return math.ceil(arguments.num_train_epochs * -(-num_batches // arguments.gradient_accumulation_steps))


def warmup_of(arguments: TrainingArguments, count: int) -> int:
    """Count the warm-up steps in a stage of ``count`` steps: ``arguments.warmup_steps``, or that share, rounded down.

    ``Trainer`` rounds up, which would make the single step of a short stage all warm-up, with a learning rate of 0.

    Raises:
        GistError: all steps would be warm-up.
    """
    share = arguments.warmup_steps
    steps = math.floor(share * count) if share < 1 else int(share)
    if steps >= count:
        raise GistError(f"warmup_steps must be less than the {count} steps of a stage, got {share:g}; lower it")
    return steps


def split_steps(total: int, num_stages: int) -> tuple[int, ...]:
    """Split optimiser steps over stages as evenly as whole numbers allow; the later stages get the remainder.

    Args:
        total: steps of all stages together.
        num_stages: at least 1.

    Returns:
        The steps of each stage, which add up to ``total``.

    Raises:
        GistError: there are fewer steps than stages.
    """
    size, rest = divmod(total, num_stages)
    if size < 1:
        raise GistError(
            f"max_steps must be at least {num_stages}, one for each stage, got {total}; use more steps or epochs, or "
            "smaller batches"
        )
    return tuple(size + (number >= num_stages - rest) for number in range(num_stages))


def _control(control: str, max_examples: int, share: float | None) -> Plan:
    if control == "bare":
        return Plan((Stage(0.0, 0),), "no-prompt")
    if control == "full":
        return Plan((Stage(1.0, max_examples),), "prompt")
    if control == "full-run-bare":
        return Plan((Stage(1.0, max_examples),), "no-prompt")
    if control != "shortened" or share is None:
        raise GistError(f"control must be one of {', '.join(CONTROLS)}, or None for the schedule, got {control!r}")
    if not 0 < share < 1:
        raise GistError(
            f"control_share must be above 0 and below 1, got {share:g}; for 0 and 1 use the controls bare and full"
        )
    (count, _) = Schedule((share, 0.0)).example_counts(max_examples)
    return Plan((Stage(share, count),), "prompt")
