"""Add entries to a store: files first, then the index, in one transaction.

Place in the flow: below the store. A file is written and synced in a writer's directory; :func:`commit` then renames it
into place and records it while holding the index's write lock. Files are placed and deleted only with that lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gisting.cache import GistCache
from gisting.errors import StoreError
from gisting.store.index import Index, NewEntry, StoreEntry, content_key, find_in, put_entry
from gisting.store.objects import Objects, checkpoint_of

if TYPE_CHECKING:
    import sqlite3

__all__ = ["commit", "commit_in_place", "drop_unnamed", "sweep", "write_caches"]

# Writing is half Python and half waiting for the disk; measured with 1 to 16 threads on a disk with short waits.
_NUM_THREADS = 4


def write_caches(folder: Path, caches: Sequence[GistCache], storage: str | None) -> list[NewEntry]:
    """Write one file per cache and sync it to the disk; the keys come from the content.

    Args:
        folder: a writer's directory.
        caches: caches of one prompt each.
        storage: how to store the numbers; None keeps every bit.

    Raises:
        GistError: the numbers cannot be stored.
        StoreError: the origin of a cache has characters that cannot be printed.
        OSError: a file cannot be written.
    """
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def write(numbered: tuple[int, GistCache]) -> NewEntry:
        number, cache = numbered
        file = folder / str(number)
        cache.save(file, storage)
        data = file.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        if not all(text.isprintable() for text in cache.origin.identity().values()):
            raise StoreError(f"cache.origin must hold printable text, got {cache.origin}; rename the template")
        entry = StoreEntry(
            name=None,
            key=content_key(sha256),
            is_keyed_by_text=False,
            num_gist_tokens=cache.num_gist_tokens[0],
            num_prompt_tokens=None,
            num_bytes=len(data),
            sha256=sha256,
            storage=storage or str(cache.dtype).removeprefix("torch."),
            **cache.origin.identity(),
            created=created,
            checkpoint=checkpoint_of(file),
        )
        # The same key means the same bytes: writing them again does no harm, and repairs a damaged file.
        return NewEntry(entry, file, is_forced=True)

    with ThreadPoolExecutor(min(_NUM_THREADS, max(1, len(caches)))) as pool:
        return [*pool.map(write, enumerate(caches))]


def commit(index: Index, objects: Objects, entries: Sequence[NewEntry], key_of_name: Mapping[str, str]) -> None:
    """Add finished files, unless another process was first, and point names at keys: all of it or nothing.

    Args:
        index: the index of the store.
        objects: the files of the store.
        entries: the finished files with their entries.
        key_of_name: the names to set, each with its key.
    """
    where = str(index.path)
    with index.writing() as connection:
        known = find_in(connection, [new.entry.key for new in entries], where)
        added = {
            new.entry.key: new
            for new in entries
            if new.is_forced
            or new.entry.key not in known
            or objects.size(new.entry.key) != known[new.entry.key].num_bytes
        }
        objects.place({key: new.file for key, new in added.items()})
        for new in added.values():
            put_entry(connection, new.entry)
        earlier = {entry.key for entry in find_in(connection, [*key_of_name], where).values()}
        connection.executemany(
            "INSERT OR REPLACE INTO names SELECT ?, key FROM entries WHERE key = ?", [*key_of_name.items()]
        )
        dropped = drop_unnamed(connection, earlier - {*key_of_name.values()}, keeps_texts=True)
    if dropped:
        sweep(index, objects, dropped)


def commit_in_place(index: Index, objects: Objects, name: str, old: StoreEntry, new: NewEntry) -> bool:
    """Put a finished file in the place of an entry, with all the names that it has then.

    Args:
        index: the index of the store.
        objects: the files of the store.
        name: the name or key by which ``old`` was found.
        old: the entry.
        new: the finished file with its entry.

    Returns:
        Whether it was done; False if ``name`` is no longer that entry, with that file.
    """
    with index.writing() as connection:
        if find_in(connection, [name], str(index.path)).get(name) != old:
            return False
        objects.place({new.entry.key: new.file})
        put_entry(connection, new.entry)
        connection.execute("UPDATE names SET key = ? WHERE key = ?", (new.entry.key, old.key))
        dropped = drop_unnamed(connection, {old.key} - {new.entry.key})
    if dropped:
        sweep(index, objects, dropped)
    return True


def drop_unnamed(connection: sqlite3.Connection, keys: Collection[str], *, keeps_texts: bool = False) -> list[str]:
    """Remove from the index the entries among ``keys`` that no name refers to.

    Args:
        connection: one that writes.
        keys: the candidates.
        keeps_texts: whether to keep entries that can still be found by their text.

    Returns:
        The keys of the removed entries.
    """
    return [
        key
        for key in keys
        if connection.execute(
            "DELETE FROM entries WHERE key = ? AND NOT (is_keyed_by_text AND ?) "
            "AND NOT EXISTS (SELECT 1 FROM names WHERE names.key = entries.key)",
            (key, keeps_texts),
        ).rowcount
    ]


def sweep(index: Index, objects: Objects, keys: Collection[str] | None = None) -> int:
    """Delete files that no entry refers to.

    Files are placed and deleted only with the write lock, so a file that another process is about to refer to is safe.

    Args:
        index: the index of the store.
        objects: the files of the store.
        keys: the files to look at; None for all files.

    Returns:
        The bytes freed.
    """
    with index.writing() as connection:
        if keys is None:
            keys = [*objects]
            known = {key for (key,) in connection.execute("SELECT key FROM entries")}
        else:
            known = {*find_in(connection, [*keys], str(index.path))}
        return sum(objects.remove(key) for key in keys if key not in known)
