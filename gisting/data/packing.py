"""Batches without waste: completions that share a prompt stand behind one copy of it, and short sequences share a row.

Place in the flow: data -> **packing** -> model, in place of the plain collator. Instruction data repeat their
instructions. Behind one copy of prompt and gist, each completion is a branch that sees the gist and itself and goes on
from the gist's position; rows are then filled with such documents. Masks and positions make every completion
independent of its neighbours (``visibility.gist`` with ``documents`` and ``branches``), so loss and gradients are those
of the padded batch. One more branch may hold the prompt itself, to be predicted from the gist alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gisting.data.collate import IGNORED, Example, GistCollator
from gisting.data.records import Record, to_record
from gisting.errors import GistError
from gisting.padding import pad_rows
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


class Branch(NamedTuple):
    """Ids behind a gist that see that and themselves, and which of them are learned, as an answer or as the prompt."""

    ids: list[int]
    labels: list[int]
    reconstruction_labels: list[int]


class Document(NamedTuple):
    """Examples behind one copy of prompt and gist, and the prompt once more where it is to be predicted from the
    gist.
    """

    examples: list[Example]
    reconstruction: list[int]

    @property
    def branches(self) -> list[Branch]:
        """What stands behind the gist, one behind the other."""
        found = []
        for example in self.examples:
            ids = example.continuation + example.completion
            labels = [IGNORED] * len(example.continuation) + example.completion
            found.append(Branch(ids, labels, [IGNORED] * len(ids)))
        if ids := self.reconstruction:
            found.append(Branch(ids, [IGNORED] * len(ids), [IGNORED, *ids[1:]]))
        return found

    @property
    def num_columns(self) -> int:
        """Ids of all."""
        return self.examples[0].num_shared_columns + sum(len(branch.ids) for branch in self.branches)


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
            is_gist = [*self.conditions][condition] == "gist"
            chosen = [
                self._document(examples, has_reconstruction=self.reconstruct and is_gist)
                for number, examples in documents
                if conditions[number] == condition
            ]
            for numbers in pack([document.num_columns for document in chosen], self.pack_length):
                packed.append([chosen[number] for number in numbers])
                drawn.append(condition)
        return self._rows(packed, torch.tensor(drawn))

    def _documents(self, examples: list[Example], instructions: list[int]) -> list[tuple[int, list[Example]]]:
        """Examples that share a copy of prompt and gist, as many as a row holds, with the number of their
        instruction.
        """
        found: list[tuple[int, list[Example]]] = []
        open_at: dict[tuple[int, ...], int] = {}  # the last document of a prompt, which may have room
        for instruction, example in zip(instructions, examples, strict=True):
            key = (instruction, *example.prompts[0])
            place = open_at.get(key)
            if (
                place is None
                or not example.continuation
                or Document([*found[place][1], example], []).num_columns > self.pack_length
            ):
                place = len(found)
                found.append((instruction, []))
            found[place][1].append(example)
            if example.continuation:
                open_at[key] = place
        return found

    def _document(self, examples: list[Example], *, has_reconstruction: bool) -> Document:
        document = Document(examples, [])
        if not has_reconstruction:
            return document
        prompt, start = examples[0].prompts[0], self.tokenizer.start_ids
        own = prompt[len(start) :] if prompt[: len(start)] == start else prompt
        longer = Document(examples, own)
        return longer if len(own) > 1 and longer.num_columns <= self.pack_length else document

    def _rows(self, packed: list[list[Document]], drawn: Tensor) -> dict[str, Tensor]:
        """Rows of documents, as tensors."""
        ids, labels, prompt_labels, documents, branches, prompts = ([[] for _ in packed] for _ in range(6))
        for row, chosen in enumerate(packed):
            for number, document in enumerate(chosen, start=1):
                stretches = document.examples[0].stretches
                for chunk, count, _ in stretches:
                    ids[row] += chunk + [self.tokenizer.gist_token_id] * count
                prompts[row] += [1] * len(stretches[0][0])
                shared = len(ids[row]) - len(labels[row])
                labels[row] += [IGNORED] * shared
                prompt_labels[row] += [IGNORED] * shared
                branches[row] += [0] * shared
                for place, branch in enumerate(document.branches, start=1):
                    ids[row] += branch.ids
                    labels[row] += branch.labels
                    prompt_labels[row] += branch.reconstruction_labels
                    branches[row] += [place] * len(branch.ids)
                documents[row] += [number] * (len(ids[row]) - len(documents[row]))
                prompts[row] += [0] * (len(ids[row]) - len(prompts[row]))
        ids, is_token = pad_rows(ids, self.tokenizer.pad_token_id, left=True)
        masks = self._masks(
            CONDITIONS,
            drawn,
            (ids == self.tokenizer.gist_token_id) & is_token,
            is_token,
            documents=pad_rows(documents, 0, left=True)[0],
            branches=pad_rows(branches, 0, left=True)[0],
        )
        batch = {"input_ids": ids, **masks, "labels": pad_rows(labels, IGNORED, left=True)[0]}
        if self.reconstruct:
            batch["reconstruction_labels"] = pad_rows(prompt_labels, IGNORED, left=True)[0]
        if self.with_prompt_columns:
            batch["is_prompt"] = pad_rows(prompts, 0, left=True)[0].bool()
        return batch
