"""The index of an earlier version: brought up to date when a store is opened, and read where it cannot be changed."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import gisting
from gisting import GistStore
from gisting.errors import CacheFormatError
from gisting.store import index
from tests import shell, tiny

# The tables that version 0.1 wrote.
FIRST = [
    """CREATE TABLE entries (
    key TEXT PRIMARY KEY,
    is_keyed_by_text INTEGER NOT NULL,
    num_gist_tokens INTEGER NOT NULL,
    num_prompt_tokens INTEGER,
    num_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    storage TEXT NOT NULL,
    model TEXT NOT NULL,
    tokenizer TEXT NOT NULL,
    template TEXT NOT NULL,
    condition TEXT NOT NULL,
    created TEXT NOT NULL
) WITHOUT ROWID""",
    "CREATE TABLE names (name TEXT PRIMARY KEY, key TEXT NOT NULL REFERENCES entries (key)) WITHOUT ROWID",
    "CREATE INDEX names_of_key ON names (key)",
]


def make_old(path: Path) -> None:
    """Write the index of a store as version 0.1 did."""
    file = sqlite3.connect(path / "index.sqlite", isolation_level=None)
    entries = file.execute("SELECT * FROM entries").fetchall()
    names = file.execute("SELECT * FROM names").fetchall()
    file.execute("DROP TABLE names")
    file.execute("DROP TABLE entries")
    for statement in FIRST:
        file.execute(statement)
    file.executemany(f"INSERT INTO entries VALUES ({', '.join('?' * 12)})", [entry[:12] for entry in entries])
    file.executemany("INSERT INTO names VALUES (?, ?)", names)
    file.execute("PRAGMA user_version=1")
    file.close()


def format_of(path: Path) -> int:
    file = sqlite3.connect(path / "index.sqlite")
    (found,) = file.execute("PRAGMA user_version").fetchone()
    file.close()
    return found


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store of format 1 with two names, one of them for two texts, and an entry without a name."""
    model, tokenizer = tiny.patched("llama")
    model.config._name_or_path = "runs/mine"
    with GistStore(tmp_path / "store") as store:
        names = ["capitals", "reverse", None]
        store.get_or_compress(model, tokenizer, ["w1", "w2 w3", "w4"], 2, names=names)
        store.put("put", replace(store["reverse"], origin=replace(store["reverse"].origin, checkpoint="")))
    make_old(tmp_path / "store")
    return tmp_path / "store"


def test_an_old_index_is_brought_up_to_date(old: Path) -> None:
    """Names, keys and files stay; the names of checkpoints come from the files, once."""
    with GistStore(old, is_read_only=True) as store:
        before = {name: store[name] for name in ("capitals", "reverse", "put")}
    assert format_of(old) == 1
    with GistStore(old) as store:
        entries = store.list()
        assert [(entry.name, entry.checkpoint) for entry in entries] == [
            ("capitals", "runs/mine"),
            ("put", ""),
            ("reverse", "runs/mine"),
            (None, "runs/mine"),
        ]
        for name, cache in before.items():
            assert all(map(lambda one, two: bool((one == two).all()), store[name].keys, cache.keys))
        assert store.verify() == []
        store.put("more", before["reverse"])
    assert format_of(old) == 2
    with GistStore(old) as store:
        assert store.list()[:1] == entries[:1]
        assert len(store) == 5


def test_an_old_index_that_cannot_be_changed_is_read(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = shell.call(monkeypatch, capsys, "store", "list", str(old))
    assert done.code == 0
    assert "runs/mine" in done.out
    assert format_of(old) == 1
    with GistStore(old, is_read_only=True) as store:
        assert store.entry("capitals").num_gist_tokens == 2


def test_the_list_opens_no_file(old: Path) -> None:
    GistStore(old).close()
    for file in old.rglob("*.safetensors"):
        file.unlink()
    with GistStore(old, is_read_only=True) as store:
        assert [entry.checkpoint for entry in store.list()] == ["runs/mine", "", "runs/mine", "runs/mine"]


def test_an_upgrade_is_complete_or_did_not_happen(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, calls = index.put_entry, []

    def failing(connection: sqlite3.Connection, entry: index.StoreEntry) -> None:
        calls.append(entry)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(connection, entry)

    with monkeypatch.context() as patch:
        patch.setattr(index, "put_entry", failing)
        with pytest.raises(KeyboardInterrupt):
            GistStore(old)
    assert format_of(old) == 1
    with GistStore(old) as store:
        assert len(store) == 4


def test_several_open_an_old_store_at_once(old: Path) -> None:
    def count(number: int) -> int:
        with GistStore(old, is_read_only=number % 2 == 1) as store:
            return len(store.list())

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(count, range(16))] == [4] * 16
    assert format_of(old) == 2


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("CREATE VIEW more AS SELECT * FROM names", "is altered: its tables are not the tables of a store"),
        ("UPDATE entries SET model = 'a' || char(10)", "is altered: it has an invalid entry"),
    ],
)
def test_an_altered_old_index_is_refused(old: Path, statement: str, message: str) -> None:
    file = sqlite3.connect(old / "index.sqlite", isolation_level=None)
    file.execute(statement)
    file.close()
    with pytest.raises(CacheFormatError, match=message):
        GistStore(old)
    assert format_of(old) == 1


def test_the_name_of_a_checkpoint_that_cannot_be_shown_is_left_out(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1"], 2)
    with GistStore(tmp_path / "store") as store:
        for name, checkpoint in (("long", "x" * 2000), ("good", "runs/mine")):
            store.put(name, replace(cache, origin=replace(cache.origin, checkpoint=checkpoint)))
        assert {entry.name: entry.checkpoint for entry in store.list()} == {"good": "runs/mine", "long": ""}
