"""README.md: each of its commands is one that exists, with options that it takes, and its Python uses names that exist.

Commands that compute something are run elsewhere: the first Python fence by tests/test_cli.py, examples by
tests/test_examples.py.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections.abc import Callable

import pytest

from tests.repository import (
    README,
    ROOT,
    Fence,
    fences_in,
    make_dry_run,
    project,
    readme_fences,
    requires_make,
)

DOCS = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")]
INSTALL = "pip install -c constraints.txt -e '.[dev]'"


def shell_commands(text: str) -> list[str]:
    """Split a shell fence into commands, without comments, continuations, leading ``NAME=value`` and ``.venv/bin/``."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        for command in re.split(r"\s*&&\s*", line) if line else []:
            command = re.sub(r"^(\w+=\S*\s+)+", "", command.removeprefix("$ "))
            commands.append(" ".join(command.removeprefix(".venv/bin/").split()))
    return commands


def check_make(command: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for word in shlex.split(command)[1:]:
        if "=" not in word:
            make_dry_run(word)


def check_gisting(command: str) -> None:
    """Check that the sub-command has a help, and that it takes every option of the line."""
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


def check_ci(command: str) -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def check_nothing(command: str) -> None:
    """Accept a line of another program, with nothing of ours in it."""


# {pattern of the whole command: how it is tested}. A line of README.md that matches none is a fault.
README_COMMANDS: dict[str, Callable[[str], None]] = {
    r"make( [\w-]+)+( PYTHON=\S+)?": check_make,
    r"gisting( .*)?": check_gisting,
    r"python -m gisting( .*)?": lambda command: check_gisting(command.removeprefix("python -m ")),
    r"(python3? -m )?pip install (-c constraints\.txt )?-e '?\.(\[[\w,-]+\])?'?": check_install,
    r"python examples/\S+\.py( .*)?": check_example,
    r"\.ci/run": check_ci,
    r"python -m pytest( -\w+| \"not slow\")*": check_nothing,  # it is running
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


@requires_make
@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "kernels/README.md", *sorted(map(str, DOCS))])
def test_targets_of_make_on_pages_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert targets <= known


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
