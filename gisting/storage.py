"""Files of gist caches: named tensors and a manifest, in full or in few bits, written whole and read with suspicion.

Place in the flow: below the cache, which says what the tensors mean. Holds how a file is laid out, how numbers are kept
in it and what a file must be like to be read at all; does not know what a prompt, a layer or a model is.

A file is a safetensors file whose metadata hold a manifest (JSON, under ``gist``). To what the caller says there, this
module adds ``format``, ``storage`` (what the numbers are kept as), ``dtype`` (what they were) and ``sha256``, over the
rest of the manifest and every tensor as it lies in the file, so that a truncated or altered file is refused. A checksum
is no signature: who writes a file can write its checksum too. Therefore nothing in a file is believed that is not
checked, nothing is ever unpickled, and what is allocated is bounded twice, some tens of megabytes aside: by twelve
times what the file has in bytes (int8 as float64; as float32 four times), and by three times ``max_bytes`` of
:func:`read`, since a file may be much larger than the room that it takes on a disk (holes).

Storages:

============== ===== =====================================================================================
float32        4     a cast
bfloat16       2     a cast
float16        2     a cast; refused where a number exceeds 65504
float8_e4m3    1     symmetric: ``code * scale``, the codes e4m3 without infinities (arXiv 2209.05433)
int8           1     symmetric: ``code * scale``, the codes -127..127 (arXiv 1712.05877 with zero point 0)
============== ===== =====================================================================================

Every rounding is to nearest, ties to even. A symmetric storage has one float32 scale for each matrix of the last two
dimensions (for keys and values: of each prompt and head): the largest number there over the largest code, 448 or 127.
What was stored once is stored again without further loss: in float32 ``x / n * n / n`` equals ``x / n`` for both, and
fewer bits round back to what they came from. Numbers far below 1e-30 become zero.
"""

from __future__ import annotations

import hashlib
import json
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

__all__ = ["FORMAT", "MAX_BYTES", "STORAGES", "inspect", "malformed", "read", "write", "write_atomically"]

FORMAT = 2
STORAGES = ("float32", "bfloat16", "float16", "float8_e4m3", "int8")
# Thousands of layers, or the lengths of hundreds of thousands of prompts. As Python objects JSON takes up to 30 times
# its bytes, so this is also what bounds memory before a file is known to be sound.
MAX_HEADER_BYTES = 1 << 20
MAX_DEPTH = 8
# Of the tensors of a file, unless a reader says otherwise: 1,300 prompts of 10 gist tokens for Llama 3 70B in bfloat16.
MAX_BYTES = 4 << 30

# What states may be in memory, and what numbers may be in a file, by the names of this format and of safetensors.
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
# For heads of zeros; and no product of a code, 2^-9 at least, and a scale comes near the smallest float32.
_SMALLEST_SCALE = 2.0**-100


class _Place(NamedTuple):
    """Where a tensor lies in a file, in bytes from its start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    end: int


# -- writing -----------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename, fsync of the directory.

    What a power cut or a killed process leaves is the old file or the new one, and at worst a temporary file named
    ``.<16 hex digits>.tmp``; an exception leaves not even that. Who may read the file is up to the umask.

    Args:
        path: the file; one that is there is replaced, a symbolic link too, and not what it points to.
        data: all of it.

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


def write(
    path: str | Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], storage: str | None = None
) -> None:
    """Write one file, whole or not at all.

    Args:
        path: the file.
        manifest: JSON values. ``format``, ``storage``, ``dtype`` and ``sha256`` are written by this function, over what
            it may hold under these names.
        tensors: of any shape, finite, of one dtype (float64, float32, bfloat16 or float16), on any device. No name ends
            with ``.scale``. Symmetric storages take two dimensions or more.
        storage: one of ``STORAGES``; None for the tensors' own dtype, which keeps every bit.

    Raises:
        GistError: the tensors are none of that, a number is too large for the storage, or the manifest is too large
            or no JSON.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    names = {dtype: name for name, dtype in _STATES.items()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= names.keys():
        raise GistError(
            f"tensors must be of one dtype out of {', '.join(_STATES)}, got {sorted(map(str, dtypes))}; cast them: "
            "cache.to(dtype=...)"
        )
    (dtype,) = dtypes
    storage = names[dtype] if storage is None else storage
    if storage not in {*STORAGES, names[dtype]}:
        raise GistError(f"storage must be None or one of {', '.join(STORAGES)}, got {storage!r}")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if not _is_finite(tensor):
            raise GistError(
                f"{name} holds NaN or infinity, which no file keeps; compress the prompt in a dtype in which the "
                "model does not overflow: bfloat16 or float32"
            )
        codes, scale = _encode(tensor, storage)
        if not _is_finite(_decode(codes, scale, dtype)):
            raise GistError(
                f"storage {storage!r} cannot hold {name}, which goes up to {float(tensor.abs().max()):g}; take "
                "storage=None, which keeps every bit"
            )
        stored[name] = codes
        if scale is not None:
            stored[name + _SCALE] = scale
    if len(stored) != len(tensors) * (2 if storage in _LARGEST_CODE else 1):
        raise GistError(f"no name of a tensor may end with {_SCALE!r}, got {sorted(tensors)}")
    try:
        whole = _strict_json(json.dumps({**manifest, "format": FORMAT, "storage": storage, "dtype": names[dtype]}))
    except (TypeError, ValueError) as error:
        raise GistError(f"manifest must be JSON that can be read again, but {error}") from error
    whole["sha256"] = _digest(whole, stored)
    data = save(stored, metadata={"gist": json.dumps(whole, sort_keys=True)})
    num_header_bytes = int.from_bytes(data[:8], "little")
    if num_header_bytes > MAX_HEADER_BYTES:
        raise GistError(
            f"the manifest and the names of {len(stored)} tensors take {num_header_bytes} bytes, a file may hold "
            f"{MAX_HEADER_BYTES}; save fewer prompts in one file: cache.select(rows).save(path)"
        )
    write_atomically(path, data)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: str | Path, *, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write` wrote, or a file of an earlier format.

    The file is memory-mapped, and tensors that were stored as they are lie in that mapping: private to the process
    where it writes to them, shared with others and with the file's cache in memory where it does not. So a file is
    replaced (:func:`write_atomically`) and never written in place; whoever may do that can change or crash a process
    that is reading.

    Args:
        path: the file itself. The last part of the path may not be a symbolic link, which in a directory that others
            write to can point anywhere; directories above it may be.
        max_bytes: how many the file's tensors may take, there and in memory; a file of more is refused before a tensor
            is read. At the peak up to three times as many are allocated.

    Returns:
        The manifest as it is in the file, and the tensors by name, on the CPU, in the shape and dtype that they had
        before they were stored.

    Raises:
        CacheFormatError: the file is truncated, altered, of a later format, no gist cache or no regular file, or holds
            what no writer of this format writes.
        GistError: its tensors take more than ``max_bytes``.
        OSError: there is no such file, or it cannot be read.
    """
    raw, manifest, places, storage, dtype = _open(path)
    num_bytes = max(raw.numel(), _num_bytes_decoded(places, storage, dtype))
    if num_bytes > max_bytes:
        raise GistError(
            f"{path} takes {num_bytes} bytes, more than max_bytes={max_bytes}; if you trust whoever gave it to you, "
            f"raise it: GistCache.load(path, max_bytes={num_bytes})"
        )
    found = {name: raw[place.first : place.end].view(place.dtype).view(place.shape) for name, place in places.items()}
    if manifest.get("sha256") != _digest(manifest, found):
        raise CacheFormatError(f"{path} is altered: its checksum does not fit; compress the prompt again")
    try:
        return manifest, _decode_all(found, storage, dtype)
    except ValueError as error:
        raise malformed(path, error) from error


def inspect(path: str | Path) -> dict[str, Any]:
    """What a file says about itself, as JSON values, without reading its tensors: the checksum is not verified.

    Args:
        path: the file, as for :func:`read`.

    Returns:
        ``format``, ``storage``, ``dtype``, ``file_bytes``, ``tensor_bytes`` (scales included), ``sha256``,
        ``manifest`` (all of it) and ``tensors``: ``{name: {"dtype": ..., "shape": [...]}}``, as they are stored.

    Raises:
        CacheFormatError: the file's header is not that of a gist cache.
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
    """The error for a file that is sound and signed, but holds what no gist cache holds: ``path``, and the ``reason``
    why.
    """
    return CacheFormatError(f"{path} is no gist cache of format {FORMAT}: {_short(reason)}; compress the prompt again")


# -- inside: the container ---------------------------------------------------------------------------------------------
#
# The header is parsed here and not by safetensors, which takes a path: what is checked must be what is read, from one
# descriptor, opened once. It also has to be refused where safetensors is content: a header of 100 MB, a name given
# twice (the last one wins), numbers that do not lie on a multiple of their size. The tests hold both readers together.


def _open(path: str | Path) -> tuple[Tensor, dict[str, Any], dict[str, _Place], str, torch.dtype]:
    """The bytes of a file; its manifest; where its tensors lie; what they are stored as, and what they were before."""
    raw = _map(path)
    manifest, places = _parse(path, raw)
    try:
        return raw, manifest, places, *_kinds(manifest, places)
    except ValueError as error:
        raise malformed(path, error) from error


def _map(path: str | Path) -> Tensor:
    """The bytes of a file, uint8."""
    if os.path.islink(path):
        raise CacheFormatError(
            f"{path} is a symbolic link, which is not followed; give the file itself: Path({str(path)!r}).resolve()"
        )
    # Without O_NONBLOCK a named pipe would wait for a writer; O_NOFOLLOW for a link that was put there just now.
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is no file; save a cache there first: cache.save(path)") from error
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise CacheFormatError(f"{path} is no regular file; give the file that cache.save(path) wrote")
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
    """Manifest and places, as far as a header alone can be right."""
    num_bytes = int.from_bytes(raw[:8].numpy().tobytes(), "little")
    try:
        if num_bytes > min(MAX_HEADER_BYTES, raw.numel() - 8):
            raise ValueError(f"a header of {num_bytes} bytes in a file of {raw.numel()}, at most {MAX_HEADER_BYTES}")
        text = raw[8 : 8 + num_bytes].numpy().tobytes().decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("the header is no JSON object")
        header = _strict_json(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata are no texts")
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
    # Before the tensors, which a later format may keep in ways that are unknown here.
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
    """The tensors of a header, which together are the bytes from ``start`` to ``stop``, each of them once."""
    places = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": list(shape), "data_offsets": [first, end]} if len(entry) == 3:
                pass
            case _:
                raise ValueError(f"{name!r} is no tensor")
        if kind not in _SAFETENSORS or not all(type(number) is int and number >= 0 for number in (*shape, first, end)):
            raise ValueError(f"{name!r} has dtype {kind!r}, shape {shape}, offsets {first} and {end}")
        dtype = _SAFETENSORS[kind]
        # Nothing in a file bounds the shape of a tensor without numbers, but someone may want to fill it.
        if math.prod(max(size, 1) for size in shape) > max(math.prod(shape), 2**31):
            raise ValueError(f"{name!r} is empty and has shape {shape}")
        if math.prod(shape) * dtype.itemsize != end - first or (start + first) % dtype.itemsize:
            raise ValueError(f"{name!r} of {dtype} and shape {shape} cannot lie from {first} to {end}")
        places[name] = _Place(dtype, tuple(shape), start + first, start + end)
    at = start
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        if place.first != at:
            raise ValueError(f"{name!r} begins at {place.first - start}, what is before it ends at {at - start}")
        at = place.end
    if at != stop:
        raise ValueError(f"the tensors end at {at - start}, the file at {stop - start}")
    return places


def _strict_json(text: str) -> Any:
    """JSON as any two readers understand it alike: no name twice, numbers that exist, texts that can be written.

    Raises:
        ValueError: it is anything else, or nested deeper than a manifest is.
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
            raise ValueError(f"{digits[:20]} is no finite number")
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
        # As bytes, for numpy has no bfloat16; a view, not a copy.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _altered(path: str | Path, reason: object) -> CacheFormatError:
    return CacheFormatError(f"{path} is truncated or altered ({_short(reason)}); compress the prompt again")


def _short(reason: object) -> str:
    """Names and shapes from a file may be as long as its header."""
    text = str(reason)
    return text if len(text) <= 300 else text[:300] + "..."


# -- inside: the numbers -----------------------------------------------------------------------------------------------


def _kinds(manifest: Mapping[str, Any], places: Mapping[str, _Place]) -> tuple[str, torch.dtype]:
    """The storage of a file, and the dtype that its tensors had; ValueError where these cannot be."""
    dtypes = {place.dtype for place in places.values()}
    if manifest["format"] == 1:  # everything as it was, and nothing said about it
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
    """What the tensors take in memory, as a header alone tells it."""
    has_scales = storage in _LARGEST_CODE
    return sum(
        math.prod(place.shape) * dtype.itemsize
        for name, place in places.items()
        if not (has_scales and name.endswith(_SCALE))
    )


def _decode_all(stored: Mapping[str, Tensor], storage: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors before they were stored; ValueError for codes and scales that :func:`_encode` never gives."""
    is_symmetric = storage in _LARGEST_CODE
    tensors = {}
    for name, codes in stored.items():
        if is_symmetric and name.endswith(_SCALE):
            if name.removesuffix(_SCALE) not in stored:
                raise ValueError(f"{name!r} is the scale of nothing")
            continue
        scale = None
        if is_symmetric:
            scale = stored.get(name + _SCALE)
            if codes.dtype != _STORED[storage] or scale is None or scale.dtype != torch.float32:
                raise ValueError(f"{name!r} must be of {_STORED[storage]} with a scale of float32")
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
    """What is stored, and the scales ``(...)`` of a tensor ``(..., rows, columns)`` where the storage has any."""
    if storage not in _LARGEST_CODE:
        return tensor.to(_STORED[storage]), None
    if tensor.dim() < 2:
        raise GistError(f"storage {storage!r} takes tensors of two dimensions or more, got {tuple(tensor.shape)}")
    numbers = tensor.float()
    largest = numbers.abs().amax((-2, -1)) if numbers.numel() else numbers.new_zeros(numbers.shape[:-2])
    scale = (largest / _LARGEST_CODE[storage]).clamp(min=_SMALLEST_SCALE)
    codes = numbers / scale[..., None, None]
    return (codes.round() if storage == "int8" else codes).to(_STORED[storage]), scale


def _decode(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) if scale is None else codes.float().mul_(scale[..., None, None]).to(dtype)


def _is_finite(tensor: Tensor) -> bool:
    """Whether every number is; in one pass and without a copy, as the least and the largest number hand on NaN."""
    if not tensor.numel():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
