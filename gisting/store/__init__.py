"""A directory of compressed prompts: found by name or by text, shared by processes, safe against being killed."""

from typing import TYPE_CHECKING, Any

from gisting.store.index import StoreEntry

if TYPE_CHECKING:
    from gisting.store.store import GistStore, StoreFault

__all__ = ["GistStore", "StoreEntry", "StoreFault"]


def __getattr__(name: str) -> Any:
    # On first use, because reading only the index, as the shell's completion of names does, needs no torch.
    if name not in ("GistStore", "StoreFault"):
        raise AttributeError(f"module 'gisting.store' has no attribute {name!r}")
    from gisting.store import store

    return getattr(store, name)
