"""``GistStore``: compressed prompts by the thousand, found by name or by text, in a directory that processes share.

Place in the flow: generation -> **store** -> generation. Joins the index (which entries there are), the objects (their
files) and the open caches (what this process has read). Knows how an entry is made and found; what is in a file is
known to :class:`~gisting.cache.GistCache`.
"""

from __future__ import annotations

import builtins
import hashlib
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gisting.cache import GistCache
from gisting.errors import CacheFormatError, GistError, StoreError
from gisting.storage import STORAGES
from gisting.store.index import (
    INDEX,
    Index,
    NewEntry,
    StoreEntry,
    canonical,
    check_name,
    content_key,
    find_in,
    is_key,
    put_entry,
    text_key,
)
from gisting.store.memory import OpenCaches
from gisting.store.objects import OBJECTS, TEMPORARY, Objects
from gisting.store.reading import check_entry, load_entry

if TYPE_CHECKING:
    import sqlite3

    import torch
    from transformers import PreTrainedModel

    from gisting.table import GistTable
    from gisting.tokens import GistTokenizer

__all__ = ["GistStore", "StoreFault"]

MAX_OPEN_BYTES = 256 * 2**20
# How often an entry is looked up, or made, that another process removes at the same time.
_ATTEMPTS = 3
# Writing is half Python and half waiting for the disk; measured with 1 to 16 threads, where waiting was short.
_WRITERS = 4
_SHOWN = 5


@dataclass(frozen=True)
class StoreFault:
    """Something that :meth:`GistStore.verify` found.

    Args:
        kind: ``"torn"`` (the file of an entry is missing, altered, or another's), ``"index"`` (the index is damaged),
            ``"orphan"`` (a file without an entry) or ``"temporary"`` (what a killed writer left).
        key: of the entry or file; None where it is about neither.
        message: what is wrong, in words.
    """

    kind: str
    key: str | None
    message: str

    @property
    def is_harmless(self) -> bool:
        """Whether it only takes space, until :meth:`GistStore.gc` is called."""
        return self.kind in ("orphan", "temporary")

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class GistStore:
    """A directory of compressed prompts.

    Any number of threads and processes on one machine may read and write at once, forked ones included. A write that
    has returned is there after ``kill -9`` of any process, and after a power failure as far as the disk keeps what it
    says it wrote; one that was cut off leaves nothing that is read. The directory must be on a disk of this machine:
    SQLite's write-ahead log does not work over a network (sqlite.org/wal.html). Linux and macOS.

    An entry is found by its *key*. For ``get_or_compress`` that is a SHA-256 over the prompt as the template writes it,
    k, the fingerprints of model and tokenizer (with its template), the condition, the dtype of the states and the
    ``chunk_length`` where one is given; for a cache that was put in, over the content of its file. *Names* are aliases
    for keys: 1 to 200 printable characters without ``/`` and ``\\``, with no space at the ends, not ``.`` or ``..``,
    not 64 hex digits (that is a key), in Unicode's composed form. They live in the index alone and never become part of
    a path. Prompts are not stored, though whoever guesses one can check the guess against its key.

    A directory that somebody else made is read with suspicion: an index with other tables, files that are altered or
    links are refused in words. Whose states they are it cannot tell; a store is trusted like a checkpoint is.

    Args:
        path: the directory; made where there is none, refused where it holds anything else.
        storage: how the numbers of new entries are stored, one of ``gisting.storage.STORAGES``; None keeps every bit.
            Entries that are there stay as they are.
        max_open_bytes: how much memory opened caches may take in this process; those used longest ago are closed
            first. 0 opens each anew.
        is_read_only: write nothing, for stores that others keep. In a directory that this process may not write to,
            and that no process has open, the index is taken as it is at opening.

    Raises:
        StoreError: the directory is no store and may not become one, or cannot be used.
        CacheFormatError: its index is damaged, altered or of a later format.
        GistError: ``storage`` or ``max_open_bytes`` is out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        storage: str | None = None,
        max_open_bytes: int = MAX_OPEN_BYTES,
        is_read_only: bool = False,
    ) -> None:
        if storage is not None and storage not in STORAGES:
            raise GistError(f"storage must be None or one of {', '.join(STORAGES)}, got {storage!r}")
        if max_open_bytes < 0:
            raise GistError(f"max_open_bytes must be at least 0, got {max_open_bytes}")
        # Absolute: a process may change its directory.
        self.path = Path(path).absolute()
        self.storage = storage
        self.is_read_only = is_read_only
        self._objects = Objects(self.path)
        self._open_caches = OpenCaches(max_open_bytes)
        if not is_read_only:
            self._make()
        self._index = Index(self.path, is_read_only=is_read_only)
        self._objects.check()

    # -- finding -------------------------------------------------------------------------------------------------------

    def get(self, names: str | Sequence[str]) -> GistCache:
        """The caches of names or keys, as one batch in their order, in the dtype that they had before they were stored.

        The index is asked each time, so what another process has replaced or removed is never handed out.

        Args:
            names: one, or B of them; one may come more than once.

        Returns:
            A cache of B prompts on the CPU, a copy that may be changed.

        Raises:
            StoreError: there is no such entry, or something is neither a name nor a key.
            CacheFormatError: the file of an entry is damaged.
            CacheMismatchError: the entries are of different models, templates or dtypes.
        """
        wanted = _asked(names)
        return GistCache.cat(self._caches_of(wanted))

    def __getitem__(self, name: str) -> GistCache:
        """The cache of one name or key; raises as :meth:`get`."""
        if not isinstance(name, str):
            raise StoreError(f"store[...] takes one name or key, got {name!r}; several: store.get([...])")
        return self.get(name)

    def __contains__(self, name: str) -> bool:
        """Whether there is an entry of this name or key. What can be no name is not there."""
        try:
            wanted = canonical(name)
        except StoreError:
            return False
        return bool(self._index.find([wanted]))

    def __len__(self) -> int:
        """How many entries :meth:`list` gives."""
        return self._index.count()

    def entry(self, name: str) -> StoreEntry:
        """What the index says of one ``name`` or key; its file is not read.

        Raises:
            StoreError: there is no such entry, or it is neither a name nor a key.
        """
        wanted = canonical(name)
        return self._found([wanted])[wanted]

    def list(self) -> builtins.list[StoreEntry]:
        """Every name with its entry, sorted by name, then entries without a name in the order they were made.

        Raises:
            CacheFormatError: the index is altered.
        """
        return self._index.all()

    def table(self, names: Sequence[str] | None = None, device: torch.device | str | None = None) -> GistTable:
        """Entries as one table, from which batches are gathered on the device without asking the index.

        Args:
            names: names or keys, in the order of the table's rows; None for all names.
            device: where the table lies; None for the CPU.

        Returns:
            A table as it is now: what is put into the store later is not in it.

        Raises:
            StoreError: there is no such entry, or no name at all.
            GistError: a name comes twice.
            CacheFormatError: the file of an entry is damaged.
            CacheMismatchError: the entries are of different models, templates or dtypes.
        """
        from gisting.table import GistTable

        if names is None:
            names = [entry.name for entry in self.list() if entry.name is not None]
            if not names:
                raise StoreError(f"{self.path} has no names to make a table of; give keys, or put something in")
        wanted = _asked(names)
        # Each is read once and goes into the table, so nothing that is in use is closed for it.
        return GistTable(self._caches_of(wanted, is_kept=False), names=wanted, device=device)

    # -- making --------------------------------------------------------------------------------------------------------

    def get_or_compress(
        self,
        model: PreTrainedModel,
        tokenizer: GistTokenizer,
        prompts: Sequence[str],
        num_gist_tokens: int | Sequence[int] = 1,
        *,
        names: Sequence[str | None] | None = None,
        condition: str = "gist",
        batch_size: int = 32,
        chunk_length: int | None = None,
    ) -> GistCache:
        """The caches of prompts: what is here is read, what is missing or damaged is compressed and stored.

        What comes back is always what the store holds: with a quantised storage the first call returns the same as the
        second, and two processes that compress a prompt at the same time get the same states, of whoever was first.

        Args:
            model: a patched model.
            tokenizer: the tokenizer it was patched for.
            prompts: B texts; the same one may come more than once and is compressed once.
            num_gist_tokens: k, one for all or one each.
            names: B names, or None where a prompt has none. A name that meant another prompt, k or model moves; what it
                meant stays, found by its text, until it is removed.
            condition: as for :func:`gisting.compress`.
            batch_size: how many prompts are run at once.
            chunk_length: as for :func:`gisting.compress`. With another one, or none, a prompt is another entry, even
                where it fits into one chunk.

        Returns:
            One cache of B prompts in their order, on the model's device and in its dtype.

        Raises:
            GistError: as :func:`gisting.compress`, or the numbers do not fit.
            StoreError: a name cannot be one or is given to two prompts; the store is read-only and lacks something.
        """
        from gisting.models.fingerprint import fingerprint
        from gisting.models.patch import require_patched
        from gisting.models.weights import input_weight

        require_patched(model, tokenizer)
        tokenizer.check_chunk_length(chunk_length)
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise GistError("prompts must be a list of one text or more, and nothing else")
        counts = [num_gist_tokens] * len(prompts) if isinstance(num_gist_tokens, int) else list(num_gist_tokens)
        if len(counts) != len(prompts):
            raise GistError(
                f"num_gist_tokens must be one for all {len(prompts)} prompts or one each, got {len(counts)}"
            )
        if any(isinstance(k, bool) or not isinstance(k, int) for k in counts):
            raise GistError(f"num_gist_tokens must be whole numbers, got {num_gist_tokens!r:.100}")
        weight = input_weight(model)
        owner = [fingerprint(model), tokenizer.fingerprint, condition, str(weight.dtype)]
        # At the end, and only where there is one: entries that were made before there were chunks keep their keys.
        owner += [] if chunk_length is None else [chunk_length]
        keys = [
            text_key([tokenizer.template.prompt_text(prompt), k, *owner])
            for prompt, k in zip(prompts, counts, strict=True)
        ]
        meaning = _meaning(names, keys)
        texts = dict(zip(keys, zip(prompts, counts, strict=True), strict=True))
        for attempt in range(_ATTEMPTS + 1):
            caches, damaged = self._opened([*texts])
            missing = {key: text for key, text in texts.items() if key not in caches}
            found = self._index.find([*meaning])
            if not missing and all(name in found and found[name].key == key for name, key in meaning.items()):
                return GistCache.cat([caches[key] for key in keys]).to(weight.device, weight.dtype)
            self._check_writable(f"{len(missing)} of {len(texts)} prompts are not in it, or have other names")
            if attempt < _ATTEMPTS:
                self._compress(
                    model,
                    tokenizer,
                    missing,
                    meaning,
                    damaged,
                    condition=condition,
                    batch_size=batch_size,
                    chunk_length=chunk_length,
                )
        raise StoreError(f"{self.path}: entries were removed {_ATTEMPTS} times as they were made; look who empties it")

    def put(self, name: str, cache: GistCache) -> None:
        """Store a cache of one prompt under a name, in place of what was there. When this returns, it is safe.

        Args:
            name: what it is called from now on.
            cache: of one prompt, on any device.

        Raises:
            StoreError: the name cannot be one, or the store is read-only.
            GistError: the cache is not of one prompt, or its numbers cannot be stored.
            OSError: it cannot be written.
        """
        self.put_many({name: cache})

    def put_many(self, caches: Mapping[str, GistCache]) -> None:
        """:meth:`put` for many at once, far quicker than one by one: all of them are stored, or none.

        Args:
            caches: of one prompt each, by name; a batch is put by ``dict(zip(names, batch))``.

        Raises:
            StoreError, GistError, OSError: as :meth:`put`.
        """
        self._check_writable("nothing can be put into it")
        named = {check_name(name): cache for name, cache in caches.items()}
        if len(named) != len(caches):
            raise StoreError("two names are spellings of one, in Unicode's composed form; give each cache a name")
        for name, cache in named.items():
            if len(cache) != 1:
                raise GistError(
                    f"{name!r} must be a cache of one prompt, got {len(cache)}; put_many(dict(zip(names, cache)))"
                )
        with self._objects.writing() as folder:
            made = self._write(folder, [*named.values()])
            self._commit(made, {name: new.entry.key for name, new in zip(named, made, strict=True)})

    # -- keeping -------------------------------------------------------------------------------------------------------

    def rename(self, name: str, new_name: str) -> None:
        """Give an entry ``new_name`` in place of ``name``.

        Raises:
            StoreError: there is no such name, or the new one is taken or cannot be one.
        """
        old, new = check_name(name), check_name(new_name)
        with self._index.writing() as connection:
            if old != new and connection.execute("SELECT 1 FROM names WHERE name = ?", (new,)).fetchone():
                raise StoreError(f"{new!r} is taken; remove it first: store.remove({new!r})")
            if connection.execute("UPDATE names SET name = ? WHERE name = ?", (new, old)).rowcount == 0:
                raise self._no_such([old])

    def remove(self, names: str | Collection[str]) -> None:
        """Remove ``names``, or with their keys entries and all their names. An entry goes with its last name, and its
        file with it.

        Raises:
            StoreError: there is no such entry; then nothing is removed.
        """
        wanted = _asked(names)
        with self._index.writing() as connection:
            found = self._find_in(connection, wanted)
            if missing := [name for name in wanted if name not in found]:
                raise self._no_such(missing)
            for name, entry in found.items():
                if is_key(name):
                    connection.execute("DELETE FROM names WHERE key = ?", (entry.key,))
                else:
                    connection.execute("DELETE FROM names WHERE name = ?", (name,))
            keys = {entry.key for entry in found.values()}
            _drop_unnamed(connection, keys)
        self._sweep(keys)

    def verify(self) -> builtins.list[StoreFault]:
        """Read every file, and compare with the index: present, whole (checksum), and what the index says it is.

        May run while others write.

        Returns:
            What is wrong, and what merely takes space (:attr:`StoreFault.is_harmless`); empty where all is well.
        """
        faults = [StoreFault("index", None, f"{self._index.path}: {line}") for line in self._index.faults()]
        entries = {entry.key: entry for entry in self._index.all()}
        # What looks wrong is looked at again while nobody can write: it may have been removed or replaced since.
        still = self._index.reading if self.is_read_only else self._index.writing
        for key in [key for key, entry in entries.items() if self._what_is_wrong(entry) is not None]:
            with still() as connection:
                for entry in self._find_in(connection, [key]).values():
                    if (message := self._what_is_wrong(entry)) is not None:
                        faults.append(StoreFault("torn", key, message))
        for key in [key for key in self._objects if key not in entries]:
            with still() as connection:
                if not self._find_in(connection, [key]) and self._objects.size(key) is not None:
                    message = f"{self._objects.path(key)} belongs to no entry; gc removes it"
                    faults.append(StoreFault("orphan", key, message))
        for path in self._objects.stale():
            faults.append(StoreFault("temporary", None, f"{path} was left by a writer that was killed; gc removes it"))
        return faults

    def gc(self, *, keep_models: Collection[str] | None = None, keep_unnamed: bool = True) -> int:
        """Delete files that no entry refers to and what killed writers left.

        Args:
            keep_models: fingerprints; entries of other models are removed. None keeps all.
            keep_unnamed: whether entries without a name stay, which are found by their text alone.

        Returns:
            The bytes freed.

        Raises:
            StoreError: the store is read-only, or has no entry of a model that is to be kept.
            CacheFormatError: the index is damaged, or files of entries are missing; then nothing is deleted, for it
                may be the index that is wrong.
        """
        faults = self._index.faults()
        with self._index.writing() as connection:
            keys = (key for (key,) in connection.execute("SELECT key FROM entries"))
            faults += [f"the file of {key} is missing" for key in keys if self._objects.size(key) is None]
            if faults:
                raise CacheFormatError(
                    f"{self.path} is damaged ({faults[0]}), so nothing is deleted; remove the entries that "
                    "store.verify() names, or restore their files"
                )
            if keep_models is not None:
                found = {model for (model,) in connection.execute("SELECT DISTINCT model FROM entries")}
                if isinstance(keep_models, str) or not keep_models or not {*keep_models} <= found:
                    raise StoreError(
                        f"keep_models must be a list of models that the store has, {_some(sorted(found))}, got "
                        f"{keep_models!r:.200}"
                    )
                for model in found.difference(keep_models):
                    keys = "SELECT key FROM entries WHERE model = ?"
                    connection.execute(f"DELETE FROM names WHERE key IN ({keys})", (model,))
                    connection.execute("DELETE FROM entries WHERE model = ?", (model,))
            if not keep_unnamed:
                connection.execute("DELETE FROM entries WHERE key NOT IN (SELECT key FROM names)")
        # Only now: files of entries that a killed process did not get to remove must still be there.
        return self._sweep(None) + sum(self._objects.stale(is_removed=True).values())

    def close(self) -> None:
        """Close the index and let go of open caches; the store opens again when it is used."""
        self._index.close()
        self._open_caches.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GistStore({str(self.path)!r}, {len(self)} entries)"

    # -- sharing -------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        names: Sequence[str] | None = None,
        *,
        title: str | None = None,
        **card: Any,
    ) -> None:
        """Write entries to a directory that can be uploaded: the files, ``index.jsonl`` and a card, ``README.md``.

        Args:
            folder: the directory; made where there is none. Entries of an earlier save that are not named now go.
            names: names or keys; None for all names.
            title: of the card; None for the directory's name.
            **card: ``data``, ``metrics``, ``license``, ``base_model`` and ``extra`` of :func:`gisting.card.card`.

        Raises:
            StoreError: there is no such entry, or one was removed meanwhile.
            CacheFormatError: the file of an entry is damaged.
            GistError: the card is refused.
            OSError: something cannot be written.
        """
        from gisting.store.hub import write_folder

        if names is None:
            names = [entry.name for entry in self.list() if entry.name is not None]
            if not names:
                raise StoreError(f"{self.path} has no names to share; give keys, or put something in")
        entries = self._found(_asked(names))
        folder = Path(folder)
        write_folder(folder, self._objects, [*entries.values()], title=title or folder.resolve().name, card=card)

    def push_to_hub(
        self,
        repo_id: str,
        names: Sequence[str] | None = None,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Upload gist caches",
        api: Any = None,
        **card: Any,
    ) -> str:
        """Upload entries to a repository on the Hugging Face hub; what it held of another store goes.

        Whoever can read it can use the prompts, and learn of their content what the states tell.

        Args:
            repo_id: ``"owner/name"``; made where there is none.
            names: names or keys; None for all names.
            private: whether a new repository can be read by its owner alone; None for the account's setting.
            revision: branch; None for the main one.
            token: access token; None for the one that is logged in.
            commit_message: what the commit is called.
            api: in place of :class:`huggingface_hub.HfApi`.
            **card: as for :meth:`save_pretrained`.

        Returns:
            Where the commit is.

        Raises:
            StoreError: there is no such entry.
            GistError: ``repo_id`` is no repository's, or the card is refused.
            OSError: the hub cannot be reached, or refuses.
        """
        from gisting.models.hub import upload
        from gisting.store.hub import DELETED, PATTERNS

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, names, title=repo_id, **card)
            return upload(
                folder,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message,
                allow_patterns=PATTERNS,
                delete_patterns=DELETED,
                api=api,
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        path: str | Path | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        api: Any = None,
        storage: str | None = None,
        max_open_bytes: int = MAX_OPEN_BYTES,
    ) -> Self:
        """A store of one's own with the entries that :meth:`save_pretrained` wrote or :meth:`push_to_hub` uploaded.

        Every line and every file is checked before it is taken over, all of them or none. What files cannot tell is
        whether a key belongs to the prompt that it claims: trust the source as that of a model.

        Args:
            name_or_path: a directory, or a repository on the hub, ``"owner/name"``.
            path: directory of the new store, which must be empty or absent; None for one beside the hub's own cache,
                which is used again when the same entries are asked for.
            revision: branch, tag or commit on the hub.
            token: access token; None for the one that is logged in.
            api: in place of :class:`huggingface_hub.HfApi`.
            storage: as for the store, for entries to come.
            max_open_bytes: as for the store.

        Raises:
            CacheFormatError: a line or file is not what a store writes, or leads out of the directory.
            StoreError: there is no such store, or ``path`` holds one.
            OSError: the hub cannot be reached, or refuses.
        """
        from gisting.store.hub import Source

        source = Source.find(name_or_path, revision=revision, token=token, api=api)
        store = cls(source.default_path if path is None else path, storage=storage, max_open_bytes=max_open_bytes)
        if len(store) and path is None and all(label in store for label in source.labels()):
            return store
        if len(store) and path is not None:
            raise StoreError(f"{path} holds a store already; open it: GistStore({str(path)!r}), or give another path")
        with store._objects.writing() as folder:
            made, meaning = source.read(folder)
            store._commit(made, meaning)
        return store

    # -- inside --------------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Make what is missing of the directory, unless it is something else."""
        index = self.path / INDEX
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = os.listdir(self.path)
        except (FileExistsError, NotADirectoryError) as error:
            raise StoreError(f"{self.path} is a file; give the directory of a store, or a new one") from error
        if INDEX in held and index.lstat().st_size:
            return
        if others := [name for name in held if name not in (OBJECTS, TEMPORARY) and not name.startswith(INDEX)]:
            raise StoreError(
                f"{self.path} is no store and not empty (it holds {_some(others)}); give the directory of a store, or "
                "a new one"
            )
        self._objects.make()
        if next(iter(self._objects), None) is not None and not (INDEX in held and index.lstat().st_size):
            raise CacheFormatError(
                f"{self.path} has files but its {INDEX} is missing or empty; restore it, or move the files away"
            )

    def _check_writable(self, reason: str) -> None:
        if self.is_read_only:
            raise StoreError(f"{self.path} was opened with is_read_only=True: {reason}; open it without")

    def _found(self, wanted: Sequence[str]) -> dict[str, StoreEntry]:
        found = self._index.find(wanted)
        if missing := [name for name in wanted if name not in found]:
            raise self._no_such(missing)
        return found

    def _no_such(self, names: Sequence[str]) -> StoreError:
        return StoreError(f"{self.path} has no entry {_some(names)}; store.list() tells what it has")

    def _caches_of(self, wanted: Sequence[str], *, is_kept: bool = True) -> builtins.list[GistCache]:
        found: dict[str, StoreEntry] = {}
        fault: Exception | None = None
        for _ in range(_ATTEMPTS):
            found = self._found(wanted)
            entries = {entry.key: entry for entry in found.values()}
            try:
                caches = {key: self._open(entry, is_kept=is_kept) for key, entry in entries.items()}
                return [caches[found[name].key] for name in wanted]
            except (FileNotFoundError, CacheFormatError) as error:
                fault = error  # unless it was removed or replaced since it was looked up
        if self._index.find(wanted) != found:
            raise StoreError(
                f"{self.path}: {_some(wanted)} changed {_ATTEMPTS} times while read; look who replaces them"
            )
        raise CacheFormatError(
            f"{self.path}: the file of an entry is missing or damaged ({fault}); store.verify() tells which are, "
            "get_or_compress makes them anew"
        ) from fault

    def _open(self, entry: StoreEntry, *, is_kept: bool = True) -> GistCache:
        cache = self._open_caches.get(entry.key, entry.sha256)
        if cache is None:
            cache = load_entry(self._objects.path(entry.key), entry)
            if is_kept:
                self._open_caches.put(entry.key, entry.sha256, cache)
        return cache

    def _opened(self, keys: Sequence[str]) -> tuple[dict[str, GistCache], set[str]]:
        """What is there of these keys, and those whose file is missing or damaged."""
        caches, damaged = {}, set()
        for key, entry in self._index.find(keys).items():
            try:
                caches[key] = self._open(entry)
            except (FileNotFoundError, CacheFormatError):
                damaged.add(key)
        return caches, damaged

    def _compress(
        self,
        model: PreTrainedModel,
        tokenizer: GistTokenizer,
        wanted: Mapping[str, tuple[str, int]],
        meaning: Mapping[str, str],
        damaged: Collection[str],
        *,
        condition: str,
        batch_size: int,
        chunk_length: int | None,
    ) -> None:
        """Compress and store ``wanted``, {key: (prompt, k)}, and give names their meaning."""
        if not wanted:
            self._commit([], meaning)
            return
        prompts, counts = [prompt for prompt, _ in wanted.values()], [k for _, k in wanted.values()]
        # Here and not at the top: this loads transformers, which reading a store does not need.
        from gisting.generation import compress

        cache = compress(
            model, tokenizer, prompts, counts, condition=condition, batch_size=batch_size, chunk_length=chunk_length
        ).to("cpu")
        lengths = [encoding.num_prompt_tokens for encoding in tokenizer.encode_prompts(prompts, counts)]
        with self._objects.writing() as folder:
            written = self._write(folder, [*cache])
            made = [
                NewEntry(
                    replace(new.entry, key=key, is_keyed_by_text=True, num_prompt_tokens=length),
                    new.file,
                    is_forced=key in damaged,
                )
                for key, length, new in zip(wanted, lengths, written, strict=True)
            ]
            self._commit(made, meaning)

    def _write(self, folder: Path, caches: Sequence[GistCache]) -> builtins.list[NewEntry]:
        """Files of caches of one prompt each, safe on the disk, keyed by content."""
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

        def write(numbered: tuple[int, GistCache]) -> NewEntry:
            number, cache = numbered
            file = folder / str(number)
            cache.save(file, self.storage)
            data = file.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            if not all(text.isprintable() for text in asdict(cache.origin).values()):
                raise StoreError(f"cache.origin must be of printable texts, got {cache.origin}; rename the template")
            entry = StoreEntry(
                name=None,
                key=content_key(sha256),
                is_keyed_by_text=False,
                num_gist_tokens=cache.num_gist_tokens[0],
                num_prompt_tokens=None,
                num_bytes=len(data),
                sha256=sha256,
                storage=self.storage or str(cache.dtype).removeprefix("torch."),
                **asdict(cache.origin),
                created=created,
            )
            # Same key, same bytes: to write them again does no harm, and mends a file that somebody damaged.
            return NewEntry(entry, file, is_forced=True)

        with ThreadPoolExecutor(min(_WRITERS, max(1, len(caches)))) as pool:
            return [*pool.map(write, enumerate(caches))]

    def _commit(self, made: Sequence[NewEntry], meaning: Mapping[str, str]) -> None:
        """Take over finished files, unless somebody was first, and give names their keys: all of it or nothing."""
        with self._index.writing() as connection:
            known = self._find_in(connection, [new.entry.key for new in made])
            taken = {
                new.entry.key: new
                for new in made
                if new.is_forced
                or new.entry.key not in known
                or self._objects.size(new.entry.key) != known[new.entry.key].num_bytes
            }
            self._objects.place({key: new.file for key, new in taken.items()})
            for new in taken.values():
                put_entry(connection, new.entry)
            left = {entry.key for entry in self._find_in(connection, [*meaning]).values()} - {*meaning.values()}
            connection.executemany(
                "INSERT OR REPLACE INTO names SELECT ?, key FROM entries WHERE key = ?", [*meaning.items()]
            )
            unnamed = _drop_unnamed(connection, left, is_text_kept=True)
        self._sweep(unnamed)

    def _find_in(self, connection: sqlite3.Connection, names: Sequence[str]) -> dict[str, StoreEntry]:
        return find_in(connection, names, str(self._index.path))

    def _sweep(self, keys: Collection[str] | None) -> int:
        """Delete the files of these keys, or all, that no entry refers to. Returns the bytes freed.

        A file is placed and deleted only with the write lock, so none that somebody is about to refer to is deleted.
        """
        if keys is not None and not keys:
            return 0
        with self._index.writing() as connection:
            if keys is None:
                keys = [*self._objects]
                known = {key for (key,) in connection.execute("SELECT key FROM entries")}
            else:
                known = {*self._find_in(connection, [*keys])}
            return sum(self._objects.remove(key) for key in keys if key not in known)

    def _what_is_wrong(self, entry: StoreEntry) -> str | None:
        path = self._objects.path(entry.key)
        try:
            check_entry(path, entry)
        except FileNotFoundError:
            return f"{path} is missing"
        except (GistError, OSError) as error:
            return str(error)
        return None


def _asked(names: str | Collection[str]) -> list[str]:
    """One name or several as a list, each as the index holds it."""
    found = [canonical(name) for name in ([names] if isinstance(names, str) else names)]
    if not found:
        raise StoreError("names is empty; give at least one name or key")
    return found


def _meaning(names: Sequence[str | None] | None, keys: Sequence[str]) -> dict[str, str]:
    """{name: key}, of prompts that have a name."""
    if names is None:
        return {}
    if isinstance(names, str) or len(names) != len(keys):
        raise StoreError(f"names must be a list of {len(keys)}, a name or None for each prompt, got {names!r:.100}")
    meaning: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        if name is not None and meaning.setdefault(check_name(name), key) != key:
            raise StoreError(f"names gives {name!r} to two prompts; give each prompt its own")
    return meaning


def _drop_unnamed(connection: sqlite3.Connection, keys: Collection[str], *, is_text_kept: bool = False) -> list[str]:
    """Remove those of these entries that have no name. Returns their keys."""
    return [
        key
        for key in keys
        if connection.execute(
            "DELETE FROM entries WHERE key = ? AND NOT (is_keyed_by_text AND ?) "
            "AND NOT EXISTS (SELECT 1 FROM names WHERE names.key = entries.key)",
            (key, is_text_kept),
        ).rowcount
    ]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name!r:.80}" for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
