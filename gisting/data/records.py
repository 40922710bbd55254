"""Instruction records and their files: ``{instruction, input, output}``, the Alpaca layout, as JSON or JSONL.

Place in the flow: **data** -> collator -> model. Knows files and nothing of tokens. A bad record is named by file and
line.
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
    """One example: what is asked (the prompt that will be compressed), what it is asked of, and the answer.

    Not a dictionary on purpose: stock ``Trainer`` strips dictionaries of the keys that ``model.forward`` does not name.

    Args:
        instruction: what is asked; empty where nothing is compressed.
        input: what it is asked of; may be empty.
        output: the answer.
        source: where it comes from, such as the split of a task; read by nobody that trains.
    """

    instruction: str
    input: str
    output: str
    source: str = ""


def to_record(item: Record | Mapping[str, Any], where: str = "record", *, needs_instruction: bool = True) -> Record:
    """A record from a mapping with ``instruction``, ``output`` and, where there is one, ``input``.

    Args:
        item: the mapping, or a record, which is returned as it is.
        where: what an error calls it, such as ``train.jsonl, line 3``.
        needs_instruction: False where it is not read, and may be missing or empty.

    Raises:
        RecordError: a field is missing, empty or no text.
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
                "; stock Trainer removes such keys from dictionaries: pass load_records(...) or "
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
        raise RecordError(f"{where}: 'instruction' is empty; it is the prompt that is to be compressed")
    return Record(**fields)


def _check_texts(fields: Mapping[str, Any], where: str) -> None:
    for name, value in fields.items():
        if not isinstance(value, str):
            raise RecordError(f"{where}: {name!r} must be a text, got {type(value).__name__}")


def load_records(path: str | Path, *, needs_instruction: bool = True) -> list[Record]:
    """Read ``.jsonl`` (one object a line, empty lines skipped) or ``.json`` (a list of objects).

    Args:
        path: the file, UTF-8.
        needs_instruction: as for :func:`to_record`.

    Returns:
        The records in the file's order.

    Raises:
        RecordError: a line is not JSON, or a record is not complete; file and line (or number) are named.
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
                f"{path} must hold a list of objects, got {type(whole).__name__}; one object a line goes in a .jsonl "
                "file"
            )
        items = [(f"{path}, record {number}", item) for number, item in enumerate(whole, start=1)]
    if not items:
        raise RecordError(f"{path} holds no record")
    return [to_record(item, where, needs_instruction=needs_instruction) for where, item in items]


def save_records(records: Iterable[Record], path: str | Path) -> None:
    """Write records as JSONL, an object a line.

    Args:
        records: written in their order.
        path: the file, UTF-8, which :func:`load_records` reads.

    Raises:
        OSError: the file cannot be written.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def parse_json(text: str, where: str) -> Any:
    """What ``text``, the JSON of a file that a person wrote, says.

    Raises:
        RecordError: it is not JSON; ``where`` says what a message calls it.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is not JSON ({error})") from error
