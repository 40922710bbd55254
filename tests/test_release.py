"""Check the files of a release: citing, contributing, reporting, and building and trying the distributions."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

import pytest
import yaml

import gisting
from gisting._compat import TESTED
from tests.repository import ROOT, fences_in, project, readme_fences
from tests.test_readme import check_readme_command, shell_commands

GITHUB = ROOT / ".github"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# -- citing ------------------------------------------------------------------------------------------------------------


def test_citation_file_and_readme_cite_the_same() -> None:
    cff = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cff.keys(), "what the format requires"
    assert cff["license"] == project()["license"]
    (fence,) = readme_fences("bibtex")
    titles = re.findall(r"^  title +=\s+\{(.*)\},$", fence.text, re.M)
    assert titles == [one["title"] for one in (cff, *cff["references"])]
    papers = [identifier["value"] for one in cff["references"] for identifier in one["identifiers"]]
    assert papers == [f"arXiv:{number}" for number in re.findall(r"eprint +=\s+\{([\d.]+)\}", fence.text)]
    for one in cff["references"]:
        for author in one["authors"]:
            assert f"{author['family-names']}, {author['given-names']}" in fence.text


# -- contributing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [command for fence in fences_in(CONTRIBUTING) for command in shell_commands(fence.text)]
)
def test_contributing_command(command: str) -> None:
    check_readme_command(command)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_forms_have_what_github_requires(path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    assert all(part["attributes"]["label"] for part in form["body"] if part["type"] != "markdown")


# -- releasing ---------------------------------------------------------------------------------------------------------


def test_release_tries_the_wheel_before_it_publishes_without_a_secret() -> None:
    text = (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "secrets." not in text
    jobs = yaml.safe_load(text)["jobs"]
    build, publish = jobs["build"], jobs["publish"]
    assert ".ci/wheel dist" in [step.get("run") for step in build["steps"]]
    (version,) = (step["with"]["python-version"] for step in build["steps"] if "setup-python" in step.get("uses", ""))
    assert version == TESTED["CI"]["python"]
    assert publish["needs"] == "build"
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}, "trusted publishing and nothing else"
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"


def test_ci_tries_the_wheel() -> None:
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    assert ".ci/wheel" in [step.get("run") for step in jobs["wheel"]["steps"]]
    assert os.access(ROOT / ".ci" / "wheel", os.X_OK)


@pytest.mark.parametrize(
    ("ref", "code"),
    [
        (None, 0),
        ("refs/heads/main", 0),
        (f"refs/tags/v{gisting.__version__}", 0),
        ("refs/tags/v0.0.1", 1),
    ],
)
def test_a_tag_of_another_version_is_refused(ref: str | None, code: int) -> None:
    """Run only those lines of the script that tries the wheel."""
    text = (ROOT / ".ci" / "wheel").read_text(encoding="utf-8")
    check = text[text.index("# A tag that is released") : text.index("if [ $# -gt 0 ]")]
    done = subprocess.run(
        ["bash", "-euc", f"version={gisting.__version__}\n{check}"],
        env={**os.environ, "GITHUB_REF": ref or ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert bool(done.stderr) is bool(code)
