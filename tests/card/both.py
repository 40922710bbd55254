"""Compare the same work on a GPU and on the CPU, within a bound.

In float32 a GPU sums in another order, and the kernels make a float32 product of three TF32 products (nearly float32).
A tiny model's logits and gradients then differ in the sixth digit, while a wrong mask or position changes the first.
The bound is a thousandth of the largest number, and no test here depends on its exact value. Answers are compared word
by word, and every word must have won by more than the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

BOUND = 1e-3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """A device whose work is compared with the CPU's.

    Args:
        device: a CUDA device, or the CPU in a smoke run.
    """

    device: torch.device

    @property
    def is_card(self) -> bool:
        """Whether this is a real GPU, not a smoke run."""
        return self.device.type == "cuda"

    @contextmanager
    def not_waiting(self) -> Iterator[None]:
        """Make torch raise within the block where the host would wait for the GPU."""
        if not self.is_card:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def put(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Move the tensors of a batch to the device."""
        return {name: one.to(self.device) if isinstance(one, Tensor) else one for name, one in batch.items()}

    def only_on_a_card(self, why: str) -> None:
        """Skip the rest of a test in a smoke run."""
        if not self.is_card:
            pytest.skip(f"needs a CUDA device: {why}")


def assert_near(found: Tensor, wanted: Tensor, name: str = "", bound: float = BOUND) -> None:
    """Raise unless two tensors differ by at most ``bound`` of the largest number of the second."""
    assert found.shape == wanted.shape, name
    found, wanted = found.detach().to(CPU, torch.float64), wanted.detach().to(CPU, torch.float64)
    assert found.isfinite().all(), name
    largest, error = wanted.abs().max().item(), (found - wanted).abs().max().item()
    assert error <= bound * largest, f"{name}: differs by {error:.2e}, the largest number is {largest:.2e}"


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of all parameters that have one, on the CPU."""
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_all_near(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = BOUND) -> None:
    """Raise unless tensors with the same names differ by at most ``bound`` of the largest number of all.

    The largest over all tensors, not of each: a gradient that is zero up to rounding (such as a key bias's) has no
    scale.
    """
    assert found.keys() == wanted.keys()
    assert wanted
    flat = [torch.cat([tensors[name].flatten().double().cpu() for name in wanted]) for tensors in (found, wanted)]
    assert_near(flat[0], flat[1], ", ".join(wanted)[:80], bound)


class Margins(LogitsProcessor):
    """Record the smallest lead of the likeliest word over the next, relative to the largest logit."""

    def __init__(self) -> None:
        self.smallest = float("inf")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.topk(2, dim=-1).values
        lead = (best[:, 0] - best[:, 1]) / scores.masked_fill(scores.isinf(), 0).abs().amax(-1)
        self.smallest = min(self.smallest, lead.min().item())
        return scores


@contextmanager
def clear_winners() -> Iterator[dict[str, Any]]:
    """Yield settings for a greedy answer on the CPU, and check that every word won by more than twice the bound."""
    margins = Margins()
    yield {"logits_processor": LogitsProcessorList([margins])}
    assert 2 * BOUND < margins.smallest < float("inf"), f"a word won by only {margins.smallest:.1e}; use another text"
