"""The published hyper-parameters, as ``TrainingArguments`` of stock ``Trainer``.

Place in the flow: below ``finetune`` and the settings of a run. Does not depend on models or data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from gisting.errors import GistError

__all__ = ["BY_LENGTH", "PUBLISHED", "check_reports", "default_num_workers", "published_arguments"]

#: Sampling strategies of ``TrainingArguments`` that need the lengths of the records.
BY_LENGTH = ("group_by_length", "batch_rebalance")
#: Hyper-parameters of LLaMA-7B and FLAN-T5-XXL (Gisting, appendix B).
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
    """Return the published hyper-parameters as ``TrainingArguments``; each can be changed.

    Args:
        output_dir: directory for checkpoints.
        is_encoder_decoder: whether to take the values of FLAN-T5-XXL instead of LLaMA-7B.
        batch_size: rows per optimiser step over all devices, reached by accumulating gradients; the published number by
            default.
        per_device_batch_size: rows per forward pass; ``batch_size``, but at most 16, by default.
        **changes: fields of ``TrainingArguments``. By default, ``dataloader_num_workers``, the number of processes that
            make batches ahead of the step, is up to 4 on a GPU, if there are enough cores, and 0 on a CPU.

    Raises:
        GistError: the batch size is not a multiple of the rows per forward pass.
    """
    settings = dict(PUBLISHED["encoder-decoder" if is_encoder_decoder else "decoder"])
    published: int = settings.pop("batch_size")
    rows = published if batch_size is None else batch_size
    on_gpu = torch.cuda.is_available() and not changes.get("use_cpu", False)
    # A launcher starts one process per device; without one, a single process spreads a batch over all visible devices.
    launched = os.environ.get("WORLD_SIZE")
    devices = int(launched) if launched else torch.cuda.device_count() if on_gpu else 1
    per_device = min(max(rows // devices, 1), 16) if per_device_batch_size is None else per_device_batch_size
    if per_device < 1 or rows < 1 or rows % (per_device * devices):
        raise GistError(
            f"batch_size must be a multiple of per_device_batch_size, got {rows} and {per_device}"
            + (f" on each of {devices} devices, {per_device * devices} rows in total" if devices > 1 else "")
        )
    if "num_train_epochs" in changes:
        settings.pop("max_steps", None)
    defaults = {
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "gradient_accumulation_steps": rows // (per_device * devices),
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "use_cpu": not torch.accelerator.is_available(),  # must be given, or bfloat16 is refused on a CPU
        # Records are not dictionaries of model inputs; the collator makes these.
        "remove_unused_columns": False,
        "report_to": "none",
        # Each process reads its own share of a stream, because batches of different lengths cannot be divided. On a
        # GPU, neither copying a batch nor checking whether a loss is NaN may wait for the previous step.
        "accelerator_config": {"dispatch_batches": False, "non_blocking": on_gpu},
        "logging_nan_inf_filter": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "dataloader_num_workers": default_num_workers(on_gpu=on_gpu),
        "logging_steps": 10,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**settings, **defaults, **changes})


def default_num_workers(*, on_gpu: bool) -> int:
    """Return the number of processes that make batches: up to 4 on a GPU, otherwise 0.

    All launched processes of this machine are assumed to share its cores equally. A training process uses one core, and
    its workers at most the rest of its share.

    Args:
        on_gpu: whether the model is trained on a GPU.
    """
    if not on_gpu:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(4, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def check_reports(names: Sequence[str]) -> None:
    """Check that ``Trainer`` can report to each of these places.

    Args:
        names: such as ``tensorboard``.

    Raises:
        GistError: one is not installed, or unknown to transformers.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = {"all", "none", *get_available_reporting_integrations()}
    for name in names:
        if name not in known:
            raise GistError(
                f"report_to: {name} is not installed, or Trainer cannot report to it; install it (pip install {name}), "
                "or leave it out"
            )
