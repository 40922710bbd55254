"""Instruction records: ``{instruction, input, output}``, the Alpaca layout, or conversations.

Place in the flow: sources -> **records** -> collator -> model. Works on texts, not on tokens. Errors name the file and
the line.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gisting.data.messages import Messages, TokenizerSource, as_instructions, is_messages
from gisting.data.sources import parse_json, read_items
from gisting.errors import RecordError
from gisting.tokens.text import text_fault

__all__ = [
    "Record",
    "load_records",
    "parse_json",
    "records_of",
    "rows_of",
    "save_records",
    "say_shared",
    "to_record",
    "to_records",
]

_log = logging.getLogger(__name__)
# What a column of a data set can be taken for.
_FIELDS = ("instruction", "input", "output", "messages", "tools")


@dataclass(frozen=True)
class Record:
    """One example: an instruction (the prompt to compress), the input it applies to, and the answer.

    Deliberately not a dictionary: stock ``Trainer`` removes keys that ``model.forward`` does not name.

    Args:
        instruction: the prompt to compress; empty if nothing is compressed.
        input: what the instruction applies to; may be empty. A list of messages, kept as ``Messages``, if the answer
            is one of a conversation: what came before it, without the prompt. The template ``"chat"`` lays it out.
        output: the answer.
        source: where the record comes from, such as the split of a task; ignored by training.
    """

    instruction: str
    input: str | Messages
    output: str
    source: str = ""

    def __post_init__(self) -> None:
        """Keep messages in a form that can be looked up."""
        if not isinstance(self.input, str) and is_messages(self.input):
            object.__setattr__(self, "input", Messages(self.input))


def to_record(item: Record | Mapping[str, Any], where: str = "record", *, needs_instruction: bool = True) -> Record:
    """Convert a mapping to one record, as :func:`records_of` does.

    Args:
        item: the mapping; a record is returned unchanged.
        where: how errors refer to the item, such as ``train.jsonl, line 3``.
        needs_instruction: whether the instruction must be there and not be empty.

    Returns:
        The record.

    Raises:
        RecordError: as :func:`records_of`, or a conversation has several answers.
    """
    found = records_of(item, where, needs_instruction=needs_instruction)
    if len(found) > 1:
        raise RecordError(f"{where} is a conversation of {len(found)} answers, each of which is a record; give one")
    return found[0]


def records_of(
    item: Record | Mapping[str, Any],
    where: str = "record",
    *,
    needs_instruction: bool = True,
    tokenizer: TokenizerSource | None = None,
) -> list[Record]:
    """Convert a mapping with ``instruction``, ``output`` and, optionally, ``input`` and ``source``, or a conversation.

    Args:
        item: the mapping; a record is returned unchanged. A conversation will do as well, as ``messages``, as
            ``conversations`` of ShareGPT, or as ``prompt`` and ``completion``: its system message is the instruction,
            and each of its answers the output of a record whose input is what came before. With ``tools``, the
            instruction is what stands for both (:meth:`GistTokenizer.prompt_with_tools`).
        where: how errors refer to the item, such as ``train.jsonl, line 3``.
        needs_instruction: whether the instruction must be there and not be empty.
        tokenizer: lays out tools and calls of tools; not needed without them.

    Returns:
        The record, or one for each answer of a conversation, in their order.

    Raises:
        RecordError: a field is missing, empty or not a text, or a conversation cannot be read.
    """
    if isinstance(item, Record):
        _check_texts(vars(item), where)
        return [item]
    if not isinstance(item, Mapping):
        raise RecordError(f"{where} must be an object with instruction, input and output, got {type(item).__name__}")
    rows = as_instructions(item, where, needs_instruction=needs_instruction, tokenizer=tokenizer)
    return [_record(row, where, needs_instruction) for row in rows]


def _record(item: Mapping[str, Any], where: str, needs_instruction: bool) -> Record:
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
        text = value
        if name == "input" and is_messages(value):
            try:
                text = json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError) as error:
                raise RecordError(f"{where}: 'input' has messages that are no JSON ({error})") from error
        if not isinstance(text, str):
            raise RecordError(f"{where}: {name!r} must be a string, got {type(value).__name__}")
        if (fault := text_fault(text)) is not None:
            raise RecordError(f"{where}: {name!r} {fault}")


def load_records(
    source: str | Path,
    *,
    needs_instruction: bool = True,
    columns: Mapping[str, str] | None = None,
    tokenizer: TokenizerSource | None = None,
) -> list[Record]:
    """Read records from a file or data set.

    Args:
        source: a file whose name says what it is: ``.json`` (a list of objects), ``.jsonl`` or ``.ndjson`` (one object
            per line), ``.csv``, ``.tsv`` or ``.parquet``; a directory that ``datasets.Dataset.save_to_disk`` wrote; or
            a data set on the Hugging Face hub, ``org/name`` or ``org/name:split`` (``train`` by default). Data sets and
            Parquet files need the ``train`` extra.
        needs_instruction: as for :func:`records_of`.
        columns: what columns are called there: ``{"instruction": "question", "output": "answer"}``. Names are
            ``instruction``, ``input``, ``output``, ``messages`` and ``tools``.
        tokenizer: the tokenizer of the model that the records are for, or a function that loads it; needed for
            conversations with tools.

    Returns:
        The records in their order, one for each answer of a conversation.

    Raises:
        RecordError: the source cannot be read as what it is, has no records, or has an incomplete one; the message
            names file and line (or record number).
        OSError: the file cannot be read.
    """
    renamed = dict(columns or {})
    if unknown := renamed.keys() - {*_FIELDS}:
        raise RecordError(f"columns must name {', '.join(_FIELDS)}, got {', '.join(sorted(unknown))}")
    found = []
    for where, item in read_items(source):
        if renamed and isinstance(item, Mapping):
            item = _renamed(item, renamed, where)
        found += records_of(item, where, needs_instruction=needs_instruction, tokenizer=tokenizer)
    if not found:
        raise RecordError(f"{source} contains no records")
    return found


def _renamed(item: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    for name, column in columns.items():
        if column not in item:
            raise RecordError(
                f"{where} has no column {column!r} for {name!r}; it has {', '.join(map(repr, item)) or 'nothing'}"
            )
    others = {name: value for name, value in item.items() if name not in (*_FIELDS, *columns.values())}
    kept = {name: item[name] for name in _FIELDS if name in item and name not in columns.values()}
    return {**others, **kept, **{name: item[column] for name, column in columns.items()}}


def rows_of(records: Any) -> Iterable[Any]:
    """Return ``records`` unless it is something else that can be iterated over.

    Args:
        records: a list of records or mappings, a ``datasets.Dataset``, or another iterable of them.

    Raises:
        RecordError: it is a path, or has several splits, as a ``datasets.DatasetDict``.
    """
    if isinstance(records, str | Path):
        raise RecordError(f"records must be records, got the path {str(records)!r}; read it: load_records(path)")
    if isinstance(records, Mapping):
        raise RecordError(
            f"records must be a list or a data set, got a {type(records).__name__} of {', '.join(map(str, records))}; "
            f"pass one of them: records[{next(iter(records), 'train')!r}]"
        )
    return records


def to_records(
    records: Iterable[Record | Mapping[str, Any]],
    tokenizer: TokenizerSource | None = None,
    where: str = "record {}",
    *,
    needs_instruction: bool = True,
) -> list[Record]:
    """Convert what a caller gave as records.

    Args:
        records: as for :func:`rows_of`.
        tokenizer: as for :func:`records_of`.
        where: how errors refer to record 3: ``where.format(3)``.
        needs_instruction: as for :func:`records_of`.

    Raises:
        RecordError: as :func:`rows_of` and :func:`records_of`.
    """
    how: dict[str, Any] = {"needs_instruction": needs_instruction, "tokenizer": tokenizer}
    return [
        row for number, record in enumerate(rows_of(records)) for row in records_of(record, where.format(number), **how)
    ]


def say_shared(records: Iterable[Record], held_out: Sequence[Record], name: str) -> int:
    """Warn in the log about records of an evaluation that are also trained on, with the same instruction and input.

    Args:
        records: the records that are trained on.
        held_out: the records that are evaluated.
        name: what the log calls them.

    Returns:
        The number of them.
    """
    trained = {(record.instruction, record.input) for record in records}
    number = sum((record.instruction, record.input) in trained for record in held_out)
    if number:
        _log.warning(
            "%d of %d records of %s are also trained on, so scores on it do not show what the model makes of new ones; "
            "take them out of one of the two",
            number,
            len(held_out),
            name,
        )
    return number


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
