"""Make the index of a store again, from its files and its journal.

Place in the flow: below the store. For an index that is damaged, altered or gone. Every file is read with the checks of
a cache file; names come from the journal, and from what can still be read of the old index.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gisting.cache import GistCache
from gisting.errors import CacheFormatError, GistError, StoreError
from gisting.storage import inspect
from gisting.store.checking import StoreFault
from gisting.store.index import INDEX, Index, StoreEntry, check_name, content_key, entry_of, put_entry
from gisting.store.journal import Journal
from gisting.store.objects import OBJECTS, TEMPORARY, Objects, checkpoint_of, locked, sync_directory

__all__ = ["rebuild"]


def rebuild(root: Path) -> list[StoreFault]:
    """Replace the index of a store; see :meth:`gisting.GistStore.rebuild`.

    Args:
        root: the store's directory.

    Returns:
        The files that cannot be read, and stay where they are.

    Raises:
        StoreError: the directory has no files of a store, or another process keeps the index locked.
        OSError: the new index cannot be written.
    """
    objects = Objects(root)
    if not (root / OBJECTS).is_dir():
        raise StoreError(f"{root} is not the directory of a store: it has no {OBJECTS}; give the one that has them")
    objects.make()
    objects.check()
    with locked(root), _no_writers(root), objects.writing() as writer:
        # Its own, because the writer's is locked.
        folder = writer / "new"
        folder.mkdir()
        names, known = _names(root)
        entries, faults = _entries(objects, known)
        made = Index(folder, is_read_only=False)
        with made.writing() as connection:
            for entry in entries.values():
                put_entry(connection, entry)
            kept = [(name, key) for name, key in names.items() if key in entries]
            connection.executemany("INSERT INTO names VALUES (?, ?)", kept)
        made.close()
        if (folder / f"{INDEX}-wal").exists():
            raise StoreError(
                f"{root}: SQLite did not finish the new index, so nothing was replaced; look for a process that reads "
                f"{root / TEMPORARY}, and run it again"
            )
        # Names of files that cannot be read stay in the journal, in case the files are restored.
        Journal(folder).add([{"name": name, "key": key} for name, key in names.items() if key not in entries])
        # First, because it has all names: until the new index is in place, they may be nowhere else.
        os.replace(Journal(folder).path, Journal(root).path)
        sync_directory(root)
        # The log of the old index must not be left next to the new one, which SQLite would apply it to. If this process
        # dies in between there is no index, and rebuilding it again finds the same.
        for end in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.replace(root / f"{INDEX}{end}", root / f"{INDEX}.old{end}")
        os.replace(folder / INDEX, root / INDEX)
        sync_directory(root)
    return faults


@contextmanager
def _no_writers(root: Path) -> Iterator[None]:
    """Keep the old index locked, if it can be opened at all. Who waits for it finds the new one afterwards."""
    connection = None
    try:
        if (root / INDEX).is_file() and not (root / INDEX).is_symlink():
            connection = sqlite3.connect(root / INDEX, timeout=60, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                    raise StoreError(
                        f"{root / INDEX} was locked by another process for 60 seconds; look for a process that stopped "
                        "in the middle of a write"
                    ) from error
        yield
    finally:
        if connection is not None:
            connection.close()


def _names(root: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return the key of each name, and what is known of entries besides their files.

    What was committed counts, as far as the old index can be read to its end: the journal may be ahead of it by a
    change that was cut off. Of an index that cannot be read, the journal has everything.
    """
    found: dict[str, str | None] = {}
    known: dict[str, dict[str, Any]] = {}
    is_whole = False
    if (root / INDEX).is_file() and not (root / INDEX).is_symlink():
        # A schema of someone else's is not asked for anything but these two tables.
        with suppress(sqlite3.DatabaseError, UnicodeError), closing(sqlite3.connect(root / INDEX)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            tables = "SELECT name FROM sqlite_master WHERE type = 'table'"
            if {"names", "entries"} <= {name for (name,) in connection.execute(tables)}:
                for key, created, count in connection.execute("SELECT key, created, num_prompt_tokens FROM entries"):
                    known[key] = {"created": created, "num_prompt_tokens": count}
                for name, key in connection.execute("SELECT name, key FROM names"):
                    found[name] = key
                is_whole = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    names, entries = Journal(root).read()
    if is_whole:
        # Only names of files that have no entry, because they were damaged or missing when it was rebuilt.
        names = {name: key for name, key in names.items() if name not in found and key not in known}
    valid: dict[str, str] = {}
    for name, key in {**found, **names}.items():
        with suppress(GistError):
            if isinstance(key, str) and check_name(name) == name:
                valid[name] = key
    return valid, {**entries, **known} if is_whole else {**known, **entries}


def _entries(objects: Objects, known: dict[str, dict[str, Any]]) -> tuple[dict[str, StoreEntry], list[StoreFault]]:
    entries: dict[str, StoreEntry] = {}
    faults = []
    for key in objects:
        path = objects.path(key)
        try:
            entries[key] = _entry(path, key, known.get(key, {}))
        except (GistError, OSError) as error:
            faults.append(StoreFault("torn", key, f"{error}; it has no entry now, and gc removes it"))
    return entries, faults


def _entry(path: Path, key: str, known: dict[str, Any]) -> StoreEntry:
    """Describe a file, with what is ``known`` besides it, as far as that is valid."""
    cache, about = GistCache.load(path), inspect(path)
    if len(cache) != 1:
        raise CacheFormatError(f"{path} holds {len(cache)} prompts, files of a store hold one")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    status = os.stat(path)
    day = datetime.fromtimestamp(status.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    values: dict[str, Any] = {
        "name": None,
        "key": key,
        "is_keyed_by_text": key != content_key(sha256),
        "num_gist_tokens": cache.num_gist_tokens[0],
        "num_prompt_tokens": None,
        "num_bytes": status.st_size,
        "sha256": sha256,
        "storage": about["storage"],
        **cache.origin.identity(),
        "checkpoint": checkpoint_of(path),
        "created": day,
    }
    names = [field.name for field in fields(StoreEntry)]
    found = entry_of([values[name] for name in names], str(path))
    # Each by itself, so that a damaged value costs neither the file nor the other.
    for name in ("created", "num_prompt_tokens"):
        if known.get(name):
            with suppress(CacheFormatError):
                found = entry_of([{**asdict(found), name: known[name]}[one] for one in names], str(path))
    return found
