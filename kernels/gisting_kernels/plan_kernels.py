"""The plan as Triton kernels: a few launches replace the hundred or so torch operations of ``plan.py``.

Place in the flow: next to plan, which calls this on a GPU. The results equal those of the torch operations, except that
the entries after the end of a list are 0 here. Names as in ``forward.py``.
"""

# Kernels are written in Triton's language and typed for its compiler, and so are their launches.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

__all__ = ["list_tiles_fused", "range_rows_fused"]

_CHUNK = 128
_INT_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def bounds_kernel(p_first, p_end, p_bounds, num_keys, num_tiles, BN: tl.constexpr):
    """Find the smallest and largest first, and the same of end, over a tile's live keys: ``(B, key tiles, 4)``."""
    i_b, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_key = i_tile * BN + tl.arange(0, BN)
    b_first = tl.load(p_first + i_b * num_keys + o_key, mask=o_key < num_keys, other=0)
    b_end = tl.load(p_end + i_b * num_keys + o_key, mask=o_key < num_keys, other=0)
    m_live = b_end > b_first
    b_first = tl.where(m_live, b_first, _INT_MAX)
    b_end = tl.where(m_live, b_end, 0)
    p_out = p_bounds + (i_b * num_tiles + i_tile) * 4
    tl.store(p_out, tl.min(b_first, 0))
    tl.store(p_out + 1, tl.max(b_first, 0))
    tl.store(p_out + 2, tl.min(b_end, 0))
    tl.store(p_out + 3, tl.max(b_end, 0))


@triton.jit
def _kinds(p_bounds, o_tile, num_tiles, row, row_end, BM: tl.constexpr, BN: tl.constexpr, NEAR, HAS_NEAR: tl.constexpr):
    """Classify tiles: 0 near, 1 partial, 2 full, 3 not visible."""
    m_tile = o_tile < num_tiles
    first_min = tl.load(p_bounds + o_tile * 4, mask=m_tile, other=_INT_MAX)
    first_max = tl.load(p_bounds + o_tile * 4 + 1, mask=m_tile, other=_INT_MAX)
    end_min = tl.load(p_bounds + o_tile * 4 + 2, mask=m_tile, other=0)
    end_max = tl.load(p_bounds + o_tile * 4 + 3, mask=m_tile, other=0)
    kind = tl.where((first_max <= row) & (end_min >= row_end), 2, 1)
    if HAS_NEAR:
        lowest = o_tile * BN - (row + BM - 1)
        highest = o_tile * BN + (BN - 1) - row
        kind = tl.where((lowest < NEAR) & (highest > -NEAR), 0, kind)
    return tl.where((first_min < row_end) & (end_max > row), kind, 3)


@triton.jit
def list_kernel(
    p_bounds, p_tiles, p_counts, p_lengths, num_rows, row_start, num_row_tiles, num_tiles, NEAR,
    HAS_NEAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Make the list of one tile of rows: count the kinds first, then write the tiles, kind by kind, in order."""
    i_b, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = row_start + i_tile * BM
    row_end = tl.minimum(row + BM, row_start + num_rows)
    p_bounds += i_b * num_tiles * 4
    num_near, num_partial, num_full = 0, 0, 0
    for i in tl.range(0, num_tiles, CHUNK):  # pyright: ignore
        kind = _kinds(p_bounds, i + tl.arange(0, CHUNK), num_tiles, row, row_end, BM, BN, NEAR, HAS_NEAR)
        num_near += tl.sum((kind == 0).to(tl.int32), 0)
        num_partial += tl.sum((kind == 1).to(tl.int32), 0)
        num_full += tl.sum((kind == 2).to(tl.int32), 0)
    i_list = i_b * num_row_tiles + i_tile
    tl.store(p_counts + i_list * 3, num_near)
    tl.store(p_counts + i_list * 3 + 1, num_near + num_partial)
    tl.store(p_counts + i_list * 3 + 2, num_near + num_partial + num_full)
    tl.store(p_lengths + i_list, num_near + num_partial + num_full)
    p_list = p_tiles + i_list * (num_tiles + 1)
    near, partial, full = 0, num_near, num_near + num_partial
    for i in tl.range(0, num_tiles, CHUNK):  # pyright: ignore
        o_tile = i + tl.arange(0, CHUNK)
        kind = _kinds(p_bounds, o_tile, num_tiles, row, row_end, BM, BN, NEAR, HAS_NEAR)
        is_near, is_partial, is_full = (kind == 0).to(tl.int32), (kind == 1).to(tl.int32), (kind == 2).to(tl.int32)
        o_near = near + tl.cumsum(is_near, 0) - 1
        o_partial = partial + tl.cumsum(is_partial, 0) - 1
        o_full = full + tl.cumsum(is_full, 0) - 1
        o_place = tl.where(kind == 0, o_near, tl.where(kind == 1, o_partial, o_full))
        tl.store(p_list + o_place, o_tile, mask=kind < 3)
        near += tl.sum(is_near, 0)
        partial += tl.sum(is_partial, 0)
        full += tl.sum(is_full, 0)


@triton.jit
def range_kernel(
    p_first, p_end, p_ranges, p_lengths, num_rows, row_start, num_keys, num_tiles, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Find the range of row tiles for one tile of keys."""
    i_b, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_key = i_tile * BN + tl.arange(0, BN)
    b_first = tl.load(p_first + i_b * num_keys + o_key, mask=o_key < num_keys, other=0)
    b_end = tl.load(p_end + i_b * num_keys + o_key, mask=o_key < num_keys, other=0)
    m_live = b_end > b_first
    low = tl.min(tl.where(m_live, b_first, _INT_MAX), 0)
    high = tl.max(tl.where(m_live, b_end, 0), 0)
    last = row_start + num_rows
    is_seen = (high > row_start) & (low < last)
    low = (tl.minimum(tl.maximum(low, row_start), last) - row_start) // BM
    high = (tl.minimum(tl.maximum(high, row_start), last) - row_start + BM - 1) // BM
    low, high = tl.where(is_seen, low, 0), tl.where(is_seen, high, 0)
    i_range = i_b * num_tiles + i_tile
    tl.store(p_ranges + i_range * 2, low)
    tl.store(p_ranges + i_range * 2 + 1, high)
    tl.store(p_lengths + i_range, high - low)


@triton.jit
def order_kernel(p_lengths, p_order, num_tiles, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Sort stably, longest first: the place of an entry is the number of entries that come before it."""
    i_b = tl.program_id(0).to(tl.int64)
    o_tile = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_length = tl.load(p_lengths + i_b * num_tiles + o_tile, mask=o_tile < num_tiles, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for i in tl.range(0, num_tiles, CHUNK):  # pyright: ignore
        o_other = i + tl.arange(0, CHUNK)
        b_other = tl.load(p_lengths + i_b * num_tiles + o_other, mask=o_other < num_tiles, other=-1)
        is_longer = b_other[None, :] > b_length[:, None]
        is_earlier = (b_other[None, :] == b_length[:, None]) & (o_other[None, :] < o_tile[:, None])
        place += tl.sum((is_longer | is_earlier).to(tl.int32), 1)
    tl.store(p_order + i_b * num_tiles + place, o_tile, mask=o_tile < num_tiles)


def list_tiles_fused(
    first: Tensor, end: Tensor, num_rows: int, start: int, size: tuple[int, int], near: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tiles, counts and order, int32, in the shapes of :class:`gisting_kernels.plan.TileLists`.

    Arguments as for :func:`gisting_kernels.plan.list_tiles`, with contiguous intervals.
    """
    batch, num_keys = first.shape
    tile_rows, tile_keys = size
    num_tiles, num_row_tiles = -(-num_keys // tile_keys), -(-num_rows // tile_rows)
    bounds = first.new_empty((batch, num_tiles, 4))
    tiles = first.new_zeros((batch, num_row_tiles, num_tiles + 1))
    counts = first.new_empty((batch, num_row_tiles, 3))
    lengths = first.new_empty((batch, num_row_tiles))
    bounds_kernel[(batch, num_tiles)](first, end, bounds, num_keys, num_tiles, BN=tile_keys, num_warps=1)
    list_kernel[(batch, num_row_tiles)](
        bounds, tiles, counts, lengths, num_rows, start, num_row_tiles, num_tiles, near or 0,
        HAS_NEAR=near is not None, BM=tile_rows, BN=tile_keys, CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip
    return tiles, counts, _order(lengths)


def range_rows_fused(
    first: Tensor, end: Tensor, num_rows: int, start: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return bounds and order, int32, in the shapes of :class:`gisting_kernels.plan.RowRanges`.

    Arguments as for :func:`gisting_kernels.plan.range_rows`, with contiguous intervals.
    """
    batch, num_keys = first.shape
    num_tiles = -(-num_keys // size[1])
    ranges = first.new_empty((batch, num_tiles, 2))
    lengths = first.new_empty((batch, num_tiles))
    range_kernel[(batch, num_tiles)](
        first, end, ranges, lengths, num_rows, start, num_keys, num_tiles, BM=size[0], BN=size[1], num_warps=1
    )
    return ranges, _order(lengths)


def _order(lengths: Tensor) -> Tensor:
    order = torch.empty_like(lengths)
    batch, num_tiles = lengths.shape
    order_kernel[(batch, -(-num_tiles // 32))](lengths, order, num_tiles, BLOCK=32, CHUNK=_CHUNK, num_warps=4)
    return order
