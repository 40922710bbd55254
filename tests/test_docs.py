"""Run the commands and the Python code on the pages of docs/, as far as they do not need a GPU."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import garbage, shell, tiny
from tests.repository import fences_in

ROOT = Path(__file__).resolve().parents[1]


def fences(page: str, language: str) -> list[str]:
    found = fences_in((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [fence.text for fence in found if fence.language == language]


def run_all(page: str, names: dict[str, Any], *, skip: str | None = None) -> dict[str, Any]:
    for number, text in enumerate(fences(page, "python")):
        if skip is None or skip not in text:
            exec(compile(text, f"docs/{page}, python {number}", "exec"), names)
    return names


def run_commands(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(fences(page, "bash")).splitlines()
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "gisting"
        done = shell.call(monkeypatch, capsys, *words)
        assert done.code == 0, f"{line}\n{done.err}"


def test_stores(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "answer plainly", "name": "plainly"}\n', encoding="utf-8")
    run_commands("stores.md", monkeypatch, capsys)
    names = run_all("stores.md", {})
    assert [entry.name for entry in names["store"].list()] == ["backwards", "capitals", "plainly", "reverse"]
    assert names["chain"].num_gist_tokens == [4]
    assert len(names["copy"]) == 4
    assert "license: apache-2.0" in Path("shared", "README.md").read_text(encoding="utf-8")


def test_training(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "recipes", "recipes")
    Path("prompts.txt").write_text("answer plainly\nreverse the letters\n", encoding="utf-8")
    run_commands("training.md", monkeypatch, capsys)
    names = run_all("training.md", {})
    assert names["metrics"]["train_loss"] > 0
    made = {path.name for path in Path("runs").iterdir()}
    assert made == {"demo", "any-k", "packed", "distilled", "adapter", "alone", "recipe", "more"}


def test_internalisation(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "recipes", "recipes")
    with garbage.frozen():
        names = run_all("internalisation.md", {})
        run_commands("internalisation.md", monkeypatch, capsys)
    assert [stage.num_examples for stage in names["result"].stages] == [2, 1, 0]
    made = {path.name for path in Path("runs").iterdir()}
    assert made == {"demo", "reverse", "in-stages", "control", "by-recipe", "rewritten", "report.md"}
    assert "| full prompt with a prefix cache |" in Path("runs/report.md").read_text(encoding="utf-8")


def test_generation(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextIteratorStreamer, pipeline

    import gisting

    torch.manual_seed(0)
    model, _ = gisting.load("runs/demo")
    names = {
        "prompts": ["please reverse the letters", "answer plainly"],
        "inputs": ["a b c", "d e"],
        "next_inputs": ["f", "g h"],
        "text": "a b c d",
        "small": gisting.unpatch(copy.deepcopy(model)),
        "TextIteratorStreamer": TextIteratorStreamer,
        "Thread": threading.Thread,
        "pipeline": pipeline,
        "torch": torch,
    }
    run_all("generation.md", names, skip='"cuda"')
    assert len(names["turn"].texts) == 2
    capsys.readouterr()


def test_index(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_all("index.md", {})
    assert names["cache"].num_gist_tokens == [2]
    run_commands("index.md", monkeypatch, capsys)


def test_a_template_of_your_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gisting

    model, tokenizer = gisting.load("runs/demo")
    gisting.unpatch(model).save_pretrained("runs/base")
    tokenizer.tokenizer.save_pretrained("runs/base")
    names = run_all("how_to_template.md", {})
    assert names["encoding"].num_gist_tokens == 2
    run_commands("how_to_template.md", monkeypatch, capsys)
    trained = gisting.GistTokenizer.from_pretrained("runs/support-trained")
    assert trained.template == names["support"]


def test_gist_t5(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model("t5").save_pretrained("runs/t5")
    tiny.word_tokenizer().save_pretrained("runs/t5")
    run_commands("how_to_t5.md", monkeypatch, capsys)
    names = run_all("how_to_t5.md", {})
    assert names["cache"].last_hidden is not None
    assert names["tokenizer"].template.name == "alpaca-t5"


def test_train_with_lora(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_commands("how_to_lora.md", monkeypatch, capsys)
    names = run_all("how_to_lora.md", {}, skip="from trl")  # run by tests/test_trl.py
    assert 0 < names["metrics"]["num_trainable_parameters"] < names["metrics"]["num_parameters"] / 10
    assert not Path("runs/lora/model.safetensors").exists()
    capsys.readouterr()


def test_the_guide_to_the_code_names_what_is_there() -> None:
    """Its tables name functions of files, ``| `models/patch.py` `require_patched` |``; the text names files."""
    text = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    pairs = re.findall(r"`([\w/]+\.py)` `(?:\w+\.)?(\w+)", text)
    assert len(pairs) > 10
    faults = [
        pair for pair in pairs if not re.search(rf"\b{pair[1]}\b", (ROOT / "gisting" / pair[0]).read_text("utf-8"))
    ]
    for path in re.findall(r"`((?:gisting|tests)/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
    assert faults == []


def marked(page: str, mark: str) -> str:
    """Return the fence below ``<!-- mark -->``."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return fences_in(text[text.index(f"<!-- {mark} -->") :])[0].text


def test_a_model_family_is_added_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models import test_families

    names: dict[str, Any] = {}
    exec(marked("code.md", "family"), names)
    assert names["found"].passed
    monkeypatch.setitem(tiny.DECODERS, "arcee", {})
    test_families.test_interval_mask_is_dense_mask("arcee", "gist")
    test_families.test_cached_is_uncached("arcee")


def test_a_mask_is_added_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import gisting
    from gisting import visibility
    from tests.models import test_families

    names = dict(vars(visibility))  # the lines belong to that module
    exec(marked("code.md", "rule"), names)
    *drawing, positions = marked("code.md", "drawing").splitlines()
    tokens = drawing[0].split()
    mask = names["gist_and_last"](torch.tensor([[token == "G" for token in tokens]]))
    assert mask.draw(tokens).splitlines() == drawing
    assert positions.split()[1:] == [str(position) for position in mask.position_ids[0].tolist()]

    monkeypatch.setitem(visibility.CONDITIONS, "gist-and-last", names["gist_and_last"])
    model, tokenizer = tiny.patched("llama")
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3", "w4"], 2, condition="gist-and-last")
    assert cache.num_gist_tokens == [3, 3]
    test_families.test_interval_mask_is_dense_mask("llama", "gist-and-last")


def test_a_shortener_is_added_as_told() -> None:
    from gisting.internalize.shorteners import Shortener, shorten

    names: dict[str, Any] = {}
    exec(marked("code.md", "shortener"), names)
    shortener: Shortener = names["FirstWords"]()
    assert [shorten(shortener, "a b c d", share) for share in (1, 0.5, 0)] == ["a b c d", "a b", ""]


@pytest.mark.slow
def test_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The two tables of the page match the output of its commands."""
    monkeypatch.chdir(tmp_path)
    (config,) = fences("costs.md", "json")
    Path("llama-7b.json").write_text(config, encoding="utf-8")
    (commands,) = fences("costs.md", "bash")
    for command, expected in zip(commands.splitlines(), fences("costs.md", "text"), strict=True):
        done = shell.call(monkeypatch, capsys, *shlex.split(command)[1:])
        assert (done.code, done.err) == (0, "")
        assert [line.rstrip() for line in done.out.splitlines()] == expected.splitlines()
    names = run_all("costs.md", {})
    assert names["gist"].saved_to_first_token(names["none"]) > 0.4
    assert len(names["curve"]) == 999
    capsys.readouterr()
