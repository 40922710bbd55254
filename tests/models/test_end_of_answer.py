"""Answers end where they were taught to end: at the tokenizer's end of sequence, whatever the model's settings say.

The model knows its answer by heart: after ``w5`` comes ``w7``, then the tokenizer's end of sequence, which it would
otherwise run past forever. Its generation settings name another end, as in a chat model made of a base model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import gisting
from gisting.data.records import Record
from gisting.eval.conditions import EVAL_CONDITIONS, evaluate
from gisting.models.hub import save_pretrained
from gisting.models.patch import patch, unpatch
from gisting.tokens import GistTokenizer
from tests import tiny

END, BASE_END = 64, 2
FOLLOWS = {"w5": "w7", "w7": "<end>", "<end>": "w7"}


def gist_tokenizer() -> GistTokenizer:
    inner = tiny.word_tokenizer(("<end>",))
    inner.add_special_tokens({"eos_token": "<end>"})
    return GistTokenizer(inner, "plain")


def knows_its_answer() -> Any:
    """Make a model whose next token depends on the last one alone, as ``FOLLOWS`` says."""
    model: Any = tiny.model("llama-untied", hidden_size=96, vocab_size=END + 1, eos_token_id=BASE_END)
    tokenizer = tiny.word_tokenizer(("<end>",))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(END + 1, 96))
        model.lm_head.weight.zero_()
        for one, following in FOLLOWS.items():
            numbers: Any = tokenizer.convert_tokens_to_ids([one, following])
            model.lm_head.weight[numbers[1], numbers[0]] = 1.0
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=BASE_END)
    return model


@pytest.fixture
def knowing() -> tuple[Any, GistTokenizer]:
    tokenizer = gist_tokenizer()
    return patch(knows_its_answer(), tokenizer), tokenizer


def test_generate_and_converse(knowing: tuple[Any, GistTokenizer]) -> None:
    cache = gisting.compress(*knowing, ["w1 w2"])
    assert gisting.generate(*knowing, ["w5"], cache=cache, max_new_tokens=6) == ["w7"]
    turn = gisting.converse(*knowing, ["w5"], cache=cache, max_new_tokens=6)
    assert turn.texts == ["w7"]
    # The gist, "w5", "w7" and the end.
    assert turn.cache.num_gist_tokens == [4]
    assert gisting.converse(*knowing, ["w5"], cache=turn.cache, max_new_tokens=6).texts == ["w7"]


@pytest.mark.parametrize(
    "settings", [{}, {"generation_config": GenerationConfig(do_sample=False)}], ids=["own", "given"]
)
def test_evaluate_under_every_condition(knowing: tuple[Any, GistTokenizer], settings: dict[str, Any]) -> None:
    records = [Record("w1 w2", "w5", "w7"), Record("w1", "w5", "w7")]
    results = evaluate(*knowing, records, 1, conditions=EVAL_CONDITIONS, max_new_tokens=6, with_rouge=False, **settings)
    assert {one.condition: one.predictions for one in results} == {name: ["w7", "w7"] for name in EVAL_CONDITIONS}
    assert {result.exact_match for result in results} == {1.0}


def test_saved_settings_end_there_for_stock_transformers(knowing: tuple[Any, GistTokenizer], tmp_path: Path) -> None:
    model, tokenizer = knowing
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=BASE_END)
    save_pretrained(model, tokenizer, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [BASE_END, END]
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    said = stock.generate(torch.tensor([[9]]), max_new_tokens=6)
    assert said.tolist() == [[9, 11, END]]
    loaded = gisting.load(tmp_path)
    assert gisting.generate(*loaded, ["w5"], prompts=["w1 w2"], max_new_tokens=6) == ["w7"]


@pytest.mark.parametrize(
    ("before", "after"),
    [(BASE_END, [BASE_END, END]), ([5, 6], [5, 6, END]), (None, END), (END, END), ([END, 5], [END, 5])],
    ids=["one", "several", "none", "the same", "among several"],
)
def test_patch_adds_the_end_and_unpatch_removes_it(before: Any, after: Any) -> None:
    model = knows_its_answer()
    model.generation_config.eos_token_id = before
    patch(model, gist_tokenizer())
    assert model.generation_config.eos_token_id == after
    unpatch(model)
    assert model.generation_config.eos_token_id == before


def test_settings_that_replace_the_models_own(knowing: tuple[Any, GistTokenizer]) -> None:
    model, tokenizer = knowing
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=BASE_END)
    assert gisting.generate(model, tokenizer, ["w5"], prompts=["w1 w2"], max_new_tokens=6) == ["w7"]
    settings: dict[str, Any] = {"conditions": EVAL_CONDITIONS, "max_new_tokens": 6, "with_rouge": False}
    results = evaluate(model, tokenizer, [Record("w1", "w5", "w7"), Record("w2", "w5", "w7")], 1, **settings)
    assert {result.exact_match for result in results} == {1.0}


@pytest.mark.parametrize(
    "settings",
    [{"eos_token_id": BASE_END}, {"generation_config": GenerationConfig(eos_token_id=BASE_END)}],
    ids=["argument", "config"],
)
def test_an_explicit_end_is_the_callers(knowing: tuple[Any, GistTokenizer], settings: dict[str, Any]) -> None:
    assert gisting.generate(*knowing, ["w5"], prompts=["w1 w2"], max_new_tokens=4, **settings) == ["w7 w7"]


def test_tokenizer_without_an_end_changes_nothing() -> None:
    model = knows_its_answer()
    inner = tiny.word_tokenizer(("<end>",))
    inner.eos_token = None
    patch(model, GistTokenizer(inner, "plain"))
    assert model.generation_config.eos_token_id == BASE_END
