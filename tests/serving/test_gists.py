"""What a server knows about gists, without any server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gisting.cache import GistCache
from gisting.errors import CacheFormatError, GistError, StoreError
from gisting.models.fingerprint import base_fingerprint, fingerprint
from gisting.models.hub import save_pretrained
from gisting.models.patch import patch
from gisting.serving.gists import (
    GistRefusedError,
    Served,
    StoredGists,
    gist_name,
    head_shard,
    salt_of,
    slots_of,
    with_placeholders,
)
from gisting.store import GistStore
from gisting.tokens import GistTokenizer
from tests import tiny

G = 64


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gists") / "store"
    model, tokenizer = tiny.patched("llama")
    with GistStore(path) as store:
        store.get_or_compress(model, tokenizer, ["w1 w2 w3", "w4"], [3, 1], names=["three", "one"])
    return path


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> GistStore:
    return GistStore(shutil.copytree(filled, tmp_path / "store"))


def served_by(store: GistStore, **changes: object) -> Served:
    (entry,) = [entry for entry in store.list() if entry.name == "three"]
    values = {"models": (entry.model,), "tokenizer": entry.tokenizer, "template": "plain", "gist_token_id": G}
    return Served(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_gists_are_found_as_the_store_has_them_now(store: GistStore) -> None:
    gists = StoredGists(store.path, served_by(store))
    assert gists.find("three").num_gist_tokens == 3
    loaded, kept = gists.load(gists.find("three")), store["three"]
    assert all(map(torch.equal, loaded.keys, kept.keys))
    store.put("three", store["one"])
    assert gists.find("three").num_gist_tokens == 1
    assert gists.find(gists.find("three").key).sha256 == gists.find("three").sha256
    store.remove("three")
    with pytest.raises(GistRefusedError, match="gist 'three' is not in the store") as caught:
        gists.find("three")
    assert caught.value.status == 404


def test_a_file_that_does_not_match_its_entry_is_not_loaded(store: GistStore) -> None:
    cache = store["three"]
    gists = StoredGists(store.path, served_by(store))
    store.put("first", GistCache(cache.values, cache.keys, cache.lengths, cache.origin))
    store.put("second", GistCache(cache.values, tuple(map(torch.clone, cache.values)), cache.lengths, cache.origin))
    first, second = gists.find("first"), gists.find("second")
    assert first.num_bytes == second.num_bytes
    files = [next(store.path.rglob(f"{entry.key}*")) for entry in (first, second)]
    files[0].write_bytes(files[1].read_bytes())  # of the same size, model and k
    with pytest.raises(CacheFormatError, match=f"is altered: its checksum is {second.sha256}"):
        gists.load(first)
    assert torch.equal(gists.load(second).keys[0], cache.values[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"models": ("llama/0", "llama/1")},
            "was made for llama/.*, but this server runs llama/0 or llama/1",
        ),
        ({"tokenizer": "0"}, r"was made with tokenizer .* \(template plain\), but this server has 0"),
    ],
)
def test_gists_of_another_model_or_tokenizer_are_refused(
    store: GistStore, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(GistRefusedError, match=message) as caught:
        StoredGists(store.path, served_by(store, **changes)).find("three")
    assert caught.value.status == 400


def test_a_gist_without_tokens_is_refused(store: GistStore) -> None:
    cache = store["one"]
    empty = GistCache(
        tuple(keys[:, :, :0] for keys in cache.keys),
        tuple(values[:, :, :0] for values in cache.values),
        torch.tensor([0]),
        cache.origin,
    )
    store.put("empty", empty)
    with pytest.raises(GistRefusedError, match="has no tokens"):
        StoredGists(store.path, served_by(store)).find("empty")


@pytest.mark.parametrize("name", ["../three", "", "a/b", "x" * 201, " three"])
def test_an_invalid_name_is_refused(store: GistStore, name: str) -> None:
    with pytest.raises(GistRefusedError, match="name must be 1 to 200"):
        StoredGists(store.path).find(name)


def test_a_directory_that_is_not_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        StoredGists(tmp_path)


def test_what_a_server_loads_from_a_checkpoint(tokenizer: GistTokenizer, tmp_path: Path) -> None:
    model = patch(tiny.model("llama"), tokenizer)
    save_pretrained(model, tokenizer, tmp_path / "model")
    served = Served.of_checkpoint(tmp_path / "model", torch.float32)
    models = (fingerprint(model), base_fingerprint(model))
    assert served == Served(models, tokenizer.fingerprint, "plain", G)
    both = Served.of_checkpoint(tmp_path / "model", torch.bfloat16)
    assert both.models[:2] == served.models
    assert len(both.models) == 4
    known = Served.of_checkpoint(tmp_path / "model", torch.bfloat16, fingerprint="llama/9", tokenizer=tokenizer)
    assert known.models == ("llama/9",)
    known = Served.of_checkpoint(tmp_path / "model", torch.bfloat16, fingerprint=["llama/9", "llama/8"])
    assert known.models == ("llama/9", "llama/8")
    with pytest.raises(GistError, match=r"has no gist.json"):
        Served.of_checkpoint(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("params", "found"),
    [(None, None), ({}, None), ({"do_remote_prefill": True}, None), ({"gist": "a"}, "a"), ("gist", None)],
)
def test_the_name_of_a_request(params: object, found: str | None) -> None:
    assert gist_name(params) == found  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gist": 3}, "must be the name of a gist, got 3"),
        ({"gist": None}, "must be the name"),
        ({"gist": "a", "do_remote_prefill": True, "b": 1}, "only .gist., got b, do_remote_prefill as well"),
    ],
)
def test_invalid_names(params: dict[str, object], message: str) -> None:
    with pytest.raises(GistRefusedError, match=message):
        gist_name(params)


def test_placeholders_are_put_in_front() -> None:
    assert with_placeholders([1, 2], 3, G) == [G, G, G, 1, 2]
    assert with_placeholders([G, G, G, 1, 2], 3, G) == [G, G, G, 1, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([G, G, 1], "prompt has 2 gist tokens in front, but the gist has 3"),
        ([G, G, G, G, 1], "prompt has 4 gist tokens in front"),
        ([1, 2, G], r"has a gist token \(64\) at 2"),
        ([G, G, G, 1, G], r"has a gist token \(64\) at 4"),
        ([G, G, G], "nothing after the gist"),
        ([], "nothing after the gist"),
    ],
)
def test_placeholders_that_do_not_fit(ids: list[int], message: str) -> None:
    with pytest.raises(GistRefusedError, match=message):
        with_placeholders(ids, 3, G)


def test_salts_differ_where_blocks_must(store: GistStore) -> None:
    gists = StoredGists(store.path)
    one, three = gists.find("one"), gists.find("three")
    salts = [salt_of(one, "s", None), salt_of(three, "s", None), salt_of(one, "t", None), salt_of(one, "s", "mine")]
    assert len(set(salts)) == 4
    assert salt_of(gists.find(one.key), "s", "") == salts[0]


@pytest.mark.parametrize(
    ("num_heads", "size", "shards"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 2, [[0], [0]]),
        (6, 3, [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_heads_of_tensor_parallel_processes(num_heads: int, size: int, shards: list[list[int]]) -> None:
    assert [list(head_shard(num_heads, rank, size)) for rank in range(size)] == shards


def test_heads_that_cannot_be_shared() -> None:
    with pytest.raises(GistError, match="3 key heads cannot be shared by 2"):
        head_shard(3, 0, 2)


def test_slots_in_a_paged_cache() -> None:
    assert slots_of([7, 2], 4, 0, 6).tolist() == [28, 29, 30, 31, 8, 9]
    assert slots_of([7, 2], 4, 3, 5).tolist() == [31, 8]
    assert slots_of([7], 4, 2, 2).tolist() == []
    assert slots_of([2**33], 4, 0, 1).tolist() == [2**35]
