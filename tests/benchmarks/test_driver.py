"""``python -m benchmarks``: the list, options, exit statuses."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as driver
from benchmarks.__main__ import BENCHMARKS, run
from gisting.errors import GistError

LIST = """
import sys
from benchmarks.__main__ import run
assert run([]) == 0
assert not {"torch", "transformers", "triton"} & sys.modules.keys()
"""


def test_the_list_has_a_line_for_each_and_imports_none() -> None:
    done = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list(BENCHMARKS)
    assert all(summary.endswith(".") for _, summary in lines)


def test_help_lists_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["store", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: python -m benchmarks store [OPTIONS]" in shown
    assert "--storage" in shown
    assert "python -m benchmarks store --output docs/results/store.jsonl" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed"], "there is no benchmark 'speed'; choose from adapter, adapter-distil, card, "),
        (["store", "--speed"], "No such option: --speed"),
        (["store", "--shapes", "huge"], "--shapes must be names of tiny, small, got 'huge'"),
        (["cpu-attention", "--tokens", "512,x"], "--tokens must be comma-separated whole numbers, got '512,x'"),
    ],
    ids=["name", "option", "choice", "number"],
)
def test_wrong_words_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("status", [None, 0, 3])
def test_the_status_of_a_benchmark_is_the_exit_status(status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.importlib, "import_module", lambda name: SimpleNamespace(main=lambda: status))
    assert run(["store"]) == (status or 0)


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise GistError("the gate failed")

    monkeypatch.setattr(driver.importlib, "import_module", lambda name: SimpleNamespace(main=fail))
    assert run(["store"]) == 1
    assert capsys.readouterr().err == "error: the gate failed\n"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_typed_options_and_a_summary(name: str) -> None:
    if name in ("kernels", "tune", "resources"):
        pytest.importorskip("triton", reason="needs triton: pip install 'gist-tokens[kernels]'")
    function = driver.importlib.import_module(BENCHMARKS[name]).main
    assert (inspect.getdoc(function) or "").partition("\n")[0].endswith(".")
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not parameter.empty, parameter
