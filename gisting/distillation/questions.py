"""Questions that a model writes itself, to be asked with its prompt in view: about each part of it, and ordinary ones.

Place in the flow: a prompt without inputs -> **questions** -> sampled answers. Cartridges (arXiv 2506.06266) calls
learning from such conversations self-study.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gisting.errors import GistError
from gisting.generation.sampling import sample_answers
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["WRITER", "parts_of", "requests_about", "write_questions"]

#: The prompt with which a model writes questions.
WRITER = "You write messages that people send to an assistant. Answer with the message alone."
_ABOUT = (
    'An assistant has these instructions:\n"{part}"\nWrite one short question that a user asks it about them.',
    'An assistant has these instructions:\n"{part}"\nWrite one short request of a user to which they apply.',
)
_ORDINARY = "Write one short {kind} about {topic} that a user sends to an assistant."
_KINDS = ("question", "request", "message")
_TOPICS = (
    *("everyday life", "food", "travel", "health", "money", "school", "science", "history", "music", "sport"),
    *("computers", "nature", "animals", "books", "films", "work", "family", "language", "mathematics", "the weather"),
)
_WORDS = 35  # of a part of the prompt
_LONGEST = 200  # characters of a question
_MARGIN = 2  # how many are asked for, for one that is needed
_FEWEST = 8


def write_questions(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prompt: str,
    number: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Let the model write questions: two of three about the parts of its prompt, the others ordinary.

    Args:
        model: a patched model, which should be able to follow instructions.
        tokenizer: the tokenizer it was patched for.
        prompt: the prompt that the questions are about.
        number: how many questions are wanted.
        seed: decides what is written.
        batch_size: how many to write at once.
        progress: called with the number of questions written since the last call; twice as many are written as wanted.

    Returns:
        At most ``number`` different questions.

    Raises:
        GistError: the model wrote fewer than 8 that can be used, or a part of the prompt exceeds its positions.
    """
    ordinary = [_ORDINARY.format(kind=kind, topic=topic) for kind in _KINDS for topic in _TOPICS]
    # A long prompt has more parts than questions are wanted: a random choice of them is asked about.
    draw = random.Random(seed)
    parts = parts_of(prompt)
    draw.shuffle(parts)
    draw.shuffle(ordinary)
    about = requests_about(parts)
    wanted = {"about": number - number // 3, "ordinary": number // 3}
    requests = [
        about[row % len(about)] if kind == "about" else ordinary[row % len(ordinary)]
        for kind, count in wanted.items()
        for row in range(_MARGIN * count)
    ]
    written = sample_answers(
        model,
        tokenizer,
        [(WRITER, request) for request in requests],
        max_new_tokens=40,
        temperature=0.8,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    found: list[str] = []
    seen: set[str] = set()
    answers = iter(written)
    for count, period in zip(wanted.values(), (len(parts), len(ordinary)), strict=True):
        usable: list[tuple[int, str]] = []  # questions, with how many of the same part come before
        turns: Counter[int] = Counter()
        for row, answer in enumerate(itertools.islice(answers, _MARGIN * count)):
            text = _cleaned(answer.output)
            if text is not None and text.lower() not in seen:
                seen.add(text.lower())
                usable.append((turns[row % period], text))
                turns[row % period] += 1
        usable.sort(key=lambda one: one[0])  # one of each part first
        found += [text for _, text in usable[:count]]
    if len(found) < min(_FEWEST, number):
        raise GistError(
            f"the model wrote {len(found)} questions that can be used, which are too few: it may not follow "
            "instructions; give inputs"
        )
    return found


def requests_about(parts: Sequence[str]) -> list[str]:
    """Return what a model is asked for, after :data:`WRITER`, to write questions: all ``parts`` of a prompt in turn."""
    return [
        _ABOUT[(turn + place) % len(_ABOUT)].format(part=part)
        for turn in range(len(_ABOUT))
        for place, part in enumerate(parts)
    ]


def parts_of(prompt: str) -> list[str]:
    """Cut a prompt into parts of about 35 words, at the ends of lines and sentences.

    Args:
        prompt: any text.

    Returns:
        The parts in order; together they hold every word.
    """
    parts: list[str] = []
    for piece in re.split(r"\n+|(?<=[.!?])\s+", prompt.strip()):
        if parts and len(f"{parts[-1]} {piece}".split()) <= _WORDS:
            parts[-1] += f" {piece}"
        else:
            parts.append(piece)
    return parts


def _cleaned(text: str) -> str | None:
    """The first line without quotation marks and numbers; None if nothing can be used."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    line = re.sub(r"^(\d+[.)]|[-*•]|([Aa] |[Tt]he )?([Qq]uestion|[Mm]essage|[Uu]ser)( asks)?:)\s*", "", line).strip(
        "\"'“”„`* "
    )
    return line if 3 <= len(line) <= _LONGEST else None
