"""The loss: the language model's loss on the answers, and optionally losses on what the gist should carry.

Place in the flow: stock ``Trainer`` calls ``compute_loss`` for every batch. Knows logits and labels; the teacher's
masks and positions come with the batch, so that this module does not depend on what they hide.

* *Distillation*: at every token of the answer, the distribution given the gist is drawn towards the distribution given
  the prompt. Teacher and student are the same weights in the same batch under two masks (the teacher has that of the
  positive control), so that there is no second model, only one more forward pass without gradients. This is the loss of
  context distillation (Askell et al. 2021, arXiv 2112.00861, section 2.3). The Gisting paper describes its training as
  a form of it (section 3.1), but trains without this loss.
* *Reconstruction*: the prompt is repeated after its gist, in a branch that sees only the gist, and is predicted from it
  (as with the autoencoding loss of ICAE, arXiv 2307.06945, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer

from gisting._compat import cache_argument
from gisting.attention.api import segments_of
from gisting.data.collate import IGNORED
from gisting.errors import GistError
from gisting.eval.kl import truncated_kl
from gisting.models.adapters import adapter_of
from gisting.models.gist_lora import gists_at
from gisting.models.head import logits_at
from gisting.models.mode import evaluating
from gisting.models.prefix import PrefixStates
from gisting.train.batches import Targets, find_targets, is_data_parallel

__all__ = ["Objective", "ObjectiveTrainer", "truncated_kl"]

_TEACHER = {f"teacher_{name}": name for name in ("attention_mask", "position_ids", "attention_mask_segment")}


@dataclass(frozen=True)
class Objective:
    """Weights of the losses whose sum is trained.

    Args:
        language_model: weight of the language model's loss on the answers, in nats per token of the answers. With 0 it
            is only reported: the gist then learns what the model says with the prompt visible, and not what the records
            say.
        distillation: weight of the KL divergence from the model with the prompt visible, in nats per token of the
            answers. Rows of every condition count: rows with the prompt visible have no divergence, and rows of the
            negative control are drawn towards what they cannot know.
        top_k: number of the teacher's likeliest tokens that are compared one by one; all others count as one outcome.
        reconstruction: weight of the prompt's negative log-likelihood after its gist, in nats per token of the prompts.

    Raises:
        GistError: a weight is negative, all weights are 0, or ``top_k`` is less than 1.
    """

    language_model: float = field(default=1.0, kw_only=True)
    distillation: float = 0.0
    top_k: int = 32
    reconstruction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("language_model", "distillation", "reconstruction"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise GistError(f"{name} must be a weight of at least 0, got {getattr(self, name)!r}")
        if not (self.language_model or self.distillation or self.reconstruction):
            raise GistError("language_model, distillation and reconstruction are all 0, so nothing would be learned")
        if self.top_k < 1:
            raise GistError(f"top_k must be at least 1, got {self.top_k}")

    @property
    def is_plain(self) -> bool:
        """Whether there is only the language model's loss."""
        return not (self.distillation or self.reconstruction) and self.language_model == 1


class ObjectiveTrainer(Trainer):
    """Stock ``Trainer`` with an :class:`Objective`; it computes logits only where a token is predicted.

    The loss of an optimiser step is the mean over all its target tokens, however the step is split into forward passes
    and processes. (Stock ``Trainer`` assumes that models like T5, whose ``forward`` takes any keyword, divide their
    loss by the number of tokens of the whole step. They do not: transformers 5.17 to 5.24.)

    Batches come from :class:`gisting.train.batches.StepBatches`, or from any collator, whose labels are then read back
    from the device. If the objective weighs distillation or reconstruction, they must hold the teacher's mask or the
    labels of the reconstruction (``with_teacher`` and ``reconstruct`` of the collators). If the prompts of a batch are
    split off, their keys and values are computed once, without gradients, for student and teacher.

    With an objective that is not plain, the logs hold each loss (``lm_loss``, ``distillation_loss``,
    ``reconstruction_loss``: means over the steps since the last log) in addition to their weighted sum, ``loss``. The
    loss of an evaluation is only the language model's.

    Args:
        *args: as for ``Trainer``.
        objective: the weights of the losses.
        **kwargs: as for ``Trainer``.
    """

    def __init__(self, *args: Any, objective: Objective = Objective(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._sums: dict[str, Tensor] = {}
        self._first_noted = 0
        self._num_prompt_labels = torch.ones(())  # of the current step, over all processes

    def compute_loss(self, model: Any, inputs: Any, return_outputs=False, num_items_in_batch: Any = None) -> Any:
        """As ``Trainer.compute_loss``; the logits in ``outputs`` are those of the targets, ``(T, V)``.

        Raises:
            GistError: the batch lacks what the objective needs, or its prompts are split off although the weights that
                act on them are trained.
        """
        inputs = dict(inputs)
        num_items_in_batch = self._whole_number(num_items_in_batch)
        labels, prompt_labels = inputs.pop("labels", None), inputs.pop("reconstruction_labels", None)
        if labels is None:
            raise GistError("inputs have no labels, which the loss needs; give a collator that makes them")
        targets = _taken(inputs, "target") or self._find(labels)
        reconstructed = _taken(inputs, "reconstruction")
        if reconstructed is None and prompt_labels is not None:
            reconstructed = self._find(prompt_labels)
        if not (model.training and self.objective.reconstruction):
            reconstructed = None
        if self._is_encoder_decoder:
            own: Any = self.model
            inputs["decoder_input_ids"] = own.prepare_decoder_input_ids_from_labels(labels)
        changed = {_TEACHER[name]: inputs.pop(name) for name in _TEACHER if name in inputs}
        if model.training and self.objective.distillation and "attention_mask" not in changed:
            raise GistError(
                "the objective weighs distillation, but the batch has no teacher_attention_mask; make the collator "
                "with with_teacher=True"
            )
        places = targets.places if reconstructed is None else torch.cat([targets.places, reconstructed.places])
        with gists_at(inputs.pop("gist_index", None)):
            prompts = self._prompts(model, inputs)
            teacher = None
            if model.training and self.objective.distillation:
                with torch.no_grad(), evaluating(model):
                    teacher = self._logits(model, {**inputs, **changed}, targets.places, prompts)
            logits = self._logits(model, inputs, places, prompts)
        logits, prompt_logits = logits[: len(targets.ids)], logits[len(targets.ids) :]
        loss = self._mean(self._cross_entropy(logits, targets.ids), len(targets.ids), num_items_in_batch)
        outputs = {"loss": loss, "logits": logits}
        if model.training and not self.objective.is_plain:
            parts = {"lm_loss": loss}
            # With weight 0, no gradient is computed of it.
            loss = self.objective.language_model * loss if self.objective.language_model else torch.zeros_like(loss)
            if teacher is not None:
                divergence = truncated_kl(logits, teacher, self.objective.top_k).sum()
                parts["distillation_loss"] = self._mean(divergence, len(targets.ids), num_items_in_batch)
                loss = loss + self.objective.distillation * parts["distillation_loss"]
            if reconstructed is not None:
                total = self._cross_entropy(prompt_logits, reconstructed.ids)
                number = None if num_items_in_batch is None else self._num_prompt_labels.clamp(min=1)
                parts["reconstruction_loss"] = self._mean(total, len(reconstructed.ids), number)
                loss = loss + self.objective.reconstruction * parts["reconstruction_loss"]
            self._note(parts, is_share=num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.get_batch_samples``; also counts the prompt tokens to reconstruct in the step."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self.objective.reconstruction:
            number = sum(self._num_reconstructed(batch) for batch in batches)
            number = torch.as_tensor(number, dtype=torch.long).to(self.args.device, non_blocking=True)
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

    @property
    def _num_averaged(self) -> int:
        """The factor that undoes averaging gradients over processes, where labels are counted over all of them."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    @property
    def _is_encoder_decoder(self) -> bool:
        model: Any = self.model
        return model.config.is_encoder_decoder

    def _find(self, labels: Tensor) -> Targets:
        return find_targets(labels, is_shifted=not self._is_encoder_decoder)

    def _num_reconstructed(self, batch: dict[str, Tensor]) -> int | Tensor:
        if "reconstruction_ids" in batch:
            return len(batch["reconstruction_ids"])
        if "reconstruction_labels" not in batch:
            raise GistError(
                "the objective weighs reconstruction, but the batch has no reconstruction_labels; use a "
                "GistPackingCollator with reconstruct=True"
            )
        return (batch["reconstruction_labels"] != IGNORED).sum()

    def _prompts(self, model: Any, inputs: dict[str, Any]) -> PrefixStates | None:
        """Take split-off prompts out of the inputs, and return their keys and values; None if there are none."""
        names = [name for name in inputs if name.startswith("prompt_")]
        if not names:
            return None
        adapter = adapter_of(self.model)
        if adapter is None or not adapter.is_gist_only:
            raise GistError(
                "the prompts of the batch are split off, so that their states get no gradient, but the weights of the "
                "model are trained; make StepBatches without has_frozen_base"
            )
        own = {name.removeprefix("prompt_"): inputs.pop(name) for name in names}
        if not own["input_ids"].shape[1]:
            return None
        states = PrefixStates()
        nowhere = own["input_ids"].new_empty(0)
        with torch.no_grad(), gists_at(nowhere):
            self._logits(model, own, nowhere, states)
        return states

    def _logits(self, model: Any, inputs: dict[str, Any], places: Tensor, prompts: PrefixStates | None) -> Tensor:
        if prompts is not None:
            inputs = {**inputs, cache_argument(): prompts}
        if is_data_parallel(self.args):  # whose threads would share one hook
            return model(**inputs).logits.flatten(0, 1)[places]
        length = inputs.get("attention_mask_segment")
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask_segment"}
        with logits_at(self.model, places), segments_of(length):
            return model(**inputs, use_cache=cache_argument() in inputs).logits[0]

    def _cross_entropy(self, logits: Tensor, ids: Tensor) -> Tensor:
        return cross_entropy(
            logits.float(), ids, reduction="sum", label_smoothing=float(self.args.label_smoothing_factor)
        )

    def _mean(self, total: Tensor, number: int, num_items_in_batch: Any) -> Tensor:
        """Return what a batch adds to the loss of its optimiser step.

        That is its ``total`` divided by the number of targets of the whole step. Where Trainer does not count these, it
        is the batch's own mean, which Trainer divides by the number of the step's batches.
        """
        if num_items_in_batch is None:
            return total / max(number, 1)
        return total / num_items_in_batch * self._num_averaged

    def _whole_number(self, num_items_in_batch: Any) -> Any:
        """Return the number of targets of a step.

        With torch's DataParallel, Trainer passes it once per replica, and as a share if tokens are not averaged over
        devices, but the loss here is over the whole batch.
        """
        if num_items_in_batch is None or not is_data_parallel(self.args):
            return num_items_in_batch
        shares = 1 if self.args.average_tokens_across_devices else self.args.n_gpu
        return torch.as_tensor(num_items_in_batch).flatten()[0] * shares

    def _note(self, parts: dict[str, Tensor], *, is_share: bool) -> None:
        """Add the losses of a batch to the sums: shares of the step's, or means that Trainer divides by the batches."""
        if not self._sums:
            self._first_noted = self.state.global_step
        batches = 1 if is_share else self.args.gradient_accumulation_steps
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float() / batches


def _taken(inputs: dict[str, Any], name: str) -> Targets | None:
    """Take the targets with this name out of the inputs; None if there are none."""
    if f"{name}_places" not in inputs:
        return None
    return Targets(inputs.pop(f"{name}_places"), inputs.pop(f"{name}_ids"))
