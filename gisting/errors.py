"""The errors that gisting raises on purpose.

Place in the flow: below everything. Every message names the argument, what was expected, what came and what to do next.
Each error is also the built-in type that a caller would expect (ValueError, TypeError), so generic handlers keep
working.
"""

import sys

__all__ = [
    "CacheFormatError",
    "CacheMismatchError",
    "GistError",
    "GistTokenError",
    "RecordError",
    "StoreError",
    "UnsupportedModelError",
]

# A package by somebody else, installed as `gisting`, has the same import name: installed over this one it replaces our
# __init__.py, and uninstalled it deletes it. Checked here because the command line and the library both pass through
# this module.
_package = sys.modules["gisting"]
if not hasattr(_package, "_HOMES"):
    raise ImportError(
        f"gisting/__init__.py is not the one of gist-tokens (found: {_package.__file__ or 'none'}), probably because "
        "the package `gisting`, which has the same import name, was installed or removed beside it; run: pip uninstall "
        "-y gisting && pip install --force-reinstall --no-deps gist-tokens"
    )


class GistError(ValueError):
    """Base of every error of this library; raised itself for a bad argument value, shape, dtype or device."""


class GistTokenError(GistError):
    """Gist tokens are missing, apart, or in a place where nothing says what they hide."""


class UnsupportedModelError(GistError):
    """The model cannot be gisted correctly; the message gives the reason."""


class CacheMismatchError(GistError):
    """A gist cache belongs to another model, tokenizer or template, or has another dtype, device or batch size."""


class CacheFormatError(GistError):
    """A gist cache file is truncated, altered, of a later format, or no gist cache at all."""


class RecordError(GistError):
    """A data record or data file cannot be read; the message names the file and line."""


class StoreError(GistError):
    """A store has no such entry, a name cannot be used, or the directory is no store."""
