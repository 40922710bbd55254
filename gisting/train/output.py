"""The directory that a training run writes to: whether it may, whether a run in it may go on, and the card in it.

Place in the flow: beside ``recipe``, which trains. Loads no model and no weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from gisting.card import is_repository_id
from gisting.errors import GistError
from gisting.models.hub import checkpoint_card
from gisting.settings import declared
from gisting.tokens import GistTokenizer
from gisting.train.self_distil import SETTINGS_SUFFIX
from gisting.train.settings import Recipe, versions

__all__ = ["ANSWERS_NAME", "RECIPE_NAME", "check_output", "check_same_run", "write_card"]

RECIPE_NAME = "recipe.yaml"
#: Where the answers are kept that the model gave to a recipe's prompts and inputs.
ANSWERS_NAME = "answers.jsonl"

# A run may be resumed with other values of these: they say how far, how fast and on which hardware it trains, and what
# is shown of it, not what is learned from what. A template that is not given is the checkpoint's; what came of both is
# compared by check_same_run.
_MAY_CHANGE = {
    *("epochs", "max_steps", "save_steps", "logging_steps", "report_to", "eval", "max_new_tokens", "save_dtype"),
    *("per_device_batch_size", "bf16", "gradient_checkpointing", "torch_compile", "num_workers", "template"),
}
# What a directory is, by a file in it.
_KINDS = {
    "settings.json": "an internalisation",
    "config.json": "a checkpoint",
    "gist_adapter.json": "an adapter",
    "adapter_config.json": "an adapter of peft",
    "index.sqlite": "a store of compressed prompts",
}


def check_output(directory: str | Path, recipe: Recipe, *, resume: bool) -> None:
    """Raise unless a run may write to a directory: an empty or new one, or with ``resume`` one with the same run.

    A recipe alone, or with sampled answers, is what a run leaves that ended before its first checkpoint. The recipe is
    replaced, and so are hidden files; the answers are used again.

    Args:
        directory: the output directory.
        recipe: the settings of the run.
        resume: whether the run continues one that is in the directory.

    Raises:
        GistError: the directory is a file, or holds something else; or the run in it has other settings, which are
            named with both values. Settings that do not change what is learned, such as ``max_steps``, may differ.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise GistError(f"the output directory must be a directory, but {directory} is a file; give another path")
    path = directory / RECIPE_NAME
    if resume:
        differences = _differences(Recipe.load(path), recipe) if path.exists() else []
        if differences:
            raise GistError(
                f"{directory} was started with other settings: {'; '.join(differences)}; resume with those, or train "
                "into another output directory"
            )
        return
    held = sorted(file.name for file in directory.glob("*") if not file.name.startswith("."))
    if not set(held) - {RECIPE_NAME, ANSWERS_NAME, ANSWERS_NAME + SETTINGS_SUFFIX}:
        return
    advice = "give another output directory, or remove this one first"
    if path.exists():
        found = Recipe.load(path)
        what = f"another run ({found.method} of {found.model} on {found.data or found.prompts})"
        advice = f"continue it with resume (--resume), {advice}"
    else:
        kinds = [kind for name, kind in _KINDS.items() if name in held]
        what = kinds[0] if kinds else f"other files ({', '.join(held[:3])}{', ...' if len(held) > 3 else ''})"
    raise GistError(f"{directory} holds {what}, which would be overwritten; {advice}")


def _differences(found: Recipe, wanted: Recipe) -> list[str]:
    differences = []
    for each in fields(Recipe):
        was, now = (
            None if value is None else declared(each).kind.write(value)
            for value in (getattr(found, each.name), getattr(wanted, each.name))
        )
        is_place = each.name in ("model", "data", "prompts", "inputs") and _is_same_place(was, now)
        if each.name not in _MAY_CHANGE and was != now and not is_place:
            differences.append(f"{each.name} was {was}, is {now}")
    return differences


def _is_same_place(one: Any, other: Any) -> bool:
    return None not in (one, other) and os.path.exists(one) and os.path.realpath(one) == os.path.realpath(other)


def check_same_run(gist: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Raise if a checkpoint to resume from was written by a run with another method, template or k.

    ``Trainer`` leaves parameters that a checkpoint lacks unchanged, so that such a run would start again, unnoticed.

    Args:
        gist: ``config.gist`` of the model as it will be trained.
        checkpoint: a checkpoint of ``Trainer``.

    Raises:
        GistError: they differ; the setting is named with both values.
    """
    path = Path(checkpoint) / CONFIG_NAME
    recorded = json.loads(path.read_text(encoding="utf-8")).get("gist") if path.is_file() else None
    if not recorded:
        return
    was, now = _facts(recorded), _facts(gist)
    differences = [f"{name} was {was[name]}, is {now.get(name)}" for name in was if was[name] != now.get(name)]
    if differences:
        raise GistError(
            f"{checkpoint} was written by a run with other settings: {'; '.join(differences)}; resume with those, or "
            "train into another output directory"
        )


def _facts(gist: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``config.gist`` says about a training, under the names of settings."""
    adapter = gist.get("adapter") or {"kind": "full"}
    names = {"kind": "method", "rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    k = gist.get("num_gist_tokens")
    return {
        **{new: adapter[old] for old, new in names.items() if old in adapter},
        "template": gist.get("template"),
        "num_gist_tokens": None if k is None else str(k[0]) if k[0] == k[1] else f"{k[0]}:{k[1]}",
        "chunk_length": gist.get("chunk_length"),
        "tokenizer": gist.get("tokenizer"),
    }


def write_card(
    directory: str | Path,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    metrics: Mapping[str, float],
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write the card of a trained checkpoint: base, data, method, settings, versions and what was measured.

    Directories and files of this computer are named without the path to them.

    Args:
        directory: directory of the checkpoint; its ``README.md`` is replaced.
        recipe: the settings of the run.
        model: the trained model.
        tokenizer: the tokenizer that it is patched for.
        metrics: what ``Trainer`` measured.
        evaluations: as for :func:`gisting.card.card`, by the path of the data.
    """
    base, data = _named(recipe.model), _named(recipe.data or recipe.prompts)
    trained, total = metrics.get("num_trainable_parameters"), metrics.get("num_parameters")
    facts = {"base": base, "method": recipe.method}
    if trained is not None and total is not None:
        facts["trained parameters"] = f"{trained:,} of {total:,}"
    facts["versions"] = versions()
    is_on_hub = recipe.model is not None and is_repository_id(recipe.model) and not os.path.exists(recipe.model)
    shown = {name: value for name, value in metrics.items() if name == "train_loss" and math.isfinite(value)}
    settings = {**recipe.written({"num_gist_tokens"}), "model": base}
    for name in ("data", "prompts", "inputs"):
        if settings.get(name) is not None:
            settings[name] = _named(settings[name])
    if recipe.eval:
        settings["eval"] = ", ".join(map(_named, recipe.eval))
    text = checkpoint_card(
        model,
        tokenizer,
        Path(directory).resolve().name,
        data=data,
        metrics=shown,
        base_model=recipe.model if is_on_hub else None,
        facts=facts,
        settings=settings,
        evaluations={_named(path): rows for path, rows in (evaluations or {}).items()},
    )
    (Path(directory) / "README.md").write_text(text, encoding="utf-8")


def _named(name_or_path: str | None) -> str:
    """Name a checkpoint or data set: a path by its last part, a name on the hub as it is."""
    text = str(name_or_path or "")
    return Path(text).resolve().name if os.path.exists(text) else text
