"""How the keys of a cache are rotated, so that they can be moved to other positions without the model.

Place in the flow: below the cache, which keeps it, in memory and in files. Rotary position embeddings rotate each key
by angles proportional to its position (RoPE, arXiv 2104.09864, equation 34), and rotating again adds the angles. Only
arithmetic: ``gisting.models.rotary`` reads the frequencies from a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gisting.errors import GistError

__all__ = ["Rotary"]


@dataclass(frozen=True)
class Rotary:
    """The rotation of every layer's keys.

    Args:
        frequencies: the distinct sets of inverse frequencies in radians per position, one for each rotated pair of
            numbers; float32 values, written as Python floats.
        layers: the index of each layer's set, or None for a layer whose keys are not rotated.
        is_interleaved: whether a pair is two neighbours (GPT-J, Cohere) and not the numbers ``i`` and ``i + R / 2``
            (GPT-NeoX, Llama), where ``R``, twice the number of frequencies, is how many numbers of a head are rotated.
    """

    frequencies: tuple[tuple[float, ...], ...]
    layers: tuple[int | None, ...]
    is_interleaved: bool = False

    def rotate(self, layer: int, keys: Tensor, by: Tensor) -> Tensor:
        """Move a layer's keys ``by`` positions.

        This is a pure rotation: a factor that a model applies to its cosines and sines (YaRN, LongRoPE) is already in
        the keys and stays. Only the first R numbers of a head are rotated, and none in a layer without rotation. Angles
        are computed in float64, and the rotation in float32 (float64 for float64 keys).

        Args:
            layer: the index of the layer.
            keys: floating ``(B, G, P, D)``.
            by: int64 ``(B,)``, or ``(B, P)`` for a number per slot; negative numbers move back. The angles are computed
                on its device.

        Returns:
            ``(B, G, P, D)``, in the dtype and on the device of ``keys``.

        Raises:
            GistError: there is no such layer, or the shapes do not fit.
        """
        if not 0 <= layer < len(self.layers):
            raise GistError(f"layer must be in 0..{len(self.layers) - 1}, got {layer}")
        if keys.dim() != 4 or by.dtype != torch.int64 or by.shape not in (keys.shape[:1], keys.shape[0:3:2]):
            raise GistError(
                "keys must be (B, G, P, D) and by int64 (B,) or (B, P), got "
                f"{tuple(keys.shape)} and {by.dtype} {tuple(by.shape)}"
            )
        number = self.layers[layer]
        if number is None:
            return keys
        frequencies = torch.tensor(self.frequencies[number], dtype=torch.float64, device=by.device)
        size = 2 * len(frequencies)
        if size > keys.shape[-1]:
            raise GistError(
                f"keys must have a head size of at least {size}, the number of rotated numbers, got {keys.shape[-1]}"
            )
        dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
        # (B, 1, P or 1, R / 2)
        angles = by.reshape(len(by), 1, -1, 1) * frequencies
        cos, sin = angles.cos().to(keys.device, dtype), angles.sin().to(keys.device, dtype)
        rotating = keys[..., :size].to(dtype)
        # The two numbers of every pair, each (B, G, P, R / 2).
        x, y = (rotating[..., 0::2], rotating[..., 1::2]) if self.is_interleaved else rotating.chunk(2, dim=-1)
        rotated = (x * cos - y * sin, y * cos + x * sin)
        whole = torch.stack(rotated, dim=-1).flatten(-2) if self.is_interleaved else torch.cat(rotated, dim=-1)
        return torch.cat([whole.to(keys.dtype), keys[..., size:]], dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """Return the rotation as JSON values, which :meth:`from_dict` reads."""
        return {
            "frequencies": [list(values) for values in self.frequencies],
            "layers": list(self.layers),
            "is_interleaved": self.is_interleaved,
        }

    @classmethod
    def from_dict(cls, found: Any) -> Rotary:
        """Make a rotation from ``found``, which :meth:`to_dict` returned.

        Raises:
            ValueError: it does not have that form.
        """
        match found:
            case {"frequencies": list(sets), "layers": list(layers), "is_interleaved": bool(is_interleaved)}:
                pass
            case _:
                raise ValueError("rotary must be an object with frequencies, layers and is_interleaved")
        for values in sets:
            if not isinstance(values, list) or not all(
                isinstance(value, float) and math.isfinite(value) for value in values
            ):
                raise ValueError("rotary frequencies must be lists of finite numbers")
        for layer in layers:
            if layer is not None and not (type(layer) is int and 0 <= layer < len(sets)):
                raise ValueError(f"rotary layers must be numbers of frequency sets or null, got {layer!r}")
        return cls(tuple(map(tuple, sets)), tuple(layers), is_interleaved)
