"""Rules of the repository that no other tool checks; each check is also shown to catch a planted fault.

`make lint` runs the tools: import-linter checks the layers, deptry the declared dependencies, ruff the docstrings and
where transformers and vLLM may be imported. README.md is checked by tests/test_readme.py.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.repository import (
    ROOT,
    constraint_lines,
    fresh_python,
    make_dry_run,
    package_sources,
    requirements,
    requires_git,
    requires_make,
    settings,
    tracked_files,
)

# Modules of optional packages; what needs one imports it where it is used.
OPTIONAL = (
    *("triton", "vllm", "accelerate", "datasets", "peft", "bm25s", "llmlingua"),
    *("rouge_score", "nltk", "sacrebleu", "matplotlib", "sentencepiece", "google.protobuf"),
)


def layers() -> dict[str, int]:
    """Read the level of each module and folder of the package from pyproject.toml, 0 for the lowest."""
    contracts = settings()["tool"]["importlinter"]["contracts"]
    (lines,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {name: level for level, line in enumerate(reversed(lines)) for name in line.split(" | ")}


def design_faults(text: str, modules: list[str]) -> list[str]:
    """Compare the tree that docs/design.md draws with the levels and with the modules, such as ``models/patch.py``."""
    drawn = text.partition("\ngisting/\n")[2].partition("\nbenchmarks/ ")[0]
    levels = {name: int(level) for name, level in re.findall(r"^  (\w+)(?:\.py|/)? +\[(\d+)\]", drawn, re.M)}
    wanted = {name: level for name, level in layers().items() if name != "_version"}
    faults = [
        f"{name}: level {wanted.get(name)} in pyproject.toml, {levels.get(name)} in docs/design.md"
        for name in sorted(wanted.keys() | levels.keys())
        if wanted.get(name) != levels.get(name)
    ]
    named = {*re.findall(r"\w+\.py\b", drawn), "__init__.py", "_version.py"}
    return faults + [f"{name} is not in docs/design.md" for name in modules if name.rpartition("/")[2] not in named]


def test_the_page_on_the_design_draws_the_tree() -> None:
    modules = [name.removeprefix("gisting/") for name in package_sources() if name.startswith("gisting/")]
    assert design_faults((ROOT / "docs" / "design.md").read_text(encoding="utf-8"), modules) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("errors.py        [0]", "errors.py        [1]", "errors: level 0 in pyproject.toml, 1 in docs/design.md"),
        ("  card.py ", "  cards.py ", "card: level 2 in pyproject.toml, None in docs/design.md"),
        ("objects.py", "files.py", "store/objects.py is not in docs/design.md"),
    ],
)
def test_the_page_on_the_design_catches_a_planted_fault(before: str, after: str, fault: str) -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert before in text
    assert fault in design_faults(text.replace(before, after), ["store/objects.py"])


def test_a_module_over_600_lines_says_why() -> None:
    """A comment ``# Over 600 lines because ...`` gives the reason."""
    paths = [*package_sources(), *(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.py"))]
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    long = {path: text.count("\n") for path, text in texts.items() if text.count("\n") > 600}
    assert {path: lines for path, lines in long.items() if "# Over 600 lines because " not in texts[path]} == {}


def test_import_is_cold() -> None:
    heavy = {"transformers", *OPTIONAL}
    assert fresh_python(f"import gisting\nprint(*sorted({heavy!r} & set(sys.modules)))") == ""


def test_core_names_need_neither_transformers_nor_an_extra() -> None:
    code = "import gisting\ngisting.Visibility, gisting.interval_attention\nprint('fine')"
    assert fresh_python(code, blocked=("transformers", *OPTIONAL)) == "fine"


def test_every_module_imports_without_the_extras() -> None:
    """But for serving/: vLLM loads it, so it may count on vLLM."""
    names = [
        path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in package_sources()
        if path.startswith("gisting/") and not path.startswith("gisting/serving/") and "__main__" not in path
    ]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\nprint('fine')"
    assert fresh_python(code, blocked=OPTIONAL) == "fine"


def test_blocking_blocks() -> None:
    code = """
        import importlib.util
        print(importlib.util.find_spec("matplotlib"))
        try:
            import matplotlib.pyplot
        except ImportError:
            print("blocked")
    """
    assert fresh_python(code, blocked=("matplotlib",)) == "None\nblocked"


@requires_make
@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("demo", "OMP_PROC_BIND=true .venv/bin/gisting demo"),
        ("test", '.venv/bin/python -m pytest -n 2 --dist worksteal -m "not slow"'),
        ("test-all", ".venv/bin/python -m pytest -n 2 --dist worksteal"),
        ("lint", ".venv/bin/lint-imports"),
        ("types", ".venv/bin/pyright"),
        ("check", ".venv/bin/python -m pytest"),
        ("bench", ".venv/bin/python -m benchmarks"),
    ],
)
def test_make_target(target: str, runs: str) -> None:
    assert runs in make_dry_run(target)


@requires_make
def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.2 && exit\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"gisting needs Python 3.11 or later, {old} is Python 3.10.2; run: make demo PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("path", ["Makefile", ".ci/run"])
def test_installs_through_the_constraints(path: str) -> None:
    assert "pip install -c constraints.txt -e '.[dev]'" in (ROOT / path).read_text(encoding="utf-8")


def test_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("background", "status"), [("", 3), ("true & vllm=$!; wait $!;", 0), ("sleep 60 & vllm=$!;", 3)]
)
def test_ci_ends_with_the_status_of_its_steps_and_leaves_nothing(tmp_path: Path, background: str, status: int) -> None:
    """Whether the tests in the background have not begun, have ended, or still run."""
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith(("set ", "scratch=", "trap "))]
    assert len(head) == 3
    done = subprocess.run(
        ["bash", "-c", "\n".join([*head, f"{background} exit {status}"])],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=30,
        check=False,
    )
    assert done.returncode == status
    assert not list(tmp_path.iterdir())


def test_constraints_pin_every_direct_dependency_of_ci_above_its_floor() -> None:
    assert [line for line in constraint_lines() if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    pins = dict(line.split("==") for line in constraint_lines())
    faults = [
        f"{name}: pyproject.toml asks for {requirement.specifier}, constraints.txt pins {pins.get(name)}"
        for name, requirement in requirements("dev").items()
        if name not in pins or not requirement.specifier.contains(pins[name])
    ]
    assert faults == []


@functools.cache
def setup_arguments() -> dict[str, Any]:
    """Catch what setup.py passes to setuptools."""
    import setuptools

    caught: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return caught


def test_package_holds_both_source_roots_and_nothing_else() -> None:
    packages = setup_arguments()["packages"]
    assert {name.partition(".")[0] for name in packages} == {"gisting", "gisting_kernels"}
    assert (ROOT / "gisting" / "py.typed").is_file()


# Published methods, and where a module that is about one says they were published.
PUBLISHED = {
    r"\bLoRA\b": r"arXiv 2106\.09685",
    r"\bPromptIntern\b": r"arXiv 2407\.02211",
    r"\bLLMLingua-2\b": r"arXiv 2403\.12968",
    r"\b[Ss]elf-information\b": r"arXiv 2310\.06201",
    r"\b[Dd]istillation\b": r"arXiv 2112\.00861",
    r"\b[Rr]elative (?:position )?bias\b": r"arXiv 1910\.10683",
    r"\bROUGE\b": r"\bLin\b.*2004",
    r"\bBLEU\b": r"\bPapineni\b.*2002",
    r"\bBM25\b": r"\bRobertson\b",
    r"\b[Bb]ootstrap\b": r"\bEfron\b",
}
SAME_AS_ANOTHER = r"\bas (?:for |in )?(?:``|:\w+:`)"
SHAPE = re.compile(rf"``\([^`]*\)``|\bshape|\bscalar\b|{SAME_AS_ANOTHER}")
DTYPE = re.compile(rf"\b(?:int|bool|integer|floating|dtypes?|(?:u?int|b?float)\d+)\b|{SAME_AS_ANOTHER}")


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Find the public functions and methods of a module; compiled kernels are left out."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.bases and not node.name.startswith("_"):
            yield from public_functions(ast.Module(node.body, []))
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            yield node


def docstring_faults(source: str) -> list[str]:
    """Find public functions with tensors whose docstring gives no shape or no dtype, and methods without a source."""
    tree = ast.parse(source)
    faults = []
    for node in public_functions(tree):
        annotations = [item.annotation for item in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
        if not any(re.match(r"(torch\.)?Tensor\b", ast.unparse(item)) for item in annotations if item is not None):
            continue
        doc = ast.get_docstring(node) or ""
        rules = {"shape": SHAPE, "dtype": DTYPE}
        faults += [f"{node.name}: no {what}" for what, rule in rules.items() if not rule.search(doc)]
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    text = "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))
    about = re.sub(r":\w+:`[^`]*`", "", ast.get_docstring(tree) or "")
    return faults + [
        f"names {match.group()}, and no docstring says where it was published ({published})"
        for method, published in PUBLISHED.items()
        if (match := re.search(method, about)) and not re.search(published, text)
    ]


def test_docstrings_give_shapes_dtypes_and_sources() -> None:
    paths = [path for path in package_sources() if not path.startswith("gisting/cli/")]
    found = [f"{path}: {fault}" for path in paths for fault in docstring_faults((ROOT / path).read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    ("doc", "faults"),
    [
        ("The mask, bool.", ["f: no shape"]),
        ("The mask ``(B, K)``.", ["f: no dtype"]),
        ("The mask, bool ``(B, K)``.", []),
        ("The mask, a tensor as in :func:`g`.", []),
    ],
)
def test_docstring_faults_are_found(doc: str, faults: list[str]) -> None:
    source = f"{{}}def f(size: int) -> Tensor:\n    '''{doc}'''\n"
    assert docstring_faults(source.format("")) == faults
    told = docstring_faults(source.format("'''Scores by BLEU.'''\n"))
    assert [fault.partition(" (")[0] for fault in told] == [
        *faults,
        "names BLEU, and no docstring says where it was published",
    ]


def test_every_module_says_its_place_in_the_flow() -> None:
    """But for the command line, which calls everything, and private modules."""
    silent = [
        path
        for path in package_sources()
        if not path.startswith("gisting/cli/")
        and not path.rpartition("/")[2].startswith("_")
        and "Place in the flow: " not in (ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "")
    ]
    assert silent == []


# Each pattern has a character in brackets so that this file does not match it. {pattern: the one file that may hold it}
WORKPLACE = {r"(?<![\w.])/wor[k]/": None, r"\.\./share[d]\b": "tests/conftest.py", r"/opt/(wheel[s]|pyp[i])": None}


def workplace_words(name: str, content: bytes) -> list[str]:
    """Find paths of the machine that a text file was written on."""
    if b"\0" in content:
        return []
    text = content.decode("utf-8", errors="replace")
    patterns = [pattern for pattern, allowed in WORKPLACE.items() if name != allowed]
    return [f"{name}: {found.group()}" for pattern in patterns for found in re.finditer(pattern, text)]


@requires_git
def test_tracked_files_are_small_name_no_workplace_and_are_not_generated() -> None:
    generated = re.compile(r"(^|/)(\.venv|__pycache__|outputs|runs|\w+\.egg-info)/")
    assert [name for name in tracked_files() if generated.search(name)] == []
    contents = {name: (ROOT / name).read_bytes() for name in tracked_files()}
    sizes = {name: len(content) for name, content in contents.items()}
    most = {name: 11_000_000 if name.startswith("gisting/adapters/") else 2_000_000 for name in sizes}
    assert {name: size for name, size in sizes.items() if size > most[name]} == {}
    assert [fault for name, content in contents.items() for fault in workplace_words(name, content)] == []


@pytest.mark.parametrize(
    ("name", "text", "is_fault"),
    [
        ("README.md", "see /wor" + "k/main", True),
        ("tests/test_cache.py", "Path('../share" + "d')", True),
        ("tests/conftest.py", "Path('../share" + "d')", False),
        ("docs/a.md", "https://example.org/wor" + "k/a", False),
        ("a.bin", "\0 /wor" + "k/main", False),
    ],
)
def test_workplace_words(name: str, text: str, is_fault: bool) -> None:
    assert bool(workplace_words(name, text.encode())) is is_fault


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    shadow = ROOT / "kernels" / "__init__.py"
    assert not shadow.exists(), "it shadows the PyPI package `kernels`: `import transformers` fails at the root"


def test_license_is_the_whole_apache_license() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for part in ("Version 2.0, January 2004", "END OF TERMS AND CONDITIONS", "limitations under the License."):
        assert part in text
