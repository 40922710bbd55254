"""The operators: interval attention with its gradients, and decoding, as torch custom ops that run the Triton kernels.

Place in the flow: plan, forward, backward, decode -> **op** -> the caller. ``torch.ops.gisting.interval_attention`` has
a schema, a fake implementation and a backward, so it works under ``torch.compile(fullgraph=True)``, ``torch.export``
and gradient checkpointing. A selective checkpoint can keep its result (:func:`keep_attention`). Eager calls
bypass torch's dispatcher, unless a dispatch mode, a subclass or a compiler must see the operator.

On a machine without a GPU the kernels run, slowly, under ``TRITON_INTERPRET=1`` (set before triton is first imported).
"""

# Over 600 lines because an operator, its checks, its gradient and its launches are of no use apart.

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ._ops import add_op_namespace_prefix, ops
from .configs import HOPPER, has_little_shared_memory, tile_sizes
from .descriptors import can_describe, describe
from .plan import Plan, TileSizes, make_plan, mean_segment_length

__all__ = ["decode_attention", "interval_attention", "is_interpreting", "keep_attention", "plan_tiles", "why_not"]

MAX_HEAD_SIZE = 256
# Gluon is an experimental part of Triton. The kernel of ``pingpong`` compiles in these versions, the last included.
GLUON_VERSIONS = ((3, 6), (3, 9))
# Three TF32 products keep both operands twice in registers, where larger heads do not fit.
MAX_HEAD_SIZE_FLOAT32 = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Indices into Plan.tensors()
_FIRST, _END, _FORWARD, _QUERY, _TABLE, _BOUNDS, _KEY_ORDER = 0, 1, 2, 5, 8, 11, 12


def is_interpreting() -> bool:
    """Return whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(q: Tensor, v: Tensor, scale: float, *, has_bias: bool) -> str | None:
    """Return why the kernels cannot serve a call, or None if they can.

    Args:
        q: ``(B, H, T, D)``, of any dtype.
        v: ``(B, G, K, Dv)``, of any dtype.
        scale: factor of the scores.
        has_bias: whether there is a dense bias.
    """
    # Not cached on the CPU, where the answer depends on the environment and may change, nor inside torch.compile, which
    # cannot trace a cache.
    is_known = q.device.type == "cuda" and not torch.compiler.is_compiling()
    device_trouble, triton_trouble = (_known_troubles_of if is_known else _troubles_of)(q.device)
    if device_trouble is not None:
        return device_trouble
    if q.dtype not in _DTYPES:
        return f"there is no kernel for {q.dtype}"
    size = q.shape[-1]
    if size > MAX_HEAD_SIZE:
        return f"the head size is {size}, more than {MAX_HEAD_SIZE}"
    if size > MAX_HEAD_SIZE_FLOAT32 and q.dtype == torch.float32:
        return f"the head size is {size}, more than {MAX_HEAD_SIZE_FLOAT32} in float32"
    if v.shape[-1] != size:
        return f"the head sizes of q and v differ, {size} and {v.shape[-1]}"
    if not scale > 0:
        return f"the scale is {scale}, not positive"
    if has_bias:
        return "there is a dense bias; the kernels take relative_bias"
    return triton_trouble


def _troubles_of(device: torch.device) -> tuple[str | None, str | None]:
    """What rules the kernels out for any tensors: the device, and a missing triton."""
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        triton_trouble = "triton is not installed (pip install 'gist-tokens[kernels]')"
    else:
        triton_trouble = None
    device_trouble = None
    if device.type != "cuda" and not (is_interpreting() and device.type == "cpu"):
        device_trouble = f"the tensors are on {device.type}, not on a CUDA device"
    elif torch.version.hip is not None:
        device_trouble = "this torch is built for AMD cards, for which the kernels have never been compiled"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        name = torch.cuda.get_device_name(device)
        device_trouble = f"{name} has no asynchronous copies (compute capability below 8.0)"
    return device_trouble, triton_trouble


# Called in every layer of every step; the answer for a CUDA device does not change.
_known_troubles_of = functools.cache(_troubles_of)


def plan_tiles(
    first: Tensor,
    end: Tensor,
    q: Tensor,
    *,
    relative_width: int | None = None,
    segment_length: float | None = None,
    can_pingpong: bool = True,
) -> Plan:
    """Plan attention for queries like ``q``. One plan serves every layer of a batch.

    Args:
        first: integer ``(B or 1, K)``: key j is seen by the rows ``first[j] <= i < end[j]``.
        end: as ``first``.
        q: ``(B, H, T, D)``. Only its device, dtype, head size and T matter.
        relative_width: W of a relative bias ``(H, 2 W + 1)``, if there will be one.
        segment_length: mean number of rows that see a key. By default it is measured where K is large enough to
            matter, which reads one number back from the device. Inside ``torch.compile`` and while a CUDA graph is
            captured it is never measured.
        can_pingpong: False if there will be dropout or a softcap, which the path pingpong does not have: its tiles
            are then not used.
    """
    capability = (8, 0) if q.device.type != "cuda" else torch.cuda.get_device_capability(q.device)
    num_rows, num_keys = q.shape[2], first.shape[1]
    if segment_length is None:
        segment_length = float(num_keys)
        is_fixed = torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing())
        if num_keys > 384 and not is_fixed:
            segment_length = mean_segment_length(first, end, num_rows)
    has_bias = relative_width is not None
    sizes = tile_sizes(
        capability,
        q.shape[-1],
        q.element_size() * 8,
        segment_length,
        has_bias=has_bias,
        can_pingpong=can_pingpong,
    )
    near = None if relative_width is None else max(relative_width, 1)
    return make_plan(first, end, num_rows, sizes, near=near)


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    relative_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
    precision: str | None = None,
    is_checked: bool = False,
) -> Tensor:
    """Compute softmax(softcap(scale q k^T) + bias) v over the keys that each row sees. Rows that see none give zeros.

    Args:
        q: ``(B, H, T, D)``, float16, bfloat16 or float32, any strides. Row t is row ``max(K - T, 0) + t`` of the mask.
        k: ``(B, G, K, D)``, dtype of q; query head h reads key head ``h // (H // G)``.
        v: as k.
        plan: what :func:`plan_tiles` returned.
        relative_bias: ``(H, 2 W + 1)``, floating point: entry ``clamp(j - i, -W, W) + W`` is added to the score of row
            i and key j. Its gradient is exact and deterministic.
        scale: positive; ``D ** -0.5`` by default.
        softcap: if given, scores become ``softcap tanh(score / softcap)``.
        dropout: probability of dropping a weight.
        sinks: ``(H,)``, floating point and finite: each row's softmax has one more term, ``exp(sinks[h])``, without a
            value.
        seed: int64 ``(1,)`` on the device of q; the same seed drops the same weights. By default it is drawn from
            torch's generator for that device.
        precision: precision of float32 products: ``"tf32"``, ``"tf32x3"`` (three products, nearly float32) or
            ``"ieee"``. The default is tf32x3, or tf32 where ``torch.set_float32_matmul_precision`` allows it.
        is_checked: skip all argument checks. Only valid after a call with the same shapes, dtypes, devices and options
            has passed them, as in every layer of a model after the first; otherwise the result is undefined.

    Returns:
        ``(B, H, T, D)`` in the dtype and memory layout of q.

    Raises:
        ValueError: the arguments do not fit each other or the kernels.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else float(scale)
    if not is_checked:
        _check(q, k, v, plan, relative_bias, sinks, scale, softcap, dropout, seed)
        if precision not in (None, "tf32", "tf32x3", "ieee"):
            raise ValueError(f"precision must be 'tf32', 'tf32x3', 'ieee' or None, got {precision!r}")
    table, width = None, 0
    if relative_bias is not None:
        table = relative_bias.float()
        if table.shape[1] == 1:
            table = table.expand(-1, 3)
        table, width = table.contiguous(), table.shape[1] // 2
    if dropout > 0 and seed is None:
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
    softcap = 0.0 if softcap is None else float(softcap)
    given = (tensor for tensor in (q, k, v, relative_bias, sinks) if tensor is not None)
    run = ops.interval_attention if _is_watched(*given) else _Direct.apply
    sinks = None if sinks is None else sinks.float()
    out, _ = run(
        q, k, v, plan.tensors(), table, seed, scale, softcap, float(dropout), width, plan.numbers(), precision or "",
        sinks,
    )  # fmt: skip
    return out


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    is_checked: bool = False,
) -> Tensor:
    """Compute attention for a few query rows, without gradients.

    The heads that read the same key head are packed into one tile, and the keys are split over programs.

    Args:
        q: ``(B, H, T, D)``, float16, bfloat16 or float32. Row t is row ``max(K - T, 0) + t`` of the mask.
        k: ``(B, G, K, D)``, dtype of q; K may be 0.
        v: as k.
        first: integer ``(B or 1, K)``: key j is seen by the rows ``first[j] <= i < end[j]``.
        end: as ``first``.
        scale: as for :func:`interval_attention`.
        softcap: as for :func:`interval_attention`.
        is_checked: as for :func:`interval_attention`.

    Returns:
        ``(B, H, T, D)`` in the dtype and layout of q.

    Raises:
        ValueError: the arguments do not fit each other or the kernels.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else float(scale)
    if not is_checked:
        _check_decode(q, k, v, first, end, scale, softcap)
    return ops.decode_attention(
        q, k, v, first.to(torch.int32).contiguous(), end.to(torch.int32).contiguous(), scale,
        0.0 if softcap is None else float(softcap),
    )  # fmt: skip


def keep_attention() -> Any:
    """Return contexts that keep attention's result, for the argument ``context_fn`` of torch's ``checkpoint``.

    With ``use_reentrant=False``, everything else is recomputed in the backward. The result of attention is expensive to
    recompute and cheap to keep.
    """
    return create_selective_checkpoint_contexts(_keep_policy)


def _keep_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_attention = op == ops.interval_attention.default
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    reason = why_not(q, v, scale, has_bias=False)
    if reason is not None:
        raise ValueError(f"the kernels cannot serve this call: {reason}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must have the same dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    others = {"k": k, "v": v, "plan": plan.first, "relative_bias": relative_bias, "sinks": sinks, "seed": seed}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}; move one of them")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be one int64, got {seed.dtype} {tuple(seed.shape)}")
    batch, heads, rows, size = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != size or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"shapes do not match: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if plan.num_rows != rows or plan.num_keys != k.shape[2] or plan.first.shape[0] not in (1, batch):
        raise ValueError(
            f"plan is for {plan.first.shape[0]} sequences of {plan.num_rows} rows and {plan.num_keys} keys, but q and "
            f"k have {batch} sequences of {rows} rows and {k.shape[2]} keys; call plan_tiles again"
        )
    if relative_bias is not None and (
        relative_bias.dim() != 2 or relative_bias.shape[0] != heads or relative_bias.shape[1] % 2 == 0
    ):
        raise ValueError(f"relative_bias must have shape ({heads}, 2 W + 1), got {tuple(relative_bias.shape)}")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(f"sinks must be floating point of shape ({heads},), got {sinks.dtype} {tuple(sinks.shape)}")
    width = None if relative_bias is None else max(relative_bias.shape[1] // 2, 1)
    if plan.near != width:
        raise ValueError(
            f"plan was made for a relative bias of width {plan.near}, got width {width}; call plan_tiles again"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def _check_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    reason = why_not(q, v, scale, has_bias=False)
    if reason is not None:
        raise ValueError(f"the kernels cannot serve this call: {reason}")
    shape = (q.shape[0], k.shape[1], k.shape[2], q.shape[3])
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}; move one of them")
        if tensor.dtype != q.dtype or tensor.shape != shape:
            raise ValueError(f"{name} must be {q.dtype} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if first.device != q.device or end.device != q.device:
        raise ValueError(f"first and end must be on the device of q, {q.device}, got {first.device} and {end.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if (
        k.shape[1] == 0
        or q.shape[1] % k.shape[1]
        or first.shape != end.shape
        or first.shape[1] != k.shape[2]
        or first.shape[0] not in (1, q.shape[0])
    ):
        raise ValueError(f"shapes do not match: q {tuple(q.shape)}, k {tuple(k.shape)}, first {tuple(first.shape)}")


# -- the custom op -----------------------------------------------------------------------------------------------------


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Sequence[Tensor],
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
    width: int,
    sizes: Sequence[int],
    precision: str,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp in base 2, float32 ``(B, H, T)``, both with the sinks."""
    if sinks is not None:
        found = _run_forward(q, k, v, plan, table, seed, scale, softcap, dropout, width, sizes, precision, None)
        return _with_sinks(*found, sinks)
    from .forward import forward_kernel

    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("inf"))
    if _must_upcast(q):
        wide, lse = _run_forward(
            q.float(), k.float(), v.float(), plan, table, seed, scale, softcap, dropout, width, sizes, precision, None
        )
        return out.copy_(wide), lse
    launch = _Launch(q, k, plan, table, seed, scale, softcap, dropout, width, precision)
    size = TileSizes.from_numbers(sizes, 0)
    tiles, counts, order = plan[_FORWARD : _FORWARD + 3]
    num_tiles = counts.shape[1]
    has_descriptors = size.path != "pointers" and can_describe(q, k, v, out)
    if has_descriptors and size.path == "pingpong" and _can_pingpong(q, launch, size, softcap, dropout):
        _pingpong(q, k, v, out, lse, plan, launch, size, scale)
        return out, lse
    given = (q, k, v)
    if has_descriptors:
        rows = size.rows, size.keys, size.keys
        given = tuple(describe(*pair, launch.padded) for pair in zip(given, rows, strict=True))
    launch(forward_kernel, num_tiles * q.shape[0] * q.shape[1], size)(
        *given, out, lse, plan[_FIRST], plan[_END], tiles, counts, order, launch.table, launch.seed,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        *launch.numbers(num_tiles, tiles.shape[2] - 1), GROUP=launch.group, BIAS=launch.has_bias,
        SOFTCAP=softcap > 0, DROPOUT=dropout > 0, D=q.shape[3], BD=launch.padded, BM=size.rows, BN=size.keys,
        EVEN_K=k.shape[2] % size.keys == 0, PRECISION=launch.precision, DESCRIPTORS=has_descriptors,
    )  # fmt: skip
    return out, lse


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Add a term to the sum of every row, in place. A row that sees no key keeps its zeros and its infinity.

    The backward pass needs nothing more: with this log-sum-exp its weights are right, and a sink has no value.
    """
    both = torch.logaddexp2(lse, sinks[:, None] * math.log2(math.e))
    out.mul_(torch.where(lse == torch.inf, 0.0, torch.exp2(lse - both))[..., None])
    return out, both


def _can_pingpong(q: Tensor, launch: _Launch, size: TileSizes, softcap: float, dropout: float) -> bool:
    """Return whether the kernel of ``pingpong`` can serve a call whose tensors can be described."""
    return (
        q.is_cuda
        and q.element_size() == 2
        and launch.padded in (64, 128)
        and size.rows % 128 == 0
        and not (launch.has_bias or softcap > 0 or dropout > 0)
        and torch.cuda.get_device_capability(q.device) == HOPPER
        and _knows_gluon()
    )


@functools.cache
def _knows_gluon() -> bool:
    import triton  # pyright: ignore[reportMissingImports]

    first, last = GLUON_VERSIONS
    return first <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= last


def _pingpong(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Sequence[Tensor],
    launch: _Launch,
    size: TileSizes,
    scale: float,
) -> None:
    """Launch the kernel of ``pingpong``, with one program for each processor."""
    from .pingpong import pingpong_kernel

    tiles, counts, order = plan[_FORWARD : _FORWARD + 3]
    num_tiles = counts.shape[1]
    num_work = num_tiles * q.shape[0] * q.shape[1]
    half = size.rows // 2
    given = [
        describe(tensor, rows, launch.padded, is_gluon=True)
        for tensor, rows in ((q, half), (k, size.keys), (v, size.keys), (out, half))
    ]
    mask_stride, _, *numbers = launch.numbers(num_tiles, tiles.shape[2] - 1)[:8]
    # Each consumer has four warps, as many as the program that starts them.
    own = dataclasses.replace(size, warps=4)
    launch(pingpong_kernel, min(num_work, _card(q.device)[0]), own)(
        *given, lse, plan[_FIRST], plan[_END], tiles, counts, order,
        mask_stride, *numbers, num_work, scale,
        GROUP=launch.group, HALF=half, BN=size.keys, BD=launch.padded, STAGES=size.stages,
    )  # fmt: skip


_forward_op = torch.library.custom_op(add_op_namespace_prefix("interval_attention"), mutates_args=())(_run_forward)


@_forward_op.register_fake
def _(q, k, v, plan, table, seed, scale, softcap, dropout, width, sizes, precision, sinks):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Sequence[Tensor],
    table: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
    width: int,
    sizes: Sequence[int],
    precision: str,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and of the table, float32 ``(H, 2 W + 1)`` (empty unless ``needs_table``)."""
    from .backward import key_kernel, query_kernel, table_kernel

    heads = q.shape[1]
    d_table = torch.zeros((heads, 2 * width + 1) if needs_table else (0, 0), dtype=torch.float32, device=q.device)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), d_table
    if _must_upcast(q):
        wide = _run_backward(
            grad.float(), q.float(), k.float(), v.float(), out.float(), lse, plan, table, seed, scale, softcap, dropout,
            width, sizes, precision, needs_table,
        )  # fmt: skip
        return dq.copy_(wide[0]), dk.copy_(wide[1]), dv.copy_(wide[2]), wide[3]

    launch = _Launch(q, k, plan, table, seed, scale, softcap, dropout, width, precision)
    num_keys = k.shape[2]
    delta = torch.empty_like(lse)
    shared: dict[str, Any] = {
        "GROUP": launch.group, "SOFTCAP": softcap > 0, "DROPOUT": dropout > 0, "D": q.shape[3], "BD": launch.padded,
        "PRECISION": launch.precision,
    }  # fmt: skip
    given = _Tiles(launch.padded, q, k, v, grad)
    size = TileSizes.from_numbers(sizes, 1)
    tiles, counts, order = plan[_QUERY : _QUERY + 3]
    num_tiles, num_key_tiles = counts.shape[1], tiles.shape[2] - 1
    far = torch.empty((*lse.shape, 2) if needs_table else (1,), dtype=torch.float32, device=q.device)
    tensors, has_descriptors = given.of(size)
    launch(query_kernel, num_tiles * q.shape[0] * heads, size)(
        *tensors, out, lse, delta, dq, far, plan[_FIRST], plan[_END], tiles, counts, order, launch.table, launch.seed,
        *q.stride(), *k.stride(), *v.stride(), *grad.stride(), *out.stride(), *dq.stride(),
        *launch.numbers(num_tiles, num_key_tiles), BIAS=launch.has_bias, TABLE_GRADIENT=needs_table,
        BM=size.rows, BN=size.keys, EVEN_K=num_keys % size.keys == 0, DESCRIPTORS=has_descriptors, **shared,
    )  # fmt: skip

    size = TileSizes.from_numbers(sizes, 2)
    bounds, order = plan[_BOUNDS], plan[_KEY_ORDER]
    num_tiles = bounds.shape[1]
    tensors, has_descriptors = given.of(size)
    launch(key_kernel, num_tiles * k.shape[0] * k.shape[1], size)(
        *tensors, lse, delta, dk, dv, plan[_FIRST], plan[_END], bounds, order, launch.table, launch.seed,
        *q.stride(), *k.stride(), *v.stride(), *grad.stride(), *dk.stride(), *dv.stride(),
        *launch.numbers(num_tiles), BIAS=launch.has_bias, BM=size.rows, BN=size.keys, DESCRIPTORS=has_descriptors,
        STAGES=size.stages, **shared,
    )  # fmt: skip

    if needs_table:
        size = TileSizes.from_numbers(sizes, 3)
        tiles, counts, _ = plan[_TABLE : _TABLE + 3]
        num_tiles, num_key_tiles = counts.shape[1], tiles.shape[2] - 1
        partial = torch.zeros((*q.shape[:2], num_tiles, 2 * width + 1), dtype=torch.float32, device=q.device)
        launch(table_kernel, num_tiles * q.shape[0] * heads, size)(
            q, k, v, grad, lse, delta, partial, plan[_FIRST], plan[_END], tiles, counts, launch.table, launch.seed,
            *q.stride(), *k.stride(), *v.stride(), *grad.stride(),
            *launch.numbers(num_tiles, num_key_tiles), BM=size.rows, BN=size.keys,
            EVEN_K=num_keys % size.keys == 0, **shared,
        )  # fmt: skip
        d_table = partial.sum((0, 2))
        sides = far.sum((0, 2))
        d_table[:, 0] += sides[:, 0]
        d_table[:, -1] += sides[:, 1]
    return dq, dk, dv, d_table


_backward_op = torch.library.custom_op(add_op_namespace_prefix("interval_attention_backward"), mutates_args=())(
    _run_backward
)


@_backward_op.register_fake
def _(grad, q, k, v, out, lse, plan, table, seed, scale, softcap, dropout, width, sizes, precision, needs_table):  # type: ignore[no-untyped-def]
    shape = (q.shape[1], 2 * width + 1) if needs_table else (0, 0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), q.new_empty(shape, dtype=torch.float32)


def _run_sinks_backward(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of the sinks, float32 ``(H,)``. An operator, so that its own derivative raises."""
    weights = torch.exp2(sinks[:, None] * math.log2(math.e) - lse)
    return -(weights * (grad.float() * out.float()).sum(-1)).sum((0, 2))


_sinks_backward_op = torch.library.custom_op(
    add_op_namespace_prefix("interval_attention_sinks_backward"), mutates_args=()
)(_run_sinks_backward)


@_sinks_backward_op.register_fake
def _(grad, out, lse, sinks):  # type: ignore[no-untyped-def]
    return torch.empty_like(sinks)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, plan, table, seed, *ctx.numbers, sinks = inputs
    ctx.num_plan = len(plan)
    ctx.has_table = table is not None
    ctx.has_seed = seed is not None
    ctx.has_sinks = sinks is not None
    ctx.save_for_backward(q, k, v, *output, *plan, *(tensor for tensor in (sinks, table, seed) if tensor is not None))
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    dq, dk, dv, d_table, d_sinks = _gradients(
        ops.interval_attention_backward, ops.interval_attention_sinks_backward, ctx, grad
    )
    return dq, dk, dv, [None] * ctx.num_plan, d_table, None, *[None] * len(ctx.numbers), d_sinks


def _gradients(
    run: Any, run_sinks: Any, ctx: Any, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    plan, rest = list(rest[: ctx.num_plan]), rest[ctx.num_plan :]
    d_sinks = None
    if ctx.has_sinks:
        sinks, *rest = rest
        if ctx.needs_input_grad[-1]:
            d_sinks = run_sinks(grad, out, lse, sinks)
    table = rest[0] if ctx.has_table else None
    seed = rest[-1] if ctx.has_seed else None
    needs_table = ctx.has_table and ctx.needs_input_grad[4]
    dq, dk, dv, d_table = run(grad, q, k, v, out, lse, plan, table, seed, *ctx.numbers, needs_table)
    return dq, dk, dv, d_table if needs_table else None, d_sinks


_forward_op.register_autograd(_differentiate, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The operator without torch's dispatcher, which takes several times as long as all else on the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = _run_forward(*inputs)
        _save(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The operators raise if their gradients are differentiated, which create_graph allows.
        run: tuple[Any, Any] = (_run_backward, _run_sinks_backward)
        if torch.is_grad_enabled():
            run = (ops.interval_attention_backward, ops.interval_attention_sinks_backward)
        dq, dk, dv, d_table, d_sinks = _gradients(*run, ctx, grad)
        return dq, dk, dv, None, d_table, None, *[None] * len(ctx.numbers), d_sinks


def _is_watched(*tensors: Tensor) -> bool:
    """Return whether something must see the operator: a compiler, a mode or subclass that dispatches, or torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


@torch.library.custom_op(add_op_namespace_prefix("decode_attention"), mutates_args=())
def _decode_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    from .decode import run_decode

    precision = _precision(q.dtype, "")
    if _must_upcast(q):
        return torch.empty_like(q).copy_(_decode_op(q.float(), k.float(), v.float(), first, end, scale, softcap))
    if q.device.type != "cuda":
        return run_decode(q, k, v, first, end, scale, softcap, precision, 4)
    processors, is_small = _card(q.device)
    with torch.cuda.device(q.device):
        return run_decode(q, k, v, first, end, scale, softcap, precision, processors, is_small=is_small)


@functools.cache
def _card(device: torch.device) -> tuple[int, bool]:
    """Return the number of a card's processors, and whether it has little shared memory."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors, has_little_shared_memory(torch.cuda.get_device_capability(device))


@_decode_op.register_fake
def _(q, k, v, first, end, scale, softcap):  # type: ignore[no-untyped-def]
    return torch.empty_like(q)


def _precision(dtype: torch.dtype, wanted: str) -> str:
    """Choose how float32 products are computed, inside the operator, because torch.compile cannot trace the getter."""
    if dtype != torch.float32:
        return "ieee"
    return wanted or ("tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32")


def _must_upcast(q: Tensor) -> bool:
    """The interpreter multiplies the bit patterns of bfloat16 (Triton 3.9) and truncates when it rounds to bfloat16."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


class _Tiles:
    """q, k, v and the gradient of the output as the backward kernels take them."""

    def __init__(self, padded: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
        self._padded = padded
        self._tensors = (q, k, v, grad)
        # Described for tiles of some rows and keys: dQ and dK/dV often have the same.
        self._described: dict[tuple[int, int], tuple[Any, ...]] = {}

    @functools.cached_property
    def _can_describe(self) -> bool:
        return can_describe(*self._tensors)

    def of(self, size: TileSizes) -> tuple[tuple[Any, ...], bool]:
        """Return the tensors and False or, if ``size`` says so and all of them allow it, their descriptors and True."""
        if size.path == "pointers" or not self._can_describe:
            return self._tensors, False
        if size.shape not in self._described:
            rows = (size.rows, size.keys, size.keys, size.rows)
            self._described[size.shape] = tuple(
                describe(*pair, self._padded) for pair in zip(self._tensors, rows, strict=True)
            )
        return self._described[size.shape], True


class _Launch:
    """The arguments that all kernels of a call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        plan: Sequence[Tensor],
        table: Tensor | None,
        seed: Tensor | None,
        scale: float,
        softcap: float,
        dropout: float,
        width: int,
        precision: str,
    ) -> None:
        self.group = q.shape[1] // k.shape[1]
        self.has_bias = table is not None
        # A missing table or seed is never read; any tensor on the device will do.
        self.table = plan[_FIRST] if table is None else table
        self.seed = plan[_FIRST] if seed is None else seed
        self.padded = max(16, 1 << (q.shape[3] - 1).bit_length())
        self.precision = _precision(q.dtype, precision)
        self.device = q.device
        self._mask_stride = 0 if plan[_FIRST].shape[0] == 1 else 1
        self._table_stride = 2 * width + 1
        self._counts = (q.shape[1], q.shape[2], k.shape[2], max(k.shape[2] - q.shape[2], 0))
        self._scalars = (scale, softcap, dropout, width)

    def numbers(self, *tiles: int) -> tuple[float, ...]:
        """Return the scalar arguments in the order that every kernel takes them."""
        return (self._mask_stride, self._table_stride, *self._counts, *tiles, *self._scalars)

    def __call__(self, kernel: Any, num_programs: int, size: TileSizes) -> Any:
        launch = functools.partial(
            kernel[(num_programs,)], num_warps=size.warps, num_stages=size.stages, enable_fp_fusion=True
        )
        # Entering a device costs a few microseconds, and a training step has hundreds of launches.
        if self.device.type != "cuda" or self.device.index == torch.cuda.current_device():
            return launch

        def on_device(*args: Any, **kwargs: Any) -> None:
            with torch.cuda.device(self.device):
                launch(*args, **kwargs)

        return on_device
