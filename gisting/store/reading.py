"""Read the file of an entry, and check that it is what the index says it is.

Place in the flow: below the store. :meth:`GistCache.load` knows what a cache file must look like, and refuses links.
This module adds what the entry says about the file, and keeps opened caches in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheFormatError, StoreError
from gisting.storage import inspect
from gisting.store.index import Index, StoreEntry, content_key, find_all, some_of
from gisting.store.lru import BoundedLRU
from gisting.store.objects import Objects

__all__ = ["ATTEMPTS", "Reader", "about_of", "check_size", "load_entry"]

# How often to look up an entry, or to make it, while another process keeps removing it.
ATTEMPTS = 3
# What a cache takes in addition to its states: Python and torch objects, measured as 0.9 KB per tensor and 5.5 KB in
# total.
_TENSOR_BYTES = 1024
_CACHE_BYTES = 8192


class Reader:
    """The caches of a store, read from their files once and then kept open.

    Args:
        index: which entries there are. It is queried every time, so that a replaced or removed entry is never returned.
        objects: their files.
        max_open_bytes: how much memory the opened caches may take.
    """

    def __init__(self, index: Index, objects: Objects, max_open_bytes: int) -> None:
        self._index = index
        self._objects = objects
        # By key, with the checksum of the file, which changes when the key is written again.
        self.open_caches: BoundedLRU[str, tuple[str, GistCache]] = BoundedLRU(max_open_bytes)

    def read(self, wanted: Sequence[str], *, is_kept: bool = True) -> list[GistCache]:
        """Return the caches of names and keys, in their order.

        Args:
            wanted: names and keys.
            is_kept: whether to keep them open.

        Raises:
            StoreError: there is no such entry, or it changed on every attempt to read it.
            CacheFormatError: the file of an entry is missing or damaged.
        """
        found: dict[str, StoreEntry] = {}
        fault: Exception | None = None
        for _ in range(ATTEMPTS):
            found = find_all(self._index, wanted)
            entries = {entry.key: entry for entry in found.values()}
            try:
                caches = {key: self._open(entry, is_kept=is_kept) for key, entry in entries.items()}
                return [caches[found[name].key] for name in wanted]
            except (FileNotFoundError, CacheFormatError) as error:
                fault = error  # or the entry was removed or replaced after it was looked up
        root = self._objects.root
        if self._index.find(wanted) != found:
            raise StoreError(
                f"{root}: {some_of(wanted)} changed {ATTEMPTS} times while being read; find out what replaces them"
            )
        raise CacheFormatError(
            f"{root}: the file of an entry is missing or damaged ({fault}); store.verify() lists the damaged ones, "
            "get_or_compress makes them again"
        ) from fault

    def read_undamaged(self, keys: Sequence[str]) -> tuple[dict[str, GistCache], set[str]]:
        """Return the caches of those ``keys`` that can be read, and the keys whose file is missing or damaged."""
        caches, damaged = {}, set()
        for key, entry in self._index.find(keys).items():
            try:
                caches[key] = self._open(entry)
            except (FileNotFoundError, CacheFormatError):
                damaged.add(key)
        return caches, damaged

    def _open(self, entry: StoreEntry, *, is_kept: bool = True) -> GistCache:
        found = self.open_caches.get(entry.key)
        if found is not None and found[0] == entry.sha256:
            return found[1]
        cache = load_entry(self._objects.path(entry.key), entry)
        if is_kept:
            num_bytes = cache.num_bytes + 2 * len(cache.keys) * _TENSOR_BYTES + _CACHE_BYTES
            self.open_caches.put(entry.key, (entry.sha256, cache), num_bytes)
        return cache


def about_of(path: Path) -> dict[str, Any] | None:
    """Return what a file says about how its gist was made and how good it is; None if nothing, or if it is unreadable.

    Args:
        path: the file of an entry, of which only the header is read.
    """
    try:
        about = inspect(path)["manifest"].get("about")
    except (OSError, CacheFormatError):
        return None
    return about[0] if isinstance(about, list) and about and isinstance(about[0], dict) else None


def check_size(path: Path, entry: StoreEntry) -> None:
    """Raise unless a file has the size that its entry says.

    Args:
        path: the file.
        entry: what the index says about it.

    Raises:
        CacheFormatError: it has another size.
        FileNotFoundError: there is no such file.
    """
    size = os.lstat(path).st_size
    if size != entry.num_bytes:
        raise CacheFormatError(f"{path} is truncated or altered: it has {size} bytes, its entry says {entry.num_bytes}")


def load_entry(path: Path, entry: StoreEntry) -> GistCache:
    """Load the cache of an entry, if the file is exactly the one that the entry describes.

    This is the only check, for everyone who reads: one that let more pass would hand out what others call damaged.

    Args:
        path: its file, in the store.
        entry: what the index says about it.

    Raises:
        CacheFormatError: the file is damaged, or is not the one that the entry describes.
        FileNotFoundError: there is no such file.
    """
    if path.parent.is_symlink():
        raise CacheFormatError(f"{path.parent} is a link; the files of a store are never reached through one")
    check_size(path, entry)
    cache = GistCache.load(path)
    origin = CacheOrigin(entry.model, entry.tokenizer, entry.template, entry.condition)
    if cache.origin != origin or cache.num_gist_tokens != [entry.num_gist_tokens]:
        raise CacheFormatError(
            f"{path} is not the file that its entry describes: it holds k={cache.num_gist_tokens} of {cache.origin}, "
            f"the entry says k={entry.num_gist_tokens} of {origin}"
        )
    if (storage := inspect(path)["storage"]) != entry.storage:
        raise CacheFormatError(f"{path} is stored as {storage}, its entry says {entry.storage!r}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise CacheFormatError(f"{path} is altered: its checksum is {found}, its entry says {entry.sha256}")
    if not entry.is_keyed_by_text and entry.key != content_key(entry.sha256):
        raise CacheFormatError(f"{path} is altered: its key does not match its content")
    return cache
