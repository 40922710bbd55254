"""The forward and backward kernels against the oracle in float64: outputs and every gradient.

Tolerance: see ``conftest.py``. Lengths are odd on purpose; tiles are 16 to 64, so that a few dozen rows make several.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")

from gisting import visibility as vis
from gisting.visibility import FOREVER, Visibility
from gisting_kernels.plan import Plan, RowRanges, TileLists
from tests.kernels.conftest import (
    DEVICE,
    DTYPES,
    IS_CUDA,
    MIXED,
    SMALL,
    Given,
    Sizes,
    check,
    differentiate,
    exact,
    failures,
    fused,
    intervals,
    make,
    plain,
    plan_for,
    tiles,
)

pytestmark = [
    pytest.mark.usefixtures("device"),
    # exp2 of a masked score, in the interpreter's NumPy
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


# -- every builder of visibility ---------------------------------------------------------------------------------------


def builders(num_keys: int) -> dict[str, Visibility]:
    """Two sequences each, differing where the builder lets them."""
    index = torch.arange(num_keys)
    third = num_keys // 3
    spans = torch.stack([(index >= third) & (index < third + 2), (index >= 2 * third) & (index < 2 * third + 1)])
    chunks = torch.stack([(index % 11) == 9, (index >= third) & (index < third + 3)])
    left, right = torch.stack([index >= 7, index >= 0]), torch.stack([index < num_keys - 9, index < num_keys])
    documents = torch.stack([(index >= 17).long() + (index >= 31).long(), (index >= third + 5).long()])
    branches = torch.stack([(index >= 20).long() + (index >= 33).long(), (index >= 2 * third + 4).long()])
    return {
        "causal": vis.causal(torch.ones(2, num_keys)),
        "causal-left-padding": vis.causal(left),
        "causal-right-padding-documents": vis.causal(right, documents=documents),
        "causal-branches": vis.causal(left, branches=branches),
        "gist": vis.gist(spans),
        "gist-several-spans-left-padding": vis.gist(chunks, left),
        "gist-documents": vis.gist(chunks, right, documents=documents),
        "gist-branches": vis.gist(spans, left, branches=branches),
        "positive-left-padding": vis.positive(spans, left),
        "negative": vis.negative(spans),
        "negative-right-padding-documents": vis.negative(chunks, right, documents=documents),
        "negative-branches": vis.negative(spans, left, branches=branches),
        "bidirectional-padding": vis.bidirectional(right),
        "encoder-gist": vis.encoder_gist(chunks, right),
        "encoder-positive": vis.encoder_positive(spans, left),
        "encoder-negative": vis.encoder_negative(spans, right),
        "windowed": vis.causal(left).windowed(13),
        "windowed-gist": vis.gist(spans, left).windowed(5),
        "last-keys": Visibility(*((t := vis.gist(torch.cat([spans, spans], 1)).last_keys(num_keys)).first, t.end)),
        "cross-attention": vis.gist(spans, left).for_cross_attention(),
    }


BUILDERS = builders(45)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder(name: str, dtype: torch.dtype) -> None:
    check(make(45, dtype=dtype, batch=2, heads=1), BUILDERS[name], MIXED)


# -- shapes ------------------------------------------------------------------------------------------------------------


def gist_in_the_middle(num_keys: int, batch: int = 1) -> Visibility:
    """Gist masking behind left padding, if there is room for it."""
    index = torch.arange(num_keys)
    is_gist = (index >= num_keys // 3) & (index < num_keys // 3 + 2)
    return vis.gist(is_gist.expand(batch, -1), (index >= num_keys // 7).expand(batch, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("num_rows", "sizes"),
    [
        pytest.param(1, SMALL, id="N1"),
        pytest.param(2, MIXED, id="N2"),
        pytest.param(15, SMALL, id="N15-one-short-of-a-tile"),
        pytest.param(16, SMALL, id="N16-a-tile"),
        pytest.param(17, SMALL, id="N17-one-over-a-tile"),
        pytest.param(63, tiles((64, 32)), id="N63"),
        pytest.param(65, tiles((32, 64)), id="N65"),
        pytest.param(64, tiles((32, 16)), id="N64-no-rest"),
        pytest.param(111, tiles((64, 64), (32, 64), (64, 32), (64, 64)), id="N111"),
        pytest.param(200, tiles((64, 64)), id="N200"),
    ],
)
def test_lengths(num_rows: int, sizes: Sizes, dtype: torch.dtype) -> None:
    check(make(num_rows, dtype=dtype), gist_in_the_middle(num_rows), sizes)


@pytest.mark.parametrize(
    ("heads", "groups"), [(1, 1), (4, 4), (4, 2), (4, 1), (6, 2)], ids=["1-1", "4-4", "4-2", "4-1", "6-2"]
)
def test_grouped_heads(heads: int, groups: int) -> None:
    check(make(21, batch=2, heads=heads, groups=groups), gist_in_the_middle(21, 2), tiles((16, 32)))


@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 17), (1, 1), (5, 40), (33, 50), (16, 17), (31, 32)])
def test_prefix_keys(num_rows: int, num_keys: int) -> None:
    """T < K: rows are the last T of the K, so that no tile of rows begins at a multiple of its size."""
    check(make(num_rows, num_keys, width=3), gist_in_the_middle(num_keys), MIXED)


@pytest.mark.parametrize(
    ("num_rows", "num_keys", "visibility"),
    [
        pytest.param(40, 17, vis.gist(torch.arange(17)[None] == 9).for_cross_attention(), id="cross-attention"),
        pytest.param(33, 1, vis.causal(torch.ones(1, 1)), id="one-key"),
        pytest.param(50, 3, intervals((0, 17), (16, 33), (49, 60)), id="intervals-beyond-K"),
        pytest.param(18, 17, vis.causal(torch.ones(1, 17)), id="one-row-more"),
    ],
)
def test_more_rows_than_keys(num_rows: int, num_keys: int, visibility: Visibility) -> None:
    check(make(num_rows, num_keys, width=4), visibility, MIXED)


@pytest.mark.parametrize("size", [1, 8, 16, 20, 64, 80, 96])
def test_head_sizes(size: int) -> None:
    check(make(33, size=size), gist_in_the_middle(33), tiles((16, 32)))


@pytest.mark.parametrize("size", [1, 20, 96, 256])
def test_head_sizes_in_float16(size: int) -> None:
    check(make(33, size=size, dtype=torch.float16), gist_in_the_middle(33), tiles((16, 32)))


def test_one_visibility_serves_every_sequence() -> None:
    given, visibility = make(17, batch=3, width=5), gist_in_the_middle(17)
    repeated = Visibility(visibility.first.expand(3, -1), visibility.end.expand(3, -1))
    have, expected = (differentiate(lambda it, v=v: fused(it, plan_for(it, v)), given) for v in (visibility, repeated))
    assert_same_bits(have, expected)


@pytest.mark.parametrize(("num_rows", "num_keys", "batch"), [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
@pytest.mark.parametrize("width", [None, 2], ids=["no-bias", "bias"])
def test_nothing_to_do(num_rows: int, num_keys: int, batch: int, width: int | None) -> None:
    """No rows, no keys or no sequences: shapes are right and what there is is zero."""
    given = make(num_rows, num_keys, batch=batch, width=width)
    visibility = Visibility(torch.zeros(batch, num_keys).int(), torch.full((batch, num_keys), FOREVER))
    for name, tensor in differentiate(lambda it: fused(it, plan_for(it, visibility)), given).items():
        assert not tensor.any(), name


# -- memory layouts ----------------------------------------------------------------------------------------------------


def transposed(tensor: Tensor) -> Tensor:
    """As a model has it: (B, T, H, D) out of one projection, seen as (B, H, T, D)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor: Tensor) -> Tensor:
    """Cut out of a larger tensor whose rest, were it read, would be seen."""
    large = torch.full([n + 3 for n in tensor.shape], 1e4, dtype=tensor.dtype, device=tensor.device)
    large[1:-2, 2:-1, 1:-2, 2:-1] = tensor
    return large[1:-2, 2:-1, 1:-2, 2:-1]


def last_dimension_strided(tensor: Tensor) -> Tensor:
    """(B, H, D, T) in memory."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("layout", [transposed, sliced, last_dimension_strided])
def test_strides(layout: Callable[[Tensor], Tensor]) -> None:
    """The same numbers laid out another way give the same results, in the output and in the gradients."""
    given, visibility = make(19, batch=2, groups=2, size=20, width=5), gist_in_the_middle(19, 2)
    plan = plan_for(given, visibility, MIXED)
    expected = differentiate(lambda it: fused(it, plan), given)
    leaves = [layout(t.detach()).requires_grad_() for t in given[:3]]
    assert all(a.stride() != b.stride() for a, b in zip(leaves, given[:3], strict=True))
    other = Given(*leaves, given.table, layout(given.upstream))
    assert_agree(differentiate(lambda it: fused(it, plan), other), expected, other, visibility)


def test_the_output_has_the_layout_of_q() -> None:
    given, visibility = make(21, batch=2, heads=4, groups=2), gist_in_the_middle(21, 2)
    q = transposed(given.q.detach())
    out = fused(given._replace(q=q), plan_for(given, visibility))
    assert out.stride() == q.stride()


@pytest.mark.parametrize("groups", [1, 4])
def test_expanded_tensors(groups: int) -> None:
    """Strides of 0: keys expanded over heads and sequences, and the gradient that ``sum`` hands back."""
    given, visibility = make(17, batch=2, heads=4, groups=groups), gist_in_the_middle(17, 2)
    plan = plan_for(given, visibility)
    k, v = (t.detach()[:1, :1].expand(2, groups, -1, -1) for t in (given.k, given.v))
    flat = Given(given.q, k.contiguous().requires_grad_(), v.contiguous().requires_grad_(), None, given.upstream)
    wide = Given(given.q, k.requires_grad_(), v.requires_grad_(), None, given.upstream)
    ones = torch.ones_like(given.upstream)
    expected = differentiate(lambda it: fused(it, plan), flat._replace(upstream=ones))
    for one in (flat, wide):
        out = fused(one, plan)
        grads = torch.autograd.grad(out.sum(), one.leaves)
        have = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
        assert_agree(have, expected, one._replace(upstream=ones), visibility)


def test_offsets_beyond_32_bits() -> None:
    """Batch entry 2 of q, k and v lies more than 2^31 elements behind entry 0. Only the pages that are written to
    exist.
    """
    stride, shape = 2**30 + 2**28, (3, 1, 17, 16)
    try:
        memory = torch.empty(2 * stride + 17 * 16, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("5 GiB of address space are not to be had")
    given, visibility = make(17, dtype=torch.float16, batch=3, heads=1), vis.causal(torch.ones(1, 17))
    far = memory.as_strided(shape, (stride, 17 * 16, 16, 1))
    plan = plan_for(given, visibility)
    expected = differentiate(lambda it: fused(it, plan), given)
    for name in ("q", "k", "v", "upstream"):
        far.copy_(getattr(given, name).detach())
        moved = given._replace(**{name: far.detach().requires_grad_(name != "upstream")})
        assert_same_bits(differentiate(lambda it: fused(it, plan), moved), expected)


def assert_agree(have: dict[str, Tensor], expected: dict[str, Tensor], given: Given, visibility: Visibility) -> None:
    """Equal bits under the interpreter. A compiled kernel orders its sums by the layout of what it reads: on a card the
    results are held to the tolerance.
    """
    if IS_CUDA:
        assert not failures(given, visibility, have)
    else:
        assert_same_bits(have, expected)


def assert_same_bits(have: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert have.keys() == expected.keys()
    for name, tensor in have.items():
        assert torch.equal(tensor, expected[name]), name


# -- intervals at random, and at the edges of tiles --------------------------------------------------------------------

EDGES = (-16, -1, 0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 60, FOREVER)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_intervals_one_off_the_edge_of_a_tile(dtype: torch.dtype) -> None:
    """Every pair of a begin and an end beside a tile's edge is some key's interval, empty ones among them."""
    pairs = list(itertools.product(EDGES[:-1], EDGES))
    pairs += [(0, 0)] * (-len(pairs) % 48)
    first, end = (t.view(-1, 48).contiguous() for t in torch.tensor(pairs, dtype=torch.int32).T)
    given = make(48, dtype=dtype, batch=first.shape[0], heads=1)
    check(given, Visibility(first, end), tiles((16, 16), (16, 32), (32, 16), (16, 32)))


@st.composite
def random_intervals(draw: st.DrawFn) -> tuple[Visibility, int]:
    num_keys, num_rows = (draw(st.sampled_from([1, 16, 17, 33])) for _ in range(2))
    number = st.one_of(st.sampled_from(EDGES), st.integers(-3, num_rows + num_keys))
    rows = draw(st.lists(st.tuples(number, number), min_size=num_keys, max_size=num_keys))
    if draw(st.booleans()):  # a document of one key, and a stretch that nobody sees
        rows[num_keys // 2] = (num_keys // 2, num_keys // 2 + 1)
        rows[: num_keys // 3] = [(5, 5)] * (num_keys // 3)
    return intervals(*rows), num_rows


@settings(max_examples=15, deadline=None)
@for_all(random_intervals(), st.sampled_from([None, 1, 7]), st.sampled_from([torch.float32, torch.float16]))
def test_random_intervals(drawn: tuple[Visibility, int], width: int | None, dtype: torch.dtype) -> None:
    visibility, num_rows = drawn
    given = make(num_rows, visibility.num_keys, width=width, dtype=dtype)
    check(given, visibility, tiles((16, 16), (16, 32), (32, 16), (16, 32)))


# -- rows that see nothing, keys that nobody sees ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0}, {"dropout": 0.4}, {"width": 6}],
    ids=["plain", "softcap", "dropout", "relative-bias"],
)
def test_what_is_not_seen_is_exactly_zero(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Even where 1e4 stands in the masked places of q, k, v and the gradient."""
    options = dict(options)
    given = make(45, dtype=dtype, batch=2, width=options.pop("width", None))
    padding = torch.stack([torch.arange(45) >= 18, torch.zeros(45)])
    visibility = vis.gist(torch.arange(45).expand(2, -1) == 30, padding)
    seen = visibility.to_dense()
    is_empty_row, is_unseen_key = (~seen.any(2)).to(DEVICE), (~seen.any(1)).to(DEVICE)
    assert is_empty_row[0, 17]
    assert is_empty_row[1].all()

    def blown_up(tensor: Tensor, where: Tensor) -> Tensor:
        large = tensor.detach().clone()
        large.transpose(1, 2)[where] = 1e4
        return large

    q, upstream = (blown_up(t, is_empty_row) for t in (given.q, given.upstream))
    k, v = (blown_up(t, is_unseen_key) for t in (given.k, given.v))
    given = Given(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), given.table, upstream)
    plan = plan_for(given, visibility, MIXED)
    have = differentiate(lambda it: fused(it, plan, **options), given)
    for name, tensor in have.items():
        assert tensor.isfinite().all(), name
    for name, where in (("out", is_empty_row), ("dq", is_empty_row), ("dk", is_unseen_key), ("dv", is_unseen_key)):
        assert not have[name].transpose(1, 2)[where].any(), name
        assert have[name].any(), name


def test_a_batch_that_sees_nothing_at_all() -> None:
    given = make(21, batch=2, width=3)
    nothing = vis.causal(torch.zeros(2, 21))
    for name, tensor in differentiate(lambda it: fused(it, plan_for(it, nothing)), given).items():
        assert torch.equal(tensor, torch.zeros_like(tensor)), name


def test_what_is_masked_changes_no_bit_of_what_is_seen() -> None:
    """Keys hidden from the completion may hold anything finite: its rows do not move."""
    given, visibility = make(45, width=4), vis.gist(torch.arange(45)[None] == 20)
    plan = plan_for(given, visibility)
    hidden = torch.arange(45) < 20
    other = given.cast(torch.float32)
    for tensor in (other.k, other.v):
        tensor.data[:, :, hidden] = -3e4
    rows = fused(given, plan)[:, :, 21:], fused(other, plan)[:, :, 21:]
    assert torch.equal(*rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("width", [None, 5], ids=["no-bias", "bias"])
def test_large_scores_do_not_overflow(dtype: torch.dtype, width: int | None) -> None:
    """Scores near 1e4 and a bias of -1e4: the softmax is one-hot, not NaN."""
    given = make(33, dtype=dtype, width=width)
    table = None if given.table is None else (given.table.detach() - 1e4).requires_grad_()
    large = Given(
        (given.q.detach() * 100).requires_grad_(), (given.k.detach() * 30).requires_grad_(), given.v, table,
        given.upstream,
    )  # fmt: skip
    for name, tensor in differentiate(lambda it: fused(it, plan_for(it, gist_in_the_middle(33))), large).items():
        assert tensor.isfinite().all(), name


# -- scale, softcap, relative bias -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("options", [{"scale": 1.0}, {"scale": 0.03}, {"scale": 1.3, "softcap": 2.0}], ids=str)
def test_scale(options: dict[str, float], dtype: torch.dtype) -> None:
    check(make(37, dtype=dtype), gist_in_the_middle(37), tiles((16, 32)), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("softcap", [0.1, 2.0, 50.0])
def test_softcap(softcap: float, dtype: torch.dtype) -> None:
    """Far below the scores, among them, and far above, where tanh is a power series."""
    check(make(37, dtype=dtype), gist_in_the_middle(37), tiles((16, 32)), softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("width", "options"),
    [
        pytest.param(0, {}, id="W0-every-entry-far"),
        pytest.param(1, {}, id="W1"),
        pytest.param(9, {}, id="W9"),
        pytest.param(9, {"softcap": 1.5, "scale": 1.0}, id="W9-softcap-scale"),
        pytest.param(200, {}, id="W200-wider-than-the-sequence"),
    ],
)
def test_relative_bias(width: int, options: dict[str, float], dtype: torch.dtype) -> None:
    check(make(45, dtype=dtype, width=width), ENCODER, MIXED, **options)


# Padding at the end and a prompt hidden from the rest, in both directions.
ENCODER = vis.encoder_gist((torch.arange(45) // 2 == 9)[None], (torch.arange(45) < 41)[None])


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)], ids=["64-rows-16-keys", "16-rows-64-keys"])
def test_relative_bias_in_tiles_that_are_not_square(shape: tuple[int, int]) -> None:
    """The diagonals of a sheared tile wrap round several times, or hardly."""
    check(make(70, width=17), vis.bidirectional(torch.ones(1, 70)), tiles(shape))


@pytest.mark.parametrize("table", [(16, 16), (32, 32), (64, 16)], ids=["smaller", "wider", "longer"])
def test_relative_bias_where_the_kernels_of_its_gradient_have_tiles_of_their_own(table: tuple[int, int]) -> None:
    """What dQ sums (from W on) and what the table's kernel sums (below W) are the whole, and nothing twice."""
    sizes = tiles((16, 16), (32, 16), (16, 16), table)
    check(make(70, width=5), vis.bidirectional(torch.ones(1, 70)), sizes)


def test_relative_bias_of_prefix_keys_and_grouped_heads() -> None:
    check(make(19, 50, heads=4, groups=2, width=11), gist_in_the_middle(50), MIXED)


def test_relative_bias_in_float32_beside_float16() -> None:
    """As a model in half precision holds its table."""
    given, visibility = make(45, dtype=torch.float16, width=9), ENCODER
    assert given.table is not None
    table = given.table.detach().float().requires_grad_()
    plan = plan_for(given, visibility)
    have = differentiate(lambda it: fused(it, plan), given._replace(table=table))
    assert have["dtable"].dtype == torch.float32
    have["dtable"] = have["dtable"].half()
    assert not failures(given, visibility, have)


@pytest.mark.parametrize("wanted", ["table", "qkv"])
def test_gradients_of_some_inputs_only(wanted: str) -> None:
    given, visibility = make(37, width=5), gist_in_the_middle(37)
    plan = plan_for(given, visibility)
    expected = differentiate(lambda it: fused(it, plan), given)
    names = ("dtable",) if wanted == "table" else ("dq", "dk", "dv")
    leaves = {
        "q": given.q, "k": given.k, "v": given.v, "table": given.table,
    }  # fmt: skip
    frozen = given._replace(
        **{name: t.detach() for name, t in leaves.items() if t is not None and f"d{name}" not in names}
    )
    grads = torch.autograd.grad(fused(frozen, plan), [t for t in frozen.leaves if t.requires_grad], given.upstream)
    for name, grad in zip(names, grads, strict=True):
        assert torch.equal(grad, expected[name]), name


def test_the_gradient_of_the_table_sums_to_zero_over_each_row() -> None:
    """A bias common to all entries changes no softmax: the entries of its gradient add up to rounding."""
    given, visibility = make(45, width=4), ENCODER
    grad = differentiate(lambda it: fused(it, plan_for(it, visibility)), given)["dtable"]
    assert (grad.sum(1).abs() <= 1e-5 * grad.abs().sum(1)).all()
    assert (grad.abs().sum(1) > 1).all()


# -- bits --------------------------------------------------------------------------------------------------------------


# On a card a race would show in some of many runs; the interpreter runs one program after the other.
RUNS = 30 if IS_CUDA else 2


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}], ids=["plain", "dropout"])
def test_equal_runs_give_equal_bits(options: dict[str, float]) -> None:
    given, visibility = make(45, width=9), ENCODER
    plan = plan_for(given, visibility, MIXED)
    runs = [differentiate(lambda it: fused(it, plan, seed=seeded(11), **options), given) for _ in range(RUNS)]
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@pytest.mark.parametrize("order", ["reversed", "rolled"])
def test_the_order_of_tiles_changes_no_bit(order: str) -> None:
    given, visibility = make(45, batch=2, width=5), BUILDERS["gist-documents"]
    plan = plan_for(given, visibility)
    expected = differentiate(lambda it: fused(it, plan), given)

    def other_order(part: TileLists | RowRanges) -> Any:
        size = part.order.shape[1]
        places = torch.arange(size).flip(0) if order == "reversed" else torch.arange(size).roll(1)
        other = part.order[:, places.to(DEVICE)].contiguous()
        assert not torch.equal(other, part.order)
        return dataclasses.replace(part, order=other)

    parts = ("forward", "backward_query", "backward_table", "backward_key")
    other = dataclasses.replace(plan, **{part: other_order(getattr(plan, part)) for part in parts})
    assert_same_bits(differentiate(lambda it: fused(it, other), given), expected)


def test_what_stands_behind_the_end_of_a_list_is_not_used() -> None:
    """The fused planner leaves that memory as it finds it."""
    given, visibility = make(45, width=5), gist_in_the_middle(45)
    plan = plan_for(given, visibility)
    expected = differentiate(lambda it: fused(it, plan), given)

    def litter(part: TileLists) -> TileLists:
        place = torch.arange(part.tiles.shape[2], device=DEVICE)
        # One tile behind the last: there every load is masked.
        littered = part.tiles.masked_fill(place >= part.counts[..., 2:], part.tiles.shape[2] - 1)
        assert not torch.equal(littered, part.tiles)
        return dataclasses.replace(part, tiles=littered.contiguous())

    parts = ("forward", "backward_query", "backward_table")
    other = dataclasses.replace(plan, **{part: litter(getattr(plan, part)) for part in parts})
    assert_same_bits(differentiate(lambda it: fused(it, other), given), expected)


@pytest.mark.parametrize("width", [None, 5], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_element_of_new_memory_is_written(
    dtype: torch.dtype, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that comes uninitialised is filled with NaN first; no result may know."""
    given, visibility = make(45, dtype=dtype, width=width), gist_in_the_middle(45)
    plan = plan_for(given, visibility, MIXED)
    expected = differentiate(lambda it: fused(it, plan), given)
    filled = []

    def poisoned(name: str) -> Callable[..., Tensor]:
        real = getattr(torch, name)

        def make_empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = real(*args, **kwargs)
            filled.append(tensor.shape)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return make_empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(name))
    have = differentiate(lambda it: fused(it, plan), given)
    monkeypatch.undo()
    assert len(filled) >= 5  # out, lse, delta, dq, dk, dv
    assert_same_bits(have, expected)


# -- dropout -----------------------------------------------------------------------------------------------------------


def kept(seed: int, dropout: float, given: Given) -> Tensor:
    """Which weights a seed keeps, ``(B, H, T, K)``: equal weights over all keys and unit values leave them in the
    output.
    """
    batch, heads, num_rows = given.q.shape[:3]
    num_keys = given.k.shape[2]
    width = 1 << (num_keys - 1).bit_length()
    q = torch.zeros(batch, heads, num_rows, width, device=DEVICE)
    k = torch.zeros(batch, 1, num_keys, width, device=DEVICE)
    v = torch.eye(num_keys, width, device=DEVICE).expand(batch, 1, -1, -1)
    everything = Visibility(torch.zeros(1, num_keys).int(), torch.full((1, num_keys), FOREVER))
    probe = Given(q, k, v, None, q)
    out = fused(probe, plan_for(probe, everything, tiles((32, 64))), dropout=dropout, seed=seeded(seed))
    weight = out[..., :num_keys] * num_keys * (1 - dropout)
    assert torch.allclose(weight, weight.round(), atol=1e-5)
    return weight.round().bool()


def seeded(seed: int) -> Tensor:
    return torch.tensor([seed], device=DEVICE)


DROPOUT = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"heads": 4, "groups": 2, "num_rows": 20}, {}, id="prefix-keys-grouped-heads"),
    pytest.param({"width": 4}, {}, id="relative-bias"),
    pytest.param({"width": 4}, {"softcap": 2.0}, id="relative-bias-softcap"),
    pytest.param({"dtype": torch.float16}, {}, id="float16"),
]


@pytest.mark.parametrize(("shape", "options"), DROPOUT)
def test_dropout_drops_the_same_weights_in_every_kernel(shape: dict[str, Any], options: dict[str, float]) -> None:
    """Against float64 with the very mask that the seed keeps, whatever the tiles."""
    given = make(**{"num_rows": 37, "num_keys": 37, **shape})
    keep = kept(2**62 - 1, 0.3, given)
    check(given, gist_in_the_middle(37), MIXED, dropout=0.3, seed=seeded(2**62 - 1), keep=keep, **options)


def test_dropout_of_another_seed_is_told_apart() -> None:
    """A test for the test."""
    given, visibility = make(37), gist_in_the_middle(37)
    plan = plan_for(given, visibility)
    have = differentiate(lambda it: fused(it, plan, dropout=0.3, seed=seeded(4)), given)
    assert failures(given, visibility, have, dropout=0.3, keep=kept(3, 0.3, given)).keys() == have.keys()
    assert not failures(given, visibility, have, dropout=0.3, keep=kept(4, 0.3, given))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share(dropout: float) -> None:
    """Heads, rows and keys alike; 6 standard deviations."""
    given = make(63, batch=3, heads=4)
    keep = kept(5, dropout, given).double()
    for dims in ((0, 1, 2, 3), (2, 3), (0, 1, 3), (0, 1, 2)):
        number = math.prod(keep.shape[dim] for dim in dims)
        error = (keep.mean(dims) - (1 - dropout)).abs().max().item()
        assert error <= 6 * math.sqrt(dropout * (1 - dropout) / number), dims


def test_heads_sequences_rows_and_seeds_draw_apart() -> None:
    """Agreement of two masks of 63 x 63 fair coins: half, within 6 standard deviations."""
    given = make(63, batch=2, heads=3)
    masks = torch.cat([kept(seed, 0.5, given).flatten(0, 1) for seed in (0, 1)])
    for a, b in itertools.combinations(masks, 2):
        assert (a == b).double().mean().item() == pytest.approx(0.5, abs=6 * 0.5 / 63)
    rows = masks[0]
    assert (rows[1:] == rows[:-1]).double().mean().item() == pytest.approx(0.5, abs=6 * 0.5 / 62)


def test_dropout_keeps_the_mean() -> None:
    """256 draws; every element of the mean within six standard errors of the value without dropout."""
    one, visibility = make(7, batch=1, heads=1), gist_in_the_middle(7)
    given = Given(*(t.detach().expand(64, 4, -1, -1) for t in one[:3]), None, one.upstream)
    plan = plan_for(given, visibility)
    with torch.no_grad():
        out = fused(given, plan, dropout=0.3, seed=seeded(9)).flatten(0, 1).double()
        expected = exact(one.cast(torch.float64), visibility)[0, 0]
    is_empty = ~visibility.to_dense()[0].any(-1)
    assert is_empty.sum() == 1
    assert not out[:, is_empty].any()
    error, spread = (out.mean(0) - expected)[~is_empty].abs(), out.std(0)[~is_empty]
    assert (spread > 0).all()
    assert (error <= 6 * spread / math.sqrt(256)).all()


def test_dropout_of_0_is_no_dropout() -> None:
    given, visibility = make(37), gist_in_the_middle(37)
    plan = plan_for(given, visibility)
    without = differentiate(lambda it: fused(it, plan), given)
    assert_same_bits(differentiate(lambda it: fused(it, plan, dropout=0.0, seed=seeded(1)), given), without)


def test_the_seed_comes_from_the_generator_of_torch() -> None:
    given, visibility = make(21), gist_in_the_middle(21)
    plan = plan_for(given, visibility)

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad():
            return [fused(given, plan, dropout=0.3) for _ in range(2)]

    (first, second), (again, _) = drawn(1), drawn(1)
    assert torch.equal(again, first)
    assert not torch.equal(first, second)
    assert not torch.equal(first, drawn(2)[0])


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(IS_CUDA, reason="on a card bfloat16 is in every test")
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "width": 7}], ids=["plain", "softcap-relative-bias"])
def test_bfloat16_under_the_interpreter(options: dict[str, Any]) -> None:
    """The op computes in float32 there; what is left is the rounding of the result."""
    options = dict(options)
    given = make(37, dtype=torch.bfloat16, heads=4, groups=2, width=options.pop("width", None))
    check(given, gist_in_the_middle(37), MIXED, **options)


@pytest.mark.parametrize("precision", ["tf32x3", None])
def test_float32_by_default_is_three_tf32_products(precision: str | None) -> None:
    """They drop products of 2^-22 of the largest: up to four times the rounding of float32. (The interpreter always
    multiplies in float32.)
    """
    given, visibility = make(63, size=64, width=5), gist_in_the_middle(63)
    plan = plan_for(given, visibility)
    have = differentiate(lambda it: fused(it, plan, precision=precision), given)
    assert not failures(given, visibility, have, factor=4.0 if IS_CUDA else 1.0)


# -- the comparison can fail -------------------------------------------------------------------------------------------


def test_the_plain_formula_is_the_oracle() -> None:
    """In float64, with every option: two paths to one number."""
    given = make(45, dtype=torch.float64, batch=2, heads=4, groups=2, width=5)
    options = {"scale": 0.7, "softcap": 1.5}
    for name, visibility in BUILDERS.items():
        have = differentiate(lambda it, v=visibility: plain(it, v, **options), given)
        for key, tensor in differentiate(lambda it, v=visibility: exact(it, v, **options), given).items():
            torch.testing.assert_close(have[key], tensor, rtol=1e-12, atol=1e-12, msg=f"{name} {key}")


def shifted(plan: Plan, first: int, end: int) -> Plan:
    return dataclasses.replace(plan, first=plan.first + first, end=plan.end + end)


def recounted(plan: Plan, part: str, kind: int, change: Callable[[Tensor], Tensor]) -> Plan:
    """The plan with other counts in one of its lists: kind 0 is near, 1 partial, 2 all."""
    lists = getattr(plan, part)
    counts = lists.counts.clone()
    counts[..., kind] = change(counts)
    return dataclasses.replace(plan, **{part: dataclasses.replace(lists, counts=counts)})


def shorter_ranges(plan: Plan) -> Plan:
    bounds = plan.backward_key.bounds.clone()
    bounds[..., 1] = (bounds[..., 1] - 1).maximum(bounds[..., 0])
    return dataclasses.replace(plan, backward_key=dataclasses.replace(plan.backward_key, bounds=bounds))


ALL = {"out", "dq", "dk", "dv"}
PLANTED: list[Any] = [
    pytest.param(lambda plan: shifted(plan, 0, -1), {}, ALL, id="interval-one-row-short"),
    pytest.param(lambda plan: shifted(plan, 0, 1), {}, ALL, id="interval-one-row-long"),
    pytest.param(lambda plan: shifted(plan, 1, 0), {}, ALL, id="interval-begins-late"),
    pytest.param(lambda plan: shifted(plan, -1, 0), {}, ALL, id="sees-the-future"),
    pytest.param(lambda plan: plan, {"scale": 1.0}, ALL, id="scale-missing"),
    pytest.param(lambda plan: plan, {"softcap": None}, ALL, id="softcap-missing"),
    pytest.param(
        lambda plan: recounted(plan, "forward", 1, lambda c: c[..., 0]), {}, {"out"}, id="partial-tiles-taken-for-full"
    ),
    pytest.param(
        lambda plan: recounted(plan, "forward", 2, lambda c: c[..., 2] - 1), {}, {"out"}, id="forward-misses-a-tile"
    ),
    pytest.param(
        lambda plan: recounted(plan, "backward_query", 2, lambda c: (c[..., 2] - 1).clamp(min=0)),
        {}, {"dq"}, id="dq-misses-a-tile",
    ),
    pytest.param(shorter_ranges, {}, {"dk", "dv"}, id="dkdv-misses-a-tile"),
]  # fmt: skip
BIAS_PLANTED: list[Any] = [
    pytest.param(
        lambda plan: recounted(plan, "forward", 0, lambda c: c[..., 0] * 0), {"out"}, id="near-taken-for-far"
    ),
    pytest.param(
        lambda plan: recounted(plan, "backward_query", 0, lambda c: c[..., 0] * 0),
        {"dq", "dtable"}, id="near-taken-for-far-in-dq",
    ),
    pytest.param(
        lambda plan: recounted(plan, "backward_table", 0, lambda c: (c[..., 0] - 1).clamp(min=0)),
        {"dtable"}, id="dtable-misses-a-tile",
    ),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("change", "options", "wrong"), PLANTED)
def test_a_planted_bug_is_found(
    change: Callable[[Plan], Plan], options: dict[str, Any], wrong: set[str], dtype: torch.dtype
) -> None:
    given, visibility = make(45, dtype=dtype), BUILDERS_ONE
    right = {"softcap": 1.0}
    plan = plan_for(given, visibility, tiles((16, 16)))
    have = differentiate(lambda it: fused(it, change(plan), **{**right, **options}), given)
    assert wrong <= failures(given, visibility, have, **right).keys()


# Padding, a gist and keys to the end: partial and full tiles in every kernel.
BUILDERS_ONE = Visibility(BUILDERS["gist-branches"].first[1:], BUILDERS["gist-branches"].end[1:])


@pytest.mark.parametrize(("change", "wrong"), BIAS_PLANTED)
def test_a_planted_bug_in_the_relative_bias_is_found(change: Callable[[Plan], Plan], wrong: set[str]) -> None:
    given, visibility = make(45, width=6), vis.bidirectional(torch.ones(1, 45))
    plan = plan_for(given, visibility, tiles((16, 16)))
    have = differentiate(lambda it: fused(it, change(plan)), given)
    assert wrong <= failures(given, visibility, have).keys()
    assert not failures(given, visibility, differentiate(lambda it: fused(it, plan), given))


def test_a_table_off_by_one_entry_is_found() -> None:
    given, visibility = make(45, width=6), vis.bidirectional(torch.ones(1, 45))
    assert given.table is not None
    rolled = given._replace(table=given.table.detach().roll(1, 1).requires_grad_())
    plan = plan_for(given, visibility)
    have = differentiate(lambda it: fused(it, plan), rolled)
    assert failures(given, visibility, have).keys() == have.keys()


def test_heads_that_read_the_wrong_keys_are_found() -> None:
    """Query head h reads key head h // (H // G), not h % G."""
    given, visibility = make(37, heads=4, groups=2), gist_in_the_middle(37)
    crossed = given._replace(q=given.q[:, [0, 2, 1, 3]].detach().requires_grad_())
    have = differentiate(lambda it: fused(it, plan_for(it, visibility)), crossed)
    have["out"] = have["out"][:, [0, 2, 1, 3]]
    assert "out" in failures(given, visibility, have)


def test_no_answer_is_no_right_answer() -> None:
    """NaN fails the comparison."""
    given, visibility = make(17), gist_in_the_middle(17)
    have = differentiate(lambda it: fused(it, plan_for(it, visibility)), given)
    assert not failures(given, visibility, have)
    have["dk"][0, 0, 3, 1] = math.nan
    assert failures(given, visibility, have).keys() == {"dk"}
