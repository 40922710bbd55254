"""What is minimised: the language model's loss on the answers, and beside it what the gist should carry.

Place in the flow: stock ``Trainer`` asks ``compute_loss`` for a batch's loss; here it is answered. Knows logits and
labels; masks and positions of the teacher come with the batch, so nothing here knows what they hide.

* *Distillation*: at every token of the answer, the distribution behind the gist is drawn to the one with the prompt in
  view. Teacher and student are the same weights in the same batch under two masks (the positive control is the
  teacher), so there is no second model, and one more forward pass without gradients. This is the loss of context
  distillation (Askell et al. 2021, arXiv 2112.00861, section 2.3); the Gisting paper names it as what its training
  amounts to (section 3.1) and trains without it.
* *Reconstruction*: behind the gist stands the prompt once more, in a branch that sees the gist alone, and is predicted
  from it (as the autoencoding loss of ICAE, arXiv 2307.06945, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer

from gisting.data.collate import IGNORED
from gisting.errors import GistError
from gisting.models.mode import evaluating

__all__ = ["Objective", "ObjectiveTrainer", "TokenMeanTrainer", "truncated_kl"]

_TEACHER = {"teacher_attention_mask": "attention_mask", "teacher_position_ids": "position_ids"}


@dataclass(frozen=True)
class Objective:
    """Weights of the losses beside the language model's, which has weight 1.

    Args:
        distillation: of the KL divergence from the model with the prompt in view, in nats a token of the answers. Rows
            of every condition count: those with the prompt in view diverge by nothing, and those of the negative
            control are drawn to what they cannot know.
        top_k: how many of the teacher's likeliest tokens are compared one by one; all others count as one.
        reconstruction: of the prompt's negative log-likelihood behind its gist, in nats a token of the prompts.

    Raises:
        GistError: a weight is negative, or ``top_k`` less than 1.
    """

    distillation: float = 0.0
    top_k: int = 32
    reconstruction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("distillation", "reconstruction"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise GistError(f"{name} must be a weight of at least 0, got {getattr(self, name)!r}")
        if self.top_k < 1:
            raise GistError(f"top_k must be at least 1, got {self.top_k}")

    @property
    def is_plain(self) -> bool:
        """Whether the language model's loss is all there is."""
        return not (self.distillation or self.reconstruction)


def truncated_kl(student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
    """KL divergence from teacher to student over the teacher's ``top_k`` likeliest tokens and one outcome more, any
    other token: at most the whole divergence (both lose the same detail), and all of it where ``top_k >= V - 1``.

    Args:
        student: logits ``(T, V)``, floating.
        teacher: logits ``(T, V)``, floating; no gradient goes there.
        top_k: of at least 1.

    Returns:
        float32 ``(T,)``, in nats.
    """
    # A forbidden token's -inf would make its gradient NaN; so low a logit is no probability either.
    student, teacher = student.float().clamp(min=-1e4), teacher.detach().float().clamp(min=-1e4)
    size = min(top_k, teacher.shape[-1])
    values, places = teacher.topk(size, dim=-1)
    target = values - teacher.logsumexp(-1, keepdim=True)
    found = student.gather(-1, places) - student.logsumexp(-1, keepdim=True)
    if size < teacher.shape[-1]:
        target = torch.cat([target, _log_rest(teacher, places)], dim=-1)
        found = torch.cat([found, _log_rest(student, places)], dim=-1)
    return (target.exp() * (target - found)).sum(-1)


def _log_rest(logits: Tensor, places: Tensor) -> Tensor:
    """Log-probability ``(T, 1)`` of all tokens but those at ``places``."""
    rest = logits.scatter(-1, places, float("-inf")).logsumexp(-1, keepdim=True)
    return rest - logits.logsumexp(-1, keepdim=True)


class TokenMeanTrainer(Trainer):
    """The mean over all target tokens of an optimiser step, however it is split into forward passes and processes.

    T5's kind counts as dividing its loss by the tokens of the whole step, for its ``forward`` takes any keyword, and
    does not (transformers 5.17 to 5.23): gradients would be so many times too large as there are forward passes in a
    step, and processes. Goes when its loss is that of ``loss_function``, as for decoders.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        """As ``Trainer.compute_loss``."""
        if not self._is_encoder_decoder or num_items_in_batch is None or self.args.n_gpu > 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs, labels = model(**inputs), inputs["labels"]
        total = cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")  # skips IGNORED
        loss = total / num_items_in_batch * self._num_averaged
        return (loss, outputs) if return_outputs else loss

    @property
    def _num_averaged(self) -> int:
        """Processes average their gradients; where labels are counted over all of them, this takes that back."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    @property
    def _is_encoder_decoder(self) -> bool:
        model: Any = self.model
        return model.config.is_encoder_decoder


class ObjectiveTrainer(TokenMeanTrainer):
    """Stock ``Trainer`` with an :class:`Objective`.

    Batches hold the teacher's mask and positions, and the labels of the reconstruction, where the objective weighs
    them (``with_teacher`` and ``reconstruct`` of the collators). The logs have the losses one by one (``lm_loss``,
    ``distillation_loss``, ``reconstruction_loss``: means over the steps since the last log) beside their weighted sum,
    ``loss``. The loss of an evaluation is the language model's alone.
    """

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._sums: dict[str, Tensor] = {}
        self._first_noted = 0
        self._num_prompt_labels = torch.ones(())  # of the step at hand, over all processes

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        """As ``Trainer.compute_loss``."""
        inputs = dict(inputs)
        changed = {_TEACHER[name]: inputs.pop(name) for name in _TEACHER if name in inputs}
        prompt_labels = inputs.pop("reconstruction_labels", None)
        labels = inputs["labels"]
        teacher = None
        if model.training and self.objective.distillation:
            unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
            if self._is_encoder_decoder:
                own: Any = self.model
                unlabelled["decoder_input_ids"] = own.prepare_decoder_input_ids_from_labels(labels)
            with torch.no_grad(), evaluating(model):
                teacher = self._labelled(model(**{**unlabelled, **changed}).logits, labels)[0]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            num_labels = (labels != IGNORED).sum()
            parts = {"lm_loss": loss}
            if teacher is not None:
                student = self._labelled(outputs.logits, labels)[0]
                divergence = truncated_kl(student, teacher, self.objective.top_k).sum() / num_labels.clamp(min=1)
                parts["distillation_loss"] = self._share(divergence, num_labels, num_items_in_batch)
                loss = loss + self.objective.distillation * parts["distillation_loss"]
            if self.objective.reconstruction:
                found, wanted = self._labelled(outputs.logits, prompt_labels)
                total = cross_entropy(found.float(), wanted, reduction="sum")
                parts["reconstruction_loss"] = (
                    total / max(len(wanted), 1)
                    if num_items_in_batch is None
                    else total / self._num_prompt_labels.clamp(min=1) * self._num_averaged
                )
                loss = loss + self.objective.reconstruction * parts["reconstruction_loss"]
            self._note(parts, is_share=num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.get_batch_samples``; counts the step's tokens of prompts as Trainer does those of answers."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self.objective.reconstruction:
            number = torch.zeros((), dtype=torch.long, device=self.args.device)
            for batch in batches:
                number += (batch["reconstruction_labels"] != IGNORED).sum().to(number.device)
            if self._num_averaged > 1:
                number = self.accelerator.gather(number).sum()  # pyright: ignore[reportAttributeAccessIssue]
            self._num_prompt_labels = number
        return batches, num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer.log``."""
        steps = self.state.global_step - self._first_noted
        if "loss" in logs and self._sums and steps:
            means: Any = self.accelerator.reduce(torch.stack([*self._sums.values()]) / steps, "mean")
            logs = {**logs, **dict(zip(self._sums, means.tolist(), strict=True))}
            self._sums = {}
        super().log(logs, start_time)

    def _labelled(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(T, V)`` at the T tokens before those that are labelled (in a decoder), and the labels ``(T,)``."""
        if not self._is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        is_labelled = labels != IGNORED
        return logits[is_labelled], labels[is_labelled]

    def _share(self, mean: Tensor, num_labels: Tensor, num_items_in_batch: Any) -> Tensor:
        """What a batch's mean adds to the loss of its optimiser step: batches weigh as they do in the language model's
        loss, by their labels. Where Trainer does not count those, it divides by the batches itself.
        """
        if num_items_in_batch is None:
            return mean
        return mean * num_labels / num_items_in_batch * self._num_averaged

    def _note(self, parts: dict[str, Tensor], *, is_share: bool) -> None:
        """Add what a batch gives its step: a share of it, or a mean that Trainer divides by the step's batches."""
        if not self._sums:
            self._first_noted = self.state.global_step
        batches = 1 if is_share else self.args.gradient_accumulation_steps
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float() / batches
