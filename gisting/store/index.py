"""Which entries a store has: a table in SQLite that many processes read and write.

Place in the flow: below the store. With SQLite in WAL mode and full synchronisation, an acknowledged write survives the
process being killed at any moment. The locks belong to the kernel, so a killed process leaves none behind. This module
knows rows; the files that they describe are in ``objects.py``.

The index may come from an untrusted source: its schema must be exactly the one written here (no triggers, no views),
and each row is checked before it is used.
"""

# Over 600 lines because SQLite's errors, locks, forks and formats are all met here, and nowhere else.

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import stat
import time
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
from gisting.store.journal import Journal
from gisting.store.objects import Objects, checkpoint_of, locked

__all__ = [
    "FORMAT",
    "INDEX",
    "DiskFullError",
    "Index",
    "NewEntry",
    "StoreEntry",
    "canonical",
    "check_name",
    "content_key",
    "entry_of",
    "find_all",
    "find_in",
    "is_key",
    "not_found",
    "put_entry",
    "some_of",
    "text_key",
]

INDEX = "index.sqlite"
FORMAT = 2
_APPLICATION = 0x47495354  # "GIST"
_TIMEOUT_S = 60.0
_TRY_MS = 20  # how long a thread waits for another process's lock before it lets a fork pass
_PER_QUERY = 500  # SQLite before 3.32 takes 999 variables
_MAX_NAME = 200
_NUM_SHOWN = 5  # names in a message
_KEY = re.compile("[0-9a-f]{64}")
_FIRST_SCHEMA = (
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
# Since format 2, an entry also has the name of the checkpoint that made it.
_SCHEMA = (_FIRST_SCHEMA[0].replace("\n) W", ",\n    checkpoint TEXT NOT NULL\n) W"), *_FIRST_SCHEMA[1:])
# Connections that a forked child inherited. A child must neither use nor close them, so they are kept.
_inherited: list[sqlite3.Connection] = []
# Connections of stores that were never closed. They are closed later, while holding the lock that blocks forks.
_dropped: deque[sqlite3.Connection] = deque()


@dataclass(frozen=True)
class StoreEntry:
    """One name of a compressed prompt in a store, or a compressed prompt without a name.

    Args:
        name: its name, or None if it can only be found by its text or key.
        key: 64 hex digits: SHA-256 of the prompt text and what it was compressed for, or of the file's content.
        is_keyed_by_text: which of the two.
        num_gist_tokens: k; the sum over all chunks if the prompt has several.
        num_prompt_tokens: tokens of the prompt without its gist; None for a cache that was put in.
        num_bytes: size of the file.
        sha256: checksum of the file, 64 hex digits.
        storage: how the numbers are stored, such as ``"float32"`` or ``"int8"``.
        model: fingerprint of the model.
        tokenizer: fingerprint of the tokenizer.
        template: name of the template.
        condition: ``"gist"``, ``"positive"`` or ``"negative"``.
        created: when the file was written, UTC, ``2026-01-31T12:00:00Z``.
        checkpoint: the name of the checkpoint that made it, for people; "" if it had none.
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
    checkpoint: str = ""


_TEXTS = ("storage", "model", "tokenizer", "template", "condition", "created", "checkpoint")
_COLUMNS = ", ".join(f"entries.{field.name}" for field in fields(StoreEntry)[1:])
_INSERT = f"INSERT OR REPLACE INTO entries VALUES ({', '.join('?' * len(_COLUMNS.split()))})"


@dataclass(frozen=True)
class NewEntry:
    """A finished file and its new row in the index.

    Args:
        entry: the row, without a name.
        file: the file, still in its writer's directory.
        is_forced: whether to replace an existing file.
    """

    entry: StoreEntry
    file: Path
    is_forced: bool


def text_key(parts: Sequence[str | int]) -> str:
    """Make the key of a prompt from ``parts``: its text and everything that its states depend on."""
    return hashlib.sha256(json.dumps(["gist of a text", *parts]).encode()).hexdigest()


def prompt_digest(text: str) -> str:
    """Return the SHA-256 of a prompt's text in hex, by which a file says what it was made of."""
    return hashlib.sha256(text.encode()).hexdigest()


def content_key(sha256: str) -> str:
    """Make the key of a file that was put in from ``sha256``, its checksum in hex."""
    return hashlib.sha256(json.dumps(["gist in a file", sha256]).encode()).hexdigest()


def is_key(text: object) -> bool:
    """Whether ``text`` has the form of a key: 64 lower-case hex digits."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


def canonical(name: str) -> str:
    """Return ``name`` unchanged if it is a key, otherwise as :func:`check_name` returns it. Raises as that does."""
    return name if is_key(name) else check_name(name)


def check_name(name: str) -> str:
    """Return ``name`` as the index holds it: in Unicode's composed form (NFC), so that two spellings are one name.

    Raises:
        StoreError: it is not a valid name. A name has 1 to 200 printable characters without slashes and backslashes,
            has no space at either end, is not ``.`` or ``..``, and does not look like a key.
    """
    if isinstance(name, str):
        name = unicodedata.normalize("NFC", name)
        is_plain = name.isprintable() and not {"/", "\\"} & {*name} and name == name.strip()
        if is_plain and 1 <= len(name) <= _MAX_NAME and name not in (".", "..") and not is_key(name):
            return name
    raise StoreError(
        f"name must be 1 to {_MAX_NAME} printable characters without / and \\, with no space at either end, not '.' or "
        f"'..', and not 64 hex digits, which would be a key; got {_shortened(name)}"
    )


class DiskFullError(StoreError):
    """The index cannot be written to, because the disk is full."""


class _Connection(sqlite3.Connection):
    """A connection that is not closed when it is garbage-collected.

    That may happen in any thread and without a lock, and a fork at that moment would leave SQLite locked in the child.
    """

    file: os.stat_result  # which file was opened
    columns = _COLUMNS  # what is read of an entry; an index of format 1 that cannot be changed lacks the last
    # What the files looked like when SQLite was told that they never change; None if SQLite itself notices changes.
    frozen: tuple[tuple[int, int, int] | None, ...] | None = None

    def __del__(self) -> None:
        _dropped.append(self)


class Index:
    """The table of a store's entries, for many threads and processes.

    Args:
        root: the store's directory, which exists.
        is_read_only: whether nothing may be written.

    Raises:
        CacheFormatError: the file is not an index, is damaged, or has a later format.
        StoreError: there is no index and none may be made, or it stays locked for too long.
    """

    def __init__(self, root: Path, *, is_read_only: bool) -> None:
        self.path = root / INDEX
        self._objects = Objects(root)
        self._is_read_only = is_read_only
        self._journal = Journal(root)
        # Reading has its own connection, so that a thread that waits to write does not block reads.
        self._reader: _Connection | None = None
        self._writer: _Connection | None = None
        self._was_open = False
        self._read_lock = ForkLock(self._leave_reader)
        self._write_lock = ForkLock(self._leave_writer)
        with self.reading():
            pass

    def close(self) -> None:
        """Close both connections. They are opened again when needed."""
        with self._read_lock:
            self._reader = _closed(self._reader)
        with self._write_lock:
            self._writer = _closed(self._writer)

    @contextmanager
    def reading(self) -> Iterator[_Connection]:
        """Read one consistent state of the index. Nothing that takes a lock may run inside the block."""
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
    def writing(self) -> Iterator[_Connection]:
        """Write to the index, as the only writer of all processes.

        The changes become visible to everyone when the block ends, or are undone if it raises. Nothing that takes a
        lock may run inside the block.

        Raises:
            StoreError: the index was opened read-only.
        """
        if self._is_read_only:
            raise StoreError(
                f"{self.path.parent} was opened with is_read_only=True and cannot be changed; open it without that"
            )
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            # Let go of between attempts: a fork waits for this lock, and must not wait for another process.
            with self._write_lock, self._errors_in_words():
                connection = self._begun(is_last=time.monotonic() > deadline)
                if connection is not None:
                    try:
                        yield connection
                        self._journal.note(connection)
                        connection.execute("COMMIT")
                    finally:
                        if connection.in_transaction:
                            connection.execute("ROLLBACK")
                    return
            time.sleep(0.001)

    def _begun(self, *, is_last: bool) -> _Connection | None:
        """Begin to write; None if another process does, and this is not the last attempt."""
        if self._writer is None or self._is_elsewhere(self._writer):
            self._writer = _closed(self._writer) or self._connect()
            self._journal.watch(self._writer)
        connection = self._writer
        connection.execute(f"PRAGMA busy_timeout={_TRY_MS}")
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if is_last or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return None
        finally:
            connection.execute(f"PRAGMA busy_timeout={round(1000 * _TIMEOUT_S)}")
        # The index may have been rebuilt while this process waited for the lock of the old one.
        if self._is_elsewhere(connection):
            connection.execute("ROLLBACK")
            return None
        return connection

    def find(self, names: Sequence[str]) -> dict[str, StoreEntry]:
        """Return the entries that exist among ``names``, which are keys and names as :func:`check_name` returns them.

        Raises:
            CacheFormatError: a row is not one that a store writes.
        """
        with self.reading() as connection:
            return find_in(connection, names, str(self.path))

    def all(self) -> list[StoreEntry]:
        """Return every name with its entry, sorted, then the entries without a name, oldest first.

        Raises:
            CacheFormatError: a row is not one that a store writes.
        """
        with self.reading() as connection:
            columns = connection.columns
            rows = connection.execute(
                f"SELECT names.name, {columns} FROM entries LEFT JOIN names USING (key) "
                "ORDER BY names.name IS NULL, names.name, entries.created, entries.key"
            ).fetchall()
        found = [entry_of(row, str(self.path)) for row in rows]
        if columns == _COLUMNS:
            return found
        return [replace(entry, checkpoint=checkpoint_of(self._objects.path(entry.key))) for entry in found]

    def count(self) -> int:
        """Return the number of entries that :meth:`all` lists."""
        with self.reading() as connection:
            (found,) = connection.execute("SELECT count(*) FROM entries LEFT JOIN names USING (key)").fetchone()
        return found

    def faults(self) -> list[str]:
        """Return what SQLite itself finds wrong with the file, and the names that refer to nothing."""
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
        """Whether the directory was replaced. The open index would still be the old one, the files would be new."""
        try:
            return not os.path.samestat(connection.file, os.stat(self.path))
        except FileNotFoundError:
            raise self._gone() from None

    def _has_changed(self, connection: _Connection) -> bool:
        """Whether the index was written to although SQLite was told that it never changes."""
        return connection.frozen is not None and connection.frozen != self._looks()

    def _looks(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return time, size and inode of the index and of its log, None for a missing file."""
        found: list[tuple[int, int, int] | None] = []
        for path in (self.path, Path(f"{self.path}-wal")):
            try:
                status = os.stat(path)
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except FileNotFoundError:
                found.append(None)
        return tuple(found)

    def _gone(self) -> StoreError:
        return StoreError(f"{self.path} was moved or deleted while the store was open; open the store again")

    def _connect(self) -> _Connection:
        with suppress(IndexError):
            while True:
                dropped = _dropped.popleft()
                with suppress(sqlite3.Error):  # of one that was never opened
                    dropped.close()
        for path in self.path.parent.glob(f"{INDEX}*"):
            try:
                is_file = stat.S_ISREG(path.lstat().st_mode)
            except FileNotFoundError:  # the log, removed by a process that has just closed the index
                continue
            if not is_file:
                raise CacheFormatError(f"{path} is a link or not a file; an index is never reached through one")
        if not self.path.exists() and self._is_read_only:
            raise StoreError(f"{self.path.parent} is not a store: it has no {INDEX}; give the directory of a store")
        if not self.path.exists() and self._was_open:
            raise self._gone()
        options, looks = "?mode=rwc", self._looks()
        is_frozen = False
        if self._is_read_only:
            # Where it cannot create files, SQLite cannot read alongside writers. It is told that there are none, and
            # changes are noticed by looking at the files.
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

    def _check_format(self, connection: _Connection) -> None:
        def number(pragma: str) -> int:
            return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

        is_empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        if is_empty and not self._is_read_only:
            self._create(connection)
        if number("application_id") != _APPLICATION:
            raise CacheFormatError(
                f"{self.path} is an SQLite database but not the index of a store; give another directory, or, if it "
                f"has the files of a store, make the index again from them: gisting store rebuild {self.path.parent}"
            )
        if number("user_version") > FORMAT:
            raise CacheFormatError(
                f"{self.path} has format {number('user_version')}, this version reads up to {FORMAT}; upgrade gisting: "
                "pip install -U gist-tokens"
            )
        if number("user_version") < FORMAT and not self._is_read_only:
            self._upgrade(connection)
        is_first = number("user_version") < FORMAT
        self._check_tables(connection, _FIRST_SCHEMA if is_first else _SCHEMA)
        if is_first:
            connection.columns = _COLUMNS.replace("entries.checkpoint", "''")

    def _check_tables(self, connection: sqlite3.Connection, schema: Sequence[str]) -> None:
        found = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master")}
        if found != {*schema}:
            raise CacheFormatError(
                f"{self.path} is altered: its tables are not the tables of a store; make the index again from the "
                f"files: gisting store rebuild {self.path.parent}"
            )

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        """Bring an index of format 1 to this format, completely or not at all. Checkpoints' names are in the files."""
        with _transaction(connection):
            if connection.execute("PRAGMA user_version").fetchone()[0] >= FORMAT:  # by another process, meanwhile
                return
            self._check_tables(connection, _FIRST_SCHEMA)
            columns = _COLUMNS.replace("entries.checkpoint", "''")
            rows = connection.execute(f"SELECT NULL, {columns} FROM entries").fetchall()
            entries = [entry_of(row, str(self.path)) for row in rows]
            names = connection.execute("SELECT name, key FROM names").fetchall()
            # SQLite would write a column that is added to a table in its own words, which are not the schema's.
            connection.execute("DROP TABLE names")
            connection.execute("DROP TABLE entries")
            for statement in _SCHEMA:
                connection.execute(statement)
            for entry in entries:
                put_entry(connection, replace(entry, checkpoint=checkpoint_of(self._objects.path(entry.key))))
            connection.executemany("INSERT INTO names VALUES (?, ?)", names)
            connection.execute(f"PRAGMA user_version={FORMAT}")

    def _create(self, connection: sqlite3.Connection) -> None:
        # SQLite does not wait to change the journal mode, so processes that make the same store take turns.
        with locked(self.path.parent):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            with _transaction(connection):
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    for statement in _SCHEMA:
                        connection.execute(statement)
                    connection.execute(f"PRAGMA application_id={_APPLICATION}")
                    connection.execute(f"PRAGMA user_version={FORMAT}")

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            # These have no code: text that is not UTF-8, and a schema that cannot be read.
            is_damaged = isinstance(error, UnicodeError) or re.search(
                "decode|malformed|file format", str(error).lower()
            )
            if is_damaged or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise CacheFormatError(
                    f"{self.path} is damaged or not the index of a store ({error}); make the index again from the "
                    f"files: gisting store rebuild {self.path.parent}"
                ) from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
                raise StoreError(
                    f"{self.path} was locked by another process for {_TIMEOUT_S:.0f} seconds ({error}); look for a "
                    "process that stopped in the middle of a write"
                ) from error
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                raise StoreError(
                    f"{self.path} cannot be opened or written to ({error}); check its permissions, or open the store "
                    "with is_read_only=True"
                ) from error
            if code == sqlite3.SQLITE_FULL:
                raise DiskFullError(
                    f"{self.path} cannot be written to, because the disk is full; remove entries: gisting store remove "
                    f"{self.path.parent} NAME"
                ) from error
            raise StoreError(f"{self.path} cannot be used ({error}); check the disk and the permissions") from error

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


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write in one transaction, as the only writer; it is undone if the block raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def find_in(connection: _Connection, names: Sequence[str], where: str) -> dict[str, StoreEntry]:
    """Do what :meth:`Index.find` does, on a connection inside a block of reading or writing.

    Args:
        connection: the connection.
        names: keys and names.
        where: what messages call the index.
    """
    rows: list[tuple[Any, ...]] = []
    for source, name, column, values in (
        ("names JOIN entries USING (key)", "names.name", "names.name", [name for name in names if not is_key(name)]),
        ("entries", "NULL", "key", [name for name in names if is_key(name)]),
    ):
        for start in range(0, len(values), _PER_QUERY):
            part = values[start : start + _PER_QUERY]
            marks = ", ".join("?" * len(part))
            query = f"SELECT {name}, {connection.columns} FROM {source} WHERE {column} IN ({marks})"
            rows += connection.execute(query, part)
    found = (entry_of(row, where) for row in rows)
    return {entry.key if entry.name is None else entry.name: entry for entry in found}


def find_all(index: Index, names: Sequence[str]) -> dict[str, StoreEntry]:
    """Return the entries of ``names``, keys and names, all of which must exist in ``index``.

    Raises:
        StoreError: there is no such entry.
        CacheFormatError: a row is not one that a store writes.
    """  # noqa: DOC501
    found = index.find(names)
    if missing := [name for name in names if name not in found]:
        raise not_found(index, missing)
    return found


def not_found(index: Index, names: Sequence[str]) -> StoreError:
    """Make the error that says that ``index`` has no entries of ``names``."""
    return StoreError(f"{index.path.parent} has no entry {some_of(names)}; store.list() shows what it has")


def some_of(names: Sequence[str]) -> str:
    """Format ``names`` for a message; if there are many, only the first few."""
    shown = ", ".join(f"{name!r:.80}" for name in names[:_NUM_SHOWN])
    return shown if len(names) <= _NUM_SHOWN else f"{shown} and {len(names) - _NUM_SHOWN} more"


def entry_of(row: Sequence[Any], where: str) -> StoreEntry:
    """Check a ``row``, ``(name, *columns)``, and return it as an entry; ``where`` is what messages call the index.

    Raises:
        CacheFormatError: it is not one that a store writes.
    """
    found = StoreEntry(*row)
    texts = [getattr(found, name) for name in _TEXTS]
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
            f"{where} is altered: it has an invalid entry, name {_shortened(found.name)}, key {_shortened(found.key)}; "
            "make the index again from the files: gisting store rebuild DIR"
        )
    return replace(found, is_keyed_by_text=bool(found.is_keyed_by_text))


def put_entry(connection: sqlite3.Connection, entry: StoreEntry) -> None:
    """Insert or replace ``entry``, without its name, on a ``connection`` that is writing."""
    connection.execute(_INSERT, astuple(entry)[1:])


def _closed(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        connection.close()


def _shortened(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
