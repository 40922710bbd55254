"""A model's training mode, for the time of a call.

Place in the flow: around whatever runs a model to read something from it. Knows no call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A block in which ``model`` is in eval mode: no dropout, and no activation checkpointing, which would drop the
    states.

    Each module goes back to its own mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
