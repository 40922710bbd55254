"""Make a run that was killed and resumed end like an uninterrupted one.

It resumes from a whole checkpoint, and its random draws do not depend on earlier draws.

Place in the flow: next to ``finetune``. Knows the files that stock ``Trainer`` writes, and batches of records; does not
depend on models.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gisting.errors import GistError

__all__ = [
    "CountEpochs",
    "RepeatableDraws",
    "check_workers",
    "checkpoint_to_resume",
    "num_steps_in",
    "without_parallel_tokenizers",
]

_PARALLELISM = "TOKENIZERS_PARALLELISM"


class RepeatableDraws:
    """A collator whose draws (k, condition) depend only on the batch, the epoch and the seed of the run.

    ``Trainer`` restores the state of the random generator after it has collated the first batches, and every worker has
    its own generator, so a k drawn from the generator's state would differ after a resume. Here, the same records in
    the same order draw the same values within an epoch, in any process, and other values in the next epoch (which
    :class:`CountEpochs` sets). The generator's state is restored, so that dropout does not depend on how far ahead
    batches are collated.

    Args:
        collator: makes a batch of records, drawing from torch's CPU generator.
        seed: seed of the run.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, torch.Tensor]], seed: int) -> None:
        self.collator = collator
        self.seed = seed
        self.epoch = 0

    def __call__(self, records: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return the batch that ``collator`` makes of ``records``."""
        drawn_from = (self.seed, self.epoch, records) if self.epoch else (self.seed, records)
        with torch.random.fork_rng(devices=[]):
            # Only the CPU generator: torch.manual_seed would also seed the GPU's, which dropout draws from.
            torch.default_generator.manual_seed(zlib.crc32(repr(drawn_from).encode()))
            return self.collator(records)


class CountEpochs(TrainerCallback):
    """Set the epoch of :class:`RepeatableDraws` before workers are started and ask for its batches."""

    def __init__(self, draws: RepeatableDraws) -> None:
        self.draws = draws
        self.num_begun = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the epoch, which is a later one at the start of a resumed run.

        A stream, whose epochs Trainer does not count, begins a new epoch every time it is read.
        """
        self.draws.epoch = max(int((state.epoch or 0) + 1e-6), self.num_begun)
        self.num_begun = self.draws.epoch + 1


def check_workers(arguments: TrainingArguments) -> None:
    """Refuse workers that outlive an epoch: :class:`CountEpochs` cannot reach them, so each epoch would draw the same.

    Args:
        arguments: the trainer's arguments.

    Raises:
        GistError: the arguments ask for such workers.
    """
    if arguments.dataloader_num_workers and arguments.dataloader_persistent_workers:
        raise GistError(
            "dataloader_persistent_workers must be False, got True: workers that outlive an epoch would draw the same "
            "k and conditions in every epoch"
        )


@contextmanager
def without_parallel_tokenizers(is_wanted: bool) -> Iterator[None]:
    """Turn off the threads of fast tokenizers while workers are forked.

    ``tokenizers`` up to 0.22 warns in every process that is forked after threads were used. If
    ``TOKENIZERS_PARALLELISM`` is set, it stays unchanged.

    Args:
        is_wanted: False changes nothing.
    """
    if not is_wanted or _PARALLELISM in os.environ:
        yield
        return
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        del os.environ[_PARALLELISM]


def checkpoint_to_resume(output_dir: str | Path, wanted: bool | str) -> str | None:
    """Return the checkpoint that a run continues from.

    ``Trainer`` writes a checkpoint in place, its state last. A process that is killed meanwhile leaves an incomplete
    checkpoint, which is skipped.

    Args:
        output_dir: directory of the run.
        wanted: True for the last whole checkpoint in ``output_dir``, a path for a particular one, False for none.

    Raises:
        GistError: there is no checkpoint, or the one at the path is incomplete.
    """
    if wanted is False:
        return None
    if wanted is not True:
        if not _is_whole(Path(wanted)):
            raise GistError(
                f"resume: {wanted} is not a whole checkpoint ({TRAINER_STATE_NAME}, which is written last, is missing "
                "or truncated); name an earlier one, or pass resume=True for the last whole one"
            )
        return wanted
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    matches = ((path, pattern.fullmatch(path.name)) for path in Path(output_dir).glob("*"))
    found = {int(match[1]): path for path, match in matches if match is not None}
    for step in sorted(found, reverse=True):
        if _is_whole(found[step]):
            return str(found[step])
    torn = f" (incomplete: {', '.join(found[step].name for step in sorted(found))})" if found else ""
    raise GistError(f"{output_dir} holds no checkpoint to resume from{torn}; start without resume")


def num_steps_in(checkpoint: str | Path) -> int:
    """Return the number of optimiser steps after which ``checkpoint``, a whole one, was written."""
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The first process writes the state while others may still write their generators' states, which are zip files.
    return all(zipfile.is_zipfile(path) for path in checkpoint.glob("rng_state*.pth"))
