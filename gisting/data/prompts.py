"""Files of prompts to compress, and of inputs: one per line as text, or data.

Place in the flow: sources -> **prompts** -> store, or training from prompts alone. Works on files, not on tokens.
Errors name the file and the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gisting.data.messages import LAYOUTS, TokenizerSource, prompt_of
from gisting.data.sources import SUFFIXES, read_items
from gisting.errors import RecordError
from gisting.tokens.text import read_text, text_fault

__all__ = ["PromptRecord", "load_inputs", "load_prompts"]

# Any other name says that the file is something else.
_TEXT = ("", ".txt", ".text", ".md", ".prompts")


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


def load_prompts(path: str | Path, tokenizer: TokenizerSource | None = None) -> list[PromptRecord]:
    """Read the prompts of a file or directory.

    In a directory, each text file is one prompt with all its lines, in the order of the names; a prompt has the name of
    its file without the suffix. Other files are left out.

    A text file (``.txt``, ``.text``, ``.md``, ``.prompts`` or no suffix) has one prompt per line; empty lines are
    skipped. Data (JSON, JSON lines, CSV, Parquet, as for :func:`gisting.load_records`) have objects with ``prompt`` and
    optionally ``name``, ``num_gist_tokens`` and ``tools``; JSON may also be a list of texts. Instead of ``prompt``, an
    object may have ``messages`` (or ``conversations``), of which the system message is the prompt.

    Args:
        path: the file, UTF-8, or the directory.
        tokenizer: the tokenizer that lays out ``tools``, or a function that loads it; not needed without them.

    Returns:
        The prompts in the order of the file.

    Raises:
        RecordError: the file is of another kind, an item is not such an object, a prompt is empty, a name occurs twice,
            or the file has no prompt.
        OSError: the file cannot be read.
    """
    found = []
    names: dict[str, str] = {}
    for where, item in _files(Path(path)) if Path(path).is_dir() else _items(Path(path)):
        record = PromptRecord(item) if isinstance(item, str) and item.strip() else _from_object(item, where, tokenizer)
        for text in (record.prompt, record.name or ""):
            if (fault := text_fault(text)) is not None:
                raise RecordError(f"{where} {fault}")
        if record.name is not None:
            if record.name in names:
                raise RecordError(
                    f"{where}: name {record.name!r} is already used on {names[record.name]}; choose another"
                )
            names[record.name] = where.rpartition(", ")[2]
        found.append(record)
    if not found:
        how = f"write each into a file named {', '.join(_TEXT[1:])}" if Path(path).is_dir() else "write one per line"
        raise RecordError(f"{path} contains no prompts; {how}")
    return found


def load_inputs(path: str | Path) -> list[str]:
    """Read inputs: the texts that prompts are applied to, such as questions of users.

    A text file has one input per line; empty lines are skipped. Data have objects with ``input``, and whatever else;
    JSON may also be a list of texts. So the records of a data set will do.

    Args:
        path: a file as for :func:`load_prompts`, UTF-8.

    Returns:
        The inputs in the order of the file; a repeated one counts once.

    Raises:
        RecordError: the file is of another kind, an item has no input, or the file has none.
        OSError: the file cannot be read.
    """
    found: dict[str, None] = {}
    for where, item in _items(Path(path), "input"):
        text = item.get("input") if isinstance(item, dict) else item
        if not isinstance(text, str):
            raise RecordError(f"{where} must be a text, or an object with a string 'input'")
        if (fault := text_fault(text)) is not None:
            raise RecordError(f"{where} {fault}")
        found.setdefault(text)
    if not found:
        raise RecordError(f"{path} contains no inputs; write one per line")
    return list(found)


def _files(path: Path) -> list[tuple[str, Any]]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _TEXT[1:] and file.is_file())
    return [(str(file), {"prompt": read_text(file).strip(), "name": file.stem}) for file in files]


def _items(path: Path, what: str = "prompt") -> list[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return [*read_items(path)]
    if suffix not in _TEXT:
        raise RecordError(
            f"{path} must end in one of {', '.join(SUFFIXES)}, or in .txt for one {what} per line; rename it"
        )
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(f"{path}, line {number}", line.strip()) for number, line in lines if line.strip()]


def _from_object(item: Any, where: str, tokenizer: TokenizerSource | None) -> PromptRecord:
    if isinstance(item, dict):  # data sets fill their columns with None
        item = {name: value for name, value in item.items() if value is not None}
    if isinstance(item, dict) and ("tools" in item or ("prompt" not in item and any(name in item for name in LAYOUTS))):
        others = {name: value for name, value in item.items() if name not in (*LAYOUTS, "tools")}
        item = {**others, "prompt": prompt_of(item, where, tokenizer)}
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or not item["prompt"].strip():
        raise RecordError(
            f"{where} must be an object with a non-empty string 'prompt' and, optionally, 'name' and 'num_gist_tokens'"
        )
    unknown = item.keys() - {"prompt", "name", "num_gist_tokens"}
    if unknown:
        raise RecordError(
            f"{where} has unknown keys {', '.join(sorted(unknown))}; known are prompt, messages, tools, name and "
            "num_gist_tokens"
        )
    name, k = item.get("name"), item.get("num_gist_tokens")
    if name is not None and not isinstance(name, str):
        raise RecordError(f"{where}: 'name' must be a string, got {name!r}")
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise RecordError(f"{where}: 'num_gist_tokens' must be a whole number of at least 1, got {k!r}")
    return PromptRecord(item["prompt"], name, k)
