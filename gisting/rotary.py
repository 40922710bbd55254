"""How the keys of a cache are rotated, so that they can be moved to other positions without the model.

Place in the flow: below the cache, which carries it along, in memory and in files. Rotary position embeddings turn each
key by angles proportional to its position (RoPE, arXiv 2104.09864, equation 34), and turning once more adds the
angles. Knows arithmetic; what a model's frequencies are is read off it in ``gisting.models.rotary``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Rotary"]


@dataclass(frozen=True)
class Rotary:
    """The rotation of every layer's keys.

    Args:
        frequencies: the distinct sets of inverse frequencies, radians per position, one for each rotated pair of
            numbers; float32 values, written as Python floats.
        layers: for each layer the number of its set, or None where its keys are not rotated.
        is_interleaved: whether a pair is two neighbours (GPT-J, Cohere) and not number ``i`` with ``i + R / 2``
            (GPT-NeoX, Llama), where ``R``, twice the number of frequencies, is how many numbers of a head are rotated.
    """

    frequencies: tuple[tuple[float, ...], ...]
    layers: tuple[int | None, ...]
    is_interleaved: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` reads it."""
        return {
            "frequencies": [list(values) for values in self.frequencies],
            "layers": list(self.layers),
            "is_interleaved": self.is_interleaved,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Rotary:
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: it is not of that form.
        """
        frequencies = tuple(tuple(float(value) for value in values) for values in found["frequencies"])
        layers = tuple(found["layers"])
        for layer in layers:
            if layer is not None and not (isinstance(layer, int) and 0 <= layer < len(frequencies)):
                raise ValueError(f"rotary layers must be numbers of frequency sets or null, got {layer!r}")
        if not isinstance(found["is_interleaved"], bool):
            raise ValueError("rotary is_interleaved must be true or false")
        return cls(frequencies, layers, found["is_interleaved"])
