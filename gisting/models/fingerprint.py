"""Whose states these are: a short name for the weights and configuration of a loaded model.

Place in the flow: asked whenever a cache is made and whenever one is used, so it must be quick: of a model of 8 billion
parameters 2.4 million are read, in less than a second once its weights are in memory (what is mapped from a file and
was never touched has to be read from there first). Reads what is loaded, wherever it came from; compares nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gisting.errors import GistError
from gisting.models.weights import input_weight

__all__ = ["fingerprint", "walk"]

# What a config holds beside the architecture: none of it changes a hidden state.
_IGNORED = {"architectures", "dtype", "gist", "torch_dtype", "transformers_version", "use_cache"}
# Whether an adapter is at work is written in no weight.
_ADAPTER_STATE = ("active_adapters", "active_adapter", "disable_adapters", "merged", "merged_adapters", "scaling")
# What torch.compile puts into the names of what it wraps.
_COMPILED = "_orig_mod."
_WHOLE = 16_384
_LONG, _NARROW = 1 << 20, 256
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: PreTrainedModel) -> str:
    """``model_type/`` and twelve hex digits of a SHA-256 over the configuration and a sample of every weight tensor.

    What goes in: the configuration; name, shape and :func:`walk` of each parameter and persistent buffer (the scales
    of quantised weights among them); the whole embedding row of the gist token; of each adapter of peft, whether it is
    active, merged or disabled. Tied tensors count under each of their names, so it does not matter whether they share
    memory. Numbers of 16 and 32 bits are read as float32, so that a cast which loses nothing does not show; all others
    bit for bit.

    The walk meets every row and every column of a matrix. So a change of all numbers of a row, of a column or of the
    tensor shows: training steps, merged adapters, replaced, exchanged or rescaled layers. What it can miss is a change
    of few single numbers of a large matrix: of m numbers at random of an R x C matrix, all are missed with probability
    ``(1 - max(R, C) / (R C)) ** m``, that is for 4,096 x 4,096 one number almost surely, 4,096 in one of three
    cases (0.37), 40,960 in one of 22,000.

    Raises:
        GistError: a tensor is on the meta device, so there are no numbers to read.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED and key[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(json.dumps(_adapter_state(model), sort_keys=True, default=str).encode())
    tensors = [
        part for name, tensor in model.state_dict().items() for part in _plain(name.replace(_COMPILED, ""), tensor)
    ]
    gist = getattr(model.config, "gist", None)
    if gist is not None:
        tensors += _plain("gist", input_weight(model).detach()[gist["gist_token_id"]])
    samples = _on_cpu([walk(tensor) for _, tensor in tensors])
    for (name, tensor), sample in zip(tensors, samples, strict=True):
        is_float = tensor.is_floating_point() and tensor.element_size() in (2, 4)
        digest.update(f"\n{name} {tuple(tensor.shape)} {'float' if is_float else tensor.dtype}\n".encode())
        digest.update((sample.view(tensor.dtype).float() if is_float else sample).numpy().data)
    return f"{model.config.model_type}/{digest.hexdigest()[:12]}"


def walk(tensor: Tensor) -> Tensor:
    """The sample of a tensor, as one row of integers that hold its bits.

    Of an ``(R, C)`` matrix the ``max(R, C)`` numbers at ``(i mod R, i mod C)``::

        0 . .        0 . . 3 . .        every row and every column has one
        . 1 .        . 1 . . 4 .
        . . 2        . . 2 . . 5
        3 . .

    A tensor of more dimensions is a matrix of rows of its last one. Up to 16,384 numbers, and up to 1,048,576 in a
    single dimension, are taken whole. What is longer than that and narrower than 256 (packed or flattened weights) is
    read as a square, the rest behind it whole.
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
    # Views, since an index of 64 bits for each number would be four times what it picks.
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    side, length = min(rows, columns), max(rows, columns)
    along = down if rows > columns else right
    squares = matrix.as_strided((length // side, side), (side * along, down + right))
    rest = matrix.diagonal((length // side * side) * (-1 if rows > columns else 1))
    return torch.cat([squares.reshape(-1), rest])


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold the numbers: a quantised or distributed one is made of several."""
    if not isinstance(tensor, Tensor):
        return  # the extra state of a module
    if tensor.device.type == "meta":
        raise GistError(
            f"{name} is on the meta device, so nobody can tell whose states these are; load the model whole, without "
            "offloading to disk"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


def _adapter_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of each layer that peft has wrapped, what says whether and how strongly its adapters act."""
    found = {}
    for name, module in model.named_modules():
        # transformers' own models have methods of some of these names.
        if isinstance(getattr(type(module), "disable_adapters", None), property):
            found[name.replace(_COMPILED, "")] = {
                key: getattr(module, key) for key in _ADAPTER_STATE if hasattr(module, key)
            }
    return found


def _on_cpu(samples: list[Tensor]) -> list[Tensor]:
    """One transfer for each device and dtype: an accelerator answers each with a wait."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault((sample.device, sample.dtype), []).append(number)
    moved = list(samples)
    for numbers in groups.values():
        joined = torch.cat([samples[number] for number in numbers]).cpu()
        for number, part in zip(numbers, joined.split([samples[number].numel() for number in numbers]), strict=True):
            moved[number] = part
    return moved
