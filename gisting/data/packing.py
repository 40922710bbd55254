"""Batches without waste: completions that share a prompt stand behind one copy of it, and short sequences share a row.

Place in the flow: data -> **packing** -> model, in place of the plain collator. Instruction data repeat their
instructions. Behind one copy of prompt and gist, each completion is a branch that sees the gist and itself and goes on
from the gist's position; rows are then filled with such documents. Masks and positions make every completion
independent of its neighbours (``visibility.gist`` with ``documents`` and ``branches``), so loss and gradients are those
of the padded batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


class GistPackingCollator(GistCollator):
    """Collates records like :class:`GistCollator`, without repeating prompts and with little padding. Decoders only.

    Records of a batch with the same instruction draw one k and one condition together and share one copy of prompt and
    gist. A record whose template leaves nothing between gist and completion keeps a copy of its own, since the gist
    itself predicts its first token.

    Layers with a sliding window count columns, neighbours among them, so a model with a window below ``pack_length``
    would not see in training what it sees in use; :func:`gisting.train.finetune.finetune` refuses that.

    Args:
        tokenizer: as for :class:`GistCollator`, of a decoder.
        num_gist_tokens: as for :class:`GistCollator`.
        conditions: as for :class:`GistCollator`.
        max_length: as for :class:`GistCollator`, of one record with its prompt.
        pack_length: ids of a row, at least ``max_length``; None for ``max_length``.

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
    ) -> None:
        super().__init__(tokenizer, num_gist_tokens, conditions=conditions, max_length=max_length)
        if tokenizer.is_encoder_decoder:
            raise GistError(
                "tokenizer is for an encoder-decoder, whose encoder reads in both directions and cannot share a "
                "prompt; use GistCollator"
            )
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
            As :meth:`GistCollator.__call__` for a decoder, with fewer and fuller rows: B is the number of rows.

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
            for numbers in pack([_length(document) for document in chosen], self.pack_length):
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
            if place is None or not example.continuation or _length([*found[place][1], example]) > self.pack_length:
                place = len(found)
                found.append((instruction, []))
            found[place][1].append(example)
            if example.continuation:
                open_at[key] = place
        return found

    def _rows(self, packed: list[list[list[Example]]], drawn: Tensor) -> dict[str, Tensor]:
        """Rows of documents of examples, as tensors."""
        ids, labels, documents, branches = ([[] for _ in packed] for _ in range(4))
        for row, chosen in enumerate(packed):
            for number, document in enumerate(chosen, start=1):
                shared = document[0].prompts[0] + [self.tokenizer.gist_token_id] * document[0].counts[0]
                ids[row] += shared
                labels[row] += [IGNORED] * len(shared)
                branches[row] += [0] * len(shared)
                for branch, example in enumerate(document, start=1):
                    rest = example.continuation + example.completion
                    ids[row] += rest
                    labels[row] += [IGNORED] * len(example.continuation) + example.completion
                    branches[row] += [branch] * len(rest)
                documents[row] += [number] * (len(ids[row]) - len(documents[row]))
        ids, is_token = pad_rows(ids, self.tokenizer.pad_token_id, left=True)
        visibility = self._visibility(
            CONDITIONS,
            drawn,
            (ids == self.tokenizer.gist_token_id) & is_token,
            is_token,
            documents=pad_rows(documents, 0, left=True)[0],
            branches=pad_rows(branches, 0, left=True)[0],
        )
        return {
            "input_ids": ids,
            "attention_mask": visibility.as_attention_mask(),
            "position_ids": visibility.position_ids,  # pyright: ignore[reportReturnType]
            "labels": pad_rows(labels, IGNORED, left=True)[0],
        }


def _length(document: list[Example]) -> int:
    """Ids of examples that share the first one's prompt and gist."""
    first = document[0]
    rests = sum(len(example.continuation) + len(example.completion) for example in document)
    return len(first.prompts[0]) + first.counts[0] + rests
