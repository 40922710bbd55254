"""Declare the settings of a training run in one table.

The options of ``gisting train``, the keys of a recipe file and the keyword arguments of ``finetune`` come from it.

Place in the flow: above :mod:`gisting.settings`; below ``finetune``, ``recipe`` and the command line. A setting is
declared here and used where it takes effect, and is not passed on by name in between. Importing this module does not
import torch or transformers, because ``gisting --help`` must stay quick.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gisting._version import __version__
from gisting.errors import GistError
from gisting.settings import (
    COUNT,
    FLAG,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    TEXT,
    TEXTS,
    WHOLE,
    Kind,
    Settings,
    checked,
    choice,
    is_whole,
    keywords_for,
    number,
    setting,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["BatchSettings", "Recipe", "TrainerSettings", "versions"]


def _methods() -> Collection[str]:
    from gisting.train.methods import METHODS

    return METHODS


def _schedules() -> list[str]:
    from transformers import SchedulerType

    return [kind.value for kind in SchedulerType]


def _condition_names() -> Collection[str]:
    from gisting.visibility import CONDITIONS

    return CONDITIONS


def _read_k(value: Any) -> tuple[int, int]:
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)(?::(\d+))?", value)) is not None:
        value = (int(match[1]), int(match[2] or match[1]))
    low, high = (value, value) if is_whole(value) else value
    return checked((low, high), is_whole(low) and is_whole(high) and 1 <= int(low) <= int(high))


def _write_k(value: tuple[int, int]) -> int | str:
    low, high = value
    return low if low == high else f"{low}:{high}"


def _read_conditions(value: Any) -> dict[str, float]:
    weights = {value: 1.0} if isinstance(value, str) else dict(value)
    return {
        checked(name, name in _condition_names()): number(weight, 0, or_equal=True) for name, weight in weights.items()
    }


def _parse_conditions(items: list[str]) -> dict[str, float]:
    weights = {}
    for item in items:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise GistError(f"condition must be a name or name=weight, got {item!r}") from None
    return weights


def _read_columns(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",")]
        value = {checked(name.strip(), bool(equals)): column.strip() for name, equals, column in pairs}
    return {
        checked(name, isinstance(name, str) and bool(name)): checked(column, isinstance(column, str) and bool(column))
        for name, column in dict(value).items()
    }


_K = Kind("a number or a range such as 1:10", _read_k, write=_write_k)
#: What columns of a data set are called.
COLUMNS = Kind("names such as instruction=question,output=answer", _read_columns, write=dict)
_CONDITIONS = Kind(
    lambda: f"names of {', '.join(_condition_names())}, with weights", _read_conditions, list[str], _parse_conditions
)


# Methods whose adapters act at gist tokens only. (Their kinds are in models/adapters.py, which imports torch.)
_GIST_ONLY = ("gist-lora", "embeddings")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(Settings):
    """Settings of stock ``Trainer``. None is the published value for the model's kind.

    Raises:
        GistError: a value is not of its setting's kind, or two settings cannot be combined.
    """

    epochs: float | None = setting(POSITIVE, None, "Passes over the data.", shown_default="3 for a decoder")
    max_steps: int | None = setting(
        COUNT, None, "Optimiser steps, instead of epochs.", shown_default="16000 for an encoder-decoder"
    )
    batch_size: int | None = setting(
        COUNT, None, "Rows per optimiser step, over all devices.", shown_default="128; 16 for an encoder-decoder"
    )
    per_device_batch_size: int | None = setting(
        COUNT, None, "Rows per forward pass; gradients are accumulated up to the batch size."
    )
    learning_rate: float | None = setting(
        POSITIVE, None, "Highest learning rate.", shown_default="2e-5; 5e-5 for an encoder-decoder"
    )
    lr_scheduler_type: str | None = setting(
        choice(_schedules),
        None,
        "Learning rate schedule of transformers.",
        shown_default="cosine; constant for an encoder-decoder",
    )
    warmup_steps: float | None = setting(
        NOT_NEGATIVE,
        None,
        "Warm-up steps, or below 1 a share of all steps.",
        shown_default="0.03; 0 for an encoder-decoder",
    )
    weight_decay: float | None = setting(NOT_NEGATIVE, None, "Weight decay of AdamW.", shown_default="0")
    save_steps: int = setting(COUNT, 500, "Steps between checkpoints to resume from; the last one is kept.")
    logging_steps: int = setting(COUNT, 10, "Steps between reports of the loss.")
    seed: int = setting(WHOLE, 42, "Seed of weights, data order and draws.")
    dtype: str = setting(
        choice("auto", "float32", "bfloat16", "float16"),
        "float32",
        "Type of the trained weights: auto, float32, bfloat16 or float16. Small steps are rounded away in half "
        "precision.",
    )
    save_dtype: str = setting(
        choice("base", "float32", "bfloat16", "float16"),
        "base",
        "Type of the weights that are written at the end: base (the type of the model's own files), float32, bfloat16 "
        "or float16. Adapters are float32.",
    )
    bf16: bool | None = setting(FLAG, None, "Calculate in bfloat16.", shown_default="where a GPU supports it")
    gradient_checkpointing: bool = setting(FLAG, False, "Use less memory and more time.")
    torch_compile: bool = setting(FLAG, False, "Compile the model.")
    num_workers: int | None = setting(
        WHOLE, None, "Processes that make batches.", shown_default="up to 4 on a GPU, otherwise 0"
    )
    report_to: tuple[str, ...] = setting(TEXTS, (), "Where to report: tensorboard, wandb, ...; may be repeated.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.max_steps is not None:
            raise GistError(
                f"epochs and max_steps cannot be combined, got {self.epochs:g} and {self.max_steps}; leave one out"
            )

    def updated(self, **changes: Any) -> Self:
        """Return the settings with some of them changed; ``epochs`` replaces ``max_steps``, and the other way round.

        Args:
            **changes: new values; None changes nothing.

        Raises:
            GistError: as the class does.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        for one, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
            if one in changes:
                changes.setdefault(other, None)
        return replace(self, **changes)

    def arguments(self, output_dir: str | Path, *, is_encoder_decoder: bool = False) -> TrainingArguments:
        """Return the settings as arguments of stock ``Trainer``, with the published values where they are None.

        Args:
            output_dir: directory for checkpoints.
            is_encoder_decoder: whether to take the values published for FLAN-T5-XXL instead of LLaMA-7B.

        Raises:
            GistError: the batch size is not a multiple of the rows per forward pass, or a ``report_to`` is not
                installed.
        """
        from transformers import TrainingArguments

        from gisting._compat import activation_checkpointing
        from gisting.train.arguments import check_reports, published_arguments

        check_reports(self.report_to)
        renamed = {
            "num_train_epochs": self.epochs,
            "dataloader_num_workers": self.num_workers,
        }
        changes = keywords_for(TrainingArguments, self, TrainerSettings)
        changes.pop("gradient_checkpointing", None)  # deprecated in newer versions of transformers
        changes |= activation_checkpointing(self.gradient_checkpointing)
        changes |= {name: value for name, value in renamed.items() if value is not None}
        return published_arguments(
            output_dir,
            is_encoder_decoder=is_encoder_decoder,
            batch_size=self.batch_size,
            per_device_batch_size=self.per_device_batch_size,
            **{**changes, "save_total_limit": 1, "report_to": list(self.report_to) or "none"},
        )


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """How records become batches.

    These are settings of :class:`gisting.GistCollator` and :class:`gisting.data.packing.GistPackingCollator`, which
    say more about each.

    Raises:
        GistError: a value is not of its setting's kind.
    """

    num_gist_tokens: tuple[int, int] = setting(
        _K, (1, 1), "k, or a range such as 1:10 from which each row draws.", "--num-gist-tokens", "-k"
    )
    conditions: Mapping[str, float] = setting(
        _CONDITIONS,
        "gist",
        "Condition to train under: gist, positive or negative, with a weight as in gist=3; may be repeated, and each "
        "row then draws one.",
        "--condition",
    )
    max_length: int | None = setting(
        COUNT, None, "Longest sequence in tokens.", shown_default="512; 128 for the source of an encoder-decoder"
    )
    max_target_length: int = setting(COUNT, 256, "Longest target of an encoder-decoder, in tokens.")
    part_separator: str | None = setting(
        TEXT, None, "Text at which instructions are cut into parts, to train a model to read chained gists."
    )
    pack_length: int | None = setting(
        COUNT,
        None,
        "Pack records into rows of this many tokens; records with the same instruction share one copy of it. The batch "
        "size then counts instructions, each with up to 8 of its records.",
    )
    max_per_group: int = setting(COUNT, 8, "Records with the same instruction that are packed together.")
    chunk_length: int | None = setting(
        COUNT, None, "Give longer prompts one gist for each chunk of at most this many tokens."
    )


@dataclass(frozen=True, kw_only=True)
class _WhatIsTrained(Settings):
    model: str | None = setting(
        TEXT, None, "Directory of a checkpoint, or a repository on the Hugging Face hub.", is_argument=True
    )
    data: str | None = setting(
        PATH,
        None,
        "Training records, with instruction, input, output or with messages: a .json, .jsonl, .csv or .parquet file, "
        "or a data set on the hub, org/name or org/name:split.",
    )
    columns: Mapping[str, str] | None = setting(
        COLUMNS, None, "What columns of the records are called, such as instruction=question,output=answer."
    )
    prompts: str | None = setting(
        PATH,
        None,
        "Instead of --data, prompts to train on without answers: a directory of text files, or a file of prompts. The "
        "model answers --inputs with each prompt in view, and the gist learns to give the same.",
    )
    inputs: str | None = setting(
        PATH, None, "With --prompts, a file of inputs: a text with one on each line, or data with input."
    )
    inputs_per_prompt: int | None = setting(
        COUNT, None, "With --prompts, how many inputs each prompt gets, drawn from all.", shown_default="all"
    )
    answer_tokens: int = setting(COUNT, 64, "With --prompts, the longest answer that is sampled, in tokens.")
    answer_temperature: float = setting(
        NOT_NEGATIVE, 1.0, "With --prompts, the temperature at which answers are sampled; 0 takes the likeliest tokens."
    )
    eval: tuple[str, ...] = setting(
        TEXTS, (), "Records to evaluate on after training, under all three conditions; may be repeated."
    )
    template: str | None = setting(
        TEXT,
        None,
        "Template of a conversation: alpaca, alpaca-t5, plain or chat.",
        shown_default="the one that the checkpoint was trained with",
    )
    method: str = setting(choice(_methods), "full", "What is trained: full, lora, gist-lora or embeddings.")
    lora_rank: int = setting(COUNT, 16, "Rank of the adapter, with lora and gist-lora.")
    lora_alpha: float | None = setting(
        POSITIVE, None, "Scale of the adapter times its rank.", shown_default="twice the rank"
    )
    language_model: float | None = setting(
        NOT_NEGATIVE,
        None,
        "Weight of the language model's loss on the answers.",
        shown_default="1; 0 with --prompts and gist-lora or embeddings",
    )
    distillation: float | None = setting(
        NOT_NEGATIVE,
        None,
        "Weight of the KL divergence from the same model with the prompt visible.",
        shown_default="0; 1 with --prompts",
    )
    distillation_top_k: int = setting(COUNT, 32, "How many of that model's likeliest tokens are compared one by one.")
    reconstruction: float = setting(
        NOT_NEGATIVE, 0.0, "Weight of the prompt's own likelihood after its gist; needs --pack-length."
    )


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainerSettings, BatchSettings, _WhatIsTrained):
    """All settings of a training run, as ``gisting train --help`` lists them.

    None means the published value for the model's kind, or "not given".

    Raises:
        GistError: a value is not of its setting's kind, or two settings cannot be combined.
    """

    max_new_tokens: int = setting(COUNT, 128, "Longest answer in the evaluation, in tokens.")
    group_by_length: bool = setting(FLAG, False, "Put rows of similar length into one batch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.data is not None:
            raise GistError(
                f"prompts and data cannot be combined, got {self.prompts} and {self.data}; answers are sampled for "
                "prompts, data have their own"
            )
        if (self.prompts is None) != (self.inputs is None):
            missing = "prompts" if self.prompts is None else "inputs"
            raise GistError(f"prompts and inputs belong together, got no {missing}; name both files")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the losses.

        With prompts alone and an adapter that acts at gist tokens only, the answers are not to be learned, but how
        likely each would have been. A method that changes the model which answers learns them too, as an anchor.
        """
        distilled = 0.0 if self.prompts is None else 1.0
        plain = 0.0 if self.prompts is not None and self.method in _GIST_ONLY else 1.0
        return {
            "language_model": plain if self.language_model is None else self.language_model,
            "distillation": distilled if self.distillation is None else self.distillation,
            "reconstruction": self.reconstruction,
        }

    def arguments(self, output_dir: str | Path, *, is_encoder_decoder: bool = False) -> TrainingArguments:
        """Return the settings as arguments of stock ``Trainer``. Arguments and errors are those of the base class."""
        arguments = super().arguments(output_dir, is_encoder_decoder=is_encoder_decoder)
        if self.group_by_length:
            arguments.train_sampling_strategy = "group_by_length"
        return arguments

    def save(self, path: str | Path) -> None:
        """Write the settings that differ from their defaults to a file.

        :func:`gisting.train.recipe.load_recipe` reads it.

        Args:
            path: the file, which is YAML.
        """
        import yaml

        text = yaml.safe_dump(self.written({"num_gist_tokens"}), sort_keys=False, allow_unicode=True)
        Path(path).write_text(f"# {versions()}\n{text}", encoding="utf-8")


def versions() -> str:
    """Name the versions of this library, torch and transformers, for a reader; nothing branches on them."""
    import torch
    import transformers

    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"  # noqa: TID251
    return f"gisting {__version__}, {libraries}"
