"""Records to batches that stock ``Trainer`` hands to a patched model.

Place in the flow: data -> **collate** -> model. All there is to gist training is in the batch: ids with gist tokens,
an interval mask, anchored positions, labels on the completion. A condition is drawn for each row by name; nothing
here knows what it hides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gisting.data.records import Record, to_record
from gisting.errors import GistError, GistTokenError
from gisting.padding import pad_rows
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import CONDITIONS, ENCODER_CONDITIONS, Condition, Visibility

__all__ = ["GistCollator"]

_log = logging.getLogger(__name__)
_IGNORED = -100  # what transformers' losses skip


class GistCollator:
    """Collates records for gist instruction finetuning (Gisting, section 3.3).

    Args:
        tokenizer: the tokenizer that the model is patched for; whether it is for an encoder-decoder decides the layout.
        num_gist_tokens: k, or a range ``(low, high)``, both included, from which each row draws its own.
        conditions: a condition for all rows, or weights with which each row draws one: ``{"gist": 3, "positive": 1}``.
        max_length: ids of a sequence, of the source for an encoder-decoder. Longer ones lose the end of their
            completion (down to a quarter of ``max_length``), then of their prompt, then the start of what stands
            behind the gist; never the gist.
        max_target_length: ids of the target of an encoder-decoder.

    Raises:
        GistError: an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: GistTokenizer,
        num_gist_tokens: int | tuple[int, int] = 1,
        *,
        conditions: str | Mapping[str, float] = "gist",
        max_length: int = 512,
        max_target_length: int = 256,
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
        # One id each of prompt, continuation and completion must fit beside the gist.
        if max_length < high + 3:
            raise GistError(f"max_length must be at least {high + 3} to hold {high} gist tokens, got {max_length}")
        if max_target_length < 1:
            raise GistError(f"max_target_length must be at least 1, got {max_target_length}")
        self.tokenizer = tokenizer
        self.num_gist_tokens = (low, high)
        self.conditions = weights
        self.max_length = max_length
        self.max_target_length = max_target_length
        self._has_warned = False

    def __call__(self, records: Sequence[Record | Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch.

        Args:
            records: B records or mappings with ``instruction``, ``input`` and ``output``.

        Returns:
            ``input_ids`` int64 ``(B, N)``; ``attention_mask`` int32 ``(B, 1, 2, N)``; ``labels`` int64, -100 where
            there is nothing to
            learn: ``(B, N)`` for a decoder, with ``position_ids`` int64 ``(B, N)``; ``(B, M)`` for an encoder-decoder.

        Raises:
            RecordError: a record is not complete.
        """
        rows = [to_record(record, f"record {number} of the batch") for number, record in enumerate(records)]
        low, high = self.num_gist_tokens
        encodings = self.tokenizer.encode_batch(
            [row.instruction for row in rows],
            [row.input for row in rows],
            [row.output for row in rows],
            num_gist_tokens=torch.randint(low, high + 1, (len(rows),)).tolist(),
        )
        if self.tokenizer.is_encoder_decoder:
            return self._encoder_decoder(encodings)
        return self._decoder(encodings)

    def _decoder(self, encodings: list[GistEncoding]) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        encodings = [self._fit(encoding, self.max_length) for encoding in encodings]
        ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], pad, left=True)
        completions = torch.tensor([len(encoding.input_ids) - encoding.completion_start for encoding in encodings])
        is_completion = torch.arange(ids.shape[1])[None] >= ids.shape[1] - completions[:, None]
        visibility = self._visibility(CONDITIONS, ids, is_token)
        return {
            "input_ids": ids,
            "attention_mask": visibility.as_attention_mask(),
            "position_ids": visibility.position_ids,  # pyright: ignore[reportReturnType]
            "labels": ids.masked_fill(~is_completion, _IGNORED),
        }

    def _encoder_decoder(self, encodings: list[GistEncoding]) -> dict[str, Tensor]:
        sources, targets = [], []
        for encoding in encodings:
            start = encoding.completion_start
            source = GistEncoding(encoding.input_ids[:start], encoding.gist_start, encoding.gist_end, start)
            sources.append(self._fit(source, self.max_length).input_ids)
            targets.append(encoding.input_ids[start:][: self.max_target_length])
        ids, is_token = pad_rows(sources, self.tokenizer.pad_token_id, left=False)
        labels, is_label = pad_rows(targets, _IGNORED, left=False)
        return {
            "input_ids": ids,
            "attention_mask": self._visibility(ENCODER_CONDITIONS, ids, is_token).as_attention_mask(),
            "labels": labels.masked_fill(~is_label, _IGNORED),
        }

    def _visibility(self, conditions: Mapping[str, Condition], ids: Tensor, is_token: Tensor) -> Visibility:
        """The intervals of each row under the condition that it drew."""
        names = list(self.conditions)
        weights = torch.tensor([self.conditions[name] for name in names], dtype=torch.float)
        drawn = torch.multinomial(weights, len(ids), replacement=True)
        is_gist = (ids == self.tokenizer.gist_token_id) & is_token
        visibility = conditions[names[0]](is_gist, is_token)
        for number, name in enumerate(names[1:], start=1):
            visibility = Visibility.where(drawn == number, conditions[name](is_gist, is_token), visibility)
        return visibility

    def _fit(self, encoding: GistEncoding, max_length: int) -> GistEncoding:
        """At most ``max_length`` ids, gist and some completion always among them."""
        excess = len(encoding.input_ids) - max_length
        if excess <= 0:
            return encoding
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "a sequence of %d ids was cut to max_length=%d (and others may be); its gist is whole",
                len(encoding.input_ids),
                max_length,
            )
        start, end, behind = encoding.gist_start, encoding.gist_end, encoding.completion_start
        prompt, gist = encoding.input_ids[:start], encoding.input_ids[start:end]
        continuation, completion = encoding.input_ids[end:behind], encoding.input_ids[behind:]
        cut = min(excess, max(0, len(completion) - max(1, max_length // 4)))
        completion, excess = completion[: len(completion) - cut], excess - cut
        cut = min(excess, len(prompt) - 1)
        prompt, excess = prompt[: len(prompt) - cut], excess - cut
        cut = min(excess, max(0, len(continuation) - 1))
        continuation, excess = continuation[cut:], excess - cut
        completion = completion[: len(completion) - excess]
        whole = prompt + gist + continuation + completion
        end = len(prompt) + len(gist)
        return GistEncoding(whole, len(prompt), end, end + len(continuation))
