"""Attention sinks in the kernels: outputs and gradients against the oracle in float64, as in ``test_kernels.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")

import gisting_kernels as kernels
from gisting import visibility as vis
from gisting.attention import interval_attention
from gisting.visibility import Visibility
from tests.attention.test_interval_attention import tolerance, worst
from tests.kernels.conftest import DEVICE, MIXED, Given, each_dtype, make, plan_for, rounding, scores

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
NAMES = ("out", "dq", "dk", "dv", "dsinks")


def run(attend: Any, given: Given, sinks: Tensor) -> dict[str, Tensor]:
    out = attend(given, sinks)
    grads = torch.autograd.grad(out, [*given[:3], sinks], given.upstream)
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def gist_of(num_keys: int) -> Visibility:
    """A gist mask whose first rows, of padding, see no key."""
    index = torch.arange(num_keys)
    is_gist = ((index >= num_keys // 3) & (index < num_keys // 3 + 2)).expand(2, -1)
    return vis.gist(is_gist, torch.stack([index >= 7, index >= 0]))


@each_dtype
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize(("rows", "keys"), [(45, 45), (17, 50)])
def test_sinks(rows: int, keys: int, softcap: float | None, dtype: torch.dtype) -> None:
    given, visibility = make(rows, keys, dtype, batch=2, heads=4, groups=2), gist_of(keys)
    sinks = torch.linspace(-3, 3, 4, device=DEVICE).to(dtype).requires_grad_()
    plan = plan_for(given, visibility, MIXED)
    on_device = visibility.to(str(DEVICE))

    def oracle(it: Given, sinks: Tensor) -> Tensor:
        return interval_attention(it.q, it.k, it.v, on_device, sinks=sinks, softcap=softcap, impl="reference")

    def plain(it: Given, sinks: Tensor) -> Tensor:
        seen = on_device.to_dense(rows)[:, None]
        both = scores(it, None, softcap).masked_fill(~seen, torch.finfo(dtype).min)
        both = torch.cat([both, sinks[:, None, None].expand(*both.shape[:3], 1)], -1)
        return both.softmax(-1)[..., :-1].masked_fill(~seen, 0.0) @ it.v.repeat_interleave(2, 1)

    have = run(
        lambda it, sinks: kernels.interval_attention(
            it.q, it.k, it.v, plan, sinks=sinks, softcap=softcap, precision="ieee"
        ),
        given,
        sinks,
    )
    wide = given.cast(torch.float64)
    exact = run(oracle, wide, sinks.detach().double().requires_grad_())
    yardstick = run(plain, given, sinks)
    largest, floor = scores(wide, None, None).abs().max().item(), rounding(given, None)
    for name, tensor in have.items():
        bound = max(tolerance(yardstick[name], exact[name], largest), floor.get(name, 0.0))
        assert tensor.dtype == dtype, name
        assert worst(tensor, exact[name]) <= bound, name


@pytest.mark.parametrize("rows", [2, 20], ids=["decoding", "more-rows"])
def test_sinks_are_not_dropped_by_the_choice_of_a_kernel(rows: int) -> None:
    """Few rows without gradients run on another kernel, which has no sinks."""
    given, visibility = make(rows, 45, batch=2, heads=2, groups=1), gist_of(45).to(str(DEVICE))
    q, k, v = given.q.detach(), given.k.detach(), given.v.detach()
    sinks = torch.tensor([0.5, 3.0], device=DEVICE)
    have = interval_attention(q, k, v, visibility, sinks=sinks, impl="triton")
    exact = interval_attention(q, k, v, visibility, sinks=sinks, impl="reference")
    assert worst(have, exact) < 1e-5
    assert worst(interval_attention(q, k, v, visibility, impl="reference"), exact) > 0.1


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)])
def test_sinks_that_do_not_fit(sinks: Tensor) -> None:
    given = make(9, batch=2)
    with pytest.raises(ValueError, match=r"sinks must be floating point of shape \(2,\), got"):
        kernels.interval_attention(*given[:3], plan_for(given, gist_of(9)), sinks=sinks.to(DEVICE))
