"""Decoders and encoder-decoders are behind one protocol, and only its module chooses between them."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gisting.generation
from gisting.models import decoder, encoder_decoder
from gisting.models.architecture import Architecture, architecture_of
from gisting.models.registry import Family

MEMBERS = [name for name in vars(Architecture) if not name.startswith("_")]


@pytest.mark.parametrize("module", [decoder, encoder_decoder], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("name", MEMBERS)
def test_both_modules_implement_the_protocol(name: str, module: ModuleType) -> None:
    def parameters(function: Any) -> list[tuple[Any, ...]]:
        return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]

    assert parameters(getattr(module, name)) == parameters(getattr(Architecture, name))[1:]  # without self
    assert name in module.__all__


def test_the_family_chooses() -> None:
    assert architecture_of(Family("llama")) is decoder
    assert architecture_of(Family("t5", is_encoder_decoder=True)) is encoder_decoder


def test_generation_does_not_ask_for_the_kind_of_model() -> None:
    (folder,) = gisting.generation.__path__
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path(folder).glob("*.py")}
    assert "answers.py" in sources
    assert [name for name, source in sources.items() if "is_encoder_decoder" in source] == []
