"""``interval_attention``: check the arguments and choose an implementation.

Place in the flow: text -> tokens -> visibility -> **attention** -> (inside a model) -> cache. Independent of models and
text. This is the only module that may import ``gisting_kernels``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

import gisting_kernels as kernels
from gisting.attention.autocast import as_autocast, autocast_dtype
from gisting.attention.memo import remembered
from gisting.attention.reference import reference_attention
from gisting.attention.relative import dense_bias
from gisting.attention.sdpa import sdpa_attention
from gisting.errors import GistError
from gisting.visibility import Visibility

__all__ = ["IMPLEMENTATIONS", "choose_implementation", "interval_attention", "mean_segment_length", "segments_of"]

#: The values of ``impl=``.
IMPLEMENTATIONS = ("auto", "reference", "sdpa", "flex", "triton")

_logger = logging.getLogger("gisting")
# Up to this many query rows, without gradients, the decoding kernel is used: the other kernel's tiles would be mostly
# empty.
_MAX_DECODE_ROWS = 8


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute attention in which query row ``i`` sees key ``j`` where ``first[j] <= i < end[j]``.

    The result is softmax(softcap(q k^T scale) + bias) v over the keys that a row sees. A row that sees no key gives
    zeros and has zero gradients.

    Args:
        q: ``(B, H, T, D)``, floating point. The rows are the last T of the K rows of the visibility; with a cached
            prefix, K > T. If T > K, as in a decoder that reads an encoder, they are counted from 0.
        k: ``(B, G, K, D)``, dtype and device of q; query head h reads key head ``h // (H // G)``.
        v: ``(B, G, K, Dv)``, as k.
        visibility: B sequences of K keys, on the device of q. With B = 1, it is used for every sequence.
        bias: ``(B or 1, H or 1, T, K)``, floating point, added to the scores, or None. Differentiable.
        relative_bias: ``(H, 2 W + 1)``, floating point, or None. ``relative_bias[h, clamp(j - i, -W, W) + W]`` is added
            to the score of row i and key j, as in T5 (arXiv 1910.10683, section 2.1). It excludes ``bias``.
            Differentiable.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: if given, scores become ``softcap * tanh(scores / softcap)``, as in Gemma 2.
        dropout: probability of dropping an attention weight.
        sinks: ``(H,)``, floating point and finite, or None. With them, the sum of a row's softmax has one more term,
            ``exp(sinks[h])``, so that its weights sum to less than 1, as in gpt-oss. Differentiable.
        impl: the implementation. An explicit choice never falls back to another: it raises if it cannot serve the call.

            - ``"triton"``: the fused kernels of ``gisting_kernels``. They need a CUDA device of compute capability 8.0
              or higher, float16, bfloat16 or float32, D = Dv up to 256, and a positive scale. They support
              ``relative_bias`` and ``sinks`` but no dense ``bias``.
            - ``"sdpa"``: torch's fused operator. On the CPU it runs in pieces without a mask if the intervals allow it,
              otherwise with a dense mask. It has no softcap.
            - ``"flex"``: torch's FlexAttention. It has no dropout and no sinks, and on the CPU no gradients for q, k
              and v. Its back end is torch's Triton kernels, or FlashAttention-4 with the environment variable
              ``GISTING_FLEX_BACK_END=flash``.
            - ``"reference"``: dense attention in float32 or better. It supports everything, slowly.
            - ``"auto"``: triton if it can serve the call on a CUDA device, otherwise reference if there is a softcap,
              otherwise sdpa. The logger ``gisting`` logs the choice and its reason once, at level INFO.

    Returns:
        ``(B, H, T, Dv)`` in the dtype of q.

    Raises:
        GistError: shapes, dtypes or devices disagree, a number is out of range, or ``impl`` cannot serve the call.
    """
    if not q.dtype == k.dtype == v.dtype:
        # Under autocast, rotated queries and keys are float32 while values are in half precision. torch's operator then
        # also computes in half precision.
        q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (relative_bias is not None and relative_bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )
    # Everything that the checks and the choice depend on. The layers of a model agree in it, so both are done once for
    # each batch.
    kinds = (_kind(q), _kind(k), _kind(v), _kind(bias), _kind(relative_bias), _kind(sinks), autocast_dtype(q))
    attend = remembered(
        visibility,
        ("attend", impl, scale, softcap, dropout, needs_grad, *kinds),
        lambda: _decide(q, k, v, visibility, bias, relative_bias, sinks, scale, softcap, dropout, impl, needs_grad),
    )
    return attend(q, k, v, visibility, bias, relative_bias, sinks)


@contextmanager
def segments_of(length: float | None) -> Iterator[None]:
    """Tell the kernels, inside this block, how many rows see a key on average. They choose their tiles by it.

    Otherwise they measure it, which makes the host wait for the device, or, if gradients are needed, assume the number
    of keys. Only speed depends on it.

    Args:
        length: at least 0, such as :func:`mean_segment_length` returns; None to leave it to the kernels.
    """
    before = _segment_length.set(length)
    try:
        yield
    finally:
        _segment_length.reset(before)


def mean_segment_length(visibility: Visibility) -> float:
    """Return how many rows see a key, averaged over the keys that some row sees.

    Args:
        visibility: intervals on the CPU; on another device, the host waits for them.
    """
    return kernels.mean_segment_length(visibility.first, visibility.end, visibility.num_keys)


_Attend = Callable[[Tensor, Tensor, Tensor, Visibility, "Tensor | None", "Tensor | None", "Tensor | None"], Tensor]
_segment_length: ContextVar[float | None] = ContextVar("segment_length", default=None)


def _kind(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _decide(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    impl: str,
    needs_grad: bool,
) -> _Attend:
    """Check the arguments and choose an implementation.

    The returned function accepts arguments of the same kinds without checks. It is cached on the visibility, so it
    keeps no reference to the visibility's tensors.

    Raises:
        GistError: the arguments do not fit each other, or the chosen implementation does not support them.
    """
    _check(q, k, v, visibility, bias, relative_bias, sinks, softcap, dropout)
    if impl not in IMPLEMENTATIONS:
        raise GistError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        impl, reason = choose_implementation(
            as_autocast(q), v, scale, has_bias=bias is not None, has_softcap=softcap is not None
        )
        if not torch.compiler.is_compiling():
            _log_choice(impl, reason)
    if impl == "triton":
        if bias is not None:
            raise GistError("impl='triton' supports no dense bias; use relative_bias, or impl='auto'")
        return _by_triton(q, k, v, visibility, relative_bias, sinks, scale, softcap, dropout, needs_grad)
    if impl == "flex":
        if bias is not None or dropout > 0 or sinks is not None:
            raise GistError(
                "impl='flex' supports no dropout, no dense bias and no sinks; use impl='auto' or impl='sdpa'"
            )
        return _by_flex(q, k, visibility, scale, softcap)
    if impl == "sdpa" and softcap is not None:
        raise GistError("impl='sdpa' supports no softcap; use impl='auto' or impl='reference'")

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        bias: Tensor | None,
        relative_bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if relative_bias is not None:
            bias = dense_bias(relative_bias, q.shape[2], k.shape[2])
        if impl == "reference":
            return reference_attention(
                q, k, v, visibility, bias=bias, scale=scale, softcap=softcap, dropout=dropout, sinks=sinks
            )
        return sdpa_attention(q, k, v, visibility, bias=bias, scale=scale, dropout=dropout, sinks=sinks)

    return attend


def choose_implementation(
    q: Tensor, v: Tensor, scale: float, *, has_bias: bool = False, has_softcap: bool = False
) -> tuple[str, str]:
    """Return the implementation that ``impl="auto"`` chooses for a call, and the reason.

    The choice depends only on the device, the dtype and the head size of the tensors, and on the other arguments.

    Args:
        q: ``(B, H, T, D)``, as for :func:`interval_attention`.
        v: ``(B, G, K, Dv)``, as q.
        scale: factor of the scores.
        has_bias: whether there is a dense bias.
        has_softcap: whether there is a softcap.

    Returns:
        One of :data:`IMPLEMENTATIONS`, and the reason in words.
    """
    reason = kernels.why_not(q, v, scale, has_bias=has_bias) if q.is_cuda else "the tensors are not on a CUDA device"
    if reason is None:
        return "triton", "the fused kernels apply"
    if has_softcap:
        return "reference", f"there is a softcap, which sdpa does not support, and not triton: {reason}"
    return "sdpa", f"not triton: {reason}"


@functools.cache
def _log_choice(impl: str, reason: str) -> None:
    _logger.info("attention runs on impl=%r: %s", impl, reason)


def _by_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    needs_grad: bool,
) -> _Attend:
    q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
    reason = kernels.why_not(q, v, scale, has_bias=False)
    if reason is not None:
        raise GistError(f"impl='triton' cannot serve this call: {reason}; use impl='auto'")
    is_plain = relative_bias is None and sinks is None and dropout == 0
    if q.shape[2] <= _MAX_DECODE_ROWS and not needs_grad and is_plain:

        def decode(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *_: Tensor | None) -> Tensor:
            q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
            return kernels.decode_attention(
                q, k, v, visibility.first, visibility.end, scale=scale, softcap=softcap, is_checked=True
            )

        return decode
    width = None if relative_bias is None else relative_bias.shape[1] // 2
    # torch.compile cannot trace a context variable, and a compiled graph measures nothing.
    length = None if torch.compiler.is_compiling() else _segment_length.get()
    if length is None and needs_grad:
        length = float(k.shape[2])
    can_pingpong = softcap is None and dropout == 0
    plan = remembered(
        visibility,
        ("triton", q.shape[2], q.shape[3], q.dtype, width, length, can_pingpong),
        # Clones, because the plan keeps the intervals, and nothing cached on a tensor may refer to that tensor.
        lambda: kernels.plan_tiles(
            visibility.first.clone(),
            visibility.end.clone(),
            q,
            relative_width=width,
            segment_length=length,
            can_pingpong=can_pingpong,
        ),
    )

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        bias: Tensor | None,
        relative_bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        return kernels.interval_attention(
            as_autocast(q),
            as_autocast(k),
            as_autocast(v),
            plan,
            relative_bias=relative_bias,
            scale=scale,
            softcap=softcap,
            dropout=dropout,
            sinks=sinks,
            is_checked=True,
        )

    return attend


def _by_flex(q: Tensor, k: Tensor, visibility: Visibility, scale: float, softcap: float | None) -> _Attend:
    # Importing FlexAttention takes long.
    from gisting.attention.flex import BLOCK, flex_attention

    num_rows, num_keys = q.shape[2], k.shape[2]
    start = max(num_keys - num_rows, 0)
    lists = remembered(
        visibility,
        ("flex", num_rows),
        lambda: kernels.list_tiles(visibility.first, visibility.end, num_rows, start, (BLOCK, BLOCK)),
    )

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        bias: Tensor | None,
        relative_bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        return flex_attention(q, k, v, visibility, lists, relative_bias=relative_bias, scale=scale, softcap=softcap)

    return attend


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    dropout: float,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise GistError(f"{name} must have 4 dimensions (batch, heads, rows, head size), got {_show(tensor)}")
    if not q.is_floating_point():
        raise GistError(f"q must be floating point, got {q.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise GistError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}; cast one of them")
        if tensor.device != q.device:
            raise GistError(f"{name} must be on the device of q, {q.device}, got {tensor.device}; move one of them")
        if tensor.shape[0] != q.shape[0]:
            raise GistError(f"{name} must have the batch size of q, {q.shape[0]}, got {_show(tensor)}")
    if k.shape[:3] != v.shape[:3]:
        raise GistError(f"k and v must agree in batch, heads and length, got {_show(k)} and {_show(v)}")
    if k.shape[-1] != q.shape[-1]:
        raise GistError(f"k must have the head size of q, {q.shape[-1]}, got {_show(k)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise GistError(f"q must have a multiple of k's heads, got {q.shape[1]} and {k.shape[1]} heads")
    if visibility.num_keys != k.shape[2] or visibility.batch_size not in (1, q.shape[0]):
        raise GistError(
            f"visibility must be for {q.shape[0]} sequences (or 1) of {k.shape[2]} keys, got {visibility.batch_size} "
            f"sequences of {visibility.num_keys} keys"
        )
    if visibility.device != q.device:
        raise GistError(
            f"visibility must be on the device of q, {q.device}, got {visibility.device}; use .to(q.device)"
        )
    if bias is not None:
        full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if (
            bias.dim() != 4
            or bias.shape[2:] != full[2:]
            or any(have not in (1, want) for have, want in zip(bias.shape[:2], full[:2], strict=True))
        ):
            raise GistError(f"bias must have shape {full}, or 1 for the batch or the heads, got {_show(bias)}")
        if bias.device != q.device:
            raise GistError(f"bias must be on the device of q, {q.device}, got {bias.device}")
    if relative_bias is not None:
        if bias is not None:
            raise GistError("bias and relative_bias cannot be combined; add both into one bias")
        if relative_bias.dim() != 2 or relative_bias.shape[0] != q.shape[1] or relative_bias.shape[1] % 2 == 0:
            raise GistError(
                f"relative_bias must have shape ({q.shape[1]}, 2 W + 1), with one row for each head of q and an odd "
                f"number of distances, got {_show(relative_bias)}"
            )
        if not relative_bias.is_floating_point():
            raise GistError(f"relative_bias must be floating point, got {relative_bias.dtype}")
        if relative_bias.device != q.device:
            raise GistError(f"relative_bias must be on the device of q, {q.device}, got {relative_bias.device}")
    if sinks is not None:
        if sinks.shape != (q.shape[1],) or not sinks.is_floating_point():
            raise GistError(
                f"sinks must be floating point of shape ({q.shape[1]},), one for each head of q, got {sinks.dtype} "
                f"{_show(sinks)}"
            )
        if sinks.device != q.device:
            raise GistError(f"sinks must be on the device of q, {q.device}, got {sinks.device}; move them")
    if softcap is not None and not softcap > 0:
        raise GistError(f"softcap must be positive, got {softcap}")
    if not 0.0 <= dropout < 1.0:
        raise GistError(f"dropout must be in [0, 1), got {dropout}")


def _show(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
