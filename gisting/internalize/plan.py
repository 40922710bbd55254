"""Which stages there are: of an internalisation, of one that ends in a gist, and of the controls that it is shown
against.

Place in the flow: schedule -> **plan** -> the loop over its stages. Every way to train is a list of stages and a
condition under which the finished model is run, so that controls go through the same code:

=================== ========================================== ==================
                    stages                                     run on
=================== ========================================== ==================
none                those of the schedule                      the bare query
none, tail gist     the same, the last ones behind a gist      k gist tokens
``bare``            the bare query                             the bare query
``full``            the full prompt                            the full prompt
``full-run-bare``   the full prompt                            the bare query
``compressed``      the prompt at one fixed share              the same prompt
=================== ========================================== ==================

Pure arithmetic: knows no text and no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from gisting.errors import GistError
from gisting.internalize.schedule import Schedule

__all__ = ["CONTROLS", "TAILS", "Plan", "Stage", "make_plan", "num_steps", "split_steps", "warmup_of"]

#: What an internalisation is compared with.
CONTROLS = ("bare", "full", "full-run-bare", "compressed")
#: What is left of the prompt in the end.
TAILS = ("none", "gist")


@dataclass(frozen=True)
class Stage:
    """What a request holds in one stage.

    Args:
        share: of the template, from 1, all of it, to 0.
        num_examples: at most so many in a prompt.
        num_gist_tokens: k, where the prompt is read through a gist; None for ordinary text.
    """

    share: float
    num_examples: int
    num_gist_tokens: int | None = None

    @property
    def condition(self) -> str:
        """What a request of this stage is to an evaluation: ``"prompt"``, ``"no-prompt"`` or ``"gist"``."""
        if self.num_gist_tokens is not None:
            return "gist"
        return "prompt" if self.share or self.num_examples else "no-prompt"


@dataclass(frozen=True)
class Plan:
    """Stages in their order, and the condition under which the finished model is run.

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
    """The stages of a training.

    Args:
        schedule: shares of the template; not asked for a control.
        max_examples: examples in a full prompt.
        tail: ``"none"``, or ``"gist"``: the last stages read the full template through its gist, in place of what the
            schedule says. They have no examples, for those are others for every query, and the gist is to be one for
            all.
        num_gist_tokens: k of such a stage.
        num_gist_stages: how many of them there are.
        control: a name of ``CONTROLS``, or None for the schedule.
        control_share: of ``"compressed"``: above 0 and below 1.

    Raises:
        GistError: a name is unknown, a number out of range, or a control has a tail.
    """
    counts = schedule.example_counts(max_examples)
    if tail not in TAILS:
        raise GistError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if (control == "compressed") != (control_share is not None):
        raise GistError(f"control_share goes with control='compressed', got {control_share!r} with {control!r}")
    if control is not None:
        if tail != "none":
            raise GistError(f"control is {control!r}, which has no stage for tail={tail!r}; leave one out")
        return _control(control, max_examples, control_share)
    stages = [Stage(share, count) for share, count in zip(schedule.shares, counts, strict=True)]
    if tail == "gist":
        if num_gist_tokens < 1:
            raise GistError(f"num_gist_tokens must be at least 1, got {num_gist_tokens}; 1 to 10 is usual")
        if not 1 <= num_gist_stages <= len(stages):
            raise GistError(f"num_gist_stages must be 1 to {len(stages)}, the number of stages, got {num_gist_stages}")
        stages[-num_gist_stages:] = [Stage(1.0, 0, num_gist_tokens)] * num_gist_stages
    return Plan(tuple(stages), stages[-1].condition)


def num_steps(arguments: TrainingArguments, num_records: int) -> int:
    """The optimiser steps of a training in one stage: ``max_steps``, or those of its epochs as ``Trainer`` counts them.

    Args:
        arguments: of which batch sizes, epochs and steps are read.
        num_records: of an epoch.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    whole, rest = divmod(num_records, arguments.train_batch_size)
    num_batches = max(whole + bool(rest and not arguments.dataloader_drop_last), 1)
    return math.ceil(arguments.num_train_epochs * -(-num_batches // arguments.gradient_accumulation_steps))


def warmup_of(arguments: TrainingArguments, count: int) -> int:
    """Steps of warm-up in a stage of ``count`` steps: ``arguments.warmup_steps``, or that share of them, rounded down.
    (Rounded up, as ``Trainer`` does, the one step of a short stage would be all warm-up, with a learning rate of 0.)

    Raises:
        GistError: there would be nothing but warm-up.
    """
    share = arguments.warmup_steps
    steps = math.floor(share * count) if share < 1 else int(share)
    if steps >= count:
        raise GistError(f"warmup_steps must be less than the steps of a stage, {count}, got {share:g}; lower it")
    return steps


def split_steps(total: int, num_stages: int) -> tuple[int, ...]:
    """Split optimiser steps over stages as evenly as whole numbers allow, the later ones first to get one more.

    Args:
        total: of all stages together.
        num_stages: at least 1.

    Returns:
        The steps of each stage; their sum is ``total``.

    Raises:
        GistError: there are fewer steps than stages.
    """
    size, rest = divmod(total, num_stages)
    if size < 1:
        raise GistError(
            f"max_steps must be at least {num_stages}, one for each stage, got {total}; give more steps or epochs, or "
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
    if control != "compressed" or share is None:
        raise GistError(f"control must be one of {', '.join(CONTROLS)}, or None for the schedule, got {control!r}")
    if not 0 < share < 1:
        raise GistError(f"control_share must be above 0 and below 1, got {share:g}; the ends are controls of their own")
    (count, _) = Schedule((share, 0.0)).example_counts(max_examples)
    return Plan((Stage(share, count),), "prompt")
