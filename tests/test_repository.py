"""Guards of the repository's own rules: layering, cold imports, README commands, docstrings, packaging, tracked files.

A checker is a plain function from a tree (or a source, a module, a text) to a list of faults, so that each is also
shown to catch a planted fault. Nothing here knows what the library computes. The first python fence of README.md is
compiled here and run elsewhere: ``from test_repository import readme_fences; readme_fences("python")[0]``.
"""

import ast
import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from lower levels, or from within its own sub-package. `__init__` is the public face and sees
# everything, so nothing may import a public name from it.
LEVELS = {
    "errors": 0,
    "_compat": 0,
    "_deprecated": 1,
    "_version": 0,
    "source": 0,
    "device": 1,
    "markdown": 1,
    "settings": 1,
    "padding": 1,
    "tokens": 1,
    "visibility": 1,
    "rotary": 1,
    "storage": 1,
    "attention": 2,
    "cache": 2,
    "card": 2,
    "table": 3,
    "models": 3,
    "generation": 4,
    "data": 4,
    "pipeline": 5,
    "store": 5,
    "eval": 5,
    "train": 6,
    "serving": 6,
    "internalize": 7,
    "bench": 2,
    "measure": 8,
    "demo": 9,
    "doctor": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}
# transformers takes seconds to import: only what cannot do without it may import it at the top.
MAY_IMPORT_TRANSFORMERS_AT_TOP = {"models", "pipeline", "train", "eval", "internalize", "measure", "demo", "cli"}
# Modules of optional packages; what needs one imports it where it is used.
OPTIONAL = (
    *("triton", "vllm", "accelerate", "datasets", "peft", "bm25s", "llmlingua"),
    *("rouge_score", "nltk", "sacrebleu", "matplotlib", "sentencepiece", "google.protobuf"),
)

requires_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs git and a git checkout"
)
requires_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


class Import(NamedTuple):
    """One imported name, absolute and dotted: ``from gisting import cache`` is ``gisting.cache``."""

    target: str
    line: int
    is_at_top: bool  # runs when the module is imported

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


def name_of(node: ast.AST) -> str:
    """The last name of ``a`` or ``x.y.a``; empty for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def imports_of(path: Path, package: str) -> Iterator[Import]:
    """Every import in a file, in functions too, with relative ones resolved against ``package``."""

    def visit(node: ast.AST, is_at_top: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno, is_at_top) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                yield from (Import(f"{base}.{alias.name}", node.lineno, is_at_top) for alias in names)
            case ast.Call(func=func, args=[ast.Constant(value=str(target)), *_]) if name_of(func) in {
                "import_module",
                "__import__",
            }:
                yield Import(target, node.lineno, is_at_top)
            case ast.If(test=test, body=body, orelse=orelse) if name_of(test) == "TYPE_CHECKING":
                for child in body:
                    yield from visit(child, False)
                for child in orelse:
                    yield from visit(child, is_at_top)
                return
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                is_at_top = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_at_top)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), True)


def modules_under(root: Path, source_root: str, package: str) -> Iterator[tuple[Path, str, list[Import]]]:
    """Each file of a package: its path, its unit (the first name below the package) and its imports."""
    for path in sorted((root / source_root / package).rglob("*.py")):
        parts = path.relative_to(root / source_root).with_suffix("").parts
        yield path.relative_to(root), parts[1], list(imports_of(path, ".".join(parts[:-1])))


def layering_faults(root: Path) -> list[str]:
    """Where the tree below ``root`` breaks the rules of imports, one line per fault."""
    faults = []
    for path, unit, imports in modules_under(root, ".", "gisting"):
        if unit not in LEVELS:
            faults.append(f"{path}: {unit} is not in the table of levels")
            continue
        for found in imports:
            where = f"{path}:{found.line}"
            if found.package == "gisting":
                # `from gisting import patch` names no module: it goes through the public face.
                other = next((name for name in found.target.split(".")[1:2] if name in LEVELS), "__init__")
                if other != unit and LEVELS[other] >= LEVELS[unit]:
                    faults.append(f"{where}: {unit} [{LEVELS[unit]}] imports {other} [{LEVELS[other]}]")
            if found.package == "gisting_kernels" and path.as_posix() != "gisting/attention/api.py":
                faults.append(f"{where}: only gisting/attention/api.py imports gisting_kernels")
            if found.package == "transformers" and found.is_at_top and unit not in MAY_IMPORT_TRANSFORMERS_AT_TOP:
                faults.append(f"{where}: {unit} imports transformers at the top, not in the function that needs it")
            if found.package == "vllm" and unit != "serving":
                faults.append(f"{where}: only gisting/serving imports vllm")
    for path, _, imports in modules_under(root, "kernels", "gisting_kernels"):
        allowed = {"torch", "triton", "gisting_kernels", *sys.stdlib_module_names}
        faults += [
            f"{path}:{found.line}: the kernels import {found.package}; they depend on torch and triton only"
            for found in imports
            if found.package not in allowed
        ]
    return list(dict.fromkeys(faults))  # several names in one import are one fault


def test_layering() -> None:
    assert layering_faults(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("gisting/tokens.py", "import gisting.models", "tokens.py:1: tokens [1] imports models [3]"),
        ("gisting/tokens.py", "from gisting.models.patch import patch", "tokens [1] imports models [3]"),
        ("gisting/tokens.py", "from gisting import visibility", "tokens [1] imports visibility [1]"),
        ("gisting/tokens.py", "from gisting import patch", "tokens [1] imports __init__ [10]"),
        ("gisting/tokens.py", "import gisting", "tokens [1] imports __init__ [10]"),
        ("gisting/tokens.py", "def f():\n    from . import cli", "tokens.py:2: tokens [1] imports cli [9]"),
        ("gisting/models/patch.py", "from ..generation import generate", "models [3] imports generation [4]"),
        ("gisting/tokens.py", "import importlib\nimportlib.import_module('gisting.cli')", "tokens [1] imports cli [9]"),
        ("gisting/helpers.py", "", "helpers is not in the table of levels"),
        ("gisting/helpers/inner.py", "", "helpers is not in the table of levels"),
        ("gisting/cache.py", "import transformers", "cache imports transformers at the top"),
        ("gisting/cache.py", "try:\n    from transformers import Cache\nfinally:\n    pass", "at the top"),
        ("gisting/cache.py", "class A:\n    import transformers.cache_utils", "cache imports transformers at the top"),
        ("gisting/attention/sdpa.py", "def f():\n    import gisting_kernels", "only gisting/attention/api.py"),
        ("gisting/cli.py", "def f():\n    import vllm", "only gisting/serving imports vllm"),
        ("kernels/gisting_kernels/op.py", "def f():\n    import gisting", "the kernels import gisting"),
        ("kernels/gisting_kernels/op.py", "import numpy", "the kernels import numpy"),
    ],
)
def test_layering_catches_a_planted_fault(tmp_path: Path, path: str, source: str, fault: str) -> None:
    plant(tmp_path, path, source)
    (found,) = layering_faults(tmp_path)
    assert fault in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gisting/models/patch.py", "import transformers\nfrom . import registry\nfrom .registry import FAMILIES"),
        ("gisting/models/patch.py", "from gisting.models.registry import FAMILIES\nfrom ..errors import GistError"),
        ("gisting/cache.py", "def f():\n    import transformers"),
        ("gisting/cache.py", "import typing\nif typing.TYPE_CHECKING:\n    from transformers import Cache"),
        ("gisting/attention/api.py", "def f():\n    from gisting_kernels.op import op"),
        ("gisting/__init__.py", "from gisting.cli import main"),
        ("gisting/serving/vllm.py", "import vllm"),
        ("kernels/gisting_kernels/op.py", "import math\nimport triton.language as tl\nfrom . import tiles"),
    ],
)
def test_layering_lets_pass_what_is_allowed(tmp_path: Path, path: str, source: str) -> None:
    plant(tmp_path, path, source)
    assert layering_faults(tmp_path) == []


def plant(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(source, encoding="utf-8")


def design_faults(text: str, modules: list[str]) -> list[str]:
    """Where the tree that docs/design.md draws is another than that of the levels and of the modules (``cache.py``,
    ``models/patch.py``), which it names each; of benchmarks it names some.
    """
    _, _, rest = text.partition("\ngisting/\n")
    drawn = rest.partition("\nkernels/ ")[0]
    levels = {name: int(level) for name, level in re.findall(r"^  (\w+)(?:\.py|/)? +\[(\d+)\]", drawn, re.M)}
    wanted = {name: level for name, level in LEVELS.items() if name not in {"__init__", "_version"}}
    faults = [
        f"{name}: level {wanted.get(name)} in the test, {levels.get(name)} in docs/design.md"
        for name in sorted(wanted.keys() | levels.keys())
        if wanted.get(name) != levels.get(name)
    ]
    told = set(re.findall(r"\w+\.py\b", drawn))
    names = {module: module.rpartition("/")[2] for module in modules if not module.startswith("bench/")}
    return faults + [
        f"{module} is not in docs/design.md"
        for module, name in names.items()
        if name not in told | {"__init__.py", "_version.py"}
    ]


def test_the_page_on_the_design_draws_the_tree() -> None:
    modules = sorted(path.relative_to(ROOT / "gisting").as_posix() for path in (ROOT / "gisting").rglob("*.py"))
    assert design_faults((ROOT / "docs" / "design.md").read_text(encoding="utf-8"), modules) == []
    assert {name for name in LEVELS if f"{name}.py" not in modules and not (ROOT / "gisting" / name).is_dir()} == set()


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("errors.py        [0]", "errors.py        [1]", "errors: level 0 in the test, 1 in docs/design.md"),
        ("  card.py ", "  cards.py ", "card: level 2 in the test, None in docs/design.md"),
        ("objects.py", "files.py", "store/objects.py is not in docs/design.md"),
    ],
)
def test_the_page_on_the_design_catches_a_planted_fault(before: str, after: str, fault: str) -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert before in text
    assert fault in design_faults(text.replace(before, after), ["store/objects.py"])


VERSION_HELPERS = re.compile(r"greater_or_equal|version_at_least|is_transformers_version|parse_version|LooseVersion")


def version_branches(source: str) -> list[int]:
    """The lines that compare, parse or take apart the version of a library or of Python; recording one is no fault."""

    def reads_version(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return name_of(node.func) == "version"  # importlib.metadata.version("torch")
        return isinstance(node, ast.Attribute) and node.attr in {"__version__", "version_info", "hexversion"}

    lines = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if any(alias.name.startswith("packaging") for alias in names):
                lines.add(node.lineno)
            case ast.ImportFrom(module=str(module)) if module.startswith("packaging"):
                lines.add(node.lineno)
            case ast.Compare() if any(map(reads_version, ast.walk(node))):
                lines.add(node.lineno)
            case ast.Attribute(value=value) | ast.Subscript(value=value) if reads_version(value):
                lines.add(node.lineno)
            case ast.Call(func=func) if VERSION_HELPERS.search(name_of(func)):
                lines.add(node.lineno)
    return sorted(lines)


def test_version_branches_live_in_compat() -> None:
    faults = [
        f"{path}:{line}: asks for a version; every branch on one belongs into gisting/_compat.py"
        for path, unit, _ in modules_under(ROOT, ".", "gisting")
        if unit != "_compat"
        for line in version_branches((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("source", "is_fault"),
    [
        ("if torch.__version__ >= '2.12': pass", True),
        ("if version.parse(torch.__version__) < version.parse('2.12'): pass", True),
        ("from packaging.version import Version", True),
        ("major = int(torch.__version__.split('.')[0])", True),
        ("old = metadata.version('torch') < '2.12'", True),
        ("if sys.version_info < (3, 12): pass", True),
        ("major = sys.version_info[0]", True),
        ("if is_torch_greater_or_equal('2.12'): pass", True),
        ("manifest = {'torch': torch.__version__, 'gisting': metadata.version('gisting')}", False),
        ("if manifest['format_version'] > FORMAT_VERSION: pass", False),
    ],
)
def test_version_branches_tells_a_branch_from_a_record(source: str, is_fault: bool) -> None:
    assert bool(version_branches(source)) is is_fault


def fresh_python(code: str, *, blocked: tuple[str, ...] = ()) -> str:
    """What ``code`` prints in a fresh interpreter in which the modules ``blocked`` are not installed.

    None in sys.modules is Python's own sign for "not there": the import fails, ``find_spec`` says None. A finder that
    raises would break the ``is_..._available`` checks of transformers, which a missing package does not.
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


def test_import_is_cold() -> None:
    heavy = {"transformers", *OPTIONAL}
    assert fresh_python(f"import gisting\nprint(*sorted({heavy!r} & set(sys.modules)))") == ""


def test_core_names_need_neither_transformers_nor_an_extra() -> None:
    code = "import gisting\ngisting.Visibility, gisting.interval_attention\nprint('fine')"
    assert fresh_python(code, blocked=("transformers", *OPTIONAL)) == "fine"


def test_every_module_imports_without_the_extras() -> None:
    # serving is loaded by vLLM, so it may count on vLLM.
    names = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path, unit, _ in modules_under(ROOT, ".", "gisting")
        if unit != "serving"
    ]
    code = f"""
        import importlib
        for name in {names!r}:
            importlib.import_module(name)
        print("fine")
    """
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


README = ROOT / "README.md"
INSTALL = "pip install -c constraints.txt -e '.[dev]'"


@dataclass(frozen=True)
class Fence:
    language: str
    line: int  # of the first line inside
    text: str


def fences_in(text: str) -> list[Fence]:
    """The fenced blocks of a Markdown text."""
    fence = r"^(?P<indent> *)```(?P<language>[\w+-]*)[^\n`]*\n(?P<text>.*?)^(?P=indent)```"
    return [
        Fence(match["language"], text.count("\n", 0, match.start()) + 2, textwrap.dedent(match["text"]))
        for match in re.finditer(fence, text, re.M | re.S)
    ]


def readme_fences(language: str) -> list[Fence]:
    """The fences of README.md in one language, in order; none while there is no README.md."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return [fence for fence in fences_in(text) if fence.language == language]


def shell_commands(text: str) -> list[str]:
    """The commands of a shell fence, without comments, continuations, leading ``NAME=value`` and ``.venv/bin/``."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        for command in re.split(r"\s*&&\s*", line) if line else []:
            command = re.sub(r"^(\w+=\S*\s+)+", "", command.removeprefix("$ "))
            commands.append(" ".join(command.removeprefix(".venv/bin/").split()))
    return commands


def make_dry_run(target: str) -> str:
    # Under `make test` the flags of the outer make would come along.
    env = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    done = subprocess.run(["make", "-n", target], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_make(command: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for word in shlex.split(command)[1:]:
        if "=" not in word:
            make_dry_run(word)


def check_gisting(command: str) -> None:
    """The sub-command has a help, and every option of the line is one that it takes."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from gisting.cli import app

    words = shlex.split(command)[1:]
    node, path = get_command(app), []
    while words and words[0] in getattr(node, "commands", {}):
        path.append(words.pop(0))
        node = node.commands[path[-1]]  # pyright: ignore[reportAttributeAccessIssue]
    assert path or not words or words[0].startswith("-"), f"{command!r}: there is no command `gisting {words[0]}`"
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0, shown.output
    known = {"--help", "--install-completion", "--show-completion"}
    known |= {name for option in node.params for name in (*option.opts, *option.secondary_opts)}
    for word in words:
        option = word.partition("=")[0]
        # A negative number is a value; everything else with a dash is an option.
        if re.match(r"--?[A-Za-z]", option):
            assert option in known, f"{command!r}: `gisting {' '.join(path)}` takes no {option}"


def check_install(command: str) -> None:
    words = shlex.split(command)
    target = words[words.index("-e") + 1]
    extras = set(re.findall(r"[\w-]+", target.removeprefix(".")))
    assert extras <= set(project()["optional-dependencies"]), command
    if extras == {"dev"}:
        assert command.endswith(INSTALL), f"{command!r} is not what `make` and .ci/run do: {INSTALL}"


def check_example(command: str) -> None:
    script = shlex.split(command)[1]
    assert (ROOT / script).is_file(), f"{command!r}: there is no {script}"
    tests = ROOT / "tests" / "test_examples.py"
    assert tests.is_file(), f"{command!r}: an example in the README is run by tests/test_examples.py"


def check_ci(command: str) -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def check_nothing(command: str) -> None:
    """A line of a tool that is not ours, with nothing of ours in it."""


# {command, as a pattern of the whole line: how it is tested}. A line of README.md that matches none is a fault.
README_COMMANDS: dict[str, Callable[[str], None]] = {
    r"make( \w+)+( PYTHON=\S+)?": check_make,
    r"gisting( .*)?": check_gisting,
    r"python -m gisting( .*)?": lambda command: check_gisting(command.removeprefix("python -m ")),
    r"(python3? -m )?pip install (-c constraints\.txt )?-e '?\.(\[[\w,-]+\])?'?": check_install,
    r"python examples/\S+\.py( .*)?": check_example,
    r"\.ci/run": check_ci,
    r"python -m pytest( -\w+)*": check_nothing,  # it is running
    r"python3(\.\d+)? -m venv \.venv": check_nothing,
    r"(\.|source) \.venv/bin/activate": check_nothing,
    r"git clone \S+": check_nothing,
    r"cd [\w.-]+": check_nothing,
}


def check_readme_command(command: str) -> None:
    for pattern, check in README_COMMANDS.items():
        if re.fullmatch(pattern, command):
            return check(command)
    pytest.fail(f"README.md: {command!r} is not in README_COMMANDS; add it there with the way it is tested")


@pytest.mark.parametrize(
    "command", dict.fromkeys(command for fence in readme_fences("bash") for command in shell_commands(fence.text))
)
def test_readme_command(command: str) -> None:
    check_readme_command(command)


def test_readme_shows_the_two_commands_and_the_way_without_make() -> None:
    commands = [command for fence in readme_fences("bash") for command in shell_commands(fence.text)]
    assert {"make demo", "make test"} <= set(commands)
    assert any(command.endswith(INSTALL) for command in commands)
    for plain in ("gisting demo", "python -m pytest"):
        assert any(command.startswith(plain) for command in commands), plain


def test_readme_shell_fences_say_bash() -> None:
    languages = {fence.language for fence in fences_in(README.read_text(encoding="utf-8"))}
    assert not languages & {"sh", "shell", "console", "zsh"}, "a shell fence that is not ```bash is not tested"


@pytest.mark.parametrize("fence", readme_fences("python"), ids=lambda fence: f"line{fence.line}")
def test_readme_python_compiles_and_uses_names_that_exist(fence: Fence) -> None:
    import gisting

    tree = ast.parse(fence.text, f"README.md:{fence.line}")
    compile(tree, f"README.md:{fence.line}", "exec")
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gisting"
    }
    assert used <= set(gisting.__all__)


def test_fences_and_commands_are_found() -> None:
    text = (
        "a\n```bash\n# why\nmake demo  # go\ngisting train \\\n  --steps 5 && cd x\n```\n\n  ```python\n  f()\n  ```\n"
    )
    shell, python = fences_in(text)
    assert (shell.language, shell.line, python.language, python.line) == ("bash", 3, "python", 10)
    assert shell_commands(shell.text) == ["make demo", "gisting train --steps 5", "cd x"]
    assert python.text == "f()\n"
    assert shell_commands("HF_HUB_OFFLINE=1 .venv/bin/gisting demo") == ["gisting demo"]


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("rm -rf x", "not in README_COMMANDS"),
        pytest.param("make nothing", "No rule to make target", marks=requires_make),
        ("gisting no-such-command", "there is no command"),
        ("gisting demo --no-such-option 3", "takes no --no-such-option"),
        ("pip install -c constraints.txt -e '.[nosuchextra]'", "nosuchextra"),
        ("python examples/99_nothing.py", "there is no examples/99_nothing.py"),
    ],
)
def test_readme_command_catches_a_planted_fault(command: str, fault: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=fault):
        check_readme_command(command)


@requires_make
@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("demo", "HF_HUB_OFFLINE=1 .venv/bin/gisting demo"),
        ("test", "HF_HUB_OFFLINE=1 .venv/bin/python -m pytest"),
        ("lint", ".venv/bin/ruff format --check"),
        ("types", ".venv/bin/pyright"),
        ("check", ".venv/bin/python -m pytest"),
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
    assert INSTALL in (ROOT / path).read_text(encoding="utf-8")


def test_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("beside", ["", "true & vllm=$!; wait $vllm;", "sleep 60 & vllm=$!;"])
def test_ci_ends_with_the_status_of_its_steps_and_leaves_nothing(tmp_path: Path, beside: str, status: int) -> None:
    """Whether or not the tests beside it have begun, have ended, or still run."""
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith(("set ", "scratch=", "trap "))]
    assert len(head) == 3
    done = subprocess.run(
        ["bash", "-c", "\n".join([*head, f"{beside} exit {status}"])],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=30,
        check=False,
    )
    assert done.returncode == status
    assert not list(tmp_path.iterdir())


@functools.cache
def setup_arguments() -> dict:
    """What setup.py hands to setuptools."""
    import setuptools

    caught: dict = {}
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    assert Path.cwd() == before
    return caught


@functools.cache
def project() -> dict:
    """The metadata in pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """The requirements of the core and of some extras by canonical name, ``gist-tokens[...]`` followed."""
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


def test_constraints_are_exact_versions_and_nothing_else() -> None:
    odd = [line for line in constraint_lines() if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)]
    assert odd == []


def test_constraints_pin_every_direct_dependency_of_ci_above_its_floor() -> None:
    pins = dict(line.split("==") for line in constraint_lines())
    faults = [
        f"{name}: pyproject.toml asks for {requirement.specifier}, constraints.txt pins {pins.get(name)}"
        for name, requirement in requirements("dev").items()
        if name not in pins or not requirement.specifier.contains(pins[name])
    ]
    assert faults == []


def test_every_imported_package_is_declared() -> None:
    declared = set(requirements(*project()["optional-dependencies"])) | {"gisting", "gisting-kernels"}
    # Imported by another name than that of the package.
    declared |= {module for module, package in (("google", "protobuf"), ("yaml", "pyyaml")) if package in declared}
    faults = {
        f"{path}:{found.line}: imports {found.package}, which pyproject.toml does not ask for"
        for path, _, imports in modules_under(ROOT, ".", "gisting")
        for found in imports
        if found.package not in sys.stdlib_module_names and canonicalize_name(found.package) not in declared
    }
    assert sorted(faults) == []


def test_package_holds_both_source_roots() -> None:
    arguments = setup_arguments()
    assert {"gisting", "gisting_kernels"} <= set(arguments["packages"])
    assert all(name.partition(".")[0] in {"gisting", "gisting_kernels"} for name in arguments["packages"])
    assert (ROOT / "gisting" / "py.typed").is_file()


def test_every_folder_of_modules_is_a_package() -> None:
    """Without its ``__init__.py`` a folder works here and is missing from the wheel."""
    folders = {path.parent for path in (ROOT / "gisting").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


# A command's options are described by its --help, a benchmark's columns by the page that shows its table.
ARGUMENTS_TOLD_ELSEWHERE = ("gisting/cli/", "benchmarks/")
# A first line that begins so says what is done, not what comes back.
VERBS = frozenset(
    "add answer apply ask build call change check choose collect compare compress compute convert copy count create cut"
    " decode delete do draw drop encode evaluate fill find forget gather generate get give hand hold keep launch lay"
    " learn list load make mark measure merge move open pack parse place plan prepare print put quantise raise read"
    " reduce refuse register remember remove rename replace report return run save search serve set show sort split"
    " start store switch take tell test time train translate try turn undo wait walk write".split()
)
# The arguments, the result or the errors are those of another name, which the docstring gives.
SAME = re.compile(r"\AAs (?:``|:)")
SAME_ARGUMENTS = re.compile(rf"{SAME.pattern}|\b[Aa]rguments\b[\w ,]*\sas\b")
SAME_ERRORS = re.compile(rf"{SAME.pattern}|\b(?:[Rr]aises|errors)\b[\w ,]*\sas\b")
TENSOR = re.compile(r"\b(?:Tensor|ndarray)\b")
SHAPE = re.compile(r"``\([^`]*\)``|\bshape|\bscalar\b")
DTYPE = re.compile(r"\b(?:int|bool|integer|floating|dtypes?|(?:u?int|b?float)\d+)\b")
SAME_TENSOR = re.compile(r"\bas (?:for |in )?(?:``|:\w+:`|[a-z]\b)")
# Published methods, and what stands in the docstrings of a module that is about one: where it was published.
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


class Definition(NamedTuple):
    """A public function, class or method of a source, and the class that a method is in."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    owner: ast.ClassDef | None

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def decorators(self) -> set[str]:
        return {name_of(item.func if isinstance(item, ast.Call) else item) for item in self.node.decorator_list}

    @property
    def overrides(self) -> bool:
        """Whether the signature may be one that a base class prescribes, and documents."""
        bases = self.owner.bases if self.owner else self.node.bases if isinstance(self.node, ast.ClassDef) else []
        named = {name_of(base.value if isinstance(base, ast.Subscript) else base) for base in bases}
        return bool(named - {"NamedTuple", "Protocol", "Generic"})

    def arguments(self) -> dict[str, str]:
        """Names and annotations of the parameters, those of a class being its fields or those of its ``__init__``."""
        node = self.node
        if isinstance(node, ast.ClassDef):
            init = next((item for item in node.body if getattr(item, "name", "") == "__init__"), None)
            if not isinstance(init, ast.FunctionDef):
                fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
                return {
                    name_of(field.target): ast.unparse(field.annotation)
                    for field in fields
                    if not name_of(field.target).startswith("_")
                    and "init=False" not in ast.unparse(field)
                    and "ClassVar" not in ast.unparse(field.annotation)
                }
            node = init
        given = node.args
        every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
        return {
            item.arg: ast.unparse(item.annotation) if item.annotation else ""
            for item in every
            if item is not None and item.arg not in {"self", "cls"} and not item.arg.startswith("_")
        }

    def result(self) -> str:
        """The annotation of what is returned; empty where that is nothing, and for a class."""
        if isinstance(self.node, ast.ClassDef) or self.node.returns is None:
            return ""
        returned = ast.unparse(self.node.returns)
        return "" if returned in {"None", "NoReturn", "Never", "Iterator[None]"} else returned

    def raised(self) -> set[str]:
        """The exception classes that the body itself raises and does not catch; of a class, while one is made."""
        if isinstance(self.node, ast.ClassDef):
            made = [item for item in self.node.body if getattr(item, "name", "") in {"__init__", "__post_init__"}]
        else:
            made = [self.node]
        found: set[str] = set()

        def visit(node: ast.AST, caught: set[str]) -> None:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Lambda():
                    return
                case ast.Try(body=body, handlers=handlers):
                    types = [handler.type for handler in handlers if handler.type is not None]
                    here = {name_of(child) for each in types for child in ast.walk(each)}
                    for child in body:
                        visit(child, caught | here)
                    for child in [*handlers, *node.orelse, *node.finalbody]:
                        visit(child, caught)
                    return
                case ast.Raise(exc=exc) if exc is not None:
                    raised = name_of(exc.func if isinstance(exc, ast.Call) else exc)
                    # `raise error` and `raise refusal(path)` name no class.
                    if raised[:1].isupper() and raised not in caught:
                        found.add(raised)
            for child in ast.iter_child_nodes(node):
                visit(child, caught)

        for function in made:
            for child in function.body:
                visit(child, set())
        return found


def public_definitions(source: str) -> Iterator[Definition]:
    """What ``__all__`` names of a source, or everything without an underscore where there is none; kernels aside, whose
    many strides follow the grammar of their module.
    """
    tree = ast.parse(source)
    exported = next(
        (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and name_of(node.targets[0]) == "__all__"
        ),
        None,
    )
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") if exported is None else node.name not in exported:
            continue
        found = Definition(node.name, node, None)
        if "jit" in found.decorators:
            continue
        yield found
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and not item.name.startswith("_"):
                yield Definition(f"{node.name}.{item.name}", item, node)


def entries(doc: str, *titles: str) -> dict[str, str]:
    """The entries ``name: text`` (or ``name, other: text``) of the sections with these titles."""
    found: dict[str, str] = {}
    for title in titles:
        for section in re.findall(rf"^{title}:\n((?: {{4}}.*\n?|\s*\n)*)", doc, re.M):
            parts = re.split(r"^ {4}((?:\*{0,2}[\w.]+, )*\*{0,2}[\w.]+):", section, flags=re.M)
            for names, text in zip(parts[1::2], parts[2::2], strict=True):
                found |= dict.fromkeys(re.findall(r"[\w.]+", names), text)
    return found


def argument_faults(found: Definition) -> list[str]:
    """Parameters that have no line under ``Args:`` and are not named ``so`` either; lines for what is no parameter."""
    told = entries(found.doc, "Args", "Attributes")
    arguments = found.arguments()
    faults = [f"Args: has {name}, which is no parameter" for name in told if name not in arguments]
    if isinstance(found.node, ast.ClassDef) and "Attributes:" in found.doc:
        faults = []
    if found.overrides or SAME_ARGUMENTS.search(found.doc):
        return faults
    # A docstring without the section may name them in its sentences.
    text = "\n".join(told.values()) if told else found.doc
    is_named = {name for name in arguments if re.search(rf"``[^`\n]*\b{name}\b[^`\n]*``", text)}
    return faults + [f"{name} is not documented" for name in arguments if name not in told and name not in is_named]


def result_faults(found: Definition) -> list[str]:
    """A result of which nothing is said: neither a section ``Returns:`` nor a first line that names what comes back."""
    if not found.result() or found.overrides or SAME.search(found.doc):
        return []
    if re.search(r"^(?:Returns|Yields):|\bReturns\b|\breturned\b", found.doc, re.M):
        return []
    first = re.match(r"\w*", found.doc)[0]  # pyright: ignore[reportOptionalSubscript]
    return [f"says what is done ({first} ...), not what is returned"] if first.lower() in VERBS else []


def raises_faults(found: Definition) -> list[str]:
    """Exceptions that the body raises and ``Raises:`` has not."""
    if SAME_ERRORS.search(found.doc):
        return []
    return [f"Raises: lacks {name}" for name in sorted(found.raised() - set(entries(found.doc, "Raises")))]


def tensor_faults(found: Definition) -> list[str]:
    """Tensors, given or returned, of which shape or dtype is not said."""
    if found.overrides or SAME_ARGUMENTS.search(found.doc):
        return []
    told = entries(found.doc, "Args", "Attributes")
    prose = re.sub(r"^(?:Args|Attributes|Raises):\n(?:    .*\n?|\s*\n)*", "", found.doc, flags=re.M)
    tensors = {name: annotation for name, annotation in found.arguments().items() if TENSOR.search(annotation)}
    texts = {name: told.get(name, prose) for name in tensors}
    if TENSOR.search(found.result()):
        texts["the result"] = prose
    faults = []
    for name, text in texts.items():
        if "Callable" in tensors.get(name, "") or SAME_TENSOR.search(text):
            continue
        faults += [f"{name}: no shape"] if not SHAPE.search(text) else []
        faults += [f"{name}: no dtype"] if not DTYPE.search(text) else []
    return faults


def source_faults(source: str) -> list[str]:
    """Published methods that a module is about, by its docstring and the first lines of what is public, where no
    docstring says their source.
    """
    tree = ast.parse(source)
    documented = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    text = "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))
    heads = [found.doc.split("\n\n")[0] for found in public_definitions(source)]
    # Where another name is pointed to, that one has its source.
    about = re.sub(r":\w+:`[^`]*`", "", "\n".join([ast.get_docstring(tree) or "", *heads]))
    return [
        f"names {match.group()}, and no docstring says where it was published ({published})"
        for method, published in PUBLISHED.items()
        if (match := re.search(method, about)) and not re.search(published, text)
    ]


def contract_faults(source: str, path: str = "") -> list[str]:
    """Where the docstrings of a source's public names leave out what a caller must know."""
    told_elsewhere = path.startswith(ARGUMENTS_TOLD_ELSEWHERE)
    faults = [] if told_elsewhere else source_faults(source)
    for found in public_definitions(source):
        if not found.doc:
            faults += [] if found.owner and found.overrides else [f"{found.name}: no docstring"]
            continue
        here = raises_faults(found) if "cli" not in path else []
        if not told_elsewhere:
            here += argument_faults(found) + result_faults(found) + tensor_faults(found)
        faults += [f"{found.name}: {fault}" for fault in here]
    return faults


def package_sources() -> list[str]:
    """The modules of both packages, relative to the root."""
    paths = [*(ROOT / "gisting").rglob("*.py"), *(ROOT / "kernels" / "gisting_kernels").rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def test_docstrings_say_what_a_caller_must_know() -> None:
    faults = [
        f"{path}: {fault}"
        for path in package_sources()
        for fault in contract_faults((ROOT / path).read_text(encoding="utf-8"), path)
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("signature", "doc", "fault"),
    [
        ("f()", "A number.\n\nArgs:\n    wide: in metres.", "f: Args: has wide, which is no parameter"),
        ("f(size, wide)", "A ``wide`` number.\n\nArgs:\n    size: in metres.", "f: wide is not documented"),
        ("f(size, wide)", "A number.\n\nArgs:\n    size: in metres, like ``wide``.", None),
        ("f(size, wide)", "A number.\n\nArgs:\n    size: in metres.", "f: wide is not documented"),
        ("f(size)", "A number of some size.", "f: size is not documented"),
        ("f(size)", "A number of ``size`` metres.", None),
        (
            "f(*, size=1, **rest)",
            "A number.\n\nArgs:\n    size: in metres.\n        Of course.\n    **rest: more.",
            None,
        ),
        ("f(self, size)", "A number. Arguments as :func:`g`.", None),
        ("f() -> int", "Count.", "f: says what is done (Count ...), not what is returned"),
        ("f() -> int", "Count.\n\nReturns:\n    How many.", None),
        ("f() -> int", "How many there are.", None),
        ("f() -> None", "Count.", None),
        ("f(): raise ValueError(1)", "A.", "f: Raises: lacks ValueError"),
        ("f(): raise errors.GistError", "A.\n\nRaises:\n    ValueError: no.", "f: Raises: lacks GistError"),
        ("f(): raise ValueError(1)", "A.\n\nRaises:\n    ValueError: it is\n        so.", None),
        ("f(): raise refusal(1)", "A.", None),
        ("f() -> Tensor", "The mask, bool.", "f: the result: no shape"),
        ("f() -> Tensor", "The mask ``(B, K)``.", "f: the result: no dtype"),
        ("f() -> Tensor", "The mask, bool ``(B, K)``.", None),
        ("f(q: Tensor)", "A.\n\nArgs:\n    q: queries, bool.", "f: q: no shape"),
        ("f(q: Tensor)", "A.\n\nArgs:\n    q: ``(B, K)``.", "f: q: no dtype"),
        ("f(q: Tensor)", "A.\n\nArgs:\n    q: ``(B, K)``, floating point.", None),
    ],
)
def test_contract_faults_are_found(signature: str, doc: str, fault: str | None) -> None:
    head, _, body = signature.partition(": raise")
    quoted = textwrap.indent(f'"""{doc}"""', "    ")
    source = f"def {head}:\n{quoted}\n    {'raise' + body if body else 'pass'}\n"
    assert contract_faults(source) == ([] if fault is None else [fault])
    assert contract_faults(f"__all__ = []\n{source}") == []
    # The same of a method, and not of one whose signature is a base's.
    method = f"class A:\n    '''A.'''\n{textwrap.indent(source, '    ')}"
    assert contract_faults(method) == ([] if fault is None else [f"A.{fault}"])


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("def f(): pass", ["f: no docstring"]),
        ("def _f(): pass", []),
        ("class A(Base):\n    'A.'\n    def f(self): pass", []),
        ("class A:\n    'A.'\n    def f(self): pass", ["A.f: no docstring"]),
        ("class A:\n    'A.'\n    size: int", ["A: size is not documented"]),
        ("class A(NamedTuple):\n    'A.'\n    size: int", ["A: size is not documented"]),
        ("class A:\n    'A.'\n    def __init__(self, size): pass", ["A: size is not documented"]),
        ("class A:\n    'A of ``size``.'\n    size: int\n    made: int = field(init=False)", []),
        ("class A:\n    'A.'\n    def __post_init__(self): raise ValueError(1)", ["A: Raises: lacks ValueError"]),
        ("def f():\n    'A.'\n    try:\n        raise ValueError(1)\n    except ValueError:\n        pass", []),
        ("def f():\n    'A.'\n    def g():\n        raise ValueError(1)", []),
        ("@triton.jit\ndef f(a): pass", []),
        ("def f():\n    'The BLEU of a text.'", ["names BLEU, and no docstring says where it was published"]),
        ("'''Scores.\n\nPapineni and others, 2002.'''\ndef f():\n    'The BLEU of a text.'", []),
    ],
)
def test_contract_faults_of_classes_and_bodies(source: str, faults: list[str]) -> None:
    found = contract_faults(source)
    assert [fault.partition(" (")[0] for fault in found] == faults


def test_every_module_has_a_docstring() -> None:
    paths = [*(ROOT / "gisting").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert [str(path) for path in paths if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_every_module_says_its_place_in_the_flow() -> None:
    """Those of the command line and the benchmarks stand above everything, each on its own."""
    silent = [
        path
        for path in package_sources()
        if not path.startswith(ARGUMENTS_TOLD_ELSEWHERE)
        and not path.endswith(("__init__.py", "/_version.py"))
        and "Place in the flow: " not in (ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "")
    ]
    assert silent == []


# Each pattern has a character in brackets so that this file does not match it. {pattern: the one file that may hold it}
WORKPLACE = {r"(?<![\w.])/wor[k]/": None, r"\.\./share[d]\b": "tests/conftest.py", r"/opt/(wheel[s]|pyp[i])": None}
MAX_BYTES = 2_000_000


@functools.cache
def tracked_files() -> tuple[str, ...]:
    """The files that git tracks or would add, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


def workplace_words(name: str, content: bytes) -> list[str]:
    """Paths of the machine that a file was written on; a binary file holds none."""
    if b"\0" in content:
        return []
    text = content.decode("utf-8", errors="replace")
    return [
        f"{name}: {found.group()}"
        for pattern, allowed in WORKPLACE.items()
        if name != allowed
        for found in re.finditer(pattern, text)
    ]


@requires_git
def test_tracked_files_are_small() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in tracked_files()}
    assert {name: size for name, size in sizes.items() if size > MAX_BYTES} == {}


@requires_git
def test_tracked_files_name_no_workplace() -> None:
    assert [fault for name in tracked_files() for fault in workplace_words(name, (ROOT / name).read_bytes())] == []


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


@requires_git
def test_nothing_generated_is_tracked() -> None:
    generated = re.compile(r"(^|/)(\.venv|__pycache__|outputs|runs|\w+\.egg-info)/")
    assert [name for name in tracked_files() if generated.search(name)] == []


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    shadow = ROOT / "kernels" / "__init__.py"
    assert not shadow.exists(), "it shadows the PyPI package `kernels`: `import transformers` fails at the root"


def test_license_is_the_whole_apache_license() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for part in ("Version 2.0, January 2004", "END OF TERMS AND CONDITIONS", "limitations under the License."):
        assert part in text
    assert text.split()[:2] == ["Apache", "License"]
    assert project()["license"] == "Apache-2.0"
