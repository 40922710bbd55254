"""Alpaca+, the data of the Gisting paper (section 4.1), rebuilt from its three public sources.

Place in the flow: **data** -> collator. Stanford Alpaca and Self-Instruct provide the training records and two
validation splits; the human-written tasks of Self-Instruct provide the third. The rules and their order are the
published script's, so every split equals the published one record by record. Works on files, not on tokens.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gisting.data.records import Record, parse_json, to_record
from gisting.errors import RecordError

__all__ = ["SIZES", "SOURCES", "alpaca_plus", "read_source", "save_splits"]

#: The paper's sources, at the commits that it names.
SOURCES = {
    "alpaca": "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/f134962/alpaca_data.json",
    "self_instruct": (
        "https://raw.githubusercontent.com/yizhongw/self-instruct/a40887b/data/gpt3_generations/batch_221203/"
        "all_instances_82K.jsonl"
    ),
    "human": (
        "https://raw.githubusercontent.com/yizhongw/self-instruct/a40887b/human_eval/user_oriented_instructions.jsonl"
    ),
}
#: Number of records in each published split.
SIZES = {"train": 130_321, "validation_seen": 1_000, "validation_unseen": 1_000, "validation_human": 252}

_TIMEOUT_S = 60


def alpaca_plus(
    alpaca: list[Any], self_instruct: list[Any], human: list[Any], *, num_validation: int = 1_000
) -> dict[str, list[Record]]:
    """Divide the three sources into the four splits.

    - ``validation_seen``: the first example of each of the first ``num_validation`` Self-Instruct instructions that
      have several examples, the first of them with an input. Their other examples become training records.
    - ``validation_unseen``: the first ``num_validation`` Alpaca examples that have an input and whose instruction is
      not among the training records collected so far.
    - ``train``: the rest of Self-Instruct, grouped by instruction and without repeated pairs of instruction and input,
      followed by the rest of Alpaca unchanged.
    - ``validation_human``: every instance of the human-written tasks.

    Args:
        alpaca: objects with ``instruction``, ``input`` and ``output``.
        self_instruct: objects with the same fields.
        human: objects with ``instruction`` and ``instances``, each with ``input`` and ``output``.
        num_validation: maximum number of records in ``validation_seen`` and in ``validation_unseen``.

    Returns:
        The records of each split by its name.

    Raises:
        RecordError: an object is incomplete, or an instruction of ``validation_unseen`` occurs again after that split
            is full, so that it would also be trained on.
    """
    train: list[Record] = []
    seen: list[Record] = []
    unseen: list[Record] = []

    groups: dict[str, list[Record]] = {}
    for record in _records(self_instruct, "self_instruct"):
        groups.setdefault(record.instruction, []).append(record)
    taken: set[tuple[str, Any]] = set()
    for group in groups.values():
        if len(seen) < num_validation and len(group) > 1 and group[0].input:
            seen.append(group[0])
            taken.add((group[0].instruction, group[0].input))
            group = group[1:]
        for record in group:
            if (record.instruction, record.input) not in taken:
                taken.add((record.instruction, record.input))
                train.append(record)

    trained = {record.instruction for record in train}
    held_out: set[str] = set()
    for number, record in enumerate(_records(alpaca, "alpaca"), start=1):
        if len(unseen) < num_validation and record.input and record.instruction not in trained:
            unseen.append(record)
            held_out.add(record.instruction)
        elif record.instruction in held_out:
            raise RecordError(
                f"alpaca record {number} repeats the instruction {record.instruction!r} of validation_unseen, which "
                "would then also be trained on; use the published file, which has no such record"
            )
        else:
            train.append(record)
            trained.add(record.instruction)

    splits = {"train": train, "validation_seen": seen, "validation_unseen": unseen}
    return {**splits, "validation_human": _human(human)}


def read_source(where: str | Path) -> list[Any]:
    """Read the objects of one source: a JSON list, or one JSON object per line.

    Args:
        where: a path, or an ``http`` or ``https`` URL.

    Returns:
        The objects in the order of the file.

    Raises:
        RecordError: the source is not JSON, or the URL cannot be fetched.
        OSError: the file cannot be read.
    """
    where = str(where)
    if where.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(where, timeout=_TIMEOUT_S) as answer:
                data: bytes = answer.read()
        except (urllib.error.URLError, TimeoutError) as error:
            raise RecordError(f"{where} cannot be fetched ({error}); download it and pass its path instead") from error
    else:
        data = Path(where).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{where} is not UTF-8 ({error})") from error
    if text.lstrip()[:1] == "[":
        return parse_json(text, where)
    return [
        parse_json(line, f"{where}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def save_splits(splits: Mapping[str, list[Record]], directory: str | Path) -> dict[str, Path]:
    """Write each split to ``alpaca_plus_<split>.json``, in the published layout.

    Args:
        splits: the records of each split by its name.
        directory: where to write the files; created if missing.

    Returns:
        The path of each split's file by the split's name.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"alpaca_plus_{name}.json" for name in splits}
    for name, records in splits.items():
        paths[name].write_text(json.dumps([vars(record) for record in records], ensure_ascii=False), encoding="utf-8")
    return paths


def _records(items: list[Any], source: str) -> list[Record]:
    return [
        to_record({**item, "source": source} if isinstance(item, dict) else item, f"{source} record {number}")
        for number, item in enumerate(items, start=1)
    ]


def _human(items: list[Any]) -> list[Record]:
    found = []
    for number, item in enumerate(items, start=1):
        where = f"human task {number}"
        if not isinstance(item, dict) or not isinstance(item.get("instances"), list):
            raise RecordError(f"{where} must be an object with 'instruction' and a list of 'instances'")
        for instance in item["instances"]:
            whole = {**(instance if isinstance(instance, dict) else {}), "instruction": item.get("instruction")}
            found.append(to_record({**whole, "source": "self_instruct"}, where))
    return found
