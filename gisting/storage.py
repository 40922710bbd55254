"""Files of gist caches: named tensors and a manifest, in full or reduced precision, written atomically and checked.

Place in the flow: below the cache, which knows what the tensors mean. Defines how a file is laid out, how numbers are
stored in it and what a file must look like to be read at all; does not know what a prompt, a layer or a model is.

A file is a safetensors file whose metadata hold a manifest (JSON, under ``gist``). To the caller's manifest this module
adds ``format``, ``storage`` (how the numbers are stored), ``dtype`` (what they were before) and ``sha256``, over the
rest of the manifest and every tensor as stored in the file, so that a truncated or altered file is refused. A checksum
is not a signature: anyone who writes a file can write its checksum too. Therefore everything in a file is checked
before it is used, and nothing is ever unpickled. Memory is bounded in two ways, apart from some tens of megabytes: by
twelve times the size of the file (int8 read as float64; four times for float32), and by three times the ``max_bytes``
of :func:`read`, because a file may be much larger than the space that it takes on a disk (holes).

Storages:

============== ===== =====================================================================================
float32        4     a cast
bfloat16       2     a cast
float16        2     a cast; refused where a number exceeds 65504
float8_e4m3    1     symmetric: ``code * scale``, the codes e4m3 without infinities (arXiv 2209.05433)
int8           1     symmetric: ``code * scale``, the codes -127..127 (arXiv 1712.05877 with zero point 0)
============== ===== =====================================================================================

Rounding is always to nearest, ties to even. A symmetric storage has one float32 scale for each matrix of the last two
dimensions (for keys and values: for each prompt and head): the largest absolute value in the matrix divided by the
largest code, 448 or 127. Storing again what was stored once loses nothing more: in float32 ``x / n * n / n`` equals
``x / n`` for both, and lower precisions round back to what they came from. Numbers far below 1e-30 become zero.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gisting.errors import CacheFormatError, GistError
from gisting.source import is_among_weights, kind_of_file

__all__ = [
    "FORMAT",
    "MAX_BYTES",
    "STORAGES",
    "check_path",
    "check_place",
    "inspect",
    "malformed",
    "read",
    "write",
    "write_atomically",
]

_log = logging.getLogger(__name__)

FORMAT = 2
STORAGES = ("float32", "bfloat16", "float16", "float8_e4m3", "int8")
# Enough for thousands of layers, or the lengths of hundreds of thousands of prompts. As Python objects, JSON takes up
# to 30 times its size in bytes, so this also bounds memory before a file is known to be sound.
MAX_HEADER_BYTES = 1 << 20
MAX_DEPTH = 8
# Default limit for the tensors of a file: 1,300 prompts of 10 gist tokens for Llama 3 70B in bfloat16.
MAX_BYTES = 4 << 30

# The dtypes of states in memory, and of numbers in a file, by their names in this format and in safetensors.
_STATES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_STORED = {**_STATES, "float8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_SAFETENSORS = dict(zip(("F64", "F32", "BF16", "F16", "F8_E4M3", "I8"), _STORED.values(), strict=True))
_LARGEST_CODE = {"float8_e4m3": 448.0, "int8": 127.0}
_SCALE = ".scale"
# For heads of zeros. It also keeps every product of a code (at least 2^-9) and a scale far above the smallest float32.
_SMALLEST_SCALE = 2.0**-100


class _Place(NamedTuple):
    """Where a tensor is in a file, in bytes from its start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    end: int


# -- writing -----------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file completely or not at all: temporary file next to it, fsync, rename, fsync of the directory.

    After a power failure or a killed process there is the old file or the new one, and at worst a temporary file named
    ``.<16 hex digits>.tmp``; an exception does not even leave that. The umask determines who may read the file.

    Args:
        path: the file. An existing file is replaced; a symbolic link is replaced too, not what it points to.
        data: the whole content.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a directory cannot be opened
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def check_path(path: str | Path) -> None:
    """Refuse a ``path`` that no file system takes.

    Raises:
        GistError: it holds a NUL character.
    """
    if "\0" in str(path):
        raise GistError(f"path must not hold a NUL character, got {str(path)!r:.200}")


def check_place(path: str | Path) -> None:
    """Refuse a ``path`` for a cache at which weight loaders would take it for weights.

    Raises:
        GistError: it is in the folder of a checkpoint and named like its weights.
    """
    check_path(path)
    path = Path(path)
    if is_among_weights(path):
        raise GistError(
            f"path must not be among the weights of a checkpoint, got {path}: vLLM and others load every "
            f"*{path.suffix} file of {path.parent} as weights; save it in a folder of its own: "
            f"{path.parent / 'gists' / path.name}"
        )


def write(
    path: str | Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], storage: str | None = None
) -> None:
    """Write one file, completely or not at all.

    Args:
        path: the file.
        manifest: JSON values. This function writes ``format``, ``storage``, ``dtype`` and ``sha256``, and overwrites
            any values under these names.
        tensors: tensors of any shape, finite, of one dtype (float64, float32, bfloat16 or float16), on any device. No
            name ends with ``.scale``. Symmetric storages need two dimensions or more.
        storage: one of ``STORAGES``; None for the tensors' own dtype, which keeps every bit.

    Raises:
        GistError: the tensors do not meet these conditions, a number is too large for the storage, or the manifest is
            too large or not JSON.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    names = {dtype: name for name, dtype in _STATES.items()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= names.keys():
        raise GistError(
            f"tensors must have one dtype out of {', '.join(_STATES)}, got {sorted(map(str, dtypes))}; cast them: "
            "cache.to(dtype=...)"
        )
    (dtype,) = dtypes
    storage = names[dtype] if storage is None else storage
    if storage not in {*STORAGES, names[dtype]}:
        raise GistError(f"storage must be None or one of {', '.join(STORAGES)}, got {storage!r}")
    stored: dict[str, Tensor] = {}
    flattened = False
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if not _is_finite(tensor):
            raise GistError(
                f"{name} holds NaN or infinity, which cannot be stored; compress the prompt in a dtype in which the "
                "model does not overflow: bfloat16 or float32"
            )
        codes, scale = _encode(tensor, storage)
        if not _is_finite(_decode(codes, scale, dtype)):
            raise GistError(
                f"storage {storage!r} cannot hold {name}, which goes up to {float(tensor.abs().max()):g}; use "
                "storage=None, which keeps every bit"
            )
        stored[name] = codes
        if scale is not None:
            stored[name + _SCALE] = scale
            flattened |= storage == "int8" and _is_flattened(tensor, codes)
    if flattened:
        _log.warning(
            "%s: storage 'int8' turns most numbers of some states into zero, because others are hundreds of times as "
            "large; float8_e4m3 takes as many bytes and keeps them",
            path,
        )
    if len(stored) != len(tensors) * (2 if storage in _LARGEST_CODE else 1):
        raise GistError(f"the name of a tensor must not end with {_SCALE!r}, got {sorted(tensors)}")
    try:
        whole = _strict_json(json.dumps({**manifest, "format": FORMAT, "storage": storage, "dtype": names[dtype]}))
    except (TypeError, ValueError) as error:
        raise GistError(f"manifest must be JSON that can be read back, but {error}") from error
    whole["sha256"] = _digest(whole, stored)
    data = save(stored, metadata={"gist": json.dumps(whole, sort_keys=True)})
    num_header_bytes = int.from_bytes(data[:8], "little")
    if num_header_bytes > MAX_HEADER_BYTES:
        raise GistError(
            f"the manifest and the names of {len(stored)} tensors take {num_header_bytes} bytes, the limit is "
            f"{MAX_HEADER_BYTES}; save fewer prompts in one file: cache.select(rows).save(path)"
        )
    write_atomically(path, data)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: str | Path, *, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write` wrote, or a file of an earlier format.

    The file is memory-mapped, and tensors that were stored in their own dtype are views of that mapping. Pages that the
    process writes to become private to it; the others are shared with other processes and with the page cache. So a
    file must be replaced (:func:`write_atomically`) and never be written in place: a process that writes in place can
    change or crash one that is reading.

    Args:
        path: the file itself. The last part of the path must not be a symbolic link, which could point anywhere in a
            directory that others can write to; directories above it may be links.
        max_bytes: how many bytes the file's tensors may take, in the file and in memory. A larger file is refused
            before any tensor is read. At the peak, up to three times as much is allocated.

    Returns:
        The manifest as it is in the file, and the tensors by name, on the CPU, in the shape and dtype that they had
        before they were stored.

    Raises:
        CacheFormatError: the file is truncated, altered, of a later format, not a gist cache or not a regular file, or
            it holds something that is never written in this format.
        GistError: its tensors take more than ``max_bytes``.
        OSError: there is no such file, or it cannot be read.
    """  # noqa: DOC501
    raw, manifest, places, storage, dtype = _open(path)
    num_bytes = max(raw.numel(), _num_bytes_decoded(places, storage, dtype))
    if num_bytes > max_bytes:
        raise GistError(
            f"{path} takes {num_bytes} bytes, more than max_bytes={max_bytes}; if you trust its source, raise the "
            f"limit: GistCache.load(path, max_bytes={num_bytes})"
        )
    found = {name: raw[place.first : place.end].view(place.dtype).view(place.shape) for name, place in places.items()}
    if manifest.get("sha256") != _digest(manifest, found):
        raise CacheFormatError(f"{path} is altered: its checksum does not match; compress the prompt again")
    try:
        return manifest, _decode_all(found, storage, dtype)
    except ValueError as error:
        raise malformed(path, error) from error


def inspect(path: str | Path) -> dict[str, Any]:
    """Return what a file says about itself, as JSON values. Reads no tensors, and so does not verify the checksum.

    Args:
        path: the file, as for :func:`read`.

    Returns:
        ``format``, ``storage``, ``dtype``, ``file_bytes``, ``tensor_bytes`` (scales included), ``sha256``,
        ``manifest`` (complete) and ``tensors``: ``{name: {"dtype": ..., "shape": [...]}}``, as they are stored.

    Raises:
        CacheFormatError: the file does not have the header of a gist cache.
        OSError: there is no such file, or it cannot be read.
    """
    raw, manifest, places, storage, dtype = _open(path)
    names = {kind: name for name, kind in _STORED.items()}
    return {
        "format": manifest["format"],
        "storage": storage,
        "dtype": names[dtype],
        "file_bytes": raw.numel(),
        "tensor_bytes": sum(place.end - place.first for place in places.values()),
        "sha256": manifest.get("sha256"),
        "manifest": manifest,
        "tensors": {
            name: {"dtype": names[place.dtype], "shape": list(place.shape)} for name, place in sorted(places.items())
        },
    }


def malformed(path: str | Path, reason: object) -> CacheFormatError:
    """Make the error for a file whose checksum matches but whose content is invalid: ``path``, and the ``reason``."""
    return CacheFormatError(
        f"{path} is not a gist cache of format {FORMAT}: {_short(reason)}; compress the prompt again"
    )


# -- inside: the container ---------------------------------------------------------------------------------------------
#
# The header is parsed here and not by safetensors, which takes a path: what is checked must be what is read, through
# one descriptor that is opened once. Some headers that safetensors accepts must also be refused: a header of 100 MB, a
# name given twice (the last one wins), numbers that are not aligned to their size. The tests compare both readers.


def _open(path: str | Path) -> tuple[Tensor, dict[str, Any], dict[str, _Place], str, torch.dtype]:
    """Return the bytes of a file, its manifest, the places of its tensors, their storage and their original dtype."""
    raw = _map(path)
    manifest, places = _parse(path, raw)
    try:
        return raw, manifest, places, *_kinds(manifest, places)
    except ValueError as error:
        raise malformed(path, error) from error


def _map(path: str | Path) -> Tensor:
    """Map the bytes of a file, uint8."""
    check_path(path)
    if os.path.islink(path):
        raise CacheFormatError(
            f"{path} is a symbolic link, which is not followed; give the file itself: Path({str(path)!r}).resolve()"
        )
    # O_NONBLOCK, because a named pipe would wait for a writer; O_NOFOLLOW, for a link put there after the check above.
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; make it with `gisting compress`") from error
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise CacheFormatError(f"{path} is not a regular file; give the file that cache.save(path) wrote")
        if state.st_size < 8:
            raise _altered(path, f"{state.st_size} bytes, too few for a header")
        mapped = f"/dev/fd/{descriptor}"
        try:
            if os.path.exists(mapped):
                return torch.from_file(mapped, shared=False, size=state.st_size, dtype=torch.uint8)
        except RuntimeError as error:
            if os.fstat(descriptor).st_size < state.st_size:
                raise _altered(path, error) from error
            raise OSError(f"{path} cannot be mapped: {error}") from error
        with os.fdopen(os.dup(descriptor), "rb") as file:
            data = bytearray(file.read(state.st_size))
        return torch.frombuffer(data, dtype=torch.uint8)
    finally:
        os.close(descriptor)


def _parse(path: str | Path, raw: Tensor) -> tuple[dict[str, Any], dict[str, _Place]]:
    """Return manifest and places, after checking everything that the header alone can show."""
    num_bytes = int.from_bytes(raw[:8].numpy().tobytes(), "little")
    try:
        if num_bytes > min(MAX_HEADER_BYTES, raw.numel() - 8):
            raise ValueError(f"a header of {num_bytes} bytes in a file of {raw.numel()}, at most {MAX_HEADER_BYTES}")
        text = raw[8 : 8 + num_bytes].numpy().tobytes().decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("the header is not a JSON object")
        header = _strict_json(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata are not texts")
    except ValueError as error:
        raise _altered(path, error) from error
    manifest_text = metadata.get("gist")
    if manifest_text is None:
        raise CacheFormatError(f"{path} is a safetensors file but holds no gist cache (no 'gist' in its metadata)")
    message = f"{path} is altered: its manifest cannot be read; compress the prompt again"
    try:
        manifest = _strict_json(manifest_text)
    except ValueError as error:
        raise CacheFormatError(message) from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise CacheFormatError(message)
    # Before looking at the tensors, which a later format may store differently.
    if version > FORMAT:
        raise CacheFormatError(
            f"{path} has format {version}, this version reads up to {FORMAT}; upgrade gisting: pip install "
            "-U gist-tokens"
        )
    try:
        return manifest, _places(header, 8 + num_bytes, raw.numel())
    except ValueError as error:
        raise _altered(path, error) from error


def _places(header: dict[str, Any], start: int, stop: int) -> dict[str, _Place]:
    """Return the places of a header's tensors, which must cover the bytes from ``start`` to ``stop`` exactly once."""
    places = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [first, end]} if len(entry) == 3:
                pass
            case _:
                raise ValueError(f"{name!r} is not a tensor")
        if kind not in _SAFETENSORS or not all(type(number) is int and number >= 0 for number in (*shape, first, end)):
            raise ValueError(f"{name!r} has dtype {kind!r}, shape {shape}, offsets {first} and {end}")
        dtype = _SAFETENSORS[kind]
        # Nothing in a file bounds the shape of an empty tensor, but later code may fill it.
        if math.prod(max(size, 1) for size in shape) > max(math.prod(shape), 2**31):
            raise ValueError(f"{name!r} is empty and has shape {shape}")
        if math.prod(shape) * dtype.itemsize != end - first or (start + first) % dtype.itemsize:
            raise ValueError(f"{name!r} of {dtype} and shape {shape} cannot be at {first} to {end}")
        places[name] = _Place(dtype, tuple(shape), start + first, start + end)
    at = start
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        if place.first != at:
            raise ValueError(f"{name!r} begins at {place.first - start}, the tensor before it ends at {at - start}")
        at = place.end
    if at != stop:
        raise ValueError(f"the tensors end at {at - start}, the file at {stop - start}")
    return places


def _strict_json(text: str) -> Any:
    """Parse JSON that every reader understands in the same way: unique names, finite numbers, valid text.

    Raises:
        ValueError: it is anything else, or nested deeper than any manifest.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is given twice")
        return found

    def whole(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**63:
            raise ValueError(f"the number {digits[:20]}... is too large")
        return number

    def finite(digits: str) -> float:
        if not math.isfinite(number := float(digits)):
            raise ValueError(f"{digits[:20]} is not a finite number")
        return number

    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + max(map(depth, inner), default=0)

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_int=whole, parse_float=finite, parse_constant=finite)
        if depth(found) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    json.dumps(found, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    return found


def _digest(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, because numpy has no bfloat16; a view, not a copy.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _altered(path: str | Path, reason: object) -> CacheFormatError:
    try:
        kind = kind_of_file(path)
    except OSError:
        kind = None
    if kind is not None:
        return CacheFormatError(f"{path} is not a gist cache: it is {kind}")
    return CacheFormatError(f"{path} is truncated or altered ({_short(reason)}); compress the prompt again")


def _short(reason: object) -> str:
    """Shorten a reason: names and shapes from a file may be as long as its header."""
    text = str(reason)
    return text if len(text) <= 300 else text[:300] + "..."


# -- inside: the numbers -----------------------------------------------------------------------------------------------


def _kinds(manifest: Mapping[str, Any], places: Mapping[str, _Place]) -> tuple[str, torch.dtype]:
    """Return the storage of a file and the original dtype of its tensors; raise ValueError if they are impossible."""
    dtypes = {place.dtype for place in places.values()}
    if manifest["format"] == 1:  # stored in the original dtype, which the manifest does not mention
        storages = [name for name, dtype in _STATES.items() if {dtype} == dtypes]
        if not storages:
            raise ValueError(f"the states must have one floating dtype, got {sorted(map(str, dtypes))}")
        return storages[0], _STATES[storages[0]]
    storage, name = manifest.get("storage"), manifest.get("dtype")
    if not isinstance(name, str) or name not in _STATES:
        raise ValueError(f"dtype must be one of {', '.join(_STATES)}, got {name!r}")
    if not isinstance(storage, str) or storage not in {*STORAGES, name}:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    wanted = {_STORED[storage], torch.float32} if storage in _LARGEST_CODE else {_STORED[storage]}
    if dtypes != wanted:
        raise ValueError(f"storage {storage} means tensors of {wanted}, got {dtypes or 'none'}")
    return storage, _STATES[name]


def _num_bytes_decoded(places: Mapping[str, _Place], storage: str, dtype: torch.dtype) -> int:
    """Return how many bytes the tensors take in memory, computed from the header alone."""
    has_scales = storage in _LARGEST_CODE
    return sum(
        math.prod(place.shape) * dtype.itemsize
        for name, place in places.items()
        if not (has_scales and name.endswith(_SCALE))
    )


def _decode_all(stored: Mapping[str, Tensor], storage: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Restore the tensors; raise ValueError for codes and scales that :func:`_encode` never returns."""
    is_symmetric = storage in _LARGEST_CODE
    tensors = {}
    for name, codes in stored.items():
        if is_symmetric and name.endswith(_SCALE):
            if name.removesuffix(_SCALE) not in stored:
                raise ValueError(f"{name!r} is a scale without codes")
            continue
        scale = None
        if is_symmetric:
            scale = stored.get(name + _SCALE)
            if codes.dtype != _STORED[storage] or scale is None or scale.dtype != torch.float32:
                raise ValueError(f"{name!r} must be {_STORED[storage]} with a float32 scale")
            if codes.dim() < 2 or scale.shape != codes.shape[:-2]:
                raise ValueError(f"{name!r} has shape {tuple(codes.shape)}, its scale {tuple(scale.shape)}")
            if scale.numel() and not (_is_finite(scale) and scale.amin() > 0):
                raise ValueError(f"the scales of {name!r} must be finite and above zero")
            if storage == "int8" and codes.numel() and codes.amin() < -127:
                raise ValueError(f"the codes of {name!r} must be -127..127")
        tensors[name] = _decode(codes, scale, dtype)
        if not _is_finite(tensors[name]):
            raise ValueError(f"{name!r} holds NaN or infinity")
    return tensors


def _encode(tensor: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """Return what is stored, and the scales ``(...)`` of a tensor ``(..., rows, columns)`` if the storage has any."""
    if storage not in _LARGEST_CODE:
        return tensor.to(_STORED[storage]), None
    if tensor.dim() < 2:
        raise GistError(f"storage {storage!r} needs tensors of two dimensions or more, got {tuple(tensor.shape)}")
    numbers = tensor.float()
    largest = numbers.abs().amax((-2, -1)) if numbers.numel() else numbers.new_zeros(numbers.shape[:-2])
    scale = (largest / _LARGEST_CODE[storage]).clamp(min=_SMALLEST_SCALE)
    codes = numbers / scale[..., None, None]
    return (codes.round() if storage == "int8" else codes).to(_STORED[storage]), scale


def _is_flattened(tensor: Tensor, codes: Tensor) -> bool:
    """Whether more than half of the numbers of some matrix have become zero."""
    if not codes.numel():
        return False
    lost = ((codes == 0) & (tensor != 0)).sum((-2, -1))
    return bool((2 * lost > (tensor != 0).sum((-2, -1))).any())


def _decode(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) if scale is None else codes.float().mul_(scale[..., None, None]).to(dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite. One pass without a copy: the minimum and the maximum propagate NaN."""
    if not tensor.numel():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
