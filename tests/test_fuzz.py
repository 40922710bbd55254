"""Names, indexes, journals, request bodies and texts at random: our errors or a right result, and nothing else.

Damaged files of caches are in ``test_cache_fuzz.py``. Each test prints how many attempts it made, and how they ended;
``pytest -s -m slow tests/test_fuzz.py`` shows it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gisting.errors import GistError
from gisting.models.hub import save_pretrained
from gisting.serving.gists import Served, StoredGists
from gisting.serving.middleware import GistMiddleware
from gisting.store import GistStore
from gisting.store.index import INDEX
from gisting.store.journal import JOURNAL
from gisting.tokens import GistTokenizer
from tests import chats, tiny
from tests.serving.test_middleware import App, ask
from tests.store.made import is_same, made
from tests.test_cache_fuzz import ODD, cut, extend, flip_bits, overwrite, places

MANY = pytest.mark.parametrize("attempts", [30, pytest.param(3000, marks=pytest.mark.slow)], ids=["few", "many"])
PIECES = (
    *("a", "é", "e\u0301", "\u202e", "\x1b[31m", "\0", "/", "\\", "..", ".", " ", "\n", "\ud800", "😀", "%s", "{}"),
    *("f" * 64, "0" * 63, "x" * 199, "'; DROP TABLE names; --", "-", "*", "\u00ad", "\u200b", "K", "\u212a"),
)


def shown(what: str, outcomes: Counter[str]) -> None:
    print(f"{what}: {outcomes.total()} attempts: " + ", ".join(f"{n} x {one}" for one, n in outcomes.most_common()))


def outcome(action: Callable[[], Any]) -> str:
    """Do something, and return how it ended; an error that is not ours fails the test."""
    try:
        action()
    except GistError as error:
        told = error
    else:
        return "done"
    assert "\x1b" not in str(told)
    return type(told).__name__


@MANY
def test_names(tmp_path: Path, attempts: int) -> None:
    """Whatever the name, a name that is taken gives back what was put under it, also after a rebuild."""
    chance, outcomes = random.Random(0), Counter[str]()
    gists = [made(seed) for seed in range(4)]
    kept: dict[str, int] = {}
    with GistStore(tmp_path / "store") as store:
        for number in range(attempts):
            name, seed = "".join(chance.choices(PIECES, k=chance.randint(0, 3))), number % 4
            done = outcome(partial(store.put, name, gists[seed]))
            outcomes[done] += 1
            if done == "done":
                kept[str(store.entry(name).name)] = seed
            elif done != "StoreError":
                pytest.fail(f"{name!r}: {done}")
        assert {entry.name for entry in store.list()} == {*kept}
    (tmp_path / "store" / INDEX).unlink()
    assert GistStore.rebuild(tmp_path / "store") == []
    with GistStore(tmp_path / "store") as store:
        assert all(is_same(store[name], gists[seed]) for name, seed in kept.items())
    shown("names", outcomes)
    assert min(outcomes["done"], outcomes["StoreError"]) > attempts // 20


@MANY
def test_indexes_and_journals(tmp_path: Path, attempts: int) -> None:
    """No reader hands out another gist, and what is rebuilt is whole, with every name that either file still had."""
    chance, outcomes = random.Random(1), Counter[str]()
    gists = {name: made(seed) for seed, name in enumerate(("a", "b", "c"))}
    with GistStore(tmp_path / "whole") as store:
        store.put_many(gists)
    files = [(tmp_path / "whole" / name).read_bytes() for name in (INDEX, JOURNAL)]
    for number in range(max(6, attempts // 15)):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", root)
        damaged = chance.choice((INDEX, JOURNAL))
        mutate = chance.choice((flip_bits, cut, extend, overwrite))
        path = root / damaged
        path.write_bytes(mutate(path.read_bytes(), chance, files))

        def read(root: Path = root) -> None:
            with GistStore(root, is_read_only=True) as store:
                for entry in store.list():
                    if entry.name in gists:
                        assert is_same(store[entry.key], gists[entry.name])
                    store.about(entry.key)

        outcomes[f"{damaged}, {outcome(read)}"] += 1
        assert GistStore.rebuild(root) == []
        with GistStore(root) as store:
            assert store.verify() == []
            found = {entry.name for entry in store.list() if entry.name is not None}
            assert found >= ({*gists} if damaged == JOURNAL else set())
            assert all(is_same(store[name], gists[name]) for name in found & {*gists})
        shutil.rmtree(root)
    shown("indexes and journals", outcomes)
    assert any(not one.endswith(", done") for one in outcomes)


@MANY
def test_bodies(tmp_path: Path, attempts: int) -> None:
    """Whatever a body holds, it is passed on or answered 400, 404 or 413; no gist is used that it does not name."""
    model, tokenizer = tiny.patched("llama")
    save_pretrained(model, tokenizer, tmp_path / "model")
    with GistStore(tmp_path / "store") as store:
        store.get_or_compress(model, tokenizer, ["w1 w2 w3"], 3, names=["three"])
    app = App()
    served = Served.of_checkpoint(tmp_path / "model", torch.float32, tokenizer=tokenizer)
    middleware = GistMiddleware(app, StoredGists(tmp_path / "store", served), tokenizer, 64)
    chance, outcomes = random.Random(2), Counter[str]()
    good: list[tuple[str, Any]] = [
        ("/v1/completions", {"prompt": "w5 w6", "kv_transfer_params": {"gist": "three"}, "max_tokens": 2}),
        ("/v1/completions", {"prompt": [[5, 6], [7]], "kv_transfer_params": {"gist": "three"}}),
        ("/v1/completions", {"prompt": ["73", 44], "kv_transfer_params": {"gist": "three"}}),
        ("/v1/completions", {"prompt": [5, 64], "vllm_xargs": {}}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "w5"}],
                "tools": [{"type": "function", "function": {"name": "w7", "parameters": {}}}],
                "kv_transfer_params": {"gist": "three", "prompt_token_ids": [5]},
            },
        ),
    ]
    for _ in range(attempts):
        path, body = chance.choice(good)
        body = json.loads(json.dumps(body))
        for _ in range(chance.randint(1, 3)):
            tree, key = chance.choice(places(body))
            tree[key] = json.loads(
                json.dumps(chance.choice([*ODD, "three", "\ud800", [5], ["w1", 5], {"gist": "three"}]))
            )
        data = json.dumps(body).encode()
        if chance.random() < 0.3:
            data = chance.choice((flip_bits, cut, extend, overwrite))(data, chance, [data])
        app.asked.clear()
        status, _ = ask(app, middleware, data, path)
        outcomes[str(status)] += 1
        assert status in (200, 400, 404, 413), data
        for _, passed in app.asked:
            # As it came, or with the placeholders of the gist that it names.
            assert passed == data or (b"three" in data and b"64, 64, 64" in passed), data
    shown("bodies", outcomes)
    assert min(outcomes["200"], outcomes["400"]) > attempts // 20


@MANY
def test_texts_with_special_tokens(attempts: int) -> None:
    """No text of a user gives a special token, the gist token among them, by default."""
    chance, outcomes = random.Random(3), Counter[str]()
    for tokenizer in fuzzed_tokenizers():
        inner: Any = tokenizer.tokenizer
        # An unknown word is no special token, though its token is one.
        special = {*inner.all_special_ids, tokenizer.gist_token_id} - {inner.unk_token_id}
        empty = Counter(tokenizer.encode_continuations([" "])[0])
        words = [*map(inner.convert_ids_to_tokens, special), "<", ">", "|", "im", "_start", " ", "\n", "a", "é", "</"]
        for _ in range(attempts):
            text = "".join(map(str, chance.choices(words, k=chance.randint(1, 5))))
            found = Counter(tokenizer.encode_continuations([text])[0])
            assert all(found[one] <= empty[one] for one in special), text
            outcomes["no special token"] += 1
    shown("texts", outcomes)


def fuzzed_tokenizers() -> list[GistTokenizer]:
    """One of words, and three with a chat template."""
    return [tiny.tokenizer(), *(GistTokenizer(chat.tokenizer(), "chat") for chat in chats.CHATS.values())][:4]
