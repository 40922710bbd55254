"""Entries of a store as plain files, to be uploaded, and back with nothing believed that is not checked.

Place in the flow: below the store. A shared store is a directory: ``objects/`` as in a store, ``index.jsonl`` with one
line for each entry, ``README.md``. The SQLite index does not travel: a stranger's database is never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gisting.card import card as make_card
from gisting.card import is_repository_id
from gisting.errors import CacheFormatError, StoreError
from gisting.storage import write_atomically
from gisting.store.index import NewEntry, StoreEntry, entry_of
from gisting.store.objects import OBJECTS, SUFFIX, Objects
from gisting.store.reading import check_entry

__all__ = ["DELETED", "PATTERNS", "Source", "write_folder"]

LINES = "index.jsonl"
FORMAT = 1
# What is uploaded and downloaded, and what of an earlier store goes when another takes its place.
PATTERNS = [LINES, "README.md", f"{OBJECTS}/*/*{SUFFIX}"]
DELETED = [f"{OBJECTS}/*"]
_MAX_LINE = 2**16
_COLUMNS = [field.name for field in fields(StoreEntry)]


def write_folder(
    folder: Path, objects: Objects, entries: Sequence[StoreEntry], *, title: str, card: Mapping[str, Any]
) -> None:
    """Write entries with their files, lines and card.

    Args:
        folder: where they go; made where there is none.
        objects: the files of the store.
        entries: those that are written, one for each name.
        title: of the card.
        card: further arguments of :func:`gisting.card.make_card`.

    Raises:
        StoreError: a file has gone, or ``folder`` is the store itself.
        CacheFormatError: a file is damaged.
        OSError: something cannot be written.
    """
    # Made first: a card that is refused leaves nothing behind.
    readme = make_card(
        "store",
        title=title,
        num_gist_tokens=[entry.num_gist_tokens for entry in entries],
        template=", ".join(sorted({entry.template for entry in entries})),
        model=", ".join(sorted({entry.model for entry in entries})),
        **card,
    )
    if folder.resolve() == objects.root.resolve():
        raise StoreError(f"{folder} is the store itself; save it in another directory")
    for key, entry in {entry.key: entry for entry in entries}.items():
        target = folder / objects.name(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(objects.path(key), target)
            check_entry(target, entry)
        except FileNotFoundError as error:
            raise StoreError(f"{objects.path(key)} was removed while the store was saved; save it again") from error
    lines = [
        json.dumps({"format": FORMAT, "file": objects.name(entry.key), **asdict(entry)}, ensure_ascii=False)
        for entry in sorted(entries, key=lambda entry: (entry.name is None, entry.name, entry.key))
    ]
    write_atomically(folder / "README.md", readme.encode())
    is_written_again = (folder / LINES).is_file()
    # Last, so that every file that it speaks of is there.
    write_atomically(folder / LINES, "".join(f"{line}\n" for line in lines).encode())
    if is_written_again:
        # What was removed from the store meanwhile must not travel on.
        for key in {*Objects(folder)} - {entry.key for entry in entries}:
            Objects(folder).remove(key)


@dataclass(frozen=True)
class Source:
    """A directory that :func:`write_folder` wrote, or somebody who says so.

    Args:
        folder: the directory.
        root: what no file of it may lead out of: the directory, or the hub's own cache of the repository, in whose
            snapshots files are links to blobs beside them.
    """

    folder: Path
    root: Path

    @classmethod
    def find(cls, name_or_path: str | Path, *, revision: str | None, token: str | None, api: Any) -> Source:
        """A directory, or a repository of the hub, downloaded.

        Args:
            name_or_path: the directory or repository.
            revision: branch, tag or commit on the hub.
            token: for a repository that is not public.
            api: a ``HfApi``; None for a new one.

        Raises:
            StoreError: it is neither.
            OSError: the hub cannot be reached, or refuses.
        """
        folder = root = Path(name_or_path)
        if not folder.is_dir():
            if not is_repository_id(str(name_or_path)):
                raise StoreError(f"{name_or_path} is neither a directory nor a repository on the hub, 'owner/name'")
            if api is None:
                from huggingface_hub import HfApi

                api = HfApi()
            folder = root = Path(
                api.snapshot_download(str(name_or_path), revision=revision, token=token, allow_patterns=PATTERNS)
            )
            if folder.parent.name == "snapshots":
                root = folder.parent.parent
        if not (folder / LINES).is_file():
            raise StoreError(f"{name_or_path} has no {LINES}, so it is no store that was saved or uploaded")
        return cls(folder, root.resolve())

    @property
    def default_path(self) -> Path:
        """Where a store with these entries is kept, beside the hub's cache."""
        from huggingface_hub import constants

        with self._inside(LINES).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Path(constants.HF_HOME) / "gisting" / "stores" / digest

    def labels(self) -> set[str]:
        """The name of each entry, or its key where it has none. Raises as :meth:`read` does."""
        return {entry.name or entry.key for entry, _ in self._entries()}

    def read(self, target: Path) -> tuple[list[NewEntry], dict[str, str]]:
        """Copy every file to ``target``, and check the copies.

        Returns:
            The new entries, and {name: key}.

        Raises:
            CacheFormatError: a line or a file is not what a store writes.
        """
        made: dict[str, NewEntry] = {}
        meaning: dict[str, str] = {}
        for entry, where in self._entries():
            if entry.name is not None and meaning.setdefault(entry.name, entry.key) != entry.key:
                raise CacheFormatError(f"{where}: {entry.name!r} is the name of two entries")
            name, unnamed = Objects.name(entry.key), replace(entry, name=None)
            if entry.key in made:
                if made[entry.key].entry != unnamed:
                    raise CacheFormatError(f"{where}: says other things of {name} than a line before")
                continue
            copy = target / entry.key
            try:
                shutil.copyfile(self._inside(name), copy)
                check_entry(copy, entry)
            except FileNotFoundError as error:
                raise CacheFormatError(f"{where}: {name} is not there; download it again") from error
            except (CacheFormatError, OSError) as error:
                raise CacheFormatError(f"{where}: {name} is not what the line says: {error}") from error
            with copy.open("rb") as file:
                os.fsync(file.fileno())
            made[entry.key] = NewEntry(unnamed, copy, is_forced=False)
        if not made:
            raise CacheFormatError(f"{self.folder / LINES} holds no entry")
        return [*made.values()], meaning

    def _entries(self) -> Iterator[tuple[StoreEntry, str]]:
        with self._inside(LINES).open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE):
                number += 1
                where = f"{self.folder / LINES}, line {number}"
                try:
                    found = json.loads(line.decode("utf-8"))
                    version = found.pop("format")
                    if type(version) is int and version > FORMAT:
                        raise CacheFormatError(
                            f"{where} has format {version}, this version reads up to {FORMAT}; upgrade gisting: pip "
                            "install -U gist-tokens"
                        )
                    file_name = found.pop("file")
                    entry = entry_of([found.pop(column) for column in _COLUMNS], where)
                    if version != FORMAT or found or file_name != Objects.name(entry.key):
                        raise CacheFormatError(f"{where}: holds other things than a store writes")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    if isinstance(error, CacheFormatError):
                        raise
                    raise CacheFormatError(f"{where} is no entry of a store ({error!r:.100})") from error
                yield entry, where

    def _inside(self, name: str) -> Path:
        """A file of the directory, with links resolved."""
        found = (self.folder / name).resolve()
        if not found.is_relative_to(self.root):
            raise CacheFormatError(f"{self.folder / name} is a link that leads out of {self.root}; it is not followed")
        return found
