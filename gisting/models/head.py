"""Logits at selected tokens only.

Place in the flow: around a forward pass of a model whose loss needs few of its logits. With a vocabulary of 50,000, the
logits of every token would be the largest tensors of a training step. So the head's input is cut down to the selected
rows; what a model does to its logits afterwards (a softcap, a scale) is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["logits_at"]


@contextmanager
def logits_at(model: Any, places: Tensor) -> Iterator[None]:
    """Make ``model`` return logits ``(1, T, V)`` of T rows of its last hidden states, within a block.

    Args:
        model: a transformers model with a head, not wrapped for several devices. Nothing else may call it meanwhile.
        places: int64 ``(T,)``, on the device of the hidden states: indices into the flattened batch, ``row * N +
            column``.
    """

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = args
        return hidden.flatten(0, 1).index_select(0, places)[None], *others

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
