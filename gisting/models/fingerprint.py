"""Identify a loaded model by a short fingerprint of its weights and configuration.

Place in the flow: called whenever a cache is made or used, so it must be quick: it reads 18 million of the parameters
of a model with 8 billion, in less than a second once the weights are in memory (pages of a mapped file that were never
touched must be read first). Reads what is loaded, wherever it came from; compares nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gisting.errors import GistError
from gisting.models.registry import is_length_dependent
from gisting.models.weights import input_weight, keep_form, row_tensors

__all__ = ["base_fingerprint", "fingerprint", "is_peft_layer", "walk"]

# Entries of a config that do not change any hidden state, at any depth: where it comes from, ids that only generation
# and losses read, what a call returns, what initialises weights and what labels are called.
_IGNORED = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "gist", "name_or_path", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("use_cache", "output_hidden_states", "output_attentions", "output_router_logits", "return_dict"),
    *("initializer_range", "initializer_factor", "router_aux_loss_coef"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
}
# Attributes that say whether an adapter is active, which no weight shows.
_ADAPTER_STATE = ("active_adapters", "active_adapter", "disable_adapters", "merged", "merged_adapters", "scaling")
# Factors in attention that no weight shows: of the scores, and of the cosines and sines of a rotation.
_SCALING = ("scaling", "attention_scaling")
# The part that torch.compile adds to the names of modules.
_COMPILED = "_orig_mod"
_WHOLE = 16_384
_DIAGONALS = 8
_LONG, _NARROW = 1 << 20, 256
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: PreTrainedModel) -> str:
    """Return ``model_type/`` and twelve hex digits of a SHA-256 over the configuration and a sample of every tensor.

    The hash covers the configuration, but not entries that change no hidden state (``pad_token_id``, ``eos_token_id``,
    ``use_cache``, ``output_hidden_states`` and the like); name, shape and :func:`walk` of each parameter and persistent
    buffer (including the scales of quantised weights); the complete embedding row of the gist token; the rotary
    frequencies in memory and the factors in attention, whatever the configuration says about them; and whether each
    peft adapter is active, merged or disabled. Tied tensors count under each of their names, so it does not matter
    whether they share memory. Values of 16 and 32 bits are read as float32, so a lossless cast does not change the
    fingerprint; all others are read bit for bit.

    ``model.to(torch.bfloat16)`` rounds rotary frequencies, ``from_pretrained(dtype=torch.bfloat16)`` leaves them in
    float32. These are two different models, because they rotate keys differently. If the frequencies depend on the
    length of a batch, those for short batches are read, so running a model never changes its fingerprint.

    The sample has values from every row and every column of a matrix, on eight diagonals. So a change of all values of
    a row, of a column or of the tensor shows: training steps, merged adapters, replaced, swapped or rescaled layers.
    In an R x C matrix, a change of all values in a block of r adjacent rows and c adjacent columns shows if
    ``r + c > ceil(min(R, C) / 8)``: for 4,096 x 4,096, a block of 256 x 257, or of 1 x 512. Smaller blocks and a few
    single values can be missed: m random values are all missed with probability ``(1 - 8 / min(R, C)) ** m``. For
    4,096 x 4,096 that is one value almost certainly, 512 values in one of three cases (0.37), 5,120 values in one of
    22,000. Matrices of up to 16,384 values are read completely.

    Args:
        model: a loaded model.

    Raises:
        GistError: a tensor is on the meta device, so there are no values to read; or 4-bit weights are no longer in the
            form that they were loaded in (:func:`~gisting.models.weights.keep_form`).
    """
    keep_form(model)
    gist = getattr(model.config, "gist", None)
    row = [] if gist is None else _plain("gist", input_weight(model).detach()[gist["gist_token_id"]])
    tensors = [*_tensors(model, model.state_dict()), *row]
    return _hashed(model, lasting_config(model.config), _adapter_state(model), tensors, {})


def base_fingerprint(model: PreTrainedModel) -> str:
    """Return the :func:`fingerprint` of the stock model under ``model``: never patched, without a gist-only adapter.

    The patched and the stock model continue from a cached gist with the same bits, and so does a model whose adapter
    acts at gist tokens only. They share this fingerprint, whatever id the gist token has. Left out are the embedding
    rows that ``patch`` added, or put back are those that it replaced (not of a checkpoint that was saved patched, which
    no longer has them).

    Args:
        model: a loaded model, patched or not.

    Raises:
        GistError: a tensor is on the meta device, so there are no values to read; or 4-bit weights are no longer in the
            form that they were loaded in (:func:`~gisting.models.weights.keep_form`).
    """
    gist = getattr(model.config, "gist", None)
    if gist is None:
        return fingerprint(model)
    keep_form(model)
    config, state, adapters = lasting_config(model.config), model.state_dict(), _adapter_state(model)
    if hasattr(model, "_gist_trained_before") and gist["adapter"]["kind"] != "lora":
        adapters = {}
        state = {
            name.replace(".base_layer", ""): tensor
            for name, tensor in state.items()
            if "lora_" not in name and name.rpartition(".")[2] != "gist_rows"
        }
    tables = row_tensors(model)
    num_rows, replaced = gist["num_embeddings"], getattr(getattr(model, "_gist_undo", None), "replaced_rows", None)
    known_rows: dict[int, Tensor] = {}
    if tables[0].shape[0] > num_rows:
        if "vocab_size" in config:
            config["vocab_size"] = num_rows
        places = {table.data_ptr() for table in tables}
        state = {
            name: tensor[:num_rows] if isinstance(tensor, Tensor) and tensor.data_ptr() in places else tensor
            for name, tensor in state.items()
        }
    elif replaced is not None:
        known_rows = {table.data_ptr(): row for table, row in zip(tables, replaced, strict=True)}
    return _hashed(model, config, adapters, _tensors(model, state), known_rows)


def _lasting(config: Any) -> Any:
    """Leave out of a config, and of the configs in it, what changes no hidden state."""
    if not isinstance(config, dict):
        return config
    return {str(key): _lasting(value) for key, value in config.items() if key not in _IGNORED and str(key)[:1] != "_"}


def walk(tensor: Tensor) -> Tensor:
    """Sample ``tensor`` as one row of integers that hold its bits.

    For an ``(R, C)`` matrix whose shorter side is S, with ``n = min(8, S)``, these are the n max(R, C) values at
    ``(i, (i + s) mod C)`` if it is tall, at ``((i + s) mod R, i)`` if it is wide, for ``s = j S // n`` and j in
    0..n-1. For n = 2::

        0 4 . .        0 . a . 4 . e .
        . 1 5 .        8 1 . b c 5 . f
        . . 2 6        . 9 2 . . d 6 .      every row and every column has some
        7 . . 3        . . ...

    A tensor with more dimensions is read as a matrix whose rows are along its last dimension. Up to 16,384 values, and
    up to 1,048,576 in a single dimension, are read completely. A tensor that is longer and narrower than 256 (packed or
    flattened weights) is read as a square, followed by the complete remainder.

    Args:
        tensor: a tensor of any shape and dtype, on any device.
    """
    tensor = tensor.detach()
    tensor = tensor.view(_BITS[tensor.element_size()])
    if tensor.numel() <= _WHOLE:
        return tensor.reshape(-1)
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
    if max(matrix.shape) > _LONG and min(matrix.shape) < _NARROW:
        flat = matrix.reshape(-1)
        columns = math.isqrt(flat.numel())
        rest = flat.numel() % columns
        return torch.cat([walk(flat[: flat.numel() - rest].view(-1, columns)), flat[flat.numel() - rest :]])
    # Use views of stacked squares and of the remainder below them: a 64-bit index for each value would take four times
    # the memory of the sample.
    tall = matrix if matrix.shape[0] > matrix.shape[1] else matrix.T
    rows, side = tall.shape
    squares = tall[: rows // side * side].unflatten(0, (rows // side, side))
    rest = tall[rows // side * side :]
    num_diagonals = min(_DIAGONALS, side)
    return torch.cat(
        [
            part.diagonal(offset, -2, -1).reshape(-1)
            for shift in (number * side // num_diagonals for number in range(num_diagonals))
            for part in (squares, rest)
            for offset in (shift, shift - side)
        ]
    )


def lasting_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a ``config`` without the entries that change no hidden state."""
    return _lasting(config.to_dict())


def _tensors(model: PreTrainedModel, state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [
        part for name, tensor in [*state.items(), *_frequencies(model)] for part in _plain(_uncompiled(name), tensor)
    ]


def _hashed(
    model: PreTrainedModel,
    config: dict[str, Any],
    adapters: dict[str, Any],
    tensors: list[tuple[str, Tensor]],
    known_rows: dict[int, Tensor],
) -> str:
    """Hash what identifies a model. The gist token's row is read from ``known_rows``, by the address of its table."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(json.dumps(adapters, sort_keys=True, default=str).encode())
    digest.update(json.dumps(_scaling(model), sort_keys=True).encode())
    samples = []
    for _, tensor in tensors:
        sample = walk(tensor)
        if tensor.data_ptr() in known_rows:
            sample = _with_row(sample, tensor, model.config.gist["gist_token_id"], known_rows[tensor.data_ptr()])
        samples.append(sample.view(tensor.dtype) if _is_cast(tensor) else sample)
    for (name, tensor), sample in zip(tensors, _on_cpu(samples), strict=True):
        digest.update(f"\n{name} {tuple(tensor.shape)} {'float' if _is_cast(tensor) else tensor.dtype}\n".encode())
        digest.update(sample.numpy().data)
    return f"{model.config.model_type}/{digest.hexdigest()[:12]}"


def _with_row(sample: Tensor, table: Tensor, number: int, row: Tensor) -> Tensor:
    """Return the sample that :func:`walk` would take of ``table`` if its row ``number`` were ``row``."""
    # Walking over views of row and column numbers shows where each value of the sample is; the table is not copied.
    shape = (table.shape[0], table[0].numel())
    rows = walk(torch.arange(shape[0], device=table.device)[:, None].expand(shape))
    columns = walk(torch.arange(shape[1], device=table.device).expand(shape))
    bits = row.to(table.device, table.dtype).reshape(-1).view(sample.dtype)
    return torch.where(rows == number, bits[columns], sample)


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors in a tensor; a quantised or distributed one has several."""
    if not isinstance(tensor, Tensor):
        return  # extra state of a module
    if tensor.device.type == "meta":
        raise GistError(
            f"{name} is on the meta device, so the model cannot be identified; load the complete model, without "
            "offloading to disk"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


def _frequencies(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the rotary frequencies that determine the states; they are in no file.

    Modules also keep a copy. If the frequencies depend on the length, those in use depend on the last batch, and the
    copy holds the ones for short batches.
    """
    are_copies_used = is_length_dependent(model.config)
    for prefix, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            if name.endswith("inv_freq") and ("original_inv_freq" in name) == are_copies_used:
                yield f"{prefix}.{name}", getattr(module, name)


def _scaling(model: nn.Module) -> dict[str, float]:
    """Collect the factors in attention by module. Gemma 3 has one for each type of layer."""
    return {
        f"{_uncompiled(name)}.{key}": float(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.endswith(_SCALING) and isinstance(value, int | float)
    }


def _adapter_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Collect, for each layer that peft has wrapped, whether and how strongly its adapters act."""
    found = {}
    for name, module in model.named_modules():
        if is_peft_layer(module):
            state = {key: getattr(module, key) for key in _ADAPTER_STATE if hasattr(module, key)}
            # The variants say where an adapter acts, for example at gist tokens only.
            variants = {key: type(value).__name__ for key, value in getattr(module, "lora_variant", {}).items()}
            found[_uncompiled(name)] = {**state, **({"variants": variants} if variants else {})}
    return found


def is_peft_layer(module: nn.Module) -> bool:
    """Return whether peft has put ``module`` in the place of one of the model's own.

    Args:
        module: any module.
    """
    # A property, because transformers' own models have methods of this name.
    return isinstance(getattr(type(module), "disable_adapters", None), property)


def _uncompiled(name: str) -> str:
    """Remove what torch.compile adds to a name."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _is_cast(tensor: Tensor) -> bool:
    """Check whether a tensor is read as float32."""
    return tensor.is_floating_point() and tensor.element_size() in (2, 4)


def _on_cpu(samples: list[Tensor]) -> list[Tensor]:
    """Move samples to the CPU, and cast floating-point ones to float32.

    There is one transfer and one cast for each device and dtype, because each may wait for the device.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault((sample.device, sample.dtype), []).append(number)
    moved = list(samples)
    for numbers in groups.values():
        joined = torch.cat([samples[number] for number in numbers]).cpu()
        joined = joined.float() if joined.is_floating_point() else joined
        for number, part in zip(numbers, joined.split([samples[number].numel() for number in numbers]), strict=True):
            moved[number] = part
    return moved
