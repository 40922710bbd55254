"""Names, checkpoints, numbers and paths of someone else: our errors, and nothing that acts on a terminal."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch

import gisting
from gisting.cache import GistCache
from gisting.cli.shared import out
from gisting.errors import GistError
from gisting.serving.gists import StoredGists
from gisting.serving.requests import completion_with_ids
from gisting.store import GistStore
from tests import tiny
from tests.shell import call
from tests.store.made import made

ESCAPE = "\x1b[31m\x1b]0;title\x07\x9b5m"


def test_texts_on_a_console_do_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(ESCAPE)
    table.add_row(ESCAPE)
    out.print(table)
    out.print(f"a\n\tb {ESCAPE}")
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b"} & {*shown}
    assert "a\n" in shown
    assert "\\x1b[31m" in shown


def test_an_error_does_not_act(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(monkeypatch, capsys, "inspect", tmp_path / f"a{ESCAPE}")
    assert done.code == 1
    assert "\x1b" not in done.err
    assert "does not exist" in done.err


WEIGHTS = {
    "list": "[]",
    "number": '{"metadata": {}, "weight_map": 7}',
    "names": '{"metadata": {}, "weight_map": {"a": 7}}',
    "nested": '{"metadata": {}, "weight_map": ' + "[" * 10**5,
    "empty": '{"metadata": {}, "weight_map": {}}',
    "elsewhere": '{"metadata": {}, "weight_map": {"a": "../../../etc/passwd"}}',
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    gisting.save_pretrained(*tiny.patched("llama"), folder)
    return folder


@pytest.mark.parametrize("text", WEIGHTS.values(), ids=WEIGHTS)
def test_hostile_weight_indexes(checkpoint: Path, tmp_path: Path, text: str) -> None:
    for file in checkpoint.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises((GistError, OSError)):
        gisting.load(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02cos\nsystem\n", pickle.dumps({"a": 1}), b"PK\x03\x04" + b"x" * 99], ids=range(4)
)
def test_hostile_weights(checkpoint: Path, tmp_path: Path, data: bytes) -> None:
    for file in checkpoint.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises((GistError, OSError)):
        gisting.load(tmp_path)


@pytest.mark.parametrize("config", ["[]", "7", "[" * 10**5, '{"model_type": 7}', '{"model_type": ["llama"]}', "{"])
def test_hostile_configs(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(GistError):
        gisting.load(tmp_path)


@pytest.mark.parametrize("prompt", [["73", 44], [[1], "a"], [1, "a"], [True], {"a": 1}, 7, [], [[]], None])
def test_prompts_of_several_kinds_are_refused(tmp_path: Path, prompt: object) -> None:
    model, tokenizer = tiny.patched("llama")
    with GistStore(tmp_path) as store:
        store.get_or_compress(model, tokenizer, ["w1"], 1, names=["one"])
    with pytest.raises(GistError, match="prompt must be") as error:
        completion_with_ids({"prompt": prompt, "kv_transfer_params": {"gist": "one"}}, StoredGists(tmp_path), tokenizer)
    assert getattr(error.value, "status", None) == 400


def test_states_that_are_not_finite_are_refused_at_once() -> None:
    model, tokenizer = tiny.patched("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    with pytest.raises(GistError, match="the states of the prompt hold NaN or infinity"):
        gisting.compress(model, tokenizer, ["w1 w2"], 2)


def test_int8_says_what_it_loses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = made(1, 8)
    with caplog.at_level(logging.WARNING):
        cache.save(tmp_path / "a", "int8")
        assert caplog.text == ""
        cache.keys[0][0, 0, 0, 0] = 1e4
        cache.save(tmp_path / "b", "float8_e4m3")
        assert caplog.text == ""
        cache.save(tmp_path / "b", "int8")
    assert "storage 'int8' turns most numbers of some states into zero" in caplog.text


def test_a_path_with_a_nul(tmp_path: Path) -> None:
    path = f"{tmp_path}/a\0b"
    for do in (
        lambda: made(1).save(path),
        lambda: GistCache.load(path),
        lambda: GistStore(path),
        lambda: gisting.load(path),
    ):
        with pytest.raises(GistError, match="NUL character"):
            do()


def test_json_is_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    from gisting.cli.shared import print_json

    print_json({"name": ESCAPE})
    assert json.loads(capsys.readouterr().out) == {"name": ESCAPE}
