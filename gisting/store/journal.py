"""The names of a store a second time, in a text file, so that a damaged index costs nothing.

Place in the flow: below the store, next to the index. The files of the entries hold everything but names, lengths of
prompts and days; each change of these is appended here before it is committed to the index. A change that was cut off
may be here and not there; nothing that was acknowledged is missing. :mod:`gisting.store.rebuilding` reads it.

A line is JSON: ``{"name": ..., "key": ...}``, with null for a name that was removed, or ``{"entry": ..., "created":
..., "num_prompt_tokens": ...}``. The last line about a name or an entry counts.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisting.errors import StoreError

if TYPE_CHECKING:
    import sqlite3

__all__ = ["JOURNAL", "Journal"]

JOURNAL = "names.jsonl"
# Beyond this, with so much for each entry and name, lines that no longer count are left out.
_MAX_BYTES = 2**20
_BYTES_EACH = 1000
_MAX_LINE = 2**16
# In the connection that writes, not in the file: which rows a transaction changes.
_WATCH = (
    "PRAGMA temp_store=MEMORY",
    "CREATE TEMP TABLE changed (kind TEXT, id TEXT)",
    *(
        f"CREATE TEMP TRIGGER {table}_{event} AFTER {event} ON main.{table} "
        f"BEGIN INSERT INTO changed VALUES ('{table}', {row}.{column}); END"
        for table, column in (("names", "name"), ("entries", "key"))
        for event, row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD"))
    ),
    "CREATE TEMP TRIGGER names_renamed AFTER UPDATE ON main.names "
    "BEGIN INSERT INTO changed VALUES ('names', OLD.name); END",
)


class Journal:
    """The journal of one store.

    Args:
        root: the store's directory.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / JOURNAL

    def watch(self, connection: sqlite3.Connection) -> None:
        """Note the changes that this ``connection`` makes."""
        for statement in _WATCH:
            connection.execute(statement)

    def note(self, connection: sqlite3.Connection) -> None:
        """Write down what a transaction of ``connection`` has changed. Call it right before the commit.

        Raises:
            StoreError: the journal is not a file.
            OSError: it cannot be written.
        """
        changed = connection.execute("SELECT DISTINCT kind, id FROM temp.changed").fetchall()
        if not changed:
            return
        lines = [_line(connection, kind, one) for kind, one in changed]
        try:
            self._append(connection, [line for line in lines if line is not None])
        except OSError as error:
            # On a full disk things can still be removed; a name whose file is gone does not come back.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or any(line.get("key", 1) for line in lines if line):
                raise
        connection.execute("DELETE FROM temp.changed")

    def _append(self, connection: sqlite3.Connection, lines: list[dict[str, Any]]) -> None:
        (entries,), (names,) = (
            connection.execute(f"SELECT count(*) FROM {table}").fetchone() for table in ("entries", "names")
        )
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            status = None
        if status is not None and not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{self.path} is a link or not a file; remove it, and names are written down again")
        if status is None or status.st_size > _MAX_BYTES + _BYTES_EACH * (entries + names):
            # Loads torch, which reading names, as a shell does to complete them, does without.
            from gisting.storage import write_atomically

            found = [("entries", key) for (key,) in connection.execute("SELECT key FROM entries")]
            found += [("names", name) for (name,) in connection.execute("SELECT name FROM names")]
            made = [line for kind, one in found if (line := _line(connection, kind, one))]
            # Names of files that could not be read when the index was rebuilt come back with these.
            keys = {one for kind, one in found if kind == "entries"}
            known = {one for kind, one in found if kind == "names"} | {line["name"] for line in lines if "name" in line}
            made += [
                {"name": name, "key": key}
                for name, key in self.read()[0].items()
                if key is not None and key not in keys and name not in known
            ]
            write_atomically(self.path, _text(made))
        else:
            self.add(lines)

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Append ``lines``.

        Raises:
            OSError: they cannot be written.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            # A line that was cut off ends here.
            size = os.fstat(handle).st_size
            is_cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            data = (b"\n" if is_cut else b"") + _text(lines)
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self) -> tuple[dict[str, str | None], dict[str, dict[str, Any]]]:
        """Return the key of each name, None for a removed one, and what is known of each entry. Skips damaged lines."""
        names: dict[str, str | None] = {}
        entries: dict[str, dict[str, Any]] = {}
        for line in self._lines():
            match line:
                case {"name": str(name), "key": str() | None as key}:
                    names[name] = key
                case {"entry": str(key), "created": str(created), "num_prompt_tokens": int() | None as count}:
                    entries[key] = {"created": created, "num_prompt_tokens": count}
        return names, entries

    def _lines(self) -> Iterator[Any]:
        if self.path.is_symlink() or not self.path.is_file():
            return
        with self.path.open("rb") as file:
            while line := file.readline(_MAX_LINE):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    continue


def _line(connection: sqlite3.Connection, kind: str, one: str) -> dict[str, Any] | None:
    """Return what is to be written about a name or an entry; None for an entry that is gone."""
    if kind == "names":
        row = connection.execute("SELECT key FROM names WHERE name = ?", (one,)).fetchone()
        return {"name": one, "key": None if row is None else row[0]}
    row = connection.execute("SELECT created, num_prompt_tokens FROM entries WHERE key = ?", (one,)).fetchone()
    return None if row is None else {"entry": one, "created": row[0], "num_prompt_tokens": row[1]}


def _text(lines: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()
