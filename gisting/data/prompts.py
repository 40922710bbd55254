"""Files of prompts to compress: one per line, as text or as JSON.

Place in the flow: **data** -> store. Works on files, not on tokens. Errors name the file and the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gisting.data.records import parse_json
from gisting.errors import RecordError

__all__ = ["PromptRecord", "load_prompts"]


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to compress.

    Args:
        prompt: its text.
        name: its name in a store; None if the file gives none.
        num_gist_tokens: k; None if the file gives none.
    """

    prompt: str
    name: str | None = None
    num_gist_tokens: int | None = None


def load_prompts(path: str | Path) -> list[PromptRecord]:
    """Read the prompts of a file.

    A ``.jsonl`` file has one object per line, with ``prompt`` and optionally ``name`` and ``num_gist_tokens``. Any
    other file has one prompt per line. Empty lines are skipped.

    Args:
        path: the file, UTF-8.

    Returns:
        The prompts in the order of the file.

    Raises:
        RecordError: a line is not such an object, a prompt is empty, a name occurs twice, or the file has no prompt.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not UTF-8 text ({error})") from error
    found = []
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _from_json(line, where) if path.suffix == ".jsonl" else PromptRecord(line.strip())
        if record.name is not None:
            if record.name in names:
                raise RecordError(
                    f"{where}: name {record.name!r} is already used on line {names[record.name]}; choose another"
                )
            names[record.name] = number
        found.append(record)
    if not found:
        raise RecordError(f"{path} contains no prompts; write one per line")
    return found


def _from_json(line: str, where: str) -> PromptRecord:
    item = parse_json(line, where)
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or not item["prompt"].strip():
        raise RecordError(
            f"{where} must be an object with a non-empty string 'prompt' and, optionally, 'name' and 'num_gist_tokens'"
        )
    unknown = item.keys() - {"prompt", "name", "num_gist_tokens"}
    if unknown:
        raise RecordError(
            f"{where} has unknown keys {', '.join(sorted(unknown))}; known are prompt, name and num_gist_tokens"
        )
    name, k = item.get("name"), item.get("num_gist_tokens")
    if name is not None and not isinstance(name, str):
        raise RecordError(f"{where}: 'name' must be a string, got {name!r}")
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise RecordError(f"{where}: 'num_gist_tokens' must be a whole number of at least 1, got {k!r}")
    return PromptRecord(item["prompt"], name, k)
