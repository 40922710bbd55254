"""Apply autocast to the arguments of attention, for operators that autocast does not handle.

Place in the flow: below the implementations. Depends on dtypes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_autocast", "autocast_dtype"]


def as_autocast(tensor: Tensor) -> Tensor:
    """Convert ``tensor``, of any shape, to the dtype of autocast if autocast is on.

    This is what autocast does to the arguments of torch's scaled_dot_product_attention: it leaves float64 unchanged.
    """
    dtype = autocast_dtype(tensor)
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on the device of ``tensor``, of any shape, or None if autocast is off there."""
    device = tensor.device.type
    # The usual devices have autocast, and torch.compile of torch 2.11 cannot trace the question.
    has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not has_autocast or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
