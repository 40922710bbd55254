"""A GPU compresses prompts and answers from them as the CPU does, with every kind of attention and of cache."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gisting
from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.errors import GistTokenError
from gisting.store import GistStore
from gisting.table import GistTable
from tests import tiny
from tests.card.both import BOUND, Place, assert_near, clear_winners

pytestmark = pytest.mark.card
PROMPTS, COUNTS = [tiny.words(9, 1), tiny.words(4, 2)], [1, 3]
INPUTS = [tiny.words(3, 3), tiny.words(6, 4)]
# A softcap (Gemma 2), windows, an encoder, and positions that rotate a part of each head.
FAMILIES = ["llama", "gemma2", "qwen2-window", "gpt_neox", "t5", "umt5"]


class Pair:
    """A patched model on the CPU, its copy on the device, and prompts that the first compressed."""

    def __init__(self, name: str, place: Place, dtype: torch.dtype = torch.float32) -> None:
        self.on_cpu, self.tokenizer = tiny.patched(name)
        self.there: Any = copy.deepcopy(self.on_cpu).to(place.device, dtype)  # pyright: ignore[reportArgumentType]
        self.place = place
        self.wanted = gisting.compress(self.on_cpu, self.tokenizer, PROMPTS, COUNTS)

    def compress(self) -> GistCache:
        return gisting.compress(self.there, self.tokenizer, PROMPTS, COUNTS)

    def said_on_cpu(self) -> list[str]:
        """Answer each input alone, so that everything computed for it is checked."""
        answers: list[str] = []
        for row, text in enumerate(INPUTS):
            with clear_winners() as watched:
                cache = self.wanted.select([row])
                call = {"cache": cache, "max_new_tokens": 8, **watched}
                answers += gisting.generate(self.on_cpu, self.tokenizer, [text], **call)
        return answers

    def said(self, cache: GistCache, **settings: Any) -> list[str]:
        return gisting.generate(self.there, self.tokenizer, INPUTS, cache=cache, max_new_tokens=8, **settings)


def assert_same_states(found: GistCache, wanted: GistCache, bound: float = BOUND) -> None:
    assert found.num_gist_tokens == wanted.num_gist_tokens
    for layer, (one, other) in enumerate(zip(found.keys + found.values, wanted.keys + wanted.values, strict=True)):
        assert_near(one, other, f"layer {layer}", bound)
    if wanted.last_hidden is not None:
        assert found.last_hidden is not None
        assert_near(found.last_hidden, wanted.last_hidden, "last hidden states", bound)


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_generation(name: str, place: Place) -> None:
    """This once failed on every GPU, because a message was too long for an assertion there."""
    pair = Pair(name, place)
    cache = pair.compress()
    assert cache.device.type == place.device.type
    assert_same_states(cache, pair.wanted)
    assert pair.said(cache) == pair.said_on_cpu()


def test_a_planted_fault_is_found(place: Place) -> None:
    """A model with an error of a hundredth in one matrix of one layer."""
    pair = Pair("llama", place)
    with torch.no_grad():
        pair.there.base_model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(AssertionError, match="layer 2: differs by"):
        assert_same_states(pair.compress(), pair.wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, place: Place) -> None:
    """Training and serving run in half precision. Each of three layers rounds a dozen times."""
    pair = Pair("llama", place, dtype)
    cache = pair.compress()
    assert cache.dtype == dtype
    assert_same_states(cache, pair.wanted, 36 * torch.finfo(dtype).eps)
    assert len(pair.said(cache)) == len(INPUTS)


def test_conversation(place: Place) -> None:
    pair = Pair("llama", place)
    found = gisting.converse(pair.there, pair.tokenizer, INPUTS, cache=pair.compress(), max_new_tokens=4)
    wanted = gisting.converse(pair.on_cpu, pair.tokenizer, INPUTS, cache=pair.wanted, max_new_tokens=4)
    assert found.texts == wanted.texts
    assert_same_states(found.cache, wanted.cache)
    again = gisting.converse(pair.there, pair.tokenizer, INPUTS, cache=found.cache, max_new_tokens=4)
    assert len(again.texts) == len(INPUTS)


def test_beams_and_stock_generate(place: Place) -> None:
    pair = Pair("llama", place)
    cache = pair.compress()
    assert len(pair.said(cache, num_beams=3, num_return_sequences=2)) == 2 * len(INPUTS)
    # As a user of stock transformers would call it: the ids begin with the gist tokens.
    one, gist = cache.select([1]), pair.tokenizer.gist_token_id
    (continuation,) = pair.tokenizer.encode_continuations(INPUTS[1:])
    ids = torch.tensor([[gist] * 3 + continuation], device=place.device)
    answer = pair.there.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=one.as_past_key_values(), max_new_tokens=8,
        do_sample=False, pad_token_id=pair.tokenizer.pad_token_id,
    )  # fmt: skip
    assert pair.tokenizer.decode(answer[0, ids.shape[1] :].tolist()).strip() == pair.said_on_cpu()[1]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_static_cache(name: str, is_compiled: bool, place: Place) -> None:
    """On a GPU, transformers itself compiles decoding with such a cache, including the guard, into CUDA graphs."""
    pair = Pair(name, place)
    torch._dynamo.reset()
    settings: dict[str, Any] = {"cache_implementation": "static", "disable_compile": not is_compiled}
    found = [pair.said(pair.compress(), **settings) for _ in range(2)]
    torch._dynamo.reset()
    assert found == [pair.said_on_cpu()] * 2


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache(implementation: str, place: Place) -> None:
    place.only_on_a_card("idle layers wait on its streams")
    pair = Pair("llama", place)
    settings: dict[str, Any] = {"cache_implementation": implementation, "disable_compile": True}
    assert pair.said(pair.compress(), **settings) == pair.said_on_cpu()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_store_and_file(name: str, place: Place, tmp_path: Path) -> None:
    pair = Pair(name, place)
    store = GistStore(tmp_path / "store")
    call = (pair.there, pair.tokenizer, PROMPTS, COUNTS)
    made, read = store.get_or_compress(*call, names=["a", "b"]), store.get_or_compress(*call)
    assert made.device == read.device == pair.compress().device
    assert_same_states(read, made, 0.0)
    assert_same_states(read, pair.wanted)
    assert pair.said(read) == pair.said_on_cpu()
    read.save(tmp_path / "both.safetensors")
    assert_same_states(GistCache.load(tmp_path / "both.safetensors", place.device), made, 0.0)
    table = store.table(device=place.device)
    assert_same_states(table.gather(["a", "b"]), made, 0.0)


def test_table(place: Place) -> None:
    pair = Pair("llama", place)
    table = GistTable(pair.compress(), names=["a", "b"])
    assert table.device.type == place.device.type
    table.add(gisting.compress(pair.there, pair.tokenizer, [tiny.words(7, 5)], 2), ["c"])
    table.remove(["a"])
    table.add(pair.compress().select([0]), ["a"])
    rows = table.rows_of(["a", "b"])
    for given in (rows, rows.to(place.device), ["a", "b"]):
        cache = table.gather(given)
        assert_same_states(cache, pair.wanted)
        assert pair.said(cache) == pair.said_on_cpu()


def test_chained_gists(place: Place) -> None:
    pair = Pair("llama", place)
    parts, wanted = pair.compress(), pair.wanted
    assert_same_states(
        GistCache.chain([parts.select([0]), parts.select([1])]),
        GistCache.chain([wanted.select([0]), wanted.select([1])]),
    )


def test_gist_tokens_without_a_mask_are_refused(place: Place) -> None:
    pair = Pair("llama", place)
    ids = torch.tensor([[5, 6, pair.tokenizer.gist_token_id, 7]], device=place.device)
    with pytest.raises(GistTokenError, match="attention_mask does not say what they hide"):
        pair.there(input_ids=ids)


STEP = """
import torch
from gisting._compat import cache_argument
from tests import tiny
model, tokenizer = tiny.patched("llama")
model.to("{device}")
past = model(input_ids=torch.tensor([[5, 6]], device="{device}"), use_cache=True)[cache_argument()]
step = torch.tensor([[{token}]], device="{device}")
print(model(input_ids=step, **{{cache_argument(): past}}).logits.sum().item())
"""


@pytest.mark.parametrize("is_gist", [False, True], ids=["word", "gist"])
def test_a_gist_token_in_a_decoding_step_fails(is_gist: bool, place: Place) -> None:
    """On a GPU an assertion fails there, after which a process cannot use it; so another process runs it."""
    code = STEP.format(device=place.device, token=len(tiny.VOCABULARY) if is_gist else 7)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode != 0) is is_gist, done.stderr
    assert ("input_ids hold gist tokens" in done.stderr) is is_gist, done.stderr


@torch.no_grad()
def test_a_decoding_step_does_not_wait(place: Place) -> None:
    pair = Pair("llama", place)
    past = pair.compress().select([1]).as_past_key_values()
    steps = [torch.tensor([[token]], device=place.device) for token in (7, 8, 9)]
    positions = [torch.tensor([[column]], device=place.device) for column in (3, 4, 5)]
    for number, (ids, position_ids) in enumerate(zip(steps, positions, strict=True)):
        call = {"input_ids": ids, "position_ids": position_ids, cache_argument(): past, "use_cache": True}
        if number:
            with place.not_waiting():
                pair.there(**call)
        else:
            pair.there(**call)
    assert past.get_seq_length() == 6
