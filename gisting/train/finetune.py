"""Gist instruction finetuning: stock ``Trainer``, the published hyper-parameters, and our collator. Nothing else is
needed.

Place in the flow: data -> collate -> **train** -> a checkpoint that ``patch`` recognises.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from gisting.data.collate import GistCollator
from gisting.data.packing import GistPackingCollator, group_by_instruction
from gisting.data.records import Record, to_record
from gisting.errors import GistError
from gisting.models.adapters import adapter_of, check_directory
from gisting.models.hub import save_pretrained
from gisting.models.patch import require_patched
from gisting.models.registry import is_length_dependent, sliding_windows
from gisting.settings import keywords_for, takes_keywords_of
from gisting.tokens import GistTokenizer
from gisting.train.arguments import PUBLISHED, default_num_workers, published_arguments
from gisting.train.batches import is_data_parallel, step_batches
from gisting.train.methods import Method, checkpointing_what_learns, prepare
from gisting.train.objective import Objective, ObjectiveTrainer
from gisting.train.repeat import (
    CountEpochs,
    RepeatableDraws,
    checkpoint_to_resume,
    num_steps_in,
    without_parallel_tokenizers,
)
from gisting.train.settings import BatchSettings

__all__ = ["PUBLISHED", "finetune", "published_arguments"]

_log = logging.getLogger(__name__)
_BY_LENGTH = ("group_by_length", "batch_rebalance")


@takes_keywords_of(BatchSettings)
def finetune(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record] | IterableDataset[Any],
    arguments: TrainingArguments,
    *,
    method: str | Method = "full",
    objective: Objective = Objective(),  # noqa: B008
    eval_records: Sequence[Record] | None = None,
    resume: bool | str = False,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> dict[str, float]:
    """Train a patched model to gist, and save it with its tokenizer in ``arguments.output_dir``.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        records: the training records, or mappings like them; also a stream of such (``datasets.IterableDataset``),
            which is read in its own order, in this process, and needs ``max_steps``. The texts of records are encoded
            once, before the first step; those of a stream as they come.
        arguments: of stock ``Trainer``; :func:`published_arguments` gives the paper's. ``train_sampling_strategy=
            "group_by_length"`` groups by the ids of a record, and needs ``datasets``.
        method: what learns: ``"full"``, ``"lora"``, ``"gist-lora"`` or ``"embeddings"`` (:mod:`gisting.train.methods`).
            With an adapter, the adapter alone is saved, for ``gisting.load`` and for peft.
        objective: losses beside the language model's: distillation from the prompt in view, reconstruction of the
            prompt, which needs ``pack_length``.
        eval_records: records for the loss that ``arguments.eval_strategy`` asks for.
        resume: go on from the last whole checkpoint in the output directory, or from the named one. What a killed
            process left of a checkpoint is passed over, and the run ends with the weights of an uninterrupted one.
        callbacks: for ``Trainer``; with any, its own printing of logs is left out.
        **settings: how records become batches (:class:`gisting.train.settings.BatchSettings`): ``num_gist_tokens``,
            ``conditions``, ``max_length`` and others. With ``pack_length``, a batch of ``arguments`` counts groups of
            records with one instruction, not records. A stream is not grouped; records of a batch that have the same
            instruction share a copy.

    Returns:
        What ``Trainer`` measured: ``train_loss`` (NaN where a resumed run had no step left), ``train_runtime`` in
        seconds, ..., and how much of the model learned:
        ``num_trainable_parameters`` of ``num_parameters``.

    Raises:
        GistError: the model is not patched, there are no records, a stream has no end (``max_steps``) or cannot be
            sorted, rows are longer than a sliding window of the model where that counts, the prompt is to be
            reconstructed without ``pack_length``, there is nothing to resume from, or weights would not be sharded
            although ``fsdp`` asks for it; or an adapter is to be trained on shards, or to be saved beside a whole
            checkpoint.
    """
    require_patched(model, tokenizer)
    checkpoint = checkpoint_to_resume(str(arguments.output_dir), resume)
    items: Any = records if isinstance(records, IterableDataset) else list(records)
    chosen = BatchSettings(**settings)
    _check_records(items, arguments, chosen.pack_length)
    collator = _collator(tokenizer, chosen, objective)
    _check_window(
        model,
        pack_length=chosen.pack_length,
        max_length=None if chosen.chunk_length is None else collator.max_length,
    )
    if isinstance(collator, GistPackingCollator) and isinstance(items, list):
        items = group_by_instruction([to_record(item) for item in items], chosen.max_per_group)
    if isinstance(items, list):
        collator.encode_ahead(items)
    elif arguments.dataloader_num_workers:
        if arguments.dataloader_num_workers != default_num_workers(on_gpu=arguments.device.type == "cuda"):
            _log.warning(
                "a stream is read in this process, not by the %d workers of dataloader_num_workers: they would read it "
                "in another order, or several times",
                arguments.dataloader_num_workers,
            )
        arguments = copy.copy(arguments)
        arguments.dataloader_num_workers, arguments.dataloader_prefetch_factor = 0, None
    collator.encode_ahead(eval_records or ())
    if arguments.train_sampling_strategy in _BY_LENGTH:
        items = _with_lengths(items, tokenizer, arguments.length_column_name)
    set_seed(arguments.seed)  # as Trainer does: a fresh adapter is drawn, and Trainer is not made yet
    count = prepare(model, method, collator.num_gist_tokens[1])
    has_adapter = adapter_of(model) is not None
    if has_adapter:
        check_directory(str(arguments.output_dir))
        if _is_to_be_sharded(arguments):
            raise GistError(
                "an adapter cannot be trained with fsdp, which shards it; leave fsdp out: a frozen model has no "
                "gradients and no optimiser state to shard"
            )
    collator.with_prompt_columns = _has_frozen_prompts(model, collator, arguments)
    batches = step_batches(collator, tokenizer, arguments, has_frozen_base=collator.with_prompt_columns)
    draws = RepeatableDraws(batches, arguments.seed)
    trainer: Any = ObjectiveTrainer(
        model=model,
        args=arguments,
        objective=objective,
        train_dataset=items,
        eval_dataset=None if eval_records is None else list(eval_records),
        data_collator=draws,
        callbacks=[CountEpochs(draws), *callbacks],
    )
    if callbacks:
        trainer.remove_callback(PrinterCallback)  # With callbacks of the caller's own, they report progress.
    if _is_to_be_sharded(arguments) and not trainer.is_fsdp_enabled:  # left out without a word
        raise GistError("fsdp is asked for, but accelerate shards on accelerators alone; leave it out on a CPU")
    about = {"num_gist_tokens": list(collator.num_gist_tokens), "chunk_length": collator.chunk_length}
    model.config.gist = {**model.config.gist, **{name: value for name, value in about.items() if value is not None}}
    with checkpointing_what_learns(model), without_parallel_tokenizers(arguments.dataloader_num_workers > 0):
        if checkpoint is not None and 0 < arguments.max_steps <= num_steps_in(checkpoint):
            # Trainer, asked to go on from a last step in the middle of an epoch, would take one step more.
            trainer._load_from_checkpoint(checkpoint)
            measured = {"train_runtime": 0.0, "train_loss": float("nan")}
        else:
            measured = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if not has_adapter:
        trainer.save_model()  # by every process, for sharded weights are gathered; the first one writes
    if trainer.is_world_process_zero():
        if has_adapter:
            save_pretrained(model, tokenizer, str(arguments.output_dir))
        else:
            tokenizer.save_pretrained(str(arguments.output_dir))
    return {**measured, "num_trainable_parameters": count.trainable, "num_parameters": count.total}


def _collator(tokenizer: GistTokenizer, settings: BatchSettings, objective: Objective) -> GistCollator:
    with_teacher = objective.distillation > 0
    if settings.pack_length is None:
        if objective.reconstruction:
            raise GistError(
                "the objective weighs the reconstruction of the prompt, which needs packed rows; give pack_length, at "
                "least max_length"
            )
        return GistCollator(tokenizer, with_teacher=with_teacher, **keywords_for(GistCollator, settings))
    if settings.part_separator is not None:
        raise GistError("pack_length and part_separator exclude each other: chained gists are not packed; give one")
    return GistPackingCollator(
        tokenizer,
        with_teacher=with_teacher,
        reconstruct=objective.reconstruction > 0,
        **keywords_for(GistPackingCollator, settings),
    )


def _has_frozen_prompts(model: Any, collator: GistCollator, arguments: TrainingArguments) -> bool:
    """Whether the states of prompts are the same for every layout of what follows them and nothing that is trained
    changes them, so that a step may compute them once and apart (:mod:`gisting.data.split`).

    That takes an adapter that acts at gist tokens alone, one gist a prompt, positions that count tokens and not columns
    (no sliding window, no rotary type that depends on the length), no noise in the base model (dropout, NEFTune, a
    router's jitter), and no activation checkpointing, which takes no cache.
    """
    adapter, config = adapter_of(model), model.config
    return (
        adapter is not None
        and adapter.is_gist_only
        and not config.is_encoder_decoder
        and collator.chunk_length is None
        and collator.part_separator is None
        and sliding_windows(config) is None
        and not is_length_dependent(config)
        and not any(getattr(arguments, f"{name}_checkpointing", False) for name in ("activation", "gradient"))
        and not is_data_parallel(arguments)
        and not arguments.neftune_noise_alpha
        and not getattr(config, "attention_dropout", 0)
        and not getattr(config, "router_jitter_noise", 0)
        and not any(
            getattr(module, "gradient_checkpointing", False)
            or (isinstance(module, torch.nn.Dropout) and module.p > 0 and "lora_dropout" not in name)
            for name, module in model.named_modules()
        )
    )


def _is_to_be_sharded(arguments: TrainingArguments) -> bool:
    """Whether the arguments ask for FSDP, or ``accelerate launch`` does, which speaks through the environment."""
    return bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _check_records(items: Any, arguments: TrainingArguments, pack_length: int | None) -> None:
    if isinstance(items, list):
        if not items:
            raise GistError("records is empty; give at least one")
    elif arguments.max_steps < 1:
        raise GistError("records is a stream, whose length is not known; set max_steps of the arguments")
    if arguments.train_sampling_strategy in _BY_LENGTH and (pack_length is not None or not isinstance(items, list)):
        kind = "a stream cannot be sorted" if pack_length is None else "packed rows are equally long"
        raise GistError(
            f"train_sampling_strategy is {arguments.train_sampling_strategy!r}, but {kind}; leave it at 'random'"
        )


def _with_lengths(items: list[Any], tokenizer: GistTokenizer, name: str) -> Any:
    """A data set with a column of lengths in ids, which is where ``Trainer`` looks for them."""
    from datasets import Dataset

    rows = [to_record(item) for item in items]
    columns = ([getattr(row, part) for row in rows] for part in ("instruction", "input", "output"))
    encodings = tokenizer.encode_batch(*columns)
    return Dataset.from_list(
        [{**asdict(row), name: len(encoding.input_ids)} for row, encoding in zip(rows, encodings, strict=True)]
    )


def _check_window(model: PreTrainedModel, **lengths: int | None) -> None:
    """Raise where a row would be longer than a sliding window, which counts columns: those of neighbours and of chunks
    that are hidden among them.
    """
    window = sliding_windows(model.config)
    for name, length in lengths.items():
        if window is not None and length is not None and window < length:
            raise GistError(
                f"{name} must be at most {window}, the sliding window of {model.config.model_type}, got {length}: a "
                "window counts columns, those of neighbours in the row and of hidden chunks among them"
            )
