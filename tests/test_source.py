"""``source``: which weight files of a checkpoint are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gisting.source import weight_files


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
