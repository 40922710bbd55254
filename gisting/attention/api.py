"""``interval_attention``: checks its arguments and chooses an implementation.

Place in the flow: text -> tokens -> visibility -> **attention** -> (inside a model) -> cache. Knows no model and no
text. The only module that may import ``gisting_kernels``.
"""

from __future__ import annotations

from torch import Tensor

from gisting.attention.reference import reference_attention
from gisting.attention.sdpa import sdpa_attention
from gisting.errors import GistError
from gisting.visibility import Visibility

__all__ = ["IMPLEMENTATIONS", "interval_attention"]

IMPLEMENTATIONS = ("auto", "reference", "sdpa")


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    bias: Tensor | None = None,
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
        bias: ``(B or 1, H or 1, T, K)``, added to the scores, or None. Differentiable.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2), or None.
        dropout: probability with which an attention weight is dropped.
        impl: ``"reference"`` (dense, in float32 or better), ``"sdpa"`` (torch's fused operator; no softcap), or
            ``"auto"``: sdpa, and reference where there is a softcap. An explicit choice never falls back.

    Returns:
        ``(B, H, T, Dv)`` in the dtype of q.

    Raises:
        GistError: shapes, dtypes or devices disagree, a number is out of range, or ``impl`` cannot do what was asked.
    """
    _check(q, k, v, visibility, bias, softcap, dropout)
    if impl not in IMPLEMENTATIONS:
        raise GistError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "sdpa" and softcap is not None:
        raise GistError("impl='sdpa' has no softcap; use impl='auto' or impl='reference'")
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if impl == "reference" or softcap is not None:
        return reference_attention(q, k, v, visibility, bias=bias, scale=scale, softcap=softcap, dropout=dropout)
    return sdpa_attention(q, k, v, visibility, bias=bias, scale=scale, dropout=dropout)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: Tensor | None,
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
    if softcap is not None and not softcap > 0:
        raise GistError(f"softcap must be positive, got {softcap}")
    if not 0.0 <= dropout < 1.0:
        raise GistError(f"dropout must be in [0, 1), got {dropout}")


def _show(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
