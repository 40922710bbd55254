"""Gist instruction finetuning: stock ``Trainer``, the published hyper-parameters and our collator.

Place in the flow: data -> collate -> **train** -> a checkpoint that ``patch`` recognises.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from gisting.data.collate import GistCollator
from gisting.data.packing import GistPackingCollator, group_by_instruction
from gisting.data.records import Record, rows_of, say_shared
from gisting.errors import GistError
from gisting.models.adapters import adapter_of, check_directory
from gisting.models.hub import check_complete, save_pretrained
from gisting.models.registry import is_length_dependent, sliding_windows
from gisting.models.state import require_patched
from gisting.models.weights import to_dtype
from gisting.settings import keywords_for, takes_keywords_of
from gisting.tokens import GistTokenizer
from gisting.train.arguments import BY_LENGTH, PUBLISHED, default_num_workers, published_arguments
from gisting.train.batches import is_data_parallel, step_batches
from gisting.train.methods import Method, checkpointing_what_learns, prepare
from gisting.train.objective import Objective, ObjectiveTrainer
from gisting.train.output import check_same_run
from gisting.train.repeat import (
    CountEpochs,
    RepeatableDraws,
    check_workers,
    checkpoint_to_resume,
    num_steps_in,
    without_parallel_tokenizers,
)
from gisting.train.settings import BatchSettings

__all__ = ["PUBLISHED", "finetune", "published_arguments"]

_log = logging.getLogger(__name__)


@takes_keywords_of(BatchSettings)
def finetune(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Iterable[Record | Mapping[str, Any]],
    arguments: TrainingArguments,
    *,
    method: str | Method = "full",
    objective: Objective = Objective(),  # noqa: B008
    eval_records: Iterable[Record | Mapping[str, Any]] | None = None,
    resume: bool | str = False,
    save_dtype: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> dict[str, float]:
    """Train a patched model to gist, and save it with its tokenizer in ``arguments.output_dir``.

    Args:
        model: a patched model.
        tokenizer: the tokenizer that it was patched for.
        records: training records, or mappings with the same keys, or conversations (``messages``), as a list or
            ``datasets.Dataset``; or a stream of them (``datasets.IterableDataset``), which is read in its own order, in
            this process, and needs ``max_steps``. Texts of records are encoded once, before the first step; texts of a
            stream are encoded as they are read. Records that do not fit ``max_length`` are left out.
        arguments: arguments of stock ``Trainer``; :func:`published_arguments` returns the paper's.
            ``train_sampling_strategy="group_by_length"`` groups records by their number of tokens, and needs
            ``datasets``.
        method: what is trained: ``"full"``, ``"lora"``, ``"gist-lora"`` or ``"embeddings"``
            (:mod:`gisting.train.methods`). With an adapter, only the adapter is saved, for ``gisting.load``, and
            except gist-lora for peft.
        objective: weights of additional losses: distillation from the same model with the prompt visible, and
            reconstruction of the prompt, which needs ``pack_length``.
        eval_records: records for the evaluation loss, if ``arguments.eval_strategy`` asks for one. The log says how
            many of them are also trained on.
        resume: continue from the last whole checkpoint in the output directory, or from the checkpoint at this path.
            Incomplete checkpoints of a killed process are skipped, and the run ends with the same weights as an
            uninterrupted one.
        save_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: the dtype in which a whole model is written, and
            which its parameters have afterwards; None for the dtype that was trained. DeepSpeed writes what its
            configuration says.
        callbacks: for ``Trainer``; if there are any, ``Trainer`` does not print its logs.
        **settings: how records become batches (:class:`gisting.train.settings.BatchSettings`): ``num_gist_tokens``,
            ``conditions``, ``max_length`` and others. With ``pack_length``, a batch of ``arguments`` counts groups of
            records with one instruction, not records. A stream is not grouped; records of a batch that have the same
            instruction share a copy.

    Returns:
        What ``Trainer`` measured: ``train_loss`` (NaN if a resumed run had no step left), ``train_runtime`` in seconds
        and others; and the number of trained parameters, ``num_trainable_parameters`` of ``num_parameters``.

    Raises:
        GistError: the model is not patched; there are no records; a stream is given without ``max_steps`` or would have
            to be sorted; packed rows or chunked prompts are longer than a sliding window of the model; reconstruction
            is requested without ``pack_length``; there is nothing to resume from, or the run to resume has another
            method, template or k; ``fsdp`` is requested, but weights would not be sharded; an adapter would be
            sharded, saved in ``save_dtype``, or saved into the directory of a whole checkpoint; or the model has
            adapters of peft, which could not be read back.
    """
    require_patched(model, tokenizer)
    check_workers(arguments)
    checkpoint = checkpoint_to_resume(str(arguments.output_dir), resume)
    items: Any = records if isinstance(records, IterableDataset) else list(rows_of(records))
    chosen = BatchSettings(**settings)
    _check_records(items, arguments, chosen.pack_length)
    collator = _collator(tokenizer, chosen, objective)
    _check_window(
        model,
        pack_length=chosen.pack_length,
        max_length=None if chosen.chunk_length is None else collator.max_length,
    )
    items = collator.encode_ahead(items) if isinstance(items, list) else _FittingStream(items, collator)
    held_out = None if eval_records is None else collator.encode_ahead(rows_of(eval_records))
    if isinstance(items, list):
        say_shared(items, held_out or (), "eval_records")
        if isinstance(collator, GistPackingCollator):
            items = group_by_instruction(items, chosen.max_per_group)
    elif arguments.dataloader_num_workers:
        if arguments.dataloader_num_workers != default_num_workers(on_gpu=arguments.device.type == "cuda"):
            _log.warning(
                "a stream is read in this process, not by the %d workers of dataloader_num_workers, which would read "
                "it in another order, or several times",
                arguments.dataloader_num_workers,
            )
        arguments = copy.copy(arguments)
        arguments.dataloader_num_workers, arguments.dataloader_prefetch_factor = 0, None
    if arguments.train_sampling_strategy in BY_LENGTH:
        items = _with_lengths(items, collator, arguments.length_column_name)
    set_seed(arguments.seed)  # as Trainer does, which is made after a new adapter is initialised
    count = prepare(model, method, collator.num_gist_tokens[1])
    about = {"num_gist_tokens": list(collator.num_gist_tokens), "chunk_length": collator.chunk_length}
    gist = {**model.config.gist, **{name: value for name, value in about.items() if value is not None}}
    if checkpoint is not None:
        check_same_run(gist, checkpoint)
    has_adapter = adapter_of(model) is not None
    if has_adapter:
        check_directory(str(arguments.output_dir))
        if save_dtype is not None:
            raise GistError(f"save_dtype must be None for an adapter, which is float32 on disk, got {save_dtype!r}")
        if _is_to_be_sharded(arguments):
            raise GistError(
                "an adapter cannot be trained with fsdp, which would shard it; leave fsdp out: a frozen model has no "
                "gradients and no optimiser state to shard"
            )
    else:
        check_complete(model)
    # Where only gist tokens learn, the teacher is the model as it is, which reads the prompt as ordinary text.
    adapter = adapter_of(model)
    collator.teacher_sees_gist = adapter is None or not adapter.is_gist_only
    collator.with_prompt_columns = _has_frozen_prompts(model, collator, arguments)
    batches = step_batches(collator, tokenizer, arguments, has_frozen_base=collator.with_prompt_columns)
    draws = RepeatableDraws(batches, arguments.seed)
    trainer: Any = ObjectiveTrainer(
        model=model,
        args=arguments,
        objective=objective,
        train_dataset=items,
        eval_dataset=held_out,
        data_collator=draws,
        callbacks=[CountEpochs(draws), *callbacks],
    )
    if callbacks:
        trainer.remove_callback(PrinterCallback)  # With callbacks of the caller's own, they report progress.
    if _is_to_be_sharded(arguments) and not trainer.is_fsdp_enabled:  # ignored silently by accelerate
        raise GistError("fsdp was requested, but accelerate only shards on accelerators; leave it out on a CPU")
    model.config.gist = gist
    with checkpointing_what_learns(model), without_parallel_tokenizers(arguments.dataloader_num_workers > 0):
        if checkpoint is not None and 0 < arguments.max_steps <= num_steps_in(checkpoint):
            # If the last step is in the middle of an epoch, Trainer would take one more.
            trainer._load_from_checkpoint(checkpoint)
            measured = {"train_runtime": 0.0, "train_loss": float("nan")}
        else:
            measured = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if not has_adapter:
        if save_dtype is not None and not trainer.is_deepspeed_enabled:
            to_dtype(model, getattr(torch, save_dtype))
        trainer.save_model()  # in every process, because sharded weights are gathered; the first one writes
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
        raise GistError("pack_length and part_separator cannot be combined: chained gists are not packed; give one")
    return GistPackingCollator(
        tokenizer,
        with_teacher=with_teacher,
        reconstruct=objective.reconstruction > 0,
        **keywords_for(GistPackingCollator, settings),
    )


def _has_frozen_prompts(model: Any, collator: GistCollator, arguments: TrainingArguments) -> bool:
    """Return whether the states of prompts depend neither on the text after them nor on trained parameters.

    A step can then compute them once and separately (:mod:`gisting.data.split`). This needs an adapter that acts only
    at gist tokens, one gist per prompt, positions that count tokens, not columns (no sliding window, no rotary type
    that depends on the length), no noise in the base model (dropout, NEFTune, a router's jitter), and no activation
    checkpointing, which does not work with a cache.
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
    """Return whether the arguments ask for FSDP, or ``accelerate launch`` does, through the environment."""
    return bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _check_records(items: Any, arguments: TrainingArguments, pack_length: int | None) -> None:
    if isinstance(items, list):
        if not items:
            raise GistError("records is empty; give at least one")
    elif arguments.max_steps < 1:
        raise GistError("records is a stream, whose length is unknown; set max_steps in the arguments")
    if arguments.train_sampling_strategy in BY_LENGTH and (pack_length is not None or not isinstance(items, list)):
        kind = "a stream cannot be sorted" if pack_length is None else "packed rows are equally long"
        raise GistError(
            f"train_sampling_strategy is {arguments.train_sampling_strategy!r}, but {kind}; leave it at 'random'"
        )


class _FittingStream(IterableDataset[Any]):
    """A stream of records without those that do not fit, so that no batch is empty."""

    def __init__(self, stream: IterableDataset[Any], collator: GistCollator) -> None:
        self.stream, self.collator = stream, collator

    def __iter__(self) -> Iterator[Any]:
        number = number_fitting = 0
        for item in self.stream:
            is_group = isinstance(item, list | tuple)
            number += 1
            if fitting := self.collator.fit(item if is_group else [item]):
                number_fitting += 1
                yield from [fitting] if is_group else fitting
        if number and not number_fitting:
            raise GistError(f"none of the {number} records of the stream fits max_length; raise it")

    def set_epoch(self, epoch: int) -> None:
        """Pass on the number of the epoch, by which a stream may shuffle."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]


def _with_lengths(items: list[Any], collator: GistCollator, name: str) -> Any:
    """Return a data set with a column of the records' numbers of ids, where ``Trainer`` looks for them.

    Raises:
        GistError: the input of a record is a conversation, which columns of a data set do not hold.
    """
    from datasets import Dataset

    if not all(isinstance(row.input, str) for row in items):
        raise GistError(
            "records whose input is a conversation cannot be grouped by length; leave train_sampling_strategy at "
            "'random'"
        )

    return Dataset.from_list(
        [{**asdict(row), name: length} for row, length in zip(items, collator.lengths(items), strict=True)]
    )


def _check_window(model: PreTrainedModel, **lengths: int | None) -> None:
    """Check that rows are not longer than a sliding window, which counts columns, including those of hidden tokens."""
    window = sliding_windows(model.config)
    for name, length in lengths.items():
        if window is not None and length is not None and window < length:
            raise GistError(
                f"{name} must be at most {window}, the sliding window of {model.config.model_type}, got {length}: the "
                "window also counts hidden columns, of other records in the row and of earlier chunks"
            )
