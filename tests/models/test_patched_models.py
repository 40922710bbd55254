"""Patched models: what they refuse to read unmasked, what they never generate, and how they train and compile."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

import gisting
from gisting._compat import cache_argument
from gisting.errors import GistError, GistTokenError
from gisting.models import registry
from gisting.visibility import Visibility, gist
from tests import tiny
from tests.models.test_patch import (
    GIST,
    assert_same_state,
    full_text,
    gradients,
    interval_call,
    one_of_each_kind,
    state_of,
)

# -- never silently unmasked -------------------------------------------------------------------------------------------

REFUSAL = "input_ids hold gist tokens, but attention_mask does not say what they hide"
UNMASKED_CALLS: dict[str, Callable[[PreTrainedModel, Tensor, dict[str, Tensor]], Any]] = {
    "forward": lambda model, ids, targets: model(input_ids=ids, **targets),
    "forward-positional": lambda model, ids, targets: model(ids, torch.ones_like(ids), **targets),
    "forward-2d-mask": lambda model, ids, targets: model(ids, attention_mask=torch.ones_like(ids), **targets),
    "forward-labels": lambda model, ids, targets: model(ids, labels=ids),
    "forward-dense-mask": lambda model, ids, targets: model(
        ids, attention_mask=torch.ones(2, 1, 14, 14, dtype=torch.bool).tril(), **targets
    ),
    "forward-int64-intervals": lambda model, ids, targets: model(
        ids, attention_mask=gist(ids == GIST).as_attention_mask().long(), **targets
    ),
    "generate": lambda model, ids, targets: model.generate(ids, max_new_tokens=3),
    "generate-2d-mask": lambda model, ids, targets: model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3
    ),
    "generate-beams": lambda model, ids, targets: model.generate(ids, max_new_tokens=3, num_beams=2),
    "generate-sample": lambda model, ids, targets: model.generate(ids, max_new_tokens=3, do_sample=True),
}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "t5", "umt5"])
@pytest.mark.parametrize("call", UNMASKED_CALLS)
def test_full_text_without_interval_mask_is_refused(name: str, call: str) -> None:
    model, _ = tiny.patched(name)
    is_encoder_decoder = name in tiny.ENCODER_DECODERS
    ids, _ = full_text(is_encoder_decoder)
    targets = {"decoder_input_ids": ids[:, :4]} if is_encoder_decoder else {}
    with pytest.raises(GistTokenError, match=REFUSAL):
        UNMASKED_CALLS[call](model, ids, targets)


@pytest.mark.parametrize("name", ["gemma2", "qwen2", "cohere2", "smollm3"])
def test_dense_masks_of_each_layer_type_are_refused(name: str) -> None:
    """These models take a dictionary of masks, which does not say what gist tokens hide, either."""
    model, _ = tiny.patched(name)
    ids, _ = full_text()
    mask = torch.ones(2, 1, 14, 14, dtype=torch.bool).tril()
    with pytest.raises(GistTokenError, match=REFUSAL):
        model(ids, attention_mask={"full_attention": mask, "sliding_attention": mask})


@one_of_each_kind
def test_inner_model_is_guarded_too(name: str) -> None:
    model, _ = tiny.patched(name)
    ids, _ = full_text()
    inner = model.get_encoder() if name == "t5" else model.base_model
    with pytest.raises(GistTokenError, match=REFUSAL):
        inner(input_ids=ids)


def test_gist_tokens_after_a_cache_are_refused() -> None:
    """Only the cache's own gist tokens may be in front; more of them would be read unmasked."""
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 2)
    ids = torch.tensor([[GIST, GIST, GIST, 9, 10]])
    with pytest.raises(GistTokenError, match="exactly the cache's gist tokens in front"):
        model.generate(ids, **{cache_argument(): cache.as_past_key_values()}, max_new_tokens=2)
    with pytest.raises(GistTokenError, match=REFUSAL):
        model(ids, **{cache_argument(): cache.as_past_key_values()})


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda model, ids, past: model(ids[:, 3:4], **{cache_argument(): past}), id="forward"),
        pytest.param(
            lambda model, ids, past: model.generate(ids[:, :4], **{cache_argument(): past}, max_new_tokens=2),
            id="generate",
        ),
        pytest.param(
            lambda model, ids, past: model.generate(ids, prefill_chunk_size=1, max_new_tokens=2), id="chunk-of-one"
        ),
    ],
)
def test_one_gist_token_after_an_ordinary_prefix_is_refused(call: Callable[..., Any]) -> None:
    """With a prompt's ordinary prefix cache and then one gist token, the following text would see the prompt itself."""
    model, _ = tiny.patched("llama")
    ids = torch.tensor([[5, 6, 7, GIST, 9]])
    past = model(ids[:, :3], use_cache=True)[cache_argument()]
    with pytest.raises(GistTokenError, match=REFUSAL):
        call(model, ids, past)


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_full_text_is_refused_when_compiled(name: str) -> None:
    model, _ = tiny.patched(name)
    ids, _ = full_text(name == "t5")
    targets = {"decoder_input_ids": ids[:, :4]} if name == "t5" else {}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(RuntimeError, match=REFUSAL):
            compiled(input_ids=ids, **mask, **targets)
    ordinary = ids.clamp(max=GIST - 1)
    assert torch.equal(compiled(input_ids=ordinary, **targets).logits, model(input_ids=ordinary, **targets).logits)


def test_unpatch_takes_the_guard_away() -> None:
    model, _ = tiny.patched("llama", vocab_size=80)
    gisting.unpatch(model)
    model(torch.tensor([[5, GIST, 6]]))


# -- gist tokens are never sampled -------------------------------------------------------------------------------------

GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True},
    "beams": {"num_beams": 3},
    "beam-sample": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


def make_eager_for_gist(model: PreTrainedModel) -> None:
    """Make the head give the gist token by far the best score."""

    def favour(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        return torch.cat([logits[..., :GIST], logits[..., GIST:] + 1e4], dim=-1)

    model.get_output_embeddings().register_forward_hook(favour)


@one_of_each_kind
@pytest.mark.parametrize("settings", GENERATE)
@pytest.mark.parametrize("user_config", [False, True], ids=["own-config", "user-config"])
def test_gist_token_is_never_generated(name: str, settings: str, user_config: bool) -> None:
    model, _ = tiny.patched(name)
    make_eager_for_gist(model)
    ids = torch.randint(4, 60, (2, 6))
    if user_config:
        tokens = model.generate(ids, generation_config=GenerationConfig(max_new_tokens=5, **GENERATE[settings]))
    else:
        tokens = model.generate(ids, max_new_tokens=5, **GENERATE[settings])
    assert tokens.shape[1] > 1
    assert not (tokens == GIST).any()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(lambda: {"suppress_tokens": [7], "max_new_tokens": 5}, id="keyword"),
        pytest.param(
            lambda: {"generation_config": GenerationConfig(suppress_tokens=[7], max_new_tokens=5)}, id="config"
        ),
    ],
)
def test_gist_token_is_not_generated_where_the_caller_suppresses_others(
    arguments: Callable[[], dict[str, Any]],
) -> None:
    """The caller's ``suppress_tokens`` replace the model's. Either the gist token stays suppressed, or the run is
    refused as soon as the model reads a gist token that it generated.
    """
    model, _ = tiny.patched("llama")
    make_eager_for_gist(model)
    try:
        tokens = model.generate(torch.randint(4, 60, (2, 6)), **arguments())
    except GistTokenError as error:
        assert re.match(REFUSAL, str(error))  # noqa: PT017 (one of two valid outcomes)
    else:
        assert not (tokens == GIST).any()


@one_of_each_kind
@pytest.mark.parametrize("settings", ["greedy", "beams", "several"])
def test_library_generate_never_gives_gist_tokens(name: str, settings: str) -> None:
    """With a head that prefers gist tokens, the texts are the same as with one that does not."""
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 2)
    texts = []
    for _ in range(2):
        torch.manual_seed(6)
        texts.append(gisting.generate(model, tokenizer, ["w4 w5"], cache=cache, max_new_tokens=5, **GENERATE[settings]))
        make_eager_for_gist(model)
    assert texts[0] == texts[1]
    assert all(texts[0])


# -- training and compiling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "t5"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, use_reentrant: bool) -> None:
    model, _ = tiny.patched(name)
    model.train()
    if name == "t5":
        model.double()
    call = {**interval_call(name, *full_text(name == "t5")), "use_cache": False}
    wanted = gradients(model, call)
    # Renamed in 5.2x; remove this when the lowest supported version has the new name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    found = gradients(model, call)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        # The same operations, so the same bits. But T5's shared bias sums the gradients of all layers in another order;
        # in float64 that is 1e-16, which these weights magnify at most 1e5 times (test_families.py).
        atol = 1e-11 * gradient.abs().max().item() if name == "t5" else 0.0
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "eager"),
        pytest.param("llama", "aot_eager", marks=pytest.mark.slow),
        pytest.param("gemma2", "eager", marks=pytest.mark.slow),
        pytest.param("t5", "eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_is_eager(name: str, backend: str) -> None:
    model, _ = tiny.patched(name)
    call = {**interval_call(name, *full_text(name == "t5")), "use_cache": False}
    wanted, wanted_logits = gradients(model, call), model(**call).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(**call).logits, wanted_logits)
    found = gradients(compiled, call)
    for key, gradient in wanted.items():
        # Gradients are summed in another order if the backward graph is traced, too.
        torch.testing.assert_close(
            found[f"_orig_mod.{key}"], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item()
        )


def test_router_logits_are_refused_in_words() -> None:
    model, _ = tiny.patched("mixtral")
    ids, visibility = full_text()
    call = interval_call("mixtral", ids, visibility)
    message = (
        "^output_router_logits needs a two-dimensional attention_mask, .* set model.config.output_router_logits = "
    )
    with pytest.raises(GistError, match=message):
        model(**call, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(GistError, match=message):
        model(**call)
    assert model(ids.clamp(max=60)).aux_loss is not None, "ordinary input is not affected"


@one_of_each_kind
@torch.no_grad()
def test_copy_of_a_patched_model(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    twin = copy.deepcopy(model)
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 2)
    assert gisting.generate(twin, tokenizer, ["w4"], cache=cache, max_new_tokens=4) == gisting.generate(
        model, tokenizer, ["w4"], cache=cache, max_new_tokens=4
    )
    before = state_of(model)
    gisting.unpatch(twin)
    assert_same_state(state_of(model), before)
    assert_same_state(state_of(twin), state_of(tiny.model(name)))
    with pytest.raises(GistTokenError, match=REFUSAL):
        model(**{**interval_call(name, *full_text()), "attention_mask": None})


# -- rotary frequencies that depend on the length ----------------------------------------------------------------------

LIMITS = {"llama-dynamic": 128, "phi3-longrope": 64}
every_limit = pytest.mark.parametrize(("name", "limit"), LIMITS.items())


@every_limit
def test_position_limit(name: str, limit: int) -> None:
    config = tiny.model(name).config
    assert registry.position_limit(config) == limit
    assert registry.is_length_dependent(config)
    assert not registry.is_length_dependent(tiny.model("llama").config)
    assert registry.position_limit(tiny.model("t5").config) is None


def text_of_length(length: int) -> tuple[Tensor, Visibility]:
    ids = torch.randint(4, 60, (1, length))
    ids[0, length // 2 : length // 2 + 3] = GIST
    return ids, gist(ids == GIST)


@every_limit
@torch.no_grad()
def test_exact_up_to_the_limit(name: str, limit: int) -> None:
    """With exactly ``limit`` tokens, the stock model with the dense mask and positions from 0 agrees."""
    model, _ = tiny.patched(name)
    ids, visibility = text_of_length(limit)
    logits = model(ids, attention_mask=visibility.as_attention_mask(), position_ids=visibility.position_ids).logits
    stock = tiny.stock_twin(name, model)(ids, attention_mask=visibility.to_dense()[:, None]).logits
    # Two rounding errors of angles up to 128 radians, 2^-18, in each of three layers.
    assert ((logits - stock).abs().max() / stock.abs().max()).item() < 2.5e-5


@every_limit
@torch.no_grad()
def test_a_long_ordinary_text_before_does_not_matter(name: str, limit: int) -> None:
    """Dynamic frequencies are kept between calls; the gist run must not use those of a long text."""
    model, tokenizer = tiny.patched(name, max_position_embeddings=128)
    prompt = tiny.words(30, 1)
    before = gisting.compress(model, tokenizer, [prompt], 2)
    model(torch.randint(4, 60, (1, 128 + 60)))
    after = gisting.compress(model, tokenizer, [prompt], 2)
    for one, other in zip(before.keys, after.keys, strict=True):
        assert torch.equal(one, other)


@every_limit
@pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "no-position-ids"])
@torch.no_grad()
def test_beyond_the_limit_is_refused(name: str, limit: int, anchored: bool) -> None:
    model, _ = tiny.patched(name)
    ids, visibility = text_of_length(limit + 1)
    call = interval_call(name, ids, visibility)
    if not anchored:
        del call["position_ids"]
    with pytest.raises(
        GistError, match=rf"span {limit + 1} positions, but the rotary frequencies of .* change beyond {limit}"
    ):
        model(**call)


@every_limit
def test_beyond_the_limit_is_refused_in_compress_and_generate(name: str, limit: int) -> None:
    model, tokenizer = tiny.patched(name)
    model_type = name.split("-")[0]
    # One gist token and nothing else: the plain template adds no tokens.
    with pytest.raises(
        GistError, match=f"^prompt 1 with its gist takes {limit + 1} positions, {model_type} has {limit}; shorten it$"
    ):
        gisting.compress(model, tokenizer, ["w1", tiny.words(limit, 1)], 1)
    cache = gisting.compress(model, tokenizer, [tiny.words(limit - 1, 1)], 1)
    message = (
        f"^input 0 with its cached prefix and 10 new tokens takes {limit + 1} positions, {model_type} has {limit}; "
    )
    with pytest.raises(GistError, match=message):
        gisting.generate(model, tokenizer, [tiny.words(limit - 10, 2)], cache=cache, max_new_tokens=10)
    gisting.generate(model, tokenizer, [tiny.words(limit - 11, 2)], cache=cache, max_new_tokens=10)
