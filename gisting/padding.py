"""Ragged rows as rectangles: the one place where ids are padded.

Place in the flow: below the collators and the models. Knows lists of ids; knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pad_rows"]


def pad_rows(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ids as one rectangle.

    Args:
        rows: B lists of ids.
        pad: the id that fills short rows.
        left: whether it stands before the ids or behind them.

    Returns:
        int64 ``(B, N)``, N the longest row, and the bool ``(B, N)`` that is true at ids.
    """
    width = max((len(row) for row in rows), default=0)
    filled = [
        [pad] * (width - len(row)) + list(row) if left else list(row) + [pad] * (width - len(row)) for row in rows
    ]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None]
    index = torch.arange(width)[None]
    is_token = index >= width - lengths if left else index < lengths
    return torch.tensor(filled, dtype=torch.long).reshape(len(rows), width), is_token
