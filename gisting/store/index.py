"""Which entries a store has: a table in SQLite that many processes read and write.

Place in the flow: below the store. SQLite in WAL mode with full synchronisation makes a write that was acknowledged
survive a process that is killed at any moment, and its locks are the kernel's, so that none is left behind. Knows rows;
the files that they speak of are in ``objects.py``.

The index may come from somebody else: its schema must be the one written here to the letter (no triggers, no views),
and what a row says is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import stat
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gisting.errors import CacheFormatError, StoreError
from gisting.store.forks import ForkLock
from gisting.store.objects import locked

__all__ = [
    "FORMAT",
    "INDEX",
    "Index",
    "NewEntry",
    "StoreEntry",
    "canonical",
    "check_name",
    "content_key",
    "entry_of",
    "find_in",
    "is_key",
    "put_entry",
    "text_key",
]

INDEX = "index.sqlite"
FORMAT = 1
_APPLICATION = 0x47495354  # "GIST"
_TIMEOUT_S = 60.0
_PER_QUERY = 500  # SQLite before 3.32 takes 999 variables
_MAX_NAME = 200
_KEY = re.compile("[0-9a-f]{64}")
_SCHEMA = (
    """CREATE TABLE entries (
    key TEXT PRIMARY KEY,
    is_keyed_by_text INTEGER NOT NULL,
    num_gist_tokens INTEGER NOT NULL,
    num_prompt_tokens INTEGER,
    num_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    storage TEXT NOT NULL,
    model TEXT NOT NULL,
    tokenizer TEXT NOT NULL,
    template TEXT NOT NULL,
    condition TEXT NOT NULL,
    created TEXT NOT NULL
) WITHOUT ROWID""",
    "CREATE TABLE names (name TEXT PRIMARY KEY, key TEXT NOT NULL REFERENCES entries (key)) WITHOUT ROWID",
    "CREATE INDEX names_of_key ON names (key)",
)
# Connections that a forked child inherited. Closing them there is as wrong as using them, so they are kept.
_inherited: list[sqlite3.Connection] = []
# Connections of stores that were never closed, to be closed with the lock that keeps forks away.
_dropped: deque[sqlite3.Connection] = deque()


@dataclass(frozen=True)
class StoreEntry:
    """One name of a compressed prompt in a store, or a compressed prompt without a name.

    Args:
        name: what it is called, or None: it is found by its text or key.
        key: 64 hex digits: SHA-256 of the prompt text and what it was compressed for, or of the file's content.
        is_keyed_by_text: which of the two.
        num_gist_tokens: k, of all chunks together where the prompt has several.
        num_prompt_tokens: tokens of the prompt without its gist; None for a cache that was put in.
        num_bytes: size of the file.
        sha256: of the file, 64 hex digits.
        storage: how its numbers are stored, ``"float32"`` or ``"int8"`` for instance.
        model: fingerprint of the model.
        tokenizer: fingerprint of the tokenizer.
        template: name of the template.
        condition: ``"gist"``, ``"positive"`` or ``"negative"``.
        created: when the file was written, UTC, ``2026-01-31T12:00:00Z``.
    """

    name: str | None
    key: str
    is_keyed_by_text: bool
    num_gist_tokens: int
    num_prompt_tokens: int | None
    num_bytes: int
    sha256: str
    storage: str
    model: str
    tokenizer: str
    template: str
    condition: str
    created: str


_COLUMNS = ", ".join(f"entries.{field.name}" for field in fields(StoreEntry)[1:])
_INSERT = f"INSERT OR REPLACE INTO entries VALUES ({', '.join('?' * len(_COLUMNS.split()))})"


@dataclass(frozen=True)
class NewEntry:
    """A finished file and what the index is to say of it.

    Args:
        entry: without a name.
        file: in a writer's own directory.
        is_forced: whether it takes the place of a file that is there.
    """

    entry: StoreEntry
    file: Path
    is_forced: bool


def text_key(parts: Sequence[str | int]) -> str:
    """The key of a prompt from ``parts``: its text and all that its states depend on."""
    return hashlib.sha256(json.dumps(["gist of a text", *parts]).encode()).hexdigest()


def content_key(sha256: str) -> str:
    """The key of a file that was put in, from ``sha256``, its checksum in hex."""
    return hashlib.sha256(json.dumps(["gist in a file", sha256]).encode()).hexdigest()


def is_key(text: object) -> bool:
    """Whether ``text`` has the form of a key: 64 hex digits, small letters."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


def canonical(name: str) -> str:
    """``name``, where it is a key, else what :func:`check_name` makes of it. Raises as that does."""
    return name if is_key(name) else check_name(name)


def check_name(name: str) -> str:
    """``name`` as the index holds it, in Unicode's composed form (NFC), so that two spellings of a letter are one name.

    Raises:
        StoreError: it is no name: 1 to 200 printable characters without / and \\, no space at its ends, not ``.`` or
            ``..``, and not of the form of a key.
    """
    if isinstance(name, str):
        name = unicodedata.normalize("NFC", name)
        is_plain = name.isprintable() and not {"/", "\\"} & {*name} and name == name.strip()
        if is_plain and 1 <= len(name) <= _MAX_NAME and name not in (".", "..") and not is_key(name):
            return name
    raise StoreError(
        f"name must be 1 to {_MAX_NAME} printable characters without / and \\, with no space at its ends, not '.' or "
        f"'..', and not 64 hex digits, which would be a key; got {_shortened(name)}"
    )


class _Connection(sqlite3.Connection):
    """Not closed where it is destroyed, in any thread and without a lock: a fork meanwhile would leave SQLite locked in
    the child.
    """

    file: os.stat_result  # which file was opened
    # What the files looked like before SQLite was told that they never change; None where it looks after changes.
    frozen: tuple[tuple[int, int, int] | None, ...] | None = None

    def __del__(self) -> None:
        _dropped.append(self)


class Index:
    """The table of a store's entries, for many threads and processes.

    Args:
        root: the store's directory, which is there.
        is_read_only: whether nothing may be written.

    Raises:
        CacheFormatError: the file is no index, damaged, or of a later format.
        StoreError: there is none and none may be made, or it is locked for long.
    """

    def __init__(self, root: Path, *, is_read_only: bool) -> None:
        self.path = root / INDEX
        self._is_read_only = is_read_only
        # A reader of its own, so that a thread that waits for another process to finish writing holds up no reads.
        self._reader: _Connection | None = None
        self._writer: _Connection | None = None
        self._was_open = False
        self._read_lock = ForkLock(self._leave_reader)
        self._write_lock = ForkLock(self._leave_writer)
        with self.reading():
            pass

    def close(self) -> None:
        """Close both connections; they are opened again when they are needed."""
        with self._read_lock:
            self._reader = _closed(self._reader)
        with self._write_lock:
            self._writer = _closed(self._writer)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One state of the index, to be read. Nothing that locks may run inside."""
        with self._read_lock, self._errors_in_words():
            if self._reader is None or self._is_elsewhere(self._reader) or self._has_changed(self._reader):
                self._reader = _closed(self._reader) or self._connect()
            connection = self._reader
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The one writer of all processes: what is written is there for all when the block ends, or not at all when it
        raises. Nothing that locks may run inside.

        Raises:
            StoreError: the index was opened to be read alone.
        """
        if self._is_read_only:
            raise StoreError(
                f"{self.path.parent} was opened with is_read_only=True and cannot be changed; open it without"
            )
        with self._write_lock, self._errors_in_words():
            if self._writer is None or self._is_elsewhere(self._writer):
                self._writer = _closed(self._writer) or self._connect()
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def find(self, names: Sequence[str]) -> dict[str, StoreEntry]:
        """The entries of ``names``, keys and names (as :func:`check_name` gives them), as far as there are any.

        Raises:
            CacheFormatError: a row is not what a store writes.
        """
        with self.reading() as connection:
            return find_in(connection, names, str(self.path))

    def all(self) -> list[StoreEntry]:
        """Every name with its entry, sorted, then every entry without a name, as they were made.

        Raises:
            CacheFormatError: a row is not what a store writes.
        """
        with self.reading() as connection:
            rows = connection.execute(
                f"SELECT names.name, {_COLUMNS} FROM entries LEFT JOIN names USING (key) "
                "ORDER BY names.name IS NULL, names.name, entries.created, entries.key"
            ).fetchall()
        return [entry_of(row, str(self.path)) for row in rows]

    def count(self) -> int:
        """How many entries :meth:`all` lists."""
        with self.reading() as connection:
            (found,) = connection.execute("SELECT count(*) FROM entries LEFT JOIN names USING (key)").fetchone()
        return found

    def faults(self) -> list[str]:
        """What SQLite itself finds wrong with the file, and names that refer to nothing."""
        with self.reading() as connection:
            lines = [line for (line,) in connection.execute("PRAGMA integrity_check(20)") if line != "ok"]
            lines += [
                f"name {_shortened(name)} refers to an entry that is not there"
                for (name,) in connection.execute(
                    "SELECT name FROM names WHERE key NOT IN (SELECT key FROM entries) LIMIT 20"
                )
            ]
        return lines

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_elsewhere(self, connection: _Connection) -> bool:
        """Whether the directory was replaced: an open index would go on in the old one, and files in the new."""
        try:
            return not os.path.samestat(connection.file, os.stat(self.path))
        except FileNotFoundError:
            raise self._gone() from None

    def _has_changed(self, connection: _Connection) -> bool:
        """Whether somebody wrote, where SQLite was told that nobody does."""
        return connection.frozen is not None and connection.frozen != self._looks()

    def _looks(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Time, size and inode of the index and of its log, None for what is not there."""
        found: list[tuple[int, int, int] | None] = []
        for path in (self.path, Path(f"{self.path}-wal")):
            try:
                status = os.stat(path)
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except FileNotFoundError:
                found.append(None)
        return tuple(found)

    def _gone(self) -> StoreError:
        return StoreError(f"{self.path} was moved or deleted while the store was open; open the store anew")

    def _connect(self) -> _Connection:
        with suppress(IndexError):
            while True:
                _dropped.popleft().close()
        for path in self.path.parent.glob(f"{INDEX}*"):
            try:
                is_file = stat.S_ISREG(path.lstat().st_mode)
            except FileNotFoundError:  # the log of a process that has just closed the index
                continue
            if not is_file:
                raise CacheFormatError(f"{path} is a link or no file; an index is never reached through one")
        if not self.path.exists() and self._is_read_only:
            raise StoreError(f"{self.path.parent} is no store: it has no {INDEX}; give the directory of a store")
        if not self.path.exists() and self._was_open:
            raise self._gone()
        options, looks = "?mode=rwc", self._looks()
        is_frozen = False
        if self._is_read_only:
            # Where no file can be made, SQLite cannot read along with writers. It is told that there are none, and what
            # others write is seen by how the files look.
            log = Path(f"{self.path}-wal")
            is_frozen = not os.access(self.path.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
            options = "?immutable=1" if is_frozen else "?mode=ro"
        connection = sqlite3.connect(
            f"file:{quote(str(self.path.absolute()))}{options}",
            uri=True,
            timeout=_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
        )
        try:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 2**20)
            for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")
            self._check_format(connection)
            if not self._is_read_only:
                connection.execute("PRAGMA synchronous=FULL")
            connection.file, self._was_open = os.stat(self.path), True
            connection.frozen = looks if is_frozen else None
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_format(self, connection: sqlite3.Connection) -> None:
        def number(pragma: str) -> int:
            return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

        is_empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        if is_empty and not self._is_read_only:
            self._create(connection)
        if number("application_id") != _APPLICATION:
            raise CacheFormatError(f"{self.path} is an SQLite database but no index of a store; give another directory")
        if number("user_version") > FORMAT:
            raise CacheFormatError(
                f"{self.path} has format {number('user_version')}, this version reads up to {FORMAT}; upgrade gisting: "
                "pip install -U gist-tokens"
            )
        found = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master")}
        if found != {*_SCHEMA}:
            raise CacheFormatError(
                f"{self.path} is altered: its tables are not those of a store; copy the files to be kept, and make the "
                "store anew"
            )

    def _create(self, connection: sqlite3.Connection) -> None:
        # SQLite has no waiting for a change of the journal, so processes that make the same store take turns.
        with locked(self.path.parent):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN IMMEDIATE")
            try:
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    for statement in _SCHEMA:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id={_APPLICATION}")
                    connection.execute(f"PRAGMA user_version={FORMAT}")
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            # Without a code: text that is no UTF-8, a schema that cannot be read.
            is_damaged = isinstance(error, UnicodeError) or re.search(
                "decode|malformed|file format", str(error).lower()
            )
            if is_damaged or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise CacheFormatError(
                    f"{self.path} is damaged or no index of a store ({error}); copy the files to be kept, and make the "
                    "store anew"
                ) from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
                raise StoreError(
                    f"{self.path} was locked by another process for {_TIMEOUT_S:.0f} seconds ({error}); look for one "
                    "that is stopped in the middle of a write"
                ) from error
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                raise StoreError(
                    f"{self.path} cannot be opened or written ({error}); check its permissions, or open the store with "
                    "is_read_only=True"
                ) from error
            raise StoreError(f"{self.path} cannot be used ({error}); check disk and permissions") from error

    def _leave_reader(self) -> None:
        _inherited.extend(_dropped)
        _dropped.clear()
        if self._reader is not None:
            _inherited.append(self._reader)
            self._reader = None

    def _leave_writer(self) -> None:
        if self._writer is not None:
            _inherited.append(self._writer)
            self._writer = None


def find_in(connection: sqlite3.Connection, names: Sequence[str], where: str) -> dict[str, StoreEntry]:
    """:meth:`Index.find` on a ``connection``, inside a block of reading or writing; ``names`` as there, ``where`` names
    the index in messages.
    """
    rows: list[tuple[Any, ...]] = []
    for source, name, column, values in (
        ("names JOIN entries USING (key)", "names.name", "names.name", [name for name in names if not is_key(name)]),
        ("entries", "NULL", "key", [name for name in names if is_key(name)]),
    ):
        for start in range(0, len(values), _PER_QUERY):
            part = values[start : start + _PER_QUERY]
            marks = ", ".join("?" * len(part))
            rows += connection.execute(f"SELECT {name}, {_COLUMNS} FROM {source} WHERE {column} IN ({marks})", part)
    found = (entry_of(row, where) for row in rows)
    return {entry.key if entry.name is None else entry.name: entry for entry in found}


def entry_of(row: Sequence[Any], where: str) -> StoreEntry:
    """A ``row``, ``(name, *columns)``, as an entry; ``where`` names the index in messages.

    Raises:
        CacheFormatError: it is not what a store writes.
    """
    found = StoreEntry(*row)
    texts = (found.storage, found.model, found.tokenizer, found.template, found.condition, found.created)
    counts = [found.num_gist_tokens, found.num_bytes]
    counts += [] if found.num_prompt_tokens is None else [found.num_prompt_tokens]
    is_good = (
        is_key(found.key)
        and is_key(found.sha256)
        and all(isinstance(value, str) and value.isprintable() and len(value) <= 1000 for value in texts)
        and all(type(value) is int and 0 <= value < 2**48 for value in counts)
        and type(found.is_keyed_by_text) in (int, bool)
        and found.is_keyed_by_text in (0, 1)
    )
    if is_good and found.name is not None:
        try:
            is_good = check_name(found.name) == found.name
        except StoreError:
            is_good = False
    if not is_good:
        raise CacheFormatError(
            f"{where} is altered: the entry of name {_shortened(found.name)}, key {_shortened(found.key)} is none that "
            "a store writes; copy the files to be kept, and make the store anew"
        )
    return replace(found, is_keyed_by_text=bool(found.is_keyed_by_text))


def put_entry(connection: sqlite3.Connection, entry: StoreEntry) -> None:
    """Insert or replace ``entry``, without its name, on a ``connection`` that writes."""
    connection.execute(_INSERT, astuple(entry)[1:])


def _closed(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        connection.close()


def _shortened(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
