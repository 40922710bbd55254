"""What is derived from tensors once per batch and used by every layer and both passes: a mask's intervals, and from
intervals tile plans and pieces.

The memory hangs on the tensors themselves: it goes with them, and is not trusted after one was written to. So nothing
that is remembered may hold the first of its tensors, nor a view of it, or neither would ever go.

Place in the flow: beside ``api``, and asked by ``models/registry.py`` for the intervals of a mask. Knows nothing of
what is built.
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
# first tensor -> (weak references to the others, versions of all, what was built under each key)
_MEMORY: Any = WeakIdKeyDictionary()


def remembered(visibility: Visibility, key: Hashable, build: Callable[[], _Result]) -> _Result:
    """:func:`remembered_on` the two tensors of the intervals of ``visibility``. Arguments otherwise as there."""
    return remembered_on((visibility.first, visibility.end), key, build)


def remembered_on(tensors: tuple[Tensor, ...], key: Hashable, build: Callable[[], _Result]) -> _Result:
    """``build()``, or what it gave the last time for these very ``tensors``, unwritten since, under this ``key``.

    It is built anew each time where that cannot be known: inside ``torch.compile``; while a CUDA graph is captured,
    which is replayed on other contents; and under ``torch.inference_mode``, whose tensors count no writes and cannot be
    used in training afterwards.

    Args:
        tensors: of any shape and dtype; what is built is forgotten with the first of them.
        key: what is asked of them.
        build: what makes the answer. It must not hold the tensors, which would then never be freed.
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
