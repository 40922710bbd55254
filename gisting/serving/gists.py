"""What a server must know of gists, whichever server it is: which may be asked for, which are in memory, whose heads.

Place in the flow: store -> **serving** -> the server's own cache. Finds entries by name as the store has them now, says
in words why one is refused, and keeps what was loaded within a number of bytes. Knows nothing of vLLM nor HTTP.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gisting.cache import GistCache
from gisting.errors import CacheFormatError, GistError, StoreError
from gisting.store.index import Index, StoreEntry, canonical
from gisting.store.objects import Objects
from gisting.store.reading import load_entry
from gisting.tokens import GistTokenizer

__all__ = [
    "GistRefusedError",
    "LoadedGists",
    "Served",
    "StoredGists",
    "fingerprints",
    "gist_name",
    "head_shard",
    "salt_of",
    "slots_of",
    "with_placeholders",
]

#: What else a request's ``kv_transfer_params`` may hold beside ``"gist"``: the ids of a chat, which vLLM takes out.
_BESIDE = {"prompt_token_ids"}


class GistRefusedError(GistError):
    """A request that cannot be answered with the gist it names.

    Args:
        message: why, in words.
        status: the HTTP status that says so: 404 for a name that is not there, else 400.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Served:
    """What a server runs, as far as gists must fit it.

    Args:
        models: fingerprints of the checkpoint: in its own dtype and, where it differs, in the server's.
        tokenizer: fingerprint of the tokenizer with its template.
        template: name of the template.
        gist_token_id: the id that holds the place of a gist token.
    """

    models: tuple[str, ...]
    tokenizer: str
    template: str
    gist_token_id: int

    @classmethod
    def of_checkpoint(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype,
        *,
        revision: str | None = None,
        fingerprint: str | Sequence[str] | None = None,
        tokenizer: GistTokenizer | None = None,
    ) -> Served:
        """What a server has loaded from a checkpoint that was saved patched.

        The weights are read a second time, by transformers on the CPU, because a server holds them in another layout;
        they are let go of again. With ``fingerprint`` nothing is read but the tokenizer.

        Args:
            name_or_path: a directory, or a repository on the Hugging Face hub.
            dtype: what the server computes in.
            revision: branch, tag or commit on the hub.
            fingerprint: that of the checkpoint, or those in several dtypes, from whoever started the server.
            tokenizer: the checkpoint's, where it is loaded already.

        Raises:
            GistError: there is no such checkpoint, or it was not saved with a gist tokenizer.
            UnsupportedModelError: the model cannot be gisted.
        """
        if tokenizer is None:
            tokenizer = GistTokenizer.from_pretrained(name_or_path, revision=revision)
        known = [fingerprint] if isinstance(fingerprint, str) else list(fingerprint or ())
        models = tuple(known) or fingerprints(name_or_path, [dtype], revision=revision)
        return cls(models, tokenizer.fingerprint, tokenizer.template.name, tokenizer.gist_token_id)


class StoredGists:
    """The gists of a store as they are now: what other processes put in or remove shows in the next request.

    Args:
        path: the directory of a store, which is only read.
        served: what a gist must belong to; None where somebody else has checked that.

    Raises:
        StoreError: the directory is no store.
        CacheFormatError: its index is damaged.
    """

    def __init__(self, path: str | Path, served: Served | None = None) -> None:
        self.path = Path(path).absolute()
        self.served = served
        self._index = Index(self.path, is_read_only=True)
        self._objects = Objects(self.path)

    def find(self, name: str) -> StoreEntry:
        """The entry of a ``name`` or key, if requests may ask for it.

        Raises:
            GistRefusedError: there is no such entry (404), or it belongs to another model or tokenizer (400).
            CacheFormatError: the index is damaged.
        """
        try:
            wanted = canonical(name)
        except StoreError as error:
            raise GistRefusedError(f"gist: {error}") from error
        entry = self._index.find([wanted]).get(wanted)
        if entry is None:
            raise GistRefusedError(
                f"gist {name!r:.100} is not in the store of this server; names are as `gisting store list` shows them",
                status=404,
            )
        served = self.served
        if served is not None and entry.model not in served.models:
            raise GistRefusedError(
                f"gist {name!r:.100} was made for {entry.model}, this server runs {' or '.join(served.models)}; "
                "compress the prompt with this model"
            )
        if served is not None and entry.tokenizer != served.tokenizer:
            raise GistRefusedError(
                f"gist {name!r:.100} was made with tokenizer {entry.tokenizer} (template {entry.template}), this "
                f"server has {served.tokenizer} (template {served.template}); compress the prompt again"
            )
        if entry.num_gist_tokens < 1:
            raise GistRefusedError(f"gist {name!r:.100} holds no token ({entry.condition}); there is nothing to serve")
        return entry

    def load(self, entry: StoreEntry) -> GistCache:
        """The states of ``entry``, on the CPU, in the dtype that they had before they were stored.

        Raises:
            FileNotFoundError: it was removed meanwhile.
            CacheFormatError: its file is damaged, or another than when the entry was found.
        """
        path = self._objects.path(entry.key)
        cache = load_entry(path, entry)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry.sha256:  # by which the states are kept and their blocks are found
            raise CacheFormatError(f"{path} is altered: its checksum is {found}, its entry says {entry.sha256}")
        return cache


class LoadedGists:
    """Prepared states by version, as many as a number of bytes allows; those used longest ago go first.

    For one thread. What is larger than all there may be is used, and not held.

    Args:
        max_bytes: what they may take together; 0 holds none.

    Raises:
        GistError: ``max_bytes`` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise GistError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._held: OrderedDict[str, list[tuple[Tensor, Tensor]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, version: str) -> bool:
        return version in self._held

    def get(self, version: str, make: Callable[[], list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
        """What is held under a version, or is made now.

        Args:
            version: of a name, changes with what it stands for.
            make: what makes the states where they are not held.

        Returns:
            Keys and values of each layer, in the shape and dtype that ``make`` gives them.
        """
        found = self._held.get(version)
        if found is not None:
            self._held.move_to_end(version)
            return found
        made = make()
        size = _num_bytes(made)
        if size <= self.max_bytes:
            self._held[version] = made
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, dropped = self._held.popitem(last=False)
                self.num_bytes -= _num_bytes(dropped)
        return made


def gist_name(params: Mapping[str, Any] | None) -> str | None:
    """The gist that ``params``, a request's ``kv_transfer_params``, name, or None.

    Raises:
        GistRefusedError: it is no text, or there is something beside it that would have another cache loaded as well.
    """
    if not isinstance(params, Mapping) or "gist" not in params:
        return None
    name = params["gist"]
    if not isinstance(name, str):
        raise GistRefusedError(f"kv_transfer_params['gist'] must be the name of a gist, got {name!r:.100}")
    if others := sorted(map(str, params.keys() - {"gist"} - _BESIDE)):
        raise GistRefusedError(f"kv_transfer_params must hold 'gist' alone, got {', '.join(others)} as well")
    return name


def with_placeholders(ids: Sequence[int], num_gist_tokens: int, gist_token_id: int) -> list[int]:
    """Ids behind a gist, with k places for it in front; those may be there already.

    Args:
        ids: of what stands behind the gist, or of both.
        num_gist_tokens: k of the gist.
        gist_token_id: what holds a place.

    Raises:
        GistRefusedError: there are other than k places, one of them further behind, or nothing behind the gist.
    """
    ids = list(ids)
    found = next((place for place, token in enumerate(ids) if token != gist_token_id), len(ids))
    if found not in (0, num_gist_tokens):
        raise GistRefusedError(
            f"prompt has {found} gist tokens in front, the gist has {num_gist_tokens}; leave them out, they are put in "
            "by the server"
        )
    if gist_token_id in ids[found:]:
        raise GistRefusedError(
            f"prompt has a gist token ({gist_token_id}) at {found + ids[found:].index(gist_token_id)}; gist tokens "
            "stand in front of everything else"
        )
    if found == len(ids):
        raise GistRefusedError("prompt has nothing behind the gist; give at least one token to answer")
    return [gist_token_id] * num_gist_tokens + ids[found:]


def salt_of(entry: StoreEntry, secret: str, salt: str | None) -> str:
    """What a request's blocks are hashed with, so that none is ever taken for another prompt's.

    Placeholders look the same for every prompt. The content's hash tells them apart, also where a name has moved to
    another prompt; the secret of the process keeps others from spelling the salt; a salt that the request brings counts
    as well.

    Args:
        entry: the gist.
        secret: of this process.
        salt: the request's own ``cache_salt``, or None.
    """
    return "\n".join(("gist", secret, entry.sha256, salt or ""))


def head_shard(num_heads: int, rank: int, size: int) -> range:
    """The key heads of one process of a tensor parallel group, as vLLM and Megatron place them.

    ``num_heads // size`` heads each; where there are fewer heads than processes, neighbours hold the same one.

    Args:
        num_heads: key heads of the model.
        rank: number of the process in its group.
        size: processes of the group.

    Raises:
        GistError: neither number divides the other.
    """
    if num_heads % size and size % num_heads:
        raise GistError(f"{num_heads} key heads cannot be shared by {size} tensor parallel processes")
    if num_heads >= size:
        each = num_heads // size
        return range(rank * each, (rank + 1) * each)
    head = rank // (size // num_heads)
    return range(head, head + 1)


def slots_of(block_ids: Sequence[int], block_size: int, first: int, end: int) -> Tensor:
    """Where positions ``first .. end - 1`` lie in a paged cache: int64 ``(end - first,)``.

    Args:
        block_ids: the sequence's blocks, in order.
        block_size: positions in a block.
        first: first position.
        end: behind the last one.
    """
    positions = torch.arange(first, end)
    blocks = torch.tensor(block_ids, dtype=torch.int64)[positions // block_size]
    return blocks * block_size + positions % block_size


def fingerprints(
    name_or_path: str | Path, dtypes: Sequence[torch.dtype], *, revision: str | None = None
) -> tuple[str, ...]:
    """Fingerprints of a checkpoint: in its own dtype, then in each of these that is another. Reads its weights.

    Args:
        name_or_path: a directory, or a repository on the hub.
        dtypes: in which else it may be served.
        revision: branch, tag or commit on the hub.

    Raises:
        GistError: there is no such checkpoint.
        UnsupportedModelError: the model cannot be gisted.
    """
    from gisting.models.fingerprint import fingerprint
    from gisting.models.load import load
    from gisting.models.weights import input_weight

    source = {} if revision is None else {"revision": revision}
    model, _ = load(name_or_path, dtype="auto", **source)
    found, own = [fingerprint(model)], input_weight(model).dtype
    for dtype in dtypes:
        if dtype != own:
            del model
            model, _ = load(name_or_path, dtype=dtype, **source)
            found.append(fingerprint(model))
    return tuple(dict.fromkeys(found))


def _num_bytes(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in layers for tensor in pair)
