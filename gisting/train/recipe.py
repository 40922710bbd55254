"""A training run as data: one YAML file that says model, records and settings, and the run that it describes.

Place in the flow: above ``finetune``, which knows nothing of files; below the command line, whose options override a
recipe. The schema is :class:`Recipe`: whatever it does not hold is refused, so a typo is no silent default. The
effective recipe is saved beside the checkpoint.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, SchedulerType, TrainerCallback, TrainingArguments, set_seed

from gisting._compat import activation_checkpointing
from gisting._version import __version__
from gisting.data.records import load_records
from gisting.errors import GistError
from gisting.models.load import load
from gisting.tokens import GistTokenizer
from gisting.train.finetune import finetune, published_arguments
from gisting.train.methods import METHODS, Method
from gisting.train.objective import Objective
from gisting.train.repeat import checkpoint_to_resume
from gisting.visibility import CONDITIONS

__all__ = ["Recipe", "TrainedModel", "load_recipe", "train_recipe"]

RECIPE_NAME = "recipe.yaml"
# Plain scalars as YAML 1.2 has them (its core schema). PyYAML reads 1.1, where 1:10 is the number 70, 2e-5 a text and
# no a boolean.
_SCALARS = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Kind(NamedTuple):
    """What a setting may be: in words, and as a function that returns the value or raises ValueError or TypeError."""

    expected: str
    read: Callable[[Any], Any]


def _checked(value: Any, is_right: bool) -> Any:
    if not is_right:
        raise ValueError
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any, low: float, *, or_equal: bool = False) -> float:
    number = float(_checked(value, isinstance(value, int | float) and not isinstance(value, bool)))
    return _checked(number, low < number < float("inf") or (or_equal and number == low))


def _k(value: Any) -> tuple[int, int]:
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)(?::(\d+))?", value)) is not None:
        value = (int(match[1]), int(match[2] or match[1]))
    low, high = (value, value) if _is_whole(value) else value
    return _checked((low, high), _is_whole(low) and _is_whole(high) and 1 <= int(low) <= int(high))


def _conditions(value: Any) -> dict[str, float]:
    weights = {value: 1.0} if isinstance(value, str) else dict(value)
    return {_checked(name, name in CONDITIONS): _number(weight, 0, or_equal=True) for name, weight in weights.items()}


def _texts(value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(_checked(value, isinstance(value, list | tuple)))
    return _checked(items, all(isinstance(item, str) and item for item in items))


def _choice(*names: str) -> _Kind:
    return _Kind(f"one of {', '.join(names)}", lambda value: _checked(value, value in names))


_TEXT = _Kind("a text", lambda value: _checked(value, isinstance(value, str) and bool(value)))
_TEXTS = _Kind("a list of texts", _texts)
_COUNT = _Kind("a whole number of at least 1", lambda value: _checked(value, _is_whole(value) and value >= 1))
_SEED = _Kind("a whole number of at least 0", lambda value: _checked(value, _is_whole(value) and value >= 0))
_POSITIVE = _Kind("a number above 0", lambda value: _number(value, 0))
_NOT_NEGATIVE = _Kind("a number of at least 0", lambda value: _number(value, 0, or_equal=True))
_FLAG = _Kind("true or false", lambda value: _checked(value, isinstance(value, bool)))
_K = _Kind("a number or a range such as 1:10", _k)
_CONDITIONS = _Kind(f"names of {', '.join(CONDITIONS)}, with weights", _conditions)


def _setting(kind: _Kind, default: Any = None) -> Any:
    return field(default=default, metadata={"kind": kind})


@dataclass(frozen=True)
class Recipe:
    """What a training run does. None stands for the published value of the model's kind, or for "not given".

    Attributes:
        model: directory of a checkpoint, or a repository on the hub.
        data: training records, ``.jsonl`` or ``.json``; paths are relative to the current directory.
        eval: records to evaluate on behind the training.
        template: prompt layout, as for :func:`gisting.load`.
        method: what is trained, as for :func:`gisting.train.finetune.finetune`.
        lora_rank: of the adapter, with ``lora`` and ``gist-lora``.
        lora_alpha: its scale times its rank; twice the rank by default.
        num_gist_tokens: k, or ``low:high``, from which each row draws.
        conditions: names with weights, of which each row draws one.
        epochs: passes over the records; excludes ``max_steps``.
        max_steps: optimiser steps.
        batch_size: rows of an optimiser step, over all devices.
        per_device_batch_size: rows of a forward pass.
        learning_rate: at its highest.
        lr_scheduler_type: name of a schedule of transformers.
        warmup_steps: steps, or part of all steps where below 1.
        weight_decay: of AdamW.
        max_length: ids of a sequence, of the source for an encoder-decoder.
        max_target_length: ids of the target of an encoder-decoder.
        part_separator: text at which instructions are cut into chained gists.
        pack_length: ids of a packed row.
        max_per_group: records of one instruction that are packed together.
        chunk_length: ids of a prompt up to which one gist is enough; longer ones get a gist for each such chunk.
        distillation: weight of the KL divergence from the same model with the prompt in view.
        distillation_top_k: how many of its likeliest tokens are compared one by one.
        reconstruction: weight of the prompt's likelihood behind its gist; needs ``pack_length``.
        save_steps: steps between checkpoints; the last one is kept.
        logging_steps: steps between reports of the loss.
        seed: of weights, data order and draws.
        dtype: of the weights that are trained.
        bf16: bfloat16 arithmetic over them; by default where a GPU has it.
        gradient_checkpointing: less memory, more time.
        torch_compile: compile the model.
        num_workers: processes that collate, beside the training one; by default as :func:`published_arguments` says.
        group_by_length: rows of a batch are about equally long.
        report_to: where ``Trainer`` reports: ``tensorboard``, ``wandb``, ...
        max_new_tokens: longest answer of the evaluation.

    Raises:
        GistError: a value is not what it should be, or two exclude each other.
    """

    model: str | None = _setting(_TEXT)
    data: str | None = _setting(_TEXT)
    eval: tuple[str, ...] = _setting(_TEXTS, ())
    template: str | None = _setting(_TEXT)
    method: str = _setting(_choice(*METHODS), "full")
    lora_rank: int = _setting(_COUNT, 16)
    lora_alpha: float | None = _setting(_POSITIVE)
    num_gist_tokens: tuple[int, int] = _setting(_K, (1, 1))
    conditions: Mapping[str, float] = _setting(_CONDITIONS, "gist")
    epochs: float | None = _setting(_POSITIVE)
    max_steps: int | None = _setting(_COUNT)
    batch_size: int | None = _setting(_COUNT)
    per_device_batch_size: int | None = _setting(_COUNT)
    learning_rate: float | None = _setting(_POSITIVE)
    lr_scheduler_type: str | None = _setting(_choice(*(kind.value for kind in SchedulerType)))
    warmup_steps: float | None = _setting(_NOT_NEGATIVE)
    weight_decay: float | None = _setting(_NOT_NEGATIVE)
    max_length: int | None = _setting(_COUNT)
    max_target_length: int = _setting(_COUNT, 256)
    part_separator: str | None = _setting(_TEXT)
    pack_length: int | None = _setting(_COUNT)
    max_per_group: int = _setting(_COUNT, 8)
    chunk_length: int | None = _setting(_COUNT)
    distillation: float = _setting(_NOT_NEGATIVE, 0.0)
    distillation_top_k: int = _setting(_COUNT, 32)
    reconstruction: float = _setting(_NOT_NEGATIVE, 0.0)
    save_steps: int = _setting(_COUNT, 500)
    logging_steps: int = _setting(_COUNT, 10)
    seed: int = _setting(_SEED, 42)
    dtype: str = _setting(_choice("auto", "float32", "bfloat16", "float16"), "float32")
    bf16: bool | None = _setting(_FLAG)
    gradient_checkpointing: bool = _setting(_FLAG, False)
    torch_compile: bool = _setting(_FLAG, False)
    num_workers: int | None = _setting(_SEED)
    group_by_length: bool = _setting(_FLAG, False)
    report_to: tuple[str, ...] = _setting(_TEXTS, ())
    max_new_tokens: int = _setting(_COUNT, 128)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, kind = getattr(self, setting.name), setting.metadata["kind"]
            if value is None and setting.default is None:
                continue
            try:
                object.__setattr__(self, setting.name, kind.read(value))
            except (TypeError, ValueError):
                raise GistError(f"{setting.name} must be {kind.expected}, got {value!r}") from None
        if self.epochs is not None and self.max_steps is not None:
            raise GistError(
                f"epochs and max_steps exclude each other, got {self.epochs:g} and {self.max_steps}; leave one out"
            )

    def updated(self, **changes: Any) -> Recipe:
        """With the values of ``changes``; ``epochs`` takes the place of ``max_steps`` and the other way round. None
        changes nothing.

        Raises:
            GistError: as the class does.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        for one, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
            if one in changes and other not in changes:
                changes[other] = None
        return replace(self, **changes)

    def arguments(self, output_dir: str | Path, *, is_encoder_decoder: bool = False) -> TrainingArguments:
        """For stock ``Trainer``, with the published values of the model's kind where the recipe says nothing.

        Args:
            output_dir: for checkpoints.
            is_encoder_decoder: whose published values stand for what is not said.

        Raises:
            GistError: the batch size is no multiple of the rows of a forward pass, or a place to report to is not
                installed.
        """
        _check_reports(self.report_to)
        changes = {
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.lr_scheduler_type,
            "warmup_steps": self.warmup_steps,
            "weight_decay": self.weight_decay,
            "bf16": self.bf16,
            "dataloader_num_workers": self.num_workers,
            "train_sampling_strategy": "group_by_length" if self.group_by_length else None,
        }
        return published_arguments(
            output_dir,
            is_encoder_decoder=is_encoder_decoder,
            batch_size=self.batch_size,
            per_device_batch_size=self.per_device_batch_size,
            save_steps=self.save_steps,
            save_total_limit=1,
            logging_steps=self.logging_steps,
            seed=self.seed,
            torch_compile=self.torch_compile,
            report_to=list(self.report_to) or "none",
            **{name: value for name, value in changes.items() if value is not None},
            **activation_checkpointing(self.gradient_checkpointing),
        )

    def save(self, path: str | Path) -> None:
        """Write ``path``, a file that :func:`load_recipe` reads, without what has its default value."""
        import torch
        import transformers
        import yaml

        values: dict[str, Any] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value != getattr(_DEFAULTS, setting.name):
                values[setting.name] = list(value) if isinstance(value, tuple) else value
        low, high = self.num_gist_tokens
        values["num_gist_tokens"] = low if low == high else f"{low}:{high}"
        versions = f"gisting {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        Path(path).write_text(f"# {versions}\n{text}", encoding="utf-8")


_DEFAULTS = Recipe()


def _check_reports(names: Sequence[str]) -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = {"all", "none", *get_available_reporting_integrations()}
    for name in names:
        if name not in known:
            raise GistError(
                f"report_to: {name} is not installed, or no place that Trainer reports to; install it (pip install "
                f"{name}), or leave it out"
            )


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe: a YAML mapping of the names that :class:`Recipe` has; ``null`` is as if not there.

    Args:
        path: the file, UTF-8.

    Returns:
        The recipe; what the file does not name has its default value.

    Raises:
        GistError: it is no such mapping, a key is unknown or stands twice, or a value is not what it should be; file,
            line and key are named.
        OSError: the file cannot be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}  # noqa: RUF012

    for name, pattern in _SCALARS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), None)
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=Loader)
        values = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GistError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise GistError(f"{path} must hold settings, one 'name: value' a line, got {type(values).__name__}")
    names = [setting.name for setting in fields(Recipe)]
    lines: dict[Any, int] = {}
    for key, _ in root.value:
        name, line = key.value, key.start_mark.line + 1
        if name in lines:
            raise GistError(f"{path}, line {line}: {name} stands twice, first in line {lines[name]}; take one out")
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"a recipe has {', '.join(names)}"
            raise GistError(f"{path}, line {line}: there is no setting {name!r}; {hint}")
        lines[name] = line
    try:
        return Recipe(**{name: value for name, value in values.items() if value is not None})
    except GistError as error:
        line = lines.get(str(error).partition(" ")[0])
        raise GistError(f"{path}, line {line}: {error}" if line else f"{path}: {error}") from None


class TrainedModel(NamedTuple):
    """What a run leaves in memory.

    Args:
        model: trained, patched.
        tokenizer: the one it is patched for.
        metrics: what ``Trainer`` measured.
        arguments: those it was trained with.
    """

    model: PreTrainedModel
    tokenizer: GistTokenizer
    metrics: dict[str, float]
    arguments: TrainingArguments


def train_recipe(
    recipe: Recipe, output_dir: str | Path, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> TrainedModel:
    """Do what a recipe says, up to the saved checkpoint, with the effective recipe beside it (``recipe.yaml``).

    Run by each process of ``torchrun`` or ``accelerate launch``, it trains on all of them.

    Args:
        recipe: with ``model`` and ``data``.
        output_dir: for checkpoint and recipe.
        resume: go on from the last whole checkpoint in ``output_dir``.
        callbacks: as for :func:`gisting.train.finetune.finetune`.

    Returns:
        Model, tokenizer and what was measured.

    Raises:
        GistError: the recipe lacks model or data, or as ``load``, ``load_records`` and ``finetune`` do.
    """
    if recipe.model is None or recipe.data is None:
        missing = " and no ".join(name for name in ("model", "data") if getattr(recipe, name) is None)
        raise GistError(f"there is no {missing} to train with; say which in the recipe or on the command line")
    checkpoint_to_resume(output_dir, resume)  # refuses before a large model is read and the directory written to
    records = load_records(recipe.data)
    set_seed(recipe.seed)
    # Before the arguments: with those of DeepSpeed stage 3 in force, transformers would load weights already in shards,
    # and the gist token's row is a mean over all rows.
    model, tokenizer = load(recipe.model, recipe.template, dtype=recipe.dtype)
    arguments = recipe.arguments(output_dir, is_encoder_decoder=tokenizer.is_encoder_decoder)
    if arguments.should_save:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        recipe.save(Path(output_dir) / RECIPE_NAME)
    metrics = finetune(
        model,
        tokenizer,
        records,
        arguments,
        num_gist_tokens=recipe.num_gist_tokens,
        conditions=recipe.conditions,
        method=Method(recipe.method, recipe.lora_rank, recipe.lora_alpha),
        max_length=recipe.max_length or (128 if tokenizer.is_encoder_decoder else 512),
        max_target_length=recipe.max_target_length,
        part_separator=recipe.part_separator,
        pack_length=recipe.pack_length,
        max_per_group=recipe.max_per_group,
        chunk_length=recipe.chunk_length,
        objective=Objective(recipe.distillation, recipe.distillation_top_k, recipe.reconstruction),
        resume=resume,
        callbacks=callbacks,
    )
    return TrainedModel(model, tokenizer, metrics, arguments)
