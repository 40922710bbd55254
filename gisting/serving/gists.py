"""What any server must know about gists: which ones requests may name, and how they fit into its cache.

Place in the flow: store -> **serving** -> the server's own cache. Finds entries by name as the store has them now, and
explains why one is refused. Does not depend on vLLM or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gisting.cache import CacheOrigin, GistCache
from gisting.errors import GistError, StoreError
from gisting.store.index import Index, StoreEntry, canonical, prompt_digest
from gisting.store.objects import Objects
from gisting.store.reading import about_of, load_entry
from gisting.tokens import GistTokenizer, read_tokenizer

__all__ = [
    "GistRefusedError",
    "Served",
    "StoredGists",
    "fingerprints",
    "gist_name",
    "head_shard",
    "read_gist_tokenizer",
    "salt_of",
    "slots_of",
    "with_placeholders",
]

#: What a request's ``kv_transfer_params`` may hold in addition to ``"gist"``: the ids of a chat, which vLLM takes out.
_ALSO_ALLOWED = {"prompt_token_ids"}


class GistRefusedError(GistError):
    """A request cannot be answered with the gist it names.

    Args:
        message: why not.
        status: the HTTP status to answer with: 404 if there is no such gist, 413 if the request is too large, 500 if
            the fault is the server's, otherwise 400.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Served:
    """The model and tokenizer that a server runs, which gists must match.

    Args:
        models: fingerprints of the checkpoint, in its own dtype and, if that differs, in the server's.
        tokenizer: fingerprint of the tokenizer with its template.
        template: name of the template.
        gist_token_id: the id of the placeholder for a gist token.
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
        """Describe what a server has loaded from a checkpoint.

        The weights are read a second time, by transformers on the CPU, because a server holds them in another layout.
        They are released afterwards. With ``fingerprint`` only the tokenizer is read.

        Args:
            name_or_path: a directory, or a repository on the Hugging Face hub.
            dtype: the dtype that the server computes in.
            revision: branch, tag or commit on the hub.
            fingerprint: the fingerprint of the checkpoint, or its fingerprints in several dtypes, if already known.
            tokenizer: the gist tokenizer, if already loaded; None for the one that the checkpoint was saved with.

        Raises:
            GistError: there is no such checkpoint, or no ``tokenizer`` is given and it was saved without one.
            UnsupportedModelError: the model cannot be gisted.
        """
        if tokenizer is None:
            tokenizer = GistTokenizer.from_pretrained(name_or_path, revision=revision)
        known = [fingerprint] if isinstance(fingerprint, str) else list(fingerprint or ())
        models = tuple(known) or fingerprints(name_or_path, [dtype], revision=revision)
        return cls(models, tokenizer.fingerprint, tokenizer.template.name, tokenizer.gist_token_id)


class StoredGists:
    """The gists of a store as it is now. What other processes put in or remove shows in the next request.

    Args:
        path: the directory of a store, which is only read.
        served: what a gist must match; None if this has been checked elsewhere.

    Raises:
        StoreError: the directory is not a store.
        CacheFormatError: its index is damaged.
    """

    def __init__(self, path: str | Path, served: Served | None = None) -> None:
        self.path = Path(path).absolute()
        self.served = served
        self._index = Index(self.path, is_read_only=True)
        self._objects = Objects(self.path)

    def find(self, name: str) -> StoreEntry:
        """Return the entry of a ``name`` or key, if requests may name it.

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
                f"gist {name!r:.100} is not in the store of this server; `gisting store list` shows the names",
                status=404,
            )
        served = self.served
        if served is not None and entry.model not in served.models:
            raise GistRefusedError(
                f"gist {name!r:.100} of {entry.created[:10]} was made {self._maker(entry)}, but this server runs "
                f"{' or '.join(served.models)}; "
                "compress the prompt with this model"
            )
        if served is not None and entry.tokenizer != served.tokenizer:
            raise GistRefusedError(
                f"gist {name!r:.100} of {entry.created[:10]} was made with tokenizer {entry.tokenizer} (template "
                f"{entry.template}), but this server has {served.tokenizer} (template {served.template}); compress the "
                "prompt again"
            )
        if entry.num_gist_tokens < 1:
            raise GistRefusedError(f"gist {name!r:.100} has no tokens ({entry.condition}); there is nothing to serve")
        return entry

    def is_made_of(self, entry: StoreEntry, prompt: str) -> bool:
        """Return whether ``entry`` was compressed from this text.

        Raises:
            GistRefusedError: its file does not say of which.
        """
        made_of = (about_of(self._objects.path(entry.key)) or {}).get("prompt_sha256")
        if made_of is None:
            raise GistRefusedError(
                f"gist {entry.name or entry.key!r:.100} does not say what it was made of, so it cannot be told whether "
                "it was made of these tools; compress it again with get_or_compress or `gisting compress --store`, or "
                "send the request without tools"
            )
        return made_of == prompt_digest(prompt)

    def _maker(self, entry: StoreEntry) -> str:
        checkpoint = entry.checkpoint
        return CacheOrigin(entry.model, entry.tokenizer, entry.template, entry.condition, checkpoint).maker

    def entries(self) -> list[StoreEntry]:
        """Return all entries of the store, as :meth:`gisting.GistStore.list` does.

        Raises:
            CacheFormatError: the index is damaged.
        """
        return self._index.all()

    def load(self, entry: StoreEntry) -> GistCache:
        """Load the states of ``entry`` on the CPU, in the dtype that they had before they were stored.

        Raises:
            FileNotFoundError: it was removed meanwhile.
            CacheFormatError: its file is damaged, or was replaced after the entry was found.
        """
        # Prepared states and blocks of the paged cache are found by the file's checksum, which this compares.
        return load_entry(self._objects.path(entry.key), entry)


def read_gist_tokenizer(
    name_or_path: str | Path, settings: Mapping[str, Any], *, revision: str | None = None
) -> GistTokenizer:
    """Load the gist tokenizer of a server: the checkpoint's own, or what ``settings`` say for an untouched base model.

    Args:
        name_or_path: the checkpoint that is served, a directory or a repository on the hub.
        settings: of the connector: ``tokenizer`` is where another gist tokenizer was saved (an adapter's directory),
            ``template`` the name of the template to write around the checkpoint's stock tokenizer.
        revision: branch, tag or commit of the checkpoint on the hub.

    Raises:
        GistError: there is no such tokenizer.
    """
    if "tokenizer" in settings:
        return GistTokenizer.from_pretrained(settings["tokenizer"])
    source = {} if revision is None else {"revision": revision}
    if "template" in settings:
        return GistTokenizer(read_tokenizer(name_or_path, **source), settings["template"])
    return GistTokenizer.from_pretrained(name_or_path, **source)


def gist_name(params: Mapping[str, Any] | None) -> str | None:
    """Return the gist that ``params``, a request's ``kv_transfer_params``, name, or None.

    Raises:
        GistRefusedError: the name is not a text, or other parameters would make vLLM load another cache as well.
    """
    if not isinstance(params, Mapping) or "gist" not in params:
        return None
    name = params["gist"]
    if not isinstance(name, str):
        raise GistRefusedError(f"kv_transfer_params['gist'] must be the name of a gist, got {name!r:.100}")
    if others := sorted(map(str, params.keys() - {"gist"} - _ALSO_ALLOWED)):
        raise GistRefusedError(f"kv_transfer_params must hold only 'gist', got {', '.join(others)} as well")
    return name


def with_placeholders(ids: Sequence[int], num_gist_tokens: int, gist_token_id: int) -> list[int]:
    """Put k placeholders for a gist in front of ids, unless they are already there.

    Args:
        ids: the ids after the gist, with or without the placeholders.
        num_gist_tokens: k of the gist.
        gist_token_id: the id of a placeholder.

    Raises:
        GistRefusedError: the number of placeholders is not k, one of them is not in front, or nothing follows the gist.
    """
    ids = list(ids)
    found = next((place for place, token in enumerate(ids) if token != gist_token_id), len(ids))
    if found not in (0, num_gist_tokens):
        raise GistRefusedError(
            f"prompt has {found} gist tokens in front, but the gist has {num_gist_tokens}; leave them out, because "
            "the server inserts them"
        )
    if gist_token_id in ids[found:]:
        raise GistRefusedError(
            f"prompt has a gist token ({gist_token_id}) at {found + ids[found:].index(gist_token_id)}; gist tokens "
            "must come before everything else"
        )
    if found == len(ids):
        raise GistRefusedError("prompt has nothing after the gist; give at least one token to answer")
    return [gist_token_id] * num_gist_tokens + ids[found:]


def salt_of(entry: StoreEntry, secret: str, salt: str | None) -> str:
    """Make the salt for the hashes of a request's blocks, so that they are never mistaken for another prompt's.

    Placeholders look the same for every prompt. The hash of the content tells them apart, even after a name has moved
    to another prompt. The secret keeps clients from guessing the salt. A salt of the request itself counts as well.

    Args:
        entry: the gist.
        secret: a secret of this process.
        salt: the request's own ``cache_salt``, or None.
    """
    return "\n".join(("gist", secret, entry.sha256, salt or ""))


def head_shard(num_heads: int, rank: int, size: int) -> range:
    """Return the key heads of one process of a tensor parallel group, as vLLM and Megatron place them.

    Each process holds ``num_heads // size`` heads. With fewer heads than processes, neighbours hold the same head.

    Args:
        num_heads: key heads of the model.
        rank: rank of the process in its group.
        size: processes of the group.

    Raises:
        GistError: neither ``num_heads`` nor ``size`` divides the other.
    """
    if num_heads % size and size % num_heads:
        raise GistError(f"{num_heads} key heads cannot be shared by {size} tensor parallel processes")
    if num_heads >= size:
        each = num_heads // size
        return range(rank * each, (rank + 1) * each)
    head = rank // (size // num_heads)
    return range(head, head + 1)


def slots_of(block_ids: Sequence[int], block_size: int, first: int, end: int) -> Tensor:
    """Return the slots of positions ``first .. end - 1`` in a paged cache: int64 ``(end - first,)``.

    Args:
        block_ids: the sequence's blocks, in order.
        block_size: positions in a block.
        first: first position.
        end: one more than the last position.
    """
    positions = torch.arange(first, end)
    blocks = torch.tensor(block_ids, dtype=torch.int64)[positions // block_size]
    return blocks * block_size + positions % block_size


def fingerprints(
    name_or_path: str | Path, dtypes: Sequence[torch.dtype], *, revision: str | None = None
) -> tuple[str, ...]:
    """Return what gists that a checkpoint reads may be made for, in its own dtype and in each other one of ``dtypes``.

    For each dtype: the checkpoint itself, and it as the untouched base model of adapters. Reads its weights.

    Args:
        name_or_path: a directory, or a repository on the hub.
        dtypes: the dtypes in which it may be served.
        revision: branch, tag or commit on the hub.

    Raises:
        GistError: there is no such checkpoint.
        UnsupportedModelError: the model cannot be gisted.
    """
    from gisting.models.fingerprint import base_fingerprint, fingerprint
    from gisting.models.load import load
    from gisting.models.weights import input_weight

    source = {} if revision is None else {"revision": revision}
    model, _ = load(name_or_path, dtype="auto", **source)
    found, own = [fingerprint(model), base_fingerprint(model)], input_weight(model).dtype
    for dtype in dtypes:
        if dtype != own:
            del model
            model, _ = load(name_or_path, dtype=dtype, **source)
            found += [fingerprint(model), base_fingerprint(model)]
    return tuple(dict.fromkeys(found))
