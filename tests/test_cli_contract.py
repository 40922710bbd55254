"""Promises of every command: examples in its help that work, only JSON with --json, exit codes, no traceback for errors
that a user can fix, completion in the shell.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from rich.console import Console
from typer.main import get_command

import gisting
from gisting.cli import app
from gisting.cli.shared import print_json
from tests.repository import fresh_python

ROOT = Path(__file__).resolve().parents[1]


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command with its name; groups are left out."""
    group = get_command(app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif not command.hidden:  # hidden ones say where a command went
            yield (*path, name), command


COMMANDS = dict(commands())
each_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


def examples(command: Any) -> list[str]:
    lines = (command.epilog or "").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("gisting ")]


# -- help --------------------------------------------------------------------------------------------------------------


@each_command
def test_help_says_what_and_shows_how(run, path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    shown = run(*path, "--help")
    assert shown.code == 0
    assert command.help.strip()
    assert 1 <= len(examples(command)) <= 3
    for example in examples(command):
        assert f"  {example}\n" in shown.out, "an example must be on one line, so that it can be copied"


@each_command
def test_examples_are_words_that_the_command_takes(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # examples name recipes/
    for example in examples(COMMANDS[path]):
        words = shlex.split(example)
        assert tuple(words[1 : len(path) + 1]) == path
        with COMMANDS[path].make_context("gisting", words[len(path) + 1 :]):
            pass


def test_an_example_that_is_not_real_is_caught() -> None:
    command = COMMANDS["inspect",]
    with pytest.raises(Exception, match="No such option: --no-such"):
        command.make_context("gisting", ["a.st", "--no-such"])


def test_examples_run_as_they_are_shown(run, workplace: Path) -> None:
    """Those that need only the output of `gisting demo --from-scratch` and a file of prompts."""
    Path("prompts.jsonl").write_text('{"prompt": "write capitals", "name": "capitals"}\n', encoding="utf-8")
    ran = 0
    for path in (
        *(
            ("compress",),
            ("generate",),
            ("compare",),
            ("inspect",),
            ("doctor",),
            ("show",),
            ("store", "list"),
            ("store", "verify"),
        ),
        *(("store", "remove"), ("store", "gc")),
    ):
        for example in examples(COMMANDS[path]):
            done = run(*shlex.split(example)[1:])
            assert done.code == 0, f"{example}\n{done.err}"
            ran += 1
    assert ran >= 12


def test_the_root_tells_the_exit_codes(run) -> None:
    said = " ".join(run("--help").out.split())
    assert "Exit codes: 0 success, 1 an error reported in one line, 2 wrong usage, 130 interrupted." in said


def test_help_needs_no_torch() -> None:
    code = "import sys, gisting.cli\nprint(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert fresh_python(code) == ""


# -- JSON --------------------------------------------------------------------------------------------------------------

# serve prints a command line and then becomes that command; unknown options are vLLM's.
WITHOUT_JSON = {("serve",)}


@pytest.mark.parametrize("path", sorted(COMMANDS.keys() - WITHOUT_JSON), ids=" ".join)
def test_every_command_has_json(path: tuple[str, ...]) -> None:
    assert "--json" in {name for option in COMMANDS[path].params for name in option.opts}


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("compress runs/demo --prompt a --prompt 'b c' --output c.st", {"prompt", "num_prompt_tokens", "num_bytes"}),
        ("compress runs/demo --prompt a --name x --store s", {"prompt", "name", "num_gist_tokens", "saved_in"}),
        ("generate runs/demo --cache one.st --input a --max-new-tokens 2", {"input", "output"}),
        ("compare runs/demo --prompt a --input b --max-new-tokens 2", {"gist", "prompt", "no_prompt", "agreement"}),
        (
            "check runs/demo --cache one.st --prompt 'answer plainly' --max-new-tokens 2",
            {"kept", "gist", "controls", "spans", "saved_in"},
        ),
        ("inspect one.st", {"format", "manifest", "tensors"}),
        ("store list gists", {"name", "key", "num_gist_tokens"}),
        ("store remove gists plainly", {"removed"}),
        ("store gc gists", {"freed_bytes"}),
        ("store rebuild gists", {"entries", "faults"}),
        ("show 'a b' c", {"labels", "position_ids", "mask"}),
        ("cost runs/demo --prompt-tokens 8 --input-tokens 4", {"mode", "first_token_flops"}),
        ("doctor", {"topic", "name", "value", "is_fault"}),
        (
            "train runs/demo --data runs/demo/unseen.jsonl --eval few.jsonl --output runs/more --max-steps 1 "
            "--batch-size 4 --max-new-tokens 2",
            {"directory", "metrics", "evaluations"},
        ),
        ("eval runs/demo --data few.jsonl --max-new-tokens 2 --output e.json", {"split", "condition", "predictions"}),
    ],
)
def test_json_stands_alone_on_standard_output(run, workplace: Path, words: str, keys: set[str]) -> None:
    """One object per line; what libraries print, such as Trainer's logs, goes to standard error."""
    run("compress", "runs/demo", "--prompt", "answer plainly", "--output", "one.st")
    run("compress", "runs/demo", "--prompt", "answer plainly", "--name", "plainly", "--store", "gists")
    records = Path("runs/demo/unseen.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(records[:2]), encoding="utf-8")
    done = run(*shlex.split(words), "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert rows
    assert all(keys <= set(row) for row in rows), rows[0]


def test_nan_and_infinity_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "rows": [(1, -float("inf")), "ä"]})
    assert capsys.readouterr().out == '{"loss": null, "rows": [[1, null], "ä"]}\n'


def test_json_of_the_demo(run, monkeypatch: pytest.MonkeyPatch, demo_checkpoint: Path) -> None:
    """What it prints while it runs goes to standard error."""
    row = json.loads((demo_checkpoint.parent / "demo.json").read_text(encoding="utf-8"))

    class Result:
        total_s = train_s = 1.0

        def to_row(self) -> dict[str, Any]:
            return row

    def run_demo(*args: object, **settings: object) -> Result:
        Console().print("1. The task")
        return Result()

    monkeypatch.setattr("gisting.demo.run_demo", run_demo)
    done = run("demo", "--from-scratch", "--json")
    assert json.loads(done.out) == row
    assert done.err.startswith("1. The task\n")


def test_a_fault_is_json_too(run, workplace: Path) -> None:
    run("compress", "runs/demo", "--prompt", "answer plainly", "--store", "gists")
    (file,) = Path("gists", "objects").glob("*/*")
    file.write_bytes(file.read_bytes()[:-1])
    done = run("store", "verify", "gists", "--json")
    assert done.code == 1
    (fault,) = (json.loads(line) for line in done.out.splitlines())
    assert (fault["kind"], fault["is_harmless"]) == ("torn", False)
    assert done.err.startswith("error: gists has 1 faults")


def test_other_output_goes_to_standard_error_with_json(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from gisting import visibility

    monkeypatch.setattr(visibility.Visibility, "save_drawing", lambda *args: print("noise of a library"))
    done = run("show", "a", "b", "--png", "x.png", "--json")
    assert [list(json.loads(line)) for line in done.out.splitlines()] == [["labels", "position_ids", "mask"]]
    assert done.err == "noise of a library\nsaved in x.png\n"
    assert run("show", "a", "b", "--png", "x.png").out.endswith("noise of a library\nsaved in x.png\n"), "put back"


# -- exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(COMMANDS.keys() - WITHOUT_JSON), ids=" ".join)
def test_an_unknown_option_is_wrong_usage(run, path: tuple[str, ...]) -> None:
    done = run(*path, "--no-such-option")
    assert (done.code, done.out) == (2, "")
    assert "No such option: --no-such-option" in done.err


@pytest.mark.parametrize("words", ["no-such-command", "store no-such", "show a b -k many", "show a b -k 0", "cost x"])
def test_wrong_usage(run, words: str) -> None:
    assert run(*words.split()).code == 2


@pytest.mark.parametrize(
    "words",
    [
        "compress runs/nothing --prompt a --output x",
        "distill runs/nothing --prompt-file {data} --output o",
        "generate runs/nothing --cache {cache}",
        "compare runs/nothing --prompt a",
        "check runs/nothing --cache {cache} --prompt a",
        "chat runs/nothing --cache {cache}",
        "eval runs/nothing --data {data}",
        "train runs/nothing --data {data} --output o",
        "internalize runs/nothing --prompt-file {data} --data {data} --output o",
        "report runs/nothing",
        "cost runs/nothing --prompt-tokens 1 --input-tokens 1",
        "apply-difference runs/nothing --base runs/demo --output o",
        "serve runs/nothing --store gists --dry-run",
        "inspect runs/nothing",
        "doctor runs/nothing",
        "bench inference --model runs/nothing",
        "store add other runs/nothing --name a",
        "store list runs/nothing",
        "store verify runs/nothing",
        "store remove runs/nothing a",
        "store gc runs/nothing",
        "store rebuild runs/nothing",
        "data alpaca-plus --output o --alpaca runs/nothing --self-instruct runs/nothing --human runs/nothing",
        "data self-distil runs/nothing --prompts {data} --inputs {data} --output o",
        "demo --from-scratch --steps 1 --output {data}",
        "try runs/nothing --prompt a --input b",
        "show a b --png runs/nothing/mask.png",
    ],
)
def test_a_missing_file_is_reported_in_one_line(run, workplace: Path, words: str) -> None:
    cache, data = "runs/demo/gists/instruction.gist.safetensors", "runs/demo/unseen.jsonl"
    done = run(*words.format(cache=cache, data=data).split())
    assert done.code == 1
    assert re.search(r"^error: .*(runs/nothing|unseen\.jsonl)", done.err, flags=re.MULTILINE), done.err
    assert "Traceback" not in done.err


def test_every_command_was_given_a_missing_file() -> None:
    (mark,) = (m for m in test_a_missing_file_is_reported_in_one_line.pytestmark if m.name == "parametrize")  # pyright: ignore
    tried = {path for path in COMMANDS for words in mark.args[1] if tuple(words.split()[: len(path)]) == path}
    assert tried == set(COMMANDS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("model.safetensors", "model.safetensors"),
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("gist.json", "gist.json"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe\x00junk"], ids=["empty", "object", "list", "binary"])
def test_a_damaged_checkpoint_is_reported_in_one_line(
    run, workplace: Path, damage: str, message: str, content: bytes
) -> None:
    Path("runs/demo", damage).write_bytes(content)
    done = run("compress", "runs/demo", "--prompt", "a", "--output", "c.st")
    assert done.code == 1
    assert re.search(r"^error: .*runs/demo", done.err, flags=re.MULTILINE), done.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (gisting.GistError("mend it so"), 1, "error: mend it so\n"),
        (PermissionError(13, "Permission denied", "one.st"), 1, "error: one.st: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (OSError("two\n  lines"), 1, "error: two lines\n"),
        (ModuleNotFoundError("No module named 'peft'"), 1, "error: No module named 'peft'\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: CUDA out of memory\n"),
        (safetensors.SafetensorError("header too small"), 1, "error: header too small\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_a_user_can_fix_is_one_line(
    run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("gisting.storage.inspect", fail)
    assert run("inspect", "one.st") == (code, "", said)


def test_a_bug_keeps_its_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gisting.storage.inspect", lambda path: {}["nothing"])
    with pytest.raises(KeyError):
        run("inspect", "one.st")


@pytest.mark.parametrize(
    "number",
    [pytest.param(1, marks=pytest.mark.slow, id="noticed at the end"), pytest.param(300, id="noticed while printing")],
)
def test_a_reader_that_has_gone_is_no_error(number: int) -> None:
    """As in ``gisting ... | head``: nothing is printed to standard error, not even by Python when it exits."""
    words = f"import sys; sys.argv = ['gisting', 'show', 'a ' * {number}, 'b']; from gisting.cli import main; main()"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-c", words],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.fixture
def complete(run, monkeypatch: pytest.MonkeyPatch):
    """Return what bash offers as completion of a line."""

    def ask(line: str) -> list[str]:
        monkeypatch.setenv("_GISTING_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        done = run()
        assert done.code == 0, done.err
        return done.out.split()

    return ask


def test_the_shell_completes_commands_and_options(complete) -> None:
    assert complete("gisting ") == [path[0] for path in dict.fromkeys((path[0],) for path in COMMANDS)]
    assert complete("gisting co") == ["cost", "compress", "compare"]
    assert complete("gisting store ver") == ["verify"]
    assert complete("gisting store gc --dr") == ["--drop-unnamed"]


def test_the_shell_completes_names_of_a_store(complete, run, workplace: Path) -> None:
    for name in ("capitals", "plainly"):
        run("compress", "runs/demo", "--prompt", name, "--name", name, "--store", "gists")
    assert complete("gisting store remove gists ") == ["capitals", "plainly"]
    assert complete("gisting generate runs/demo --store gists --name pl") == ["plainly"]
    assert complete("gisting generate runs/demo --store nothing --name pl") == []
    assert complete("gisting store list gists --json --he") == ["--help"]


def test_names_are_completed_without_torch(workplace: Path, run) -> None:
    run("compress", "runs/demo", "--prompt", "a", "--name", "first", "--store", "gists")
    code = f"""
        import os, sys
        os.environ.update(_GISTING_COMPLETE="complete_bash", COMP_WORDS="gisting store remove {workplace / "gists"} ",
                          COMP_CWORD="4")
        sys.argv = ["gisting"]
        from gisting.cli import main
        try:
            main()
        except SystemExit:
            print("torch" in sys.modules)
    """
    assert fresh_python(code) == "first\nFalse"
