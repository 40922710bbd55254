"""Compare ``impl="flex"`` with the oracle, and its block mask with a dense mask.

On the CPU, torch's FlexAttention evaluates the mask for each pair and ignores the blocks, so the blocks are tested
separately. There it has gradients only for the table of a relative bias.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gisting import visibility as vis
from gisting.attention import flex, interval_attention
from gisting.attention.relative import dense_bias
from gisting.errors import GistError
from gisting.visibility import Visibility
from gisting_kernels import list_tiles
from tests.attention.test_interval_attention import inputs, largest_score, masks, tolerance, worst
from tests.slow import slow

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def packed(num_keys: int) -> Visibility:
    """Make two sequences of documents of 5, 6, 7, ... tokens with one gist token each; the second starts long."""
    lengths = torch.arange(5, num_keys + 5)
    documents = torch.repeat_interleave(torch.arange(num_keys), lengths)[:num_keys]
    documents = torch.stack([documents, torch.where(torch.arange(num_keys) < num_keys // 2, 0, documents + 1)])
    is_gist = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (2, 0))[:, :num_keys]
    return vis.gist(is_gist, documents=documents)


def branched(num_keys: int) -> Visibility:
    """Make a prompt with its gist, and three completions that share it."""
    index = torch.arange(num_keys)[None]
    prompt = num_keys // 4
    branches = torch.where(index < prompt, 0, 1 + (index - prompt) * 3 // max(num_keys - prompt, 1))
    return vis.gist((index >= prompt - 2) & (index < prompt), branches=branches)


def both_ways(num_keys: int) -> Visibility:
    index = torch.arange(num_keys)
    is_gist = ((index >= num_keys // 2) & (index < num_keys // 2 + 3)).expand(2, -1)
    return vis.encoder_gist(is_gist, torch.stack([index >= 0, index < num_keys - num_keys // 4]))


def cross(num_keys: int) -> Visibility:
    return masks(num_keys).for_cross_attention()


def windowed(num_keys: int) -> Visibility:
    return vis.causal(torch.ones(1, num_keys)).windowed(17)


def nothing(num_keys: int) -> Visibility:
    return vis.causal(torch.zeros(1, num_keys))


BUILDERS: dict[str, Callable[[int], Visibility]] = {
    "gist-and-padding": masks,
    "packed": packed,
    "branches": branched,
    "bidirectional": both_ways,
    "cross": cross,
    "window": windowed,
    "nothing": nothing,
}


def plain(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Attend the plain way, all in the dtype of q, with the keys in reverse order: the yardstick."""
    group = q.shape[1] // k.shape[1]
    k, v = k.flip(2).repeat_interleave(group, 1), v.flip(2).repeat_interleave(group, 1)
    seen = visibility.to_dense(q.shape[2])[:, None].flip(-1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias.to(q.dtype).flip(-1)
    return scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~seen, 0.0) @ v


def assert_as_good_as_plain(
    visibility: Visibility,
    heads: int = 4,
    groups: int = 2,
    num_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    width: int | None = None,
    softcap: float | None = None,
) -> None:
    """Compare the output, and with a relative bias of ``width`` the gradient of its table."""
    num_keys = visibility.num_keys
    given = inputs(heads, groups, num_keys if num_rows is None else num_rows, num_keys, dtype, batch=4)
    if visibility.batch_size == 2:
        given = given._replace(**{name: getattr(given, name)[:2] for name in ("q", "k", "v", "upstream")})
    q, k, v = (t.detach() for t in given[:3])
    table = None if width is None else torch.randn(heads, 2 * width + 1)

    def run(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf = None if table is None else table.detach().to(dtype).requires_grad_()
        out = attend(q.to(dtype), k.to(dtype), v.to(dtype), leaf)
        assert out.dtype == dtype
        return [out.detach(), *([] if leaf is None else torch.autograd.grad(out, leaf, given.upstream.to(dtype)))]

    def ours(impl: str) -> Callable[..., Tensor]:
        return lambda q, k, v, table: interval_attention(
            q, k, v, visibility, relative_bias=table, softcap=softcap, impl=impl
        )

    def yardstick(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        bias = None if table is None else dense_bias(table, q.shape[2], k.shape[2])
        return plain(q, k, v, visibility, bias, softcap)

    exact, by_plain, have = run(ours("reference"), torch.float64), run(yardstick, dtype), run(ours("flex"), dtype)
    largest = largest_score(given) + (0 if table is None else table.abs().max().item())
    for name, *tensors in zip(("out", "dtable"), have, by_plain, exact, strict=False):
        assert tensors[0].shape == tensors[2].shape, name
        error, bound = worst(tensors[0], tensors[2]), tolerance(tensors[1], tensors[2], largest)
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"  # NaN fails too


@pytest.mark.parametrize("num_keys", [slow(1), 63, slow(128), slow(200)])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_outputs(build: Callable[[int], Visibility], num_keys: int) -> None:
    assert_as_good_as_plain(build(num_keys))


@pytest.mark.parametrize("dtype", [slow(torch.float64), torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [slow(1, 1), slow(4, 4), (6, 2), slow(4, 1)])
def test_dtypes_and_heads(heads: int, groups: int, dtype: torch.dtype) -> None:
    assert_as_good_as_plain(masks(63), heads, groups, dtype=dtype)


@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 7), (7, 200), slow(130, 200)])
def test_prefix_keys(num_rows: int, num_keys: int) -> None:
    assert_as_good_as_plain(masks(num_keys), num_rows=num_rows)


@pytest.mark.parametrize(("num_rows", "num_keys"), [(63, 7), slow(200, 111)])
def test_more_rows_than_keys(num_rows: int, num_keys: int) -> None:
    assert_as_good_as_plain(cross(num_keys), num_rows=num_rows)


def test_softcap() -> None:
    assert_as_good_as_plain(masks(63), softcap=0.9)


@pytest.mark.parametrize(
    ("num_rows", "num_keys", "width", "softcap"),
    [
        slow(63, 63, 9, None),
        (63, 63, 9, 0.9),
        slow(20, 63, 9, None),
        slow(63, 20, 9, None),
        slow(63, 63, 100, None),
        (9, 9, 0, None),
    ],
)
def test_relative_bias_and_its_gradient(num_rows: int, num_keys: int, width: int, softcap: float | None) -> None:
    """With softcap (before the bias), with T < K and T > K, a table wider than the sequence, and one column only."""
    visibility = both_ways(num_keys) if num_rows <= num_keys else cross(num_keys)
    assert_as_good_as_plain(visibility, num_rows=num_rows, width=width, softcap=softcap)


@pytest.mark.parametrize("width", [None, 2])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(5, 0), (0, 5), (0, 0)])
def test_no_rows_or_no_keys(num_rows: int, num_keys: int, width: int | None) -> None:
    q, k, v = torch.randn(2, 4, num_rows, 8), torch.randn(2, 2, num_keys, 8), torch.randn(2, 2, num_keys, 9)
    table = None if width is None else torch.randn(4, 2 * width + 1, requires_grad=True)
    visibility = vis.bidirectional(torch.ones(1, num_keys))
    out = interval_attention(q, k, v, visibility, relative_bias=table, impl="flex")
    assert torch.equal(out, torch.zeros(2, 4, num_rows, 9))
    if table is not None:
        assert torch.equal(torch.autograd.grad(out.sum(), table)[0], torch.zeros_like(table))


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals that end one row late fail the comparison."""
    right = flex._mask_mod
    monkeypatch.setattr(flex, "_mask_mod", lambda first, end: right(first, end + 1))
    with pytest.raises(AssertionError, match="out: error"):
        assert_as_good_as_plain(masks(63))


# -- blocks ------------------------------------------------------------------------------------------------------------


def dense_blocks(counts: Tensor, indices: Tensor, num_columns: int) -> Tensor:
    """Mark the blocks in a list: bool ``(B, rows of blocks, columns of blocks)``."""
    named = torch.zeros(counts.shape[0], counts.shape[2], num_columns, dtype=torch.bool)
    for b in range(counts.shape[0]):
        for row in range(counts.shape[2]):
            named[b, row, indices[b, 0, row, : counts[b, 0, row]].long()] = True
    return named


@pytest.mark.parametrize("num_rows", [None, 130])
@pytest.mark.parametrize("num_keys", [1, 127, 129, 300, 512])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_blocks(build: Callable[[int], Visibility], num_keys: int, num_rows: int | None) -> None:
    visibility = build(num_keys)
    num_rows = num_keys if num_rows is None else num_rows
    lists = list_tiles(visibility.first, visibility.end, num_rows, max(num_keys - num_rows, 0), (flex.BLOCK,) * 2)
    mask = flex.block_mask(visibility, lists, num_rows)
    assert mask.shape == (visibility.batch_size, 1, num_rows, num_keys)
    size = flex.BLOCK
    seen = visibility.to_dense(num_rows)
    seen = torch.nn.functional.pad(seen, (0, -num_keys % size))
    # A full block may contain rows beyond the last, but no keys beyond the last.
    rows = seen.split(size, dim=1)
    has_any = torch.stack([row.unflatten(2, (-1, size)).any(-1).any(1) for row in rows], 1)
    has_all = torch.stack([row.unflatten(2, (-1, size)).all(-1).all(1) for row in rows], 1)
    num_columns = has_any.shape[2]
    partial = dense_blocks(mask.kv_num_blocks, mask.kv_indices, num_columns)
    full = dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, num_columns)
    assert not (partial & full).any()
    assert not (has_any & ~partial & ~full).any(), "a block that holds something is not named"
    assert not (full & ~has_all).any(), "a block named full is not"
    # The lists for the backward are the transposed ones.
    assert torch.equal(dense_blocks(mask.q_num_blocks, mask.q_indices, has_any.shape[1]).mT, partial)
    assert torch.equal(dense_blocks(mask.full_q_num_blocks, mask.full_q_indices, has_any.shape[1]).mT, full)


def test_full_blocks_are_found() -> None:
    visibility = vis.causal(torch.ones(1, 512))
    lists = list_tiles(visibility.first, visibility.end, 512, 0, (128, 128))
    # The planner's kernels may leave anything after the end of a list.
    is_unused = torch.arange(lists.tiles.shape[-1]) >= lists.counts[..., 2:]
    mask = flex.block_mask(visibility, replace(lists, tiles=lists.tiles.masked_fill(is_unused, 10**9)), 512)
    assert mask.kv_indices.amax() < 4
    assert mask.full_kv_indices.amax() < 4
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 3]


def test_the_mask_is_made_once_for_a_batch_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    build = flex.block_mask
    monkeypatch.setattr(flex, "block_mask", lambda *args: calls.append(args[2]) or build(*args))
    given, visibility = inputs(num_rows=63), masks(63)
    q, k, v = (t.detach() for t in given[:3])
    for _ in range(2):
        interval_attention(q, k, v, visibility, impl="flex")
    interval_attention(q[:, :, -5:], k, v, visibility, impl="flex")
    assert calls == [63, 5]
    gone = weakref.ref(visibility.first)
    del visibility
    gc.collect()
    assert gone() is None


# -- compilation and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [slow(None), 9])
def test_compiles_as_a_whole(width: int | None) -> None:
    """Attention and the block mask are traced together. No code is generated, which takes half a minute on a CPU."""
    given, visibility = inputs(num_rows=63), masks(63)
    q, k, v = (t.detach() for t in given[:3])
    table = None if width is None else torch.randn(4, 2 * width + 1)

    def attend(first: Tensor, end: Tensor) -> Tensor:
        return interval_attention(q, k, v, Visibility(first, end), relative_bias=table, impl="flex")

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(visibility.first, visibility.end)
    eager = attend(visibility.first, visibility.end)
    assert worst(compiled, eager) <= 4 * torch.finfo(torch.float32).eps * eager.abs().max().item()


def test_too_many_compilations_are_an_error_and_no_dense_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    q = torch.randn(1, 1, 4, 8)
    with torch._dynamo.config.patch(recompile_limit=1):
        flex._compiled()(q, q, q)
        wider = torch.randn(1, 1, 4, 16)
        with pytest.raises(FailOnRecompileLimitHit):
            flex._compiled()(wider, wider, wider)
    flex._compiled.cache_clear()
    torch._dynamo.reset()


def test_the_back_end_is_torchs_triton_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GISTING_FLEX_BACK_END", raising=False)
    assert (flex.back_end(), flex._kernel_options()) == ("triton", {})
    monkeypatch.setenv("GISTING_FLEX_BACK_END", "flash")
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: object())
    assert (flex.back_end(), flex._kernel_options()) == ("flash", {"kernel_options": {"BACKEND": "FLASH"}})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cuda", "GISTING_FLEX_BACK_END must be one of triton, flash, got 'cuda'"),
        ("flash", "GISTING_FLEX_BACK_END=flash needs FlashAttention-4: pip install flash-attn-4"),
    ],
)
def test_back_ends_that_are_not_there(wanted: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GISTING_FLEX_BACK_END", wanted)
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GistError) as caught:
        flex.back_end()
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_on_a_cpu_are_refused(name: str) -> None:
    given = {key: torch.randn(1, 2, 9, 8) for key in "qkv"}
    given[name].requires_grad_()
    visibility = vis.causal(torch.ones(1, 9))
    with pytest.raises(GistError) as caught:
        interval_attention(**given, visibility=visibility, impl="flex")
    assert str(caught.value) == (
        "impl='flex' has no gradients of q, k and v on the CPU, because torch's FlexAttention has none; use "
        "impl='auto', or torch.no_grad()"
    )
    with torch.no_grad():
        assert interval_attention(**given, visibility=visibility, impl="flex").shape == (1, 2, 9, 8)


@pytest.mark.parametrize("options", [{"bias": torch.zeros(1, 1, 9, 9)}, {"dropout": 0.1}], ids=["bias", "dropout"])
def test_options_that_flex_does_not_support_are_refused(options: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(GistError) as caught:
        interval_attention(q, q, q, vis.causal(torch.ones(1, 9)), impl="flex", **options)
    message = "impl='flex' supports no dropout, no dense bias and no sinks; use impl='auto' or impl='sdpa'"
    assert str(caught.value) == message


# -- on a card ---------------------------------------------------------------------------------------------------------


@requires_cuda
@pytest.mark.parametrize("width", [None, 9], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(63, 63), (300, 300), (130, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_on_a_card(dtype: torch.dtype, num_rows: int, num_keys: int, width: int | None) -> None:
    torch._dynamo.reset()
    given = inputs(4, 2, num_rows, num_keys, dtype, size=32)
    visibility = masks(num_keys).to("cuda")
    table = None if width is None else torch.randn(4, 2 * width + 1)

    def run(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to("cuda", dtype).requires_grad_() for t in given[:3]]
        # All implementations keep tables in float32.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaf = None if table is None else table.to("cuda", wide).requires_grad_()
        out = attend(*leaves, leaf)
        leaves += [] if leaf is None else [leaf]
        return [out.detach(), *torch.autograd.grad(out, leaves, given.upstream.to("cuda", dtype))]

    def ours(impl: str) -> Callable[..., Tensor]:
        return lambda q, k, v, table: interval_attention(q, k, v, visibility, relative_bias=table, impl=impl)

    def yardstick(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        return plain(q, k, v, visibility, None if table is None else dense_bias(table, q.shape[2], k.shape[2]))

    exact, by_plain, have = run(ours("reference"), torch.float64), run(yardstick, dtype), run(ours("flex"), dtype)
    largest = largest_score(given) + (0 if table is None else table.abs().max().item())
    for name, *tensors in zip(("out", "dq", "dk", "dv", "dtable"), have, by_plain, exact, strict=False):
        # The floor of the tolerance uses the eps of the inputs' dtype.
        error, bound = worst(tensors[0], tensors[2]), tolerance(tensors[1].to(dtype), tensors[2], largest)
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"
