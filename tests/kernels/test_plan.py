"""Compare the plan with the dense mask: which tiles are listed, how, in which order. Test the table of tile sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gisting_kernels as kernels
from gisting import visibility as vis
from gisting.attention import interval_attention
from gisting.visibility import FOREVER, Visibility
from gisting_kernels import configs
from gisting_kernels.configs import ENVIRONMENT_VARIABLE, LONG, SHORT, read_table, tile_sizes
from gisting_kernels.plan import Plan, TileLists, TileSizes, list_tiles, make_plan, mean_segment_length, range_rows
from tests.kernels.conftest import DEVICE, SMALL, intervals, tiles
from tests.slow import slow


@pytest.fixture(autouse=True)
def _sizes_are_not_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


# -- drawings ----------------------------------------------------------------------------------------------------------


def draw(lists: TileLists, row: int = 0) -> list[str]:
    """Draw a letter for each tile: near, partial, full. Fail if a tile is listed twice."""
    lines = []
    for listed, (near, partial, full) in zip(lists.tiles[row].tolist(), lists.counts[row].tolist(), strict=True):
        line = ["."] * (len(listed) - 1)
        for letter, begin, end in (("N", 0, near), ("P", near, partial), ("F", partial, full)):
            for tile in listed[begin:end]:
                assert line[tile] == ".", f"tile {tile} is listed twice"
                line[tile] = letter
        lines.append("".join(line))
    return lines


# prompt a b c, gist G, completion d e f g
GIST = vis.gist(torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0]]).bool())
PADDED = vis.gist(torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0]]).bool(), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]]))

DRAWINGS: list[Any] = [
    pytest.param(GIST, 8, None, "P... FP.. .PP. .PFP", id="docstring"),
    pytest.param(PADDED, 8, None, ".... .P.. .PP. .PFP", id="padding"),
    pytest.param(vis.causal(torch.ones(1, 8)), 8, None, "P... FP.. FFP. FFFP", id="causal"),
    pytest.param(vis.causal(torch.ones(1, 7)), 7, None, "P... FP.. FFP. FFFP", id="a-key-short-of-a-tile"),
    pytest.param(vis.bidirectional(torch.ones(1, 7)), 7, None, "FFFP FFFP FFFP FFFP", id="the-last-tile-is-partial"),
    pytest.param(vis.causal(torch.ones(1, 8)).windowed(2), 8, None, "P... PP.. .PP. ..PP", id="window"),
    pytest.param(vis.causal(torch.ones(1, 8)), 3, None, "FFFP FFFF", id="prefix-keys-rows-5-to-7"),
    pytest.param(vis.causal(torch.zeros(1, 8)), 8, None, ".... .... .... ....", id="no-row-sees-a-key"),
    pytest.param(vis.causal(torch.ones(1, 3)).for_cross_attention(), 6, None, "FP FP FP", id="more-rows-than-keys"),
    pytest.param(vis.causal(torch.ones(1, 8)), 8, 1, "N... FN.. FFN. FFFN", id="near-the-diagonal-alone"),
    pytest.param(vis.causal(torch.ones(1, 8)), 8, 2, "N... NN.. FNN. FFNN", id="near-one-off-the-diagonal"),
    pytest.param(vis.causal(torch.ones(1, 8)), 8, 3, "N... NN.. FNN. FFNN", id="near-two-off-the-diagonal"),
    pytest.param(vis.causal(torch.ones(1, 8)), 8, 4, "N... NN.. NNN. FNNN", id="near-three-off-the-diagonal"),
    pytest.param(GIST, 8, 2, "N... NN.. .NN. .PNN", id="near-before-partial"),
    pytest.param(vis.bidirectional(torch.ones(1, 8)), 8, 9, "NNNN NNNN NNNN NNNN", id="near-everywhere"),
]


@pytest.mark.parametrize(("visibility", "num_rows", "near", "drawing"), DRAWINGS)
def test_drawings(visibility: Visibility, num_rows: int, near: int | None, drawing: str) -> None:
    """The tiles are 2 x 2."""
    start = max(visibility.num_keys - num_rows, 0)
    lists = list_tiles(visibility.first, visibility.end, num_rows, start, (2, 2), near)
    assert " ".join(draw(lists)) == drawing


def test_row_ranges_of_the_docstring() -> None:
    """Key tiles a b, c G, d e, f g are seen from row tiles 0-1, 1-3, 2-3, 3."""
    ranges = range_rows(GIST.first, GIST.end, 8, 0, (2, 2))
    assert ranges.bounds.tolist() == [[[0, 2], [1, 4], [2, 4], [3, 4]]]
    assert ranges.order.tolist() == [[1, 0, 2, 3]]


# -- random intervals --------------------------------------------------------------------------------------------------


@st.composite
def plans(draw_from: st.DrawFn) -> tuple[Visibility, int, tuple[int, int], int | None]:
    """Draw a batch of random intervals, T, the rows and keys of a tile, and W."""
    num_keys, num_rows = draw_from(st.integers(0, 23)), draw_from(st.integers(0, 23))
    rows, keys = (draw_from(st.sampled_from([1, 2, 4, 8, 16])) for _ in range(2))
    edges = st.builds(lambda tile, size, off: tile * size + off, st.integers(0, 6), st.just(rows), st.integers(-1, 1))
    number = st.one_of(st.integers(-4, 40), edges, st.just(FOREVER))
    batch = draw_from(st.integers(1, 2))
    pairs = st.lists(st.tuples(number, number), min_size=num_keys, max_size=num_keys)
    both = torch.tensor([draw_from(pairs) for _ in range(batch)], dtype=torch.int32).view(batch, num_keys, 2)
    near = draw_from(st.one_of(st.none(), st.integers(1, 30)))
    return Visibility(both[..., 0].contiguous(), both[..., 1].contiguous()), num_rows, (rows, keys), near


def tile_view(dense: Tensor, size: tuple[int, int], missing: bool) -> Tensor:
    """View ``(B, T, K)`` as ``(B, row tiles, key tiles, rows * keys)``, padded with ``missing``."""
    rows, keys = size
    padded = torch.nn.functional.pad(dense, (0, -dense.shape[2] % keys, 0, -dense.shape[1] % rows), value=missing)
    tiled = padded.unflatten(1, (padded.shape[1] // rows, rows)).unflatten(3, (padded.shape[2] // keys, keys))
    return tiled.transpose(2, 3).flatten(3)


def classes(lists: TileLists) -> Tensor:
    """Return the class of each tile, ``(B, row tiles, key tiles)``: 0 near, 1 partial, 2 full, 3 not listed."""
    batch, num_row_tiles, padded = lists.tiles.shape
    kind = torch.full((batch, num_row_tiles, padded - 1), 3)
    for b in range(batch):
        for i, line in enumerate(draw(lists, b)):
            for j, letter in enumerate(line):
                kind[b, i, j] = "NPF.".index(letter)
    return kind


@settings(max_examples=60, deadline=None)
@for_all(plans())
def test_lists_agree_with_the_dense_mask(
    drawn: tuple[Visibility, int, tuple[int, int], int | None],
) -> None:
    visibility, num_rows, size, near = drawn
    start = max(visibility.num_keys - num_rows, 0)
    lists = list_tiles(visibility.first, visibility.end, num_rows, start, size, near)
    num_row_tiles, num_key_tiles = math.ceil(num_rows / size[0]), math.ceil(visibility.num_keys / size[1])
    batch = visibility.batch_size
    assert lists.tiles.shape == (batch, num_row_tiles, num_key_tiles + 1)
    assert lists.counts.shape == (batch, num_row_tiles, 3)
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (lists.tiles, lists.counts, lists.order))
    # The kernel loads the next tile ahead, even if it does not use it, so every entry must be a valid address.
    assert ((lists.tiles >= 0) & (lists.tiles <= num_key_tiles)).all()

    kind = classes(lists)  # no tile twice
    dense = visibility.to_dense(num_rows)
    anything, everything = tile_view(dense, size, False).any(-1), tile_view(dense, size, True).all(-1)
    # No row sees the keys beyond the last.
    is_rest = torch.arange(num_key_tiles) * size[1] + size[1] > visibility.num_keys
    everything &= ~is_rest
    assert (kind[anything] < 3).all(), "a tile with a visible pair is not listed"
    assert everything[kind == 2].all(), "a full tile hides something"
    if near is None:
        assert (kind != 0).all()
        is_near = torch.zeros_like(everything)
        assert (kind[everything & (dense.shape[1] > 0)] == 2).all(), "a tile that hides nothing is not full"
    else:
        distances = near_distances(num_row_tiles, num_key_tiles, size, start)
        is_near = (distances.abs() < near).any(-1)[None].expand_as(kind)
    listed = kind < 3
    assert torch.equal((kind == 0) & listed, is_near & listed)

    lengths = lists.counts[..., 2].gather(1, lists.order.long())
    assert (lengths[:, :-1] >= lengths[:, 1:]).all()
    assert torch.equal(lists.order.sort(-1).values, torch.arange(num_row_tiles, dtype=torch.int32).expand(batch, -1))


def near_distances(num_row_tiles: int, num_key_tiles: int, size: tuple[int, int], start: int) -> Tensor:
    """Return j - i for whole tiles, ``(row tiles, key tiles, rows * keys)``, beyond the last row and key too."""
    rows = start + torch.arange(num_row_tiles * size[0])
    keys = torch.arange(num_key_tiles * size[1])
    return tile_view((keys[None] - rows[:, None])[None], size, False)[0]


@settings(max_examples=60, deadline=None)
@for_all(plans())
def test_ranges_cover_every_row_that_sees_a_key(
    drawn: tuple[Visibility, int, tuple[int, int], int | None],
) -> None:
    visibility, num_rows, size, _ = drawn
    start = max(visibility.num_keys - num_rows, 0)
    ranges = range_rows(visibility.first, visibility.end, num_rows, start, size)
    num_row_tiles, num_key_tiles = math.ceil(num_rows / size[0]), math.ceil(visibility.num_keys / size[1])
    assert ranges.bounds.shape == (visibility.batch_size, num_key_tiles, 2)
    low, high = ranges.bounds[..., 0], ranges.bounds[..., 1]
    assert ((low >= 0) & (low <= high) & (high <= num_row_tiles)).all()
    anything = tile_view(visibility.to_dense(num_rows), size, False).any(-1)  # (B, row tiles, key tiles)
    index = torch.arange(num_row_tiles)[None, :, None]
    inside = (index >= low[:, None]) & (index < high[:, None])
    assert inside[anything].all(), "a row that sees a key is outside the range"
    lengths = (high - low).gather(1, ranges.order.long())
    assert (lengths[:, :-1] >= lengths[:, 1:]).all()
    assert torch.equal(
        ranges.order.sort(-1).values, torch.arange(num_key_tiles, dtype=torch.int32).expand(visibility.batch_size, -1)
    )


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_ranges_are_no_wider_than_needed(name: str) -> None:
    num_keys = 23
    visibility = {"causal": vis.causal, "bidirectional": vis.bidirectional}[name](torch.ones(1, num_keys))
    bounds = range_rows(visibility.first, visibility.end, num_keys, 0, (4, 8)).bounds[0].tolist()
    assert bounds == ([[0, 6], [2, 6], [4, 6]] if name == "causal" else [[0, 6]] * 3)


@pytest.mark.parametrize("name", ["causal", "gist", "documents", "encoder-gist", "windowed", "bidirectional"])
def test_few_tiles_are_listed_in_vain(name: str) -> None:
    """Only four numbers decide whether a tile is listed, so it may have no visible pair.

    For the library's masks there is at most one such tile for each tile of rows.
    """
    num_keys, size = 200, (16, 16)
    is_gist = torch.arange(num_keys)[None] // 3 == 22
    visibility = {
        "causal": vis.causal(torch.ones(1, num_keys)),
        "gist": vis.gist(is_gist),
        "documents": vis.causal(torch.ones(1, num_keys), documents=torch.arange(num_keys)[None] // 37),
        "encoder-gist": vis.encoder_gist(is_gist),
        "windowed": vis.causal(torch.ones(1, num_keys)).windowed(20),
        "bidirectional": vis.bidirectional(torch.ones(1, num_keys)),
    }[name]
    kind = classes(list_tiles(visibility.first, visibility.end, num_keys, 0, size))
    anything = tile_view(visibility.to_dense(), size, False).any(-1)
    assert ((kind < 3) & ~anything).sum() <= kind.shape[1]


# -- the whole plan ----------------------------------------------------------------------------------------------------


def test_the_plan_holds_the_lists_of_each_kernel() -> None:
    sizes = tiles((16, 32), (32, 16), (16, 64), (32, 16))
    visibility = vis.gist(torch.arange(70)[None] == 30)
    plan = make_plan(visibility.first, visibility.end, 50, sizes, near=3)
    assert (plan.num_rows, plan.num_keys, plan.near) == (50, 70, 3)
    for lists, size in ((plan.forward, (16, 32)), (plan.backward_query, (32, 16)), (plan.backward_table, (32, 16))):
        same(lists, list_tiles(visibility.first, visibility.end, 50, 20, size, 3))
    same(plan.backward_key, range_rows(visibility.first, visibility.end, 50, 20, (16, 64)))
    assert [tuple(t.shape) for t in plan.tensors()][:2] == [(1, 70), (1, 70)]
    assert len(plan.tensors()) == 13
    assert plan.numbers() == [16, 32, 4, 2, 0, 32, 16, 4, 2, 0, 16, 64, 4, 2, 0, 32, 16, 4, 2, 0]
    assert plan.tensors() is plan.tensors()
    assert plan.numbers() is plan.numbers()
    other = dataclasses.replace(plan, first=plan.first + 1)
    assert other.tensors()[0] is other.first


def same(have: Any, expected: Any) -> None:
    """Assert that two parts of plans are equal."""
    assert vars(have).keys() == vars(expected).keys()
    for name, tensor in vars(have).items():
        assert torch.equal(tensor, vars(expected)[name]), name


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_intervals_of_any_integer_type(dtype: torch.dtype) -> None:
    first, end = torch.arange(20)[None].to(dtype), torch.full((1, 20), 20, dtype=dtype)
    plan = make_plan(first, end, 20, SMALL)
    assert plan.first.dtype == plan.end.dtype == torch.int32
    same(plan.forward, make_plan(first.int(), end.int(), 20, SMALL).forward)


def test_intervals_that_are_views() -> None:
    """``from_attention_mask`` makes such views of one tensor."""
    mask = vis.gist(torch.arange(40)[None].expand(2, -1) == 13).as_attention_mask()
    visibility = Visibility.from_attention_mask(mask)
    plan = make_plan(visibility.first, visibility.end, 40, SMALL)
    assert plan.first.is_contiguous()
    assert plan.end.is_contiguous()
    assert torch.equal(plan.end, mask[:, 0, 1])


WIDTHS = [1, 5, 17, 64]


@pytest.mark.parametrize("near", WIDTHS)
@pytest.mark.parametrize("table", [(16, 16), (32, 32), (64, 16), (16, 64)], ids="{0[0]}x{0[1]}".format)
def test_near_tiles_hold_every_distance_below_the_width(near: int, table: tuple[int, int]) -> None:
    """The table kernel sums the distances below W in its near tiles, so these must contain all of them."""
    assert_near_distances_are_in_near_tiles(tiles((16, 16), (32, 16), (16, 16), table), 150, near)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=["8.0", "8.6", "9.0"])
@pytest.mark.parametrize(("head_size", "bits"), [(64, 16), (128, 16), (256, 16), (64, 32), (128, 32)])
@pytest.mark.parametrize("segment_length", [100.0, 1000.0, 5000.0], ids=["short", "long", "longest"])
def test_near_tiles_hold_every_near_distance_in_every_row_of_the_table(
    capability: tuple[int, int], bits: int, head_size: int, segment_length: float
) -> None:
    sizes = tile_sizes(capability, head_size, bits, segment_length, has_bias=True)
    assert_near_distances_are_in_near_tiles(sizes, 700, 91)


def assert_near_distances_are_in_near_tiles(sizes: Any, num_keys: int, near: int) -> None:
    visibility = vis.bidirectional(torch.ones(1, num_keys))
    plan = make_plan(visibility.first, visibility.end, num_keys, sizes, near=near)
    distance = torch.arange(num_keys)[None] - torch.arange(num_keys)[:, None]
    for lists, size in ((plan.backward_query, plan.sizes[1]), (plan.backward_table, plan.sizes[3])):
        is_near = (classes(lists)[0] == 0).repeat_interleave(size.rows, 0).repeat_interleave(size.keys, 1)
        is_near = is_near[:num_keys, :num_keys]
        assert is_near[distance.abs() < near].all()
        assert not is_near.all() or num_keys < near + 2 * max(size.shape)


def test_no_tensor_of_rows_times_keys() -> None:
    """For 4,096 rows and keys in tiles of 64, no tensor is larger than a few times the number of tiles or keys."""
    largest = 0

    class Measure(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    visibility = vis.gist(torch.arange(4096)[None] == 2000)
    first, end = visibility.first, visibility.end
    with Measure():
        make_plan(first, end, 4096, tiles((64, 64)), near=100)
    assert 4096 <= largest <= 4 * 64 * 65


# -- the planner in Triton ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("near", [slow(None, id="no-bias"), slow(1, id="W1"), pytest.param(9, id="W9")])
@pytest.mark.parametrize(
    ("visibility", "num_rows"),
    [
        pytest.param(vis.gist(torch.arange(45)[None].expand(3, -1) % 13 == 9), 45, id="gist"),
        pytest.param(vis.gist(torch.arange(45)[None] == 9, torch.arange(45)[None] > 20), 30, id="padding-prefix-keys"),
        pytest.param(vis.causal(torch.ones(2, 17)).for_cross_attention(), 70, id="more-rows-than-keys"),
        pytest.param(vis.causal(torch.zeros(1, 16)), 16, id="no-row-sees-a-key"),
        pytest.param(intervals((-5, -3), (30, 60), (7, 7), (-1, FOREVER), (16, 17)), 40, id="intervals-out-of-range"),
        pytest.param(vis.causal(torch.ones(1, 1)), 1, id="one-key"),
    ],
)
def test_the_fused_planner_gives_the_same(visibility: Visibility, num_rows: int, near: int | None) -> None:
    pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")
    from gisting_kernels.plan_kernels import list_tiles_fused, range_rows_fused

    start = max(visibility.num_keys - num_rows, 0)
    size = (16, 16)
    first, end = visibility.first.contiguous(), visibility.end.contiguous()
    expected = list_tiles(first, end, num_rows, start, size, near)
    have = TileLists(
        *(t.cpu() for t in list_tiles_fused(first.to(DEVICE), end.to(DEVICE), num_rows, start, size, near))
    )
    assert torch.equal(have.counts, expected.counts)
    assert torch.equal(have.order, expected.order)
    used = torch.arange(expected.tiles.shape[2]) < expected.counts[..., 2:]
    assert torch.equal(have.tiles[used], expected.tiles[used])
    bounds, order = range_rows_fused(first.to(DEVICE), end.to(DEVICE), num_rows, start, size)
    wanted = range_rows(first, end, num_rows, start, size)
    assert torch.equal(bounds.cpu(), wanted.bounds)
    assert torch.equal(order.cpu(), wanted.order)


@pytest.mark.usefixtures("device")
@pytest.mark.slow
def test_the_fused_planner_with_several_chunks_of_tiles() -> None:
    """It walks the tiles in chunks of 128, and sorts row tiles in blocks of 32."""
    pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")
    from gisting_kernels.plan_kernels import list_tiles_fused, range_rows_fused

    num_keys, num_rows = 16 * 131 + 5, 16 * 35 + 3
    start, size = num_keys - num_rows, (16, 16)
    visibility = vis.gist(torch.arange(num_keys)[None] % 1000 == 700)
    first, end = visibility.first, visibility.end
    expected = list_tiles(first, end, num_rows, start, size, 40)
    fused = list_tiles_fused(first.to(DEVICE), end.to(DEVICE), num_rows, start, size, 40)
    tile, counts, order = (t.cpu() for t in fused)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(order, expected.order)
    used = torch.arange(tile.shape[2]) < counts[..., 2:]
    assert torch.equal(tile[used], expected.tiles[used])
    wanted = range_rows(first, end, num_rows, start, size)
    bounds, order = range_rows_fused(first.to(DEVICE), end.to(DEVICE), num_rows, start, size)
    assert torch.equal(bounds.cpu(), wanted.bounds)
    assert torch.equal(order.cpu(), wanted.order)


# -- mean segment length -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visibility", "num_rows", "length"),
    [
        # 8, 7, ... 1 rows see the keys
        pytest.param(vis.causal(torch.ones(1, 8)), 8, 36 / 8, id="causal"),
        # 4, 3, 2 rows see a b c; 5, 4, 3, 2, 1 rows see G d e f g
        pytest.param(GIST, 8, (4 + 3 + 2 + 5 + 4 + 3 + 2 + 1) / 8, id="gist"),
        # 2 rows see c, 5 to 2 see G d e f, and none sees the other three
        pytest.param(PADDED, 8, (2 + 5 + 4 + 3 + 2) / 5, id="only-visible-keys-count"),
        # rows 6 and 7 see the six keys before them, and themselves
        pytest.param(vis.causal(torch.ones(1, 8)), 2, (2 * 7 + 1) / 8, id="prefix-keys"),
        pytest.param(vis.causal(torch.ones(1, 3)).for_cross_attention(), 5, 5.0, id="more-rows-than-keys"),
        pytest.param(vis.causal(torch.zeros(2, 8)), 8, 0.0, id="no-row-sees-a-key"),
    ],
)
def test_mean_segment_length(visibility: Visibility, num_rows: int, length: float) -> None:
    assert mean_segment_length(visibility.first, visibility.end, num_rows) == pytest.approx(length, rel=1e-6)


# -- tile sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
def test_every_card_finds_its_sizes(capability: tuple[int, int]) -> None:
    for bits in (16, 32):
        # Float32 beyond 128 is refused by why_not.
        for head_size in (1, 8, 64, 65, 128, *((129, 256) if bits == 16 else ())):
            for segment_length in (0.0, SHORT, SHORT + 1, LONG, LONG + 1):
                for has_bias in (False, True):
                    sizes = tile_sizes(capability, head_size, bits, segment_length, has_bias=has_bias)
                    assert len(sizes) == 4
                    for size in sizes:
                        assert all(n >= 16 and n & (n - 1) == 0 for n in size.shape), size
                        assert size.warps in (1, 2, 4, 8)
                        assert size.stages >= 1


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0)], ids="{0[0]}.{0[1]}".format)
def test_cards_with_little_shared_memory_take_the_small_tiles(capability: tuple[int, int]) -> None:
    long = tile_sizes(capability, 128, 16, 1e6, has_bias=False)
    short = tile_sizes((8, 0), 128, 16, 1.0, has_bias=False)
    assert [size.shape for size in long] == [size.shape for size in short]
    assert {size.stages for size in long} == {1}


def test_short_segments_have_smaller_tiles() -> None:
    """On cards with enough shared memory; most of a large tile would be masked."""
    for capability in ((8, 0), (9, 0)):
        short, long = (tile_sizes(capability, 64, 16, n, has_bias=False)[0] for n in (SHORT, SHORT + 1))
        assert short.rows * short.keys < long.rows * long.keys


@pytest.mark.parametrize(
    ("capability", "segment_length", "has_bias", "tile"),
    [
        pytest.param((9, 0), SHORT, False, TileSizes(64, 64, 4, 2, "descriptors"), id="short"),
        pytest.param((9, 0), 1030.0, False, TileSizes(128, 128, 8, 2, "pingpong"), id="4,096-tokens"),
        pytest.param((9, 0), 4100.0, False, TileSizes(128, 128, 8, 2, "pingpong"), id="16,384-tokens"),
        pytest.param((10, 0), 1030.0, False, TileSizes(64, 64, 4, 3), id="newer-card"),
        pytest.param((9, 0), 4100.0, True, TileSizes(128, 64, 8, 3), id="bias"),
    ],
)
def test_the_forward_kernel_of_a_hopper_card(
    capability: tuple[int, int], segment_length: float, has_bias: bool, tile: TileSizes
) -> None:
    """With head size 128, as measured on an H200."""
    assert tile_sizes(capability, 128, 16, segment_length, has_bias=has_bias)[0] == tile


def test_a_pingpong_row_that_no_card_has_timed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head size 64 keeps the tile that was timed, until there is a time for the other."""
    assert tile_sizes((9, 0), 64, 16, 4100.0, has_bias=False)[0] == TileSizes(128, 64, 4, 3)
    rows = [row | {"measured": True, "device": "a card"} for row in read_table()]
    monkeypatch.setattr("gisting_kernels.configs.read_table", lambda: rows)
    assert tile_sizes((9, 0), 64, 16, 4100.0, has_bias=False)[0] == TileSizes(128, 128, 8, 2, "pingpong")


@pytest.mark.parametrize(("size", "tile"), [(64, TileSizes(128, 64, 4, 3)), (128, TileSizes(64, 64, 4, 3))])
def test_calls_with_dropout_or_a_softcap_have_tiles_of_their_own(size: int, tile: TileSizes) -> None:
    """The tile of pingpong spills on the other paths."""
    assert tile_sizes((9, 0), size, 16, 1030.0, has_bias=False, can_pingpong=False)[0] == tile


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("options", "expected"), [({}, True), ({"softcap": 5.0}, False), ({"dropout": 0.1}, False)], ids=str
)
def test_attention_says_whether_a_call_can_pingpong(
    options: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, plan_tiles = [], kernels.plan_tiles

    def planned(*args: Any, **kwargs: Any) -> Plan:
        calls.append(kwargs["can_pingpong"])
        return plan_tiles(*args, **kwargs)

    monkeypatch.setattr(kernels, "plan_tiles", planned)
    visibility = vis.causal(torch.ones(1, 8))
    q = torch.zeros(1, 1, 8, 16, device=DEVICE, requires_grad=True)
    interval_attention(q, q, q, visibility.to(str(DEVICE)), impl="triton", **options)
    interval_attention(q, q, q, visibility.to(str(DEVICE)), impl="triton")
    assert calls == ([True] if expected else [False, True])  # the plan of one is not that of the other


def test_the_longest_segments_may_have_their_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"arch": 90, "kernel": "forward", "bits": 16, "head_size": 64, "segment": "long", "tile": [64, 64, 4, 3]}
    longest = row | {"segment": "longest", "tile": [128, 64, 4, 3]}
    others = [other for other in read_table() if other["kernel"] != "forward"]
    monkeypatch.setattr("gisting_kernels.configs._ROWS", (row, longest, *others))
    found = [tile_sizes((9, 0), 64, 16, length, has_bias=False)[0] for length in (1030.0, LONG, 4100.0)]
    assert found == [TileSizes(64, 64, 4, 3), TileSizes(64, 64, 4, 3), TileSizes(128, 64, 4, 3)]


def test_a_row_may_name_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only cards with all of the shared memory take it; the others have the tile in a single stage."""
    row = {"arch": 90, "kernel": "forward", "bits": 16, "head_size": 64, "tile": [128, 64, 4, 3], "path": "descriptors"}
    others = [other for other in read_table() if other["kernel"] != "forward"]
    old = row | {"arch": 80}
    monkeypatch.setattr("gisting_kernels.configs._ROWS", (row, old, *others))
    assert tile_sizes((9, 0), 64, 16, 1.0, has_bias=False)[0] == TileSizes(128, 64, 4, 3, "descriptors")
    assert tile_sizes((12, 0), 64, 16, 1.0, has_bias=False)[0] == TileSizes(128, 64, 4, 1)


def test_numbers_and_sizes() -> None:
    sizes = (TileSizes(16, 32, 4, 2), TileSizes(64, 16, 8, 1, "pingpong"))
    numbers = [number for size in sizes for number in size.numbers]
    assert [TileSizes.from_numbers(numbers, index) for index in (0, 1)] == list(sizes)


def test_measured_rows_name_their_device() -> None:
    assert any(row["measured"] for row in read_table())
    for row in read_table():
        assert row["measured"] == ("device" in row), row


def test_every_row_of_the_table_can_match() -> None:
    """No earlier row matches everything that a row matches."""
    keys = ("arch", "kernel", "bits", "head_size", "segment", "bias")
    for place, row in enumerate(read_table()):
        for earlier in read_table()[:place]:
            if earlier.get("path") == "pingpong" != row.get("path"):
                continue  # for other cards of the class
            assert any(key in earlier and earlier[key] != row.get(key) for key in keys), row


def test_sizes_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tile_sizes((9, 0), 64, 16, 1.0, has_bias=False)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, " forward=32,16,2,1; key=16,64,8,4 ;")
    forced = tile_sizes((9, 0), 64, 16, 1.0, has_bias=False)
    assert forced == (TileSizes(32, 16, 2, 1), usual[1], TileSizes(16, 64, 8, 4), usual[3])
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "forward=32,16,2,1,descriptors")
    assert tile_sizes((9, 0), 64, 16, 1.0, has_bias=False)[0] == TileSizes(32, 16, 2, 1, "descriptors")
    # Forced sizes are used unchanged, even on a small card.
    assert tile_sizes((8, 6), 64, 16, 1.0, has_bias=False)[0] == TileSizes(32, 16, 2, 1, "descriptors")


def test_the_plan_takes_the_forced_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "forward=32,16,2,1")
    plan = kernels.plan_tiles(GIST.first, GIST.end, torch.zeros(1, 1, 8, 16))
    assert plan.sizes[0] == TileSizes(32, 16, 2, 1)


EXPECTED = (
    "GISTING_KERNEL_CONFIG: expected KERNEL=ROWS,KEYS,WARPS,STAGES or KERNEL=ROWS,KEYS,WARPS,STAGES,PATH, separated by "
    "';', where KERNEL is one of forward, query, key, table and PATH one of pointers, descriptors, pingpong, got "
)
POWER = "must be a power of two of at least 16, got "
WARPS = "must be a power of two, got "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("forward", f"{EXPECTED}'forward'", id="no-numbers"),
        pytest.param("dq=16,16,4,1", f"{EXPECTED}'dq=16,16,4,1'", id="unknown-kernel"),
        pytest.param("key=16,16,4", f"{EXPECTED}'key=16,16,4'", id="three-numbers"),
        pytest.param("key=16,16,4,1,1", f"{EXPECTED}'key=16,16,4,1,1'", id="five-numbers"),
        pytest.param("key=16,16,4,1,tma", f"{EXPECTED}'key=16,16,4,1,tma'", id="unknown-path"),
        pytest.param("key=16,-16,4,1", f"{EXPECTED}'key=16,-16,4,1'", id="negative"),
        pytest.param("key=16,16.0,4,1", f"{EXPECTED}'key=16,16.0,4,1'", id="no-integer"),
        pytest.param("key=16,16,4,1,table=16,16,4,1", f"{EXPECTED}'key=16,16,4,1,table=16,16,4,1'", id="comma"),
        pytest.param("key=8,16,4,1", f"GISTING_KERNEL_CONFIG: rows {POWER}'key=8,16,4,1'", id="rows-8"),
        pytest.param("key=16,48,4,1", f"GISTING_KERNEL_CONFIG: keys {POWER}'key=16,48,4,1'", id="keys-48"),
        pytest.param("key=16,16,3,1", f"GISTING_KERNEL_CONFIG: warps {WARPS}'key=16,16,3,1'", id="warps-3"),
        pytest.param("key=16,16,0,1", f"GISTING_KERNEL_CONFIG: warps {WARPS}'key=16,16,0,1'", id="warps-0"),
        pytest.param(
            "key=16,16,4,0", "GISTING_KERNEL_CONFIG: stages must be at least 1, got 'key=16,16,4,0'", id="stages-0"
        ),
    ],
)
def test_invalid_sizes(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    with pytest.raises(ValueError, match="GISTING_KERNEL_CONFIG") as caught:
        tile_sizes((8, 0), 64, 16, 1.0, has_bias=False)
    assert str(caught.value) == message


# -- plan_tiles --------------------------------------------------------------------------------------------------------


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the arguments of each look-up."""
    calls: list[dict[str, Any]] = []

    def look_up(capability: Any, head_size: int, bits: int, segment_length: float, **options: bool) -> Any:
        calls.append({"head_size": head_size, "bits": bits, "length": segment_length, **options})
        return configs.tile_sizes(capability, head_size, bits, segment_length, **options)

    monkeypatch.setattr("gisting_kernels.op.tile_sizes", look_up)
    return calls


def test_plan_tiles_asks_for_the_sizes_of_its_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    q = torch.zeros(1, 2, 8, 80, dtype=torch.float16)
    plan = kernels.plan_tiles(GIST.first, GIST.end, q, relative_width=3)
    assert calls == [{"head_size": 80, "bits": 16, "length": 8.0, "has_bias": True, "can_pingpong": True}]
    assert (plan.near, plan.num_rows) == (3, 8)


def test_plan_tiles_measures_the_segments_of_long_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    documents = vis.causal(torch.ones(1, 600), documents=torch.arange(600)[None] // 3)
    q = torch.zeros(1, 1, 600, 16)
    kernels.plan_tiles(documents.first, documents.end, q)
    kernels.plan_tiles(documents.first, documents.end, q, segment_length=500.0)
    assert [call["length"] for call in calls] == [2.0, 500.0]  # (3 + 2 + 1) / 3


@pytest.mark.parametrize(("width", "near"), [(None, None), (0, 1), (1, 1), (7, 7)])
def test_a_bias_of_width_0_is_near_on_the_diagonal(width: int | None, near: int | None) -> None:
    plan: Plan = kernels.plan_tiles(GIST.first, GIST.end, torch.zeros(1, 1, 8, 16), relative_width=width)
    assert plan.near == near
