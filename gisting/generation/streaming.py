"""Streamers that receive an answer alone, and end even when generation fails.

Place in the flow: between stock ``generate`` and the caller's streamer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from gisting.errors import GistError

if TYPE_CHECKING:
    import torch

__all__ = ["AnswerStreamer", "check_streamer", "ends_its_streamer"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class AnswerStreamer:
    """Pass an answer on to a streamer without the ids before it, which hold gist tokens that no tokenizer can decode.

    Args:
        streamer: the caller's streamer. It is ended once, however often :meth:`end` is called.
    """

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.is_before_answer = True
        self.is_ended = False

    def put(self, value: torch.Tensor) -> None:
        """Pass new ids on, except the first ones, which come before the answer.

        Args:
            value: int64, of any shape; the first is ``(1, T)``, and passed on as ``(1, 0)``.
        """
        # Not left out: a streamer with skip_prompt skips its first value.
        self.streamer.put(value[:, :0] if self.is_before_answer else value)
        self.is_before_answer = False

    def end(self) -> None:
        """End the caller's streamer, unless it has ended."""
        if not self.is_ended:
            self.is_ended = True
            self.streamer.end()


def ends_its_streamer(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a ``function`` so that its ``streamer`` ends after an error too.

    Another thread may be reading from the streamer, and would wait forever.
    """

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if kwargs.get("streamer") is None:
            return function(*args, **kwargs)
        streamer = kwargs["streamer"] = AnswerStreamer(kwargs["streamer"])
        try:
            return function(*args, **kwargs)
        except BaseException:
            streamer.end()
            raise

    return wrapper


def check_streamer(num_inputs: int, config: Any) -> None:
    """Raise unless ``num_inputs`` and the ``GenerationConfig`` ``config`` make a single answer.

    Raises:
        GistError: there would be several.
    """
    numbers = (num_inputs, config.num_beams or 1, config.num_return_sequences or 1)
    if numbers != (1, 1, 1):
        raise GistError(
            "streamer takes one answer: one input, num_beams=1 and num_return_sequences=1, got "
            f"{numbers[0]}, {numbers[1]} and {numbers[2]}"
        )
