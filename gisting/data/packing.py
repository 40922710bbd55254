"""Batches without waste: completions that share a prompt stand behind one copy of it, and short sequences share a row.

Place in the flow: data -> **packing** -> model, in place of the plain collator. Instruction data repeat their
instructions. Behind one copy of prompt and gist, each completion is a branch that sees the gist and itself and goes on
from the gist's position; rows are then filled with such documents. Masks and positions make every completion
independent of its neighbours (``visibility.gist`` with ``documents`` and ``branches``), so loss and gradients are those
of the padded batch. One more branch may hold the prompt itself, to be predicted from the gist alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gisting.data.collate import IGNORED, Example, GistCollator
from gisting.data.records import Record, to_record
from gisting.errors import GistError
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS

__all__ = ["GistPackingCollator", "group_by_instruction", "pack"]


def group_by_instruction(records: Sequence[Record], max_per_group: int = 8) -> list[list[Record]]:
    """Records with the same instruction together, at most so many in a group: a training set for stock ``Trainer``
    whose items are groups, so that records that can share a prompt come in one batch however it is shuffled.

    Args:
        records: in any order.
        max_per_group: the largest group; an optimiser step then holds up to so many times its batch size of records.

    Returns:
        Groups in the order in which their instructions first appear.

    Raises:
        GistError: ``max_per_group`` is less than 1.
    """
    if max_per_group < 1:
        raise GistError(f"max_per_group must be at least 1, got {max_per_group}")
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.instruction, []).append(record)
    return [
        group[start : start + max_per_group]
        for group in found.values()
        for start in range(0, len(group), max_per_group)
    ]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Items, by number, for bins that hold them: first-fit decreasing, at most 11/9 of the fewest bins, plus 1.

    Args:
        lengths: of the items, none above ``capacity``.
        capacity: of a bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = next((place for place, left in enumerate(room) if left >= lengths[item]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= lengths[item]
    return bins


@dataclass
class Document:
    """Examples behind one copy of prompt and gist, and the prompt once more where it is to be predicted from the
    gist.

    Args:
        examples: with one prompt and one k, at least one.
        num_columns: ids of all.
        reconstruction: what is to be predicted, its first id given; or nothing.
    """

    examples: list[Example]
    num_columns: int
    reconstruction: Sequence[int] = ()


class Run(NamedTuple):
    """Neighbouring ids of a row that are alike.

    Args:
        ids: in order.
        kind: what they are, one of the numbers below.
        document: number of their document in the row, from 1; 0 for padding.
        branch: number of their branch in the document, from 1; 0 for what all branches share.
    """

    ids: Sequence[int]
    kind: int
    document: int = 0
    branch: int = 0


# Kinds of runs. A prompt is the first chunk alone: what depends on no gist token.
_PADDING, _PROMPT, _LATER_CHUNK, _GIST, _GIVEN, _ANSWER, _RECONSTRUCTED = range(7)


class GistPackingCollator(GistCollator):
    """Collates records like :class:`GistCollator`, without repeating prompts and with little padding. Decoders only.

    Records of a batch with the same instruction draw one k and one condition together and share one copy of prompt and
    gist. A record whose template leaves nothing between gist and completion keeps a copy of its own, since the gist
    itself predicts its first token.

    Layers with a sliding window count columns, neighbours among them, so a model with a window below ``pack_length``
    would not see in training what it sees in use; :func:`gisting.train.finetune.finetune` refuses that.

    With ``reconstruct``, a document whose condition is gist gets one branch more, its prompt::

             a  b  G  c  d  a  b       labels                  c  d
          a  1  .  .  .  .  .  .       reconstruction_labels         b
          b  1  1  .  .  .  .  .
          G  1  1  1  .  .  .  .       a, the cue, is given
          c  .  .  1  1  .  .  .
          d  .  .  1  1  1  .  .
          a  .  .  1  .  .  1  .
          b  .  .  1  .  .  1  1

    The branch stands behind all completions and its first id is not learned, so nothing of it is predicted by what it
    does not see: neither by a completion's last token nor, in the document of a record without continuation, by the
    gist that answers there. Every document has its own, so a prompt that fills several rows is learned in each. It is
    left out where the document would no longer fit into a row, and where the prompt has a single id.

    Args:
        tokenizer: as for :class:`GistCollator`, of a decoder.
        num_gist_tokens: as for :class:`GistCollator`.
        conditions: as for :class:`GistCollator`.
        max_length: as for :class:`GistCollator`, of one record with its prompt.
        pack_length: ids of a row, at least ``max_length``; None for ``max_length``.
        chunk_length: as for :class:`GistCollator`; a whole prompt is reconstructed from the gists of all its chunks.
        with_teacher: as for :class:`GistCollator`.
        with_prompt_columns: as for :class:`GistCollator`, of each copy of a prompt; a prompt that is to be predicted is
            none of them.
        reconstruct: whether prompts, as they were cut to ``max_length`` and without ``tokenizer.start_ids``, are to be
            predicted from their gists as well.

    Raises:
        GistError: an argument is out of range, or the tokenizer is for an encoder-decoder.
    """

    def __init__(
        self,
        tokenizer: GistTokenizer,
        num_gist_tokens: int | tuple[int, int] = 1,
        *,
        conditions: str | Mapping[str, float] = "gist",
        max_length: int = 512,
        pack_length: int | None = None,
        chunk_length: int | None = None,
        with_teacher: bool = False,
        with_prompt_columns: bool = False,
        reconstruct: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            num_gist_tokens,
            conditions=conditions,
            max_length=max_length,
            chunk_length=chunk_length,
            with_teacher=with_teacher,
            with_prompt_columns=with_prompt_columns,
        )
        if tokenizer.is_encoder_decoder:
            raise GistError(
                "tokenizer is for an encoder-decoder, whose encoder reads in both directions and cannot share a "
                "prompt; use GistCollator"
            )
        self.reconstruct = reconstruct
        self.pack_length = max_length if pack_length is None else pack_length
        if self.pack_length < max_length:
            raise GistError(
                f"pack_length must be at least max_length, {max_length}, got {pack_length}; a record must fit in a row"
            )

    def __call__(self, records: Sequence[Any]) -> dict[str, Tensor]:
        """One batch.

        Args:
            records: records, mappings with ``instruction``, ``input`` and ``output``, or lists of such, as
                :func:`group_by_instruction` gives.

        Returns:
            As :meth:`GistCollator.__call__` for a decoder, with fewer and fuller rows: B is the number of rows. With
            ``reconstruct`` also ``reconstruction_labels`` int64 ``(B, N)``: the ids of prompts behind their gists, but
            for the first of each, and -100 elsewhere; there ``labels`` are -100.

        Raises:
            RecordError: a record is not complete.
        """
        flat = [one for item in records for one in (item if isinstance(item, list | tuple) else [item])]
        rows = [to_record(record, f"record {number} of the batch") for number, record in enumerate(flat)]
        number_of = {text: number for number, text in enumerate(dict.fromkeys(row.instruction for row in rows))}
        instructions = [number_of[row.instruction] for row in rows]
        counts, conditions = self._draw_counts(len(number_of)), self._draw_conditions(len(number_of)).tolist()
        examples = self._examples(rows, [counts[number] for number in instructions])
        documents = self._documents(examples, instructions)
        packed, drawn = [], []
        for condition in sorted(set(conditions)):
            chosen = [document for number, document in documents if conditions[number] == condition]
            if self.reconstruct and [*self.conditions][condition] == "gist":
                for document in chosen:
                    self._reconstruct(document)
            for numbers in pack([document.num_columns for document in chosen], self.pack_length):
                packed.append([chosen[number] for number in numbers])
                drawn.append(condition)
        return self._rows(packed, torch.tensor(drawn))

    def _documents(self, examples: list[Example], instructions: list[int]) -> list[tuple[int, Document]]:
        """Examples that share a copy of prompt and gist, as many as a row holds, with the number of their
        instruction.
        """
        found: list[tuple[int, Document]] = []
        # The last document of a prompt, which may have room. A prompt that was cut begins like the whole one.
        open_by: dict[tuple[int, int], Document] = {}
        for instruction, example in zip(instructions, examples, strict=True):
            key = (instruction, len(example.prompts[0]))
            own = len(example.continuation) + len(example.completion)
            document = open_by.get(key)
            if document is None or not example.continuation or document.num_columns + own > self.pack_length:
                document = Document([example], example.num_shared_columns + own)
                found.append((instruction, document))
            else:
                document.examples.append(example)
                document.num_columns += own
            if example.continuation:
                open_by[key] = document
        return found

    def _reconstruct(self, document: Document) -> None:
        """Give ``document`` its prompt to be predicted, if there is room."""
        prompt, start = document.examples[0].prompts[0], array("i", self.tokenizer.start_ids)
        own = prompt[len(start) :] if prompt[: len(start)] == start else prompt
        if len(own) > 1 and document.num_columns + len(own) <= self.pack_length:
            document.reconstruction = own
            document.num_columns += len(own)

    def _runs(self, document: Document, number: int) -> Iterator[Run]:
        """The ids of a document, which is the row's ``number``-th."""
        for place, (chunk, count, _) in enumerate(document.examples[0].stretches):
            yield Run(chunk, _LATER_CHUNK if place else _PROMPT, number)
            yield Run([self.tokenizer.gist_token_id] * count, _GIST, number)
        for branch, example in enumerate(document.examples, start=1):
            yield Run(example.continuation, _GIVEN, number, branch)
            yield Run(example.completion, _ANSWER, number, branch)
        if prompt := document.reconstruction:
            last = len(document.examples) + 1
            yield Run(prompt[:1], _GIVEN, number, last)
            yield Run(prompt[1:], _RECONSTRUCTED, number, last)

    def _rows(self, packed: list[list[Document]], drawn: Tensor) -> dict[str, Tensor]:
        """Rows of documents, as tensors."""
        lengths = [sum(document.num_columns for document in chosen) for chosen in packed]
        width = max(lengths, default=0)
        runs: list[Run] = []
        for chosen, length in zip(packed, lengths, strict=True):
            runs.append(Run([self.tokenizer.pad_token_id] * (width - length), _PADDING))
            for number, document in enumerate(chosen, start=1):
                runs += self._runs(document, number)
        shape = (len(packed), width)
        flat = array("i")
        for run in runs:
            flat.extend(run.ids)
        ids = torch.frombuffer(flat, dtype=torch.int32).long().view(shape)
        repeats = torch.tensor([len(run.ids) for run in runs])
        kind, documents, branches = (
            torch.tensor(values).repeat_interleave(repeats).view(shape)
            for values in zip(*((run.kind, run.document, run.branch) for run in runs), strict=True)
        )
        masks = self._masks(CONDITIONS, drawn, kind == _GIST, kind != _PADDING, documents=documents, branches=branches)
        batch = {"input_ids": ids, **masks, "labels": ids.masked_fill(kind != _ANSWER, IGNORED)}
        if self.reconstruct:
            batch["reconstruction_labels"] = ids.masked_fill(kind != _RECONSTRUCTED, IGNORED)
        if self.with_prompt_columns:
            batch["is_prompt"] = kind == _PROMPT
        return batch
