"""Gisting: press repeated prompts into a few cached gist tokens, for unmodified Hugging Face models.

Public names are loaded on first use; importing this package imports no model code and changes nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gisting._version import __version__

if TYPE_CHECKING:
    from gisting.attention import interval_attention
    from gisting.cache import GistCache
    from gisting.data.collate import GistCollator
    from gisting.data.records import Record, load_records
    from gisting.distillation import distill
    from gisting.errors import GistError
    from gisting.eval.check import check_gist
    from gisting.generation import compress, converse, generate
    from gisting.models.check import check_model
    from gisting.models.hub import push_to_hub, save_pretrained
    from gisting.models.load import load
    from gisting.models.patch import patch, unpatch
    from gisting.store import GistStore
    from gisting.table import GistTable
    from gisting.tokens import GistTokenizer, Template
    from gisting.visibility import Visibility

_HOMES = {
    "GistCache": "cache",
    "GistCollator": "data.collate",
    "GistError": "errors",
    "GistStore": "store",
    "GistTable": "table",
    "GistTokenizer": "tokens",
    "Record": "data.records",
    "Template": "tokens",
    "Visibility": "visibility",
    "check_gist": "eval.check",
    "check_model": "models.check",
    "compress": "generation",
    "converse": "generation",
    "distill": "distillation",
    "generate": "generation",
    "interval_attention": "attention",
    "load": "models.load",
    "load_records": "data.records",
    "patch": "models.patch",
    "push_to_hub": "models.hub",
    "save_pretrained": "models.hub",
    "unpatch": "models.patch",
}

__all__ = [
    "GistCache",
    "GistCollator",
    "GistError",
    "GistStore",
    "GistTable",
    "GistTokenizer",
    "Record",
    "Template",
    "Visibility",
    "__version__",
    "check_gist",
    "check_model",
    "compress",
    "converse",
    "distill",
    "generate",
    "interval_attention",
    "load",
    "load_records",
    "patch",
    "push_to_hub",
    "save_pretrained",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gisting' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gisting.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
