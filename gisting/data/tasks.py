"""The built-in task: instructions over letters that a small model learns to follow, and to gist, within minutes.

Place in the flow: **data**. An instruction has three independent parts (order, edit, style), said in one of several
phrasings:

    please reverse the letters , drop the last letter and write capitals      a b c d e      ->      E D C B

Whole combinations of parts are held out, so an unseen instruction tests whether the gist carries each part, not
whether it names one of the instructions seen in training. Everything is made from a seed; no file, no download.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gisting.data.records import Record
from gisting.errors import GistError
from gisting.tokens import GistTokenizer, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["LETTERS", "TEMPLATE", "Instruction", "LetterTask", "task_tokenizer"]

LETTERS = "abcdefgh"
_Rule = Callable[[list[str]], list[str]]


def _shift(letter: str, by: int) -> str:
    return LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)]


ORDERS: dict[str, _Rule] = {
    "keep the order": lambda letters: letters,
    "reverse the letters": lambda letters: letters[::-1],
    "move the first letter to the end": lambda letters: letters[1:] + letters[:1],
    "move the last letter to the front": lambda letters: letters[-1:] + letters[:-1],
    "swap the first two letters": lambda letters: [*letters[1::-1], *letters[2:]],
}
# No edit moves where the answer begins: with a style that does, its place would be one that training never showed.
EDITS: dict[str, _Rule] = {
    "change nothing else": lambda letters: letters,
    "drop the last letter": lambda letters: letters[:-1],
    "write the last letter twice": lambda letters: letters + letters[-1:],
    "replace each letter by the next": lambda letters: [_shift(letter, 1) for letter in letters],
    "replace each letter by the one before": lambda letters: [_shift(letter, -1) for letter in letters],
}
STYLES: dict[str, _Rule] = {
    "answer plainly": lambda letters: letters,
    "end with a bang": lambda letters: [*letters, "!"],
    "begin with a star": lambda letters: ["*", *letters],
    "write capitals": lambda letters: [letter.upper() for letter in letters],
    "end with a dash": lambda letters: [*letters, "-"],
}
PHRASINGS = (
    "please {order} , {edit} and {style}",
    "your task : {order} , then {edit} ; {style} .",
    "{style} . {order} and {edit} .",
    "when you get letters , {order} , {edit} , and always {style}",
)

#: Prompt, gist, ``input: ... output:``, answer.
TEMPLATE = Template(
    name="letters",
    prompt="instruction: {prompt}",
    continuation=" input: {input} output:",
    continuation_without_input=" output:",
    completion=" {output}",
)


@dataclass(frozen=True)
class Instruction:
    """One combination of the three parts; ``text`` says it, ``answer`` does it."""

    order: str
    edit: str
    style: str

    def text(self, phrasing: str = PHRASINGS[0]) -> str:
        """The instruction in words."""
        return phrasing.format(order=self.order, edit=self.edit, style=self.style)

    def answer(self, letters: list[str]) -> list[str]:
        """What follows from it for these letters."""
        return STYLES[self.style](EDITS[self.edit](ORDERS[self.order](letters)))


@dataclass(frozen=True)
class LetterTask:
    """The task with some combinations held out.

    Args:
        num_unseen: how many of the 125 combinations no training record uses, at most 25. Any two parts of a held-out
            combination are trained on together, only never with its third.
        length: letters in an input.
        seed: which combinations are held out.
    """

    num_unseen: int = 16
    length: int = 5
    seed: int = 0
    seen: tuple[Instruction, ...] = field(init=False)
    unseen: tuple[Instruction, ...] = field(init=False)

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        parts = [chance.sample(list(rules), len(rules)) for rules in (ORDERS, EDITS, STYLES)]
        # A Latin square: of the combinations with any two parts in common, one at most is held out.
        size = len(STYLES)
        square = [
            Instruction(order, edit, parts[2][(i + j) % size])
            for (i, order), (j, edit) in itertools.product(enumerate(parts[0]), enumerate(parts[1]))
        ]
        if not 1 <= self.num_unseen <= len(square):
            raise GistError(f"num_unseen must be in 1..{len(square)}, got {self.num_unseen}")
        unseen = tuple(chance.sample(square, self.num_unseen))
        rest = (Instruction(*combination) for combination in itertools.product(ORDERS, EDITS, STYLES))
        object.__setattr__(self, "unseen", unseen)
        object.__setattr__(self, "seen", tuple(instruction for instruction in rest if instruction not in unseen))

    def records(self, split: str, count: int, seed: int) -> list[Record]:
        """``count`` records of ``"seen"`` or ``"unseen"`` combinations with fresh inputs.

        Raises:
            GistError: there is no such split.
        """
        if split not in ("seen", "unseen"):
            raise GistError(f"split must be seen or unseen, got {split!r}")
        return list(itertools.islice(self._stream(split, seed), count))

    def _stream(self, split: str, seed: int) -> Iterator[Record]:
        chance = random.Random(f"{split} {seed}")
        while True:
            instruction = chance.choice(self.seen if split == "seen" else self.unseen)
            letters = [chance.choice(LETTERS) for _ in range(self.length)]
            yield Record(
                instruction.text(chance.choice(PHRASINGS)),
                " ".join(letters),
                " ".join(instruction.answer(letters)),
                split,
            )


def task_tokenizer() -> GistTokenizer:
    """A tokenizer with one id for each word and letter of the task, and its template."""
    return GistTokenizer(_word_tokenizer(), TEMPLATE)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [*ORDERS, *EDITS, *STYLES, *(phrasing.format(order="", edit="", style="") for phrasing in PHRASINGS)]
    texts += [
        TEMPLATE.prompt_text(""),
        TEMPLATE.continuation_text(" "),
        "! * -",
        " ".join(LETTERS),
        " ".join(LETTERS.upper()),
    ]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
