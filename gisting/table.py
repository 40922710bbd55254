"""The gists of many prompts in one table on the device, from which batches are gathered by index.

Place in the flow: cache -> **table** -> generation. Joins single caches into tensors of ``(prompts, heads, slots, head
size)``, one for the keys and one for the values of each layer, so that a batch of any size takes one gather of each.
Knows which row a name has; does not depend on files or a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheMismatchError, GistError
from gisting.rotary import Rotary

__all__ = ["GistTable"]

# A row number holds the row in its low bits and, above them, how many prompts had that row before.
_ROW_BITS = 32
_ROW = (1 << _ROW_BITS) - 1
_NUM_SHOWN = 4  # prompts that are named where a table is shown


class GistTable:
    """The states of many prompts, right-aligned in slots, ready to be gathered.

    Prompts may be added and removed at any time, from any thread. A gather sees the table either before or after a
    change, and returns a copy that later changes do not affect. The capacity is doubled when it runs out and never
    shrinks; the space of a removed prompt is reused, under another row number. On an accelerator, all threads must use
    one stream.

    States are copied in one layer at a time: in addition to the given caches, building a table takes the memory of the
    table and of one layer.

    Args:
        caches: the first prompts: a cache, or several of one model, dtype and device; k may differ. They are copied.
        names: one for each prompt; None for their numbers, ``"0"``, ``"1"``, ...
        device: where to place the table; None for the device of the caches.
        dtype: dtype of the states; None for that of the caches.

    Raises:
        GistError: there is no cache, or names are missing or repeated.
        CacheMismatchError: the caches do not belong together.
    """

    def __init__(
        self,
        caches: GistCache | Sequence[GistCache],
        names: Iterable[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        caches = [caches] if isinstance(caches, GistCache) else list(caches)
        if not caches:
            raise GistError("caches is empty; give at least one")
        self._lock = Lock()
        first = caches[0]
        # The name of one prompt is not the name of another.
        self._origin = replace(first.origin, name="")
        self._rotary, self._num_layers = first.rotary, len(first.keys)
        # Keys of all layers, values of all layers, last hidden states; each (rows, ..., slots, size).
        self._states = [
            tensor.new_empty((0, *tensor.shape[1:-2], 0, tensor.shape[-1]), device=device, dtype=dtype)
            for tensor in _states_of(first)
        ]
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._is_held = torch.zeros(0, dtype=torch.bool)
        # How many prompts were removed from each row.
        self._generations = torch.zeros(0, dtype=torch.int64)
        self._about: list[Mapping[str, Any] | None] = []
        self._rows: dict[str, int] = {}
        self._shown: dict[str, str] = {}  # names with the days on which they were compressed, of caches from a store
        num_prompts = sum(map(len, caches))
        self._put(caches, [str(number) for number in range(num_prompts)] if names is None else names, first)

    # -- properties ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    @property
    def names(self) -> list[str]:
        """The names of the prompts, in the order of their row numbers."""
        with self._lock:
            return sorted(self._rows, key=self._rows.__getitem__)

    @property
    def num_bytes(self) -> int:
        """Bytes of all states, including unused capacity."""
        with self._lock:
            return sum(tensor.numel() * tensor.element_size() for tensor in self._states)

    @property
    def origin(self) -> CacheOrigin:
        """What the states belong to."""
        return self._origin

    @property
    def rotary(self) -> Rotary | None:
        """How the keys are rotated, as in :class:`GistCache`."""
        return self._rotary

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all states."""
        return self._states[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the states."""
        return self._states[0].device

    def __repr__(self) -> str:
        names = self.names
        shown = ", ".join(self._labels(names[:_NUM_SHOWN]) + ["..."] * (len(names) > _NUM_SHOWN))
        return (
            f"GistTable({len(names)} prompts{shown and f' ({shown})'}, {self._num_layers} layers, {self.num_bytes} "
            f"bytes, {self.dtype}, {self.device}, made {self._origin.maker})"
        )

    # -- gathering -----------------------------------------------------------------------------------------------------

    def rows_of(self, names: Iterable[str]) -> Tensor:
        """Return the row numbers of the prompts ``names``, int64 ``(B,)`` on the CPU.

        A row number belongs to one prompt forever. A prompt that reuses the space of a removed one gets another number,
        so :meth:`gather` refuses a number of the removed one instead of returning a different prompt. Prompts that
        reuse no space are numbered 0, 1, ... in the order in which they were added.

        Raises:
            GistError: there is no such prompt, or no name at all.
        """
        names = _listed("names", names)
        with self._lock:
            return self._rows_of(names)

    def gather(self, rows: Iterable[int] | Iterable[str] | Tensor) -> GistCache:
        """Return the prompts of these rows as a batch, in this order. A row may occur more than once.

        Args:
            rows: B names, or B row numbers, which may be an integer tensor ``(B,)``. A tensor on an accelerator is read
                back once, to check it.

        Returns:
            A copy of their states, in as many slots as the largest k among them.

        Raises:
            GistError: there is no such prompt or it was removed, or ``rows`` is empty, unordered, or holds something
                else.
        """
        given = rows if isinstance(rows, Tensor) else _listed("rows", rows)
        with self._lock:
            found = _as_numbers(given) if isinstance(given, Tensor) or not _are_texts(given) else self._rows_of(given)
            where = self._places(found)
            lengths = self._lengths[where]
            num_slots = int(lengths.max())
            if isinstance(given, Tensor) and given.device == self.device:
                index = given.long() & _ROW
            else:
                index = where.to(self.device)
            used = [tensor.narrow(-2, tensor.shape[-2] - num_slots, num_slots) for tensor in self._states]
            gathered = self._cache([tensor.index_select(0, index) for tensor in used], lengths)
            cache = replace(gathered, about=tuple(self._about[row] for row in where.tolist()))
        if isinstance(given, Tensor) or len({*given}) > 1 or not isinstance(given[0], str):
            return cache
        return replace(cache, origin=replace(cache.origin, name=self._labels(given[:1])[0]))

    # -- changing ------------------------------------------------------------------------------------------------------

    def add(self, cache: GistCache, names: Iterable[str]) -> Tensor:
        """Add prompts.

        Args:
            cache: N prompts, of any k. They are copied.
            names: one for each, not yet in the table.

        Returns:
            Their row numbers, int64 ``(N,)`` on the CPU.

        Raises:
            GistError: a name is taken, or there are not as many names as prompts.
            CacheMismatchError: the cache is of another model, dtype or device than the table.
        """
        return self._put([cache], names)

    def remove(self, names: Iterable[str]) -> None:
        """Remove the prompts ``names``. Later prompts reuse their space, but not their row numbers.

        Raises:
            GistError: there is no such prompt, or a name is given twice; then nothing is removed.
        """
        names = _checked(names)
        with self._lock:
            where = self._rows_of(names) & _ROW
            self._is_held[where] = False
            self._generations[where] += 1
            for name in names:
                del self._rows[name]
                self._shown.pop(name, None)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _put(self, caches: Sequence[GistCache], names: Iterable[str], like: GistCache | None = None) -> Tensor:
        """Copy caches into the table. They must belong together, and to ``like`` or, if it is None, to the table."""
        names = _checked(names)
        num_prompts = sum(map(len, caches))
        if len(names) != num_prompts:
            raise GistError(f"names must be one for each of the {num_prompts} prompts, got {len(names)}")
        # The table is written in place, which is not allowed for tensors that were made in inference mode.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for name in names:
                if name in self._rows:
                    raise GistError(f"{name!r} is already in the table; remove it first, or choose another name")
            states = [_states_of(cache) for cache in caches]
            if any(_sizes(parts) != _sizes(self._states) for parts in states):
                raise CacheMismatchError(
                    f"caches differ in layers, heads or sizes from the table, which was made {self._origin.maker}; "
                    "compress the prompts again"
                )
            like = self._cache(self._states, self._lengths) if like is None else like
            rotary = GistCache.cat([_emptied(cache) for cache in (like, *caches)]).rotary
            self._make_room(len(names), max(self._states[0].shape[-2], *(cache.num_slots for cache in caches)))
            where = (~self._is_held).nonzero()[: len(names), 0]
            index = where.to(self.device)
            for tensor, parts in zip(self._states, zip(*states, strict=True), strict=True):
                joined = _joined(parts, tensor.shape[-2])
                tensor.index_copy_(0, index, joined.to(tensor.device, tensor.dtype))
            self._lengths[where] = torch.cat([cache.lengths for cache in caches])
            for row, about in zip(where.tolist(), (one for cache in caches for one in cache.about), strict=True):
                self._about[row] = about
            self._is_held[where] = True
            self._rotary = rotary
            rows = self._generations[where] << _ROW_BITS | where
            self._rows.update(zip(names, rows.tolist(), strict=True))
            origins = [cache.origin for cache in caches for _ in range(len(cache))]
            self._shown.update({name: origin.name for name, origin in zip(names, origins, strict=True) if origin.name})
            return rows

    def _labels(self, names: Sequence[str]) -> list[str]:
        return [self._shown.get(name, repr(name)) for name in names]

    def _rows_of(self, names: Sequence[Any]) -> Tensor:
        if not names:
            raise GistError("names must be a list of at least one text, got []")
        if not all(isinstance(name, str) for name in names):
            raise GistError(f"names must be texts, got {names!r:.100}")
        try:
            return torch.tensor([self._rows[name] for name in names])
        except KeyError as error:
            raise GistError(
                f"{error.args[0]!r} is not in the table of {len(self._rows)} prompts; add it: table.add(cache, names)"
            ) from error

    def _places(self, rows: Tensor) -> Tensor:
        """Return the rows of these row numbers, all of which must be in the table."""
        where = rows & _ROW
        is_there = where < len(self._is_held)
        where = where.where(is_there, 0)
        if len(self._is_held):
            is_there &= self._is_held[where] & (self._generations[where] << _ROW_BITS | where == rows)
        if not is_there.all():
            raise GistError(
                f"rows must be numbers of prompts in the table; {rows[~is_there][0]} was removed or never added; get "
                "the row numbers with table.rows_of(names)"
            )
        return where

    def _make_room(self, num_rows: int, num_slots: int) -> None:
        """Grow completely or not at all: if memory runs out, nothing has changed."""
        capacity, slots = self._states[0].shape[0], self._states[0].shape[-2]
        missing = len(self._rows) + num_rows - capacity
        more = max(missing, capacity) if missing > 0 else 0
        if more or num_slots > slots:
            states = []
            for tensor in self._states:
                larger = tensor.new_zeros(capacity + more, *tensor.shape[1:-2], num_slots, tensor.shape[-1])
                larger[:capacity].narrow(-2, num_slots - slots, slots).copy_(tensor)
                states.append(larger)
            self._states = states
            self._lengths = torch.cat([self._lengths, self._lengths.new_zeros(more)])
            self._is_held = torch.cat([self._is_held, self._is_held.new_zeros(more)])
            self._generations = torch.cat([self._generations, self._generations.new_zeros(more)])
            self._about += [None] * more

    def _cache(self, states: list[Tensor], lengths: Tensor) -> GistCache:
        layers = self._num_layers
        return GistCache(
            tuple(states[:layers]),
            tuple(states[layers : 2 * layers]),
            lengths,
            self._origin,
            states[2 * layers] if len(states) > 2 * layers else None,
            self._rotary,
        )


def _states_of(cache: GistCache) -> list[Tensor]:
    return [*cache.keys, *cache.values, *([] if cache.last_hidden is None else [cache.last_hidden])]


def _emptied(cache: GistCache) -> GistCache:
    """Return a cache without prompts and slots, which :meth:`GistCache.cat` can still compare with others."""
    states = [tensor[:0].narrow(-2, 0, 0) for tensor in _states_of(cache)]
    num_layers = len(cache.keys)
    return replace(
        cache,
        keys=tuple(states[:num_layers]),
        values=tuple(states[num_layers : 2 * num_layers]),
        lengths=cache.lengths[:0],
        last_hidden=None if cache.last_hidden is None else states[-1],
        about=(),
    )


def _joined(parts: Sequence[Tensor], num_slots: int) -> Tensor:
    """Stack ``(N_i, ..., P_i, size)``, right-aligned in ``num_slots``. A single one that fits is returned unchanged."""
    if len(parts) == 1 and parts[0].shape[-2] == num_slots:
        return parts[0]
    joined = parts[0].new_zeros(sum(map(len, parts)), *parts[0].shape[1:-2], num_slots, parts[0].shape[-1])
    for place, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        place.narrow(-2, num_slots - part.shape[-2], part.shape[-2]).copy_(part)
    return joined


def _sizes(states: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes without the numbers of prompts and slots."""
    return [(*tensor.shape[1:-2], tensor.shape[-1]) for tensor in states]


def _listed(argument: str, given: Any) -> list[Any]:
    """Return an ordered argument as a list."""
    if isinstance(given, str | bytes):
        raise GistError(f"{argument} must be a list, got one text; put it in a list")
    if isinstance(given, Set | Mapping) or not isinstance(given, Iterable):
        raise GistError(f"{argument} must be a list or another ordered collection, got {type(given).__name__}")
    found = given.tolist() if hasattr(given, "tolist") else list(given)  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(found, list):
        raise GistError(f"{argument} must be a list, got one value; put it in a list")
    return found


def _are_texts(rows: Sequence[Any]) -> bool:
    if len({isinstance(row, str) for row in rows}) > 1:
        raise GistError(f"rows must be either all row numbers or all names, got {rows!r:.100}")
    return bool(rows) and isinstance(rows[0], str)


def _as_numbers(rows: Any) -> Tensor:
    """Return the row numbers as int64 ``(B,)`` on the CPU."""
    try:
        found = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise GistError(f"rows must be row numbers or names, one for each prompt ({error})") from error
    if found.dim() == 1 and not len(found):
        raise GistError("rows is empty; name at least one prompt")
    if found.dim() != 1 or found.dtype not in (torch.int32, torch.int64):
        raise GistError(
            f"rows must be row numbers or names, one for each prompt, got {found.dtype} of shape {tuple(found.shape)}"
        )
    return found.cpu().long()


def _checked(names: Iterable[str]) -> list[str]:
    found = _listed("names", names)
    seen: set[str] = set()
    for name in found:
        if not isinstance(name, str):
            raise GistError(f"names must be texts, got {name!r}")
        if name in seen:
            raise GistError(f"names has {name!r} twice; give each prompt a different name")
        seen.add(name)
    return found
