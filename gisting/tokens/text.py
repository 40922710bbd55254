"""Texts as people have them: files of editors, and characters that cannot be written.

Place in the flow: **text** -> tokens. Does not depend on tokenizers.
"""

from __future__ import annotations

from pathlib import Path

from gisting.errors import RecordError

__all__ = ["plain", "read_text", "text_fault"]


def read_text(path: str | Path) -> str:
    r"""Read a text file as an editor shows it.

    A byte order mark at the beginning and one line end at the end are left out; ``\r\n`` and ``\r`` become ``\n``.

    Args:
        path: the file, UTF-8.

    Returns:
        The text.

    Raises:
        RecordError: the file is not UTF-8; the message names the line.
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecordError(f"{path} is not UTF-8 text (line {line}: {error.reason}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def text_fault(text: str) -> str | None:
    r"""Return what is wrong with a text that cannot be written as UTF-8, or None.

    JSON that was cut in the middle of an emoji has lone surrogates (``"\ud83d"``). So has an argument of a command that
    is not UTF-8.

    Args:
        text: the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = ascii(text[error.start])
        return f"has {what} at character {error.start}, half of a character or a byte that is not UTF-8; correct it"
    return None


def plain(text: str, *, keeps_lines: bool = False) -> str:
    """Return a text with its control characters escaped, so that a terminal shows them and does not act on them.

    Args:
        text: the text, from a file or a server that may be someone else's.
        keeps_lines: whether line ends stay as they are.
    """
    kept = "\n" if keeps_lines else ""
    return "".join(
        character if character.isprintable() or character in kept else ascii(character)[1:-1] for character in text
    )
