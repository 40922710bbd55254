"""Weight differences: models published as the weights to add to a base model that may not be redistributed.

Place in the flow: before ``gisting.load``, which reads the checkpoint that :func:`apply_weight_difference` writes.
Works on files, tensor by tensor, and builds no model. The layout is the one of the published LLaMA checkpoints
(github.com/jayelm/gisting, ``src/weight_diff.py``, which follows Alpaca's): an ordinary checkpoint in float32 in which
every tensor must be added to the base model's tensor of the same name. A row that the base does not have counts as
zero, so the difference holds the gist token's rows of the embedding and of the head unchanged.
"""

from __future__ import annotations

import contextlib
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
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from gisting.errors import GistError
from gisting.models.published import ALPACA_STRIPPED, PUBLISHED, PublishedCheckpoint, published
from gisting.models.registry import read_config
from gisting.models.state import PATCH_FORMAT
from gisting.source import weight_files
from gisting.tokens import GistTokenizer

__all__ = ["RecoveredCheckpoint", "apply_weight_difference", "looks_like_difference", "refusal"]

# A buffer that transformers saved with LLaMA's weights until 4.32. It is computed from the config and is not a weight.
_FREQUENCIES = "rotary_emb.inv_freq"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_BYTES = 1 << 30
_SUMMED_AT_ONCE = 1 << 20
# The weights of a LLaMA's RMSNorm are factors: about 1 in a model, about 0.001 in a difference of two models.
_NORM_OF_A_DIFFERENCE = 0.1
# What a truncated or foreign file makes its reader raise.
_DAMAGE = (SafetensorError, RuntimeError, ValueError, TypeError, OSError, EOFError, LookupError, AttributeError)


@dataclass(frozen=True)
class RecoveredCheckpoint:
    """What :func:`apply_weight_difference` has written and checked.

    Args:
        directory: where the checkpoint is.
        num_parameters: number of values in its weights.
        num_added_rows: number of rows that embedding and head have in addition to the base model's.
        weight_sum: the float64 sum of all weights before they were cast, and of the rotary frequencies where the
            published sum includes them.
        expected_sum: the sum it was compared with; None if no sum is known, so that the weights are unconfirmed.
        dtype: dtype of the weights as written.
    """

    directory: Path
    num_parameters: int
    num_added_rows: int
    weight_sum: float
    expected_sum: float | None
    dtype: str


def apply_weight_difference(
    difference: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    dtype: str = "float32",
    expected_sum: float | None = None,
    tolerance: float = 0.1,
    on_progress: Callable[[int, int], None] | None = None,
    **source: Any,
) -> RecoveredCheckpoint:
    """Add a weight difference to its base model and write the resulting checkpoint.

    Weights are read and written tensor by tensor, in files of about 1 GiB, so a model of any size needs little memory.
    They are added in float32. The checkpoint appears under its name once it is complete and checked; until then there
    is only a hidden directory next to it, which is removed if anything fails.

    A checkpoint whose tokenizer has ``<GIST>`` is written so that :func:`gisting.load` finds what the published ones
    were trained with: the template :data:`~gisting.models.published.ALPACA_STRIPPED` and, where the sum of the weights
    identifies the checkpoint that was trained to gist, its k.

    Args:
        difference: a directory, or a repository on the Hugging Face hub.
        base: the base model: a directory, or a repository on the hub. Its weights are safetensors files, or ``.bin``
            files, which are read with ``weights_only=True``.
        output: the directory for the checkpoint, which must be new or empty.
        dtype: the type in which the weights are written: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        expected_sum: what all weights of the result must add up to; None for the sum that is known for a published
            checkpoint of this name. Where none is known, the result is compared with all published sums.
        tolerance: how far the sum may be off. Published sums were added up in float32, which leaves an error of a few
            hundredths; with another base model, or another condition, the sum is off by tens.
        on_progress: called after each tensor with the number of bytes done and the total number of bytes.
        **source: ``revision``, ``token``, ``cache_dir``, ... for a difference on the hub.

    Returns:
        What was written and checked.

    Raises:
        GistError: a checkpoint is missing or cannot be read, the two do not fit each other, the sum is wrong,
            ``output`` is not empty, or the disk has too little space.
        OSError: something cannot be written.
    """
    if dtype not in _DTYPES:
        raise GistError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not tolerance >= 0:
        raise GistError(f"tolerance must be at least 0, got {tolerance!r}")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise GistError(f"output {output} already exists; give a directory that is new or empty")
    known = published(difference) or _by_sum(expected_sum, tolerance)
    if known is not None and not known.is_difference:
        raise GistError(f"difference {difference} is a complete checkpoint: gisting.load reads it directly")
    if expected_sum is None and known is not None:
        expected_sum = known.weight_sum

    config, base_config = read_config(difference, **source), read_config(base)
    if config.model_type != base_config.model_type:
        raise GistError(
            f"difference is for a {config.model_type} model, base {base} is a {base_config.model_type} model"
        )
    tokenizer = _read_tokenizer(difference, **source)  # read now, so that a missing file shows before the work
    changes, originals = _Weights(difference, **source), _Weights(base)
    names = _weight_names(changes, originals)
    num_added_rows = _count_added_rows(names, changes, originals, config, base_config)

    written = _DTYPES[dtype]
    split = split_state_dict_into_shards_factory(
        {name: changes.shapes[name] for name in names},
        get_storage_size=lambda shape: shape.numel() * written.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_BYTES,
    )
    num_bytes: int = split.metadata["total_size"]
    _check_space(output, num_bytes)
    total, num_done = 0.0, 0
    with _complete_or_absent(output) as folder:
        for file, shard in split.filename_to_tensors.items():
            tensors = {}
            for name in shard:
                tensor = _added(changes[name], originals[name])
                total += _sum(tensor)
                tensors[name] = tensor.to(written)
                num_done += tensors[name].nbytes
                if on_progress is not None:
                    on_progress(num_done, num_bytes)
            save_file(tensors, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        total += _sum_of_frequencies(changes, originals, config, is_counted=known is not None)
        if expected_sum is None:
            known = _by_sum(total, tolerance)
            expected_sum = None if known is None else known.weight_sum
        _check_sum(total, expected_sum, tolerance, difference, base)
        config.dtype = written
        _save_settings(tokenizer, folder, config, known)
    return RecoveredCheckpoint(
        directory=output,
        num_parameters=sum(changes.shapes[name].numel() for name in names),
        num_added_rows=num_added_rows,
        weight_sum=total,
        expected_sum=expected_sum,
        dtype=dtype,
    )


def looks_like_difference(model: PreTrainedModel) -> bool:
    """Return whether a loaded LLaMA is the difference of two models, such as a local copy of a published difference.

    Nothing in a directory of the published layout says so, but the weights do: those of the last norm are about 1 in a
    model and near 0 in a difference. This does not work for other families; Gemma's norms are near 0 by design.

    Args:
        model: a loaded model. On the meta device there are no values to look at, and the answer is False.
    """
    norm = getattr(getattr(model, "model", None), "norm", None)
    if model.config.model_type != "llama" or norm is None or norm.weight.device.type == "meta":
        return False
    return float(norm.weight.detach().float().abs().mean()) < _NORM_OF_A_DIFFERENCE


def refusal(name_or_path: str | Path) -> GistError:
    """Return the error for loading a weight difference as if it were a model. It names the command to run.

    Args:
        name_or_path: what was to be loaded.
    """
    return GistError(
        f"{name_or_path} is a weight difference, not a model; add it to its base model first: "
        f"gisting apply-difference {name_or_path} --base BASE --output DIRECTORY, then load DIRECTORY"
    )


# -- reading -----------------------------------------------------------------------------------------------------------


class _Weights:
    """The tensors of a checkpoint by name. One of its files is mapped into memory at a time."""

    def __init__(self, name_or_path: str | Path, **source: Any) -> None:
        self.name = str(name_or_path)
        self.shapes: dict[str, torch.Size] = {}
        self._files: dict[str, Path] = {}
        self._mapped: tuple[Path, dict[str, Tensor]] | None = None
        try:
            files = weight_files(name_or_path, **source)
        except _DAMAGE as error:
            raise GistError(f"the weights of {self.name} cannot be found ({error}); fetch them again") from error
        if not files:
            raise GistError(
                f"{self.name} holds no weights: neither a directory nor a repository on the hub with files "
                "model.safetensors or pytorch_model.bin, in one part or several"
            )
        for file in files:
            for name, tensor in self._tensors(file).items():
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                    raise GistError(f"{file} holds {name} as {kind}; only floating-point tensors can be added")
                self.shapes[name], self._files[name] = tensor.shape, file

    def get(self, name: str, default: Tensor) -> Tensor:
        return self[name] if name in self._files else default

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors(self._files[name])[name]

    def _tensors(self, file: Path) -> dict[str, Tensor]:
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = None  # first, so that the memory of the last file is free
            try:
                self._mapped = file, _map_file(file)
            except (*_DAMAGE, pickle.UnpicklingError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise GistError(f"{file} of {self.name} cannot be read ({reason}); fetch it again") from error
        return self._mapped[1]


def _map_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # The format from before PyTorch 1.6 cannot be mapped.
        found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise TypeError(f"it holds a {type(found).__name__}, not the tensors of a checkpoint")
    return found


def _read_tokenizer(name_or_path: str | Path, **source: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **source)
    except (OSError, ValueError, ImportError) as error:
        raise GistError(
            f"the tokenizer of {name_or_path} cannot be loaded ({error}); SentencePiece tokenizers need: pip install "
            "'gist-tokens[sentencepiece]'"
        ) from error


# -- checking ----------------------------------------------------------------------------------------------------------


def _weight_names(changes: _Weights, originals: _Weights) -> list[str]:
    """Return the names that both have, in the order of the difference, without the frequencies that either may hold."""
    names, expected = (
        [name for name in held.shapes if not name.endswith(_FREQUENCIES)] for held in (changes, originals)
    )
    only_here, only_there = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
    if only_here or only_there:
        listed = [
            f"{len(some)} only in {which} ({', '.join(some[:3])}{', ...' if len(some) > 3 else ''})"
            for some, which in ((only_here, changes.name), (only_there, originals.name))
            if some
        ]
        raise GistError(
            f"base {originals.name} does not have the same tensors as {changes.name}: {'; '.join(listed)}; give the "
            "base model that it was trained from"
        )
    return names


def _count_added_rows(names: list[str], changes: _Weights, originals: _Weights, config: Any, base_config: Any) -> int:
    """Check that shapes are equal, except for rows that the base lacks at the end of its vocabulary; count those."""
    faults, num_added = [], 0
    rows, base_rows = config.vocab_size, base_config.vocab_size
    for name in names:
        shape, original = changes.shapes[name], originals.shapes[name]
        if shape == original:
            continue
        if rows > base_rows and shape[:1] == (rows,) and original[:1] == (base_rows,) and shape[1:] == original[1:]:
            num_added = rows - base_rows
        else:
            faults.append(f"{name} is {tuple(shape)}, the base model's {tuple(original)}")
    if faults:
        raise GistError(
            f"base {originals.name} does not fit {changes.name}: {'; '.join(faults[:3])}"
            f"{f' and {len(faults) - 3} more' if len(faults) > 3 else ''}; give the base model that it was trained from"
        )
    return num_added


def _check_sum(found: float, expected: float | None, tolerance: float, difference: Any, base: Any) -> None:
    if not math.isfinite(found):
        raise GistError(
            f"the weights of {difference} added to {base} contain infinities or NaNs; one of the files is damaged"
        )
    if expected is None or abs(found - expected) <= tolerance:
        return
    other = _by_sum(found, tolerance)
    raise GistError(
        f"the weights of {difference} added to {base} add up to {found:.4f}, expected {expected:.4f} within {tolerance}"
        + (f"; this is the sum of {other.name}" if other is not None else "")
        + ": the difference was made with another base model, or a file is damaged; check both, or give the sum that "
        "you expect"
    )


def _by_sum(value: float | None, tolerance: float) -> PublishedCheckpoint | None:
    """Find the published difference whose recovered weights have this sum."""
    for known in PUBLISHED.values():
        if value is not None and known.weight_sum is not None and abs(known.weight_sum - value) <= min(tolerance, 1.0):
            return known
    return None


def _sum_of_frequencies(changes: _Weights, originals: _Weights, config: Any, *, is_counted: bool) -> float:
    """Sum the rotary frequencies of all layers, which were saved in 2023 and are part of the published sums.

    They are counted if the difference has them, and always if it is a published one. Where the base has none (because
    a later transformers saved it) they are computed as its model computed them.
    """
    names = [name for name in changes.shapes if name.endswith(_FREQUENCIES)]
    if not names and not is_counted:
        return 0.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    computed = 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if not names:
        return config.num_hidden_layers * _sum(computed)
    return sum(_sum(_added(changes[name], originals.get(name, computed))) for name in names)


def _check_space(output: Path, needed: int) -> None:
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise GistError(
            f"output {output} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; free some space, use "
            "another disk, or write bfloat16"
        )


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _added(change: Tensor, original: Tensor) -> Tensor:
    """Add in float32; rows that the original lacks are taken from the change."""
    result = change.to(torch.float32, copy=True)
    result[: len(original)].add_(original.float())
    return result


def _sum(tensor: Tensor) -> float:
    """Sum in float64, a part at a time, because a float64 copy of the whole would be twice the size of the tensor."""
    return sum(float(part.double().sum()) for part in tensor.reshape(-1).split(_SUMMED_AT_ONCE))


# -- writing -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    """Make a hidden directory next to ``output`` that is renamed to it on success and removed on failure.

    A killed process leaves the hidden directory, ``.<name>.<16 hex digits>.tmp``, which may be deleted.
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


def _save_settings(tokenizer: Any, folder: Path, config: Any, known: PublishedCheckpoint | None) -> None:
    """Save tokenizer, config and generation config, with what :func:`gisting.load` recognises."""
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
            f"the difference has {config.vocab_size} rows, but its tokenizer's gist token has id "
            f"{gist_tokenizer.gist_token_id}; fetch weights and tokenizer from the same place"
        )
    else:
        gist_tokenizer.save_pretrained(folder)
        config.gist = {
            "format": PATCH_FORMAT,
            "gist_token_id": gist_tokenizer.gist_token_id,
            "num_embeddings": config.vocab_size,
            # As it will be read back: a SentencePiece tokenizer is saved in another format than it was read from.
            "tokenizer": GistTokenizer.from_pretrained(folder).fingerprint,
            "template": gist_tokenizer.template.name,
            **(known.about_gists if known is not None else {}),
        }
    config.save_pretrained(folder)
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
