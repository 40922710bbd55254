"""The data of a stage: template, examples and query as records, each within the length that the model is trained at.

Place in the flow: template's text, examples of each query -> **layout** -> records -> collator. What is too long loses
examples, the least similar first; template and query are never cut. The answer and what stands between query and answer
are the tokenizer template's, so they are the same in all stages. Knows tokenizers; knows no model and no stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gisting.data.plain import excerpt, plain_sources
from gisting.data.records import Record
from gisting.errors import GistError, RecordError
from gisting.tokens import GistTokenizer

__all__ = ["PromptLayout", "Requests", "lay_out"]

_PLACEHOLDERS = re.compile(r"\{(input|output)\}")


@dataclass(frozen=True)
class PromptLayout:
    """How template and examples become one prompt: template, ``gap``, examples with ``separator`` between them.

    Args:
        example: holds ``{input}`` and ``{output}`` once each.
        separator: between examples.
        gap: between template and examples.

    Raises:
        GistError: a placeholder is missing or there twice.
    """

    example: str = "{input} -> {output}"
    separator: str = "\n"
    gap: str = "\n\n"

    def __post_init__(self) -> None:
        if sorted(_PLACEHOLDERS.findall(self.example)) != ["input", "output"]:
            raise GistError(f"example must hold {{input}} and {{output}} exactly once each, got {self.example!r}")

    def prompt(self, template: str, examples: Sequence[Record]) -> str:
        """The prompt of one query; "" where there is neither template nor example.

        Args:
            template: what is left of it.
            examples: in their order, the most similar last.
        """
        lines = [_PLACEHOLDERS.sub(lambda found, one=one: getattr(one, found[1]), self.example) for one in examples]
        return self.gap.join(part for part in (template, self.separator.join(lines)) if part)


@dataclass(frozen=True)
class Requests:
    """What a model is asked in a stage.

    Args:
        records: the prompt as instruction, the query as input, the answer as output.
        num_examples: for each record, the examples in its prompt.
        prompt_tokens: for each record, what a request costs beside the bare query: ids, or k gist tokens.
        query_tokens: for each record, ids of the bare query, up to where the answer begins.
    """

    records: list[Record]
    num_examples: list[int]
    prompt_tokens: list[int]
    query_tokens: list[int]


def lay_out(
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    template: str,
    examples: Sequence[Sequence[Record]],
    layout: PromptLayout,
    *,
    max_length: int,
    max_target_length: int,
    num_gist_tokens: int | None = None,
) -> Requests:
    """Lay out requests that fit.

    Args:
        tokenizer: of the model.
        records: B records, of which query and answer are taken.
        template: what is left of it, "" for nothing.
        examples: for each record, the most similar last; those at the front are dropped first.
        layout: how they become a prompt.
        max_length: ids of prompt, query and answer at most; of an encoder-decoder without the answer.
        max_target_length: ids of the answer of an encoder-decoder at most.
        num_gist_tokens: k that stand behind the prompt and cost in its place; None for ordinary text.

    Returns:
        The requests, in the records' order.

    Raises:
        RecordError: a record has no query, or does not fit even without examples; it is named by number and query.
    """
    inputs = [record.input for record in records]
    for number, text in enumerate(inputs, start=1):
        if not text.strip():
            raise RecordError(f"record {number} has no input; it is the query, all that is left in the end")
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
        texts = [layout.prompt(template, kept[row]) for row in pending]
        sources = plain_sources(tokenizer, texts, [inputs[row] for row in pending])
        too_long = []
        for row, text, source in zip(pending, texts, sources, strict=True):
            prompts[row], lengths[row] = text, len(source)
            length = len(source) + answers[row] + (num_gist_tokens or 0)
            if length <= max_length:
                continue
            if not kept[row]:
                raise RecordError(
                    f"record {row + 1} ({excerpt(inputs[row])}) has {length} ids with the template and without "
                    f"examples, more than max_length={max_length}; raise it: template and query are never cut"
                )
            kept[row].pop(0)
            too_long.append(row)
        pending = too_long
    if num_gist_tokens is not None:
        bare = [len(ids) for ids in tokenizer.encode_continuations(inputs)]
        lengths = [length + num_gist_tokens for length in bare]
    return Requests(
        [Record(prompt, one.input, one.output, one.source) for prompt, one in zip(prompts, records, strict=True)],
        [len(found) for found in kept],
        [length - query for length, query in zip(lengths, bare, strict=True)],
        bare,
    )
