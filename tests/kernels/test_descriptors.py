"""Which tensors the tensor copy unit can read, and that the forward kernel takes the path it is told to take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")

from gisting import visibility as vis
from gisting_kernels import forward, op
from gisting_kernels.descriptors import can_describe, describe
from gisting_kernels.plan import TileSizes
from tests.kernels.conftest import DEVICE, IS_CUDA, Sizes, differentiate, failures, fused, make, plan_for, tiles

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.zeros(2, 3, 17, 16),
    "heads-after-rows": lambda: torch.zeros(2, 17, 3, 16).transpose(1, 2),
    "part-of-a-projection": lambda: torch.zeros(2, 17, 9 * 16)[..., 48:96].view(2, 17, 3, 16).transpose(1, 2),
    "one-sequence-with-an-odd-stride": lambda: torch.zeros(1, 3, 17, 20).as_strided((1, 3, 17, 20), (7, 340, 20, 1)),
}
OTHERS: dict[str, Callable[[], Tensor]] = {
    "strided-dimension": lambda: torch.zeros(2, 3, 16, 17).transpose(2, 3),
    "rows-of-68-bytes": lambda: torch.zeros(2, 3, 17, 17),
    "odd-address": lambda: torch.zeros(1 + 2 * 3 * 17 * 16)[1:].view(2, 3, 17, 16),
    "expanded": lambda: torch.zeros(2, 1, 17, 16).expand(2, 3, 17, 16),
    "expanded-rows": lambda: torch.zeros(2, 3, 1, 16).expand(2, 3, 17, 16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_can_be_described(layout: str) -> None:
    tensor = LAYOUTS[layout]()
    assert can_describe(tensor)
    descriptor = describe(tensor, 16, 32)
    assert list(descriptor.shape) == list(tensor.shape)
    assert list(descriptor.block_shape) == [1, 1, 16, 32]
    real = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    assert [stride for size, stride in zip(tensor.shape, descriptor.strides, strict=True) if size > 1] == real


@pytest.mark.parametrize("layout", OTHERS)
def test_tensors_that_cannot_be_described(layout: str) -> None:
    assert not can_describe(OTHERS[layout]())
    assert not can_describe(LAYOUTS["contiguous"](), OTHERS[layout]())


def test_alignment_is_counted_in_bytes() -> None:
    """Rows of 12 elements are 48 bytes in float32, and 24 bytes in float16."""
    assert can_describe(torch.zeros(2, 3, 17, 12))
    assert not can_describe(torch.zeros(2, 3, 17, 12, dtype=torch.float16))


class Spy:
    """A kernel that records how it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.seen: list[bool] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.seen.append(kwargs["DESCRIPTORS"])
            assert kwargs["DESCRIPTORS"] == (not isinstance(args[0], Tensor))
            self.kernel[grid](*args, **kwargs)

        return launch


def sizes_with(path: str) -> Sizes:
    sizes = tiles((16, 16))
    return (TileSizes(16, 16, 4, 2, path), *sizes[1:])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("path", "layout", "is_described"),
    [
        ("pointers", "contiguous", False),
        ("descriptors", "contiguous", True),
        ("descriptors", "heads-after-rows", True),
        ("descriptors", "odd-address", False),
        ("descriptors", "strided-dimension", False),
        ("descriptors", "expanded", False),
        pytest.param("pingpong", "contiguous", True, id="pingpong-without-its-card"),
    ],
)
def test_the_path_of_the_plan_is_taken(
    path: str, layout: str, is_described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "pingpong" and IS_CUDA:
        pytest.skip("on a card, another kernel may run")
    spy = Spy(forward.forward_kernel)
    monkeypatch.setattr(forward, "forward_kernel", spy)
    given = make(17, batch=2, heads=3, groups=3)
    # A single tensor decides.
    with DEVICE:
        k = (LAYOUTS | OTHERS)[layout]()
    k.as_strided((k.untyped_storage().nbytes() // k.element_size(),), (1,), 0).normal_()
    plan = plan_for(given, vis.causal(torch.ones(1, 17)))
    plan = type(plan)(**{**vars_of(plan), "sizes": sizes_with(path)})
    expected = fused(given._replace(k=k.clone(memory_format=torch.contiguous_format)), plan)
    assert torch.allclose(fused(given._replace(k=k), plan), expected, atol=1e-5)
    assert spy.seen == [path != "pointers", is_described]


def vars_of(plan: Any) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__ if not name.startswith("_")}


@pytest.mark.parametrize(
    ("version", "is_known"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1234", True), ("3.10.0", False), ("4.0.0", False)],
)
def test_gluon_is_used_in_known_versions_only(version: str, is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", version)
    op._knows_gluon.cache_clear()
    assert op._knows_gluon() == is_known
    op._knows_gluon.cache_clear()


ON_HOPPER = IS_CUDA and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not ON_HOPPER, reason="Gluon kernels run on a card of compute capability 9.0 only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("num_rows", [1, 127, 129, 1001])
def test_the_pingpong_kernel(num_rows: int, size: int, dtype: torch.dtype) -> None:
    """It agrees with the oracle, the gradients from its log-sum-exp too."""
    given = make(num_rows, dtype=dtype, batch=2, heads=4, groups=2, size=size)
    visibility = vis.gist((torch.arange(num_rows) == num_rows // 3).expand(2, -1))
    sizes = (TileSizes(128, 128, 8, 2, "pingpong"), *tiles((64, 64))[1:])
    plan = plan_for(given, visibility, sizes)
    plan = type(plan)(**{**vars_of(plan), "sizes": sizes})
    assert not failures(given, visibility, differentiate(lambda it: fused(it, plan), given))


@pytest.mark.skipif(not ON_HOPPER, reason="Gluon kernels run on a card of compute capability 9.0 only")
@pytest.mark.parametrize("case", ["gist", "padding", "more-keys", "one-mask-for-all"])
@pytest.mark.parametrize("size", [64, 128])
def test_programs_that_take_several_tiles(size: int, case: str) -> None:
    """There are 1,024 tiles, several for each processor."""
    num_rows = 1001
    num_keys = num_rows + 300 if case == "more-keys" else num_rows
    given = make(num_rows, num_keys, torch.bfloat16, batch=4, heads=32, groups=8, size=size)
    index = torch.arange(num_keys).expand(1 if case == "one-mask-for-all" else 4, -1)
    visibility = vis.gist(index == num_keys // 3, index >= 300 if case == "padding" else None)
    sizes = (TileSizes(128, 128, 8, 2, "pingpong"), *tiles((64, 64))[1:])
    plan = plan_for(given, visibility, sizes)
    plan = type(plan)(**{**vars_of(plan), "sizes": sizes})
    assert not failures(given, visibility, differentiate(lambda it: fused(it, plan), given))
