"""Files that were tampered with, in ``slow`` more than ten thousand: each is refused with a message, or is valid.

A file that loads is compared with an oracle: safetensors reads it too, and the arithmetic of the format is repeated
here.
"""

from __future__ import annotations

import collections
import copy
import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from gisting import storage
from gisting.cache import GistCache
from gisting.errors import CacheFormatError
from gisting.rotary import Rotary
from tests.forge import Forged, with_header
from tests.memory import CAN_TELL_PEAK, peak_growth_mb, requires_peak
from tests.test_cache import FORMAT_1, assert_same, made_up, tensors_of

FILES_EACH = 50
# More than any file here needs, and less than one of the large numbers written by mutations would cost.
MAX_GROWTH_MB = 64


def originals(folder: Path) -> list[bytes]:
    """Tiny files of every kind: states and encoder states, every storage, no slots, rotation, format 1."""
    rotary = Rotary(((1.0, 0.1), (0.5,)), (0, None, 1))
    caches = [
        (made_up((1, 2)), None),
        (replace(made_up((1, 2)), rotary=rotary), "int8"),
        (replace(made_up((2, 1), dtype=torch.bfloat16), rotary=rotary), None),
        (made_up((1, 2), encoder=True), "float8_e4m3"),
        (made_up((2,), dtype=torch.float16, encoder=True), "float32"),
        (made_up((0, 0)), "int8"),
    ]
    files = []
    for cache, kind in caches:
        cache.save(folder / "a", kind)
        files.append((folder / "a").read_bytes())
    return [*files, FORMAT_1]


# -- what is done to a file --------------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 127, 2**31, 2**62, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "keys.0", "x.scale", [], {}, [[]], [0], [1, 1]),
    *("F32", "F16", "BF16", "F64", "I8", "I32", "F8_E4M3", "float32", "int8", "float8_e4m3", "float16", "float64"),
    *([2**40, 0], [0, 12], [2, 2, 2, 4], {"x": 1}),
]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Yield every (container, key) in a tree of JSON."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in inner for found in [(tree, key), *places(value)]]


def flip_bits(whole: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        bit = chance.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def cut(whole: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    return whole[: chance.randrange(len(whole))]


def extend(whole: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    return whole + chance.choice((b"\0", b" ", b"}", whole, chance.randbytes(8)))


def overwrite(whole: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    start, size = chance.randrange(len(whole)), chance.choice((1, 2, 4, 8, 100))
    what = chance.choice((b"\0" * size, b"\xff" * size, chance.randbytes(size), chance.choice(others)[start:][:size]))
    return whole[:start] + what + whole[start + len(what) :]


def splice(whole: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    other = chance.choice(others)
    if chance.random() < 0.5:
        return whole[: chance.randrange(len(whole))] + other[chance.randrange(len(other)) :]
    first, second = Forged.apart(whole), Forged.apart(other)
    mixed = chance.choice(
        (
            Forged(first.entries, first.manifest, second.data),
            Forged(first.entries, second.manifest, first.data),
            Forged(second.entries, first.manifest, second.data),
            Forged({**second.entries, **first.entries}, first.manifest, first.data + second.data),
        )
    )
    return mixed.together(signed=chance.random() < 0.8)


def edit_text(whole: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Remove, double or insert characters of the header, and correct the length in front."""
    end = 8 + int.from_bytes(whole[:8], "little")
    header = bytearray(whole[8:end].rstrip())
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(header))
        size = chance.choice((1, 1, 5, 40))
        header[at : at + chance.choice((0, size))] = chance.choice(
            (
                b"",
                bytes(header[at : at + size]) * 2,
                chance.choice((b'"', b"{", b"]", b",", b"\\", b"1", b" ", b"\xe9", b"[" * 5000, b'{"":' * 5000)),
            )
        )
    return with_header(bytes(header), whole[end:])


def edit_values(whole: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Remove, rename, exchange or change fields of the header or the manifest, and usually sign again."""
    forged = Forged.apart(whole)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = places(chance.choice((forged.entries, forged.manifest, forged.manifest)))
        if not found:
            break
        tree, key = chance.choice(found)
        value = tree[key]
        action = chance.randrange(6)
        if action == 0:
            del tree[key]
        elif action == 1 and isinstance(tree, dict):
            tree[chance.choice(("keys.0", "values.9", "last_hidden", "format", "x", ""))] = tree.pop(key)
        elif action == 2 and isinstance(value, int | float):
            tree[key] = chance.choice((value + 1, value - 1, value * 2, -value, float(value), bool(value), str(value)))
        elif action == 3:
            other, its_key = chance.choice(found)
            tree[key] = copy.deepcopy(other[its_key])
        elif action == 4 and isinstance(value, list):
            tree[key] = chance.choice((value * 2, value[:-1], value[::-1], [*value, chance.choice(ODD)]))
        elif action == 4 and isinstance(value, str):
            tree[key] = chance.choice(("\ud800", "\0", "é" * 9, value + "x", value[:-1], value.upper()))
        else:
            tree[key] = copy.deepcopy(chance.choice(ODD))
    return forged.together(signed=chance.random() < 0.8, indent=chance.choice((None, None, 1)))


def edit_tensor(whole: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Give a tensor another dtype, shape or content that fits its bytes, and sign."""
    forged = Forged.apart(whole)
    name = chance.choice(list(forged.entries))
    entry = forged.entries[name]
    data = forged.data[slice(*entry["data_offsets"])]
    kind, shape = entry["dtype"], entry["shape"]
    action = chance.randrange(4)
    if action == 0:
        forged.remove(name)
    elif action == 1:
        chance.shuffle(shape)
        forged.replace(chance.choice((name, name, "keys.3", "x.scale")), kind, shape, data)
    elif action == 2:
        kind = chance.choice(("F64", "F32", "BF16", "F16", "I8", "F8_E4M3"))
        size = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(kind, 1)
        forged.replace(name, kind, [1] * chance.randrange(4) + [len(data) // size], data[: len(data) // size * size])
    else:
        content = bytearray(data)
        for _ in range(chance.choice((1, 4, 20)) if content else 0):
            content[chance.randrange(len(content))] = chance.choice((0x7F, 0xFF, 0x80, 0, chance.randrange(256)))
        forged.replace(name, kind, shape, bytes(content))
    return forged.together()


MUTATIONS: list[Callable[[bytes, random.Random, list[bytes]], bytes]] = [
    *(flip_bits, cut, extend, overwrite, splice, edit_text),
    *(edit_values,) * 4,
    *(edit_tensor,) * 3,
]


# -- what becomes of it ------------------------------------------------------------------------------------------------


def what_it_says(whole: bytes) -> GistCache:
    """Read a valid file with safetensors and the arithmetic of the format; fail for an invalid one."""
    forged = Forged.apart(whole)
    manifest = forged.manifest
    tensors = load(whole)
    assert manifest["sha256"] == forged.checksum()
    assert {type(manifest["format"]), type(manifest["num_layers"]), *map(type, manifest["lengths"])} == {int}
    json.dumps(manifest, ensure_ascii=False, allow_nan=False).encode()
    if manifest["format"] == 2:
        dtype = getattr(torch, manifest["dtype"])
        scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".scale")}
        assert all(scale.isfinite().all() and (scale > 0).all() for scale in scales.values())
        if manifest["storage"] in ("int8", "float8_e4m3"):
            assert all((codes.float() >= -127).all() for codes in tensors.values() if codes.dtype == torch.int8)
            tensors = {
                name: torch.einsum("...rc,...->...rc", codes.float(), scales[f"{name}.scale"])
                for name, codes in tensors.items()
            }
        tensors = {name: states.to(dtype) for name, states in tensors.items()}
    layers = range(manifest["num_layers"])
    rotary = manifest.get("rotary")
    return replace(
        made_up(),
        keys=tuple(tensors.pop(f"keys.{layer}") for layer in layers),
        values=tuple(tensors.pop(f"values.{layer}") for layer in layers),
        lengths=torch.tensor(manifest["lengths"]),
        origin=replace(made_up().origin, **manifest["origin"]),
        last_hidden=tensors.pop("last_hidden", None),
        rotary=rotary and Rotary.from_dict(rotary),
    )


def check(path: Path, whole: bytes) -> str:
    """Load a file, and return ``"loaded"`` or how it was refused."""
    path.write_bytes(whole)
    try:
        cache = GistCache.load(path)
    except CacheFormatError as error:
        told = str(error).removeprefix(str(path))
        assert told != str(error), "the message names the file"  # noqa: PT017 (the message is what is tested)
        return " ".join(told.split()[:3])
    oracle = what_it_says(whole)
    assert_same(cache, oracle)
    assert cache.rotary == oracle.rotary
    assert all(tensor.isfinite().all() for tensor in tensors_of(cache))
    if cache.rotary is not None:  # which can rotate these keys
        for layer, keys in enumerate(cache.keys):
            cache.rotary.rotate(layer, keys, cache.lengths)
    assert storage.inspect(path)["file_bytes"] == len(whole)
    cache.save(path)  # what was read can be written
    return "loaded"


@pytest.mark.parametrize("examples", [24, pytest.param(240, marks=pytest.mark.slow)], ids=["few", "many"])
def test_files_that_were_tampered_with(tmp_path: Path, examples: int) -> None:
    files = originals(tmp_path)
    for whole in files:
        assert check(tmp_path / "a", whole) == "loaded"
    outcomes: collections.Counter[str] = collections.Counter()

    @given(st.integers(0, 2**32 - 1))
    @settings(deadline=None, max_examples=examples, derandomize=True, database=None)
    def tamper(seed: int) -> None:
        for number in range(FILES_EACH):
            chance = random.Random(f"{seed} {number}")
            whole = chance.choice(files)
            mutate = chance.choice(MUTATIONS)
            try:
                outcomes[check(tmp_path / "a", mutate(whole, chance, files))] += 1
            except Exception as error:
                error.add_note(f"seed {seed}, file {number}: {mutate.__name__}")
                raise

    with peak_growth_mb() if CAN_TELL_PEAK else nullcontext(lambda: 0.0) as grown:
        tamper()
    assert outcomes.total() >= 42 * examples
    assert grown() < MAX_GROWTH_MB
    # Not all of them are refused by the same check.
    for way in ("loaded", "is truncated or", "is altered: its", "is no gist", "has format 3,"):
        assert outcomes[way] >= examples // (24 if way == "has format 3," else 3), outcomes


@requires_peak
def test_memory_that_a_file_takes_would_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bound above can be exceeded, even if the process has held more before."""
    originals(tmp_path)
    del bytearray(b"x" * (4 * MAX_GROWTH_MB << 20))[:]
    parse = storage._parse

    def careless(path: str | Path, raw: torch.Tensor) -> Any:
        torch.ones(2 * MAX_GROWTH_MB << 20, dtype=torch.uint8)
        return parse(path, raw)

    with peak_growth_mb() as grown:
        GistCache.load(tmp_path / "a")
    assert grown() < MAX_GROWTH_MB
    monkeypatch.setattr(storage, "_parse", careless)
    with peak_growth_mb() as grown:
        GistCache.load(tmp_path / "a")
    assert grown() > MAX_GROWTH_MB


@pytest.mark.parametrize("mutate", dict.fromkeys(MUTATIONS), ids=lambda mutate: mutate.__name__)
def test_mutations_change_something(mutate: Callable[..., bytes], tmp_path: Path) -> None:
    """A mutation that returned its argument would only be counted."""
    files = originals(tmp_path)
    changed = sum(mutate(files[1], random.Random(seed), files) != files[1] for seed in range(100))
    assert changed >= 80
