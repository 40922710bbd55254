"""Gist caches in stock vLLM: a KV connector that puts the states of a gist where vLLM would have computed them.

Place in the flow: HTTP or offline -> requests with ids -> **vLLM** -> answers. A gist is an ordinary prefix of k
tokens (positions are anchored at it), so a request reads ``[<GIST>] * k + rest`` and the connector reports k tokens as
computed elsewhere. ``gisting.serving.scheduler`` and ``gisting.serving.worker`` do the work; this module connects them
to vLLM's interfaces, and is the only one that imports vLLM.

It holds three classes, each named on vLLM's command line (``gisting serve`` writes it): :class:`GistConnector` in the
engine, :class:`NoGistTokens` in the sampler, and :class:`GistMiddleware` around the HTTP server.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
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
from gisting.serving.gists import Served, StoredGists, read_gist_tokenizer
from gisting.serving.middleware import GistMiddleware
from gisting.serving.requests import GistRequest, request
from gisting.serving.scheduler import SchedulerSide
from gisting.serving.steps import COUNTERS, Step
from gisting.serving.worker import WorkerSide

__all__ = ["GistConnector", "GistMiddleware", "GistRequest", "GistStats", "NoGistTokens", "request"]

logger = logging.getLogger("vllm.gisting")  # below vLLM's logger, which has handlers

#: The version that is tested, and the one whose interface was read. Later ones may have changed.
KNOWN_VERSIONS = ("0.32", "0.33")
MAX_BYTES = 256 * 2**20
_SETTINGS = ("store", "max_bytes", "fingerprint", "tokenizer", "template", "gist_token_id")
# Without these vLLM would not call the connector, or the connector could not report back.
_HOOKS = (
    "on_new_request",
    "bind_gpu_block_pool",
    "get_block_ids_with_load_errors",
    "register_kv_caches",
    "build_prom_metrics",
)


@dataclass
class GistStats(KVConnectorStats):
    """Counts since the last report, by the names of :data:`gisting.serving.steps.COUNTERS`. Workers' counts add up."""

    data: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def reset(self) -> None:
        """Restart from 0."""
        self.data = dict.fromkeys(COUNTERS, 0)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add the counts of ``other``."""
        for name, count in other.data.items():
            self.data[name] += count
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what vLLM writes into its log."""
        return {f"gist {name}": count for name, count in self.data.items()}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class _GistProm(KVConnectorPromMetrics):
    """The counts of each engine as ``vllm:gist_*_total``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[tuple[str, int], Any] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:gist_{name}", documentation=f"{text}.", labelnames=labelnames)
            for engine, values in per_engine_labelvalues.items():
                self._counters[name, engine] = counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the counts of an engine."""
        for name, count in transfer_stats_data.items():
            self._counters[name, engine_idx].inc(count)


@dataclass
class _StepMetadata(KVConnectorMetadata):
    """A step as vLLM passes it to the workers."""

    step: Step


class GistConnector(KVConnectorBase_V1):
    """Loads gists from a :class:`gisting.GistStore` into vLLM's paged cache.

    ``--kv-transfer-config`` names it, with these settings in ``kv_connector_extra_config``: ``store``, the directory;
    ``max_bytes`` of prepared gists that each worker keeps in memory (256 MiB); ``fingerprint`` of the checkpoint, or a
    list of its fingerprints in several dtypes, if they are known, so that its weights need not be read a second time.
    For a base model that was never patched also ``gist_token_id``, and where its gist tokenizer comes from, as
    :func:`gisting.serving.gists.read_gist_tokenizer` takes it: ``tokenizer`` or ``template``.

    vLLM makes one connector in the scheduler and one in each worker. This class only passes vLLM's calls on, to
    :class:`gisting.serving.scheduler.SchedulerSide` or to :class:`gisting.serving.worker.WorkerSide`.

    Raises:
        GistError: a setting is missing or unknown, or vLLM is configured in a way that cannot serve gists.
        UnsupportedModelError: the model's cache cannot hold a gist.
        StoreError: the directory is not a store.
        ImportError: vLLM lacks a hook that the connector needs.
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
        self._counts: Counter[str] = Counter()
        block_size: int = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        model = vllm_config.model_config
        if role == KVConnectorRole.SCHEDULER:
            served = Served.of_checkpoint(
                model.model,
                model.dtype,
                revision=model.revision,
                fingerprint=settings.get("fingerprint"),
                tokenizer=read_gist_tokenizer(model.model, settings, revision=model.revision),
            )
            logger.info("gists of %s for %s from %s", " or ".join(served.models), model.model, settings["store"])
            self.scheduler = SchedulerSide(StoredGists(settings["store"], served), served, block_size, self._counts)
        else:
            self.worker = WorkerSide(
                StoredGists(settings["store"]),
                max_bytes=int(settings.get("max_bytes", MAX_BYTES)),
                block_size=block_size,
                dtype=model.dtype,
                rank_and_size=lambda: (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()),
                counts=self._counts,
            )

    # -- scheduler -----------------------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Keep the block pool, which knows the prefix cache."""
        self.scheduler.block_pool = gpu_block_pool

    def on_new_request(self, request: Any) -> None:
        """Accept the request with its gist or refuse it, and salt its blocks."""
        self.scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens of the gist follow those that vLLM has in its own cache."""
        return self.scheduler.num_new_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note where to write the tokens that were promised."""
        self.scheduler.give_blocks(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Return what the workers write before this step."""
        return _StepMetadata(self.scheduler.next_step(scheduler_output))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; its blocks belong to vLLM again."""
        self.scheduler.finish(request, block_ids)
        return False, None

    # -- worker --------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Find the layers of these caches, and refuse those that cannot be written to from outside."""
        context = self._vllm_config.compilation_config.static_forward_context
        self.worker.layers = _layers_in_order(kv_caches, context)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the states of this step's gists, before anything reads them."""
        self.worker.run(self._get_connector_metadata().step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: what a step reads was written before it."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: gists are made by :func:`gisting.compress`."""

    def wait_for_save(self) -> None:
        """Do nothing: nothing is saved."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the refused requests, which need not wait any longer."""
        return None, self.worker.take_ended() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that could not be written; vLLM ends the requests that they belong to."""
        return self.worker.take_invalid_blocks()

    # -- metrics -------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Return the counts since the last call."""
        if not self._counts:
            return None
        stats = GistStats()
        stats.data.update(self._counts)
        self._counts.clear()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Make counts of what another process sent."""
        return GistStats() if data is None else GistStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVConnectorPromMetrics:
        """Make the counters for ``/metrics``."""
        return _GistProm(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class NoGistTokens(LogitsProcessor, LogitsProcessorV2):
    """Keeps gist tokens from being sampled by setting their logit to minus infinity, in both of vLLM's model runners.

    For a model without gist tokens it changes nothing.
    """

    def __init__(self, vllm_config: Any, *others: Any) -> None:
        config = vllm_config.model_config.hf_config
        gist = getattr(config, "gist", None)
        # A base model that was never patched does not say it; the connector's settings do.
        transfer = getattr(vllm_config, "kv_transfer_config", None)
        extra = getattr(transfer, "kv_connector_extra_config", None) or {}
        self._gist_token_id: int | None = (gist if isinstance(gist, dict) else extra).get("gist_token_id")

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Change logits ``(rows, vocabulary)`` in place."""
        if self._gist_token_id is not None:
            logits[:, self._gist_token_id] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        """Whether greedy answers are unaffected."""
        return self._gist_token_id is None

    def update_state(self, batch_update: Any) -> None:
        """Do nothing: the logits do not depend on the requests."""


def check_version(version: str) -> None:
    """Warn if vLLM's ``version`` is not one of :data:`KNOWN_VERSIONS`, and raise if it lacks a hook.

    Raises:
        ImportError: vLLM lacks a hook that the connector needs.
    """
    if missing := [name for name in _HOOKS if not hasattr(KVConnectorBase_V1, name)]:
        raise ImportError(
            f"vLLM {version} has no {', '.join(missing)} for KV connectors; gists need vLLM "
            f"{' or '.join(KNOWN_VERSIONS)}: pip install 'vllm=={KNOWN_VERSIONS[-1]}.*'"
        )
    if not version.startswith(tuple(f"{known}." for known in KNOWN_VERSIONS)):
        logger.warning(
            "gists were tested with vLLM %s, this is %s: compare answers with gisting.generate before relying on it",
            " and ".join(KNOWN_VERSIONS),
            version,
        )


def _check_config(config: Any, kv_cache_config: Any) -> None:
    """Raise unless vLLM's configuration can serve gists."""
    parallel, model, transfer = config.parallel_config, config.model_config, config.kv_transfer_config
    if transfer.kv_load_failure_policy != "fail":
        raise GistError(
            f"kv_load_failure_policy must be 'fail', got {transfer.kv_load_failure_policy!r}: a gist that cannot be "
            "read cannot be recomputed from its placeholders"
        )
    for name, text in (
        ("pipeline_parallel_size", "it spreads layers over processes"),
        ("decode_context_parallel_size", "it spreads positions over processes"),
        ("prefill_context_parallel_size", "it spreads positions over processes"),
    ):
        if getattr(parallel, name, 1) != 1:
            raise GistError(
                f"{name} must be 1 with gists, got {getattr(parallel, name)}: {text}; use tensor parallelism"
            )
    if config.speculative_config is not None:
        raise GistError("speculative decoding does not work with gists: the draft model has no states for them")
    if model.is_encoder_decoder:
        raise UnsupportedModelError("gists of encoder-decoders cannot be served with vLLM; use gisting.generate")
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
            f"vLLM keeps this model's cache as {kinds} in {len(groups)} groups, but gists need full attention in one "
            "group, without sliding windows, latent attention (MLA) or linear layers; use gisting.generate"
        )


def _plain_specs(spec: Any) -> list[Any]:
    """Return the specs of the layers that ``spec`` joins."""
    parts = getattr(spec, "kv_cache_specs", None)
    return [spec] if parts is None else list(parts.values())


def _names_our_processor(found: Any) -> bool:
    return found is NoGistTokens or found == f"{NoGistTokens.__module__}:{NoGistTokens.__name__}"


def _layers_in_order(names: Iterable[str], context: dict[str, Any]) -> list[Any]:
    """Return the attention layers of these names, first to last.

    Raises:
        UnsupportedModelError: one of them shares another layer's cache, or its cache cannot be written to from outside.
    """
    from vllm.model_executor.models.utils import extract_layer_index  # pyright: ignore[reportMissingImports]

    ordered = sorted(names, key=extract_layer_index)
    layers = [context[name] for name in ordered]
    for name, layer in zip(ordered, layers, strict=True):
        kind = type(getattr(layer, "impl", layer)).__name__
        if not hasattr(getattr(layer, "impl", None), "do_kv_cache_update"):
            raise UnsupportedModelError(
                f"the cache of {name} ({kind}) cannot be written to from outside; choose another attention backend: "
                "--attention-backend"
            )
        if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
            raise UnsupportedModelError(f"{name} shares the cache of another layer, which gists do not support")
    return layers
