"""What keeps the host from waiting for an accelerator: assertions there, and one copy where many would do.

Place in the flow: below whatever runs a model. To branch on a number that a device has computed, the host waits for all
the work before it; an assertion is queued like any other work and costs no wait. Every assertion of the library goes
through here, so that the limits of such messages are known in one place. Knows no model and no text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gisting.errors import GistError

__all__ = ["MAX_MESSAGE_BYTES", "assert_on_device", "on_each_device"]

#: CUDA hands the message to its kernel in a buffer of fixed size. torch refuses one of 255 bytes and more, even where
#: the assertion holds, and on CUDA alone (``aten/src/ATen/native/cuda/TensorCompare.cu``).
MAX_MESSAGE_BYTES = 254


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail on the device unless ``condition`` holds; the host does not wait for the answer.

    On the CPU and under ``torch.compile`` for it, that is an error with this message. On a CUDA device the message goes
    to standard error and the next call that waits for the device raises; the process can then no longer use the device.
    So this is for what must never happen; what a user may well get wrong is checked before, on the host.

    Args:
        condition: bool ``()``, on any device.
        message: at most :data:`MAX_MESSAGE_BYTES` bytes in UTF-8; a constant of its module, for a test to check.

    Raises:
        GistError: the message is longer, on whatever device.
        RuntimeError: from torch, where the condition does not hold.
    """
    size = len(message.encode())
    if size > MAX_MESSAGE_BYTES:
        raise GistError(
            f"message must be at most {MAX_MESSAGE_BYTES} bytes, the room that an assertion has on a CUDA device, "
            f"got {size}; shorten it"
        )
    torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]


def on_each_device(tensor: Tensor) -> Callable[[torch.device], Tensor]:
    """``tensor``, of any shape and dtype, on the device that is asked for, copied there the first time alone.

    For what every layer of a model needs, whose layers may lie on several devices: each copy from the CPU is a wait.
    """
    return functools.cache(tensor.to)
