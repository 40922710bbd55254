"""An index that is lost or damaged is made again from the files and the journal of names."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gisting.errors import CacheFormatError, StoreError
from gisting.store import GistStore
from gisting.store.index import INDEX
from gisting.store.journal import JOURNAL
from tests import tiny
from tests.store.made import is_same, made


@pytest.fixture
def store(tmp_path: Path) -> GistStore:
    """Names that were put, moved, renamed and removed, and prompts found by their text."""
    store = GistStore(tmp_path / "store", storage="bfloat16")
    store.put_many({name: made(seed) for seed, name in enumerate(("a", "b", "c", "d"))})
    model, tokenizer = tiny.patched("llama")
    store.get_or_compress(model, tokenizer, ["w1 w2 w3", "w4"], 2, names=["prompt", None])
    store.put("a", made(9))
    store.put("again", made(1))  # a second name of one entry
    store.rename("c", "çé")
    store.remove("d")
    return store


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def scribble(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def another(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE names (name, key)")
    connection.close()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "overwritten": scribble,
    "another": another,
    "whole": lambda path: None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_nothing_is_lost(store: GistStore, damage: str) -> None:
    before, name_of_first = store.list(), store.list()[0].name
    store.close()
    DAMAGE[damage](store.path / INDEX)
    if damage != "whole":
        with pytest.raises(CacheFormatError, match=r"gisting store rebuild .*/store$"):
            GistStore(store.path)
    assert GistStore.rebuild(store.path) == []
    found = GistStore(store.path)
    assert found.list() == before
    assert found.verify() == []
    assert [*(store.path / "tmp").iterdir()] == []
    assert name_of_first == "a"
    found.put("later", made(5))
    found.close()
    (store.path / INDEX).unlink()
    assert GistStore.rebuild(store.path) == []
    assert {entry.name for entry in GistStore(store.path).list()} == {entry.name for entry in before} | {"later"}


def test_a_store_of_an_earlier_version_writes_its_names_down_at_the_next_write(store: GistStore) -> None:
    before = store.list()
    (store.path / JOURNAL).unlink()
    store.rename("a", "z")
    wanted = sorted((entry if entry.name != "a" else replace(entry, name="z") for entry in before), key=str)
    store.close()
    (store.path / INDEX).unlink()
    GistStore.rebuild(store.path)
    assert sorted(GistStore(store.path).list(), key=str) == wanted
    # Without a journal, names come from the index, if it can be read.
    (store.path / JOURNAL).unlink()
    GistStore.rebuild(store.path)
    assert sorted(GistStore(store.path).list(), key=str) == wanted


@pytest.mark.parametrize("number", range(4))
def test_names_survive_a_kill_while_files_are_moved(
    store: GistStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Also those of a store of an earlier version, which has no journal yet."""
    before = store.list()
    store.close()
    (store.path / JOURNAL).unlink()
    (store.path / f"{INDEX}-wal").write_bytes(b"")
    moved: list[object] = []
    replace_file = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).parent == store.path:
            if len(moved) == number:
                raise KeyboardInterrupt
            moved.append(target)
        replace_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            GistStore.rebuild(store.path)
    assert GistStore.rebuild(store.path) == []
    assert GistStore(store.path).list() == before


def test_an_index_that_is_not_finished_is_not_put_in_place(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.list()
    with monkeypatch.context() as patched:
        patched.setattr("gisting.store.rebuilding.Index.close", lambda index: None)
        with pytest.raises(StoreError, match="SQLite did not finish the new index, so nothing was replaced"):
            GistStore.rebuild(store.path)
    assert GistStore(store.path).list() == before


@pytest.mark.parametrize("is_whole", [True, False])
def test_damaged_days_and_lengths_do_not_cost_the_file(store: GistStore, is_whole: bool) -> None:
    wanted = {entry.name: entry.num_prompt_tokens for entry in store.list()}
    key, other = store.entry("prompt").key, store.entry("a").key
    store.close()
    changes = [(key, "x\n", wanted["prompt"]), (other, "2026-01-31T12:00:00Z", -5)]
    if is_whole:
        with sqlite3.connect(store.path / INDEX) as connection:
            for one, created, count in changes:
                connection.execute(
                    "UPDATE entries SET created = ?, num_prompt_tokens = ? WHERE key = ?", (created, count, one)
                )
        connection.close()
    else:
        (store.path / INDEX).unlink()
        with (store.path / JOURNAL).open("a") as file:
            for one, created, count in changes:
                file.write(json.dumps({"entry": one, "created": created, "num_prompt_tokens": count}) + "\n")
    assert GistStore.rebuild(store.path) == []
    found = GistStore(store.path)
    assert {entry.name: entry.num_prompt_tokens for entry in found.list()} == wanted
    assert found.entry("a").created == "2026-01-31T12:00:00Z"
    assert found.verify() == []


def test_what_was_committed_counts(store: GistStore) -> None:
    """A process that dies between the journal and the commit leaves a change there that the index does not have."""
    before, key = store.list(), store.entry("a").key
    store.close()
    with (store.path / JOURNAL).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": "a", "key": None}) + "\n" + json.dumps({"name": "z", "key": key}) + "\n")
    GistStore.rebuild(store.path)
    assert GistStore(store.path).list() == before


def test_damaged_files_and_lines_are_left_out(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {entry.name for entry in store.list()}
    damaged = store.path / "objects" / (key := store.entry("b").key)[:2] / f"{key}.gist.safetensors"
    whole = damaged.read_bytes()
    store.close()
    damaged.write_bytes(whole[:-1])
    (store.path / INDEX).unlink()
    with (store.path / JOURNAL).open("ab") as file:
        for line in (
            b"[" * 10**5,
            b"\xff",
            b'{"name": 1, "key": "a"}',
            b'{"name": "../x", "key": "%s"}' % key.encode(),
        ):
            file.write(line + b"\n")
        file.write(b'{"name": "a", "ke')  # cut off
    (fault,) = GistStore.rebuild(store.path)
    assert (fault.kind, fault.key) == ("torn", key)
    found = GistStore(store.path)
    assert {entry.name for entry in found.list()} == wanted - {"b", "again"}
    # Also when the journal is written again.
    size = (store.path / JOURNAL).stat().st_size
    monkeypatch.setattr("gisting.store.journal._MAX_BYTES", 0)
    monkeypatch.setattr("gisting.store.journal._BYTES_EACH", 0)
    found.rename("a", "A")
    found.rename("A", "a")
    assert (store.path / JOURNAL).stat().st_size <= size
    # If the file comes back, so do its names.
    damaged.write_bytes(whole)
    GistStore.rebuild(store.path)
    assert {entry.name for entry in GistStore(store.path).list()} == wanted


def test_who_has_the_store_open_finds_the_new_index(store: GistStore) -> None:
    before = store.list()
    GistStore.rebuild(store.path)
    assert store.list() == before
    store.put("more", made(7))
    assert is_same(GistStore(store.path)["more"], GistStore(store.path).get("more"))
    assert store.verify() == []
    # The rows of the old log must not come back.
    shutil.copytree(store.path, store.path.parent / "copy")
    assert GistStore(store.path.parent / "copy").verify() == []


def test_the_journal_stays_small(store: GistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gisting.store.journal._MAX_BYTES", 2000)
    monkeypatch.setattr("gisting.store.journal._BYTES_EACH", 10)
    for number in range(60):
        store.rename("b" if number % 2 == 0 else "x", "x" if number % 2 == 0 else "b")
    assert (store.path / JOURNAL).stat().st_size < 6000
    before = store.list()
    store.close()
    (store.path / INDEX).unlink()
    GistStore.rebuild(store.path)
    assert GistStore(store.path).list() == before


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not the directory of a store: it has no objects"):
        GistStore.rebuild(tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_a_change_that_fails_is_not_written_down(store: GistStore) -> None:
    lines = (store.path / JOURNAL).read_text()
    with pytest.raises(StoreError):
        store.rename("b", "a")
    with pytest.raises(StoreError):
        store.remove(["a", "nothing"])
    assert (store.path / JOURNAL).read_text() == lines
    (store.path / JOURNAL).unlink()
    os.symlink("/dev/null", store.path / JOURNAL)
    with pytest.raises(StoreError, match="is a link or not a file"):
        store.remove("a")
    assert "a" in store


def test_the_lines(store: GistStore) -> None:
    lines = [json.loads(line) for line in (store.path / JOURNAL).read_text().splitlines()]
    assert {"name": "d", "key": None} in lines
    assert {"name": "c", "key": None} in lines
    assert {"name": "çé", "key": store.entry("çé").key} in lines
