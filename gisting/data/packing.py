"""Make batches with little padding: completions share their prompt, and short sequences share a row.

Place in the flow: data -> **packing** -> model, instead of the plain collator. Instruction data repeat their
instructions. After one copy of prompt and gist, each completion is a branch that sees the gist and itself, and whose
positions continue from the gist. Rows are then filled with such documents. Masks and positions make every completion
independent of its neighbours (``visibility.gist`` with ``documents`` and ``branches``), so loss and gradients equal
those of the padded batch. Another branch can hold the prompt itself, to be predicted from the gist alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gisting.data.collate import IGNORED, Example, GistCollator
from gisting.data.records import Record, to_records
from gisting.errors import GistError
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS

__all__ = ["GistPackingCollator", "group_by_instruction", "pack"]


def group_by_instruction(records: Sequence[Record], max_per_group: int = 8) -> list[list[Record]]:
    """Group records by instruction, to make a training set whose items are groups.

    Records that can share a prompt are then in the same batch, however stock ``Trainer`` shuffles the items.

    Args:
        records: in any order.
        max_per_group: size of the largest group. An optimiser step then holds up to its batch size times this many
            records.

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
    """Pack items into bins by first-fit decreasing, which uses at most 11/9 of the smallest number of bins, plus 1.

    Args:
        lengths: lengths of the items, none above ``capacity``.
        capacity: capacity of a bin.

    Returns:
        The indices of the items in each bin.
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
    """Examples after one copy of their prompt and gist; and the prompt again, if it is to be predicted from the gist.

    Args:
        examples: one or more, with the same prompt and k.
        num_columns: number of ids in total.
        reconstruction: the ids to predict, of which the first is given; or none.
    """

    examples: list[Example]
    num_columns: int
    reconstruction: Sequence[int] = ()


class Run(NamedTuple):
    """Consecutive ids of a row that are of the same kind.

    Args:
        ids: in order.
        kind: one of the numbers below.
        document: number of their document in the row, from 1; 0 for padding.
        branch: number of their branch in the document, from 1; 0 for ids that all branches share.
    """

    ids: Sequence[int]
    kind: int
    document: int = 0
    branch: int = 0


# Kinds of runs. A prompt is only its first chunk, which does not depend on a gist token.
_PADDING, _PROMPT, _LATER_CHUNK, _GIST, _GIVEN, _ANSWER, _RECONSTRUCTED = range(7)


class GistPackingCollator(GistCollator):
    """Collates records like :class:`GistCollator`, without repeating prompts and with little padding. Decoders only.

    Records of a batch with the same instruction draw one k and one condition, and share one copy of prompt and gist. A
    record whose template has no text between gist and completion gets its own copy, because the gist itself predicts
    its first token.

    Sliding windows count columns, including those of other records, so a model with a window below ``pack_length``
    would not see the same in training and in use; :func:`gisting.train.finetune.finetune` refuses that.

    With ``reconstruct``, a document whose condition is gist gets another branch, its prompt::

             a  b  G  c  d  a  b       labels                  c  d
          a  1  .  .  .  .  .  .       reconstruction_labels         b
          b  1  1  .  .  .  .  .
          G  1  1  1  .  .  .  .       a, the first id, is given
          c  .  .  1  1  .  .  .
          d  .  .  1  1  1  .  .
          a  .  .  1  .  .  1  .
          b  .  .  1  .  .  1  1

    The branch comes after all completions, and its first id is not predicted, because the token before it is not part
    of the branch: it is the last token of a completion or, if a record has no continuation, the gist that answers
    there. Every document has its own branch, so a prompt that fills several rows is predicted in each. The branch is
    left out if the document would no longer fit into a row, or if the prompt has a single id.

    Args:
        tokenizer: as for :class:`GistCollator`, of a decoder.
        num_gist_tokens: as for :class:`GistCollator`.
        conditions: as for :class:`GistCollator`.
        max_length: as for :class:`GistCollator`, for one record with its prompt.
        pack_length: number of ids in a row, at least ``max_length``; None for ``max_length``.
        chunk_length: as for :class:`GistCollator`; a whole prompt is reconstructed from the gists of all its chunks.
        with_teacher: as for :class:`GistCollator`.
        teacher_sees_gist: as for :class:`GistCollator`.
        with_prompt_columns: as for :class:`GistCollator`, for each copy of a prompt, but not for a prompt that is to be
            predicted.
        reconstruct: whether prompts, without ``tokenizer.start_ids``, are also predicted from their gists.

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
        teacher_sees_gist: bool = True,
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
            teacher_sees_gist=teacher_sees_gist,
            with_prompt_columns=with_prompt_columns,
        )
        if tokenizer.is_encoder_decoder:
            raise GistError(
                "tokenizer is for an encoder-decoder, whose encoder reads in both directions, so records cannot share "
                "a prompt; use GistCollator"
            )
        self.reconstruct = reconstruct
        self.pack_length = max_length if pack_length is None else pack_length
        if self.pack_length < max_length:
            raise GistError(
                f"pack_length must be at least max_length, {max_length}, got {pack_length}; a record must fit in a row"
            )

    def __call__(self, records: Sequence[Any]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            records: records, mappings with ``instruction``, ``input`` and ``output``, or lists of these, as
                :func:`group_by_instruction` returns them.

        Returns:
            As :meth:`GistCollator.__call__` for a decoder, with fewer and fuller rows: B is the number of rows. With
            ``reconstruct`` also ``reconstruction_labels`` int64 ``(B, N)``: the ids of prompts after their gists,
            except for the first of each, and -100 elsewhere. Where they are not -100, ``labels`` are.

        Raises:
            RecordError: a record is incomplete, or none fits ``max_length``.
        """
        flat = [one for item in records for one in (item if isinstance(item, list | tuple) else [item])]
        rows = to_records(flat, self.tokenizer, "record {} of the batch")
        fitting = self._some_fitting(rows, "record {} of the batch")
        number_of = {text: number for number, text in enumerate(dict.fromkeys(row.instruction for row, _ in fitting))}
        instructions = [number_of[row.instruction] for row, _ in fitting]
        counts, conditions = self._draw_counts(len(number_of)), self._draw_conditions(len(number_of)).tolist()
        examples = self._with_counts([example for _, example in fitting], [counts[number] for number in instructions])
        examples = self._as_drawn(examples, [conditions[number] for number in instructions])
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
        """Group examples into documents that fit into a row; return them with the index of their instruction."""
        found: list[tuple[int, Document]] = []
        open_by: dict[int, Document] = {}  # the last document of each instruction, which may have room
        for instruction, example in zip(instructions, examples, strict=True):
            own = len(example.continuation) + len(example.completion)
            document = open_by.get(instruction)
            if document is None or not example.continuation or document.num_columns + own > self.pack_length:
                document = Document([example], example.num_shared_columns + own)
                found.append((instruction, document))
            else:
                document.examples.append(example)
                document.num_columns += own
            if example.continuation:
                open_by[instruction] = document
        return found

    def _reconstruct(self, document: Document) -> None:
        """Add the prompt of ``document`` to it as ids to predict, if there is room."""
        prompt, start = document.examples[0].prompts[0], array("i", self.tokenizer.start_ids)
        own = prompt[len(start) :] if prompt[: len(start)] == start else prompt
        if len(own) > 1 and document.num_columns + len(own) <= self.pack_length:
            document.reconstruction = own
            document.num_columns += len(own)

    def _runs(self, document: Document, number: int) -> Iterator[Run]:
        """Yield the ids of a document, the ``number``-th of its row."""
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
        """Make tensors of rows of documents."""
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
