"""A bias that depends on the distance between key and query alone, and its dense form.

T5 (arXiv 1910.10683, section 2.1) adds to each score a scalar for its bucket of distances, and beyond some distance all
share one bucket; so 2 W + 1 numbers a head say everything. Kernels read the table; the dense form is for those that
cannot.

Place in the flow: ``api`` asks here for implementations that take a dense bias. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_bias"]


def dense_bias(relative_bias: Tensor, num_rows: int, num_keys: int) -> Tensor:
    """The bias ``(1, H, T, K)`` of a table ``(H, 2 W + 1)``: entry ``clamp(j - i, -W, W) + W`` for row i and key j.

    Rows are the last T of the K; where T > K, they count from 0. Differentiable.

    Args:
        relative_bias: ``(H, 2 W + 1)``, of any dtype.
        num_rows: T.
        num_keys: K.

    Returns:
        ``(1, H, T, K)`` in the dtype of the table.
    """
    width = relative_bias.shape[1] // 2
    start = max(num_keys - num_rows, 0)
    rows = torch.arange(start, start + num_rows, device=relative_bias.device)[:, None]
    keys = torch.arange(num_keys, device=relative_bias.device)[None]
    return relative_bias[:, (keys - rows).clamp(-width, width) + width][None]
