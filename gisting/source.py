"""Find the files of a checkpoint in a directory or in a repository on the Hugging Face hub.

Place in the flow: below everything that reads a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["SOURCE_ARGUMENTS", "find_file", "weight_files"]

#: The arguments of ``from_pretrained`` that say where files come from, and nothing else.
SOURCE_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"})
# In transformers' order of preference.
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def find_file(name_or_path: str | Path, file: str, **source: Any) -> str | None:
    """Return the local path of a checkpoint's file, or None if the file does not exist or the hub cannot be reached.

    Args:
        name_or_path: a directory, or a repository on the hub.
        file: the file's name there.
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


def weight_files(name_or_path: str | Path, **source: Any) -> list[Path]:
    """Return the local paths of a checkpoint's weight files, or an empty list if it has none.

    An index of several files is preferred to a single file, and safetensors to ``.bin``. A file in a directory that an
    index names is listed even if it is missing.

    Args:
        name_or_path: a directory, or a repository on the hub, from which the files are fetched.
        **source: as for ``from_pretrained``: ``revision``, ``token`` and the like.

    Raises:
        LookupError, TypeError, ValueError: an index is damaged.
        OSError: a file that an index names cannot be fetched.
    """
    from transformers.utils.hub import get_checkpoint_shard_files

    for name in _WEIGHTS:
        found = find_file(name_or_path, name, **source)
        if found is None:
            continue
        if name.endswith(".index.json"):
            files, _ = get_checkpoint_shard_files(str(name_or_path), found, **source)
            return [Path(file) for file in files or ()]
        return [Path(found)]
    return []
