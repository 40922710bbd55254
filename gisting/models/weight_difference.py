"""Weight differences: a trained model published as what has to be added to its base model, which may not be passed on.

Place in the flow: before ``gisting.load``, which reads the checkpoint that :func:`apply_weight_difference` writes.
Works on files, tensor by tensor, and builds no model. The layout is that of the published LLaMA checkpoints
(github.com/jayelm/gisting, ``src/weight_diff.py``, itself Alpaca's): an ordinary checkpoint in float32, whose every
tensor is to be added to the base model's of the same name. The base counts as zero where it has no row, so the
gist token's row of embedding and head is in the difference as it is. What :func:`make_weight_difference` writes has a
file ``weight_difference.json`` in addition, by which it is recognised and checked to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from gisting.errors import GistError
from gisting.models.patch import PATCH_FORMAT
from gisting.models.published import ALPACA_STRIPPED, PUBLISHED, PublishedCheckpoint, published
from gisting.models.registry import read_config
from gisting.source import find_file
from gisting.tokens import GistTokenizer

__all__ = [
    "RecoveredCheckpoint",
    "WeightDifference",
    "apply_weight_difference",
    "looks_like_difference",
    "make_weight_difference",
    "refusal",
    "weight_difference",
]

_FILE = "weight_difference.json"
_FORMAT = 1
# In order of preference, as transformers': an index of several files, or the single one.
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
# A buffer that was saved with LLaMA's weights until transformers 4.32; it is computed from the config and no weight.
_FREQUENCIES = "rotary_emb.inv_freq"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# As safetensors calls them.
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_SHARD_BYTES = 1 << 30
_SUMMED_AT_ONCE = 1 << 20
# An RMSNorm of LLaMA multiplies: its weights are about 1 in a model, about 0.001 in a difference of two.
_NORM_OF_A_DIFFERENCE = 0.1


@dataclass(frozen=True)
class WeightDifference:
    """What ``weight_difference.json`` says.

    Args:
        base: name or path of the base model it was made with; "" where that is not to be told.
        dtype: of the model's weights; those of the difference are float32.
        weight_sum: of all numbers of the recovered model, summed in float64.
        sha256: of all tensors of the recovered model in ``dtype``, in order of their names.
        num_inexact: numbers of the recovered model that are not to the bit those of the model it was made from, for
            ``base + (model - base)`` rounds in float32.
    """

    base: str
    dtype: str
    weight_sum: float
    sha256: str
    num_inexact: int


@dataclass(frozen=True)
class RecoveredCheckpoint:
    """What :func:`apply_weight_difference` has written and checked.

    Args:
        directory: where it is.
        num_parameters: numbers in its weights.
        num_added_rows: rows that embedding and head have beyond the base model's.
        weight_sum: the sum of all weights before they were cast, and of the rotary frequencies where the published sum
            holds them; float64.
        expected_sum: what it was compared with, or None: nobody knows whether these are the right weights.
        is_verified: True if the recovered weights are to the bit those that the difference was made for, or None where
            the difference does not tell, as the published ones.
        dtype: of the weights as written.
    """

    directory: Path
    num_parameters: int
    num_added_rows: int
    weight_sum: float
    expected_sum: float | None
    is_verified: bool | None
    dtype: str


def apply_weight_difference(
    difference: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    expected_sum: float | None = None,
    tolerance: float = 0.1,
    on_progress: Callable[[int, int], None] | None = None,
    **source: Any,
) -> RecoveredCheckpoint:
    """Add a weight difference to its base model, and write the checkpoint that comes out.

    Weights are read and written tensor by tensor in files of about 1 GiB, so that a model of any size needs little
    memory. They are added in float32. The checkpoint appears under its name when it is whole and checked, and
    before that there is only a hidden directory beside it, which is removed if anything fails.

    A checkpoint whose tokenizer has ``<GIST>`` is written for :func:`gisting.load`, with what the published ones were
    trained with: the template :data:`~gisting.models.published.ALPACA_STRIPPED` and, where the sum of its weights says
    that it is the one trained to gist, its k.

    Args:
        difference: a directory, or a repository on the Hugging Face hub.
        base: the base model: a directory, or a repository on the hub. Safetensors, or ``.bin`` files, which are
            read with ``weights_only=True``.
        output: directory for the checkpoint; there is none yet, or it is empty.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, in which the weights are written; None for what the
            difference was made from: float32 where it does not say.
        expected_sum: what all weights of the result sum up to; None for what is known of a published checkpoint by its
            name, or stands in ``weight_difference.json``. Where neither tells, the published sums are tried.
        tolerance: how far the sum may be off. Published sums were added up in float32, which leaves an error of some
            hundredths; another base model, or another condition, is off by tens.
        on_progress: called with bytes done and bytes in all, after each tensor.
        **source: ``revision``, ``token``, ``cache_dir``, ... for the difference on the hub.

    Returns:
        What was written and checked.

    Raises:
        GistError: a checkpoint is missing or cannot be read, they do not fit each other, the result is not what it
            should be, ``output`` is taken, or the disk is too full.
        OSError: something cannot be written.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise GistError(f"dtype must be one of {', '.join(_DTYPES)} or None, got {dtype!r}")
    if not tolerance >= 0:
        raise GistError(f"tolerance must be at least 0, got {tolerance!r}")
    output = _free(output)
    about = weight_difference(difference, **source)
    known = published(difference) or _by_sum(expected_sum, tolerance)
    if known is not None and not known.is_difference:
        raise GistError(f"difference {difference} is a whole checkpoint: gisting.load reads it as it is")
    if expected_sum is None:
        expected_sum = known.weight_sum if known is not None else about.weight_sum if about is not None else None
    recorded_dtype = "float32" if about is None else about.dtype
    dtype = recorded_dtype if dtype is None else dtype

    config, base_config = read_config(difference, **source), read_config(base)
    if config.model_type != base_config.model_type:
        raise GistError(f"difference is of a {config.model_type} model, base {base} is a {base_config.model_type}")
    tokenizer = _tokenizer(difference, **source)  # what is missing here shows before the work
    changes, originals = _Weights(difference, **source), _Weights(base)
    names = _weight_names(changes, originals)
    num_added_rows = _check_shapes(names, changes, originals, config, base_config)

    sizes = {name: changes.shape(name).numel() for name in names}
    shards = _shards({name: size * _DTYPES[dtype].itemsize for name, size in sizes.items()})
    total = sum(sizes.values()) * _DTYPES[dtype].itemsize
    _check_space(output, total)
    summed, digests, done = 0.0, {}, 0
    with _whole_or_absent(output) as folder:
        for number, shard in enumerate(shards):
            tensors = {}
            for name in shard:
                tensor = _added(changes[name], originals[name])
                summed += _sum(tensor)
                if about is not None:
                    digests[name] = _digest(name, tensor.to(_DTYPES[recorded_dtype]))
                tensors[name] = tensor.to(_DTYPES[dtype])
                done += sizes[name] * _DTYPES[dtype].itemsize
                if on_progress is not None:
                    on_progress(done, total)
            _save_shard(tensors, folder, number, len(shards))
        _save_index(shards, total, folder)
        summed += _sum_of_frequencies(changes, originals, config, is_counted=known is not None and known.is_difference)
        if expected_sum is None:
            known = _by_sum(summed, tolerance)
            expected_sum = None if known is None else known.weight_sum
        _check_sum(summed, expected_sum, tolerance, difference, base)
        if about is not None and _joined(digests) != about.sha256:
            raise GistError(
                f"base {base} is not the model that {difference} was made with"
                + (f", {about.base}" if about.base else "")
                + ": the weights that come out are not those of the model that it was made from; take that base model, "
                "in the precision it had then, or fetch the files again"
            )
        config.dtype = _DTYPES[dtype]
        if about is None:
            _save_published(tokenizer, folder, config, known)
        else:
            _save_as_it_was(difference, folder, config, **source)
    return RecoveredCheckpoint(
        directory=output,
        num_parameters=sum(sizes.values()),
        num_added_rows=num_added_rows,
        weight_sum=summed,
        expected_sum=expected_sum,
        is_verified=None if about is None else True,
        dtype=dtype,
    )


def make_weight_difference(
    model: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    base_name: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> WeightDifference:
    """Write what has to be added to ``base`` to get ``model``: the opposite of :func:`apply_weight_difference`.

    The difference is float32, ``model - base``, and ``model`` itself in rows that ``base`` lacks. Beside it stand
    config and tokenizer of ``model``, and ``weight_difference.json``.

    Args:
        model: a checkpoint, as a directory or on the hub.
        base: the model it was trained from. It may have fewer rows of embedding.
        output: directory for the difference; there is none yet, or it is empty.
        base_name: what the difference calls its base model; None for ``base`` if that is a name on the hub, else
            nothing: a path tells others nothing.
        on_progress: called with bytes done and bytes in all, after each tensor.

    Returns:
        What stands in ``weight_difference.json``.

    Raises:
        GistError: a checkpoint is missing or cannot be read, they do not fit each other, ``output`` is taken, or
            the disk is too full.
        OSError: something cannot be written.
    """
    output = _free(output)
    if weight_difference(model) is not None:
        raise GistError(f"model {model} is a weight difference itself; apply it first")
    config, base_config = read_config(model), read_config(base)
    if config.model_type != base_config.model_type:
        raise GistError(f"model is a {config.model_type}, base {base} is a {base_config.model_type}")
    tuned, originals = _Weights(model), _Weights(base)
    names = _weight_names(tuned, originals)
    _check_shapes(names, tuned, originals, config, base_config)
    kinds = {tuned.dtype(name) for name in names}
    dtype = next((name for name, kind in _DTYPES.items() if kinds == {kind}), "float32")
    sizes = {name: tuned.shape(name).numel() * 4 for name in names}
    shards, total = _shards(sizes), sum(sizes.values())
    _check_space(output, total)
    summed, digests, num_inexact, done = 0.0, {}, 0, 0
    with _whole_or_absent(output) as folder:
        for number, shard in enumerate(shards):
            tensors = {}
            for name in shard:
                goal, original = tuned[name], originals[name]
                tensors[name] = _added(goal, original, sign=-1)
                recovered = _added(tensors[name], original)
                summed += _sum(recovered)
                recovered = recovered.to(_DTYPES[dtype])
                digests[name] = _digest(name, recovered)
                num_inexact += int((recovered != goal).sum())
                done += sizes[name]
                if on_progress is not None:
                    on_progress(done, total)
            _save_shard(tensors, folder, number, len(shards))
        _save_index(shards, total, folder)
        if base_name is None:
            base_name = "" if Path(base).exists() else str(base)
        about = WeightDifference(base_name, dtype, summed, _joined(digests), num_inexact)
        config.dtype = torch.float32
        _save_as_it_was(model, folder, config)
        (folder / _FILE).write_text(json.dumps({"format": _FORMAT, **vars(about)}, indent=2) + "\n", encoding="utf-8")
    return about


def weight_difference(name_or_path: str | Path, **source: Any) -> WeightDifference | None:
    """What ``weight_difference.json`` of a checkpoint says, or None where there is none.

    Args:
        name_or_path: a directory, or a repository on the hub.
        **source: ``revision``, ``token``, ``cache_dir``, ... for one on the hub.

    Raises:
        GistError: it cannot be read, or is of a later format.
    """
    found = find_file(name_or_path, _FILE, **source)
    if found is None:
        return None
    try:
        about = json.loads(Path(found).read_text(encoding="utf-8"))
        version = about.pop("format")
        if version == _FORMAT:
            return WeightDifference(
                str(about["base"]),
                _known_dtype(about["dtype"]),
                float(about["weight_sum"]),
                str(about["sha256"]),
                int(about["num_inexact"]),
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GistError(f"{found} cannot be read ({error!r}); fetch the difference again") from error
    raise GistError(
        f"{found} has format {version}, this version reads {_FORMAT}; upgrade gisting: pip install -U gist-tokens"
    )


def looks_like_difference(model: PreTrainedModel) -> bool:
    """Whether a loaded LLaMA is the difference of two models, as the published ones are when their files are local.

    Nothing in a directory of the published layout says so, but its weights do: those of the last norm are about 1 in a
    model, and near 0 in a difference. Other families are not told apart so; Gemma's norms are near 0 by design.

    Args:
        model: a loaded model. On the meta device nothing can be seen, and the answer is no.
    """
    norm = getattr(getattr(model, "model", None), "norm", None)
    if model.config.model_type != "llama" or norm is None or norm.weight.device.type == "meta":
        return False
    return float(norm.weight.detach().float().abs().mean()) < _NORM_OF_A_DIFFERENCE


def refusal(name_or_path: str | Path) -> GistError:
    """The error of somebody who loads a weight difference as if it were a model, with the command to run.

    Args:
        name_or_path: what was to be loaded.
    """
    return GistError(
        f"{name_or_path} is a weight difference, not a model: it has to be added to the weights of its base model "
        f"first: gisting apply-difference {name_or_path} --base BASE --output DIRECTORY, then load DIRECTORY"
    )


# -- reading -----------------------------------------------------------------------------------------------------------


class _Weights:
    """The tensors of a checkpoint by name, from files of which one is open at a time."""

    def __init__(self, name_or_path: str | Path, **source: Any) -> None:
        self.name = str(name_or_path)
        files = _weight_files(name_or_path, **source)
        self._open: tuple[Path, Any] | None = None
        self._places: dict[str, tuple[Path, torch.Size, torch.dtype]] = {}
        for file in files:
            for name, shape, dtype in self._headers(file):
                self._places[name] = (file, shape, dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as it is in the file; mapped, so that it is read where it is used."""
        with self._reading(self._places[name][0]):
            handle = self._handle(self._places[name][0])
            return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)

    def shape(self, name: str) -> torch.Size:
        return self._places[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name][2]

    def _headers(self, file: Path) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
        with self._reading(file):
            handle = self._handle(file)
            for name in list(handle.keys()):
                if isinstance(handle, dict):
                    tensor = handle[name]
                    if not isinstance(tensor, Tensor):
                        raise GistError(f"{file} holds {name}, which is no tensor; it is no checkpoint of transformers")
                    yield name, tensor.shape, tensor.dtype
                else:
                    part = handle.get_slice(name)  # of the header: the tensor itself is not read
                    if part.get_dtype() not in _STORED:
                        raise GistError(
                            f"{file} holds {name} as {part.get_dtype()}; only {', '.join(_STORED)} can be added"
                        )
                    yield name, torch.Size(part.get_shape()), _STORED[part.get_dtype()]

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None  # before the next, so that what the last one held is free
            if file.suffix == ".safetensors":
                handle: Any = safe_open(file, "pt")
            else:
                try:
                    handle = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap" not in str(error):
                        raise
                    # The format from before PyTorch 1.6 cannot be mapped.
                    handle = torch.load(file, map_location="cpu", weights_only=True)
                if not isinstance(handle, dict):
                    raise GistError(f"{file} holds a {type(handle).__name__}, not the tensors of a checkpoint")
            self._open = (file, handle)
        return self._open[1]

    @contextlib.contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        # Whatever a truncated or foreign file makes the readers raise; pickle's own errors are of any kind.
        try:
            yield
        except GistError:
            raise
        except (
            SafetensorError,
            RuntimeError,
            ValueError,
            OSError,
            EOFError,
            KeyError,
            pickle.UnpicklingError,
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise GistError(f"{file} of {self.name} cannot be read ({reason}); fetch it again") from error


def _weight_files(name_or_path: str | Path, **source: Any) -> list[Path]:
    for name in _WEIGHTS:
        found = find_file(name_or_path, name, **source)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [Path(found)]
        try:
            parts = list(dict.fromkeys(json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GistError(f"{found} is no index of weights ({error!r}); fetch it again") from error
        files = [find_file(name_or_path, part, **source) for part in parts]
        if None in files:
            raise GistError(f"{name_or_path} lacks {parts[files.index(None)]}, which {name} names; fetch it again")
        return [Path(file) for file in files if file is not None]
    raise GistError(
        f"{name_or_path} holds no weights: there is no such directory with one of {', '.join(_WEIGHTS)}, and the hub "
        "did not give one"
    )


def _known_dtype(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r}")
    return name


# -- checking ----------------------------------------------------------------------------------------------------------


def _weight_names(changes: _Weights, originals: _Weights) -> list[str]:
    """The names of both, in the order of the difference; frequencies are no weights and may be in either."""
    names, expected = ([name for name in held if not name.endswith(_FREQUENCIES)] for held in (changes, originals))
    only_here, only_there = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
    if only_here or only_there:
        told = [
            f"{len(some)} only in {which} ({', '.join(some[:3])}{', ...' if len(some) > 3 else ''})"
            for some, which in ((only_here, changes.name), (only_there, originals.name))
            if some
        ]
        raise GistError(
            f"base {originals.name} has not the same tensors as {changes.name}: {'; '.join(told)}; take the base "
            "model that it was trained from"
        )
    return names


def _check_shapes(names: list[str], changes: _Weights, originals: _Weights, config: Any, base_config: Any) -> int:
    """Shapes are equal, or the base lacks rows at the end of its vocabulary; returns how many."""
    faults, added = [], 0
    rows, base_rows = config.vocab_size, base_config.vocab_size
    for name in names:
        shape, original = changes.shape(name), originals.shape(name)
        if shape == original:
            continue
        if rows > base_rows and shape[:1] == (rows,) and original[:1] == (base_rows,) and shape[1:] == original[1:]:
            added = rows - base_rows
        else:
            faults.append(f"{name} is {tuple(shape)}, the base model's {tuple(original)}")
    if faults:
        raise GistError(
            f"base {originals.name} does not fit {changes.name}: {'; '.join(faults[:3])}"
            f"{f' and {len(faults) - 3} more' if len(faults) > 3 else ''}; take the base model that it was trained from"
        )
    return added


def _check_sum(found: float, expected: float | None, tolerance: float, difference: Any, base: Any) -> None:
    if not math.isfinite(found):
        raise GistError(
            f"the weights of {difference} added to {base} hold numbers that are infinite or none; a file is damaged"
        )
    if expected is None or abs(found - expected) <= tolerance:
        return
    other = _by_sum(found, tolerance)
    raise GistError(
        f"the weights of {difference} added to {base} sum up to {found:.4f}, expected {expected:.4f} within {tolerance}"
        + (f"; this is the sum of {other.name}" if other is not None else "")
        + ": the base model is another than the difference was made with, or a file is damaged; check both, or give "
        "the sum that you expect"
    )


def _by_sum(value: float | None, tolerance: float) -> PublishedCheckpoint | None:
    """The published difference whose recovered weights have this sum."""
    for known in PUBLISHED.values():
        if value is not None and known.weight_sum is not None and abs(known.weight_sum - value) <= min(tolerance, 1.0):
            return known
    return None


def _sum_of_frequencies(changes: _Weights, originals: _Weights, config: Any, *, is_counted: bool) -> float:
    """What the published sum holds beside weights: the rotary frequencies of each layer, a buffer that was saved.

    They are counted where the difference has them, and for a published one in any case. Where the base has none (it
    was saved by a later transformers) they are computed, as its model computed them.
    """
    names = [name for name in changes if name.endswith(_FREQUENCIES)]
    if not names and not is_counted:
        return 0.0
    computed = 1.0 / (10000.0 ** (torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)))
    if not names:
        return config.num_hidden_layers * _sum(computed)
    held = {name: originals[name] for name in names if name in originals}
    return sum(_sum(_added(changes[name], held.get(name, computed))) for name in names)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_space(output: Path, needed: int) -> None:
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise GistError(
            f"output {output} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; make room, take "
            "another disk, or write bfloat16"
        )


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _added(change: Tensor, original: Tensor, *, sign: int = 1) -> Tensor:
    """``change + sign * original`` in float32; rows that the original lacks are the change's."""
    result = change.to(torch.float32, copy=True)
    if len(original) != len(result):
        result[: len(original)].add_(original.float(), alpha=sign)
    else:
        result.add_(original.float(), alpha=sign)
    return result


def _sum(tensor: Tensor) -> float:
    """In float64, a part at a time: a copy of the whole would be twice the tensor."""
    return sum(float(part.double().sum()) for part in tensor.reshape(-1).split(_SUMMED_AT_ONCE))


def _digest(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _joined(digests: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------------


def _free(output: str | Path) -> Path:
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise GistError(f"output {output} is there already; give a directory that is new or empty")
    return output


@contextlib.contextmanager
def _whole_or_absent(output: Path) -> Iterator[Path]:
    """A hidden directory beside ``output`` that takes its name when all went well, and is removed when not.

    What a killed process leaves is the hidden directory, ``.<name>.<16 hex digits>.tmp``, which may be deleted.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.absolute().parent / f".{output.name}.{secrets.token_hex(8)}.tmp"
    folder.mkdir()
    try:
        yield folder
        for file in (found for found in folder.rglob("*") if found.is_file()):
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        if output.is_dir():
            output.rmdir()  # an empty one; rename does not replace it everywhere
        folder.rename(output.absolute())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, in groups of at most about 1 GiB (or one tensor)."""
    shards: list[list[str]] = []
    held = _SHARD_BYTES
    for name, size in sizes.items():
        if held + size > _SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _shard_name(number: int, num_shards: int) -> str:
    return "model.safetensors" if num_shards == 1 else f"model-{number + 1:05}-of-{num_shards:05}.safetensors"


def _save_shard(tensors: dict[str, Tensor], folder: Path, number: int, num_shards: int) -> None:
    save_file(tensors, folder / _shard_name(number, num_shards), metadata={"format": "pt"})


def _save_index(shards: list[list[str]], num_bytes: int, folder: Path) -> None:
    if len(shards) > 1:
        places = {name: _shard_name(number, len(shards)) for number, shard in enumerate(shards) for name in shard}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
        (folder / _WEIGHTS[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tokenizer(name_or_path: str | Path, **source: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **source)
    except (OSError, ValueError, ImportError) as error:
        raise GistError(
            f"the tokenizer of {name_or_path} cannot be loaded ({error}); one of SentencePiece needs: pip install "
            "'gist-tokens[sentencepiece]'"
        ) from error


def _save_as_it_was(name_or_path: str | Path, folder: Path, config: Any, **source: Any) -> None:
    """What stands beside the weights of a checkpoint of this library, or of any other."""
    if find_file(name_or_path, "gist.json", **source) is not None:
        GistTokenizer.from_pretrained(name_or_path, **source).save_pretrained(folder)
    else:
        _tokenizer(name_or_path, **source).save_pretrained(folder)
    config.save_pretrained(folder)
    generation = find_file(name_or_path, "generation_config.json", **source)
    if generation is not None:
        shutil.copyfile(generation, folder / "generation_config.json")


def _save_published(tokenizer: Any, folder: Path, config: Any, known: PublishedCheckpoint | None) -> None:
    """Tokenizer, config and generation config of the published layout, with what :func:`gisting.load` recognises."""
    # Early conversions of LLaMA have other ids in their config than in their tokenizer, and -1 for padding, which
    # would be the gist token's row.
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(config, name, getattr(tokenizer, name))
    if (getattr(config, "pad_token_id", None) or 0) < 0:
        config.pad_token_id = None
    template = None if config.is_encoder_decoder else ALPACA_STRIPPED
    gist_tokenizer = GistTokenizer(tokenizer, template, is_encoder_decoder=bool(config.is_encoder_decoder))
    if not gist_tokenizer.has_own_gist_token:
        tokenizer.save_pretrained(folder)
    elif gist_tokenizer.gist_token_id >= config.vocab_size:
        raise GistError(
            f"the difference has {config.vocab_size} rows, but id {gist_tokenizer.gist_token_id} is its tokenizer's "
            "gist token; fetch weights and tokenizer from the same place"
        )
    else:
        gist_tokenizer.save_pretrained(folder)
        config.gist = {
            "format": PATCH_FORMAT,
            "gist_token_id": gist_tokenizer.gist_token_id,
            "num_embeddings": config.vocab_size,
            # As it will be read: a tokenizer of SentencePiece is saved in another format than it came in.
            "tokenizer": GistTokenizer.from_pretrained(folder).fingerprint,
            "template": gist_tokenizer.template.name,
            **(known.about_gists if known is not None else {}),
        }
    config.save_pretrained(folder)
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
