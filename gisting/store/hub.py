"""Write entries of a store as plain files that can be uploaded, and read them back with every claim checked.

Place in the flow: below the store. A shared store is a directory: ``objects/`` as in a store, ``index.jsonl`` with one
line per entry, and ``README.md``. The SQLite index is not shared: a database from someone else is never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gisting.cache import kept_share
from gisting.card import card as make_card
from gisting.card import is_repository_id
from gisting.errors import CacheFormatError, StoreError
from gisting.storage import inspect, write_atomically
from gisting.store.index import NewEntry, StoreEntry, entry_of
from gisting.store.objects import OBJECTS, SUFFIX, Objects, checkpoint_of
from gisting.store.reading import about_of, check_size, load_entry

__all__ = ["DELETED", "PATTERNS", "Source", "write_folder"]

LINES = "index.jsonl"
FORMAT = 1
# What is uploaded and downloaded, and what is deleted of an earlier store when another replaces it.
PATTERNS = [LINES, "README.md", f"{OBJECTS}/*/*{SUFFIX}"]
DELETED = [f"{OBJECTS}/*"]
_MAX_LINE = 2**16
# The name of the checkpoint is in the file itself.
_COLUMNS = [field.name for field in fields(StoreEntry) if field.name != "checkpoint"]


def write_folder(
    folder: Path, objects: Objects, entries: Sequence[StoreEntry], *, title: str, card: Mapping[str, Any]
) -> None:
    """Write entries with their files, lines and card.

    Args:
        folder: where to write them, made if it does not exist.
        objects: the files of the store.
        entries: the entries to write, one for each name.
        title: title of the card.
        card: further arguments of :func:`gisting.card.card`.

    Raises:
        StoreError: a file was removed meanwhile, or ``folder`` is the store itself.
        CacheFormatError: a file is damaged.
        OSError: something cannot be written.
    """
    about = {entry.key: about_of(objects.path(entry.key)) for entry in entries}
    kept = {entry.name or entry.key[:12]: kept_share(about[entry.key]) for entry in entries}
    measured = {f"kept, {name}": share for name, share in kept.items() if share is not None}
    if measured:
        card = {**card, "metrics": {**measured, **(card.get("metrics") or {})}}
    # Made first, so that a refused card leaves nothing behind.
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
            check_size(objects.path(key), entry)
            shutil.copyfile(objects.path(key), target)
            load_entry(target, entry)
        except FileNotFoundError as error:
            raise StoreError(
                f"{objects.path(key)} was removed while the store was being saved; save it again"
            ) from error
    lines = [
        json.dumps(
            {"format": FORMAT, "file": objects.name(entry.key), **{name: getattr(entry, name) for name in _COLUMNS}},
            ensure_ascii=False,
        )
        for entry in sorted(entries, key=lambda entry: (entry.name is None, entry.name, entry.key))
    ]
    write_atomically(folder / "README.md", readme.encode())
    is_written_again = (folder / LINES).is_file()
    # Last, so that every file it mentions is there.
    write_atomically(folder / LINES, "".join(f"{line}\n" for line in lines).encode())
    if is_written_again:
        # What was removed from the store since the last save must not be shared again.
        for key in {*Objects(folder)} - {entry.key for entry in entries}:
            Objects(folder).remove(key)


@dataclass(frozen=True)
class Source:
    """A directory that :func:`write_folder` wrote, or that claims to be one.

    Args:
        folder: the directory.
        root: the directory that no file may lead out of: ``folder``, or the hub's cache of the repository, where the
            files of a snapshot are links to blobs next to it.
    """

    folder: Path
    root: Path

    @classmethod
    def find(cls, name_or_path: str | Path, *, revision: str | None, token: str | None, api: Any) -> Source:
        """Find a directory, or download a repository of the hub.

        Args:
            name_or_path: the directory or repository.
            revision: branch, tag or commit on the hub.
            token: access token for a private repository.
            api: an ``HfApi``; None for a new one.

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
            raise StoreError(f"{name_or_path} has no {LINES}, so it is not a store that was saved or uploaded")
        return cls(folder, root.resolve())

    @property
    def default_path(self) -> Path:
        """Where to keep a store with these entries, next to the hub's cache."""
        from huggingface_hub import constants

        with self._inside(LINES).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Path(constants.HF_HOME) / "gisting" / "stores" / digest

    def labels(self) -> set[str]:
        """Return the name of each entry, or its key if it has none. Raises as :meth:`read` does."""
        return {entry.name or entry.key for entry, _ in self._entries()}

    def read(self, target: Path) -> tuple[list[NewEntry], dict[str, str]]:
        """Copy every file to ``target``, and check the copies.

        Returns:
            The new entries, and {name: key}.

        Raises:
            CacheFormatError: a line or a file is not one that a store writes.
        """
        made: dict[str, NewEntry] = {}
        key_of_name: dict[str, str] = {}
        for entry, where in self._entries():
            if entry.name is not None and key_of_name.setdefault(entry.name, entry.key) != entry.key:
                raise CacheFormatError(f"{where}: {entry.name!r} is the name of two entries")
            name, unnamed = Objects.name(entry.key), replace(entry, name=None)
            if entry.key in made:
                if replace(made[entry.key].entry, checkpoint="") != unnamed:
                    raise CacheFormatError(f"{where}: contradicts what an earlier line says about {name}")
                continue
            copy = target / entry.key
            try:
                source = self._inside(name)
                # Before it is copied: a file with holes takes no space here, and its whole size in a copy.
                check_size(source, entry)
                inspect(source)
                shutil.copyfile(source, copy)
                load_entry(copy, entry)
            except FileNotFoundError as error:
                raise CacheFormatError(f"{where}: {name} is missing; download it again") from error
            except (CacheFormatError, OSError) as error:
                raise CacheFormatError(f"{where}: {name} does not match the line: {error}") from error
            with copy.open("rb") as file:
                os.fsync(file.fileno())
            made[entry.key] = NewEntry(replace(unnamed, checkpoint=checkpoint_of(copy)), copy, is_forced=False)
        if not made:
            raise CacheFormatError(f"{self.folder / LINES} has no entries")
        return [*made.values()], key_of_name

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
                        raise CacheFormatError(f"{where}: is not a line that a store writes")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    if isinstance(error, CacheFormatError):
                        raise
                    raise CacheFormatError(f"{where} is not an entry of a store ({error!r:.100})") from error
                yield entry, where

    def _inside(self, name: str) -> Path:
        """Return the path of a file of the directory, with links resolved."""
        found = (self.folder / name).resolve()
        if not found.is_relative_to(self.root):
            raise CacheFormatError(f"{self.folder / name} is a link that leads out of {self.root}; it is not followed")
        return found
