"""Keep the host from waiting for an accelerator: assert on the device, and copy a tensor to each device only once.

Place in the flow: below everything that runs a model. To branch on a number that a device has computed, the host must
wait for all earlier work. An assertion on the device is queued like any other work, so the host does not wait. Every
such assertion of the library is made here, where the limit of their messages is checked. Independent of models and
text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gisting.errors import GistError

__all__ = ["MAX_MESSAGE_BYTES", "assert_on_device", "on_each_device"]

#: The CUDA kernel takes the message in a buffer of fixed size. Only on CUDA, torch refuses a message of 255 bytes or
#: more, even if the assertion holds (``aten/src/ATen/native/cuda/TensorCompare.cu``).
MAX_MESSAGE_BYTES = 254


def assert_on_device(condition: Tensor, message: str) -> None:
    """Assert on the device that ``condition`` holds, without making the host wait.

    On the CPU, also under ``torch.compile``, a failed assertion is an error with this message. On a CUDA device the
    message goes to standard error, the next call that waits for the device raises, and the process can no longer use
    the device. So this is for conditions that must always hold; check likely mistakes of users beforehand, on the host.

    Args:
        condition: bool ``()``, on any device.
        message: at most :data:`MAX_MESSAGE_BYTES` bytes in UTF-8. It must be a constant of its module, so that a test
            can check its length.

    Raises:
        GistError: the message is too long. This is checked on every device.
        RuntimeError: raised by torch if the condition does not hold.
    """
    size = len(message.encode())
    if size > MAX_MESSAGE_BYTES:
        raise GistError(
            f"message must be at most {MAX_MESSAGE_BYTES} bytes, the limit of an assertion on a CUDA device, got "
            f"{size}; shorten it"
        )
    torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]


def on_each_device(tensor: Tensor) -> Callable[[torch.device], Tensor]:
    """Return a function that copies ``tensor``, of any shape and dtype, to a device on its first call for that device.

    For tensors that every layer of a model needs. The layers may be on several devices, and the host waits for each
    copy.
    """
    return functools.cache(tensor.to)
