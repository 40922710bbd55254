"""Who may see whom, as two integers per key.

Place in the flow: text -> tokens -> **visibility** -> attention -> cache -> generation. Key ``j`` may be seen by the
query rows ``first[j] <= i < end[j]`` and by nobody else. Every mask of the Gisting paper (arXiv 2304.08467, section 3
and appendix A) is such a set of intervals, so a mask costs O(N) memory and never N x N:

         a b G c        rows see keys          key    a  b  G  c
       a 1 . . .                               first  0  1  2  3
       b 1 1 . .                               end    3  3  *  *       * = for ever
       G 1 1 1 .
       c . . 1 1                               the prompt a b ends with the gist G; c sees it through G alone

A *condition* (gist, positive control, negative control) is a function that returns intervals; nothing downstream
knows which one it was. This module knows nothing of models, text or attention: tensors in, tensors out, on any
device, without a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gisting.errors import GistError

__all__ = [
    "CHAINED_CONDITIONS",
    "CONDITIONS",
    "ENCODER_CONDITIONS",
    "FOREVER",
    "Visibility",
    "bidirectional",
    "causal",
    "chained",
    "chained_negative",
    "chained_positive",
    "encoder_gist",
    "encoder_negative",
    "encoder_positive",
    "gist",
    "negative",
    "positive",
]

# The end of a key that outlives its sequence: what is appended later sees it. A plain number of rows would not do: in
# a sequence that stops with its gist, the prompt ends at K as well, and yet nothing behind may see it.
FOREVER = 1 << 30


@dataclass(frozen=True)
class Visibility:
    """Key ``j`` of row ``b`` is seen by the query rows ``first[b, j] <= i < end[b, j]``.

    Args:
        first: int32, shape ``(B, K)``.
        end: int32, shape ``(B, K)``; ``end <= first`` means that nobody sees the key (padding), and an end beyond K
            that whatever is appended to the sequence, or a decoder that reads it, sees the key too; builders write
            ``FOREVER``.
        position_ids: int64, shape ``(B, K)``, or None. A position is the number of surviving tokens before the token;
            tokens that will be hidden count back from their own gist, so that a cached gist stands at ``0 .. k-1``
            whatever it was made from.

    Raises:
        GistError: the tensors disagree in shape or are no integers.
    """

    first: Tensor
    end: Tensor
    position_ids: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("first", self.first), ("end", self.end)):
            if tensor.dim() != 2 or tensor.is_floating_point() or tensor.dtype == torch.bool:
                raise GistError(
                    f"{name} must be an integer tensor of shape (B, K), got {tensor.dtype} {tuple(tensor.shape)}"
                )
        if self.first.shape != self.end.shape:
            raise GistError(
                f"first and end must have one shape, got {tuple(self.first.shape)} and {tuple(self.end.shape)}"
            )
        if self.position_ids is not None and self.position_ids.shape != self.first.shape:
            raise GistError(
                f"position_ids must have the shape of first, {tuple(self.first.shape)}, got "
                f"{tuple(self.position_ids.shape)}"
            )
        object.__setattr__(self, "first", self.first.to(torch.int32))
        object.__setattr__(self, "end", self.end.to(torch.int32))

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.first.shape[0]

    @property
    def num_keys(self) -> int:
        """K, the number of keys of a sequence."""
        return self.first.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the intervals lie."""
        return self.first.device

    def to(self, device: torch.device | str) -> Visibility:
        """The same intervals on ``device``."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Visibility(self.first.to(device), self.end.to(device), positions)

    def survivors(self) -> Tensor:
        """Keys that a row appended after the last one sees: bool ``(B, K)``. These are what a cache keeps."""
        return self.end > self.num_keys

    def windowed(self, window: int) -> Visibility:
        """Sliding window attention: a key is seen by at most ``window`` rows from its own on, ``end = min(end, j +
        window)``.

        Args:
            window: number of rows, counting the key's own, as ``sliding_window`` of a transformers config.

        Raises:
            GistError: ``window`` is less than 1.
        """
        if window < 1:
            raise GistError(f"window must be at least 1, got {window}")
        index = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
        return Visibility(self.first, torch.minimum(self.end, index + window), self.position_ids)

    def for_cross_attention(self) -> Visibility:
        """What rows behind the last one see, whichever they are: every survivor, always. For a decoder that reads an
        encoder.
        """
        first = torch.zeros_like(self.first)
        return Visibility(first, torch.where(self.survivors(), FOREVER, first))

    def last_keys(self, num_keys: int) -> Visibility:
        """The intervals of the last ``num_keys`` keys, rows counted from the first of them.

        Raises:
            GistError: there are fewer keys than that.
        """
        shift = self.num_keys - num_keys
        if shift < 0:
            raise GistError(f"num_keys must be at most {self.num_keys}, got {num_keys}")
        if num_keys < 0:
            raise GistError(f"num_keys must be at least 0, got {num_keys}")
        positions = None if self.position_ids is None else self.position_ids[:, shift:]
        return Visibility(self.first[:, shift:] - shift, self.end[:, shift:] - shift, positions)

    def to_dense(self, num_rows: int | None = None) -> Tensor:
        """The mask itself, bool ``(B, T, K)``: what the intervals stand for, in O(T K) memory. For oracles and
        drawings.

        Args:
            num_rows: T; the rows are the last T of the K (all of them by default). Where T > K, rows count from 0.
        """
        num_rows = self.num_keys if num_rows is None else num_rows
        start = max(self.num_keys - num_rows, 0)
        rows = torch.arange(start, start + num_rows, dtype=torch.int32, device=self.device)[None, :, None]
        return (rows >= self.first[:, None]) & (rows < self.end[:, None])

    def as_attention_mask(self) -> Tensor:
        """The intervals as int32 ``(B, 1, 2, K)``, the form in which a patched model takes them as ``attention_mask``.

        transformers hands every 4-D mask through untouched, so this works with Trainer, checkpointing and FSDP as it
        is.
        """
        return torch.stack([self.first, self.end], dim=1)[:, None]

    @staticmethod
    def from_attention_mask(attention_mask: Tensor) -> Visibility:
        """The inverse of :meth:`as_attention_mask`: ``attention_mask`` is int32 ``(B, 1, 2, K)``.

        Raises:
            GistError: the mask is not int32 of shape ``(B, 1, 2, K)``.
        """
        if not is_interval_mask(attention_mask):
            raise GistError(
                "attention_mask must be int32 of shape (B, 1, 2, K), as Visibility.as_attention_mask() gives it, "
                f"got {attention_mask.dtype} {tuple(attention_mask.shape)}"
            )
        return Visibility(attention_mask[:, 0, 0], attention_mask[:, 0, 1])

    @staticmethod
    def where(rows: Tensor, chosen: Visibility, other: Visibility) -> Visibility:
        """Sequence by sequence: ``chosen`` where ``rows`` (bool ``(B,)``) is true, else ``other``."""
        pick = rows.to(chosen.device)[:, None]
        positions = None
        if chosen.position_ids is not None and other.position_ids is not None:
            positions = torch.where(pick, chosen.position_ids, other.position_ids)
        return Visibility(
            torch.where(pick, chosen.first, other.first), torch.where(pick, chosen.end, other.end), positions
        )

    def draw(self, tokens: Sequence[str] | None = None, row: int = 0) -> str:
        """The mask of sequence ``row`` drawn with ``1`` and ``.``, rows see keys.

        Args:
            tokens: K labels; the key's number (modulo 10) where there are none.
            row: which sequence of the batch.

        Raises:
            GistError: there is no such row, or the labels are not K.
        """
        self._check_labels(tokens, row)
        labels = [str(j % 10) for j in range(self.num_keys)] if tokens is None else [str(t) for t in tokens]
        width = max((len(label) for label in labels), default=1)
        dense = self._row(row).to_dense()[0].tolist()
        head = " " * (width + 1) + " ".join(label.rjust(width) for label in labels)
        lines = [
            f"{label.rjust(width)} " + " ".join(("1" if seen else ".").rjust(width) for seen in line)
            for label, line in zip(labels, dense, strict=True)
        ]
        return "\n".join([head, *lines])

    def save_drawing(self, path: str | Path, tokens: Sequence[str] | None = None, row: int = 0) -> None:
        """Draw the mask of sequence ``row`` as a PNG (needs the ``eval`` extra: matplotlib).

        Args:
            path: file to write.
            tokens: K labels for the axes, or None.
            row: which sequence of the batch.

        Raises:
            GistError: as :meth:`draw`, or matplotlib is not installed.
        """
        self._check_labels(tokens, row)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise GistError("drawing a PNG needs matplotlib; run: pip install 'gist-tokens[eval]'") from error
        side = min(max(2.0, 0.28 * self.num_keys), 24.0)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        axes.imshow(self._row(row).to_dense()[0].cpu().numpy(), cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
        axes.set_xlabel("key")
        axes.set_ylabel("query row")
        if tokens is not None:
            axes.set_xticks(range(self.num_keys), labels=list(tokens), rotation=90)
            axes.set_yticks(range(self.num_keys), labels=list(tokens))
        figure.savefig(path, dpi=120, format="png")

    def _row(self, row: int) -> Visibility:
        return Visibility(self.first[row : row + 1].cpu(), self.end[row : row + 1].cpu())

    def _check_labels(self, tokens: Sequence[str] | None, row: int) -> None:
        if not 0 <= row < self.batch_size:
            raise GistError(f"row must be in 0..{self.batch_size - 1}, got {row}")
        if tokens is not None and len(tokens) != self.num_keys:
            raise GistError(f"tokens must be {self.num_keys} labels, one per key, got {len(tokens)}")


def is_interval_mask(attention_mask: object) -> bool:
    """Whether this is the tensor form of a :class:`Visibility`: int32 of shape ``(B, 1, 2, K)``."""
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.dtype == torch.int32
        and attention_mask.dim() == 4
        and attention_mask.shape[1:3] == (1, 2)
    )


# -- conditions of a decoder -------------------------------------------------------------------------------------------


def causal(padding: Tensor, *, documents: Tensor | None = None, branches: Tensor | None = None) -> Visibility:
    """Plain causal attention over the tokens that are no padding.

    Args:
        padding: bool or integer ``(B, K)``, true or 1 for tokens, false or 0 for padding, on either side:
            transformers' ``attention_mask``.
        documents: int ``(B, K)``, or None: packed documents, equal numbers in a row are one document, none sees
            another.
        branches: int ``(B, K)``, or None: 0 for what all completions of a document share, then 1, 2, ... for each
            completion; a completion sees what is shared and itself.
    """
    _check_padding(padding)
    return _decoder(torch.zeros_like(padding, dtype=torch.bool), padding, documents, branches, _hide_nothing)


def gist(
    is_gist: Tensor,
    padding: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    branches: Tensor | None = None,
) -> Visibility:
    """Causal gist masking (Gisting, section 3.2): what precedes a gist span is hidden from everything behind it.

    Several spans in one document, as a long prompt in chunks has them: each hides what stands between it and the span
    before it, and all gist tokens stay. A chunk counts back from its own gist, so it may stand at positions of the
    gists before it, which it sees all the same::

             a  b  G  g  c  d  e  H  h  f
          a  1  .  .  .  .  .  .  .  .  .     position_ids   -2 -1  0  1 -1  0  1  2  3  4
          b  1  1  .  .  .  .  .  .  .  .
          G  1  1  1  .  .  .  .  .  .  .     a b, c d e: the chunks of a prompt
          g  1  1  1  1  .  .  .  .  .  .     G g, H h: their gists
          c  .  .  1  1  1  .  .  .  .  .     f: the rest
          d  .  .  1  1  1  1  .  .  .  .
          e  .  .  1  1  1  1  1  .  .  .
          H  .  .  1  1  1  1  1  1  .  .
          h  .  .  1  1  1  1  1  1  1  .
          f  .  .  1  1  .  .  .  1  1  1

    A document without gist tokens is plainly causal.

    Args:
        is_gist: bool ``(B, K)``, true at gist tokens.
        padding: as for :func:`causal`; None for no padding.
        documents: as for :func:`causal`.
        branches: as for :func:`causal`; gist tokens stand in the shared part.
    """
    return _decoder(is_gist, padding, documents, branches, _hide_before_next_span)


def positive(
    is_gist: Tensor,
    padding: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    branches: Tensor | None = None,
) -> Visibility:
    """The positive control (Gisting, section 4): ordinary causal attention with the gist tokens in place.
    Arguments as :func:`gist`.
    """
    return _decoder(is_gist, padding, documents, branches, _hide_nothing)


def negative(
    is_gist: Tensor,
    padding: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    branches: Tensor | None = None,
) -> Visibility:
    """The negative control (Gisting, section 4): what follows the last gist sees neither prompt nor gist.
    Arguments as :func:`gist`.
    """
    return _decoder(is_gist, padding, documents, branches, _hide_to_last_span)


def chained(is_gist: Tensor, is_copy: Tensor, parts: Tensor, padding: Tensor | None = None) -> Visibility:
    """Gist masking of a prompt in parts, each compressed on its own, as ``GistCache.chain`` puts them together.

    A part sees nothing of the parts before it, not even their gists; the rest sees the gists of all. So a gist would be
    seen by two stretches of rows, its own part and the rest, and it takes two keys: behind each gist token stands a
    *copy*, the same token at the same position. The gist is seen by its part alone, and the copy by the rest alone.
    What a copy sees is what its gist sees, with the gist in place of itself, so it has the gist's states in every
    layer. In the last part, which the rest follows, a gist needs no copy::

             a  G  g  H  h  b  J  L  c  d     parts           1  1  1  1  1  2  2  2  0  0
          a  1  .  .  .  .  .  .  .  .  .     position_ids   -1  0  0  1  1  1  2  3  4  5
          G  1  1  .  .  .  .  .  .  .  .
          g  1  1  .  .  .  .  .  .  .  .     a, b: the prompts of two parts
          H  1  1  .  1  .  .  .  .  .  .     G H, J L: their gists
          h  1  1  .  1  .  .  .  .  .  .     g h: the copies of G H
          b  .  .  .  .  .  1  .  .  .  .     c d: the rest
          J  .  .  .  .  .  1  1  .  .  .
          L  .  .  .  .  .  1  1  1  .  .
          c  .  .  1  .  1  .  1  1  1  .
          d  .  .  1  .  1  .  1  1  1  1

    A single part without copies is what :func:`gist` gives. In layers with a sliding window, which counts columns, a
    gist of an early part can be out of reach here though it is within reach as a cache.

    Args:
        is_gist: bool ``(B, K)``, true at gist tokens and their copies.
        is_copy: bool ``(B, K)``, true at copies, each right behind its gist token; every gist token has one, but for
            those of the last part.
        parts: int ``(B, K)``: equal numbers above 0 in a row are one part; 0 for the rest, behind all parts.
        padding: as for :func:`causal`, on either side; None for no padding.
    """
    is_gist, is_token = _check(is_gist, padding, is_copy=is_copy, parts=parts)
    is_rest, num_keys = is_token & (parts == 0), is_gist.shape[-1]
    index = torch.arange(num_keys, device=is_gist.device).expand_as(is_gist)
    part_end = _run_end(torch.where(is_token, parts, -1))
    has_copy = torch.nn.functional.pad(is_copy[:, 1:].bool(), (0, 1), value=False)
    survives = is_rest | (is_gist & ~has_copy)
    first = torch.where(is_copy.bool() & is_token, _carry_back(index, is_rest, num_keys), index)
    end = torch.where(survives, FOREVER, part_end)
    # A prompt token counts back from the gist of its part; a gist with a copy stands where its copy stands.
    next_gist = torch.minimum(_carry_back(index, is_gist, num_keys), part_end)
    before = survives.long().cumsum(-1) - survives.long()
    positions = before - torch.where(is_gist | is_rest, 0, next_gist - index)
    return Visibility(first, torch.where(is_token, end, first), torch.where(is_token, positions, 0))


def chained_positive(is_gist: Tensor, is_copy: Tensor, parts: Tensor, padding: Tensor | None = None) -> Visibility:
    """The positive control of a prompt in parts: all of them as one text with the gist tokens in place, copies being
    padding. Arguments as :func:`chained`.
    """
    return positive(*_without_copies(is_gist, is_copy, parts, padding))


def chained_negative(is_gist: Tensor, is_copy: Tensor, parts: Tensor, padding: Tensor | None = None) -> Visibility:
    """The negative control of a prompt in parts: the rest sees none of them. Arguments as :func:`chained`."""
    return negative(*_without_copies(is_gist, is_copy, parts, padding))


# -- conditions of an encoder ------------------------------------------------------------------------------------------


def bidirectional(padding: Tensor) -> Visibility:
    """Every token sees every token that is no padding. ``padding`` as for :func:`causal`."""
    _check_padding(padding)
    return _encoder(torch.zeros_like(padding, dtype=torch.bool), padding, hide_prompt=False, hide_gist=False)


def encoder_gist(is_gist: Tensor, padding: Tensor | None = None) -> Visibility:
    """Gist masking of an encoder (Gisting, appendix A): prompt and rest are hidden from each other, in both directions.

    Args:
        is_gist: bool ``(B, K)``; several spans hide chunk by chunk, and a chunk sees the gists before it.
        padding: bool or integer ``(B, K)``, 1 for tokens and 0 for padding; None for no padding.
    """
    return _encoder(is_gist, padding, hide_prompt=True, hide_gist=False)


def encoder_positive(is_gist: Tensor, padding: Tensor | None = None) -> Visibility:
    """The positive control of an encoder: everything sees everything. Arguments as :func:`encoder_gist`."""
    return _encoder(is_gist, padding, hide_prompt=False, hide_gist=False)


def encoder_negative(is_gist: Tensor, padding: Tensor | None = None) -> Visibility:
    """The negative control of an encoder: the gist is hidden from the rest as well.
    Arguments as :func:`encoder_gist`.
    """
    return _encoder(is_gist, padding, hide_prompt=True, hide_gist=True)


Condition = Callable[..., Visibility]
#: The conditions of a decoder by name.
CONDITIONS: dict[str, Condition] = {"gist": gist, "positive": positive, "negative": negative}
#: The conditions of a decoder whose prompt is in parts.
CHAINED_CONDITIONS: dict[str, Condition] = {
    "gist": chained,
    "positive": chained_positive,
    "negative": chained_negative,
}
#: The conditions of an encoder.
ENCODER_CONDITIONS: dict[str, Condition] = {
    "gist": encoder_gist,
    "positive": encoder_positive,
    "negative": encoder_negative,
}


# -- arithmetic --------------------------------------------------------------------------------------------------------
# Runs are found by where they start; their ends are carried backwards by a reversed cumulative minimum. All of it is
# O(N).


def _carry_back(value: Tensor, where: Tensor, beyond: int) -> Tensor:
    """For each index j, ``value`` at the first index >= j for which ``where`` holds, else ``beyond``. ``value`` must
    not decrease.
    """
    marked = torch.where(where, value, beyond)
    return marked.flip(-1).cummin(-1).values.flip(-1)


def _run_end(label: Tensor) -> Tensor:
    """For each index, the end (exclusive) of its run of equal labels."""
    num_keys = label.shape[-1]
    index = torch.arange(num_keys, device=label.device).expand_as(label)
    is_last = torch.nn.functional.pad(label[:, 1:] != label[:, :-1], (0, 1), value=True)
    return _carry_back(index + 1, is_last, num_keys)


def _numbered(label: Tensor) -> Tensor:
    """Runs of equal labels numbered 1, 2, ... in their row, whatever the labels are."""
    is_new = torch.nn.functional.pad(label[:, 1:] != label[:, :-1], (1, 0), value=True)
    return is_new.long().cumsum(-1)


def _run_start(label: Tensor) -> Tensor:
    """For each index, the start of its run of equal labels."""
    return label.shape[-1] - _run_end(label.flip(-1)).flip(-1)


def _check_padding(padding: Tensor) -> None:
    if padding.dim() != 2:
        raise GistError(f"padding must be a mask of shape (B, K), got {tuple(padding.shape)}")


def _check(is_gist: Tensor, padding: Tensor | None, **others: Tensor | None) -> tuple[Tensor, Tensor]:
    if is_gist.dim() != 2:
        raise GistError(f"is_gist must be bool of shape (B, K), got {tuple(is_gist.shape)}")
    for name, tensor in {"padding": padding, **others}.items():
        if tensor is not None and tensor.shape != is_gist.shape:
            raise GistError(f"{name} must have the shape of is_gist, {tuple(is_gist.shape)}, got {tuple(tensor.shape)}")
    is_token = torch.ones_like(is_gist, dtype=torch.bool) if padding is None else padding.bool()
    return is_gist.bool() & is_token, is_token


def _without_copies(is_gist: Tensor, is_copy: Tensor, parts: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """``is_gist`` and ``padding`` of the same sequences with their copies as padding."""
    is_gist, is_token = _check(is_gist, padding, is_copy=is_copy, parts=parts)
    return is_gist & ~is_copy.bool(), is_token & ~is_copy.bool()


# A rule says where a key stops being seen: the row number, or FOREVER for a key that stays.


def _hide_nothing(is_gist: Tensor, label: Tensor, document_end: Tensor) -> Tensor:
    return torch.full_like(document_end, FOREVER)


def _hide_before_next_span(is_gist: Tensor, label: Tensor, document_end: Tensor) -> Tensor:
    """A prompt token ends with the next gist span of its document; gist tokens and what has no span behind it stay."""
    span_end = _run_end(torch.where(is_gist, label, -1))
    next_span_end = _carry_back(span_end, is_gist, FOREVER)
    return torch.where(is_gist | (next_span_end > document_end), FOREVER, next_span_end)


def _hide_to_last_span(is_gist: Tensor, label: Tensor, document_end: Tensor) -> Tensor:
    """All up to the last gist token of a document ends there; the rest stays."""
    num_keys = label.shape[-1]
    index = torch.arange(num_keys, device=label.device).expand_as(label)
    next_gist = _carry_back(index, is_gist, num_keys)
    next_gist = torch.nn.functional.pad(next_gist[:, 1:], (0, 1), value=num_keys)
    last_end = _carry_back(index + 1, is_gist & (next_gist >= document_end), FOREVER)
    return torch.where(last_end > document_end, FOREVER, last_end)


def _decoder(
    is_gist: Tensor,
    padding: Tensor | None,
    documents: Tensor | None,
    branches: Tensor | None,
    hide: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Visibility:
    is_gist, is_token = _check(is_gist, padding, documents=documents, branches=branches)
    index = torch.arange(is_gist.shape[-1], device=is_gist.device).expand_as(is_gist)
    label = torch.zeros_like(index) if documents is None else torch.where(is_token, _numbered(documents), 0)
    branch = torch.zeros_like(index) if branches is None else branches.long().clamp(min=0)
    in_branch = branch > 0
    branch_run = label * (branch.amax() + 1) + branch
    document_end = _run_end(label)

    hidden_from = hide(is_gist, label, document_end)
    end = hidden_from if documents is None else torch.minimum(hidden_from, document_end)
    end = torch.where(in_branch, torch.minimum(end, _run_end(branch_run)), end)

    # Shared tokens and branch tokens are counted apart: a branch goes on from the shared tokens, not from the branch
    # before it.
    survives = is_token & ~in_branch & (hidden_from == FOREVER)
    before = survives.long().cumsum(-1) - survives.long()
    before = before - before.gather(-1, _run_start(label))
    next_survivor = torch.minimum(_carry_back(index, survives | in_branch, label.shape[-1]), hidden_from)
    positions = before - torch.where(survives, 0, next_survivor - index)
    positions = torch.where(in_branch, before + index - _run_start(branch_run), positions)
    return Visibility(index, torch.where(is_token, end, index), torch.where(is_token, positions, 0))


def _encoder(is_gist: Tensor, padding: Tensor | None, *, hide_prompt: bool, hide_gist: bool) -> Visibility:
    is_gist, is_token = _check(is_gist, padding)
    index = torch.arange(is_gist.shape[-1], device=is_gist.device).expand_as(is_gist)
    first = torch.zeros_like(index)
    end = torch.full_like(index, FOREVER)
    if hide_prompt:
        # A chunk is a stretch of prompt with its gist span; the rest is the chunk behind the last span.
        chunk = torch.nn.functional.pad(is_gist[:, :-1] & ~is_gist[:, 1:], (1, 0), value=False).long().cumsum(-1)
        is_last_gist = is_gist & (is_gist.flip(-1).cumsum(-1).flip(-1) == 1)
        last_end = _carry_back(index + 1, is_last_gist, FOREVER)
        is_rest = last_end == FOREVER
        first = _run_start(chunk)
        end = torch.where(is_rest, FOREVER, _run_end(chunk))
        end = torch.where(is_gist, last_end if hide_gist else FOREVER, end)
    return Visibility(first, torch.where(is_token, end, first))
