"""The forward kernel: out = softmax(scores) v over the keys that a row sees, and the log-sum-exp of each row.

Place in the flow: plan -> **forward** -> op. The scores are ``s = scale q k^T``, then ``softcap tanh(s / softcap)``,
then plus T5's relative bias (arXiv 1910.10683). A program keeps, for its tile of rows, the running maximum m, the
running sum l and the unnormalised output of the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867;
FlashAttention-2, arXiv 2307.08691):

    m' = max(m, max_j s_j)      l' = l 2^(m - m') + sum_j 2^(s_j - m')      acc' = acc 2^(m - m') + 2^(s - m') v

Scores and the log-sum-exp are kept in base 2 (multiplied by log2 e), because the hardware has ``exp2``. A row that sees
no key has l = 0. It gives zeros and a log-sum-exp of +infinity, with which 2^(s - lse) is 0 in the backward.

The loop over the list of tiles carries the next index, because Triton could not load ahead otherwise. It loads the same
data for partial and full tiles: a branch around the loads would prevent software pipelining, while a branch around the
mask does not.

Names: ``i_`` index, ``o_`` offsets, ``p_`` pointer, ``b_`` block of values, ``m_`` mask, ``s_`` stride in elements.
"""

# Kernels are written in Triton's language and typed for its compiler, and so are their launches.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

__all__ = ["LOG2E", "bias_tile", "cap", "forward_kernel", "keep_tile", "load_tile", "tanh"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Compute tanh in float32, by a power series where the quotient would cancel."""
    small = x * x
    series = x * (1.0 + small * (-1.0 / 3 + small * (2.0 / 15 + small * (-17.0 / 315 + small * (62.0 / 2835)))))
    quotient = 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))
    return tl.where(tl.abs(x) < 0.25, series, quotient)


@triton.jit
def cap(b_dot, scale, softcap):
    """Compute softcap tanh(scale q k^T / softcap), not in base 2."""
    return softcap * tanh(b_dot * (scale / softcap))


@triton.jit
def bias_tile(p_table, i_h, o_row, o_key, s_table, WIDTH):
    """Gather the relative bias of a tile: entry clamp(j - i, -W, W) + W of the head's row of the table."""
    o_entry = tl.minimum(tl.maximum(o_key - o_row, -WIDTH), WIDTH) + WIDTH
    return tl.load(p_table + i_h * s_table + o_entry)


@triton.jit
def keep_tile(seed, i_bh, o_row, o_key, num_keys, dropout):
    """Choose the weights that dropout keeps, as a function of seed, head, row and key, so the backward keeps the same.

    The pair is numbered modulo 2^32, so the pattern repeats beyond 65,536 rows and keys.
    """
    return tl.rand(seed + tl.cast(i_bh, tl.int64) * 2654435769, o_row * num_keys + o_key) >= dropout


@triton.jit
def load_tile(p_base, o_row, o_dim, s_row, s_dim, num_rows, D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr):
    """Load a tile (rows, BD). Rows from ``num_rows`` on and dimensions from D on are 0."""
    p_tile = p_base + o_row[:, None] * s_row + o_dim[None, :] * s_dim
    if EVEN:
        if D == BD:
            return tl.load(p_tile)
        else:
            return tl.load(p_tile, mask=o_dim[None, :] < D, other=0.0)
    else:
        if D == BD:
            return tl.load(p_tile, mask=o_row[:, None] < num_rows, other=0.0)
        else:
            return tl.load(p_tile, mask=(o_row[:, None] < num_rows) & (o_dim[None, :] < D), other=0.0)


@triton.jit
def load_block(descriptor, i_b, i_h, i_row, ROWS: tl.constexpr, BD: tl.constexpr):
    """Load a tile (ROWS, BD) of one head by the tensor copy unit. What is beyond the tensor is 0."""
    return descriptor.load([i_b, i_h, i_row, 0]).reshape(ROWS, BD)


@triton.jit
def _walk(
    b_acc, b_sum, b_max, b_q, p_k, p_v, p_first, p_end, p_list, i_begin, i_masked, i_end,
    o_row, o_dim, i_b, i_g, s_kk, s_kd, s_vk, s_vd, num_keys, scale,
    p_table, i_h, s_table, seed, i_bh, softcap, dropout,
    NEAR: tl.constexpr, BIAS: tl.constexpr, WIDTH, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Walk the tiles ``i_begin <= i < i_end`` of the list. Tiles before ``i_masked`` are partial.

    With NEAR, the bias is gathered; otherwise the bias of a tile is one scalar.
    """
    i_next = tl.load(p_list + i_begin)
    for i in tl.range(i_begin, i_end):  # pyright: ignore
        i_tile = i_next
        i_next = tl.load(p_list + i + 1)
        o_key = i_tile * BN + tl.arange(0, BN)
        # (BN, BD)
        if DESCRIPTORS:
            b_k = load_block(p_k, i_b, i_g, i_tile * BN, BN, BD)
        else:
            b_k = load_tile(p_k, o_key.to(tl.int64), o_dim, s_kk, s_kd, num_keys, D, BD, EVEN_K)
        b_first = tl.load(p_first + o_key, mask=o_key < num_keys, other=0)
        b_end = tl.load(p_end + o_key, mask=o_key < num_keys, other=0)
        # (BM, BN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if SOFTCAP:
            b_s = cap(b_s, scale, softcap) * LOG2E
        elif BIAS:
            b_s = b_s * (scale * LOG2E)
        if BIAS:
            if NEAR:
                b_s += bias_tile(p_table, i_h, o_row[:, None], o_key[None, :], s_table, WIDTH) * LOG2E
            else:
                is_right = i_tile * BN > tl.min(o_row, 0)
                b_s += tl.load(p_table + i_h * s_table + tl.where(is_right, 2 * WIDTH, 0)) * LOG2E
        if i < i_masked:
            m_seen = (o_row[:, None] >= b_first[None, :]) & (o_row[:, None] < b_end[None, :])
            b_s = tl.where(m_seen, b_s, float("-inf"))
        # Without softcap and bias, the scale is part of the exponent, as one fused multiply-add.
        factor = 1.0 if SOFTCAP or BIAS else scale * LOG2E
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * factor)
        # A row that has seen no key yet has the maximum -infinity, and -inf - -inf would be NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.math.exp2(b_s * factor - b_shift[:, None])
        b_decay = tl.math.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        if DROPOUT:
            m_keep = keep_tile(seed, i_bh, o_row[:, None], o_key[None, :], num_keys, dropout)
            b_p = tl.where(m_keep, b_p / (1.0 - dropout), 0.0)
        if DESCRIPTORS:
            b_v = load_block(p_v, i_b, i_g, i_tile * BN, BN, BD)
        else:
            b_v = load_tile(p_v, o_key.to(tl.int64), o_dim, s_vk, s_vd, num_keys, D, BD, EVEN_K)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        b_max = b_new
    return b_acc, b_sum, b_max


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_first, p_end, p_tiles, p_counts, p_order, p_table, p_seed,
    s_qb, s_qh, s_qt, s_qd, s_kb, s_kh, s_kk, s_kd, s_vb, s_vh, s_vk, s_vd, s_ob, s_oh, s_ot, s_od,
    s_mask, s_table, num_heads, num_rows, num_keys, row_start, num_row_tiles, num_key_tiles, scale, softcap, dropout,
    WIDTH,
    GROUP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Attend with BM rows of one query head. ``s_mask`` is 1, or 0 if one mask serves every sequence.

    Heads that share keys run in neighbouring programs, which find the keys in the L2 cache. Tiles of rows with the
    longest lists come first.
    """
    i_program = tl.program_id(0)
    i_group = i_program % GROUP
    i_rank = (i_program // GROUP) % num_row_tiles
    i_bg = i_program // (GROUP * num_row_tiles)
    num_groups = num_heads // GROUP
    i_b, i_g = i_bg // num_groups, i_bg % num_groups
    i_h = i_g * GROUP + i_group
    i_bh = i_b * num_heads + i_h
    i_mask = (i_b * s_mask).to(tl.int64)
    i_tile = tl.load(p_order + i_mask * num_row_tiles + i_rank)
    i_list = i_mask * num_row_tiles + i_tile

    o_query = i_tile * BM + tl.arange(0, BM)
    o_row = row_start + o_query
    o_dim = tl.arange(0, BD)
    if not DESCRIPTORS:
        p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
        p_k += i_b.to(tl.int64) * s_kb + i_g.to(tl.int64) * s_kh
        p_v += i_b.to(tl.int64) * s_vb + i_g.to(tl.int64) * s_vh
    p_out += i_b.to(tl.int64) * s_ob + i_h.to(tl.int64) * s_oh
    p_first += i_mask * num_keys
    p_end += i_mask * num_keys
    p_list = p_tiles + i_list * (num_key_tiles + 1)
    i_near = tl.load(p_counts + i_list * 3)
    i_partial = tl.load(p_counts + i_list * 3 + 1)
    i_full = tl.load(p_counts + i_list * 3 + 2)
    seed = tl.load(p_seed) if DROPOUT else 0

    # (BM, BD)
    if DESCRIPTORS:
        b_q = load_block(p_q, i_b, i_h, i_tile * BM, BM, BD)
    else:
        b_q = load_tile(p_q, o_query.to(tl.int64), o_dim, s_qt, s_qd, num_rows, D, BD, False)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    if BIAS:
        b_acc, b_sum, b_max = _walk(
            b_acc, b_sum, b_max, b_q, p_k, p_v, p_first, p_end, p_list, 0, i_near, i_near,
            o_row, o_dim, i_b, i_g, s_kk, s_kd, s_vk, s_vd, num_keys, scale,
            p_table, i_h, s_table, seed, i_bh, softcap, dropout,
            True, BIAS, WIDTH, SOFTCAP, DROPOUT, BN, D, BD, EVEN_K, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    b_acc, b_sum, b_max = _walk(
        b_acc, b_sum, b_max, b_q, p_k, p_v, p_first, p_end, p_list, i_near, i_partial, i_full,
        o_row, o_dim, i_b, i_g, s_kk, s_kd, s_vk, s_vd, num_keys, scale,
        p_table, i_h, s_table, seed, i_bh, softcap, dropout,
        False, BIAS, WIDTH, SOFTCAP, DROPOUT, BN, D, BD, EVEN_K, PRECISION, DESCRIPTORS,
    )  # fmt: skip

    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_lse = tl.where(m_empty, float("inf"), b_max + tl.math.log2(b_sum))
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    m_row = o_query < num_rows
    p_tile = p_out + o_query.to(tl.int64)[:, None] * s_ot + o_dim[None, :] * s_od
    tl.store(p_tile, b_out, mask=m_row[:, None] & (o_dim[None, :] < D))
    tl.store(p_lse + i_bh.to(tl.int64) * num_rows + o_query, b_lse, mask=m_row)
