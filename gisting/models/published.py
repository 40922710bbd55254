"""List the checkpoints that the authors of Gisting published: what each is, and the template it was trained with.

Place in the flow: read by ``gisting.load`` and by ``weight_difference``. The facts are from github.com/jayelm/gisting
(README, ``src/weight_diff.py``, ``src/train.py``, issue 8); nothing is fetched here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gisting.tokens import Template

__all__ = ["ALPACA_STRIPPED", "PUBLISHED", "PublishedCheckpoint", "published"]

#: The template that the published LLaMA checkpoints were trained with. The published code wrote ``"alpaca"``, but the
#: SentencePiece tokenizer of transformers 4.28 removed spaces and newlines next to a special token, and put a space
#: before each piece of text. So there is no newline before the gist, and a space in place of the newline after it. The
#: published token counts (``data/benchmarking``) and the published outputs, which hold the ids as text, confirm this.
ALPACA_STRIPPED = Template(
    "alpaca-stripped", "Instruction: {prompt}", " Input: {input}\nOutput:", " Output:", " {output}"
)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One of the six published checkpoints.

    Args:
        name: the repository on the hub.
        condition: the mask it was trained with: ``"gist"``, ``"positive"`` or ``"negative"`` (the controls).
        weight_sum: for a weight difference, the sum of all weights of the recovered model and of its rotary
            frequencies, from the published script; None for a complete checkpoint.
        num_gist_tokens: k.
    """

    name: str
    condition: str
    weight_sum: float | None
    num_gist_tokens: int = 1

    @property
    def is_difference(self) -> bool:
        """Whether its weights must first be added to the weights of LLaMA-7B."""
        return self.weight_sum is not None

    @property
    def about_gists(self) -> dict[str, list[int]]:
        """What ``config.gist`` says about training: the lowest and highest k; nothing for the controls."""
        return {"num_gist_tokens": [self.num_gist_tokens] * 2} if self.condition == "gist" else {}


#: The published checkpoints by repository on the hub.
PUBLISHED: dict[str, PublishedCheckpoint] = {
    found.name: found
    for found in (
        PublishedCheckpoint("jayelm/llama-7b-gist-1", "gist", 50547.9570),
        PublishedCheckpoint("jayelm/llama-7b-pos_control-1", "positive", 50596.9141),
        PublishedCheckpoint("jayelm/llama-7b-neg_control-1", "negative", 50503.8789),
        PublishedCheckpoint("jayelm/flan-t5-xxl-gist-1", "gist", None),
        PublishedCheckpoint("jayelm/flan-t5-xxl-pos_control-1", "positive", None),
        PublishedCheckpoint("jayelm/flan-t5-xxl-neg_control-1", "negative", None),
    )
}


def published(name_or_path: str | Path) -> PublishedCheckpoint | None:
    """Look up a published checkpoint by its name on the hub. A local directory is never one, whatever its name.

    Args:
        name_or_path: as for :func:`gisting.load`.

    Returns:
        The published checkpoint, or None.
    """
    name = str(name_or_path)
    return None if Path(name).is_dir() else PUBLISHED.get(name)
