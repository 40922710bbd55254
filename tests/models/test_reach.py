"""The edges of what is supported: latent attention, positions that are scaled or tabulated, layers with a state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import gisting
from benchmarks import families
from gisting._compat import cache_argument
from gisting.errors import GistError, UnsupportedModelError
from gisting.models.check import check_model
from gisting.storage import STORAGES
from gisting.visibility import gist
from tests import tiny

# -- latent attention: values are narrower than keys, and what is rotated is not in the keys ---------------------------


@pytest.fixture(scope="module")
def latent() -> tuple[Any, Any, gisting.GistCache]:
    model, tokenizer = tiny.patched("deepseek_v3")
    return model, tokenizer, gisting.compress(model, tokenizer, ["w1 w2 w3 w4", "w5"], [3, 1])


INPUTS = ["w6 w7", "w8 w9 w10"]


def answers(latent: Any, cache: gisting.GistCache) -> list[str]:
    model, tokenizer, _ = latent
    return gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=6)


@pytest.mark.parametrize("storage", [None, *STORAGES])
def test_latent_states_are_stored(latent: Any, storage: str | None, tmp_path: Path) -> None:
    cache = latent[2]
    assert {keys.shape[3] - values.shape[3] for keys, values in zip(cache.keys, cache.values, strict=True)} == {12}
    cache.save(tmp_path / "latent.gist", storage)
    found = gisting.GistCache.load(tmp_path / "latent.gist")
    for here, there in zip(found.keys + found.values, cache.blanked().keys + cache.blanked().values, strict=True):
        assert here.shape == there.shape
        # e4m3 has three bits after the leading one.
        assert (here - there).abs().max() <= there.abs().max() * (0 if storage in (None, "float32") else 2**-4)
    if storage is None:
        assert answers(latent, found) == answers(latent, cache)


def test_latent_states_in_stores_and_tables(latent: Any, tmp_path: Path) -> None:
    cache = latent[2]
    store = gisting.GistStore(tmp_path / "store")
    store.put("first", cache[0])
    assert answers(latent, gisting.GistCache.cat([store["first"], cache[1]])) == answers(latent, cache)
    assert answers(latent, gisting.GistTable(cache).gather([0, 1])) == answers(latent, cache)


def test_latent_states_are_not_chained(latent: Any) -> None:
    """Rotating their keys would change nothing that is rotated, and the second gist would stay where it was."""
    cache = latent[2]
    assert cache.rotary is None
    with pytest.raises(GistError, match=r"latent attention does not, so compress the joined prompts"):
        gisting.GistCache.chain([cache[0], cache[1]])


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["ministral3", "gptj", "codegen"])
def test_positions_that_cannot_be_negative_are_refused(model_type: str) -> None:
    """A logarithm of the position, or a table without entries below 0."""
    found = check_model(families.build("decoder", model_type, 64)).failed
    assert found is not None
    assert found.name == "positions"
    assert "scaled or in a table" in found.problem


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_absolute_positions_are_refused(model_type: str) -> None:
    found = check_model(families.build("decoder", model_type, 64)).failed
    assert found is not None
    assert (found.name, "absolute, learned" in found.problem) == ("positions", True)


def test_temperature_by_position_is_refused() -> None:
    """Llama 4 scales queries by the logarithm of the number of tokens, from 8,192 tokens on."""
    config = AutoConfig.for_model(
        "llama4_text",
        **{**tiny._COMMON, "intermediate_size_mlp": 48, "num_local_experts": 2},
        layer_types=["full_attention"] * 3,
        no_rope_layers=[1, 0, 1],
        attn_temperature_tuning=True,
    )
    with pytest.raises(UnsupportedModelError, match="it scales attention by how many tokens come before"):
        gisting.patch(tiny.scaled(AutoModelForCausalLM.from_config(config)), tiny.tokenizer())


@pytest.mark.parametrize(
    ("rope_type", "more"),
    [
        ("dynamic", {"factor": 2.0}),
        ("longrope", {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 128}),
    ],
)
def test_frequencies_that_change_with_the_length_are_refused_beyond_it(rope_type: str, more: dict[str, Any]) -> None:
    parameters = {"rope_theta": 1e4, "rope_type": rope_type, **more}
    model, tokenizer = tiny.patched("llama", rope_parameters=parameters, max_position_embeddings=128)
    short, long = tiny.words(100, 1), tiny.words(140, 1)
    assert gisting.compress(model, tokenizer, [short], 2).num_gist_tokens == [2]
    with pytest.raises(GistError, match="128"):
        gisting.compress(model, tokenizer, [long], 2)


def test_yarn_is_right_at_any_length() -> None:
    yarn = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny.model("llama", rope_parameters=yarn)
    assert check_model(model).passed


# -- layers with a state -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_state_and_the_slots_are_a_gist_of_lfm2() -> None:
    """What docs/models.md says of hybrid models: after a gist, the states of its convolutions and the k slots of its
    attention continue as the full text does; without the states they do not.
    """
    config = AutoConfig.for_model(
        "lfm2",
        **{**tiny._COMMON, "num_hidden_layers": 4},
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )
    torch.manual_seed(1)
    model: Any = tiny.scaled(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    ids = torch.arange(4, 24)[None]
    is_gist = (torch.arange(20) >= 9) & (torch.arange(20) < 12)
    seen = gist(is_gist[None])
    scores = torch.zeros(1, 1, 20, 20).masked_fill(~seen.to_dense()[:, None], torch.finfo(torch.float32).min)

    def run(start: int, end: int, cache: Any) -> torch.Tensor:
        masks = {"full_attention": scores[:, :, start:end, :end], "conv": None}
        positions: Any = seen.position_ids
        more = {cache_argument(): cache, "use_cache": True}
        return model(ids[:, start:end], attention_mask=masks, position_ids=positions[:, start:end], **more).logits

    whole = run(0, 20, DynamicCache(config=config))[:, 12:]
    cache: Any = DynamicCache(config=config)
    run(0, 12, cache)
    for layer in cache.layers:
        if hasattr(layer, "keys"):
            layer.keys, layer.values = layer.keys[:, :, 9:12].clone(), layer.values[:, :, 9:12].clone()
    without = copy.deepcopy(cache)
    for layer in without.layers:
        if hasattr(layer, "conv_states"):
            layer.conv_states[0].zero_()

    def rest(cache: Any) -> torch.Tensor:
        causal = torch.full((8, 11), torch.finfo(torch.float32).min).triu(4)[None, None]
        more = {cache_argument(): cache, "use_cache": True}
        masks = {"full_attention": causal, "conv": None}
        return model(ids[:, 12:], attention_mask=masks, position_ids=torch.arange(3, 11)[None], **more).logits

    size = whole.abs().max()
    assert (rest(cache) - whole).abs().max() / size < 1e-5
    assert (rest(without) - whole).abs().max() / size > 1e-2
    # Nothing of this is supported.
    with pytest.raises(UnsupportedModelError, match="layers of type conv"):
        gisting.patch(model, tiny.tokenizer())
