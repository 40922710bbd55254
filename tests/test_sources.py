"""Files and data sets as people have them: what is read as records and prompts, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from typer.testing import CliRunner

import gisting
from gisting import GistCollator, GistError, GistTokenizer, Record, load_records
from gisting.cli import app
from gisting.data.messages import as_instructions
from gisting.data.records import records_of, save_records, say_shared, to_record, to_records
from gisting.errors import RecordError
from gisting.eval.conditions import evaluate
from gisting.eval.results import evaluate_splits
from gisting.serving.requests import chat_ids
from gisting.tokens.text import read_text
from gisting.train.finetune import finetune, published_arguments
from tests import tiny
from tests.chats import CALLED, CHATS, WEATHER

datasets = pytest.importorskip("datasets")

RECORDS = [
    Record("talk as a pirate", "hello", "arr"),
    Record("translate", "01", "NA"),
    Record("a\nb", '"x", y', "☕"),
]
ROWS = [{"instruction": one.instruction, "input": one.input, "output": one.output} for one in RECORDS]

# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"be brief", "be brief"),
        (b"\xef\xbb\xbfbe brief\n", "be brief"),
        (b"be\r\nbrief\r\n", "be\nbrief"),
        (b"be\rbrief\r", "be\nbrief"),
        (b"be brief\n\n", "be brief\n"),
        ("be\u2028brief\x0c\n".encode(), "be\u2028brief\x0c"),
        (b"\n", ""),
    ],
)
def test_a_text_file_is_what_an_editor_shows(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    assert read_text(tmp_path / "prompt.txt") == text


@pytest.mark.parametrize("text", ["\ud83d", "caf\udce9"], ids=["half-an-emoji", "argument-that-is-not-utf8"])
def test_half_characters_are_refused_with_their_place(tokenizer: GistTokenizer, text: str) -> None:
    with pytest.raises(GistError, match=r"^prompts\[1\] has '\\u\w+' at character \d, half of a character or a byte"):
        tokenizer.encode_prompts(["w1", text], 1)
    with pytest.raises(RecordError, match=r"^record 1 of the batch: 'input' has '\\u\w+' at character \d"):
        GistCollator(tokenizer)([RECORDS[0], Record("w1", text, "w2")])


# -- files -------------------------------------------------------------------------------------------------------------


def written(folder: Path, name: str) -> Path:
    """Write the records to a file of the kind that its name says."""
    path = folder / name
    kind = path.suffix.lower()
    table = datasets.Dataset.from_list(ROWS)
    if kind == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind in (".jsonl", ".ndjson"):
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    elif kind in (".csv", ".tsv"):
        table.to_csv(path, sep="\t" if kind == ".tsv" else ",")
    elif kind == ".parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "A.JSONL", "a.ndjson", "a.csv", "a.tsv", "a.parquet", "saved-to-disk"]
)
def test_every_kind_of_file_has_the_same_records(tmp_path: Path, name: str) -> None:
    """Every cell of a table is the text that it is: 01 is no number and NA is not missing."""
    assert load_records(written(tmp_path, name)) == RECORDS
    assert load_records(str(written(tmp_path, name))) == RECORDS


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,context,answer,output,n\nq,c,a,o,1\n", encoding="utf-8")
    columns = {"instruction": "context", "input": "question", "output": "answer"}
    assert load_records(path, columns=columns) == [Record("c", "q", "a")]
    with pytest.raises(
        RecordError, match=r"a\.csv, line 2 has no column 'questoin' for 'input'; it has 'question', 'context', "
    ):
        load_records(path, columns={"input": "questoin"})
    with pytest.raises(RecordError, match="columns must name instruction, input, output, messages, tools, got prompt"):
        load_records(path, columns={"prompt": "question"})


def test_columns_may_be_swapped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]), encoding="utf-8")
    assert load_records(path, columns={"instruction": "input", "input": "instruction"}) == [
        Record("hello", "talk as a pirate", "arr")
    ]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none.parquet", FileNotFoundError, "none.parquet"),
        ("none.csv", FileNotFoundError, "none.csv"),
        ("none.txt", FileNotFoundError, "none.txt"),
        ("none", FileNotFoundError, "none"),
    ],
)
def test_a_missing_file_is_an_os_error(tmp_path: Path, name: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load_records(tmp_path / name)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(RecordError, match=r"a\.parquet is neither a file nor a data set that can be loaded \(\w+: "):
        load_records(tmp_path / "a.parquet")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        RecordError, match=r"splits has several splits, train; give the directory of one, such as .*train"
    ):
        load_records(tmp_path / "splits")
    assert load_records(tmp_path / "splits" / "train") == RECORDS


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [
        ("org/name", "org/name", "train"),
        ("org/name:test[:2]", "org/name", "test[:2]"),
        (Path("org/name"), "org/name", "train"),
    ],
)
def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch, source: str | Path, name: str, split: str) -> None:
    calls = []

    def load(*names: str, **settings: str) -> Any:
        calls.append((names, settings))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_records(source) == RECORDS
    assert calls == [((name,), {"split": split})]


def test_a_data_set_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: str, **settings: str) -> Any:
        raise ValueError("Config name is missing.\nPick one")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        RecordError,
        match=r"^org/name is neither a file nor a data set that can be loaded \(ValueError: Config name is missing",
    ):
        load_records("org/name")


def test_without_the_extra_its_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = written(tmp_path, "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        RecordError, match=r"a\.parquet is read with the package datasets.*pip install 'gist-tokens\[train"
    ):
        load_records(path)
    assert load_records(written_csv(tmp_path)) == [Record("a", "b", "c")]


def written_csv(folder: Path) -> Path:
    path = folder / "a.csv"
    path.write_text("instruction,input,output\na,b,c\n", encoding="utf-8")
    return path


# -- conversations -----------------------------------------------------------------------------------------------------

SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": text} for role, text in (("system", "be brief"), ("user", "hi"), ("assistant", "yo"))
)


@pytest.mark.parametrize(
    ("item", "record"),
    [
        ({"messages": [SYSTEM, USER, ASSISTANT]}, Record("be brief", "hi", "yo")),
        ({"messages": [SYSTEM, ASSISTANT], "source": "x"}, Record("be brief", "", "yo", "x")),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be brief"},
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "yo"},
                ]
            },
            Record("be brief", "hi", "yo"),
        ),
        ({"prompt": "be brief", "completion": "yo"}, Record("be brief", "", "yo")),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, Record("be brief", "hi", "yo")),
        (
            {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASSISTANT]},
            Record("be brief", "hi", "yo"),
        ),
        ({"instruction": "a", "output": "b", "messages": [USER]}, Record("a", "", "b")),
        ({"messages": [SYSTEM, USER, ASSISTANT], "tools": None}, Record("be brief", "hi", "yo")),
        ({"messages": None, "conversations": [SYSTEM, USER, ASSISTANT]}, Record("be brief", "hi", "yo")),
        ({"output": None, "conversations": [SYSTEM, USER, ASSISTANT]}, Record("be brief", "hi", "yo")),
        ({"instruction": "a", "output": "b", "messages": None, "tools": []}, Record("a", "", "b")),
        ({"messages": [SYSTEM, {**USER, "weight": 0}, {**ASSISTANT, "weight": 1}]}, Record("be brief", "hi", "yo")),
    ],
)
def test_conversations_of_one_question(item: dict, record: Record) -> None:
    assert to_record(item) == record


def test_without_an_instruction_the_system_message_may_be_missing() -> None:
    assert to_record({"messages": [USER, ASSISTANT]}, needs_instruction=False) == Record("", "hi", "yo")
    assert to_record({"prompt": "hi", "completion": "yo"}, needs_instruction=False) == Record("", "hi", "yo")


def test_every_answer_of_a_conversation_is_a_record() -> None:
    more = {"role": "user", "content": "and?", "name": "me"}
    said = {"role": "assistant", "content": "no"}
    item = {"messages": [SYSTEM, USER, ASSISTANT, more, said, USER], "source": "x"}
    first, second = records_of(item)
    assert first == Record("be brief", "hi", "yo", "x")
    assert second == Record("be brief", [USER, ASSISTANT, more], "no", "x")  # type: ignore[arg-type]
    assert records_of({"prompt": [SYSTEM, USER, ASSISTANT, more], "completion": [said]}) == [replace(second, source="")]
    assert records_of({"messages": [USER, more, said]}, needs_instruction=False) == [Record("", [USER, more], "no")]  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=r"^record is a conversation of 2 answers, each of which is a record"):
        to_record(item)
    assert to_records([item, item]) == [first, second] * 2
    assert len({first, second, replace(second, input=[dict(one) for one in second.input])}) == 2  # type: ignore[arg-type]
    assert str(second.input) == "user: hi\nassistant: yo\nuser: and?"


def test_arguments_of_a_call_may_be_json() -> None:
    """As the OpenAI API has them, and data sets, whose columns have one type."""
    tokenizer = GistTokenizer(CHATS["qwen2.5"].tokenizer(), "chat")
    (call,) = CALLED["tool_calls"]
    in_json = {
        **CALLED,
        "tool_calls": [{**call, "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}],
    }
    found = [records_of({"messages": [SYSTEM, USER, one, ASSISTANT]}, tokenizer=tokenizer) for one in (CALLED, in_json)]
    assert found[0] == found[1]
    assert found[0][0].output == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


def test_a_conversation_is_kept_in_a_file(tmp_path: Path) -> None:
    rows = records_of({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]})
    save_records(rows, tmp_path / "a.jsonl")
    assert load_records(tmp_path / "a.jsonl") == rows


def test_tools_beside_any_layout_are_a_part_of_the_prompt() -> None:
    tokenizer = GistTokenizer(CHATS["qwen2.5"].tokenizer(), "chat")
    both, alone = tokenizer.prompt_with_tools("be brief", [WEATHER]), tokenizer.prompt_with_tools(None, [WEATHER])
    for item in ({"instruction": "be brief", "output": "yo"}, {"prompt": "be brief", "completion": "yo"}):
        given = {**item, "tools": [WEATHER]}
        assert records_of(given, tokenizer=tokenizer) == [Record(both, "", "yo")]
        with pytest.raises(RecordError, match="has tools or other parts of messages"):
            records_of(given)
    item = {"prompt": "hi", "completion": "yo", "tools": [WEATHER]}
    assert records_of(item, needs_instruction=False, tokenizer=tokenizer) == [Record(alone, "hi", "yo")]
    item = {"input": "hi", "output": "yo", "tools": [WEATHER]}
    assert records_of(item, tokenizer=tokenizer) == [Record(alone, "hi", "yo")]


def test_parts_are_joined_as_a_server_joins_them() -> None:
    parts = [{"type": "text", "text": text} for text in ("be", "brief")]
    item = {"messages": [{"role": "system", "content": parts}, USER, ASSISTANT]}
    tokenizer = GistTokenizer(CHATS["qwen2.5"].tokenizer(), "chat")
    (record,) = records_of(item)
    assert record.instruction == "be\nbrief"
    assert chat_ids(tokenizer, [{"role": "user", "content": parts}]) == tokenizer.encode_continuations(["be\nbrief"])[0]


def test_a_column_of_tools_may_have_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"chat": [USER, ASSISTANT], "functions": json.dumps([WEATHER])}), encoding="utf-8")
    tokenizer = GistTokenizer(CHATS["qwen2.5"].tokenizer(), "chat")
    columns = {"messages": "chat", "tools": "functions"}
    prompt = tokenizer.prompt_with_tools(None, [WEATHER])
    assert load_records(path, columns=columns, tokenizer=tokenizer) == [Record(prompt, "hi", "yo")]
    loaded = []
    assert load_records(path, columns=columns, tokenizer=lambda: loaded.append(1) or tokenizer)[0].instruction == prompt
    assert loaded == [1]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"messages": [USER, ASSISTANT]}, "line 3 has no system message, which is what is gisted; give it one"),
        ({"messages": [SYSTEM, USER]}, "line 3 has no answer of the assistant, got user after the system message"),
        ({"messages": [SYSTEM]}, "got none after the system message"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "line 3, message 1 is another system message; there can be one, at"),
        ({"messages": "hi"}, "line 3: 'messages' must be a list of messages"),
        ({"prompt": "hi", "completion": [ASSISTANT]}, "line 3: 'completion' must be a list of messages"),
        ({"prompt": [SYSTEM, USER, ASSISTANT], "completion": [USER]}, "line 3 has no answer of the assistant"),
        (
            {"messages": [SYSTEM, {"role": "ipython", "content": ""}]},
            "message 1 is of an unknown role, 'ipython'; known",
        ),
        ({"messages": [SYSTEM, "hi"]}, "line 3, message 1 must be an object with role and content, got str"),
        (
            {
                "messages": [
                    SYSTEM,
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]},
                ]
            },
            "line 3, message 2: tool_calls must be a list of functions with a name, and arguments that are an object",
        ),
        (
            {"messages": [SYSTEM, USER, {"role": "assistant", "tool_calls": "f"}]},
            "message 2: tool_calls must be a list",
        ),
        ({"messages": [SYSTEM, USER, CALLED]}, "line 3 has tools or other parts of messages that a chat template lays"),
        (
            {"messages": [SYSTEM, USER, {"role": "assistant"}]},
            "line 3, message 2: its content must be a text, got None",
        ),
        (
            {"messages": [SYSTEM, {"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
            "line 3, message 1: its content must be a text, got list",
        ),
        ({"messages": [SYSTEM, USER, ASSISTANT], "tools": [WEATHER]}, "line 3 has tools or other parts of messages"),
        ({"messages": [SYSTEM, USER, ASSISTANT], "tools": "[{"}, "line 3: 'tools' is a text, but not JSON"),
        ({"messages": [{**SYSTEM, "content": " "}, USER, ASSISTANT]}, "line 3: 'instruction' is empty"),
        (
            {"instruction": "p", "input": [{"role": {1}}], "output": "x"},
            "line 3: 'input' has messages that are no JSON",
        ),
        ({"instruction": "p", "input": [{"role": "\ud83d"}], "output": "x"}, r"line 3: 'input' has '\\ud83d' at"),
        ({"instruction": "p", "input": ["x"], "output": "x"}, "line 3: 'input' must be a string, got list"),
    ],
)
def test_other_conversations_are_refused(item: dict, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        to_record(item, "line 3")


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [
        ("chatml", "chat", "line 3: the chat template writes no tools; choose one that does"),
        ("llama-3.1", "chat", "line 3: the chat template does not write tools into the system message alone"),
        ("qwen2.5", "plain", "line 3: tools are laid out by the template 'chat' only"),
    ],
)
def test_tools_that_a_template_cannot_lay_out(name: str, template: str, message: str) -> None:
    tokenizer = GistTokenizer(CHATS[name].tokenizer(), template)
    with pytest.raises(RecordError, match=message):
        records_of({"messages": [SYSTEM, USER, ASSISTANT], "tools": [WEATHER]}, "line 3", tokenizer=tokenizer)
    if name != "llama-3.1":
        with pytest.raises(
            RecordError, match=r"line 3: (the chat template does not write the|calls of tools are laid)"
        ):
            records_of({"messages": [SYSTEM, USER, CALLED]}, "line 3", tokenizer=tokenizer)


def test_what_is_no_conversation_is_not_changed() -> None:
    item = {"instruction": "a", "prompt": "b"}
    (found,) = as_instructions(item, "line 3")
    assert found is item


# -- objects -----------------------------------------------------------------------------------------------------------

WORDS = [{"instruction": f"w{n % 3} w4", "input": f"w{n}", "output": "w5", "other": n} for n in range(8)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {"batch_size": 4, "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    return published_arguments(folder, **{**settings, **changes})


def loss_of(folder: Path, records: Any, **settings: Any) -> float:
    torch.manual_seed(0)
    model, tokenizer = tiny.patched("llama")
    return finetune(model, tokenizer, records, arguments(folder), **settings)["train_loss"]


@pytest.mark.parametrize("settings", [{}, {"max_length": 32, "pack_length": 32}], ids=["padded", "packed"])
def test_a_dataset_is_trained_on_as_a_list_is(tmp_path: Path, settings: dict[str, Any]) -> None:
    table = datasets.Dataset.from_list(WORDS)
    assert loss_of(tmp_path, table, **settings) == loss_of(tmp_path, WORDS, **settings)


def test_a_dataset_is_evaluated_as_a_list_is() -> None:
    model, tokenizer = tiny.patched("llama")
    table = datasets.Dataset.from_list(WORDS)
    settings: dict[str, Any] = {"max_new_tokens": 2, "with_rouge": False, "conditions": ["gist"]}
    (found,), (expected,) = (
        evaluate(model, tokenizer, rows, **settings) for rows in (table, [to_record(row) for row in WORDS])
    )
    assert found == expected
    splits = datasets.DatasetDict(some=table)
    (split,) = evaluate_splits(
        model, tokenizer, splits, name="tiny", environment={}, with_perplexity=False, **settings
    ).splits
    assert (split.name, split.results, split.records[1]) == ("some", [expected], Record("w1 w4", "w1", "w5"))


def test_what_is_not_a_list_of_records_is_refused(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(WORDS))
    with pytest.raises(RecordError, match=r"got a DatasetDict of train; pass one of them: records\['train'\]"):
        loss_of(tmp_path, splits)
    with pytest.raises(RecordError, match=r"got the path 'a\.jsonl'; read it: load_records\(path\)"):
        loss_of(tmp_path, "a.jsonl")


LONG = {"instruction": "w1 " * 20, "input": "w2", "output": "w3"}


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_records_that_do_not_fit_are_not_trained_on(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where they would fill a batch."""
    rows = [*[LONG] * 4, *WORDS]
    settings = {"max_length": 16}
    if kind == "list":
        assert loss_of(tmp_path, rows, **settings) == loss_of(tmp_path, WORDS, **settings)
        assert "4 of 12 records are longer than max_length=16: the end of the input is cut of 0, and 4" in caplog.text
        return
    stream, short = (datasets.IterableDataset.from_generator(lambda rows=rows: iter(rows)) for rows in (rows, WORDS))
    assert loss_of(tmp_path, stream, **settings) == loss_of(tmp_path, short, **settings)
    with pytest.raises(GistError, match="none of the 4 records of the stream fits max_length; raise it"):
        loss_of(tmp_path, datasets.IterableDataset.from_generator(lambda: iter(rows[:4])), **settings)


def test_training_on_what_is_evaluated_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "gisting")
    held_out = [WORDS[1], {**WORDS[2], "output": "w9"}, {**WORDS[3], "input": "w50"}]
    loss_of(tmp_path, WORDS, eval_records=held_out)
    assert "2 of 3 records of eval_records are also trained on, so scores on it" in caplog.text
    caplog.clear()
    assert say_shared([to_record(WORDS[0])], [to_record(row) for row in held_out], "held out") == 0
    assert not caplog.records


# -- the command line --------------------------------------------------------------------------------------------------


def test_a_file_and_an_argument_give_one_prompt(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    gisting.save_pretrained(model, tokenizer, str(tmp_path / "model"))
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfw1 w2\r\nw3\r\n")
    for how in (["--prompt-file", str(tmp_path / "prompt.txt")], ["--prompt", "w1 w2\nw3"]):
        done = CliRunner().invoke(app, ["compress", str(tmp_path / "model"), *how, "--store", str(tmp_path / "store")])
        assert done.exit_code == 0, done.output
    assert len(gisting.GistStore(tmp_path / "store")) == 1
