"""Gist instruction finetuning: stock ``Trainer``, the published hyper-parameters, and our collator. Nothing else is
needed.

Place in the flow: data -> collate -> **train** -> a checkpoint that ``patch`` recognises.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gisting.data.collate import GistCollator
from gisting.data.packing import GistPackingCollator, group_by_instruction
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.models.patch import require_patched
from gisting.models.registry import sliding_windows
from gisting.tokens import GistTokenizer

__all__ = ["PUBLISHED", "finetune", "published_arguments"]

#: Gisting, appendix B: LLaMA-7B and FLAN-T5-XXL.
PUBLISHED: dict[str, dict[str, Any]] = {
    "decoder": {
        "num_train_epochs": 3.0,
        "batch_size": 128,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
    },
    "encoder-decoder": {
        "max_steps": 16_000,
        "batch_size": 16,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
    },
}


def published_arguments(
    output_dir: str | Path,
    *,
    is_encoder_decoder: bool = False,
    batch_size: int | None = None,
    per_device_batch_size: int | None = None,
    **changes: Any,
) -> TrainingArguments:
    """The published hyper-parameters as ``TrainingArguments``; anything may be changed.

    Args:
        output_dir: where checkpoints go.
        is_encoder_decoder: FLAN-T5-XXL's settings rather than LLaMA-7B's.
        batch_size: rows of one optimiser step over all devices, reached by accumulating gradients; the published one
            by default.
        per_device_batch_size: rows of one forward pass; ``batch_size``, at most 16, by default.
        **changes: fields of ``TrainingArguments``.

    Raises:
        GistError: the batch size is no multiple of the rows of a forward pass.
    """
    settings = dict(PUBLISHED["encoder-decoder" if is_encoder_decoder else "decoder"])
    published: int = settings.pop("batch_size")
    rows = published if batch_size is None else batch_size
    devices = max(int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count(), 1)
    per_device = min(max(rows // devices, 1), 16) if per_device_batch_size is None else per_device_batch_size
    if per_device < 1 or rows < 1 or rows % (per_device * devices):
        raise GistError(
            f"batch_size must be a multiple of per_device_batch_size, got {rows} and {per_device}"
            + (f" on {devices} devices" if devices > 1 else "")
        )
    if "num_train_epochs" in changes:
        settings.pop("max_steps", None)
    on_gpu = torch.cuda.is_available()
    defaults = {
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "gradient_accumulation_steps": rows // (per_device * devices),
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        # Records are no dictionaries of model inputs; the collator makes the columns.
        "remove_unused_columns": False,
        "report_to": "none",
        "dataloader_pin_memory": on_gpu,
        "logging_steps": 10,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**settings, **defaults, **changes})


def finetune(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    arguments: TrainingArguments,
    *,
    num_gist_tokens: int | tuple[int, int] = 1,
    conditions: str | Mapping[str, float] = "gist",
    max_length: int = 512,
    max_target_length: int = 256,
    part_separator: str | None = None,
    pack_length: int | None = None,
    max_per_group: int = 8,
    eval_records: Sequence[Record] | None = None,
    resume: bool | str = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train a patched model to gist, and save it with its tokenizer in ``arguments.output_dir``.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        records: the training records.
        arguments: of stock ``Trainer``; :func:`published_arguments` gives the paper's.
        num_gist_tokens: k, or a range from which each row draws.
        conditions: as for :class:`GistCollator`.
        max_length: as for :class:`GistCollator`.
        max_target_length: as for :class:`GistCollator`.
        part_separator: as for :class:`GistCollator`: instructions that hold it are trained as chained gists.
        pack_length: ids of a row in which records are packed (:class:`GistPackingCollator`); None for a row each. A
            batch of ``arguments`` then counts groups of records with one instruction, not records.
        max_per_group: the largest such group.
        eval_records: records for the loss that ``arguments.eval_strategy`` asks for.
        resume: go on from the last checkpoint in the output directory, or from the named one.
        callbacks: for ``Trainer``; with any, its own printing of logs is left out.

    Returns:
        What ``Trainer`` measured: ``train_loss``, ``train_runtime`` in seconds, ...

    Raises:
        GistError: the model is not patched, there are no records, records cannot be packed for this model, or there is
            nothing to resume from.
    """
    require_patched(model, tokenizer)
    if not records:
        raise GistError("records is empty; give at least one")
    items: list[Any] = list(records)
    if pack_length is None:
        collator = GistCollator(
            tokenizer,
            num_gist_tokens,
            conditions=conditions,
            max_length=max_length,
            max_target_length=max_target_length,
            part_separator=part_separator,
        )
    else:
        _check_packing(model, pack_length, part_separator)
        items = group_by_instruction(records, max_per_group)
        collator = GistPackingCollator(
            tokenizer, num_gist_tokens, conditions=conditions, max_length=max_length, pack_length=pack_length
        )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=items,  # pyright: ignore[reportArgumentType]
        eval_dataset=None if eval_records is None else list(eval_records),  # pyright: ignore[reportArgumentType]
        data_collator=collator,
        callbacks=list(callbacks),
    )
    if callbacks:
        trainer.remove_callback(PrinterCallback)  # Whoever brings callbacks shows the progress.
    low, high = collator.num_gist_tokens
    model.config.gist = {**model.config.gist, "num_gist_tokens": [low, high]}
    if resume is True and get_last_checkpoint(str(arguments.output_dir)) is None:
        raise GistError(f"{arguments.output_dir} holds no checkpoint to resume from; start without resume")
    result = trainer.train(resume_from_checkpoint=resume or None)
    if trainer.is_world_process_zero():
        trainer.save_model()
        tokenizer.save_pretrained(str(arguments.output_dir))
    return result.metrics


def _check_packing(model: PreTrainedModel, pack_length: int, part_separator: str | None) -> None:
    if part_separator is not None:
        raise GistError("pack_length and part_separator exclude each other: chained gists are not packed; give one")
    window = sliding_windows(model.config)
    if window is not None and window < pack_length:
        raise GistError(
            f"pack_length must be at most {window}, the sliding window of {model.config.model_type}, got "
            f"{pack_length}: a window counts columns, neighbours in the row among them"
        )
