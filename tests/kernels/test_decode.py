"""Test decoding against a float64 oracle that is written out in this file.

Tolerance: see ``conftest.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")

import gisting_kernels as kernels
from gisting import visibility as vis
from gisting.attention import interval_attention
from gisting.visibility import FOREVER, Visibility
from gisting_kernels.decode import run_decode
from tests.attention.test_interval_attention import tolerance, worst
from tests.kernels.conftest import DEVICE, IS_CUDA, each_dtype
from tests.slow import slow

pytestmark = [
    pytest.mark.usefixtures("device"),
    # exp2 of a masked score, in the interpreter's NumPy
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw numbers that ``dtype`` represents exactly."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def make(
    num_rows: int = 1,
    num_keys: int = 57,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 3,
    heads: int = 4,
    groups: int = 2,
    size: int = 16,
) -> dict[str, Any]:
    """Make the arguments of a call: causal attention after left padding of 0, 4 and 8 keys."""
    first = torch.arange(num_keys, dtype=torch.int32).expand(batch, -1)
    end = torch.where(first >= 4 * torch.arange(batch)[:, None], FOREVER, first)
    return {
        "q": normal(batch, heads, num_rows, size, dtype=dtype),
        "k": normal(batch, groups, num_keys, size, dtype=dtype),
        "v": normal(batch, groups, num_keys, size, dtype=dtype) + 1,
        "first": first.contiguous().to(DEVICE),
        "end": end.to(DEVICE),
    }


def by_hand(given: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, float]:
    """Compute attention under a dense mask, all in ``dtype``; also return the largest score."""
    q, k, v = (given[name].to(dtype) for name in "qkv")
    batch, heads, num_rows, size = q.shape
    num_keys = k.shape[2]
    start = max(num_keys - num_rows, 0)
    rows = torch.arange(start, start + num_rows, device=DEVICE)[None, :, None]
    seen = (rows >= given["first"][:, None]) & (rows < given["end"][:, None])
    seen = seen.expand(batch, num_rows, num_keys)
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scale = given.get("scale")
    scores = q @ k.transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    largest = scores.abs().max().item() if scores.numel() else 0.0
    if given.get("softcap") is not None:
        scores = given["softcap"] * torch.tanh(scores / given["softcap"])
    seen = seen[:, None]
    weights = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1).masked_fill(~seen, 0.0)
    return weights @ v, largest


def assert_right(have: Tensor, given: dict[str, Any]) -> None:
    exact, largest = by_hand(given, torch.float64)
    yardstick, _ = by_hand(given, given["q"].dtype)
    assert have.dtype == given["q"].dtype
    assert have.shape == given["q"].shape
    error, bound = worst(have, exact), tolerance(yardstick, exact, largest)
    assert error <= bound, f"error {error:.2e}, allowed {bound:.2e}"


def check(given: dict[str, Any]) -> None:
    assert_right(kernels.decode_attention(**given), given)


# -- shapes ------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("num_keys", [slow(1), 21, slow(64), slow(65)])
def test_rows_and_keys(num_keys: int, num_rows: int, dtype: torch.dtype) -> None:
    check(make(num_rows, num_keys, dtype))


@pytest.mark.parametrize(
    ("heads", "groups"),
    [
        slow(1, 1, id="1-1"),
        slow(4, 4, id="4-4"),
        slow(4, 2, id="4-2"),
        pytest.param(6, 2, id="6-2"),
        slow(8, 1, id="8-1"),
    ],
)
def test_grouped_heads(heads: int, groups: int) -> None:
    check(make(2, heads=heads, groups=groups))


@pytest.mark.parametrize("size", [slow(1), slow(8), 20, slow(64), slow(96), slow(128)])
def test_head_sizes(size: int) -> None:
    check(make(2, size=size))


@pytest.mark.parametrize("size", [20, slow(256)])
def test_head_sizes_in_float16(size: int) -> None:
    check(make(2, size=size, dtype=torch.float16))


def test_more_packed_rows_than_a_tile_holds() -> None:
    """5 rows of 15 heads for each key head are 75 packed rows."""
    check(make(5, 19, batch=2, heads=30, groups=2))


def test_more_rows_than_keys() -> None:
    """T > K: rows count from 0."""
    given = make(5, 3)
    given["first"], given["end"] = (t.to(DEVICE) for t in (torch.tensor([[0, 1, 4]]), torch.tensor([[9, 3, 9]])))
    check(given)


def test_one_mask_serves_every_sequence() -> None:
    given = make(3)
    given["first"], given["end"] = given["first"][1:2], given["end"][1:2]
    check(given)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_intervals_of_any_integer_type(dtype: torch.dtype) -> None:
    given = make(3)
    expected = kernels.decode_attention(**given)
    limit = 30_000 if dtype == torch.int16 else FOREVER
    other = {name: given[name].clamp(max=limit).to(dtype) for name in ("first", "end")}
    assert torch.equal(kernels.decode_attention(**{**given, **other}), expected)


@pytest.mark.parametrize(("num_rows", "batch"), [(0, 2), (1, 0)], ids=["no-rows", "no-sequences"])
def test_nothing_to_do(num_rows: int, batch: int) -> None:
    given = make(num_rows, 7, batch=batch)
    assert kernels.decode_attention(**given).shape == given["q"].shape


@pytest.mark.skipif(IS_CUDA, reason="on a card bfloat16 is in every test")
def test_bfloat16_under_the_interpreter() -> None:
    """The operator computes in float32 there, so only the rounding of the result differs."""
    check(make(2, dtype=torch.bfloat16))


# -- scale and softcap -------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    "options",
    [slow({"scale": 1.0}), slow({"softcap": 0.5}), {"softcap": 3.0, "scale": 0.9}, slow({"softcap": 50.0})],
    ids=str,
)
def test_scale_and_softcap(options: dict[str, float], dtype: torch.dtype) -> None:
    check({**make(2, dtype=dtype), **options})


def test_large_scores_do_not_overflow() -> None:
    """With scores near 1e4, the softmax is one-hot in each split and over the splits."""
    given = make(2)
    given["q"], given["k"] = given["q"] * 100, given["k"] * 30
    out = kernels.decode_attention(**given)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), by_hand(given, torch.float64)[0], rtol=0, atol=1e-2)


# -- rows that see nothing ---------------------------------------------------------------------------------------------


def test_rows_that_see_nothing_are_zero() -> None:
    """A sequence of nothing but padding, and rows within the padding; values of 1e4 at masked keys change nothing."""
    given = make(3, 10)
    padding = torch.arange(10)[None] >= torch.tensor([[0], [9], [10]])
    visibility = vis.causal(padding).to(str(DEVICE))
    given["first"], given["end"] = visibility.first, visibility.end
    for name in "kv":
        given[name].transpose(1, 2)[~padding.to(DEVICE)] = 1e4
    out = kernels.decode_attention(**given)
    assert not out[2].any()
    assert not out[1, :, :2].any()
    assert out[1, :, 2].any()
    assert_right(out, given)


def test_no_keys_at_all() -> None:
    given = make(2, 0)
    assert torch.equal(kernels.decode_attention(**given), torch.zeros_like(given["q"]))


# -- splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processors", [slow(1), slow(2), slow(8), 1000])
def test_the_number_of_splits_changes_only_the_rounding(num_processors: int) -> None:
    """The three sequences see 700 keys, 30 and none."""
    given = make(2, 700, batch=3, heads=2, groups=1)
    first = torch.arange(700).repeat(3, 1)
    end = torch.full_like(first, FOREVER)
    end[1, 30:], end[2] = 0, 0
    given["first"], given["end"] = first.int().to(DEVICE), end.int().to(DEVICE)
    assert_right(run_decode(*given.values(), 16**-0.5, 0.0, "ieee", num_processors), given)


def test_more_key_tiles_than_splits() -> None:
    """There are at most 64 splits on any card; 5,000 keys are more tiles than that."""
    given = make(1, 5000, batch=1, heads=1, groups=1, size=8)
    assert_right(run_decode(*given.values(), 8**-0.5, 0.0, "ieee", 10_000), given)


def test_equal_runs_give_equal_bits() -> None:
    given = make(2)
    assert torch.equal(kernels.decode_attention(**given), kernels.decode_attention(**given))


def test_a_sequence_does_not_depend_on_the_others() -> None:
    """Equal up to rounding, because the number of splits depends on the batch."""
    given = make(2)
    together = kernels.decode_attention(**given)
    for b in range(3):
        alone = {name: t[b : b + 1] for name, t in given.items()}
        torch.testing.assert_close(kernels.decode_attention(**alone), together[b : b + 1], rtol=0, atol=2e-6)


# -- memory ------------------------------------------------------------------------------------------------------------


def transposed(tensor: Tensor) -> Tensor:
    """Lay the tensor out as (B, T, H, D)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def out_of_a_longer_cache(tensor: Tensor) -> Tensor:
    """Return the first keys of a longer cache; reading the rest would change the result."""
    large = torch.full((*tensor.shape[:2], tensor.shape[2] + 9, tensor.shape[3]), 1e4, device=DEVICE)
    large[:, :, : tensor.shape[2]] = tensor
    return large[:, :, : tensor.shape[2]]


def last_dimension_strided(tensor: Tensor) -> Tensor:
    """Lay the tensor out as (B, H, D, T)."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("layout", [transposed, out_of_a_longer_cache, last_dimension_strided])
def test_strides(layout: Callable[[Tensor], Tensor]) -> None:
    given = make(3)
    other = {name: t if name in ("first", "end") else layout(t) for name, t in given.items()}
    assert other["k"].stride() != given["k"].stride()
    assert torch.equal(kernels.decode_attention(**other), kernels.decode_attention(**given))


def test_a_shared_mask_that_is_a_view() -> None:
    """``Visibility.from_attention_mask`` makes such views of one tensor."""
    given = make(3)
    stacked = torch.stack([given["first"], given["end"]], 1)
    other = {**given, "first": stacked[:, 0], "end": stacked[:, 1]}
    assert not other["first"].is_contiguous()
    assert torch.equal(kernels.decode_attention(**other), kernels.decode_attention(**given))


@pytest.mark.parametrize("num_keys", [0, 21])
def test_every_element_of_new_memory_is_written(num_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(3, num_keys)
    expected = kernels.decode_attention(**given)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args: Any, real: Callable[..., Tensor] = real, **kwargs: Any) -> Tensor:
            tensor = real(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)
    have = kernels.decode_attention(**given)
    monkeypatch.undo()
    assert torch.equal(have, expected)


# -- no gradients ------------------------------------------------------------------------------------------------------


def test_it_has_no_gradient_and_says_so() -> None:
    given = make(1)
    given["q"].requires_grad_()
    out = kernels.decode_attention(**given)
    with pytest.raises(RuntimeError, match="decode_attention"):
        out.sum().backward()


# -- through gisting.attention -----------------------------------------------------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Tensor]:
    """Record the queries that a function of the package is called with."""
    calls: list[Tensor] = []
    real = getattr(kernels, name)

    def called(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(q)
        return real(q, *args, **kwargs)

    monkeypatch.setattr(kernels, name, called)
    return calls


@pytest.mark.parametrize("num_rows", [1, slow(5), 8])
def test_a_few_rows_without_gradients_are_decoded(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(num_rows, 37)
    visibility = Visibility(given["first"], given["end"])
    decoded, planned = spy(monkeypatch, "decode_attention"), spy(monkeypatch, "interval_attention")
    q, k, v = (given[name] for name in "qkv")
    out = interval_attention(q, k, v, visibility, impl="triton", scale=0.4, softcap=2.0)
    assert (len(decoded), len(planned)) == (1, 0)
    with_gradient = interval_attention(
        q.clone().requires_grad_(), k, v, visibility, impl="triton", scale=0.4, softcap=2.0
    )
    assert (len(decoded), len(planned)) == (1, 1)
    torch.testing.assert_close(out, with_gradient.detach(), rtol=0, atol=2e-6)
    assert_right(out, {**given, "scale": 0.4, "softcap": 2.0})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"num_rows": 9}, id="nine-rows"),
        pytest.param({"relative_bias": torch.ones(4, 3)}, id="relative-bias"),
        pytest.param({"dropout": 0.5}, id="dropout"),
        pytest.param({"requires_grad": "v"}, id="gradient-of-v"),
    ],
)
def test_everything_else_is_not_decoded(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    change = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in change.items()}
    given = make(change.pop("num_rows", 2), 20)
    decoded, planned = spy(monkeypatch, "decode_attention"), spy(monkeypatch, "interval_attention")
    wanted = change.pop("requires_grad", "")
    q, k, v = (given[name].clone().requires_grad_(name == wanted) for name in "qkv")
    interval_attention(q, k, v, Visibility(given["first"], given["end"]), impl="triton", **change)
    assert (len(decoded), len(planned)) == (0, 1)


def test_under_no_grad_parameters_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(2, 20)
    decoded = spy(monkeypatch, "decode_attention")
    q, k, v = (given[name].clone().requires_grad_() for name in "qkv")
    with torch.no_grad():
        interval_attention(q, k, v, Visibility(given["first"], given["end"]), impl="triton")
    assert len(decoded) == 1


def test_a_decoder_reads_an_encoder_with_one_row_at_a_time() -> None:
    """Cross-attention in a decoding step: T = 1, and every row sees every survivor."""
    given = make(1, 30)
    padding = torch.arange(30)[None] < torch.tensor([[30], [12], [0]])
    visibility = vis.bidirectional(padding).for_cross_attention().to(str(DEVICE))
    given["first"], given["end"] = visibility.first, visibility.end
    out = interval_attention(given["q"], given["k"], given["v"], visibility, impl="triton")
    assert not out[2].any()
    assert_right(out, given)


# -- the comparison can fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda given: {"end": given["end"] - FOREVER + 56}, id="interval-short"),
        pytest.param(lambda given: {"first": given["first"] - 1}, id="sees-the-future"),
        pytest.param(lambda given: {"scale": 1.0}, id="scale-missing"),
        pytest.param(lambda given: {"softcap": 1.0}, id="softcap-too-much"),
        pytest.param(lambda given: {"q": given["q"].flip(1)}, id="heads-crossed"),
        pytest.param(lambda given: {"q": given["q"].flip(0)}, id="sequences-crossed"),
        pytest.param(lambda given: {"q": given["q"].flip(2)}, id="rows-crossed"),
    ],
)
@each_dtype
def test_a_planted_bug_is_found(fault: Callable[[dict[str, Any]], dict[str, Any]], dtype: torch.dtype) -> None:
    given = make(3, dtype=dtype)
    with pytest.raises(AssertionError, match=r"error .*, allowed"):
        assert_right(kernels.decode_attention(**{**given, **fault(given)}), given)


# -- errors ------------------------------------------------------------------------------------------------------------

ERRORS = [
    pytest.param(
        {"k": torch.zeros(2, 2, 21, 16)},
        "k must be torch.float32 of shape (3, 2, 21, 16), got torch.float32 (2, 2, 21, 16)",
        id="k-batch",
    ),
    pytest.param(
        {"v": torch.zeros(3, 2, 21, 16).half()},
        "v must be torch.float32 of shape (3, 2, 21, 16), got torch.float16 (3, 2, 21, 16)",
        id="v-dtype",
    ),
    pytest.param(
        {"v": torch.zeros(3, 2, 20, 16)},
        "v must be torch.float32 of shape (3, 2, 21, 16), got torch.float32 (3, 2, 20, 16)",
        id="v-length",
    ),
    pytest.param(
        {"first": torch.zeros(3, 20).int()},
        "shapes do not match: q (3, 4, 1, 16), k (3, 2, 21, 16), first (3, 20)",
        id="first-length",
    ),
    pytest.param(
        {"q": torch.zeros(3, 5, 1, 16)},
        "shapes do not match: q (3, 5, 1, 16), k (3, 2, 21, 16), first (3, 21)",
        id="heads-no-multiple",
    ),
    pytest.param(
        {"scale": -1.0}, "the kernels cannot serve this call: the scale is -1.0, not positive", id="scale"
    ),
    pytest.param(
        {"first": torch.zeros(2, 21).int(), "end": torch.zeros(2, 21).int()},
        "shapes do not match: q (3, 4, 1, 16), k (3, 2, 21, 16), first (2, 21)",
        id="mask-batch",
    ),
    pytest.param({"softcap": -2.0}, "softcap must be positive, got -2.0", id="softcap"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_errors(changes: dict[str, Any], message: str) -> None:
    changes = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in changes.items()}
    with pytest.raises(ValueError, match=r".") as caught:
        kernels.decode_attention(**{**make(1, 21), **changes})
    assert str(caught.value) == message
