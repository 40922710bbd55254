"""Compare the public API with tests/golden/api.txt."""

from __future__ import annotations

import ast
import difflib
import re
import types
from pathlib import Path

import pytest

from tests import api
from tests.repository import fences_in

ROOT = Path(__file__).resolve().parents[1]


def changes(promised: list[str], found: list[str]) -> list[str]:
    lines = difflib.unified_diff(promised, found, "tests/golden/api.txt", "the API as it is", lineterm="", n=0)
    return [line for line in lines if not line.startswith("@@")]


def test_the_api_is_the_promised_one() -> None:
    diff = changes(api.GOLDEN.read_text(encoding="utf-8").splitlines(), api.api())
    assert not diff, "\n".join(
        [
            "the public API changed. If that is intended, run python -m tests.api --write and add it to CHANGELOG.md",
            *diff,
        ]
    )


def planted(body: str) -> list[str]:
    module = types.ModuleType("planted")
    exec(body, module.__dict__)
    return sorted(api.lines_of(module, {}))


BEFORE = """
__all__ = ["LIMIT", "Kind", "act"]
LIMIT = 3
def act(a: int, *, b: str = "x") -> None: ...
class Kind:
    def __init__(self, size: int) -> None: ...
    def run(self) -> int: ...
    @property
    def num(self) -> int: ...
    def _inside(self) -> None: ...
"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('b: str = "x"', 'b: str = "y"', "+planted.act(a: int, *, b: str = 'y') -> None"),
        ("a: int", "a: float", "+planted.act(a: float, *, b: str = 'x') -> None"),
        (', "act"', "", "-planted.act(a: int, *, b: str = 'x') -> None"),
        ("size: int", "size: int, more: int", "+planted.Kind(size: int, more: int) -> None < object"),
        ("def run(self)", "def run(self, often)", "+planted.Kind.run(self, often) -> int"),
        ("def num(self)", "def number(self)", "-planted.Kind.num -> int"),
        ("LIMIT = 3", "LIMIT = 3.0", "+planted.LIMIT: float"),
    ],
)
def test_a_change_shows(old: str, new: str, line: str) -> None:
    assert BEFORE.count(old) == 1
    assert line in [
        re.sub(r"<class '(\w+)'>", r"\1", found)
        for found in changes(planted(BEFORE), planted(BEFORE.replace(old, new)))
    ]


def test_what_is_private_may_change() -> None:
    assert planted(BEFORE) == planted(BEFORE.replace("_inside(self)", "_inside(self, more)"))


def test_what_the_reference_shows_is_promised() -> None:
    """Except for vLLM's modules, which need vLLM to be imported."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    shown = {name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE)}
    assert len(shown) > 50
    assert {"gisting.serving.vllm"} == {
        name for name in shown if name not in api.MODULES and name.rpartition(".")[0] not in api.MODULES
    }


def test_what_the_pages_import_is_promised() -> None:
    """README, docs and examples only use public names, except for modules that need vLLM."""
    promised = {
        re.split(r"[(:<\s]", line, maxsplit=1)[0] for line in api.GOLDEN.read_text(encoding="utf-8").splitlines()
    }
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    sources = [
        fence.text
        for page in pages
        for fence in fences_in(page.read_text(encoding="utf-8"))
        if fence.language == "python"
    ]
    sources += [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    used = {
        f"{node.module}.{alias.name}"
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gisting")
        for alias in node.names
    }
    assert len(used) > 20
    used = {name for name in used if not name.startswith(("gisting.serving.vllm", "gisting.measure"))}
    assert used <= promised, f"not in tests/golden/api.txt: {sorted(used - promised)}"
