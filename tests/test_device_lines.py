"""Check that docs/device_lines.md lists every line that runs only on an accelerator, and that its tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "device_lines.md"
#: Matches such a line, in code without docstrings and comments.
PATTERN = re.compile(
    r"""\.type\ [!=]=\ " | \.is_cuda\b | \bis_compiling\(\) | _assert_async | assert_on_device\( | pin_memory
    | \bautocast\( | is_autocast | get_autocast | is_inference\b | is_inference_mode | [^_]inference_mode\(
    | torch\.cuda\. | torch\.accelerator | torch\.backends\.cuda | torch\.version\.(hip|cuda) | \.Stream\(""",
    re.VERBOSE,
)


class Row(NamedTuple):
    """A row of the table: a file, a snippet of its lines, and the tests on a card and without one."""

    file: str
    snippet: str
    on_card: list[str]
    without: list[str]


def rows_of(page: str) -> list[Row]:
    table = page.split("<!-- lines -->")[1].split("\n\n")[1]
    rows = []
    for line in table.splitlines()[2:]:
        file, snippet, _, on_card, without = (cell.strip() for cell in line.strip("| ").split(" | "))
        tests = [re.findall(r"`(tests/[^`]+)`", cell) for cell in (on_card, without)]
        rows.append(Row(file.strip("`"), snippet.strip("`"), *tests))
    return rows


def device_lines(source: str) -> list[str]:
    """Find the lines of ``source`` that run only on an accelerator."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
        if isinstance(node, ast.FunctionDef | ast.Assign) and re.search(
            "def assert_on_device|__all__", lines[node.lineno - 1]
        ):
            lines[node.lineno - 1] = ""
    return [line for line in (re.sub(r"\s+#.*|^#.*", "", line).strip() for line in lines) if PATTERN.search(line)]


def sources() -> dict[str, str]:
    paths = [*ROOT.glob("gisting/**/*.py"), *ROOT.glob("kernels/gisting_kernels/**/*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def faults(rows: list[Row], files: dict[str, str]) -> list[str]:
    found, used = [], set()
    for file, source in files.items():
        for line in device_lines(source):
            covering = [row for row in rows if row.file == file and row.snippet in line]
            used.update(row[:2] for row in covering)
            if not covering:
                found.append(f"{file}: no row for {line}")
    found += [f"{row.file}: no line has {row.snippet}" for row in rows if row[:2] not in used]
    for row in rows:
        for test in row.on_card + row.without:
            path, _, name = test.partition("::")
            if not (ROOT / path).is_file() or f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8"):
                found.append(f"{row.file}, {row.snippet}: there is no {test}")
    return found


def test_every_line_is_listed() -> None:
    assert faults(rows_of(PAGE.read_text(encoding="utf-8")), sources()) == []


def test_tests_on_a_card_are_run_there() -> None:
    """``make test-card`` includes them."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    run = re.search(r"^CARD_TESTS := ((?:.*\\\n)*.*)", makefile, re.MULTILINE)
    assert run
    chosen = tuple(run[1].replace("\\\n", " ").split())
    for row in rows_of(PAGE.read_text(encoding="utf-8")):
        for test in row.on_card:
            assert test.startswith(chosen), test


def test_planted_faults_are_found() -> None:
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    first, files = rows[0], {rows[0].file: sources()[rows[0].file]}
    ours = [row for row in rows if row.file == first.file]
    assert faults(ours, files) == []
    more = {first.file: files[first.file] + '\nif q.device.type == "xpu":\n    pass\n'}
    assert faults(ours, more) == [f'{first.file}: no row for if q.device.type == "xpu":']
    assert faults([*ours, first._replace(snippet="nothing")], files) == [f"{first.file}: no line has nothing"]
    (missing,) = faults([first._replace(on_card=["tests/test_device.py::test_none"])], files)
    assert missing.endswith("there is no tests/test_device.py::test_none")


def test_device_lines() -> None:
    source = '''
"""A module about q.is_cuda."""
# q.is_cuda in a comment
if q.is_cuda:  # and here
    torch.cuda.synchronize()
with torch.inference_mode():
    "torch.cuda.in_a_string"
config.inference_mode = True
'''
    assert device_lines(source) == ["if q.is_cuda:", "torch.cuda.synchronize()", "with torch.inference_mode():"]
