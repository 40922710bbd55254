"""The oracle of interval attention: plain and dense, in float32 or better. It is not meant to be fast.

It defines the corner cases: a query row that sees no key gives zeros and has zero gradients.

Place in the flow: ``api`` -> **reference** -> the caller. The other implementations do not use it; tests compare them
with it.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from gisting.attention.autocast import has_autocast
from gisting.visibility import Visibility

__all__ = ["reference_attention"]


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention densely. Arguments and result as for :func:`gisting.attention.interval_attention`."""
    # Autocast would compute the products in half precision.
    device_type = q.device.type
    can_autocast = has_autocast(device_type)
    with torch.autocast(device_type, enabled=False) if can_autocast else contextlib.nullcontext():
        return _attend(q, k, v, visibility, bias, scale, softcap, dropout, sinks)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    sinks: Tensor | None,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.repeat_interleave(group, dim=1).to(dtype)
    v = v.repeat_interleave(group, dim=1).to(dtype)
    # (B, H, T, K)
    scores = q.to(dtype) @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.to(dtype)
    seen = visibility.to_dense(q.shape[2])[:, None]
    scores = scores.masked_fill(~seen, torch.finfo(dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    # The finite fill value keeps the softmax of an empty row finite. Multiplying by the mask then sets the weights of
    # such a row, and their gradients, to zero.
    weights = scores.softmax(-1)[..., : k.shape[2]] * seen
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ v).to(q.dtype)
