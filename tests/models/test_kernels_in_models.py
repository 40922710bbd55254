"""Run whole models on the Triton kernels and compare outputs, gradients and training with stock eager attention.

For T5, also check that no tensor is as large as the scores. Without a GPU the kernels run in Triton's interpreter, so
everything is small.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")

import gisting_kernels
from gisting import visibility as vis
from gisting.attention import api, interval_attention
from gisting.errors import UnsupportedModelError
from tests import tiny
from tests.models import test_relative_bias
from tests.models.test_families import Result, assert_as_good_as, result_of
from tests.models.test_relative_bias import batch, loss_of, stock_logits

pytestmark = pytest.mark.skipif(
    not gisting_kernels.is_interpreting(), reason="proves arithmetic under the interpreter; on a card see tests/kernels"
)
# Two layers in the encoder, because the second gets its bias from the first.
SMALL = {"num_layers": 2, "num_decoder_layers": 1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make ``impl="auto"`` choose the kernels, as on a GPU, and record the choices."""
    chosen: list[str] = []

    def choose(*args: Any, **kwargs: Any) -> tuple[str, str]:
        chosen.append("triton")
        return "triton", "a test asks for it"

    monkeypatch.setattr(api, "choose_implementation", choose)
    monkeypatch.setenv("GISTING_KERNEL_CONFIG", "forward=32,32,4,1;query=32,32,4,1;key=32,32,4,1;table=32,32,4,1")
    return chosen


@pytest.mark.parametrize(
    ("name", "condition", "left", "changes"),
    [
        pytest.param("t5", "gist", True, SMALL, id="t5-gist-small"),
        pytest.param("t5", "gist", True, {}, id="t5-gist", marks=pytest.mark.slow),
        pytest.param("t5", "positive", False, {}, id="t5-positive", marks=pytest.mark.slow),
        pytest.param("umt5", "gist", False, {}, id="umt5-gist", marks=pytest.mark.slow),
    ],
)
def test_t5_outputs_and_gradients_are_those_of_stock_eager(
    name: str, condition: str, left: bool, changes: dict[str, Any], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes:
        monkeypatch.setattr(test_relative_bias, "ROWS", test_relative_bias.ROWS[:2])
    model, _ = tiny.patched(name, **changes)
    given = batch(condition, left)
    found = result_of(model, model(**given.call()).logits, given.is_target)
    assert calls
    assert sum(key.endswith("relative_attention_bias.weight") for key in found.gradients) == (
        5 if name == "umt5" else 2
    )
    stock = tiny.stock_twin(name, model, attn_implementation="eager", **changes)
    results: list[Result] = []
    for dtype in (torch.float32, torch.float64):
        stock = stock.to(dtype)
        results.append(result_of(stock, stock_logits(stock, given), given.is_target))
    assert_as_good_as(found, *results)


@pytest.mark.slow
def test_t5_training_is_that_of_stock_eager(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take 20 steps of AdamW in float32 from weights of the usual size (see the same test of the relative bias)."""
    monkeypatch.setattr(test_relative_bias, "ROWS", test_relative_bias.ROWS[:2])
    model, _ = tiny.patched("t5", num_layers=1, num_decoder_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    stock = tiny.stock_twin("t5", model, attn_implementation="eager", num_layers=1, num_decoder_layers=1)
    given = batch("gist")
    losses: list[list[float]] = []
    for which, logits_of in (
        (model, lambda: model(**given.call()).logits),
        (stock, lambda: stock_logits(stock, given)),
    ):
        stepper = torch.optim.AdamW(which.parameters(), lr=3e-4)
        losses.append([])
        for _ in range(20):
            stepper.zero_grad()
            loss = loss_of(logits_of(), given)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(which.parameters(), 1.0)
            stepper.step()
            losses[-1].append(loss.item())
    assert calls
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    trained = dict(stock.named_parameters())
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    torch.testing.assert_close(dict(model.named_parameters())[name], trained[name], rtol=1e-3, atol=1e-5)


def test_llama_outputs_and_gradients_are_those_of_the_oracle(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny.patched("llama")
    ids = torch.randint(4, 60, (2, 37), generator=torch.Generator().manual_seed(1))
    is_gist = torch.zeros_like(ids, dtype=torch.bool)
    is_gist[0, 17:20] = is_gist[1, 5] = True
    is_token = torch.ones_like(is_gist)
    is_token[1, 30:] = False
    seen = vis.gist(is_gist, is_token)
    call = {
        "input_ids": ids,
        "attention_mask": seen.as_attention_mask(),
        "position_ids": seen.position_ids,
        "use_cache": False,
    }
    found = result_of(model, model(**call).logits, is_token)
    assert len(calls) == 1  # once for all layers
    monkeypatch.setattr(api, "choose_implementation", lambda *args, **kwargs: ("reference", "a test asks for it"))
    call["attention_mask"] = seen.as_attention_mask()  # the choice is stored with the mask
    plain = result_of(model, model(**call).logits, is_token)
    truth = result_of(model.double(), model(**call).logits, is_token)
    assert not torch.equal(found[0], plain[0])  # otherwise the kernels would be compared with themselves
    assert_as_good_as(found, plain, truth)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))])
        return out


def layer(num_rows: int, impl: str) -> Callable[[], Tensor]:
    """Run forward and backward of one attention with T5's bias, including the plan."""
    q, k, v = (torch.randn(1, 2, num_rows, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(2, 2 * 5 + 1, requires_grad=True)
    is_gist = torch.zeros(1, num_rows, dtype=torch.bool)
    is_gist[:, num_rows // 2] = True
    seen = vis.encoder_gist(is_gist, torch.ones_like(is_gist))
    return lambda: interval_attention(q, k, v, seen, relative_bias=table, scale=1.0, impl=impl).sum()


@pytest.mark.parametrize(("impl", "growth"), [("triton", 1), ("reference", 2)])
def test_memory_of_a_t5_layer(impl: str, growth: int, calls: list[str]) -> None:
    """The largest tensor grows linearly with N with the kernels, quadratically with the reference."""
    sizes = []
    for num_rows in (64, 128):
        run = layer(num_rows, impl)
        with Largest() as largest:
            run().backward()
        sizes.append(largest.numel)
    assert [after / before for before, after in itertools.pairwise(sizes)] == [2**growth]


def test_mirrored_table_is_found(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug is found: the same kernels with negated distances do not pass."""
    whole = gisting_kernels.interval_attention

    def mirrored(*args: Any, relative_bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        table = None if relative_bias is None else relative_bias.flip(1)
        return whole(*args, relative_bias=table, **kwargs)

    monkeypatch.setattr(gisting_kernels, "interval_attention", mirrored)
    # By the check of the model, or by the comparison if the model was checked by a test before.
    with pytest.raises((AssertionError, UnsupportedModelError)):
        test_t5_outputs_and_gradients_are_those_of_stock_eager("t5", "gist", True, SMALL, calls, monkeypatch)


@pytest.mark.parametrize("impl", ["triton", "flex"])
def test_what_is_planned_goes_with_the_intervals(impl: str, calls: list[str]) -> None:
    seen = vis.causal(torch.ones(1, 40, dtype=torch.bool))
    q = torch.randn(1, 1, 40, 16)
    first = interval_attention(q, q, q, seen, impl=impl)
    assert torch.equal(interval_attention(q, q, q, seen, impl=impl), first)
    held = weakref.ref(seen.first)
    del seen
    gc.collect()
    assert held() is None
