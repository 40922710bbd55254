"""Describe tensors to the tensor copy unit (TMA) of cards of compute capability 9.0 and newer.

Place in the flow: a tensor, a tile -> **descriptors** -> op, which passes them to the kernels. The unit copies a tile
of a tensor to shared memory by itself. A kernel needs no registers for addresses, and what is beyond the tensor is 0.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_describe", "describe", "layout_of"]

# What the unit needs of addresses and strides, in bytes.
ALIGNMENT = 16


def can_describe(*tensors: Tensor) -> bool:
    """Return whether the unit can copy from all of these 4-D tensors.

    The last dimension must be contiguous, and the other strides and the address must be multiples of 16 bytes. Strides
    of 0, of an expanded tensor, do not qualify.
    """
    # Every layer of every step asks, so the strides are not looked at one by one.
    for tensor in tensors:
        one, two, three, last = _strides_of(tensor)
        size = tensor.element_size()
        if last != 1 or min(one, two, three) <= 0:
            return False
        if (tensor.data_ptr() | one * size | two * size | three * size) % ALIGNMENT:
            return False
    return True


def _strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a 4-D tensor, and 16 bytes for dimensions of size 1, whose strides are arbitrary."""
    if 1 not in tensor.shape:
        return tensor.stride()
    aligned = ALIGNMENT // tensor.element_size()
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return (*(aligned if size == 1 else stride for size, stride in pairs), tensor.stride(3))


def describe(tensor: Tensor, rows: int, padded: int, *, is_gluon: bool = False) -> Any:
    """Describe a tensor ``(B, H, T, D)`` in tiles ``(1, 1, rows, padded)``.

    Args:
        tensor: of any dtype for Triton, 16 bits for Gluon; see :func:`can_describe`.
        rows: rows of a tile.
        padded: D, rounded up to a power of 2.
        is_gluon: whether the kernel is written in Gluon, where the layout in shared memory is part of the descriptor.
    """
    shape, strides, block = list(tensor.shape), list(_strides_of(tensor)), [1, 1, rows, padded]
    if is_gluon:
        from triton.experimental.gluon.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
            TensorDescriptor as GluonDescriptor,
        )

        return GluonDescriptor(tensor, shape, strides, block, layout_of(rows, padded, tensor.dtype))
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]

    return TensorDescriptor(tensor, shape, strides, block)


@functools.cache
def layout_of(rows: int, padded: int, dtype: torch.dtype) -> Any:
    """Return the layout in shared memory of a 16-bit tile ``(1, 1, rows, padded)``, for Gluon."""
    from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, padded], element)
