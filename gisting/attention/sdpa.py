"""Interval attention with torch's fused operator: in pieces that need no mask, or with a dense mask.

On a CPU, the intervals are cut into rectangles and causal pieces (``pieces.py``) if that is cheaper. Then the time is
proportional to the visible pairs, and memory to T and K. With a dense mask, memory is O(T K) for each sequence (not for
each head), or for each head with a bias or sinks. torch's operator has no softcap.

Place in the flow: ``api`` -> **sdpa** -> torch. Uses no other implementation except the pieces.
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
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention with torch's operator.

    Arguments and result as for :func:`gisting.attention.interval_attention`, without softcap.

    On a CPU, attention runs in pieces if they are estimated to take less time: if the mask consists of a few long runs
    of keys and hides a good part of the pairs. It can then be differentiated once. The mask is dense on other devices,
    with a bias or dropout, if v and q have different head sizes, if ``scale`` is not positive, inside ``torch.compile``
    and ``torch.func`` (because the pieces depend on data), for subclasses of Tensor (which may hold no data), if
    ``torch.nn.attention.sdpa_kernel`` has switched the fused operator off, and if this torch does not have it.
    """
    pieces = None if bias is not None or dropout else _pieces(q, k, v, visibility, scale)
    if pieces is None:
        return dense_attention(q, k, v, visibility, bias=bias, scale=scale, dropout=dropout, sinks=sinks)
    return attend_pieces(as_autocast(q), as_autocast(k), as_autocast(v), pieces, scale, sinks)


def _pieces(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Plan | None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in (q, k, v, visibility.first, visibility.end)):
        return None
    if q.device.type != "cpu" or v.shape[-1] != q.shape[-1] or not scale > 0:
        return None
    (batch, heads, num_rows, size), num_keys = q.shape, k.shape[2]
    # For decoding and small batches, examining the intervals would take longer than attention itself.
    if batch * heads * num_rows * size * num_keys <= 2 * call_cost():
        return None
    # The CPU operator also obeys this flag, which sdpa_kernel(...) sets.
    if not torch.backends.cuda.flash_sdp_enabled() or not is_available():
        return None
    work = heads * size * (batch if visibility.batch_size == 1 else 1)
    return remembered(visibility, ("pieces", num_rows, work), lambda: plan_if_cheaper(visibility, num_rows, work))


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention with a dense mask, on any device. Arguments and result as for :func:`sdpa_attention`."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        # With a mask, torch's own grouping (enable_gqa) does not use the fused kernels on any device.
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    seen = visibility.to_dense(q.shape[2])[:, None]
    # For a row that sees no key, torch's kernels give zeros, NaN or the mean of v. Let it see every key, then zero it.
    is_empty = ~seen.any(-1, keepdim=True)
    seen = seen | is_empty
    mask = seen if bias is None else bias.to(q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    if sinks is not None:
        # The sink is the score of one more key, which is 0 and so is its value.
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        shape = (q.shape[0], q.shape[1], q.shape[2], 1)
        column = sinks.to(q.dtype)[:, None, None].expand(shape)
        mask = torch.cat([mask.expand(*shape[:3], -1), column], dim=-1)
        k, v = torch.nn.functional.pad(k, (0, 0, 0, 1)), torch.nn.functional.pad(v, (0, 0, 0, 1))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.masked_fill(is_empty, 0.0)
