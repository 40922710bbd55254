"""Parity with the published implementation of Gisting (github.com/jayelm/gisting, 2023) on two small checkpoints.

``expected.safetensors`` holds what that code computed in float32; ``meta.json`` lists the cases. The checkpoints bring
the gist token in their own vocabulary (id 95), so ``patch`` keeps its trained row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import gisting
from gisting._compat import cache_argument
from gisting.cache import CacheOrigin, GistCache
from gisting.models import decoder, encoder_decoder
from gisting.models.fingerprint import fingerprint
from gisting.tokens import GistEncoding, GistTokenizer
from gisting.visibility import CONDITIONS, ENCODER_CONDITIONS
from tests import tiny

GIST = 95
NEW_TOKENS = 12
PUBLISHED_NAMES = {"gist": "gist", "positive": "pos_control", "negative": "neg_control"}
# The tolerance for both, and a smaller one for LLaMA: full and cached logits of the published code itself differ by
# 7e-7 for LLaMA, by 2e-5 for T5 (``meta.json``).
TOLERANCE, LLAMA_TOLERANCE = 1e-4, 1e-5
CASES = ("9+1+6", "5+2+8", "17+5+4", "1+1+1", "30+10+12", "12+3+2")

every_case = pytest.mark.parametrize("case", range(len(CASES)), ids=CASES)
every_condition = pytest.mark.parametrize("condition", CONDITIONS)


@dataclass(frozen=True)
class Published:
    """A patched checkpoint and the published tensors of its family."""

    model: PreTrainedModel
    tokenizer: GistTokenizer
    family: str
    tensors: dict[str, Tensor]
    cases: list[dict[str, int]]

    def __getitem__(self, key: tuple[int, str]) -> Tensor:
        case, name = key
        return self.tensors[f"{self.family}.{case}.{name}"]

    def encoding(self, case: int) -> GistEncoding:
        """Return prompt and gist, without the rest."""
        prompt, k = self.cases[case]["prompt"], self.cases[case]["gist"]
        return GistEncoding(self[case, "input_ids"][0, : prompt + k].tolist(), prompt, prompt + k, prompt + k)

    def rest(self, case: int) -> list[int]:
        """Return the ids after the gist."""
        return self[case, "input_ids"][0, self.encoding(case).gist_end :].tolist()

    def compress(self, case: int) -> GistCache:
        """Compute the library's own prefix states of one case."""
        origin = CacheOrigin(fingerprint(self.model), self.tokenizer.fingerprint, "plain", "gist")
        run = encoder_decoder.prefix_states if self.family == "t5" else decoder.prefix_states
        return run(self.model, self.tokenizer, [self.encoding(case)], origin)


def load(shared: Path, family: str) -> Published:
    folder = shared / "reference" / "gisting-2023"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["gist_token"] == GIST
    assert tuple(f"{case['prompt']}+{case['gist']}+{case['rest']}" for case in meta["cases"]) == CASES
    tokenizer = GistTokenizer(
        tiny.word_tokenizer((*(f"w{number}" for number in range(60, 91)), "<GIST>")),
        "plain",
        is_encoder_decoder=family == "t5",
    )
    assert tokenizer.gist_token_id == GIST
    assert tokenizer.has_own_gist_token
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(folder / family, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    gisting.patch(model, tokenizer)
    # The published runs ended at the model's own end alone; this tokenizer was not part of them.
    model.generation_config.eos_token_id = ends
    return Published(model, tokenizer, family, load_file(folder / "expected.safetensors"), meta["cases"])


@pytest.fixture(scope="module")
def llama(shared: Path) -> Published:
    return load(shared, "llama")


@pytest.fixture(scope="module")
def t5(shared: Path) -> Published:
    return load(shared, "t5")


def assert_close(found: Tensor, published: Tensor, tolerance: float) -> None:
    assert found.shape == published.shape
    assert ((found - published).abs().max() / published.abs().max()).item() < tolerance


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_trained_gist_row_stays(shared: Path, family: str) -> None:
    weights = load_file(shared / "reference" / "gisting-2023" / family / "model.safetensors")
    model = load(shared, family).model
    for name in (
        ("model.embed_tokens.weight", "lm_head.weight") if family == "llama" else ("shared.weight", "lm_head.weight")
    ):
        assert torch.equal(model.state_dict()[name], weights[name]), name


# -- LLaMA -------------------------------------------------------------------------------------------------------------


@every_case
@every_condition
@torch.no_grad()
def test_llama_logits(llama: Published, case: int, condition: str) -> None:
    ids = llama[case, "input_ids"]
    visibility = CONDITIONS[condition](ids == GIST)
    logits = llama.model(
        ids, attention_mask=visibility.as_attention_mask(), position_ids=visibility.position_ids
    ).logits
    assert_close(logits, llama[case, f"logits_{PUBLISHED_NAMES[condition]}"], LLAMA_TOLERANCE)


@every_case
@torch.no_grad()
def test_llama_cached_logits_and_greedy_tokens(llama: Published, case: int) -> None:
    arguments, given = decoder.prepare_generation(
        llama.model, llama.tokenizer, llama.compress(case), [llama.rest(case)]
    )
    k = llama.cases[case]["gist"]
    assert given == k + llama.cases[case]["rest"]
    past = arguments[cache_argument()]
    logits = llama.model(
        arguments["input_ids"][:, k:],
        attention_mask=arguments["attention_mask"],
        position_ids=torch.arange(k, given)[None],
        **{cache_argument(): past},
    ).logits
    assert_close(logits, llama[case, "logits_cached_rest"], LLAMA_TOLERANCE)

    arguments, _ = decoder.prepare_generation(llama.model, llama.tokenizer, llama.compress(case), [llama.rest(case)])
    tokens = llama.model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert tokens[0, given:].tolist() == llama[case, "generated_after_rest"][0].tolist()


def rotated(keys: Tensor, by: int, model: PreTrainedModel) -> Tensor:
    """Rotate keys by ``by`` positions, by definition: pairs ``(j, j + D/2)`` turn by ``by * theta ** (-2 j / D)``."""
    half = keys.shape[-1] // 2
    theta = model.config.rope_parameters["rope_theta"]
    angle = by * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    one, two = keys.double().split(half, dim=-1)
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], dim=-1).float()


@every_case
def test_llama_gist_keys_and_values(llama: Published, case: int) -> None:
    """Values agree with the published ones. So do keys, once they are rotated from position 0, where ours are, to the
    position after the prompt, where the published ones are.
    """
    cache = llama.compress(case)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        assert_close(values, llama[case, f"gist_value.{layer}"], LLAMA_TOLERANCE)
        published = llama[case, f"gist_key.{layer}"]
        assert_close(rotated(keys, llama.cases[case]["prompt"], llama.model), published, LLAMA_TOLERANCE)
        assert (keys - published).abs().max() > 0.01, "the published keys are rotated at positions after the prompt"


def test_llama_cases_in_one_ragged_batch(llama: Published) -> None:
    """All six prompts in one cache and all six rests in one call give the same tokens."""
    cache = GistCache.cat([llama.compress(case) for case in range(len(CASES))])
    rests = [llama.rest(case) for case in range(len(CASES))]
    arguments, given = decoder.prepare_generation(llama.model, llama.tokenizer, cache, rests)
    tokens = llama.model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)[:, given:]
    assert tokens.tolist() == [llama[case, "generated_after_rest"][0].tolist() for case in range(len(CASES))]


# -- T5 ----------------------------------------------------------------------------------------------------------------


@every_case
@every_condition
@torch.no_grad()
def test_t5_encoder_states_and_logits(t5: Published, case: int, condition: str) -> None:
    ids = t5[case, "input_ids"]
    out = t5.model(
        ids,
        attention_mask=ENCODER_CONDITIONS[condition](ids == GIST).as_attention_mask(),
        decoder_input_ids=t5[case, "decoder_input_ids"],
    )
    name = PUBLISHED_NAMES[condition]
    assert_close(out.encoder_last_hidden_state, t5[case, f"encoder_{name}"], TOLERANCE)
    assert_close(out.logits, t5[case, f"logits_{name}"], TOLERANCE)


@every_case
@torch.no_grad()
def test_t5_cached_states_logits_and_greedy_tokens(t5: Published, case: int) -> None:
    arguments, _ = encoder_decoder.prepare_generation(t5.model, t5.tokenizer, t5.compress(case), [t5.rest(case)])
    assert_close(arguments["encoder_outputs"].last_hidden_state, t5[case, "encoder_cached"], TOLERANCE)
    logits = t5.model(**arguments, decoder_input_ids=t5[case, "decoder_input_ids"]).logits
    assert_close(logits, t5[case, "logits_cached"], TOLERANCE)
    tokens = t5.model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert tokens[0].tolist() == t5[case, "generated"][0].tolist()


@every_case
def test_t5_gist_keys_values_and_states(t5: Published, case: int) -> None:
    """T5's keys have no position, so they equal the published ones directly."""
    cache = t5.compress(case)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        assert_close(keys, t5[case, f"gist_key.{layer}"], TOLERANCE)
        assert_close(values, t5[case, f"gist_value.{layer}"], TOLERANCE)
    assert cache.last_hidden is not None
    assert_close(cache.last_hidden, t5[case, "gist_last_hidden"], TOLERANCE)


@every_case
@torch.no_grad()
def test_t5_from_the_published_cache(t5: Published, case: int) -> None:
    """A cache made from the published tensors gives the published results."""
    layers = range(t5.model.config.num_layers)
    cache = GistCache(
        tuple(t5[case, f"gist_key.{layer}"] for layer in layers),
        tuple(t5[case, f"gist_value.{layer}"] for layer in layers),
        torch.tensor([t5.cases[case]["gist"]]),
        CacheOrigin("t5/published", "", "plain", "gist"),
        t5[case, "gist_last_hidden"],
    )
    arguments, _ = encoder_decoder.prepare_generation(t5.model, t5.tokenizer, cache, [t5.rest(case)])
    assert isinstance(arguments["encoder_outputs"], BaseModelOutput)
    assert_close(arguments["encoder_outputs"].last_hidden_state, t5[case, "encoder_cached"], TOLERANCE)
    tokens = t5.model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert tokens[0].tolist() == t5[case, "generated"][0].tolist()
