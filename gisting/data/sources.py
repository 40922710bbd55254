"""Files and data sets of records or prompts: JSON, JSON lines, CSV, Parquet, and data sets of the hub.

Place in the flow: **sources** -> records. Yields mappings and where they are, for messages; does not look into them.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gisting.errors import RecordError
from gisting.tokens.text import read_text

__all__ = ["LINES", "SUFFIXES", "parse_json", "read_items"]

#: Suffixes of files with one JSON object per line.
LINES = (".jsonl", ".ndjson")
#: Suffixes of all files that are read.
SUFFIXES = (".json", *LINES, ".csv", ".tsv", ".parquet")
# As the hub names repositories, with an optional split such as train[:1000].
_DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+(:.+)?")


def read_items(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Read the items of a file or data set.

    Args:
        source: a file whose name ends in one of ``SUFFIXES``, in capitals or not; a directory that
            ``datasets.Dataset.save_to_disk`` wrote; or a data set on the Hugging Face hub, ``org/name`` or
            ``org/name:split`` (``train`` by default). Data sets and Parquet files need the ``train`` extra.

    Yields:
        Where each item is, such as ``train.jsonl, line 3``, and the item.

    Raises:
        RecordError: the source cannot be read as what it is; the message names file and line.
        OSError: the file cannot be read.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _numbered(str(path), _saved_dataset(path))
    elif not path.exists() and suffix not in SUFFIXES and _DATASET_ID.fullmatch(str(source)):
        name, _, split = str(source).partition(":")
        yield from _numbered(
            name, _datasets(str(source), lambda library: library.load_dataset(name, split=split or "train"))
        )
    elif suffix in LINES:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", parse_json(line, f"{path}, line {number}")
    elif suffix == ".json":
        whole = parse_json(read_text(path), str(path))
        if not isinstance(whole, list):
            raise RecordError(
                f"{path} must contain a list of objects, got {type(whole).__name__}; a file with one object per line "
                "must be named .jsonl"
            )
        yield from _numbered(str(path), whole)
    elif suffix in (".csv", ".tsv"):
        yield from _rows(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        path.stat()  # a missing file is the same error as for the other kinds
        how = {"data_files": str(path), "split": "train", "streaming": True}  # a stream leaves nothing in the cache
        yield from _numbered(str(path), _datasets(str(path), lambda library: [*library.load_dataset("parquet", **how)]))
    else:
        path.stat()
        raise RecordError(f"{path} must end in one of {', '.join(SUFFIXES)}, which says how to read it; rename it")


def _numbered(name: str, items: Any) -> Iterator[tuple[str, Any]]:
    for number, item in enumerate(items, start=1):
        yield f"{name}, record {number}", item


def _rows(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Read the rows of a table, every cell as the text that it is."""
    reader = csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise RecordError(
                    f"{where} has not as many cells as the first line, {len(reader.fieldnames or ())}; put cells with "
                    "a separator or a line end into double quotes"
                )
            yield where, row
    except csv.Error as error:
        raise RecordError(
            f"{path}, line {reader.line_num + 1} is not a row of a table ({error}); correct it"
        ) from error


def _saved_dataset(path: Path) -> Any:
    found = _datasets(str(path), lambda library: library.load_from_disk(str(path)))
    if isinstance(found, dict):
        raise RecordError(
            f"{path} has several splits, {', '.join(map(str, found))}; give the directory of one, such as "
            f"{path / str(next(iter(found)))}"
        )
    return found


def _datasets(source: str, load: Any) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise RecordError(
            f"{source} is read with the package datasets, which is not installed; run: pip install 'gist-tokens[train]'"
        ) from error
    try:
        return load(datasets)
    except (OSError, ValueError, DatasetsError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RecordError(
            f"{source} is neither a file nor a data set that can be loaded ({reason}); check the name, or load it with "
            "the package datasets and pass the object"
        ) from error


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
