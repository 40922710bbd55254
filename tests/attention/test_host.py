"""Test what a call costs the host. If the host takes longer than the work it starts, the accelerator waits.

The kernels are replaced by a stub, so that only Python is timed: the CPU time of the thread, relative to torch's
operator on tensors so small that its arithmetic takes no time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import gisting_kernels
from gisting.attention import api, interval_attention
from gisting.attention.api import segments_of
from gisting.errors import GistError
from gisting.models import registry
from gisting.visibility import Visibility, gist
from gisting_kernels import op


def microseconds(call: Callable[[], Any], number: int = 300, rounds: int = 7) -> float:
    for _ in range(50):
        call()
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(number):
            call()
        best = min(best, (time.thread_time() - start) / number)
    return 1e6 * best


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the kernels' operator return at once, and record the checks, choices and plans before it."""
    asked: list[str] = []
    choose, check, why_not = api.choose_implementation, api._check, gisting_kernels.why_not

    def count(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return inner(*args, **kwargs)

        return counted

    def chosen(q: Any, v: Any, scale: float, **kwargs: Any) -> tuple[str, str]:
        assert choose(q, v, scale, **kwargs)[0] != "triton"  # on a CPU
        assert why_not(q, v, scale, has_bias=False) is None
        return "triton", "a test asks for it"

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(op, "_Direct", SimpleNamespace(apply=lambda q, *_: (q, None)))
    monkeypatch.setattr(api, "choose_implementation", count("choose", chosen))
    monkeypatch.setattr(api, "_check", count("check", check))
    monkeypatch.setattr(gisting_kernels, "plan_tiles", count("plan", gisting_kernels.plan_tiles))
    return asked


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 16, heads, 16, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2, 2))
    return q.requires_grad_(), k, v


def seen() -> Visibility:
    is_gist = torch.zeros(2, 16, dtype=torch.bool)
    is_gist[:, 5:7] = True
    return gist(is_gist)


def test_a_batch_is_checked_and_planned_once(stub: list[str]) -> None:
    q, k, v = tensors()
    visibility = seen()
    for _ in range(5):
        interval_attention(q, k, v, visibility)
    assert stub == ["check", "choose", "plan"]
    interval_attention(q, k, v, seen())
    assert stub == ["check", "choose", "plan"] * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: ((q[:, :, :8], k, v), {}),
        lambda q, k, v: ((q.detach(), k, v), {}),
        lambda q, k, v: ((q.half(), k.half(), v.half()), {}),
        lambda q, k, v: ((q, k[:, :1], v[:, :1]), {}),
        lambda q, k, v: ((q, k, v), {"scale": 0.5}),
        lambda q, k, v: ((q, k, v), {"softcap": 2.0}),
        lambda q, k, v: ((q, k, v), {"dropout": 0.5}),
        lambda q, k, v: ((q, k, v), {"relative_bias": torch.zeros(4, 3)}),
        lambda q, k, v: ((q, k, v), {"impl": "triton"}),
    ],
    ids="rows gradients dtype heads scale softcap dropout bias impl".split(),
)
def test_a_call_of_another_kind_is_checked_again(stub: list[str], change: Callable[..., Any]) -> None:
    q, k, v = tensors()
    visibility = seen()
    interval_attention(q, k, v, visibility)
    others, settings = change(q, k, v)
    interval_attention(*others, visibility, **settings)
    assert stub.count("check") == 2


def test_invalid_calls_are_refused_every_time() -> None:
    q, k, v = tensors()
    visibility = seen()
    interval_attention(q, k, v, visibility)
    for _ in range(2):
        with pytest.raises(GistError, match=r"k and v must agree"):
            interval_attention(q, k, v[:, :, :5], visibility)
        with pytest.raises(GistError, match=r"softcap must be positive, got -1"):
            interval_attention(q, k, v, visibility, softcap=-1.0)
        with pytest.raises(GistError, match=r"impl must be one of"):
            interval_attention(q, k, v, visibility, impl="fast")
    torch.testing.assert_close(interval_attention(q, k, v, visibility), interval_attention(q, k, v, seen()))


def test_a_training_step_reads_no_length_from_the_device(monkeypatch: pytest.MonkeyPatch, stub: list[str]) -> None:
    """In training, the choice of tiles gets the mean segment length from the batch, or uses the number of keys."""
    lengths = []
    plan = op.plan_tiles

    def planned(first: Any, end: Any, q: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["segment_length"])
        return plan(first, end, q, **kwargs)

    monkeypatch.setattr(gisting_kernels, "plan_tiles", planned)
    q, k, v = tensors()
    interval_attention(q, k, v, seen())
    with segments_of(7.5):
        interval_attention(q, k, v, seen())
        interval_attention(q.detach(), k, v, seen())
    interval_attention(q.detach(), k, v, seen())
    assert lengths == [16.0, 7.5, 7.5, None]


@pytest.mark.skipif(sys.gettrace() is not None, reason="measuring coverage slows Python down, and not torch")
def test_host_time(stub: list[str]) -> None:
    """At most 4 and 6 times torch's operator. 2.4 and 3.6 were measured, and 6.3 and 8 without caching for a batch."""
    q, k, v = tensors()
    visibility, mask = seen(), seen().as_attention_mask()
    module = SimpleNamespace(is_causal=True, layer_idx=0)
    flat = [tensor.detach()[:1, :1, :4].contiguous() for tensor in (q, k, v)]

    def layer() -> Any:
        return registry._attention_forward(
            module,  # pyright: ignore[reportArgumentType]
            q,
            k,
            v,
            mask,
            base_forward=scaled_dot_product_attention,  # pyright: ignore[reportArgumentType]
            scaling=0.25,
        )

    plain = microseconds(lambda: scaled_dot_product_attention(*flat))
    attention = microseconds(lambda: interval_attention(q, k, v, visibility))
    whole = microseconds(layer)
    assert attention < 4 * plain, (attention, plain)
    assert whole < 6 * plain, (whole, plain)
