"""``state``: whether a model is patched, through everything that can happen to it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import gisting
from gisting.errors import GistError
from gisting.models import patch as patch_module
from gisting.models import state
from gisting.models.registry import Family
from gisting.models.state import guarded_stack, is_patched, require_patched
from tests import tiny


def test_a_model_is_patched_until_it_is_unpatched(tmp_path: Path) -> None:
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    assert not is_patched(model)
    gisting.patch(model, tokenizer)
    assert is_patched(model)
    assert is_patched(copy.deepcopy(model))
    assert require_patched(model, tokenizer) == Family("llama")
    model.save_pretrained(tmp_path)
    assert not is_patched(AutoModelForCausalLM.from_pretrained(tmp_path))
    gisting.unpatch(model)
    assert not is_patched(model)


def test_another_tokenizer_is_refused() -> None:
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(
        GistError, match=r"^model was patched for tokenizer .* \(template plain, .* \(template alpaca, "
    ):
        require_patched(model, tiny.tokenizer(template="alpaca"))
    model.config.gist["format"] = 7
    with pytest.raises(GistError, match=r"^model.config.gist has format 7, this version reads 1; upgrade gisting"):
        require_patched(model, tokenizer)


@pytest.mark.parametrize(("name", "stack"), [("llama", "LlamaModel"), ("t5", "T5Stack")])
def test_the_guarded_stack_reads_the_ids(name: str, stack: str) -> None:
    assert type(guarded_stack(tiny.model(name))).__name__ == stack


def test_patch_still_has_its_public_names() -> None:
    for name in ("PATCH_FORMAT", "guarded_stack", "is_patched", "require_patched"):
        assert getattr(patch_module, name) is getattr(state, name)
