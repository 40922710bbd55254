"""Guards of the repository's own rules: layering, cold imports, README commands, docstrings, packaging, tracked files.

A checker is a plain function from a tree (or a source, a module, a text) to a list of faults, so that each is also
shown to catch a planted fault. Nothing here knows what the library computes. The first python fence of README.md is
compiled here and run elsewhere: ``from test_repository import readme_fences; readme_fences("python")[0]``.
"""

import ast
import functools
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
import zipfile
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
    "_version": 0,
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
    "bench": 7,
    "demo": 8,
    "cli": 9,
    "__main__": 10,
    "__init__": 10,
}
# transformers takes seconds to import: only what cannot do without it may import it at the top.
MAY_IMPORT_TRANSFORMERS_AT_TOP = {"models", "pipeline", "train", "eval", "bench", "demo", "cli"}
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
    # serving is loaded by vLLM, so it may count on vLLM; __main__ runs the command.
    names = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path, unit, _ in modules_under(ROOT, ".", "gisting")
        if unit not in {"serving", "__main__"}
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
    assert extras <= set(setup_arguments()["extras_require"]), command
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
    for name in ("Makefile", "setup.py", "constraints.txt"):
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


def requirements(*extras: str) -> dict[str, Requirement]:
    """The requirements of the core and of some extras by canonical name, ``gisting[...]`` followed."""
    arguments = setup_arguments()
    found, todo = {}, [*arguments["install_requires"]]
    for extra in extras:
        todo += arguments["extras_require"][extra]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == "gisting":
            todo += [line for extra in requirement.extras for line in arguments["extras_require"][extra]]
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
        f"{name}: setup.py asks for {requirement.specifier}, constraints.txt pins {pins.get(name)}"
        for name, requirement in requirements("dev").items()
        if name not in pins or not requirement.specifier.contains(pins[name])
    ]
    assert faults == []


def test_every_imported_package_is_declared() -> None:
    declared = set(requirements(*setup_arguments()["extras_require"])) | {"gisting", "gisting-kernels"}
    # Imported by another name than that of the package.
    declared |= {module for module, package in (("google", "protobuf"), ("yaml", "pyyaml")) if package in declared}
    faults = {
        f"{path}:{found.line}: imports {found.package}, which setup.py does not ask for"
        for path, _, imports in modules_under(ROOT, ".", "gisting")
        for found in imports
        if found.package not in sys.stdlib_module_names and canonicalize_name(found.package) not in declared
    }
    assert sorted(faults) == []


def test_package_holds_both_source_roots_and_its_version() -> None:
    import gisting

    arguments = setup_arguments()
    assert {"gisting", "gisting_kernels"} <= set(arguments["packages"])
    assert all(name.partition(".")[0] in {"gisting", "gisting_kernels"} for name in arguments["packages"])
    assert arguments["version"] == gisting.__version__
    assert (ROOT / "gisting" / "py.typed").is_file()


def test_every_folder_of_modules_is_a_package() -> None:
    """Without its ``__init__.py`` a folder works here and is missing from the wheel."""
    folders = {path.parent for path in (ROOT / "gisting").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def docstring_faults(module: types.ModuleType) -> list[str]:
    """What of ``module.__all__`` is not documented: classes, their public methods and properties, functions.

    A function with parameters needs more than one line: what they mean, what comes back, what is raised.
    """
    faults = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value):
            # dataclass and NamedTuple write a docstring by themselves, `Name(field: type, ...)`.
            if not value.__doc__ or value.__doc__.startswith(f"{value.__name__}("):
                faults.append(f"{name}: no docstring")
            package = value.__module__.partition(".")[0]
            own = [base for base in value.__mro__ if base.__module__.partition(".")[0] == package]
            members = {member: raw for base in reversed(own) for member, raw in vars(base).items()}
            for member, raw in members.items():
                is_documentable = callable(raw) or isinstance(
                    raw, property | functools.cached_property | classmethod | staticmethod
                )
                # getdoc also finds what an overridden method inherits.
                if not member.startswith("_") and is_documentable and not inspect.getdoc(getattr(value, member)):
                    faults.append(f"{name}.{member}: no docstring")
        elif callable(value):
            lines = [line for line in (inspect.getdoc(value) or "").splitlines() if line.strip()]
            if not lines:
                faults.append(f"{name}: no docstring")
            elif inspect.signature(value).parameters and len(lines) < 2:
                faults.append(f"{name}: has parameters, so say what they are, what is returned and what is raised")
    return faults


def test_public_names_are_documented() -> None:
    import gisting

    assert docstring_faults(gisting) == []


def test_docstrings_catch_a_planted_fault() -> None:
    source = '''
        import functools
        from dataclasses import dataclass
        __all__ = ["LIMIT", "bare", "short", "fine", "none", "Bare", "Data", "Fine"]
        LIMIT = 3
        def bare(): pass
        def short(a):
            """One line."""
        def fine(a):
            """One line.

            And what it raises.
            """
        def none():
            """No parameters, so one line does."""
        class Bare: pass
        @dataclass
        class Data:
            a: int
        class Fine:
            """A class."""
            limit = 3
            def method(self): pass
            @property
            def prop(self): pass
            @functools.cached_property
            def cached(self): pass
            @classmethod
            def make(cls): pass
            def _hidden(self): pass
            def told(self):
                """Told."""
    '''
    module = types.ModuleType("planted")
    exec(textwrap.dedent(source), module.__dict__)
    assert [fault.partition(":")[0] for fault in docstring_faults(module)] == [
        *("bare", "short", "Bare", "Data", "Fine.method", "Fine.prop", "Fine.cached", "Fine.make"),
    ]


def test_every_module_has_a_docstring() -> None:
    paths = [*(ROOT / "gisting").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert [str(path) for path in paths if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


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
    assert setup_arguments()["license_expression"] == "Apache-2.0"


def test_a_wheel_holds_every_file(tmp_path: Path) -> None:
    """An editable install reads the folder itself, so that a data file which the wheel lacks is not missed there."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("gisting", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)],
        cwd=tree,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {str(path.relative_to(tree)) for path in (tree / "gisting").rglob("*") if path.is_file()}
    package = tree / "kernels" / "gisting_kernels"
    wanted |= {str(path.relative_to(tree / "kernels")) for path in package.rglob("*") if path.is_file()}
    assert held == wanted
