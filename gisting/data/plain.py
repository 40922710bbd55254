"""Records as ordinary text without gist tokens: with the prompt in view, or without any prompt.

Place in the flow: data -> **plain** -> model. An alternative to ``GistCollator``, also used by the evaluation
conditions without gist tokens. The tokenizer's template lays out the text; the gist is left out::

    prompt in view      prompt, continuation, completion
    bare query          start ids (<s>, if the tokenizer adds it), continuation, completion;
                        under the template "chat" the conversation without a system message, completion

Produces ids, padding and labels. Nothing is sampled and nothing is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gisting.data.collate import IGNORED
from gisting.data.records import Record
from gisting.errors import GistError, RecordError
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer, Message

__all__ = ["PlainCollator", "excerpt", "plain_batch", "plain_sources"]


def plain_sources(
    tokenizer: GistTokenizer, prompts: Sequence[str], inputs: Sequence[str | Sequence[Message]]
) -> list[list[int]]:
    """Encode texts without gist tokens, up to where the answer begins.

    Args:
        tokenizer: its template lays out the texts.
        prompts: B texts; an empty one gives the bare query.
        inputs: B texts, or messages as for :meth:`GistTokenizer.encode_continuations`.

    Returns:
        B lists of ids. Where a text has no ids, the list is empty for a decoder and holds the end of sequence for an
        encoder-decoder.

    Raises:
        GistError: the numbers of prompts and inputs differ, or one of them is not a string.
    """
    if len(prompts) != len(inputs):
        raise GistError(f"inputs must have one text per prompt ({len(prompts)}), got {len(inputs)}")
    pairs = list(zip(prompts, inputs, strict=True))
    heads = iter(tokenizer.encode_prompts([prompt for prompt in prompts if prompt], 1))
    after = iter(tokenizer.encode_continuations([input for prompt, input in pairs if prompt]))
    bare = iter(tokenizer.encode_bare([input for prompt, input in pairs if not prompt]))
    sources = [next(heads).chunks[0] + next(after) if prompt else next(bare) for prompt, _ in pairs]
    if tokenizer.is_encoder_decoder:
        return [source or [tokenizer.eos_token_id] for source in sources]
    return sources


def plain_batch(
    tokenizer: GistTokenizer, sources: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Combine sources and their answers into one batch.

    Args:
        tokenizer: supplies the padding id, and whether the batch is for an encoder-decoder.
        sources: B lists of ids, up to where the answer begins.
        completions: B lists of ids, each with its end of sequence.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``(B, N)``; ``labels``, int64, -100 where there is nothing to
        learn. For a decoder ``labels`` is ``(B, N)``, everything is padded on the left, and ``position_ids``, int64
        ``(B, N)``, count from 0. For an encoder-decoder ``labels`` is ``(B, M)`` and everything is padded on the right.
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
    """Collate records as ordinary text, with labels on the completion.

    Works for decoders and encoder-decoders, patched or not.

    Args:
        tokenizer: its template lays out the texts; whether it is for an encoder-decoder decides the form of the batch.
        max_length: maximum number of ids in a sequence; for an encoder-decoder, in the source. Longer sequences are
            refused, so whatever may be dropped (examples, never the query) must be dropped beforehand.
        max_target_length: maximum number of ids in the target of an encoder-decoder.

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
        """Make one batch, in the form that :func:`plain_batch` describes.

        Args:
            records: B records; one without an instruction becomes the bare query.

        Returns:
            The batch.

        Raises:
            RecordError: a record does not fit, or leaves a decoder no text to continue.
        """
        inputs = [record.input for record in records]
        sources = plain_sources(self.tokenizer, [record.instruction for record in records], inputs)
        completions = self.tokenizer.encode_completions(inputs, [record.output for record in records])
        for number, (source, completion) in enumerate(zip(sources, completions, strict=True)):
            where = f"record {number} of the batch ({excerpt(inputs[number])})"
            if not source:
                raise RecordError(
                    f"{where} has no text for the model to continue; give it an input, or use a template whose "
                    "continuation has text"
                )
            if self.tokenizer.is_encoder_decoder and len(completion) > self.max_target_length:
                raise RecordError(
                    f"{where} has a target of {len(completion)} ids, more than "
                    f"max_target_length={self.max_target_length}; raise max_target_length (nothing is cut)"
                )
            length = len(source) if self.tokenizer.is_encoder_decoder else len(source) + len(completion)
            if length > self.max_length:
                raise RecordError(
                    f"{where} has {length} ids, more than max_length={self.max_length}; raise max_length or "
                    "shorten the prompt (nothing is cut)"
                )
        return plain_batch(self.tokenizer, sources, completions)


def excerpt(text: object) -> str:
    """Quote ``text``, or messages, for a message, shortened to 40 characters; the quoted text is returned."""
    text = str(text)
    return repr(text if len(text) <= 40 else text[:37] + "...")
