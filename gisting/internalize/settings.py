"""Declare the settings of an internalisation in one table.

The options of ``gisting internalize``, the keys of a recipe file and the keyword arguments of
:func:`gisting.internalize.stages.internalize` come from it.

Place in the flow: above :mod:`gisting.settings`; below the loop over stages and the command line. Importing this module
imports neither torch nor transformers, because ``gisting --help`` must stay quick.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from gisting.settings import (
    COUNT,
    NOT_NEGATIVE,
    PATH,
    TEXT,
    WHOLE,
    Kind,
    Settings,
    checked,
    choice,
    is_whole,
    read_yaml,
    setting,
)
from gisting.tokens import TEMPLATES
from gisting.train.settings import COLUMNS, TrainerSettings

__all__ = ["METHODS", "SHORTENERS", "WEIGHTS", "InternalizeSettings", "StageSettings"]

#: Ways to teach a model its prompt.
METHODS = ("stages", "on-policy", "self-study")
#: What can be trained.
WEIGHTS = ("full", "lora")
#: Names of shorteners in settings.
SHORTENERS = ("none", "self-information", "llmlingua2", "rewrites")
_METRICS = ("exact_match", "bleu", "rouge_l")
_TEMPLATES = (*TEMPLATES, "chat")


def _tails() -> Collection[str]:
    from gisting.internalize.plan import TAILS

    return TAILS


def _controls() -> Collection[str]:
    from gisting.internalize.plan import CONTROLS

    return CONTROLS


def _read_control(value: Any) -> str:
    from gisting.internalize.plan import current_control

    name = current_control(value)
    return checked(name, name in _controls())


_CONTROL = Kind(lambda: f"one of {', '.join(_controls())}", _read_control)
_STAGES = Kind("a whole number of at least 2", lambda value: checked(value, is_whole(value) and value >= 2), int)
_TEMPLATE = Kind(
    f"one of {', '.join(_TEMPLATES)} (the prompt to internalise is another setting, prompt_file: --prompt-file FILE)",
    lambda value: checked(value, value in _TEMPLATES),
)


@dataclass(frozen=True, kw_only=True)
class StageSettings(Settings):
    """What the stages read and how they are evaluated.

    These are the keyword arguments of :func:`gisting.internalize.stages.internalize` that are numbers and names.

    Raises:
        GistError: a value is not of its setting's kind.
    """

    method: str = setting(
        choice(*METHODS),
        "stages",
        "How the prompt is taught: stages; on-policy (the model answers bare queries, and is corrected by itself with "
        "the prompt in view); or self-study (it asks itself about the prompt).",
    )
    num_questions: int | None = setting(
        WHOLE,
        None,
        "Questions about the prompt that the model writes itself, for on-policy and self-study.",
        "--questions",
        shown_default="256, or 0 for on-policy with --data",
    )
    temperature: float = setting(
        NOT_NEGATIVE, 1.0, "Temperature of the answers that are sampled to learn from, for on-policy and self-study."
    )
    max_examples: int = setting(
        WHOLE, 0, "Most similar training records in a full prompt; fewer with each stage.", "--examples"
    )
    tail: str = setting(choice(_tails), "none", "What is left after the last stage: none, or gist (k tokens).")
    num_gist_tokens: int = setting(COUNT, 1, "Gist tokens, with --tail gist.", "--num-gist-tokens", "-k")
    num_gist_stages: int = setting(COUNT, 1, "Stages that read a gist, with --tail gist.", "--gist-stages")
    control: str | None = setting(
        _CONTROL, None, "Instead of the stages, one stage with all steps: bare, full, full-run-bare or shortened."
    )
    control_share: float | None = setting(
        NOT_NEGATIVE, None, "Kept share of the prompt, with --control shortened.", "--share"
    )
    max_length: int = setting(
        COUNT, 512, "Longest request with its answer, in tokens; examples are dropped until it fits."
    )
    max_target_length: int = setting(COUNT, 256, "Longest answer of an encoder-decoder, in tokens.")
    max_new_tokens: int = setting(COUNT, 128, "Longest sampled answer, in the evaluation and to learn from, in tokens.")


@dataclass(frozen=True, kw_only=True)
class _WhatIsInternalized(Settings):
    model: str | None = setting(
        TEXT, None, "Directory of a checkpoint, or a repository on the Hugging Face hub.", is_argument=True
    )
    prompt_file: str | None = setting(PATH, None, "Text file with the prompt with which every request would begin.")
    data: str | None = setting(
        PATH,
        None,
        "Training records, with input (the query) and output or with messages: a .json, .jsonl, .csv or .parquet file, "
        "or a data set on the hub; instructions and system messages are not read.",
    )
    columns: Mapping[str, str] | None = setting(
        COLUMNS, None, "What columns of the records are called, such as input=question,output=answer."
    )
    edits: str | None = setting(
        PATH,
        None,
        "Records with edited versions of the prompt as instructions, for --tail gist, whose gist carries what differs.",
    )
    eval: str | None = setting(PATH, None, "Records to answer after each stage, bare and with the stage's prompt.")
    output: str | None = setting(PATH, None, "Directory for the checkpoint and the files of each stage.")
    template: str | None = setting(
        _TEMPLATE,
        None,
        "Template of a conversation: alpaca, alpaca-t5, plain or chat.",
        shown_default="the one that the checkpoint was trained with",
    )
    stages: int = setting(_STAGES, 4, "Number of stages.")
    schedule: str = setting(
        TEXT,
        "linear",
        "Kept share of the prompt in each stage: linear, exponential, inverse, or shares such as 1,0.6,0.3,0.",
    )
    shortener: str | None = setting(
        choice(*SHORTENERS),
        None,
        "What shortens the prompt: none, self-information, llmlingua2 or rewrites.",
        shown_default="none, or rewrites if they are given",
    )
    rewrites: str | None = setting(
        PATH, None, 'JSON file with shorter prompts by their share: {"0.6": "...", "0.3": "..."}.'
    )
    min_answer_words: int = setting(
        COUNT,
        4,
        "Examples never have nearly the same answer as the record, unless the answer has fewer words than this. Use 1 "
        "for short texts such as commands, as opposed to labels.",
    )
    weights: str = setting(choice(*WEIGHTS), "full", "What is trained: full (every weight) or lora (an adapter).")
    lora_rank: int = setting(COUNT, 16, "Rank of the adapter, with --weights lora.")
    metric: str = setting(choice(*_METRICS), "exact_match", "Score of the answers: exact_match, bleu or rouge_l.")


@dataclass(frozen=True, kw_only=True)
class InternalizeSettings(TrainerSettings, StageSettings, _WhatIsInternalized):
    """All settings of a run, as ``gisting internalize --help`` lists them.

    None means the published value for the model's kind, or "not given". Steps, epochs and batches are counted over all
    stages together.

    Raises:
        GistError: a value is not of its setting's kind, or two settings cannot be combined.
    """

    old_names: ClassVar = {
        "compressor": "shortener",
        "layout": "template",
        "examples": "max_examples",
        "gist_stages": "num_gist_stages",
        "share": "control_share",
    }

    def __post_init__(self) -> None:
        if self.method in WEIGHTS:  # in earlier versions, method was the setting that is called weights now
            warnings.warn(f"method {self.method} is now called weights {self.method}", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "weights", self.method)
            object.__setattr__(self, "method", "stages")
        super().__post_init__()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read settings from a YAML file; in files of version 0.1, ``template`` is the file with the prompt.

        Args:
            path: the file, in UTF-8.

        Raises:
            GistError: the file is not such a mapping, or a key or value is wrong; file, line and key are named.
            OSError: the file cannot be read.
        """
        values, _ = read_yaml(path)
        is_old = "prompt_file" not in values and values.get("template") not in (None, *_TEMPLATES)
        if cls is InternalizeSettings and is_old:
            return _SettingsOfVersion01.load(path)  # pyright: ignore[reportReturnType]
        return super().load(path)


class _SettingsOfVersion01(InternalizeSettings):
    # The prompt's file was called template, and the template was called layout.
    old_names: ClassVar = {"template": "prompt_file", **InternalizeSettings.old_names}
