"""Read a model's input embedding as a plain tensor, whose dtype and device represent the model's.

Place in the flow: below everything that needs the dtype or device of a model, or its tables with a row for each token.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["input_weight", "row_tensors"]


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
