"""What the tests of the kernels share: the device, inputs, the plain formula, and the comparison with float64.

On a machine with a card the kernels are compiled and run there, else Triton's interpreter runs them on the CPU
(``tests/conftest.py`` asks for it). The tolerance is that of ``tests/attention/test_interval_attention.py``: at most
twice the error of the plain formula in the same dtype, both against float64, with a small floor.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gisting_kernels as kernels
from gisting.attention import interval_attention
from gisting.visibility import Visibility
from gisting_kernels.plan import Plan, TileSizes
from tests.attention.test_interval_attention import tolerance, worst

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_CUDA = DEVICE.type == "cuda"
# The interpreter has no arithmetic in bfloat16; there the op computes in float32, which has a test of its own.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if IS_CUDA else [])]


def _version(name: str) -> tuple[int, int]:
    """Major and minor version of a package, (0, 0) where it is not installed."""
    try:
        major, minor = importlib.metadata.version(name).split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


# What asks for the interpreter in a process of its own, also where there is a card.
requires_interpreter = pytest.mark.skipif(
    (0, 0) < _version("triton") < (3, 7) and _version("numpy") >= (2, 5),
    reason="Triton's interpreter fails with numpy 2.5 before triton 3.7; install triton 3.7 or numpy 2.4",
)
Sizes = tuple[TileSizes, TileSizes, TileSizes, TileSizes]


def tiles(*shapes: tuple[int, int]) -> Sizes:
    """Tile sizes (rows, keys) of the forward, dQ, dK/dV and table-gradient kernels; one shape serves all four."""
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
    """Leaves that ask for a gradient, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    upstream: Tensor

    def cast(self, dtype: torch.dtype) -> Given:
        """The same numbers in another dtype, as new leaves."""
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
        """What a plan for this has to know of the relative bias."""
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
    """Numbers that ``dtype`` holds exactly. ``width``: W of a relative bias."""
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
    """One sequence, ``(first, end)`` of each key."""
    first, end = torch.tensor(pairs, dtype=torch.int32).T
    return Visibility(first[None].contiguous(), end[None].contiguous())


def scores(given: Given, scale: float | None, softcap: float | None) -> Tensor:
    """softcap(scale q k^T) + bias, in the dtype of q."""
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
    """What anyone would write in torch with a dense mask, all in the dtype of q; ``keep``: the weights that dropout
    leaves, ``(B, H, T, K)``.
    """
    seen = visibility.to_dense(given.q.shape[2])[:, None].to(DEVICE)
    weights = scores(given, scale, softcap).masked_fill(~seen, torch.finfo(given.q.dtype).min).softmax(-1)
    weights = weights.masked_fill(~seen, 0.0)
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    return weights @ given.v.repeat_interleave(given.q.shape[1] // given.v.shape[1], 1)


def exact(given: Given, visibility: Visibility, *, keep: Tensor | None = None, **options: Any) -> Tensor:
    """The oracle of ``gisting``, in float64. It draws its own dropout, so that with ``keep`` the plain formula in
    float64 stands in (test_the_plain_formula_is_the_oracle).
    """
    if keep is not None:
        return plain(given, visibility, keep=keep, **options)
    on_device = visibility.to(str(DEVICE))
    return interval_attention(*given[:3], on_device, relative_bias=given.table, impl="reference", **options)


def plan_for(given: Given, visibility: Visibility, sizes: Sizes = SMALL) -> Plan:
    first, end = visibility.first.to(DEVICE), visibility.end.to(DEVICE)
    return kernels.make_plan(first, end, given.q.shape[2], sizes, near=given.near)


def fused(given: Given, plan: Plan, **options: Any) -> Tensor:
    """The kernels under test; float32 products as float32 has them."""
    options.setdefault("precision", "ieee")
    return kernels.interval_attention(*given[:3], plan, relative_bias=given.table, **options)


def differentiate(attend: Callable[[Given], Tensor], given: Given) -> dict[str, Tensor]:
    """The output and the gradient of every input, by name."""
    out = attend(given)
    grads = torch.autograd.grad(out, given.leaves, given.upstream)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dtable"), grads, strict=False))}


def rounding(given: Given, scale: float | None) -> dict[str, float]:
    """What rounding alone may leave of gradients that nearly cancel, as where rows see one key, whose score has none.

    The gradient of a score is P (g . v - g . out): two sums over D in different orders, each within eps |g| . |v| of
    the right one. Those of q, k and the table are sums of as many such errors, of random sign.
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
    """What of the output and the gradients is further from float64 than allowed, and by how much.

    Args:
        factor: of the tolerance; everywhere 1 but where a docstring says why.
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
        if not error <= bound:  # NaN fails too
            found[name] = f"error {error:.2e}, allowed {bound:.2e}"
    return found


def check(given: Given, visibility: Visibility, sizes: Sizes = SMALL, **options: Any) -> None:
    """The kernels give what float64 gives, within the tolerance: output and all gradients."""
    only_here = {name: options.pop(name) for name in ("keep", "factor") if name in options}
    seed = options.pop("seed", None)
    plan = plan_for(given, visibility, sizes)
    have = differentiate(lambda it: fused(it, plan, seed=seed, **options), given)
    assert not failures(given, visibility, have, **only_here, **options)
