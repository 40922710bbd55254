"""What a run leaves on the disk while it goes on: settings, weights of a finished stage, lines for people to read.

Place in the flow: below the loop over stages. Everything is written whole or not at all, so that what a killed process
left can be trusted. Knows files and weights; knows no stage.
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
from gisting.internalize.result import write_json
from gisting.models import adapters
from gisting.storage import write_atomically
from gisting.tokens import GistTokenizer

__all__ = [
    "ANSWERS_NAME",
    "DATA_NAME",
    "EVAL_NAME",
    "SETTINGS_NAME",
    "STAGE_NAME",
    "TRAINING_NAME",
    "check_directory",
    "read_answers",
    "read_records",
    "read_template",
    "records_hash",
    "restore_model",
    "save_model",
    "write_lines",
    "write_records",
]

SETTINGS_NAME = "settings.json"
TRAINING_NAME = "training.json"  # beside the weights of a stage
# The lines and the template of a stage, in its directory.
STAGE_NAME, DATA_NAME, EVAL_NAME, ANSWERS_NAME = "stage.json", "data.jsonl", "eval.jsonl", "answers.jsonl"
_FIELDS = ("instruction", "input", "output")


def check_directory(output: Path, settings: dict[str, Any], resume: bool, *, is_adapter: bool) -> None:
    """Raise unless the output directory is this run's, or free.

    Args:
        output: the directory.
        settings: all that decides the run; JSON.
        resume: whether there must be a run with the same settings; otherwise there must be none.
        is_adapter: whether an adapter is to be saved in it.

    Raises:
        GistError: there is another run, or none to resume, or a checkpoint of something else.
    """
    path = output / SETTINGS_NAME
    if not resume:
        if path.exists():
            raise GistError(
                f"{output} holds an internalisation already; go on with resume=True, or give another directory"
            )
        if is_adapter:
            adapters.check_directory(output)
        elif (output / "config.json").exists():
            raise GistError(f"{output} holds a checkpoint, which would be lost; give another directory")
        return
    if not path.exists():
        raise GistError(f"{output} holds nothing to resume from; start without resume")
    found, wanted = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    differences = [f"{name} was {was}, is {now}" for name, was, now in _differences(found, wanted)]
    if differences:
        raise GistError(
            f"{output} was begun with other settings: {'; '.join(differences)}; take those, or another directory"
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
    """Write a checkpoint that ``gisting.load`` reads, or the model's adapter alone.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        directory: where to.
        training: what is to be said of it; then the directory is made whole or not at all, and must not be there.
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
    """Put weights that :func:`save_model` wrote into a model, in place: a compressor may hold it.

    Args:
        model: the one that they were trained from, with or without an adapter.
        directory: where they lie.
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
    """Write ``records``, what a stage asks, to ``path``, an object a line; an instruction may be empty."""
    write_lines(path, [{name: getattr(record, name) for name in _FIELDS} for record in records])


def read_records(path: Path) -> list[Record] | None:
    """What :func:`write_records` wrote to ``path``; None where there is no file."""
    if not path.exists():
        return None
    # Of an answer, U+2028 is a part: only this ends a line.
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_template(directory: Path) -> str:
    """The template as a stage read it.

    Args:
        directory: of the stage.

    Raises:
        GistError: it cannot be read.
    """
    with _in_words(directory / STAGE_NAME) as path:
        return json.loads(path.read_text(encoding="utf-8"))["template"]


def read_answers(directory: Path, condition: str) -> tuple[list[str], list[str]]:
    """What was said after a stage.

    Args:
        directory: of the stage.
        condition: under which it was asked, such as ``"no-prompt"``.

    Returns:
        Answers, and the references, in the order of the evaluation records.

    Raises:
        GistError: it cannot be read, or was not asked so.
    """
    with _in_words(directory / ANSWERS_NAME) as path:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [line[condition] for line in lines], [line["output"] for line in lines]


@contextmanager
def _in_words(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GistError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def write_lines(path: Path, items: Sequence[Mapping[str, Any]]) -> None:
    """Write ``path`` with an object of ``items`` on each line, whole or not at all."""
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    write_atomically(path, text.encode())


def records_hash(records: Sequence[Record]) -> str:
    """SHA-256 over queries and answers of ``records``, in hex."""
    rows = [[record.input, record.output] for record in records]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
