"""Files of prompts to compress: one a line, as text or as JSON.

Place in the flow: **data** -> store. Knows files and nothing of tokens. A bad line is named by file and number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gisting.data.records import parse_json
from gisting.errors import RecordError

__all__ = ["PromptRecord", "load_prompts"]


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to compress; None where the file does not say.

    Args:
        prompt: its text.
        name: what it is called in a store, or None.
        num_gist_tokens: k, or None.
    """

    prompt: str
    name: str | None = None
    num_gist_tokens: int | None = None


def load_prompts(path: str | Path) -> list[PromptRecord]:
    """Read prompts: from ``.jsonl`` objects with ``prompt`` and, where wanted, ``name`` and ``num_gist_tokens``; from
    any other file a prompt a line. Empty lines are skipped.

    Args:
        path: the file, UTF-8.

    Returns:
        The prompts, in their order.

    Raises:
        RecordError: a line is no such object, a prompt is empty, a name comes twice, or there is no prompt at all.
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
                raise RecordError(f"{where}: name {record.name!r} is that of line {names[record.name]}; give another")
            names[record.name] = number
        found.append(record)
    if not found:
        raise RecordError(f"{path} holds no prompt; write one on each line")
    return found


def _from_json(line: str, where: str) -> PromptRecord:
    item = parse_json(line, where)
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or not item["prompt"].strip():
        raise RecordError(f"{where} must be an object with a text 'prompt' and may have 'name' and 'num_gist_tokens'")
    unknown = item.keys() - {"prompt", "name", "num_gist_tokens"}
    if unknown:
        raise RecordError(f"{where} has {', '.join(sorted(unknown))}; known are prompt, name, num_gist_tokens")
    name, k = item.get("name"), item.get("num_gist_tokens")
    if name is not None and not isinstance(name, str):
        raise RecordError(f"{where}: 'name' must be a text, got {name!r}")
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise RecordError(f"{where}: 'num_gist_tokens' must be a whole number of at least 1, got {k!r}")
    return PromptRecord(item["prompt"], name, k)
