"""What autocast would do to the arguments of attention, for operators that it does not know.

Place in the flow: below the implementations. Knows dtypes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_autocast", "autocast_dtype"]


def as_autocast(tensor: Tensor) -> Tensor:
    """What autocast makes of an argument of torch's scaled_dot_product_attention: the same ``tensor``, of any shape, in
    the dtype of autocast where that is on; it leaves float64 alone.
    """
    dtype = autocast_dtype(tensor)
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of ``tensor``, of any shape, or None where that is off."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
