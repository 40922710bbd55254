"""``card``: what it states, what it leaves open, and that no text can break its YAML or its tables."""

from __future__ import annotations

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard, RepoCard
from hypothesis import given, settings
from hypothesis import strategies as st

from gisting.card import card, is_repository_id
from gisting.errors import GistError

PLAIN: dict[str, Any] = {
    "title": "owner/name",
    "num_gist_tokens": [1, 2, 3, 5, 6, 9],
    "template": "alpaca",
    "model": "llama/0123456789ab",
}


def cells(text: str) -> list[list[str]]:
    """Split the rows of all tables as GitHub's Markdown does: at bars that have no backslash before them."""
    rows = [line for line in text.split("---\n", 2)[2].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_checkpoint() -> None:
    text = card(
        "checkpoint",
        **PLAIN,
        data="5,000 records",
        metrics={"exact_match": 0.25, "rouge_l": 0.123456789},
        license="apache-2.0",
        base_model="maker/base",
    )
    read: Any = ModelCard(text).data
    assert read.library_name == "gisting"
    assert read.license == "apache-2.0"
    assert read.base_model == "maker/base"
    assert "gisting" in (read.tags or [])
    assert read.model_name == "owner/name"
    assert [(found.dataset_name, found.metric_type, found.metric_value) for found in read.eval_results or []] == [
        ("5,000 records", "exact_match", 0.25),
        ("5,000 records", "rouge_l", 0.123456789),
    ]
    assert cells(text) == [
        ["", ""],
        ["---", "---"],
        ["gist tokens for a prompt (k)", "1 to 3, 5, 6, 9"],
        ["template", "alpaca"],
        ["model", "llama/0123456789ab, made from maker/base"],
        ["data", "5,000 records"],
        ["metric", "value"],
        ["---", "---"],
        [r"exact\_match", "0.25"],
        [r"rouge\_l", "0.123457"],
    ]
    assert 'gisting.load("owner/name")' in text


def test_a_training_and_its_evaluations() -> None:
    rows = [
        {"condition": "gist", "num_gist_tokens": 2, "num_records": 5, "exact_match": 0.75, "perplexity": None},
        {"condition": "no|prompt", "num_gist_tokens": 2, "num_records": 5, "exact_match": 0.0, "perplexity": 3.5},
    ]
    text = card(
        "checkpoint",
        **PLAIN,
        data="train.jsonl",
        metrics={"train_loss": 1.5},
        facts={"method": "gist-lora", "a|b": "c\nd"},
        settings={"max_steps": 3, "part_separator": "\n| "},
        evaluations={"unseen.jsonl": rows},
        extra="The end.",
    )
    read: Any = ModelCard(text).data
    assert [(one.dataset_name, one.metric_type, one.metric_name, one.metric_value) for one in read.eval_results] == [
        ("train.jsonl", "train_loss", None, 1.5),
        ("unseen.jsonl", "exact_match", "exact_match (k = 2)", 0.75),
    ], "the controls are not results of the model"
    assert cells(text)[5:] == [
        ["data", "train.jsonl"],
        ["method", "gist-lora"],
        [r"a\|b", "c d"],
        ["metric", "value"],
        ["---", "---"],
        [r"train\_loss", "1.5"],
        ["k", "condition", "records", r"exact\_match", "perplexity"],
        ["---"] * 5,
        ["2", "gist", "5", "0.75", "-"],
        ["2", r"no\|prompt", "5", "0", "3.5"],
        ["setting", "value"],
        ["---", "---"],
        [r"max\_steps", "3"],
        [r"part\_separator", r"\|"],
    ]
    assert text.endswith("\n\nThe end.\n")


def test_store() -> None:
    text = card("store", **PLAIN, extra="## More\n\nThe rest.\n")
    read: Any = ModelCard(text).data
    assert read.base_model is None, "a fingerprint is not a repository"
    assert read.eval_results is None
    assert 'GistStore.from_pretrained("owner/name")' in text
    assert text.endswith("\n\n## More\n\nThe rest.\n")


@pytest.mark.parametrize("kind", ["checkpoint", "store"])
def test_what_is_not_stated(kind: str) -> None:
    text = card(kind, title="owner/name", num_gist_tokens=None, template="plain", model="llama")
    assert ["gist tokens for a prompt (k)", "not stated"] in cells(text)
    assert ["data", "not stated"] in cells(text)
    assert "## Measured\n\nNothing was measured.\n" in text
    assert "model-index" not in text
    assert "license" not in text


def test_metrics_without_data_stay_out_of_the_index() -> None:
    """The hub's index requires the data that a value was measured on."""
    text = card("checkpoint", **PLAIN, metrics={"loss": 2})
    assert ["loss", "2"] in cells(text)
    assert "model-index" not in text


@pytest.mark.parametrize(
    ("counts", "shown"), [(4, "4"), ([4], "4"), ([3, 1, 2], "1 to 3"), (range(1, 3), "1, 2"), ([2, 2], "2")]
)
def test_counts(counts: Any, shown: str) -> None:
    text = card("checkpoint", **{**PLAIN, "num_gist_tokens": counts})
    assert ["gist tokens for a prompt (k)", shown] in cells(text)


@pytest.mark.parametrize("title", ["my checkpoint", "", "a/b/c", "/etc/passwd", 'x") or exit("/y', "owner/na\nme"])
def test_example_names_a_directory_where_the_title_is_no_repository(title: str) -> None:
    assert 'gisting.load("path/to/this/directory")' in card("checkpoint", **{**PLAIN, "title": title})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "model"}, r"^kind must be one of checkpoint, store, got 'model'$"),
        ({"base_model": "runs"}, r"^base_model must be a repository on the hub, 'owner/name', got 'runs'$"),
        (
            {"metrics": {"loss": float("nan")}},
            r"^metrics\['loss'\] must be a finite number, got nan; leave out what was not measured$",
        ),
        ({"metrics": {"loss": True}}, r"^metrics\['loss'\] must be a finite number, got True"),
        ({"metrics": {"loss": "0.5"}}, r"^metrics\['loss'\] must be a finite number, got '0.5'"),
    ],
    ids=str,
)
def test_card_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = {"kind": "checkpoint", **PLAIN, **changes}
    with pytest.raises(GistError, match=message):
        card(arguments.pop("kind"), **arguments)


HOSTILE = st.one_of(
    st.text(),
    st.sampled_from(
        ["---\nlicense: x", "a: b", "\n---\n", "| | |", "'\"", "{}[]", "!!python/object:os", "\ud800", "\0"]
    ),
)


@settings(max_examples=30)
@given(title=HOSTILE, template=HOSTILE, model=HOSTILE, data=HOSTILE, license=HOSTILE, metric=HOSTILE)
def test_no_text_breaks_the_card(**texts: Any) -> None:
    metrics = {texts.pop("metric"): 0.5}
    text = card("store", num_gist_tokens=1, metrics=metrics, **texts)
    text.encode()
    front, body = re.match(r"---\n(.*?)\n---\n\n(# .*)\Z", text, re.DOTALL).groups()  # type: ignore[union-attr]
    assert RepoCard(text).text.strip() == body.strip(), "the front matter ends where it should"
    assert set(RepoCard(text).data.to_dict()) <= {"library_name", "tags", "license", "model-index"}
    assert RepoCard(text).data.to_dict().get("license", "") == " ".join(
        "".join(character if character.isprintable() else " " for character in texts["license"]).split()
    )
    assert "\n---" not in front
    assert [len(row) for row in cells(text)] == [2] * 9


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", True), ("A-1/b.c_d", True), ("b", False), ("a/b/c", False), ("/a/b", False), ("../b", False), ("", False)],
)
def test_repository_ids(name: str, is_one: bool) -> None:
    assert is_repository_id(name) is is_one
