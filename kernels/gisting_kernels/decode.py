"""Decoding: attention of a few query rows to many keys. No gradients.

Place in the flow: next to forward; **decode** -> op's callers. A single query row leaves most of a tile empty, so the
rows of the GROUP heads that read the same key head are packed into one tile. The keys are split over programs to fill
the card, and the results of the splits are merged by their log-sum-exps (base 2; FlashAttention-2, section 3.1):

    out = sum_s 2^(lse_s - m) out_s / sum_s 2^(lse_s - m)        m = max_s lse_s

Names as in ``forward.py``.
"""

# Kernels are written in Triton's language and typed for its compiler, and so are their launches.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .forward import LOG2E, cap, load_tile
from .plan import TileSizes

__all__ = ["decode_kernel", "decode_size", "merge_kernel", "run_decode"]

# Beyond this number of splits, merging costs more than splitting gains.
_MAX_SPLITS = 64


def decode_size(num_packed: int, head_size: int, bits: int, *, is_small: bool = False) -> TileSizes:
    """Return the tile of the decoding kernel.

    Args:
        num_packed: rows packed together, T times the heads of a group.
        head_size: D.
        bits: bits per element of q.
        is_small: whether the card has little shared memory.
    """
    rows, keys, warps = (64, 64, 8 if head_size > 128 else 4) if bits <= 16 else (32, 32, 4)
    if is_small and head_size > 128:
        rows, keys = 32, 32
    return TileSizes(min(rows, max(16, 1 << (num_packed - 1).bit_length())), keys, warps, 2)


@triton.jit
def decode_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_first, p_end,
    s_qb, s_qh, s_qt, s_qd, s_kb, s_kh, s_kk, s_kd, s_vb, s_vh, s_vk, s_vd,
    s_mask, num_heads, num_rows, num_keys, row_start, keys_per_split, s_split, scale, softcap,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend with BM packed rows of one key head to one split of its keys.

    Packed row r of a sequence is row ``r // GROUP`` of head ``r % GROUP`` of the group. Writes float32
    ``(splits, B, H, T, D)`` and ``(splits, B, H, T)``.
    """
    i_bg, i_block, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_groups = num_heads // GROUP
    i_b, i_g = i_bg // num_groups, i_bg % num_groups
    o_packed = i_block * BM + tl.arange(0, BM)
    m_row = o_packed < num_rows * GROUP
    o_t = o_packed // GROUP
    o_h = i_g * GROUP + o_packed % GROUP
    o_row = row_start + o_t
    o_dim = tl.arange(0, BD)
    p_rows = p_q + i_b.to(tl.int64) * s_qb + o_h.to(tl.int64) * s_qh + o_t.to(tl.int64) * s_qt
    # (BM, BD)
    b_q = tl.load(p_rows[:, None] + o_dim[None, :] * s_qd, mask=m_row[:, None] & (o_dim[None, :] < D), other=0.0)
    p_k += i_b.to(tl.int64) * s_kb + i_g.to(tl.int64) * s_kh
    p_v += i_b.to(tl.int64) * s_vb + i_g.to(tl.int64) * s_vh
    i_mask = (i_b * s_mask).to(tl.int64) * num_keys

    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    i_first = i_split * keys_per_split
    for i in tl.range(i_first, tl.minimum(i_first + keys_per_split, num_keys), BN):
        o_key = i + tl.arange(0, BN)
        m_key = o_key < num_keys
        b_k = load_tile(p_k, o_key.to(tl.int64), o_dim, s_kk, s_kd, num_keys, D, BD, False)
        b_v = load_tile(p_v, o_key.to(tl.int64), o_dim, s_vk, s_vd, num_keys, D, BD, False)
        # (BM, BN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if SOFTCAP:
            b_s = cap(b_s, scale, softcap) * LOG2E
        else:
            b_s = b_s * (scale * LOG2E)
        b_first = tl.load(p_first + i_mask + o_key, mask=m_key, other=0)
        b_end = tl.load(p_end + i_mask + o_key, mask=m_key, other=0)
        m_seen = (o_row[:, None] >= b_first[None, :]) & (o_row[:, None] < b_end[None, :])
        b_s = tl.where(m_seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.math.exp2(b_s - b_shift[:, None])
        b_decay = tl.math.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
        b_max = b_new

    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_lse = tl.where(m_empty, float("-inf"), b_max + tl.math.log2(b_sum))
    o_out = i_split.to(tl.int64) * s_split + (i_b.to(tl.int64) * num_heads + o_h) * num_rows + o_t
    p_tile = p_out + o_out[:, None] * D + o_dim[None, :]
    tl.store(p_tile, b_acc / b_sum[:, None], mask=m_row[:, None] & (o_dim[None, :] < D))
    tl.store(p_lse + o_out, b_lse, mask=m_row)


@triton.jit
def merge_kernel(
    p_parts, p_lse, p_out, s_ob, s_oh, s_ot, s_od, num_splits, num_heads, num_rows, s_split,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_split = tl.arange(0, BS)
    o_dim = tl.arange(0, BD)
    m_split = o_split < num_splits
    o_part = o_split.to(tl.int64) * s_split + i_row
    b_lse = tl.load(p_lse + o_part, mask=m_split, other=float("-inf"))
    b_max = tl.max(b_lse, 0)
    b_weight = tl.math.exp2(b_lse - tl.where(b_max == float("-inf"), 0.0, b_max))
    # (BS, BD)
    m_part = m_split[:, None] & (o_dim[None, :] < D)
    b_parts = tl.load(p_parts + o_part[:, None] * D + o_dim[None, :], mask=m_part, other=0.0)
    b_total = tl.sum(b_weight, 0)
    b_out = tl.sum(b_parts * b_weight[:, None], 0) / tl.where(b_total == 0.0, 1.0, b_total)
    i_b, i_h, i_t = i_row // (num_heads * num_rows), (i_row // num_rows) % num_heads, i_row % num_rows
    p_tile = p_out + i_b * s_ob + i_h * s_oh + i_t * s_ot + o_dim * s_od
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=o_dim < D)


def run_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    softcap: float,
    precision: str,
    num_processors: int,
    *,
    is_small: bool = False,
) -> Tensor:
    """Launch the kernels for :func:`gisting_kernels.decode_attention`, whose arguments have been checked.

    Args:
        q: ``(B, H, T, D)``, floating point.
        k: ``(B, G, K, D)``, dtype of q.
        v: ``(B, G, K, D)``, dtype of q.
        first: int32 ``(B or 1, K)``, contiguous.
        end: int32 ``(B or 1, K)``, contiguous.
        scale: factor of the scores.
        softcap: 0 for none.
        precision: precision of the matrix products, as ``tl.dot`` names it.
        num_processors: number of processors of the device; more processors make more splits.
        is_small: whether the device has little shared memory.

    Returns:
        ``(B, H, T, D)`` in the dtype and layout of q.
    """
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    batch, heads, rows, size = q.shape
    groups, num_keys = k.shape[1], k.shape[2]
    if num_keys == 0:
        return out.zero_()
    group = heads // groups
    padded = max(16, 1 << (size - 1).bit_length())
    tile = decode_size(rows * group, size, q.element_size() * 8, is_small=is_small)
    num_blocks = -(-rows * group // tile.rows)
    # Twice as many programs as processors, but no split smaller than one tile of keys.
    wanted = max(1, 2 * num_processors // (num_blocks * batch * groups))
    num_tiles = -(-num_keys // tile.keys)
    keys_per_split = -(-num_tiles // min(wanted, num_tiles, _MAX_SPLITS)) * tile.keys
    num_splits = -(-num_keys // keys_per_split)
    num_results = batch * heads * rows
    results = torch.empty((num_splits, num_results, size), dtype=torch.float32, device=q.device)
    lse = torch.empty((num_splits, num_results), dtype=torch.float32, device=q.device)
    decode_kernel[(batch * groups, num_blocks, num_splits)](
        q, k, v, results, lse, first, end, *q.stride(), *k.stride(), *v.stride(),
        0 if first.shape[0] == 1 else 1, heads, rows, num_keys, max(num_keys - rows, 0), keys_per_split, num_results,
        scale, softcap,
        GROUP=group, SOFTCAP=softcap > 0, D=size, BD=padded, BM=tile.rows, BN=tile.keys,
        PRECISION=precision, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    merge_kernel[(num_results,)](
        results, lse, out, *out.stride(), num_splits, heads, rows, num_results,
        D=size, BD=padded, BS=1 << (num_splits - 1).bit_length(), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
