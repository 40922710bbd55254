"""The cases of the kernels' benchmark, their inputs and FLOPs, and the comparison with the oracle.

Place in the flow: **workload** -> attention (the benchmark), tune. The only implementation used here is the reference.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gisting import visibility as vis
from gisting.attention import interval_attention
from gisting.attention.relative import dense_bias
from gisting.visibility import Visibility

# From this distance on, T5's buckets (32, up to distance 128) are constant (arXiv 1910.10683).
T5_WIDTH = 91
TOKENS = 16_384


@dataclass(frozen=True)
class Case:
    """A mask and sizes. ``share`` is the percentage of a sequence that is prompt."""

    name: str
    mask: str
    num_rows: int
    batch: int
    heads: int = 32
    groups: int = 8
    head_size: int = 128
    share: int = 50
    num_gist: int = 16
    width: int | None = None
    document_lengths: tuple[int, int] = (64, 512)
    num_branches: int = 8

    def to_row(self) -> dict[str, Any]:
        """Make the entries that describe the case in a row."""
        return {
            "case": self.name,
            "mask": self.mask,
            "batch": self.batch,
            "heads": self.heads,
            "key_heads": self.groups,
            "rows": self.num_rows,
            "head_size": self.head_size,
            "prompt_percent": self.share,
            "bias_width": self.width,
        }


def _batch(num_rows: int) -> int:
    return max(1, TOKENS // num_rows)


def all_cases() -> list[Case]:
    """List all cases, in the order in which they run."""
    found = [
        Case(f"gist/{share}%/{num_rows}", "gist", num_rows, _batch(num_rows), share=share)
        for share in (25, 50, 90)
        for num_rows in (512, 1024, 2048, 4096, 8192, 16384, 32768)
    ]
    shapes = {"d128/32": (128, 32, 32), "d64/32:8": (64, 32, 8), "d64/32": (64, 32, 32)}
    for label, (size, heads, groups) in shapes.items():
        found += [
            Case(f"gist/50%/{num_rows}/{label}", "gist", num_rows, _batch(num_rows), heads, groups, size)
            for num_rows in (2048, 8192)
        ]
    for size in (128, 64):
        found.append(Case(f"packed/8192/d{size}", "packed", 8192, 2, head_size=size, num_gist=8))
        for mask in ("shared-gist", "shared-causal"):
            found.append(Case(f"{mask}/4096/d{size}", mask, 4096, 4, head_size=size))
    for num_rows in (512, 2048):
        found.append(Case(f"t5/{num_rows}", "encoder", num_rows, _batch(num_rows), 16, 16, 64, width=T5_WIDTH))
    return found


QUICK = ("gist/50%/2048", "gist/50%/8192", "packed/8192/d128", "shared-gist/4096/d128", "t5/512")


def smoke_cases() -> list[Case]:
    """List a case of every kind of mask, small enough for the interpreter."""
    small: dict[str, Any] = {"num_rows": 64, "batch": 1, "heads": 4, "groups": 2, "head_size": 16, "num_gist": 2}
    return [
        Case("gist/50%/64", "gist", **small),
        Case("packed/64", "packed", document_lengths=(9, 20), **small),
        Case("shared-gist/64", "shared-gist", num_branches=3, **small),
        Case("shared-causal/64", "shared-causal", num_branches=3, **small),
        Case("t5/64", "encoder", width=5, **{**small, "groups": 4}),
    ]


def chosen_cases(*, quick: bool = False, pattern: str | None = None) -> list[Case]:
    """Select the quick cases, or those whose name matches a shell pattern, or both."""
    found = [case for case in all_cases() if not quick or case.name in QUICK]
    return [case for case in found if pattern is None or fnmatch.fnmatch(case.name, pattern)]


def visibility_of(case: Case, device: torch.device) -> Visibility:
    """Make the intervals of a case, with a row for each sequence."""
    shape = (case.batch, case.num_rows)
    index = torch.arange(case.num_rows, device=device).expand(shape)
    prompt = case.num_rows * case.share // 100
    is_gist = (index >= prompt) & (index < prompt + case.num_gist)
    if case.mask == "gist":
        return vis.gist(is_gist)
    if case.mask == "encoder":
        return vis.encoder_gist(is_gist)
    if case.mask.startswith("shared"):
        shared = prompt + case.num_gist
        branch = 1 + (index - shared) * case.num_branches // (case.num_rows - shared)
        branches = torch.where(index < shared, 0, branch)
        if case.mask == "shared-causal":
            return vis.causal(torch.ones(shape, device=device), branches=branches)
        return vis.gist(is_gist, branches=branches)
    documents, is_gist = _pack(case)
    return vis.gist(is_gist.to(device), documents=documents.to(device))


def _pack(case: Case) -> tuple[Tensor, Tensor]:
    """Draw documents of uniformly random lengths from a fixed seed. Each starts with its prompt and gist."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.zeros(case.batch, case.num_rows, dtype=torch.long)
    is_gist = torch.zeros(case.batch, case.num_rows, dtype=torch.bool)
    shortest, longest = case.document_lengths
    for row in range(case.batch):
        start, number = 0, 0
        while start < case.num_rows:
            length = int(torch.randint(shortest, longest + 1, (), generator=generator))
            documents[row, start : start + length] = number
            prompt = start + length * case.share // 100
            is_gist[row, prompt : min(prompt + case.num_gist, start + length)] = True
            start, number = start + length, number + 1
    return documents, is_gist


# -- counting ----------------------------------------------------------------------------------------------------------


def visible_pairs(visibility: Visibility, num_rows: int) -> int:
    """Count the (row, key) pairs of all sequences where the row sees the key, without a dense mask."""
    start = max(visibility.num_keys - num_rows, 0)
    seen = visibility.end.clamp(max=start + num_rows).long() - visibility.first.clamp(min=start).long()
    return int(seen.clamp(min=0).sum())


def visited_pairs(counts: Tensor, size: tuple[int, int]) -> int:
    """Count the pairs in the listed tiles; each row of tiles lists ``counts[..., 2]``."""
    return int(counts[..., 2].sum()) * size[0] * size[1]


def flops(case: Case, pairs: int, which: str) -> int:
    """Count the FLOPs of the forward pass, ``4 H D`` for each pair, or of both passes, 3.5 times as many."""
    forward = 4 * case.heads * case.head_size * pairs
    return forward if which == "forward" else forward * 7 // 2


def dense_bytes(case: Case) -> int:
    """Estimate the peak memory of a dense mask: the mask and a 16-bit copy; with a bias, also its gradient."""
    area = case.batch * case.num_rows**2
    return 3 * area if case.width is None else 4 * case.heads * area + area


# -- inputs and the oracle ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Leaves that require gradients, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    upstream: Tensor

    def cast(self, dtype: torch.dtype) -> Inputs:
        """Convert the numbers to another dtype, as new leaves. The table is converted only to float64."""
        q, k, v = (tensor.detach().to(dtype).requires_grad_() for tensor in (self.q, self.k, self.v))
        table = self.table
        if table is not None:
            table = table.detach().to(dtype if dtype == torch.float64 else torch.float32).requires_grad_()
        return Inputs(q, k, v, table, self.upstream.to(dtype))

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs q, k, v, and the table if there is one."""
        return [self.q, self.k, self.v, *([] if self.table is None else [self.table])]


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Draw normally distributed inputs from a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    shape = (case.batch, case.heads, case.num_rows, case.head_size)
    key_shape = (case.batch, case.groups, case.num_rows, case.head_size)
    table = None
    if case.width is not None:
        table = normal(case.heads, 2 * case.width + 1, dtype=torch.float32).requires_grad_()
    return Inputs(
        normal(*shape).requires_grad_(),
        normal(*key_shape).requires_grad_(),
        normal(*key_shape).requires_grad_(),
        table,
        normal(*shape),
    )


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def results_of(attend: Attend, given: Inputs) -> dict[str, Tensor]:
    """Return the output and the gradient of every leaf, by name."""
    out = attend(given.q, given.k, given.v, given.table)
    grads = torch.autograd.grad(out, given.leaves, given.upstream)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dtable"), grads, strict=False))}


def oracle(visibility: Visibility) -> Attend:
    """Attend with the reference implementation."""
    return lambda q, k, v, table: interval_attention(q, k, v, visibility, relative_bias=table, impl="reference")


def plain(visibility: Visibility) -> Attend:
    """Attend the plain way, with a dense mask, all in the dtype of q: the yardstick of the tolerance."""

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        seen = visibility.to_dense(q.shape[2])[:, None]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if table is not None:
            scores = scores + dense_bias(table, q.shape[2], k.shape[2]).to(q.dtype)
        return scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~seen, 0.0) @ v

    return attend


def faults_of(attend: Attend, given: Inputs, visibility: Visibility, eps: float | None = None) -> list[str]:
    """Describe where the error of ``attend`` is more than twice that of plain attention in the same dtype.

    Both errors are against float64. The tolerance has the floor of the attention tests, (4 + largest score) eps times
    the largest number; errors below it come from rounding.

    Args:
        attend: the attention to check.
        given: inputs in its dtype.
        visibility: the mask.
        eps: rounding error for the floor, by default that of the dtype.
    """
    exact = results_of(oracle(visibility), given.cast(torch.float64))
    by_plain = results_of(plain(visibility), given.cast(given.q.dtype))
    have = results_of(attend, given)
    with torch.no_grad():
        keys = given.k.repeat_interleave(given.q.shape[1] // given.k.shape[1], 1).double()
        largest = (given.q.double() @ keys.mT * given.q.shape[-1] ** -0.5).abs().max().item()
        largest += 0.0 if given.table is None else given.table.abs().max().item()
    eps = torch.finfo(given.q.dtype).eps if eps is None else eps
    found = []
    for name, tensor in have.items():
        allowed = 2 * worst(by_plain[name], exact[name]) + (4 + largest) * eps * exact[name].abs().max().item()
        error = worst(tensor, exact[name])
        if not error <= allowed:  # also true for NaN
            found.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    return found


def worst(have: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference, in float64."""
    return (have.double() - exact.double()).abs().max().item()
