"""Ordinary inputs, which have nothing to do with any particular prompt, and short texts that instructions apply to.

Written for this repository. Those of the held-out part are never trained on.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["INSTRUCTIONS", "PASSAGES", "QUESTIONS"]

_TOPICS = (
    "the moon,volcanoes,coffee,chess,honey bees,the printing press,glaciers,jazz,bread,bicycles,photosynthesis,whales,"
    "electric cars,the Great Wall of China,dreams,rainbows,penguins,democracy,vaccines,origami,tides,spiders,opera,"
    "batteries,recycling,the ozone layer,marathons,cheese,sign language,robots,tea,libraries,earthquakes,football,maps"
).split(",")
_FORMS = (
    "What is interesting about {}?",
    "Explain {} in two sentences.",
    "Tell me a short story about {}.",
    "Write a haiku about {}.",
    "Why do people care about {}?",
    "Give me three facts about {}.",
    "Can you recommend a way to learn more about {}?",
    "What is a common mistake people make about {}?",
)


def _lines(name: str) -> list[str]:
    return (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()


#: Questions and requests of the kind that any assistant gets.
QUESTIONS = [*_lines("questions.txt"), *(form.format(topic) for topic in _TOPICS for form in _FORMS)]
#: Texts of one to three sentences that a short instruction can be applied to.
PASSAGES = _lines("passages.txt")
#: Short instructions that stand for a prompt, to be applied to a passage.
INSTRUCTIONS = _lines("instructions.txt")
