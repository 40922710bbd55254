"""Cut intervals into pieces, and compare attention by pieces with the oracle in float64.

The tolerance is that of ``test_interval_attention.py``. In drawings of a mask, each piece has a letter, in the order of
the keys, and a capital letter if it is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from gisting import visibility as vis
from gisting.attention import interval_attention, sdpa
from gisting.attention.pieces import Group, Piece, Plan, attend_pieces, is_available, plan_if_cheaper, plan_pieces
from gisting.visibility import FOREVER, Visibility
from tests.attention import test_interval_attention as oracle
from tests.attention.test_interval_attention import Inputs, largest_score, plain, run, tolerance, worst
from tests.slow import slow

DTYPES = [slow(torch.float64), torch.float32, torch.bfloat16, slow(torch.float16)]

pytestmark = pytest.mark.skipif(
    not is_available(), reason="this torch has no fused attention on the CPU by these names"
)


# -- intervals to pieces -----------------------------------------------------------------------------------------------


def spans(text: str) -> tuple[Tensor, Tensor]:
    """Find the gist tokens (G), and the tokens that are not padding (_), in a text such as ``a b G c _``."""
    tokens = text.split()
    return torch.tensor([[t == "G" for t in tokens]]), torch.tensor([[t != "_" for t in tokens]])


def intervals(*pairs: tuple[int, int]) -> Visibility:
    first, end = torch.tensor(pairs, dtype=torch.int32).T
    return Visibility(first[None], end[None])


def draw(pieces: list[Piece], num_rows: int, num_keys: int) -> list[str]:
    lines = [["."] * num_keys for _ in range(num_rows)]
    for number, piece in enumerate(pieces):
        for row in range(piece.first_row, piece.end_row):
            for key in range(piece.first_key, piece.end_key):
                if piece.is_causal and key - piece.first_key > row - piece.first_row:
                    continue
                assert lines[row][key] == ".", f"row {row} sees key {key} twice"
                lines[row][key] = chr(ord("A" if piece.is_causal else "a") + number)
    return ["".join(line) for line in lines]


DRAWINGS: list[Any] = [
    pytest.param(vis.causal(torch.ones(1, 4)), 4, "A... AA.. AAA. AAAA", id="causal"),
    pytest.param(vis.gist(*spans("a b G c d")), 5, "A.... AA... AAB.. ..BB. ..BBB", id="gist"),
    pytest.param(vis.gist(*spans("a b G G")), 4, "A... AA.. AAA. AAAA", id="stops-with-its-gist"),
    pytest.param(vis.gist(*spans("a G b G c")), 5, "a.... ab... .bc.. .bcD. .b.DD", id="two-spans"),
    pytest.param(vis.positive(*spans("a b G c")), 4, "A... AA.. AAA. AAAA", id="positive"),
    pytest.param(vis.negative(*spans("a b G c d")), 5, "A.... AA... AAA.. ...B. ...BB", id="negative"),
    pytest.param(vis.gist(*spans("_ _ a G c")), 5, "..... ..... ..a.. ..aB. ...BB", id="left-padding"),
    pytest.param(vis.gist(*spans("a b G c _ _")), 6, "A..... AA.... AAB... ..BB.. ..BB.. ..BB..", id="right-padding"),
    pytest.param(vis.causal(torch.zeros(1, 3)), 3, "... ... ...", id="only-padding"),
    pytest.param(
        vis.gist(spans("a b G c a b G")[0], documents=torch.tensor([[1, 1, 1, 1, 2, 2, 2]])),
        7,
        "A...... AA..... AAB.... ..BB... ....C.. ....CC. ....CCC",
        id="packed-documents",
    ),
    pytest.param(
        vis.causal(torch.ones(1, 5), branches=torch.tensor([[0, 1, 1, 2, 2]])),
        5,
        "a.... aB... aBB.. a..C. a..CC",
        id="branches",
    ),
    pytest.param(vis.encoder_gist(*spans("a b G c")), 4, "aab. aab. aab. ..bc", id="encoder-gist"),
    pytest.param(vis.encoder_gist(*spans("a b G c d _")), 6, "aab... aab... aab... ..bcc. ..bcc. ..bcc.", id="encoder"),
    pytest.param(vis.encoder_positive(*spans("a b G c")), 4, "aaaa aaaa aaaa aaaa", id="encoder-positive"),
    pytest.param(vis.encoder_negative(*spans("a b G c")), 4, "aaa. aaa. aaa. ...b", id="encoder-negative"),
    pytest.param(vis.causal(torch.ones(1, 5)), 3, "aaB.. aaBB. aaBBB", id="causal-after-a-prefix"),
    pytest.param(vis.gist(*spans("a b G c d")), 3, "aaB.. ..BB. ..BBB", id="rows-from-the-gist-on"),
    pytest.param(vis.gist(*spans("a b G c d")), 2, "..aB. ..aBB", id="rows-after-the-gist"),
    pytest.param(vis.gist(*spans("a b G c d")), 1, "..aaa", id="one-row"),
    pytest.param(vis.gist(*spans("a b G c")).for_cross_attention(), 5, "..aa ..aa ..aa ..aa ..aa", id="cross"),
    pytest.param(vis.gist(*spans("a b G c")), 6, "A... AA.. AAB. ..BB ..BB ..BB", id="more-rows-than-keys"),
    pytest.param(vis.causal(torch.ones(1, 5)).windowed(2), 5, "a.... ab... .bc.. ..cD. ...DD", id="sliding-window"),
    pytest.param(intervals((0, 3), (1, 3), (2, 3), (3, 3), (4, 3)), 5, "A.... AA... AAA.. ..... .....", id="cut-below"),
    pytest.param(intervals((0, 4), (0, 4), (1, 4), (2, 4), (2, 4)), 5, "aB... aBB.. aBBBc aBBBc .....", id="mixed"),
    pytest.param(intervals((0, 4), (1, 4), (1, 4), (2, 4)), 4, "A... AAB. AABB AABB", id="two-slopes"),
]


@pytest.mark.parametrize(("visibility", "num_rows", "drawing"), DRAWINGS)
def test_pieces_by_eye(visibility: Visibility, num_rows: int, drawing: str) -> None:
    (group,) = plan_pieces(visibility, num_rows).groups
    assert draw(group.pieces, num_rows, visibility.num_keys) == drawing.split()
    seen = [[c != "." for c in line] for line in drawing.split()]
    assert visibility.to_dense(num_rows)[0].tolist() == seen


@st.composite
def batches(draw: Callable[..., Any]) -> tuple[Visibility, int]:
    """Draw any intervals, including empty and inverted ones and runs of neighbours; T is below, at or above K."""
    batch, num_keys, num_rows = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    ends = st.one_of(st.integers(-2, 14), st.just(FOREVER))
    first, end = [], []
    for _ in range(batch):
        if first and draw(st.booleans()):  # as another sequence
            same = draw(st.integers(0, len(first) - 1))
            first.append(first[same])
            end.append(end[same])
            continue
        start, stop, own = draw(st.integers(-2, 9)), draw(ends), []
        for _ in range(num_keys):
            step = draw(st.sampled_from([0, 0, 1, 1, 1, None]))
            if step is None:
                start, stop, step = draw(st.integers(-2, 14)), draw(ends), 0
            start += step
            own.append((start, stop))
        first.append([a for a, _ in own])
        end.append([b for _, b in own])
    return Visibility(torch.tensor(first, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)), num_rows


@settings(deadline=None, max_examples=300, derandomize=True)
@for_all(batch=batches())
def test_pieces_cover_what_is_seen_each_pair_once(batch: tuple[Visibility, int]) -> None:
    visibility, num_rows = batch
    groups = plan_pieces(visibility, num_rows).groups
    dense = visibility.to_dense(num_rows)
    number = torch.arange(visibility.batch_size)
    members = [number[group.sequences].tolist() for group in groups]
    assert sorted(sequence for own in members for sequence in own) == number.tolist()
    for group, own in zip(groups, members, strict=True):
        drawn = draw(group.pieces, num_rows, visibility.num_keys)  # complains of a pair that is there twice
        for sequence in own:
            assert [[c != "." for c in line] for line in drawn] == dense[sequence].tolist()
        assert all(dense[own[0]].equal(dense[sequence]) for sequence in own)
        assert_stretches(group, num_rows)


def assert_stretches(group: Group, num_rows: int) -> None:
    """The stretches of a piece cover its rows, and a row is new in the first piece that has it."""
    had: set[int] = set()
    for piece, stretches in group.steps:
        rows = [(row, s.is_new) for s in stretches for row in range(s.first_row, s.end_row)]
        assert rows == [(row, row not in had) for row in range(piece.first_row, piece.end_row)]
        had |= {row for row, _ in rows}
    assert had <= set(range(num_rows))


def gist_of(num_keys: int, num_gist_tokens: int = 4) -> Visibility:
    """Make a gist mask in which half of the tokens are prompt."""
    index = torch.arange(num_keys)[None]
    return vis.gist((index >= num_keys // 2) & (index < num_keys // 2 + num_gist_tokens))


def test_sequences_with_equal_intervals_are_one_group() -> None:
    one, other = gist_of(16), vis.causal(torch.ones(1, 16))
    pick = [one, other, other, one, other, one]
    visibility = Visibility(torch.cat([v.first for v in pick]), torch.cat([v.end for v in pick]))
    members = [torch.arange(6)[group.sequences].tolist() for group in plan_pieces(visibility, 16).groups]
    assert sorted(members) == [[0, 3, 5], [1, 2, 4]]
    together = Visibility(visibility.first[1:3], visibility.end[1:3])
    assert [group.sequences for group in plan_pieces(together, 16).groups] == [slice(None)]
    assert [group.sequences for group in plan_pieces(one, 16).groups] == [slice(None)]
    neighbours = Visibility(visibility.first[:3], visibility.end[:3])
    assert all(isinstance(group.sequences, slice) for group in plan_pieces(neighbours, 16).groups)


# Whether pieces are cheaper, at 512 multiply-adds for a pair (8 heads of 64).
CHEAPER: list[Any] = [
    pytest.param(gist_of(512), 512, True, id="gist"),
    pytest.param(vis.causal(torch.ones(1, 2048)), 2048, True, id="causal"),
    pytest.param(vis.causal(torch.ones(1, 2048), documents=torch.arange(2048)[None] // 256), 2048, True, id="packed"),
    pytest.param(gist_of(2048), 256, True, id="rows-after-a-hidden-prompt"),
    pytest.param(vis.causal(torch.zeros(1, 512)), 512, True, id="nothing-is-seen"),
    pytest.param(vis.causal(torch.ones(1, 2048)).windowed(512), 2048, False, id="sliding-window"),
    pytest.param(vis.causal(torch.ones(1, 512), documents=torch.arange(512)[None]), 512, False, id="tiny-documents"),
    pytest.param(vis.bidirectional(torch.ones(1, 512)), 512, False, id="nothing-is-hidden"),
    pytest.param(gist_of(32), 32, False, id="short"),
]


@pytest.mark.parametrize(("visibility", "num_rows", "is_cheaper"), CHEAPER)
def test_pieces_are_refused_where_they_are_dearer(visibility: Visibility, num_rows: int, is_cheaper: bool) -> None:
    assert (plan_if_cheaper(visibility, num_rows, 8 * 64) is not None) is is_cheaper


# -- attention by pieces -----------------------------------------------------------------------------------------------


def inputs(
    heads: int = 4,
    groups: int = 2,
    num_rows: int = 63,
    num_keys: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 4,
    size: int = 12,
) -> Inputs:
    """Draw the inputs of the oracle's tests, but with the head size of keys for values, as pieces require."""
    q, k, v, _, upstream = oracle.inputs(heads, groups, num_rows, num_keys, dtype, batch=batch, size=size)
    return Inputs(q, k, v.detach()[..., :size].clone().requires_grad_(), None, upstream[..., :size].clone())


def pieces_of(visibility: Visibility, scale: float = 0.3) -> Callable[..., Tensor]:
    """Attend by pieces, regardless of the cost."""
    return lambda q, k, v, bias=None: attend_pieces(q, k, v, plan_pieces(visibility, q.shape[2]), scale)


def added_up(visibility: Visibility, given: Inputs, scale: float) -> dict[str, float]:
    """Sum the absolute values of the terms whose sums are the gradients of q and k; return the largest for each.

    The terms are ``weight (dout . v - dout . out)`` times a key or a query.
    """
    q, k, v, upstream = (t.detach().double() for t in (given.q, given.k, given.v, given.upstream))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = visibility.to_dense(q.shape[2])[:, None]
    weights = (q @ k.mT * scale).masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    sums = upstream.abs() @ v.abs().mT + (upstream * (weights @ v)).abs().sum(-1, keepdim=True)
    terms = scale * weights * sums
    of_keys = (terms.mT @ q.abs()).unflatten(1, (-1, group)).sum(2)
    return {"dq": (terms @ k.abs()).max().item(), "dk": of_keys.max().item()}


def bounds(visibility: Visibility, given: Inputs, exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the tolerance of the oracle's tests, plus two rounding errors of the terms for the gradients of q and k.

    If a row sees two keys, the two sums of its gradient nearly cancel. The plain implementation takes the difference in
    another order, so its error does not measure that of the pieces. The sums are in float32 or better.
    """
    yardstick, largest = run(plain(visibility, 0.3), given), largest_score(given, 0.3)
    terms = added_up(visibility, given, 0.3)
    eps = min(torch.finfo(given.q.dtype).eps, torch.finfo(torch.float32).eps)
    return {
        name: tolerance(yardstick[name], tensor, largest) + 2 * eps * terms.get(name, 0.0)
        for name, tensor in exact.items()
    }


def assert_as_good_as_plain(attend: Callable[..., Tensor], visibility: Visibility, given: Inputs) -> None:
    exact = oracle.exact_of(visibility, given, scale=0.3)
    have, allowed = run(attend, given), bounds(visibility, given, exact)
    for name, tensor in have.items():
        assert tensor.dtype == given.q.dtype, name
        assert tensor.shape == exact[name].shape, name
        error, bound = worst(tensor, exact[name]), allowed[name]
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [2, slow(7), 63, slow(111)])
@pytest.mark.parametrize(("heads", "groups"), oracle.HEADS, ids=oracle.HEAD_IDS)
def test_outputs_and_gradients(dtype: torch.dtype, num_rows: int, heads: int, groups: int) -> None:
    visibility = oracle.masks(num_rows)
    assert_as_good_as_plain(pieces_of(visibility), visibility, inputs(heads, groups, num_rows, dtype=dtype))


def test_gradients_that_nearly_cancel() -> None:
    """With two keys per row, rounding exceeds the oracle's tolerance in about one of 40 draws, and in four of these."""
    visibility = oracle.masks(2)
    for seed in range(79, 107):
        torch.manual_seed(seed)
        q, k, v, upstream = (torch.randn(4, 4, 2, 12) for _ in range(4))
        given = Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), None, upstream)
        assert_as_good_as_plain(pieces_of(visibility), visibility, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups"), oracle.HEADS, ids=oracle.HEAD_IDS)
def test_one_row_with_one_key(dtype: torch.dtype, heads: int, groups: int) -> None:
    """The gradients of q and k are 0, as differences of two equal sums, dout . v and dout . out, of ``size`` terms.

    Their rounding errors are small compared with the sums, not with 0.
    """
    given, visibility = inputs(heads, groups, 1, dtype=dtype), oracle.masks(1)
    exact, have = oracle.exact_of(visibility, given, scale=0.3), run(pieces_of(visibility), given)
    assert not exact["dq"].any()
    assert not exact["dk"].any()
    assert worst(have["out"], exact["out"]) == 0
    size, group = given.q.shape[-1], heads // groups
    eps = torch.finfo(dtype).eps
    for name, factor in (("dq", given.k), ("dk", given.q)):
        sums = size * given.upstream.abs().max() * given.v.abs().max()
        assert have[name].abs().max() <= 4 * group * eps * 0.3 * sums * factor.abs().max(), name
    bound = (4 + largest_score(given, 0.3)) * group * eps * given.upstream.abs().max()
    assert worst(have["dv"], exact["dv"]) <= bound


def repeated(visibility: Visibility, batch: int) -> Visibility:
    return Visibility(visibility.first.expand(batch, -1), visibility.end.expand(batch, -1))


def many_spans(num_keys: int) -> Visibility:
    """Make every eighth token a gist token, so that the last rows are in a dozen pieces."""
    return vis.gist(torch.arange(num_keys)[None] % 8 == 5)


def shuffled(num_keys: int) -> Visibility:
    """Make six sequences: two masks that alternate, and one sequence in which no row sees a key."""
    kinds = [gist_of(num_keys), many_spans(num_keys), vis.causal(torch.zeros(1, num_keys))]
    pick = [kinds[number] for number in (0, 1, 0, 2, 1, 0)]
    return Visibility(torch.cat([v.first for v in pick]), torch.cat([v.end for v in pick]))


LAYOUTS: list[Any] = [
    pytest.param(vis.causal(torch.ones(2, 63)), 63, id="causal"),
    slow(repeated(gist_of(1300, 20), 1), 1300, id="gist-longer-than-a-block"),
    pytest.param(repeated(many_spans(111), 2), 111, id="rows-in-many-pieces"),
    pytest.param(many_spans(111), 7, id="last-rows-in-many-pieces"),
    pytest.param(shuffled(63), 63, id="groups-of-sequences"),
    pytest.param(shuffled(63), 7, id="groups-of-sequences-last-rows"),
    pytest.param(vis.causal(torch.ones(2, 63)).windowed(9), 63, id="sliding-window"),
    pytest.param(vis.gist(torch.arange(63)[None] % 40 == 20, documents=torch.arange(63)[None] // 40), 63, id="packed"),
    pytest.param(vis.encoder_gist(torch.arange(63)[None] % 20 == 15), 63, id="encoder"),
    pytest.param(vis.gist(torch.arange(63)[None] == 30).for_cross_attention(), 111, id="more-rows-than-keys"),
    pytest.param(gist_of(63), 111, id="more-rows-than-keys-causal"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("visibility", "num_rows"), LAYOUTS)
def test_outputs_and_gradients_of_layouts(visibility: Visibility, num_rows: int, dtype: torch.dtype) -> None:
    given = inputs(4, 2, num_rows, visibility.num_keys, dtype, batch=visibility.batch_size)
    assert_as_good_as_plain(pieces_of(visibility), visibility, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_does_not_grow_with_the_number_of_pieces(dtype: torch.dtype) -> None:
    """With rows in up to 255 pieces, sums in half precision would have twice the mean error of plain attention."""
    given, visibility = inputs(2, 1, 511, dtype=dtype, batch=1), vis.gist(torch.arange(511)[None] % 2 == 1)
    exact, yardstick = oracle.exact_of(visibility, given, scale=0.3), run(plain(visibility, 0.3), given)
    have = run(pieces_of(visibility), given)
    for name in ("out", "dq"):  # what is summed over pieces
        error, of_plain = ((t.double() - exact[name]).norm() for t in (have[name], yardstick[name]))
        assert error <= of_plain, name


def test_one_visibility_serves_every_sequence() -> None:
    given, one = inputs(), gist_of(63)
    have, expected = run(pieces_of(one), given), run(pieces_of(repeated(one, 4)), given)
    for name, tensor in have.items():
        assert torch.equal(tensor, expected[name]), name


def with_wrong_piece(plan: Plan, **changes: int) -> Plan:
    """Change the second piece of the first group of a plan."""
    (group, *others), second = plan.groups, plan.groups[0].steps[1]
    piece = second.piece._replace(**{name: getattr(second.piece, name) + by for name, by in changes.items()})
    steps = (group.steps[0], second._replace(piece=piece), *group.steps[2:])
    return Plan((group._replace(steps=steps), *others))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [{"first_key": 1}, {"first_key": -1}, {"end_key": -1}, {"first_key": -1, "end_key": -1}, {"is_causal": -1}],
    ids=str,
)
def test_a_planted_bug_exceeds_the_tolerance(changes: dict[str, int], dtype: torch.dtype) -> None:
    given, visibility = inputs(batch=1, dtype=dtype), gist_of(63)
    exact = oracle.exact_of(visibility, given, scale=0.3)
    allowed = bounds(visibility, given, exact)
    plan = with_wrong_piece(plan_pieces(visibility, 63), **changes)
    wrong = run(lambda q, k, v, bias: attend_pieces(q, k, v, plan, 0.3), given)
    for name, tensor in wrong.items():
        assert worst(tensor, exact[name]) > 2 * allowed[name], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_seen_is_exactly_zero(dtype: torch.dtype) -> None:
    given, visibility = inputs(dtype=dtype), oracle.masks(63)
    have, seen = run(pieces_of(visibility), given), visibility.to_dense()
    for name, hidden in (("out", ~seen.any(2)), ("dq", ~seen.any(2)), ("dk", ~seen.any(1)), ("dv", ~seen.any(1))):
        assert hidden.any()
        assert have[name].isfinite().all(), name
        assert not have[name].transpose(1, 2)[hidden].any(), name


def test_what_nobody_sees_is_not_read() -> None:
    """Padded keys may be NaN, as memory that was never written to can be."""
    given, visibility = inputs(batch=1), vis.gist(torch.arange(63)[None] == 30, torch.arange(63)[None] >= 9)
    expected = run(pieces_of(visibility), given)
    hidden = (torch.arange(63) < 9)[:, None]
    k, v = (t.detach().masked_fill(hidden, torch.nan).requires_grad_() for t in (given.k, given.v))
    for name, tensor in run(pieces_of(visibility), given._replace(k=k, v=v)).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores are near 1e4, and whole pieces are far below the other pieces of their rows."""
    given, visibility = inputs(dtype=dtype), many_spans(63)
    large = given._replace(
        q=(given.q.detach() * 100).requires_grad_(),
        k=(given.k.detach() * torch.linspace(-30, 30, 63)[:, None]).to(dtype).requires_grad_(),
    )
    for name, tensor in run(pieces_of(visibility), large).items():
        assert tensor.isfinite().all(), name


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows-before-heads": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "cut-out-of-a-longer-cache": lambda t: torch.cat([t, torch.full_like(t, 1e4)], 2)[:, :, : t.shape[2]],
    "cut-out-of-one-projection": lambda t: torch.cat([t, torch.full_like(t, 1e4)], 3)[..., : t.shape[3]],
    "numbers-of-a-row-apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
def test_strided_inputs(strides: Callable[[Tensor], Tensor]) -> None:
    given, visibility = inputs(num_rows=63, num_keys=111), oracle.masks(111)
    strided = Inputs(*(strides(t.detach()).requires_grad_() for t in given[:3]), None, strides(given.upstream))
    expected = run(pieces_of(visibility), given)
    for name, tensor in run(pieces_of(visibility), strided).items():
        assert worst(tensor, expected[name]) <= 8 * torch.finfo(torch.float32).eps * expected[name].abs().max(), name


def test_a_gradient_that_is_one_number_expanded() -> None:
    given, visibility = inputs(), oracle.masks(63)
    ones = torch.ones(()).expand_as(given.upstream)
    expected = run(pieces_of(visibility), given._replace(upstream=torch.ones_like(given.upstream)))
    for name, tensor in run(pieces_of(visibility), given._replace(upstream=ones)).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_output_lies_as_models_want_it() -> None:
    """Rows come before heads in memory, so a model joins the heads without a copy."""
    out = pieces_of(oracle.masks(63))(*(t.detach() for t in inputs()[:3]))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("visibility", [gist_of(7, 1), many_spans(9), vis.causal(torch.zeros(1, 5))])
def test_gradients_are_those_of_the_function(visibility: Visibility) -> None:
    given = inputs(2, 1, visibility.num_keys, dtype=torch.float64, batch=2, size=2)
    assert torch.autograd.gradcheck(pieces_of(visibility), given.leaves, fast_mode=False)


def test_pieces_are_differentiated_once() -> None:
    """A second derivative raises instead of being dropped: torch has none for the fused operator's backward."""
    given = inputs(2, 1, 7)
    out = pieces_of(gist_of(7))(*given[:3])
    (dq,) = torch.autograd.grad(out.sum(), given.q, create_graph=True)
    assert torch.equal(dq, torch.autograd.grad(pieces_of(gist_of(7))(*given[:3]).sum(), given.q)[0])
    with pytest.raises(RuntimeError, match=r"derivative for .*_backward is not implemented"):
        dq.sum().backward()


# -- what impl="sdpa" makes of it --------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Record the operators that run, and the size of the largest tensor that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result

    def count(self, name: str) -> int:
        return self.names.count(f"aten::_scaled_dot_product_flash_attention_for_cpu{name}")


def both_passes(given: Inputs, visibility: Visibility, **options: Any) -> Recorded:
    with Recorded() as recorded:
        out = interval_attention(*given[:3], visibility, impl="sdpa", **options)
        torch.autograd.grad(out, given.leaves, given.upstream)
    return recorded


def test_no_tensor_of_rows_times_keys() -> None:
    given = inputs(2, 1, 2048, batch=1, size=4)
    recorded = both_passes(given, gist_of(2048))
    assert (recorded.count(""), recorded.count("_backward")) == (2, 2)
    assert recorded.largest == given.q.numel()
    with sdpa_kernel(SDPBackend.MATH):
        assert both_passes(given, gist_of(2048)).largest >= 2048 * 2048


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, slow(4)])
def test_impl_sdpa_is_the_oracle_by_pieces(used: list[str], batch: int, dtype: torch.dtype) -> None:
    given, visibility = inputs(num_rows=511, dtype=dtype, batch=4), repeated(gist_of(511), batch)
    attend = oracle.ours(visibility, "sdpa", scale=0.3)
    assert_as_good_as_plain(attend, visibility, given)
    assert used == ["pieces"]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record whether each call of ``impl="sdpa"`` used pieces or a dense mask."""
    calls: list[str] = []

    def recording(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return function(*args, **kwargs)

        return attend

    monkeypatch.setattr(sdpa, "attend_pieces", recording("pieces", sdpa.attend_pieces))
    monkeypatch.setattr(sdpa, "dense_attention", recording("dense", sdpa.dense_attention))
    return calls


class Marked(Tensor):
    """A subclass of Tensor."""


def wide_values(given: Inputs) -> Inputs:
    return given._replace(v=torch.cat([given.v, given.v], -1).detach().requires_grad_())


CHOSEN: list[Any] = [
    pytest.param({}, "pieces", id="plain"),
    pytest.param({"bias": torch.zeros(1, 1, 511, 511)}, "dense", id="bias"),
    pytest.param({"dropout": 0.1}, "dense", id="dropout"),
    pytest.param({"scale": 0.0}, "dense", id="scale-0"),
    pytest.param({"scale": -0.5}, "dense", id="negative-scale"),
    pytest.param({"visibility": vis.causal(torch.ones(1, 511)).windowed(32)}, "dense", id="sliding-window"),
    pytest.param({"visibility": vis.bidirectional(torch.ones(1, 511))}, "dense", id="nothing-is-hidden"),
    pytest.param({"given": inputs(num_rows=1, num_keys=511)}, "dense", id="decoding"),
    pytest.param({"given": inputs(num_rows=0, num_keys=511)}, "dense", id="no-rows"),
    pytest.param({"given": wide_values(inputs(num_rows=511))}, "dense", id="wide-values"),
    pytest.param({"subclass": True}, "dense", id="subclass"),
    pytest.param({"kernel": SDPBackend.MATH}, "dense", id="fused-operator-off"),
    pytest.param({"kernel": SDPBackend.FLASH_ATTENTION}, "pieces", id="fused-operator-alone"),
]


@pytest.mark.parametrize(("changes", "chosen"), CHOSEN)
def test_pieces_or_dense(used: list[str], changes: dict[str, Any], chosen: str) -> None:
    options = dict(changes)
    given: Inputs = options.pop("given", None) or inputs(num_rows=511)
    visibility = options.pop("visibility", gist_of(511))
    q, k, v = (t.detach() for t in given[:3])
    q = q.as_subclass(Marked) if options.pop("subclass", False) else q
    kernel = options.pop("kernel", None)
    with sdpa_kernel([kernel] if kernel else list(SDPBackend.__members__.values())[1:]):
        interval_attention(q, k, v, visibility, impl="sdpa", **options)
    assert used == [chosen]


def test_dense_where_torch_has_no_such_operator(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "is_available", lambda: False)
    given = inputs(num_rows=511)
    interval_attention(*given[:3], gist_of(511), impl="sdpa")
    assert used == ["dense"]


def test_dense_inside_torch_func(used: list[str]) -> None:
    given, visibility = inputs(num_rows=511), gist_of(511)
    attend = oracle.ours(visibility, "sdpa", scale=0.3)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (attend(q, k, v, None) * given.upstream).sum()

    grads = torch.func.grad(loss, argnums=(0, 1, 2))(*(t.detach() for t in given[:3]))
    assert used == ["dense"]
    expected = run(attend, given)
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert worst(grad, expected[name]) <= 40 * torch.finfo(torch.float32).eps * expected[name].abs().max(), name


def test_compiles_as_one_graph() -> None:
    """The graph uses a dense mask, and agrees with the pieces outside the graph."""
    given, visibility = inputs(num_rows=511), gist_of(511)
    attend = oracle.ours(visibility, "sdpa", scale=0.3)
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert_as_good_as_plain(compiled, visibility, given)
    have, expected = run(compiled, given), run(attend, given)
    for name, tensor in have.items():
        assert worst(tensor, expected[name]) <= 40 * torch.finfo(torch.float32).eps * expected[name].abs().max(), name


def test_pieces_are_found_once_for_all_layers(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []

    def counting(visibility: Visibility, num_rows: int, work: int) -> Plan | None:
        found.append((num_rows, work))
        return plan_if_cheaper(visibility, num_rows, work)

    monkeypatch.setattr(sdpa, "plan_if_cheaper", counting)
    given, visibility = inputs(num_rows=511), gist_of(511)
    x = given.q
    for _ in range(3):
        x = interval_attention(x, given.k, given.v, visibility, impl="sdpa")
    x.sum().backward()
    work = 4 * 12  # H D, and one visibility for four sequences
    assert (found, used) == ([(511, 4 * work)], ["pieces"] * 3)
    visibility.first.add_(0)  # a write makes the cached pieces invalid
    interval_attention(*given[:3], visibility, impl="sdpa")
    interval_attention(given.q[:, :, :400], *given[1:3], visibility, impl="sdpa")
    interval_attention(*given[:3], repeated(visibility, 4), impl="sdpa")
    assert found == [(511, 4 * work), (511, 4 * work), (400, 4 * work), (511, work)]


def test_a_refusal_is_remembered_too(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(sdpa, "plan_if_cheaper", lambda *arguments: found.append(1))
    given, visibility = inputs(num_rows=511), gist_of(511)
    for _ in range(3):
        interval_attention(*given[:3], visibility, impl="sdpa")
    assert (found, used) == ([1], ["dense"] * 3)


@pytest.mark.parametrize("autocast", [torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast(used: list[str], dtype: torch.dtype, autocast: torch.dtype) -> None:
    """Like scaled_dot_product_attention: half precision except for float64, and gradients in the dtype of the leaf."""
    numbers, visibility = inputs(num_rows=511, dtype=torch.bfloat16), gist_of(511)
    given = numbers.cast(dtype)
    coarse = dtype if dtype == torch.float64 else autocast
    exact, yardstick = oracle.exact_of(visibility, given, scale=0.3), run(plain(visibility, 0.3), given.cast(coarse))

    def attend(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", dtype=autocast):
            out = oracle.ours(visibility, "sdpa", scale=0.3)(*arguments)
        with torch.autocast("cpu", dtype=autocast), sdpa_kernel(SDPBackend.MATH):
            assert out.dtype == oracle.ours(visibility, "sdpa", scale=0.3)(*arguments).dtype == coarse
        return out.to(dtype)

    for name, tensor in run(attend, given).items():
        assert tensor.dtype == dtype
        assert worst(tensor, exact[name]) <= tolerance(yardstick[name], exact[name], largest_score(given, 0.3)), name
    assert used == ["pieces", "dense"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    given, visibility = inputs(num_rows=511), gist_of(511)
    attend = oracle.ours(visibility, "sdpa")

    def again(*leaves: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=use_reentrant)

    have, expected = run_backward(again, given), run_backward(attend, given)
    for name, tensor in have.items():
        assert torch.equal(tensor, expected[name]), name


def run_backward(attend: Callable[..., Tensor], given: Inputs) -> dict[str, Tensor]:
    """Like ``run``, but with ``backward()``, which reentrant checkpointing requires."""
    leaves = given.cast(given.q.dtype)
    attend(leaves.q, leaves.k, leaves.v, None).backward(leaves.upstream)
    return {f"d{name}": t.grad for name, t in zip("qkv", leaves[:3], strict=True) if t.grad is not None}
