"""Run the notebook, and check that its cells print what the text next to them says.

By default it trains for a few steps only; with ``slow``, as it is, until the model has learned.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "gisting_in_ten_minutes.ipynb"


def printed(notebook: nbformat.NotebookNode, heading: str) -> str:
    """Join what the cells under a heading print."""
    text, is_under = "", False
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and "## " in cell.source:
            is_under = heading in cell.source
        elif cell.cell_type == "code" and is_under:
            text += "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
    return text


def test_it_is_committed_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("steps", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_it_runs_and_shows_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more threads would wait for those of other pytest workers
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training,) = [cell for cell in notebook.cells if "STEPS, ROWS = 300, 32" in cell.source]
    training.source = training.source.replace("STEPS, ROWS = 300, 32", f"STEPS, ROWS = {steps}, 32")
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    rows = printed(notebook, "Only the mask changes").splitlines()
    assert rows[-1].split() == ["stone", ".", ".", ".", "1", "1", "1"]
    found = re.findall(r"^(\w+) +([\d.]+) % exact$", printed(notebook, "Did it learn?"), re.MULTILINE)
    exact = {name: float(value) for name, value in found}
    assert exact.keys() == {"gist", "positive", "negative"}
    if steps == 300:
        assert exact["gist"] >= 90
        assert exact["positive"] >= 90
        assert exact["negative"] <= 5
    answered = printed(notebook, "Compress a prompt once")
    (rule,) = re.findall(r"begin your answer with (\w+) and end it with (\w+)", answered)
    answers = re.findall(r"^(\w+ \w+) +->  (.*)$", answered, re.MULTILINE)
    assert len(answers) == 3
    if steps == 300:
        assert [answer for _, answer in answers] == [f"{rule[0]} {asked} {rule[1]}" for asked, _ in answers]
    table = [line.split() for line in printed(notebook, "What it saves").splitlines()[1:]]
    assert [row[:2] for row in table] == [["no", "cache"], ["prefix", "cache"], ["gist", "cache"]]
    kept = [int(row[4].replace(",", "")) for row in table]
    assert kept[0] == 0
    assert kept[1] == int(table[1][3]) * kept[2], "one gist token needs the bytes of one prompt token"
