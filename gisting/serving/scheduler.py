"""The scheduler side of the connector: which gist a request gets, and when the workers must load it.

Place in the flow: vLLM's scheduler -> **scheduler** -> :mod:`gisting.serving.steps`. Uses only the attributes of vLLM's
requests, blocks and scheduler outputs, so it imports no vLLM and touches no tensors.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gisting.errors import GistError
from gisting.serving.gists import GistRefusedError, Served, StoredGists, gist_name, salt_of, with_placeholders
from gisting.serving.steps import Load, Step
from gisting.store.index import StoreEntry

__all__ = ["SchedulerSide"]

_logger = logging.getLogger("vllm.gisting")  # below vLLM's logger, which has handlers


@dataclass(frozen=True)
class _Given:
    """The blocks that a request was given, until it ends."""

    request: Any
    num_output_tokens: int
    block_ids: list[int]

    @property
    def is_unconfirmed(self) -> bool:
        """Whether no token has been computed from these blocks yet, so the load may have failed."""
        return self.request.num_output_tokens <= self.num_output_tokens


class SchedulerSide:
    """Accepts or refuses requests and plans the loads of each step.

    It takes a request's gist from the store as the store is now, checks it, and salts the request's blocks with the
    gist's hash before any block is looked up. The engine ends the requests that it refuses with an error. This is the
    second line of defence: the middleware answers such requests with 4xx before they get here.

    Args:
        gists: the gists that requests may name.
        served: what the server runs.
        block_size: positions in a block of the paged cache.
        counts: where to count, by the names of :data:`gisting.serving.steps.COUNTERS`.
    """

    def __init__(self, gists: StoredGists, served: Served, block_size: int, counts: Counter[str]) -> None:
        self._gists = gists
        self._served = served
        self._block_size = block_size
        self._counts = counts
        self._secret = secrets.token_hex(16)
        # By request id: the gist of each accepted request, and why each refused one was refused.
        self.entries: dict[str, StoreEntry] = {}
        self.refused: dict[str, str] = {}
        self._step = Step()
        self._pending: dict[str, Load] = {}
        self._given: dict[str, _Given] = {}
        #: vLLM's block pool, which knows the prefix cache.
        self.block_pool: Any = None

    def add(self, request: Any) -> None:
        """Accept a new request with its gist or note why it is refused, and salt its blocks."""
        try:
            entry = self._admit(request)
        except Exception as error:  # no error of one request may end the engine
            is_known = isinstance(error, (GistError, OSError))
            _logger.error("request %s is refused: %s", request.request_id, error, exc_info=not is_known)
            self.refused[request.request_id] = str(error)
            self._counts["refused"] += 1
            salt = secrets.token_hex(16)  # so that it shares no blocks
            # Otherwise vLLM would not ask the connector, which could then not refuse.
            request.skip_reading_prefix_cache = False
        else:
            if entry is None:
                return
            self.entries[request.request_id] = entry
            self._counts["requests"] += 1
            salt = salt_of(entry, self._secret, request.cache_salt)
        request.cache_salt = salt
        request.block_hashes = []
        request.update_block_hashes()

    def _admit(self, request: Any) -> StoreEntry | None:
        params = request.kv_transfer_params
        if params is not None and not isinstance(params, Mapping):
            request.kv_transfer_params = None  # vLLM would look up keys in it
            raise GistRefusedError(f"kv_transfer_params must be an object, got {params!r:.100}")
        name = gist_name(params)
        ids = request.prompt_token_ids
        gist_token_id = self._served.gist_token_id
        if name is None:
            if ids is not None and gist_token_id in ids:
                raise GistRefusedError(
                    "the prompt has gist tokens but names no gist; give kv_transfer_params={'gist': name}"
                )
            return None
        if ids is None or request.prompt_embeds is not None or request.mm_features:
            raise GistRefusedError("with a gist the prompt must be ids only, without embeddings, images or audio")
        if request.lora_request is not None:
            raise GistRefusedError("the gist was made without the LoRA adapter that the request names")
        if request.skip_reading_prefix_cache:
            raise GistRefusedError(
                "a gist is a cached prefix, which prompt_logprobs and skip_reading_prefix_cache would compute again"
            )
        entry = self._gists.find(name)
        if len(with_placeholders(ids, entry.num_gist_tokens, gist_token_id)) != len(ids):
            raise GistRefusedError(
                f"the prompt has no placeholders in front for the {entry.num_gist_tokens} tokens of gist "
                f"{name!r:.100}; make it with gisting.serving.vllm.request, or start the server with `gisting serve`"
            )
        return entry

    def num_new_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens of the gist follow those in vLLM's own cache, and whether they arrive later."""
        if request.request_id in self.refused:
            # Promise one token that arrives later, which then cannot be loaded: this is how a connector refuses.
            return 1, True
        entry = self.entries.get(request.request_id)
        return (0 if entry is None else max(0, entry.num_gist_tokens - num_computed_tokens)), False

    def give_blocks(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note the blocks that the promised tokens must be written to.

        Args:
            request: the request.
            blocks: all its blocks, in order.
            num_external_tokens: how many tokens were promised.
        """
        entry = self.entries.get(request.request_id)
        if entry is None and num_external_tokens == 0:
            return
        block_ids = list(*blocks.get_block_ids())  # of the one group
        if entry is None:
            self._step.refused[request.request_id] = block_ids
            return
        # Even if nothing is loaded: what was found in the prefix cache may be another request's unfinished load.
        self._given[request.request_id] = _Given(request, request.num_output_tokens, block_ids)
        if num_external_tokens == 0:
            return
        k = entry.num_gist_tokens
        num_blocks = -(-k // self._block_size)
        self._pending[request.request_id] = Load(entry, k - num_external_tokens, block_ids[:num_blocks])

    def next_step(self, scheduler_output: Any) -> Step:
        """Return what the workers do before this step."""
        step, self._step = self._step, Step()
        # A request that was given blocks and lost them in the same step will get others.
        step.loads = [load for name, load in self._pending.items() if name in scheduler_output.num_scheduled_tokens]
        self._pending.clear()
        for name in scheduler_output.preempted_req_ids or ():
            self._evict_unconfirmed(name)
        return step

    def finish(self, request: Any, block_ids: Iterable[int]) -> None:
        """Forget a request that has ended; its blocks belong to vLLM again."""
        self._evict_unconfirmed(request.request_id, block_ids)
        self.entries.pop(request.request_id, None)
        self.refused.pop(request.request_id, None)
        self._pending.pop(request.request_id, None)

    def _evict_unconfirmed(self, name: str, block_ids: Iterable[int] = ()) -> None:
        """Take the blocks of a request that loses them out of the prefix cache if no token came from them yet.

        vLLM adds blocks to the prefix cache before they are written. When a load fails it removes them again, but only
        those of running requests: not those of a request that was cancelled or preempted before its first step ended.
        """
        given = self._given.pop(name, None)
        if given is not None and given.is_unconfirmed:
            self.block_pool.evict_blocks({*given.block_ids, *block_ids})
