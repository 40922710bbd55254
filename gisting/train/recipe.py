"""Run the training that a recipe describes: a YAML file with model, records and settings.

Place in the flow: above ``finetune``, which does not read files; below the command line, whose options override a
recipe. Unknown settings are refused, so that a typo does not silently become a default. The effective recipe is saved
with the checkpoint.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from gisting.data.prompts import load_inputs, load_prompts
from gisting.data.records import Record, load_records, say_shared
from gisting.errors import GistError
from gisting.models.load import load, load_tokenizer, saved_dtype
from gisting.settings import keywords_for
from gisting.tokens import GistTokenizer
from gisting.train.finetune import finetune
from gisting.train.methods import Method
from gisting.train.objective import Objective
from gisting.train.output import ANSWERS_NAME, RECIPE_NAME, check_output, write_card
from gisting.train.repeat import checkpoint_to_resume
from gisting.train.self_distil import pair_up, self_distil
from gisting.train.settings import BatchSettings, Recipe

__all__ = ["Recipe", "TrainedModel", "load_recipe", "train_recipe"]


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe: a YAML file that maps names of settings to values; ``null`` means not given.

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
    """The result of a run.

    Args:
        model: the trained model, patched, with the weights that were written.
        tokenizer: the tokenizer that it is patched for.
        metrics: what ``Trainer`` measured.
        arguments: the arguments that it was trained with.
    """

    model: PreTrainedModel
    tokenizer: GistTokenizer
    metrics: dict[str, float]
    arguments: TrainingArguments


def train_recipe(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    held_out: Mapping[str, Sequence[Record]] = {},
    sampling: Callable[[int], AbstractContextManager[Callable[[int], Any]]] | None = None,
) -> TrainedModel:
    """Train the model of a recipe, and save the checkpoint with the effective recipe (``recipe.yaml``) and a card.

    With prompts and inputs instead of records, the model first answers with each prompt in view. The answers are kept
    as ``answers.jsonl`` in ``output_dir``, and a run that is resumed does not sample them again.

    When ``torchrun`` or ``accelerate launch`` calls this in several processes, they train together.

    Args:
        recipe: a recipe with ``model``, and ``data`` or ``prompts`` and ``inputs``.
        output_dir: directory for checkpoint and recipe, which must not exist or be empty, unless the run is resumed.
        resume: continue from the last whole checkpoint in ``output_dir``.
        callbacks: as for :func:`gisting.train.finetune.finetune`; with any, ``Trainer`` shows no progress bar.
        held_out: records that will be evaluated, by name; the log says how many of them are also trained on.
        sampling: called with the number of answers to sample; a context whose value is called with the number of
            answers done since its last call.

    Returns:
        Model, tokenizer, metrics and arguments.

    Raises:
        GistError: the recipe lacks model or data; ``output_dir`` holds something else, or the run to resume has other
            settings (:func:`gisting.train.output.check_output`); or as ``load``, ``load_records``, ``load_prompts``,
            ``self_distil`` and ``finetune`` do.
    """
    if recipe.model is None or (recipe.data is None and recipe.prompts is None):
        has = {"model": recipe.model, "data": recipe.data or recipe.prompts}
        missing = " and no ".join(name for name, value in has.items() if value is None)
        or_prompts = " (for data, prompts and inputs will do)" if recipe.model is not None else ""
        raise GistError(
            f"there is no {missing} to train with; name it in the recipe or on the command line{or_prompts}"
        )
    # These fail before a large model is loaded and the directory is written to. Only the first process looks at what is
    # there, because it may soon write.
    if os.environ.get("RANK", "0") == "0":
        check_output(output_dir, recipe, resume=resume)
    checkpoint_to_resume(output_dir, resume)
    tokenizer_of_data = functools.cache(functools.partial(load_tokenizer, recipe.model, recipe.template))
    pairs = None if recipe.prompts is None else _pairs(recipe, recipe.prompts, tokenizer_of_data)
    records = (
        load_records(str(recipe.data), columns=recipe.columns, tokenizer=tokenizer_of_data) if pairs is None else []
    )
    set_seed(recipe.seed)
    # Loaded before the arguments are made, because with arguments for DeepSpeed stage 3, transformers loads weights in
    # shards, and the gist token's row is a mean over all rows.
    model, tokenizer = load(recipe.model, recipe.template, dtype=recipe.dtype)
    arguments = recipe.arguments(output_dir, is_encoder_decoder=tokenizer.is_encoder_decoder)
    if callbacks:
        arguments.disable_tqdm = True  # They report progress, as in finetune.
    if arguments.should_save:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        recipe.save(Path(output_dir) / RECIPE_NAME)
    if pairs is not None:
        with arguments.main_process_first(), (sampling or _unseen)(len(pairs)) as progress:
            if not (arguments.fsdp or arguments.deepspeed):  # which place the weights themselves
                model.to(arguments.device)  # pyright: ignore[reportArgumentType]
            records = self_distil(
                model,
                tokenizer,
                pairs,
                Path(output_dir) / ANSWERS_NAME,
                max_new_tokens=recipe.answer_tokens,
                temperature=recipe.answer_temperature,
                seed=recipe.seed,
                progress=progress,
            )
        set_seed(recipe.seed)  # whether answers were sampled or read
    for name, rows in held_out.items():
        say_shared(records, rows, name)
    save_dtype: str | None = recipe.save_dtype
    if save_dtype == "base":
        save_dtype = saved_dtype(recipe.model) if recipe.method == "full" else None
    settings = {
        **keywords_for(BatchSettings, recipe),
        "method": Method(recipe.method, recipe.lora_rank, recipe.lora_alpha),
        "save_dtype": save_dtype,
        "objective": Objective(top_k=recipe.distillation_top_k, **recipe.weights),
    }
    if tokenizer.is_encoder_decoder:
        settings.setdefault("max_length", 128)
    metrics = finetune(model, tokenizer, records, arguments, resume=resume, callbacks=callbacks, **settings)
    if arguments.process_index == 0:
        write_card(output_dir, recipe, model, tokenizer, metrics)
    return TrainedModel(model, tokenizer, metrics, arguments)


def _pairs(recipe: Recipe, prompts: str, tokenizer: Callable[[], GistTokenizer]) -> list[tuple[str, str]]:
    """The pairs of prompts and inputs of a recipe that has no records."""
    return pair_up(
        [one.prompt for one in load_prompts(prompts, tokenizer)],
        load_inputs(str(recipe.inputs)),
        inputs_per_prompt=recipe.inputs_per_prompt,
        seed=recipe.seed,
    )


@contextmanager
def _unseen(total: int) -> Iterator[Callable[[int], Any]]:
    yield lambda done: None
