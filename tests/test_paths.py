"""Where checkpoints come from: a path that is not there, or holds something else, is named in any spelling."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gisting
from gisting import doctor
from gisting.errors import GistError
from gisting.models.hub import save_pretrained
from gisting.store import GistStore
from gisting.tokens import GistTokenizer
from tests import tiny

SPELLINGS = [
    "runs/a/b",
    "~/no such folder",
    "~/nowhere",
    "./nowhere",
    "./nowhere/",
    "../nowhere",
    "nowhere/",
    "/no/where",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("path", SPELLINGS)
def test_a_path_that_is_not_there(path: str, run) -> None:
    message = r"is not a checkpoint: no such directory \(looked for /.*\)$"
    for read in (gisting.load, GistTokenizer.from_pretrained):
        with pytest.raises(GistError, match=message):
            read(path)
    ((finding),) = [one for one in doctor.examine_path(path) if one.is_fault]
    assert "no such directory (looked for /" in finding.value
    done = run("compress", path, "--prompt", "w1", "--output", "one.gist.safetensors")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert " is not a checkpoint: no such directory (looked for /" in done.err


@pytest.mark.parametrize("path", ["nowhere", "owner/nowhere", Path("nowhere"), Path("runs/a")])
def test_what_may_be_on_the_hub(path: str | Path) -> None:
    with pytest.raises(GistError, match=r"is not a checkpoint: no such directory"):
        gisting.load(path)


def test_home_is_written_out(tmp_path: Path) -> None:
    save_pretrained(*tiny.patched("llama"), tmp_path / "mine")
    model, tokenizer = gisting.load("~/mine")
    assert GistTokenizer.from_pretrained("~/mine").fingerprint == tokenizer.fingerprint
    assert gisting.compress(model, tokenizer, ["w1"]).num_slots == 1
    assert not [one for one in doctor.examine_path("~/mine") if one.is_fault]


def a_store(path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    GistStore(path).get_or_compress(model, tokenizer, ["w1"])


def a_cache(path: Path) -> None:
    gisting.compress(*tiny.patched("llama"), ["w1"]).save(path)


def weights(path: Path) -> None:
    tiny.model("llama").save_pretrained(path.parent / "whole")
    (path.parent / "whole" / "model.safetensors").rename(path)


def a_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table one (two)")


def a_folder(path: Path, *files: str) -> None:
    path.mkdir()
    for file in files:
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text("{}")


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0"), r"it is a GGUF file, which transformers reads with"),
    "json": (
        lambda path: path.write_text(json.dumps({"prompt": "w1"})),
        "it is a JSON file; a checkpoint",
    ),
    "json list": (lambda path: path.write_text("[\n1]"), "it is a JSON file; a checkpoint"),
    "database": (a_database, "it is a database, such as the index of a store, which is given by its directory;"),
    "torch": (lambda path: torch.save({}, path), "it is a file of torch.save or another ZIP archive; a checkpoint is"),
    "pickle": (lambda path: path.write_bytes(b"\x80\4."), "it is a pickle, which is never opened; a checkpoint is"),
    "cache": (a_cache, "it is a cache file of compressed prompts; a checkpoint is a directory with a config.json$"),
    "weights": (weights, "it is a file of weights; a checkpoint is a directory with a config.json$"),
    "text": (lambda path: path.write_text("w1 w2"), "it is a file; a checkpoint is a directory with a config.json$"),
    "store": (a_store, "it is a store of compressed prompts; give the checkpoint that made it$"),
    "empty folder": (lambda path: path.mkdir(), "the directory has no config.json$"),
    "folder of gguf": (lambda path: a_folder(path, "model-q4.gguf"), "it holds model-q4.gguf, a GGUF file, which"),
    "folder above": (lambda path: a_folder(path, "step-9/config.json"), "no config.json; .*thing/step-9 has one$"),
}


@pytest.mark.parametrize(("make", "message"), KINDS.values(), ids=KINDS)
def test_a_path_of_another_kind(make: Callable[[Path], object], message: str) -> None:
    make(Path("thing"))
    with pytest.raises(GistError, match=rf"^thing is not a checkpoint: .*{message}"):
        gisting.load("thing")


def test_an_adapter_of_peft() -> None:
    a_folder(Path("thing"), "adapter_config.json")
    (finding,) = doctor.examine_path("thing")
    assert finding.value.endswith(
        "it is an adapter of peft without its model; gisting.load merges it, gisting.save_pretrained saves that"
    )
    with pytest.raises(GistError, match=r"^thing/adapter_config.json is damaged \('base_model_name_or_path'\)"):
        gisting.load("thing")


@pytest.mark.parametrize("kind", ["gguf", "json", "database", "torch"])
def test_a_cache_file_of_another_kind(kind: str, run) -> None:
    make, _ = KINDS[kind]
    make(Path("thing"))
    with pytest.raises(GistError, match=r"^thing is not a gist cache: it is a "):
        gisting.GistCache.load("thing")
    assert run("inspect", "thing").err.startswith("error: thing is not a gist cache: it is a ")
    assert "is not a gist cache" in next(one.value for one in doctor.examine_path("thing") if one.is_fault)
