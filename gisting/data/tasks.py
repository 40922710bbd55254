"""The built-in tasks, which a small model learns within minutes. They are generated from a seed, without any files.

Place in the flow: **data**. :class:`LetterTask` is for gisting, where prompts differ. Its instructions manipulate
letters; each combines three independent parts (order, edit, style) in one of several phrasings:

    please reverse the letters , drop the last letter and write capitals      a b c d e      ->      E D C B

Whole combinations of parts are held out. An unseen instruction therefore tests whether the gist carries each part, not
just which of the training instructions it was.

:class:`CodeTask` is for internalisation, where the same long prompt accompanies every query and has information that
the query lacks:

    table : birch-7 ; coral-2 ; ... . answer backwards and stop there .
    coral birch      ->      birch birch-7 coral coral-2
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from gisting.data.records import Record
from gisting.errors import GistError
from gisting.tokens import GistTokenizer, Template

__all__ = [
    "LETTERS",
    "TEMPLATE",
    "CodeTable",
    "CodeTask",
    "Instruction",
    "LetterTask",
    "code_tokenizer",
    "task_tokenizer",
]

#: The alphabet of the letter task's inputs.
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
# No edit moves the start of the answer: combined with a style that does, it would put letters at positions that never
# occur in training.
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
    """One combination of the three parts: ``text`` puts it into words, ``answer`` carries it out.

    Args:
        order: a name of ``ORDERS``.
        edit: a name of ``EDITS``.
        style: a name of ``STYLES``.
    """

    order: str
    edit: str
    style: str

    def text(self, phrasing: str = PHRASINGS[0]) -> str:
        """Fill ``phrasing`` with the three parts; the text is returned."""
        return phrasing.format(order=self.order, edit=self.edit, style=self.style)

    def answer(self, letters: list[str]) -> list[str]:
        """Apply the instruction to ``letters``; the words of the answer are returned."""
        return STYLES[self.style](EDITS[self.edit](ORDERS[self.order](letters)))


@dataclass(frozen=True)
class LetterTask:
    """Follow instructions about letters, some combinations of which are held out.

    Args:
        num_unseen: number of the 125 combinations that are held out, at most 25. Any two parts of a held-out
            combination do occur together in training, but never with its third part.
        length: number of letters in an input.
        seed: selects the held-out combinations.

    Raises:
        GistError: ``num_unseen`` is out of range.
    """

    num_unseen: int = 16
    length: int = 5
    seed: int = 0
    seen: tuple[Instruction, ...] = field(init=False)
    unseen: tuple[Instruction, ...] = field(init=False)

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        parts = [chance.sample(list(rules), len(rules)) for rules in (ORDERS, EDITS, STYLES)]
        # A Latin square: at most one of the combinations that share two parts is held out.
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
        """Generate records with random inputs.

        Args:
            split: which combinations to use: ``"seen"`` or ``"unseen"``.
            count: number of records.
            seed: selects the records; equal arguments give equal records.

        Returns:
            The records.

        Raises:
            GistError: ``split`` is unknown.
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


# -- codes -------------------------------------------------------------------------------------------------------------

NAMES = (
    *("amber", "birch", "coral", "delta", "ember", "fjord", "grove", "heron", "indigo", "jade", "karst", "larch"),
    *("maple", "north", "onyx", "pearl", "quartz", "raven", "slate", "tundra", "umber", "violet", "willow", "zephyr"),
)
# An answer states each name before its code, and a code begins with its name, so each word can be found in one hop of
# attention, which a small model learns in minutes. Finding what follows a name takes two hops (an induction head),
# which the model did not learn in a thousand steps.
NUM_CODES = 8
CODE_ORDERS: dict[str, _Rule] = {"in order": lambda names: names, "backwards": lambda names: names[::-1]}
CODE_ENDINGS: dict[str, _Rule] = {
    "stop there": lambda words: words,
    "end with done": lambda words: [*words, "done"],
}


@dataclass(frozen=True)
class CodeTable:
    """A prompt of :class:`CodeTask`: the code of each name (``"birch-7"``), and how to answer.

    Args:
        codes: the codes, each made of a name and its number.
        order: a name of ``CODE_ORDERS``.
        ending: a name of ``CODE_ENDINGS``.
    """

    codes: tuple[str, ...]
    order: str
    ending: str

    @property
    def names(self) -> list[str]:
        """The names in the table."""
        return [code.partition("-")[0] for code in self.codes]

    def text(self) -> str:
        """Put the table and its rule into words; the text is returned."""
        return f"table : {' ; '.join(self.codes)} . answer {self.order} and {self.ending} ."

    def edited(self) -> CodeTable:
        """Change every code to the next number, keeping names and rule; the new table is returned."""
        numbers = (int(code.partition("-")[2]) for code in self.codes)
        pairs = zip(self.names, numbers, strict=True)
        return replace(self, codes=tuple(f"{name}-{(number + 1) % NUM_CODES}" for name, number in pairs))

    def answer(self, names: list[str]) -> list[str]:
        """Answer the query ``names``; the words of the answer, each name with its code, are returned."""
        codes = dict(zip(self.names, self.codes, strict=True))
        words = [word for name in CODE_ORDERS[self.order](names) for word in (name, codes[name])]
        return CODE_ENDINGS[self.ending](words)


@dataclass(frozen=True)
class CodeTask:
    """Look names up in a table that is part of the prompt.

    Args:
        num_names: number of entries in a table, at most 24.
        length: number of names in a query.
        seed: selects the task's own table.
        num_unasked: number of names in that table that no query of training or evaluation uses, so that their codes
            can only be learned from the table itself.

    Raises:
        GistError: ``num_names`` or ``num_unasked`` is out of range.
    """

    num_names: int = 16
    length: int = 3
    seed: int = 0
    num_unasked: int = 0
    table: CodeTable = field(init=False)
    unasked: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.num_names <= len(NAMES):
            raise GistError(f"num_names must be in 1..{len(NAMES)}, got {self.num_names}")
        if not 0 <= self.num_unasked < self.num_names:
            raise GistError(f"num_unasked must be in 0..{self.num_names - 1}, got {self.num_unasked}")
        chance = random.Random(f"table {self.seed}")
        object.__setattr__(self, "table", self._draw_table(chance, self.num_names))
        object.__setattr__(self, "unasked", frozenset(chance.sample(self.table.names, self.num_unasked)))

    def records(self, split: str, count: int, seed: int) -> list[Record]:
        """Generate ``count`` different queries to the task's own table, each with the table's text as instruction.

        Queries of ``"eval"`` use the same names as queries of ``"train"`` but never coincide with them, whatever the
        seeds. Each query of ``"unasked"`` has at least one name that occurs in neither.

        Args:
            split: ``"train"``, ``"eval"`` or ``"unasked"``.
            count: number of queries.
            seed: selects the queries of the split and their order.

        Returns:
            The records.

        Raises:
            GistError: ``split`` is unknown or has fewer than ``count`` queries.
        """
        if split not in ("train", "eval", "unasked"):
            raise GistError(f"split must be train, eval or unasked, got {split!r}")
        names = self.table.names
        # The half that a query belongs to does not depend on the seed of the records.
        half = random.Random(f"split {self.seed}")
        queries = [
            query
            for query in itertools.product(names, repeat=self.length)
            if (half.random() < 0.5) == (split == "train") or split == "unasked"
        ]
        queries = [query for query in queries if self.unasked.isdisjoint(query) != (split == "unasked")]
        if not 0 < count <= len(queries):
            raise GistError(f"count must be in 1..{len(queries)}, the number of {split} queries, got {count}")
        return [
            self._record(self.table, list(query), split)
            for query in random.Random(f"{split} {seed}").sample(queries, count)
        ]

    def lookups(self, num_tables: int, per_table: int, seed: int) -> list[Record]:
        """Generate queries to random tables of 2 to ``num_names`` entries, grouped by table.

        They teach a model to read tables, but nothing about the task's own table. Short tables are included because
        they are easier to learn from; the skill carries over to long ones.

        Args:
            num_tables: number of random tables.
            per_table: number of queries per table.
            seed: selects the tables and queries.

        Returns:
            The records.
        """
        chance = random.Random(f"lookups {seed}")
        found: list[Record] = []
        for _ in range(num_tables):
            table = self._draw_table(chance, chance.randint(min(2, self.num_names), self.num_names))
            names = table.names
            found += [
                self._record(table, [chance.choice(names) for _ in range(self.length)], "lookup")
                for _ in range(per_table)
            ]
        return found

    def _draw_table(self, chance: random.Random, size: int) -> CodeTable:
        codes = tuple(f"{name}-{chance.randrange(NUM_CODES)}" for name in chance.sample(NAMES, size))
        return CodeTable(codes, chance.choice([*CODE_ORDERS]), chance.choice([*CODE_ENDINGS]))

    def _record(self, table: CodeTable, names: list[str], source: str) -> Record:
        return Record(table.text(), " ".join(names), " ".join(table.answer(names)), source)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def task_tokenizer() -> GistTokenizer:
    """Build a tokenizer with one id per word and letter of :class:`LetterTask`; it is returned with their template."""
    texts = [*ORDERS, *EDITS, *STYLES, *(phrasing.format(order="", edit="", style="") for phrasing in PHRASINGS)]
    return _word_tokenizer([*texts, "! * -", " ".join(LETTERS), " ".join(LETTERS.upper())])


def code_tokenizer() -> GistTokenizer:
    """Build a tokenizer with one id per word of :class:`CodeTask`; it is returned with their template."""
    codes = tuple(f"{name}-{number}" for name in NAMES for number in range(NUM_CODES))
    return _word_tokenizer([CodeTable(codes, "", "").text(), *CODE_ORDERS, *CODE_ENDINGS, *NAMES, "done ->"])


def _word_tokenizer(texts: list[str]) -> GistTokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [*texts, TEMPLATE.prompt_text(""), TEMPLATE.continuation_text(" ")]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return GistTokenizer(tokenizer, TEMPLATE)
