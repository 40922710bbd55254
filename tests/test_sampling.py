"""Answers with the whole prompt in view: the stock model's own, whatever the batch, the order and the architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gisting import GistError
from gisting.cache import CacheOrigin
from gisting.data.plain import plain_sources
from gisting.generation.compression import full_prompt_cache, full_prompt_caches
from gisting.generation.sampling import sample_answers, sample_bare_answers
from tests import tiny

PROMPTS = [tiny.words(9, 1), tiny.words(4, 2), tiny.words(13, 3)]
PAIRS = [(prompt, text) for text in ("w1 w2", "w3 w4 w5 w6", "w7") for prompt in PROMPTS]


def stock_ids(name: str, model: Any, tokenizer: Any, pair: tuple[str, str], num_tokens: int) -> list[int]:
    """Greedy ids of an unpatched model with the same weights, up to the end."""
    twin: Any = tiny.stock_twin(name, model)
    (source,) = plain_sources(tokenizer, [pair[0]], [pair[1]])
    ids = torch.tensor([source])
    said = twin.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        suppress_tokens=[tokenizer.gist_token_id],
        pad_token_id=0,
    )[0].tolist()
    said = said[1:] if tokenizer.is_encoder_decoder else said[len(source) :]
    return said[: said.index(2) + 1] if 2 in said else said


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3_text", "t5"])
def test_greedy_answers_are_those_of_the_stock_model_to_the_whole_text(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    found = sample_answers(model, tokenizer, PAIRS, max_new_tokens=6, temperature=0, batch_size=4)
    assert [(one.prompt, one.input) for one in found] == PAIRS
    for one, pair in zip(found, PAIRS, strict=True):
        assert one.token_ids == stock_ids(name, model, tokenizer, pair, 6)
        assert one.output == tokenizer.decode(one.token_ids).strip()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_samples_depend_on_their_pair_and_the_seed_alone(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    found = sample_answers(model, tokenizer, PAIRS, max_new_tokens=6, seed=3, batch_size=4)
    assert sample_answers(model, tokenizer, PAIRS[::-1], max_new_tokens=6, seed=3, batch_size=5)[::-1] == found
    assert sample_answers(model, tokenizer, PAIRS[4:5], max_new_tokens=6, seed=3) == found[4:5]
    assert sample_answers(model, tokenizer, PAIRS, max_new_tokens=6, seed=4) != found
    twice = sample_answers(model, tokenizer, [PAIRS[0]] * 2, max_new_tokens=6, seed=3)
    assert twice[0] == found[0]
    assert twice[1] != found[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_as_often_as_the_model_says(temperature: float) -> None:
    model, tokenizer = tiny.patched("llama")
    number = 2000
    found = sample_answers(
        model, tokenizer, [PAIRS[0]] * number, max_new_tokens=1, temperature=temperature, batch_size=number
    )
    (source,) = plain_sources(tokenizer, [PAIRS[0][0]], [PAIRS[0][1]])
    with torch.no_grad():
        logits = model(torch.tensor([source])).logits[0, -1].double()
    logits[tokenizer.gist_token_id] = -torch.inf
    expected = (logits / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in found]), minlength=len(expected))
    assert counts[tokenizer.gist_token_id] == 0
    deviation = (number * expected * (1 - expected)).sqrt()
    assert ((counts - number * expected).abs() <= 4.5 * deviation + 1).all()


def test_an_answer_ends_where_the_model_ends_it_and_an_adapter_plays_no_part() -> None:
    from gisting.models.adapters import Adapter, attach

    model, tokenizer = tiny.patched("llama")
    before = sample_answers(model, tokenizer, PAIRS * 4, max_new_tokens=40, seed=1)
    ended = [one.token_ids for one in before if 2 in one.token_ids]
    assert ended
    assert all(ids.index(2) == len(ids) - 1 for ids in ended)
    attach(model, Adapter("gist-lora"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    assert sample_answers(model, tokenizer, PAIRS * 4, max_new_tokens=40, seed=1) == before


def test_each_prompt_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gisting.generation import sampling

    model, tokenizer = tiny.patched("llama")
    run: list[str] = []
    right = sampling.full_prompt_caches
    monkeypatch.setattr(sampling, "full_prompt_caches", lambda *args: run.extend(args[2]) or right(*args))
    done: list[int] = []
    sample_answers(model, tokenizer, PAIRS, max_new_tokens=2, batch_size=2, progress=done.append)
    assert sorted(run) == sorted(PROMPTS)
    assert sum(done) == len(PAIRS)
    assert max(done) == 2


def test_many_prompts_are_read_in_several_passes_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows times the longest; a prompt that is longer than the bound is read alone."""
    from gisting.generation import sampling

    model, tokenizer = tiny.patched("llama")
    prompts = [tiny.words(size, place) for place, size in enumerate((2, 2, 3, 9, 3, 4))]
    pairs = [(prompt, "w5") for prompt in prompts]
    expected = sample_answers(model, tokenizer, pairs, max_new_tokens=4)
    passes: list[list[int]] = []
    right = sampling.full_prompt_caches

    def spied(model: Any, tokenizer: Any, prompts: Any, origin: Any) -> Any:
        passes.append(right(model, tokenizer, prompts, origin).num_gist_tokens)
        return right(model, tokenizer, prompts, origin)

    monkeypatch.setattr(sampling, "full_prompt_caches", spied)
    monkeypatch.setattr(sampling, "_TOKENS_AT_ONCE", 8)
    assert sample_answers(model, tokenizer, pairs, max_new_tokens=4) == expected
    assert passes == [[2, 2], [3, 3], [4], [9]]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3_text"])
def test_states_of_prompts_in_one_pass_are_those_of_each(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    origin = CacheOrigin("", "", "", "prompt")
    found = full_prompt_caches(model, tokenizer, PROMPTS, origin)
    assert found.num_slots == max(found.num_gist_tokens)
    for row, prompt in enumerate(PROMPTS):
        alone, own = full_prompt_cache(model, tokenizer, prompt, origin), found[row]
        assert own.num_gist_tokens == alone.num_gist_tokens
        for one, other in zip((*own.keys, *own.values), (*alone.keys, *alone.values), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert all((layer[1, :, : found.num_slots - found.num_gist_tokens[1]] == 0).all() for layer in found.keys)


def test_no_pairs_give_no_answers() -> None:
    model, tokenizer = tiny.patched("llama")
    assert sample_answers(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        ("w1", {}, "pairs must be a list of pairs of texts"),
        (["w1 w2"], {}, r"pairs\[0\] must be a prompt and an input, both texts"),
        ([("w1", "w2", "w3")], {}, r"pairs\[0\] must be a prompt and an input"),
        ([("w1", "w2"), ("", "w2")], {}, r"pairs\[1\] has an empty prompt"),
        (PAIRS, {"temperature": -1}, "temperature must be a number of at least 0"),
        (PAIRS, {"temperature": float("nan")}, "temperature must be a number of at least 0"),
        (PAIRS, {"seed": 0.5}, "seed must be a whole number"),
        (PAIRS, {"batch_size": 0}, "batch_size must be at least 1"),
        (PAIRS, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (PAIRS, {"max_new_tokens": 120}, "input 0 with its prompt and 120 new tokens takes"),
    ],
)
def test_what_cannot_be_sampled(pairs: Any, settings: dict[str, Any], message: str) -> None:
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match=message):
        sample_answers(model, tokenizer, pairs, **settings)


def test_an_unpatched_model_is_refused() -> None:
    _, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match="is not patched"):
        sample_answers(tiny.model("llama"), tokenizer, PAIRS)


# -- the bare query ----------------------------------------------------------------------------------------------------

INPUTS = ["w1 w2", "w3 w4 w5 w6", "w7"]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3_text", "t5"])
def test_bare_answers_are_those_of_the_stock_model_to_the_input_alone(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    found = sample_bare_answers(model, tokenizer, INPUTS, max_new_tokens=6, temperature=0, batch_size=2)
    assert [(one.prompt, one.input) for one in found] == [("", text) for text in INPUTS]
    for one in found:
        assert one.token_ids == stock_ids(name, model, tokenizer, ("", one.input), 6)
        assert one.output == tokenizer.decode(one.token_ids).strip()


def test_bare_samples_depend_on_their_input_and_the_seed_alone() -> None:
    model, tokenizer = tiny.patched("llama")
    found = sample_bare_answers(model, tokenizer, [*INPUTS, "w7"], max_new_tokens=6, seed=3, batch_size=3)
    assert sample_bare_answers(model, tokenizer, INPUTS[::-1], max_new_tokens=6, seed=3)[::-1] == found[:3]
    assert sample_bare_answers(model, tokenizer, INPUTS, max_new_tokens=6, seed=4) != found[:3]
    assert found[3] != found[2], "another answer to a repeated input"
    assert sample_bare_answers(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        (["w1", 3], {}, r"inputs\[1\] must be a text, got int"),
        (["w1"], {"temperature": -1}, "temperature must be a number of at least 0, got -1"),
        (["w1"], {"max_new_tokens": 0}, "max_new_tokens must be"),
        (["w1"], {"max_new_tokens": 2000}, "input 0 with its answer takes 2001 positions"),
        (["w1"], {"seed": 0.5}, "seed must be a whole number, got 0.5"),
    ],
)
def test_bare_inputs_that_are_refused(inputs: Any, settings: dict[str, Any], message: str) -> None:
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match=message):
        sample_bare_answers(model, tokenizer, inputs, **settings)
