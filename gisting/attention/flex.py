"""Interval attention through torch's FlexAttention: its block mask from our tile lists, the rest as two closures.

Place in the flow: visibility, tile lists (from ``api``) -> **flex** -> the caller. The lists say which tiles of 128 x
128 hold anything and which need no test; inside the others the mask is asked pair by pair. On the CPU torch runs it
uncompiled, dense and without gradients for q, k and v: good for tests, not for work.
"""

from __future__ import annotations

import functools
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

__all__ = ["BLOCK", "block_mask", "flex_attention"]

# What FlexAttention cuts its mask into by default, on every card.
BLOCK = 128


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
    """Arguments and result as :func:`gisting.attention.interval_attention`, already checked.

    Args:
        q, k, v, visibility, relative_bias, scale, softcap: as there.
        lists: the tiles of ``visibility`` for ``BLOCK`` rows and keys, as ``gisting_kernels.list_tiles`` gives them.

    Raises:
        GistError: a gradient of q, k or v was asked for on the CPU.
    """
    if q.device.type == "cpu" and any(tensor.requires_grad for tensor in (q, k, v)):
        if torch.is_grad_enabled():
            raise GistError(
                "impl='flex' has no gradients of q, k and v on the CPU (torch's FlexAttention has none); use "
                "impl='auto', or torch.no_grad()"
            )
        # torch refuses such tensors under no_grad too.
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
    if torch.compiler.is_compiling():
        return torch_flex_attention(q, k, v, **options)
    if q.device.type == "cpu":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
            return torch_flex_attention(q, k, v, **options)
    return _compiled()(q, k, v, **options)


def _attend_to_nothing(q: Tensor, k: Tensor, v: Tensor, relative_bias: Tensor | None) -> Tensor:
    """No rows, or zeros as sums over no keys, so that the arguments have their gradients; torch's own form raises."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, dim=1).mT
    if relative_bias is not None:
        scores = scores + relative_bias[:, :1, None].to(q.dtype)
    return scores @ v.repeat_interleave(group, dim=1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One compiled function for the process.

    ``dynamic`` is left open: the first lengths are compiled in, so that batches of one length need no bounds checks,
    and from the second on lengths are variables, or a training run on ragged batches would compile for each anew
    (some 15 s, unslothai/unsloth-zoo#868). ``fullgraph``: else Dynamo, after eight compilations, would go on with the
    dense form without a word (vllm-project/vllm#27178); so it raises, and names the setting to change.
    """
    return torch.compile(torch_flex_attention, fullgraph=True)


def block_mask(visibility: Visibility, lists: Any, num_rows: int) -> BlockMask:
    """FlexAttention's form of the mask, for ``num_rows`` rows that are the last of the keys.

    Args:
        visibility: the intervals.
        lists: their tiles for ``BLOCK`` rows and keys: ``tiles`` ``(B, row tiles, key tiles + 1)``, of which
            ``counts[..., 1]`` are partial and those up to ``counts[..., 2]`` full.
        num_rows: T.
    """
    start = max(visibility.num_keys - num_rows, 0)
    # (B, 1, row tiles, key tiles) and (B, 1, row tiles): one mask for all heads
    tiles = lists.tiles[:, None, :, :-1]
    num_partial, num_listed = lists.counts[:, None, :, 1].contiguous(), lists.counts[:, None, :, 2]
    place = torch.arange(tiles.shape[-1], device=tiles.device)
    # Behind the end of a list there may be anything.
    tiles = torch.where(place < num_listed[..., None], tiles, 0)
    # The full tiles stand behind the partial ones; each row of the list is turned until they come first.
    full = tiles.gather(-1, (place + num_partial[..., None]) % tiles.shape[-1])
    return BlockMask.from_kv_blocks(
        num_partial,
        tiles,
        num_listed - num_partial,
        full,
        BLOCK_SIZE=BLOCK,
        # Rows count from 0 there. New tensors even where nothing moves: what is remembered must not hold the old ones.
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
        # Scores are in float32 there, or float64.
        table = relative_bias if q.dtype == torch.float64 else relative_bias.float()
        # Tensors, not numbers: a number that differs from call to call becomes symbolic, which not every backend takes.
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
