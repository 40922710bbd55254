"""``interval_attention``: checks its arguments and chooses an implementation.

Place in the flow: text -> tokens -> visibility -> **attention** -> (inside a model) -> cache. Knows no model and no
text. The only module that may import ``gisting_kernels``.
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

from gisting.attention.autocast import as_autocast, autocast_dtype
from gisting.attention.memo import remembered
from gisting.attention.reference import reference_attention
from gisting.attention.relative import dense_bias
from gisting.attention.sdpa import sdpa_attention
from gisting.errors import GistError
from gisting.visibility import Visibility

__all__ = ["IMPLEMENTATIONS", "choose_implementation", "interval_attention", "segments_of"]

#: What ``impl=`` may be.
IMPLEMENTATIONS = ("auto", "reference", "sdpa", "flex", "triton")

_logger = logging.getLogger("gisting")
# Up to so many query rows without gradients the kernel for decoding is asked: a tile of the other would be empty.
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
    impl: str = "auto",
) -> Tensor:
    """Attention in which key ``j`` is seen by the query rows ``first[j] <= i < end[j]``.

    softmax(softcap(q k^T scale) + bias) v over the keys that a row sees. A row that sees no key gives zeros and zero
    gradients.

    Args:
        q: ``(B, H, T, D)``, floating point. The rows are the last T of the K that the visibility counts (a cached
            prefix has K > T); where T > K, as a decoder may read an encoder, they count from 0.
        k: ``(B, G, K, D)``, dtype and device of q; query head h reads key head ``h // (H // G)``.
        v: ``(B, G, K, Dv)``, as k.
        visibility: B sequences of K keys, on the device of q. B = 1 serves every sequence.
        bias: ``(B or 1, H or 1, T, K)``, floating point, added to the scores, or None. Differentiable.
        relative_bias: ``(H, 2 W + 1)``, floating point, or None: row i adds
            ``relative_bias[h, clamp(j - i, -W, W) + W]`` to its score with key j, as T5 does (arXiv 1910.10683, section
            2.1). Not together with ``bias``. Differentiable.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2), or None.
        dropout: probability with which an attention weight is dropped.
        impl: how. An explicit choice never falls back; what it cannot do it refuses.

            - ``"triton"``: the fused kernels of ``gisting_kernels``. CUDA devices from compute capability 8.0; float16,
              bfloat16, float32; D = Dv up to 256; ``relative_bias`` but no dense ``bias``; a positive scale.
            - ``"sdpa"``: torch's fused operator. On the CPU in pieces without a mask where the intervals allow it, else
              with a dense mask. No softcap.
            - ``"flex"``: torch's FlexAttention. No dropout; on the CPU no gradients for q, k and v.
            - ``"reference"``: dense, in float32 or better; everything, slowly.
            - ``"auto"``: triton on a CUDA device where it applies, else reference where there is a softcap, else sdpa.
              The choice and its reason are logged once, at level INFO, by the logger ``gisting``.

    Returns:
        ``(B, H, T, Dv)`` in the dtype of q.

    Raises:
        GistError: shapes, dtypes or devices disagree, a number is out of range, or ``impl`` cannot do what was asked.
    """
    if not q.dtype == k.dtype == v.dtype:
        # Under autocast, rotated queries and keys are float32 beside values in half precision; torch's operator, too,
        # then works in the latter.
        q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (relative_bias is not None and relative_bias.requires_grad)
    )
    # All that the checks and the choice look at. The layers of a model agree in it, so both are made once for a batch.
    kinds = (_kind(q), _kind(k), _kind(v), _kind(bias), _kind(relative_bias), autocast_dtype(q))
    attend = remembered(
        visibility,
        ("attend", impl, scale, softcap, dropout, needs_grad, *kinds),
        lambda: _decide(q, k, v, visibility, bias, relative_bias, scale, softcap, dropout, impl, needs_grad),
    )
    return attend(q, k, v, visibility, bias, relative_bias)


@contextmanager
def segments_of(length: float | None) -> Iterator[None]:
    """A block in which the kernels are told how many rows see a key on average, by which they choose their tiles.

    They would measure it otherwise, for which a number is read back from the device, or, where there are gradients and
    an accelerator should not wait, take the number of keys. Only speed depends on it.

    Args:
        length: of at least 0; None to leave it to them.
    """
    before = _segment_length.set(length)
    try:
        yield
    finally:
        _segment_length.reset(before)


_Attend = Callable[[Tensor, Tensor, Tensor, Visibility, "Tensor | None", "Tensor | None"], Tensor]
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
    scale: float,
    softcap: float | None,
    dropout: float,
    impl: str,
    needs_grad: bool,
) -> _Attend:
    """Check the arguments and choose; what comes back takes others of the same kinds unchecked. It holds no tensor of
    the visibility, on which it is remembered.
    """
    _check(q, k, v, visibility, bias, relative_bias, softcap, dropout)
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
            raise GistError("impl='triton' takes no dense bias; give relative_bias, or use impl='auto'")
        return _by_triton(q, k, v, visibility, relative_bias, scale, softcap, dropout, needs_grad)
    if impl == "flex":
        if bias is not None or dropout > 0:
            raise GistError("impl='flex' has no dropout and no dense bias; use impl='auto' or impl='sdpa'")
        return _by_flex(q, k, visibility, scale, softcap)
    if impl == "sdpa" and softcap is not None:
        raise GistError("impl='sdpa' has no softcap; use impl='auto' or impl='reference'")

    def attend(
        q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: Tensor | None, relative_bias: Tensor | None
    ) -> Tensor:
        if relative_bias is not None:
            bias = dense_bias(relative_bias, q.shape[2], k.shape[2])
        if impl == "reference":
            return reference_attention(q, k, v, visibility, bias=bias, scale=scale, softcap=softcap, dropout=dropout)
        return sdpa_attention(q, k, v, visibility, bias=bias, scale=scale, dropout=dropout)

    return attend


def choose_implementation(
    q: Tensor, v: Tensor, scale: float, *, has_bias: bool = False, has_softcap: bool = False
) -> tuple[str, str]:
    """What ``impl="auto"`` stands for in a call, and why. Of the tensors, only device, dtype and head size count.

    Args:
        q: ``(B, H, T, D)``, as for :func:`interval_attention`.
        v: ``(B, G, K, Dv)``, as q.
        scale: factor of the scores.
        has_bias: whether there is a dense bias.
        has_softcap: whether there is a softcap.

    Returns:
        One of :data:`IMPLEMENTATIONS`, and the reason in words.
    """
    from gisting_kernels import why_not

    reason = why_not(q, v, scale, has_bias=has_bias) if q.is_cuda else "the tensors are not on a CUDA device"
    if reason is None:
        return "triton", "the fused kernels apply"
    if has_softcap:
        return "reference", f"there is a softcap, which sdpa has not, and not triton: {reason}"
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
    scale: float,
    softcap: float | None,
    dropout: float,
    needs_grad: bool,
) -> _Attend:
    import gisting_kernels as kernels

    q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
    reason = kernels.why_not(q, v, scale, has_bias=False)
    if reason is not None:
        raise GistError(f"impl='triton' cannot serve this call: {reason}; use impl='auto'")
    if q.shape[2] <= _MAX_DECODE_ROWS and not needs_grad and relative_bias is None and dropout == 0:

        def decode(
            q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: Tensor | None, relative_bias: Tensor | None
        ) -> Tensor:
            q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
            return kernels.decode_attention(
                q, k, v, visibility.first, visibility.end, scale=scale, softcap=softcap, is_checked=True
            )

        return decode
    width = None if relative_bias is None else relative_bias.shape[1] // 2
    # A compiled graph measures nothing, and torch.compile cannot trace a context variable.
    length = None if torch.compiler.is_compiling() else _segment_length.get()
    if length is None and needs_grad:
        length = float(k.shape[2])
    plan = remembered(
        visibility,
        ("triton", q.shape[2], q.shape[3], q.dtype, width, length),
        # Cloned: the plan keeps the intervals, and what is remembered must not hold what it is remembered on.
        lambda: kernels.plan_tiles(
            visibility.first.clone(), visibility.end.clone(), q, relative_width=width, segment_length=length
        ),
    )

    def attend(
        q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: Tensor | None, relative_bias: Tensor | None
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
            is_checked=True,
        )

    return attend


def _by_flex(q: Tensor, k: Tensor, visibility: Visibility, scale: float, softcap: float | None) -> _Attend:
    from gisting.attention.flex import BLOCK, flex_attention
    from gisting_kernels import list_tiles

    num_rows, num_keys = q.shape[2], k.shape[2]
    start = max(num_keys - num_rows, 0)
    lists = remembered(
        visibility,
        ("flex", num_rows),
        lambda: list_tiles(visibility.first, visibility.end, num_rows, start, (BLOCK, BLOCK)),
    )

    def attend(
        q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: Tensor | None, relative_bias: Tensor | None
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
    softcap: float | None,
    dropout: float,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise GistError(f"{name} must have four dimensions (batch, heads, rows, head size), got {_show(tensor)}")
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
        raise GistError(f"the heads of q must be a multiple of those of k, got {q.shape[1]} and {k.shape[1]}")
    if visibility.num_keys != k.shape[2] or visibility.batch_size not in (1, q.shape[0]):
        raise GistError(
            f"visibility must be for {q.shape[0]} sequences (or 1) of {k.shape[2]} keys, got {visibility.batch_size} "
            f"of {visibility.num_keys}"
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
            raise GistError(f"bias must have shape {full}, 1 allowed for batch and heads, got {_show(bias)}")
        if bias.device != q.device:
            raise GistError(f"bias must be on the device of q, {q.device}, got {bias.device}")
    if relative_bias is not None:
        if bias is not None:
            raise GistError("bias and relative_bias were both given; add them into one bias")
        if relative_bias.dim() != 2 or relative_bias.shape[0] != q.shape[1] or relative_bias.shape[1] % 2 == 0:
            raise GistError(
                f"relative_bias must have shape ({q.shape[1]}, 2 W + 1), a row for each head of q and an odd number of "
                f"distances, got {_show(relative_bias)}"
            )
        if not relative_bias.is_floating_point():
            raise GistError(f"relative_bias must be floating point, got {relative_bias.dtype}")
        if relative_bias.device != q.device:
            raise GistError(f"relative_bias must be on the device of q, {q.device}, got {relative_bias.device}")
    if softcap is not None and not softcap > 0:
        raise GistError(f"softcap must be positive, got {softcap}")
    if not 0.0 <= dropout < 1.0:
        raise GistError(f"dropout must be in [0, 1), got {dropout}")


def _show(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
