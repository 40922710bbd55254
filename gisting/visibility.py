"""Masks as intervals: for each key, the range of query rows that see it.

Place in the flow: text -> tokens -> **visibility** -> attention -> cache -> generation.

Query row ``i`` sees key ``j`` if and only if ``first[j] <= i < end[j]``. Every mask of the Gisting paper (arXiv
2304.08467, section 3 and appendix A) can be written this way, so a mask takes two integers per key instead of N x N
bits. As an example, take a prompt ``a b``, its gist token ``G`` and a completion ``c``::

         a b G c        1: the row sees the key      key    a  b  G  c
       a 1 . . .                                     first  0  1  2  3
       b 1 1 . .                                     end    3  3  *  *       * is FOREVER
       G 1 1 1 .
       c . . 1 1

Row ``G`` (row 2) is the last that sees the prompt: the keys ``a`` and ``b`` end at row 3. The key ``G`` has no end, so
every later row sees it, and learns about the prompt only through it. After training, the keys and values of ``G`` can
therefore be cached and used in place of the prompt.

A *condition* (gist, positive control, negative control) is a function that returns such intervals. The code that uses
them does not depend on which condition made them. The functions here turn tensors into tensors, on any device and
without a loop over rows, and are independent of text, models and the implementation of attention.
"""

# Over 600 lines because every condition is here, each with the picture of its mask.
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
    "without_gists",
]

# The end of a key that rows appended after the sequence will see. The number of rows K would be ambiguous: if a
# sequence stops with its gist token, the keys of its prompt also end at row K, yet appended rows must not see them.
FOREVER = 1 << 30


@dataclass(frozen=True)
class Visibility:
    """The mask of a batch: query row ``i`` of sequence ``b`` sees key ``j`` where ``first[b, j] <= i < end[b, j]``.

    Args:
        first: int32, shape ``(B, K)``.
        end: int32, shape ``(B, K)``. No row sees a key with ``end <= first``: it is padding. A key whose end is
            greater than K survives the sequence: rows appended later see it, and so does a decoder that reads an
            encoder's output. The builders below write ``FOREVER`` for such an end.
        position_ids: int64, shape ``(B, K)``, or None. The position of a token is the number of surviving tokens before
            it. A token that gets hidden counts backwards from its own gist instead. So a prompt's k gist tokens are
            always at the positions ``0 .. k-1``, no matter how long the prompt was.

    Raises:
        GistError: the tensors have different shapes or are not integers.
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
                f"first and end must have the same shape, got {tuple(self.first.shape)} and {tuple(self.end.shape)}"
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
        """K, the number of keys in a sequence."""
        return self.first.shape[1]

    @property
    def device(self) -> torch.device:
        """The device that holds the intervals."""
        return self.first.device

    def to(self, device: torch.device | str) -> Visibility:
        """Move the intervals to ``device``."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Visibility(self.first.to(device), self.end.to(device), positions)

    def survivors(self) -> Tensor:
        """Find the keys that rows appended after the sequence see: bool ``(B, K)``. A cache keeps exactly these."""
        return self.end > self.num_keys

    def windowed(self, window: int) -> Visibility:
        """Apply a sliding window: only the ``window`` rows from the key's own row onwards see it.

        Args:
            window: number of rows, counting the key's own row, like ``sliding_window`` in a transformers config.

        Raises:
            GistError: ``window`` is less than 1.
        """
        if window < 1:
            raise GistError(f"window must be at least 1, got {window}")
        index = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
        return Visibility(self.first, torch.minimum(self.end, index + window), self.position_ids)

    def for_cross_attention(self) -> Visibility:
        """Let every row see every survivor and nothing else. This is the mask of a decoder that reads an encoder."""
        first = torch.zeros_like(self.first)
        return Visibility(first, torch.where(self.survivors(), FOREVER, first))

    def last_keys(self, num_keys: int) -> Visibility:
        """Keep the last ``num_keys`` keys, and count rows from the first of them.

        Raises:
            GistError: ``num_keys`` is negative or greater than K.
        """
        shift = self.num_keys - num_keys
        if shift < 0:
            raise GistError(f"num_keys must be at most {self.num_keys}, got {num_keys}")
        if num_keys < 0:
            raise GistError(f"num_keys must be at least 0, got {num_keys}")
        positions = None if self.position_ids is None else self.position_ids[:, shift:]
        return Visibility(self.first[:, shift:] - shift, self.end[:, shift:] - shift, positions)

    def to_dense(self, num_rows: int | None = None) -> Tensor:
        """Write the mask out as bool ``(B, T, K)``, in O(T K) memory. For reference implementations and drawings.

        Args:
            num_rows: T, by default K. The rows are the last T of the K rows; if T > K, they are counted from 0.
        """
        num_rows = self.num_keys if num_rows is None else num_rows
        start = max(self.num_keys - num_rows, 0)
        rows = torch.arange(start, start + num_rows, dtype=torch.int32, device=self.device)[None, :, None]
        return (rows >= self.first[:, None]) & (rows < self.end[:, None])

    def as_attention_mask(self) -> Tensor:
        """Stack the intervals into int32 ``(B, 1, 2, K)``, which a patched model accepts as its ``attention_mask``.

        transformers passes 4-D masks through unchanged, so this also works with Trainer, gradient checkpointing and
        FSDP.
        """
        return torch.stack([self.first, self.end], dim=1)[:, None]

    @staticmethod
    def from_attention_mask(attention_mask: Tensor) -> Visibility:
        """Read the intervals back from ``attention_mask``, int32 ``(B, 1, 2, K)``, made by :meth:`as_attention_mask`.

        Raises:
            GistError: the mask has another shape or dtype.
        """
        if not is_interval_mask(attention_mask):
            raise GistError(
                "attention_mask must be int32 of shape (B, 1, 2, K), as made by Visibility.as_attention_mask(), "
                f"got {attention_mask.dtype} {tuple(attention_mask.shape)}"
            )
        return Visibility(attention_mask[:, 0, 0], attention_mask[:, 0, 1])

    def draw(self, tokens: Sequence[str] | None = None, row: int = 0) -> str:
        """Draw the mask of one sequence, with ``1`` where the row sees the key and ``.`` where it does not.

        Args:
            tokens: K labels. Without them, each key is labelled with its index modulo 10.
            row: index of the sequence in the batch.

        Raises:
            GistError: there is no such sequence, or the number of labels is not K.
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
        """Save the mask of one sequence as a PNG image. Needs matplotlib, which the ``eval`` extra installs.

        Args:
            path: file to write.
            tokens: K labels for the axes, or None for no labels.
            row: index of the sequence in the batch.

        Raises:
            GistError: as :meth:`draw`, or matplotlib is not installed.
        """
        self._check_labels(tokens, row)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise GistError("saving a PNG needs matplotlib; run: pip install 'gist-tokens[eval]'") from error
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
            raise GistError(f"tokens must have {self.num_keys} labels, one per key, got {len(tokens)}")


def is_interval_mask(attention_mask: object) -> bool:
    """Return whether this is the tensor form of a :class:`Visibility`: int32 of shape ``(B, 1, 2, K)``."""
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.dtype == torch.int32
        and attention_mask.dim() == 4
        and attention_mask.shape[1:3] == (1, 2)
    )


# -- conditions of a decoder -------------------------------------------------------------------------------------------


def causal(padding: Tensor, *, documents: Tensor | None = None, branches: Tensor | None = None) -> Visibility:
    """Ordinary causal attention, in which no row sees padding.

    Args:
        padding: bool or integer ``(B, K)``: true or 1 for tokens, false or 0 for padding, on either side. This is the
            ``attention_mask`` of transformers.
        documents: int ``(B, K)``, or None: which of several packed documents a token belongs to. Consecutive tokens
            with equal numbers are one document, and documents do not see each other.
        branches: int ``(B, K)``, or None: several completions of one shared beginning. The shared tokens have number
            0, the completions have the numbers 1, 2, ...; a completion sees the shared tokens and itself.
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
    """Causal gist masking (Gisting, section 3.2): rows after a span of gist tokens do not see the tokens before it.

    A long prompt may be compressed in chunks, each followed by a span of gist tokens. Then each span hides its own
    chunk from later rows, while all gist tokens remain visible. The tokens of a chunk count their positions backwards
    from their own gist tokens, so they may share positions with earlier gist tokens, which they see nevertheless::

             a  b  G  g  c  d  e  H  h  f
          a  1  .  .  .  .  .  .  .  .  .     position_ids   -2 -1  0  1 -1  0  1  2  3  4
          b  1  1  .  .  .  .  .  .  .  .
          G  1  1  1  .  .  .  .  .  .  .     a b and c d e are the chunks of a prompt,
          g  1  1  1  1  .  .  .  .  .  .     G g and H h are their gist tokens,
          c  .  .  1  1  1  .  .  .  .  .     f is the rest of the sequence
          d  .  .  1  1  1  1  .  .  .  .
          e  .  .  1  1  1  1  1  .  .  .
          H  .  .  1  1  1  1  1  1  .  .
          h  .  .  1  1  1  1  1  1  1  .
          f  .  .  1  1  .  .  .  1  1  1

    Documents without gist tokens get ordinary causal attention.

    Args:
        is_gist: bool ``(B, K)``, true at gist tokens.
        padding: as for :func:`causal`; None for no padding.
        documents: as for :func:`causal`.
        branches: as for :func:`causal`; gist tokens must be in the shared part.
    """
    return _decoder(is_gist, padding, documents, branches, _hide_before_next_span)


def positive(
    is_gist: Tensor,
    padding: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    branches: Tensor | None = None,
) -> Visibility:
    """The positive control (Gisting, section 4): ordinary causal attention over prompt, gist tokens and the rest.

    Arguments as for :func:`gist`.
    """
    return _decoder(is_gist, padding, documents, branches, _hide_nothing)


def negative(
    is_gist: Tensor,
    padding: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    branches: Tensor | None = None,
) -> Visibility:
    """The negative control (Gisting, section 4): rows after the last gist token see neither the prompt nor its gist.

    Arguments as for :func:`gist`.
    """
    return _decoder(is_gist, padding, documents, branches, _hide_to_last_span)


def without_gists(
    visibility: Visibility, is_gist: Tensor, padding: Tensor | None = None, documents: Tensor | None = None
) -> tuple[Visibility, Tensor]:
    """Hide gist tokens from everything else: of the positive control this makes the model that reads ordinary text.

    Args:
        visibility: what is seen with the gist tokens in view; of an encoder, whose distances count columns, too.
        is_gist: as for :func:`gist`, as ``padding`` and ``documents``; also true at copies of chained gist tokens.
        padding: see above.
        documents: see above.

    Returns:
        Intervals and positions, which do not count gist tokens; and the number of gist tokens before each in its
        document, int64 ``(B, K)``.
    """
    is_gist, is_token = _check(is_gist, padding, documents=documents)
    span = is_gist.long()
    first = torch.where(is_gist, torch.maximum(visibility.first, _run_start(span)), visibility.first)
    end = torch.where(is_gist, torch.minimum(visibility.end, _run_end(span)), visibility.end)
    before = span.cumsum(-1) - span
    if documents is not None:
        before = before - before.gather(-1, _run_start(torch.where(is_token, _numbered(documents), 0)))
    positions = None if visibility.position_ids is None else visibility.position_ids - before
    return Visibility(first, end, positions), before


def chained(is_gist: Tensor, is_copy: Tensor, parts: Tensor, padding: Tensor | None = None) -> Visibility:
    """Gist masking of a prompt in several parts that are compressed separately, as ``GistCache.chain`` joins them.

    A part does not see the parts before it, not even their gist tokens, while the rest of the sequence sees the gist
    tokens of all parts. A gist token must therefore be visible to its own part and to the rest, but not to the parts in
    between: two ranges of rows, where a key has only one. So each gist token is followed by a *copy*, the same token at
    the same position. Only the part itself sees the original, and only the rest sees the copy. The copy sees what the
    original sees, including the original in place of itself, so both have the same hidden states in every layer. The
    gist tokens of the last part need no copies, because nothing comes between them and the rest::

             a  G  g  H  h  b  J  L  c  d     parts           1  1  1  1  1  2  2  2  0  0
          a  1  .  .  .  .  .  .  .  .  .     position_ids   -1  0  0  1  1  1  2  3  4  5
          G  1  1  .  .  .  .  .  .  .  .
          g  1  1  .  .  .  .  .  .  .  .     a and b are the prompts of two parts,
          H  1  1  .  1  .  .  .  .  .  .     G H and J L are their gist tokens,
          h  1  1  .  1  .  .  .  .  .  .     g h are the copies of G H,
          b  .  .  .  .  .  1  .  .  .  .     c d is the rest of the sequence
          J  .  .  .  .  .  1  1  .  .  .
          L  .  .  .  .  .  1  1  1  .  .
          c  .  .  1  .  1  .  1  1  1  .
          d  .  .  1  .  1  .  1  1  1  1

    With a single part and no copies, the result is that of :func:`gist`. A sliding window counts columns, prompts and
    originals included: the gist tokens of an early part may lie outside the window here although they would lie inside
    it in a cache.

    Args:
        is_gist: bool ``(B, K)``, true at gist tokens and at their copies.
        is_copy: bool ``(B, K)``, true at copies. Each directly follows its gist token, and every gist token outside the
            last part has one.
        parts: int ``(B, K)``: 0 for the rest, which comes after all parts. Consecutive tokens with equal numbers above
            0 are one part.
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
    # Prompt tokens count backwards from the gist of their part. A gist token and its copy share a position.
    next_gist = torch.minimum(_carry_back(index, is_gist, num_keys), part_end)
    before = survives.long().cumsum(-1) - survives.long()
    positions = before - torch.where(is_gist | is_rest, 0, next_gist - index)
    return Visibility(first, torch.where(is_token, end, first), torch.where(is_token, positions, 0))


def chained_positive(is_gist: Tensor, is_copy: Tensor, parts: Tensor, padding: Tensor | None = None) -> Visibility:
    """The positive control for a prompt in parts: ordinary causal attention over all parts, with copies as padding.

    Arguments as for :func:`chained`.
    """
    return positive(*_without_copies(is_gist, is_copy, parts, padding))


def chained_negative(is_gist: Tensor, is_copy: Tensor, parts: Tensor, padding: Tensor | None = None) -> Visibility:
    """The negative control for a prompt in parts: the rest sees no part and no gist token.

    Arguments as for :func:`chained`.
    """
    return negative(*_without_copies(is_gist, is_copy, parts, padding))


# -- conditions of an encoder ------------------------------------------------------------------------------------------


def bidirectional(padding: Tensor) -> Visibility:
    """Bidirectional attention: every row sees every token that is not padding. ``padding`` is as for :func:`causal`."""
    _check_padding(padding)
    return _encoder(torch.zeros_like(padding, dtype=torch.bool), padding, hide_prompt=False, hide_gist=False)


def encoder_gist(is_gist: Tensor, padding: Tensor | None = None) -> Visibility:
    """Gist masking of an encoder (Gisting, appendix A): the prompt and the rest do not see each other.

    Args:
        is_gist: bool ``(B, K)``. With several spans of gist tokens, no chunk sees another chunk, but each sees the gist
            tokens before it.
        padding: bool or integer ``(B, K)``, 1 for tokens and 0 for padding; None for no padding.
    """
    return _encoder(is_gist, padding, hide_prompt=True, hide_gist=False)


def encoder_positive(is_gist: Tensor, padding: Tensor | None = None) -> Visibility:
    """The positive control of an encoder: bidirectional attention. Arguments as for :func:`encoder_gist`."""
    return _encoder(is_gist, padding, hide_prompt=False, hide_gist=False)


def encoder_negative(is_gist: Tensor, padding: Tensor | None = None) -> Visibility:
    """The negative control of an encoder: the rest does not see the gist tokens either.

    Arguments as for :func:`encoder_gist`.
    """
    return _encoder(is_gist, padding, hide_prompt=True, hide_gist=True)


Condition = Callable[..., Visibility]
#: The conditions of a decoder, by name.
CONDITIONS: dict[str, Condition] = {"gist": gist, "positive": positive, "negative": negative}
#: The conditions of a decoder whose prompt consists of several parts, by name.
CHAINED_CONDITIONS: dict[str, Condition] = {
    "gist": chained,
    "positive": chained_positive,
    "negative": chained_negative,
}
#: The conditions of an encoder, by name.
ENCODER_CONDITIONS: dict[str, Condition] = {
    "gist": encoder_gist,
    "positive": encoder_positive,
    "negative": encoder_negative,
}


# -- arithmetic --------------------------------------------------------------------------------------------------------
# Documents, branches, chunks and gist spans are runs of equal labels. A reversed cumulative minimum carries the end of
# each run back to all of its tokens, in O(N).


def _carry_back(value: Tensor, where: Tensor, beyond: int) -> Tensor:
    """For each index j, return ``value`` at the first index >= j where ``where`` holds, or ``beyond`` if there is none.

    ``value`` must not decrease along a row.
    """
    marked = torch.where(where, value, beyond)
    return marked.flip(-1).cummin(-1).values.flip(-1)


def _run_end(label: Tensor) -> Tensor:
    """For each index, return the (exclusive) end of its run of equal labels."""
    num_keys = label.shape[-1]
    index = torch.arange(num_keys, device=label.device).expand_as(label)
    is_last = torch.nn.functional.pad(label[:, 1:] != label[:, :-1], (0, 1), value=True)
    return _carry_back(index + 1, is_last, num_keys)


def _numbered(label: Tensor) -> Tensor:
    """Number the runs of equal labels in each row 1, 2, ..., because labels may repeat or be negative."""
    is_new = torch.nn.functional.pad(label[:, 1:] != label[:, :-1], (1, 0), value=True)
    return is_new.long().cumsum(-1)


def _run_start(label: Tensor) -> Tensor:
    """For each index, return the start of its run of equal labels."""
    return label.shape[-1] - _run_end(label.flip(-1)).flip(-1)


def _check_padding(padding: Tensor) -> None:
    if padding.dim() != 2:
        raise GistError(f"padding must have shape (B, K), got {tuple(padding.shape)}")


def _check(is_gist: Tensor, padding: Tensor | None, **others: Tensor | None) -> tuple[Tensor, Tensor]:
    if is_gist.dim() != 2:
        raise GistError(f"is_gist must have shape (B, K), got {tuple(is_gist.shape)}")
    for name, tensor in {"padding": padding, **others}.items():
        if tensor is not None and tensor.shape != is_gist.shape:
            raise GistError(f"{name} must have the shape of is_gist, {tuple(is_gist.shape)}, got {tuple(tensor.shape)}")
    is_token = torch.ones_like(is_gist, dtype=torch.bool) if padding is None else padding.bool()
    return is_gist.bool() & is_token, is_token


def _without_copies(is_gist: Tensor, is_copy: Tensor, parts: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``is_gist`` and ``padding`` with the copies turned into padding."""
    is_gist, is_token = _check(is_gist, padding, is_copy=is_copy, parts=parts)
    return is_gist & ~is_copy.bool(), is_token & ~is_copy.bool()


# A rule returns, for each key, the first row from which a condition hides it, or FOREVER.


def _hide_nothing(is_gist: Tensor, label: Tensor, document_end: Tensor) -> Tensor:
    return torch.full_like(document_end, FOREVER)


def _hide_before_next_span(is_gist: Tensor, label: Tensor, document_end: Tensor) -> Tensor:
    """Hide prompt tokens from the end of the next gist span in their document. Gist tokens and the rest stay."""
    span_end = _run_end(torch.where(is_gist, label, -1))
    next_span_end = _carry_back(span_end, is_gist, FOREVER)
    return torch.where(is_gist | (next_span_end > document_end), FOREVER, next_span_end)


def _hide_to_last_span(is_gist: Tensor, label: Tensor, document_end: Tensor) -> Tensor:
    """Hide everything up to the last gist token of a document from the rows after it. The rest stays."""
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

    # Intervals. In causal attention, the first row that sees a key is its own, so ``first`` is the index. A key ends
    # where its condition hides it, where its document ends, or where its branch ends, whichever comes first.
    hidden_from = hide(is_gist, label, document_end)
    end = hidden_from if documents is None else torch.minimum(hidden_from, document_end)
    end = torch.where(in_branch, torch.minimum(end, _run_end(branch_run)), end)

    # Positions. Each branch continues from the shared tokens, not from the branch before it, so branch tokens do not
    # count as survivors here.
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
        # A chunk is a piece of prompt with its gist span. The rest is the chunk after the last span.
        chunk = torch.nn.functional.pad(is_gist[:, :-1] & ~is_gist[:, 1:], (1, 0), value=False).long().cumsum(-1)
        is_last_gist = is_gist & (is_gist.flip(-1).cumsum(-1).flip(-1) == 1)
        last_end = _carry_back(index + 1, is_last_gist, FOREVER)
        is_rest = last_end == FOREVER
        first = _run_start(chunk)
        end = torch.where(is_rest, FOREVER, _run_end(chunk))
        end = torch.where(is_gist, last_end if hide_gist else FOREVER, end)
    return Visibility(first, torch.where(is_token, end, first))
