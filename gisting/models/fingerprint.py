"""Whose states these are: a short name for the weights and configuration of a loaded model.

Place in the flow: asked whenever a cache is made and whenever one is used, so it must be quick: of a model of 8 billion
parameters 18 million are read, in less than a second once its weights are in memory (what is mapped from a file and
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
from gisting.models.registry import is_length_dependent
from gisting.models.weights import input_weight

__all__ = ["fingerprint", "walk"]

# What a config holds beside the architecture: none of it changes a hidden state.
_IGNORED = {"architectures", "dtype", "gist", "torch_dtype", "transformers_version", "use_cache"}
# Whether an adapter is at work is written in no weight.
_ADAPTER_STATE = ("active_adapters", "active_adapter", "disable_adapters", "merged", "merged_adapters", "scaling")
# What attention multiplies with, written in no weight: scores, and the cosines and sines of a rotation.
_SCALING = ("scaling", "attention_scaling")
# What torch.compile puts into the names of what it wraps.
_COMPILED = "_orig_mod"
_WHOLE = 16_384
_DIAGONALS = 8
_LONG, _NARROW = 1 << 20, 256
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: PreTrainedModel) -> str:
    """``model_type/`` and twelve hex digits of a SHA-256 over the configuration and a sample of every weight tensor.

    What goes in: the configuration; name, shape and :func:`walk` of each parameter and persistent buffer (the scales
    of quantised weights among them); the whole embedding row of the gist token; the rotary frequencies as they are in
    memory and the factors of attention, whatever the configuration says of them; of each adapter of peft, whether it
    is active, merged or disabled. Tied tensors count under each of their names, so it does not matter whether they
    share memory. Numbers of 16 and 32 bits are read as float32, so that a cast which loses nothing does not show; all
    others bit for bit.

    ``model.to(torch.bfloat16)`` rounds rotary frequencies, ``from_pretrained(dtype=torch.bfloat16)`` leaves them in
    float32: two models, which rotate keys differently. Where frequencies change with the length of a batch, those
    below the length at which they change are read, so that running a model never changes its fingerprint.

    The walk meets every row and every column of a matrix, and eight diagonals of it. So a change of all numbers of a
    row, of a column or of the tensor shows: training steps, merged adapters, replaced, exchanged or rescaled layers.
    In an R x C matrix a change of all numbers of a block of r neighbouring rows and c neighbouring columns shows from
    ``r + c > ceil(min(R, C) / 8)`` on: of 4,096 x 4,096 one of 256 x 257, or 1 x 512. What can be missed are smaller
    blocks and few single numbers: of m numbers at random, all are missed with probability
    ``(1 - 8 / min(R, C)) ** m``, that is for 4,096 x 4,096 one number almost surely, 512 in one of three cases (0.37),
    5,120 in one of 22,000. Matrices of up to 16,384 numbers are read whole.

    Raises:
        GistError: a tensor is on the meta device, so there are no numbers to read.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED and key[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(json.dumps(_adapter_state(model), sort_keys=True, default=str).encode())
    digest.update(json.dumps(_scaling(model), sort_keys=True).encode())
    tensors = [
        part
        for name, tensor in [*model.state_dict().items(), *_frequencies(model)]
        for part in _plain(_uncompiled(name), tensor)
    ]
    gist = getattr(model.config, "gist", None)
    if gist is not None:
        tensors += _plain("gist", input_weight(model).detach()[gist["gist_token_id"]])
    samples = _on_cpu([walk(tensor).view(tensor.dtype) if _is_cast(tensor) else walk(tensor) for _, tensor in tensors])
    for (name, tensor), sample in zip(tensors, samples, strict=True):
        digest.update(f"\n{name} {tuple(tensor.shape)} {'float' if _is_cast(tensor) else tensor.dtype}\n".encode())
        digest.update(sample.numpy().data)
    return f"{model.config.model_type}/{digest.hexdigest()[:12]}"


def walk(tensor: Tensor) -> Tensor:
    """The sample of ``tensor``, as one row of integers that hold its bits.

    Of an ``(R, C)`` matrix with S, the shorter of its sides, and ``n = min(8, S)`` the n max(R, C) numbers at
    ``(i, (i + s) mod C)`` where it is tall, at ``((i + s) mod R, i)`` where it is wide, for ``s = j S // n`` and j in
    0..n-1. For n = 2::

        0 4 . .        0 . a . 4 . e .
        . 1 5 .        8 1 . b c 5 . f
        . . 2 6        . 9 2 . . d 6 .      every row and every column has some
        7 . . 3        . . ...

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
    # Views, since an index of 64 bits for each number would be four times what it picks: squares one below another, and
    # what is left below them.
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


def _frequencies(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The rotary frequencies that no file holds, but for copies that nothing computes with."""
    # Where they change with the length, what is in use depends on what ran last, and the copies are what comes back.
    are_copies_used = is_length_dependent(model.config)
    for prefix, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            if name.endswith("inv_freq") and ("original_inv_freq" in name) == are_copies_used:
                yield f"{prefix}.{name}", getattr(module, name)


def _scaling(model: nn.Module) -> dict[str, float]:
    """What attention multiplies with, of each module that says so. Gemma 3 has one for each type of layer."""
    return {
        f"{_uncompiled(name)}.{key}": float(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.endswith(_SCALING) and isinstance(value, int | float)
    }


def _adapter_state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of each layer that peft has wrapped, what says whether and how strongly its adapters act."""
    found = {}
    for name, module in model.named_modules():
        # transformers' own models have methods of some of these names.
        if isinstance(getattr(type(module), "disable_adapters", None), property):
            state = {key: getattr(module, key) for key in _ADAPTER_STATE if hasattr(module, key)}
            # Where an adapter acts: at gist tokens alone, or as peft's own variants do.
            variants = {key: type(value).__name__ for key, value in getattr(module, "lora_variant", {}).items()}
            found[_uncompiled(name)] = {**state, **({"variants": variants} if variants else {})}
    return found


def _uncompiled(name: str) -> str:
    """A name without what torch.compile adds to it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _is_cast(tensor: Tensor) -> bool:
    """Whether it is read as float32."""
    return tensor.is_floating_point() and tensor.element_size() in (2, 4)


def _on_cpu(samples: list[Tensor]) -> list[Tensor]:
    """Floating ones as float32; in one transfer and one cast for each device and dtype, as each may be waited for."""
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
