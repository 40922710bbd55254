"""The embedding of a model as a plain tensor: its rows, its dtype and its device speak for the model's.

Place in the flow: below whatever asks where a model lies, and in which dtype.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["input_weight"]


def input_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding of ``model``, ``(vocabulary, d_model)`` in its own dtype."""
    return cast(Tensor, model.get_input_embeddings().weight)
