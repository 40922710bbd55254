"""Make batches of records, which stock ``Trainer`` passes to a patched model.

Place in the flow: data -> **collate** -> model. Everything special about gist training is in the batch: ids with gist
tokens, an interval mask, anchored positions, labels on the completion. A condition is drawn for each row by name; this
module does not depend on what it hides.
"""

from __future__ import annotations

import itertools
import logging
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gisting.data.records import Record, to_records
from gisting.errors import GistError, GistTokenError, RecordError
from gisting.padding import pad_rows
from gisting.tokens import ChatTemplate, GistTokenizer, cut_into_chunks, num_chunks
from gisting.visibility import CHAINED_CONDITIONS, CONDITIONS, ENCODER_CONDITIONS, Condition, Visibility, without_gists

__all__ = ["GistCollator"]

_log = logging.getLogger(__name__)
IGNORED = -100  # what transformers' losses skip


_AHEAD = 1_000  # texts per call when the tokenizer encodes ahead
# What is cut off an input: a word, or a part of a very long one.
_PIECE = re.compile(r"\S{1,16}")


class Example(NamedTuple):
    """The ids of one record before they are laid out.

    Its prompt has one or more parts, each with its own k. A single part longer than ``chunk_length`` is cut into
    chunks. ``bare`` is the continuation of a row that draws the negative control, where that is another one.
    """

    prompts: list[array[int]]
    counts: list[int]
    continuation: array[int]
    completion: array[int]
    chunk_length: int | None = None
    bare: array[int] | None = None

    @property
    def stretches(self) -> list[tuple[Sequence[int], int, bool]]:
        """The stretches that precede the continuation, in order.

        Each is the ids of a prompt, the number of gist tokens after them, and whether each gist token has a copy.
        """
        if len(self.prompts) == 1:
            chunks = cut_into_chunks(self.prompts[0], self.chunk_length)
            return [(chunk, self.counts[0], False) for chunk in chunks]
        last = len(self.prompts) - 1
        return [
            (prompt, count, number < last)
            for number, (prompt, count) in enumerate(zip(self.prompts, self.counts, strict=True))
        ]

    @property
    def num_gist_columns(self) -> int:
        """The number of gist tokens and their copies."""
        if len(self.prompts) == 1:
            return self.counts[0] * num_chunks(len(self.prompts[0]), self.chunk_length)
        return 2 * sum(self.counts) - self.counts[-1]

    @property
    def num_shared_columns(self) -> int:
        """The number of ids before the continuation."""
        return sum(map(len, self.prompts)) + self.num_gist_columns


class GistCollator:
    """Collates records for gist instruction finetuning (Gisting, section 3.3).

    Args:
        tokenizer: the tokenizer that the model is patched for. It decides whether batches are for a decoder or an
            encoder-decoder.
        num_gist_tokens: k, or a range ``(low, high)``, both included, from which each row draws its k.
        conditions: a condition for all rows, or weights with which each row draws one: ``{"gist": 3, "positive": 1}``.
            Under the template ``"chat"``, what follows the gist in a row that draws the negative control is the
            conversation without a system message, as in evaluation.
        max_length: largest number of ids in a sequence, or in the source for an encoder-decoder, with the largest k.
            Of a longer record, the end of its input is cut, whole words at a time; instruction, gist, answer and the
            template around them stay. A record that does not fit even so, or whose input is a conversation, is left
            out, and the log says how many are.
        max_target_length: largest number of ids in the target of an encoder-decoder; a record whose answer is longer
            is left out.
        part_separator: a text at which an instruction is cut into parts, each compressed separately with its own k
            (``visibility.chained``). This trains a model to read gists that ``GistCache.chain`` joins. Spaces around
            the separator belong to the parts. An instruction without the separator is one part; with None, every
            instruction is. The gist tokens of all parts but the last are in the sequence twice. Decoders only.
        chunk_length: a prompt with more ids than this is cut into chunks, each
            followed by the row's k gist tokens, as in ``gisting.compress(chunk_length=...)``
            (``tokens.cut_into_chunks``). A chunk sees the gists before it. Sliding windows count columns, including
            those of earlier chunks, so a model with a window below ``max_length`` would not see the same in training
            and in use. Decoders only, and without ``part_separator``.
        with_teacher: whether a batch also holds the intervals and positions of its rows under the positive control, in
            which a teacher sees the prompt.
        teacher_sees_gist: whether that teacher sees the gist tokens too. If only they are trained (an adapter that acts
            at gist tokens), a teacher that saw them could be drawn towards the gist, instead of the other way round:
            then False makes the teacher the model as it is, with the prompt as ordinary text.
        with_prompt_columns: whether a batch also marks the tokens that depend only on other prompt tokens, under every
            condition and for the teacher: those before the first gist token, so of a prompt in parts or chunks only the
            first. If the model is frozen, their states are those of the model without gists. Decoders only.

    Raises:
        GistError: an argument is out of range, or two cannot be combined.
        GistTokenError: ``num_gist_tokens`` is less than 1.
    """

    def __init__(
        self,
        tokenizer: GistTokenizer,
        num_gist_tokens: int | tuple[int, int] = 1,
        *,
        conditions: str | Mapping[str, float] = "gist",
        max_length: int = 512,
        max_target_length: int = 256,
        part_separator: str | None = None,
        chunk_length: int | None = None,
        with_teacher: bool = False,
        teacher_sees_gist: bool = True,
        with_prompt_columns: bool = False,
    ) -> None:
        if not isinstance(tokenizer, GistTokenizer):
            raise GistError(
                f"tokenizer must be a GistTokenizer, got {type(tokenizer).__name__}; wrap it: GistTokenizer(tokenizer)"
            )
        low, high = (num_gist_tokens, num_gist_tokens) if isinstance(num_gist_tokens, int) else num_gist_tokens
        if low < 1:
            raise GistTokenError(f"num_gist_tokens must be at least 1, got {low}; 1 to 10 is usual")
        if high < low:
            raise GistError(f"num_gist_tokens must be a range (low, high), got ({low}, {high})")
        weights = {conditions: 1.0} if isinstance(conditions, str) else dict(conditions)
        unknown = weights.keys() - CONDITIONS.keys()
        if unknown or not weights or any(weight < 0 for weight in weights.values()) or not sum(weights.values()):
            raise GistError(f"conditions must be names of {', '.join(CONDITIONS)}, with weights, got {conditions!r}")
        # One id each of prompt, continuation and completion must fit in addition to the gist.
        if max_length < high + 3:
            raise GistError(f"max_length must be at least {high + 3} to hold {high} gist tokens, got {max_length}")
        if max_target_length < 1:
            raise GistError(f"max_target_length must be at least 1, got {max_target_length}")
        if part_separator == "":
            raise GistError("part_separator is empty; give a text that separates the parts, or None")
        if part_separator is not None and tokenizer.is_encoder_decoder:
            raise GistError(
                f"part_separator is {part_separator!r}, but gists of an encoder-decoder cannot be chained; pass None"
            )
        tokenizer.check_chunk_length(chunk_length)
        if part_separator is not None and chunk_length is not None:
            raise GistError(
                f"part_separator ({part_separator!r}) and chunk_length ({chunk_length}) cannot be combined: a part "
                "sees nothing of the parts before it, a chunk the gists before it; pass None for one of them"
            )
        if with_prompt_columns and tokenizer.is_encoder_decoder:
            raise GistError(
                "with_prompt_columns is for decoders: in an encoder, a prompt sees its gist, so no token depends only "
                "on the prompt; leave it out"
            )
        self.tokenizer = tokenizer
        self.num_gist_tokens = (low, high)
        self.conditions = weights
        self.max_length = max_length
        self.max_target_length = max_target_length
        self.part_separator = part_separator
        self.chunk_length = chunk_length
        self.with_teacher = with_teacher
        self.teacher_sees_gist = teacher_sees_gist
        self.with_prompt_columns = with_prompt_columns
        self._has_reported = False
        self._prompts = _Encoded(self._encode_prompts)
        self._answers = _Encoded(self._encode_answers)
        # As in answers: a chat without a prompt does not begin with the end of its system message.
        self._has_bare = "negative" in self.conditions and isinstance(tokenizer.template, ChatTemplate)
        self._bare = _Encoded(self._encode_bare)

    def encode_ahead(self, records: Iterable[Any]) -> list[Record]:
        """Encode the texts of ``records`` and keep their ids, so that a batch of them does not use the tokenizer.

        This does not change the batches. An id takes 4 bytes, and is kept as long as the collator; an instruction that
        several records share is encoded and kept once. Forked worker processes share the kept ids.

        Args:
            records: records or groups of records, as for a batch.

        Returns:
            The records of which batches are made, as :meth:`fit` returns them, in one list.

        Raises:
            RecordError: a record is incomplete, or none fits.
            GistError: a text cannot be encoded, as :meth:`GistTokenizer.encode_texts` says.
        """
        flat = (one for item in records for one in (item if isinstance(item, list | tuple) else [item]))
        rows = to_records(flat, self.tokenizer)
        # A part without text is refused when its batch is made.
        self._prompts.keep(text for row in rows for text in self._parts(row) if text.strip())
        self._answers.keep((row.input, row.output) for row in rows)
        self._bare.keep(row.input for row in rows if self._has_bare)
        if rows:
            _log.info("the texts of %d records are encoded", len(rows))
        self._has_reported = False
        fitted = [row for row, _ in self._some_fitting(rows, "record {}")]
        self._answers.keep((row.input, row.output) for row in fitted)
        self._bare.keep(row.input for row in fitted if self._has_bare)
        return fitted

    def fit(self, records: Sequence[Record | Mapping[str, Any]]) -> list[Record]:
        """Cut the inputs of records that are longer than ``max_length``, and leave out those that cannot fit.

        A batch of the records that are returned equals a batch of ``records``.

        Args:
            records: records, or mappings with the same keys.

        Returns:
            The records that fit, in their order.

        Raises:
            RecordError: a record is incomplete.
        """
        rows = to_records(records, self.tokenizer)
        return [row for row, _ in self._fitting(rows, "record {}")]

    def lengths(self, records: Sequence[Record]) -> list[int]:
        """Count the ids of each record, without gist tokens and before its input is cut.

        Args:
            records: in any order; records that were encoded ahead need no tokenizer.
        """
        parts = [self._parts(record) for record in records]
        prompts = iter(self._prompts.find([text for texts in parts for text in texts]))
        answers = self._answers.find([(record.input, record.output) for record in records])
        return [
            sum(len(next(prompts)) for _ in texts) + len(continuation) + len(completion)
            for texts, (continuation, completion) in zip(parts, answers, strict=True)
        ]

    def __call__(self, records: Sequence[Record | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            records: B records, or mappings with ``instruction``, ``input`` and ``output``. A conversation counts as a
                record for each of its answers.

        Returns:
            ``input_ids`` int64 ``(B, N)``; ``attention_mask`` int32 ``(B, 1, 2, N)``; ``labels`` int64, -100 where
            there is nothing to predict: ``(B, N)`` for a decoder, with ``position_ids`` int64 ``(B, N)``; ``(B, M)``
            for an encoder-decoder. With ``with_teacher`` also ``teacher_attention_mask`` int32 ``(B, 1, 2, N)`` and,
            for a decoder, ``teacher_position_ids`` int64 ``(B, N)``. With ``with_prompt_columns`` also ``is_prompt``
            bool ``(B, N)``, False at padding: in both masks, a row with ``is_prompt`` sees only keys with
            ``is_prompt``. With both, and a teacher that does not see gists, ``num_gists_before`` int64 ``(B, N)``: the
            number of gist tokens before each token.

        Raises:
            RecordError: a record is incomplete; a part of its instruction is empty; there is no text between several
                parts and the completion; or no record of the batch fits ``max_length``.
        """
        rows = to_records(records, self.tokenizer, "record {} of the batch")
        examples = [example for _, example in self._some_fitting(rows, "record {} of the batch")]
        examples = self._with_counts(examples, self._draw_counts(len(examples)))
        return self._encoder_decoder(examples) if self.tokenizer.is_encoder_decoder else self._decoder(examples)

    def _draw_counts(self, number: int) -> list[int]:
        low, high = self.num_gist_tokens
        return torch.randint(low, high + 1, (number,)).tolist()

    def _draw_conditions(self, number: int) -> Tensor:
        """Draw indices into ``self.conditions``, int64 ``(number,)``."""
        weights = torch.tensor([*self.conditions.values()], dtype=torch.float)
        return torch.multinomial(weights, number, replacement=True)

    def _fitting(self, rows: list[Record], where: str) -> list[tuple[Record, Example]]:
        """Return the rows that fit, their inputs cut if need be, and their ids; errors call row 3 ``where.format(3)``.

        The examples have the largest k, so whether a record fits does not depend on what is drawn.
        """
        examples = self._encode(rows, where)
        excess = [self._excess(example) for example in examples]
        found = [
            (row, example) if more <= 0 else self._cut(row, example)
            for row, example, more in zip(rows, examples, excess, strict=True)
        ]
        fitted = [one for one in found if one is not None]
        if max(excess, default=0) > 0:
            self._report(len(rows), sum(more > 0 for more in excess), len(rows) - len(fitted))
        return fitted

    def _some_fitting(self, rows: list[Record], where: str) -> list[tuple[Record, Example]]:
        """Return :meth:`_fitting`, or raise if there is nothing left."""
        fitting = self._fitting(rows, where)
        if rows and not fitting:
            raise RecordError(
                f"none of {len(rows)} records fits {self._limit}: instruction, {self.num_gist_tokens[1]} gist tokens, "
                "conversation and answer are never cut, and take more; raise the limit, or shorten them"
            )
        return fitting

    @property
    def _limit(self) -> str:
        target = f", max_target_length={self.max_target_length}" if self.tokenizer.is_encoder_decoder else ""
        return f"max_length={self.max_length}{target}"

    def _report(self, num_rows: int, num_long: int, num_left_out: int) -> None:
        if not self._has_reported:
            self._has_reported = True
            _log.warning(
                "%d of %d records are longer than %s: the end of the input is cut of %d, and %d are left out, because "
                "instruction, gist and answer alone do not fit, or their input is a conversation, which is not cut",
                num_long,
                num_rows,
                self._limit,
                num_long - num_left_out,
                num_left_out,
            )

    def _encode(self, rows: list[Record], where: str) -> list[Example]:
        """Return the ids of the rows, with the largest k for every part."""
        parts = [self._parts(row) for row in rows]
        for number, texts in enumerate(parts):
            if not all(text.strip() for text in texts):
                raise RecordError(
                    f"{where.format(number)} has an empty part in its instruction, which is cut at "
                    f"part_separator={self.part_separator!r}; remove the separator, or give the part some text"
                )
        prompts = iter(self._prompts.find([text for texts in parts for text in texts]))
        answers = self._answers.find([(row.input, row.output) for row in rows])
        examples = []
        for number, (texts, (continuation, completion)) in enumerate(zip(parts, answers, strict=True)):
            if len(texts) > 1 and not continuation:
                # Otherwise the last gist would have to answer, which has not seen the earlier parts.
                raise RecordError(
                    f"{where.format(number)} has several parts and no text after their gists for the model to "
                    "continue; give an input, or a template with text there"
                )
            ids = list(itertools.islice(prompts, len(texts)))
            counts = [self.num_gist_tokens[1]] * len(texts)
            bare = self._bare.find([rows[number].input])[0] if self._has_bare else None
            examples.append(Example(ids, counts, continuation, completion, self.chunk_length, bare))
        return examples

    def _with_counts(self, examples: list[Example], counts: list[int]) -> list[Example]:
        """Give the last part of each example the k in ``counts``; each earlier part draws its own."""
        drawn = iter(self._draw_counts(sum(len(example.prompts) - 1 for example in examples)))
        return [
            example._replace(counts=[*itertools.islice(drawn, len(example.prompts) - 1), count])
            for example, count in zip(examples, counts, strict=True)
        ]

    def _excess(self, example: Example) -> int:
        """Return by how many ids an example is too long."""
        asked = max(len(example.continuation), len(example.bare or ()))
        excess = example.num_shared_columns + asked - self.max_length
        if self.tokenizer.is_encoder_decoder:
            return max(excess, len(example.completion) - self.max_target_length)
        return excess + len(example.completion)

    def _cut(self, row: Record, example: Example) -> tuple[Record, Example] | None:
        """Cut the end of the input of a row that is too long; return None if that is not enough."""
        if self.tokenizer.is_encoder_decoder and len(example.completion) > self.max_target_length:
            return None
        if not isinstance(row.input, str):
            return None
        ends = [piece.end() for piece in _PIECE.finditer(row.input)]
        more = max(0, len(example.bare or ()) - len(example.continuation))
        # Of so many pieces, the first number fits, or is 0; the second does not. By how much they are too long.
        low, high = 0, len(ends)
        low_excess, high_excess = (
            self._excess(example._replace(continuation=_ids([]), bare=None)),
            self._excess(example),
        )
        for step in itertools.count(1):
            if low_excess > 0 or high - low <= 1:
                break
            # Where a straight line between the two is 0, but sometimes the middle, in case it is no straight line.
            share = 0.5 if step % 3 == 0 else low_excess / (low_excess - high_excess)
            number = min(max(low + int(share * (high - low)), low + 1), high - 1)
            (continuation,) = self.tokenizer.encode_continuations([row.input[: ends[number - 1]]])
            excess = self._excess(example._replace(continuation=_ids(continuation), bare=None)) + more
            if excess > 0:
                high, high_excess = number, excess
            else:
                low, low_excess = number, excess
        for number in range(low, 0, -1):  # An answer may have more ids after another input.
            input = row.input[: ends[number - 1]]
            shorter = replace(row, input=input)
            ((continuation, completion),) = self._answers.find([(input, row.output)])
            bare = self._bare.find([input])[0] if self._has_bare else None
            cut = example._replace(continuation=continuation, completion=completion, bare=bare)
            if self._excess(cut) <= 0:
                return shorter, cut
        return None

    def _parts(self, record: Record) -> list[str]:
        if self.part_separator is None:
            return [record.instruction]
        return record.instruction.split(self.part_separator)

    def _encode_prompts(self, texts: Sequence[str]) -> list[array[int]]:
        encodings = self.tokenizer.encode_prompts(texts, 1)
        return [_ids(encoding.input_ids[: encoding.gist_start]) for encoding in encodings]

    def _encode_answers(self, texts: Sequence[tuple[Any, str]]) -> list[tuple[array[int], array[int]]]:
        pairs = self.tokenizer.encode_answers([input for input, _ in texts], [output for _, output in texts])
        return [(_ids(continuation), _ids(completion)) for continuation, completion in pairs]

    def _encode_bare(self, inputs: Sequence[Any]) -> list[array[int]]:
        return [_ids(ids) for ids in self.tokenizer.encode_bare(inputs)]

    def _as_drawn(self, examples: list[Example], drawn: Sequence[int]) -> list[Example]:
        """Give the examples that drew the negative control their bare continuation."""
        names = list(self.conditions)
        return [
            example
            if example.bare is None or names[number] != "negative"
            else example._replace(continuation=example.bare)
            for example, number in zip(examples, drawn, strict=True)
        ]

    def _decoder(self, examples: list[Example]) -> dict[str, Tensor]:
        drawn = self._draw_conditions(len(examples))
        examples = self._as_drawn(examples, drawn.tolist())
        rows, copies, parts = zip(*(self._columns(example) for example in examples), strict=True)
        ids, is_token = pad_rows(rows, self.tokenizer.pad_token_id, left=True)
        is_gist = (ids == self.tokenizer.gist_token_id) & is_token
        if self.part_separator is None:
            masks = self._masks(CONDITIONS, drawn, is_gist, is_token)
        else:
            is_copy, parts = pad_rows(copies, 0, left=True)[0].bool(), pad_rows(parts, 0, left=True)[0]
            masks = self._masks(CHAINED_CONDITIONS, drawn, is_gist, is_copy, parts, is_token)
        completions = torch.tensor([len(example.completion) for example in examples])
        is_completion = torch.arange(ids.shape[1])[None] >= ids.shape[1] - completions[:, None]
        batch = {"input_ids": ids, **masks, "labels": ids.masked_fill(~is_completion, IGNORED)}
        if self.with_prompt_columns:
            batch["is_prompt"] = is_token & (is_gist.cumsum(-1) == 0)
        return batch

    def _columns(self, example: Example) -> tuple[array[int], list[int], list[int]]:
        """Return the ids of a row, which of them are copies (0 or 1), and the part of each (from 1; 0 after all)."""
        ids, copies, parts = array("i"), [], []
        for number, (prompt, count, has_copies) in enumerate(example.stretches, start=1):
            gist = [0, 1] * count if has_copies else [0] * count
            ids.extend(prompt)
            ids.extend([self.tokenizer.gist_token_id] * len(gist))
            copies += [0] * len(prompt) + gist
            parts += [number] * (len(prompt) + len(gist))
        rest = example.continuation + example.completion
        return ids + rest, copies + [0] * len(rest), parts + [0] * len(rest)

    def _encoder_decoder(self, examples: list[Example]) -> dict[str, Tensor]:
        drawn = self._draw_conditions(len(examples))
        examples = self._as_drawn(examples, drawn.tolist())
        sources = [self._columns(example._replace(completion=_ids([])))[0] for example in examples]
        ids, is_token = pad_rows(sources, self.tokenizer.pad_token_id, left=False)
        labels, is_label = pad_rows([example.completion for example in examples], IGNORED, left=False)
        is_gist = (ids == self.tokenizer.gist_token_id) & is_token
        masks = self._masks(ENCODER_CONDITIONS, drawn, is_gist, is_token)
        return {"input_ids": ids, **masks, "labels": labels.masked_fill(~is_label, IGNORED)}

    def _masks(
        self, conditions: Mapping[str, Condition], drawn: Tensor, *layout: Tensor, **packing: Tensor
    ) -> dict[str, Tensor]:
        """Return intervals, and positions for a decoder, of each row under the condition it drew, and the teacher's."""
        found = {"": self._drawn(conditions, drawn, layout, packing)}
        masks: dict[str, Tensor] = {}
        if self.with_teacher:
            teacher = conditions["positive"](*layout, **packing)
            if not self.teacher_sees_gist:
                # The layout begins with is_gist, and ends with the padding.
                documents = packing.get("documents")
                teacher, before = without_gists(teacher, layout[0], layout[-1], documents=documents)
                if self.with_prompt_columns:
                    masks["num_gists_before"] = before
            found["teacher_"] = teacher
        for prefix, one in found.items():
            masks[f"{prefix}attention_mask"] = one.as_attention_mask()
            if one.position_ids is not None:
                masks[f"{prefix}position_ids"] = one.position_ids
        return masks

    def _drawn(
        self,
        conditions: Mapping[str, Condition],
        drawn: Tensor,
        layout: Sequence[Tensor],
        packing: Mapping[str, Tensor],
    ) -> Visibility:
        """Apply each condition that was drawn to the rows that drew it."""
        names = list(self.conditions)
        numbers = sorted(set(drawn.tolist()))
        if len(numbers) == 1:
            return conditions[names[numbers[0]]](*layout, **packing)
        order, found = [], []
        for number in numbers:
            rows = (drawn == number).nonzero()[:, 0]
            chosen = {name: tensor[rows] for name, tensor in packing.items()}
            found.append(conditions[names[number]](*(tensor[rows] for tensor in layout), **chosen))
            order.append(rows)
        back = torch.cat(order).argsort()
        positions = [one.position_ids for one in found if one.position_ids is not None]
        return Visibility(
            torch.cat([one.first for one in found])[back],
            torch.cat([one.end for one in found])[back],
            torch.cat(positions)[back] if positions else None,
        )


class _Encoded:
    """A map from texts to their ids: it encodes texts when asked, unless their ids were kept before.

    Args:
        encode: returns the ids of each text of a list.
    """

    def __init__(self, encode: Callable[[Sequence[Any]], list[Any]]) -> None:
        self._encode = encode
        self._kept: dict[Any, Any] = {}

    def find(self, texts: Sequence[Any]) -> list[Any]:
        """Return the ids of each text."""
        fresh = self._fresh(texts)
        return [self._kept[text] if text in self._kept else fresh[text] for text in texts]

    def keep(self, texts: Iterable[Any]) -> None:
        """Encode the texts that are not kept yet, and keep their ids."""
        texts = list(dict.fromkeys(texts))
        for start in range(0, len(texts), _AHEAD):
            self._kept.update(self._fresh(texts[start : start + _AHEAD]))

    def _fresh(self, texts: Sequence[Any]) -> dict[Any, Any]:
        missing = list(dict.fromkeys(text for text in texts if text not in self._kept))
        return dict(zip(missing, self._encode(missing), strict=True)) if missing else {}


def _ids(ids: Sequence[int]) -> array[int]:
    """Store ids in 4 bytes each; a list of Python integers takes 40."""
    return array("i", ids)
