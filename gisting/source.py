"""Find the files of a checkpoint in a directory or in a repository on the Hugging Face hub.

Place in the flow: below everything that reads a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

__all__ = [
    "SOURCE_ARGUMENTS",
    "explain",
    "find_file",
    "gists_among_weights",
    "is_among_weights",
    "kind_of_file",
    "local",
    "missing",
    "weight_files",
]

#: The arguments of ``from_pretrained`` that say where files come from, and nothing else.
SOURCE_ARGUMENTS = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"})
# In transformers' order of preference.
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


# What a name on the hub looks like: "owner/name", or "name" for the oldest repositories.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# How files begin that are given by mistake.
_BEGINNINGS = (
    (
        b"GGUF",
        "a GGUF file, which transformers reads with from_pretrained(..., gguf_file=...); save that as a checkpoint",
    ),
    (b"SQLite format 3\0", "a database, such as the index of a store, which is given by its directory"),
    (b"PK\3\4", "a file of torch.save or another ZIP archive"),
    (b"\x80", "a pickle, which is never opened"),
)
_MAX_HEADER = 1 << 20
# What weight loaders, vLLM's among them, read all files of in a checkpoint's folder.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def local(name_or_path: str | Path) -> str | Path:
    """Return a name or path with ``~`` written out, if it is a path that begins so."""
    return os.path.expanduser(name_or_path) if str(name_or_path).startswith("~") else name_or_path


def kind_of_file(path: str | Path) -> str | None:
    """Describe a file that is not safetensors, by how it begins, or return None if nothing is known of it.

    Args:
        path: a file that can be read.
    """
    with Path(path).open("rb") as file:
        head = file.read(64)
    found = [kind for beginning, kind in _BEGINNINGS if head.startswith(beginning)]
    if found:
        return found[0]
    return "a JSON file" if re.match(rb"\s*[\[{]\s*[\"\[{\]}\w-]", head) else None


def missing(name_or_path: str | Path) -> str | None:
    """Say why a name can be neither a directory nor a repository on the hub, or return None if it can.

    Args:
        name_or_path: what should be one of them.
    """
    if "\0" in str(name_or_path):
        return f"the name holds a NUL character: {str(name_or_path)!r:.200}"
    path = Path(local(name_or_path))
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(_MAX_HEADER)
        kind = kind_of_file(path)
        if kind is None and head[8:9] == b"{":
            kind = "a cache file of compressed prompts" if b'"gist"' in head else "a file of weights"
        return f"it is {kind or 'a file'}; a checkpoint is a directory with a config.json"
    if path.exists():
        return None
    text = str(name_or_path)
    if isinstance(name_or_path, str) and _HUB_NAME.fullmatch(text):
        return None
    return f"no such directory (looked for {path.absolute()})"


def explain(name_or_path: str | Path) -> str | None:
    """Say why there can be no checkpoint under a name, or return None if there may be one, here or on the hub.

    Args:
        name_or_path: what should be a directory, or a repository on the hub.
    """
    fault, path = missing(name_or_path), Path(local(name_or_path))
    if fault is not None or not path.is_dir():
        return fault
    held = sorted(file.name for file in path.iterdir())
    if "config.json" in held or "gist_adapter.json" in held:
        return None
    if "index.sqlite" in held and "objects" in held:
        return "it is a store of compressed prompts; give the checkpoint that made it"
    if "adapter_config.json" in held:
        return "it is an adapter of peft without its model; gisting.load merges it, gisting.save_pretrained saves that"
    models = [name for name in held if name.endswith(".gguf")]
    if models:
        return f"it holds {models[0]}, {_BEGINNINGS[0][1]}"
    steps = [name for name in held if (path / name / "config.json").is_file()]
    if steps:
        return f"the directory has no config.json; {path / steps[-1]} has one"
    return "the directory has no config.json"


def find_file(name_or_path: str | Path, file: str, **source: Any) -> str | None:
    """Return the local path of a checkpoint's file, or None if the file does not exist or the hub cannot be reached.

    Args:
        name_or_path: a directory, or a repository on the hub.
        file: the file's name there.
        **source: as for ``from_pretrained``: ``revision``, ``token`` and the like.
    """
    from transformers.utils.hub import cached_file

    if missing(name_or_path) is not None:
        return None
    return cached_file(
        str(local(name_or_path)),
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


def is_among_weights(path: str | Path) -> bool:
    """Whether a file of this name would be taken for weights: in the folder of a checkpoint, and named like them.

    Args:
        path: the file, which need not exist.
    """
    path = Path(path)
    if not path.name.endswith(_WEIGHT_SUFFIXES):
        return False
    try:
        with (path.parent / "config.json").open("rb") as file:
            config = json.loads(file.read(_MAX_HEADER))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and not {"model_type", "architectures"}.isdisjoint(config)


def gists_among_weights(directory: str | Path) -> list[Path]:
    """Return the cache files of compressed prompts that lie where weight loaders look, sorted.

    Args:
        directory: the folder of a checkpoint. Anything else has none.
    """
    try:
        names = sorted(os.listdir(local(directory)))
    except OSError:
        return []
    paths = [Path(local(directory)) / name for name in names if name.endswith(_WEIGHT_SUFFIXES)]
    return [path for path in paths if _holds_gists(path)]


def _holds_gists(path: Path) -> bool:
    """Whether the header of a safetensors file says that it holds compressed prompts."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _MAX_HEADER else None
    except (OSError, ValueError, RecursionError):
        return False
    about = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(about, dict) and "gist" in about
