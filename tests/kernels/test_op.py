"""Test the operators with torch's features (schema, fake tensors, compile, export, checkpoint, autocast), and how
``gisting.attention`` uses them: what it chooses, refuses and caches.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")

import gisting_kernels as kernels
from gisting import visibility as vis
from gisting.attention import api, interval_attention
from gisting.errors import GistError
from gisting.visibility import Visibility
from gisting_kernels import op
from gisting_kernels.configs import ENVIRONMENT_VARIABLE
from gisting_kernels.op import _Launch, _troubles_of
from tests.kernels.conftest import (
    DEVICE,
    IS_CUDA,
    MIXED,
    SMALL,
    Given,
    differentiate,
    failures,
    fused,
    make,
    plan_for,
)
from tests.slow import slow

pytestmark = [
    pytest.mark.usefixtures("device"),
    # exp2 of a masked score, in the interpreter's NumPy
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
FORWARD = torch.ops.gisting.interval_attention.default
BACKWARD = torch.ops.gisting.interval_attention_backward.default
DECODE = torch.ops.gisting.decode_attention.default


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small tiles, so that a few rows make several."""
    sizes = "forward=16,16,4,2;query=16,16,4,2;key=16,16,4,2;table=16,16,4,1"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, sizes)


def gist_in_the_middle(num_keys: int) -> Visibility:
    index = torch.arange(num_keys)[None]
    return vis.gist(index == num_keys // 2, index >= num_keys // 7).to(str(DEVICE))


class Calls(TorchDispatchMode):
    """Count the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def assert_same_bits(have: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert have.keys() == expected.keys()
    for name, tensor in have.items():
        assert torch.equal(tensor, expected[name]), name


# -- schema, fake tensors, autograd ------------------------------------------------------------------------------------


def arguments(
    given: Given, *, softcap: float = 0.0, dropout: float = 0.0, sinks: Tensor | None = None
) -> tuple[Any, ...]:
    """Make the arguments of the forward operator."""
    plan = plan_for(given, gist_in_the_middle(given.k.shape[2]))
    seed = torch.tensor([3], device=DEVICE) if dropout else None
    width = 0 if given.near is None else given.near
    sizes = plan.numbers()
    return (*given[:3], plan.tensors(), given.table, seed, 0.25, softcap, dropout, width, sizes, "ieee", sinks)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param({"width": 2}, {"softcap": 1.5, "dropout": 0.2}, id="bias-softcap-dropout"),
        slow({"dtype": torch.bfloat16, "num_keys": 30, "heads": 4, "groups": 2}, {}, id="bfloat16-prefix-keys"),
        pytest.param({"num_rows": 0}, {}, id="no-rows"),
        pytest.param({}, {"sinks": torch.tensor([0.5, -1.0], device=DEVICE, requires_grad=True)}, id="sinks"),
    ],
)
def test_opcheck(shape: dict[str, Any], options: dict[str, Any]) -> None:
    given = make(**{"num_rows": 17, "num_keys": 17, **shape})
    opcheck(FORWARD, arguments(given, **options))


@pytest.mark.parametrize(
    "layout",
    [pytest.param((0, 2, 1, 3), id="BTHD"), slow((1, 0, 2, 3), id="HBTD"), slow((0, 1, 3, 2), id="BHDT")],
)
def test_opcheck_of_strided_queries(layout: tuple[int, ...]) -> None:
    """The fake implementation must return the strides of the real one."""
    given = make(17, batch=2)
    inverse = tuple(torch.tensor(layout).argsort().tolist())
    q = given.q.detach().permute(layout).contiguous().permute(inverse)
    opcheck(FORWARD, arguments(given._replace(q=q)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("needs_table", [False, True], ids=["no-bias", "bias"])
def test_opcheck_of_the_backward(needs_table: bool) -> None:
    given = make(17, width=2 if needs_table else None)
    leaves = Given(*(t if t is None else t.detach() for t in given))
    args = arguments(leaves)
    out, lse = FORWARD(*args)
    opcheck(
        BACKWARD,
        (given.upstream, *args[:3], out, lse, *args[3:-1], needs_table),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_of_decoding() -> None:
    given = make(2, 17, batch=2, heads=4, groups=2)
    q, k, v = (t.detach() for t in given[:3])
    visibility = gist_in_the_middle(17)
    opcheck(DECODE, (q, k, v, visibility.first, visibility.end, 0.25, 0.0))


@pytest.mark.parametrize("is_watched", [True, False])
def test_a_second_derivative_raises(is_watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_is_watched", lambda *tensors: is_watched)
    given, visibility = make(17), gist_in_the_middle(17)
    out = fused(given, plan_for(given, visibility))
    (grad,) = torch.autograd.grad(out.sum(), given.q, create_graph=True)
    with pytest.raises(RuntimeError, match="interval_attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_second_derivative_of_sinks_raises(is_watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_is_watched", lambda *tensors: is_watched)
    given, visibility = make(17), gist_in_the_middle(17)
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    out = fused(given, plan_for(given, visibility), sinks=sinks)
    (grad,) = torch.autograd.grad(out.sum(), sinks, create_graph=True)
    with pytest.raises(RuntimeError, match="interval_attention_sinks_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("is_watched", [False, True])
def test_frozen_sinks_cost_no_gradient(is_watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_is_watched", lambda *tensors: is_watched)
    given, visibility = make(17), gist_in_the_middle(17)
    out = fused(given, plan_for(given, visibility), sinks=torch.zeros(2, device=DEVICE))
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.autograd.grad(out.sum(), given.q)
    assert seen
    assert not [name for name in seen if "exp2" in name or "sinks" in name]


@pytest.mark.parametrize("name", ["relative_bias", "sinks"])
def test_a_subclass_in_any_argument_sees_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Subclass(Tensor):
        pass

    def fail(*inputs: Any) -> None:
        raise AssertionError("the dispatcher was bypassed")

    monkeypatch.setattr(op._Direct, "apply", fail)
    given, visibility = make(17, width=3 if name == "relative_bias" else None), gist_in_the_middle(17)
    plan = plan_for(given, visibility)
    if name == "relative_bias":
        assert given.table is not None
        fused(given._replace(table=given.table.detach().as_subclass(Subclass)), plan)
    else:
        fused(given, plan, sinks=torch.zeros(2, device=DEVICE).as_subclass(Subclass))


@pytest.mark.parametrize("width", [None, 3])
def test_direct_calls_give_the_bits_of_the_operator(width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients of some of the inputs, too."""
    given, visibility = make(21, heads=4, groups=2, width=width), gist_in_the_middle(21)
    plan, seed = plan_for(given, visibility, MIXED), torch.tensor([5], device=DEVICE)
    results = []
    for is_watched in (True, False):
        monkeypatch.setattr(op, "_is_watched", lambda *tensors, answer=is_watched: answer)
        results.append(differentiate(lambda it: fused(it, plan, dropout=0.2, seed=seed), given))
        frozen = Given(*(None if t is None else t.detach() for t in given))  # pyright: ignore[reportArgumentType]
        frozen.v.requires_grad_()
        out = fused(frozen, plan, dropout=0.2, seed=seed)
        (results[-1]["dv-alone"],) = torch.autograd.grad(out, frozen.v, frozen.upstream)
        assert not fused(given._replace(q=given.q.detach()), plan).isnan().any()
        with torch.no_grad():
            results[-1]["out-alone"] = fused(given, plan, dropout=0.2, seed=seed)
            assert not results[-1]["out-alone"].requires_grad
    assert_same_bits(results[1], results[0])
    assert torch.equal(results[0]["dv-alone"], results[0]["dv"])


def test_what_must_see_the_operator() -> None:
    class Subclass(Tensor):
        pass

    q = make(3).q
    assert not op._is_watched(q, torch.nn.Parameter(q.detach()))
    assert op._is_watched(q, q.as_subclass(Subclass))
    with Calls():
        assert op._is_watched(q)
    seen = []
    torch.func.vmap(lambda row: seen.append(op._is_watched(row)) or row)(q)
    assert seen == [True]


def test_one_launch_of_the_operator_for_each_pass() -> None:
    given, visibility = make(17, width=2), gist_in_the_middle(17)
    plan = plan_for(given, visibility)
    with Calls() as calls:
        differentiate(lambda it: fused(it, plan), given)
    assert (calls.counts[FORWARD], calls.counts[BACKWARD]) == (1, 1)


# -- compile and export ------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize(
    ("width", "options"),
    [
        slow(None, {"softcap": 2.0}, id="softcap"),
        pytest.param(3, {"dropout": 0.3}, id="bias-dropout"),
    ],
)
def test_compiles_as_one_graph_with_a_plan_from_outside(width: int | None, options: dict[str, float]) -> None:
    given, visibility = make(21, heads=4, groups=2, width=width), gist_in_the_middle(21)
    plan, seed = plan_for(given, visibility, MIXED), torch.tensor([5], device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        return 2 * kernels.interval_attention(q, k, v, plan, relative_bias=table, seed=seed, **options)

    graph = compiled(attend)
    expected = differentiate(lambda it: attend(*it[:4]), given)
    assert_same_bits(differentiate(lambda it: graph(*it[:4]), given), expected)


@pytest.mark.parametrize("width", [slow(None, id="no-bias"), pytest.param(3, id="bias")])
def test_compiles_as_one_graph_that_plans_inside(width: int | None) -> None:
    """The intervals are read from the mask tensor, as inside a patched model."""
    given, visibility = make(21, heads=4, groups=2, width=width), gist_in_the_middle(21)
    mask = visibility.as_attention_mask()

    def attend(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        return interval_attention(q, k, v, Visibility.from_attention_mask(mask), relative_bias=table, impl="triton")

    graph = compiled(attend)
    expected = differentiate(lambda it: attend(mask, *it[:4]), given)
    assert_same_bits(differentiate(lambda it: graph(mask, *it[:4]), given), expected)
    assert not failures(given, visibility, expected)


def test_one_graph_serves_all_lengths() -> None:
    """With dynamic shapes, nothing is compiled again, even for lengths that are not multiples of a tile."""

    def attend(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interval_attention(q, k, v, Visibility.from_attention_mask(mask), impl="triton")

    graph = compiled(attend, dynamic=True)
    for num_rows in (21, 33):
        given, mask = make(num_rows), gist_in_the_middle(num_rows).as_attention_mask()
        expected = differentiate(lambda it, m=mask: attend(m, *it[:3]), given)
        with torch.compiler.set_stance("default" if num_rows == 21 else "fail_on_recompile"):
            have = differentiate(lambda it, m=mask: graph(m, *it[:3]), given)
        assert_same_bits(have, expected)


def test_dropout_in_a_graph_draws_again_each_time_and_the_backward_draws_the_same() -> None:
    """With v and the gradient all ones, the sum of dv over the keys is the sum of the kept weights: the output."""
    given, visibility = make(21, heads=1), gist_in_the_middle(21)
    plan = plan_for(given, visibility)
    q, k, v = given.q.detach(), given.k.detach(), torch.ones_like(given.v).requires_grad_()

    graph = compiled(lambda v: kernels.interval_attention(q, k, v, plan, dropout=0.4, precision="ieee"))
    out, other = graph(v), graph(v)
    assert not torch.equal(out, other)
    for result in (out, other):
        (grad,) = torch.autograd.grad(result, v, torch.ones_like(result))
        torch.testing.assert_close(grad.sum((1, 2)), result.sum((1, 2)).detach(), rtol=1e-5, atol=1e-5)


def test_decoding_compiles() -> None:
    given, visibility = make(1, 21, heads=4, groups=2), gist_in_the_middle(21)
    q, k, v = (t.detach() for t in given[:3])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interval_attention(q, k, v, visibility, impl="triton")

    with Calls() as calls:
        expected = attend(q, k, v)
    assert calls.counts[DECODE] == 1
    assert torch.equal(compiled(attend)(q, k, v), expected)


class Layer(torch.nn.Module):
    """Attention that plans for itself."""

    def forward(self, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interval_attention(q, k, v, Visibility.from_attention_mask(mask), impl="triton")


@pytest.mark.parametrize("strict", [pytest.param(False, id="non-strict"), slow(True, id="strict")])
@pytest.mark.parametrize("num_rows", [2, 21], ids=["decoding", "planning"])
def test_exports(num_rows: int, strict: bool) -> None:
    given = make(num_rows, 21, heads=4, groups=2)
    args = (gist_in_the_middle(21).as_attention_mask(), *(t.detach() for t in given[:3]))
    program = torch.export.export(Layer(), args, strict=strict)
    targets = {node.target for node in program.graph.nodes}
    assert (DECODE if num_rows == 2 else FORWARD) in targets
    assert torch.equal(program.module()(*args), Layer()(*args))


# -- checkpoint and autocast -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [slow(0.0), 0.4])
@pytest.mark.parametrize(
    ("options", "times"),
    [
        pytest.param({}, 2, id="recompute-everything"),
        pytest.param({"context_fn": kernels.keep_attention}, 1, id="keep-attention"),
    ],
)
def test_checkpoint(options: dict[str, Any], times: int, dropout: float) -> None:
    """The gradients are equal to the bit, even with dropout. Only what is not kept is computed again."""
    given, visibility = make(21, width=2), gist_in_the_middle(21)
    plan = plan_for(given, visibility)

    def layer(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return kernels.interval_attention(q.sin(), k, v, plan, relative_bias=table, dropout=dropout).exp()

    torch.manual_seed(7)
    expected = differentiate(lambda it: layer(*it[:4]), given)
    torch.manual_seed(7)
    with Calls() as calls:
        have = differentiate(lambda it: checkpoint(layer, *it[:4], use_reentrant=False, **options), given)
    assert_same_bits(have, expected)
    assert calls.counts[FORWARD] == times
    assert calls.counts[torch.ops.aten.sin.default] == 2
    assert calls.counts[BACKWARD] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_under_autocast(dtype: torch.dtype) -> None:
    """Like torch's own attention, it computes in the dtype of autocast, and gradients have the dtype of the leaves."""
    given, visibility = make(21, width=3), gist_in_the_middle(21)

    def attend(it: Given) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=dtype):
            return interval_attention(*it[:3], visibility, relative_bias=it.table, impl="triton")

    upstream = given.upstream.to(dtype)
    have = differentiate(attend, given._replace(upstream=upstream))
    assert have["out"].dtype == dtype
    assert {have[name].dtype for name in ("dq", "dk", "dv", "dtable")} == {torch.float32}
    cast = Given(*(t.detach().to(dtype).requires_grad_() for t in given[:3]), given.table, upstream)
    expected = differentiate(
        lambda it: interval_attention(*it[:3], visibility, relative_bias=it.table, impl="triton"), cast
    )
    for name, tensor in have.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_under_inference_mode() -> None:
    given, visibility = make(21), gist_in_the_middle(21)
    expected = interval_attention(*given[:3], visibility, impl="triton").detach()
    with torch.inference_mode():
        assert torch.equal(interval_attention(*given[:3], visibility, impl="triton"), expected)
        own = gist_in_the_middle(21)
        assert torch.equal(interval_attention(*given[:3], own, impl="triton"), expected)


# -- gisting.attention: what runs --------------------------------------------------------------------------------------


@pytest.fixture
def _log_again() -> None:
    api._log_choice.cache_clear()


@pytest.mark.usefixtures("_log_again")
@pytest.mark.parametrize(
    ("options", "choice", "reason"),
    [
        pytest.param({}, "sdpa", "not triton: the tensors are not on a CUDA device", id="sdpa"),
        pytest.param(
            {"softcap": 2.0},
            "reference",
            "there is a softcap, which sdpa does not support, and not triton: the tensors are not on a CUDA device",
            id="reference",
        ),
    ],
)
def test_auto_on_the_cpu_says_what_it_runs_and_why_once(
    options: dict[str, float], choice: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not use the interpreter, which is for tests only."""
    q = torch.randn(1, 2, 9, 8)
    visibility = vis.causal(torch.ones(1, 9))
    with caplog.at_level(logging.INFO, logger="gisting"):
        outs = [interval_attention(q, q, q, visibility, **options) for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == [f"attention runs on impl={choice!r}: {reason}"]
    assert torch.equal(outs[0], interval_attention(q, q, q, visibility, impl=choice, **options))


@pytest.mark.usefixtures("_log_again")
@pytest.mark.skipif(not IS_CUDA, reason="needs a CUDA device")
def test_auto_on_a_card_is_triton(caplog: pytest.LogCaptureFixture) -> None:
    given, visibility = make(21), gist_in_the_middle(21)
    with caplog.at_level(logging.INFO, logger="gisting"):
        have = interval_attention(*given[:3], visibility)
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs on impl='triton': the fused kernels apply"
    ]
    assert torch.equal(have, interval_attention(*given[:3], visibility, impl="triton"))


def test_an_explicit_choice_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    given, visibility = make(21), gist_in_the_middle(21)
    with caplog.at_level(logging.INFO, logger="gisting"):
        interval_attention(*given[:3], visibility, impl="triton")
    assert not caplog.records


def test_impl_triton_is_the_operator_as_planned() -> None:
    given, visibility = make(21, width=3), gist_in_the_middle(21)
    plan = kernels.plan_tiles(visibility.first, visibility.end, given.q, relative_width=3)
    expected = kernels.interval_attention(*given[:3], plan, relative_bias=given.table, scale=0.7, softcap=2.0)
    have = interval_attention(*given[:3], visibility, relative_bias=given.table, scale=0.7, softcap=2.0, impl="triton")
    assert torch.equal(have, expected)


SERVES = "impl='triton' cannot serve this call: {}; use impl='auto'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"dtype": torch.float64}, SERVES.format("there is no kernel for torch.float64"), id="float64"),
        pytest.param(
            {"bias": (1, 1, 12, 12)},
            "impl='triton' supports no dense bias; use relative_bias, or impl='auto'",
            id="dense-bias",
        ),
        pytest.param(
            {"size": 257, "dtype": torch.float16},
            SERVES.format("the head size is 257, more than 256"),
            id="D257",
        ),
        pytest.param({"size": 129}, SERVES.format("the head size is 129, more than 128 in float32"), id="D129-float32"),
        pytest.param({"scale": -0.5}, SERVES.format("the scale is -0.5, not positive"), id="negative-scale"),
        pytest.param({"scale": 0.0}, SERVES.format("the scale is 0.0, not positive"), id="scale-0"),
        pytest.param(
            {"value_size": 20}, SERVES.format("the head sizes of q and v differ, 16 and 20"), id="value-head-size"
        ),
    ],
)
def test_what_impl_triton_refuses(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    dtype, size = changes.pop("dtype", torch.float32), changes.pop("size", 16)
    q = torch.zeros(1, 2, 12, size, dtype=dtype, device=DEVICE)
    v = torch.zeros(1, 2, 12, changes.pop("value_size", size), dtype=dtype, device=DEVICE)
    if "bias" in changes:
        changes["bias"] = torch.zeros(changes["bias"], device=DEVICE)
    with pytest.raises(GistError) as caught:
        interval_attention(q, q, v, gist_in_the_middle(12), impl="triton", **changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("num_rows", [2, 12], ids=["decoding", "planning"])
def test_impl_triton_on_the_cpu_without_the_interpreter(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit choice never falls back."""
    monkeypatch.setattr("gisting_kernels.op.is_interpreting", lambda: False)
    q, k = torch.zeros(1, 2, num_rows, 16), torch.zeros(1, 2, 12, 16)
    with pytest.raises(GistError) as caught:
        interval_attention(q, k, k, vis.causal(torch.ones(1, 12)), impl="triton")
    assert str(caught.value) == SERVES.format("the tensors are on cpu, not on a CUDA device")


# -- why_not -----------------------------------------------------------------------------------------------------------


def test_an_environment_variable_switches_the_interpreter_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert kernels.is_interpreting() is expected
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernels.is_interpreting() is False


def test_a_card_without_asynchronous_copies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor claims to be on such a card."""
    monkeypatch.setattr("gisting_kernels.op._known_troubles_of", _troubles_of)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    fake: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 1, 8, 64))
    assert kernels.why_not(fake, fake, 0.1, has_bias=False) == (
        "Tesla T4 has no asynchronous copies (compute capability below 8.0)"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert kernels.why_not(fake, fake, 0.1, has_bias=False) is None


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is not asked again in every layer of every step."""
    asked: list[torch.device] = []
    monkeypatch.setattr("gisting_kernels.op._known_troubles_of", functools.cache(_troubles_of))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    for index, dtype in ((0, torch.float16), (0, torch.bfloat16), (1, torch.float16)):
        fake: Any = SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, shape=(1, 1, 8, 64))
        assert kernels.why_not(fake, fake, 0.1, has_bias=False) is None
    wrong: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float64, shape=(1, 1, 8, 64))
    assert kernels.why_not(wrong, wrong, 0.1, has_bias=False) == "there is no kernel for torch.float64"
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize(("current", "entered"), [(1, []), (0, [torch.device("cuda", 1)])])
def test_a_launch_enters_its_device_only_from_another(
    monkeypatch: pytest.MonkeyPatch, current: int, entered: list[torch.device]
) -> None:
    """Two cards are simulated."""
    given, launched, found = make(17), [], []
    launch = _Launch(
        *given[:2], plan_for(given, gist_in_the_middle(17)).tensors(), None, None, 1.0, 0.0, 0.0, 0, "ieee"
    )
    launch.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: found.append(device) or contextlib.nullcontext())
    kernel = {(3,): lambda *args, **options: launched.append((args, options["num_warps"]))}
    launch(kernel, 3, SMALL[0])(7)
    assert (launched, found) == ([((7,), 4)], entered)


def test_other_devices_are_refused() -> None:
    q = torch.zeros(1, 1, 8, 16, device="meta")
    assert kernels.why_not(q, q, 1.0, has_bias=False) == "the tensors are on meta, not on a CUDA device"


def test_a_dense_bias_is_refused() -> None:
    q = torch.zeros(1, 1, 8, 16, device=DEVICE)
    assert kernels.why_not(q, q, 1.0, has_bias=True) == "there is a dense bias; the kernels take relative_bias"
    assert kernels.why_not(q, q, 1.0, has_bias=False) is None


def test_without_triton_the_package_imports_plans_and_says_why_not() -> None:
    """Runs in a fresh process in which triton cannot be imported. Importing the package never imports triton."""
    code = (
        "import sys\n"
        "import torch, gisting_kernels\n"
        "assert 'triton' not in sys.modules, 'importing gisting_kernels imports triton'\n"
        "sys.modules['triton'] = None\n"
        "q = torch.zeros(1, 1, 8, 16)\n"
        "first, end = torch.arange(8)[None], torch.full((1, 8), 8)\n"
        "assert gisting_kernels.plan_tiles(first, end, q).num_keys == 8\n"
        "print(gisting_kernels.why_not(q, q, 1.0, has_bias=False))\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root / "kernels"), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "triton is not installed (pip install 'gist-tokens[kernels]')"


# -- gisting.attention: what is remembered -----------------------------------------------------------------------------


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record every plan that is made."""
    made: list[Any] = []
    real = kernels.plan_tiles

    def plan_tiles(*args: Any, **kwargs: Any) -> Any:
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(kernels, "plan_tiles", plan_tiles)
    return made


def test_one_plan_serves_every_layer_and_both_passes(plans: list[Any]) -> None:
    given, visibility = make(21), gist_in_the_middle(21)
    hidden = given.q
    for _ in range(3):
        hidden = interval_attention(hidden, given.k, given.v, visibility, impl="triton")
    hidden.sum().backward()
    assert len(plans) == 1


def test_another_length_dtype_width_or_mask_is_planned_again(plans: list[Any]) -> None:
    given, visibility = make(21, width=2), gist_in_the_middle(21)

    def attend(it: Given = given, visibility: Visibility = visibility) -> Tensor:
        return interval_attention(*it[:3], visibility, relative_bias=it.table, impl="triton")

    attend()
    assert len(plans) == 1
    attend(given._replace(q=given.q[:, :, 5:]))
    attend(given.cast(torch.float16))
    attend(given._replace(table=None))
    attend(visibility=gist_in_the_middle(21))
    assert len(plans) == 5
    attend()
    assert len(plans) == 5


def test_a_mask_that_was_written_to_is_planned_again(plans: list[Any]) -> None:
    given, visibility = make(21), gist_in_the_middle(21)
    before = interval_attention(*given[:3], visibility, impl="triton")
    visibility.end.fill_(0)
    after = interval_attention(*given[:3], visibility, impl="triton")
    assert len(plans) == 2
    assert before.any()
    assert not after.any()


def test_the_plan_is_freed_with_its_mask(plans: list[Any]) -> None:
    given, visibility = make(21), gist_in_the_middle(21)
    interval_attention(*given[:3], visibility, impl="triton").sum().backward()
    plan, first = weakref.ref(plans.pop()), weakref.ref(visibility.first)
    del visibility
    gc.collect()
    assert first() is None
    assert plan() is None


# -- errors of the operator --------------------------------------------------------------------------------------------

CANNOT = "the kernels cannot serve this call: "


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


def call(**changes: Any) -> Tensor:
    """Make a valid call with B 2, H 4, G 2, T 5, K 6, D 8, except for changes; ``plan`` has changes of the plan."""
    plan = {"batch": 2, "num_rows": 5, "num_keys": 6, "near": None, **changes.pop("plan", {})}
    first = torch.zeros(plan["batch"], plan["num_keys"], device=DEVICE).int()
    arguments: dict[str, Any] = {
        "q": zeros(2, 4, 5, 8),
        "k": zeros(2, 2, 6, 8),
        "v": zeros(2, 2, 6, 8),
        "plan": kernels.make_plan(first, first + 9, plan["num_rows"], SMALL, near=plan["near"]),
    }
    return kernels.interval_attention(**{**arguments, **changes})


FOR = "plan is for {}, but q and k have 2 sequences of 5 rows and 6 keys; call plan_tiles again"
ERRORS = [
    pytest.param(
        {name: zeros(2, 4, 6, 8, dtype=torch.float64) for name in "qkv"},
        f"{CANNOT}there is no kernel for torch.float64",
        id="float64",
    ),
    pytest.param({"scale": 0.0}, f"{CANNOT}the scale is 0.0, not positive", id="scale"),
    pytest.param({"v": zeros(2, 2, 6, 9)}, f"{CANNOT}the head sizes of q and v differ, 8 and 9", id="value-head-size"),
    pytest.param(
        {"k": zeros(2, 2, 6, 8, dtype=torch.float16)},
        "q, k and v must have the same dtype, got torch.float32, torch.float16 and torch.float32",
        id="k-dtype",
    ),
    pytest.param(
        {"v": zeros(2, 2, 6, 8, dtype=torch.bfloat16)},
        "q, k and v must have the same dtype, got torch.float32, torch.float32 and torch.bfloat16",
        id="v-dtype",
    ),
    pytest.param(
        {"v": zeros(2, 2, 7, 8)}, "shapes do not match: q (2, 4, 5, 8), k (2, 2, 6, 8), v (2, 2, 7, 8)", id="v-length"
    ),
    pytest.param(
        {"k": zeros(1, 2, 6, 8), "v": zeros(1, 2, 6, 8)},
        "shapes do not match: q (2, 4, 5, 8), k (1, 2, 6, 8), v (1, 2, 6, 8)",
        id="batch",
    ),
    pytest.param(
        {"k": zeros(2, 3, 6, 8), "v": zeros(2, 3, 6, 8)},
        "shapes do not match: q (2, 4, 5, 8), k (2, 3, 6, 8), v (2, 3, 6, 8)",
        id="heads-no-multiple",
    ),
    pytest.param(
        {"q": zeros(2, 4, 5, 9), "v": zeros(2, 2, 6, 9)},
        "shapes do not match: q (2, 4, 5, 9), k (2, 2, 6, 8), v (2, 2, 6, 9)",
        id="k-head-size",
    ),
    pytest.param({"plan": {"num_rows": 4}}, FOR.format("2 sequences of 4 rows and 6 keys"), id="plan-rows"),
    pytest.param({"plan": {"num_keys": 7}}, FOR.format("2 sequences of 5 rows and 7 keys"), id="plan-keys"),
    pytest.param({"plan": {"batch": 3}}, FOR.format("3 sequences of 5 rows and 6 keys"), id="plan-batch"),
    pytest.param(
        {"relative_bias": zeros(4, 5)},
        "plan was made for a relative bias of width None, got width 2; call plan_tiles again",
        id="plan-without-bias",
    ),
    pytest.param(
        {"plan": {"near": 2}},
        "plan was made for a relative bias of width 2, got width None; call plan_tiles again",
        id="plan-with-bias",
    ),
    pytest.param(
        {"plan": {"near": 2}, "relative_bias": zeros(4, 7)},
        "plan was made for a relative bias of width 2, got width 3; call plan_tiles again",
        id="plan-of-another-width",
    ),
    pytest.param(
        {"plan": {"near": 2}, "relative_bias": zeros(2, 5)},
        "relative_bias must have shape (4, 2 W + 1), got (2, 5)",
        id="bias-heads",
    ),
    pytest.param(
        {"plan": {"near": 2}, "relative_bias": zeros(4, 4)},
        "relative_bias must have shape (4, 2 W + 1), got (4, 4)",
        id="bias-even",
    ),
    pytest.param({"softcap": 0.0}, "softcap must be positive, got 0.0", id="softcap-0"),
    pytest.param({"softcap": float("nan")}, "softcap must be positive, got nan", id="softcap-nan"),
    pytest.param({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0", id="dropout-1"),
    pytest.param({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1", id="dropout-negative"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        call(**changes)
    assert str(caught.value) == message


def test_the_call_that_the_errors_change_is_right() -> None:
    assert call().shape == (2, 4, 5, 8)
    assert call(plan={"batch": 1}).shape == (2, 4, 5, 8)


def test_a_checked_call_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same numbers; the operator itself checks nothing."""
    given, visibility = make(5, 21, heads=4, groups=2, width=2), gist_in_the_middle(21)
    decoding = (*(t.detach() for t in given[:3]), visibility.first, visibility.end)
    plan = plan_for(given, visibility)
    expected, decoded = fused(given, plan), kernels.decode_attention(*decoding)
    monkeypatch.delattr("gisting_kernels.op.why_not")
    with pytest.raises(NameError, match="why_not"):
        fused(given, plan)
    with pytest.raises(NameError, match="why_not"):
        kernels.decode_attention(*decoding)
    assert torch.equal(fused(given, plan, is_checked=True), expected)
    assert torch.equal(kernels.decode_attention(*decoding, is_checked=True), decoded)


def test_a_misspelt_option_is_no_silent_default() -> None:
    with pytest.raises(TypeError, match="droput"):
        call(droput=0.5)
