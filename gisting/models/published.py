"""The checkpoints that the authors of Gisting published: what each is, and what its texts looked like in training.

Place in the flow: asked by ``gisting.load`` and by ``weight_difference``. Facts only, from github.com/jayelm/gisting
(README, ``src/weight_diff.py``, ``src/train.py``, issue 8); nothing is fetched here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gisting.tokens import Template

__all__ = ["ALPACA_STRIPPED", "PUBLISHED", "PublishedCheckpoint", "published"]

#: What the published LLaMA checkpoints were trained on. The code wrote ``"alpaca"``, but the SentencePiece tokenizer of
#: transformers 4.28 took blanks and line ends beside a special token away, and put a blank before each stretch of text.
#: So the line end before the gist is missing, and behind it stands a blank in its place. The published numbers of ids
#: (``data/benchmarking``) and the published outputs, which hold the ids as text, say so.
ALPACA_STRIPPED = Template(
    "alpaca-stripped", "Instruction: {prompt}", " Input: {input}\nOutput:", " Output:", " {output}"
)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One of the six on the hub.

    Args:
        name: the repository on the hub.
        condition: ``"gist"``, ``"positive"`` or ``"negative"`` control: what mask it was trained with.
        weight_sum: for a weight difference the sum of all numbers of the recovered model, rotary frequencies
            included, as the published script knows it; None for a whole checkpoint.
        num_gist_tokens: k.
    """

    name: str
    condition: str
    weight_sum: float | None
    num_gist_tokens: int = 1

    @property
    def is_difference(self) -> bool:
        """Whether its weights have to be added to those of LLaMA-7B first."""
        return self.weight_sum is not None

    @property
    def about_gists(self) -> dict[str, list[int]]:
        """What ``config.gist`` says of training: k from and to, and nothing for the controls."""
        return {"num_gist_tokens": [self.num_gist_tokens] * 2} if self.condition == "gist" else {}


#: The published checkpoints by their repository on the hub.
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
    """What is known of a checkpoint by its name; a directory, whatever its name, is not known.

    Args:
        name_or_path: as for :func:`gisting.load`.

    Returns:
        The published checkpoint, or None.
    """
    name = str(name_or_path)
    return None if Path(name).is_dir() else PUBLISHED.get(name)
