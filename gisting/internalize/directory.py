"""The files of a run in progress: its settings, the weights of a finished stage, and lines for people to read.

Place in the flow: below the loop over stages. Everything is written atomically, so that the files of a killed process
can be trusted. Reads and writes files and weights; independent of what a stage does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gisting.data.records import Record
from gisting.errors import GistError
from gisting.internalize.result import with_current_names, write_json
from gisting.models import adapters
from gisting.storage import write_atomically
from gisting.tokens import GistTokenizer

__all__ = [
    "ANSWERS_NAME",
    "DATA_NAME",
    "EVAL_NAME",
    "SETTINGS_NAME",
    "STAGE_NAME",
    "STUDY_NAME",
    "TRAINING_NAME",
    "check_directory",
    "read_answers",
    "read_prompt",
    "read_records",
    "records_hash",
    "restore_model",
    "save_model",
    "write_lines",
    "write_records",
]

SETTINGS_NAME = "settings.json"
TRAINING_NAME = "training.json"  # next to the weights of a stage
# The prompt and the lines of a stage, in its directory.
STAGE_NAME, DATA_NAME, EVAL_NAME, ANSWERS_NAME = "stage.json", "data.jsonl", "eval.jsonl", "answers.jsonl"
# Directory of what was written and sampled for a method without stages; its STAGE_NAME has the whole prompt.
STUDY_NAME = "study"
_FIELDS = ("instruction", "input", "output")


def check_directory(output: Path, settings: dict[str, Any], resume: bool, *, is_adapter: bool) -> None:
    """Raise unless the output directory is free, or holds the run to be resumed.

    Args:
        output: the directory.
        settings: everything that determines the run; JSON.
        resume: whether the directory must hold a run with the same settings; otherwise it must hold none.
        is_adapter: whether an adapter will be saved in it.

    Raises:
        GistError: the directory holds another run, no run to resume, or another checkpoint.
    """
    path = output / SETTINGS_NAME
    if not resume:
        if path.exists():
            raise GistError(
                f"{output} already holds an internalisation; continue it with resume=True, or use another directory"
            )
        if is_adapter:
            adapters.check_directory(output)
        elif (output / "config.json").exists():
            raise GistError(f"{output} holds a checkpoint, which would be overwritten; use another directory")
        return
    if not path.exists():
        raise GistError(f"{output} holds nothing to resume; start without resume")
    found = with_current_names(json.loads(path.read_text(encoding="utf-8")))
    wanted = json.loads(json.dumps(settings))
    differences = [f"{name} was {was}, is {now}" for name, was, now in _differences(found, wanted)]
    if differences:
        raise GistError(
            f"{output} was started with other settings: {'; '.join(differences)}; use those, or another directory"
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    differences = []
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        was, now = found.get(name), wanted.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            differences += _differences(was, now)
        elif was != now:
            differences.append((name, was, now))
    return differences


def save_model(model: Any, tokenizer: GistTokenizer, directory: Path, training: dict[str, Any] | None = None) -> None:
    """Write a checkpoint that ``gisting.load`` can read, or only the model's adapter.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        directory: the output directory.
        training: contents of a file about the training; with it the directory is written atomically and must not exist.
    """
    target = directory if training is None else directory.with_name(f".{directory.name}.tmp")
    if training is not None:
        shutil.rmtree(target, ignore_errors=True)
    if adapters.adapter_of(model) is None:
        model.save_pretrained(target)
    else:
        adapters.save(model, tokenizer, target)
    tokenizer.save_pretrained(target)
    if training is not None:
        write_json(target / TRAINING_NAME, training)
        target.rename(directory)


def restore_model(model: Any, directory: Path) -> None:
    """Load weights that :func:`save_model` wrote into a model, in place, because a shortener may refer to the model.

    Args:
        model: the model that was trained, with or without an adapter.
        directory: the directory with the weights.
    """
    if adapters.read_about(directory) is not None:
        if adapters.adapter_of(model) is not None:
            adapters.detach(model)
        adapters.load(model, directory)
        return
    saved = type(model).from_pretrained(directory, dtype=model.dtype)
    with torch.no_grad():
        model.load_state_dict(saved.state_dict())
    model.config.gist = saved.config.gist


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write the ``records`` of a stage to ``path``, one object per line; an instruction may be empty."""
    write_lines(path, [{name: getattr(record, name) for name in _FIELDS} for record in records])


def read_records(path: Path) -> list[Record] | None:
    """Read what :func:`write_records` wrote to ``path``; None if there is no file."""
    if not path.exists():
        return None
    # str.splitlines would also split at U+2028, which an answer may contain.
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_prompt(directory: Path) -> str:
    """Read the prompt of a stage, without examples.

    Args:
        directory: the stage's directory.

    Raises:
        GistError: it cannot be read.
    """
    with _naming_errors(directory / STAGE_NAME) as path:
        about = json.loads(path.read_text(encoding="utf-8"))
        return about["template"] if "template" in about else about["prompt"]  # the former in runs of format 1


def read_answers(directory: Path, condition: str) -> tuple[list[str], list[str]]:
    """Read the answers after a stage.

    Args:
        directory: the stage's directory.
        condition: the condition of the requests, such as ``"no-prompt"``.

    Returns:
        Answers and references, in the order of the evaluation records.

    Raises:
        GistError: they cannot be read, or there are none under this condition.
    """
    with _naming_errors(directory / ANSWERS_NAME) as path:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [line[condition] for line in lines], [line["output"] for line in lines]


@contextmanager
def _naming_errors(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GistError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def write_lines(path: Path, items: Sequence[Mapping[str, Any]]) -> None:
    """Write ``items`` to ``path`` atomically, one object per line."""
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    write_atomically(path, text.encode())


def records_hash(records: Sequence[Record], *, with_instructions: bool = False) -> str:
    """Compute the SHA-256 of the queries and answers of ``records``, in hex; with their instructions if these count."""
    rows = [[*([one.instruction] if with_instructions else []), one.input, one.output] for one in records]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
