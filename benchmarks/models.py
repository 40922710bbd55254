"""What several benchmarks build their work from: the sizes of a real model, and texts of a given length."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from gisting.data.tasks import LETTERS

__all__ = ["SMOLLM2", "letters"]

#: The sizes of SmolLM2-135M, for :func:`gisting.measure.models.random_llama`.
SMOLLM2: Mapping[str, Any] = {
    "hidden_size": 576,
    "num_layers": 30,
    "num_heads": 9,
    "num_key_heads": 3,
    "intermediate_size": 1536,
    "vocabulary": 49_152,
    "is_tied": True,
}


def letters(chance: random.Random, number: int) -> str:
    """Draw this many words, each of which is one id of the built-in task's tokenizer."""
    return " ".join(chance.choices(LETTERS, k=number))
