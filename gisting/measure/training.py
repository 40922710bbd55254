"""Show how far a training run is: a bar in a terminal, otherwise a line for each report of the loss.

Place in the flow: beside ``Trainer``, whose own reports are dictionaries among the pieces of a bar.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from gisting.measure.progress import progress_bar

__all__ = ["ShownTraining"]


class ShownTraining(TrainerCallback):
    """A callback that shows steps, loss and the time left on standard error.

    Used as a context, so that the bar also ends after an error. Without a terminal, there is a line for each report of
    ``Trainer`` (every ``logging_steps``).
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._console = Console(stderr=True, markup=False)
        self._advance: Any = None
        self._first_step = 0
        self._start = 0.0

    def __enter__(self) -> ShownTraining:
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, in the first process."""
        self._first_step, self._start = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            self._advance = self._stack.enter_context(progress_bar("training", state.max_steps))
            self._advance(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar, so that the next run can have its own."""
        self._stack.close()
        self._advance = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar on."""
        if self._advance is not None:
            self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        found = {name: (logs or {}).get(name) for name in ("loss", "eval_loss")}
        said = ", ".join(f"{name} {float(value):.4f}" for name, value in found.items() if value is not None)
        if not said or self._advance is None:
            return
        if self._console.is_terminal:
            self._advance(0, said)
            return
        steps = state.global_step - self._first_step
        seconds = (time.perf_counter() - self._start) / steps if steps else math.nan
        left = "" if math.isnan(seconds) else f", {_duration(seconds * (state.max_steps - state.global_step))} left"
        self._console.print(
            f"step {state.global_step:,} of {state.max_steps:,}: {said}{left}", highlight=False, soft_wrap=True
        )


def _duration(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, such as ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
