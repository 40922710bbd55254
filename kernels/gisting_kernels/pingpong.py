"""The forward kernel for cards of compute capability 9.0, in Gluon, Triton's lower-level language.

Place in the flow: plan -> **pingpong** -> op, where the table of tile sizes says so. It computes what
``forward.forward_kernel`` does without bias, softcap and dropout. Three groups of warps share a program:

    loader        copies queries, keys and values to shared memory with the tensor copy unit, some tiles ahead
    consumer 0    attends with the first half of the rows
    consumer 1    attends with the second half

A consumer starts two products, the scores of the next tile and the output of this one, and computes the softmax while
they run (FlashAttention-3, arXiv 2407.08608). The consumers take turns, so that the softmax of one runs beside the
products of the other. A program works on one tile of rows after another, longest lists first.

Names are those of ``forward``. ``b_`` also names blocks in shared memory, ``bar_`` names barriers.
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
    warpgroup_mma_wait,
)

__all__ = ["pingpong_kernel"]

LOG2E = gl.constexpr(1.4426950408889634)
# Triton 3.8 has other names for these.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _place(i_work, num_work, p_counts, p_order, s_mask, num_heads, num_row_tiles, GROUP: gl.constexpr):
    """Find the sequence, head, tile of rows and list of a program's next piece of work, the longest lists first."""
    num_bh = num_work // num_row_tiles
    i_rank = i_work // num_bh
    i_bh = i_work % num_bh
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    i_g = i_h // GROUP
    i_mask = (i_b * s_mask).to(gl.int64)
    i_tile = gl.load(p_order + i_mask * num_row_tiles + i_rank)
    i_list = i_mask * num_row_tiles + i_tile
    i_partial = gl.load(p_counts + i_list * 3 + 1)
    i_full = gl.load(p_counts + i_list * 3 + 2)
    return i_b, i_g, i_h, i_mask, i_tile, i_list, i_partial, i_full


@gluon.jit
def _load(
    q, k, v, b_q, b_k, b_v, bar_q, bar_q_free, bar_k, bar_k_free, bar_v, bar_v_free,
    p_tiles, p_counts, p_order, s_mask, num_heads, num_row_tiles, num_key_tiles, num_work,
    GROUP: gl.constexpr, HALF: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy what the consumers need, in the order in which they need it."""
    i_load = 0
    i_turn = 0
    for i_work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        i_b, i_g, i_h, _, i_tile, i_list, _, i_full = _place(
            i_work, num_work, p_counts, p_order, s_mask, num_heads, num_row_tiles, GROUP
        )
        p_list = p_tiles + i_list * (num_key_tiles + 1)
        i_next = gl.load(p_list, mask=i_full > 0, other=0)
        for i in range(gl.maximum(i_full, 1)):
            i_key = i_next * BN
            i_next = gl.load(p_list + i + 1)
            stage = i_load % STAGES
            phase = ((i_load // STAGES) & 1) ^ 1
            mbarrier.wait(bar_k_free.index(stage), phase)
            mbarrier.expect(bar_k.index(stage), k.block_type.nbytes)
            copy_in(k, [i_b, i_g, i_key, 0], bar_k.index(stage), b_k.index(stage))
            if i == 0:
                # The consumers may still write the output of the tile of rows before.
                for half in gl.static_range(2):
                    mbarrier.wait(bar_q_free.index(half), (i_turn & 1) ^ 1)
                    mbarrier.expect(bar_q.index(half), q.block_type.nbytes)
                    copy_in(q, [i_b, i_h, i_tile * 2 * HALF + half * HALF, 0], bar_q.index(half), b_q.index(half))
            mbarrier.wait(bar_v_free.index(stage), phase)
            mbarrier.expect(bar_v.index(stage), v.block_type.nbytes)
            copy_in(v, [i_b, i_g, i_key, 0], bar_v.index(stage), b_v.index(stage))
            i_load += 1
        i_turn += 1  # noqa: SIM113  Gluon has no enumerate


@gluon.jit
def _mask(b_s, p_first, p_end, o_row, i_key, num_keys, BN: gl.constexpr, KEYS: gl.constexpr):
    o_key = i_key + gl.arange(0, BN, layout=KEYS)
    b_first = gl.load(p_first + o_key, mask=o_key < num_keys, other=0)
    b_end = gl.load(p_end + o_key, mask=o_key < num_keys, other=0)
    m_seen = (o_row[:, None] >= b_first[None, :]) & (o_row[:, None] < b_end[None, :])
    return gl.where(m_seen, b_s, float("-inf"))


@gluon.jit
def _softmax(b_s, b_max, b_sum, factor):
    """Return the unnormalised weights, the new maximum and sum, and the factor of what was summed before."""
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * factor)
    b_shift = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * factor - b_shift[:, None])
    b_decay = gl.exp2(b_max - b_shift)
    return b_p, b_new, b_sum * b_decay + gl.sum(b_p, 1), b_decay


@gluon.jit
def _consume(
    out, b_q, b_k, b_v, bar_q, bar_q_free, bar_k, bar_k_free, bar_v, bar_v_free, bar_turn,
    p_lse, p_first, p_end, p_tiles, p_counts, p_order,
    s_mask, num_heads, num_rows, num_keys, row_start, num_row_tiles, num_key_tiles, num_work, scale,
    GROUP: gl.constexpr, HALF: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr,
    half: gl.constexpr,
):  # fmt: skip
    """Attend with one half of each tile of rows."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    KEYS: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = out.dtype
    factor = scale * LOG2E
    b_none = gl.zeros([HALF, BN], gl.float32, layout=SCORES)
    b_mine = b_q.index(half).reshape([HALF, BD])
    bar_mine = bar_turn.index(half)
    bar_other = bar_turn.index(1 - half)
    i_load = 0
    i_turn = 0
    for i_work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        i_b, _, i_h, i_mask, i_tile, i_list, i_partial, i_full = _place(
            i_work, num_work, p_counts, p_order, s_mask, num_heads, num_row_tiles, GROUP
        )
        p_list = p_tiles + i_list * (num_key_tiles + 1)
        # A tile of rows without keys masks one tile completely.
        i_masked = gl.where(i_full == 0, 1, i_partial)
        i_stop = gl.maximum(i_full, 1)
        i_first = i_tile * 2 * HALF + half * HALF
        o_query = i_first + gl.arange(0, HALF, layout=ROWS)
        o_row = row_start + o_query
        b_max = gl.full([HALF], float("-inf"), gl.float32, layout=ROWS)
        b_sum = gl.zeros([HALF], gl.float32, layout=ROWS)
        b_acc = gl.zeros([HALF, BD], gl.float32, layout=OUT)

        mbarrier.wait(bar_q.index(half), i_turn & 1)
        stage = i_load % STAGES
        mbarrier.wait(bar_k.index(stage), (i_load // STAGES) & 1)
        b_s = warpgroup_mma(
            b_mine, b_k.index(stage).reshape([BN, BD]).permute((1, 0)), b_none, use_acc=False, is_async=True
        )
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(bar_k_free.index(stage), count=1)
        if i_masked > 0:
            i_key = gl.load(p_list, mask=i_full > 0, other=0) * BN
            b_s = _mask(b_s, p_first + i_mask * num_keys, p_end + i_mask * num_keys, o_row, i_key, num_keys, BN, KEYS)
        b_p, b_max, b_sum, b_decay = _softmax(b_s, b_max, b_sum, factor)
        b_w = gl.convert_layout(b_p.to(dtype), WEIGHTS)
        mbarrier.wait(bar_v.index(stage), (i_load // STAGES) & 1)
        for i in range(1, i_stop):
            i_key = gl.load(p_list + i) * BN
            stage = (i_load + 1) % STAGES
            mbarrier.wait(bar_k.index(stage), ((i_load + 1) // STAGES) & 1)
            # A piece of work with n tiles has n - 1 steps.
            mbarrier.wait(bar_mine, ((i_load - i_turn) & 1) ^ (1 - half))
            # The weights of the last tile are only a place for the scores. New zeros would cost instructions.
            b_next = warpgroup_mma(
                b_mine, b_k.index(stage).reshape([BN, BD]).permute((1, 0)), b_p, use_acc=False, is_async=True
            )
            b_out = warpgroup_mma(b_w, b_v.index(i_load % STAGES).reshape([BN, BD]), b_acc, is_async=True)
            mbarrier.arrive(bar_other, count=1)
            b_s = warpgroup_mma_wait(1, deps=[b_next])
            mbarrier.arrive(bar_k_free.index(stage), count=1)
            if i < i_masked:
                b_s = _mask(
                    b_s, p_first + i_mask * num_keys, p_end + i_mask * num_keys, o_row, i_key, num_keys, BN, KEYS
                )
            b_p, b_max, b_sum, b_decay = _softmax(b_s, b_max, b_sum, factor)
            b_new = gl.convert_layout(b_p.to(dtype), WEIGHTS)
            # Without this wait, which is a loop, between the softmax and the wait for the product, the compiler would
            # compute the softmax after the product instead of beside it.
            mbarrier.wait(bar_v.index(stage), ((i_load + 1) // STAGES) & 1)
            b_acc, b_w = warpgroup_mma_wait(0, deps=[b_out, b_w])
            mbarrier.arrive(bar_v_free.index(i_load % STAGES), count=1)
            b_acc = b_acc * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
            b_w = b_new
            i_load += 1
        stage = i_load % STAGES
        b_out = warpgroup_mma(b_w, b_v.index(stage).reshape([BN, BD]), b_acc, is_async=True)
        b_acc, b_w = warpgroup_mma_wait(0, deps=[b_out, b_w])
        mbarrier.arrive(bar_v_free.index(stage), count=1)
        i_load += 1

        m_empty = b_sum == 0.0
        b_sum = gl.where(m_empty, 1.0, b_sum)
        b_lse = gl.where(m_empty, float("inf"), b_max + gl.log2(b_sum))
        gl.store(p_lse + (i_b * num_heads + i_h).to(gl.int64) * num_rows + o_query, b_lse, mask=o_query < num_rows)
        b_acc = b_acc / gl.convert_layout(b_sum, gl.SliceLayout(1, OUT))[:, None]
        # The queries are no longer needed; their place takes the output.
        b_mine.store(b_acc.to(dtype))
        fence_async_shared()
        copy_out(out, [i_b, i_h, i_first, 0], b_q.index(half))
        tma.store_wait(0)
        mbarrier.arrive(bar_q_free.index(half), count=1)
        i_turn += 1  # noqa: SIM113  Gluon has no enumerate


@gluon.jit
def pingpong_kernel(
    q, k, v, out, p_lse, p_first, p_end, p_tiles, p_counts, p_order,
    s_mask, num_heads, num_rows, num_keys, row_start, num_row_tiles, num_key_tiles, num_work, scale,
    GROUP: gl.constexpr, HALF: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend with one tile of 2 HALF rows of one query head after another.

    ``q``, ``k``, ``v`` and ``out`` are descriptors of (B, H, T, D) in blocks (1, 1, HALF or BN, BD).
    """
    b_q = gl.allocate_shared_memory(q.dtype, [2, 1, 1, HALF, BD], q.layout)
    b_k = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BN, BD], k.layout)
    b_v = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BN, BD], v.layout)
    bar_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bar_q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bar_turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bar_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(bar_q.index(half), count=1)
        mbarrier.init(bar_q_free.index(half), count=1)
        mbarrier.init(bar_turn.index(half), count=1)
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
                _consume,
                (
                    out, b_q, b_k, b_v, bar_q, bar_q_free, bar_k, bar_k_free, bar_v, bar_v_free, bar_turn,
                    p_lse, p_first, p_end, p_tiles, p_counts, p_order,
                    s_mask, num_heads, num_rows, num_keys, row_start, num_row_tiles, num_key_tiles, num_work, scale,
                    GROUP, HALF, BN, BD, STAGES, 0,
                ),
            ),
            (
                _consume,
                (
                    out, b_q, b_k, b_v, bar_q, bar_q_free, bar_k, bar_k_free, bar_v, bar_v_free, bar_turn,
                    p_lse, p_first, p_end, p_tiles, p_counts, p_order,
                    s_mask, num_heads, num_rows, num_keys, row_start, num_row_tiles, num_key_tiles, num_work, scale,
                    GROUP, HALF, BN, BD, STAGES, 1,
                ),
            ),
            (
                _load,
                (
                    q, k, v, b_q, b_k, b_v, bar_q, bar_q_free, bar_k, bar_k_free, bar_v, bar_v_free,
                    p_tiles, p_counts, p_order, s_mask, num_heads, num_row_tiles, num_key_tiles, num_work,
                    GROUP, HALF, BN, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
