"""Shared by the tests of the kernels: the device, inputs, the plain formula, and the comparison with float64.

On a machine with a card the kernels are compiled and run there. On other machines Triton's interpreter, which
``tests/conftest.py`` switches on, runs them on the CPU. The tolerance is that of
``tests/attention/test_interval_attention.py``: at most twice the error of the plain formula in the same dtype, both
against float64, with a small floor. By default each path runs at one odd size in float32; the other rows are slow.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gisting_kernels as kernels
from gisting.attention import interval_attention
from gisting.visibility import Visibility
from gisting_kernels.plan import Plan, TileSizes
from tests.attention.test_interval_attention import tolerance, worst
from tests.slow import slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_CUDA = DEVICE.type == "cuda"
# The interpreter has no bfloat16 arithmetic. There the operator computes in float32, which other tests cover.
each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        slow(torch.float16, id="float16"),
        *([pytest.param(torch.bfloat16, id="bfloat16")] if IS_CUDA else []),
    ],
)


def _version(name: str) -> tuple[int, int]:
    """Return the major and minor version of a package, or (0, 0) if it is not installed."""
    try:
        major, minor = importlib.metadata.version(name).split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


# For tests that start a process under the interpreter, even on a machine with a card.
requires_interpreter = pytest.mark.skipif(
    (0, 0) < _version("triton") < (3, 7) and _version("numpy") >= (2, 5),
    reason="Triton's interpreter fails with numpy 2.5 before triton 3.7; install triton 3.7 or numpy 2.4",
)
Sizes = tuple[TileSizes, TileSizes, TileSizes, TileSizes]


def tiles(*shapes: tuple[int, int]) -> Sizes:
    """Make the tiles of the forward, dQ, dK/dV and table-gradient kernels; a single (rows, keys) serves all four."""
    sizes = [TileSizes(rows, keys, 4, 2) for rows, keys in (shapes if len(shapes) == 4 else shapes * 4)]
    return (sizes[0], sizes[1], sizes[2], sizes[3])


SMALL = tiles((16, 16))
MIXED = tiles((16, 32), (32, 16), (16, 64), (32, 16))


@pytest.fixture
def device() -> torch.device:
    if not IS_CUDA and not kernels.is_interpreting():
        pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1: nothing here can run a kernel")
    return DEVICE


class Given(NamedTuple):
    """Leaves that require gradients, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    upstream: Tensor

    def cast(self, dtype: torch.dtype) -> Given:
        """Convert the numbers to another dtype, as new leaves."""
        q, k, v, table = (None if t is None else t.detach().to(dtype).requires_grad_() for t in self[:4])
        assert q is not None
        assert k is not None
        assert v is not None
        return Given(q, k, v, table, self.upstream.to(dtype))

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]

    @property
    def near(self) -> int | None:
        """The width of the relative bias that a plan for these inputs needs."""
        return None if self.table is None else max(self.table.shape[1] // 2, 1)


def make(
    num_rows: int = 45,
    num_keys: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 1,
    size: int = 16,
    width: int | None = None,
) -> Given:
    """Draw inputs that ``dtype`` represents exactly. ``width`` is W of a relative bias."""
    num_keys = num_rows if num_keys is None else num_keys
    generator = torch.Generator().manual_seed(heads * 1000 + groups * 100 + num_rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    return Given(
        normal(batch, heads, num_rows, size).requires_grad_(),
        normal(batch, groups, num_keys, size).requires_grad_(),
        normal(batch, groups, num_keys, size).requires_grad_(),
        None if width is None else normal(heads, 2 * width + 1).requires_grad_(),
        normal(batch, heads, num_rows, size),
    )


def intervals(*pairs: tuple[int, int]) -> Visibility:
    """Make one sequence from the ``(first, end)`` of each key."""
    first, end = torch.tensor(pairs, dtype=torch.int32).T
    return Visibility(first[None].contiguous(), end[None].contiguous())


def scores(given: Given, scale: float | None, softcap: float | None) -> Tensor:
    """Compute softcap(scale q k^T) + bias in the dtype of q."""
    group, num_rows, num_keys = given.q.shape[1] // given.k.shape[1], given.q.shape[2], given.k.shape[2]
    k = given.k.repeat_interleave(group, 1)
    result = given.q @ k.transpose(-1, -2) * (given.q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        result = softcap * torch.tanh(result / softcap)
    if given.table is not None:
        width = given.table.shape[1] // 2
        start = max(num_keys - num_rows, 0)
        distance = torch.arange(num_keys)[None] - torch.arange(start, start + num_rows)[:, None]
        result = result + given.table[:, distance.clamp(-width, width).to(DEVICE) + width]
    return result


def plain(
    given: Given,
    visibility: Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute attention the plain way, with a dense mask, all in the dtype of q.

    ``keep`` marks the weights that dropout keeps, ``(B, H, T, K)``.
    """
    seen = visibility.to_dense(given.q.shape[2])[:, None].to(DEVICE)
    weights = scores(given, scale, softcap).masked_fill(~seen, torch.finfo(given.q.dtype).min).softmax(-1)
    weights = weights.masked_fill(~seen, 0.0)
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    return weights @ given.v.repeat_interleave(given.q.shape[1] // given.v.shape[1], 1)


def exact(given: Given, visibility: Visibility, *, keep: Tensor | None = None, **options: Any) -> Tensor:
    """Run the reference implementation.

    It draws its own dropout, so with ``keep`` the plain formula replaces it (test_the_plain_formula_is_the_oracle shows
    that both agree).
    """
    if keep is not None:
        return plain(given, visibility, keep=keep, **options)
    on_device = visibility.to(str(DEVICE))
    return interval_attention(*given[:3], on_device, relative_bias=given.table, impl="reference", **options)


# The path that every plan of ``plan_for`` takes, where a kernel has it; a fixture sets it.
chosen = {"path": "pointers"}


def plan_for(given: Given, visibility: Visibility, sizes: Sizes = SMALL) -> Plan:
    first, end = visibility.first.to(DEVICE), visibility.end.to(DEVICE)
    forward, query, key, table = (replace(size, path=chosen["path"]) for size in sizes)
    sizes = (forward, query, key, table)
    return kernels.make_plan(first, end, given.q.shape[2], sizes, near=given.near)


def fused(given: Given, plan: Plan, **options: Any) -> Tensor:
    """Run the kernels under test, with full precision in float32 products."""
    options.setdefault("precision", "ieee")
    return kernels.interval_attention(*given[:3], plan, relative_bias=given.table, **options)


def differentiate(attend: Callable[[Given], Tensor], given: Given) -> dict[str, Tensor]:
    """Return the output and the gradient of every input, by name."""
    out = attend(given)
    grads = torch.autograd.grad(out, given.leaves, given.upstream)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dtable"), grads, strict=False))}


def rounding(given: Given, scale: float | None) -> dict[str, float]:
    """Bound the rounding errors of gradients that nearly cancel, for instance where rows see a single key.

    The gradient of a score is P (g . v - g . out), the difference of two sums over D in different orders. Each is
    within eps |g| . |v| of its exact value. The gradients of q, k and the table sum such errors with random signs.
    """
    batch, heads, num_rows, size = given.q.shape
    group = heads // given.k.shape[1]
    factor = size**-0.5 if scale is None else scale
    q, k, v, upstream = (t.detach().double().abs() for t in (given.q, given.k, given.v, given.upstream))
    products = upstream @ v.repeat_interleave(group, 1).transpose(-1, -2)
    largest, mean = (2 * torch.finfo(given.q.dtype).eps * x.item() for x in (products.max(), products.mean()))
    return {
        "dq": largest * factor * k.max().item(),
        "dk": mean * factor * q.mean().item() * math.sqrt(num_rows * group),
        "dtable": mean * math.sqrt(batch * num_rows),
    }


def failures(
    given: Given,
    visibility: Visibility,
    have: dict[str, Tensor],
    *,
    keep: Tensor | None = None,
    factor: float = 1.0,
    **options: Any,
) -> dict[str, str]:
    """Find the outputs and gradients that are further from float64 than allowed, and say by how much.

    Args:
        factor: of the tolerance, always 1 unless a docstring gives a reason.
        options: scale, softcap and dropout, for the oracle and the plain formula.
    """
    wide = given.cast(torch.float64)
    truth = differentiate(lambda it: exact(it, visibility, keep=keep, **options), wide)
    yardstick = differentiate(lambda it: plain(it, visibility, keep=keep, **options), given)
    largest = scores(wide, options.get("scale"), None).abs().max().item()
    floor = rounding(given, options.get("scale"))
    found = {}
    assert have.keys() == truth.keys()
    for name, tensor in have.items():
        assert tensor.shape == truth[name].shape, name
        assert tensor.dtype == given.q.dtype, name
        bound = factor * tolerance(yardstick[name], truth[name], largest)
        if truth[name].abs().max() < 1:  # for inputs and upstream gradients of size 1
            bound = max(bound, floor.get(name, 0.0))
        error = worst(tensor, truth[name])
        if not error <= bound:  # also true for NaN
            found[name] = f"error {error:.2e}, allowed {bound:.2e}"
    return found


def check(given: Given, visibility: Visibility, sizes: Sizes = SMALL, **options: Any) -> None:
    """Assert that the output and all gradients of the kernels agree with float64 within the tolerance."""
    only_here = {name: options.pop(name) for name in ("keep", "factor") if name in options}
    seed = options.pop("seed", None)
    plan = plan_for(given, visibility, sizes)
    have = differentiate(lambda it: fused(it, plan, seed=seed, **options), given)
    assert not failures(given, visibility, have, **only_here, **options)
