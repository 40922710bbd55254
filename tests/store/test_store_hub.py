"""Sharing a store: saving, uploading and loading it again offline, and refusing invalid directories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gisting.cache import GistCache
from gisting.errors import CacheFormatError, GistError, StoreError
from gisting.store import GistStore
from tests import tiny
from tests.store.made import ORIGIN, is_same, made


@dataclass
class FakeHub:
    """A hub in a local directory with downloads laid out as by huggingface_hub: snapshots of links to blobs."""

    folder: Path
    calls: list[str] = field(default_factory=list)

    def create_repo(self, repo_id: str, *, private: bool | None, token: str | None, exist_ok: bool) -> None:
        self.calls.append(f"create {repo_id} private={private} token={token} exist_ok={exist_ok}")
        (self.folder / "hub" / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        revision: str | None,
        token: str | None,
        commit_message: str,
        allow_patterns: list[str],
        delete_patterns: list[str],
    ) -> SimpleNamespace:
        from huggingface_hub.utils import filter_repo_objects

        self.calls.append(f"upload {repo_id} revision={revision} {commit_message}")
        there = self.folder / "hub" / repo_id

        def files(root: Path, patterns: list[str]) -> list[str]:
            found = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
            return [*filter_repo_objects(found, allow_patterns=patterns)]

        for name in files(there, delete_patterns):
            (there / name).unlink()
        for name in files(Path(folder_path), allow_patterns):
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, there / name)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, token: str | None, allow_patterns: list[str]
    ) -> str:
        self.calls.append(f"download {repo_id} revision={revision} token={token} {allow_patterns}")
        source, repository = self.folder / "hub" / repo_id, self.folder / "cache" / repo_id.replace("/", "--")
        shutil.rmtree(repository, ignore_errors=True)
        for path in [path for path in source.rglob("*") if path.is_file()]:
            blob = repository / "blobs" / sha1(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link = repository / "snapshots" / "1" / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return str(repository / "snapshots" / "1")


@pytest.fixture
def hub(tmp_path: Path) -> FakeHub:
    return FakeHub(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> GistStore:
    store = GistStore(tmp_path / "store")
    store.put_many({"a": made(1), "b": made(2, k=3), "same as a": made(1)})
    return store


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))


def assert_taken_over(found: GistStore) -> None:
    assert [entry.name for entry in found.list()] == ["a", "b", "same as a"]
    assert is_same(found.get(["a", "b", "same as a"]), GistCache.cat([made(1), made(2, k=3), made(1)]))
    assert found.verify() == []


# -- there and back ----------------------------------------------------------------------------------------------------


def test_save_and_load(store: GistStore, tmp_path: Path) -> None:
    store.save_pretrained(tmp_path / "saved", data="two made-up prompts", license="apache-2.0")
    found = GistStore.from_pretrained(tmp_path / "saved", tmp_path / "taken")
    assert_taken_over(found)
    assert found.list() == store.list(), "with keys, checksums and times"
    assert found.path == tmp_path / "taken"
    card = (tmp_path / "saved" / "README.md").read_text()
    for part in ("# saved", "two made-up prompts", "license: apache-2.0", "plain", ORIGIN.model.split("/")[1]):
        assert part in card
    held = sorted(path.relative_to(tmp_path / "saved").parts[0] for path in (tmp_path / "saved").iterdir())
    assert held == ["README.md", "index.jsonl", "objects"], "no SQLite"


def test_what_was_removed_does_not_travel_on(store: GistStore, tmp_path: Path) -> None:
    store.save_pretrained(tmp_path / "saved")
    store.remove("b")
    store.save_pretrained(tmp_path / "saved")
    assert len([*(tmp_path / "saved" / "objects").rglob("*.safetensors")]) == 1, "a, and the same as a"
    assert [entry.name for entry in GistStore.from_pretrained(tmp_path / "saved", tmp_path / "taken").list()] == [
        "a",
        "same as a",
    ]
    with pytest.raises(StoreError, match="is the store itself; save it in another directory"):
        store.save_pretrained(store.path)


def test_push_and_load(store: GistStore, hub: FakeHub, tmp_path: Path) -> None:
    url = store.push_to_hub("owner/gists", private=True, api=hub)
    assert url == "https://huggingface.co/owner/gists/commit/1"
    assert_taken_over(GistStore.from_pretrained("owner/gists", tmp_path / "taken", revision="v1", api=hub))
    assert hub.calls == [
        "create owner/gists private=True token=None exist_ok=True",
        "upload owner/gists revision=None Upload gist caches",
        "download owner/gists revision=v1 token=None ['index.jsonl', 'README.md', 'objects/*/*.gist.safetensors']",
    ]
    assert 'GistStore.from_pretrained("owner/gists")' in (tmp_path / "hub/owner/gists/README.md").read_text()


def test_what_is_pushed_takes_the_place_of_what_was(store: GistStore, hub: FakeHub, tmp_path: Path) -> None:
    store.push_to_hub("owner/gists", api=hub)
    store.push_to_hub("owner/gists", ["b"], api=hub)
    assert len([*(tmp_path / "hub").rglob("*.safetensors")]) == 1
    found = GistStore.from_pretrained("owner/gists", tmp_path / "taken", api=hub)
    assert [entry.name for entry in found.list()] == ["b"]


def test_without_a_path_it_is_taken_over_once(store: GistStore, hub: FakeHub, tmp_path: Path) -> None:
    store.push_to_hub("owner/gists", api=hub)
    found = GistStore.from_pretrained("owner/gists", api=hub)
    assert_taken_over(found)
    assert found.path.is_relative_to(tmp_path / "hf")
    found.put("own", made(9))
    again = GistStore.from_pretrained("owner/gists", api=hub)
    assert again.path == found.path
    assert "own" in again
    again.remove("a")
    assert "a" in GistStore.from_pretrained("owner/gists", api=hub), "the entry is there"
    store.put("c", made(3))
    store.push_to_hub("owner/gists", api=hub)
    assert "c" in GistStore.from_pretrained("owner/gists", api=hub), "other entries are another store"


def test_prompts_that_were_compressed_are_found_by_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.patched("llama")
    store = GistStore(tmp_path / "store")
    wanted = store.get_or_compress(model, tokenizer, ["w1 w2", "w3"], 2, names=["x", None])
    store.save_pretrained(tmp_path / "saved")
    found = GistStore.from_pretrained(tmp_path / "saved", tmp_path / "taken")
    assert [entry.name for entry in found.list()] == ["x"], "an entry without a name is shared only by its key"
    monkeypatch.setattr("gisting.store.compressing.compress", None)
    assert is_same(found.get_or_compress(model, tokenizer, ["w1 w2"], 2), wanted[0])
    store.save_pretrained(tmp_path / "all", [entry.key for entry in store.list()])
    found = GistStore.from_pretrained(tmp_path / "all", tmp_path / "taken too")
    assert [entry.name for entry in found.list()] == [None, None]
    assert is_same(found.get_or_compress(model, tokenizer, ["w1 w2", "w3"], 2), wanted)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda store, to: store.save_pretrained(to, ["x"]), StoreError, "has no entry 'x'"),
        (lambda store, to: store.save_pretrained(to, metrics={"loss": float("nan")}), GistError, "metrics"),
        (lambda store, to: store.push_to_hub("gists", api=None), GistError, "^repo_id must be a repository on the hub"),
        (lambda store, to: GistStore(to / "new").save_pretrained(to / "saved"), StoreError, "has no names to share"),
        (lambda store, to: GistStore.from_pretrained(to / "nowhere"), StoreError, "neither a directory nor a repo"),
        (
            lambda store, to: GistStore.from_pretrained(store.path),
            StoreError,
            "has no index.jsonl, so it is not a store",
        ),
    ],
    ids=["name", "card", "repository", "empty", "nowhere", "a store itself"],
)
def test_refusals(
    store: GistStore, tmp_path: Path, call: Callable[[GistStore, Path], Any], error: type[GistError], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(store, tmp_path / "to")
    assert not (tmp_path / "to" / "index.jsonl").exists()


def test_a_store_that_is_there_is_not_mixed_with(store: GistStore, tmp_path: Path) -> None:
    store.save_pretrained(tmp_path / "saved")
    with pytest.raises(StoreError, match=r"store already holds a store; open it with GistStore\("):
        GistStore.from_pretrained(tmp_path / "saved", store.path)


def test_a_damaged_entry_is_not_shared(store: GistStore, tmp_path: Path) -> None:
    path = next((store.path / "objects").rglob("*.gist.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheFormatError, match="is altered"):
        store.save_pretrained(tmp_path / "saved")


# -- invalid directories -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(store: GistStore, tmp_path: Path) -> Path:
    store.save_pretrained(tmp_path / "saved", ["a", "b"])
    return tmp_path / "saved"


def lines_of(saved: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (saved / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def write_lines(saved: Path, lines: list[Any]) -> None:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    (saved / "index.jsonl").write_text(text, encoding="utf-8")


def assert_refused(saved: Path, message: str) -> None:
    taken = saved.parent / "taken"
    with pytest.raises(CacheFormatError, match=message):
        GistStore.from_pretrained(saved, taken)
    if taken.exists():
        left = GistStore(taken)
        assert len(left) == 0, "all or nothing"
        assert left.verify() == []


OTHER = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../secret"}, "line 1: is not a line that a store writes"),
        ({"file": "/etc/passwd"}, "line 1: is not a line that a store writes"),
        (
            {"key": "../../../secret"},
            "line 1 is altered: it has an invalid entry, name 'a', key '../../../secret'",
        ),
        ({"key": OTHER}, "line 1: is not a line that a store writes"),
        ({"key": OTHER, "file": f"objects/01/{OTHER}.gist.safetensors"}, "line 1: objects/01/.* is missing"),
        ({"name": "../a"}, r"line 1 is altered: it has an invalid entry, name '\.\./a'"),
        ({"name": ["a"]}, "line 1 is altered: it has an invalid entry, name"),
        ({"name": OTHER}, "line 1 is altered: it has an invalid entry, name"),
        ({"name": "b"}, "line 2: 'b' is the name of two entries"),
        ({"num_bytes": 10**30}, "line 1 is altered"),
        ({"num_bytes": 7}, "line 1: objects/.* does not match the line: .* its entry says 7"),
        ({"num_bytes": "7"}, "line 1 is altered"),
        ({"num_gist_tokens": 9}, "line 1: .* is not the file that its entry describes"),
        ({"model": "llama/ffffffffffff"}, "line 1: .* is not the file that its entry describes"),
        ({"sha256": OTHER}, "line 1: .* is altered: its checksum is"),
        ({"is_keyed_by_text": None}, "line 1 is altered"),
        ({"num_prompt_tokens": []}, "line 1 is altered"),
        ({"num_prompt_tokens": ""}, "line 1 is altered"),
        ({"num_prompt_tokens": 0.0}, "line 1 is altered"),
        ({"created": "\ud800"}, "line 1 is altered"),
        ({"created": "\x1b[31m"}, "line 1 is altered"),
        ({"storage": "int8"}, "line 1: .* is stored as float32, its entry says 'int8'"),
        ({"more": 1}, "line 1: is not a line that a store writes"),
        ({"format": 2}, "line 1 has format 2, this version reads up to 1; upgrade gisting"),
        ({"format": "1"}, "line 1: is not a line that a store writes"),
    ],
    ids=str,
)
def test_a_line_that_no_store_writes(saved: Path, change: dict[str, Any], message: str) -> None:
    (saved.parent / "secret").write_text("secret")
    first, second = lines_of(saved)
    write_lines(saved, [{**first, **change}, second])
    assert_refused(saved, message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 1 is not an entry of a store"),
        ("[]", "line 1 is not an entry of a store"),
        ("{}", r"line 1 is not an entry of a store \(KeyError\('format'\)\)"),
        ('{"format": 1', "line 1 is not an entry of a store"),
        ("[" * 100_000, "line 1 is not an entry of a store"),
        ("\x00", "line 1 is not an entry of a store"),
        ('{"format": 1, "name": "' + "a" * 10**6, "line 1 is not an entry of a store"),
    ],
    ids=["empty", "list", "object", "cut off", "deep", "zero", "long"],
)
def test_a_line_that_is_none(saved: Path, line: str, message: str) -> None:
    write_lines(saved, [line])
    assert_refused(saved, message)


def test_no_lines(saved: Path) -> None:
    write_lines(saved, [])
    assert_refused(saved, "has no entries")


def test_a_key_that_is_not_of_its_content(saved: Path) -> None:
    first, second = lines_of(saved)
    name = f"objects/01/{OTHER}.gist.safetensors"
    (saved / "objects" / "01").mkdir(exist_ok=True)
    (saved / first["file"]).rename(saved / name)
    write_lines(saved, [{**first, "key": OTHER, "file": name}, second])
    assert_refused(saved, "line 1: .* its key does not match its content")


def test_lines_that_differ_over_one_file(saved: Path) -> None:
    first, second = lines_of(saved)
    write_lines(saved, [first, {**first, "name": "c", "num_prompt_tokens": 7}, second])
    assert_refused(saved, "line 2: contradicts what an earlier line says about objects/")


@pytest.mark.parametrize("what", ["file", "shard", "objects", "index.jsonl"])
def test_links_out_of_the_directory_are_not_followed(saved: Path, what: str) -> None:
    first = lines_of(saved)[0]
    path = {
        "file": saved / first["file"],
        "shard": (saved / first["file"]).parent,
        "objects": saved / "objects",
        "index.jsonl": saved / "index.jsonl",
    }[what]
    path.rename(saved.parent / "elsewhere")
    path.symlink_to(saved.parent / "elsewhere")
    assert_refused(saved, "is a link that leads out of .*; it is not followed$")


def test_a_file_of_another_kind(saved: Path) -> None:
    (saved / lines_of(saved)[0]["file"]).write_bytes(b"x" * lines_of(saved)[0]["num_bytes"])
    assert_refused(saved, "line 1: objects/.* does not match the line: ")


@pytest.mark.parametrize("claimed", [None, 2**32 - 1], ids=["another size", "its size"])
def test_a_file_with_holes_is_not_copied(saved: Path, monkeypatch: pytest.MonkeyPatch, claimed: int | None) -> None:
    """It takes no space where it comes from, and gigabytes in a copy."""
    first, second = lines_of(saved)
    with (saved / first["file"]).open("r+b") as file:
        file.truncate(0)
        file.truncate(2**32 - 1)
    write_lines(saved, [{**first, **({} if claimed is None else {"num_bytes": claimed})}, second])
    monkeypatch.setattr("gisting.store.hub.shutil.copyfile", lambda *_: pytest.fail("it was copied"))
    assert_refused(saved, "line 1: objects/.* does not match the line: ")


def test_files_that_no_line_names_are_left_where_they_are(saved: Path) -> None:
    (saved / "objects" / "01").mkdir(exist_ok=True)
    (saved / "objects" / "01" / "index.sqlite").write_bytes(b"x")
    (saved / "index.sqlite").write_bytes(b"x")
    found = GistStore.from_pretrained(saved, saved.parent / "taken")
    assert len(found) == 2
    assert found.verify() == []


def test_a_snapshot_that_leads_out_of_its_repository(saved: Path, hub: FakeHub, tmp_path: Path) -> None:
    GistStore(tmp_path / "store").push_to_hub("owner/gists", api=hub)
    snapshot = Path(hub.snapshot_download("owner/gists", revision=None, token=None, allow_patterns=[]))
    (tmp_path / "outside").write_bytes((snapshot / lines_of(snapshot)[0]["file"]).read_bytes())
    link = snapshot / lines_of(snapshot)[0]["file"]
    link.unlink()
    link.symlink_to(tmp_path / "outside")
    api: Any = SimpleNamespace(snapshot_download=lambda *_, **__: str(snapshot))
    with pytest.raises(CacheFormatError, match="is a link that leads out of"):
        GistStore.from_pretrained("owner/gists", tmp_path / "taken", api=api)
