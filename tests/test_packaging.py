"""Check that `python -m build` makes a source distribution and a wheel with the required files and no others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.specifiers import SpecifierSet

import gisting
from gisting import _compat, doctor
from tests.repository import ROOT, constraint_lines, project, requirements

NEEDED = ("MANIFEST.in", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Built(NamedTuple):
    """The names in both archives, the sources that they were made from, and the path of the wheel."""

    sdist: set[str]
    wheel: set[str]
    sources: set[str]
    file: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("build") / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("gisting", "kernels", "tests", "benchmarks"):
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
    """With an editable install nothing fails if the wheel lacks a data file, because the folder itself is read."""
    held = {name for name in built.wheel if ".dist-info/" not in name}
    assert held == {name.removeprefix("kernels/") for name in built.sources}
    assert {"gisting/py.typed", "gisting_kernels/configs.json"} <= held
    assert {name.partition("/")[0] for name in held} == {"gisting", "gisting_kernels"}, "and nothing else"


def test_the_source_distribution_holds_what_the_wheel_is_made_from(built: Built) -> None:
    held = {name for name in built.sdist if not name.startswith("gist_tokens.egg-info/")}
    assert held == {*built.sources, *NEEDED, "PKG-INFO", "setup.cfg"}


def test_the_wheel_says_what_it_is(built: Built) -> None:
    assert built.file.name == f"gist_tokens-{gisting.__version__}-py3-none-any.whl"
    folder = f"gist_tokens-{gisting.__version__}.dist-info"
    with zipfile.ZipFile(built.file) as archive:
        about = message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "gisting = gisting.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert (about["Name"], about["Version"], about["License-Expression"]) == (
        "gist-tokens",
        gisting.__version__,
        "Apache-2.0",
    )
    assert about["Requires-Python"] == ">=3.11"
    assert set(about.get_all("Provides-Extra", [])) == set(project()["optional-dependencies"])
    assert "Typing :: Typed" in about.get_all("Classifier", [])
    assert about.get_payload().startswith("# gisting"), "the page on a package index is README.md"


# -- floors and tested versions ----------------------------------------------------------------------------------------

# Every place that names a lowest supported version. The group is the version.
FLOORS_TOLD = [
    ("README.md", "python", r"With Python ([\d.]+) or later"),
    ("README.md", "python", r"^\| versions \|.*Python ([\d.]+)"),
    ("README.md", "torch", r"^\| versions \|.*torch ([\d.]+)"),
    ("README.md", "transformers", r"^\| versions \|.*transformers ([\d.]+)"),
    ("README.md", "triton", r"^\| versions \|.*triton ([\d.]+)"),
    ("CONTRIBUTING.md", "python", r"With Python ([\d.]+) or later"),
    ("docs/index.md", "python", r"with Python ([\d.]+) or later"),
    ("docs/faq.md", "transformers", r"\*\*Which versions of transformers\?\*\* ([\d.]+) and later"),
    ("docs/design.md", "python", r"Floors: Python ([\d.]+),"),
    ("docs/design.md", "torch", r"Floors: .*torch ([\d.]+),"),
    ("docs/design.md", "transformers", r"Floors: .*transformers ([\d.]+);"),
    ("docs/design.md", "transformers", r"transformers \(>= ([\d.]+):"),
    ("docs/how_to_gpu.md", "triton", r"triton ([\d.]+) or later"),
    ("Makefile", "python", r"gisting needs Python ([\d.]+) or later"),
    ("pyproject.toml", "python", r'^pythonVersion = "([\d.]+)"'),
]


def floors() -> dict[str, str]:
    """Read the lowest supported version of Python and of each package from pyproject.toml."""
    specifiers = {name: one.specifier for name, one in requirements(*project()["optional-dependencies"]).items()}
    specifiers["python"] = SpecifierSet(project()["requires-python"])
    return {name: one.version for name, found in specifiers.items() for one in found if one.operator == ">="}


def floor_faults(texts: Mapping[str, str]) -> list[str]:
    """Find texts that name another lowest version than the metadata, or no version at all."""
    faults = []
    for file, package, pattern in FLOORS_TOLD:
        told = re.findall(pattern, texts[file], re.M) or ["nothing"]
        faults += [
            f"{file} says {one} of {package}, the metadata {floors()[package]}"
            for one in told
            if one != floors()[package]
        ]
    return faults


def told() -> dict[str, str]:
    return {file: (ROOT / file).read_text(encoding="utf-8") for file, _, _ in FLOORS_TOLD}


def test_every_place_names_the_floors_of_the_metadata() -> None:
    assert floor_faults(told()) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (
            "Floors: Python 3.11, torch 2.11",
            "Floors: Python 3.11, torch 2.10",
            "docs/design.md says 2.10 of torch, the",
        ),
        (
            "transformers 5.17;",
            "transformers, see there;",
            "docs/design.md says nothing of transformers, the metadata 5.17",
        ),
    ],
)
def test_another_floor_is_found(before: str, after: str, fault: str) -> None:
    texts = told()
    assert before in texts["docs/design.md"]
    ((found),) = floor_faults({**texts, "docs/design.md": texts["docs/design.md"].replace(before, after)})
    assert found.startswith(fault)


def test_the_code_reads_the_floors_of_the_metadata() -> None:
    """At run time they come from the metadata of the installed package and from one constant."""
    assert ".".join(map(str, _compat.MIN_TRANSFORMERS)) == floors()["transformers"]
    read = dict(one for extra in ("", *doctor.EXTRAS) for one in _compat.requirements("gist-tokens", extra))
    for name in ("torch", "transformers", "triton", "peft"):
        assert read[name] == f">={floors()[name]}", "pyproject.toml has changed since: pip install -e ."


def test_the_tested_versions_of_ci_are_those_that_it_installs() -> None:
    pins = dict(line.split("==") for line in constraint_lines())
    tested = dict(_compat.TESTED["CI"])
    assert tested.pop("python") == floors()["python"]
    assert tested == {name: pins[name] for name in tested}


@pytest.mark.parametrize("place", _compat.TESTED)
def test_no_tested_version_is_below_its_floor(place: str) -> None:
    for package, version in _compat.TESTED[place].items():
        assert SpecifierSet(f">={floors()[package]}").contains(version), package
