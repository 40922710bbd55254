"""Read a model's input embedding as a plain tensor, whose dtype and device represent the model's.

Place in the flow: below everything that needs to know the dtype or device of a model.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["input_weight"]


def input_weight(model: PreTrainedModel) -> Tensor:
    """Return the input embedding of ``model``, ``(vocabulary, d_model)``, in its own dtype.

    Args:
        model: any model.
    """
    return cast(Tensor, model.get_input_embeddings().weight)
