"""Attention sinks: one more term in the softmax of every row, as in gpt-oss, in every implementation on the CPU.

The tolerance is that of ``test_interval_attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gisting import visibility as vis
from gisting.attention import interval_attention, sdpa
from gisting.attention.pieces import attend_pieces, plan_pieces
from gisting.errors import GistError
from gisting.visibility import Visibility
from tests.attention.test_interval_attention import by_hand, inputs, largest_score, masks, tolerance, worst
from tests.slow import slow

Leaves = dict[str, Any]


def leaves(dtype: torch.dtype = torch.float32, *, heads: int = 4, rows: int = 63, keys: int | None = None) -> Leaves:
    """Draw q, k, v and sinks; some sinks are far above the scores, some far below."""
    given = inputs(heads, heads // 2, rows, keys, dtype)
    sinks = torch.linspace(-3, 3, heads).to(dtype).requires_grad_()
    return {"q": given.q, "k": given.k, "v": given.v[..., :12].detach().clone().requires_grad_(), "sinks": sinks}


def run(attend: Callable[..., Tensor], given: Leaves) -> dict[str, Tensor]:
    out = attend(**given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    grads = torch.autograd.grad(out, list(given.values()), upstream)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(given, grads, strict=True)}}


def ours(visibility: Visibility, impl: str) -> Callable[..., Tensor]:
    return lambda **given: interval_attention(**given, visibility=visibility, impl=impl)


def plain(visibility: Visibility) -> Callable[..., Tensor]:
    """Attend the plain way in the dtype of q, the keys in reverse order: the yardstick of the tolerance."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.flip(2).repeat_interleave(group, 1), v.flip(2).repeat_interleave(group, 1)
        seen = visibility.to_dense(q.shape[2])[:, None].flip(-1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., :-1].masked_fill(~seen, 0.0) @ v

    return attend


def rounding_of_sinks(given: Leaves) -> float:
    """Bound the rounding error of the gradient of a sink, whose terms nearly cancel.

    It sums ``-weight (dout . out)`` over the B T rows. Both out and the product over D are rounded, each within
    eps |dout| . |v| of its exact value, and such errors add up with random signs. dout is of size 1.
    """
    batch, _, rows, _ = given["q"].shape
    products = given["v"].detach().double().abs().sum(-1) * (2 / torch.pi) ** 0.5
    return 2 * torch.finfo(given["q"].dtype).eps * products.mean().item() * (batch * rows) ** 0.5


def assert_as_good_as_plain(visibility: Visibility, impl: str, given: Leaves) -> None:
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    exact, yardstick = run(ours(visibility, "reference"), wide), run(plain(visibility), given)
    largest = largest_score(inputs(4, 2, given["q"].shape[2], given["k"].shape[2]))
    for name, tensor in run(ours(visibility, impl), given).items():
        assert tensor.dtype == given["q"].dtype, name
        error, bound = worst(tensor, exact[name]), tolerance(yardstick[name], exact[name], largest)
        if name == "dsinks":
            bound = max(bound, rounding_of_sinks(given))
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize(("rows", "keys"), [(9, 9), (4, 9), (1, 1)])
def test_the_oracle_is_the_definition_by_hand(rows: int, keys: int) -> None:
    given, visibility = leaves(torch.float64, rows=rows, keys=keys), masks(keys)
    have = interval_attention(**given, visibility=visibility, impl="reference")
    slow = by_hand(given["q"], given["k"], given["v"], visibility, sinks=given["sinks"])
    torch.testing.assert_close(have, slow, rtol=0, atol=100 * torch.finfo(torch.float64).eps)


def test_the_oracle_has_the_gradients_of_its_definition() -> None:
    given = leaves(torch.float64, heads=2, rows=4)
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: interval_attention(q, k, v, masks(4), sinks=sinks, impl="reference"),
        tuple(given.values()),
    )


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [slow(torch.float64), torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(63, 63), (1, 7), (7, 64), (1, 1)])
def test_outputs_and_gradients(impl: str, dtype: torch.dtype, rows: int, keys: int) -> None:
    assert_as_good_as_plain(masks(keys), impl, leaves(dtype, rows=rows, keys=keys))


@pytest.mark.parametrize("dtype", [slow(torch.float64), torch.float32, torch.bfloat16], ids=str)
def test_pieces(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With rows in several pieces, and in none."""
    index = torch.arange(511)
    is_gist = ((index >= 200) & (index < 204)).expand(4, -1)
    padding = torch.stack([index >= 0, index >= 20, index >= 60, index >= 0])
    visibility, given = vis.gist(is_gist, padding), leaves(dtype, rows=511)
    monkeypatch.setattr(sdpa, "dense_attention", None)
    assert_as_good_as_plain(visibility, "sdpa", given)


def test_a_low_sink_is_none_and_a_high_one_takes_everything() -> None:
    given, visibility = leaves(torch.float64), masks(63)
    del given["sinks"]
    none = interval_attention(**given, visibility=visibility, impl="reference")
    for impl in ("reference", "sdpa"):
        low, high = (
            interval_attention(**given, visibility=visibility, impl=impl, sinks=torch.full((4,), sink).double())
            for sink in (-50.0, 50.0)
        )
        assert worst(low, none) < 1e-15
        assert high.abs().max() < 1e-15


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (torch.zeros(2), r"sinks must be floating point of shape \(4,\), one for each head of q, got .* \(2,\)"),
        (torch.zeros(4, 1), r"sinks must be floating point of shape \(4,\)"),
        (torch.zeros(4, dtype=torch.int64), r"sinks must be floating point .* got torch.int64"),
        (torch.zeros(4, device="meta"), "sinks must be on the device of q, cpu, got meta"),
    ],
    ids=["other-heads", "two-dimensions", "integers", "elsewhere"],
)
def test_sinks_that_do_not_fit(sinks: Tensor, message: str) -> None:
    given: dict[str, Any] = {**leaves(), "sinks": sinks}
    with pytest.raises(GistError, match=message):
        interval_attention(**given, visibility=masks(63))


def test_a_second_derivative_of_pieces_raises() -> None:
    given, index = leaves(rows=7), torch.arange(7)
    visibility = vis.gist((index == 3).expand(4, -1))
    out = attend_pieces(given["q"], given["k"], given["k"], plan_pieces(visibility, 7), 0.3, given["sinks"])
    (grad,) = torch.autograd.grad(out.sum(), given["sinks"], create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for the gradient of sinks is not implemented"):
        grad.sum().backward()


def test_flex_has_no_sinks() -> None:
    with pytest.raises(GistError, match="impl='flex' supports no dropout, no dense bias and no sinks"):
        interval_attention(**leaves(), visibility=masks(63), impl="flex")
