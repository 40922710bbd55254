"""Many prompts' gists in one table on the device, from which a batch is handed out by index.

Place in the flow: cache -> **table** -> generation. Joins single caches into tensors of ``(prompts, heads, slots, head
size)``, one for the keys and one for the values of each layer, so that a batch is one gather of each, whatever its
size. Knows which row a name has; knows no files and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheMismatchError, GistError
from gisting.rotary import Rotary

__all__ = ["GistTable"]


class GistTable:
    """The states of many prompts, right-aligned in slots, ready to be gathered.

    Prompts come and go while it is in use, from any thread: a gather sees the table before a change or after it, and
    what it returned is a copy that no later change reaches. Room is doubled when it runs out and never given back; the
    row of a removed prompt is used again. On an accelerator all threads are to use one stream.

    Args:
        cache: the first prompts. It is copied.
        names: one for each of them; None for their numbers, ``"0"``, ``"1"``, ...
        device: where the table lies; None for where the cache does.
        dtype: of the states; None for that of the cache.

    Raises:
        GistError: names are missing or repeat.
    """

    def __init__(
        self,
        cache: GistCache,
        names: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        cache = cache.to(device, dtype)
        self._lock = Lock()
        self._origin, self._rotary, self._num_layers = cache.origin, cache.rotary, len(cache.keys)
        # Keys of all layers, values of all layers, last hidden states; each (rows, ..., slots, size).
        self._states = [tensor.new_empty(0, *tensor.shape[1:-2], 0, tensor.shape[-1]) for tensor in _states_of(cache)]
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._is_held = torch.zeros(0, dtype=torch.bool)
        self._rows: dict[str, int] = {}
        self.add(cache, [str(number) for number in range(len(cache))] if names is None else names)

    # -- what it is ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many prompts it holds."""
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    @property
    def names(self) -> list[str]:
        """The names of its prompts, in the order of their rows."""
        with self._lock:
            return sorted(self._rows, key=self._rows.__getitem__)

    @property
    def num_bytes(self) -> int:
        """Bytes of all states, room that is not in use among them."""
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
        """Where the states lie."""
        return self._states[0].device

    def __repr__(self) -> str:
        return (
            f"GistTable({len(self)} prompts, {self._num_layers} layers, {self.num_bytes} bytes, {self.dtype}, "
            f"{self.device}, model {self._origin.model})"
        )

    # -- handing out ---------------------------------------------------------------------------------------------------

    def rows_of(self, names: Sequence[str]) -> Tensor:
        """The rows of these prompts, int64 on the CPU. A row stays a prompt's own until that is removed.

        Raises:
            GistError: there is no such prompt, or no name at all.
        """
        with self._lock:
            return self._rows_of(names)

    def gather(self, rows: Sequence[int] | Sequence[str] | Tensor) -> GistCache:
        """A batch: the prompts of these rows, in this order; a row may come more than once.

        Args:
            rows: B names, or B row numbers. A tensor of them on an accelerator is read back once, to check it.

        Returns:
            A copy of their states in as many slots as the largest k among them takes.

        Raises:
            GistError: there is no such prompt, ``rows`` is empty, or holds something else.
        """
        with self._lock:
            where = self._find(rows)
            lengths = self._lengths[where]
            num_slots = int(lengths.max())
            if not isinstance(rows, Tensor) or rows.device != self.device:
                rows = where.to(self.device)
            used = [tensor.narrow(-2, tensor.shape[-2] - num_slots, num_slots) for tensor in self._states]
            return self._cache([tensor.index_select(0, rows) for tensor in used], lengths)

    # -- changing it ---------------------------------------------------------------------------------------------------

    def add(self, cache: GistCache, names: Sequence[str]) -> Tensor:
        """Put more prompts in.

        Args:
            cache: N prompts, of any k. They are copied.
            names: one for each, none of which is in the table.

        Returns:
            Their rows, int64 ``(N,)`` on the CPU.

        Raises:
            GistError: a name is taken, or there are not as many names as prompts.
            CacheMismatchError: the cache is of another model, dtype or device than the table.
        """
        names = _checked(names)
        if len(names) != len(cache):
            raise GistError(f"names must be one for each of the {len(cache)} prompts, got {len(names)}")
        # In place below: tensors made in inference mode could not be written outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for name in names:
                if name in self._rows:
                    raise GistError(f"{name!r} is in the table already; remove it first, or take another name")
            states = [tensor[:0] for tensor in self._states]
            if _sizes(states) != _sizes(_states_of(cache)):
                raise CacheMismatchError(
                    f"cache has other layers, heads or sizes than the table of {self._origin.model}; compress the "
                    "prompts again"
                )
            new = GistCache.cat([self._cache(states, self._lengths[:0]), cache])
            self._make_room(len(names), new.num_slots)
            rows = (~self._is_held).nonzero()[: len(names), 0]
            where = rows.to(self.device)
            for tensor, part in zip(self._states, _states_of(new), strict=True):
                tensor.index_copy_(0, where, part)
            self._lengths[rows] = new.lengths
            self._is_held[rows] = True
            self._rotary = new.rotary
            self._rows.update(zip(names, rows.tolist(), strict=True))
            return rows

    def remove(self, names: Sequence[str]) -> None:
        """Take prompts out. Their rows are used again by prompts that come.

        Raises:
            GistError: there is no such prompt, or a name comes twice; then none is removed.
        """
        names = _checked(names)
        with self._lock:
            self._is_held[self._rows_of(names)] = False
            for name in names:
                del self._rows[name]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _rows_of(self, names: Sequence[Any]) -> Tensor:
        if isinstance(names, str) or not names:
            raise GistError(f"names must be a list of at least one text, got {names!r}")
        try:
            return torch.tensor([self._rows[name] for name in names])
        except KeyError as error:
            raise GistError(
                f"{error.args[0]!r} is not in the table of {len(self._rows)} prompts; add it: table.add(cache, names)"
            ) from error

    def _find(self, rows: Sequence[int] | Sequence[str] | Tensor) -> Tensor:
        """Row numbers on the CPU, each of which holds a prompt."""
        if isinstance(rows, str):
            raise GistError("rows must be a list, got one text; put it in a list")
        if not isinstance(rows, Tensor) and len(rows) and isinstance(rows[0], str):
            return self._rows_of(rows)
        found = _as_numbers(rows)
        is_there = (found >= 0) & (found < len(self._is_held))
        is_there &= self._is_held[found.where(is_there, 0)] if len(self._is_held) else False
        if not is_there.all():
            raise GistError(
                f"rows must be of prompts in the table, whose last row is {len(self._is_held) - 1}; "
                f"{found[~is_there][0]} is none"
            )
        return found

    def _make_room(self, num_rows: int, num_slots: int) -> None:
        """Whole or not at all: nothing has changed where memory runs out."""
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


def _sizes(states: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Everything but the numbers of prompts and slots."""
    return [(*tensor.shape[1:-2], tensor.shape[-1]) for tensor in states]


def _as_numbers(rows: Any) -> Tensor:
    """int64 ``(B,)`` on the CPU."""
    try:
        found = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GistError(f"rows must be row numbers or names, all of one kind ({error})") from error
    if found.dim() == 1 and not len(found):
        raise GistError("rows is empty; name at least one prompt")
    if found.dim() != 1 or found.dtype not in (torch.int32, torch.int64):
        raise GistError(
            f"rows must be row numbers or names, one for each prompt, got {found.dtype} of shape {tuple(found.shape)}"
        )
    return found.cpu().long()


def _checked(names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise GistError(f"names must be a list of texts, got {names!r}; put it in a list")
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str):
            raise GistError(f"names must be texts, got {name!r}")
        if name in seen:
            raise GistError(f"names hold {name!r} twice; each prompt has a name of its own")
        seen.add(name)
    return list(names)
