"""``compress`` and ``generate``: a batch equals its rows, answers equal those from the full text, and arguments that do
not fit are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import gisting
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheMismatchError, GistError, GistTokenError
from gisting.generation import checks
from gisting.models import adapters
from gisting.models.fingerprint import fingerprint
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS
from tests import tiny

three_kinds = pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
WINDOWED = ["mistral-window", "qwen2-window", "gemma2", "gemma3_text", "cohere2"]


def one_by_one(
    model: PreTrainedModel, tokenizer: GistTokenizer, inputs: list[str], cache: GistCache, **settings: Any
) -> list[str]:
    """Answer each input alone, after its own prompt."""
    return [
        text
        for row, text_in in enumerate(inputs)
        for text in gisting.generate(model, tokenizer, [text_in], cache=cache[row if len(cache) > 1 else 0], **settings)
    ]


def distance(one: GistCache, other: GistCache) -> float:
    """The largest difference, in units of the largest number."""
    assert one.num_gist_tokens == other.num_gist_tokens
    pairs = [*zip(one.keys, other.keys, strict=True), *zip(one.values, other.values, strict=True)]
    if one.last_hidden is not None and other.last_hidden is not None:
        pairs.append((one.last_hidden, other.last_hidden))
    # Slots without a token may hold anything.
    held = other.attention_mask.bool()
    return max(((a - b).movedim(-2, 1)[held].abs().max() / b.movedim(-2, 1)[held].abs().max()).item() for a, b in pairs)


# -- compress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3_text", "gpt_neox", "mixtral", "t5"])
def test_64_ragged_prompts_are_compressed_as_one_by_one(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    prompts = [tiny.words(1 + (37 * number) % 97, number) for number in range(64)]
    assert len({len(prompt.split()) for prompt in prompts}) == 64
    cache = gisting.compress(model, tokenizer, prompts, 3, batch_size=64)
    assert len(cache) == 64
    single = GistCache.cat([gisting.compress(model, tokenizer, [prompt], 3) for prompt in prompts])
    # Required: 1e-5 in float32. T5 does not scale its scores, so it is less exact with these weights (1e-4
    # against float64 in tests/models/test_families.py).
    assert distance(cache, single) < (2e-5 if name == "t5" else 1e-5)


@three_kinds
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_order_and_batch_size_do_not_matter(name: str, batch_size: int) -> None:
    model, tokenizer = tiny.patched(name)
    prompts = [tiny.words(count, count) for count in (17, 2, 30, 9, 9, 1, 23)]
    counts = [3, 1, 2, 5, 1, 4, 3]
    wanted = gisting.compress(model, tokenizer, prompts, counts)
    order = [4, 0, 6, 2, 5, 1, 3]
    found = gisting.compress(
        model, tokenizer, [prompts[row] for row in order], [counts[row] for row in order], batch_size=batch_size
    )
    assert found.num_gist_tokens == [counts[row] for row in order]
    assert distance(found, wanted.select(order)) < 2e-5


@three_kinds
def test_gists_do_not_keep_their_prompts_alive(name: str) -> None:
    """A slice of a long prompt's keys would keep all of them in memory."""
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, [tiny.words(90, 1)], 2)
    for tensor in (*cache.keys, *cache.values):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert not tensor.requires_grad


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_slots_without_a_token_hold_nothing_of_the_prompt(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, [tiny.words(9, 1), tiny.words(5, 2)], [1, 4])
    empty = (cache.attention_mask == 0)[0]
    assert empty.tolist() == [True, True, True, False]
    for tensor in (*cache.keys, *cache.values):
        assert not tensor[0][:, empty].any()
        assert tensor[0][:, ~empty].any()
    if cache.last_hidden is not None:
        assert not cache.last_hidden[0][empty].any()


@pytest.mark.parametrize("k", [1, 2, 10, 64])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_k_from_1_to_64(name: str, k: int) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, [tiny.words(9, 1), tiny.words(4, 2)], k)
    assert cache.num_gist_tokens == [k, k]
    assert cache.num_slots == k
    assert len(gisting.generate(model, tokenizer, ["w1", "w2"], cache=cache, max_new_tokens=3)) == 2


def test_origin_of_a_compressed_prompt() -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1"])
    assert cache.origin == CacheOrigin(fingerprint(model), tokenizer.fingerprint, "plain", "gist")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_gist_tokens": 0}, GistTokenError, "^num_gist_tokens must be at least 1, got 0; 1 to 10 is usual$"),
        ({"num_gist_tokens": [2, 0]}, GistTokenError, "^num_gist_tokens must be at least 1, got 0"),
        ({"num_gist_tokens": -1}, GistTokenError, "^num_gist_tokens must be at least 1, got -1"),
        (
            {"num_gist_tokens": [1]},
            GistError,
            "^num_gist_tokens must be one number or one for each of 2 prompts, got 1$",
        ),
        ({"prompts": ["w1", ""]}, GistError, "^prompt 1 is empty; there is nothing to compress, give its text$"),
        ({"prompts": [" \n", "w1"]}, GistError, "^prompt 0 is empty; there is nothing to compress"),
        ({"prompts": []}, GistError, "^prompts is empty; give at least one prompt$"),
        ({"prompts": "w1 w2"}, GistError, "^prompts must be a list of texts, got one text; put it in a list$"),
        ({"prompts": ["w1", 3]}, GistError, r"^prompts\[1\] must be a text, got int$"),
        ({"batch_size": 0}, GistError, "^batch_size must be at least 1, got 0$"),
        ({"condition": "gits"}, GistError, "^condition must be one of gist, positive, negative, got 'gits'$"),
        (
            {"prompts": ["w1", tiny.words(127, 1)], "num_gist_tokens": 2},
            GistError,
            "^prompt 1 with its gist takes 129 positions, llama has 128; shorten it$",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_compress_refuses(arguments: dict[str, Any], error: type[GistError], message: str) -> None:
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(error, match=message):
        gisting.compress(model, tokenizer, **{"prompts": ["w1", "w2"], **arguments})


@pytest.mark.parametrize("condition", ["positive", "negative"])
def test_controls_of_an_encoder_leave_no_states(condition: str) -> None:
    model, tokenizer = tiny.patched("t5")
    message = rf"^condition '{condition}' leaves no states to cache in an encoder, .* use generate\(prompts=\.\.\., "
    with pytest.raises(GistError, match=message):
        gisting.compress(model, tokenizer, ["w1"], condition=condition)


# -- generate: a batch is its rows -------------------------------------------------------------------------------------


@three_kinds
def test_16_caches_with_16_inputs_are_one_by_one(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    prompts = [tiny.words(1 + (5 * number) % 37, number) for number in range(16)]
    inputs = [tiny.words(1 + (7 * number) % 19, 100 + number) for number in range(16)]
    cache = gisting.compress(model, tokenizer, prompts, 3)
    settings = {"max_new_tokens": 12, "do_sample": False}
    texts = gisting.generate(model, tokenizer, inputs, cache=cache, **settings)
    assert texts == one_by_one(model, tokenizer, inputs, cache, **settings)
    assert len(set(texts)) > 8
    assert texts == gisting.generate(model, tokenizer, inputs, prompts=prompts, num_gist_tokens=3, **settings)


@three_kinds
def test_prompts_that_generate_runs_itself_take_no_fingerprint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller never sees their cache, and evaluation would fingerprint a large model for every batch."""
    model, tokenizer = tiny.patched(name)
    calls = []
    for module in (checks, adapters):
        monkeypatch.setattr(module, "fingerprint", lambda model: calls.append(None) or fingerprint(model))
    gisting.generate(model, tokenizer, ["w1"], prompts=["w2 w3"], max_new_tokens=2)
    assert not calls
    gisting.generate(model, tokenizer, ["w1"], cache=gisting.compress(model, tokenizer, ["w2 w3"]), max_new_tokens=2)
    assert len(calls) == 2


@three_kinds
def test_another_k_in_each_row(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    counts = [1, 5, 2, 10]
    prompts = [tiny.words(number + 3, number) for number in range(4)]
    inputs = [tiny.words(count, 50 + count) for count in (4, 1, 9, 2)]
    cache = gisting.compress(model, tokenizer, prompts, counts)
    joined = GistCache.cat(
        [gisting.compress(model, tokenizer, [prompt], k) for prompt, k in zip(prompts, counts, strict=True)]
    )
    texts = gisting.generate(model, tokenizer, inputs, cache=cache, max_new_tokens=8)
    assert texts == gisting.generate(model, tokenizer, inputs, cache=joined, max_new_tokens=8)
    assert texts == one_by_one(model, tokenizer, inputs, cache, max_new_tokens=8)
    assert texts == gisting.generate(
        model, tokenizer, inputs, prompts=prompts, num_gist_tokens=counts, max_new_tokens=8
    )


@three_kinds
def test_one_cache_for_many_inputs(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    prompt = tiny.words(20, 1)
    cache = gisting.compress(model, tokenizer, [prompt], 3)
    inputs = [tiny.words(count, count) for count in (3, 8, 1, 5)]
    texts = gisting.generate(model, tokenizer, inputs, cache=cache, max_new_tokens=8)
    assert texts == one_by_one(model, tokenizer, inputs, cache, max_new_tokens=8)
    assert texts == gisting.generate(model, tokenizer, inputs, prompts=[prompt], num_gist_tokens=3, max_new_tokens=8)


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows_do_not_count_padding(name: str) -> None:
    """Ragged inputs of up to four windows (8 tokens), after gists of several k."""
    model, tokenizer = tiny.patched(name)
    prompts = [tiny.words(count, count) for count in (25, 3, 12, 7)]
    inputs = [tiny.words(count, 30 + count) for count in (32, 2, 9, 9)]
    cache = gisting.compress(model, tokenizer, prompts, [2, 4, 3, 3])
    texts = gisting.generate(model, tokenizer, inputs, cache=cache, max_new_tokens=10)
    assert texts == one_by_one(model, tokenizer, inputs, cache, max_new_tokens=10)


def test_a_window_that_is_wide_enough_takes_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rows that a window would cut run in separate batches."""
    model, tokenizer = tiny.patched("mistral-window", sliding_window=40)
    cache = gisting.compress(model, tokenizer, ["w1 w2", "w3"], [2, 1])
    calls, right = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **arguments: calls.append(arguments["input_ids"].shape[0]) or right(**arguments)
    )
    gisting.generate(model, tokenizer, ["w1 w2 w3", "w4"], cache=cache, max_new_tokens=35)
    assert calls == [2]
    gisting.generate(model, tokenizer, ["w1 w2 w3", "w4"], cache=cache, max_new_tokens=36)
    assert calls == [2, 1, 1]


@three_kinds
def test_inputs_without_text(name: str) -> None:
    """The published templates have a form without input; T5 then reads only the gist."""
    model, tokenizer = tiny.patched(name, "alpaca-t5" if name == "t5" else "alpaca")
    prompts = [tiny.words(8, 1), tiny.words(3, 2), tiny.words(5, 3)]
    cache = gisting.compress(model, tokenizer, prompts, [2, 1, 3])
    for inputs in (["", "w1 w2", ""], ["", "", ""]):
        texts = gisting.generate(model, tokenizer, inputs, cache=cache, max_new_tokens=6)
        assert texts == one_by_one(model, tokenizer, inputs, cache, max_new_tokens=6)
        assert len(set(texts)) > 1
    if name == "t5":
        full = tokenizer.encode_batch(prompts, ["", "", ""], num_gist_tokens=[2, 1, 3])
        from gisting.models.encoder_decoder import prepare_full_generation

        tokens = model.generate(**prepare_full_generation(model, tokenizer, full, "gist"), max_new_tokens=6)
        assert texts == [tokenizer.decode(row) for row in tokens.tolist()]


def test_nothing_behind_the_gist_is_refused_in_a_decoder() -> None:
    model, tokenizer = tiny.patched("llama")  # without input, the plain template is white space, which is no token here
    cache = gisting.compress(model, tokenizer, ["w1"])
    with pytest.raises(
        GistError, match=r"^inputs\[1\] leaves nothing after the gist for the model to continue; give an input"
    ):
        gisting.generate(model, tokenizer, ["w1", ""], cache=cache)


# -- generate: the three conditions ------------------------------------------------------------------------------------

PROMPTS = [tiny.words(20, 1), tiny.words(3, 2), tiny.words(11, 3)]
INPUTS = [tiny.words(2, 4), tiny.words(9, 5), tiny.words(5, 6)]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral-window", "gpt_neox", "t5", "umt5"])
def test_positive_control_is_the_full_text(name: str) -> None:
    """Run stock ``generate`` of an unpatched model on prompt, gist and input."""
    model, tokenizer = tiny.patched(name)
    settings = {"max_new_tokens": 8, "do_sample": False}
    texts = gisting.generate(
        model, tokenizer, INPUTS, prompts=PROMPTS, num_gist_tokens=2, condition="positive", **settings
    )
    stock = tiny.stock_twin(name, model)
    for text, encoding in zip(texts, tokenizer.encode_batch(PROMPTS, INPUTS, num_gist_tokens=2), strict=True):
        ids = torch.tensor([encoding.input_ids])
        tokens = stock.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        given = 0 if name in tiny.ENCODER_DECODERS else ids.shape[1]
        assert text == tokenizer.decode(tokens[0, given:].tolist())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral-window", "gpt_neox", "t5", "umt5"])
def test_negative_control_is_the_bare_input(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    settings = {"max_new_tokens": 8, "do_sample": False}
    texts = gisting.generate(
        model, tokenizer, INPUTS, prompts=PROMPTS, num_gist_tokens=2, condition="negative", **settings
    )
    gisting.unpatch(model)
    for text, rest in zip(texts, tokenizer.encode_continuations(INPUTS), strict=True):
        tokens = model.generate(
            torch.tensor([rest]), attention_mask=torch.ones(1, len(rest), dtype=torch.long), **settings
        )
        given = 0 if name in tiny.ENCODER_DECODERS else len(rest)
        assert text == tokenizer.decode(tokens[0, given:].tolist())


@three_kinds
@pytest.mark.parametrize("condition", CONDITIONS)
def test_one_prompt_for_all_under_each_condition(name: str, condition: str) -> None:
    model, tokenizer = tiny.patched(name)
    settings = {"num_gist_tokens": 2, "condition": condition, "max_new_tokens": 6}
    shared = gisting.generate(model, tokenizer, INPUTS, prompts=PROMPTS[:1], **settings)
    assert shared == gisting.generate(model, tokenizer, INPUTS, prompts=PROMPTS[:1] * 3, **settings)


@pytest.mark.parametrize("condition", ["positive", "negative"])
def test_caches_of_the_controls(condition: str, tmp_path: Path) -> None:
    """On a decoder the controls are caches too, of all tokens or none, and name their condition."""
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, PROMPTS, 2, condition=condition)
    assert cache.origin.condition == condition
    assert cache.num_gist_tokens == ([22, 5, 13] if condition == "positive" else [0, 0, 0])
    cache.save(tmp_path / "a")
    texts = gisting.generate(model, tokenizer, INPUTS, cache=GistCache.load(tmp_path / "a"), max_new_tokens=6)
    assert texts == gisting.generate(
        model, tokenizer, INPUTS, prompts=PROMPTS, num_gist_tokens=2, condition=condition, max_new_tokens=6
    )


# -- generate: sampling, beams and other settings ----------------------------------------------------------------------


@three_kinds
def test_sampling_follows_the_seed(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, 2)

    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return gisting.generate(
            model, tokenizer, INPUTS, cache=cache, max_new_tokens=8, do_sample=True, temperature=2.0
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams-all": {"num_beams": 3, "num_return_sequences": 3},
    "user-config": {
        "generation_config": GenerationConfig(num_beams=3, num_return_sequences=2, pad_token_id=0, eos_token_id=2)
    },
}


@three_kinds
@pytest.mark.parametrize("settings", BEAMS)
def test_beams_of_a_batch_are_those_of_its_rows(name: str, settings: str) -> None:
    """The answers to one input are together, best first, even if a window makes rows run in separate batches."""
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, [2, 1, 3])
    texts = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6, **BEAMS[settings])
    each = {"beams": 1, "beams-all": 3, "user-config": 2}[settings]
    assert len(texts) == each * len(INPUTS)
    assert texts == one_by_one(model, tokenizer, INPUTS, cache, max_new_tokens=6, **BEAMS[settings])
    if each > 1:
        assert texts[0] != texts[1]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_beams_are_those_of_the_full_text(name: str) -> None:
    """Beam search from a cache of prompt and gist equals beam search on the text."""
    model, tokenizer = tiny.patched(name)
    settings = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    texts = gisting.generate(
        model, tokenizer, INPUTS[:1], prompts=PROMPTS[:1], num_gist_tokens=2, condition="positive", **settings
    )
    ids = torch.tensor([tokenizer.encode(PROMPTS[0], INPUTS[0], num_gist_tokens=2).input_ids])
    tokens = tiny.stock_twin(name, model).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert texts == [tokenizer.decode(row) for row in tokens[:, ids.shape[1] :].tolist()]


@three_kinds
def test_several_samples_of_each_input_stand_together(name: str) -> None:
    """At a temperature that makes sampling greedy, all samples of an input equal its greedy answer."""
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, 2)
    greedy = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6, do_sample=False)
    assert len(set(greedy)) == 3
    texts = gisting.generate(
        model,
        tokenizer,
        INPUTS,
        cache=cache,
        max_new_tokens=6,
        do_sample=True,
        temperature=1e-4,
        num_return_sequences=2,
    )
    assert texts == [text for text in greedy for _ in range(2)]


@pytest.mark.parametrize("where", ["keyword", "user-config", "model-config"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_suppressed_tokens_of_the_caller_and_of_the_model_stay_suppressed(name: str, where: str) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, 2)
    favourite = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=1, do_sample=False)[0]
    token = tiny.VOCABULARY.index(favourite)
    settings: dict[str, Any] = {}
    if where == "keyword":
        settings["suppress_tokens"] = [token]
    elif where == "user-config":
        settings["generation_config"] = GenerationConfig(suppress_tokens=[token])
    else:
        model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or []), token]
    texts = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=1, do_sample=False, **settings)
    assert texts[0] != favourite


@three_kinds
def test_without_the_models_own_cache(name: str) -> None:
    """``use_cache=False`` gives the same answer or is refused, but never gives a different answer."""
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, 2)
    wanted = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6)
    try:
        found = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6, use_cache=False)
    except GistError:
        return
    assert found == wanted


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_settings_that_change_what_stock_generate_returns(name: str) -> None:
    """A result's type never depends on a flag: it is texts, or our own error."""
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, 2)
    with pytest.raises(GistError, match="return_dict_in_generate"):
        gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=3, return_dict_in_generate=True)


# -- generate: modes and dtypes ----------------------------------------------------------------------------------------


@three_kinds
def test_training_mode_is_left_and_restored(name: str) -> None:
    changes = {"dropout_rate": 0.5} if name == "t5" else {"attention_dropout": 0.5}
    model, tokenizer = tiny.patched(name, **changes)
    model.eval()
    wanted_cache = gisting.compress(model, tokenizer, PROMPTS, 2)
    wanted = gisting.generate(model, tokenizer, INPUTS, cache=wanted_cache, max_new_tokens=6)
    model.train()
    frozen = model.get_input_embeddings().eval()  # one module that the user keeps in eval mode
    cache = gisting.compress(model, tokenizer, PROMPTS, 2)
    assert distance(cache, wanted_cache) == 0
    assert gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6) == wanted
    assert model.training
    assert not frozen.training
    with pytest.raises(GistError, match="must be one for all"):
        gisting.generate(model, tokenizer, INPUTS[:2], cache=cache)
    assert model.training


def test_training_mode_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1"])
    model.train()

    def fail(**_: Any) -> None:
        assert not model.training
        raise RuntimeError("planted")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="planted"):
        gisting.generate(model, tokenizer, ["w1"], cache=cache, max_new_tokens=2)
    assert model.training


@three_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model = tiny.model(name).to(dtype)
    tokenizer = tiny.tokenizer(name)
    gisting.patch(model, tokenizer)
    cache = gisting.compress(model, tokenizer, PROMPTS, 2)
    assert cache.dtype == dtype
    texts = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6)
    assert texts == gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6)
    assert len(set(texts)) > 1


# -- what does not belong together -------------------------------------------------------------------------------------


def test_cache_of_another_model() -> None:
    model, tokenizer = tiny.patched("llama")
    other, _ = tiny.patched("llama", rms_norm_eps=1e-3)
    cache = gisting.compress(other, tokenizer, ["w1"])
    message = (
        f"^cache was made for {fingerprint(other)}, this model is {fingerprint(model)}; compress the prompt again$"
    )
    with pytest.raises(CacheMismatchError, match=message):
        gisting.generate(model, tokenizer, ["w1"], cache=cache)


@pytest.mark.parametrize(
    ("template", "words"),
    [("alpaca", ()), ("plain", ("more",))],
    ids=["template", "vocabulary"],
)
def test_cache_of_another_tokenizer_or_template(template: str, words: tuple[str, ...]) -> None:
    model, tokenizer = tiny.patched("llama")
    other_tokenizer = GistTokenizer(tiny.word_tokenizer(words), template)
    other = gisting.patch(tiny.model("llama"), other_tokenizer)
    cache = gisting.compress(other, other_tokenizer, ["w1"])
    message = (
        rf"^cache was made with tokenizer {other_tokenizer.fingerprint} \(template {template}\), this one is "
        rf"{tokenizer.fingerprint} \(template plain\); compress the prompt again"
        + (", or load with template='alpaca'$" if template == "alpaca" else "$")
    )
    with pytest.raises(CacheMismatchError, match=message):
        gisting.generate(model, tokenizer, ["w1"], cache=cache)
    # Which is said first: with another dtype as well, a cast would not help.
    with pytest.raises(CacheMismatchError, match=message):
        gisting.generate(model, tokenizer, ["w1"], cache=cache.to(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda cache: cache.to(dtype=torch.bfloat16),
            r"^cache has dtype torch.bfloat16, the model torch.float32; .* or cast: cache.to\(dtype=torch.float32\)$",
        ),
        (lambda cache: cache.to("meta"), r"^cache is on meta, the model on cpu; move it: cache.to\('cpu'\)$"),
        (lambda cache: cache.select([0, 1, 0]), "^cache must be one for all 2 inputs or one each, got 3$"),
        (
            lambda cache: dataclasses.replace(cache, origin=dataclasses.replace(cache.origin, model="t5/0123456789ab")),
            "^cache was made for t5/0123456789ab, this model is llama/[0-9a-f]{12}; compress the prompt again$",
        ),
    ],
    ids=["dtype", "device", "batch-size", "model"],
)
def test_cache_that_does_not_fit(change: Callable[[GistCache], GistCache], message: str) -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1", "w2"])
    with pytest.raises(CacheMismatchError, match=message):
        gisting.generate(model, tokenizer, ["w1", "w2"], cache=change(cache))


def test_a_cast_cache_is_accepted_where_the_model_was_cast_alike() -> None:
    """Weights that bfloat16 represents exactly are the same model in float32, and its cache may be cast."""
    model = tiny.model("llama").bfloat16()
    tokenizer = tiny.tokenizer()
    gisting.patch(model, tokenizer)
    cache = gisting.compress(model, tokenizer, ["w1 w2"], 2)
    gisting.generate(model.float(), tokenizer, ["w1"], cache=cache.to(dtype=torch.float32), max_new_tokens=2)


CALLS: list[tuple[dict[str, Any], type[GistError], str]] = [
    ({}, GistError, r"^give either cache or prompts: generate\(..., cache=compress\(model, tokenizer, prompts\)\)$"),
    ({"cache": True, "prompts": ["w1"]}, GistError, "^give either cache or prompts"),
    (
        {"cache": True, "inputs": []},
        GistError,
        '^inputs is empty; give at least one text, "" if the prompt needs no input$',
    ),
    ({"cache": True, "inputs": "w1"}, GistError, "^inputs must be a list of texts, got one text; put it in a list$"),
    (
        {"cache": True, "inputs": ["w1", None]},
        GistError,
        r"^inputs\[1\] must be a text, or a list of messages, got NoneType$",
    ),
    ({"prompts": "w1 w2"}, GistError, "^prompts must be a list of texts, got one text; put it in a list$"),
    ({"prompts": []}, GistError, "^prompts must be one for all 2 inputs or one each, got 0$"),
    ({"prompts": ["w1"] * 3}, GistError, "^prompts must be one for all 2 inputs or one each, got 3$"),
    ({"prompts": ["w1", ""]}, GistError, "^prompt 1 is empty"),
    ({"prompts": ["w1"], "num_gist_tokens": 0}, GistTokenError, "^num_gist_tokens must be at least 1, got 0"),
    (
        {"prompts": ["w1"], "condition": "no"},
        GistError,
        "^condition must be one of gist, positive, negative, got 'no'$",
    ),
    ({"cache": True, "max_new_tokens": 0}, GistError, "^max_new_tokens must be at least 1, got 0$"),
    *[
        (
            {"cache": True, name: None},
            GistError,
            f"^{name} cannot be given: generate makes them from inputs and cache; .* call model.generate$",
        )
        for name in (
            *("input_ids", "attention_mask", "past_key_values", "position_ids", "encoder_outputs", "inputs_embeds"),
            *("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "cache_position"),
            "custom_generate",
        )
    ],
    ({"cache": True, "max_new_tokens": 2.5}, GistError, "^max_new_tokens must be a whole number, got 2.5$"),
    ({"cache": True, "max_new_tokens": True}, GistError, "^max_new_tokens must be a whole number, got True$"),
    ({"cache": True, "num_beams": 0}, GistError, "^num_beams must be at least 1, got 0$"),
    ({"cache": True, "num_return_sequences": 1.5}, GistError, "^num_return_sequences must be a whole number, got 1.5$"),
    ({"cache": True, "max_length": 9}, GistError, "^max_length also counts the tokens before .*; give max_new_tokens$"),
    ({"cache": True, "min_length": 9}, GistError, "^min_length also counts the tokens before .*; give min_new_tokens$"),
    *[
        ({"cache": True, name: 2.0}, GistError, f"^{name} looks at the prompt's tokens, .*; set {name}=[01]$")
        for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
    ],
    (
        {"cache": True, "guidance_scale": 1.5, "prompt_lookup_num_tokens": 3},
        GistError,
        "^guidance_scale must be 1 with drafts",
    ),
    (
        {"cache": True, "position_ids": 1, "input_ids": 1},
        GistError,
        "^input_ids, position_ids cannot be given: generate makes them",
    ),
    (
        {"cache": True, "inputs": ["w1", tiny.words(100, 1)], "max_new_tokens": 28},
        GistError,
        "^input 1 with its cached prefix and 28 new tokens takes 129 positions, llama has 128; shorten it$",
    ),
    (
        {"prompts": [tiny.words(128, 1)], "condition": "positive"},
        GistError,
        "^prompt 0 with its gist takes 129 positions, llama has 128; shorten it$",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), CALLS, ids=lambda value: str(value)[:40] if isinstance(value, dict) else ""
)
def test_generate_refuses(arguments: dict[str, Any], error: type[GistError], message: str) -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1"])
    arguments = {"inputs": ["w1", "w2"], "max_new_tokens": 5, **arguments}
    if arguments.get("cache") is True:
        arguments["cache"] = cache
    with pytest.raises(error, match=message):
        gisting.generate(model, tokenizer, **arguments)


def test_up_to_the_last_position() -> None:
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, [tiny.words(127, 1)], 1)
    assert gisting.generate(model, tokenizer, [tiny.words(100, 2)], cache=cache, max_new_tokens=27)


@three_kinds
def test_unpatched_model_and_foreign_tokenizer(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, ["w1"])
    calls: list[Callable[[PreTrainedModel, Any], Any]] = [
        lambda model, tokenizer: gisting.compress(model, tokenizer, ["w1"]),
        lambda model, tokenizer: gisting.generate(model, tokenizer, ["w1"], cache=cache),
    ]
    unpatched = tiny.model(name)
    for call in calls:
        message = rf"^model \({type(model).__name__}\) is not patched; call gisting.patch\(model, tokenizer\) first$"
        with pytest.raises(GistError, match=message):
            call(unpatched, tokenizer)
        with pytest.raises(
            GistError, match=r"^tokenizer must be a GistTokenizer, got \w+; wrap it: GistTokenizer\(tokenizer\)$"
        ):
            call(model, tiny.word_tokenizer())
        with pytest.raises(
            GistError, match=r"^model was patched for tokenizer .* got .* load the tokenizer that was saved"
        ):
            call(model, tiny.tokenizer(name, "alpaca"))
