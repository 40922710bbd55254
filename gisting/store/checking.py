"""Find damage in a store, and delete what is no longer needed.

Place in the flow: below the store. Compares the index with the files, while other processes may be writing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gisting.errors import CacheFormatError, GistError, StoreError
from gisting.store.index import Index, StoreEntry, find_in, some_of
from gisting.store.objects import Objects
from gisting.store.reading import load_entry
from gisting.store.writing import sweep

__all__ = ["StoreFault", "collect_garbage", "find_faults"]


@dataclass(frozen=True)
class StoreFault:
    """Something that :meth:`GistStore.verify` found.

    Args:
        kind: ``"torn"`` (the file of an entry is missing, altered, or belongs to another entry), ``"index"`` (the index
            is damaged), ``"orphan"`` (a file without an entry) or ``"temporary"`` (left by a killed writer).
        key: the key of the entry or file; None if the fault concerns neither.
        message: what is wrong, in words.
    """

    kind: str
    key: str | None
    message: str

    @property
    def is_harmless(self) -> bool:
        """Whether it only takes up space, until :meth:`GistStore.gc` is called."""
        return self.kind in ("orphan", "temporary")

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def find_faults(index: Index, objects: Objects, *, is_read_only: bool) -> list[StoreFault]:
    """Read every file and compare it with the index; see :meth:`GistStore.verify`.

    Args:
        index: the index of the store.
        objects: the files of the store.
        is_read_only: whether the write lock cannot be taken.
    """
    where = str(index.path)
    faults = [StoreFault("index", None, f"{where}: {line}") for line in index.faults()]
    entries = {entry.key: entry for entry in index.all()}
    # Look again at what seems wrong, with writers locked out: it may have been removed or replaced since.
    locking = index.reading if is_read_only else index.writing
    for key in [key for key, entry in entries.items() if _damage(objects, entry) is not None]:
        with locking() as connection:
            for entry in find_in(connection, [key], where).values():
                if (message := _damage(objects, entry)) is not None:
                    faults.append(StoreFault("torn", key, message))
    for key in [key for key in objects if key not in entries]:
        with locking() as connection:
            if not find_in(connection, [key], where) and objects.size(key) is not None:
                faults.append(StoreFault("orphan", key, f"{objects.path(key)} belongs to no entry; gc removes it"))
    for path in objects.stale():
        faults.append(StoreFault("temporary", None, f"{path} was left by a writer that was killed; gc removes it"))
    return faults


def collect_garbage(index: Index, objects: Objects, *, keep_models: Collection[str] | None, keep_unnamed: bool) -> int:
    """Delete entries that are not to be kept, and files that no entry refers to; see :meth:`GistStore.gc`.

    Args:
        index: the index of the store.
        objects: the files of the store.
        keep_models: fingerprints of the models whose entries stay; None keeps all.
        keep_unnamed: whether entries without a name stay.

    Returns:
        The bytes freed.

    Raises:
        CacheFormatError: the index is damaged, or an entry's file is missing; nothing is deleted.
        StoreError: ``keep_models`` is not a list of models in the store.
    """
    faults = index.faults()
    with index.writing() as connection:
        keys = (key for (key,) in connection.execute("SELECT key FROM entries"))
        faults += [f"the file of {key} is missing" for key in keys if objects.size(key) is None]
        if faults:
            raise CacheFormatError(
                f"{objects.root} is damaged ({faults[0]}), so nothing is deleted; remove the entries that "
                "store.verify() lists, or restore their files"
            )
        if keep_models is not None:
            found = {model for (model,) in connection.execute("SELECT DISTINCT model FROM entries")}
            if isinstance(keep_models, str) or not keep_models or not {*keep_models} <= found:
                raise StoreError(
                    f"keep_models must be a list of models in the store ({some_of(sorted(found))}), got "
                    f"{keep_models!r:.200}"
                )
            for model in found.difference(keep_models):
                connection.execute("DELETE FROM names WHERE key IN (SELECT key FROM entries WHERE model = ?)", (model,))
                connection.execute("DELETE FROM entries WHERE model = ?", (model,))
        if not keep_unnamed:
            connection.execute("DELETE FROM entries WHERE key NOT IN (SELECT key FROM names)")
    # After the commit: if this process is killed before it, the entries stay and still need their files.
    return sweep(index, objects) + sum(objects.stale(is_removed=True).values())


def _damage(objects: Objects, entry: StoreEntry) -> str | None:
    path = objects.path(entry.key)
    try:
        load_entry(path, entry)
    except FileNotFoundError:
        return f"{path} is missing"
    except (GistError, OSError) as error:
        return str(error)
    return None
