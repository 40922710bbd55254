"""Instruction records and their files: ``{instruction, input, output}``, the Alpaca layout, as JSON or JSONL.

Place in the flow: **data** -> collator -> model. Works on files, not on tokens. Errors name the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gisting.errors import RecordError

__all__ = ["Record", "load_records", "parse_json", "save_records", "to_record"]


@dataclass(frozen=True)
class Record:
    """One example: an instruction (the prompt to compress), the input it applies to, and the answer.

    Deliberately not a dictionary: stock ``Trainer`` removes keys that ``model.forward`` does not name.

    Args:
        instruction: the prompt to compress; empty if nothing is compressed.
        input: what the instruction applies to; may be empty.
        output: the answer.
        source: where the record comes from, such as the split of a task; ignored by training.
    """

    instruction: str
    input: str
    output: str
    source: str = ""


def to_record(item: Record | Mapping[str, Any], where: str = "record", *, needs_instruction: bool = True) -> Record:
    """Convert a mapping with ``instruction``, ``output`` and, optionally, ``input`` and ``source`` to a record.

    Args:
        item: the mapping; a record is returned unchanged.
        where: how errors refer to the item, such as ``train.jsonl, line 3``.
        needs_instruction: whether the instruction must be there and not be empty.

    Returns:
        The record.

    Raises:
        RecordError: a field is missing, empty or not a string.
    """
    if isinstance(item, Record):
        _check_texts(vars(item), where)
        return item
    if not isinstance(item, Mapping):
        raise RecordError(f"{where} must be an object with instruction, input and output, got {type(item).__name__}")
    needed = ("instruction", "output") if needs_instruction else ("output",)
    for name in needed:
        if name not in item:
            hint = (
                "; stock Trainer removes these keys from dictionaries: pass load_records(...) or "
                "TrainingArguments(remove_unused_columns=False)"
                if not item
                else ""
            )
            raise RecordError(f"{where} has no {name!r}; it has {', '.join(map(repr, item)) or 'nothing'}{hint}")
    fields = {name: item[name] for name in needed}
    optional = (name for name in ("instruction", "input", "source") if name not in fields)
    fields |= {name: "" if item.get(name) is None else item[name] for name in optional}
    _check_texts(fields, where)
    if needs_instruction and not fields["instruction"].strip():
        raise RecordError(f"{where}: 'instruction' is empty; give the prompt that should be compressed")
    return Record(**fields)


def _check_texts(fields: Mapping[str, Any], where: str) -> None:
    for name, value in fields.items():
        if not isinstance(value, str):
            raise RecordError(f"{where}: {name!r} must be a string, got {type(value).__name__}")


def load_records(path: str | Path, *, needs_instruction: bool = True) -> list[Record]:
    """Read records from ``.jsonl`` (one object per line, empty lines skipped) or ``.json`` (a list of objects).

    Args:
        path: the file, UTF-8.
        needs_instruction: as for :func:`to_record`.

    Returns:
        The records in the order of the file.

    Raises:
        RecordError: the file is not JSON, has no records, or has an incomplete one; the message names file and line
            (or record number).
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise RecordError(f"{path} must end in .json or .jsonl")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not UTF-8 ({error})") from error
    if path.suffix == ".jsonl":
        items = [
            (f"{path}, line {number}", parse_json(line, f"{path}, line {number}"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    else:
        whole = parse_json(text, str(path))
        if not isinstance(whole, list):
            raise RecordError(
                f"{path} must contain a list of objects, got {type(whole).__name__}; a file with one object per line "
                "must be named .jsonl"
            )
        items = [(f"{path}, record {number}", item) for number, item in enumerate(whole, start=1)]
    if not items:
        raise RecordError(f"{path} contains no records")
    return [to_record(item, where, needs_instruction=needs_instruction) for where, item in items]


def save_records(records: Iterable[Record], path: str | Path) -> None:
    """Write records as JSONL, which :func:`load_records` reads.

    Args:
        records: the records, written in this order.
        path: the file, UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def parse_json(text: str, where: str) -> Any:
    """Parse JSON from a file written by a user.

    Args:
        text: the JSON.
        where: how errors refer to it.

    Returns:
        The parsed value.

    Raises:
        RecordError: ``text`` is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is not JSON ({error})") from error
