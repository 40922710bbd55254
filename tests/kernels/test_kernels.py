"""Compare the outputs and all gradients of the forward and backward kernels with the oracle in float64.

Tolerance: see ``conftest.py``. Lengths are odd on purpose. Tiles are as small as 16, so a few dozen rows make several.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
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
from gisting_kernels import backward
from gisting_kernels.plan import Plan, RowRanges, TileLists
from tests.kernels.conftest import (
    DEVICE,
    IS_CUDA,
    MIXED,
    SMALL,
    Given,
    Sizes,
    check,
    chosen,
    differentiate,
    each_dtype,
    exact,
    failures,
    fused,
    intervals,
    make,
    plain,
    plan_for,
    tiles,
)
from tests.slow import slow

pytestmark = [
    pytest.mark.usefixtures("device"),
    # exp2 of a masked score, in the interpreter's NumPy
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True, scope="module", params=["pointers", "descriptors"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run every test with tiles loaded through pointers, and through descriptors."""
    before, chosen["path"] = chosen["path"], request.param
    yield request.param
    chosen["path"] = before


# -- which kernels run -------------------------------------------------------------------------------------------------


class Spy:
    """A kernel that records whether it is launched with descriptors."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.seen: list[bool] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> None:
            assert [isinstance(arg, Tensor) for arg in args[:4]] == [not kwargs["DESCRIPTORS"]] * 4
            self.seen.append(kwargs["DESCRIPTORS"])
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
def test_dq_and_dkdv_take_the_path_of_the_plan(layout: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a path of its own. A gradient that the tensor copy unit cannot read, like that of a sum, decides."""
    spies = {name: Spy(getattr(backward, name)) for name in ("query_kernel", "key_kernel")}
    for name, spy in spies.items():
        monkeypatch.setattr(backward, name, spy)
    given, visibility = make(33, batch=2, heads=4, groups=2), gist_in_the_middle(33, 2)
    if layout == "expanded":
        given = given._replace(upstream=torch.ones((), device=DEVICE).expand(given.q.shape))
    plan = plan_for(given, visibility, MIXED)
    for other in ("pointers", "descriptors"):
        forward, query, key, table = plan.sizes
        mixed = dataclasses.replace(plan, sizes=(forward, query, dataclasses.replace(key, path=other), table))
        assert not failures(given, visibility, differentiate(lambda it, plan=mixed: fused(it, plan), given))
    can = layout == "contiguous"
    assert spies["query_kernel"].seen == [can and path == "descriptors"] * 2
    assert spies["key_kernel"].seen == [False, can]


# -- every builder of visibility ---------------------------------------------------------------------------------------


def builders(num_keys: int) -> dict[str, Visibility]:
    """Make two sequences with each builder, different ones where the builder allows it."""
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
DEFAULT = {"gist-several-spans-left-padding", "gist-documents", "negative-branches", "encoder-gist", "windowed-gist"}


@each_dtype
@pytest.mark.parametrize("name", [name if name in DEFAULT else slow(name) for name in BUILDERS])
def test_every_builder(name: str, dtype: torch.dtype) -> None:
    check(make(45, dtype=dtype, batch=2, heads=1), BUILDERS[name], MIXED)


# -- shapes ------------------------------------------------------------------------------------------------------------


def gist_in_the_middle(num_keys: int, batch: int = 1) -> Visibility:
    """Make a gist mask with left padding, if there is room for it."""
    index = torch.arange(num_keys)
    is_gist = (index >= num_keys // 3) & (index < num_keys // 3 + 2)
    return vis.gist(is_gist.expand(batch, -1), (index >= num_keys // 7).expand(batch, -1))


@each_dtype
@pytest.mark.parametrize(
    ("num_rows", "sizes"),
    [
        slow(1, SMALL, id="N1"),
        slow(2, MIXED, id="N2"),
        slow(15, SMALL, id="N15-one-short-of-a-tile"),
        slow(16, SMALL, id="N16-one-tile"),
        slow(17, SMALL, id="N17-one-over-a-tile"),
        slow(63, tiles((64, 32)), id="N63"),
        slow(65, tiles((32, 64)), id="N65"),
        pytest.param(64, tiles((32, 16)), id="N64-whole-tiles"),
        pytest.param(111, tiles((64, 64), (32, 64), (64, 32), (64, 64)), id="N111"),
        slow(200, tiles((64, 64)), id="N200"),
    ],
)
def test_lengths(num_rows: int, sizes: Sizes, dtype: torch.dtype) -> None:
    check(make(num_rows, dtype=dtype), gist_in_the_middle(num_rows), sizes)


@pytest.mark.parametrize(
    ("heads", "groups"),
    [
        slow(1, 1, id="1-1"),
        slow(4, 4, id="4-4"),
        slow(4, 2, id="4-2"),
        slow(4, 1, id="4-1"),
        pytest.param(6, 2, id="6-2"),
    ],
)
def test_grouped_heads(heads: int, groups: int) -> None:
    check(make(21, batch=2, heads=heads, groups=groups), gist_in_the_middle(21, 2), tiles((16, 32)))


@pytest.mark.parametrize(
    ("num_rows", "num_keys"), [slow(1, 17), slow(1, 1), slow(5, 40), (33, 50), slow(16, 17), slow(31, 32)]
)
def test_prefix_keys(num_rows: int, num_keys: int) -> None:
    """With T < K the rows are the last T of the K, so no tile of rows starts at a multiple of its size."""
    check(make(num_rows, num_keys, width=3), gist_in_the_middle(num_keys), MIXED)


@pytest.mark.parametrize(
    ("num_rows", "num_keys", "visibility"),
    [
        pytest.param(40, 17, vis.gist(torch.arange(17)[None] == 9).for_cross_attention(), id="cross-attention"),
        slow(33, 1, vis.causal(torch.ones(1, 1)), id="one-key"),
        slow(50, 3, intervals((0, 17), (16, 33), (49, 60)), id="intervals-beyond-K"),
        slow(18, 17, vis.causal(torch.ones(1, 17)), id="one-row-more"),
    ],
)
def test_more_rows_than_keys(num_rows: int, num_keys: int, visibility: Visibility) -> None:
    check(make(num_rows, num_keys, width=4), visibility, MIXED)


@pytest.mark.parametrize("size", [slow(1), slow(8), slow(16), 20, slow(64), slow(80), slow(96)])
def test_head_sizes(size: int) -> None:
    check(make(33, size=size), gist_in_the_middle(33), tiles((16, 32)))


@pytest.mark.parametrize("size", [slow(1), 20, slow(96), slow(256)])
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
    """Without rows, keys or sequences the shapes are right and all results are zero."""
    given = make(num_rows, num_keys, batch=batch, width=width)
    visibility = Visibility(torch.zeros(batch, num_keys).int(), torch.full((batch, num_keys), FOREVER))
    for name, tensor in differentiate(lambda it: fused(it, plan_for(it, visibility)), given).items():
        assert not tensor.any(), name


@pytest.mark.parametrize("end", [31, 32, 33])
@pytest.mark.parametrize("first", [15, 16, 17])
def test_intervals_that_begin_and_end_beside_a_tile(first: int, end: int) -> None:
    """A tile of 16 rows and keys is full only if no interval begins or ends inside it."""
    check(make(48, heads=1), intervals(*[(first, end)] * 16, *[(0, 48)] * 32))


# -- memory layouts ----------------------------------------------------------------------------------------------------


def transposed(tensor: Tensor) -> Tensor:
    """Lay the tensor out as (B, T, H, D), like the projection of a model."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor: Tensor) -> Tensor:
    """Return a slice of a larger tensor; reading the rest of it would change the result."""
    large = torch.full([n + 3 for n in tensor.shape], 1e4, dtype=tensor.dtype, device=tensor.device)
    large[1:-2, 2:-1, 1:-2, 2:-1] = tensor
    return large[1:-2, 2:-1, 1:-2, 2:-1]


def last_dimension_strided(tensor: Tensor) -> Tensor:
    """Lay the tensor out as (B, H, D, T)."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("layout", [slow(transposed), sliced, slow(last_dimension_strided)])
def test_strides(layout: Callable[[Tensor], Tensor]) -> None:
    """The memory layout of the inputs changes neither the output nor the gradients."""
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


@pytest.mark.parametrize("groups", [slow(1), 4])
def test_expanded_tensors(groups: int) -> None:
    """Strides may be 0: keys expanded over heads and sequences, and the gradient that ``sum`` returns."""
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
    """Sequence 2 of q, k and v is more than 2^31 elements after sequence 0. Only pages that are written to exist."""
    stride, shape = 2**30 + 2**28, (3, 1, 17, 16)
    try:
        memory = torch.empty(2 * stride + 17 * 16, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("cannot reserve 5 GiB of address space")
    given, visibility = make(17, dtype=torch.float16, batch=3, heads=1), vis.causal(torch.ones(1, 17))
    far = memory.as_strided(shape, (stride, 17 * 16, 16, 1))
    plan = plan_for(given, visibility)
    expected = differentiate(lambda it: fused(it, plan), given)
    for name in ("q", "k", "v", "upstream"):
        far.copy_(getattr(given, name).detach())
        moved = given._replace(**{name: far.detach().requires_grad_(name != "upstream")})
        assert_same_bits(differentiate(lambda it: fused(it, plan), moved), expected)


def assert_agree(have: dict[str, Tensor], expected: dict[str, Tensor], given: Given, visibility: Visibility) -> None:
    """Assert equal bits under the interpreter, and agreement within the tolerance on a card.

    A compiled kernel orders its sums by the layout of its inputs.
    """
    if IS_CUDA:
        assert not failures(given, visibility, have)
    else:
        assert_same_bits(have, expected)


def assert_same_bits(have: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert have.keys() == expected.keys()
    for name, tensor in have.items():
        assert torch.equal(tensor, expected[name]), name


# -- random intervals, and intervals at the edges of tiles -------------------------------------------------------------

EDGES = (-16, -1, 0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 60, FOREVER)


@each_dtype
def test_intervals_one_off_the_edge_of_a_tile(dtype: torch.dtype) -> None:
    """Every pair of a start and an end next to a tile's edge is the interval of some key, including empty ones."""
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
    if draw(st.booleans()):  # a document of one key, and a run of keys that no row sees
        rows[num_keys // 2] = (num_keys // 2, num_keys // 2 + 1)
        rows[: num_keys // 3] = [(5, 5)] * (num_keys // 3)
    return intervals(*rows), num_rows


@settings(max_examples=6, deadline=None)
@for_all(random_intervals(), st.sampled_from([None, 1, 7]), st.sampled_from([torch.float32, torch.float16]))
def test_random_intervals(drawn: tuple[Visibility, int], width: int | None, dtype: torch.dtype) -> None:
    visibility, num_rows = drawn
    given = make(num_rows, visibility.num_keys, width=width, dtype=dtype)
    check(given, visibility, tiles((16, 16), (16, 32), (32, 16), (16, 32)))


# -- rows that see no key, keys that no row sees -----------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    "options",
    [
        slow({}, id="plain"),
        slow({"softcap": 3.0}, id="softcap"),
        pytest.param({"dropout": 0.4}, id="dropout"),
        slow({"width": 6}, id="relative-bias"),
    ],
)
def test_what_is_not_seen_is_exactly_zero(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Masked elements of q, k, v and the gradient have no effect, even if they are 1e4."""
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
    """Changing the keys that are hidden from the completion does not change its rows."""
    given, visibility = make(45, width=4), vis.gist(torch.arange(45)[None] == 20)
    plan = plan_for(given, visibility)
    hidden = torch.arange(45) < 20
    other = given.cast(torch.float32)
    for tensor in (other.k, other.v):
        tensor.data[:, :, hidden] = -3e4
    rows = fused(given, plan)[:, :, 21:], fused(other, plan)[:, :, 21:]
    assert torch.equal(*rows)


@each_dtype
@pytest.mark.parametrize("width", [slow(None, id="no-bias"), pytest.param(5, id="bias")])
def test_large_scores_do_not_overflow(dtype: torch.dtype, width: int | None) -> None:
    """With scores near 1e4 and a bias of -1e4, the softmax is one-hot, not NaN."""
    given = make(33, dtype=dtype, width=width)
    table = None if given.table is None else (given.table.detach() - 1e4).requires_grad_()
    large = Given(
        (given.q.detach() * 100).requires_grad_(), (given.k.detach() * 30).requires_grad_(), given.v, table,
        given.upstream,
    )  # fmt: skip
    for name, tensor in differentiate(lambda it: fused(it, plan_for(it, gist_in_the_middle(33))), large).items():
        assert tensor.isfinite().all(), name


# -- scale, softcap, relative bias -------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    "options", [slow({"scale": 1.0}), slow({"scale": 0.03}), {"scale": 1.3, "softcap": 2.0}], ids=str
)
def test_scale(options: dict[str, float], dtype: torch.dtype) -> None:
    check(make(37, dtype=dtype), gist_in_the_middle(37), tiles((16, 32)), **options)


@each_dtype
@pytest.mark.parametrize("softcap", [slow(0.1), slow(2.0), 50.0])
def test_softcap(softcap: float, dtype: torch.dtype) -> None:
    """The softcap is far below the scores, among them, and far above them, where tanh is a power series."""
    check(make(37, dtype=dtype), gist_in_the_middle(37), tiles((16, 32)), softcap=softcap)


@each_dtype
@pytest.mark.parametrize(
    ("width", "options"),
    [
        pytest.param(0, {}, id="W0-every-entry-far"),
        slow(1, {}, id="W1"),
        slow(9, {}, id="W9"),
        pytest.param(9, {"softcap": 1.5, "scale": 1.0}, id="W9-softcap-scale"),
        slow(200, {}, id="W200-wider-than-the-sequence"),
    ],
)
def test_relative_bias(width: int, options: dict[str, float], dtype: torch.dtype) -> None:
    check(make(45, dtype=dtype, width=width), ENCODER, MIXED, **options)


# Padding at the end, and a prompt and a rest that do not see each other.
ENCODER = vis.encoder_gist((torch.arange(45) // 2 == 9)[None], (torch.arange(45) < 41)[None])


@pytest.mark.parametrize("width", [2, 3])
def test_a_bias_whose_width_ends_beside_a_tile(width: int) -> None:
    """A neighbouring tile of 16 x 16 then holds one to three pairs with entries of their own, in its corner."""
    check(make(33, heads=1, width=width), vis.bidirectional(torch.ones(1, 33)))


@pytest.mark.parametrize("shape", [pytest.param((64, 16), id="64-rows-16-keys"), slow((16, 64), id="16-rows-64-keys")])
def test_relative_bias_in_tiles_that_are_not_square(shape: tuple[int, int]) -> None:
    """The diagonals of a sheared tile wrap around several times, or hardly at all."""
    check(make(70, width=17), vis.bidirectional(torch.ones(1, 70)), tiles(shape))


@pytest.mark.parametrize(
    "table",
    [slow((16, 16), id="smaller"), slow((32, 32), id="wider"), pytest.param((64, 16), id="longer")],
)
def test_the_kernels_of_the_table_gradient_may_have_different_tiles(table: tuple[int, int]) -> None:
    """The dQ kernel sums the distances from W on, the table kernel those below W: together everything exactly once."""
    sizes = tiles((16, 16), (32, 16), (16, 16), table)
    check(make(70, width=5), vis.bidirectional(torch.ones(1, 70)), sizes)


def test_relative_bias_of_prefix_keys_and_grouped_heads() -> None:
    check(make(19, 50, heads=4, groups=2, width=11), gist_in_the_middle(50), MIXED)


def test_a_float32_table_with_float16_queries() -> None:
    """Models in half precision keep their table in float32."""
    given, visibility = make(45, dtype=torch.float16, width=9), ENCODER
    assert given.table is not None
    table = given.table.detach().float().requires_grad_()
    plan = plan_for(given, visibility)
    have = differentiate(lambda it: fused(it, plan), given._replace(table=table))
    assert have["dtable"].dtype == torch.float32
    have["dtable"] = have["dtable"].half()
    assert not failures(given, visibility, have)


@pytest.mark.parametrize("wanted", ["table", slow("qkv")])
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
    """Adding a constant to all entries changes no softmax, so the entries of the gradient sum to zero."""
    given, visibility = make(45, width=4), ENCODER
    grad = differentiate(lambda it: fused(it, plan_for(it, visibility)), given)["dtable"]
    assert (grad.sum(1).abs() <= 1e-5 * grad.abs().sum(1)).all()
    assert (grad.abs().sum(1) > 1).all()


# -- bits --------------------------------------------------------------------------------------------------------------


# On a card a race would show in some of many runs; the interpreter runs the programs one after another.
RUNS = 30 if IS_CUDA else 2


@pytest.mark.parametrize("options", [pytest.param({}, id="plain"), slow({"dropout": 0.3}, id="dropout")])
def test_equal_runs_give_equal_bits(options: dict[str, float]) -> None:
    given, visibility = make(45, width=9), ENCODER
    plan = plan_for(given, visibility, MIXED)
    runs = [differentiate(lambda it: fused(it, plan, seed=seeded(11), **options), given) for _ in range(RUNS)]
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@pytest.mark.parametrize("order", ["reversed", slow("rolled")])
def test_the_order_of_tiles_changes_no_bit(order: str) -> None:
    given, visibility = make(45, batch=2, heads=1, width=5), BUILDERS["gist-documents"]
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


def test_entries_after_the_end_of_a_list_are_not_used() -> None:
    """The fused planner does not write them."""
    given, visibility = make(45, width=5), gist_in_the_middle(45)
    plan = plan_for(given, visibility)
    expected = differentiate(lambda it: fused(it, plan), given)

    def litter(part: TileLists) -> TileLists:
        place = torch.arange(part.tiles.shape[2], device=DEVICE)
        # One tile after the last, where every load is masked.
        littered = part.tiles.masked_fill(place >= part.counts[..., 2:], part.tiles.shape[2] - 1)
        assert not torch.equal(littered, part.tiles)
        return dataclasses.replace(part, tiles=littered.contiguous())

    parts = ("forward", "backward_query", "backward_table")
    other = dataclasses.replace(plan, **{part: litter(getattr(plan, part)) for part in parts})
    assert_same_bits(differentiate(lambda it: fused(it, other), given), expected)


@pytest.mark.parametrize("width", [slow(None, id="no-bias"), pytest.param(5, id="bias")])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), slow(torch.bfloat16, id="bfloat16")])
def test_every_element_of_new_memory_is_written(
    dtype: torch.dtype, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uninitialised memory is filled with NaN, which must not show in any result."""
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
    """Find the weights that a seed keeps, ``(B, H, T, K)``.

    With equal weights over all keys and unit vectors as values, the output shows them.
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
    slow({}, {}, id="plain"),
    pytest.param({"heads": 4, "groups": 2, "num_rows": 20}, {}, id="prefix-keys-grouped-heads"),
    slow({"width": 4}, {}, id="relative-bias"),
    pytest.param({"width": 4}, {"softcap": 2.0}, id="relative-bias-softcap"),
    slow({"dtype": torch.float16}, {}, id="float16"),
]


@pytest.mark.parametrize(("shape", "options"), DROPOUT)
def test_dropout_drops_the_same_weights_in_every_kernel(shape: dict[str, Any], options: dict[str, float]) -> None:
    """Compare with float64 under the same dropout mask, with tiles that differ between the kernels."""
    given = make(**{"num_rows": 37, "num_keys": 37, **shape})
    keep = kept(2**62 - 1, 0.3, given)
    check(given, gist_in_the_middle(37), MIXED, dropout=0.3, seed=seeded(2**62 - 1), keep=keep, **options)


def test_dropout_with_another_seed_fails_the_comparison() -> None:
    given, visibility = make(37), gist_in_the_middle(37)
    plan = plan_for(given, visibility)
    have = differentiate(lambda it: fused(it, plan, dropout=0.3, seed=seeded(4)), given)
    assert failures(given, visibility, have, dropout=0.3, keep=kept(3, 0.3, given)).keys() == have.keys()
    assert not failures(given, visibility, have, dropout=0.3, keep=kept(4, 0.3, given))


@pytest.mark.parametrize("dropout", [0.1, slow(0.5), slow(0.9)])
def test_dropout_keeps_its_share(dropout: float) -> None:
    """Over heads, over rows and over keys, within 6 standard deviations."""
    given = make(63, batch=3, heads=4)
    keep = kept(5, dropout, given).double()
    for dims in ((0, 1, 2, 3), (2, 3), (0, 1, 3), (0, 1, 2)):
        number = math.prod(keep.shape[dim] for dim in dims)
        error = (keep.mean(dims) - (1 - dropout)).abs().max().item()
        assert error <= 6 * math.sqrt(dropout * (1 - dropout) / number), dims


def test_heads_sequences_rows_and_seeds_draw_independently() -> None:
    """Two masks of 63 x 63 fair coins agree in half of them, within 6 standard deviations."""
    given = make(63, batch=2, heads=3)
    masks = torch.cat([kept(seed, 0.5, given).flatten(0, 1) for seed in (0, 1)])
    for a, b in itertools.combinations(masks, 2):
        assert (a == b).double().mean().item() == pytest.approx(0.5, abs=6 * 0.5 / 63)
    rows = masks[0]
    assert (rows[1:] == rows[:-1]).double().mean().item() == pytest.approx(0.5, abs=6 * 0.5 / 62)


def test_dropout_keeps_the_mean() -> None:
    """Every element of the mean of 64 draws is within six standard errors of the value without dropout."""
    one, visibility = make(7, batch=1, heads=1), gist_in_the_middle(7)
    given = Given(*(t.detach().expand(16, 4, -1, -1) for t in one[:3]), None, one.upstream)
    plan = plan_for(given, visibility)
    with torch.no_grad():
        out = fused(given, plan, dropout=0.3, seed=seeded(9)).flatten(0, 1).double()
        expected = exact(one.cast(torch.float64), visibility)[0, 0]
    is_empty = ~visibility.to_dense()[0].any(-1)
    assert is_empty.sum() == 1
    assert not out[:, is_empty].any()
    error, spread = (out.mean(0) - expected)[~is_empty].abs(), out.std(0)[~is_empty]
    assert (spread > 0).all()
    assert (error <= 6 * spread / math.sqrt(64)).all()


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
@pytest.mark.parametrize(
    "options", [pytest.param({}, id="plain"), slow({"softcap": 2.0, "width": 7}, id="softcap-relative-bias")]
)
def test_bfloat16_under_the_interpreter(options: dict[str, Any]) -> None:
    """The operator computes in float32 there, so only the rounding of the result differs."""
    options = dict(options)
    given = make(37, dtype=torch.bfloat16, heads=4, groups=2, width=options.pop("width", None))
    check(given, gist_in_the_middle(37), MIXED, **options)


@pytest.mark.parametrize("precision", [slow("tf32x3"), None])
def test_float32_by_default_is_three_tf32_products(precision: str | None) -> None:
    """Three TF32 products drop terms of 2^-22 of the largest: up to four times the rounding error of float32.

    The interpreter always multiplies in float32.
    """
    given, visibility = make(63, size=64, width=5), gist_in_the_middle(63)
    plan = plan_for(given, visibility)
    have = differentiate(lambda it: fused(it, plan, precision=precision), given)
    assert not failures(given, visibility, have, factor=4.0 if IS_CUDA else 1.0)


# -- the comparison can fail -------------------------------------------------------------------------------------------


def test_the_plain_formula_is_the_oracle() -> None:
    """Two implementations give the same numbers in float64, with every option."""
    given = make(45, dtype=torch.float64, batch=2, heads=4, groups=2, width=5)
    options = {"scale": 0.7, "softcap": 1.5}
    for name, visibility in BUILDERS.items():
        have = differentiate(lambda it, v=visibility: plain(it, v, **options), given)
        for key, tensor in differentiate(lambda it, v=visibility: exact(it, v, **options), given).items():
            torch.testing.assert_close(have[key], tensor, rtol=1e-12, atol=1e-12, msg=f"{name} {key}")


def shifted(plan: Plan, first: int, end: int) -> Plan:
    return dataclasses.replace(plan, first=plan.first + first, end=plan.end + end)


def recounted(plan: Plan, part: str, kind: int, change: Callable[[Tensor], Tensor]) -> Plan:
    """Change the counts in one of the plan's lists: kind 0 is near, 1 partial, 2 all."""
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


@each_dtype
@pytest.mark.parametrize(("change", "options", "wrong"), PLANTED)
def test_a_planted_bug_is_found(
    change: Callable[[Plan], Plan], options: dict[str, Any], wrong: set[str], dtype: torch.dtype
) -> None:
    given, visibility = make(45, dtype=dtype, heads=1), BUILDERS_ONE
    right = {"softcap": 1.0}
    plan = plan_for(given, visibility, tiles((16, 16)))
    have = differentiate(lambda it: fused(it, change(plan), **{**right, **options}), given)
    assert wrong <= failures(given, visibility, have, **right).keys()


# Padding, a gist and keys up to the last row make partial and full tiles in every kernel.
BUILDERS_ONE = Visibility(BUILDERS["gist-branches"].first[1:], BUILDERS["gist-branches"].end[1:])


def test_partial_tiles_taken_for_full_in_dq_are_found(path: str) -> None:
    """By descriptors, the mask of full tiles is not tested; by pointers, it always is."""
    given, visibility = make(45, heads=1), BUILDERS_ONE
    plan = plan_for(given, visibility)
    wrong = recounted(plan, "backward_query", 1, lambda c: c[..., 0])
    have = differentiate(lambda it: fused(it, wrong), given)
    assert failures(given, visibility, have).keys() == ({"dq"} if path == "descriptors" else set())


@pytest.mark.parametrize(("change", "wrong"), BIAS_PLANTED)
def test_a_planted_bug_in_the_relative_bias_is_found(change: Callable[[Plan], Plan], wrong: set[str]) -> None:
    given, visibility = make(45, heads=1, width=6), vis.bidirectional(torch.ones(1, 45))
    plan = plan_for(given, visibility, tiles((16, 16)))
    have = differentiate(lambda it: fused(it, change(plan)), given)
    assert wrong <= failures(given, visibility, have).keys()


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


def test_nan_fails_the_comparison() -> None:
    given, visibility = make(17), gist_in_the_middle(17)
    have = differentiate(lambda it: fused(it, plan_for(it, visibility)), given)
    assert not failures(given, visibility, have)
    have["dk"][0, 0, 3, 1] = math.nan
    assert failures(given, visibility, have).keys() == {"dk"}
