"""What `python -m build` gives: a source distribution and, from that, a wheel, with every file that is needed and no
other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import NamedTuple

import pytest

import gisting
from tests.test_repository import ROOT, setup_arguments

NEEDED = ("MANIFEST.in", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Built(NamedTuple):
    """Names in the two archives, as they are there; the sources that they were made from; the wheel."""

    sdist: set[str]
    wheel: set[str]
    sources: set[str]
    file: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("build") / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("gisting", "kernels", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in NEEDED:
        shutil.copy(ROOT / file, tree)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree.parent / "dist"), str(tree)],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (tree.parent / "dist").glob("*.tar.gz")
    (wheel,) = (tree.parent / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(tree).as_posix() for path in (tree / "gisting").rglob("*") if path.is_file()}
    package = tree / "kernels" / "gisting_kernels"
    sources |= {path.relative_to(tree).as_posix() for path in package.rglob("*") if path.is_file()}
    return Built(in_sdist, in_wheel, sources, wheel)


def test_the_wheel_holds_every_file(built: Built) -> None:
    """An editable install reads the folder itself, so that a data file which the wheel lacks is not missed there."""
    held = {name for name in built.wheel if ".dist-info/" not in name}
    assert held == {name.removeprefix("kernels/") for name in built.sources}
    assert {"gisting/py.typed", "gisting_kernels/configs.json"} <= held


def test_the_source_distribution_holds_what_the_wheel_is_made_from(built: Built) -> None:
    held = {name for name in built.sdist if not name.startswith("gisting.egg-info/")}
    assert held == {*built.sources, *NEEDED, "PKG-INFO", "setup.cfg"}


def test_the_wheel_says_what_it_is(built: Built) -> None:
    folder = f"gisting-{gisting.__version__}.dist-info"
    with zipfile.ZipFile(built.file) as archive:
        about = message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "gisting = gisting.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert (about["Name"], about["Version"], about["License-Expression"]) == (
        "gisting",
        gisting.__version__,
        "Apache-2.0",
    )
    assert about["Requires-Python"] == ">=3.11"
    assert set(about.get_all("Provides-Extra", [])) == set(setup_arguments()["extras_require"])
    assert "Typing :: Typed" in about.get_all("Classifier", [])
    assert about.get_payload().startswith("# gisting"), "the page on a package index is README.md"
