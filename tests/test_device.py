"""Test assertions on a device: their messages fit into CUDA's buffer, and all of them go through one function.

A CPU does not check the length of a message.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gisting.device import MAX_MESSAGE_BYTES, assert_on_device
from gisting.errors import GistError
from gisting.models import patch as patch_module
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("gisting/**/*.py"), *ROOT.glob("kernels/gisting_kernels/**/*.py")])


def message_faults(source: str, module: object) -> Iterator[str]:
    """Find faults of the assertions on a device in ``source``, the text of ``module``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name) and "_assert_async" in (
            node.attr if isinstance(node, ast.Attribute) else node.id
        ):
            yield f"line {node.lineno}: an assertion that does not go through assert_on_device"
        if not isinstance(node, ast.Call) or "assert_on_device" not in ast.unparse(node.func):
            continue
        message = getattr(module, ast.unparse(node.args[1]), None) if len(node.args) == 2 else None
        if not isinstance(message, str):
            yield f"line {node.lineno}: the message must be a constant of the module"
        elif len(message.encode()) > 254:
            yield f"line {node.lineno}: a message of {len(message.encode())} bytes"


def test_messages_fit() -> None:
    faults, num_modules = [], 0
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.")
        if name == "gisting.device":
            assert source.count("torch._assert_async(") == 1
        elif "assert_on_device" in source or "_assert_async" in source:
            num_modules += 1
            faults += [
                f"{path.relative_to(ROOT)}: {fault}" for fault in message_faults(source, importlib.import_module(name))
            ]
    assert num_modules, "there is no assertion left to check"
    assert faults == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("torch._assert_async(a, SHORT)", "does not go through"),
        ("torch.ops.aten._assert_async.msg(a, SHORT)", "does not go through"),
        ("from torch import _assert_async as check\n_assert_async(a)", "does not go through"),
        ("assert_on_device(a, f'{b}')", "must be a constant"),
        ("assert_on_device(a, message=SHORT)", "must be a constant"),
        ("device.assert_on_device(a, LONG)", "a message of 255 bytes"),
    ],
)
def test_a_planted_fault_is_found(source: str, fault: str) -> None:
    class Module:
        SHORT = "x" * 254
        LONG = "x" * 255

    assert fault in "\n".join(message_faults(source, Module))
    assert list(message_faults("assert_on_device(a, SHORT)", Module)) == []


def test_the_limit_is_that_of_cuda() -> None:
    """Messages of 254 bytes pass, longer ones do not."""
    assert_on_device(torch.tensor(True), "x" * MAX_MESSAGE_BYTES)
    for message in ("x" * 255, "é" * 128):
        with pytest.raises(GistError, match=r"^message must be at most 254 bytes, .* got 25[56]; shorten it"):
            assert_on_device(torch.tensor(True), message)


def test_a_false_condition_fails() -> None:
    with pytest.raises(RuntimeError, match="must never happen"):
        assert_on_device(torch.tensor(False), "must never happen")


def test_compiles() -> None:
    def double(x: Tensor) -> Tensor:
        assert_on_device((x > 0).all(), "x must be positive")
        return 2 * x

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="x must be positive"):
        compiled(torch.zeros(3))


def step(model: torch.nn.Module, token: int) -> None:
    """Run the guard of a decoding step on the meta device, which is not the CPU and holds no numbers."""
    ids = torch.full((2, 1), token, device="meta")
    patch_module._guard(model.base_model, (), {"input_ids": ids}, gist_token_id=len(tiny.VOCABULARY))  # type: ignore[arg-type]


def test_the_message_of_the_guard_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny.patched("llama")
    step(model, 5)
    monkeypatch.setattr(patch_module, "_UNMASKED", "x" * 255)
    with pytest.raises(GistError, match="message must be at most 254 bytes"):
        step(model, 5)
