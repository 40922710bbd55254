"""``GistStore``: what is put in comes out, by name or by text, and everything wrong with a store is reported."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gisting
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheFormatError, CacheMismatchError, GistError, GistTokenError, StoreError
from gisting.models.fingerprint import fingerprint
from gisting.serving.gists import StoredGists
from gisting.store import GistStore
from gisting.store import compressing as compressing_module
from gisting.store import index as index_module
from gisting.store import reading as reading_module
from gisting.store import store as store_module
from gisting.store.index import INDEX, StoreEntry
from gisting.store.objects import Objects
from gisting.store.writing import write_caches
from tests import tiny
from tests.store.made import ORIGIN, is_same, made

DAY = r"\d{4}-\d\d-\d\d"
KEY = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "store"
    GistStore(path).close()
    return path


@pytest.fixture(scope="module")
def of_fifty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fifty") / "store"
    with GistStore(path) as store:
        store.put_many({str(seed): made(seed) for seed in range(50)})
    return path


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> GistStore:
    # A copy, because making a store waits for the disk several times.
    return GistStore(shutil.copytree(empty, tmp_path / "store"))


def file_of(store: GistStore, name: str) -> Path:
    (entry,) = [entry for entry in store.list() if name in (entry.name, entry.key)]
    return store.path / "objects" / entry.key[:2] / f"{entry.key}.gist.safetensors"


def files(store: GistStore) -> list[Path]:
    return sorted((store.path / "objects").rglob("*.gist.safetensors"))


def sql(store: GistStore, *statements: str) -> None:
    """Change the index without the store's knowledge."""
    connection = sqlite3.connect(store.path / INDEX, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


# -- by name -----------------------------------------------------------------------------------------------------------


def test_put_and_get(store: GistStore) -> None:
    store.put("a", made(1))
    store.put("b", made(2, k=3))
    assert is_same(store["a"], made(1))
    assert is_same(store.get(["b", "a", "b"]), GistCache.cat([made(2, k=3), made(1), made(2, k=3)]))
    assert "a" in store
    assert "c" not in store
    assert "" not in store
    assert len(store) == 2
    assert [entry.name for entry in store.list()] == ["a", "b"]


def test_put_replaces(store: GistStore) -> None:
    store.put("a", made(1))
    store.put("a", made(2))
    assert is_same(store["a"], made(2))
    assert len(store) == 1
    assert len(files(store)) == 1, "unused files are deleted"


def test_names_of_one_cache_share_a_file(store: GistStore) -> None:
    store.put_many({"a": made(1), "b": made(1), "c": made(2)})
    assert len(store) == 3
    assert len(files(store)) == 2
    store.remove("a")
    assert is_same(store["b"], made(1))
    store.remove("b")
    assert len(files(store)) == 1


def test_put_many_puts_a_batch(store: GistStore) -> None:
    batch = GistCache.cat([made(seed, k) for seed, k in enumerate((1, 5, 2))])
    store.put_many(dict(zip("abc", batch, strict=True)))
    assert is_same(store.get(["a", "b", "c"]), batch)
    assert store["a"].num_slots == 1


def test_put_many_is_all_or_nothing(store: GistStore) -> None:
    bad = made(2)
    bad.keys[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(GistError, match="NaN"):
        store.put_many({"a": made(1), "b": bad})
    assert len(store) == 0
    assert store.verify() == []


def test_what_comes_back_may_be_changed(store: GistStore) -> None:
    store.put("a", made(1))
    for _ in range(2):
        found = store["a"]
        found.keys[0].zero_()
        assert is_same(store["a"], made(1))


def test_list_has_every_field(store: GistStore) -> None:
    store.put("a", made(1, k=3))
    (entry,) = store.list()
    assert entry == StoreEntry(
        name="a",
        key=entry.key,
        is_keyed_by_text=False,
        num_gist_tokens=3,
        num_prompt_tokens=None,
        num_bytes=file_of(store, "a").stat().st_size,
        sha256=entry.sha256,
        storage="float32",
        model=ORIGIN.model,
        tokenizer=ORIGIN.tokenizer,
        template="plain",
        condition="gist",
        created=entry.created,
    )
    assert re.fullmatch("[0-9a-f]{64}", entry.key)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry.created)
    assert is_same(store[entry.key], made(1, k=3)), "a key works like a name"
    assert entry.key in store


@pytest.mark.parametrize("storage", [None, "int8"])
def test_what_is_known_about_a_gist_is_kept_and_can_be_added_to(tmp_path: Path, storage: str | None) -> None:
    store = GistStore(tmp_path / "store", storage=storage)
    store.put_many({"a": made(1).with_about(distilled={"inputs": 80}), "b": made(2), "c": made(2)})
    before, states = store.entry("b"), store["b"]
    assert store.about("a") == {"distilled": {"inputs": 80}}
    assert store.about("b") is None
    store.note("b", quality={"kept": 0.5})
    store.note("a", quality={"kept": 1})
    assert store["a"].about == ({"distilled": {"inputs": 80}, "quality": {"kept": 1}},)
    assert store["c"].about == store["b"].about == ({"quality": {"kept": 0.5}},), "another name of the same gist"
    assert is_same(store["b"], states), "the states are as before"
    assert store.entry("b").created == before.created
    assert store.entry("b").storage == before.storage
    assert before.key not in store
    assert len(files(store)) == 2
    assert store.verify() == []


@pytest.mark.parametrize("change", ["put", "remove", "rename", "alias"])
def test_a_note_undoes_nothing_that_another_process_does(
    store: GistStore, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Between the look-up of the entry and the write."""
    store.put("a", made(1))
    other = GistStore(store.path)
    changes: dict[str, Callable[[], None]] = {
        "put": lambda: other.put("a", made(2)),
        "remove": lambda: other.remove("a"),
        "rename": lambda: other.rename("a", "b"),
        "alias": lambda: other.put("b", made(1)),
    }
    todo = [changes[change]]

    def write_then_change(*arguments: Any) -> Any:
        found = write_caches(*arguments)
        if todo:
            todo.pop()()
        return found

    monkeypatch.setattr("gisting.store.store.write_caches", write_then_change)
    if change in ("remove", "rename"):
        with pytest.raises(StoreError, match="has no entry 'a'"):
            store.note("a", quality={"kept": 1})
        assert [entry.name for entry in store.list()] == ([] if change == "remove" else ["b"])
    else:
        store.note("a", quality={"kept": 1})
        assert is_same(store["a"], made(2 if change == "put" else 1))
        assert [entry.name for entry in store.list()] == (["a"] if change == "put" else ["a", "b"])
        assert all(store.about(str(entry.name)) == {"quality": {"kept": 1}} for entry in store.list())
    assert store.verify() == []


def test_a_note_about_another_gist_is_refused(store: GistStore) -> None:
    store.put("a", made(1))
    read = store.entry("a")
    store.note("a", expected_sha256=read.sha256, quality={"kept": 1})
    with pytest.raises(StoreError, match="'a' was replaced or noted about after it was read, so the facts may be"):
        store.note("a", expected_sha256=read.sha256, quality={"kept": 0})
    assert store.about("a") == {"quality": {"kept": 1}}


def test_a_note_refuses(store: GistStore) -> None:
    store.put("a", made(1))
    with pytest.raises(StoreError, match="has no entry 'b'"):
        store.note("b", quality={})
    with pytest.raises(GistError, match="JSON"):
        store.note("a", quality=float("nan"))
    with pytest.raises(StoreError, match="nothing can be noted about 'a'"):
        GistStore(store.path, is_read_only=True).note("a", quality={})
    assert store.about("a") is None


def test_rename(store: GistStore) -> None:
    store.put_many({"a": made(1), "b": made(2)})
    store.rename("a", "c")
    assert [entry.name for entry in store.list()] == ["b", "c"]
    assert is_same(store["c"], made(1))
    store.rename("c", "c")
    for arguments, message in ((("c", "b"), "'b' is taken"), (("a", "d"), "has no entry 'a'"), (("c", ""), "^name")):
        with pytest.raises(StoreError, match=message):
            store.rename(*arguments)


def test_entry(store: GistStore) -> None:
    """The entry is what the index says, whether or not the file exists."""
    store.put("a", made(1))
    (entry,) = store.list()
    file_of(store, "a").unlink()
    assert store.entry("a") == entry
    assert store.entry(entry.key).key == entry.key
    with pytest.raises(StoreError, match=r"has no entry 'b'; store.list\(\) shows what it has"):
        store.entry("b")
    with pytest.raises(StoreError, match="'a/b'"):
        store.entry("a/b")


def test_remove(store: GistStore) -> None:
    store.put_many({"a": made(1), "b": made(1), "c": made(2), "d": made(3)})
    with pytest.raises(StoreError, match=r"store has no entry 'x', 'y'; store.list\(\) shows what it has$"):
        store.remove(["c", "x", "y"])
    assert "c" in store, "nothing is removed if something is missing"
    store.remove(["c"])
    key = store.list()[0].key
    store.remove(key)
    assert [entry.name for entry in store.list()] == ["d"]
    assert len(files(store)) == 1
    assert store.verify() == []


GOOD_NAMES = ["a", "system prompt", "-", "...", "日本語", "é", "a" * 200, "a'b\"c;--", "%41", "KEY", "0" * 63]
BAD_NAMES: list[Any] = [
    *("", " a", "a ", ".", "..", "a/b", "a\\b", "../x", "a\nb", "a\x00b", "\x7f", "a\u200bb", "\u202eb", "\ud800"),
    *("a" * 201, KEY, None, 3, b"a", Path("a")),
]


@pytest.mark.parametrize("name", GOOD_NAMES, ids=ascii)
def test_good_names(store: GistStore, name: str) -> None:
    store.put(name, made(1))
    assert name in store
    assert is_same(store[name], made(1))
    store.remove(name)
    assert len(store) == 0


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_names(store: GistStore, name: Any) -> None:
    with pytest.raises(
        StoreError, match=r"^name must be 1 to 200 printable characters without / and \\, with no space"
    ):
        store.put(name, made(1))
    assert len(store) == 0
    assert name not in store


def test_two_spellings_are_one_name(store: GistStore) -> None:
    store.put("cafe\u0301", made(1))
    assert is_same(store["caf\u00e9"], made(1))
    assert store.list()[0].name == "caf\u00e9"
    with pytest.raises(StoreError, match=r"^two names are the same in Unicode"):
        store.put_many({"cafe\u0301": made(1), "caf\u00e9": made(2)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda store: store.get([]), StoreError, "^names is empty; give at least one name or key$"),
        (lambda store: store["b"], StoreError, "has no entry 'b'; "),
        (lambda store: store[KEY], StoreError, "has no entry '0123"),
        (lambda store: store[3], StoreError, r"^store\[...\] takes one name or key, got 3; for several use store.get"),
        (lambda store: store.get([f"x{i}" for i in range(9)]), StoreError, "'x3', 'x4' and 4 more; "),
        (
            lambda store: store.put("b", GistCache.cat([made(1)] * 3)),
            GistError,
            "^'b' must be a cache of one prompt, got 3",
        ),
        (
            lambda store: store.get(["a", "other"]),
            CacheMismatchError,
            f"^'a' of {DAY}, 'other' of {DAY} are not of one kind: caches belong to different origins",
        ),
        (
            lambda store: store.get(["a", "half"]),
            CacheMismatchError,
            f"^'a' of {DAY}, 'half' of {DAY} are not .*: caches are torch.float32",
        ),
        (lambda store: GistStore(store.path, storage="int4"), GistError, "^storage must be None or one of float32"),
        (
            lambda store: GistStore(store.path, max_open_bytes=-1),
            GistError,
            "^max_open_bytes must be at least 0, got -1",
        ),
    ],
    ids=["nothing", "name", "key", "type", "many", "batch", "origins", "dtypes", "storage", "bytes"],
)
def test_refusals(store: GistStore, call: Callable[[GistStore], Any], error: type[GistError], message: str) -> None:
    other = CacheOrigin("llama/ffffffffffff", "ba9876543210", "plain", "gist")
    store.put_many({"a": made(1), "other": made(1, origin=other), "half": made(1, dtype=torch.bfloat16)})
    with pytest.raises(error, match=message):
        call(store)


@pytest.mark.parametrize("storage", ["bfloat16", "float8_e4m3", "int8"])
def test_storage(tmp_path: Path, storage: str) -> None:
    full, small = GistStore(tmp_path / "full"), GistStore(tmp_path / "small", storage=storage)
    for store in (full, small):
        store.put("a", made(1, k=64))
    assert small.list()[0].storage == storage
    assert small.list()[0].num_bytes < 0.9 * full.list()[0].num_bytes
    found = small["a"]
    assert found.dtype == torch.float32
    assert not is_same(found, made(1, k=64))
    assert torch.allclose(found.keys[0], made(1, k=64).keys[0], rtol=0.1, atol=0.05)


# -- by text -----------------------------------------------------------------------------------------------------------


class Compressions:
    """Counts what is compressed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        inner = compressing_module.compress

        def compress(model: Any, tokenizer: Any, prompts: Any, *args: Any, **kwargs: Any) -> GistCache:
            self.calls.append(list(prompts))
            return inner(model, tokenizer, prompts, *args, **kwargs)

        monkeypatch.setattr(compressing_module, "compress", compress)


@pytest.fixture
def compressions(monkeypatch: pytest.MonkeyPatch) -> Compressions:
    return Compressions(monkeypatch)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
def test_get_or_compress_is_compress(store: GistStore, name: str, compressions: Compressions) -> None:
    model, tokenizer = tiny.patched(name)
    prompts = [tiny.words(count, count) for count in (9, 4, 12)]
    wanted = gisting.compress(model, tokenizer, prompts, [3, 1, 2])
    for _ in range(2):
        found = store.get_or_compress(model, tokenizer, prompts, [3, 1, 2])
        # Row by row, because the unused slots in front of a short gist may differ.
        assert all(is_same(one, other) for one, other in zip(found, wanted, strict=True))
    assert compressions.calls == [prompts], "once"
    assert gisting.generate(model, tokenizer, ["w1", "w2", "w3"], cache=found, max_new_tokens=4)
    assert sorted(entry.num_gist_tokens for entry in store.list()) == [1, 2, 3]
    lengths = {entry.num_gist_tokens: entry.num_prompt_tokens for entry in store.list()}
    encodings = tokenizer.encode_prompts(prompts, [3, 1, 2])
    assert lengths == {encoding.num_gist_tokens: encoding.gist_start for encoding in encodings}


def test_a_note_on_a_text_leaves_it_where_it_is_found(store: GistStore, compressions: Compressions) -> None:
    model, tokenizer = tiny.patched("llama")
    store.get_or_compress(model, tokenizer, ["w1 w2"], 2, names=["a"])
    before = store.entry("a")
    store.note("a", quality={"kept": 0.5})
    after = store.entry("a")
    assert (after.key, after.num_prompt_tokens, after.is_keyed_by_text) == (before.key, 2, True)
    (about,) = store.get_or_compress(model, tokenizer, ["w1 w2"], 2).about
    assert about == {"quality": {"kept": 0.5}, "prompt_sha256": hashlib.sha256(b"w1 w2").hexdigest()}
    assert compressions.calls == [["w1 w2"]]
    assert store.verify() == []


def test_only_what_is_missing_is_compressed_and_once(store: GistStore, compressions: Compressions) -> None:
    model, tokenizer = tiny.patched("llama")
    a, b, c = (tiny.words(6, seed) for seed in range(3))
    store.get_or_compress(model, tokenizer, [a])
    found = store.get_or_compress(model, tokenizer, [b, a, c, b])
    assert compressions.calls == [[a], [b, c]]
    assert torch.allclose(found.keys[1], gisting.compress(model, tokenizer, [b, a, c, b]).keys[1], atol=1e-5)
    assert torch.equal(found.keys[0][0], found.keys[0][3])
    store.get_or_compress(model, tokenizer, [a], 2)
    store.get_or_compress(model, tokenizer, [a], condition="positive")
    assert compressions.calls[2:] == [[a], [a]], "another k and another condition are other entries"
    assert len(store) == 5


def test_a_prompt_in_chunks_is_another_entry(store: GistStore, compressions: Compressions) -> None:
    """Each length makes its own entry; without a length the key is the same as before chunks existed."""
    model, tokenizer = tiny.patched("llama")
    prompt = tiny.words(9, 1)
    for chunk_length in (None, 4, 5, 5, None, 20):
        found = store.get_or_compress(model, tokenizer, [prompt], 2, chunk_length=chunk_length)
        assert is_same(found, gisting.compress(model, tokenizer, [prompt], 2, chunk_length=chunk_length))
    assert len(compressions.calls) == 4
    held = sorted((entry.num_gist_tokens, entry.num_prompt_tokens) for entry in store.list())
    assert held == [(2, 9), (2, 9), (4, 9), (6, 9)]
    owner = [fingerprint(model), tokenizer.fingerprint, "gist", "torch.float32"]
    parts = ["gist of a text", tokenizer.template.prompt_text(prompt), 2, *owner]
    assert hashlib.sha256(json.dumps(parts).encode()).hexdigest() in store
    with pytest.raises(GistError, match="chunk_length must be at least 1, got 0"):
        store.get_or_compress(model, tokenizer, [prompt], 2, chunk_length=0)


def test_another_model_tokenizer_template_or_dtype_is_another_entry(
    store: GistStore, compressions: Compressions
) -> None:
    model, tokenizer = tiny.patched("llama")
    prompt = tiny.words(6, 1)
    store.get_or_compress(model, tokenizer, [prompt])
    with torch.no_grad():
        next(model.parameters())[5] += 0.5
    store.get_or_compress(model, tokenizer, [prompt])
    store.get_or_compress(*tiny.patched("llama", "alpaca"), [prompt])
    half = model.to(torch.bfloat16)
    found = store.get_or_compress(half, tokenizer, [prompt])
    assert found.dtype == torch.bfloat16
    assert len(compressions.calls) == 4
    # The bfloat16 weights as float32 have the fingerprint of the bfloat16 model.
    assert store.get_or_compress(model.float(), tokenizer, [prompt]).dtype == torch.float32
    assert len(compressions.calls) == 5


def test_names_of_prompts(store: GistStore, compressions: Compressions) -> None:
    model, tokenizer = tiny.patched("llama")
    a, b = tiny.words(6, 1), tiny.words(6, 2)
    store.get_or_compress(model, tokenizer, [a, b, b], names=["x", None, "y"])
    assert [entry.name for entry in store.list()] == ["x", "y"]
    first = store["x"]
    store.get_or_compress(model, tokenizer, [b], names=["x"])
    assert is_same(store["x"], store["y"])
    assert len(compressions.calls) == 1, "it is found by its text"
    store.get_or_compress(model, tokenizer, [a], names=["z"])
    assert is_same(store["z"], first)
    assert len(compressions.calls) == 1, "the earlier entry of the name is still there"
    store.get_or_compress(model, tokenizer, [a], 2, names=["x"])
    assert store["x"].num_gist_tokens == [2]


def test_a_name_that_was_put_moves(store: GistStore) -> None:
    model, tokenizer = tiny.patched("llama")
    store.put("x", made(1))
    found = store.get_or_compress(model, tokenizer, ["w1 w2"], names=["x"])
    assert is_same(store["x"], found)
    assert len(files(store)) == 1, "a cache that was put in can only be found by its name"


def test_the_first_call_returns_what_the_second_does(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    store = GistStore(tmp_path / "store", storage="int8")
    prompts = [tiny.words(6, 1), tiny.words(9, 2)]
    first = store.get_or_compress(model, tokenizer, prompts, 2)
    assert is_same(first, store.get_or_compress(model, tokenizer, prompts, 2))
    assert not is_same(first, gisting.compress(model, tokenizer, prompts, 2))


def test_a_repair_that_died_halfway_is_made_again(store: GistStore, compressions: Compressions) -> None:
    """Between renaming the new file into place and the commit: a whole file of the same size, and an old entry."""
    pair = tiny.patched("llama")
    wanted = store.get_or_compress(*pair, ["w1 w2"], 2, names=["a"])
    path, entry = file_of(store, "a"), store.entry("a")
    other = replace(wanted.to("cpu"), keys=tuple(keys + 1 for keys in wanted.to("cpu").keys))
    other.save(path)
    assert path.stat().st_size == entry.num_bytes
    fresh = GistStore(store.path)
    assert [fault.kind for fault in fresh.verify()] == ["torn"]
    for read in (
        lambda: fresh["a"],
        lambda: fresh.table(["a"]),
        lambda: fresh.save_pretrained(store.path.parent / "shared"),
        lambda: StoredGists(store.path).load(entry),
    ):
        with pytest.raises(CacheFormatError, match="its checksum is"):
            read()
    assert is_same(fresh.get_or_compress(*pair, ["w1 w2"], 2), wanted)
    assert len(compressions.calls) == 2
    assert fresh.verify() == []
    assert is_same(GistStore(store.path)["a"], wanted)


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "link"])
def test_a_damaged_entry_is_made_again(store: GistStore, compressions: Compressions, damage: str) -> None:
    model, tokenizer = tiny.patched("llama")
    wanted = store.get_or_compress(model, tokenizer, ["w1 w2"], names=["x"])
    store.close()
    spoil(file_of(store, "x"), damage)
    with pytest.raises(CacheFormatError, match=r"the file of an entry is missing or damaged \("):
        store.get("x")
    assert [fault.kind for fault in store.verify()] == ["torn"]
    assert is_same(store.get_or_compress(model, tokenizer, ["w1 w2"], names=["x"]), wanted)
    assert len(compressions.calls) == 2
    assert store.verify() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "w1 w2"}, GistError, "^prompts must be a non-empty list of texts"),
        ({"prompts": []}, GistError, "^prompts must be a non-empty list of texts"),
        ({"prompts": ["w1", None]}, GistError, "^prompts must be a non-empty list of texts"),
        ({"prompts": [" "]}, GistError, "^prompt 0 is empty"),
        ({"num_gist_tokens": 0}, GistTokenError, "0"),
        (
            {"num_gist_tokens": [1]},
            GistError,
            "^num_gist_tokens must be one number for all 2 prompts or one for",
        ),
        ({"names": ["a"]}, StoreError, "^names must be a list of 2 items, a name or None for each prompt, got"),
        ({"names": "ab"}, StoreError, "^names must be a list of 2 items, a name or None for each prompt, got 'ab'"),
        ({"names": ["a", "a"]}, StoreError, "^names gives 'a' to two prompts; give each prompt a different name$"),
        ({"names": ["a", "a/b"]}, StoreError, "^name must be 1 to 200"),
        ({"condition": "none"}, GistError, "^condition must be one of"),
    ],
    ids=str,
)
def test_get_or_compress_refuses(
    store: GistStore, arguments: dict[str, Any], error: type[GistError], message: str
) -> None:
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(error, match=message):
        store.get_or_compress(model, tokenizer, **{"prompts": ["w1", "w2"], **arguments})
    assert len(store) == 0
    assert files(store) == []


def test_an_unpatched_model_is_refused(store: GistStore) -> None:
    with pytest.raises(GistError, match="patch"):
        store.get_or_compress(tiny.model("llama"), tiny.tokenizer(), ["w1"])


def test_prompts_are_not_stored(store: GistStore) -> None:
    model, tokenizer = tiny.patched("llama")
    store.get_or_compress(model, tokenizer, ["w11 w22 w33 w44"], names=["x"])
    store.close()
    for path in [path for path in store.path.rglob("*") if path.is_file()]:
        assert b"w22 w33" not in path.read_bytes(), path


# -- open caches -------------------------------------------------------------------------------------------------------


def test_opened_caches_are_bounded(store: GistStore) -> None:
    """The limit counts what they really take, which is more than their states."""
    store.put_many({name: made(seed) for seed, name in enumerate("abc")})
    store.get("a")
    one = store._reader.open_caches.num_bytes
    assert made(1).num_bytes < one < 20_000
    bounded = GistStore(store.path, max_open_bytes=2 * one)
    for name in "abc":
        bounded.get(name)
    assert len(bounded._reader.open_caches) == 2


def test_an_open_cache_is_not_read_again(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_many({"a": made(1), "b": made(2)})
    loads: list[Path] = []
    inner = reading_module.load_entry

    def load_entry(path: Path, entry: StoreEntry) -> GistCache:
        loads.append(path)
        return inner(path, entry)

    monkeypatch.setattr(reading_module, "load_entry", load_entry)
    for _ in range(3):
        store.get(["a", "b", "a"])
    assert loads == [file_of(store, "a"), file_of(store, "b")]
    without = GistStore(store.path, max_open_bytes=0)
    for _ in range(3):
        without.get("a")
    assert len(loads) == 5


def test_what_another_replaced_or_removed_is_noticed(store: GistStore) -> None:
    other = GistStore(store.path)
    store.put_many({"a": made(1), "b": made(2)})
    other.get(["a", "b"])
    store.put("a", made(3))
    assert is_same(other["a"], made(3))
    store.remove("b")
    with pytest.raises(StoreError, match="has no entry 'b'"):
        other.get("b")


def test_an_entry_that_is_replaced_between_lookup_and_opening(
    store: GistStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", made(1))
    inner, other = reading_module.load_entry, GistStore(store.path)

    def load_entry(path: Path, entry: StoreEntry) -> GistCache:
        if is_first := not done:
            done.append(is_first)
            other.put("a", made(2))
        return inner(path, entry)

    done: list[bool] = []
    monkeypatch.setattr(reading_module, "load_entry", load_entry)
    assert is_same(store["a"], made(2))


def test_an_entry_that_changes_all_the_time(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a", made(1))
    inner, other, seeds = reading_module.load_entry, GistStore(store.path), iter(range(2, 99))

    def load_entry(path: Path, entry: StoreEntry) -> GistCache:
        other.put("a", made(next(seeds)))
        return inner(path, entry)

    monkeypatch.setattr(reading_module, "load_entry", load_entry)
    with pytest.raises(StoreError, match=r"'a' changed 3 times while being read; find out what replaces them$"):
        store.get("a")


# -- verify and gc -----------------------------------------------------------------------------------------------------


def spoil(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "link":
        elsewhere = path.with_name("elsewhere")
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    else:
        raise AssertionError(damage)


def test_verify_of_a_good_store(store: GistStore) -> None:
    store.put_many({str(seed): made(seed) for seed in range(20)})
    assert store.verify() == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"^torn: .*\.gist\.safetensors is missing$"),
        ("truncated", r"^torn: .* is truncated or altered: it has \d+ bytes, its entry says \d+$"),
        ("altered", r"^torn: .* is altered: its checksum does not match"),
        ("link", r"^torn: .* is truncated or altered: it has \d+ bytes"),
    ],
)
def test_verify_finds_damaged_files(store: GistStore, damage: str, message: str) -> None:
    store.put_many({"a": made(1), "b": made(2)})
    store.get(["a", "b"])
    spoil(file_of(store, "b"), damage)
    (fault,) = store.verify()
    assert re.match(message, str(fault))
    assert not fault.is_harmless
    assert fault.key == next(entry.key for entry in store.list() if entry.name == "b")
    store.close()
    assert is_same(store["a"], made(1))
    with pytest.raises(CacheFormatError, match="missing or damaged"):
        store.get(["a", "b"])
    store.put("b", made(2))
    assert store.verify() == [], "putting it in again repairs it"


def test_verify_finds_another_good_file(store: GistStore) -> None:
    other = CacheOrigin("llama/ffffffffffff", "ba9876543210", "plain", "gist")
    store.put_many({"a": made(1), "b": made(2), "c": made(3, origin=other), "d": made(4, k=3)})
    same_size = file_of(store, "b").read_bytes()
    file_of(store, "a").write_bytes(same_size)
    (fault,) = store.verify()
    assert re.search("its checksum is [0-9a-f]{64}, its entry says [0-9a-f]{64}", str(fault))
    store.remove("a")
    shutil.copy(file_of(store, "c"), file_of(store, "b"))
    store.close()
    with pytest.raises(CacheFormatError, match=r"is not the file that its entry describes: it holds k=\[2\] of .*ffff"):
        store.get("b")


def test_verify_and_gc_of_what_only_takes_space(store: GistStore) -> None:
    store.put_many({"a": made(1), "b": made(2)})
    orphan = store.path / "objects" / KEY[:2] / f"{KEY}.gist.safetensors"
    orphan.parent.mkdir(exist_ok=True)
    shutil.copy(file_of(store, "a"), orphan)
    left = store.path / "tmp" / "left"
    left.mkdir()
    (left / "0").write_bytes(b"0" * 100)
    (store.path / "tmp" / "stray").write_bytes(b"0" * 10)
    size = orphan.stat().st_size
    faults = store.verify()
    assert [(fault.kind, fault.is_harmless) for fault in faults] == [("orphan", True), *[("temporary", True)] * 2]
    assert store.gc() == size + 110
    assert store.verify() == []
    assert store.gc() == 0
    assert is_same(store.get(["a", "b"]), GistCache.cat([made(1), made(2)]))


def test_gc_leaves_writers_alone(store: GistStore) -> None:
    with store._objects.writing() as folder:
        (folder / "0").write_bytes(b"0")
        other = GistStore(store.path)
        assert other.verify() == []
        assert other.gc() == 0
        assert (folder / "0").exists()
    assert list((store.path / "tmp").iterdir()) == []


def test_gc_by_model_and_name(store: GistStore) -> None:
    model, tokenizer = tiny.patched("llama")
    store.get_or_compress(model, tokenizer, ["w1", "w2"], names=["x", None])
    store.put("a", made(1))
    before = sum(path.stat().st_size for path in files(store))
    (unnamed,) = [entry for entry in store.list() if entry.name is None]
    assert store.gc() == 0
    assert store.gc(keep_unnamed=False) == unnamed.num_bytes
    assert [entry.name for entry in store.list()] == ["a", "x"]
    assert store.gc(keep_models=[ORIGIN.model]) > 0
    assert [entry.name for entry in store.list()] == ["a"]
    assert before > sum(path.stat().st_size for path in files(store)) > 0


@pytest.mark.parametrize("models", [ORIGIN.model, [], ["llama/typo"], [ORIGIN.model, "llama/typo"]], ids=str)
def test_gc_keeps_everything_if_a_model_is_unknown(store: GistStore, models: Any) -> None:
    store.put("a", made(1))
    with pytest.raises(StoreError, match=rf"keep_models must be a list of models in the store \('{ORIGIN.model}'"):
        store.gc(keep_models=models)
    assert is_same(store["a"], made(1))


def test_gc_of_a_damaged_store_deletes_nothing(of_fifty: Path, tmp_path: Path) -> None:
    """The index may be wrong: a file without an entry may belong to an entry that was lost."""
    store = GistStore(shutil.copytree(of_fifty, tmp_path / "store"))
    store.close()
    path = store.path / "index.sqlite"
    whole, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(30):
        broken = bytearray(whole)
        for _ in range(200):
            broken[chance.randrange(100, len(broken))] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            with GistStore(store.path) as damaged:
                damaged.gc()
        except CacheFormatError:
            refused += 1
        for log in store.path.glob("index.sqlite-*"):
            log.unlink()
        assert len(files(store)) == 50
    assert refused > 15
    path.write_bytes(whole)
    files(store)[0].unlink()
    with pytest.raises(CacheFormatError, match=r"is damaged \(the file of [0-9a-f]{64} is missing\), so nothing is"):
        GistStore(store.path).gc()


def test_a_process_may_change_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        GistStore(tmp_path / name / "gists").close()
    monkeypatch.chdir(tmp_path / "here")
    store = GistStore("gists")
    monkeypatch.chdir(tmp_path / "there")
    store.put("a", made(1))
    assert is_same(GistStore(tmp_path / "here" / "gists")["a"], made(1))
    assert GistStore("gists").verify() == []


def test_a_directory_that_is_replaced_while_it_is_open(store: GistStore) -> None:
    store.put("old", made(1))
    moved = store.path.rename(store.path.parent / "moved")
    with pytest.raises(StoreError, match=r"objects is missing, or is a link or file; it must be a directory"):
        store.put("a", made(2))
    with pytest.raises(StoreError, match=r"index\.sqlite was moved or deleted while the store was open"):
        store.get("old")
    GistStore(store.path).close()
    store.put("a", made(2))
    assert [entry.name for entry in GistStore(store.path).list()] == ["a"]
    assert [entry.name for entry in GistStore(moved).list()] == ["old"]
    assert GistStore(store.path).verify() == GistStore(moved).verify() == []


def test_a_link_in_place_of_a_directory_is_not_followed(store: GistStore, tmp_path: Path) -> None:
    store.put("a", made(1))
    store.close()
    (file,) = files(store)
    outside = file.parent.rename(tmp_path / "outside")
    file.parent.symlink_to(outside)
    fresh = GistStore(store.path)
    with pytest.raises(CacheFormatError, match=r"is a link; the files of a store are never reached through one"):
        fresh.get("a")
    assert [fault.kind for fault in fresh.verify()] == ["torn"]
    fresh.remove("a")
    assert (outside / file.name).is_file()


def test_a_template_that_could_not_be_read_back_is_not_stored(store: GistStore) -> None:
    with pytest.raises(StoreError, match=r"cache\.origin must hold printable text"):
        store.put("a", made(1, origin=CacheOrigin("m", "t", "two\nlines", "gist")))
    assert store.verify() == []


# -- the directory -----------------------------------------------------------------------------------------------------


def test_a_store_is_opened_again(store: GistStore) -> None:
    store.put("a", made(1))
    store.close()
    assert is_same(GistStore(str(store.path))["a"], made(1))
    assert is_same(store["a"], made(1)), "a closed store opens again"
    with GistStore(store.path) as other:
        assert "a" in other
    assert repr(store) == f"GistStore({str(store.path)!r}, 1 entries)"


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"is not a store and not empty \(it holds 'notes.txt'\); give the directory"):
        GistStore(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(StoreError, match=r"notes.txt is a file; give the directory of a store"):
        GistStore(tmp_path / "notes.txt")
    with pytest.raises(StoreError, match=r"absent is not a store: it has no index.sqlite"):
        GistStore(tmp_path / "absent", is_read_only=True)


@pytest.mark.parametrize("left", [[], ["objects"], ["objects", "tmp"], ["objects", "tmp", "index.sqlite"]], ids=str)
def test_a_store_that_was_not_finished_is(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        if name == "index.sqlite":
            (tmp_path / name).touch()
        else:
            (tmp_path / name).mkdir()
    store = GistStore(tmp_path)
    store.put("a", made(1))
    assert store.verify() == []


def spoiled_index(store: GistStore, how: str) -> None:
    path = store.path / INDEX
    data = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "no database":
            path.write_bytes(b"x" * 10000)
        case "another database":
            path.unlink()
            sql(store, "CREATE TABLE other (a)")
        case "later":
            sql(store, "PRAGMA user_version=3")
        case "trigger":
            sql(store, "CREATE TRIGGER t AFTER INSERT ON names BEGIN DELETE FROM entries; END")
        case "view":
            sql(store, "DROP TABLE names", "CREATE VIEW names AS SELECT key AS name, key FROM entries")
        case "link":
            path.rename(store.path.parent / "elsewhere")
            path.symlink_to(store.path.parent / "elsewhere")
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "zeros":
            path.write_bytes(data[:4096] + bytes(len(data) - 4096))
        case _:
            raise AssertionError(how)


def test_what_a_killed_write_left_is_no_other_content(of_fifty: Path, tmp_path: Path) -> None:
    """Beside a store that another process is rebuilding, there may be a journal that is being written."""
    store = GistStore(shutil.copytree(of_fifty, tmp_path / "store"))
    store.close()
    (store.path / ".0123456789abcdef.tmp").write_bytes(b"{")
    spoiled_index(store, "missing")
    with pytest.raises(CacheFormatError, match="is missing or empty; make it again from the files"):
        GistStore(store.path)
    (store.path / "notes.tmp").write_bytes(b"{")
    with pytest.raises(StoreError, match="is not a store and not empty"):
        GistStore(store.path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            "has files but its index.sqlite is missing or empty; make it again from the files: gisting store rebuild",
        ),
        (
            "empty",
            "has files but its index.sqlite is missing or empty; make it again from the files: gisting store rebuild",
        ),
        ("no database", "index.sqlite is damaged or not the index of a store"),
        ("another database", "index.sqlite is an SQLite database but not the index of a store"),
        ("later", "index.sqlite has format 3, this version reads up to 2; upgrade gisting"),
        ("trigger", "index.sqlite is altered: its tables are not the tables of a store"),
        ("view", "index.sqlite is altered: its tables are not the tables of a store"),
        ("link", "index.sqlite is a link or not a file"),
        ("truncated", "index.sqlite is damaged or not the index of a store"),
        ("zeros", "index.sqlite is damaged or not the index of a store"),
    ],
)
@pytest.mark.parametrize("is_read_only", [False, True], ids=["write", "read-only"])
def test_a_bad_index_is_refused(of_fifty: Path, tmp_path: Path, how: str, message: str, is_read_only: bool) -> None:
    store = GistStore(shutil.copytree(of_fifty, tmp_path / "store"))
    store.close()
    spoiled_index(store, how)
    if is_read_only and how in ("missing", "empty"):
        message = "index.sqlite|is not a store: it has no index.sqlite"
    with pytest.raises((CacheFormatError, StoreError), match=message):
        GistStore(store.path, is_read_only=is_read_only).get([str(seed) for seed in range(50)])


@pytest.mark.parametrize(
    "change",
    [
        "key = '../../../../etc/passwd'",
        f"key = upper('{KEY}')",
        "key = x'00'",
        "sha256 = 'x'",
        "num_bytes = -1",
        "num_bytes = 'many'",
        "num_gist_tokens = 1e300",
        "num_gist_tokens = 9223372036854775807",
        "num_prompt_tokens = 'x'",
        "storage = x'ff'",
        "model = printf('%.*c', 2000, 'x')",
        "is_keyed_by_text = 7",
        "created = x'00'",
    ],
)
def test_a_bad_row_is_refused(store: GistStore, change: str) -> None:
    store.put("a", made(1))
    sql(store, f"UPDATE entries SET {change}", "UPDATE names SET key = (SELECT key FROM entries)")
    for call in (lambda: store["a"], store.list, store.verify):
        with pytest.raises(
            CacheFormatError,
            match=r"index\.sqlite is altered: it has an invalid entry, name 'a', key",
        ):
            call()


@pytest.mark.parametrize("name", ["a/b", "..", KEY, "cafe\u0301", "a" * 201])
def test_a_bad_name_in_the_index_is_refused(store: GistStore, name: str) -> None:
    store.put("a", made(1))
    sql(store, f"UPDATE names SET name = '{name}'")
    with pytest.raises(CacheFormatError, match=r"index\.sqlite is altered: it has an invalid entry, name"):
        store.list()


def test_a_huge_value_is_not_read(store: GistStore) -> None:
    store.put("a", made(1))
    sql(store, "UPDATE entries SET model = printf('%.*c', 9000000, 'x')")
    with pytest.raises((StoreError, CacheFormatError), match=r"index\.sqlite"):
        store.get("a")


def test_a_name_without_its_entry_is_a_fault(store: GistStore) -> None:
    store.put_many({"a": made(1), "b": made(2)})
    sql(store, "DELETE FROM entries WHERE key = (SELECT key FROM names WHERE name = 'a')")
    faults = store.verify()
    assert [fault.kind for fault in faults] == ["index", "orphan"]
    assert "name 'a' refers to an entry that is not there" in str(faults[0])
    assert is_same(store["b"], made(2))
    store.put("a", made(1))
    assert store.verify() == []


@pytest.mark.parametrize("name", ["objects", "tmp"])
def test_directories_that_are_links_are_refused(store: GistStore, name: str) -> None:
    store.put("a", made(1))
    store.close()
    (store.path / name).rename(store.path.parent / "elsewhere")
    (store.path / name).symlink_to(store.path.parent / "elsewhere")
    with pytest.raises(StoreError, match=f"{name} is missing, or is a link or file"):
        GistStore(store.path)


def test_a_link_in_place_of_a_shard_is_not_written_through(store: GistStore) -> None:
    store.put("a", made(1))
    shard, elsewhere = file_of(store, "a").parent, store.path.parent / "elsewhere"
    store.remove("a")
    shard.rmdir()
    elsewhere.mkdir()
    shard.symlink_to(elsewhere)
    with pytest.raises(StoreError, match=r"holds a link in place of a directory; remove it$"):
        store.put("a", made(1))
    assert list(elsewhere.iterdir()) == []
    assert len(store) == 0


def test_read_only(store: GistStore) -> None:
    model, tokenizer = tiny.patched("llama")
    store.get_or_compress(model, tokenizer, ["w1"], names=["x"])
    store.put("a", made(1))
    reader = GistStore(store.path, is_read_only=True)
    assert is_same(reader["a"], made(1))
    assert len(reader.get_or_compress(model, tokenizer, ["w1"], names=["x"])) == 1
    store.put("b", made(2))
    assert is_same(reader["b"], made(2)), "changes by others are seen"
    calls: list[Callable[[], Any]] = [
        lambda: reader.put("c", made(1)),
        lambda: reader.remove("a"),
        lambda: reader.rename("a", "c"),
        reader.gc,
        lambda: reader.get_or_compress(model, tokenizer, ["w1", "w2"]),
        lambda: reader.get_or_compress(model, tokenizer, ["w1"], names=["y"]),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="was opened with is_read_only=True"):
            call()
    assert reader.verify() == []


def test_read_only_where_nothing_can_be_written(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a", made(1))
    store.close()
    store.path.chmod(0o555)
    # The superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    try:
        reader = GistStore(store.path, is_read_only=True)
        assert is_same(reader["a"], made(1))
        assert reader.verify() == []
        assert not (store.path / f"{INDEX}-wal").exists()
    finally:
        store.path.chmod(0o755)


def test_what_others_write_is_seen_where_nothing_can_be_written(
    store: GistStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", made(1))
    store.close()
    # As for a server of another user: this process may not write there, another one may.
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        reader = GistStore(store.path, is_read_only=True)
        assert is_same(reader["a"], made(1))
        for number in range(3):
            store.put("a", made(10 + number))
            store.put(f"b{number}", made(number))
            assert is_same(reader["a"], made(10 + number)), "while the writer has the store open"
            store.remove(f"b{number}")
            assert f"b{number}" not in reader
            store.put("a", made(20 + number))
            store.close()
            assert is_same(reader["a"], made(20 + number)), "and when it has closed it"


def test_an_index_that_is_locked_for_long(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_TIMEOUT_S", 0.05)
    store.put("a", made(1))
    store.close()
    blocker = sqlite3.connect(store.path / INDEX, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="was locked by another process for 0 seconds"):
        store.put("b", made(2))
    assert is_same(store["a"], made(1)), "readers are not blocked"
    blocker.execute("ROLLBACK")
    blocker.close()
    store.put("b", made(2))
    assert is_same(store["b"], made(2))


# -- threads and forks -------------------------------------------------------------------------------------------------


def test_threads_read_and_write_at_once(tmp_path: Path) -> None:
    store = GistStore(tmp_path / "store", max_open_bytes=10 * 20_000)
    store.put_many({f"fixed{seed}": made(seed) for seed in range(20)})

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for turn in range(15):
            seed = int(torch.randint(20, (1,), generator=generator))
            if number % 2:
                assert is_same(store.get([f"fixed{seed}", "fixed0"]), GistCache.cat([made(seed), made(0)]))
            else:
                store.put(f"own{number}", made(1000 * number + turn))
                assert is_same(store[f"own{number}"], made(1000 * number + turn))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert store.verify() == []
    assert store._reader.open_caches.num_bytes <= 10 * 20_000


def in_child(work: Callable[[], None]) -> None:
    """Run ``work`` in a forked child, and fail if it fails."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_store_can_be_used_in_forked_children(store: GistStore) -> None:
    store.put("a", made(1))
    store.get("a")
    inherited = store._index._reader

    def work() -> None:
        assert store._index._reader is None, "the parent's connection is not used"
        assert is_same(store["a"], made(1))
        store.put("b", made(2))
        assert store._index._reader is not inherited

    for _ in range(3):
        in_child(work)
        assert is_same(store["b"], made(2))
        store.put("b", made(3))
    assert store._index._reader is inherited
    assert store.verify() == []


@pytest.mark.parametrize("num_forks", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_a_fork_waits_until_no_thread_is_in_the_index(store: GistStore, num_forks: int) -> None:
    """Otherwise the child would inherit locks of threads that it does not have."""
    is_stopping = threading.Event()

    def work(number: int) -> None:
        turn = 0
        while not is_stopping.is_set():
            store.put(f"t{number}", made(turn))
            store.get(f"t{number}")
            turn += 1

    def drop(number: int) -> None:
        """Leave connections to the garbage collector, which closes them in any thread."""
        while not is_stopping.is_set():
            for turn in range(5):
                GistStore(store.path.parent / f"dropped{number}").put("a", made(turn))
            gc.collect()

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(job, number) for number in range(2) for job in (work, drop)]
        try:
            for turn in range(num_forks):
                in_child(lambda turn=turn: store.put("child", made(turn)))
                assert is_same(store["child"], made(turn))
        finally:
            is_stopping.set()
    for one in running:
        one.result()
    assert store.verify() == []


def test_two_that_compress_at_once_get_the_first_states(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.patched("llama")
    other, inner = GistStore(store.path), compressing_module.compress

    def compress(*args: Any, **kwargs: Any) -> GistCache:
        found = inner(*args, **kwargs)
        if not done:
            done.append(True)
            other.get_or_compress(model, tokenizer, ["w1 w2"])
            # Another batch or another machine would not produce the same bits either.
            found = replace(found, keys=tuple(keys + 1e-3 for keys in found.keys))
        return found

    done: list[bool] = []
    monkeypatch.setattr(compressing_module, "compress", compress)
    found = store.get_or_compress(model, tokenizer, ["w1 w2"])
    assert is_same(found, other.get_or_compress(model, tokenizer, ["w1 w2"]))
    assert is_same(found, inner(model, tokenizer, ["w1 w2"], 1))
    assert store.verify() == []


def test_entries_that_are_removed_as_they_are_made(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.patched("llama")
    other, commit = GistStore(store.path), store_module.commit
    times = 2

    def commit_and_lose(*args: Any) -> None:
        nonlocal times
        commit(*args)
        if times:
            times -= 1
            other.remove([entry.key for entry in other.list()])

    monkeypatch.setattr(store_module, "commit", commit_and_lose)
    assert len(store.get_or_compress(model, tokenizer, ["w1 w2"], names=["x"])) == 1
    times = 99
    other.remove("x")
    with pytest.raises(StoreError, match="entries were removed 3 times right after they were made"):
        store.get_or_compress(model, tokenizer, ["w1 w2"], names=["x"])


@pytest.mark.parametrize("step", ["place", "remove"])
def test_files_are_placed_and_deleted_by_one_process_at_a_time(
    store: GistStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Otherwise gc would delete a file that another process has just placed and is about to refer to."""
    store.put("a", made(1))
    monkeypatch.setattr(index_module, "_TIMEOUT_S", 0.05)
    others = {"put": GistStore(store.path), "gc": GistStore(store.path)}
    inner, met = getattr(Objects, step), []

    def slowly(self: Objects, *args: Any) -> Any:
        if self is store._objects:
            for what, call in (("put", lambda: others["put"].put("b", made(1))), ("gc", others["gc"].gc)):
                with pytest.raises(StoreError, match="was locked by another process"):
                    call()
                met.append(what)
        return inner(self, *args)

    monkeypatch.setattr(Objects, step, slowly)
    store.put("a", made(2))
    assert met[:2] == ["put", "gc"]
    monkeypatch.undo()
    assert is_same(store["a"], made(2))
    assert store.gc() == 0
    assert store.verify() == []


# -- tables ------------------------------------------------------------------------------------------------------------


def test_table(store: GistStore) -> None:
    store.put_many({"a": made(1), "b": made(2, k=3), "c": made(3)})
    key = store.list()[0].key
    whole = store.table()
    assert whole.names == ["a", "b", "c"]
    assert is_same(whole.gather(["c", "a"]), store.get(["c", "a"]))
    assert is_same(store.table(["b", "c"]).gather(["b"]), made(2, k=3))
    assert is_same(store.table([key]).gather([key]), made(1))
    assert store.table(["a"], device="cpu").device == torch.device("cpu")
    assert len(store._reader.open_caches) == 2, "what is only read for a table is not kept open"


def test_table_refuses(store: GistStore) -> None:
    with pytest.raises(StoreError, match="has no names to make a table of; give keys, or add an entry"):
        store.table()
    other = CacheOrigin("llama/ffffffffffff", "ba9876543210", "plain", "gist")
    store.put_many({"a": made(1), "b": made(2, origin=other)})
    with pytest.raises(CacheMismatchError, match=r"^caches belong to different origins"):
        store.table()
    with pytest.raises(StoreError, match="has no entry 'c'"):
        store.table(["a", "c"])
    with pytest.raises(GistError, match="'a'"):
        store.table(["a", "a"])


def test_a_table_shows_names_before_hashes(store: GistStore) -> None:
    """Checkpoint, names and days, then the fingerprint; of one prompt they travel with its cache, into errors."""
    cache = replace(made(1), origin=replace(made(1).origin, checkpoint="runs/mine"))
    store.put_many(dict.fromkeys(("a", "b", "c", "d", "e"), cache))
    table = store.table()
    assert re.search(rf"\(5 prompts \('a' of {DAY}, 'b' of {DAY}, 'c' of {DAY}, 'd' of {DAY}, \.\.\.\), ", repr(table))
    assert repr(table).endswith(f", made by runs/mine for {ORIGIN.model})")
    assert re.fullmatch(rf"'b' of {DAY}", table.gather(["b"]).origin.name)
    assert re.fullmatch(rf"'b' of {DAY}", table.gather(["b", "b"]).origin.name)
    assert table.gather(["a", "b"]).origin.name == "", "of the first prompt alone"
    table.remove(["b"])
    table.add(made(2), ["b"])
    assert table.gather(["b"]).origin.name == "'b'"
