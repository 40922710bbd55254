"""Test the layout for the Hugging Face ``kernels`` project: complete, self-contained, loadable next to the package."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")

import build_hub
import gisting_kernels

ROOT = Path(__file__).resolve().parents[2]


def causal_difference(module) -> float:
    q = torch.randn(1, 2, 21, 16)
    first, end = torch.arange(21)[None], torch.full((1, 21), 21)
    out = module.interval_attention(q, q, q, module.plan_tiles(first, end, q))
    return (out - torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)).abs().max().item()


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return build_hub.build(tmp_path / "hub", backends=["cuda", "cpu"])


def test_layout(hub: Path) -> None:
    written = {str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()}
    names = {path.name for path in (ROOT / "kernels" / "gisting_kernels").iterdir() if path.suffix in (".py", ".json")}
    assert {"build.toml", "CARD.md"} <= written
    assert {f"torch-ext/gisting_kernels/{name}" for name in names} <= written
    assert {f"build/torch-cuda/{name}" for name in (*names, "metadata.json")} <= written
    general = tomllib.loads((hub / "build.toml").read_text())["general"]
    metadata = json.loads((hub / "build" / "torch-cuda" / "metadata.json").read_text())
    assert (metadata["name"], metadata["version"], metadata["license"]) == (
        general["name"],
        general["version"],
        "Apache-2.0",
    )
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])


def test_sources_import_nothing_absolute_of_ours() -> None:
    for path in (ROOT / "kernels" / "gisting_kernels").glob("*.py"):
        assert not re.search(r"^\s*(?:from|import) gisting", path.read_text(), flags=re.MULTILINE), path


@pytest.mark.skipif(not gisting_kernels.is_interpreting(), reason="the cpu variant only runs under the interpreter")
def test_loads_next_to_the_package_as_the_hub_does(hub: Path) -> None:
    variant = hub / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        assert module.op.ops is not gisting_kernels.op.ops
        assert causal_difference(module) < 1e-5
        assert causal_difference(gisting_kernels) < 1e-5
    finally:
        for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[loaded]


def test_loads_through_kernels(hub: Path) -> None:
    if importlib.util.find_spec("kernels.load") is None:
        pytest.skip("the package `kernels` is not installed")
    code = (
        "import pathlib, sys, kernels; "
        "module = kernels.get_local_kernel(pathlib.Path(sys.argv[1])); "
        "print(sorted(module.__all__))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(hub)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=hub,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(sorted(gisting_kernels.__all__))


def test_other_sources_get_another_namespace(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "kernels"
    (copy / "gisting_kernels").mkdir(parents=True)
    for path in (ROOT / "kernels" / "gisting_kernels").iterdir():
        if path.is_file():
            (copy / "gisting_kernels" / path.name).write_bytes(path.read_bytes())
    (copy / "build.toml").write_bytes((ROOT / "kernels" / "build.toml").read_bytes())
    with (copy / "gisting_kernels" / "plan.py").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(build_hub, "HERE", copy)
    other = build_hub.build(tmp_path / "other", backends=["cpu"])
    ids = {json.loads((at / "build" / "torch-cpu" / "metadata.json").read_text())["id"] for at in (hub, other)}
    assert len(ids) == 2


def test_refuses_a_folder_that_is_not_empty(hub: Path) -> None:
    with pytest.raises(FileExistsError, match=r"is not empty; name a new folder"):
        build_hub.build(hub)
