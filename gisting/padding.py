"""Pad ragged rows of ids to a rectangle. No other module pads ids.

Place in the flow: below the collators and the models. Independent of tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pad_rows"]


def pad_rows(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to the length N of the longest.

    Args:
        rows: B lists of ids.
        pad: the id that fills short rows.
        left: whether to pad before the ids instead of after them.

    Returns:
        The padded ids, int64 ``(B, N)``, and a mask, bool ``(B, N)``, that is true at ids and false at padding.
    """
    width = max((len(row) for row in rows), default=0)
    filled = [
        [pad] * (width - len(row)) + list(row) if left else list(row) + [pad] * (width - len(row)) for row in rows
    ]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None]
    index = torch.arange(width)[None]
    is_token = index >= width - lengths if left else index < lengths
    return torch.tensor(filled, dtype=torch.long).reshape(len(rows), width), is_token
