"""A directory of compressed prompts: found by name or by text, shared by many processes, safe against being killed."""

from gisting.store.index import StoreEntry
from gisting.store.store import GistStore, StoreFault

__all__ = ["GistStore", "StoreEntry", "StoreFault"]
