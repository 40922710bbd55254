"""What lets a run that was killed end where an uninterrupted one ends: whole checkpoints, and draws that do not depend
on what was drawn before.

Place in the flow: beside ``finetune``. Knows files that stock ``Trainer`` writes and batches of records; nothing of
models.
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
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gisting.errors import GistError

__all__ = ["CountEpochs", "RepeatableDraws", "checkpoint_to_resume", "num_steps_in", "without_parallel_tokenizers"]

_PARALLELISM = "TOKENIZERS_PARALLELISM"


class RepeatableDraws:
    """A collator whose draws (k, condition) depend on the batch, the epoch and the run's seed alone.

    ``Trainer`` restores the state of the random generator behind the first batches that it collates, and workers have
    generators of their own; so a k that is drawn from the generator's state differs after a resume. Here the same
    records in the same order draw the same in an epoch, in whichever process, and draw anew in the next one
    (:class:`CountEpochs` says which it is). The generator itself is left as it was, so that dropout does not depend on
    how far ahead batches are collated.

    Args:
        collator: what makes a batch of records, drawing from torch's generator of the CPU.
        seed: of the run.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, torch.Tensor]], seed: int) -> None:
        self.collator = collator
        self.seed = seed
        self.epoch = 0

    def __call__(self, records: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The batch that ``collator`` makes of ``records``."""
        drawn_from = (self.seed, self.epoch, records) if self.epoch else (self.seed, records)
        with torch.random.fork_rng(devices=[]):
            # Of the CPU alone: torch.manual_seed would seed the card's generator as well, which dropout draws from.
            torch.default_generator.manual_seed(zlib.crc32(repr(drawn_from).encode()))
            return self.collator(records)


class CountEpochs(TrainerCallback):
    """Tells :class:`RepeatableDraws` which epoch begins, before its batches are asked for and workers are started.

    Raises:
        GistError: when training begins, if workers are to outlive an epoch: they would not hear of the next one.
    """

    def __init__(self, draws: RepeatableDraws) -> None:
        self.draws = draws
        self.num_begun = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if args.dataloader_num_workers and args.dataloader_persistent_workers:
            raise GistError(
                "dataloader_persistent_workers must be False, got True: workers that outlive an epoch would draw the "
                "same k and conditions in each"
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        # A resumed run begins with a later one, a stream (of which Trainer knows no epochs) each time it is read.
        self.draws.epoch = max(int((state.epoch or 0) + 1e-6), self.num_begun)
        self.num_begun = self.draws.epoch + 1


@contextmanager
def without_parallel_tokenizers(is_wanted: bool) -> Iterator[None]:
    """Turn the threads of fast tokenizers off while workers are forked: ``tokenizers`` up to 0.22 warns in each
    process that is forked after threads were used. ``TOKENIZERS_PARALLELISM``, where it is set, is left as it is.

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
    """The checkpoint that a run goes on from.

    ``Trainer`` writes a checkpoint in place, its state last; a process that is killed meanwhile leaves part of one,
    and that is passed over.

    Args:
        output_dir: of the run.
        wanted: True for the last whole checkpoint in it, a path for that one, False for none.

    Raises:
        GistError: there is none, or the named one is not whole.
    """
    if wanted is False:
        return None
    if wanted is not True:
        if not _is_whole(Path(wanted)):
            raise GistError(
                f"resume: {wanted} is no whole checkpoint ({TRAINER_STATE_NAME}, which is written last, is missing or "
                "cut off); name an earlier one, or pass resume=True for the last whole one"
            )
        return wanted
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    matches = ((path, pattern.fullmatch(path.name)) for path in Path(output_dir).glob("*"))
    found = {int(match[1]): path for path, match in matches if match is not None}
    for step in sorted(found, reverse=True):
        if _is_whole(found[step]):
            return str(found[step])
    torn = f" ({', '.join(found[step].name for step in sorted(found))} was cut off while written)" if found else ""
    raise GistError(f"{output_dir} holds no checkpoint to resume from{torn}; start without resume")


def num_steps_in(checkpoint: str | Path) -> int:
    """Optimiser steps that ``checkpoint``, a whole one, holds."""
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The first process writes the state; others may still be at their generators' states, which are zip files.
    return all(zipfile.is_zipfile(path) for path in checkpoint.glob("rng_state*.pth"))
