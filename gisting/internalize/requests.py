"""Build the requests of a stage: prompt, examples and query as records that fit the training length.

Place in the flow: the prompt's text, examples for each query -> **requests** -> records -> collator. A request that is
too long loses examples, the least similar first; prompt and query are never cut. The answer, and the text between query
and answer, come from the tokenizer's template, so they are the same in all stages. Needs a tokenizer; independent of
models and stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gisting._deprecated import renamed_arguments
from gisting.data.plain import excerpt, plain_sources
from gisting.data.records import Record
from gisting.errors import GistError, RecordError
from gisting.tokens import GistTokenizer

__all__ = ["PromptFormat", "Requests", "make_requests"]

_PLACEHOLDERS = re.compile(r"\{(input|output)\}")


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt and its examples become one text: the prompt, ``gap``, the examples joined by ``separator``.

    Args:
        example: the text of an example, with ``{input}`` and ``{output}`` once each.
        separator: the text between examples.
        gap: the text between prompt and examples.

    Raises:
        GistError: a placeholder is missing or occurs twice.
    """

    example: str = "{input} -> {output}"
    separator: str = "\n"
    gap: str = "\n\n"

    def __post_init__(self) -> None:
        if sorted(_PLACEHOLDERS.findall(self.example)) != ["input", "output"]:
            raise GistError(f"example must contain {{input}} and {{output}} exactly once each, got {self.example!r}")

    @renamed_arguments(template="prompt")
    def prompt(self, prompt: str, examples: Sequence[Record]) -> str:
        """Join a prompt and its examples; "" without either.

        Args:
            prompt: the whole prompt, or what is left of it in a stage.
            examples: in order, the most similar last.
        """
        lines = [_PLACEHOLDERS.sub(lambda found, one=one: getattr(one, found[1]), self.example) for one in examples]
        return self.gap.join(part for part in (prompt, self.separator.join(lines)) if part)


@dataclass(frozen=True)
class Requests:
    """The requests of a stage.

    Args:
        records: prompt and examples as instruction, query as input, answer as output.
        num_examples: for each record, the number of examples in its prompt.
        prompt_tokens: for each record, what a request costs in addition to the bare query: ids, or k gist tokens.
        query_tokens: for each record, the ids of the bare query, up to where the answer begins.
    """

    records: list[Record]
    num_examples: list[int]
    prompt_tokens: list[int]
    query_tokens: list[int]


@renamed_arguments(template="prompt", layout="prompt_format")
def make_requests(
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    prompt: str,
    examples: Sequence[Sequence[Record]],
    prompt_format: PromptFormat,
    *,
    max_length: int,
    max_target_length: int,
    num_gist_tokens: int | None = None,
) -> Requests:
    """Make requests that fit.

    Args:
        tokenizer: the model's tokenizer.
        records: B records, of which queries and answers are used.
        prompt: the whole prompt, or what is left of it in the stage; "" for nothing.
        examples: for each record, the most similar last; the first ones are dropped first.
        prompt_format: how prompt and examples become one text.
        max_length: maximum ids of prompt, query and answer; for an encoder-decoder, of prompt and query.
        max_target_length: maximum ids of the answer of an encoder-decoder.
        num_gist_tokens: k gist tokens after the prompt, which are counted instead of it; None for ordinary text.

    Returns:
        The requests, in the order of the records.

    Raises:
        RecordError: a record has no query, or does not fit even without examples; the message gives its number and
            query.
    """
    inputs = [record.input for record in records]
    for number, text in enumerate(inputs, start=1):
        if not str(text).strip():
            raise RecordError(f"record {number} has no input; the input is the query, which must not be empty")
    bare = [len(source) for source in plain_sources(tokenizer, [""] * len(inputs), inputs)]
    answers = [len(ids) for ids in tokenizer.encode_completions(inputs, [record.output for record in records])]
    if tokenizer.is_encoder_decoder:
        for number, length in enumerate(answers, start=1):
            if length > max_target_length:
                raise RecordError(
                    f"record {number} ({excerpt(inputs[number - 1])}) has an answer of {length} ids, more than "
                    f"max_target_length={max_target_length}; raise it"
                )
        answers = [0] * len(answers)
    kept = [list(found) for found in examples]
    prompts, lengths = [""] * len(inputs), [0] * len(inputs)
    pending = list(range(len(inputs)))
    while pending:
        texts = [prompt_format.prompt(prompt, kept[row]) for row in pending]
        sources = plain_sources(tokenizer, texts, [inputs[row] for row in pending])
        too_long = []
        for row, text, source in zip(pending, texts, sources, strict=True):
            prompts[row], lengths[row] = text, len(source)
            length = len(source) + answers[row] + (num_gist_tokens or 0)
            if length <= max_length:
                continue
            if not kept[row]:
                raise RecordError(
                    f"record {row + 1} ({excerpt(inputs[row])}) has {length} ids with the prompt and without "
                    f"examples, more than max_length={max_length}; raise it, because prompt and query are never cut"
                )
            kept[row].pop(0)
            too_long.append(row)
        pending = too_long
    if num_gist_tokens is not None:
        bare = [len(ids) for ids in tokenizer.encode_continuations(inputs)]
        lengths = [length + num_gist_tokens for length in bare]
    return Requests(
        [Record(text, one.input, one.output, one.source) for text, one in zip(prompts, records, strict=True)],
        [len(found) for found in kept],
        [length - query for length, query in zip(lengths, bare, strict=True)],
        bare,
    )
