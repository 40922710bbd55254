"""The dense form of a relative bias, which depends only on the distance between key and query.

T5 (arXiv 1910.10683, section 2.1) adds a scalar to each score, chosen by the bucket of the distance. From some distance
W on all distances share a bucket, so a table of 2 W + 1 numbers per head is enough. The kernels read the table; other
implementations need the dense form.

Place in the flow: used by ``api``. Independent of models.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense_bias"]


def dense_bias(relative_bias: Tensor, num_rows: int, num_keys: int) -> Tensor:
    """Expand a table into a dense bias: entry ``clamp(j - i, -W, W) + W`` for row i and key j. Differentiable.

    The rows are the last T of the K rows; if T > K, they are counted from 0.

    Args:
        relative_bias: the table ``(H, 2 W + 1)``, of any dtype.
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
