"""The settings of ``gisting internalize``: old names of options and recipe keys, and one table for all three."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import gisting
from gisting import GistError
from gisting.internalize.settings import InternalizeSettings, StageSettings
from gisting.internalize.stages import internalize
from tests import tiny

OLD = (
    "model: m\ntemplate: rules.txt\ndata: train.jsonl\noutput: runs/x\ncompressor: rewrites\nexamples: 3\ntail: gist\n"
    "gist_stages: 2\nlayout: plain\n"
)


def test_keyword_arguments_come_from_the_table() -> None:
    parameters = inspect.signature(internalize).parameters
    for each in fields(StageSettings):
        assert parameters[each.name].default == each.default
    with pytest.raises(TypeError, match="max_lenght"):
        StageSettings(max_lenght=3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("text", [OLD, "\n".join(reversed(OLD.splitlines()))], ids=["in-order", "reversed"])
def test_a_recipe_of_version_01_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = InternalizeSettings.load(path)
    assert any("template is now called prompt_file" in str(each.message) for each in warned)
    assert len(warned) == 5
    assert (found.prompt_file, found.template, found.shortener) == ("rules.txt", "plain", "rewrites")
    assert (found.max_examples, found.num_gist_stages) == (3, 2)


def test_the_template_of_a_recipe_is_a_conversations(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text in ("template: chat\n", "template: chat\nprompt_file: rules.txt\n"):
        path.write_text(text, encoding="utf-8")
        assert InternalizeSettings.load(path).template == "chat"
    path.write_text("template: rules.txt\nprompt_file: rules.txt\n", encoding="utf-8")
    with pytest.raises(GistError, match=r"recipe.yaml, line 1: template must be one of .*: --prompt-file FILE\)"):
        InternalizeSettings.load(path)


def test_a_recipe_with_an_old_and_its_new_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("max_examples: 4\nexamples: 3\n", encoding="utf-8")
    with pytest.raises(GistError, match="line 2: max_examples is given twice, also by its old name"), pytest.warns():
        InternalizeSettings.load(path)


def test_old_keywords_of_shortening_work_for_one_release() -> None:
    from gisting.internalize.shorteners import NoShortening, shorten

    with pytest.warns(DeprecationWarning, match="the argument template will be removed"):
        assert shorten(NoShortening(), template="a b", share=0.5) == "a b"  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--compressor none", "note: --compressor is now called --shortener"),
        ("--layout plain", "note: --layout is now called --template"),
        ("--control compressed --share 0.5", "note: the control 'compressed' will be removed in the next release; use"),
        ("--recipe old.yaml", "old.yaml: template is now called prompt_file"),
    ],
)
def test_old_options_print_a_note(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, note: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(OLD, encoding="utf-8")
    done = run("internalize", *words.split())
    assert done.code == 1, "required settings or files are missing"
    assert note in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "m --data d --output o --template t.txt",
            "error: template must be one of alpaca, alpaca-t5, plain, chat (the",
        ),
        ("m --prompt-file p.txt", "error: data and output must be given, on the command line or in a recipe"),
    ],
)
def test_what_is_missing_is_named(run: Callable[..., Any], words: str, message: str) -> None:
    done = run("internalize", *words.split())
    assert (done.code, message in done.err) == (1, True), done.err


def test_columns_have_other_names(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are read before the model, which is not there."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("be brief", encoding="utf-8")
    Path("q.csv").write_text("question,answer\na,b\n", encoding="utf-8")
    words = ("internalize", "none/at/all", "--prompt-file", "p.txt", "--data", "q.csv", "--output", "o", "--columns")
    assert "q.csv, line 2 has no column 'query' for 'input'" in run(*words, "input=query").err
    assert "q.csv" not in run(*words, "input=question,output=answer").err


def test_old_options_are_not_in_the_help(run: Callable[..., Any]) -> None:
    text = run("internalize", "--help").out
    assert "--shortener" in text
    assert "--compressor" not in text
    assert "--layout" not in text


@pytest.mark.parametrize(
    "words", ["--method on-policy --questions 12", "--method self-study --questions 12 --weights lora"]
)
def test_a_method_without_stages_needs_no_records(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    gisting.save_pretrained(*tiny.patched("llama"), "base")
    Path("p.txt").write_text(tiny.words(9, 1), encoding="utf-8")
    Path("q.jsonl").write_text('{"input": "w1 w2", "output": "w3"}\n', encoding="utf-8")
    given = (
        "internalize base --prompt-file p.txt --eval q.jsonl --output o --max-steps 2 --batch-size 4 --max-new-tokens 3"
    )
    done = run(*given.split(), *words.split())
    assert done.code == 0, done.err
    assert "saved in o; run it on the bare query: " in done.out
    report = run("report", "o")
    assert words.split()[1] in report.out
    assert "m --data d" not in done.err


def test_what_is_trained_was_called_method(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("internalize", "--method", "lora")
    assert "note: method lora is now called weights lora" in done.err
