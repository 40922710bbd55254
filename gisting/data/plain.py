"""Records as ordinary text, without gist tokens: what a prompt in view, or no prompt at all, looks like to a model.

Place in the flow: data -> **plain** -> model, beside the collator of gists, and under the conditions of an evaluation
that have no gist tokens. Texts are laid out by the tokenizer's template as if the gist were left out of them::

    prompt in view      prompt, continuation, completion
    bare query          what the tokenizer puts before a text (<s>), continuation, completion

Knows ids, padding and labels; draws nothing, cuts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gisting.data.collate import IGNORED
from gisting.data.records import Record
from gisting.errors import GistError, RecordError
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer

__all__ = ["PlainCollator", "excerpt", "plain_batch", "plain_sources"]


def plain_sources(tokenizer: GistTokenizer, prompts: Sequence[str], inputs: Sequence[str]) -> list[list[int]]:
    """The ids of texts without gist tokens, up to where the answer begins.

    Args:
        tokenizer: with the template that lays them out.
        prompts: B texts; an empty one leaves the bare query.
        inputs: B texts.

    Returns:
        B lists of ids; an encoder that would be left without any reads the end of sequence, for a decoder the list is
        then empty.

    Raises:
        GistError: the numbers differ, or something is no text.
    """
    if len(prompts) != len(inputs):
        raise GistError(f"inputs must be as many as prompts, {len(prompts)}, got {len(inputs)}")
    continuations = tokenizer.encode_continuations(inputs)
    heads = iter(tokenizer.encode_prompts([prompt for prompt in prompts if prompt], 1))
    sources = [
        (next(heads).chunks[0] if prompt else tokenizer.start_ids) + continuation
        for prompt, continuation in zip(prompts, continuations, strict=True)
    ]
    if tokenizer.is_encoder_decoder:
        return [source or [tokenizer.eos_token_id] for source in sources]
    return sources


def plain_batch(
    tokenizer: GistTokenizer, sources: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Sources with their answers as one batch.

    Args:
        tokenizer: whose padding is taken, and which says whether it is for an encoder-decoder.
        sources: B lists of ids, up to where the answer begins.
        completions: B lists of ids, with their end of sequence.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``(B, N)``; ``labels`` int64, -100 where there is nothing to learn.
        Of a decoder they are ``(B, N)``, padded on the left, with ``position_ids`` int64 ``(B, N)`` from 0; of an
        encoder-decoder ``(B, M)``, padded on the right like the source.
    """
    pad = tokenizer.pad_token_id
    if tokenizer.is_encoder_decoder:
        ids, is_token = pad_rows(sources, pad, left=False)
        labels, _ = pad_rows(completions, IGNORED, left=False)
        return {"input_ids": ids, "attention_mask": is_token.long(), "labels": labels}
    pairs = list(zip(sources, completions, strict=True))
    ids, is_token = pad_rows([[*source, *completion] for source, completion in pairs], pad, left=True)
    labels, _ = pad_rows([[IGNORED] * len(source) + [*answer] for source, answer in pairs], IGNORED, left=True)
    mask = is_token.long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": labels,
    }


class PlainCollator:
    """Collates records as ordinary text for a decoder or an encoder-decoder, patched or not; labels on the completion.

    Args:
        tokenizer: with the template that lays the texts out; whether it is for an encoder-decoder decides the batch.
        max_length: ids of a sequence at most, of the source for an encoder-decoder. A longer one is refused: what was
            to be dropped of it (examples, never the query) must be dropped before.
        max_target_length: ids of the target of an encoder-decoder at most.

    Raises:
        GistError: a length is less than 1.
    """

    def __init__(self, tokenizer: GistTokenizer, max_length: int = 512, *, max_target_length: int = 256) -> None:
        for name, value in (("max_length", max_length), ("max_target_length", max_target_length)):
            if value < 1:
                raise GistError(f"{name} must be at least 1, got {value}")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_target_length = max_target_length

    def __call__(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """One batch, as :func:`plain_batch` says; a record without instruction is the bare query.

        Args:
            records: B records.

        Raises:
            RecordError: one does not fit, or has nothing that a decoder could continue.
        """
        inputs = [record.input for record in records]
        sources = plain_sources(self.tokenizer, [record.instruction for record in records], inputs)
        completions = self.tokenizer.encode_completions(inputs, [record.output for record in records])
        for number, (source, completion) in enumerate(zip(sources, completions, strict=True)):
            where = f"record {number} of the batch ({excerpt(inputs[number])})"
            if not source:
                raise RecordError(f"{where} has nothing to continue; give an input, or a template with text there")
            if self.tokenizer.is_encoder_decoder and len(completion) > self.max_target_length:
                raise RecordError(
                    f"{where} has a target of {len(completion)} ids, more than "
                    f"max_target_length={self.max_target_length}; raise it, nothing is cut"
                )
            length = len(source) if self.tokenizer.is_encoder_decoder else len(source) + len(completion)
            if length > self.max_length:
                raise RecordError(
                    f"{where} has {length} ids, more than max_length={self.max_length}; raise it or shorten the "
                    "prompt, nothing is cut"
                )
        return plain_batch(self.tokenizer, sources, completions)


def excerpt(text: str) -> str:
    """``text`` as a message shows it: quoted, at most 40 characters of it."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
