"""Where the files of a checkpoint come from: a directory, or a repository on the Hugging Face hub.

Place in the flow: below everything that reads one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["SOURCE_ARGUMENTS", "find_file"]

#: The arguments of ``from_pretrained`` that say where files come from, and nothing else.
SOURCE_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"})


def find_file(name_or_path: str | Path, file: str, **source: Any) -> str | None:
    """Where a file of a directory or of a repository on the hub lies on this disk; None where there is none, or no
    connection.

    Args:
        name_or_path: directory or repository.
        file: its name there.
        **source: as for ``from_pretrained``: ``revision``, ``token`` and the like.
    """
    from transformers.utils.hub import cached_file

    return cached_file(
        str(name_or_path),
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **source,
    )
