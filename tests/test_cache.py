"""``GistCache``: batches of compressed prompts in memory, and files that are refused when anything in them changed."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import gisting
from gisting import cache as cache_module
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheFormatError, CacheMismatchError, GistError
from tests import tiny

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
    assert chosen.num_slots == max(chosen.num_gist_tokens), "slots that nobody uses are dropped"
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


@pytest.mark.parametrize(
    ("caches", "error", "message"),
    [
        (list, GistError, "^caches is empty; give at least one$"),
        (
            lambda: [made_up(), made_up(origin=CacheOrigin("llama/ffffffffffff", "ba9876543210", "plain", "gist"))],
            CacheMismatchError,
            "^caches belong to different origins, .*llama/0123.* and .*llama/ffff.*; compress them anew$",
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
    ],
    ids=["nothing", "model", "condition", "dtype", "device"],
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
    with pytest.raises(GistError, match=r"^these are encoder states, which generate does not take as past_key_values"):
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
            model.generate(ids, past_key_values=cache[0].as_past_key_values(), max_new_tokens=8)
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


def test_round_trip_of_special_numbers(tmp_path: Path) -> None:
    cache = made_up()
    cache.keys[0][0, 0, -1, :] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    cache.save(tmp_path / "a")
    loaded = GistCache.load(tmp_path / "a")
    assert torch.equal(loaded.keys[0].view(torch.int32), cache.keys[0].view(torch.int32))


def test_round_trip_of_an_empty_prefix(tmp_path: Path) -> None:
    """What the negative control leaves: no slots."""
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
    """Format, origin and k can be read with nothing but safetensors; format 1 is pinned here."""
    made_up(encoder=True).save(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        manifest = json.loads(file.metadata()["gist"])
        names = sorted(file.keys())
    checksum = manifest.pop("sha256")
    assert manifest == {
        "format": 1,
        "origin": {
            "model": "llama/0123456789ab",
            "tokenizer": "ba9876543210",
            "template": "plain",
            "condition": "gist",
        },
        "lengths": [2, 5, 1],
        "num_layers": 3,
    }
    assert re.fullmatch("[0-9a-f]{64}", checksum)
    assert names == ["keys.0", "keys.1", "keys.2", "last_hidden", "values.0", "values.1", "values.2"]


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


ALTERED = r" (is truncated or altered \(|is altered: |has format \d+, |is a safetensors file but holds no gist cache)"


def test_every_truncation_is_refused(saved: bytes, tmp_path: Path) -> None:
    """Every length in the first bytes and at the end, and a sample between."""
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


def test_every_bit_flip_in_the_header_is_refused(saved: bytes, tmp_path: Path) -> None:
    """A third of all bits of length and header: names, shapes, offsets, manifest, checksum, padding."""
    bits = random.Random(1).sample(range(header_end(saved) * 8), header_end(saved) * 8 // 3)
    assert len(bits) > 1500
    for bit in bits:
        data = bytearray(saved)
        data[bit // 8] ^= 1 << bit % 8
        assert_refused(
            tmp_path / "a", bytes(data), ALTERED, f"bit {bit} flipped, {saved[bit // 8 - 8 : bit // 8 + 8]!r}"
        )


def test_every_bit_flip_in_the_states_is_refused(saved: bytes, tmp_path: Path) -> None:
    start = header_end(saved) * 8
    for bit in random.Random(2).sample(range(start, len(saved) * 8), 400):
        data = bytearray(saved)
        data[bit // 8] ^= 1 << bit % 8
        message = " is altered: its checksum does not fit; compress the prompt again$"
        assert_refused(tmp_path / "a", bytes(data), message, f"bit {bit} flipped")


def test_exchanged_states_are_refused(saved: bytes, tmp_path: Path) -> None:
    """The same bytes under another name."""
    for one, other in ((b"keys.0", b"keys.1"), (b"keys.0", b"values.0")):
        if len(one) != len(other):
            data = saved.replace(b"values.0", b"values.9")
        else:
            data = saved.replace(one, b"keys.X").replace(other, one).replace(b"keys.X", other)
        assert_refused(tmp_path / "a", data, " is altered: its checksum does not fit", f"{one!r} for {other!r}")


def rewritten(
    saved: bytes, path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any], *, signed: bool
) -> bytes:
    """The file with its manifest and tensors changed, with the right checksum (``signed``) or the old one."""
    path.write_bytes(saved)
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["gist"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(manifest, tensors)
    if signed:
        del manifest["sha256"]
        manifest["sha256"] = cache_module._digest(manifest, tensors)
    save_file(tensors, path, metadata={"gist": json.dumps(manifest, sort_keys=True)})
    return path.read_bytes()


@pytest.mark.parametrize("signed", [True, False])
def test_later_format(saved: bytes, signed: bool, tmp_path: Path) -> None:
    data = rewritten(saved, tmp_path / "b", lambda manifest, _: manifest.update(format=2, news=[1]), signed=signed)
    message = " has format 2, this version reads up to 1; upgrade gisting: pip install -U gisting$"
    assert_refused(tmp_path / "a", data, message, "format 2")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda manifest, _: manifest["origin"].update(model="llama/ffffffffffff"), id="model"),
        pytest.param(lambda manifest, _: manifest["origin"].update(tokenizer="ffffffffffff"), id="tokenizer"),
        pytest.param(lambda manifest, _: manifest["origin"].update(condition="positive"), id="condition"),
        pytest.param(lambda manifest, _: manifest.update(lengths=[2, 5, 2]), id="lengths"),
        pytest.param(lambda manifest, _: manifest.update(num_layers=2), id="layers"),
        pytest.param(lambda manifest, _: manifest.update(more=1), id="more"),
        pytest.param(lambda manifest, _: manifest.pop("sha256"), id="no-checksum"),
        pytest.param(lambda _, tensors: tensors.pop("keys.2"), id="tensor-gone"),
        pytest.param(lambda _, tensors: tensors.update(more=torch.zeros(1)), id="tensor-more"),
        pytest.param(lambda _, tensors: tensors.update({"keys.0": tensors["keys.0"].view(torch.int32)}), id="dtype"),
        pytest.param(lambda _, tensors: tensors.update({"keys.0": tensors["keys.0"].reshape(3, 5, 2, 4)}), id="shape"),
    ],
)
def test_changed_content_is_refused(saved: bytes, change: Callable[..., Any], tmp_path: Path) -> None:
    data = rewritten(saved, tmp_path / "b", change, signed=False)
    assert_refused(
        tmp_path / "a", data, " is altered: its checksum does not fit; compress the prompt again$", "a change"
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda manifest, _: manifest.update(num_layers=4), id="layers-missing"),
        pytest.param(lambda manifest, _: manifest.update(num_layers=0), id="no-layers"),
        pytest.param(lambda manifest, _: manifest.update(num_layers="3"), id="layers-as-text"),
        pytest.param(lambda manifest, _: manifest.pop("lengths"), id="no-lengths"),
        pytest.param(lambda manifest, _: manifest.update(lengths=[2, 5]), id="lengths-too-few"),
        pytest.param(lambda manifest, _: manifest.update(lengths=[2, 6, 1]), id="k-beyond-the-slots"),
        pytest.param(lambda manifest, _: manifest.update(lengths=[2, -5, 1]), id="k-negative"),
        pytest.param(lambda manifest, _: manifest.update(lengths=[2, 0.5, 1]), id="k-half"),
        pytest.param(lambda manifest, _: manifest.pop("origin"), id="no-origin"),
        pytest.param(lambda manifest, _: manifest["origin"].update(more=1), id="origin-more"),
        pytest.param(lambda manifest, _: manifest["origin"].update(model=3), id="origin-no-text"),
        pytest.param(lambda manifest, _: manifest.update(format="one"), id="format-as-text"),
        pytest.param(
            lambda _, tensors: tensors.update({"keys.1": tensors["keys.1"][:, :, :4].clone()}), id="slots-differ"
        ),
        pytest.param(
            lambda _, tensors: tensors.update({"keys.1": tensors["keys.1"][0].clone()}), id="keys-of-3-dimensions"
        ),
        pytest.param(lambda _, tensors: tensors.update({"values.2": tensors["values.2"].half()}), id="dtypes-differ"),
    ],
)
def test_hostile_file_with_a_right_checksum_is_refused(
    saved: bytes, change: Callable[..., Any], tmp_path: Path
) -> None:
    """A checksum is no signature: who writes a file can write its checksum too. What cannot be a cache is refused in
    words.
    """
    data = rewritten(saved, tmp_path / "b", change, signed=True)
    assert_refused(tmp_path / "a", data, " ", "a manifest that cannot be")


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
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "write", [lambda it, path: path.write_bytes(pickle.dumps(it)), torch.save], ids=["pickle", "torch.save"]
)
def test_nothing_is_unpickled(write: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    write({"keys.0": Bomb(tmp_path / "exploded")}, tmp_path / "b")
    assert_refused(tmp_path / "a", (tmp_path / "b").read_bytes(), r" is truncated or altered \(", "a pickle")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, b"\xff" * 64, b'{"format": 1}', b"not a cache at all, but text of some length"], ids=repr
)
def test_other_files(data: bytes, tmp_path: Path) -> None:
    assert_refused(tmp_path / "a", data, ALTERED, "other file")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=re.escape(f"{path} is no file; save a cache there first: cache.save(path)")
        ):
            GistCache.load(path)


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
    """A temporary file is private; what becomes of it is an ordinary file, as one that ``open`` makes."""
    (tmp_path / "ordinary").write_bytes(b"")
    made_up().save(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
