"""Intervals cut into rectangles and causal trapezoids, each one unmasked or causal call of torch's fused CPU attention.

Place in the flow: ``sdpa.py`` asks here first, and makes the mask dense only where this is dearer or cannot be. Keys
next to each other whose intervals end together, and start together or each one row after the one before, are one
*piece*; so a piece is a run of keys, and pieces share rows but never keys:

         a b G c        rows see keys          piece   rows  keys
       a 1 . . .                               a b     0..3  0..2  causal: the prompt, down to its gist
       b 1 1 . .                               G c     2..4  2..4  causal
       G 1 1 1 .
       c . . 1 1                               row G is in both

The fused operator also returns the logarithm of the sum of exponentials of each row. With lse_ip and out_ip those of
row i in piece p, whose keys are S_p,

    lse_i = log sum_p exp(lse_ip)        out_i = sum_p exp(lse_ip - lse_i) out_ip

are exactly the row over all its keys. Backward (FlashAttention-2, arXiv 2307.08691, algorithm 2), with s_ij the scores,

    w_ij    = exp(s_ij - lse_i)                       the weight of key j for row i
    delta_i = sum_d dout_id out_id
    ds_ij   = w_ij (dout_i . v_j - delta_i)
    dq_i    = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i        dv_j = sum_i w_ij dout_i

where only lse_i and delta_i know of keys outside a piece. So the fused backward of a piece, given lse and out of the
*whole* rows, gives that piece's exact share of each gradient: dq is the sum over pieces, dk and dv of a key come from
its one piece. No tensor of T x K numbers exists in either pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gisting.visibility import Visibility

__all__ = [
    "Group",
    "Piece",
    "Plan",
    "Step",
    "Stretch",
    "attend_pieces",
    "call_cost",
    "is_available",
    "plan_if_cheaper",
    "plan_pieces",
]

# Costs are in multiply-adds of q k^T, of which a thread of the fused operator does about 2e10 a second forward and 6e9
# forward and backward; measured with torch 2.13, float32, H 8, D 64, two threads. A call takes 20 and 50 us besides.
CALL_COST_PER_THREAD = 500_000
# Merging a row into what other pieces gave it, in keys.
MERGE_COST = 32
# The fused operator takes this many keys at a time and skips, where causal, only whole blocks of them.
KEY_BLOCK = 512


class Piece(NamedTuple):
    """Rows ``first_row <= i < end_row`` see keys ``first_key <= j < end_key``: all of them, or, if causal, those with
    ``j - first_key <= i - first_row``. Rows are counted from the first of the T.

    Args:
        first_row: from this row on.
        end_row: up to this row, which is none of them.
        first_key: from this key on.
        end_key: up to this key, which is none of them.
        is_causal: whether the rows see the keys only up to the diagonal.
    """

    first_row: int
    end_row: int
    first_key: int
    end_key: int
    is_causal: bool

    @property
    def rows(self) -> slice:
        """The rows, to index with."""
        return slice(self.first_row, self.end_row)

    @property
    def keys(self) -> slice:
        """The keys, to index with."""
        return slice(self.first_key, self.end_key)


class Stretch(NamedTuple):
    """Rows of a piece that no piece before it had (``is_new``), or that all were in some piece before.

    Args:
        first_row: from this row on.
        end_row: up to this row, which is none of them.
        is_new: whether nothing is there yet, so that nothing is merged.
    """

    first_row: int
    end_row: int
    is_new: bool


class Step(NamedTuple):
    """A piece, and its rows by whether they are merged with what is there already.

    Args:
        piece: what is seen.
        stretches: all its rows, cut where it changes whether they are new.
    """

    piece: Piece
    stretches: tuple[Stretch, ...]


class Group(NamedTuple):
    """Sequences of a batch (a slice or their numbers) with the same intervals, and what is done for them in turn.

    Args:
        sequences: a slice, or int64 ``(sequences,)``.
        steps: what is done, in this order.
    """

    sequences: slice | Tensor
    steps: tuple[Step, ...]

    @property
    def pieces(self) -> list[Piece]:
        """The pieces alone, from the first key to the last."""
        return [step.piece for step in self.steps]


class Plan(NamedTuple):
    """What a batch is computed by: every (row, key) that is seen is in one piece of its sequence's group.

    Args:
        groups: every sequence is in one of them.
    """

    groups: tuple[Group, ...]

    @property
    def is_merged(self) -> bool:
        """Whether some row is in several pieces."""
        steps = (step for group in self.groups for step in group.steps)
        return any(not stretch.is_new for step in steps for stretch in step.stretches)


# -- intervals to pieces -----------------------------------------------------------------------------------------------


def plan_pieces(visibility: Visibility, num_rows: int) -> Plan:
    """The pieces of a batch, whatever they cost.

    Args:
        visibility: B sequences of K keys, on the CPU.
        num_rows: T; the rows are the last T of the K. Where T > K, rows count from 0.

    Returns:
        One group for each set of sequences with equal intervals; ``slice(None)`` where that is all of them, so that one
        sequence of intervals serves any batch.
    """
    different = _different(visibility, num_rows)
    return _plan(different, _runs(different), num_rows)


def plan_if_cheaper(visibility: Visibility, num_rows: int, work: int) -> Plan | None:
    """The pieces of a batch, or None where attention with a dense mask is estimated to take less time.

    Many short runs of keys are dear, such as those of a sliding window, where each key is a run of its own. The answer
    does not look at them one by one.

    Args:
        visibility: as for :func:`plan_pieces`.
        num_rows: as for :func:`plan_pieces`.
        work: multiply-adds for one (row, key) of one sequence of the visibility: H D, times the sequences that it
            serves.
    """
    different = _different(visibility, num_rows)
    runs = _runs(different)
    if _cost(different, runs, num_rows, work) >= visibility.batch_size * visibility.num_keys * num_rows * work:
        return None
    return _plan(different, runs, num_rows)


class _Different(NamedTuple):
    """The different sequences of a batch: rows cut to the T and counted from their first, unseen keys ``0, 0``."""

    first: Tensor  # (U, K)
    end: Tensor  # (U, K)
    which: Tensor  # (B,): the one that a sequence equals
    counts: Tensor  # (U,)


class _Runs(NamedTuple):
    """Pieces as columns, one entry each, in the order of sequences and keys."""

    sequence: Tensor
    first_row: Tensor
    end_row: Tensor
    first_key: Tensor
    end_key: Tensor
    is_causal: Tensor


def _different(visibility: Visibility, num_rows: int) -> _Different:
    num_keys, start = visibility.num_keys, max(visibility.num_keys - num_rows, 0)
    first = visibility.first.long().clamp(min=start) - start
    end = visibility.end.long().clamp(max=start + num_rows) - start
    is_seen = end > first
    both = torch.cat([first * is_seen, end * is_seen], dim=1)
    if visibility.batch_size == 1:
        one = both.new_ones(1)
        return _Different(both[:, :num_keys], both[:, num_keys:], one - 1, one)
    both, which, counts = torch.unique(both, dim=0, return_inverse=True, return_counts=True)
    return _Different(both[:, :num_keys], both[:, num_keys:], which, counts)


def _runs(different: _Different) -> _Runs:
    first, end = different.first, different.end
    is_seen = end > first
    step = first[:, 1:] - first[:, :-1]
    # Between a key and the next, (U, K - 1). A key that could be in a run of either kind goes to the sloped one: what a
    # cached prefix gives is then a rectangle and a whole triangle.
    is_linked = is_seen[:, 1:] & is_seen[:, :-1] & (end[:, 1:] == end[:, :-1])
    is_slope = is_linked & (step == 1)
    in_slope = _after(is_slope) | _before(is_slope)
    is_flat = is_linked & (step == 0) & ~in_slope[:, 1:] & ~in_slope[:, :-1]
    sequence, first_key = (is_seen & ~_after(is_slope | is_flat)).nonzero().unbind(1)
    last_key = (is_seen & ~_before(is_slope | is_flat)).nonzero()[:, 1]
    here = (sequence, first_key)
    return _Runs(sequence, first[here], end[here], first_key, last_key + 1, in_slope[here])


def _after(link: Tensor) -> Tensor:
    """For each key, whether the link before it holds: ``(U, K - 1)`` to ``(U, K)``."""
    return torch.nn.functional.pad(link, (1, 0), value=False)


def _before(link: Tensor) -> Tensor:
    """For each key, whether the link behind it holds: ``(U, K - 1)`` to ``(U, K)``."""
    return torch.nn.functional.pad(link, (0, 1), value=False)


def _cost(different: _Different, runs: _Runs, num_rows: int, work: int) -> float:
    rows, keys = runs.end_row - runs.first_row, runs.end_key - runs.first_key
    # Of the causal ones, block b of the keys is skipped by the first b blocks of rows.
    num_whole = (keys - 1) // KEY_BLOCK
    rest = keys - num_whole * KEY_BLOCK
    skipped = KEY_BLOCK * (KEY_BLOCK * num_whole * (num_whole - 1) // 2 + num_whole * rest)
    area = rows * keys - skipped * runs.is_causal
    # (U, T): in how many pieces a row is
    steps = torch.zeros(len(different.counts), num_rows + 1, dtype=torch.long)
    steps.index_put_((runs.sequence, runs.first_row), torch.ones_like(rows), accumulate=True)
    steps.index_put_((runs.sequence, runs.end_row), -torch.ones_like(rows), accumulate=True)
    num_merged = (steps.cumsum(1) - 1).clamp(min=0).sum(1)
    per_pair = (area * different.counts[runs.sequence]).sum() + MERGE_COST * (num_merged * different.counts).sum()
    return work * per_pair.item() + call_cost() * len(rows)


def call_cost() -> int:
    """What a call of the fused operator costs before it does anything, in multiply-adds that its threads would do."""
    return CALL_COST_PER_THREAD * torch.get_num_threads()


def _plan(different: _Different, runs: _Runs, num_rows: int) -> Plan:
    pieces: list[list[Piece]] = [[] for _ in range(len(different.counts))]
    for sequence, *piece in zip(*(column.tolist() for column in runs), strict=True):
        pieces[sequence].append(Piece._make(piece))
    return Plan(
        tuple(Group(_members(different.which, number), _steps(own, num_rows)) for number, own in enumerate(pieces))
    )


def _members(which: Tensor, number: int) -> slice | Tensor:
    """The sequences that equal one, as a slice where they stand together: what a slice picks is no copy."""
    members = (which == number).nonzero()[:, 0]
    first, end = int(members[0]), int(members[-1]) + 1
    if len(members) == len(which):
        return slice(None)
    return slice(first, end) if len(members) == end - first else members


def _steps(pieces: list[Piece], num_rows: int) -> tuple[Step, ...]:
    is_new = torch.ones(num_rows, dtype=torch.bool)
    steps = []
    for piece in pieces:
        stretches, row = [], piece.first_row
        for value, count in zip(*torch.unique_consecutive(is_new[piece.rows], return_counts=True), strict=True):
            stretches.append(Stretch(row, row + int(count), bool(value)))
            row += int(count)
        is_new[piece.rows] = False
        steps.append(Step(piece, tuple(stretches)))
    return tuple(steps)


# -- attention by pieces -----------------------------------------------------------------------------------------------


def is_available() -> bool:
    """Whether this torch has the fused CPU attention under the names of torch 2.13, which are private.

    Goes when torch returns the log-sum-exp from a public function on the CPU.
    """
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
    )


def attend_pieces(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """Attention over the pieces of a plan; rows in no piece give zeros and have zero gradients.

    Args:
        q: ``(B, H, T, D)``, floating point, on the CPU.
        k: ``(B, G, K, D)``, dtype of q; query head h reads key head ``h // (H // G)``.
        v: ``(B, G, K, D)``, as k.
        plan: what :func:`plan_pieces` gives for the T, and for these B sequences or one.
        scale: factor of the scores, positive (the fused operator gives NaN where it is not and a piece is causal).

    Returns:
        ``(B, H, T, D)`` in the dtype of q, differentiable once.
    """
    # Function.apply has no types.
    out: Any = _PiecewiseAttention.apply(_rows_whole(q), _rows_whole(k), _rows_whole(v), plan, scale)
    return out


class _PiecewiseAttention(torch.autograd.Function):
    # The fused operator groups heads by itself, in both passes (pytorch/pytorch#157893), so keys are not expanded.
    # Not marked once_differentiable, which drops a second derivative in silence where dout asks for none; the fused
    # backward has none and says so.

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
        (batch, heads, num_rows, size), wide = q.shape, _wide(q.dtype)
        # Rows before heads in memory, as the fused operator has it, and models want it.
        out = q.new_zeros(batch, num_rows, heads, size, dtype=wide if plan.is_merged else q.dtype).transpose(1, 2)
        lse = q.new_full((batch, num_rows, heads), -torch.inf, dtype=wide).transpose(1, 2)
        for sequences, steps in plan.groups:
            q_, k_, v_, out_, lse_ = (t[sequences] for t in (q, k, v, out, lse))
            for piece, stretches in steps:
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q_[:, :, piece.rows],
                    k_[:, :, piece.keys],
                    v_[:, :, piece.keys],
                    is_causal=piece.is_causal,
                    scale=scale,
                )
                for here, new, is_new in _stretches(piece, stretches):
                    if is_new:
                        out_[:, :, here] = part[:, :, new]
                        lse_[:, :, here] = part_lse[:, :, new]
                        continue
                    # exp(new) / (exp(old) + exp(new)), the share of the new keys
                    share = torch.sigmoid(part_lse[:, :, new] - lse_[:, :, here])
                    out_[:, :, here].lerp_(part[:, :, new].to(wide), share[..., None])
                    lse_[:, :, here] = torch.logaddexp(part_lse[:, :, new], lse_[:, :, here])
            if not isinstance(sequences, slice):
                out[sequences], lse[sequences] = out_, lse_
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        plan: Plan = ctx.plan
        dq = torch.zeros_like(q, dtype=_wide(q.dtype) if plan.is_merged else q.dtype)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for sequences, steps in plan.groups:
            q_, k_, v_, out_, lse_, dout_ = (t[sequences] for t in (q, k, v, out, lse, dout))
            dq_, dk_, dv_ = (t[sequences] for t in (dq, dk, dv))
            for piece, stretches in steps:
                part, dk_[:, :, piece.keys], dv_[:, :, piece.keys] = (
                    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                        dout_[:, :, piece.rows],
                        q_[:, :, piece.rows],
                        k_[:, :, piece.keys],
                        v_[:, :, piece.keys],
                        out_[:, :, piece.rows],
                        lse_[:, :, piece.rows],
                        0.0,
                        piece.is_causal,
                        scale=ctx.scale,
                    )
                )
                for here, new, is_new in _stretches(piece, stretches):
                    if is_new:
                        dq_[:, :, here] = part[:, :, new]
                    else:
                        dq_[:, :, here] += part[:, :, new]
            if not isinstance(sequences, slice):
                dq[sequences], dk[sequences], dv[sequences] = dq_, dk_, dv_
        return dq.to(q.dtype), dk, dv, None, None


def _stretches(piece: Piece, stretches: tuple[Stretch, ...]) -> list[tuple[slice, slice, bool]]:
    """Each stretch as rows of the T, as rows of the piece, and whether it is new."""
    start = piece.first_row
    return [(slice(a, b), slice(a - start, b - start), is_new) for a, b, is_new in stretches]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over pieces, and of the fused operator's own."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_whole(tensor: Tensor) -> Tensor:
    """The fused operator reads the numbers of a row as neighbours in memory, and does not check that they are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
