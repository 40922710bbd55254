"""Compressed prompts: one or many, in memory and in files.

Place in the flow: attention -> (inside a model) -> **cache** -> generation. Holds the keys and values that survive a
prompt and says what they belong to. Knows the file format; does not know how the states were computed, and loads
nothing but safetensors.

A file is a safetensors file whose metadata hold a manifest (JSON). The manifest names format, model, tokenizer and
template, and a SHA-256 over itself and every tensor, so that a truncated or altered file is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gisting.errors import CacheFormatError, CacheMismatchError, GistError
from gisting.rotary import Rotary

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["CacheOrigin", "GistCache"]

FORMAT = 1


@dataclass(frozen=True)
class CacheOrigin:
    """What a cache belongs to.

    Args:
        model: fingerprint of weights and configuration, ``model_type/hex``.
        tokenizer: fingerprint of tokenizer, gist token and template.
        template: name of the template.
        condition: ``"gist"``; ``"positive"`` for an ordinary prefix cache with prompt and gist, ``"negative"`` for an
            empty one.
    """

    model: str
    tokenizer: str
    template: str
    condition: str


@dataclass(frozen=True, eq=False)
class GistCache:
    """The states of B compressed prompts, right-aligned in P slots.

    Args:
        keys: one ``(B, G, P, D)`` for each layer, rotated at positions ``0 .. lengths[b] - 1``; for an
            encoder-decoder, of each encoder layer.
        values: one ``(B, G, P, Dv)`` for each layer.
        lengths: int64 ``(B,)`` on the CPU: k of each prompt.
        origin: what the states belong to.
        last_hidden: ``(B, P, d_model)``, an encoder's last hidden states, else None.
        rotary: how the keys are rotated, which :meth:`chain` needs; None where nobody said (files of format 1) and for
            an encoder-decoder, whose keys are not rotated.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor
    origin: CacheOrigin
    last_hidden: Tensor | None = None
    rotary: Rotary | None = None

    # -- what it is ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """B, the number of prompts."""
        return self.lengths.shape[0]

    @property
    def num_gist_tokens(self) -> list[int]:
        """k of each prompt."""
        return self.lengths.tolist()

    @property
    def num_slots(self) -> int:
        """P, the largest k of the batch."""
        return self.keys[0].shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all states."""
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the states of the first layer lie."""
        return self.keys[0].device

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def attention_mask(self) -> Tensor:
        """int64 ``(B, P)``: 1 at slots that hold a token. What stands in front of the mask of the rest in stock
        ``generate``.
        """
        slots = torch.arange(self.num_slots)
        return (slots[None] >= self.num_slots - self.lengths[:, None]).long().to(self.device)

    def __repr__(self) -> str:
        return (
            f"GistCache({len(self)} prompts, k={self.num_gist_tokens if len(self) <= 8 else '...'}, {len(self.keys)} "
            f"layers, {self.num_bytes} bytes, {self.dtype}, {self.device}, model {self.origin.model})"
        )

    # -- other batches -------------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> GistCache:
        """The prompts with these numbers, in this order; a number may come more than once.

        Raises:
            GistError: there is no such prompt, or no number at all.
        """
        if not rows:
            raise GistError("rows is empty; name at least one prompt")
        for row in rows:
            if not -len(self) <= row < len(self):
                raise GistError(f"rows must be in 0..{len(self) - 1}, got {row}")
        index = torch.tensor([row % len(self) for row in rows])
        lengths = self.lengths[index]
        start = self.num_slots - int(lengths.max())
        where = index.to(self.device)
        return self._map(
            lambda tensor, dim: tensor.index_select(0, where).narrow(dim, start, tensor.shape[dim] - start), lengths
        )

    def __getitem__(self, row: int) -> GistCache:
        """Prompt ``row`` alone. Raises IndexError where there is none, so that a cache can be iterated."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must be in 0..{len(self) - 1}, got {row}")
        return self.select([row])

    @staticmethod
    def cat(caches: Sequence[GistCache]) -> GistCache:
        """One batch of several caches of one model; k may differ.

        Raises:
            GistError: there is nothing to join.
            CacheMismatchError: the caches do not belong together.
        """
        if not caches:
            raise GistError("caches is empty; give at least one")
        first = caches[0]
        for other in caches[1:]:
            if other.origin != first.origin:
                raise CacheMismatchError(
                    f"caches belong to different origins, {first.origin} and {other.origin}; compress them anew"
                )
            if (other.dtype, other.device) != (first.dtype, first.device):
                raise CacheMismatchError(
                    f"caches are {first.dtype} on {first.device} and {other.dtype} on {other.device}; bring them "
                    "together with .to()"
                )
        slots = max(cache.num_slots for cache in caches)

        def join(parts: Sequence[Tensor], dim: int) -> Tensor:
            padded = []
            for part in parts:
                shape = list(part.shape)
                shape[dim] = slots - shape[dim]
                padded.append(torch.cat([part.new_zeros(shape), part], dim=dim))
            return torch.cat(padded)

        hidden = [cache.last_hidden for cache in caches]
        return GistCache(
            tuple(join(layer, 2) for layer in zip(*(cache.keys for cache in caches), strict=True)),
            tuple(join(layer, 2) for layer in zip(*(cache.values for cache in caches), strict=True)),
            torch.cat([cache.lengths for cache in caches]),
            first.origin,
            None if first.last_hidden is None else join([part for part in hidden if part is not None], 1),
            first.rotary,
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GistCache:
        """The same states on another device or in another dtype."""
        return self._map(lambda tensor, dim: tensor.to(device=device, dtype=dtype), self.lengths)

    def as_past_key_values(self) -> DynamicCache:
        """A fresh transformers cache of length P, for stock ``model.generate`` on a decoder.

        Its call is ``model.generate([<GIST>] * k + rest, past_key_values=cache.as_past_key_values())``, with
        ``attention_mask = cat([cache.attention_mask, mask of the rest])`` for a ragged batch. ``generate`` appends to
        what it is given, so ask for a new one each time; this cache stays as it is.

        Raises:
            GistError: the states are an encoder's; use ``gisting.generate``.
        """
        if self.last_hidden is not None:
            raise GistError(
                "these are encoder states, which generate does not take as past_key_values; use "
                "gisting.generate(cache=...)"
            )
        from transformers import DynamicCache

        past = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            past.update(keys, values, layer)
        return past

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all (temporary file, fsync, rename).

        Raises:
            OSError: the file cannot be written.
        """
        from safetensors.torch import save

        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._named().items()}
        manifest = {
            "format": FORMAT,
            "origin": asdict(self.origin),
            "lengths": self.num_gist_tokens,
            "num_layers": len(self.keys),
        }
        manifest["sha256"] = _digest(manifest, tensors)
        data = save(tensors, metadata={"gist": json.dumps(manifest, sort_keys=True)})
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent or ".", prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that nobody else may read; caches are shared like any other file.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> GistCache:
        """Read what :meth:`save` wrote.

        Whether it belongs to the model at hand is checked where it is used, against the model.

        Args:
            path: the file.
            device: where the states go.

        Raises:
            CacheFormatError: the file is truncated, altered, of a later format, or no gist cache.
            OSError: there is no such file, or it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; save a cache there first: cache.save(path)")
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                text = (file.metadata() or {}).get("gist")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, ValueError, UnicodeDecodeError) as error:
            raise CacheFormatError(f"{path} is truncated or altered ({error}); compress the prompt again") from error
        if text is None:
            raise CacheFormatError(f"{path} is a safetensors file but holds no gist cache (no 'gist' in its metadata)")
        try:
            manifest = json.loads(text)
            version = manifest["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise CacheFormatError(
                f"{path} is altered: its manifest cannot be read; compress the prompt again"
            ) from error
        if not isinstance(version, int):
            raise CacheFormatError(f"{path} is altered: its manifest cannot be read; compress the prompt again")
        if version > FORMAT:
            raise CacheFormatError(
                f"{path} has format {version}, this version reads up to {FORMAT}; upgrade gisting: pip install -U "
                "gisting"
            )
        expected = manifest.pop("sha256", None)
        if expected != _digest(manifest, tensors):
            raise CacheFormatError(f"{path} is altered: its checksum does not fit; compress the prompt again")
        try:
            cache = cls(
                tuple(tensors[f"keys.{layer}"] for layer in range(manifest["num_layers"])),
                tuple(tensors[f"values.{layer}"] for layer in range(manifest["num_layers"])),
                torch.tensor(manifest["lengths"]),
                CacheOrigin(**manifest["origin"]),
                tensors.get("last_hidden"),
            )
            cache._check()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CacheFormatError(
                f"{path} is no gist cache of format {FORMAT}: {error}; compress the prompt again"
            ) from error
        return cache.to(device)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise ValueError unless the parts fit together: a file with a right checksum may still hold anything."""
        if self.lengths.dim() != 1 or self.lengths.dtype != torch.int64 or not len(self):
            raise ValueError("lengths must be whole numbers, one for each prompt")
        if not self.keys or any(tensor.dim() != 4 for tensor in (*self.keys, *self.values)):
            raise ValueError("keys and values must have four dimensions")
        batch, slots = len(self), self.num_slots
        if self.lengths.amin() < 0 or self.lengths.amax() != slots:
            raise ValueError(f"the largest of the lengths must be the {slots} slots")
        for key, value in zip(self.keys, self.values, strict=True):
            if key.shape[:3] != value.shape[:3] or (key.shape[0], key.shape[2]) != (batch, slots):
                raise ValueError("a layer has another shape than the others")
        if self.last_hidden is not None and (
            self.last_hidden.dim() != 3 or self.last_hidden.shape[:2] != (batch, slots)
        ):
            raise ValueError("last_hidden has another shape than the layers")
        if any(tensor.dtype != self.dtype or not tensor.is_floating_point() for tensor in self._tensors()):
            raise ValueError("the states must have one floating dtype")
        if not all(isinstance(value, str) for value in asdict(self.origin).values()):
            raise ValueError("origin must be texts")

    def _named(self) -> dict[str, Tensor]:
        named = {f"keys.{layer}": tensor for layer, tensor in enumerate(self.keys)}
        named |= {f"values.{layer}": tensor for layer, tensor in enumerate(self.values)}
        return named if self.last_hidden is None else named | {"last_hidden": self.last_hidden}

    def _tensors(self) -> list[Tensor]:
        return list(self._named().values())

    def _map(self, change: Any, lengths: Tensor) -> GistCache:
        """``change(tensor, dimension of the slots)`` of every tensor."""
        return replace(
            self,
            keys=tuple(change(tensor, 2) for tensor in self.keys),
            values=tuple(change(tensor, 2) for tensor in self.values),
            lengths=lengths,
            last_hidden=None if self.last_hidden is None else change(self.last_hidden, 1),
        )


def _digest(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
