"""The two sides of the vLLM connector, without vLLM: requests are refused or planned, and states are written."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.serving.gists import Served, StoredGists
from gisting.serving.scheduler import SchedulerSide
from gisting.serving.steps import COUNTERS, Load, Step
from gisting.serving.worker import WorkerSide
from gisting.store import GistStore
from tests import tiny

G = 64
BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("connector") / "store"
    model, tokenizer = tiny.patched("llama")
    with GistStore(path) as store:
        store.get_or_compress(model, tokenizer, ["w1 w2 w3 w4 w5", "w4"], [6, 1], names=["six", "one"])
    return path


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> GistStore:
    return GistStore(shutil.copytree(filled, tmp_path / "store"))


@pytest.fixture
def scheduler(store: GistStore) -> SchedulerSide:
    entry = store.entry("six")
    served = Served((entry.model,), entry.tokenizer, "plain", G)
    found = SchedulerSide(StoredGists(store.path, served), served, BLOCK_SIZE, Counter())
    found.block_pool = SimpleNamespace(evict_blocks=lambda block_ids: None)
    return found


class Request(SimpleNamespace):
    """A request as far as the scheduler side looks at it."""

    def __init__(self, name: str, params: Any, ids: list[int] | None, **more: Any) -> None:
        super().__init__(
            request_id=name,
            kv_transfer_params=params,
            prompt_token_ids=ids,
            prompt_embeds=None,
            mm_features=[],
            lora_request=None,
            skip_reading_prefix_cache=False,
            cache_salt=None,
            block_hashes=["stale"],
            num_output_tokens=0,
        )
        vars(self).update(more)

    def update_block_hashes(self) -> None:
        self.block_hashes.append(self.cache_salt)


def blocks(*ids: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))


def output(scheduled: set[str], preempted: set[str] | None = None) -> Any:
    return SimpleNamespace(num_scheduled_tokens=dict.fromkeys(scheduled, 1), preempted_req_ids=preempted)


def six(name: str = "a", **more: Any) -> Request:
    return Request(name, {"gist": "six"}, [G] * 6 + [1, 2], **more)


# -- scheduler ---------------------------------------------------------------------------------------------------------


def test_an_accepted_request_is_salted_and_loaded(scheduler: SchedulerSide, store: GistStore) -> None:
    request = six()
    scheduler.add(request)
    assert scheduler.entries == {"a": store.entry("six")}
    (salt,) = request.block_hashes
    assert store.entry("six").sha256 in salt, "the old hashes are gone, the new ones are salted"
    assert scheduler.num_new_tokens(request, 0) == (6, False)
    assert scheduler.num_new_tokens(request, 4) == (2, False)
    assert scheduler.num_new_tokens(request, 8) == (0, False)
    scheduler.give_blocks(request, blocks(7, 8, 9), 2)
    step = scheduler.next_step(output({"a"}))
    assert step == Step([Load(store.entry("six"), 4, [7, 8])])
    assert pickle.loads(pickle.dumps(step)) == step, "it is sent to other processes"  # noqa: S301
    assert scheduler.next_step(output({"a"})) == Step()
    scheduler.finish(request, [])
    assert scheduler.entries == {}


def test_an_ordinary_request_is_left_alone(scheduler: SchedulerSide) -> None:
    request = Request("a", None, [1, 2])
    scheduler.add(request)
    assert request.block_hashes == ["stale"]
    assert scheduler.num_new_tokens(request, 0) == (0, False)
    scheduler.give_blocks(request, None, 0)
    assert scheduler.next_step(output({"a"})) == Step()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", {"gist": "unknown"}, [1]), "is not in the store"),
        (Request("a", {"gist": "six"}, [1]), "has no placeholders in front for the 6 tokens of gist 'six'"),
        (Request("a", {"gist": "one"}, [G] * 6 + [1]), "has 6 gist tokens in front, but the gist has 1"),
        (Request("a", None, [G, 1]), "has gist tokens but names no gist"),
        (Request("a", ["x"], [1]), "kv_transfer_params must be an object, got"),
        (Request("a", {"gist": "six"}, None), "the prompt must be ids only"),
        (six(mm_features=["image"]), "the prompt must be ids only"),
        (six(lora_request=object()), "without the LoRA adapter"),
        (six(skip_reading_prefix_cache=True), "a gist is a cached prefix"),
    ],
    ids=["unknown", "no placeholders", "k", "no gist", "no object", "embeddings", "images", "LoRA", "uncached"],
)
def test_a_refused_request_ends_alone(scheduler: SchedulerSide, request_: Request, message: str) -> None:
    scheduler.add(request_)
    assert message in scheduler.refused["a"]
    assert scheduler._counts == {"refused": 1}
    assert not request_.skip_reading_prefix_cache, "or vLLM would not ask the connector"
    assert scheduler.num_new_tokens(request_, 0) == (1, True)
    scheduler.give_blocks(request_, blocks(5), 1)
    assert scheduler.next_step(output(set())) == Step(refused={"a": [5]})
    scheduler.finish(request_, [5])
    assert scheduler.refused == {}


def test_refused_requests_share_no_blocks(scheduler: SchedulerSide) -> None:
    requests = [Request(name, {"gist": "unknown"}, [1]) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    assert requests[0].cache_salt != requests[1].cache_salt


@pytest.mark.parametrize(
    ("num_external_tokens", "num_new_tokens", "evicted"), [(6, 0, [{5, 6}]), (0, 0, [{5, 6}]), (6, 1, [])]
)
def test_blocks_that_may_be_unwritten_are_evicted(
    scheduler: SchedulerSide, num_external_tokens: int, num_new_tokens: int, evicted: list[set[int]]
) -> None:
    calls: list[set[int]] = []
    scheduler.block_pool = SimpleNamespace(evict_blocks=calls.append)
    request = six(num_output_tokens=3)  # from before an earlier preemption
    scheduler.add(request)
    scheduler.give_blocks(request, blocks(5, 6), num_external_tokens)
    scheduler.next_step(output({"a"}))
    request.num_output_tokens += num_new_tokens
    scheduler.next_step(output(set(), {"a", "another"}))
    assert calls == evicted
    assert [*scheduler.entries] == ["a"], "it is scheduled again later"


def test_a_load_that_is_preempted_in_its_own_step_is_not_sent(scheduler: SchedulerSide) -> None:
    scheduler.add(six())
    scheduler.give_blocks(six(), blocks(5, 6), 6)
    assert scheduler.next_step(output(set(), {"a"})) == Step()


# -- worker ------------------------------------------------------------------------------------------------------------


class Layer:
    """An attention layer of two key heads of 16 numbers, with a paged cache of its own."""

    num_kv_heads = 2
    head_size = 16

    def __init__(self) -> None:
        self.kv_cache = torch.zeros(2, 40, self.num_kv_heads, self.head_size)
        self.impl = self

    def do_kv_cache_update(self, layer: Any, keys: Any, values: Any, kv_cache: Any, slots: Any) -> None:
        kv_cache[0, slots], kv_cache[1, slots] = keys, values


def worker_of(store: GistStore, *, max_bytes: int = 2**20, size: int = 1, rank: int = 0) -> WorkerSide:
    worker = WorkerSide(
        StoredGists(store.path),
        max_bytes=max_bytes,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        rank_and_size=lambda: (rank, size),
        counts=Counter(),
    )
    cache = store["six"]
    worker.layers = [Layer() for _ in cache.keys]
    for layer in worker.layers:
        layer.num_kv_heads, layer.head_size = cache.keys[0].shape[1] // size, cache.keys[0].shape[3]
        layer.kv_cache = torch.zeros(2, 40, layer.num_kv_heads, layer.head_size)
    return worker


def written(worker: WorkerSide, slots: list[int]) -> list[torch.Tensor]:
    """Keys and values ``(2, G, k, D)`` of each layer in these slots."""
    return [layer.kv_cache[:, slots].transpose(1, 2) for layer in worker.layers]


def test_states_are_written_where_the_step_says(store: GistStore) -> None:
    worker, entry, cache = worker_of(store), store.entry("six"), store["six"]
    worker.run(Step([Load(entry, 0, [7, 2])]))
    for found, keys, values in zip(written(worker, [28, 29, 30, 31, 8, 9]), cache.keys, cache.values, strict=True):
        assert torch.equal(found, torch.cat([keys, values]))
    worker.run(Step([Load(entry, 5, [0, 1])]))
    for found, keys in zip(written(worker, [4, 5]), cache.keys, strict=True):
        assert torch.equal(found[0, :, 1:], keys[0, :, 5:]), "only the last one, because five were already there"
        assert not found[:, :, :1].any()
    num_bytes = cache.num_bytes
    assert worker._counts == {"loads": 1, "hits": 1, "tokens": 7, "bytes": num_bytes + num_bytes // 6}
    assert worker._counts.keys() <= COUNTERS.keys()
    assert worker.take_invalid_blocks() == set()


def test_a_load_that_fails_ends_its_request_alone(store: GistStore) -> None:
    worker, entry = worker_of(store), store.entry("six")
    store.remove("one")
    gone = Load(store.entry("six"), 4, [3, 4])
    (file,) = store.path.rglob(f"{entry.key}*")
    file.unlink()
    worker.run(Step([gone], {"refused": [9]}))
    assert worker.take_invalid_blocks() == {4, 9}, "the first block was already there"
    assert worker.take_invalid_blocks() == set()
    assert worker.take_ended() == {"refused"}
    assert worker.take_ended() == set()
    assert worker._counts == {"failed": 1}


def test_prepared_gists_are_bounded(store: GistStore) -> None:
    worker = worker_of(store, max_bytes=store["six"].num_bytes)
    for name in ("six", "six", "one", "six"):
        worker.run(Step([Load(store.entry(name), 0, [0, 1])]))
    assert worker._counts["hits"] == 1, "the one pushed out the six"
    assert len(worker.prepared) == 1
    with pytest.raises(GistError, match="max_bytes must be at least 0"):
        worker_of(store, max_bytes=-1)


def test_a_tensor_parallel_worker_takes_its_heads(store: GistStore) -> None:
    cache: GistCache = store["six"]
    found = worker_of(store, size=2, rank=1).prepare(store.entry("six"))
    for (keys, values), all_keys, all_values in zip(found, cache.keys, cache.values, strict=True):
        half = all_keys.shape[1] // 2
        assert torch.equal(keys, all_keys[0, half:].transpose(0, 1))
        assert torch.equal(values, all_values[0, half:].transpose(0, 1))


def test_gists_of_another_shape_are_refused(store: GistStore) -> None:
    worker = worker_of(store)
    worker.layers[-1].head_size += 1
    with pytest.raises(GistError, match=r"the gist has \d+ key heads of size \d+ for this worker, the model \d+ of"):
        worker.prepare(store.entry("six"))
    worker.layers[0].head_size_v = 3
    with pytest.raises(GistError, match=r"values of \d+ numbers for each head, the model's have 3; compress the"):
        worker.prepare(store.entry("six"))
    worker.layers = worker.layers[:-1]
    with pytest.raises(GistError, match=r"the gist has \d layers, this worker \d"):
        worker.prepare(store.entry("six"))
