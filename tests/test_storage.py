"""``gisting.storage``: what each storage keeps of a number, atomic writes, and files that are refused."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from gisting import storage
from gisting.cache import GistCache
from gisting.errors import CacheFormatError, GistError
from tests.forge import Forged, with_header
from tests.memory import peak_growth_mb, requires_peak

FUZZ = settings(deadline=None, max_examples=60, derandomize=True)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
requires_posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and permission bits are POSIX's")
requires_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")


def stored(tmp_path: Path, tensor: Tensor, kind: str | None) -> Tensor:
    """Write a tensor to a file and read it back."""
    storage.write(tmp_path / "a", {"about": "this"}, {"x": tensor}, kind)
    manifest, tensors = storage.read(tmp_path / "a")
    assert manifest["about"] == "this"
    assert list(tensors) == ["x"]
    assert (tensors["x"].dtype, tensors["x"].shape) == (tensor.dtype, tensor.shape)
    return tensors["x"]


# -- what is kept of a number ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "numbers", "kept"),
    [
        # 24, 8 and 11 significant bits: ties go to the even neighbour.
        ("float32", [1 + 2**-23, 1 / 3, -0.0, 1e-45], [1 + 2**-23, 1 / 3, -0.0, 1e-45]),
        ("bfloat16", [1 + 2**-8, 1 + 3 * 2**-8, -3.0, 2.0**126], [1.0, 1 + 2**-6, -3.0, 2.0**126]),
        ("float16", [1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 2**-25], [1.0, 1 + 2**-9, 65504.0, 0.0]),
        # The largest number is 127: the scale is 1.
        ("int8", [127.0, 0.5, 1.5, 2.5, -0.5, -126.5, 126.51, 0.49], [127.0, 0, 2, 2, 0, -126, 127, 0]),
        ("int8", [-12.7, 0.04, 0.26, 3.14], [-12.7, 0.0, 0.3, 3.1]),
        # The largest is 448: 4 significant bits down to 2^-6, multiples of 2^-9 below.
        ("float8_e4m3", [448.0, 17, 19, -432, 0.25], [448.0, 16, 20, -448, 0.25]),
        ("float8_e4m3", [-448.0, 2**-9, 2**-10, 3 * 2**-10, 2**-6], [-448.0, 2**-9, 0, 2**-8, 2**-6]),
    ],
)
def test_rounding(kind: str, numbers: list[float], kept: list[float], tmp_path: Path) -> None:
    found = stored(tmp_path, torch.tensor([numbers]), kind)
    # If the scale is not a power of two, the product is rounded.
    torch.testing.assert_close(found, torch.tensor([kept]), rtol=2**-23 if -12.7 in numbers else 0, atol=0)


@pytest.mark.parametrize("kind", storage.STORAGES)
def test_every_head_has_its_own_scale(kind: str, tmp_path: Path) -> None:
    """Heads that differ by a factor of a million lose the same fraction of their own largest number."""
    torch.manual_seed(1)
    size = torch.tensor([1e-2, 1.0, 1e3, 1e4])[:, None, None]
    states = torch.randn(3, 4, 5, 8).clamp(-3, 3) * size
    error = ((stored(tmp_path, states, kind) - states).abs() / states.abs().amax((-2, -1), keepdim=True)).amax()
    # Half a step at the largest number of a head: 1 / 254 and 16 / 448, for casts 2^-8 and 2^-11.
    bounds = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "float8_e4m3": 16 / 448, "int8": 1 / 254}
    assert error <= bounds[kind] * (1 + 2**-20)
    assert error >= bounds[kind] / 4, "the bound is not far too large"
    scale = storage.inspect(tmp_path / "a")["tensors"].get("x.scale")
    assert scale == ({"dtype": "float32", "shape": [3, 4]} if kind in ("float8_e4m3", "int8") else None)


@pytest.mark.parametrize("kind", [None, *storage.STORAGES])
@pytest.mark.parametrize("shape", [(2, 3, 0, 4), (2, 0, 3, 4), (0, 1, 1, 1), (1, 2, 3, 0), (2, 1, 3, 4)], ids=str)
def test_zeros_and_nothing(kind: str | None, shape: tuple[int, ...], tmp_path: Path) -> None:
    states = torch.zeros(shape)
    assert torch.equal(stored(tmp_path, states, kind), states)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Two matrices of any floating dtype: ordinary numbers, powers of two over the whole range, zeros."""
    name = draw(st.sampled_from(list(DTYPES)))
    most = {"float64": 126, "float32": 126, "bfloat16": 126, "float16": 14}[name]
    number = st.one_of(
        st.floats(-3, 3, width=32),
        st.just(0.0),
        st.builds(
            lambda mantissa, exponent: mantissa * 2.0**exponent, st.floats(-1.99, 1.99), st.integers(-most - 20, most)
        ),
    )
    numbers = draw(st.lists(number, min_size=12, max_size=12))
    return torch.tensor(numbers, dtype=torch.float64).to(DTYPES[name]).reshape(2, 2, 3)


@pytest.mark.parametrize("largest_code", [127.0, 448.0])
def test_no_scale_drifts(largest_code: float) -> None:
    """Divide, multiply and divide again, for all 2^23 float32 numbers from 1 to 2."""
    scale = torch.arange(2**23, dtype=torch.int32).add_(0x3F800000).view(torch.float32) / largest_code
    assert torch.equal(scale * largest_code / largest_code, scale)


@given(matrices(), st.sampled_from(storage.STORAGES))
@FUZZ
def test_what_was_stored_once_is_stored_again_without_loss(
    tmp_path_factory: pytest.TempPathFactory, states: Tensor, kind: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        once = stored(folder, states, kind)
    except GistError as error:
        assert "cannot hold x" in str(error)  # noqa: PT017 (the other correct outcome)
        return
    assert torch.equal(stored(folder, once.clone(), kind), once)
    if kind in ("int8", "float8_e4m3"):
        largest = states.abs().double().amax((-2, -1), keepdim=True)
        step = {"int8": 1 / 254, "float8_e4m3": 16 / 448}[kind]
        rounding = states.double().abs() * torch.finfo(states.dtype).eps + torch.finfo(states.dtype).tiny + 2.0**-100
        assert ((once.double() - states.double()).abs() <= largest * step * 1.0001 + rounding).all()


@pytest.mark.parametrize(
    ("numbers", "dtype", "kind", "message"),
    [
        ([65520.0], "float32", "float16", r"^storage 'float16' cannot hold x, which goes up to 65520; use storage="),
        ([-1e5, 2.0], "bfloat16", "float16", r"^storage 'float16' cannot hold x, which goes up to 99840; use"),
        ([3.4e38], "float32", "bfloat16", r"^storage 'bfloat16' cannot hold x, which goes up to 3.4e\+38; use"),
        ([65504.0], "float16", "bfloat16", r"^storage 'bfloat16' cannot hold x, which goes up to 65504; use"),
        # 127 times a 127th has one more rounding.
        (
            [torch.finfo(torch.float32).max],
            "float32",
            "int8",
            r"^storage 'int8' cannot hold x, which goes up to 3.40282e",
        ),
        ([1e39], "float64", "int8", r"^storage 'int8' cannot hold x, which goes up to 1e\+39; use storage=None"),
        ([float("nan")], "float32", None, r"^x holds NaN or infinity, which cannot be stored; compress the"),
        ([1.0, float("-inf")], "float16", "int8", r"^x holds NaN or infinity, which cannot be stored; compress the"),
        ([1.0], "float32", "int4", r"^storage must be None or one of float32, bfloat16, .*, int8, got 'int4'$"),
        ([1.0], "float32", "float64", r"^storage must be None or one of float32, bfloat16, .*, int8, got 'float64'$"),
    ],
)
def test_numbers_that_a_storage_cannot_hold(
    numbers: list[float], dtype: str, kind: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(GistError, match=message):
        stored(tmp_path, torch.tensor([numbers], dtype=DTYPES[dtype]), kind)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({}, None, r"^tensors must have one dtype out of float64, float32, bfloat16, float16, got \[\]; cast them"),
        ({"x": torch.zeros(1), "y": torch.zeros(1).half()}, None, r"got \['torch.float16', 'torch.float32'\]; cast"),
        ({"x": torch.zeros(1).long()}, None, r"got \['torch.int64'\]; cast them: cache.to\(dtype=...\)$"),
        ({"x": torch.zeros(1)}, "int8", r"^storage 'int8' needs tensors of two dimensions or more, got \(1,\)$"),
        (
            {"x": torch.zeros(1, 1), "x.scale": torch.zeros(1, 1)},
            "int8",
            r"^the name of a tensor must not end",
        ),
    ],
    ids=["none", "two-dtypes", "integers", "one-dimension", "name"],
)
def test_tensors_that_are_not_stored(
    tensors: dict[str, Tensor], kind: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(GistError, match=message):
        storage.write(tmp_path / "a", {}, tensors, kind)


def test_a_manifest_that_is_too_large_is_not_written(tmp_path: Path) -> None:
    text = "x" * 2**20
    with pytest.raises(GistError, match=r"^the manifest and the names of 1 tensors take \d+ bytes, the limit is 10"):
        storage.write(tmp_path / "a", {"text": text}, {"x": torch.zeros(1)})
    storage.write(tmp_path / "a", {"text": text[:-1000]}, {"x": torch.zeros(1)})
    assert storage.read(tmp_path / "a")[0]["text"] == text[:-1000]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"x": {1, 2}}, "Object of type set is not JSON serializable"),
        ({"x": float("nan")}, "NaN is not a finite number"),
        ({"x": "\ud800"}, "'utf-8' codec can't encode"),
        ({"x": {1: "a", "1": "b"}}, "a name is given twice"),
        ({"x": 2**64}, r"the number 18446744073709551616... is too large"),
        ({"x": [[[[[[[[]]]]]]]]}, "it is nested too deeply"),
    ],
    ids=["set", "nan", "surrogate", "twice", "large", "deep"],
)
def test_a_manifest_that_could_not_be_read_is_not_written(
    manifest: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GistError, match=f"^manifest must be JSON that can be read back, but {message}"):
        storage.write(tmp_path / "a", manifest, {"x": torch.zeros(1)})


def test_a_manifest_of_python_values(tmp_path: Path) -> None:
    storage.write(tmp_path / "a", {"x": {2: (1, 2), 10: None}}, {"x": torch.zeros(1)})
    assert storage.read(tmp_path / "a")[0]["x"] == {"2": [1, 2], "10": None}


# -- what a file says --------------------------------------------------------------------------------------------------


def test_manifest_and_tensors(tmp_path: Path) -> None:
    """Check every byte by hand, and with safetensors' own reader."""
    states = torch.tensor([[[0.0, -254.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    storage.write(tmp_path / "a", {"about": "this", "format": 9, "sha256": "no"}, {"x": states}, "int8")
    found = Forged.apart((tmp_path / "a").read_bytes())
    assert found.manifest == {
        "about": "this",
        "format": 2,
        "storage": "int8",
        "dtype": "bfloat16",
        "sha256": found.checksum(),
    }
    tensors = load_file(tmp_path / "a")
    # 0.5 and 1.5 steps: ties to even.
    assert tensors["x"].tolist() == [[[0, -127], [0, 2]], [[0, 0], [0, 0]]]
    assert tensors["x.scale"].tolist() == [2.0, 2.0**-100]
    manifest, read = storage.read(tmp_path / "a")
    assert manifest == found.manifest
    assert read["x"].tolist() == [[[0, -254], [0, 4]], [[0, 0], [0, 0]]]


def test_inspect(tmp_path: Path) -> None:
    states = {"b": torch.ones(2, 3, 4, 5).half(), "a": torch.ones(2, 3).half()}
    storage.write(tmp_path / "a", {"about": "this"}, states, "float8_e4m3")
    found = storage.inspect(tmp_path / "a")
    assert json.loads(json.dumps(found)) == found
    manifest = found.pop("manifest")
    assert manifest == storage.read(tmp_path / "a")[0]
    assert found == {
        "format": 2,
        "storage": "float8_e4m3",
        "dtype": "float16",
        "file_bytes": (tmp_path / "a").stat().st_size,
        "tensor_bytes": 6 + 120 + 4 + 24,
        "sha256": manifest["sha256"],
        "tensors": {
            "a": {"dtype": "float8_e4m3", "shape": [2, 3]},
            "a.scale": {"dtype": "float32", "shape": []},
            "b": {"dtype": "float8_e4m3", "shape": [2, 3, 4, 5]},
            "b.scale": {"dtype": "float32", "shape": [2, 3]},
        },
    }


@requires_peak
def test_inspect_reads_the_header_alone(tmp_path: Path) -> None:
    """The file has 1 GB, all of it a hole."""
    forged = Forged({"x": {"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}}, {"format": 1}, b"")
    header = forged.together()
    (tmp_path / "a").write_bytes(header)
    os.truncate(tmp_path / "a", len(header) + 2**30)
    with peak_growth_mb() as grown:
        assert storage.inspect(tmp_path / "a")["tensors"] == {"x": {"dtype": "float32", "shape": [2**28]}}
    assert grown() < 20


# -- mapped, and read once ---------------------------------------------------------------------------------------------


@requires_proc
def test_states_lie_in_the_file(tmp_path: Path) -> None:
    states = torch.randn(4, 100)
    storage.write(tmp_path / "a", {}, {"x": states})
    before = (tmp_path / "a").read_bytes()
    open_files = len(os.listdir("/proc/self/fd"))
    kept = [storage.read(tmp_path / "a")[1]["x"] for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == open_files, "the mapping holds no descriptor"
    assert str(tmp_path / "a") in Path("/proc/self/maps").read_text(encoding="utf-8")
    kept[0].zero_()
    assert torch.equal(kept[1], states), "changes stay private to one reader"
    assert (tmp_path / "a").read_bytes() == before
    storage.write(tmp_path / "a", {}, {"x": states + 1})
    assert torch.equal(kept[1], states), "a file is replaced, not changed"


def test_where_nothing_can_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(tmp_path / "a", {}, {"x": torch.ones(3)})
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert storage.read(tmp_path / "a")[1]["x"].tolist() == [1, 1, 1]


def test_what_is_checked_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file takes the name as soon as the first is open."""
    storage.write(tmp_path / "a", {}, {"x": torch.ones(3)})
    fstat = os.fstat

    def exchange(descriptor: int) -> os.stat_result:
        monkeypatch.undo()
        (tmp_path / "a").unlink()
        (tmp_path / "a").write_bytes(b"something else")
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", exchange)
    assert storage.read(tmp_path / "a")[1]["x"].tolist() == [1, 1, 1]


@requires_posix
def test_a_link_that_comes_between_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(tmp_path / "a", {}, {"x": torch.ones(3)})
    (tmp_path / "b").symlink_to("a")
    monkeypatch.setattr(os.path, "islink", lambda path: False)
    with pytest.raises(OSError, match="symbolic links"):
        storage.read(tmp_path / "b")


@requires_proc
def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(tmp_path / "a", {}, {"x": torch.ones(3)})

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Cannot allocate memory")

    monkeypatch.setattr(torch, "from_file", fail)
    with pytest.raises(OSError, match=r"a cannot be mapped: Cannot allocate memory$"):
        storage.read(tmp_path / "a")


def test_a_file_that_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(tmp_path / "a", {}, {"x": torch.ones(3)})
    fstat = os.fstat

    def shrink(descriptor: int) -> os.stat_result:
        monkeypatch.undo()
        state = fstat(descriptor)
        os.truncate(tmp_path / "a", 100)
        return state

    monkeypatch.setattr(os, "fstat", shrink)
    with pytest.raises(CacheFormatError, match=r" is truncated or altered \("):
        storage.read(tmp_path / "a")


# -- what is not a file ------------------------------------------------------------------------------------------------


def make_link(path: Path) -> None:
    storage.write(path.with_name("real"), {}, {"x": torch.ones(3)})
    path.symlink_to("real")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


@requires_posix
@pytest.mark.parametrize("read", [storage.read, storage.inspect])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (make_link, CacheFormatError, r" is a symbolic link, which is not followed; give the file itself: Path\("),
        (lambda path: path.symlink_to("nowhere"), CacheFormatError, " is a symbolic link, which is not followed"),
        (lambda path: path.symlink_to("a"), CacheFormatError, " is a symbolic link, which is not followed"),
        (os.mkfifo, CacheFormatError, r" is not a regular file; give the file that cache.save\(path\) wrote$"),
        (Path.mkdir, CacheFormatError, " is not a regular file; give the file that"),
        (make_socket, OSError, "No such device or address"),
        (lambda path: None, FileNotFoundError, " does not exist; make it with `gisting compress`$"),
    ],
    ids=["link", "dangling-link", "link-to-itself", "pipe", "directory", "socket", "nothing"],
)
def test_what_is_no_regular_file(
    read: Callable[[Path], Any],
    make: Callable[[Path], Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a")
    with pytest.raises(error, match=message):
        read(tmp_path / "a")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device_is_refused() -> None:
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(CacheFormatError, match=f"^{device} is not a regular file; give the file that"):
            storage.read(device)


@requires_posix
def test_a_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    storage.write(tmp_path / "link" / "a", {}, {"x": torch.ones(3)})
    assert storage.read(tmp_path / "link" / "a")[1]["x"].tolist() == [1, 1, 1]


# -- hostile headers ---------------------------------------------------------------------------------------------------


TENSOR = '"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def one_tensor(**entry: Any) -> bytes:
    """A valid file of three float32 numbers, except for what the entry says."""
    forged = Forged({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **entry}}, {"format": 1}, b"\0" * 12)
    return forged.together()


def two_tensors(*offsets: list[int], num_bytes: int = 24) -> bytes:
    entries = {name: {"dtype": "F32", "shape": [3], "data_offsets": at} for name, at in zip("xy", offsets, strict=True)}
    return Forged(entries, {"format": 1}, b"\0" * num_bytes).together()


def metadata(text: str) -> bytes:
    """A valid file, except for the text of its metadata, which is given as JSON."""
    return with_header(f'{{"__metadata__":{text},{TENSOR}}}'.encode(), b"")


def manifest(text: str) -> bytes:
    return metadata(json.dumps({"gist": text}))


TRUNCATED, UNREADABLE = r" is truncated or altered \(", " is altered: its manifest cannot be read; compress the prompt"
HOSTILE: dict[str, tuple[bytes, str]] = {
    # -- the length of the header
    "empty": (b"", TRUNCATED + "0 bytes, too few for a header"),
    "seven bytes": (b"\0" * 7, TRUNCATED + "7 bytes, too few"),
    "no header": (b"\0" * 8, TRUNCATED + "the header is not a JSON object"),
    "a header of 2^64": (b"\xff" * 8 + b"{}", TRUNCATED + r"a header of 18446744073709551615 bytes in a file of 10"),
    "a header beyond the end": (b"\x03" + b"\0" * 7 + b"{}", TRUNCATED + "a header of 3 bytes in a file of 10"),
    "a header of 2 MB": (with_header(b'{"a":"' + b"a" * 2**21 + b'"}', b""), TRUNCATED + "a header of 2097160 bytes"),
    # -- invalid JSON
    "no JSON": (with_header(b"{]", b""), TRUNCATED + "Expecting property name"),
    "a list": (with_header(b"[]", b""), TRUNCATED + "the header is not a JSON object"),
    "space in front": (with_header(b" {}", b""), TRUNCATED + "the header is not a JSON object"),
    "a byte order mark": (with_header(b"\xef\xbb\xbf{}", b""), TRUNCATED + "the header is not a JSON object"),
    "UTF-16": (with_header("{}".encode("utf-16-le"), b""), TRUNCATED),
    "no UTF-8": (with_header(b'{"\xff":1}', b""), TRUNCATED + "'utf-8' codec can't decode"),
    "half a surrogate pair": (with_header(rb'{"\ud800":{}}', b""), TRUNCATED + "'utf-8' codec can't encode"),
    "a name twice": (with_header(f"{{{TENSOR},{TENSOR}}}".encode(), b""), TRUNCATED + "a name is given twice"),
    "a field twice": (
        with_header(b'{"x":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b""),
        TRUNCATED + "a name is given twice",
    ),
    "nested lists": (with_header(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), TRUNCATED + "it is nested"),
    "nested objects": (with_header(b'{"x":' * 50_000 + b"1" + b"}" * 50_000, b""), TRUNCATED + "it is nested too"),
    "nested a little": (with_header(b'{"x":' + b"[" * 9 + b"]" * 9 + b"}", b""), TRUNCATED + "it is nested too deeply"),
    "NaN in JSON": (with_header(b'{"x":NaN}', b""), TRUNCATED + "NaN is not a finite number"),
    "infinity in JSON": (with_header(b'{"x":-Infinity}', b""), TRUNCATED + "-Infinity is not a finite number"),
    "a float beyond floats": (with_header(b'{"x":1e999}', b""), TRUNCATED + "1e999 is not a finite number"),
    "a number of 5000 digits": (with_header(b'{"x":' + b"9" * 5000 + b"}", b""), TRUNCATED + "the number 9+... is too"),
    "a number of 65 bits": (with_header(b'{"x":%d}' % 2**64, b""), TRUNCATED + "the number 18446744073709551616... is"),
    # -- tensors
    "a tensor that is a number": (with_header(metadata("{}")[8:].strip()[:-1] + b',"y":1}', b""), " is a safetensors"),
    "no dtype": (one_tensor(dtype=None), TRUNCATED + "'x' is not a tensor"),
    "a dtype of another kind": (one_tensor(dtype="I64"), TRUNCATED + "'x' has dtype 'I64'"),
    "an unknown dtype": (one_tensor(dtype="F7"), TRUNCATED + "'x' has dtype 'F7'"),
    "a shape that is a number": (one_tensor(shape=3), TRUNCATED + "'x' is not a tensor"),
    "a shape of texts": (one_tensor(shape=["3"]), TRUNCATED + r"'x' has dtype 'F32', shape \['3'\]"),
    "a shape of truths": (one_tensor(shape=[3, True]), TRUNCATED + r"'x' has dtype 'F32', shape \[3, True\]"),
    "a negative shape": (one_tensor(shape=[-3, -1]), TRUNCATED + r"'x' has dtype 'F32', shape \[-3, -1\]"),
    "a shape of halves": (one_tensor(shape=[1.5, 2]), TRUNCATED + r"'x' has dtype 'F32', shape \[1.5, 2\]"),
    "a shape too large": (one_tensor(shape=[2**62, 4]), TRUNCATED + "'x' of torch.float32 and shape .* cannot be at"),
    "a shape too small": (one_tensor(shape=[2]), TRUNCATED + r"'x' of torch.float32 and shape \[2\] cannot be at 0"),
    "an empty shape too large": (
        one_tensor(shape=[0, 2**40], data_offsets=[0, 0]),
        TRUNCATED + r"'x' is empty and has shape \[0, 1099511627776\]",
    ),
    "three offsets": (one_tensor(data_offsets=[0, 12, 12]), TRUNCATED + "'x' is not a tensor"),
    "offsets backwards": (one_tensor(data_offsets=[12, 0]), TRUNCATED + "'x' of .* cannot be at 12 to 0"),
    "negative offsets": (one_tensor(data_offsets=[-12, 0]), TRUNCATED + "'x' has dtype 'F32', .* offsets -12 and 0"),
    "offsets of truths": (
        one_tensor(shape=[], dtype="I8", data_offsets=[False, True]),
        TRUNCATED + ".* offsets False and True",
    ),
    "offsets after the end": (one_tensor(data_offsets=[4, 16]), TRUNCATED + "'x' begins at 4, the tensor before it"),
    "more than a tensor": (one_tensor(more=1), TRUNCATED + "'x' is not a tensor"),
    "an overlap": (two_tensors([0, 12], [8, 20], num_bytes=20), TRUNCATED + "'y' begins at 8, the tensor before it"),
    "the same bytes twice": (two_tensors([0, 12], [0, 12], num_bytes=12), TRUNCATED + "'y' begins at 0, the "),
    "a gap": (two_tensors([0, 12], [16, 28], num_bytes=28), TRUNCATED + "'y' begins at 16, the tensor before it"),
    "bytes in front": (
        two_tensors([4, 16], [16, 28], num_bytes=28),
        TRUNCATED + "'x' begins at 4, the tensor before it",
    ),
    "bytes after": (two_tensors([0, 12], [12, 24], num_bytes=25), TRUNCATED + "the tensors end at 24, the file at"),
    "bytes missing": (two_tensors([0, 12], [12, 24], num_bytes=23), TRUNCATED + "the tensors end at 24, the file at"),
    "no multiple of its size": (
        Forged(
            {
                "x": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
                "y": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
            },
            {"format": 1},
            b"\0" * 5,
        ).together(),
        TRUNCATED + "'y' of torch.float32 and shape .1. cannot be at 1 to 5",
    ),
    # -- the manifest
    "no metadata": (with_header(b"{}", b""), r" is a safetensors file but holds no gist cache "),
    "metadata without gist": (metadata('{"format":"pt"}'), r" is a safetensors file but holds no gist cache "),
    "metadata that are a list": (metadata("[]"), TRUNCATED + "the metadata are not texts"),
    "metadata that are no texts": (metadata('{"gist":{}}'), TRUNCATED + "the metadata are not texts"),
    "a manifest of text": (manifest("gist"), UNREADABLE),
    "a manifest that is a list": (manifest("[1]"), UNREADABLE),
    "a name twice in it": (manifest('{"format":2,"format":1}'), UNREADABLE),
    "NaN in it": (manifest('{"format":2,"x":NaN}'), UNREADABLE),
    "nested in it": (manifest('{"format":2,"x":' + "[" * 100_000 + "]" * 100_000 + "}"), UNREADABLE),
    "half a surrogate pair in it": (manifest(r'{"format":2,"x":"\ud800"}'), UNREADABLE),
    "no format": (manifest('{"sha256":"x"}'), UNREADABLE),
    "a format that is true": (manifest('{"format":true}'), UNREADABLE),
    "a format that is text": (manifest('{"format":"2"}'), UNREADABLE),
    "a format that is a float": (manifest('{"format":2.0}'), UNREADABLE),
    "format 0": (manifest('{"format":0}'), UNREADABLE),
    "format -1": (manifest('{"format":-1}'), UNREADABLE),
    "format 3": (
        manifest('{"format":3}'),
        " has format 3, this version reads up to 2; upgrade gisting: pip install -U gist-tokens$",
    ),
    "format 3, which keeps its tensors in other ways": (
        one_tensor(dtype="F4").replace(b'\\"format\\": 1', b'\\"format\\": 3'),
        " has format 3, this version reads up to 2; upgrade",
    ),
    "no checksum": (manifest('{"format":1}'), " is altered: its checksum does not match; compress the prompt again$"),
    "a checksum that is a number": (manifest('{"format":1,"sha256":0}'), " is altered: its checksum does not match"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_header(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CacheFormatError, match="^" + re.escape(str(tmp_path / "a")) + message):
        storage.read(tmp_path / "a")


def test_a_message_is_not_as_long_as_a_file(tmp_path: Path) -> None:
    for hostile in (one_tensor(dtype="F" * 10**5), one_tensor(shape=[1] * 10**5 + [2])):
        (tmp_path / "a").write_bytes(hostile)
        with pytest.raises(CacheFormatError, match=r"\.\.\.\); compress the prompt again$") as caught:
            storage.read(tmp_path / "a")
        assert len(str(caught.value)) < 600


def test_the_table_of_hostile_headers_is_about_what_it_says(tmp_path: Path) -> None:
    """The forged files can be read if nothing is wrong with them."""
    for right in (one_tensor(), two_tensors([0, 12], [12, 24])):
        (tmp_path / "a").write_bytes(right)
        assert all(tensor.tolist() == [0, 0, 0] for tensor in storage.read(tmp_path / "a")[1].values())


# -- hostile numbers with a valid checksum -----------------------------------------------------------------------------

NAN, INFINITY, ONE = b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\x3f"


def forged(kind: str | None, change: Callable[[Forged], Any], tmp_path: Path) -> None:
    """Store two matrices of four numbers, change them and write a new checksum."""
    storage.write(tmp_path / "a", {}, {"x": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]] * 2)}, kind)
    found = Forged.apart((tmp_path / "a").read_bytes())
    change(found)
    (tmp_path / "a").write_bytes(found.together())


def scales(first: bytes) -> Callable[[Forged], Any]:
    return lambda it: it.replace("x.scale", "F32", [2], first + ONE)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        pytest.param(None, lambda it: it.replace("x", "F32", [1], NAN), "'x' holds NaN or infinity", id="nan"),
        pytest.param(None, lambda it: it.replace("x", "F32", [1], INFINITY), "'x' holds NaN", id="inf"),
        pytest.param("bfloat16", lambda it: it.replace("x", "BF16", [1], NAN[2:]), "'x' holds NaN", id="nan-bfloat16"),
        pytest.param("float16", lambda it: it.replace("x", "F16", [1], b"\0\x7c"), "'x' holds NaN", id="inf-float16"),
        pytest.param(
            "float8_e4m3", lambda it: it.replace("x", "F8_E4M3", [2, 2, 2], b"\x7f" * 8), "'x' holds NaN", id="nan-8"
        ),
        pytest.param(
            "int8", lambda it: it.replace("x", "I8", [2, 2, 2], b"\x80" * 8), "the codes of 'x' must be -127", id="-128"
        ),
        pytest.param("int8", scales(NAN), "the scales of 'x' must be finite and above", id="scale-nan"),
        pytest.param("int8", scales(INFINITY), "the scales of 'x' must be finite and above", id="scale-infinite"),
        pytest.param("int8", scales(b"\0" * 4), "the scales of 'x' must be finite and above", id="scale-zero"),
        pytest.param("int8", scales(b"\0\0\x80\xbf"), "the scales of 'x' must be finite and", id="scale-negative"),
        pytest.param("int8", scales(b"\xff\xff\x7f\x7f"), "'x' holds NaN or infinity", id="scale-too-large"),
        pytest.param(
            "int8", lambda it: it.replace("x.scale", "F32", [1], ONE), r"'x' has shape \(2, 2, 2\), ", id="shape"
        ),
        pytest.param(
            "int8", lambda it: it.replace("x.scale", "F32", [2, 1], ONE * 2), "'x' has shape", id="scale-dimensions"
        ),
        pytest.param(
            "int8", lambda it: it.replace("x.scale", "I8", [2], b"\1\1"), "storage int8 means", id="scale-int"
        ),
        pytest.param("int8", lambda it: it.remove("x.scale"), "storage int8 means tensors of", id="scale-gone"),
        pytest.param("int8", lambda it: it.remove("x"), "storage int8 means tensors of", id="codes-gone"),
        pytest.param(
            "int8", lambda it: it.replace("y.scale", "F32", [1], ONE), "'y.scale' is a scale", id="scale-more"
        ),
        pytest.param(
            "int8", lambda it: it.replace("y", "I8", [1, 1], b"\1"), "'y' must be torch.int8 with", id="codes-more"
        ),
        pytest.param(
            "int8", lambda it: it.replace("y", "F32", [1, 1], ONE), "'y' must be torch.int8 with", id="codes-float"
        ),
        pytest.param("int8", lambda it: it.manifest.update(storage="float8_e4m3"), "storage float8_e4m3 m", id="other"),
        pytest.param("int8", lambda it: it.manifest.update(storage="float32"), "storage float32 means", id="no-scales"),
        pytest.param("int8", lambda it: it.manifest.update(storage="int4"), "storage must be one of", id="no-storage"),
        pytest.param("int8", lambda it: it.manifest.update(storage=[]), "storage must be one of", id="storage-list"),
        pytest.param("int8", lambda it: it.manifest.pop("storage"), "storage must be one of .* got None", id="none"),
        pytest.param("int8", lambda it: it.manifest.update(dtype="int8"), "dtype must be one of", id="dtype-int8"),
        pytest.param("int8", lambda it: it.manifest.update(dtype={}), "dtype must be one of", id="dtype-object"),
        pytest.param("int8", lambda it: it.manifest.pop("dtype"), "dtype must be one of .* got None", id="no-dtype"),
        pytest.param("int8", lambda it: it.manifest.update(format=1), "the states must have one", id="format-1"),
        pytest.param(None, lambda it: it.remove("x"), "storage float32 means tensors of .* got none", id="no-tensors"),
    ],
)
def test_hostile_numbers(kind: str | None, change: Callable[[Forged], Any], message: str, tmp_path: Path) -> None:
    forged(kind, change, tmp_path)
    with pytest.raises(CacheFormatError, match=f" is not a gist cache of format 2: .*{message}"):
        storage.read(tmp_path / "a")


def test_forged_numbers_that_are_right_are_read(tmp_path: Path) -> None:
    forged("int8", scales(ONE), tmp_path)
    assert storage.read(tmp_path / "a")[1]["x"][0].tolist() == [[32, 64], [95, 127]]


# -- bounded memory ----------------------------------------------------------------------------------------------------


def sparse(path: Path, num_mb: int) -> None:
    """Write a valid file of int8 codes for float64: a header on the disk, then a hole of zeros."""
    size = num_mb * 2**20
    entries = {
        "x": {"dtype": "I8", "shape": [1, 1, size], "data_offsets": [4, size + 4]},
        "x.scale": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    scale = torch.ones(1).numpy().tobytes()
    manifest = {"format": 2, "storage": "int8", "dtype": "float64"}
    whole = Forged(entries, manifest, scale + bytes(size)).together()
    path.write_bytes(whole[:-size])
    os.truncate(path, len(whole))


@requires_peak
def test_a_file_with_a_hole_is_not_unfolded(tmp_path: Path) -> None:
    """The file has 40 MB of which the disk holds one block; it takes 320 MB in memory, 480 MB while it is decoded."""
    sparse(tmp_path / "a", 40)
    length = 40 * 2**20 * 8
    message = (
        rf"/a takes {length} bytes, more than max_bytes={length - 1}; if you trust its source, raise the limit: "
        rf"GistCache.load\(path, max_bytes={length}\)$"
    )
    with peak_growth_mb() as grown:
        with pytest.raises(GistError, match=message) as caught:
            storage.read(tmp_path / "a", max_bytes=length - 1)
        assert not isinstance(caught.value, CacheFormatError), "nothing is wrong with the file"
        with pytest.raises(GistError, match=rf"/a takes {length} bytes, more than max_bytes=1000; "):
            GistCache.load(tmp_path / "a", max_bytes=1000)
        assert grown() < 20
        assert storage.read(tmp_path / "a", max_bytes=length)[1]["x"].shape == (1, 1, 40 * 2**20)
        assert 320 <= grown() <= 3 * 320


@pytest.mark.parametrize("kind", [None, *storage.STORAGES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_limit_is_of_the_larger_of_file_and_memory(kind: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    storage.write(
        tmp_path / "a", {}, {"x": torch.ones(1, 50, 100, dtype=dtype), "y": torch.ones(1, 2, dtype=dtype)}, kind
    )
    wanted = max((tmp_path / "a").stat().st_size, 5002 * dtype.itemsize)
    storage.read(tmp_path / "a", max_bytes=wanted)
    with pytest.raises(GistError, match=f"takes {wanted} bytes, more than max_bytes={wanted - 1}; "):
        storage.read(tmp_path / "a", max_bytes=wanted - 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, which Linux enforces")
def test_hostile_files_exhaust_no_memory(tmp_path: Path) -> None:
    """Read headers of 1 MB of costly JSON, and files that claim to be large, in a process with 200 MB to spare."""
    costly = {
        "lists": b'{"x":[' + b"[]," * 340_000 + b"[]]}",
        "objects": b'{"x":[' + b"{}," * 340_000 + b"{}]}",
        "numbers": b'{"x":[' + b"1," * 500_000 + b"1]}",
        "names": b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b"}",
        "text": b'{"x":"' + "\U0001f600".encode() * 260_000 + b'"}',
        "escapes": b'{"x":"' + rb"\ud83d\ude00" * 87_000 + b'"}',
        "long lengths": metadata(json.dumps({"gist": '{"format":1,"lengths":[' + "1," * 400_000 + "1]}"}))[8:],
    }
    for number, header in enumerate(costly.values()):
        (tmp_path / f"costly-{number}").write_bytes(with_header(header, b""))
    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"hostile-{number}").write_bytes(data)
    code = """
        import pathlib, resource, sys
        from gisting.cache import GistCache
        from gisting.errors import CacheFormatError
        status = pathlib.Path("/proc/self/status").read_text()
        now = 1024 * int(status.split("VmSize:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (now + 200 * 2**20,) * 2)
        refused = 0
        for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            try:
                GistCache.load(path)
            except CacheFormatError:
                refused += 1
        print(refused)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(costly) + len(HOSTILE)


# -- written completely or not at all ----------------------------------------------------------------------------------


def test_write_atomically(tmp_path: Path) -> None:
    for data in (b"one", b""):
        storage.write_atomically(tmp_path / "a", data)
        assert (tmp_path / "a").read_bytes() == data
        assert os.listdir(tmp_path) == ["a"]


def test_write_atomically_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_atomically("a" * 255, b"one")
    assert os.listdir(tmp_path) == ["a" * 255], "the length of the temporary name does not depend on it"


@pytest.mark.parametrize("function", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk-full", "interrupt"])
def test_write_that_fails_leaves_what_was(
    function: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        storage.write_atomically(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@requires_posix
def test_file_then_name_then_directory_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(*paths: Any) -> None:
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    storage.write_atomically(tmp_path / "a", b"new")
    assert calls == ["file", "rename", "directory"]


@requires_posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_is_what_the_umask_allows(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        storage.write_atomically(tmp_path / "a", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


@requires_posix
def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "a").symlink_to("real")
    storage.write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "real").read_bytes() == b"old"
    assert not (tmp_path / "a").is_symlink()
