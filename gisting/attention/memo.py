"""Cache what is derived from a mask, so that every layer and both passes of a batch share it.

It caches the intervals of a mask, and the tile plans and pieces that are made from intervals. An entry belongs to its
tensors: it is freed with them, and ignored after one of them has been written to. A cached value must not refer to the
first of its tensors or to a view of it, because then neither would ever be freed.

Place in the flow: used by ``api`` and the implementations, and by ``models/registry.py`` for the intervals of a mask.
Independent of what is cached.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gisting.visibility import Visibility

__all__ = ["remembered", "remembered_on"]

_Result = TypeVar("_Result")
# first tensor -> (weak references to the others, versions of all, cached values by key)
_MEMORY: Any = WeakIdKeyDictionary()


def remembered(visibility: Visibility, key: Hashable, build: Callable[[], _Result]) -> _Result:
    """Call :func:`remembered_on` with the two tensors of ``visibility``. Other arguments as for that function."""
    return remembered_on((visibility.first, visibility.end), key, build)


def remembered_on(tensors: tuple[Tensor, ...], key: Hashable, build: Callable[[], _Result]) -> _Result:
    """Return the value cached for these ``tensors`` under ``key``, or call ``build`` and cache its result.

    The value is built again if a tensor was written to since. Nothing is cached inside ``torch.compile``; while a CUDA
    graph is captured, because the graph is replayed with other contents; and under ``torch.inference_mode``, whose
    tensors do not count writes and cannot be used in training afterwards.

    Args:
        tensors: any shapes and dtypes. The value is freed with the first of them.
        key: distinguishes values that are derived from the same tensors.
        build: makes the value, which must not refer to the tensors, because they would then never be freed.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or any(map(_is_untracked, tensors)):
        return build()
    versions = tuple(_version(tensor) for tensor in tensors)
    entry = _MEMORY.get(tensors[0])
    if (
        entry is None
        or entry[1] != versions
        or any(held() is not tensor for held, tensor in zip(entry[0], tensors[1:], strict=True))
    ):
        entry = (tuple(weakref.ref(tensor) for tensor in tensors[1:]), versions, {})
        _MEMORY[tensors[0]] = entry
    built = entry[2]
    if key not in built:
        built[key] = build()
    return built[key]


def _is_untracked(tensor: Tensor) -> bool:
    return tensor.is_inference() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _version(tensor: Tensor) -> int:
    return tensor._version
