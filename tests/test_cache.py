"""``GistCache``: batches of compressed prompts in memory, and files that are refused if anything in them changed."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import gisting
from gisting._compat import cache_argument
from gisting.cache import CacheOrigin, GistCache, kept_share
from gisting.errors import CacheFormatError, CacheMismatchError, GistError
from gisting.rotary import Rotary
from gisting.storage import STORAGES
from tests import tiny
from tests.forge import Forged

ORIGIN = CacheOrigin("llama/0123456789ab", "ba9876543210", "plain", "gist")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made_up(
    counts: tuple[int, ...] = (2, 5, 1),
    *,
    dtype: torch.dtype = torch.float32,
    encoder: bool = False,
    origin: CacheOrigin = ORIGIN,
    seed: int = 0,
) -> GistCache:
    """Random states of three layers, two key heads, head size 4 (values: 6); slots without a token hold zeros."""
    generator = torch.Generator().manual_seed(seed)
    slots = max(counts, default=0)
    held = (torch.arange(slots)[None] >= slots - torch.tensor(counts)[:, None]).to(dtype)[:, None, :, None]

    def states(size: int) -> tuple[Tensor, ...]:
        shape = (len(counts), 2, slots, size)
        return tuple(torch.randn(shape, generator=generator).to(dtype) * held for _ in range(3))

    hidden = torch.randn(len(counts), slots, 8, generator=generator).to(dtype) * held[:, 0] if encoder else None
    return GistCache(states(4), states(6), torch.tensor(counts), origin, hidden)


def tensors_of(cache: GistCache) -> list[Tensor]:
    return [*cache.keys, *cache.values, *([] if cache.last_hidden is None else [cache.last_hidden])]


def assert_same(found: GistCache, wanted: GistCache) -> None:
    assert found.num_gist_tokens == wanted.num_gist_tokens
    assert found.origin == wanted.origin
    assert (found.last_hidden is None) == (wanted.last_hidden is None)
    assert len(found.keys) == len(wanted.keys)
    for one, other in zip(tensors_of(found), tensors_of(wanted), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


both_kinds = pytest.mark.parametrize("encoder", [False, True], ids=["decoder", "encoder"])


# -- what it says about itself -----------------------------------------------------------------------------------------


def test_properties() -> None:
    cache = made_up()
    assert len(cache) == 3
    assert cache.num_gist_tokens == [2, 5, 1]
    assert cache.num_slots == 5
    assert cache.dtype == torch.float32
    assert cache.device == torch.device("cpu")
    assert cache.attention_mask.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert cache.attention_mask.dtype == torch.int64


@pytest.mark.parametrize(
    ("dtype", "encoder", "num_bytes"),
    # 3 prompts x 5 slots x (3 layers x 2 heads x (4 + 6) numbers, and 8 of an encoder's last state)
    [(torch.float32, False, 3600), (torch.bfloat16, False, 1800), (torch.float32, True, 4080)],
)
def test_num_bytes(dtype: torch.dtype, encoder: bool, num_bytes: int) -> None:
    assert made_up(dtype=dtype, encoder=encoder).num_bytes == num_bytes


def test_repr() -> None:
    assert repr(made_up()) == (
        "GistCache(3 prompts, k=[2, 5, 1], 3 layers, 3600 bytes, torch.float32, cpu, model llama/0123456789ab)"
    )
    assert "9 prompts, k=..., 3 layers" in repr(made_up((1,) * 9))


# -- other batches -----------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("rows", [[0], [1], [2, 0], [1, 1, 2], [-1], [-3, 0]], ids=str)
def test_select(rows: list[int], encoder: bool) -> None:
    cache = made_up(encoder=encoder)
    chosen = cache.select(rows)
    assert chosen.num_gist_tokens == [cache.num_gist_tokens[row] for row in rows]
    assert chosen.num_slots == max(chosen.num_gist_tokens), "slots that no row uses are dropped"
    start = cache.num_slots - chosen.num_slots
    for found, all_of_it in zip(tensors_of(chosen), tensors_of(cache), strict=True):
        slots_at = 1 if all_of_it.dim() == 3 else 2
        assert torch.equal(found, all_of_it[rows].narrow(slots_at, start, chosen.num_slots))
    assert chosen.origin == cache.origin


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "^rows is empty; name at least one prompt$"),
        ([0, 3], r"^rows must be in 0\.\.2, got 3$"),
        ([-4], r"^rows must be in 0\.\.2, got -4$"),
    ],
    ids=str,
)
def test_select_refuses(rows: list[int], message: str) -> None:
    with pytest.raises(GistError, match=message):
        made_up().select(rows)


@pytest.mark.parametrize(
    "rows",
    [torch.tensor([2, -3]), np.array([2, -3]), (2, 0), iter([2, 0]), [torch.tensor(2), np.int64(0)]],
    ids=["tensor", "array", "tuple", "iterator", "scalars"],
)
def test_select_takes_any_whole_numbers(rows: Any) -> None:
    assert_same(made_up().select(rows), made_up().select([2, 0]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([1.0]), "^rows must be whole numbers, in one dimension, got tensor"),
        (torch.tensor([[1]]), "^rows must be whole numbers, in one dimension, got tensor"),
        (torch.tensor(1), r"^rows must be whole numbers, in one dimension, got tensor\(1\)$"),
        (1, "^rows must be whole numbers, in one dimension, got 1$"),
        (["0"], r"^rows must be whole numbers, in one dimension, got \['0'\]$"),
        (
            torch.tensor([True, False, True]),
            r"^rows must be whole numbers, got True or False .* mask.nonzero\(\)\[:, 0",
        ),
    ],
    ids=str,
)
def test_select_refuses_what_is_no_number(rows: Any, message: str) -> None:
    with pytest.raises(GistError, match=message):
        made_up().select(rows)


def test_slices_are_selections() -> None:
    cache = made_up()
    assert_same(cache[0:2], cache.select([0, 1]))
    assert_same(cache[::-2], cache.select([2, 0]))
    with pytest.raises(GistError, match=r"^rows is empty; name at least one prompt$"):
        cache[3:]
    with pytest.raises(GistError, match=r"^an index must be a whole number or a slice, got \[0, 1\]; .* call select"):
        cache[[0, 1]]  # pyright: ignore[reportArgumentType]


def test_iteration_and_index() -> None:
    cache = made_up()
    assert [one.num_gist_tokens for one in cache] == [[2], [5], [1]]
    for row, one in enumerate(cache):
        assert_same(one, cache[row])
    assert_same(cache[-1], cache[2])
    with pytest.raises(IndexError, match=r"^row must be in 0\.\.2, got 3$"):
        cache[3]


@both_kinds
def test_cat_is_the_inverse_of_iteration(encoder: bool) -> None:
    cache = made_up(encoder=encoder)
    assert_same(GistCache.cat(list(cache)), cache)


@both_kinds
def test_cat_of_different_k_aligns_on_the_right(encoder: bool) -> None:
    one, other = made_up((2,), encoder=encoder), made_up((4, 3), encoder=encoder, seed=1)
    joined = GistCache.cat([one, other])
    assert joined.num_gist_tokens == [2, 4, 3]
    for found, left, right in zip(tensors_of(joined), tensors_of(one), tensors_of(other), strict=True):
        slots_at = 1 if found.dim() == 3 else 2
        assert torch.equal(found[:1].narrow(slots_at, 2, 2), left)
        assert not found[:1].narrow(slots_at, 0, 2).any()
        assert torch.equal(found[1:], right)


def test_cat_takes_any_iterable_of_caches() -> None:
    assert_same(GistCache.cat(one for one in made_up()), made_up())
    with pytest.raises(GistError, match=r"^caches\[1\] must be a GistCache, got str$"):
        GistCache.cat([made_up(), "b"])  # pyright: ignore[reportArgumentType]


def spread(cache: GistCache) -> GistCache:
    """The cache of a model on two devices, with the last layer on the second."""
    return replace(
        cache,
        keys=(*cache.keys[:-1], cache.keys[-1].to("meta")),
        values=(*cache.values[:-1], cache.values[-1].to("meta")),
    )


ROTARY = Rotary(((1.0, 0.1),), (0, 0, 0))


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.blanked(),
        lambda cache: cache.select([2, 0]),
        lambda cache: cache[1],
        lambda cache: GistCache.cat([cache, cache]),
        lambda cache: GistCache.chain([cache, cache]),
    ],
    ids=["blanked", "select", "index", "cat", "chain"],
)
def test_layers_may_lie_on_several_devices(change: Callable[[GistCache], GistCache]) -> None:
    cache = replace(made_up(), rotary=ROTARY)
    found, wanted = change(spread(cache)), change(cache)
    for one, other in zip(tensors_of(found), tensors_of(wanted), strict=True):
        assert one.shape == other.shape
    for layer in range(2):
        assert torch.equal(found.keys[layer], wanted.keys[layer])
        assert torch.equal(found.values[layer], wanted.values[layer])
    assert found.keys[2].device == found.values[2].device == torch.device("meta")


def test_a_first_layer_elsewhere_does_not_take_the_others_along() -> None:
    cache = replace(made_up(), rotary=ROTARY)
    cache = replace(cache, keys=(cache.keys[0].to("meta"), *cache.keys[1:]))
    for found in (cache.select([0]), cache.blanked()):
        assert [keys.device.type for keys in found.keys] == ["meta", "cpu", "cpu"]


@pytest.mark.parametrize(
    ("caches", "error", "message"),
    [
        (list, GistError, "^caches is empty; give at least one$"),
        (
            lambda: [made_up(), made_up(origin=CacheOrigin("llama/ffffffffffff", "ba9876543210", "plain", "gist"))],
            CacheMismatchError,
            "^caches belong to different origins, .*llama/0123.* and .*llama/ffff.*; compress them again$",
        ),
        (
            lambda: [made_up(), made_up(origin=CacheOrigin("llama/0123456789ab", "ba9876543210", "plain", "positive"))],
            CacheMismatchError,
            "^caches belong to different origins, .*condition='gist'.* and .*condition='positive'",
        ),
        (
            lambda: [made_up(), made_up(dtype=torch.bfloat16)],
            CacheMismatchError,
            r"^caches are torch.float32 on cpu and torch.bfloat16 on cpu; bring them together with .to\(\)$",
        ),
        (
            lambda: [made_up(), made_up().to("meta")],
            CacheMismatchError,
            r"^caches are torch.float32 on cpu and torch.float32 on meta; bring them together with .to\(\)$",
        ),
        (
            lambda: [made_up(), spread(made_up())],
            CacheMismatchError,
            r"^caches are torch.float32 on cpu and torch.float32 on cpu, meta; bring them together with .to\(\)$",
        ),
    ],
    ids=["nothing", "model", "condition", "dtype", "device", "spread"],
)
def test_cat_refuses(caches: Callable[[], list[GistCache]], error: type[GistError], message: str) -> None:
    with pytest.raises(error, match=message):
        GistCache.cat(caches())


@both_kinds
def test_to(encoder: bool) -> None:
    cache = made_up(encoder=encoder)
    half = cache.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(tensors_of(half), tensors_of(cache), strict=True))
    assert half.lengths is cache.lengths
    assert cache.dtype == torch.float32
    away = cache.to("meta")
    assert away.device == torch.device("meta")
    assert away.lengths.device == torch.device("cpu"), "lengths are for Python"
    assert_same(cache.to("cpu", torch.float32), cache)


def test_as_past_key_values() -> None:
    cache = made_up()
    past = cache.as_past_key_values()
    assert past.get_seq_length() == 5
    for layer, keys, values in zip(past.layers, cache.keys, cache.values, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    past.update(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 6), 0)
    past.layers[1].keys.zero_()
    assert cache.as_past_key_values().get_seq_length() == 5
    assert_same(cache, made_up())


def test_encoder_states_are_no_past_key_values() -> None:
    with pytest.raises(GistError, match=r"^these are encoder states, which generate does not take as past_key"):
        made_up(encoder=True).as_past_key_values()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True}], ids=["greedy", "sample"])
def test_generate_leaves_the_cache_as_it_is(name: str, settings: dict[str, Any]) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, [tiny.words(9, 1), tiny.words(4, 2)], [3, 2])
    before = [tensor.clone() for tensor in tensors_of(cache)]
    texts = []
    for _ in range(2):
        torch.manual_seed(1)
        texts.append(gisting.generate(model, tokenizer, ["w1 w2", "w3"], cache=cache, max_new_tokens=8, **settings))
        if name != "t5":
            ids = torch.tensor([[tokenizer.gist_token_id] * 3 + [9, 8]])
            model.generate(ids, **{cache_argument(): cache[0].as_past_key_values()}, max_new_tokens=8)
    assert texts[0] == texts[1]
    for tensor, old in zip(tensors_of(cache), before, strict=True):
        assert torch.equal(tensor, old)


# -- files that are as they were written -------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(1,), (2, 5, 1), (64,)], ids=str)
def test_round_trip(counts: tuple[int, ...], dtype: torch.dtype, encoder: bool, tmp_path: Path) -> None:
    cache = made_up(counts, dtype=dtype, encoder=encoder)
    cache.save(tmp_path / "a.gist.safetensors")
    assert_same(GistCache.load(tmp_path / "a.gist.safetensors"), cache)
    assert os.listdir(tmp_path) == ["a.gist.safetensors"]


def test_a_file_among_the_weights_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """vLLM loads every *.safetensors file of a checkpoint's folder as weights."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(
        GistError, match=r"path must not be among the weights of a checkpoint, got .*gists/a\.safetensors"
    ):
        made_up().save(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == ["config.json"]
    made_up().save(tmp_path / "a.gist")


def test_round_trip_of_special_numbers(tmp_path: Path) -> None:
    cache = made_up()
    cache.keys[0][0, 0, -1, :] = torch.tensor([3e38, 1e-38, -0.0, 1e-45])
    cache.save(tmp_path / "a")
    loaded = GistCache.load(tmp_path / "a")
    assert torch.equal(loaded.keys[0].view(torch.int32), cache.keys[0].view(torch.int32))


def test_round_trip_of_an_empty_prefix(tmp_path: Path) -> None:
    """The negative control leaves no slots."""
    cache = made_up((0, 0))
    cache.save(tmp_path / "a")
    loaded = GistCache.load(tmp_path / "a")
    assert_same(loaded, cache)
    assert loaded.num_slots == 0


def test_round_trip_of_views(tmp_path: Path) -> None:
    """Tensors that are not contiguous, and slices of one tensor."""
    cache = made_up()
    twisted = GistCache(
        tuple(keys.transpose(1, 2).contiguous().transpose(1, 2) for keys in cache.keys),
        torch.stack(cache.values).unbind(),
        cache.lengths,
        cache.origin,
    )
    twisted.save(tmp_path / "a")
    assert_same(GistCache.load(tmp_path / "a"), twisted)


@pytest.mark.parametrize("layers", [(0, 0, 0), (0, None, 1)], ids=str)
def test_round_trip_of_the_rotation(layers: tuple[int | None, ...], tmp_path: Path) -> None:
    rotary = Rotary(((1.0, 0.1), (1 / 3,)), layers, is_interleaved=True)
    replace(made_up(), rotary=rotary).save(tmp_path / "a")
    assert GistCache.load(tmp_path / "a").rotary == rotary


@both_kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("counts", [(2, 5, 0), (0, 0)], ids=str)
def test_storage(counts: tuple[int, ...], storage: str, dtype: torch.dtype, encoder: bool, tmp_path: Path) -> None:
    """A file gives back nearly the same numbers in the same dtype, and storing them again changes nothing."""
    cache = made_up(counts, dtype=dtype, encoder=encoder)
    cache.save(tmp_path / "a", storage)
    loaded = GistCache.load(tmp_path / "a")
    assert (loaded.dtype, loaded.num_gist_tokens, loaded.origin) == (dtype, list(counts), ORIGIN)
    # For numbers up to 4: a cast's relative error, half a step of int8 or float8, and rounding to the states' dtype.
    error = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "float8_e4m3": 2**-4, "int8": 2**-7}[storage]
    for found, wanted in zip(tensors_of(loaded), tensors_of(cache), strict=True):
        torch.testing.assert_close(found, wanted, atol=4 * (error + torch.finfo(dtype).eps), rtol=0)
        if storage in ("float32", str(dtype).removeprefix("torch.")):
            assert torch.equal(found, wanted)
    loaded.save(tmp_path / "b", storage)
    assert_same(GistCache.load(tmp_path / "b"), loaded)


def test_bytes_of_a_storage(tmp_path: Path) -> None:
    """3 prompts x 5 slots x 3 layers x 2 heads x (4 + 6) numbers; 36 scales of 4 bytes."""
    found = {}
    for storage in STORAGES:
        made_up().save(tmp_path / "a", storage)
        found[storage] = len(Forged.apart((tmp_path / "a").read_bytes()).data)
    assert found == {"float32": 3600, "bfloat16": 1800, "float16": 1800, "float8_e4m3": 1044, "int8": 1044}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_round_trip_of_a_compressed_prompt(name: str, tmp_path: Path) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, [tiny.words(9, 1), tiny.words(4, 2)], [3, 2])
    cache.save(tmp_path / "a")
    loaded = GistCache.load(tmp_path / "a")
    assert_same(loaded, cache)
    inputs = ["w1 w2", "w3"]
    assert gisting.generate(model, tokenizer, inputs, cache=loaded, max_new_tokens=6) == gisting.generate(
        model, tokenizer, inputs, cache=cache, max_new_tokens=6
    )


def test_load_onto_a_device(tmp_path: Path) -> None:
    made_up().save(tmp_path / "a")
    assert GistCache.load(tmp_path / "a", device="meta").device == torch.device("meta")


def test_path_as_text_and_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made_up().save("a")
    assert_same(GistCache.load("a"), made_up())


def test_file_describes_itself(tmp_path: Path) -> None:
    """Format, origin and k can be read with nothing but safetensors; format 2 is pinned here."""
    cache = replace(made_up(encoder=True), rotary=Rotary(((1.0, 0.25),), (0, None, 0)))
    cache.save(tmp_path / "a", "int8")
    with safe_open(tmp_path / "a", framework="pt") as file:
        manifest = json.loads(file.metadata()["gist"])
        tensors = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    checksum = manifest.pop("sha256")
    assert manifest == {
        "format": 2,
        "storage": "int8",
        "dtype": "float32",
        "origin": {
            "model": "llama/0123456789ab",
            "tokenizer": "ba9876543210",
            "template": "plain",
            "condition": "gist",
        },
        "lengths": [2, 5, 1],
        "num_layers": 3,
        "rotary": {"frequencies": [[1.0, 0.25]], "layers": [0, None, 0], "is_interleaved": False},
    }
    assert checksum == Forged.apart((tmp_path / "a").read_bytes()).checksum()
    assert tensors == {
        **{f"keys.{layer}": ("I8", [3, 2, 5, 4]) for layer in range(3)},
        **{f"keys.{layer}.scale": ("F32", [3, 2]) for layer in range(3)},
        **{f"values.{layer}": ("I8", [3, 2, 5, 6]) for layer in range(3)},
        **{f"values.{layer}.scale": ("F32", [3, 2]) for layer in range(3)},
        "last_hidden": ("I8", [3, 5, 8]),
        "last_hidden.scale": ("F32", [3]),
    }


def test_a_file_names_the_checkpoint_that_made_it(tmp_path: Path) -> None:
    """It is for people: it does not count in a comparison, and the name in a store stays in the store."""
    cache = made_up()
    named = replace(cache, origin=replace(cache.origin, checkpoint="runs/mine", name="'rules' of 2026-01-31"))
    named.save(tmp_path / "a")
    loaded = GistCache.load(tmp_path / "a")
    assert (loaded.origin.checkpoint, loaded.origin.name) == ("runs/mine", "")
    assert loaded.origin == cache.origin
    assert GistCache.cat([cache, loaded]).num_gist_tokens == cache.num_gist_tokens * 2
    assert "made by runs/mine for llama/0123456789ab" in repr(loaded)
    other = replace(cache, origin=replace(cache.origin, model="llama/ffffffffffff"))
    with pytest.raises(CacheMismatchError, match=r"origins, 'rules' of 2026-01-31 by runs/mine CacheOrigin.*0123"):
        GistCache.cat([named, other])


ABOUT = ({"made": {"inputs": 80}}, None, {"quality": {"kept": 0.5, "lost": ["a", "b"]}})


@both_kinds
@pytest.mark.parametrize("storage", [None, "int8"])
def test_what_is_known_about_each_prompt_stays_with_it(encoder: bool, storage: str | None, tmp_path: Path) -> None:
    cache = replace(made_up(encoder=encoder), about=ABOUT)
    assert made_up().about == (None, None, None)
    assert cache.select([2, 0, -1]).about == (ABOUT[2], ABOUT[0], ABOUT[2])
    assert cache[1].about == (None,)
    assert GistCache.cat([*cache]).about == ABOUT
    assert GistCache.cat([made_up(encoder=encoder), cache]).about == (None, None, None, *ABOUT)
    assert cache.to(dtype=torch.bfloat16).about == cache.blanked().about == ABOUT
    cache.save(tmp_path / "a", storage)
    assert GistCache.load(tmp_path / "a").about == ABOUT
    noted = cache.with_about(quality={"kept": 1})
    assert noted.about == (ABOUT[0] | {"quality": {"kept": 1}}, {"quality": {"kept": 1}}, {"quality": {"kept": 1}})
    assert cache.about == ABOUT
    assert_same(noted, cache)


def test_nothing_known_leaves_files_as_they_were(tmp_path: Path) -> None:
    made_up().save(tmp_path / "a")
    replace(made_up(), about=({}, {}, {})).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "about" not in Forged.apart((tmp_path / "a").read_bytes()).manifest


def test_a_chain_says_what_is_known_of_its_parts(tmp_path: Path) -> None:
    cache = replace(made_up(), rotary=Rotary((), (None, None, None)))
    known = replace(cache, about=ABOUT)
    assert GistCache.chain([known]).about == ABOUT
    assert GistCache.chain([cache, cache]).about == (None, None, None)
    chained = GistCache.chain([known, cache])
    assert chained.about == ({"parts": [ABOUT[0], None]}, None, {"parts": [ABOUT[2], None]})
    assert GistCache.chain([chained, known[0]]).about[0] == {"parts": [ABOUT[0], None, ABOUT[0]]}
    chained.save(tmp_path / "a")
    assert GistCache.load(tmp_path / "a").about == chained.about


@pytest.mark.parametrize(
    ("about", "share"),
    [
        (None, None),
        ({}, None),
        ({"quality": {"kept": 0.5}}, 0.5),
        ({"quality": {"kept": 1}}, 1.0),
        ({"quality": {"kept": True}}, None),
        ({"quality": {"kept": "0.5"}}, None),
        ({"quality": 0.5}, None),
        (["quality"], None),
    ],
)
def test_kept_share(about: Any, share: float | None) -> None:
    assert kept_share(about) == share


# A T5-like cache of two prompts, k = 1 and 2, one layer, one head of size 2, bfloat16, as version 0.1 wrote it.
FORMAT_1 = base64.b64decode(
    "+AEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJnaXN0Ijoie1wiZm9ybWF0XCI6IDEsIFwibGVuZ3Roc1wiOiBbMSwgMl0sIFwibnVtX2xheWVy"
    "c1wiOiAxLCBcIm9yaWdpblwiOiB7XCJjb25kaXRpb25cIjogXCJnaXN0XCIsIFwibW9kZWxcIjogXCJ0NS8wMTIzNDU2Nzg5YWJcIiwgXCJ0"
    "ZW1wbGF0ZVwiOiBcInBsYWluXCIsIFwidG9rZW5pemVyXCI6IFwiYmE5ODc2NTQzMjEwXCJ9LCBcInNoYTI1NlwiOiBcIjQ4ZGQwYzM4ZmVl"
    "MWNmMjIwMzFiNjU5Njk5OGM0MDFjMTRmYTZlNjI0ZmY4N2VmZjMxNzFkYTU5MWNhZDJjYzBcIn0ifSwia2V5cy4wIjp7ImR0eXBlIjoiQkYx"
    "NiIsInNoYXBlIjpbMiwxLDIsMl0sImRhdGFfb2Zmc2V0cyI6WzAsMTZdfSwibGFzdF9oaWRkZW4iOnsiZHR5cGUiOiJCRjE2Iiwic2hhcGUi"
    "OlsyLDIsM10sImRhdGFfb2Zmc2V0cyI6WzE2LDQwXX0sInZhbHVlcy4wIjp7ImR0eXBlIjoiQkYxNiIsInNoYXBlIjpbMiwxLDIsMl0sImRh"
    "dGFfb2Zmc2V0cyI6WzQwLDU2XX19ICAgICAAAAAAwD8AwEBAgD4Av4BAAACAPwBAQECAQKBAwEDgQABBEEEgQTBBAAAAAEBAgMDAQAA/gL8A"
    "QQ=="
)


def test_format_1_goes_on_being_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(FORMAT_1)
    keys = torch.tensor([[[[0.0, 0.0], [1.5, -2.0]]], [[[3.0, 0.25], [-0.5, 4.0]]]], dtype=torch.bfloat16)
    hidden = torch.arange(12).reshape(2, 2, 3).bfloat16()
    origin = CacheOrigin("t5/0123456789ab", "ba9876543210", "plain", "gist")
    loaded = GistCache.load(tmp_path / "a")
    assert_same(loaded, GistCache((keys,), (2 * keys,), torch.tensor([1, 2]), origin, hidden))
    assert loaded.rotary is None
    loaded.save(tmp_path / "b")
    assert_same(GistCache.load(tmp_path / "b"), loaded)
    assert Forged.apart((tmp_path / "b").read_bytes()).manifest["format"] == 2


def test_same_cache_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        made_up().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- files that are not ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "a"
    made_up().save(path)
    return path.read_bytes()


def header_end(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


def assert_refused(path: Path, data: bytes, message: str, what: str) -> None:
    path.write_bytes(data)
    try:
        GistCache.load(path)
    except CacheFormatError as error:
        assert re.match(re.escape(str(path)) + message, str(error)), f"{what}: {error}"  # noqa: PT017 (names the place)
    else:
        pytest.fail(f"accepted with {what}")


# What the numbers are stored as decides how much memory they take, and is looked at before the checksum.
KIND = "is not a gist cache of format 2: (storage|dtype) "
ALTERED = (
    r" (is truncated or altered \(|is not a gist cache: it is a |"
    r"is altered: |has format \d+, |is a safetensors file but holds no gist cache|"
    f"{KIND})"
)


def test_every_truncation_is_refused(saved: bytes, tmp_path: Path) -> None:
    """Try every length near the start and the end, and a sample in between."""
    end = header_end(saved)
    sample = random.Random(0).sample(range(40, len(saved) - 40), 100)
    for length in sorted({*range(40), *sample, end - 1, end, end + 1, *range(len(saved) - 40, len(saved))}):
        assert_refused(
            tmp_path / "a",
            saved[:length],
            r" is truncated or altered \(.*compress the prompt again$",
            f"{length} bytes",
        )


def test_anything_behind_the_end_is_refused(saved: bytes, tmp_path: Path) -> None:
    for more in (b"\0", b" ", saved):
        assert_refused(tmp_path / "a", saved + more, ALTERED, f"{len(more)} bytes more")


@pytest.mark.parametrize("share", [30, pytest.param(3, marks=pytest.mark.slow)], ids=["few", "many"])
def test_a_bit_flip_in_the_header_is_refused(saved: bytes, tmp_path: Path, share: int) -> None:
    """Flip a thirtieth, or a third, of all bits of length and header: names, shapes, offsets, manifest, checksum and
    padding.
    """
    bits = random.Random(1).sample(range(header_end(saved) * 8), header_end(saved) * 8 // share)
    assert len(bits) > 4500 // share
    for bit in bits:
        data = bytearray(saved)
        data[bit // 8] ^= 1 << bit % 8
        assert_refused(
            tmp_path / "a", bytes(data), ALTERED, f"bit {bit} flipped, {saved[bit // 8 - 8 : bit // 8 + 8]!r}"
        )


def test_a_bit_flip_in_the_states_is_refused(saved: bytes, tmp_path: Path) -> None:
    start = header_end(saved) * 8
    for bit in random.Random(2).sample(range(start, len(saved) * 8), 100):
        data = bytearray(saved)
        data[bit // 8] ^= 1 << bit % 8
        message = " is altered: its checksum does not match; compress the prompt again$"
        assert_refused(tmp_path / "a", bytes(data), message, f"bit {bit} flipped")


def test_exchanged_states_are_refused(saved: bytes, tmp_path: Path) -> None:
    """The same bytes under another name are refused."""
    for one, other in ((b"keys.0", b"keys.1"), (b"keys.0", b"values.0")):
        if len(one) != len(other):
            data = saved.replace(b"values.0", b"values.9")
        else:
            data = saved.replace(one, b"keys.X").replace(other, one).replace(b"keys.X", other)
        assert_refused(tmp_path / "a", data, " is altered: its checksum does not match", f"{one!r} for {other!r}")


def rewritten(saved: bytes, change: Callable[[Forged], Any], *, signed: bool) -> bytes:
    """Change the manifest and tensors of a file, with a correct checksum (``signed``) or the old one."""
    forged = Forged.apart(saved)
    change(forged)
    return forged.together(signed=signed)


@pytest.mark.parametrize("signed", [True, False])
def test_later_format(saved: bytes, signed: bool, tmp_path: Path) -> None:
    data = rewritten(saved, lambda it: it.manifest.update(format=3, news=[1]), signed=signed)
    message = " has format 3, this version reads up to 2; upgrade gisting: pip install -U gist-tokens$"
    assert_refused(tmp_path / "a", data, message, "format 3")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda it: it.manifest["origin"].update(model="llama/ffffffffffff"), id="model"),
        pytest.param(lambda it: it.manifest["origin"].update(tokenizer="ffffffffffff"), id="tokenizer"),
        pytest.param(lambda it: it.manifest["origin"].update(condition="positive"), id="condition"),
        pytest.param(lambda it: it.manifest.update(lengths=[2, 5, 2]), id="lengths"),
        pytest.param(lambda it: it.manifest.update(num_layers=2), id="layers"),
        pytest.param(lambda it: it.manifest.update(storage="float16"), id="storage"),
        pytest.param(lambda it: it.manifest.update(dtype="float16"), id="dtype"),
        pytest.param(lambda it: it.manifest.update(more=1), id="more"),
        pytest.param(lambda it: it.manifest.update(format=1), id="format-1"),
        pytest.param(lambda it: it.manifest.pop("sha256"), id="no-checksum"),
        pytest.param(lambda it: it.remove("keys.2"), id="tensor-gone"),
        pytest.param(lambda it: it.replace("more", "F32", [1], bytes(4)), id="tensor-more"),
        pytest.param(lambda it: it.entries["keys.0"].update(dtype="I8", shape=[3, 2, 5, 16]), id="tensor-dtype"),
        pytest.param(lambda it: it.entries["keys.0"].update(shape=[3, 5, 2, 4]), id="shape"),
    ],
)
def test_changed_content_is_refused(saved: bytes, change: Callable[[Forged], Any], tmp_path: Path) -> None:
    data = rewritten(saved, change, signed=False)
    assert_refused(
        tmp_path / "a",
        data,
        f" (is altered: its checksum does not match; compress the prompt again$|{KIND})",
        "a change",
    )


def rotation(**changes: Any) -> Callable[[Forged], Any]:
    right = {"frequencies": [[1.0, 0.1]], "layers": [0, 0, 0], "is_interleaved": False}
    return lambda it: it.manifest.update(rotary={**right, **changes})


def test_the_rotation_that_is_changed_below_is_right(saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(rewritten(saved, rotation(), signed=True))
    assert GistCache.load(tmp_path / "a").rotary == Rotary(((1.0, 0.1),), (0, 0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda it: it.manifest.update(num_layers=4), "6 tensors do not make 4 layers", id="layers-4"),
        pytest.param(lambda it: it.manifest.update(num_layers=0), "6 tensors do not make 0 layers", id="layers-0"),
        pytest.param(lambda it: it.manifest.update(num_layers=10**9), "6 tensors do not make 1", id="layers-1e9"),
        pytest.param(lambda it: it.manifest.update(num_layers=-3), "6 tensors do not make -3", id="layers-minus"),
        pytest.param(lambda it: it.manifest.update(num_layers="3"), "6 tensors do not make '3'", id="layers-text"),
        pytest.param(lambda it: it.manifest.update(num_layers=3.0), "6 tensors do not make 3.0", id="layers-3.0"),
        pytest.param(lambda it: it.manifest.pop("num_layers"), "'num_layers' is missing", id="no-layers"),
        pytest.param(lambda it: it.remove("keys.2"), "5 tensors do not make 3 layers", id="tensor-gone"),
        pytest.param(lambda it: it.replace("more", "F32", [1], bytes(4)), "7 tensors do not make 3", id="tensor-more"),
        pytest.param(
            lambda it: it.entries.update(more=it.entries.pop("keys.2")), "'keys.2' is missing", id="other-name"
        ),
        pytest.param(lambda it: it.manifest.pop("lengths"), "'lengths' is missing", id="no-lengths"),
        pytest.param(lambda it: it.manifest.update(lengths=5), "lengths must be whole numbers", id="lengths-number"),
        pytest.param(lambda it: it.manifest.update(lengths=[]), "lengths must be whole numbers", id="no-prompts"),
        pytest.param(lambda it: it.manifest.update(lengths=[2, 5]), "a layer's shape differs", id="lengths-too-few"),
        pytest.param(lambda it: it.manifest.update(lengths=[2, 6, 1]), "number of slots, 5", id="k-beyond-the-slots"),
        pytest.param(lambda it: it.manifest.update(lengths=[2, 4, 1]), "number of slots, 5", id="k-below-the-slots"),
        pytest.param(lambda it: it.manifest.update(lengths=[5, -5, 1]), "number of slots, 5", id="k-negative"),
        pytest.param(lambda it: it.manifest.update(lengths=[2, 5, 0.5]), "must be whole numbers", id="k-half"),
        pytest.param(lambda it: it.manifest.update(lengths=[2, 5, True]), "must be whole numbers", id="k-true"),
        pytest.param(lambda it: it.manifest.update(lengths=[2, 5, [1]]), "must be whole numbers", id="k-list"),
        pytest.param(lambda it: it.manifest.update(lengths=[2, 5, 2**62]), "number of slots, 5", id="k-huge"),
        pytest.param(lambda it: it.manifest.pop("origin"), "'origin' is missing", id="no-origin"),
        pytest.param(lambda it: it.manifest.update(origin="llama"), "must be a mapping", id="origin-text"),
        pytest.param(lambda it: it.manifest["origin"].update(more=1), "unexpected keyword", id="origin-more"),
        pytest.param(lambda it: it.manifest["origin"].update(name="a"), "multiple values", id="origin-name"),
        pytest.param(lambda it: it.manifest.update(checkpoint="\x1b[2J"), "must be printable", id="checkpoint-escape"),
        pytest.param(lambda it: it.manifest.update(checkpoint=3), "origin must be texts", id="checkpoint-number"),
        pytest.param(lambda it: it.manifest["origin"].pop("model"), "missing 1 required", id="origin-less"),
        pytest.param(lambda it: it.manifest["origin"].update(model=3), "origin must be texts", id="origin-number"),
        pytest.param(lambda it: it.replace("keys.1", "F32", [3, 2, 4, 4], bytes(384)), "shape differs", id="slots"),
        pytest.param(lambda it: it.replace("keys.1", "F32", [3, 1, 5, 4], bytes(240)), "shape differs", id="heads"),
        pytest.param(lambda it: it.replace("keys.1", "F32", [2, 2, 5, 4], bytes(320)), "shape differs", id="prompts"),
        pytest.param(lambda it: it.replace("keys.1", "F32", [2, 5, 4], bytes(160)), "four dimensions", id="dimensions"),
        pytest.param(
            lambda it: it.replace("last_hidden", "F32", [3, 4, 8], bytes(384)), "shape of last_hidden", id="hidden"
        ),
        pytest.param(lambda it: it.replace("values.2", "F16", [3, 2, 5, 6], bytes(360)), "storage float32", id="dtype"),
        pytest.param(rotation(layers=[0, 0]), "rotary has 2 layers, the states 3", id="rotary-layers"),
        pytest.param(rotation(layers=[0, 1, 0]), "rotary layers must be numbers of frequency sets", id="rotary-set"),
        pytest.param(rotation(layers=[0, True, 0]), "rotary layers must be numbers of frequency", id="rotary-true"),
        pytest.param(rotation(frequencies=[[1.0] * 3]), "rotary rotates more numbers than a head", id="rotary-size"),
        pytest.param(rotation(frequencies=[["1"]]), "rotary frequencies must be lists of finite", id="rotary-text"),
        pytest.param(rotation(frequencies=3), "rotary must be an object with", id="rotary-number"),
        pytest.param(rotation(is_interleaved=1), "rotary must be an object with", id="rotary-interleaved"),
        pytest.param(lambda it: it.manifest.update(rotary=[]), "rotary must be an object with", id="rotary-list"),
        pytest.param(lambda it: it.manifest.update(rotary={}), "rotary must be an object with", id="rotary-empty"),
    ],
)
def test_hostile_file_with_a_right_checksum_is_refused(
    saved: bytes, change: Callable[[Forged], Any], message: str, tmp_path: Path
) -> None:
    """A checksum is no signature: anyone who writes a file can write its checksum. A file that cannot be a cache is
    refused.
    """
    data = rewritten(saved, change, signed=True)
    assert_refused(tmp_path / "a", data, f" is not a gist cache of format 2: .*{message}", "a manifest that cannot be")


def test_nothing_that_lies_in_front_of_a_gist_is_read(saved: bytes, tmp_path: Path) -> None:
    """Slots beyond a row's length may hold any finite numbers: the mask hides them."""
    forged = Forged.apart(saved)
    states = torch.full((3, 2, 5, 4), 3e38)
    forged.replace("keys.0", "F32", [3, 2, 5, 4], states.numpy().tobytes())
    (tmp_path / "a").write_bytes(forged.together())
    loaded = GistCache.load(tmp_path / "a")
    assert loaded.attention_mask.tolist() == made_up().attention_mask.tolist()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"gist"', "{}", '{"sha256": "x"}'], ids=repr)
def test_manifest_that_is_none(text: str, tmp_path: Path) -> None:
    save_file({"keys.0": torch.zeros(1, 1, 1, 1)}, tmp_path / "b", metadata={"gist": text})
    message = " is altered: its manifest cannot be read; compress the prompt again$"
    assert_refused(tmp_path / "a", (tmp_path / "b").read_bytes(), message, text)


def test_foreign_safetensors_file(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, tmp_path / "b", metadata=metadata)
        message = r" is a safetensors file but holds no gist cache \(no 'gist' in its metadata\)$"
        assert_refused(tmp_path / "a", (tmp_path / "b").read_bytes(), message, "foreign file")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "write", [lambda it, path: path.write_bytes(pickle.dumps(it)), torch.save], ids=["pickle", "torch.save"]
)
def test_nothing_is_unpickled(write: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    write({"keys.0": Bomb(tmp_path / "exploded")}, tmp_path / "b")
    assert_refused(
        tmp_path / "a",
        (tmp_path / "b").read_bytes(),
        r" is not a gist cache: it is a (pickle|file of torch\.save)",
        "a pickle",
    )
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, b"\xff" * 64, b'{"format": 1}', b"not a cache at all, but text of some length"], ids=repr
)
def test_other_files(data: bytes, tmp_path: Path) -> None:
    assert_refused(tmp_path / "a", data, ALTERED, "other file")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    """More files that cannot be read are in ``test_storage.py``."""
    message = re.escape(f"{tmp_path / 'none'} does not exist; make it with `gisting compress`")
    with pytest.raises(FileNotFoundError, match=message):
        GistCache.load(tmp_path / "none")
    with pytest.raises(CacheFormatError, match=re.escape(f"{tmp_path} is not a regular file; give the file that")):
        GistCache.load(tmp_path)


# -- what is not written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lengths": torch.tensor([2, 4, 1])},
            r"^this cache could not be loaded again: the largest length must be the number of slots, 5; compress",
        ),
        (
            {"rotary": Rotary(((1.0,),), (0,))},
            r"^this cache could not .*: rotary has 1 layers, the states 3; compress the",
        ),
        (
            {"keys": (torch.full((3, 2, 5, 4), torch.inf),) * 3},
            r"^keys.0 holds NaN or infinity, which cannot be stored; c",
        ),
        (
            {"keys": made_up().keys[:2]},
            r"^this cache could not .*: there are keys of 2 layers and values of 3; compress",
        ),
    ],
    ids=["lengths", "rotary", "infinity", "layers"],
)
def test_save_refuses(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GistError, match=message):
        replace(made_up(), **change).save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


# -- written whole or not at all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk-full", "interrupt"])
@pytest.mark.parametrize("exists", [True, False], ids=["over-old", "new"])
def test_save_that_fails_leaves_what_was(
    function: str, error: BaseException, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    if exists:
        made_up().save(path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        made_up((7,), seed=1).save(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["a"] if exists else [])
    if exists:
        assert_same(GistCache.load(path), made_up())


def test_save_over_an_old_file(tmp_path: Path) -> None:
    made_up().save(tmp_path / "a")
    made_up((7,), seed=1).save(tmp_path / "a")
    assert_same(GistCache.load(tmp_path / "a"), made_up((7,), seed=1))
    assert os.listdir(tmp_path) == ["a"]


def test_save_where_no_directory_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        made_up().save(tmp_path / "none" / "a")


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
def test_saved_file_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    """A temporary file is private, but the finished file has ordinary permissions, like one made by ``open``."""
    (tmp_path / "ordinary").write_bytes(b"")
    made_up().save(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
