"""The file of an entry, read with suspicion: it must be what the index says it is.

Place in the flow: below the store. What a cache file must be like is known to :meth:`GistCache.load`, which also
refuses links; here is what an entry adds to that.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheFormatError
from gisting.storage import inspect
from gisting.store.index import StoreEntry, content_key

__all__ = ["check_entry", "load_entry"]


def load_entry(path: Path, entry: StoreEntry) -> GistCache:
    """The cache of an entry.

    Args:
        path: its file, in the store.
        entry: what the index says of it.

    Raises:
        CacheFormatError: the file is damaged, or another than the entry speaks of.
        FileNotFoundError: it is not there.
    """
    if path.parent.is_symlink():
        raise CacheFormatError(f"{path.parent} is a link; a file of a store is never reached through one")
    size = os.lstat(path).st_size
    if size != entry.num_bytes:
        raise CacheFormatError(f"{path} is truncated or altered: it has {size} bytes, its entry says {entry.num_bytes}")
    cache = GistCache.load(path)
    origin = CacheOrigin(entry.model, entry.tokenizer, entry.template, entry.condition)
    if cache.origin != origin or cache.num_gist_tokens != [entry.num_gist_tokens]:
        raise CacheFormatError(
            f"{path} is another file than its entry speaks of: it holds k={cache.num_gist_tokens} of {cache.origin}, "
            f"the entry says k={entry.num_gist_tokens} of {origin}"
        )
    return cache


def check_entry(path: Path, entry: StoreEntry) -> None:
    """Raise unless the file is the very one that the entry speaks of: :func:`load_entry`, and checksum and key.

    Args:
        path: its file, in the store.
        entry: what the index says of it.

    Raises:
        CacheFormatError: it is not.
        FileNotFoundError: it is not there.
    """
    load_entry(path, entry)
    if (storage := inspect(path)["storage"]) != entry.storage:
        raise CacheFormatError(f"{path} is stored as {storage}, its entry says {entry.storage!r}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise CacheFormatError(f"{path} is altered: its checksum is {found}, its entry says {entry.sha256}")
    if not entry.is_keyed_by_text and entry.key != content_key(entry.sha256):
        raise CacheFormatError(f"{path} is altered: its key is not that of its content")
