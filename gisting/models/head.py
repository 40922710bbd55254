"""Logits at chosen tokens alone.

Place in the flow: around a forward pass of a model whose loss needs few of its logits. A vocabulary of 50,000 makes the
logits of every token the largest tensors of a training step; the head's input is cut down to the rows that are asked
for, and whatever a model does to its logits afterwards (a softcap, a scale) goes on as it is. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["logits_at"]


@contextmanager
def logits_at(model: Any, places: Tensor) -> Iterator[None]:
    """A block in which ``model`` gives logits ``(1, T, V)`` of T rows of its last hidden states.

    Args:
        model: a model with a head, as transformers made it (not wrapped for several devices); nothing else calls it
            meanwhile.
        places: int64 ``(T,)``: numbers of rows, counted through the batch: ``row * N + column``. On the device of the
            hidden states.
    """

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = args
        return hidden.flatten(0, 1).index_select(0, places)[None], *others

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
