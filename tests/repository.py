"""What several tests read of the repository: its files, metadata and fences, and a Python without some packages."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

requires_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs git and a git checkout"
)
requires_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@functools.cache
def settings() -> dict[str, Any]:
    """Read pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    """Read the metadata in pyproject.toml."""
    return settings()["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """Collect the requirements of the core and of some extras by canonical name, following ``gist-tokens[...]``."""
    optional = project()["optional-dependencies"]
    found, todo = {}, [*project()["dependencies"]]
    for extra in extras:
        todo += optional[extra]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == project()["name"]:
            todo += [line for extra in requirement.extras for line in optional[extra]]
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@functools.cache
def tracked_files() -> tuple[str, ...]:
    """List the files that git tracks or would add, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


def package_sources() -> list[str]:
    """List the modules of both packages, relative to the root."""
    paths = [*(ROOT / "gisting").rglob("*.py"), *(ROOT / "kernels" / "gisting_kernels").rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


@dataclass(frozen=True)
class Fence:
    language: str
    line: int  # of the first line inside
    text: str


def fences_in(text: str) -> list[Fence]:
    """Find the fenced blocks of a Markdown text."""
    fence = r"^(?P<indent> *)```(?P<language>[\w+-]*)[^\n`]*\n(?P<text>.*?)^(?P=indent)```"
    return [
        Fence(match["language"], text.count("\n", 0, match.start()) + 2, textwrap.dedent(match["text"]))
        for match in re.finditer(fence, text, re.M | re.S)
    ]


def readme_fences(language: str) -> list[Fence]:
    """Find the fences of README.md in one language, in order."""
    return [fence for fence in fences_in(README.read_text(encoding="utf-8")) if fence.language == language]


def make_dry_run(target: str) -> str:
    # Under `make test` the flags of the outer make would come along.
    env = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    done = subprocess.run(["make", "-n", target], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fresh_python(code: str, *, blocked: tuple[str, ...] = ()) -> str:
    """Run ``code`` in a fresh interpreter where the modules ``blocked`` are not installed, and return what it prints.

    With None in ``sys.modules`` an import fails and ``find_spec`` returns None, as for a missing package. A finder that
    raises would break the ``is_..._available`` checks of transformers.
    """
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n{textwrap.dedent(code)}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
