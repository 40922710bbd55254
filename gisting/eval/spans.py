"""Exact spans of a prompt, such as names, numbers and web addresses, and questions that ask for them.

Place in the flow: a prompt -> **spans** with a question each -> answers, in which the spans are looked for. Texts only,
independent of models. What is a name is guessed from capitals, so a prompt in a script without them has numbers and
addresses alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Span", "find_spans"]

_GAP = "____"
_QUESTION = 'Which exact words of your instructions belong in the gap "____" here? "{text}"'
# The first that matches at a place wins, so a number within an address is part of the address.
_SPAN = re.compile(
    r"(?:https?://|www\.)[^\s<>\"'()\[\]]*[^\s<>\"'()\[\].,;:!?]"  # web addresses
    r"|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"  # mail addresses
    r"|(?<![\w.])[+(]?\d[\d ()-]{6,}\d(?!\w|[:.,/]\d)"  # telephone numbers
    r"|[$€£]?(?<![\w.])\d+(?:[.,:/-]\d+)*(?:\s?%|\s?[ap]m\b)?"  # numbers, times, dates, prices
    r"|(?<!\w)[A-Z][\w'-]+(?: (?:(?:&|of|the|de|van) )*[A-Z][\w'-]+)+"  # names of several words
    r"|(?<=[a-z,;:\"] )[A-Z][\w'-]+"  # a name within a sentence
)
_LIST_MARKER = re.compile(r"^[ \t]*(?:\d+[.)]|[-*])[ \t]+", flags=re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_FEWEST_WORDS = 3
_LONGEST = 240  # characters of a question's sentence


@dataclass(frozen=True)
class Span:
    """An exact span of a prompt, and a question whose answer it is.

    Args:
        text: the span.
        question: the sentence that holds it, with a gap in its place.
    """

    text: str
    question: str

    def is_in(self, answer: str) -> bool:
        """Return whether an answer holds the span as whole words, whatever its capitals and spaces.

        Args:
            answer: the text of the answer.
        """
        words = r"\s+".join(map(re.escape, self.text.casefold().split()))
        return re.search(rf"(?<!\w){words}(?!\w)", answer.casefold()) is not None


def find_spans(prompt: str, largest_number: int = 16) -> list[Span]:
    """Find the exact spans of a prompt that a question can ask for.

    Args:
        prompt: the prompt.
        largest_number: if there are more, this many of them are taken at equal distances.

    Returns:
        The spans in the order of the prompt, each once.
    """
    found: dict[str, Span] = {}
    for span in _spans(_LIST_MARKER.sub("", prompt)):
        found.setdefault(span.text.casefold(), span)
    spans = [*found.values()]
    if len(spans) <= largest_number:
        return spans
    return [spans[number * len(spans) // largest_number] for number in range(largest_number)]


def _spans(prompt: str) -> Iterator[Span]:
    for sentence in _SENTENCE.split(prompt):
        for match in _SPAN.finditer(sentence):
            text = match.group()
            start = max(0, match.start() - _LONGEST // 2)
            shown = sentence[start : match.end() + _LONGEST // 2]
            gapped = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", _GAP, shown)
            span = Span(text, _QUESTION.format(text=gapped.strip()))
            # What the question says elsewhere needs no prompt, and a few words do not say what is asked for. There is
            # no gap for a part of a word, such as the number in 24h.
            if _GAP in gapped and not span.is_in(gapped) and len(gapped.split()) > _FEWEST_WORDS:
                yield span
