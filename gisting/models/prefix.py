"""Keys and values of a prefix in a training step: computed in one pass, and continued from in several.

Place in the flow: ``train/objective.py`` runs a batch's prompts into one, and student and teacher continue from it.
transformers' own dynamic layers start by making a tensor from Python numbers and copying their first states, which
costs host time in every layer of every pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["PrefixStates"]


class _Layer(DynamicLayer):
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        keys: Any = self.keys
        values: Any = self.values
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class PrefixStates(Cache):
    """A transformers cache that keeps the keys and values of the first pass, ``(B, G, P, D)`` per layer.

    Every later pass sees these followed by its own, which are not kept.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
