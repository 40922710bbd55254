"""Interval attention through torch's own fused operator: by pieces that need no mask, or with the mask made dense.

On a CPU the intervals are cut into rectangles and causal pieces (``pieces.py``) where that is cheaper: time then goes
by the pairs that are seen, and memory by T and K. With a dense mask, memory is O(T K) for each sequence (not for each
head). No softcap: torch's operator has none.

Place in the flow: ``api`` -> **sdpa** -> torch. Knows no other implementation but the pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gisting.attention.autocast import as_autocast
from gisting.attention.memo import remembered
from gisting.attention.pieces import Plan, attend_pieces, call_cost, is_available, plan_if_cheaper
from gisting.visibility import Visibility

__all__ = ["dense_attention", "sdpa_attention"]


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
    """Arguments and result as :func:`gisting.attention.interval_attention`, already checked; without softcap.

    By pieces on a CPU, where these are estimated to take less time: a few long runs of keys with a good part hidden.
    Dense elsewhere, and with a bias, with dropout, where v has another head size than q, where ``scale`` is not
    positive, inside ``torch.compile`` and ``torch.func`` (the pieces depend on data), for subclasses of Tensor (which
    may hold none), where ``torch.nn.attention.sdpa_kernel`` has the fused operator switched off, and in a torch that
    does not have it. By pieces it can be differentiated once.
    """
    pieces = None if bias is not None or dropout else _pieces(q, k, v, visibility, scale)
    if pieces is None:
        return dense_attention(q, k, v, visibility, bias=bias, scale=scale, dropout=dropout)
    return attend_pieces(as_autocast(q), as_autocast(k), as_autocast(v), pieces, scale)


def _pieces(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Plan | None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in (q, k, v, visibility.first, visibility.end)):
        return None
    if q.device.type != "cpu" or v.shape[-1] != q.shape[-1] or not scale > 0:
        return None
    (batch, heads, num_rows, size), num_keys = q.shape, k.shape[2]
    # Decoding and small batches: looking at the intervals would take longer than attention does.
    if batch * heads * num_rows * size * num_keys <= 2 * call_cost():
        return None
    # Under sdpa_kernel(...) too, the flag of this name is the one that the CPU's operator heeds.
    if not torch.backends.cuda.flash_sdp_enabled() or not is_available():
        return None
    work = heads * size * (batch if visibility.batch_size == 1 else 1)
    return remembered(visibility, ("pieces", num_rows, work), lambda: plan_if_cheaper(visibility, num_rows, work))


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Arguments and result as :func:`sdpa_attention`; with the mask made dense, on any device."""
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
