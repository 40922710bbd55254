"""Split a batch into the tokens of its prompts and everything else.

Place in the flow: data -> collate -> **split** -> a training step in which the base model is frozen. The tokens of a
prompt see only the prompt, so if no parameter that acts on them is trained, their keys and values need no gradient and
are the same for the gist and for a teacher that sees the prompt. The step then computes them once (``prompt_*``) and
continues from their keys and values with the rest, whose mask has the columns of the prompts first::

             a b G c d e H f          a b d e          a b d e G c H f
           a 1 . . . . . . .        a 1 . . .        G 1 1 . . 1 . . .
           b 1 1 . . . . . .        b 1 1 . .        c . . . . 1 1 . .
           G 1 1 1 . . . . .        d . . 1 .        H . . 1 1 . . 1 .
           c . . 1 1 . . . .        e . . 1 1        f . . . . . . 1 1
           d . . . . 1 . . .
           e . . . . 1 1 . .        prompts          the rest, 4 rows of 8 keys
           H . . . . 1 1 1 .
           f . . . . . . 1 1        two packed documents: prompt a b, gist G; prompt d e, gist H

Rows keep their order, so an interval of rows is an interval in both parts. All tensors are on the CPU, so that finding
the sizes of the parts never waits for a device. Does not depend on models or texts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gisting.data.collate import IGNORED
from gisting.errors import GistError
from gisting.visibility import FOREVER, Visibility

__all__ = ["split_prompts"]


def split_prompts(batch: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Split the batch of a decoder into its prompts and the rest.

    Both parts keep the positions of the batch, also for the teacher: positions under the positive control differ by a
    constant, the length of the prompt, which does not change rotary attention. For a teacher that does not see gists,
    what follows a gist moves up to its prompt.

    Args:
        batch: made by a collator with ``with_prompt_columns``: ``input_ids``, ``position_ids``, ``labels``, int64
            ``(B, N)``; ``is_prompt`` bool ``(B, N)``; ``attention_mask`` int32 ``(B, 1, 2, N)``; possibly
            ``teacher_attention_mask`` of the same shape, ``teacher_position_ids``, ``num_gists_before`` and
            ``reconstruction_labels`` int64 ``(B, N)``. On the CPU; not modified.
        pad_token_id: the id of empty columns.

    Returns:
        With P the largest number of prompt tokens in a row, and M that of other tokens, both padded on the left:
        ``prompt_input_ids`` and ``prompt_position_ids`` int64 ``(B, P)``, ``prompt_attention_mask`` int32
        ``(B, 1, 2, P)``; ``input_ids``, ``position_ids``, ``labels``, ``reconstruction_labels`` and, if the teacher
        does not see gists, ``teacher_position_ids`` int64 ``(B, M)``; ``attention_mask`` and
        ``teacher_attention_mask`` int32 ``(B, 1, 2, P + M)``, whose rows are the last M.

    Raises:
        GistError: the batch does not mark its prompts.
    """
    if "is_prompt" not in batch:
        raise GistError("batch has no is_prompt; make the collator with with_prompt_columns=True")
    first, end = batch["attention_mask"][:, 0].unbind(1)
    is_prompt = batch["is_prompt"]
    prompts, rest = _Part.of(is_prompt), _Part.of((end > first) & ~is_prompt)
    positions, num_prompts = batch["position_ids"], prompts.width
    parts = {
        "prompt_input_ids": prompts.take(batch["input_ids"], pad_token_id),
        "prompt_position_ids": prompts.take(positions, 0),
        "prompt_attention_mask": _joined(prompts.intervals(batch["attention_mask"], prompts, 0)),
        "input_ids": rest.take(batch["input_ids"], pad_token_id),
        "position_ids": rest.take(positions, 0),
        "labels": rest.take(batch["labels"], IGNORED),
    }
    for name in ("attention_mask", "teacher_attention_mask"):
        if name in batch:
            parts[name] = _joined(*(part.intervals(batch[name], rest, num_prompts) for part in (prompts, rest)))
    if "num_gists_before" in batch:
        parts["teacher_position_ids"] = rest.take(positions - batch["num_gists_before"], 0)
    if "reconstruction_labels" in batch:
        parts["reconstruction_labels"] = rest.take(batch["reconstruction_labels"], IGNORED)
    return parts


class _Part:
    """Some columns of each row, in order, moved to the right end of a narrower rectangle."""

    def __init__(self, columns: Tensor, is_kept: Tensor, num_before: Tensor) -> None:
        self.columns = columns  # int64 (B, W): the original index of each column
        self.is_kept = is_kept  # bool (B, W): False at padding
        self.num_before = num_before  # int64 (B, N + 1): kept columns among the first n, and the padding before them

    @property
    def width(self) -> int:
        return self.columns.shape[1]

    @staticmethod
    def of(is_kept: Tensor) -> _Part:
        counts = is_kept.sum(1, keepdim=True)
        width = int(counts.max()) if len(counts) else 0
        columns = is_kept.long().argsort(dim=1, stable=True)[:, is_kept.shape[1] - width :]
        num_before = torch.nn.functional.pad(is_kept.long().cumsum(1), (1, 0))
        return _Part(columns, torch.arange(width)[None] >= width - counts, num_before + width - counts)

    def take(self, values: Tensor, fill: int) -> Tensor:
        """Take the kept columns of ``values`` ``(B, N)``, with ``fill`` at padding: ``(B, W)``."""
        return values.gather(1, self.columns).masked_fill(~self.is_kept, fill)

    def intervals(self, attention_mask: Tensor, rows: _Part, start: int) -> Tensor:
        """Return the intervals of these keys over the rows of another part, counted from ``start``: ``(B, 2, W)``."""
        first, end = (self.take(bound, 0).long() for bound in attention_mask[:, 0].unbind(1))
        limit = rows.num_before.shape[1] - 1
        moved = [start + rows.num_before.gather(1, bound.clamp(max=limit)) for bound in (first, end)]
        moved[1] = torch.where(end > limit, FOREVER, moved[1])
        return torch.stack([bound.masked_fill(~self.is_kept, 0) for bound in moved], dim=1)


def _joined(*intervals: Tensor) -> Tensor:
    first, end = torch.cat(intervals, dim=2).unbind(1)
    return Visibility(first, end).as_attention_mask()
