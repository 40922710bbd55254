"""Gist caches in stock vLLM: a KV connector that puts the states of a gist where vLLM would have computed them.

Place in the flow: HTTP or offline -> requests with ids -> **vLLM** -> answers. A gist is an ordinary prefix of k
tokens (positions are anchored at it), so a request reads ``[<GIST>] * k + rest`` and the connector reports k tokens as
computed elsewhere. Which gist a request may have is decided in ``gisting.serving.gists``; here is what vLLM is told.

Three classes, each named on vLLM's command line (``gisting serve`` writes it): :class:`GistConnector` in the engine,
:class:`NoGistTokens` in the sampler, :class:`GistMiddleware` around the HTTP server. vLLM is imported only here.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm import __version__ as vllm_version  # pyright: ignore
from vllm.distributed import (  # pyright: ignore[reportMissingImports]
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # pyright: ignore[reportMissingImports]
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (  # pyright: ignore[reportMissingImports]
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]
from vllm.v1.worker.gpu.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor as LogitsProcessorV2,
)

from gisting.errors import GistError, UnsupportedModelError
from gisting.serving.gists import (
    GistRefusedError,
    LoadedGists,
    Served,
    StoredGists,
    gist_name,
    head_shard,
    salt_of,
    slots_of,
    with_placeholders,
)
from gisting.serving.middleware import GistMiddleware
from gisting.serving.requests import GistRequest, request
from gisting.store.index import StoreEntry

__all__ = ["GistConnector", "GistMiddleware", "GistRequest", "GistStats", "NoGistTokens", "request"]

logger = logging.getLogger("vllm.gisting")  # below vllm's, which has handlers

#: Those that this was run with and those whose interface was read. What a later one changes nobody has seen.
KNOWN_VERSIONS = ("0.32", "0.33")
MAX_BYTES = 256 * 2**20
_SETTINGS = ("store", "max_bytes", "fingerprint")
# Without these the connector would not be asked, or could say nothing.
_HOOKS = (
    "on_new_request",
    "bind_gpu_block_pool",
    "get_block_ids_with_load_errors",
    "register_kv_caches",
    "build_prom_metrics",
)
_COUNTERS = {
    "requests": "Requests that name a gist and were taken",
    "refused": "Requests that were refused in the engine, because they do not fit the gist that they name",
    "hits": "Gists that were in memory when they were needed",
    "loads": "Gists that were read from the store",
    "failed": "Gists that could not be read when they were needed",
    "bytes": "Bytes of keys and values written into the paged cache",
    "tokens": "Gist tokens whose keys and values were written into the paged cache",
}


@dataclass
class GistStats(KVConnectorStats):
    """Counts since they were last asked for, of :data:`_COUNTERS`. Those of several workers add up."""

    data: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_COUNTERS, 0))

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        self.data[name] += count

    def reset(self) -> None:
        """Begin at 0 again."""
        self.data = dict.fromkeys(_COUNTERS, 0)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """These and the other's counts."""
        for name, count in other.data.items():
            self.data[name] += count
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM writes into its log."""
        return {f"gist {name}": count for name, count in self.data.items()}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class _GistProm(KVConnectorPromMetrics):
    """The counts as ``vllm:gist_*_total``, for each engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[tuple[str, int], Any] = {}
        for name, text in _COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:gist_{name}", documentation=f"{text}.", labelnames=labelnames)
            for engine, values in per_engine_labelvalues.items():
                self._counters[name, engine] = counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine counted."""
        for name, count in transfer_stats_data.items():
            self._counters[name, engine_idx].inc(count)


@dataclass(frozen=True)
class _Load:
    """States that a worker is to write before it computes: positions ``first .. entry.num_gist_tokens - 1``."""

    entry: StoreEntry
    first: int
    block_ids: list[int]


@dataclass(frozen=True)
class _Given:
    """What a request was given blocks with, until it ends."""

    request: Any
    num_output_tokens: int
    block_ids: list[int]

    @property
    def is_unconfirmed(self) -> bool:
        """Whether no token has come of these blocks yet, so that nobody knows what became of the load."""
        return self.request.num_output_tokens <= self.num_output_tokens


@dataclass
class _Step(KVConnectorMetadata):
    """What the scheduler tells the workers for one step."""

    loads: list[_Load] = field(default_factory=list)
    refused: dict[str, list[int]] = field(default_factory=dict)  # request: its blocks


class GistConnector(KVConnectorBase_V1):
    """Loads gists from a :class:`gisting.GistStore` into vLLM's paged cache.

    ``--kv-transfer-config`` names it, with these settings in ``kv_connector_extra_config``: ``store``, the directory;
    ``max_bytes`` of prepared gists that each worker holds (256 MiB); ``fingerprint`` of the checkpoint, or a list of
    those that it has in several dtypes, where they are known, so that its weights need not be read a second time.

    In the scheduler it takes a request's gist from the store as it is now, checks it, and salts the request's blocks
    with the gist's hash before any block is looked up, so that nobody can forget to. What it cannot take, the engine
    ends with an error; that is the second line, for the middleware answers such requests with 4xx before they come
    here.

    Raises:
        GistError: a setting is missing or unknown; or a configuration cannot serve gists.
        UnsupportedModelError: the model's cache is none that a gist can stand in.
        StoreError: the store is none.
        ImportError: vLLM lacks what a connector needs to be told.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check_version(vllm_version)
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        settings = dict(self._kv_transfer_config.kv_connector_extra_config)
        if "store" not in settings or settings.keys() - {*_SETTINGS}:
            raise GistError(
                f"kv_connector_extra_config must hold 'store', the directory of a GistStore, and may hold "
                f"{', '.join(_SETTINGS[1:])}; got {', '.join(map(str, settings)) or 'nothing'}"
            )
        _check_config(vllm_config, kv_cache_config)
        self._stats = GistStats()
        self._block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        model = vllm_config.model_config
        if role == KVConnectorRole.SCHEDULER:
            served = Served.of_checkpoint(
                model.model, model.dtype, revision=model.revision, fingerprint=settings.get("fingerprint")
            )
            logger.info("gists of %s for %s from %s", " or ".join(served.models), model.model, settings["store"])
            self._served = served
            self._gists = StoredGists(settings["store"], served)
            self._secret = secrets.token_hex(16)
            self._entries: dict[str, StoreEntry] = {}
            self._refused: dict[str, str] = {}
            self._step = _Step()
            self._pending: dict[str, _Load] = {}
            self._given: dict[str, _Given] = {}
            self._block_pool: Any = None
        else:
            self._gists = StoredGists(settings["store"])
            self._loaded = LoadedGists(int(settings.get("max_bytes", MAX_BYTES)))
            self._dtype: torch.dtype = model.dtype
            self._layers: list[Any] | None = None
            self._invalid_blocks: set[int] = set()
            self._ended: set[str] = set()

    # -- scheduler -----------------------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Keep what knows the prefix cache."""
        self._block_pool = gpu_block_pool

    def on_new_request(self, request: Any) -> None:
        """Take the request's gist, or note why it has none, and salt its blocks."""
        try:
            entry = self._admit(request)
        except Exception as error:  # whatever it is, it must not take the engine along
            is_known = isinstance(error, (GistError, OSError))
            logger.error("request %s is refused: %s", request.request_id, error, exc_info=not is_known)
            self._refused[request.request_id] = str(error)
            self._stats.add("refused")
            salt = secrets.token_hex(16)  # shares its blocks with nobody
            request.skip_reading_prefix_cache = False  # or the connector would not be asked, and could not say no
        else:
            if entry is None:
                return
            self._entries[request.request_id] = entry
            self._stats.add("requests")
            salt = salt_of(entry, self._secret, request.cache_salt)
        request.cache_salt = salt
        request.block_hashes = []
        request.update_block_hashes()

    def _admit(self, request: Any) -> StoreEntry | None:
        params = request.kv_transfer_params
        if params is not None and not isinstance(params, Mapping):
            request.kv_transfer_params = None  # or vLLM would ask it for its keys
            raise GistRefusedError(f"kv_transfer_params must be an object, got {params!r:.100}")
        name = gist_name(params)
        ids = request.prompt_token_ids
        gist_token_id = self._served.gist_token_id
        if name is None:
            if ids is not None and gist_token_id in ids:
                raise GistRefusedError(
                    "the prompt has gist tokens and names no gist; give kv_transfer_params={'gist': name}"
                )
            return None
        if ids is None or request.prompt_embeds is not None or request.mm_features:
            raise GistRefusedError("a gist goes with a prompt of ids alone, without embeddings, images or sound")
        if request.lora_request is not None:
            raise GistRefusedError("a gist was made without the LoRA adapter that the request names")
        if request.skip_reading_prefix_cache:
            raise GistRefusedError(
                "a gist is a cached prefix, and prompt_logprobs and skip_reading_prefix_cache would compute it anew"
            )
        entry = self._gists.find(name)
        if len(with_placeholders(ids, entry.num_gist_tokens, gist_token_id)) != len(ids):
            raise GistRefusedError(
                f"the prompt has no places for the {entry.num_gist_tokens} tokens of gist {name!r:.100} in front; make "
                "it with gisting.serving.vllm.request, or start the server with `gisting serve`"
            )
        return entry

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens of the gist lie behind those that vLLM has in its own cache."""
        if request.request_id in self._refused:
            # As if it waited for one token from elsewhere, which then cannot be had: this is how a connector says no.
            return 1, True
        entry = self._entries.get(request.request_id)
        return (0 if entry is None else max(0, entry.num_gist_tokens - num_computed_tokens)), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note where the tokens that were promised are to be written."""
        entry = self._entries.get(request.request_id)
        if entry is None and num_external_tokens == 0:
            return
        (block_ids,) = blocks.get_block_ids()
        if entry is None:
            self._step.refused[request.request_id] = list(block_ids)
            return
        # Also where nothing is loaded: another request's load may be what it found in the prefix cache.
        self._given[request.request_id] = _Given(request, request.num_output_tokens, list(block_ids))
        if num_external_tokens == 0:
            return
        k = entry.num_gist_tokens
        num_blocks = -(-k // self._block_size)
        self._pending[request.request_id] = _Load(entry, k - num_external_tokens, list(block_ids[:num_blocks]))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers write before this step."""
        step, self._step = self._step, _Step()
        # What was given blocks and lost them again in the same step gets other ones later.
        step.loads = [load for name, load in self._pending.items() if name in scheduler_output.num_scheduled_tokens]
        self._pending.clear()
        for name in scheduler_output.preempted_req_ids or ():
            self._distrust(name)
        return step

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; its blocks are vLLM's."""
        self._distrust(request.request_id, block_ids)
        self._entries.pop(request.request_id, None)
        self._refused.pop(request.request_id, None)
        self._pending.pop(request.request_id, None)
        return False, None

    def _distrust(self, name: str, block_ids: Iterable[int] = ()) -> None:
        """Take the blocks of a request that loses them out of the prefix cache, if no token has come of them yet.

        vLLM has them there before they are written. When a load fails it takes them out again, but only those of
        requests that run: not of one that was cancelled, or lost its blocks, before its first step was over.
        """
        given = self._given.pop(name, None)
        if given is not None and given.is_unconfirmed:
            self._block_pool.evict_blocks({*given.block_ids, *block_ids})

    # -- worker --------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Find the layers whose cache it is, and refuse those that cannot be written to from outside."""
        context = self._vllm_config.compilation_config.static_forward_context
        self._layers = _layers_in_order(kv_caches, context)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the states of this step's gists, before anything reads them."""
        step = self._get_connector_metadata()
        for load in step.loads:
            try:
                self._write(load)
            except Exception as error:  # out of memory, for instance: this request fails, and no other
                is_known = isinstance(error, (GistError, OSError))
                logger.error("gist %s cannot be loaded: %s", load.entry.key, error, exc_info=not is_known)
                self._stats.add("failed")
                self._invalid_blocks.update(load.block_ids[load.first // self._block_size :])
        for name, block_ids in step.refused.items():
            self._ended.add(name)
            self._invalid_blocks.update(block_ids)

    def _write(self, load: _Load) -> None:
        version = load.entry.sha256
        is_held = version in self._loaded
        states = self._loaded.get(version, lambda: self._prepared(load.entry))
        self._stats.add("hits" if is_held else "loads")
        k, first = load.entry.num_gist_tokens, load.first
        slots = slots_of(load.block_ids, self._block_size, first, k).to(states[0][0].device)
        for layer, (keys, values) in zip(self._layers or (), states, strict=True):
            # Each backend lays its pages out as it likes; this is how a layer writes what it has computed itself.
            layer.impl.do_kv_cache_update(layer, keys[first:], values[first:], layer.kv_cache, slots)
            self._stats.add("bytes", (k - first) * (keys[0].nbytes + values[0].nbytes))
        self._stats.add("tokens", k - first)

    def _prepared(self, entry: StoreEntry) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``(k, G, D)`` of each layer: this worker's heads, on its device, in the model's dtype."""
        cache = self._gists.load(entry)
        layers = self._layers or []
        if len(cache.keys) != len(layers):
            raise GistError(f"the gist has {len(cache.keys)} layers, this worker {len(layers)}")
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        prepared = []
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            heads = head_shard(keys.shape[1], rank, size)
            if len(heads) != layer.num_kv_heads or keys.shape[3] != layer.head_size:
                raise GistError(
                    f"the gist has {len(heads)} key heads of size {keys.shape[3]} for this worker, the model "
                    f"{layer.num_kv_heads} of {layer.head_size}"
                )
            # (1, G, k, D) -> (k, G of this worker, D)
            keys, values = (states[0, heads.start : heads.stop].transpose(0, 1) for states in (keys, values))
            device = layer.kv_cache.device
            prepared.append((keys.to(device, self._dtype).contiguous(), values.to(device, self._dtype).contiguous()))
        return prepared

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: what a step reads was written before it."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved: gists are made by :func:`gisting.compress`."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The refused requests, whose wait is over."""
        ended, self._ended = self._ended, set()
        return None, ended or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that nothing could be written to; vLLM ends the requests that they belong to."""
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    # -- metrics -------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """The counts since the last call."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, GistStats()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Counts as they came from another process."""
        return GistStats() if data is None else GistStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVConnectorPromMetrics:
        """The counters behind ``/metrics``."""
        return _GistProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class NoGistTokens(LogitsProcessor, LogitsProcessorV2):
    """Gist tokens are never sampled: their logit is minus infinity. For both of vLLM's model runners.

    Of a model without gist tokens it changes nothing.
    """

    def __init__(self, vllm_config: Any, *others: Any) -> None:
        config = vllm_config.model_config.hf_config
        gist = getattr(config, "gist", None)
        self._gist_token_id: int | None = gist["gist_token_id"] if isinstance(gist, dict) else None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Change logits ``(rows, vocabulary)`` in place."""
        if self._gist_token_id is not None:
            logits[:, self._gist_token_id] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        """Whether greedy answers stay what they are."""
        return self._gist_token_id is None

    def update_state(self, batch_update: Any) -> None:
        """Nothing depends on the requests."""


def check_version(version: str) -> None:
    """Say so where this vLLM is none of :data:`KNOWN_VERSIONS`, and raise where it lacks what a connector needs.

    Raises:
        ImportError: it does.
    """
    if missing := [name for name in _HOOKS if not hasattr(KVConnectorBase_V1, name)]:
        raise ImportError(
            f"vLLM {version} does not tell a KV connector of {', '.join(missing)}; gists are served by vLLM "
            f"{' and '.join(KNOWN_VERSIONS)}: pip install 'vllm=={KNOWN_VERSIONS[-1]}.*'"
        )
    if not version.startswith(tuple(f"{known}." for known in KNOWN_VERSIONS)):
        logger.warning(
            "gists were tried with vLLM %s, this is %s: compare answers with gisting.generate before relying on it",
            " and ".join(KNOWN_VERSIONS),
            version,
        )


def _check_config(config: Any, kv_cache_config: Any) -> None:
    """Raise unless gists can be served by a vLLM that is configured so."""
    parallel, model, transfer = config.parallel_config, config.model_config, config.kv_transfer_config
    if transfer.kv_load_failure_policy != "fail":
        raise GistError(
            f"kv_load_failure_policy must be 'fail', got {transfer.kv_load_failure_policy!r}: a gist that cannot be "
            "read cannot be computed anew from its placeholders"
        )
    for name, text in (
        ("pipeline_parallel_size", "layers are spread over processes"),
        ("decode_context_parallel_size", "positions are spread over processes"),
        ("prefill_context_parallel_size", "positions are spread over processes"),
    ):
        if getattr(parallel, name, 1) != 1:
            raise GistError(
                f"{name} must be 1 with gists, got {getattr(parallel, name)}: {text}; use tensor parallelism"
            )
    if config.speculative_config is not None:
        raise GistError("speculative decoding does not go with gists: the drafting model has no states of them")
    if model.is_encoder_decoder:
        raise UnsupportedModelError("vLLM serves no gists of encoder-decoders; use gisting.generate")
    if not any(_names_our_processor(found) for found in model.logits_processors or ()):
        raise GistError("gist tokens could be sampled; add --logits-processors gisting.serving.vllm:NoGistTokens")
    groups = kv_cache_config.kv_cache_groups
    specs = [spec for group in groups for spec in _plain_specs(group.kv_cache_spec)]
    if len(groups) != 1 or any(
        not isinstance(spec, FullAttentionSpec)
        or isinstance(spec, MLAAttentionSpec)
        or getattr(spec, "sliding_window", None)
        or getattr(spec, "attention_chunk_size", None)
        for spec in specs
    ):
        kinds = ", ".join(dict.fromkeys(type(spec).__name__ for spec in specs))
        raise UnsupportedModelError(
            f"vLLM keeps this model's cache as {kinds} in {len(groups)} groups, and gists are served for full "
            "attention in one group: no sliding windows, no latent (MLA) nor linear layers; use gisting.generate"
        )


def _plain_specs(spec: Any) -> list[Any]:
    """The specs of layers that are kept together."""
    parts = getattr(spec, "kv_cache_specs", None)
    return [spec] if parts is None else list(parts.values())


def _names_our_processor(found: Any) -> bool:
    return found is NoGistTokens or found == f"{NoGistTokens.__module__}:{NoGistTokens.__name__}"


def _layers_in_order(names: Iterable[str], context: dict[str, Any]) -> list[Any]:
    """The attention layers of these names, from the first to the last.

    Raises:
        UnsupportedModelError: one of them is no layer of a decoder with a cache of its own that can be written to.
    """
    from vllm.model_executor.models.utils import extract_layer_index  # pyright: ignore[reportMissingImports]

    ordered = sorted(names, key=extract_layer_index)
    layers = [context[name] for name in ordered]
    for name, layer in zip(ordered, layers, strict=True):
        kind = type(getattr(layer, "impl", layer)).__name__
        if not hasattr(getattr(layer, "impl", None), "do_kv_cache_update"):
            raise UnsupportedModelError(
                f"{name} keeps its cache in a way ({kind}) that takes no states from outside; choose another attention "
                "backend: --attention-backend"
            )
        if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
            raise UnsupportedModelError(f"{name} shares the cache of another layer, which gists do not know of")
    return layers
