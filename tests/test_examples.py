"""Every example runs as its docstring says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_example(name: str, *arguments: str | Path, cwd: Path) -> str:
    found = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_example_is_run() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f'"{path.name}"' in source


def test_compress_and_generate(demo_checkpoint: Path, tmp_path: Path) -> None:
    out = run_example("01_compress_and_generate.py", demo_checkpoint, cwd=tmp_path).splitlines()
    assert out[0].startswith("GistCache(3 prompts, k=[2, 2, 2]")
    # Stock generate says what gisting.generate said for the same prompt and input.
    assert eval(out[1])[0].startswith(out[3].strip())


@pytest.mark.timeout(300)
def test_finetune_a_pretrained_checkpoint(shared: Path, tmp_path: Path) -> None:
    """A checkpoint that nobody here trained learns to gist, and its ordinary text is untouched by patching."""
    checkpoint = shared / "models" / "stories260K"
    out = run_example(
        "02_finetune_a_checkpoint.py", checkpoint, "--steps", "300", "--output", tmp_path / "out", cwd=tmp_path
    )
    assert "ordinary text is as before patch: True" in out
    share = {
        name: float(value) for name, value in re.findall(r"^(gist|positive|negative)\s+([\d.]+) % exact", out, re.M)
    }
    assert share["gist"] >= 90
    assert share["positive"] >= 90
    assert share["negative"] <= 50
    assert "What color is it?  ->  green" in out
    assert "Tell me where.  ->  garden" in out


def test_gist_only_lora(shared: Path, tmp_path: Path) -> None:
    """Two small trainings show the way of an adapter from file to base model, and its promise about ordinary text."""
    checkpoint = shared / "models" / "stories260K"
    out = run_example("03_gist_only_lora.py", checkpoint, "--steps", "20", "--output", tmp_path / "out", cwd=tmp_path)
    assert "ordinary text has the bits of the base model: True" in out
    assert len(re.findall(r"^\w+ saw a \w+\.  Say the \w+\.  ->  ", out, re.M)) == 4
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_trl_trains_with_the_collator_alone(demo_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    out = run_example("04_trl_sft_trainer.py", demo_checkpoint, cwd=tmp_path)
    first, last = map(float, re.findall(r"^loss ([\d.]+) -> ([\d.]+)$", out, re.M)[0])
    assert last < first / 2
