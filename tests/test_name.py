"""The distribution is gist-tokens, because `gisting` is an unrelated package; the import name is gisting."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import ROOT, project, requires_git, tracked_files

OTHER = "gisting"
# An argument of pip install: an option or a requirement, perhaps quoted.
WORD = r"['\"]?(?:-{1,2}[\w-]+|[A-Za-z][\w.-]*)(?:\\?\[[\w,.\\-]*\])?(?:[=<>!~][^\s'\"]*)?['\"]?"


def wrong_names(text: str) -> list[str]:
    """Find where a text says to install the other package, or names one of our extras as an extra of that package."""
    # A message may be spread over several string literals.
    text = re.sub(r"\"\s*\n\s*[rf]?\"", "", text)
    installs = [
        match.group()
        for match in re.finditer(rf"\bpip install((?: +{WORD})+)", text)
        if any(re.split(r"\\?\[|[=<>!~]", word.strip("'\"."))[0] == OTHER for word in match[1].split())
    ]
    extras = "|".join(project()["optional-dependencies"])
    return installs + re.findall(rf"\b{OTHER}\\?\[(?:{extras})\b", text)


@requires_git
def test_every_hint_names_our_distribution() -> None:
    texts = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in tracked_files()
        if Path(name).suffix in {".py", ".md", ".ipynb", ".yml", ".yaml", ".toml", ".txt", ".cff", ""}
    }
    assert {name: found for name, text in texts.items() if (found := wrong_names(text))} == {}


@pytest.mark.parametrize(
    ("text", "is_fault"),
    [
        (f"pip install {OTHER}", True),
        (f"needs vLLM; run: pip install '{OTHER}[vllm]' (without a GPU)", True),
        (f"pip install -U {OTHER}.", True),
        (f"pip install -c constraints.txt openai '{OTHER}>=0.2'", True),
        (f'"upgrade gisting: pip install -U "\n            "{OTHER}"', True),
        (f'"upgrade gisting: pip "\n    f"install -U {OTHER}"', True),
        (rf"match=r'pip install {OTHER}\[eval\]'", True),
        (f"needs matplotlib ({OTHER}[eval])", True),
        ("pip install -U gist-tokens", False),
        ("pip install 'gist-tokens[eval]', and gisting draws", False),
        (f"pip uninstall -y {OTHER} && pip install gist-tokens", False),
        (f"pip install trl\n{OTHER} train", False),
        (f"{OTHER}[0]", False),
    ],
)
def test_wrong_names(text: str, is_fault: bool) -> None:
    assert bool(wrong_names(text)) is is_fault


# -- files of the other package in place of ours -----------------------------------------------------------------------


def shadowed(folder: Path, init: str | None) -> Path:
    """Make a folder to import gisting from, with our files but without our ``__init__.py``.

    Args:
        folder: where to make it.
        init: the other package's ``__init__.py``; None if it was removed.
    """
    package = folder / "gisting"
    package.mkdir()
    for path in (ROOT / "gisting").iterdir():
        if path.name not in {"__init__.py", "__pycache__"}:
            (package / path.name).symlink_to(path)
    if init is not None:
        (package / "__init__.py").write_text(init, encoding="utf-8")
    return folder


@pytest.mark.parametrize("init", ["main = None\n", None], ids=["replaced", "deleted"])
@pytest.mark.parametrize(
    "words",
    [
        ("-m", "gisting", "--version"),
        ("-c", "from gisting.cli import main"),  # what the installed command runs
        pytest.param(("-c", "import gisting.visibility"), marks=pytest.mark.slow),
        pytest.param(("-c", "from gisting.models import load"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_files_of_the_other_package_give_one_clear_error(
    tmp_path: Path, words: tuple[str, ...], init: str | None
) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=shadowed(tmp_path, init), env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: gisting/__init__.py does not belong to gist-tokens (found: ")
    assert last.endswith("pip uninstall -y gisting && pip install --force-reinstall --no-deps gist-tokens")
    assert ("(found: none)" in last) is (init is None)
