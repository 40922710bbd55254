"""A training run as data: one YAML file that says model, records and settings, and the run that it describes.

Place in the flow: above ``finetune``, which knows nothing of files; below the command line, whose options override a
recipe. The schema is :class:`Recipe`: whatever it does not hold is refused, so a typo is no silent default. The
effective recipe is saved beside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from gisting.data.records import load_records
from gisting.errors import GistError
from gisting.models.load import load
from gisting.settings import keywords_for
from gisting.tokens import GistTokenizer
from gisting.train.finetune import finetune
from gisting.train.methods import Method
from gisting.train.objective import Objective
from gisting.train.repeat import checkpoint_to_resume
from gisting.train.settings import BatchSettings, Recipe

__all__ = ["Recipe", "TrainedModel", "load_recipe", "train_recipe"]

RECIPE_NAME = "recipe.yaml"


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe: a YAML file that maps names of settings to values; ``null`` is as if the name were not there.

    Args:
        path: the file, in UTF-8.

    Returns:
        The recipe; settings that the file does not name have their defaults.

    Raises:
        GistError: the file is not such a mapping, or a key or value is wrong; file, line and key are named.
        OSError: the file cannot be read.
    """
    return Recipe.load(path)


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
    settings = {
        **keywords_for(BatchSettings, recipe),
        "method": Method(recipe.method, recipe.lora_rank, recipe.lora_alpha),
        "objective": Objective(recipe.distillation, recipe.distillation_top_k, recipe.reconstruction),
    }
    if tokenizer.is_encoder_decoder:
        settings.setdefault("max_length", 128)
    metrics = finetune(model, tokenizer, records, arguments, resume=resume, callbacks=callbacks, **settings)
    return TrainedModel(model, tokenizer, metrics, arguments)
