"""``source``: which weight files of a checkpoint are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gisting.source import gists_among_weights, is_among_weights, weight_files


def make(folder: Path, *names: str) -> None:
    for name in names:
        text = json.dumps({"metadata": {}, "weight_map": {"b": "two", "a": "one", "c": "two"}})
        (folder / name).write_text(text if name.endswith(".index.json") else "", encoding="utf-8")


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), []),
        (("config.json",), []),
        (("model.safetensors",), ["model.safetensors"]),
        (("pytorch_model.bin",), ["pytorch_model.bin"]),
        (("pytorch_model.bin", "model.safetensors"), ["model.safetensors"]),
        (("model.safetensors", "model.safetensors.index.json"), ["one", "two"]),
        (("pytorch_model.bin", "pytorch_model.bin.index.json"), ["one", "two"]),
        (("pytorch_model.bin.index.json", "model.safetensors"), ["model.safetensors"]),
    ],
    ids=str,
)
def test_weight_files(tmp_path: Path, present: tuple[str, ...], expected: list[str]) -> None:
    make(tmp_path, *present)
    assert weight_files(tmp_path) == [tmp_path / name for name in expected]


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"metadata": {}}'])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises((LookupError, TypeError, ValueError)):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ('{"model_type": "llama"}', "a.gist.safetensors", True),
        ('{"architectures": ["A"]}', "a.bin", True),
        ('{"model_type": "llama"}', "a.gist", False),
        ('{"model_type": "llama"}', "gists/a.safetensors", False),
        ('{"port": 80}', "a.safetensors", False),
        ("[]", "a.safetensors", False),
        ("[" * 10**5, "a.safetensors", False),
        (None, "a.safetensors", False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_among_weights(tmp_path: Path, config: str | None, name: str, expected: bool) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert is_among_weights(tmp_path / name) is expected


def test_gists_among_weights(tmp_path: Path) -> None:
    def write(name: str, header: bytes) -> None:
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header)

    write("a.safetensors", b'{"__metadata__": {"gist": "{}"}}')
    write("b.pt", b'{"__metadata__": {"gist": "{}"}}')
    write("c.gist", b'{"__metadata__": {"gist": "{}"}}')
    write("weights.safetensors", b'{"__metadata__": {"format": "pt"}}')
    write("list.safetensors", b"[1]")
    write("deep.safetensors", b"[" * 10**5)
    (tmp_path / "short.bin").write_bytes(b"\xff")
    (tmp_path / "folder.bin").mkdir()
    assert [path.name for path in gists_among_weights(tmp_path)] == ["a.safetensors", "b.pt"]
    assert gists_among_weights(tmp_path / "a.safetensors") == []
