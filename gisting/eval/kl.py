"""The KL divergence between next-token distributions, over the likeliest tokens of one of them.

Place in the flow: below the training losses and :mod:`gisting.eval.divergence`. Only arithmetic on logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Likeliest", "kl_from", "kl_loss", "likeliest", "truncated_kl"]


class Likeliest(NamedTuple):
    """The likeliest tokens of T distributions over V tokens.

    Args:
        log_probs: float32 ``(T, K + 1)``, in nats: of the K likeliest tokens, the likeliest first, and of all others
            together; ``(T, V)`` if K is V and there are no others.
        tokens: int64 ``(T, K)``, their ids.
    """

    log_probs: Tensor
    tokens: Tensor


def likeliest(logits: Tensor, top_k: int) -> Likeliest:
    """Find the ``top_k`` likeliest tokens, and how likely all others are together.

    Args:
        logits: ``(T, V)``, floating.
        top_k: at least 1; V if it is larger.

    Returns:
        What :func:`kl_from` compares with.
    """
    # The -inf of a forbidden token would make its gradient NaN; -1e4 has a probability of 0 as well.
    logits = logits.float().clamp(min=-1e4)
    values, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    return Likeliest(_log_probs(logits, values, tokens), tokens)


def kl_from(student: Tensor, teacher: Likeliest) -> Tensor:
    """Compute the KL divergence from teacher to student over the teacher's likeliest tokens.

    All other tokens together are one more outcome. The result is at most the full divergence, and equal to it for
    ``K >= V - 1``.

    Args:
        student: logits ``(T, V)``, floating.
        teacher: what :func:`likeliest` returned for the teacher's T distributions, on the device of ``student``.

    Returns:
        float32 ``(T,)``, in nats.
    """
    student = student.float().clamp(min=-1e4)
    found = _log_probs(student, student.gather(-1, teacher.tokens), teacher.tokens)
    return (teacher.log_probs.exp() * (teacher.log_probs - found)).sum(-1)


def kl_loss(student: Tensor, teacher: Likeliest) -> Tensor:
    """Compute :func:`kl_from` for training: a quarter of the time, gradients included.

    What the student gives to all other tokens is taken as 1 minus the rest, which is coarse below about 1e-6.

    Args:
        student: logits ``(T, V)``, floating, finite.
        teacher: as for :func:`kl_from`.

    Returns:
        float32 ``(T,)``, in nats.
    """
    return _KlLoss.apply(student, teacher.log_probs, teacher.tokens)  # pyright: ignore[reportReturnType]


class _KlLoss(torch.autograd.Function):
    """The gradient with respect to a logit is q - p; the other tokens share their p in proportion to q."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, log_probs: Tensor, tokens: Tensor) -> Tensor:
        logits = student.float()
        total = logits.logsumexp(-1, keepdim=True)
        found = logits.gather(-1, tokens) - total
        q_found, p = found.exp(), log_probs.exp()
        q_rest = (1 - q_found.sum(-1, keepdim=True)).clamp(min=1e-7)
        size = tokens.shape[-1]
        has_rest = log_probs.shape[-1] > size
        ctx.save_for_backward(
            student, total, q_found - p[:, :size], p[:, size:] / q_rest if has_rest else q_rest, tokens
        )
        terms = torch.cat([found, q_rest.log()], dim=-1) if has_rest else found
        return (p * (log_probs - terms)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        student, total, at_tokens, ratio, tokens = ctx.saved_tensors
        weight = gradients[0][:, None]
        gradient = (student.float() - total).exp_().mul_((1 - ratio) * weight)
        return gradient.scatter_(-1, tokens, at_tokens * weight).to(student.dtype), None, None


def truncated_kl(student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
    """Compute the KL divergence from teacher to student over the teacher's ``top_k`` likeliest tokens.

    All other tokens together are one more outcome. The result is at most the full divergence, and equal to it for
    ``top_k >= V - 1``.

    Args:
        student: logits ``(T, V)``, floating.
        teacher: logits ``(T, V)``, floating; no gradient flows into them.
        top_k: at least 1.

    Returns:
        float32 ``(T,)``, in nats.
    """
    return kl_from(student, likeliest(teacher.detach(), top_k))


def _log_probs(logits: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities ``(T, K + 1)`` of the tokens, whose logits are ``values``, and of all others together."""
    # Computed once, because every use reads rows of a large vocabulary from memory.
    total = logits.logsumexp(-1, keepdim=True)
    if tokens.shape[-1] == logits.shape[-1]:
        return values - total
    rest = logits.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([values, rest], dim=-1) - total
