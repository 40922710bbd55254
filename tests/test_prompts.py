"""Files of prompts: what is read, and that errors name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gisting import GistTokenizer
from gisting.data.prompts import PromptRecord, load_prompts
from gisting.errors import RecordError
from tests.chats import CHATS, WEATHER


def written(folder: Path, text: str, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = written(tmp_path, 'answer in French\n\n  {"prompt": "as written"}  \nüber 東京\n', "prompts.txt")
    assert load_prompts(path) == [
        PromptRecord("answer in French"),
        PromptRecord('{"prompt": "as written"}'),
        PromptRecord("über 東京"),
    ]


def test_json_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '{"prompt": "answer in French"}\n\n'
        '{"prompt": "two\\nlines", "name": "both", "num_gist_tokens": 3}\n'
        '{"prompt": "c\u2028d", "name": null, "num_gist_tokens": null}\n',
    )
    assert load_prompts(path) == [
        PromptRecord("answer in French"),
        PromptRecord("two\nlines", "both", 3),
        PromptRecord("c\u2028d"),
    ]


def test_a_list_and_a_table(tmp_path: Path) -> None:
    """A file of JSON is not read as text."""
    assert load_prompts(written(tmp_path, '["a", {"prompt": "b", "name": "c"}]', "prompts.json")) == [
        PromptRecord("a"),
        PromptRecord("b", "c"),
    ]
    assert load_prompts(written(tmp_path, "prompt,name\na,01\n", "prompts.csv")) == [PromptRecord("a", "01")]
    assert load_prompts(written(tmp_path, '{"prompt": "a"}\r\n', "prompts.NDJSON")) == [PromptRecord("a")]
    assert load_prompts(written(tmp_path, "\ufeffa\r\nb\x0cc\n", "prompts.md")) == [
        PromptRecord("a"),
        PromptRecord("b\x0cc"),
    ]
    with pytest.raises(
        RecordError, match=r"prompts\.yaml must end in one of \.json, .*, or in \.txt for one prompt per"
    ):
        load_prompts(written(tmp_path, "a\n", "prompts.yaml"))
    with pytest.raises(
        RecordError, match=r"prompts\.json, record 2 must be an object with a non-empty string 'prompt'"
    ):
        load_prompts(written(tmp_path, '["a", 3]', "prompts.json"))


def test_prompts_of_conversations_and_with_tools(tmp_path: Path) -> None:
    tokenizer = GistTokenizer(CHATS["qwen2.5"].tokenizer(), "chat")
    system = {"role": "system", "content": "be brief"}
    items = [
        {"messages": [system, {"role": "user", "content": "hi"}], "name": "a", "num_gist_tokens": 3},
        {"conversations": [{"from": "system", "value": "be kind"}], "tools": None},
        {"prompt": "be brief", "tools": [WEATHER], "name": "b"},
        {"messages": [system], "tools": json.dumps([WEATHER])},
        {"tools": [WEATHER]},
        {"prompt": None, "messages": None, "conversations": [system], "name": None, "tools": None},
        {"prompt": "c", "messages": None},
    ]
    path = written(tmp_path, "\n".join(map(json.dumps, items)))
    both, alone = tokenizer.prompt_with_tools("be brief", [WEATHER]), tokenizer.prompt_with_tools(None, [WEATHER])
    assert load_prompts(path, tokenizer) == [
        PromptRecord("be brief", "a", 3),
        PromptRecord("be kind"),
        PromptRecord(both, "b"),
        PromptRecord(both),
        PromptRecord(alone),
        PromptRecord("be brief"),
        PromptRecord("c"),
    ]
    with pytest.raises(RecordError, match=r"line 3 has tools or other parts of messages that a chat template lays out"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "\\ud83d"}', r"line 1 has '\\ud83d' at character 0, half of a character"),
        ("", r"prompts\.jsonl contains no prompts; write one per line$"),
        ('{"prompt": "a"}\n{"prompt"', r"prompts\.jsonl, line 2 is not JSON"),
        ("[" * 100_000, r"prompts\.jsonl, line 1 is not JSON"),
        ('["a"]', "line 1 must be an object with a non-empty string 'prompt'"),
        ('" "', "line 1 must be an object with a non-empty string 'prompt'"),
        ('{"prompt": "  "}', "line 1 must be an object with a non-empty string 'prompt'"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "line 1 has no system message, which is what is compressed",
        ),
        ('{"messages": ["a"]}', "line 1, message 0 must be an object with role and content, got str"),
        ('{"prompt": 3}', "line 1 must be an object with a non-empty string 'prompt'"),
        ('{"prompt": "a", "k": 3}', "line 1 has unknown keys k; known are prompt, messages, tools, name and num"),
        ('{"prompt": "a", "name": 3}', "line 1: 'name' must be a string, got 3"),
        ('{"prompt": "a", "num_gist_tokens": 0}', "'num_gist_tokens' must be a whole number of at least 1, got 0"),
        ('{"prompt": "a", "num_gist_tokens": true}', "must be a whole number of at least 1, got True"),
        (
            '{"prompt": "a", "name": "x"}\n\n{"prompt": "b", "name": "x"}',
            "line 3: name 'x' is already used on line 1; choose another",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        load_prompts(written(tmp_path, text))


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(RecordError, match=r"prompts\.txt is not UTF-8 text"):
        load_prompts(path)
