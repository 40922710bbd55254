"""A configuration that cannot serve gists is refused when the engine starts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gisting.errors import GistError, UnsupportedModelError
from tests.vllm.conftest import Served


def spec(kind: str = "FullAttentionSpec", **settings: Any) -> Any:
    import vllm.v1.kv_cache_interface as interface

    return getattr(interface, kind)(
        **{"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32, **settings}
    )


def configuration(served: Served) -> SimpleNamespace:
    """The configuration of a connector, as far as it looks at it."""
    return SimpleNamespace(
        parallel=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        model=SimpleNamespace(
            is_encoder_decoder=False, logits_processors=["gisting.serving.vllm:NoGistTokens"], dtype=torch.float32
        ),
        speculative=None,
        policy="fail",
        extra={"store": str(served.store)},
        groups=[SimpleNamespace(kv_cache_spec=spec())],
    )


def connect(found: SimpleNamespace, role: str = "WORKER") -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from gisting.serving.vllm import GistConnector

    config = SimpleNamespace(
        parallel_config=found.parallel,
        model_config=found.model,
        speculative_config=found.speculative,
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=found.extra, kv_load_failure_policy=found.policy, is_kv_producer=True
        ),
    )
    return GistConnector(config, KVConnectorRole[role], SimpleNamespace(kv_cache_groups=found.groups))


def test_a_plain_configuration_is_taken(served: Served) -> None:
    assert connect(configuration(served))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda found: setattr(found, "extra", {}), GistError, "must hold 'store'.*got nothing"),
        (
            lambda found: found.extra.update(sotre="x"),
            GistError,
            "may hold max_bytes, fingerprint, .*; got store, sotre",
        ),
        (lambda found: found.extra.update(store="/nowhere"), GistError, "/nowhere is not a store"),
        (lambda found: found.extra.update(max_bytes=-1), GistError, "max_bytes must be at least 0"),
        (lambda found: setattr(found, "policy", "recompute"), GistError, "kv_load_failure_policy must be 'fail'"),
        (lambda found: setattr(found.parallel, "pipeline_parallel_size", 2), GistError, "pipeline_parallel_size must"),
        (lambda found: setattr(found.parallel, "decode_context_parallel_size", 2), GistError, "decode_context_para"),
        (lambda found: setattr(found, "speculative", object()), GistError, "speculative decoding does not work"),
        (lambda found: setattr(found.model, "is_encoder_decoder", True), UnsupportedModelError, "encoder-decoders"),
        (lambda found: setattr(found.model, "logits_processors", None), GistError, "add --logits-processors gisting"),
        (lambda found: found.groups.append(found.groups[0]), UnsupportedModelError, "in 2 groups"),
        (
            lambda found: setattr(found, "groups", [SimpleNamespace(kv_cache_spec=spec(sliding_window=8))]),
            UnsupportedModelError,
            "without sliding windows",
        ),
        (
            lambda found: setattr(
                found, "groups", [SimpleNamespace(kv_cache_spec=spec("SlidingWindowSpec", sliding_window=8))]
            ),
            UnsupportedModelError,
            "cache as SlidingWindowSpec",
        ),
        (
            lambda found: setattr(found, "groups", [SimpleNamespace(kv_cache_spec=spec("MLAAttentionSpec"))]),
            UnsupportedModelError,
            "cache as MLAAttentionSpec",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_serve_gists_is_refused(
    served: Served, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    found = configuration(served)
    change(found)
    with pytest.raises(error, match=message):
        connect(found)


def test_layers_that_cannot_be_written_to_are_refused(served: Served) -> None:
    connector = connect(configuration(served))
    ours = SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=None), kv_sharing_target_layer_name=None)
    sharing = SimpleNamespace(impl=ours.impl, kv_sharing_target_layer_name="model.layers.0.attn")
    closed = SimpleNamespace(impl=SimpleNamespace(), kv_sharing_target_layer_name=None)

    def register(*layers: Any) -> Any:
        names = {f"model.layers.{number}.attn": layer for number, layer in enumerate(layers)}
        connector._vllm_config.compilation_config = SimpleNamespace(static_forward_context=names)
        connector.register_kv_caches(dict.fromkeys(reversed(names), torch.empty(0)))
        return connector.worker.layers

    assert register(*[ours] * 11, SimpleNamespace(**vars(ours), last=True))[-1].last  # 10 and 11 come after 9
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1.attn shares the cache of another layer"):
        register(ours, sharing)
    with pytest.raises(
        UnsupportedModelError, match=r"the cache of model.layers.1.attn \(SimpleNamespace\) cannot be written"
    ):
        register(ours, closed)


def test_versions(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from gisting.serving.vllm import check_version

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    check_version(vllm.__version__)
    check_version("0.33.1")
    assert not caplog.text
    check_version("0.34.0")
    assert "gists were tested with vLLM 0.32 and 0.33, this is 0.34.0" in caplog.text
    monkeypatch.delattr(KVConnectorBase_V1, "on_new_request")
    with pytest.raises(ImportError, match=r"vLLM 0.34.0 has no on_new_request for KV connectors"):
        check_version("0.34.0")


def test_a_tensor_parallel_worker_takes_its_heads(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import gisting.serving.vllm as ours
    from gisting import GistStore

    with GistStore(served.store) as store:
        cache, entry = store["eight"], store.entry("eight")
    for size, rank, heads in ((1, 0, [0, 1]), (2, 1, [1]), (4, 1, [0]), (4, 3, [1])):
        worker = connect(configuration(served)).worker
        layer = SimpleNamespace(num_kv_heads=len(heads), head_size=32, kv_cache=torch.empty(0))
        worker.layers = [layer] * 3
        monkeypatch.setattr(ours, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        monkeypatch.setattr(ours, "get_tensor_model_parallel_world_size", lambda size=size: size)
        found = worker.prepare(entry)
        for (keys, values), wanted_keys, wanted_values in zip(found, cache.keys, cache.values, strict=True):
            assert torch.equal(keys, wanted_keys[0, heads].transpose(0, 1))
            assert torch.equal(values, wanted_values[0, heads].transpose(0, 1))
        layer.num_kv_heads = 5
        with pytest.raises(GistError, match="the model 5 of 32"):
            worker.prepare(entry)
