"""Eval mode for the duration of a call.

Place in the flow: around everything that runs a model to read something from it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

__all__ = ["evaluating"]

_lock = threading.Lock()
# For each module, how many blocks it is in now, and its mode before the first of them. Empty between calls.
_inside: dict[nn.Module, tuple[int, bool]] = {}


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Put ``models`` in eval mode for a block: no dropout, and no activation checkpointing, which would drop states.

    Afterwards each of their modules is in the mode it was in before. Several threads may be in blocks of one model: the
    last of them to leave restores it. A thread that trains the model meanwhile trains it in eval mode.
    """
    modules = dict.fromkeys(module for model in models for module in model.modules())
    with _lock:
        for module in modules:
            blocks, mode = _inside.get(module, (0, module.training))
            _inside[module] = (blocks + 1, mode)
        for model in models:
            model.eval()
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                blocks, mode = _inside.pop(module)
                if blocks > 1:
                    _inside[module] = (blocks - 1, mode)
                else:
                    module.training = mode
