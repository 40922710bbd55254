"""Interval attention through torch's scaled_dot_product_attention, with the mask made dense for the call.

Memory is O(T K) booleans for each sequence (not for each head). No softcap: torch's operator has none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gisting.visibility import Visibility

__all__ = ["sdpa_attention"]


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Arguments and result as :func:`gisting.attention.interval_attention`, already checked; without softcap."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        # Expanded by hand: with a mask, torch's own grouping (enable_gqa) leaves the fused kernels on every device.
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    seen = visibility.to_dense(q.shape[2])[:, None]
    # torch's kernels disagree on a row that sees nothing (zeros, NaN or the mean of v). It is shown everything, then
    # zeroed.
    is_empty = ~seen.any(-1, keepdim=True)
    seen = seen | is_empty
    mask = seen if bias is None else bias.to(q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.masked_fill(is_empty, 0.0)
