"""Define the errors that gisting raises deliberately.

Place in the flow: below everything. Every message names the argument, what was expected, what was given and what to do
next. All errors are also ``ValueError``, so generic handlers keep working.
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

# The unrelated package `gisting` has the same import name: installing it replaces our __init__.py, uninstalling it
# deletes our __init__.py. This is checked here because the command line and the library both import this module.
_package = sys.modules["gisting"]
if not hasattr(_package, "_HOMES"):
    raise ImportError(
        f"gisting/__init__.py does not belong to gist-tokens (found: {_package.__file__ or 'none'}), probably because "
        "the package `gisting`, which has the same import name, was also installed, or was removed; run: pip uninstall "
        "-y gisting && pip install --force-reinstall --no-deps gist-tokens"
    )


class GistError(ValueError):
    """The base of all errors of this library. Raised directly for a wrong argument value, shape, dtype or device."""


class GistTokenError(GistError):
    """Gist tokens are missing, not contiguous, or used without a mask that says what they hide."""


class UnsupportedModelError(GistError):
    """The model cannot be gisted correctly; the message gives the reason."""


class CacheMismatchError(GistError):
    """A gist cache belongs to another model, tokenizer or template, or has another dtype, device or batch size."""


class CacheFormatError(GistError):
    """A gist cache file is truncated, altered, of a later format, or not a gist cache at all."""


class RecordError(GistError):
    """A data record or data file cannot be read; the message names the file and line."""


class StoreError(GistError):
    """A store has no such entry, a name cannot be used, or the directory is not a store."""
