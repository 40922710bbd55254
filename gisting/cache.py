"""Compressed prompts: one or many, in memory and in files.

Place in the flow: attention -> (inside a model) -> **cache** -> generation. Holds the keys and values that survive a
prompt, and records what they belong to. How a file is laid out and kept safe is in ``gisting.storage``. Does not depend
on how the states were computed.

The manifest of a file names the model, the tokenizer and template, the checkpoint that made it, k of each prompt, how
the keys are rotated, and what is known about how each gist was made and how good it is; its tensors are ``keys.0``,
``values.0``, ... and ``last_hidden``.
"""

# Over 600 lines because a file from anywhere is checked part by part, and every public method says what it raises.

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gisting.device import on_each_device
from gisting.errors import CacheMismatchError, GistError
from gisting.padding import pad_rows
from gisting.rotary import Rotary
from gisting.storage import MAX_BYTES, check_place, malformed, read, write
from gisting.tokens import ChatTemplate

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

    from gisting.tokens import GistTokenizer, Message

__all__ = ["CacheOrigin", "GistCache", "kept_share"]

_PAST_IMPLEMENTATIONS = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")
# Room for states eight times as large: three of the fifteen powers of two that e4m3 spans.
_FP8_HEADROOM = 8


@dataclass(frozen=True)
class CacheOrigin:
    """What a cache belongs to.

    Args:
        model: the fingerprint of weights and configuration, ``model_type/hex``.
        tokenizer: the fingerprint of tokenizer, gist token and template.
        template: the name of the template.
        condition: ``"gist"``; ``"positive"`` for an ordinary prefix cache with prompt and gist, ``"negative"`` for an
            empty one.
        checkpoint: the name of what made the cache, for people; "" if it had none. It makes no difference to what the
            cache belongs to.
        name: the prompt's name and the day it was compressed, if the cache comes from a store; likewise, and not in
            files.
    """

    model: str
    tokenizer: str
    template: str
    condition: str
    checkpoint: str = field(default="", compare=False, repr=False)
    name: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        """Return names first, then what identifies the origin."""
        return " ".join(filter(None, (self.name, self.checkpoint and f"by {self.checkpoint}", repr(self))))

    @property
    def maker(self) -> str:
        """By which checkpoint and for which model, for messages: ``"by runs/mine for llama/0123456789ab"``."""
        return f"by {self.checkpoint} for {self.model}" if self.checkpoint else f"for {self.model}"

    def identity(self) -> dict[str, str]:
        """Return the parts by which two origins are compared, by name."""
        return {key: getattr(self, key) for key in ("model", "tokenizer", "template", "condition")}


@dataclass(frozen=True, eq=False)
class GistCache:
    """The states of B compressed prompts, right-aligned in P slots.

    After a turn of ``gisting.converse``, the slots also hold the conversation so far.

    Args:
        keys: one ``(B, G, P, D)`` for each layer, floating point, rotated at positions ``0 .. lengths[b] - 1``; for an
            encoder-decoder, of each encoder layer.
        values: one ``(B, G, P, Dv)`` for each layer, in the dtype of the keys. Keys and values are what the model
            caches: in latent attention (DeepSeek), the latent states and the rotated part of the keys.
        lengths: int64 ``(B,)`` on the CPU: k of each prompt, summed over its chunks if it has several.
        origin: what the states belong to.
        last_hidden: ``(B, P, d_model)`` in the dtype of the keys, an encoder's last hidden states, else None.
        rotary: how the keys are rotated, which :meth:`chain` needs; None if unknown (files of format 1), for latent
            attention, whose values are rotated and whose keys are not, and for an encoder-decoder.
        has_answers: whether what follows is a later turn of a conversation under the template ``"chat"``, which begins
            with the end of the answer that the slots end with.
        about: for each prompt, how its gist was made and how good it was found to be, as a small dictionary of JSON
            values, or None; ``()`` is None for all. Files keep it. It makes no difference to what the states are.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor
    origin: CacheOrigin
    last_hidden: Tensor | None = None
    rotary: Rotary | None = None
    has_answers: bool = False
    about: tuple[Mapping[str, Any] | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.about:
            object.__setattr__(self, "about", (None,) * self.lengths.numel())

    # -- properties ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return B, the number of prompts."""
        return self.lengths.shape[0]

    @property
    def num_gist_tokens(self) -> list[int]:
        """k of each prompt, summed over its chunks."""
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
        """The device of the first layer's states."""
        return self.keys[0].device

    @property
    def num_bytes(self) -> int:
        """The number of bytes of all states."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def attention_mask(self) -> Tensor:
        """int64 ``(B, P)``: 1 at slots that hold a token. It precedes the mask of the input in stock ``generate``."""
        return self._is_held().long().to(self.device)

    def __repr__(self) -> str:
        made = f"made {self.origin.maker}" if self.origin.checkpoint else f"model {self.origin.model}"
        return (
            f"GistCache({len(self)} prompts, k={self.num_gist_tokens if len(self) <= 8 else '...'}, {len(self.keys)} "
            f"layers, {self.num_bytes} bytes, {self.dtype}, {self.device}, {made})"
        )

    # -- other batches -------------------------------------------------------------------------------------------------

    def select(self, rows: Iterable[int] | Tensor) -> GistCache:
        """Return the prompts with these row numbers, in this order; a number may be repeated.

        Args:
            rows: whole numbers, where negative ones count from the end; also an integer tensor or array ``(rows,)``.

        Raises:
            GistError: ``rows`` is empty, or something in it is not the number of a prompt.
        """
        numbers = _whole_numbers(rows)
        if not numbers:
            raise GistError("rows is empty; name at least one prompt")
        for row in numbers:
            if not -len(self) <= row < len(self):
                raise GistError(f"rows must be in 0..{len(self) - 1}, got {row}")
        index = torch.tensor([row % len(self) for row in numbers])
        lengths = self.lengths[index]
        start = self.num_slots - int(lengths.max())
        index_on = on_each_device(index)
        selected = self._map(
            lambda tensor, dim: tensor.index_select(0, index_on(tensor.device)).narrow(
                dim, start, tensor.shape[dim] - start
            ),
            lengths,
        )
        return replace(selected, about=tuple(self.about[row] for row in numbers))

    def __getitem__(self, row: int | slice) -> GistCache:
        """Return prompt ``row`` alone, or the prompts of a slice.

        Raises:
            IndexError: there is no such prompt; so a cache can be iterated.
            GistError: the slice is empty, or ``row`` is neither a number nor a slice.
        """
        if isinstance(row, slice):
            return self.select(range(len(self))[row])
        try:
            (row,) = _whole_numbers([row])
        except GistError as error:
            raise GistError(
                f"an index must be a whole number or a slice, got {row!r}; for several rows call select(rows)"
            ) from error
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must be in 0..{len(self) - 1}, got {row}")
        return self.select([row])

    @staticmethod
    def cat(caches: Iterable[GistCache]) -> GistCache:
        """Join several caches of one model into one batch; k may differ.

        Args:
            caches: caches with any number of prompts each.

        Raises:
            GistError: there is nothing to join.
            CacheMismatchError: the caches do not belong together.
        """
        caches = list(caches)
        rotary = _check_together(caches)
        first = caches[0]
        slots = max(cache.num_slots for cache in caches)

        def join(parts: Sequence[Tensor], dim: int) -> Tensor:
            padded = []
            for part in parts:
                shape = list(part.shape)
                shape[dim] = slots - shape[dim]
                padded.append(torch.cat([part.new_zeros(shape), part], dim=dim) if shape[dim] else part)
            return torch.cat(padded)

        hidden = [cache.last_hidden for cache in caches]
        return GistCache(
            tuple(join(layer, 2) for layer in zip(*(cache.keys for cache in caches), strict=True)),
            tuple(join(layer, 2) for layer in zip(*(cache.values for cache in caches), strict=True)),
            torch.cat([cache.lengths for cache in caches]),
            first.origin,
            None if first.last_hidden is None else join([part for part in hidden if part is not None], 1),
            rotary,
            first.has_answers,
            tuple(about for cache in caches for about in cache.about),
        )

    @staticmethod
    def chain(caches: Iterable[GistCache]) -> GistCache:
        """Chain gists in one prefix, as if each prompt had been compressed at its place in it.

        Row b of the result is row b of every cache, with its keys rotated from positions ``0 .. k - 1`` to the
        positions after the gists before it. This needs no model, and equals, up to rounding, what the model computes
        for a prompt with shifted positions.

        A model must be trained on chained gists to read them: a model trained on single gists has never seen a prefix
        of several. ``GistCollator(part_separator=...)`` lays out such training. Without it expect worse answers, and
        measure them.

        Args:
            caches: the parts in order, each of B prompts, or of one prompt for all rows. k may differ.

        Returns:
            One cache of B prompts, where k is the sum over the parts; a single part is returned unchanged. What is
            known about the parts of a row becomes ``about["parts"]``: what was measured of a part does not hold for a
            chain.

        Raises:
            GistError: there is nothing to chain, numbers of prompts do not fit, or the states cannot be moved, because
                they are an encoder's, are of a condition other than gist, were distilled, or come from a file that does
                not say how keys are rotated.
            CacheMismatchError: the caches do not belong together.
        """
        caches = list(caches)
        rotary = _check_together(caches)
        first = caches[0]
        if first.last_hidden is not None:
            raise GistError(
                "caches hold encoder states, which cannot be chained: T5-like models see a gist by its distance to the "
                "input, which rotating does not change; compress the joined prompts instead"
            )
        if first.origin.condition != "gist":
            raise GistError(
                f"caches must be of condition 'gist' to be chained, got {first.origin.condition!r}: prefixes that "
                "never saw each other are not a valid control; compress the joined prompts instead"
            )
        if len(caches) == 1:
            return first
        if any(about and "distilled" in about for cache in caches for about in cache.about):
            raise GistError(
                "caches hold a distilled gist, which is what it is at the beginning of a prefix and by itself; distil "
                "the joined prompts instead"
            )
        if rotary is None:
            raise GistError(
                "caches do not say how their keys are rotated (rotary is None): their files are of format 1, so "
                "compress the prompts again, or their model does not rotate keys in a known way, as latent attention "
                "does not, so compress the joined prompts"
            )
        batch = max(len(cache) for cache in caches)
        if any(len(cache) not in (1, batch) for cache in caches):
            raise GistError(
                f"caches must have one prompt or {batch}, like the largest, got {[len(cache) for cache in caches]}"
            )
        lengths = torch.stack([cache.lengths.expand(batch) for cache in caches])
        offsets = lengths.cumsum(0) - lengths
        # What each row holds moves to the right in order: the last slots of a stable sort by "holds a token".
        is_held = torch.cat([cache._is_held().expand(batch, -1) for cache in caches], dim=1)
        slots = int(lengths.sum(0).max())
        source = is_held.sort(dim=1, stable=True).indices[:, is_held.shape[1] - slots :, None]
        source_on = on_each_device(source[:, None])

        def join(parts: Sequence[Tensor]) -> Tensor:
            whole = torch.cat([part.expand(batch, -1, -1, -1) for part in parts], dim=2)
            return whole.take_along_dim(source_on(whole.device), dim=2)

        keys = [
            [rotary.rotate(layer, part.expand(batch, -1, -1, -1), by) for part, by in zip(parts, offsets, strict=True)]
            for layer, parts in enumerate(zip(*(cache.keys for cache in caches), strict=True))
        ]
        values = zip(*(cache.values for cache in caches), strict=True)
        return GistCache(
            tuple(join(layer) for layer in keys),
            tuple(join(layer) for layer in values),
            lengths.sum(0),
            first.origin,
            rotary=rotary,
            has_answers=first.has_answers,
            about=tuple(_about_parts([cache.about[row % len(cache)] for cache in caches]) for row in range(batch)),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GistCache:
        """Return the same states on another device or in another dtype.

        Args:
            device: the new device; None leaves each layer where it is.
            dtype: the new floating dtype; None leaves it unchanged.
        """
        return self._map(lambda tensor, dim: tensor.to(device=device, dtype=dtype), self.lengths)

    def with_about(self, **facts: Any) -> GistCache:
        """Return the same states with facts added to what is known about every prompt.

        Args:
            **facts: JSON values by name, such as ``quality={"kept": 0.93}``; they replace earlier ones of the name.
        """
        return replace(self, about=tuple({**(about or {}), **facts} for about in self.about))

    def blanked(self) -> GistCache:
        """Return the same cache with zeros in the slots that hold no token.

        No token sees these slots, but in a ragged batch they hold states of the *prompt*, which must neither get into a
        file nor widen the range of numbers that a quantised file covers.
        """
        is_empty_on = on_each_device(~self._is_held())

        def blank(tensor: Tensor, dim: int) -> Tensor:
            here = is_empty_on(tensor.device)
            return tensor.masked_fill(here[:, None, :, None] if dim == 2 else here[:, :, None], 0)

        return self._map(blank, self.lengths)

    def as_past_key_values(
        self,
        cache_implementation: str = "dynamic",
        *,
        config: PreTrainedConfig | None = None,
        max_cache_len: int | None = None,
        cache_config: Mapping[str, Any] | None = None,
    ) -> Cache:
        """Make a new transformers cache of these P slots, for stock ``model.generate`` on a decoder.

        Call ``model.generate([<GIST>] * k + input, past_key_values=cache.as_past_key_values())``, with
        ``attention_mask = cat([cache.attention_mask, mask of the inputs])`` for a ragged batch. ``generate`` appends to
        the cache it gets, so make a new one for each call; this ``GistCache`` is not changed.

        Args:
            cache_implementation: one of transformers' names: ``"dynamic"`` grows; ``"static"`` has its full size from
                the start, which ``torch.compile`` needs; ``"offloaded"`` and ``"offloaded_static"`` keep all layers but
                one in CPU memory; ``"quantized"`` uses few bits per number.
            config: ``model.config``; required unless ``"dynamic"`` or ``"offloaded"``. With it, sliding layers drop
                keys that have left their window; without it, every layer keeps every key.
            max_cache_len: the number of columns of a static cache: P, the input and the new tokens.
            cache_config: ``backend`` and settings of a quantised cache, as in transformers' ``GenerationConfig``.

        Raises:
            GistError: the states are an encoder's (use ``gisting.generate``), there is no such cache, it cannot be made
                for this model or device, or a required argument is missing.
            ImportError: the package of a quantised cache's backend is not installed; transformers names it.
        """
        if self.last_hidden is not None:
            raise GistError(
                "these are encoder states, which generate does not take as past_key_values; use "
                "gisting.generate(cache=...)"
            )
        past: Any = self._empty_past(cache_implementation, config, max_cache_len, cache_config or {})
        # With this a patched model checks that the ids in front are gist tokens; generate drops them unread.
        past.gist_mask = self.attention_mask
        if self.num_slots:
            for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
                past.update(keys, values, layer)
        return past

    def encode_inputs(self, tokenizer: GistTokenizer, inputs: Sequence[str | Sequence[Message]]) -> list[list[int]]:
        """Encode what follows the slots for each of ``inputs``, up to where the answer begins.

        After a gist this is :meth:`GistTokenizer.encode_continuations`; after an answer of a chat, its next turn; of
        the negative control of a chat, the conversation without a prompt.

        Args:
            tokenizer: the tokenizer of the model that reads the cache.
            inputs: one text, or list of messages, for each answer.

        Raises:
            GistError: as :meth:`GistTokenizer.encode_continuations`.
        """
        if self.has_answers:
            return tokenizer.encode_next_turns(inputs)
        if self.origin.condition == "negative" and isinstance(tokenizer.template, ChatTemplate):
            # Nothing comes before: a chat without a prompt does not begin with the end of its system message.
            return tokenizer.encode_bare(inputs)
        return tokenizer.encode_continuations(inputs)

    def stock_inputs(
        self, tokenizer: GistTokenizer, inputs: Sequence[str | Sequence[Message]], *, device: Any = None
    ) -> dict[str, Tensor]:
        """Make what stock ``model.generate`` reads along with :meth:`as_past_key_values`.

        An unpatched model with the same weights reads it too::

            given = cache.stock_inputs(tokenizer, [messages])
            model.generate(**given, past_key_values=cache.as_past_key_values())

        Args:
            tokenizer: the tokenizer of the model that reads the cache.
            inputs: B texts, or lists of messages, one for each prompt.
            device: where the tensors are to be; None for the cache's own.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``(B, P + N)``: gist tokens for the slots, padding, the input.

        Raises:
            GistError: the numbers of prompts and inputs differ, the states are an encoder's, or as
                :meth:`encode_inputs`.
        """
        if len(inputs) != len(self):
            raise GistError(
                f"inputs must be one for each of the {len(self)} prompts, got {len(inputs)}; select() repeats"
            )
        if self.last_hidden is not None:
            raise GistError(
                "these are encoder states, from which stock generate does not continue; use gisting.generate"
            )
        return self.columns(tokenizer, self.encode_inputs(tokenizer, inputs), device or self.keys[0].device)

    def columns(
        self, tokenizer: GistTokenizer, continuations: Sequence[Sequence[int]], device: Any
    ) -> dict[str, Tensor]:
        """Lay out ids after the slots as :meth:`stock_inputs` does.

        Settings that look at ids already seen (``repetition_penalty``) must not act on ids that the row's own
        continuation does not hold. So the slots hold the gist id, which is suppressed in every answer, and the padding,
        which would often have the id of the end of sequence, holds the first id of the row's continuation.

        Args:
            tokenizer: the tokenizer of the model that reads the cache.
            continuations: B lists of ids, none empty.
            device: where the tensors are to be.
        """
        ids, is_token = pad_rows(continuations, tokenizer.pad_token_id, left=True)
        ids = torch.where(is_token, ids, torch.tensor([row[0] for row in continuations])[:, None])
        held = self.attention_mask
        return {
            "input_ids": torch.cat([torch.full_like(held, tokenizer.gist_token_id).to(device), ids.to(device)], dim=1),
            "attention_mask": torch.cat([held.to(device), is_token.long().to(device)], dim=1),
        }

    # -- files ---------------------------------------------------------------------------------------------------------

    def is_finite(self) -> bool:
        """Whether every number of the states is finite. Reads from the device once."""
        found = [tensor.isfinite().all() for tensor in self._named().values() if tensor.numel()]
        return not found or bool(torch.stack([one.to(found[0].device) for one in found]).all())

    def save(self, path: str | Path, storage: str | None = None) -> None:
        """Write one safetensors file, completely or not at all (temporary file, fsync, rename).

        Args:
            path: the file. In the folder of a checkpoint its name must not be one of a file of weights, such as
                ``*.safetensors``, because vLLM and other servers load all of these.
            storage: the type in which numbers are stored, one of ``gisting.storage.STORAGES``: ``"float32"``,
                ``"bfloat16"``, ``"float16"``, ``"float8_e4m3"`` or ``"int8"`` (the last two with a scale for each
                prompt and head). None for the states' own dtype, which keeps every bit.

        Raises:
            GistError: the states contain NaN or infinity or exceed the range of the storage, the parts of this cache
                are inconsistent, or the file would lie among the weights of a checkpoint.
            OSError: the file cannot be written.
        """
        check_place(path)
        try:
            self._check()
        except ValueError as error:
            raise GistError(f"this cache could not be loaded again: {error}; compress the prompt") from error
        manifest = {
            "origin": self.origin.identity(),
            **({"checkpoint": self.origin.checkpoint} if self.origin.checkpoint else {}),
            "lengths": self.num_gist_tokens,
            "num_layers": len(self.keys),
            "rotary": None if self.rotary is None else self.rotary.to_dict(),
        }
        if self.has_answers:
            manifest["has_answers"] = True
        if any(self.about):
            manifest["about"] = [about or None for about in self.about]
        write(path, manifest, self._named(), storage)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", *, max_bytes: int = MAX_BYTES) -> GistCache:
        """Read what :meth:`save` wrote, in the dtype that the states had before they were stored.

        Functions that use the cache check that it belongs to their model. The file is memory-mapped, and the states may
        stay in it until they are written to or moved.

        Args:
            path: the file itself, not a symbolic link.
            device: where the states go.
            max_bytes: how many bytes the states may take, because a file can be made to expand when it is read. Up to
                three times as many are allocated at the peak.

        Returns:
            The cache, entirely on one device.

        Raises:
            CacheFormatError: the file is truncated, altered, of a later format, or not a gist cache.
            GistError: the states take more than ``max_bytes``.
            OSError: the file does not exist or cannot be read.
        """  # noqa: DOC501
        manifest, tensors = read(path, max_bytes=max_bytes)
        try:
            cache = cls._from_parts(manifest, tensors)
            cache._check()
        except (KeyError, TypeError, ValueError) as error:
            raise malformed(path, f"{error} is missing" if isinstance(error, KeyError) else error) from error
        return cache.to(device)

    # -- private -------------------------------------------------------------------------------------------------------

    @classmethod
    def _from_parts(cls, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GistCache:
        # Compare with the number of tensors before looping up to a number from the file.
        num_layers, rest = divmod(len(tensors) - ("last_hidden" in tensors), 2)
        if type(manifest["num_layers"]) is not int or (manifest["num_layers"], 0) != (num_layers, rest):
            raise ValueError(f"{len(tensors)} tensors do not make {manifest['num_layers']!r} layers")
        lengths, rotary = manifest["lengths"], manifest.get("rotary")
        if not isinstance(lengths, list) or not all(type(length) is int for length in lengths):
            raise ValueError("lengths must be whole numbers, one for each prompt")
        about = manifest.get("about", [])
        if not isinstance(about, list):
            raise ValueError("about must be a list")
        return cls(
            tuple(tensors[f"keys.{layer}"] for layer in range(num_layers)),
            tuple(tensors[f"values.{layer}"] for layer in range(num_layers)),
            torch.tensor(lengths, dtype=torch.int64),
            CacheOrigin(**manifest["origin"], checkpoint=manifest.get("checkpoint", ""), name=""),
            tensors.get("last_hidden"),
            None if rotary is None else Rotary.from_dict(rotary),
            manifest.get("has_answers") is True,
            tuple(about),
        )

    def _empty_past(
        self,
        implementation: str,
        config: PreTrainedConfig | None,
        max_cache_len: int | None,
        cache_config: Mapping[str, Any],
    ) -> Cache:
        from transformers import DynamicCache, QuantizedCache, StaticCache

        name = f"cache_implementation={implementation!r}"
        if implementation not in _PAST_IMPLEMENTATIONS:
            raise GistError(
                f"cache_implementation must be one of {', '.join(_PAST_IMPLEMENTATIONS)}, got {implementation!r}"
            )
        is_offloaded, is_static = implementation.startswith("offloaded"), implementation.endswith("static")
        if is_offloaded and self.device.type != "cuda":
            raise GistError(f"{name} waits on CUDA streams, the cache is on {self.device}; use 'dynamic' or 'static'")
        if config is None:
            if is_static or implementation == "quantized":
                raise GistError(f"{name} is made for the layers of one model; give config=model.config")
            return DynamicCache(offloading=is_offloaded)
        if is_static:
            if max_cache_len is None or max_cache_len < self.num_slots:
                raise GistError(
                    f"{name} needs max_cache_len, the sum of the cache's {self.num_slots} slots, the input and the new "
                    f"tokens, got {max_cache_len}"
                )
            return StaticCache(config, max_cache_len, offloading=is_offloaded)
        if implementation != "quantized":
            return DynamicCache(config=config, offloading=is_offloaded)
        settings = {"backend": "quanto", **cache_config}
        try:
            past = QuantizedCache(config=config, **settings)
        except (TypeError, ValueError) as error:
            raise GistError(f"{name}, cache_config={dict(cache_config)} is refused by transformers: {error}") from error
        if settings["backend"] == "fp8":
            # The first states, here the gist's, set its scale for good. What follows may be larger.
            layers: list[Any] = past.layers
            for layer in layers:
                layer.fp8_max = layer.fp8_max / _FP8_HEADROOM
        return past

    def _is_held(self) -> Tensor:
        """bool ``(B, P)`` on the CPU, like ``lengths``: the slots that hold a token."""
        return torch.arange(self.num_slots)[None] >= self.num_slots - self.lengths[:, None]

    def _check(self) -> None:
        """Check that the parts are consistent: a file with a correct checksum may still hold anything.

        ``gisting.storage`` checks that all states are finite. Slots before a prompt's gist are not checked, because
        they are never read.

        Raises:
            ValueError: they are not.
        """
        if self.lengths.dim() != 1 or self.lengths.dtype != torch.int64 or not len(self):
            raise ValueError("lengths must be whole numbers, one for each prompt")
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(f"there are keys of {len(self.keys)} layers and values of {len(self.values)}")
        if any(tensor.dim() != 4 for tensor in (*self.keys, *self.values)):
            raise ValueError("keys and values must have four dimensions")
        batch, slots = len(self), self.num_slots
        if self.lengths.amin() < 0 or self.lengths.amax() != slots:
            raise ValueError(f"the largest length must be the number of slots, {slots}")
        for key, value in zip(self.keys, self.values, strict=True):
            if key.shape[:3] != value.shape[:3] or (key.shape[0], key.shape[2]) != (batch, slots):
                raise ValueError("a layer's shape differs from the others")
        if self.last_hidden is not None and (
            self.last_hidden.dim() != 3 or self.last_hidden.shape[:2] != (batch, slots)
        ):
            raise ValueError("the shape of last_hidden does not fit the layers")
        if any(tensor.dtype != self.dtype or not tensor.is_floating_point() for tensor in self._tensors()):
            raise ValueError("all states must have the same floating dtype")
        if not all(isinstance(value, str) for value in asdict(self.origin).values()):
            raise ValueError("origin must be texts")
        if len(self.about) != batch or not all(about is None or isinstance(about, Mapping) for about in self.about):
            raise ValueError("about must be a dictionary or None for each prompt")
        if not self.origin.checkpoint.isprintable():
            raise ValueError("the name of its checkpoint must be printable")
        if self.rotary is not None:
            if len(self.rotary.layers) != len(self.keys):
                raise ValueError(f"rotary has {len(self.rotary.layers)} layers, the states {len(self.keys)}")
            for number, key in zip(self.rotary.layers, self.keys, strict=True):
                if number is not None and 2 * len(self.rotary.frequencies[number]) > key.shape[-1]:
                    raise ValueError(f"rotary rotates more numbers than a head has, {key.shape[-1]}")

    def _named(self) -> dict[str, Tensor]:
        named = {f"keys.{layer}": tensor for layer, tensor in enumerate(self.keys)}
        named |= {f"values.{layer}": tensor for layer, tensor in enumerate(self.values)}
        return named if self.last_hidden is None else named | {"last_hidden": self.last_hidden}

    def _tensors(self) -> list[Tensor]:
        return list(self._named().values())

    def _devices(self) -> list[torch.device]:
        """The device of each layer; a model may be spread over several."""
        return [keys.device for keys in self.keys]

    def _map(self, change: Any, lengths: Tensor) -> GistCache:
        """Apply ``change(tensor, dimension of the slots)`` to every tensor."""
        return replace(
            self,
            keys=tuple(change(tensor, 2) for tensor in self.keys),
            values=tuple(change(tensor, 2) for tensor in self.values),
            lengths=lengths,
            last_hidden=None if self.last_hidden is None else change(self.last_hidden, 1),
        )


def kept_share(about: Any) -> float | None:
    """Return the share of the full prompt's effect that a gist was measured to keep, which ``gisting check`` writes.

    Args:
        about: an item of ``GistCache.about``, also one from a file that says anything.

    Returns:
        ``about["quality"]["kept"]``, or None if it was not measured.
    """
    quality = about.get("quality") if isinstance(about, Mapping) else None
    kept = quality.get("kept") if isinstance(quality, Mapping) else None
    return float(kept) if isinstance(kept, int | float) and not isinstance(kept, bool) else None


def _about_parts(parts: Sequence[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """Say of a chain what is known about its parts; a part may be a chain itself."""
    if not any(parts):
        return None
    return {"parts": [one for part in parts for one in (part["parts"] if part and "parts" in part else [part])]}


def _whole_numbers(rows: Any) -> list[int]:
    """``rows`` as Python integers. A mask has no row numbers, so True and False are refused."""
    try:
        listed = list(rows.tolist() if hasattr(rows, "tolist") else rows)
        numbers = [operator.index(row) for row in listed]
    except TypeError as error:
        raise GistError(f"rows must be whole numbers, in one dimension, got {rows!r}") from error
    if any(isinstance(row, bool) for row in listed):
        raise GistError(
            f"rows must be whole numbers, got True or False in {rows!r}; for a mask give mask.nonzero()[:, 0]"
        )
    return numbers


def _check_together(caches: Sequence[GistCache]) -> Rotary | None:
    """Raise unless the caches have the same origin, dtype and devices. Return how their keys are rotated, if known."""
    if not caches:
        raise GistError("caches is empty; give at least one")
    for place, cache in enumerate(caches):
        if not isinstance(cache, GistCache):
            raise GistError(f"caches[{place}] must be a GistCache, got {type(cache).__name__}")
    first = caches[0]
    for other in caches[1:]:
        if other.origin != first.origin:
            raise CacheMismatchError(
                f"caches belong to different origins, {first.origin} and {other.origin}; compress them again"
            )
        if other.has_answers != first.has_answers:
            raise CacheMismatchError(
                "some caches end with an answer and some with a gist, after which a chat goes on differently; join "
                "conversations of the same kind"
            )
        if other.dtype != first.dtype or other._devices() != first._devices():
            here, there = (", ".join(dict.fromkeys(map(str, cache._devices()))) for cache in (first, other))
            raise CacheMismatchError(
                f"caches are {first.dtype} on {here} and {other.dtype} on {there}; bring them together with .to()"
            )
    known = {cache.rotary for cache in caches} - {None}
    if len(known) > 1:
        raise CacheMismatchError("caches are of one model, but their keys are rotated differently; compress them again")
    return known.pop() if known else None
