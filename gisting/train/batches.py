"""What a training step needs to know about its batch, calculated on the host.

Place in the flow: data -> collate -> **batches** -> ``objective``. To index with a boolean mask, or to know the length
of a row, the host would have to read from the accelerator and wait for it in every step. Here, both become tensors of
indices whose sizes are known. Runs in the workers of the data loader. Depends on columns and labels, not on models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import TrainingArguments

from gisting.attention.api import mean_segment_length
from gisting.data.collate import IGNORED
from gisting.data.split import split_prompts
from gisting.errors import GistError
from gisting.tokens import GistTokenizer
from gisting.visibility import Visibility, is_interval_mask

__all__ = ["StepBatches", "Targets", "find_targets", "is_data_parallel", "step_batches"]


class Targets(NamedTuple):
    """The tokens to predict in a batch.

    Args:
        places: int64 ``(T,)``: indices of the hidden states that predict them, in the flattened batch.
        ids: int64 ``(T,)``: the ids that they should predict.
    """

    places: Tensor
    ids: Tensor


def find_targets(labels: Tensor, *, is_shifted: bool) -> Targets:
    """Find where ``labels`` are predicted.

    Args:
        labels: int64 ``(B, N)``, -100 where there is nothing to predict.
        is_shifted: whether a token is predicted one column before its own, as in a decoder. The first column of a row
            is then not predicted.
    """
    width = labels.shape[1]
    if is_shifted:
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        return Targets(rows * width + columns, labels[rows, columns + 1])
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    return Targets(rows * width + columns, labels[rows, columns])


class StepBatches:
    """A collator whose batches :class:`gisting.train.objective.ObjectiveTrainer` runs without waiting for the device.

    Args:
        collator: makes a batch of records: ``input_ids``, ``labels``, masks.
        tokenizer: the model's tokenizer.
        has_frozen_base: whether no parameter that acts on prompts is trained, so that prompts can be computed once
            (:mod:`gisting.data.split`). The ``collator`` must then mark them (``with_prompt_columns``).

    Raises:
        GistError: ``has_frozen_base`` is True, and the tokenizer is for an encoder-decoder.
    """

    def __init__(
        self,
        collator: Callable[[Sequence[Any]], dict[str, Tensor]],
        tokenizer: GistTokenizer,
        *,
        has_frozen_base: bool = False,
    ) -> None:
        if has_frozen_base and tokenizer.is_encoder_decoder:
            raise GistError(
                "has_frozen_base is for decoders: in an encoder, a prompt sees its gist, so its states change with "
                "training; leave it out"
            )
        self.collator = collator
        self.has_frozen_base = has_frozen_base
        self._gist_token_id = tokenizer.gist_token_id
        self._pad_token_id = tokenizer.pad_token_id
        self._is_shifted = not tokenizer.is_encoder_decoder

    def __call__(self, records: Sequence[Any]) -> dict[str, Any]:
        """Make a batch with ``collator``, split it if the base is frozen, and add int64 indices.

        Returns:
            As ``collator``, or as :func:`gisting.data.split.split_prompts`. In addition: ``target_places`` and
            ``target_ids`` ``(T,)`` for ``labels``; ``reconstruction_places`` and ``reconstruction_ids`` ``(S,)``, which
            replace ``reconstruction_labels``; ``gist_index`` ``(G,)``, the indices of gist tokens in the flattened
            ``input_ids``; and for every interval mask, such as ``attention_mask``, the float
            ``attention_mask_segment``: the mean number of rows that see a key, by which attention kernels choose tiles.

        Raises:
            GistError: the collator's batch has no labels.
        """
        batch: dict[str, Any] = self.collator(records)
        if "labels" not in batch:
            raise GistError("the collator's batch has no labels, which the loss needs; give a collator that makes them")
        if self.has_frozen_base:
            batch = split_prompts(batch, self._pad_token_id)
        batch["target_places"], batch["target_ids"] = find_targets(batch["labels"], is_shifted=self._is_shifted)
        if "reconstruction_labels" in batch:
            found = find_targets(batch.pop("reconstruction_labels"), is_shifted=self._is_shifted)
            batch["reconstruction_places"], batch["reconstruction_ids"] = found
        batch["gist_index"] = (batch["input_ids"].flatten() == self._gist_token_id).nonzero()[:, 0]
        masks = {name: Visibility.from_attention_mask(mask) for name, mask in batch.items() if is_interval_mask(mask)}
        return batch | {f"{name}_segment": mean_segment_length(mask) for name, mask in masks.items()}


def step_batches(
    collator: Callable[[Sequence[Any]], dict[str, Tensor]],
    tokenizer: GistTokenizer,
    arguments: TrainingArguments,
    *,
    has_frozen_base: bool = False,
) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Return :class:`StepBatches`, or ``collator`` unchanged with torch's DataParallel.

    DataParallel would cut the indices that :class:`StepBatches` adds into shares.

    Args:
        collator: as for :class:`StepBatches`.
        tokenizer: as for :class:`StepBatches`.
        arguments: of the trainer.
        has_frozen_base: as for :class:`StepBatches`.
    """
    if is_data_parallel(arguments):
        return collator
    return StepBatches(collator, tokenizer, has_frozen_base=has_frozen_base)


def is_data_parallel(arguments: TrainingArguments) -> bool:
    """Return whether ``Trainer`` spreads each batch over several devices of this process, with torch's DataParallel.

    Args:
        arguments: of the trainer.
    """
    return arguments.n_gpu > 1
