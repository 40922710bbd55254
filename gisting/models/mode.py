"""Eval mode for the duration of a call.

Place in the flow: around everything that runs a model to read something from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

__all__ = ["evaluating"]


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Put ``models`` in eval mode for a block: no dropout, and no activation checkpointing, which would drop states.

    Afterwards each of their modules is in the mode it was in before.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
