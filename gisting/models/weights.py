"""Read a model's input embedding as a plain tensor, whose dtype and device represent the model's, and change the dtype.

Place in the flow: below everything that needs the dtype or device of a model, or its tables with a row for each token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["input_weight", "row_tensors", "to_dtype"]


def input_weight(model: PreTrainedModel) -> Tensor:
    """Return the input embedding of ``model``, ``(vocabulary, d_model)``, in its own dtype.

    Args:
        model: any model.
    """
    return cast(Tensor, model.get_input_embeddings().weight)


def row_tensors(model: PreTrainedModel) -> list[Tensor]:
    """Return the tensors with a row for each token: input embedding, untied output weight, and output bias.

    Args:
        model: a model with a language model head.
    """
    tensors = [input_weight(model)]
    head: Any = model.get_output_embeddings()
    if head.weight is not tensors[0]:
        tensors.append(head.weight)
    if getattr(head, "bias", None) is not None:
        tensors.append(head.bias)
    return [tensor.detach() for tensor in tensors]


def to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of a model's floating-point parameters, in place; gradients are dropped.

    Buffers stay as they are: rotary frequencies lose precision in 16 bits. Sharded parameters (``DTensor``) are changed
    in every process.

    Args:
        model: any model.
        dtype: the new dtype.
    """
    model.zero_grad(set_to_none=True)
    # Unlike an assignment to ``parameter.data``, this also reaches the shards of FSDP2.
    model._apply(
        lambda tensor: tensor.to(dtype) if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor
    )
