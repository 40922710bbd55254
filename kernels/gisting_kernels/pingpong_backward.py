"""dQ and dK/dV for cards of compute capability 9.0, in Gluon, Triton's lower-level language.

Place in the flow: plan, forward -> **pingpong_backward** -> op, where the table of tile sizes says so. They compute
what ``backward.query_kernel`` and ``backward.key_kernel`` do without bias, softcap and dropout. As in ``pingpong``, one
group of warps loads and two consume, each with half of the tile that stays: of the rows for dQ, of the keys for dK/dV.

A consumer starts two products, S and dP, computes P while dP runs, and for dK/dV computes dS while P^T g runs. The
consumers drift apart, so that one computes while the products of the other run.

Names are those of ``backward``. ``b_`` also names blocks in shared memory, ``bar_`` names barriers.
"""

# Kernels are written in Gluon's language and typed for its compiler.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportUnboundVariable=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
from triton.experimental.gluon.language.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

__all__ = ["key_pingpong_kernel", "query_pingpong_kernel"]

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _key_load(
    q, k, v, grad, b_q, b_k, b_v, b_grad, bar_key, bar_q, bar_q_free, bar_grad, bar_grad_free,
    i_b, i_g, i_key, i_low, i_high,
    GROUP: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the tile of keys and values, then queries and gradients of every head of the group."""
    mbarrier.expect(bar_key, 2 * k.block_type.nbytes + 2 * v.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(k, [i_b, i_g, i_key + half * HALF, 0], bar_key, b_k.index(half))
        tma.async_copy_global_to_shared(v, [i_b, i_g, i_key + half * HALF, 0], bar_key, b_v.index(half))
    num_tiles = i_high - i_low
    for i in range(GROUP * num_tiles):
        i_h = i_g * GROUP + i // num_tiles
        i_row = (i_low + i % num_tiles) * BM
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(bar_q_free.index(stage), phase)
        mbarrier.expect(bar_q.index(stage), q.block_type.nbytes)
        tma.async_copy_global_to_shared(q, [i_b, i_h, i_row, 0], bar_q.index(stage), b_q.index(stage))
        mbarrier.wait(bar_grad_free.index(stage), phase)
        mbarrier.expect(bar_grad.index(stage), grad.block_type.nbytes)
        tma.async_copy_global_to_shared(grad, [i_b, i_h, i_row, 0], bar_grad.index(stage), b_grad.index(stage))


@gluon.jit
def _key_consume(
    dk, dv, b_q, b_k, b_v, b_grad, bar_key, bar_q, bar_q_free, bar_grad, bar_grad_free,
    p_lse, p_delta, p_first, p_end, i_b, i_g, i_key, i_low, i_high, num_heads, num_rows, num_keys, row_start, scale,
    GROUP: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr,
    half: gl.constexpr,
):  # fmt: skip
    """Sum dk and dv of one half of the keys."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(0, SCORES)
    KEYS: gl.constexpr = gl.SliceLayout(1, SCORES)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = dk.dtype
    factor = scale * LOG2E
    b_none = gl.zeros([HALF, BM], gl.float32, layout=SCORES)
    b_my_k = b_k.index(half).reshape([HALF, BD])
    b_my_v = b_v.index(half).reshape([HALF, BD])
    i_mine = i_key + half * HALF
    o_key = i_mine + gl.arange(0, HALF, layout=KEYS)
    b_first = gl.load(p_first + o_key, mask=o_key < num_keys, other=0)
    b_end = gl.load(p_end + o_key, mask=o_key < num_keys, other=0)
    i_first = gl.max(b_first, 0)
    i_end = gl.min(b_end, 0)
    num_tiles = i_high - i_low
    num_steps = GROUP * num_tiles
    b_dk = warpgroup_mma_init(gl.zeros([HALF, BD], gl.float32, layout=OUT))
    b_dv = gl.zeros([HALF, BD], gl.float32, layout=OUT)
    o_line = gl.arange(0, BM, layout=LINE)
    o_row = gl.arange(0, BM, layout=ROWS)
    # The log-sum-exp and delta of a tile are loaded one tile ahead.
    o_query = i_low * BM + o_line
    p_head = (i_b * num_heads + i_g * GROUP).to(gl.int64) * num_rows
    m_row = (o_query < num_rows) & (num_steps > 0)
    b_next_lse = gl.load(p_lse + p_head + o_query, mask=m_row, other=float("inf"))
    b_next_delta = gl.load(p_delta + p_head + o_query, mask=m_row, other=0.0)
    mbarrier.wait(bar_key, 0)
    for i in range(num_steps):
        i_row = (i_low + i % num_tiles) * BM
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(bar_q.index(stage), phase)
        b_s = warpgroup_mma(
            b_my_k, b_q.index(stage).reshape([BM, BD]).permute((1, 0)), b_none, use_acc=False, is_async=True
        )
        mbarrier.wait(bar_grad.index(stage), phase)
        b_dp = warpgroup_mma(
            b_my_v, b_grad.index(stage).reshape([BM, BD]).permute((1, 0)), b_none, use_acc=False, is_async=True
        )
        b_lse = gl.convert_layout(b_next_lse, ROWS)
        b_delta = b_next_delta
        i_then = i + 1
        o_query = (i_low + i_then % num_tiles) * BM + o_line
        p_head = (i_b * num_heads + i_g * GROUP + i_then // num_tiles).to(gl.int64) * num_rows
        m_row = (o_query < num_rows) & (i_then < num_steps)
        b_next_lse = gl.load(p_lse + p_head + o_query, mask=m_row, other=float("inf"))
        b_next_delta = gl.load(p_delta + p_head + o_query, mask=m_row, other=0.0)
        # All but dP: the dK of the step before is also done, so its queries may be replaced.
        b_s, b_dk = warpgroup_mma_wait(1, deps=[b_s, b_dk])
        mbarrier.arrive(bar_q_free.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        b_p = gl.exp2(b_s * factor - b_lse[None, :])
        if (row_start + i_row < i_first) | (row_start + i_row + BM > i_end):
            o_seen = row_start + i_row + o_row
            b_p = gl.where((o_seen[None, :] >= b_first[:, None]) & (o_seen[None, :] < b_end[:, None]), b_p, 0.0)
        b_w = gl.convert_layout(b_p.to(dtype), WEIGHTS)
        b_dv = warpgroup_mma(b_w, b_grad.index(stage).reshape([BM, BD]), b_dv, is_async=True)
        b_delta = gl.convert_layout(b_delta, ROWS)
        b_dp = warpgroup_mma_wait(1, deps=[b_dp])
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_u = gl.convert_layout(b_ds.to(dtype), WEIGHTS)
        b_dk = warpgroup_mma(b_u, b_q.index(stage).reshape([BM, BD]), b_dk, is_async=True)
        b_dv, b_w = warpgroup_mma_wait(1, deps=[b_dv, b_w])
        mbarrier.arrive(bar_grad_free.index(stage), count=1)
    b_dk = warpgroup_mma_wait(0, deps=[b_dk])
    # Keys and values are no longer needed; their places take the gradients.
    b_my_k.store((b_dk * scale).to(dtype))
    b_my_v.store(b_dv.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk, [i_b, i_g, i_mine, 0], b_k.index(half))
    tma.async_copy_shared_to_global(dv, [i_b, i_g, i_mine, 0], b_v.index(half))
    tma.store_wait(0)


@gluon.jit
def key_pingpong_kernel(
    q, k, v, grad, dk, dv, p_lse, p_delta, p_first, p_end, p_bounds, p_order,
    s_mask, num_heads, num_rows, num_keys, row_start, num_key_tiles, scale,
    GROUP: gl.constexpr, BM: gl.constexpr, HALF: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute dk and dv of 2 HALF keys of one key head, summed over the query heads of its group.

    ``q``, ``k``, ``v``, ``grad``, ``dk`` and ``dv`` are descriptors in blocks (1, 1, BM or HALF, BD).
    """
    i_program = gl.program_id(0)
    num_groups = num_heads // GROUP
    i_rank = i_program % num_key_tiles
    i_bg = i_program // num_key_tiles
    i_b = i_bg // num_groups
    i_g = i_bg % num_groups
    i_mask = (i_b * s_mask).to(gl.int64)
    i_tile = gl.load(p_order + i_mask * num_key_tiles + i_rank)
    i_low = gl.load(p_bounds + (i_mask * num_key_tiles + i_tile) * 2)
    i_high = gl.load(p_bounds + (i_mask * num_key_tiles + i_tile) * 2 + 1)
    i_key = i_tile * 2 * HALF
    p_first += i_mask * num_keys
    p_end += i_mask * num_keys
    b_k = gl.allocate_shared_memory(k.dtype, [2, 1, 1, HALF, BD], k.layout)
    b_v = gl.allocate_shared_memory(v.dtype, [2, 1, 1, HALF, BD], v.layout)
    b_q = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BM, BD], q.layout)
    b_grad = gl.allocate_shared_memory(grad.dtype, [STAGES, 1, 1, BM, BD], grad.layout)
    bar_key = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_grad = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_grad_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar_key, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(bar_q.index(stage), count=1)
        mbarrier.init(bar_q_free.index(stage), count=2)
        mbarrier.init(bar_grad.index(stage), count=1)
        mbarrier.init(bar_grad_free.index(stage), count=2)
    # The copy unit must see the barriers.
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _key_consume,
                (
                    dk, dv, b_q, b_k, b_v, b_grad, bar_key, bar_q, bar_q_free, bar_grad, bar_grad_free,
                    p_lse, p_delta, p_first, p_end, i_b, i_g, i_key, i_low, i_high,
                    num_heads, num_rows, num_keys, row_start, scale, GROUP, BM, HALF, BD, STAGES, 0,
                ),
            ),
            (
                _key_consume,
                (
                    dk, dv, b_q, b_k, b_v, b_grad, bar_key, bar_q, bar_q_free, bar_grad, bar_grad_free,
                    p_lse, p_delta, p_first, p_end, i_b, i_g, i_key, i_low, i_high,
                    num_heads, num_rows, num_keys, row_start, scale, GROUP, BM, HALF, BD, STAGES, 1,
                ),
            ),
            (
                _key_load,
                (
                    q, k, v, grad, b_q, b_k, b_v, b_grad, bar_key, bar_q, bar_q_free, bar_grad, bar_grad_free,
                    i_b, i_g, i_key, i_low, i_high, GROUP, BM, HALF, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _query_load(
    q, k, v, grad, b_q, b_k, b_v, b_grad, bar_row, bar_k, bar_k_free, bar_v, bar_v_free,
    p_list, i_b, i_g, i_h, i_row, i_full,
    BN: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the tile of queries and gradients, then the keys and values of the list."""
    mbarrier.expect(bar_row, 2 * q.block_type.nbytes + 2 * grad.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [i_b, i_h, i_row + half * HALF, 0], bar_row, b_q.index(half))
        tma.async_copy_global_to_shared(grad, [i_b, i_h, i_row + half * HALF, 0], bar_row, b_grad.index(half))
    i_next = gl.load(p_list)
    for i in range(i_full):
        i_key = i_next * BN
        i_next = gl.load(p_list + i + 1)
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(bar_k_free.index(stage), phase)
        mbarrier.expect(bar_k.index(stage), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [i_b, i_g, i_key, 0], bar_k.index(stage), b_k.index(stage))
        mbarrier.wait(bar_v_free.index(stage), phase)
        mbarrier.expect(bar_v.index(stage), v.block_type.nbytes)
        tma.async_copy_global_to_shared(v, [i_b, i_g, i_key, 0], bar_v.index(stage), b_v.index(stage))


@gluon.jit
def _query_consume(
    dq, b_q, b_k, b_v, b_grad, bar_row, bar_k, bar_k_free, bar_v, bar_v_free,
    p_lse, p_delta, p_first, p_end, p_list, i_b, i_h, i_row, i_partial, i_full, num_heads, num_rows, num_keys,
    row_start, scale,
    BN: gl.constexpr, HALF: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr, half: gl.constexpr,
):  # fmt: skip
    """Sum dq of one half of the rows."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    KEYS: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = dq.dtype
    factor = scale * LOG2E
    b_none = gl.zeros([HALF, BN], gl.float32, layout=SCORES)
    b_my_q = b_q.index(half).reshape([HALF, BD])
    b_my_grad = b_grad.index(half).reshape([HALF, BD])
    i_mine = i_row + half * HALF
    o_query = i_mine + gl.arange(0, HALF, layout=ROWS)
    o_row = row_start + o_query
    o_flat = (i_b * num_heads + i_h).to(gl.int64) * num_rows + o_query
    b_lse = gl.load(p_lse + o_flat, mask=o_query < num_rows, other=float("inf"))
    b_delta = gl.load(p_delta + o_flat, mask=o_query < num_rows, other=0.0)
    b_dq = warpgroup_mma_init(gl.zeros([HALF, BD], gl.float32, layout=OUT))
    mbarrier.wait(bar_row, 0)
    for i in range(i_full):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(bar_k.index(stage), phase)
        b_s = warpgroup_mma(
            b_my_q, b_k.index(stage).reshape([BN, BD]).permute((1, 0)), b_none, use_acc=False, is_async=True
        )
        mbarrier.wait(bar_v.index(stage), phase)
        b_dp = warpgroup_mma(
            b_my_grad, b_v.index(stage).reshape([BN, BD]).permute((1, 0)), b_none, use_acc=False, is_async=True
        )
        # All but dP: the dQ of the step before is also done, so its keys may be replaced.
        b_s, b_dq = warpgroup_mma_wait(1, deps=[b_s, b_dq])
        mbarrier.arrive(bar_k_free.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        b_p = gl.exp2(b_s * factor - b_lse[:, None])
        if i < i_partial:
            o_key = gl.load(p_list + i) * BN + gl.arange(0, BN, layout=KEYS)
            b_first = gl.load(p_first + o_key, mask=o_key < num_keys, other=0)
            b_end = gl.load(p_end + o_key, mask=o_key < num_keys, other=0)
            b_p = gl.where((o_row[:, None] >= b_first[None, :]) & (o_row[:, None] < b_end[None, :]), b_p, 0.0)
        b_dp = warpgroup_mma_wait(0, deps=[b_dp])
        mbarrier.arrive(bar_v_free.index(stage), count=1)
        b_u = gl.convert_layout((b_p * (b_dp - b_delta[:, None])).to(dtype), WEIGHTS)
        b_dq = warpgroup_mma(b_u, b_k.index(stage).reshape([BN, BD]), b_dq, is_async=True)
    b_dq = warpgroup_mma_wait(0, deps=[b_dq])
    # The queries are no longer needed; their place takes the gradient.
    b_my_q.store((b_dq * scale).to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq, [i_b, i_h, i_mine, 0], b_q.index(half))
    tma.store_wait(0)


@gluon.jit
def query_pingpong_kernel(
    q, k, v, grad, dq, p_lse, p_delta, p_first, p_end, p_tiles, p_counts, p_order,
    s_mask, num_heads, num_rows, num_keys, row_start, num_row_tiles, num_key_tiles, scale,
    GROUP: gl.constexpr, BN: gl.constexpr, HALF: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute dq of 2 HALF rows of a query head.

    ``q``, ``k``, ``v``, ``grad`` and ``dq`` are descriptors in blocks (1, 1, HALF or BN, BD).
    """
    i_program = gl.program_id(0)
    i_group = i_program % GROUP
    i_rank = (i_program // GROUP) % num_row_tiles
    i_bg = i_program // (GROUP * num_row_tiles)
    num_groups = num_heads // GROUP
    i_b = i_bg // num_groups
    i_g = i_bg % num_groups
    i_h = i_g * GROUP + i_group
    i_mask = (i_b * s_mask).to(gl.int64)
    i_tile = gl.load(p_order + i_mask * num_row_tiles + i_rank)
    i_list = i_mask * num_row_tiles + i_tile
    i_partial = gl.load(p_counts + i_list * 3 + 1)
    i_full = gl.load(p_counts + i_list * 3 + 2)
    p_list = p_tiles + i_list * (num_key_tiles + 1)
    i_row = i_tile * 2 * HALF
    p_first += i_mask * num_keys
    p_end += i_mask * num_keys
    b_q = gl.allocate_shared_memory(q.dtype, [2, 1, 1, HALF, BD], q.layout)
    b_grad = gl.allocate_shared_memory(grad.dtype, [2, 1, 1, HALF, BD], grad.layout)
    b_k = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BN, BD], k.layout)
    b_v = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BN, BD], v.layout)
    bar_row = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar_row, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(bar_k.index(stage), count=1)
        mbarrier.init(bar_k_free.index(stage), count=2)
        mbarrier.init(bar_v.index(stage), count=1)
        mbarrier.init(bar_v_free.index(stage), count=2)
    # The copy unit must see the barriers.
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _query_consume,
                (
                    dq, b_q, b_k, b_v, b_grad, bar_row, bar_k, bar_k_free, bar_v, bar_v_free,
                    p_lse, p_delta, p_first, p_end, p_list, i_b, i_h, i_row, i_partial, i_full,
                    num_heads, num_rows, num_keys, row_start, scale, BN, HALF, BD, STAGES, 0,
                ),
            ),
            (
                _query_consume,
                (
                    dq, b_q, b_k, b_v, b_grad, bar_row, bar_k, bar_k_free, bar_v, bar_v_free,
                    p_lse, p_delta, p_first, p_end, p_list, i_b, i_h, i_row, i_partial, i_full,
                    num_heads, num_rows, num_keys, row_start, scale, BN, HALF, BD, STAGES, 1,
                ),
            ),
            (
                _query_load,
                (
                    q, k, v, grad, b_q, b_k, b_v, b_grad, bar_row, bar_k, bar_k_free, bar_v, bar_v_free,
                    p_list, i_b, i_g, i_h, i_row, i_full, BN, HALF, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
