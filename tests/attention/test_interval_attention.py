"""Compare the oracle of interval attention with a definition in plain Python, and everything else with the oracle.

The tolerance, in all tests of attention, is at most twice the error of plain attention in torch (dense mask, softmax,
matmul) in the same dtype, both against float64. See ``tolerance`` for its floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gisting import visibility as vis
from gisting.attention import IMPLEMENTATIONS, interval_attention
from gisting.errors import GistError
from gisting.visibility import Visibility
from tests.slow import slow

# flex and triton support only some of these calls; they are tested in other files.
every_torch_implementation = pytest.mark.parametrize("impl", ["auto", "reference", "sdpa"])
HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)]
DTYPES = [slow(torch.float64), torch.float32, torch.bfloat16, slow(torch.float16)]
HEAD_IDS = [f"H{heads}-G{groups}" for heads, groups in HEADS]


# -- inputs ------------------------------------------------------------------------------------------------------------


def masks(num_keys: int) -> Visibility:
    """Make four sequences: gist with left padding, negative with right padding, packed documents, only padding."""
    index = torch.arange(num_keys)
    is_gist = (index >= num_keys // 3) & (index < num_keys // 3 + 2)
    everything = torch.ones(num_keys, dtype=torch.bool)
    padding = torch.stack([index >= num_keys // 7, index < num_keys - num_keys // 5, everything, ~everything])
    documents = torch.stack([index * 0, index * 0, (index >= num_keys // 2).long(), index * 0])
    spans = is_gist.expand(4, -1)
    is_negative = torch.tensor([False, True, False, False])
    negative, gist = vis.negative(spans, padding), vis.gist(spans, padding, documents=documents)
    return Visibility(
        torch.where(is_negative[:, None], negative.first, gist.first),
        torch.where(is_negative[:, None], negative.end, gist.end),
    )


class Inputs(NamedTuple):
    """Leaves that require gradients, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    upstream: Tensor

    def cast(self, dtype: torch.dtype) -> Inputs:
        """Convert the numbers to another dtype, as new leaves."""
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in self[:4]]
        return Inputs(*leaves, self.upstream.to(dtype))

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]


def inputs(
    heads: int = 4,
    groups: int = 2,
    num_rows: int = 63,
    num_keys: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 4,
    bias_shape: tuple[int, int] | None = None,
    size: int = 12,
) -> Inputs:
    """Draw numbers that ``dtype`` represents exactly, so that all implementations get the same inputs."""
    num_keys = num_rows if num_keys is None else num_keys
    generator = torch.Generator().manual_seed(heads * 1000 + groups * 100 + num_rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Inputs(
        normal(batch, heads, num_rows, size).requires_grad_(),
        normal(batch, groups, num_keys, size).requires_grad_(),
        normal(batch, groups, num_keys, size + 3).requires_grad_(),
        None if bias_shape is None else normal(*bias_shape, num_rows, num_keys).requires_grad_(),
        normal(batch, heads, num_rows, size + 3),
    )


def run(attend: Callable[..., Tensor], given: Inputs) -> dict[str, Tensor]:
    """Return the output and the gradient of every input, by name."""
    out = attend(given.q, given.k, given.v, given.bias)
    grads = torch.autograd.grad(out, given.leaves, given.upstream)
    names = [f"d{name}" for name, t in zip("qkv", given[:3], strict=True)] + ["dbias"]
    return {"out": out.detach(), **dict(zip(names, grads, strict=False))}


def ours(visibility: Visibility, impl: str, **options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, bias: interval_attention(q, k, v, visibility, bias=bias, impl=impl, **options)


def plain(visibility: Visibility, scale: float | None = None) -> Callable[..., Tensor]:
    """Attend the plain way, with a dense mask, all in the dtype of q: the yardstick of the tolerance.

    The keys are in reverse order. Otherwise the float64 result would equal the oracle's to the bit, and the yardstick
    would be 0.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.flip(2).repeat_interleave(group, 1), v.flip(2).repeat_interleave(group, 1)
        seen = visibility.to_dense(q.shape[2])[:, None].flip(-1)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias.flip(-1)
        return scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~seen, 0.0) @ v

    return attend


# -- tolerance ---------------------------------------------------------------------------------------------------------


def worst(have: Tensor, exact: Tensor) -> float:
    return (have.double() - exact.double()).abs().max().item()


def largest_score(given: Inputs, scale: float | None = None) -> float:
    q, k, bias = given.q.detach().double(), given.k.detach().double(), given.bias
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores if bias is None else scores + bias.detach()).abs().max().item()


def tolerance(of_plain: Tensor, exact: Tensor, largest: float) -> float:
    """Allow twice the error of the plain implementation, and at least (4 + s) eps times the largest exact number.

    s is the largest score. The floor has two reasons. With one row or one key, the plain implementation can be exact by
    luck, while an equally good one rounds weights, products, the result and the sum over a group once each: 4 eps. And
    a backward that recomputes the weights as exp(score - logsumexp), like torch's fused one, turns the rounding error
    of the score, s eps, into one of the weight (in float64, measured against 80-bit arithmetic: 4 times the plain
    error).
    """
    return 2 * worst(of_plain, exact) + (4 + largest) * torch.finfo(of_plain.dtype).eps * exact.abs().max().item()


def exact_of(visibility: Visibility, given: Inputs, **options: Any) -> dict[str, Tensor]:
    return run(ours(visibility, "reference", **options), given.cast(torch.float64))


def assert_as_good_as_plain(visibility: Visibility, given: Inputs, impl: str, scale: float | None = None) -> None:
    exact = exact_of(visibility, given, scale=scale)
    yardstick = run(plain(visibility, scale), given)
    have = run(ours(visibility, impl, scale=scale), given)
    largest = largest_score(given, scale)
    assert have.keys() == exact.keys()
    for name, tensor in have.items():
        assert tensor.dtype == given.q.dtype, name
        assert tensor.shape == exact[name].shape, name
        error, bound = worst(tensor, exact[name]), tolerance(yardstick[name], exact[name], largest)
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"


# -- the oracle against a definition in plain Python -------------------------------------------------------------------


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute softmax(softcap(q k^T scale) + bias) v over the keys with first <= row < end, with loops over floats."""
    (batch, heads, num_rows, size), (groups, num_keys) = q.shape, k.shape[1:3]
    first, end = (t.expand(batch, -1).tolist() for t in (visibility.first, visibility.end))
    factor = size**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, num_rows, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for t in range(num_rows):
                row = t if num_rows > num_keys else t + num_keys - num_rows
                weights = {}
                for j in range(num_keys):
                    if not first[b][j] <= row < end[b][j]:
                        continue
                    products = zip(q[b, h, t].tolist(), k[b, g, j].tolist(), strict=True)
                    score = factor * sum(x * y for x, y in products)
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if bias is not None:
                        score += bias[b % bias.shape[0], h % bias.shape[1], t, j].item()
                    weights[j] = math.exp(score)
                total = sum(weights.values()) + (0 if sinks is None else math.exp(sinks[h].item()))
                for j, weight in weights.items():
                    out[b, h, t] += weight / total * v[b, g, j]
    return out


BY_HAND: list[Any] = [
    pytest.param({"heads": 4, "groups": 2, "num_rows": 9}, {}, id="grouped-heads"),
    pytest.param({"heads": 1, "groups": 1, "num_rows": 1}, {}, id="one-row"),
    pytest.param({"heads": 4, "groups": 1, "num_rows": 4, "num_keys": 9}, {}, id="prefix-keys"),
    pytest.param({"heads": 2, "groups": 2, "num_rows": 12, "num_keys": 7}, {"cross": True}, id="more-rows-than-keys"),
    pytest.param({"heads": 2, "groups": 1, "num_rows": 9, "bias_shape": (4, 2)}, {}, id="bias"),
    pytest.param({"heads": 2, "groups": 1, "num_rows": 9, "bias_shape": (1, 1)}, {}, id="bias-for-all"),
    pytest.param({"heads": 2, "groups": 1, "num_rows": 9}, {"scale": 1.7}, id="scale"),
    pytest.param({"heads": 2, "groups": 1, "num_rows": 9}, {"softcap": 0.9}, id="softcap"),
    pytest.param(
        {"heads": 2, "groups": 1, "num_rows": 9, "bias_shape": (1, 2)},
        {"softcap": 0.9, "scale": 1.7},
        id="softcap-before-bias",
    ),
]


@pytest.mark.parametrize(("shape", "options"), BY_HAND)
def test_the_oracle_is_the_definition_by_hand(shape: dict[str, Any], options: dict[str, Any]) -> None:
    given = inputs(**shape, dtype=torch.float64, size=3)
    options = dict(options)
    visibility = masks(given.k.shape[2])
    if options.pop("cross", False):
        visibility = visibility.for_cross_attention()
    have = interval_attention(*given[:3], visibility, bias=given.bias, impl="reference", **options)
    slow = by_hand(*given[:3], visibility, bias=given.bias, **options)
    # Both are float64 sums of at most a dozen terms of size 1, in different orders.
    torch.testing.assert_close(have, slow, rtol=0, atol=100 * torch.finfo(torch.float64).eps)


def test_the_definition_by_hand_notices_an_interval_that_is_off_by_one() -> None:
    given, visibility = inputs(2, 1, 9, dtype=torch.float64, size=3), masks(9)
    have = interval_attention(*given[:3], visibility, impl="reference")
    for off in (Visibility(visibility.first, visibility.end + 1), Visibility(visibility.first + 1, visibility.end)):
        assert worst(by_hand(*given[:3], off), have) > 1e-3


# -- everything else against the oracle --------------------------------------------------------------------------------


# "auto" equals one of the others to the bit (test_auto_is_...), so most tests leave it out.
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 7, 63, slow(111)])
@pytest.mark.parametrize(("heads", "groups"), HEADS, ids=HEAD_IDS)
def test_outputs_and_gradients(impl: str, dtype: torch.dtype, num_rows: int, heads: int, groups: int) -> None:
    assert_as_good_as_plain(masks(num_rows), inputs(heads, groups, num_rows, dtype=dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [7, 63])
@pytest.mark.parametrize("bias_shape", [(4, 6), (1, 6), (4, 1), (1, 1)], ids="B{0[0]}-H{0[1]}".format)
def test_outputs_and_gradients_with_bias(dtype: torch.dtype, num_rows: int, bias_shape: tuple[int, int]) -> None:
    assert_as_good_as_plain(masks(num_rows), inputs(6, 2, num_rows, dtype=dtype, bias_shape=bias_shape), "sdpa")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_shape", [None, (1, 4)], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 7), (1, 63), (7, 111), (63, 64), (62, 63)])
def test_prefix_keys(dtype: torch.dtype, bias_shape: tuple[int, int] | None, num_rows: int, num_keys: int) -> None:
    given = inputs(4, 2, num_rows, num_keys, dtype, bias_shape=bias_shape)
    assert_as_good_as_plain(masks(num_keys), given, "sdpa")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_shape", [None, (1, 4)], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 7), (7, 7), (63, 7), (111, 63)])
def test_a_decoder_reads_an_encoder(
    dtype: torch.dtype, bias_shape: tuple[int, int] | None, num_rows: int, num_keys: int
) -> None:
    """In cross-attention, also with T > K, every row sees the survivors."""
    visibility = masks(num_keys).for_cross_attention()
    assert_as_good_as_plain(visibility, inputs(4, 2, num_rows, num_keys, dtype, bias_shape=bias_shape), "sdpa")


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("scale", [1.0, 0.03, -0.5])
def test_scale(impl: str, scale: float) -> None:
    assert_as_good_as_plain(masks(63), inputs(), impl, scale=scale)


@every_torch_implementation
def test_one_visibility_serves_every_sequence(impl: str) -> None:
    given, all_four = inputs(bias_shape=(1, 4)), masks(63)
    one = Visibility(all_four.first[:1], all_four.end[:1])
    same = Visibility(all_four.first[:1].expand(4, -1), all_four.end[:1].expand(4, -1))
    have, expected = run(ours(one, impl), given), run(ours(same, impl), given)
    for name, tensor in have.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@every_torch_implementation
def test_strided_inputs(impl: str) -> None:
    """Models pass heads transposed out of a projection, and keys sliced from a longer cache."""
    given, visibility = inputs(4, 2, 7, 9), masks(9)
    q = given.q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (torch.cat([t.detach(), torch.full_like(t, 1e4)], 2)[:, :, :9] for t in (given.k, given.v))
    have = interval_attention(q, k, v, visibility, impl=impl)
    expected = interval_attention(*given[:3], visibility, impl=impl)
    assert worst(have, expected) <= 4 * torch.finfo(torch.float32).eps * expected.abs().max().item()


@pytest.mark.parametrize("bias_shape", [None, (4, 4), (1, 1)], ids=["no-bias", "bias", "bias-for-all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "num_keys"), [(63, 63), (1, 7), (7, 111), (63, 7)])
@pytest.mark.parametrize(
    ("options", "chosen"), [({}, "sdpa"), ({"softcap": 2.0}, "reference")], ids=["plain", "softcap"]
)
def test_auto_is_sdpa_without_softcap_and_reference_with(
    options: dict[str, float],
    chosen: str,
    num_rows: int,
    num_keys: int,
    dtype: torch.dtype,
    bias_shape: tuple[int, int] | None,
) -> None:
    given, visibility = inputs(4, 2, num_rows, num_keys, dtype, bias_shape=bias_shape), masks(num_keys)
    have, expected = run(ours(visibility, "auto", **options), given), run(ours(visibility, chosen, **options), given)
    for name, tensor in have.items():
        assert torch.equal(tensor, expected[name]), name


def test_softcap_bounds_the_scores() -> None:
    """A cap far above all scores changes nothing; with a cap near 0, all visible keys have equal weights."""
    given, visibility = inputs(2, 1, 9, dtype=torch.float64), masks(9)
    uncapped = interval_attention(*given[:3], visibility, impl="reference")
    loose = interval_attention(*given[:3], visibility, softcap=1e6)
    torch.testing.assert_close(loose, uncapped, rtol=0, atol=1e-9)  # tanh(x) - x is x^3 / 3: (10 / 1e6)^3 * 1e6 is 1e-9
    tight = interval_attention(*given[:3], visibility, softcap=1e-9)
    seen = visibility.to_dense()[:, None].double()
    mean = seen / seen.sum(-1, keepdim=True).clamp(min=1) @ given.v
    torch.testing.assert_close(tight, mean.expand_as(tight), rtol=0, atol=1e-7)


# -- the tolerance can fail --------------------------------------------------------------------------------------------


def planted(visibility: Visibility, fault: str) -> Visibility:
    first, end = visibility.first, visibility.end
    index = torch.arange(visibility.num_keys, dtype=torch.int32)
    if fault == "end-plus-one":
        return Visibility(first, end + 1)
    if fault == "end-minus-one":
        return Visibility(first, end - 1)
    if fault == "first-plus-one":
        return Visibility(first + 1, end)
    if fault == "sees-the-future":
        return Visibility(first - 1, end)
    return Visibility(first, torch.where(end > first, vis.FOREVER, index))  # the prompt stays visible


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fault", ["end-plus-one", "end-minus-one", "first-plus-one", "sees-the-future", "nothing-is-hidden"]
)
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_planted_bug_exceeds_the_tolerance(impl: str, fault: str, dtype: torch.dtype) -> None:
    given, visibility = inputs(dtype=dtype, bias_shape=(1, 4)), masks(63)
    exact, yardstick = exact_of(visibility, given), run(plain(visibility), given)
    wrong, largest = run(ours(planted(visibility, fault), impl), given), largest_score(given)
    for name, tensor in wrong.items():
        assert worst(tensor, exact[name]) > 2 * tolerance(yardstick[name], exact[name], largest), name


# -- rows that see no key, keys that no row sees -----------------------------------------------------------------------


@pytest.mark.parametrize("bias_shape", [None, (1, 4), (4, 4)], ids=["no-bias", "bias-for-all", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"dropout": 0.4}], ids=["plain", "softcap", "dropout"])
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_what_is_not_seen_is_exactly_zero(
    impl: str, options: dict[str, float], dtype: torch.dtype, bias_shape: tuple[int, int] | None
) -> None:
    if impl == "sdpa" and "softcap" in options:
        pytest.skip("sdpa has no softcap")
    given, visibility = inputs(dtype=dtype, bias_shape=bias_shape), masks(63)
    have = run(ours(visibility, impl, **options), given)
    seen = visibility.to_dense()
    is_empty_row, is_unseen_key = ~seen.any(2), ~seen.any(1)
    assert is_empty_row[0, 0]  # left padding
    assert is_empty_row[3].all()  # a sequence of nothing but padding
    assert is_unseen_key[1, -1]  # right padding
    for name, tensor in have.items():
        assert tensor.isfinite().all(), name
    for name, rows in (("out", is_empty_row), ("dq", is_empty_row), ("dk", is_unseen_key), ("dv", is_unseen_key)):
        assert not have[name].transpose(1, 2)[rows].any(), name
        if not options:
            assert have[name].transpose(1, 2)[~rows].any(-1).any(-1).all() or name in ("dq", "dk"), name
    if bias_shape is not None:
        summed = seen if bias_shape[0] == 4 else seen.any(0, keepdim=True)
        assert not have["dbias"].masked_fill(summed[:, None], 0).any()
        assert have["dbias"].any()


@every_torch_implementation
@pytest.mark.parametrize("bias_shape", [None, (1, 1)], ids=["no-bias", "bias"])
def test_a_batch_that_sees_nothing_at_all(impl: str, bias_shape: tuple[int, int] | None) -> None:
    given = inputs(2, 1, 7, batch=1, bias_shape=bias_shape)
    nothing = vis.causal(torch.zeros(1, 7))
    for name, tensor in run(ours(nothing, impl), given).items():
        assert torch.equal(tensor, torch.zeros_like(tensor)), name


@every_torch_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(impl: str, dtype: torch.dtype) -> None:
    """With scores near 1e4 and a bias of -1e4, as in additive masks, the softmax is one-hot, not NaN."""
    given = inputs(2, 1, 63, dtype=dtype, bias_shape=(1, 1))
    large = given._replace(
        q=(given.q.detach() * 100).requires_grad_(),
        k=(given.k.detach() * 30).requires_grad_(),
        bias=(given.bias.detach() - 1e4).requires_grad_(),
    )
    for name, tensor in run(ours(masks(63), impl), large).items():
        assert tensor.isfinite().all(), name


# -- dropout -----------------------------------------------------------------------------------------------------------


@every_torch_implementation
def test_dropout_of_0_is_no_dropout(impl: str) -> None:
    given, visibility = inputs(), masks(63)
    without = run(ours(visibility, impl), given)
    for name, tensor in run(ours(visibility, impl, dropout=0.0), given).items():
        assert torch.equal(tensor, without[name]), name


@pytest.mark.parametrize("dropout", [slow(0.1), 0.5])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 49).view(1, 1, 7, 7)], ids=["no-bias", "bias"])
@every_torch_implementation
def test_dropout_keeps_the_mean_and_the_empty_rows(impl: str, bias: Tensor | None, dropout: float) -> None:
    """The mean of 6,000 draws is within six standard errors; by chance, one element in 10^9 is not."""
    draws, visibility = 6000, Visibility(*(t[:1] for t in (masks(7).first, masks(7).end)))
    q, k, v = (t[:1].detach() for t in inputs(2, 1, 7)[:3])
    many = [t.expand(draws, -1, -1, -1) for t in (q, k, v)]
    dropped = interval_attention(*many, visibility, bias=bias, dropout=dropout, impl=impl)
    expected = interval_attention(q, k, v, visibility, bias=bias, impl=impl)[0]
    is_empty_row = ~visibility.to_dense()[0].any(-1)
    assert is_empty_row.sum() == 1
    assert not dropped[:, :, is_empty_row].any()
    spread = dropped.std(0)[:, ~is_empty_row]
    assert (spread > 0).all()
    error = (dropped.mean(0) - expected)[:, ~is_empty_row].abs()
    assert (error <= 6 * spread / math.sqrt(draws)).all()


@every_torch_implementation
def test_dropout_drops_the_stated_share_of_the_weights(impl: str) -> None:
    """With one key and value 1, the output is 1 / (1 - p) where the weight was kept, and 0 elsewhere."""
    one = torch.ones(20_000, 1, 1, 1)
    out = interval_attention(one, one, one, vis.causal(torch.ones(1, 1)), dropout=0.25, impl=impl).flatten()
    assert set(out.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # Standard deviation of a share: sqrt(0.25 * 0.75 / 20,000) = 0.003
    assert (out == 0).double().mean().item() == pytest.approx(0.25, abs=6 * 0.0031)


@every_torch_implementation
def test_dropout_follows_the_seed_of_torch(impl: str) -> None:
    given, visibility = inputs(), masks(63)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return interval_attention(*given[:3], visibility, dropout=0.3, impl=impl)

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))


# -- torch's own machinery ---------------------------------------------------------------------------------------------


@every_torch_implementation
@pytest.mark.parametrize("bias_shape", [None, (1, 2)], ids=["no-bias", "bias"])
def test_gradients_are_those_of_the_function(impl: str, bias_shape: tuple[int, int] | None) -> None:
    given = inputs(2, 1, 5, 6, torch.float64, batch=2, size=2, bias_shape=bias_shape)
    visibility = Visibility(*(t[:2] for t in (masks(6).first, masks(6).end)))

    def attend(*leaves: Tensor) -> Tensor:
        return ours(visibility, impl)(*leaves[:3], leaves[3] if len(leaves) > 3 else None)

    assert torch.autograd.gradcheck(attend, given.leaves, fast_mode=False)


def test_gradients_of_the_softcap_are_those_of_the_function() -> None:
    given = inputs(2, 1, 5, dtype=torch.float64, size=2)
    visibility = masks(5)
    assert torch.autograd.gradcheck(lambda *leaves: interval_attention(*leaves, visibility, softcap=0.7), given.leaves)


@every_torch_implementation
def test_torch_func(impl: str) -> None:
    """``torch.func.grad``, and ``vmap`` over the values, agree with autograd."""
    given, visibility = inputs(2, 1, 7, dtype=torch.float64), masks(7)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (ours(visibility, impl)(q, k, v, None) * given.upstream).sum()

    grads = torch.func.grad(loss, argnums=(0, 1, 2))(*(t.detach() for t in given[:3]))
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        torch.testing.assert_close(grad, run(ours(visibility, impl), given)[name], rtol=1e-12, atol=1e-12)
    scaled = torch.stack([given.v.detach(), 2 * given.v.detach()])
    both = torch.func.vmap(lambda v: ours(visibility, impl)(given.q.detach(), given.k.detach(), v, None))(scaled)
    torch.testing.assert_close(both[1], 2 * both[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias_shape", [slow(None, id="no-bias"), pytest.param((1, 4), id="bias")])
@pytest.mark.parametrize("impl", [slow("auto"), slow("reference"), "sdpa"])
def test_compiles_as_one_graph(impl: str, bias_shape: tuple[int, int] | None) -> None:
    """Forward and backward run through AOT autograd, with intervals read from the mask tensor, as inside a model."""
    given, visibility = inputs(4, 2, 7, bias_shape=bias_shape), masks(7)

    def attend(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return interval_attention(q, k, v, Visibility.from_attention_mask(mask), bias=bias, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    mask = visibility.as_attention_mask()
    have = run(lambda *leaves: compiled(mask, *leaves), given)
    expected = run(ours(visibility, impl), given)
    for name, tensor in have.items():
        # The same float32 operations in another order.
        assert (
            worst(tensor, expected[name]) <= 8 * torch.finfo(torch.float32).eps * expected[name].abs().max().item()
        ), name


@every_torch_implementation
def test_torch_is_not_asked_whether_a_cpu_has_autocast(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile of torch 2.11, the oldest that is supported, cannot trace the question."""

    def asked(device_type: str) -> bool:
        raise AssertionError(device_type)

    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    given = inputs(4, 2, 7)
    assert ours(masks(7), impl)(given.q, given.k, given.v, None).shape[:3] == given.q.shape[:3]


@pytest.mark.parametrize("builder", [vis.gist, slow(vis.positive), slow(vis.negative), slow(vis.encoder_gist)])
def test_masks_are_built_inside_the_graph(builder: Callable[..., Visibility]) -> None:
    """A compiled training step may make the intervals itself."""
    is_gist = torch.arange(14).view(2, 7) % 7 == 3
    torch.compiler.reset()
    compiled = torch.compile(lambda t: builder(t).as_attention_mask(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(is_gist), builder(is_gist).as_attention_mask())


AUTOCAST = [
    pytest.param("reference", {}, id="reference"),
    pytest.param("reference", {"softcap": 1e6}, id="reference-softcap"),
    pytest.param("sdpa", {}, id="sdpa"),
]


@pytest.mark.parametrize("autocast", [torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("bias_shape", [slow(None, id="no-bias"), pytest.param((1, 4), id="bias")])
@pytest.mark.parametrize(("impl", "options"), AUTOCAST)
def test_under_autocast(
    impl: str,
    options: dict[str, float],
    bias_shape: tuple[int, int] | None,
    dtype: torch.dtype,
    autocast: torch.dtype,
) -> None:
    """Under a Trainer with bf16=True or fp16=True, it is as good as plain attention in the coarser dtype."""
    given, visibility = inputs(4, 2, 7, dtype=torch.bfloat16, bias_shape=bias_shape), masks(7)
    coarse = torch.bfloat16 if torch.bfloat16 in (dtype, autocast) else autocast
    exact, yardstick = exact_of(visibility, given), run(plain(visibility), given.cast(coarse))
    given = given.cast(dtype)

    def attend(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", dtype=autocast):
            return ours(visibility, impl, **options)(*arguments).to(dtype)

    for name, tensor in run(attend, given).items():
        assert worst(tensor, exact[name]) <= tolerance(yardstick[name], exact[name], largest_score(given)), name


@every_torch_implementation
def test_runs_on_the_meta_device(impl: str) -> None:
    q, kv = torch.empty(2, 4, 7, 8, device="meta"), torch.empty(2, 2, 9, 8, device="meta")
    visibility = vis.gist(torch.zeros(2, 9, dtype=torch.bool, device="meta"))
    assert interval_attention(q, kv, kv, visibility, impl=impl).shape == (2, 4, 7, 8)


# -- errors ------------------------------------------------------------------------------------------------------------


def call(**changes: Any) -> Tensor:
    """Make a valid call with B 2, H 4, G 2, T 5, K 6, D 8, except for the changed arguments."""
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 6, 8),
        "v": torch.zeros(2, 2, 6, 8),
        "visibility": vis.causal(torch.ones(2, 6)),
    }
    return interval_attention(**{**arguments, **changes})


ERRORS = [
    pytest.param(
        {"q": torch.zeros(4, 5, 8)},
        "q must have 4 dimensions (batch, heads, rows, head size), got (4, 5, 8)",
        id="q-dimensions",
    ),
    pytest.param(
        {"k": torch.zeros(2, 6, 8)},
        "k must have 4 dimensions (batch, heads, rows, head size), got (2, 6, 8)",
        id="k-dimensions",
    ),
    pytest.param(
        {"v": torch.zeros(1, 2, 2, 6, 8)},
        "v must have 4 dimensions (batch, heads, rows, head size), got (1, 2, 2, 6, 8)",
        id="v-dimensions",
    ),
    pytest.param(
        {"q": torch.zeros(2, 4, 5, 8, dtype=torch.int64)},
        "q must be floating point, got torch.int64",
        id="q-integer",
    ),
    pytest.param(
        {"k": torch.zeros(2, 2, 6, 8, dtype=torch.bfloat16)},
        "k must have the dtype of q, torch.float32, got torch.bfloat16; cast one of them",
        id="k-dtype",
    ),
    pytest.param(
        {"v": torch.zeros(2, 2, 6, 8, dtype=torch.float64)},
        "v must have the dtype of q, torch.float32, got torch.float64; cast one of them",
        id="v-dtype",
    ),
    pytest.param(
        {"k": torch.zeros(2, 2, 6, 8, device="meta")},
        "k must be on the device of q, cpu, got meta; move one of them",
        id="k-device",
    ),
    pytest.param(
        {"v": torch.zeros(2, 2, 6, 8, device="meta")},
        "v must be on the device of q, cpu, got meta; move one of them",
        id="v-device",
    ),
    pytest.param(
        {"k": torch.zeros(3, 2, 6, 8)}, "k must have the batch size of q, 2, got (3, 2, 6, 8)", id="k-batch-size"
    ),
    pytest.param(
        {"v": torch.zeros(1, 2, 6, 8)}, "v must have the batch size of q, 2, got (1, 2, 6, 8)", id="v-batch-size"
    ),
    pytest.param(
        {"v": torch.zeros(2, 4, 6, 8)},
        "k and v must agree in batch, heads and length, got (2, 2, 6, 8) and (2, 4, 6, 8)",
        id="v-heads",
    ),
    pytest.param(
        {"v": torch.zeros(2, 2, 7, 8)},
        "k and v must agree in batch, heads and length, got (2, 2, 6, 8) and (2, 2, 7, 8)",
        id="v-length",
    ),
    pytest.param(
        {"k": torch.zeros(2, 2, 6, 4)}, "k must have the head size of q, 8, got (2, 2, 6, 4)", id="k-head-size"
    ),
    pytest.param(
        {"k": torch.zeros(2, 3, 6, 8), "v": torch.zeros(2, 3, 6, 8)},
        "q must have a multiple of k's heads, got 4 and 3 heads",
        id="heads-no-multiple",
    ),
    pytest.param(
        {"k": torch.zeros(2, 0, 6, 8), "v": torch.zeros(2, 0, 6, 8)},
        "q must have a multiple of k's heads, got 4 and 0 heads",
        id="no-heads",
    ),
    pytest.param(
        {"visibility": vis.causal(torch.ones(2, 5))},
        "visibility must be for 2 sequences (or 1) of 6 keys, got 2 sequences of 5 keys",
        id="visibility-keys",
    ),
    pytest.param(
        {"visibility": vis.causal(torch.ones(3, 6))},
        "visibility must be for 2 sequences (or 1) of 6 keys, got 3 sequences of 6 keys",
        id="visibility-batch-size",
    ),
    pytest.param(
        {"visibility": vis.causal(torch.ones(2, 6)).to("meta")},
        "visibility must be on the device of q, cpu, got meta; use .to(q.device)",
        id="visibility-device",
    ),
    pytest.param(
        {"bias": torch.zeros(4, 5, 6)},
        "bias must have shape (2, 4, 5, 6), or 1 for the batch or the heads, got (4, 5, 6)",
        id="bias-dimensions",
    ),
    pytest.param(
        {"bias": torch.zeros(1, 1, 6, 6)},
        "bias must have shape (2, 4, 5, 6), or 1 for the batch or the heads, got (1, 1, 6, 6)",
        id="bias-rows",
    ),
    pytest.param(
        {"bias": torch.zeros(1, 1, 5, 1)},
        "bias must have shape (2, 4, 5, 6), or 1 for the batch or the heads, got (1, 1, 5, 1)",
        id="bias-keys",
    ),
    pytest.param(
        {"bias": torch.zeros(1, 2, 5, 6)},
        "bias must have shape (2, 4, 5, 6), or 1 for the batch or the heads, got (1, 2, 5, 6)",
        id="bias-heads",
    ),
    pytest.param(
        {"bias": torch.zeros(1, 1, 5, 6, device="meta")},
        "bias must be on the device of q, cpu, got meta",
        id="bias-device",
    ),
    pytest.param({"softcap": 0.0}, "softcap must be positive, got 0.0", id="softcap-0"),
    pytest.param({"softcap": -1.0}, "softcap must be positive, got -1.0", id="softcap-negative"),
    pytest.param({"softcap": math.nan}, "softcap must be positive, got nan", id="softcap-nan"),
    pytest.param({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0", id="dropout-1"),
    pytest.param({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1", id="dropout-negative"),
    pytest.param({"dropout": math.nan}, "dropout must be in [0, 1), got nan", id="dropout-nan"),
    pytest.param(
        {"impl": "flash"}, f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got 'flash'", id="impl-unknown"
    ),
    pytest.param(
        {"impl": "sdpa", "softcap": 2.0},
        "impl='sdpa' supports no softcap; use impl='auto' or impl='reference'",
        id="sdpa-softcap",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GistError) as caught:
        call(**changes)
    assert str(caught.value) == message


def test_the_unchanged_call_is_valid() -> None:
    assert call().shape == (2, 4, 5, 8)


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(TypeError, match="droput"):
        call(droput=0.5)
