"""Find the tiles that an interval mask touches, once per batch, for every kernel of every layer.

Place in the flow: first/end (from the caller) -> **plan** -> kernels. Written in torch operations, without a loop over
tiles and without a tensor of N x N elements; on a GPU the kernels of ``plan_kernels.py`` compute the same in a few
launches. Four numbers describe a tile of keys: the smallest and largest ``first`` and the smallest and largest ``end``
of its *live* keys, the keys that some row sees. For the rows ``r0 <= i < r1``:

    visible   min first < r1  and  max end > r0        some row may see some key (conservative: perhaps none does)
    full      max first <= r0 and  min end >= r1       every row sees every key, none of them dead: no mask test

An example: 8 rows and keys in tiles of 2 x 2, prompt ``a b c``, gist ``G``, completion ``d e f g``:

            a b  c G  d e  f g
      a b   P    .    .    .         P  partial: loaded, masked
      c G   F    P    .    .         F  full: loaded, no mask test
      d e   .    P    P    .         .  skipped: not even loaded
      f g   .    P    F    P         (the rows from d on do not see c, so the tile c G is never full for them)

Forward and dQ walk a list of key tiles for each tile of rows. dK/dV walks the rows for each tile of keys, which needs
no list: the rows that see any key of the tile lie between two bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "PATHS",
    "Plan",
    "RowRanges",
    "TileLists",
    "TileSizes",
    "list_tiles",
    "make_plan",
    "mean_segment_length",
    "range_rows",
]

# The ways to run a kernel: tiles loaded through pointers; by the tensor copy unit of newer cards (TMA), through
# descriptors; or by groups of warps that load and compute in turns.
PATHS = ("pointers", "descriptors", "pingpong")
_INT_MAX = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class TileSizes:
    """The configuration of a kernel: the shape of its tile, and Triton's compile options.

    Args:
        rows: query rows in a tile.
        keys: keys in a tile.
        warps: warps per program.
        stages: stages of the software pipeline.
        path: one of ``PATHS``. A call that pingpong cannot serve uses descriptors; tensors that cannot be described use
            pointers.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    path: str = "pointers"

    @classmethod
    def from_numbers(cls, numbers: Sequence[int], index: int) -> TileSizes:
        """Read the ``index``-th kernel's configuration from :meth:`Plan.numbers`."""
        rows, keys, warps, stages, path = numbers[5 * index : 5 * index + 5]
        return cls(rows, keys, warps, stages, PATHS[path])

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """Rows, keys, warps, stages and the index of the path in ``PATHS``."""
        return self.rows, self.keys, self.warps, self.stages, PATHS.index(self.path)

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and keys of a tile."""
        return self.rows, self.keys


@dataclass(frozen=True)
class TileLists:
    """The key tiles to walk for each tile of rows: near ones first, then partial, then full ones.

    Args:
        tiles: int32 ``(B, row tiles, key tiles + 1)``, indices of key tiles. One longer than needed, because the kernel
            loads the next index before it works on the current tile.
        counts: int32 ``(B, row tiles, 3)``: where the near, partial and full tiles end in the list.
        order: int32 ``(B, row tiles)``, row tiles sorted by the length of their lists, longest first.
    """

    tiles: Tensor
    counts: Tensor
    order: Tensor


@dataclass(frozen=True)
class RowRanges:
    """The rows that see any key, for each tile of keys.

    Args:
        bounds: int32 ``(B, key tiles, 2)``: the half-open range of row tiles.
        order: int32 ``(B, key tiles)``, key tiles sorted by their number of row tiles, largest first.
    """

    bounds: Tensor
    order: Tensor


@dataclass(frozen=True)
class Plan:
    """What the kernels need to know about the intervals of a batch. B is 1 if one mask serves every sequence.

    Args:
        first, end: int32 ``(B, K)``, contiguous.
        forward, backward_query, backward_table: lists for the forward, dQ and table-gradient kernels.
        backward_key: ranges for the dK/dV kernel.
        num_rows: T; query row t is row ``max(K - T, 0) + t`` of the mask.
        near: W, the distance from which a relative bias is constant, or None without a bias.
        sizes: tile sizes of the forward, dQ, dK/dV and table-gradient kernels.
    """

    first: Tensor
    end: Tensor
    forward: TileLists
    backward_query: TileLists
    backward_table: TileLists
    backward_key: RowRanges
    num_rows: int
    near: int | None
    sizes: tuple[TileSizes, TileSizes, TileSizes, TileSizes]
    _tensors: list[Tensor] = field(init=False, repr=False, compare=False)
    _numbers: list[int] = field(init=False, repr=False, compare=False)

    @property
    def num_keys(self) -> int:
        """K, the number of keys."""
        return self.first.shape[1]

    def __post_init__(self) -> None:
        # Every layer uses both lists in every step, so they are made once.
        lists = (self.forward, self.backward_query, self.backward_table)
        tensors = [
            self.first,
            self.end,
            *(tensor for part in lists for tensor in (part.tiles, part.counts, part.order)),
            self.backward_key.bounds,
            self.backward_key.order,
        ]
        numbers = [number for size in self.sizes for number in size.numbers]
        object.__setattr__(self, "_tensors", tensors)
        object.__setattr__(self, "_numbers", numbers)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, int32 in the shapes above, in the order that the custom op takes them.

        The list is shared: do not change it.
        """
        return self._tensors

    def numbers(self) -> list[int]:
        """Return the numbers of each of ``sizes``, as the custom op takes them.

        The list is shared: do not change it.
        """
        return self._numbers


def make_plan(
    first: Tensor,
    end: Tensor,
    num_rows: int,
    sizes: tuple[TileSizes, TileSizes, TileSizes, TileSizes],
    *,
    near: int | None = None,
) -> Plan:
    """Plan the tiles of ``first[j] <= i < end[j]``.

    Args:
        first: integer ``(B, K)``.
        end: integer ``(B, K)``.
        num_rows: T.
        sizes: tile sizes of the forward, dQ, dK/dV and table-gradient kernels.
        near: W of a relative bias ``(H, 2 W + 1)``; key tiles with some ``|j - i| < W`` are then listed separately.

    Returns:
        The plan, on the device of ``first``.
    """
    first, end = first.to(torch.int32).contiguous(), end.to(torch.int32).contiguous()
    start = max(first.shape[1] - num_rows, 0)
    lists: dict[tuple[int, int], TileLists] = {}
    forward, query, key, table = sizes
    # Without a bias, no kernel walks the lists of the table gradient.
    table = query if near is None else table
    for size in (forward, query, table):
        if size.shape not in lists:
            lists[size.shape] = list_tiles(first, end, num_rows, start, size.shape, near)
    return Plan(
        first,
        end,
        lists[forward.shape],
        lists[query.shape],
        lists[table.shape],
        range_rows(first, end, num_rows, start, key.shape),
        num_rows,
        near,
        sizes,
    )


def list_tiles(
    first: Tensor, end: Tensor, num_rows: int, start: int, size: tuple[int, int], near: int | None = None
) -> TileLists:
    """List the tiles of one size.

    Args:
        first: int32 ``(B, K)``.
        end: int32 ``(B, K)``.
        num_rows: T; the rows are ``start .. start + num_rows - 1`` of the mask.
        start: index of the first row.
        size: rows and keys of a tile.
        near: W of a relative bias, or None without one; key tiles with some ``|j - i| < W`` are listed separately.
    """
    if _is_fused(first, num_rows):
        from .plan_kernels import list_tiles_fused

        with torch.cuda.device_of(first):
            return TileLists(*list_tiles_fused(first.contiguous(), end.contiguous(), num_rows, start, size, near))
    tile_rows, tile_keys = size
    device = first.device
    first_min, first_max, end_min, end_max = _bounds(first, end, tile_keys)
    num_tiles = first_min.shape[1]
    row_first = start + torch.arange(0, num_rows, tile_rows, dtype=torch.int32, device=device)
    row_end = (row_first + tile_rows).clamp(max=start + num_rows)
    r0, r1 = row_first[:, None], row_end[:, None]  # (row tiles, 1), against (B, 1, key tiles)
    is_visible = (first_min[:, None] < r1) & (end_max[:, None] > r0)
    is_full = (first_max[:, None] <= r0) & (end_min[:, None] >= r1)
    kind = torch.where(is_full, 2, 1)
    if near is not None:
        key_first = torch.arange(num_tiles, dtype=torch.int32, device=device) * tile_keys
        # The distances j - i of the whole tile, including rows beyond the last, because the kernel computes with those.
        lowest = key_first - (r0 + tile_rows - 1)
        highest = key_first + (tile_keys - 1) - r0
        kind = torch.where((lowest < near) & (highest > -near), 0, kind)
    kind = torch.where(is_visible, kind, 3)
    tiles = pad(kind.sort(dim=-1, stable=True).indices.to(torch.int32), (0, 1))
    counts = torch.stack([(kind <= last).sum(-1) for last in range(3)], dim=-1).to(torch.int32)
    return TileLists(tiles.contiguous(), counts.contiguous(), _longest_first(counts[..., 2]))


def range_rows(first: Tensor, end: Tensor, num_rows: int, start: int, size: tuple[int, int]) -> RowRanges:
    """Find the row ranges for tiles of one size.

    Args:
        first: int32 ``(B, K)``.
        end: int32 ``(B, K)``.
        num_rows: T; the rows are ``start .. start + num_rows - 1`` of the mask.
        start: index of the first row.
        size: rows and keys of a tile.
    """
    if _is_fused(first, num_rows):
        from .plan_kernels import range_rows_fused

        with torch.cuda.device_of(first):
            return RowRanges(*range_rows_fused(first.contiguous(), end.contiguous(), num_rows, start, size))
    tile_rows, tile_keys = size
    first_min, _, _, end_max = _bounds(first, end, tile_keys)
    low = (first_min.clamp(start, start + num_rows) - start) // tile_rows
    high = ((end_max.clamp(start, start + num_rows) - start) + tile_rows - 1) // tile_rows
    is_seen = (end_max > start) & (first_min < start + num_rows)
    bounds = torch.stack([torch.where(is_seen, low, 0), torch.where(is_seen, high, 0)], dim=-1).to(torch.int32)
    return RowRanges(bounds.contiguous(), _longest_first(bounds[..., 1] - bounds[..., 0]))


def _is_fused(first: Tensor, num_rows: int) -> bool:
    """Use Triton on a GPU, except inside ``torch.compile``, which fuses torch operations itself."""
    return first.is_cuda and first.numel() > 0 and num_rows > 0 and not torch.compiler.is_compiling()


def _bounds(first: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the smallest and largest first, and the smallest and largest end, of each tile: ``(B, key tiles)`` each.

    A dead key gets first = infinity and end = 0, so its tile cannot be full, and it does not make its tile visible.
    Keys beyond the last are dead.
    """
    num_keys = first.shape[1]
    missing = -num_keys % size
    is_live = end > first
    first = pad(torch.where(is_live, first, _INT_MAX), (0, missing), value=_INT_MAX)
    end = pad(torch.where(is_live, end, 0), (0, missing), value=0)
    shape = (first.shape[0], (num_keys + missing) // size, size)
    first, end = first.view(shape), end.view(shape)
    return first.amin(-1), first.amax(-1), end.amin(-1), end.amax(-1)


def _longest_first(length: Tensor) -> Tensor:
    return length.sort(dim=-1, descending=True, stable=True).indices.to(torch.int32).contiguous()


def mean_segment_length(first: Tensor, end: Tensor, num_rows: int) -> float:
    """Return how many rows see a key, averaged over the keys that some row sees. Tile sizes depend on it.

    Reads two numbers back from the device, in one transfer.

    Args:
        first: integer ``(B, K)``.
        end: integer ``(B, K)``.
        num_rows: T.
    """
    start = max(first.shape[1] - num_rows, 0)
    seen = (end.clamp(max=start + num_rows) - first.clamp(min=start)).clamp(min=0)
    total = torch.stack([seen.sum(dtype=torch.float32), (seen > 0).sum(dtype=torch.float32)]).tolist()
    return total[0] / max(total[1], 1.0)
