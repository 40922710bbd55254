"""The backward kernels: gradients of q, k, v and of the relative bias. No atomics, so equal runs give equal bits.

Place in the flow: plan, forward -> **backward** -> op. With P = softmax(S), out = P v, and g the gradient of out:

    dv_j  = sum_i P_ij g_i                       dP_ij = g_i . v_j
    dS_ij = P_ij (dP_ij - delta_i)               delta_i = sum_j P_ij dP_ij = g_i . out_i
    dq_i  = scale sum_j dS_ij k_j                dk_j  = scale sum_i dS_ij q_i
    dbias[d] = sum over i, j with clamp(j - i, -W, W) = d of dS_ij

P is recomputed from q, k and the log-sum-exp of the forward. Under dropout with keep mask Z and rate r, P in dv becomes
P Z / (1 - r) and dP becomes dP Z / (1 - r), while delta = g . out is unchanged. Under a softcap c, the gradient of the
score before the cap is dS (1 - (s / c)^2), where s is the score after it.

The dQ kernel runs first. It computes delta and walks the lists of the plan, as the forward does. The dK/dV kernel keeps
a tile of keys and walks the rows that see any of them, which are one contiguous range. It has a single flat loop over
(head of the group, tile of rows), because nested loops spill registers. Its products start at -lse and -delta instead
of 0, if neither a softcap nor dropout comes in between: rows are columns of its tiles, so a thread would hold 32 of
these numbers beside the products.

With DESCRIPTORS, tiles are loaded by the tensor copy unit (``descriptors.py``) and only partial tiles test the mask. By
pointers, the mask is always tested, because the branch makes the compiler for older cards spill most registers. Two
small programs on a processor are faster than one large: while one waits for its products, the other computes.

For dbias (of a bias like T5's, arXiv 1910.10683), all distances of W or more share one entry on each side. The dQ
kernel sums these as it goes, two numbers per row. For smaller distances, the table kernel visits the near tiles once
more. It shears the tile of dS so that diagonals become columns, sums the columns, and adds the sums to a row of partial
results that belongs to this program alone; a sum over programs follows. Exactly one of the two kernels counts each
pair, even if their tiles have different shapes. Names as in ``forward.py``.
"""

# Kernels are written in Triton's language and typed for its compiler, and so are their launches.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .forward import LOG2E, bias_tile, cap, keep_tile, load_block, load_tile

__all__ = ["key_kernel", "query_kernel", "table_kernel"]


@triton.jit
def _score_gradient(
    b_s, b_dp, b_lse, b_delta, o_row, b_first, b_end, is_partial, b_bias, m_keep, scale, softcap, dropout,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """From q k^T and g v^T of a tile, compute P (after dropout), dS of the final score, and dS before the softcap.

    The tile may be (rows, keys) or (keys, rows); ``b_lse``, ``b_delta``, ``o_row``, ``b_first`` and ``b_end`` broadcast
    to it. With BRANCH, the mask is tested only if ``is_partial``; otherwise it is always tested, because the compiler
    for older cards spills most registers at the branch.
    """
    if SOFTCAP:
        b_s = cap(b_s, scale, softcap)
        b_slope = 1.0 - (b_s / softcap) * (b_s / softcap)
        b_s = b_s * LOG2E
    else:
        b_s = b_s * (scale * LOG2E)
    if BIAS:
        b_s += b_bias * LOG2E
    # The weight of a hidden pair may be infinite before the mask replaces it. Nothing may be multiplied in between.
    b_p = tl.math.exp2(b_s - b_lse)
    if BRANCH:
        if is_partial:
            b_p = tl.where((o_row >= b_first) & (o_row < b_end), b_p, 0.0)
    else:
        b_p = tl.where((o_row >= b_first) & (o_row < b_end), b_p, 0.0)
    b_dropped = b_p
    if DROPOUT:
        b_dropped = tl.where(m_keep, b_p / (1.0 - dropout), 0.0)
        b_dp = tl.where(m_keep, b_dp / (1.0 - dropout), 0.0)
    b_ds = b_p * (b_dp - b_delta)
    b_du = b_ds
    if SOFTCAP:
        b_du = b_ds * b_slope
    return b_dropped, b_ds, b_du


@triton.jit
def _query_walk(
    b_dq, b_left, b_right, b_q, b_grad, b_lse, b_delta, p_k, p_v, p_first, p_end, p_list, i_begin, i_masked, i_end,
    o_row, o_dim, i_b, i_g, s_kk, s_kd, s_vk, s_vd, num_keys, scale,
    p_table, far_left, far_right, i_h, s_table, seed, i_bh, softcap, dropout,
    NEAR: tl.constexpr, BIAS: tl.constexpr, WIDTH, TABLE_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Walk the tiles ``i_begin <= i < i_end`` of the list. Tiles before ``i_masked`` are partial.

    With NEAR, the bias is gathered; otherwise the bias of a tile is one scalar, ``far_left`` or ``far_right``.
    """
    i_next = tl.load(p_list + i_begin)
    for i in tl.range(i_begin, i_end):  # pyright: ignore
        i_tile = i_next
        i_next = tl.load(p_list + i + 1)
        o_key = i_tile * BN + tl.arange(0, BN)
        # (BN, BD)
        if DESCRIPTORS:
            b_k = load_block(p_k, i_b, i_g, i_tile * BN, BN, BD)
            b_v = load_block(p_v, i_b, i_g, i_tile * BN, BN, BD)
        else:
            b_k = load_tile(p_k, o_key.to(tl.int64), o_dim, s_kk, s_kd, num_keys, D, BD, EVEN_K)
            b_v = load_tile(p_v, o_key.to(tl.int64), o_dim, s_vk, s_vd, num_keys, D, BD, EVEN_K)
        b_first = tl.load(p_first + o_key, mask=o_key < num_keys, other=0)
        b_end = tl.load(p_end + o_key, mask=o_key < num_keys, other=0)
        b_bias, b_minus, is_right, m_keep = 0.0, b_lse, True, True
        if BIAS:
            if NEAR:
                b_bias = bias_tile(p_table, i_h, o_row[:, None], o_key[None, :], s_table, WIDTH)
            else:
                is_right = i_tile * BN > tl.min(o_row, 0)
                b_minus = b_lse - tl.where(is_right, far_right, far_left) * LOG2E
        if DROPOUT:
            m_keep = keep_tile(seed, i_bh, o_row[:, None], o_key[None, :], num_keys, dropout)
        # (BM, BN)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
        _, b_ds, b_du = _score_gradient(
            b_s, b_dp, b_minus[:, None], b_delta[:, None], o_row[:, None], b_first[None, :], b_end[None, :],
            i < i_masked, b_bias, m_keep, scale, softcap, dropout, NEAR, SOFTCAP, DROPOUT, DESCRIPTORS,
        )  # fmt: skip
        if TABLE_GRADIENT:
            if NEAR:
                o_distance = o_key[None, :] - o_row[:, None]
                b_left += tl.sum(tl.where(o_distance <= -WIDTH, b_ds, 0.0), 1)
                b_right += tl.sum(tl.where(o_distance >= WIDTH, b_ds, 0.0), 1)
            else:
                b_far = tl.sum(b_ds, 1)
                b_left += tl.where(is_right, 0.0, b_far)
                b_right += tl.where(is_right, b_far, 0.0)
        # (BM, BD)
        b_dq = tl.dot(b_du.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq, b_left, b_right


@triton.jit
def query_kernel(
    p_q, p_k, p_v, p_grad, p_out, p_lse, p_delta, p_dq, p_far, p_first, p_end, p_tiles, p_counts, p_order, p_table,
    p_seed,
    s_qb, s_qh, s_qt, s_qd, s_kb, s_kh, s_kk, s_kd, s_vb, s_vh, s_vk, s_vd, s_gb, s_gh, s_gt, s_gd,
    s_ob, s_oh, s_ot, s_od, s_db, s_dh, s_dt, s_dd,
    s_mask, s_table, num_heads, num_rows, num_keys, row_start, num_row_tiles, num_key_tiles, scale, softcap, dropout,
    WIDTH,
    GROUP: tl.constexpr, BIAS: tl.constexpr, TABLE_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Compute delta and dq of BM rows of a query head, and dbias of distances from W on, left and right.

    delta is float32 ``(B, H, T)`` and read by the other kernels, these two entries of dbias ``(B, H, T, 2)``.
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
    o_wide = o_query.to(tl.int64)
    m_row = o_query < num_rows
    p_first += i_mask * num_keys
    p_end += i_mask * num_keys
    p_list = p_tiles + i_list * (num_key_tiles + 1)
    i_near = tl.load(p_counts + i_list * 3)
    i_partial = tl.load(p_counts + i_list * 3 + 1)
    i_full = tl.load(p_counts + i_list * 3 + 2)
    seed = tl.load(p_seed) if DROPOUT else 0
    o_flat = i_bh.to(tl.int64) * num_rows + o_query

    # (BM, BD)
    if DESCRIPTORS:
        b_q = load_block(p_q, i_b, i_h, i_tile * BM, BM, BD)
        b_grad = load_block(p_grad, i_b, i_h, i_tile * BM, BM, BD)
    else:
        p_k += i_b.to(tl.int64) * s_kb + i_g.to(tl.int64) * s_kh
        p_v += i_b.to(tl.int64) * s_vb + i_g.to(tl.int64) * s_vh
        p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
        p_grad += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh
        b_q = load_tile(p_q, o_wide, o_dim, s_qt, s_qd, num_rows, D, BD, False)
        b_grad = load_tile(p_grad, o_wide, o_dim, s_gt, s_gd, num_rows, D, BD, False)
    p_out += i_b.to(tl.int64) * s_ob + i_h.to(tl.int64) * s_oh
    b_out = load_tile(p_out, o_wide, o_dim, s_ot, s_od, num_rows, D, BD, False)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    tl.store(p_delta + o_flat, b_delta, mask=m_row)
    b_lse = tl.load(p_lse + o_flat, mask=m_row, other=float("inf"))
    b_dq = tl.zeros([BM, BD], tl.float32)
    b_left = tl.zeros([BM], tl.float32)
    b_right = tl.zeros([BM], tl.float32)
    far_left, far_right = 0.0, 0.0
    if BIAS:
        far_left = tl.load(p_table + i_h * s_table)
        far_right = tl.load(p_table + i_h * s_table + 2 * WIDTH)
        b_dq, b_left, b_right = _query_walk(
            b_dq, b_left, b_right, b_q, b_grad, b_lse, b_delta, p_k, p_v, p_first, p_end, p_list, 0, i_near,
            i_near, o_row, o_dim, i_b, i_g, s_kk, s_kd, s_vk, s_vd, num_keys, scale,
            p_table, far_left, far_right, i_h, s_table, seed, i_bh, softcap, dropout,
            True, BIAS, WIDTH, TABLE_GRADIENT, SOFTCAP, DROPOUT, BN, D, BD, EVEN_K, PRECISION, DESCRIPTORS,
        )  # fmt: skip
    b_dq, b_left, b_right = _query_walk(
        b_dq, b_left, b_right, b_q, b_grad, b_lse, b_delta, p_k, p_v, p_first, p_end, p_list, i_near,
        i_partial, i_full, o_row, o_dim, i_b, i_g, s_kk, s_kd, s_vk, s_vd, num_keys, scale,
        p_table, far_left, far_right, i_h, s_table, seed, i_bh, softcap, dropout,
        False, BIAS, WIDTH, TABLE_GRADIENT, SOFTCAP, DROPOUT, BN, D, BD, EVEN_K, PRECISION, DESCRIPTORS,
    )  # fmt: skip
    p_dq += i_b.to(tl.int64) * s_db + i_h.to(tl.int64) * s_dh
    p_tile = p_dq + o_wide[:, None] * s_dt + o_dim[None, :] * s_dd
    tl.store(p_tile, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_row[:, None] & (o_dim[None, :] < D))
    if TABLE_GRADIENT:
        tl.store(p_far + o_flat * 2, b_left, mask=m_row)
        tl.store(p_far + o_flat * 2 + 1, b_right, mask=m_row)


@triton.jit
def key_kernel(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_dk, p_dv, p_first, p_end, p_bounds, p_order, p_table, p_seed,
    s_qb, s_qh, s_qt, s_qd, s_kb, s_kh, s_kk, s_kd, s_vb, s_vh, s_vk, s_vd, s_gb, s_gh, s_gt, s_gd,
    s_xb, s_xh, s_xk, s_xd, s_yb, s_yh, s_yk, s_yd,
    s_mask, s_table, num_heads, num_rows, num_keys, row_start, num_key_tiles, scale, softcap, dropout, WIDTH,
    GROUP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk (strides s_x) and dv (s_y) of BN keys of one key head, summed over the query heads of its group."""
    i_program = tl.program_id(0)
    num_groups = num_heads // GROUP
    i_rank = i_program % num_key_tiles
    i_bg = i_program // num_key_tiles
    i_b, i_g = i_bg // num_groups, i_bg % num_groups
    i_mask = (i_b * s_mask).to(tl.int64)
    i_tile = tl.load(p_order + i_mask * num_key_tiles + i_rank)
    i_low = tl.load(p_bounds + (i_mask * num_key_tiles + i_tile) * 2)
    i_high = tl.load(p_bounds + (i_mask * num_key_tiles + i_tile) * 2 + 1)
    seed = tl.load(p_seed) if DROPOUT else 0

    o_key = i_tile * BN + tl.arange(0, BN)
    o_dim = tl.arange(0, BD)
    o_wide = o_key.to(tl.int64)
    m_key = o_key < num_keys
    # (BN, BD)
    if DESCRIPTORS:
        b_k = load_block(p_k, i_b, i_g, i_tile * BN, BN, BD)
        b_v = load_block(p_v, i_b, i_g, i_tile * BN, BN, BD)
    else:
        p_k += i_b.to(tl.int64) * s_kb + i_g.to(tl.int64) * s_kh
        p_v += i_b.to(tl.int64) * s_vb + i_g.to(tl.int64) * s_vh
        b_k = load_tile(p_k, o_wide, o_dim, s_kk, s_kd, num_keys, D, BD, False)
        b_v = load_tile(p_v, o_wide, o_dim, s_vk, s_vd, num_keys, D, BD, False)
    b_first = tl.load(p_first + i_mask * num_keys + o_key, mask=m_key, other=0)
    b_end = tl.load(p_end + i_mask * num_keys + o_key, mask=m_key, other=0)
    # Rows that see every key of the tile.
    i_first, i_end = tl.max(b_first, 0), tl.min(b_end, 0)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)

    num_tiles = i_high - i_low
    # The stages are given here, too, so that all loads run ahead, not only those of matrices.
    for i in tl.range(0, GROUP * num_tiles, num_stages=STAGES):  # pyright: ignore
        # At least 1, because a loop that loads ahead also computes this for keys that no row sees.
        i_h = i_g * GROUP + i // tl.maximum(num_tiles, 1)
        i_bh = (i_b * num_heads + i_h).to(tl.int64)
        i_query = (i_low + i % tl.maximum(num_tiles, 1)) * BM
        o_query = i_query + tl.arange(0, BM)
        o_row = row_start + o_query
        m_row = o_query < num_rows
        # (BM, BD)
        if DESCRIPTORS:
            b_q = load_block(p_q, i_b, i_h, i_query, BM, BD)
            b_grad = load_block(p_grad, i_b, i_h, i_query, BM, BD)
        else:
            o_far = o_query.to(tl.int64)
            p_qh = p_q + i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
            p_gh = p_grad + i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh
            b_q = load_tile(p_qh, o_far, o_dim, s_qt, s_qd, num_rows, D, BD, False)
            b_grad = load_tile(p_gh, o_far, o_dim, s_gt, s_gd, num_rows, D, BD, False)
        # Rows beyond the last have P = 2^-infinity = 0, so the mask need not test for them.
        b_lse = tl.load(p_lse + i_bh * num_rows + o_query, mask=m_row, other=float("inf"))
        b_delta = tl.load(p_delta + i_bh * num_rows + o_query, mask=m_row, other=0.0)
        b_bias, m_keep = 0.0, True
        if BIAS:
            if DESCRIPTORS:
                i_right = i_tile * BN - (row_start + i_query)
                b_bias = tl.zeros([BN, BM], tl.float32)
                if (i_right - (BM - 1) < WIDTH) & (i_right + (BN - 1) > -WIDTH):
                    b_bias = bias_tile(p_table, i_h, o_row[None, :], o_key[:, None], s_table, WIDTH)
                else:
                    i_entry = tl.where(i_right > 0, 2 * WIDTH, 0)
                    b_bias += tl.load(p_table + i_h * s_table + i_entry)
            else:
                b_bias = bias_tile(p_table, i_h, o_row[None, :], o_key[:, None], s_table, WIDTH)
        if DROPOUT:
            m_keep = keep_tile(seed, i_b * num_heads + i_h, o_row[None, :], o_key[:, None], num_keys, dropout)
        # (BN, BM): transposed, so that both sums below are plain products. Without dropout or a softcap, the sums start
        # at -delta and -lse instead of 0, so these need no registers of their own.
        b_minus, b_less = b_lse[None, :], b_delta[None, :]
        b_dp = tl.zeros([BN, BM], tl.float32)
        if not DROPOUT:
            b_dp -= b_less
            b_less = 0.0
        b_s = tl.zeros([BN, BM], tl.float32)
        if not SOFTCAP:
            b_s -= b_minus / (scale * LOG2E)
            b_minus = 0.0
        b_dp = tl.dot(b_v, tl.trans(b_grad), b_dp, input_precision=PRECISION)
        b_s = tl.dot(b_k, tl.trans(b_q), b_s, input_precision=PRECISION)
        is_partial = (row_start + i_query < i_first) | (row_start + i_query + BM > i_end)
        b_p, _, b_du = _score_gradient(
            b_s, b_dp, b_minus, b_less, o_row[None, :], b_first[:, None], b_end[:, None], is_partial, b_bias, m_keep,
            scale, softcap, dropout, BIAS, SOFTCAP, DROPOUT, DESCRIPTORS,
        )  # fmt: skip
        b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(b_du.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    p_dk += i_b.to(tl.int64) * s_xb + i_g.to(tl.int64) * s_xh
    p_dv += i_b.to(tl.int64) * s_yb + i_g.to(tl.int64) * s_yh
    m_tile = m_key[:, None] & (o_dim[None, :] < D)
    p_tile = p_dk + o_wide[:, None] * s_xk + o_dim[None, :] * s_xd
    tl.store(p_tile, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_tile)
    p_tile = p_dv + o_wide[:, None] * s_yk + o_dim[None, :] * s_yd
    tl.store(p_tile, b_dv.to(p_dv.dtype.element_ty), mask=m_tile)


@triton.jit
def table_kernel(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_partial, p_first, p_end, p_tiles, p_counts, p_table, p_seed,
    s_qb, s_qh, s_qt, s_qd, s_kb, s_kh, s_kk, s_kd, s_vb, s_vh, s_vk, s_vd, s_gb, s_gh, s_gt, s_gd,
    s_mask, s_table, num_heads, num_rows, num_keys, row_start, num_row_tiles, num_key_tiles, scale, softcap, dropout,
    WIDTH,
    GROUP: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dbias below distance W for BM rows of a head: this program's row of ``(B, H, row tiles, 2 W + 1)``."""
    i_program = tl.program_id(0)
    i_tile = i_program % num_row_tiles
    i_bh = i_program // num_row_tiles
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    i_g = i_h // GROUP
    i_mask = (i_b * s_mask).to(tl.int64)
    i_list = i_mask * num_row_tiles + i_tile

    o_query = i_tile * BM + tl.arange(0, BM)
    o_row = row_start + o_query
    o_dim = tl.arange(0, BD)
    o_wide = o_query.to(tl.int64)
    m_row = o_query < num_rows
    p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
    p_grad += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh
    p_k += i_b.to(tl.int64) * s_kb + i_g.to(tl.int64) * s_kh
    p_v += i_b.to(tl.int64) * s_vb + i_g.to(tl.int64) * s_vh
    p_first += i_mask * num_keys
    p_end += i_mask * num_keys
    p_list = p_tiles + i_list * (num_key_tiles + 1)
    p_partial += i_program.to(tl.int64) * (2 * WIDTH + 1)
    i_near = tl.load(p_counts + i_list * 3)
    seed = tl.load(p_seed) if DROPOUT else 0
    o_flat = i_bh.to(tl.int64) * num_rows + o_query
    b_q = load_tile(p_q, o_wide, o_dim, s_qt, s_qd, num_rows, D, BD, False)
    b_grad = load_tile(p_grad, o_wide, o_dim, s_gt, s_gd, num_rows, D, BD, False)
    b_lse = tl.load(p_lse + o_flat, mask=m_row, other=float("inf"))
    b_delta = tl.load(p_delta + o_flat, mask=m_row, other=0.0)

    # Sheared: column c of row i holds key (c + i) mod BN, so a column is a diagonal that wraps around.
    o_shear = tl.arange(0, BM)[:, None] + tl.arange(0, BN)[None, :]
    for i in tl.range(0, i_near):  # pyright: ignore
        i_key = tl.load(p_list + i)
        o_key = i_key * BN + tl.arange(0, BN)
        b_k = load_tile(p_k, o_key.to(tl.int64), o_dim, s_kk, s_kd, num_keys, D, BD, EVEN_K)
        b_v = load_tile(p_v, o_key.to(tl.int64), o_dim, s_vk, s_vd, num_keys, D, BD, EVEN_K)
        b_first = tl.load(p_first + o_key, mask=o_key < num_keys, other=0)
        b_end = tl.load(p_end + o_key, mask=o_key < num_keys, other=0)
        b_bias = bias_tile(p_table, i_h, o_row[:, None], o_key[None, :], s_table, WIDTH)
        m_keep = True
        if DROPOUT:
            m_keep = keep_tile(seed, i_bh, o_row[:, None], o_key[None, :], num_keys, dropout)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
        _, b_ds, _ = _score_gradient(
            b_s, b_dp, b_lse[:, None], b_delta[:, None], o_row[:, None], b_first[None, :], b_end[None, :], True,
            b_bias, m_keep, scale, softcap, dropout, True, SOFTCAP, DROPOUT, False,
        )  # fmt: skip
        b_ds = tl.where(m_row[:, None], b_ds, 0.0)
        b_sheared = tl.gather(b_ds, o_shear % BN, axis=1)
        for i_wrap in tl.static_range((BM + BN - 2) // BN + 1):
            # (BN,): sums of whole or partial diagonals. Column c has the distance of key c, less i_wrap tiles.
            b_sum = tl.sum(tl.where(o_shear // BN == i_wrap, b_sheared, 0.0), 0)
            o_distance = i_key * BN - (row_start + i_tile * BM) + tl.arange(0, BN) - i_wrap * BN
            m_inner = (o_distance > -WIDTH) & (o_distance < WIDTH)
            p_inner = p_partial + WIDTH + o_distance
            tl.store(p_inner, tl.load(p_inner, mask=m_inner, other=0.0) + b_sum, mask=m_inner)
            # In the next step, another thread may own this entry.
            tl.debug_barrier()
