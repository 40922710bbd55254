"""``GistStore``: thousands of compressed prompts, found by name or by text, in a directory that processes share.

Place in the flow: generation -> **store** -> generation. The public face of this package: the index knows which entries
there are (``index.py``), the objects are their files (``objects.py``), the reader keeps opened caches (``reading.py``).
:class:`~gisting.cache.GistCache` knows what is in a file.
"""

# Over 600 lines because every public method says what its arguments are and what it raises.

from __future__ import annotations

import builtins
import os
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gisting.cache import GistCache
from gisting.errors import CacheFormatError, CacheMismatchError, GistError, StoreError
from gisting.storage import STORAGES, check_path
from gisting.store.checking import StoreFault, collect_garbage, find_faults
from gisting.store.hub import DELETED, PATTERNS, Source, write_folder
from gisting.store.index import (
    INDEX,
    DiskFullError,
    Index,
    StoreEntry,
    canonical,
    check_name,
    find_all,
    find_in,
    is_key,
    not_found,
    some_of,
)
from gisting.store.journal import JOURNAL
from gisting.store.objects import OBJECTS, TEMPORARY, Objects
from gisting.store.reading import ATTEMPTS, Reader, about_of, load_entry
from gisting.store.writing import commit, commit_in_place, drop_unnamed, sweep, write_caches
from gisting.table import GistTable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from gisting.tokens import GistTokenizer

__all__ = ["GistStore", "StoreFault"]

MAX_OPEN_BYTES = 256 * 2**20
# What a write leaves if its process is killed; see write_atomically.
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.tmp")


class GistStore:
    """A directory of compressed prompts.

    Any number of threads and processes on one machine may read and write at once, including forked ones. A write that
    has returned survives ``kill -9`` of any process, and a power failure as far as the disk keeps what it acknowledged;
    a write that was cut off leaves nothing that is ever read. The directory must be on a disk of this machine, because
    SQLite's write-ahead log does not work over a network (sqlite.org/wal.html). Linux and macOS.

    An entry is found by its *key*. For ``get_or_compress``, that is a SHA-256 over the prompt as the template writes
    it, k, the fingerprints of the model and of the tokenizer (with its template), the condition, the dtype of the
    states and, if one is given, the ``chunk_length``. For a cache that was put in, it is a hash of the file's content.
    *Names* are aliases for keys: 1 to 200 printable characters without slashes and backslashes, with no space at either
    end, not ``.`` or ``..``, not 64 hex digits (that is a key), in Unicode's composed form. They exist only in the
    index and never become part of a path. Prompts are not stored, but anyone who guesses one can check the guess
    against its key.

    A directory from an untrusted source is read with suspicion: an index with other tables, altered files and links are
    refused with an error. A store cannot tell who made the states; trust it as you would trust a checkpoint.

    Args:
        path: the directory. It is made if it does not exist, and refused if it holds anything else.
        storage: how to store the numbers of new entries, one of ``gisting.storage.STORAGES``; None keeps every bit.
            Existing entries stay unchanged.
        max_open_bytes: how much memory opened caches may take in this process. The least recently used ones are closed
            first; 0 reads the file every time.
        is_read_only: write nothing, for stores that others maintain. If this process may not write to the directory and
            no process has it open, the index is used as it was when opened.

    Raises:
        StoreError: the directory is not a store and may not become one, or cannot be used.
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
        check_path(path)
        # Absolute, because a process may change its directory.
        self.path = Path(path).absolute()
        self.storage = storage
        self.is_read_only = is_read_only
        self._objects = Objects(self.path)
        if not is_read_only:
            self._make()
        self._index = Index(self.path, is_read_only=is_read_only)
        self._reader = Reader(self._index, self._objects, max_open_bytes)
        self._objects.check()

    # -- finding -------------------------------------------------------------------------------------------------------

    def get(self, names: str | Sequence[str]) -> GistCache:
        """Return the caches of names or keys as one batch, in their order and in the dtype they had before storing.

        The index is queried every time, so an entry that another process has replaced or removed is never returned.

        Args:
            names: one, or B of them; one may occur more than once.

        Returns:
            A cache of B prompts on the CPU, a copy that may be changed.

        Raises:
            StoreError: there is no such entry, or something is neither a name nor a key.
            CacheFormatError: the file of an entry is damaged.
            CacheMismatchError: the entries are of different models, templates or dtypes.
        """
        wanted = _as_list(names)
        caches = self._reader.read(wanted)
        try:
            cache = GistCache.cat(caches)
        except CacheMismatchError as error:
            raise CacheMismatchError(f"{self._dated(wanted)} are not of one kind: {error}") from error
        if len({*wanted}) > 1:
            return cache
        return replace(cache, origin=replace(cache.origin, name=self._dated(wanted)))

    def __getitem__(self, name: str) -> GistCache:
        """Return the cache of one name or key; raises as :meth:`get`."""
        if not isinstance(name, str):
            raise StoreError(f"store[...] takes one name or key, got {name!r}; for several use store.get([...])")
        return self.get(name)

    def __contains__(self, name: str) -> bool:
        """Whether there is an entry of this name or key. False for anything that cannot be a name."""
        try:
            wanted = canonical(name)
        except StoreError:
            return False
        return bool(self._index.find([wanted]))

    def __len__(self) -> int:
        """Return the number of entries that :meth:`list` returns."""
        return self._index.count()

    def entry(self, name: str) -> StoreEntry:
        """Return what the index says about one ``name`` or key, without reading its file.

        Raises:
            StoreError: there is no such entry, or it is neither a name nor a key.
        """
        wanted = canonical(name)
        return find_all(self._index, [wanted])[wanted]

    def about(self, name: str) -> dict[str, Any] | None:
        """Return how the gist of one ``name`` or key was made and how good it is, as :attr:`GistCache.about` says it.

        Raises:
            StoreError: there is no such entry, or it is neither a name nor a key.
        """
        return about_of(self._objects.path(self.entry(name).key))

    def list(self) -> builtins.list[StoreEntry]:
        """Return every name with its entry, sorted by name, then the entries without a name, oldest first.

        Raises:
            CacheFormatError: the index is altered.
        """
        return self._index.all()

    def table(self, names: Sequence[str] | None = None, device: torch.device | str | None = None) -> GistTable:
        """Load entries into one table, from which batches are gathered on the device without querying the index.

        Args:
            names: names or keys, in the order of the table's rows; None for all names.
            device: where to place the table; None for the CPU.

        Returns:
            A snapshot: the table does not contain what is put into the store later.

        Raises:
            StoreError: there is no such entry, or the store has no names at all.
            GistError: a name is given twice.
            CacheFormatError: the file of an entry is damaged.
            CacheMismatchError: the entries are of different models, templates or dtypes.
        """
        wanted = _as_list(self._all_names("to make a table of") if names is None else names)
        # Each is read once and copied into the table, so it must not push out an opened cache that is in use.
        caches = self._reader.read(wanted, is_kept=False)
        found = self._index.find(wanted)
        named = [
            replace(cache, origin=replace(cache.origin, name=_dated(name, found.get(name))))
            for name, cache in zip(wanted, caches, strict=True)
        ]
        return GistTable(named, names=wanted, device=device)

    # -- making --------------------------------------------------------------------------------------------------------

    def get_or_compress(
        self,
        model: PreTrainedModel,
        tokenizer: GistTokenizer,
        prompts: Sequence[str],
        num_gist_tokens: int | Sequence[int] | None = None,
        *,
        names: Sequence[str | None] | None = None,
        condition: str = "gist",
        batch_size: int = 32,
        chunk_length: int | None = None,
    ) -> GistCache:
        """Return the caches of prompts: read those in the store, and compress and store the missing or damaged ones.

        The result is always what the store holds. With a quantised storage the first call returns the same as the
        second, and two processes that compress a prompt at the same time get the same states, from the one that was
        first.

        Args:
            model: a patched model.
            tokenizer: the tokenizer it was patched for.
            prompts: B texts. One may occur more than once, and is compressed once.
            num_gist_tokens: k, one number for all or one for each; None as for :func:`gisting.compress`.
            names: B names, or None where a prompt has none. A name that referred to another prompt, k or model is
                moved; the entry it referred to stays in the store and is found by its text until it is removed.
            condition: as for :func:`gisting.compress`.
            batch_size: how many prompts to run at once.
            chunk_length: as for :func:`gisting.compress`. Each chunk length makes a separate entry, even for a prompt
                that fits into one chunk.

        Returns:
            One cache of B prompts in their order, on the model's device and in its dtype.

        Raises:
            GistError: as :func:`gisting.compress`, or the numbers do not fit.
            StoreError: a name is not valid or is given to two prompts, or the store is read-only and lacks something.
        """
        # Loads transformers, which reading a store does without.
        from gisting.generation.checks import chosen_k, listed
        from gisting.models.state import require_patched
        from gisting.models.weights import input_weight
        from gisting.store.compressing import Compressor, check_names, check_prompts, write

        require_patched(model, tokenizer)
        tokenizer.check_chunk_length(chunk_length)
        prompts = prompts if isinstance(prompts, str) else listed("prompts", prompts)
        counts = check_prompts(prompts, chosen_k(model, num_gist_tokens))
        compressor = Compressor(model, tokenizer, condition, batch_size, chunk_length)
        keys = compressor.keys(prompts, counts)
        key_of_name = check_names(names, keys)
        texts = dict(zip(keys, zip(prompts, counts, strict=True), strict=True))
        for attempt in range(ATTEMPTS + 1):
            caches, damaged = self._reader.read_undamaged([*texts])
            missing = {key: text for key, text in texts.items() if key not in caches}
            found = self._index.find([*key_of_name])
            if not missing and all(name in found and found[name].key == key for name, key in key_of_name.items()):
                weight = input_weight(model)
                return GistCache.cat([caches[key] for key in keys]).to(weight.device, weight.dtype)
            self._check_writable(f"{len(missing)} of {len(texts)} prompts are not in it, or have other names")
            if attempt < ATTEMPTS and missing:
                compressed = compressor.compress(missing)
                with self._objects.writing() as folder:
                    commit(self._index, self._objects, write(folder, compressed, damaged, self.storage), key_of_name)
            elif attempt < ATTEMPTS:
                commit(self._index, self._objects, [], key_of_name)
        raise StoreError(
            f"{self.path}: entries were removed {ATTEMPTS} times right after they were made; find out what removes them"
        )

    def put(self, name: str, cache: GistCache) -> None:
        """Store a cache of one prompt under a name, replacing what the name referred to. On return it is on disk.

        Args:
            name: the name.
            cache: a cache of one prompt, on any device.

        Raises:
            StoreError: the name is not valid, or the store is read-only.
            GistError: the cache is not of one prompt, or its numbers cannot be stored.
            OSError: it cannot be written.
        """
        self.put_many({name: cache})

    def put_many(self, caches: Mapping[str, GistCache]) -> None:
        """Store many caches at once, much faster than one by one: either all of them are stored, or none.

        Args:
            caches: caches of one prompt each, by name; for a batch, ``dict(zip(names, batch))``.

        Raises:
            StoreError: a name is not valid, two names are the same, or the store is read-only.
            GistError: a cache is not of one prompt, or its numbers cannot be stored.
            OSError: a file cannot be written.
        """
        self._check_writable("nothing can be put into it")
        named = {check_name(name): cache for name, cache in caches.items()}
        if len(named) != len(caches):
            raise StoreError("two names are the same in Unicode's composed form; give each cache a different name")
        for name, cache in named.items():
            if len(cache) != 1:
                raise GistError(
                    f"{name!r} must be a cache of one prompt, got {len(cache)}; use put_many(dict(zip(names, cache)))"
                )
        with self._objects.writing() as folder:
            made = write_caches(folder, [*named.values()], self.storage)
            key_of_name = {name: new.entry.key for name, new in zip(named, made, strict=True)}
            commit(self._index, self._objects, made, key_of_name)

    def note(self, name: str, *, expected_sha256: str | None = None, **facts: Any) -> None:
        """Add facts to what is known about the gist of a name or key; the states stay as they are, bit by bit.

        The entry stays where its text finds it. An entry that was put in gets another key, which all its names follow,
        because its key is a hash of the file.

        Args:
            name: the name or key.
            expected_sha256: the checksum of the file that the facts are about, :attr:`StoreEntry.sha256` of when it was
                read; None for whatever has the name now.
            **facts: as for :meth:`GistCache.with_about`.

        Raises:
            StoreError: there is no such entry, it has another checksum than expected, another process changed it on
                every attempt, or the store is read-only.
            GistError: the facts are not JSON.
            CacheFormatError: the file of the entry is damaged.
            FileNotFoundError: it is gone.
        """
        self._check_writable(f"nothing can be noted about {name!r}")
        for _ in range(ATTEMPTS):
            entry = self.entry(name)
            if expected_sha256 is not None and entry.sha256 != expected_sha256:
                raise StoreError(
                    f"{name!r:.100} was replaced or noted about after it was read, so the facts may be about another "
                    "gist; read it again"
                )
            try:
                cache = load_entry(self._objects.path(entry.key), entry).with_about(**facts)
            except (FileNotFoundError, CacheFormatError):
                if self._index.find([canonical(name)]) == {canonical(name): entry}:
                    raise
                continue  # it was removed or replaced after it was looked up
            with self._objects.writing() as folder:
                (new,) = write_caches(folder, [cache], entry.storage)
                kept = replace(new.entry, created=entry.created, num_prompt_tokens=entry.num_prompt_tokens)
                if entry.is_keyed_by_text:
                    kept = replace(kept, key=entry.key, is_keyed_by_text=True)
                if commit_in_place(self._index, self._objects, canonical(name), entry, replace(new, entry=kept)):
                    return
        raise StoreError(
            f"{self.path}: {name!r:.100} changed {ATTEMPTS} times while facts were noted about it; find out what "
            "replaces it"
        )

    # -- maintaining ---------------------------------------------------------------------------------------------------

    def rename(self, name: str, new_name: str) -> None:
        """Rename the entry ``name`` to ``new_name``.

        Raises:
            StoreError: there is no such name, or the new one is taken or not valid.
        """  # noqa: DOC501
        old, new = check_name(name), check_name(new_name)
        with self._index.writing() as connection:
            if old != new and connection.execute("SELECT 1 FROM names WHERE name = ?", (new,)).fetchone():
                raise StoreError(f"{new!r} is taken; remove it first: store.remove({new!r})")
            if connection.execute("UPDATE names SET name = ? WHERE name = ?", (new, old)).rowcount == 0:
                raise not_found(self._index, [old])

    def remove(self, names: str | Collection[str]) -> None:
        """Remove ``names``; a key removes the entry with all its names.

        An entry and its file are deleted with its last name. On a full disk, where the index cannot be written to, the
        files are deleted first.

        Raises:
            StoreError: there is no such entry; then nothing is removed.
        """
        wanted = _as_list(names)
        try:
            self._remove(wanted)
        except DiskFullError:
            self._free(wanted)
            self._remove(wanted)

    def _free(self, wanted: Sequence[str]) -> None:
        """Delete the files of entries that lose their last name, before they lose it."""
        with self._index.writing() as connection:
            found = find_in(connection, wanted, str(self._index.path))
            for key in {entry.key for entry in found.values()}:
                names = {name for (name,) in connection.execute("SELECT name FROM names WHERE key = ?", (key,))}
                if key in wanted or names <= {*wanted}:
                    self._objects.remove(key)

    def _remove(self, wanted: Sequence[str]) -> None:
        with self._index.writing() as connection:
            found = find_in(connection, wanted, str(self._index.path))
            if missing := [name for name in wanted if name not in found]:
                raise not_found(self._index, missing)
            for name, entry in found.items():
                if is_key(name):
                    connection.execute("DELETE FROM names WHERE key = ?", (entry.key,))
                else:
                    connection.execute("DELETE FROM names WHERE name = ?", (name,))
            keys = {entry.key for entry in found.values()}
            drop_unnamed(connection, keys)
        sweep(self._index, self._objects, keys)

    def verify(self) -> builtins.list[StoreFault]:
        """Read every file and check that it is present, whole (checksum), and what the index says it is.

        May run while others write.

        Returns:
            What is wrong, and what merely takes up space (:attr:`StoreFault.is_harmless`); empty if all is well.
        """
        return find_faults(self._index, self._objects, is_read_only=self.is_read_only)

    def gc(self, *, keep_models: Collection[str] | None = None, keep_unnamed: bool = True) -> int:
        """Delete files that no entry refers to and what killed writers left.

        Args:
            keep_models: fingerprints; entries of other models are removed. None keeps all.
            keep_unnamed: whether to keep entries without a name, which can only be found by their text.

        Returns:
            The bytes freed.

        Raises:
            StoreError: the store is read-only, or has no entry of a model in ``keep_models``.
            CacheFormatError: the index is damaged, or files of entries are missing. Then nothing is deleted, because
                it may be the index that is wrong.
        """
        return collect_garbage(self._index, self._objects, keep_models=keep_models, keep_unnamed=keep_unnamed)

    @staticmethod
    def rebuild(path: str | Path) -> builtins.list[StoreFault]:
        """Make the index of a store again, if it is damaged or gone, from the files and the journal of names.

        Nothing is lost: the files hold the states and what they were made for, and ``names.jsonl`` holds the names. The
        old index stays in the directory as ``index.sqlite.old``. Other processes may have the store open; they find the
        new index at their next call. A call between the moves of the two indexes, which follow each other at once,
        fails with a :class:`StoreError` that says the index was moved or deleted; it can be repeated.

        Args:
            path: the directory of the store.

        Returns:
            The files that cannot be read. They stay where they are, without an entry.

        Raises:
            StoreError: the directory is not that of a store, or another process keeps the index locked.
            OSError: the new index cannot be written.
        """
        from gisting.store.rebuilding import rebuild

        return rebuild(Path(path).absolute())

    def close(self) -> None:
        """Close the index and release opened caches. The store opens again when it is used."""
        self._index.close()
        self._reader.open_caches.clear()

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
            folder: the directory, made if it does not exist. Entries of an earlier save that are not named now are
                deleted from it.
            names: names or keys; None for all names.
            title: title of the card; None for the directory's name.
            **card: ``data``, ``metrics``, ``license``, ``base_model`` and ``extra`` of :func:`gisting.card.card`.

        Raises:
            StoreError: there is no such entry, or one was removed meanwhile.
            CacheFormatError: the file of an entry is damaged.
            GistError: the card is refused.
            OSError: something cannot be written.
        """
        entries = find_all(self._index, _as_list(self._all_names("to share") if names is None else names))
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
        """Upload entries to a repository on the Hugging Face hub, replacing any store that it held.

        Anyone who can read the repository can use the prompts, and learn what the states reveal of their content.

        Args:
            repo_id: ``"owner/name"``; the repository is created if it does not exist.
            names: names or keys; None for all names.
            private: whether to make a new repository private; None for the account's setting.
            revision: branch; None for the main one.
            token: access token; None for the one that is logged in.
            commit_message: message of the commit.
            api: used instead of a new :class:`huggingface_hub.HfApi`.
            **card: as for :meth:`save_pretrained`.

        Returns:
            The URL of the commit.

        Raises:
            StoreError: there is no such entry.
            GistError: ``repo_id`` is not that of a repository, or the card is refused.
            OSError: the hub cannot be reached, or refuses.
        """
        from gisting.models.hub import upload

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
        """Make a store of the entries that :meth:`save_pretrained` wrote or :meth:`push_to_hub` uploaded.

        Every line and every file is checked before it is added; either all are added, or none. Checking files cannot
        show whether a key really belongs to the prompt that it claims: trust the source as you would trust a model's.

        Args:
            name_or_path: a directory, or a repository on the hub, ``"owner/name"``.
            path: directory of the new store, which must be empty or absent; None for one next to the hub's cache, which
                is used again when the same entries are requested.
            revision: branch, tag or commit on the hub.
            token: access token; None for the one that is logged in.
            api: used instead of a new :class:`huggingface_hub.HfApi`.
            storage: as for the store; applies to entries added later.
            max_open_bytes: as for the store.

        Raises:
            CacheFormatError: a line or file is not one that a store writes, or leads out of the directory.
            StoreError: there is no such store, or ``path`` already holds one.
            OSError: the hub cannot be reached, or refuses.
        """
        source = Source.find(name_or_path, revision=revision, token=token, api=api)
        store = cls(source.default_path if path is None else path, storage=storage, max_open_bytes=max_open_bytes)
        if len(store) and path is None and all(label in store for label in source.labels()):
            return store
        if len(store) and path is not None:
            raise StoreError(
                f"{path} already holds a store; open it with GistStore({str(path)!r}), or give another path"
            )
        with store._objects.writing() as folder:
            made, key_of_name = source.read(folder)
            commit(store._index, store._objects, made, key_of_name)
        return store

    # -- inside --------------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Make what is missing of the directory, unless it holds something else."""
        index = self.path / INDEX
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = os.listdir(self.path)
        except (FileExistsError, NotADirectoryError) as error:
            raise StoreError(f"{self.path} is a file; give the directory of a store, or a new one") from error
        if INDEX in held and index.lstat().st_size:
            return
        if others := [
            name
            for name in held
            if name not in (OBJECTS, TEMPORARY, JOURNAL)
            and not name.startswith(INDEX)
            and not _UNFINISHED.fullmatch(name)
        ]:
            raise StoreError(
                f"{self.path} is not a store and not empty (it holds {some_of(others)}); give the directory of a "
                "store, or a new one"
            )
        self._objects.make()
        if next(iter(self._objects), None) is not None and not (INDEX in held and index.lstat().st_size):
            raise CacheFormatError(
                f"{self.path} has files but its {INDEX} is missing or empty; make it again from the files: gisting "
                f"store rebuild {self.path}"
            )

    def _dated(self, wanted: Sequence[str]) -> str:
        """Write names with the days on which they were compressed."""
        found = self._index.find(wanted)
        names = [*dict.fromkeys(wanted)]
        shown = [_dated(name, found.get(name)) for name in names[:4]]
        return ", ".join([*shown, *(["..."] if len(names) > 4 else [])])

    def _check_writable(self, reason: str) -> None:
        if self.is_read_only:
            raise StoreError(f"{self.path} was opened with is_read_only=True: {reason}; open it without that")

    def _all_names(self, purpose: str) -> builtins.list[str]:
        names = [entry.name for entry in self.list() if entry.name is not None]
        if not names:
            raise StoreError(f"{self.path} has no names {purpose}; give keys, or add an entry")
        return names


def _dated(name: str, entry: StoreEntry | None) -> str:
    """Write a name or key with the day on which its prompt was compressed, if that is known."""
    return f"{name[:12] if is_key(name) else name!r}{'' if entry is None else f' of {entry.created[:10]}'}"


def _as_list(names: str | Collection[str]) -> list[str]:
    """Return one name or several as a list, each as the index holds it."""
    found = [canonical(name) for name in ([names] if isinstance(names, str) else names)]
    if not found:
        raise StoreError("names is empty; give at least one name or key")
    return found
