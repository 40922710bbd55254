"""Run interval attention with torch's FlexAttention, whose block mask is made from our tile lists.

Place in the flow: visibility, tile lists (from ``api``) -> **flex** -> the caller. The lists say which tiles of 128 x
128 to visit and which of them need no mask test; in the others, the mask is evaluated for each pair. On the CPU, torch
runs FlexAttention uncompiled, dense, and without gradients for q, k and v, which is enough for tests only.

torch has two back ends for it on a card: its own Triton kernels, and FlashAttention-4, an experiment that must be asked
for. Here, the environment variable ``GISTING_FLEX_BACK_END`` asks, with ``triton`` (the default) or ``flash``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from gisting.attention.memo import remembered
from gisting.errors import GistError
from gisting.visibility import Visibility

__all__ = ["BACK_ENDS", "BLOCK", "ENVIRONMENT_VARIABLE", "back_end", "block_mask", "flex_attention"]

# FlexAttention's default block size, on every card.
BLOCK = 128
BACK_ENDS = ("triton", "flash")
ENVIRONMENT_VARIABLE = "GISTING_FLEX_BACK_END"


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    lists: Any,
    *,
    relative_bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Compute what :func:`gisting.attention.interval_attention` does, for arguments that it has checked.

    Args:
        q: as there.
        k: as there.
        v: as there.
        visibility: as there.
        relative_bias: as there.
        scale: as there.
        softcap: as there.
        lists: the tiles of ``visibility`` for ``BLOCK`` rows and keys, as ``gisting_kernels.list_tiles`` returns them.

    Raises:
        GistError: q, k or v requires a gradient on the CPU.
    """
    if q.device.type == "cpu" and any(tensor.requires_grad for tensor in (q, k, v)):
        if torch.is_grad_enabled():
            raise GistError(
                "impl='flex' has no gradients of q, k and v on the CPU, because torch's FlexAttention has none; use "
                "impl='auto', or torch.no_grad()"
            )
        # torch refuses such tensors even under no_grad.
        q, k, v = q.detach(), k.detach(), v.detach()
    if q.shape[2] == 0 or k.shape[2] == 0:
        return _attend_to_nothing(q, k, v, relative_bias)
    num_rows = q.shape[2]
    mask = remembered(visibility, ("flex mask", num_rows), lambda: block_mask(visibility, lists, num_rows))
    options: dict[str, Any] = {
        "score_mod": _score_mod(q, k, softcap, relative_bias),
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if q.device.type != "cpu":
        options |= _kernel_options()
    if torch.compiler.is_compiling():
        return torch_flex_attention(q, k, v, **options)
    if q.device.type == "cpu":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
            return torch_flex_attention(q, k, v, **options)
    return _compiled()(q, k, v, **options)


def back_end() -> str:
    """Return which of torch's kernels run FlexAttention on a card, one of ``BACK_ENDS``.

    Raises:
        GistError: ``GISTING_FLEX_BACK_END`` names another, or asks for FlashAttention-4 where it is missing.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, BACK_ENDS[0])
    if wanted not in BACK_ENDS:
        raise GistError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACK_ENDS)}, got {wanted!r}")
    if wanted == "flash" and not all(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn.cute")):
        raise GistError(f"{ENVIRONMENT_VARIABLE}=flash needs FlashAttention-4: pip install flash-attn-4")
    return wanted


def _kernel_options() -> dict[str, Any]:
    return {"kernel_options": {"BACKEND": "FLASH"}} if back_end() == "flash" else {}


def _attend_to_nothing(q: Tensor, k: Tensor, v: Tensor, relative_bias: Tensor | None) -> Tensor:
    """Return no rows, or zeros computed as empty sums, so that the arguments get gradients. torch's operator raises."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, dim=1).mT
    if relative_bias is not None:
        scores = scores + relative_bias[:, :1, None].to(q.dtype)
    return scores @ v.repeat_interleave(group, dim=1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Compile FlexAttention, once for the process.

    ``dynamic`` keeps its default: the first lengths are compiled in, so batches of equal length need no bounds checks.
    From the second lengths on they are dynamic; otherwise, training on ragged batches would compile for every new
    length, which takes about 15 s (unslothai/unsloth-zoo#868). Without ``fullgraph``, Dynamo would silently use the
    dense form after eight compilations (vllm-project/vllm#27178); with it, Dynamo raises and names the setting to
    change.
    """
    return torch.compile(torch_flex_attention, fullgraph=True)


def block_mask(visibility: Visibility, lists: Any, num_rows: int) -> BlockMask:
    """Make FlexAttention's block mask.

    Args:
        visibility: the intervals.
        lists: their tiles for ``BLOCK`` rows and keys: ``tiles`` ``(B, row tiles, key tiles + 1)`` starts with
            ``counts[..., 1]`` partial tiles; full tiles follow, up to ``counts[..., 2]``.
        num_rows: T; the rows are the last T of the K rows.
    """
    start = max(visibility.num_keys - num_rows, 0)
    # (B, 1, row tiles, key tiles) and (B, 1, row tiles): one mask for all heads
    tiles = lists.tiles[:, None, :, :-1]
    num_partial, num_listed = lists.counts[:, None, :, 1].contiguous(), lists.counts[:, None, :, 2]
    place = torch.arange(tiles.shape[-1], device=tiles.device)
    # The entries after the end of a list are arbitrary.
    tiles = torch.where(place < num_listed[..., None], tiles, 0)
    # Full tiles follow the partial ones in each list; rotate the list so that they come first.
    full = tiles.gather(-1, (place + num_partial[..., None]) % tiles.shape[-1])
    return BlockMask.from_kv_blocks(
        num_partial,
        tiles,
        num_listed - num_partial,
        full,
        BLOCK_SIZE=BLOCK,
        # FlexAttention counts rows from 0. The subtraction makes new tensors even if start is 0; that matters, because
        # nothing cached on the intervals may refer to them.
        mask_mod=_mask_mod(visibility.first - start, visibility.end - start),
        seq_lengths=(num_rows, visibility.num_keys),
    )


def _mask_mod(first: Tensor, end: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if first.shape[0] == 1:

        def is_seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return (row >= first[0, key]) & (row < end[0, key])

    else:

        def is_seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return (row >= first[b, key]) & (row < end[b, key])

    return is_seen


def _score_mod(
    q: Tensor, k: Tensor, softcap: float | None, relative_bias: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    if softcap is None and relative_bias is None:
        return None
    table = offset = last = None
    if relative_bias is not None:
        width, start = relative_bias.shape[1] // 2, max(k.shape[2] - q.shape[2], 0)
        # FlexAttention computes scores in float32, or in float64.
        table = relative_bias if q.dtype == torch.float64 else relative_bias.float()
        # Tensors instead of numbers: numbers that change between calls become symbolic, which some backends reject.
        offset = torch.full((), width - start, dtype=torch.int32, device=q.device)
        last = torch.full((), 2 * width, dtype=torch.int32, device=q.device)

    def modify(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if table is not None and offset is not None and last is not None:
            # clamp(j - i, -W, W) + W
            entry = torch.minimum((key - row + offset).clamp(min=0), last)
            score = score + table[h, entry]
        return score

    return modify
