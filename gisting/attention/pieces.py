"""Attention on the CPU without a mask: cut the intervals into pieces, each one call of torch's fused attention.

Place in the flow: ``sdpa.py`` tries this first, and uses a dense mask if the pieces are more expensive or impossible. A
*piece* is a run of neighbouring keys whose intervals have the same end, and either the same start (a rectangle, without
a mask) or starts that increase by one (a trapezoid, causal). Pieces may share rows, but never keys:

         a b G c        rows see keys          piece   rows  keys
       a 1 . . .                               a b     0..3  0..2  causal: the prompt, down to its gist
       b 1 1 . .                               G c     2..4  2..4  causal
       G 1 1 1 .
       c . . 1 1                               row G is in both

The fused operator also returns the log-sum-exp of each row. Let out_ip and lse_ip be its results for row i in piece p.
Then the results over all keys of the row are exactly

    lse_i = log sum_p exp(lse_ip)        out_i = sum_p exp(lse_ip - lse_i) out_ip

In the backward (FlashAttention-2, arXiv 2307.08691, algorithm 2), with the scores s_ij,

    w_ij    = exp(s_ij - lse_i)                       the weight of key j for row i
    delta_i = sum_d dout_id out_id
    ds_ij   = w_ij (dout_i . v_j - delta_i)
    dq_i    = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i        dv_j = sum_i w_ij dout_i

and the sink of a head (gpt-oss), one more term exp(sink) in each row's sum, gets -sum_i exp(sink - lse_i) delta_i. Only
lse_i and delta_i depend on keys outside the piece. So the fused backward of a piece, called with lse and out of
the *whole* rows, computes that piece's exact share of the gradients: dq is the sum over the pieces, and dk and dv of a
key come from its only piece. Neither pass makes a tensor of T x K numbers.
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

# Costs are in multiply-adds of q k^T. A thread of the fused operator does about 2e10 of them per second forward, and
# 6e9 forward and backward (measured with torch 2.13, float32, H 8, D 64, two threads). A call adds 20 and 50 us.
CALL_COST_PER_THREAD = 500_000
# The cost of merging a row with the results of earlier pieces, as a number of keys.
MERGE_COST = 32
# The fused operator processes blocks of this many keys, and a causal call skips only whole blocks.
KEY_BLOCK = 512


class Piece(NamedTuple):
    """Rows ``first_row <= i < end_row`` that see keys ``first_key <= j < end_key``.

    Args:
        first_row: the first row, counted from the first of the T.
        end_row: the end of the rows (exclusive).
        first_key: the first key.
        end_key: the end of the keys (exclusive).
        is_causal: whether the rows see only the keys with ``j - first_key <= i - first_row``, instead of all of them.
    """

    first_row: int
    end_row: int
    first_key: int
    end_key: int
    is_causal: bool

    @property
    def rows(self) -> slice:
        """The rows, as an index."""
        return slice(self.first_row, self.end_row)

    @property
    def keys(self) -> slice:
        """The keys, as an index."""
        return slice(self.first_key, self.end_key)


class Stretch(NamedTuple):
    """Consecutive rows of a piece that either all occur in earlier pieces, or do not (``is_new``).

    Args:
        first_row: the first row.
        end_row: the end of the rows (exclusive).
        is_new: whether the rows have no results yet, so nothing is merged.
    """

    first_row: int
    end_row: int
    is_new: bool


class Step(NamedTuple):
    """A piece, with its rows divided by whether they must be merged with the results of earlier pieces.

    Args:
        piece: the piece.
        stretches: all its rows, in stretches that are new or not.
    """

    piece: Piece
    stretches: tuple[Stretch, ...]


class Group(NamedTuple):
    """The sequences of a batch that have the same intervals, and the steps that compute their attention.

    Args:
        sequences: a slice of the batch, or indices, int64 ``(sequences,)``.
        steps: the steps, in order.
    """

    sequences: slice | Tensor
    steps: tuple[Step, ...]

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of the steps, from the first key to the last."""
        return [step.piece for step in self.steps]


class Plan(NamedTuple):
    """The pieces of a batch. Each visible (row, key) pair is in exactly one piece of its sequence's group.

    Args:
        groups: each sequence is in one of them.
    """

    groups: tuple[Group, ...]

    @property
    def is_merged(self) -> bool:
        """Whether some row occurs in several pieces."""
        steps = (step for group in self.groups for step in group.steps)
        return any(not stretch.is_new for step in steps for stretch in step.stretches)


# -- intervals to pieces -----------------------------------------------------------------------------------------------


def plan_pieces(visibility: Visibility, num_rows: int) -> Plan:
    """Cut the intervals of a batch into pieces, regardless of the cost.

    Args:
        visibility: B sequences of K keys, on the CPU.
        num_rows: T; the rows are the last T of the K rows. If T > K, they are counted from 0.

    Returns:
        One group for each set of sequences with equal intervals. If all are equal, its ``sequences`` are
        ``slice(None)``, so a visibility with a single sequence works with any batch.
    """
    different = _different(visibility, num_rows)
    return _plan(different, _runs(different), num_rows)


def plan_if_cheaper(visibility: Visibility, num_rows: int, work: int) -> Plan | None:
    """Cut the intervals into pieces, or return None if a dense mask is estimated to take less time.

    Many short runs of keys are expensive. In a sliding window, for instance, each key is a run by itself.

    Args:
        visibility: as for :func:`plan_pieces`.
        num_rows: as for :func:`plan_pieces`.
        work: multiply-adds for one (row, key) pair of one sequence of the visibility: H D, times the number of
            sequences that use it.
    """
    different = _different(visibility, num_rows)
    runs = _runs(different)
    if _cost(different, runs, num_rows, work) >= visibility.batch_size * visibility.num_keys * num_rows * work:
        return None
    return _plan(different, runs, num_rows)


class _Different(NamedTuple):
    """The U distinct sequences of a batch. Intervals are cut to the T rows; keys that no row sees have ``0, 0``."""

    first: Tensor  # (U, K)
    end: Tensor  # (U, K)
    which: Tensor  # (B,): index of the distinct sequence that each sequence equals
    counts: Tensor  # (U,): how many sequences are equal


class _Runs(NamedTuple):
    """Pieces as columns, ordered by sequence and key."""

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
    # Links between neighbouring keys, (U, K - 1). A key that fits into both kinds of run joins the sloped run, so that
    # a cached prefix makes a rectangle and a full triangle.
    is_linked = is_seen[:, 1:] & is_seen[:, :-1] & (end[:, 1:] == end[:, :-1])
    is_slope = is_linked & (step == 1)
    in_slope = _after(is_slope) | _before(is_slope)
    is_flat = is_linked & (step == 0) & ~in_slope[:, 1:] & ~in_slope[:, :-1]
    sequence, first_key = (is_seen & ~_after(is_slope | is_flat)).nonzero().unbind(1)
    last_key = (is_seen & ~_before(is_slope | is_flat)).nonzero()[:, 1]
    here = (sequence, first_key)
    return _Runs(sequence, first[here], end[here], first_key, last_key + 1, in_slope[here])


def _after(link: Tensor) -> Tensor:
    """For each key, return whether it is linked to the key before it: ``(U, K - 1)`` to ``(U, K)``."""
    return torch.nn.functional.pad(link, (1, 0), value=False)


def _before(link: Tensor) -> Tensor:
    """For each key, return whether it is linked to the key after it: ``(U, K - 1)`` to ``(U, K)``."""
    return torch.nn.functional.pad(link, (0, 1), value=False)


def _cost(different: _Different, runs: _Runs, num_rows: int, work: int) -> float:
    rows, keys = runs.end_row - runs.first_row, runs.end_key - runs.first_key
    # In a causal piece, the first b blocks of rows skip block b of the keys.
    num_whole = (keys - 1) // KEY_BLOCK
    rest = keys - num_whole * KEY_BLOCK
    skipped = KEY_BLOCK * (KEY_BLOCK * num_whole * (num_whole - 1) // 2 + num_whole * rest)
    area = rows * keys - skipped * runs.is_causal
    # (U, T): the number of pieces that each row is in
    steps = torch.zeros(len(different.counts), num_rows + 1, dtype=torch.long)
    steps.index_put_((runs.sequence, runs.first_row), torch.ones_like(rows), accumulate=True)
    steps.index_put_((runs.sequence, runs.end_row), -torch.ones_like(rows), accumulate=True)
    num_merged = (steps.cumsum(1) - 1).clamp(min=0).sum(1)
    per_pair = (area * different.counts[runs.sequence]).sum() + MERGE_COST * (num_merged * different.counts).sum()
    return work * per_pair.item() + call_cost() * len(rows)


def call_cost() -> int:
    """Return the fixed cost of a call of the fused operator, as multiply-adds that its threads could do meanwhile."""
    return CALL_COST_PER_THREAD * torch.get_num_threads()


def _plan(different: _Different, runs: _Runs, num_rows: int) -> Plan:
    pieces: list[list[Piece]] = [[] for _ in range(len(different.counts))]
    for sequence, *piece in zip(*(column.tolist() for column in runs), strict=True):
        pieces[sequence].append(Piece._make(piece))
    return Plan(
        tuple(Group(_members(different.which, number), _steps(own, num_rows)) for number, own in enumerate(pieces))
    )


def _members(which: Tensor, number: int) -> slice | Tensor:
    """Select the sequences that equal a distinct one, by a slice if they are neighbours, because that needs no copy."""
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
    """Return whether this torch has the fused CPU attention under the private names of torch 2.13.

    To be removed when torch returns the log-sum-exp from a public function on the CPU.
    """
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
    )


def attend_pieces(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, sinks: Tensor | None = None) -> Tensor:
    """Compute attention over the pieces of a plan. Rows in no piece give zeros and have zero gradients.

    Args:
        q: ``(B, H, T, D)``, floating point, on the CPU.
        k: ``(B, G, K, D)``, dtype of q; query head h reads key head ``h // (H // G)``.
        v: ``(B, G, K, D)``, as k.
        plan: the result of :func:`plan_pieces` for T rows, and for these B sequences or for one.
        scale: factor of the scores; positive, because otherwise the fused operator gives NaN in causal pieces.
        sinks: ``(H,)``, floating point, or None: one more term of each head's softmax, without a value.

    Returns:
        ``(B, H, T, D)`` in the dtype of q, differentiable once.
    """
    # Function.apply has no types.
    out: Any = _PiecewiseAttention.apply(_rows_whole(q), _rows_whole(k), _rows_whole(v), plan, scale, sinks)
    return out


class _PiecewiseAttention(torch.autograd.Function):
    # The fused operator handles grouped heads in both passes (pytorch/pytorch#157893), so keys are not expanded. Not
    # marked once_differentiable, which silently drops the second derivative if dout requires no gradient; the fused
    # backward has no derivative and raises.

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, sinks: Tensor | None) -> Tensor:
        (batch, heads, num_rows, size), wide = q.shape, _wide(q.dtype)
        # In memory, rows come before heads, as the fused operator lays its output out and models expect it.
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
                    # The share of the new keys is exp(new) / (exp(old) + exp(new)).
                    share = torch.sigmoid(part_lse[:, :, new] - lse_[:, :, here])
                    out_[:, :, here].lerp_(part[:, :, new].to(wide), share[..., None])
                    lse_[:, :, here] = torch.logaddexp(part_lse[:, :, new], lse_[:, :, here])
            if not isinstance(sequences, slice):
                out[sequences], lse[sequences] = out_, lse_
        if sinks is not None:
            # As one more piece: a key whose value is 0.
            both = torch.logaddexp(lse, sinks.to(wide)[:, None])
            out, lse = out.to(wide) * torch.exp(lse - both)[..., None], both
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, sinks = ctx.saved_tensors
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
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[5]:
            dsinks = _SinksGradient.apply(dout, out, lse, sinks)
        return dq.to(q.dtype), dk, dv, None, None, dsinks


class _SinksGradient(torch.autograd.Function):
    # A function, so that its derivative raises as that of the fused operator's backward: as plain operations it would
    # leave out how the log-sum-exp depends on the inputs.

    @staticmethod
    def forward(ctx: Any, dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
        weights = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
        return -(weights * (dout.to(lse.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            "derivative for the gradient of sinks is not implemented; use impl='reference' for second derivatives"
        )


def _stretches(piece: Piece, stretches: tuple[Stretch, ...]) -> list[tuple[slice, slice, bool]]:
    """Return each stretch as rows of the T, as rows of the piece, and whether it is new."""
    start = piece.first_row
    return [(slice(a, b), slice(a - start, b - start), is_new) for a, b, is_new in stretches]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over pieces, which is also that of the fused operator's own sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_whole(tensor: Tensor) -> Tensor:
    """Make the rows contiguous: the fused operator requires that, but does not check it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
