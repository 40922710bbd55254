"""Records, the collator (what a batch contains, what is cut, what is refused) and the built-in tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gisting import GistCollator, GistError, GistTokenizer, Record, Visibility, load_records
from gisting.data.packing import GistPackingCollator
from gisting.data.records import save_records, to_record
from gisting.data.tasks import (
    EDITS,
    ORDERS,
    STYLES,
    CodeTable,
    CodeTask,
    Instruction,
    LetterTask,
    code_tokenizer,
    task_tokenizer,
)
from gisting.errors import GistTokenError, RecordError
from gisting.tokens import Template
from tests import tiny
from tests.test_tokens import llama, with_real_gist_token

# -- records -----------------------------------------------------------------------------------------------------------


def test_json_and_jsonl_give_the_same_records(tmp_path: Path) -> None:
    records = [Record("do this", "to that", "done", "seen"), Record("say\nhi", "", "hi ☕")]
    save_records(records, tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps([record.__dict__ for record in records]), encoding="utf-8")
    assert load_records(tmp_path / "a.jsonl") == load_records(tmp_path / "a.json") == records


def test_empty_lines_are_skipped_and_a_line_separator_in_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"instruction": "a\u2028b", "output": "c"}\n\n', encoding="utf-8")
    assert load_records(path) == [Record("a\u2028b", "", "c")]


def test_alpaca_layout_of_the_published_files(shared: Path) -> None:
    sizes = {
        name: len(load_records(shared / "data" / f"alpaca_plus_validation_{name}.json"))
        for name in ("human", "seen", "unseen")
    }
    assert sizes == {"human": 252, "seen": 1000, "unseen": 1000}


@pytest.mark.parametrize(
    "split", [pytest.param("seen", marks=pytest.mark.slow), pytest.param("unseen", marks=pytest.mark.slow), "human"]
)
def test_every_published_record_is_split_as_it_would_be_in_one_text(shared: Path, tmp_path: Path, split: str) -> None:
    """With LLaMA's SentencePiece model and the paper's settings (k = 10, 512 ids): the ids of a row are those of the
    whole text including its gist tokens. Those that are longer than 512 ids are counted.
    """
    records = load_records(shared / "data" / f"alpaca_plus_validation_{split}.json")
    plain = llama(shared, tmp_path)
    tokenizer, joint, k = GistTokenizer(plain), with_real_gist_token(plain), 10
    gist_id = joint.convert_tokens_to_ids("<GIST>")
    whole, cut = (GistCollator(tokenizer, k, max_length=length) for length in (4096, 512))
    num_cut = 0
    for start in range(0, len(records), 100):
        part = records[start : start + 100]
        texts = []
        for record in part:
            layout = tokenizer.template
            behind = layout.continuation_text(record.input) + layout.completion_text(record.output)
            texts.append(layout.prompt_text(record.instruction) + "<GIST>" * k + behind)
        expected: Any = joint(texts)["input_ids"]
        for ids, found in zip(expected, unpadded(whole(part)), strict=True):
            ids = [tokenizer.gist_token_id if token == gist_id else token for token in ids]
            assert found == [*ids, tokenizer.eos_token_id]
        fitted = cut.fit(part)
        assert all(len(row) <= 512 for row in unpadded(cut(part)))
        num_cut += len(set(part) - set(fitted))
    assert num_cut == {"seen": 0, "unseen": 0, "human": 9}[split]


def unpadded(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The ids of each row, without padding."""
    visibility = Visibility.from_attention_mask(batch["attention_mask"])
    is_token = visibility.end > visibility.first
    return [ids[held].tolist() for ids, held in zip(batch["input_ids"], is_token, strict=True)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{oops\n', r"a\.jsonl, line 2 is not JSON"),
        (
            "a.jsonl",
            '{"instruction": "a", "input": "b"}\n',
            r"a\.jsonl, line 1 has no 'output'; it has 'instruction', 'input'",
        ),
        ("a.jsonl", '{"output": "a"}\n', r"line 1 has no 'instruction'"),
        ("a.jsonl", "[1]\n", r"line 1 must be an object with instruction, input and output, got list"),
        ("a.jsonl", '{"instruction": 1, "output": "b"}\n', r"line 1: 'instruction' must be a string, got int"),
        ("a.jsonl", '{"instruction": "a", "output": 0}\n', r"line 1: 'output' must be a string, got int"),
        ("a.jsonl", '{"instruction": "a", "output": null}\n', r"line 1: 'output' must be a string, got NoneType"),
        ("a.jsonl", '{"instruction": "  ", "output": "b"}\n', r"line 1: 'instruction' is empty"),
        ("a.jsonl", "\n", r"a\.jsonl contains no records"),
        ("a.json", '{"instruction": "a", "output": "b"}', r"a\.json must contain a list of objects, got dict"),
        ("a.json", '[{"instruction": "a"}]', r"a\.json, record 1 has no 'output'"),
        ("a.json", "[", r"a\.json is not JSON"),
        ("a.xml", "", r"a\.xml must end in one of \.json, \.jsonl, .*, which says how to read it"),
        ("a.ndjson", "[1]\n", r"line 1 must be an object with instruction"),
        ("A.JSONL", "{", r"A\.JSONL, line 1 is not JSON"),
        ("a.csv", "instruction,output\n", r"a\.csv contains no records"),
        ("a.csv", "instruction,output\na\n", r"a\.csv, line 2 has not as many cells as the first line, 2"),
        ("a.csv", "instruction,output\na,b,c\n", r"a\.csv, line 2 has not as many cells as the first line, 2"),
        ("a.csv", 'instruction,output\na,"b\n', r"a\.csv, line 2 is not a row of a table \(unexpected end of data\)"),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "\\ud83d"}',
            r"line 1: 'output' has '\\ud83d' at character 0, half",
        ),
    ],
)
def test_errors_name_the_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        load_records(tmp_path / name)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"instruction": "\xff"}')
    with pytest.raises(
        RecordError, match=r"a\.jsonl is not UTF-8 text \(line 2: invalid start byte\); save it as UTF-8"
    ):
        load_records(tmp_path / "a.jsonl")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.jsonl"):
        load_records(tmp_path / "none.jsonl")


def test_the_error_for_stripped_dictionaries_mentions_trainer() -> None:
    with pytest.raises(RecordError, match=r"record 0 of the batch has no 'instruction'.*remove_unused_columns=False"):
        to_record({}, "record 0 of the batch")


# -- the collator ------------------------------------------------------------------------------------------------------

RECORDS = [Record("w1 w2 w3", "w4 w5", "w6 w7"), Record("w10 w11 w12 w13 w14", "", "w15")]


def test_a_decoder_batch_by_eye(tokenizer: GistTokenizer) -> None:
    batch = GistCollator(tokenizer, 2)(RECORDS)
    word = {number: f"w{number - 4}" for number in range(4, 64)} | {0: "_", 2: "$", 64: "G"}
    rows = [" ".join(word[token] for token in row) for row in batch["input_ids"].tolist()]
    assert rows == ["w1 w2 w3 G G w4 w5 w6 w7 $", "_ w10 w11 w12 w13 w14 G G w15 $"]
    labels = [" ".join("." if token == -100 else word[token] for token in row) for row in batch["labels"].tolist()]
    assert labels == [". . . . . . . w6 w7 $", ". . . . . . . . w15 $"]
    assert batch["position_ids"].tolist() == [[-3, -2, -1, 0, 1, 2, 3, 4, 5, 6], [0, -5, -4, -3, -2, -1, 0, 1, 2, 3]]
    assert batch["attention_mask"].dtype == torch.int32
    drawn = Visibility.from_attention_mask(batch["attention_mask"]).draw("a b c G G d e f g $".split(), row=0)
    assert drawn.splitlines() == [
        "  a b c G G d e f g $",
        "a 1 . . . . . . . . .",
        "b 1 1 . . . . . . . .",
        "c 1 1 1 . . . . . . .",
        "G 1 1 1 1 . . . . . .",
        "G 1 1 1 1 1 . . . . .",
        "d . . . 1 1 1 . . . .",
        "e . . . 1 1 1 1 . . .",
        "f . . . 1 1 1 1 1 . .",
        "g . . . 1 1 1 1 1 1 .",
        "$ . . . 1 1 1 1 1 1 1",
    ]


def test_an_encoder_decoder_batch_by_eye(t5_tokenizer: GistTokenizer) -> None:
    batch = GistCollator(t5_tokenizer, 1)(RECORDS)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 64, 8, 9], [14, 15, 16, 17, 18, 64]]
    assert batch["labels"].tolist() == [[10, 11, 2], [19, 2, -100]]
    # The second source ends with its gist; its prompt is hidden from the decoder even so.
    survivors = Visibility.from_attention_mask(batch["attention_mask"]).survivors()
    assert survivors.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]


def test_dictionaries_are_records_too(tokenizer: GistTokenizer) -> None:
    as_records = GistCollator(tokenizer, 2)(RECORDS)
    as_mappings = GistCollator(tokenizer, 2)([record.__dict__ for record in RECORDS])
    assert all(torch.equal(as_records[name], as_mappings[name]) for name in as_records)


def test_each_row_samples_its_condition_and_its_k(tokenizer: GistTokenizer) -> None:
    collate = GistCollator(tokenizer, (1, 4), conditions={"gist": 3, "positive": 1, "negative": 0})
    rows = 2000
    batch = collate([RECORDS[0]] * rows)
    counts = (batch["input_ids"] == tokenizer.gist_token_id).sum(-1)
    assert sorted(counts.unique().tolist()) == [1, 2, 3, 4]
    # Under the positive control the first prompt key is visible to the end; under gist it is hidden.
    start = (batch["input_ids"] != tokenizer.pad_token_id).int().argmax(-1)
    keys = Visibility.from_attention_mask(batch["attention_mask"])
    positive = keys.survivors()[torch.arange(rows), start].float().mean().item()
    assert positive == pytest.approx(0.25, abs=0.05)  # five standard deviations of a share of 2,000


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    input=st.integers(0, 40),
    output=st.integers(0, 12),
    k=st.integers(1, 4),
    spare=st.integers(3, 60),
    kind=st.sampled_from(["plain", "chunks", "parts", "t5"]),
)
def test_a_long_record_is_trained_on_as_one_with_a_shorter_input(
    lengths: list[int], input: int, output: int, k: int, spare: int, kind: str
) -> None:
    """Instruction, gist and answer stay. The input is the longest beginning that fits; without one, nothing is left."""
    tokenizer = GistTokenizer(tiny.word_tokenizer(("between",)), WORDS_BETWEEN, is_encoder_decoder=kind == "t5")
    options: dict[str, Any] = {"chunks": {"chunk_length": 3}, "parts": {"part_separator": " | "}}.get(kind, {})
    prompt = " | ".join(tiny.words(length, length) for length in lengths) if kind == "parts" else tiny.words(9, 1)
    record = Record(prompt, tiny.words(input, 2), tiny.words(output, 3))

    def whole(one: Record) -> dict[str, torch.Tensor]:
        return GistCollator(tokenizer, k, max_length=10_000, **options)([one])

    collate = GistCollator(tokenizer, k, max_length=k + spare, max_target_length=8, **options)
    words = record.input.split()
    shorter = [replace(record, input=" ".join(words[:number])) for number in range(1 if words else 0, len(words) + 1)]
    fits = [
        one
        for one in shorter
        if whole(one)["input_ids"].shape[1] <= k + spare and (kind != "t5" or whole(one)["labels"].shape[1] <= 8)
    ]
    assert collate.fit([record]) == fits[-1:]
    if fits:
        batch, expected = collate([record]), whole(fits[-1])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    else:
        with pytest.raises(RecordError, match=rf"^none of 1 records fits max_length={k + spare}"):
            collate([record])


WORDS_BETWEEN = Template("between", "{prompt}", "{input} between", "between", "{output}")


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_an_instruction_is_not_cut_for_a_long_input(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = GistTokenizer(tiny.word_tokenizer(("Instruction:", "Input:", "Output:")), "alpaca")
    make = GistCollator if kind == "padded" else GistPackingCollator
    collate = make(tokenizer, (1, 2), max_length=17)
    records = [Record("w1 w2 w3", "w4 " * 200, "w5 w6"), Record("w1 w2", "w3", "w4 " * 20)]
    torch.manual_seed(0)
    (row,) = collate(records)["input_ids"].tolist()
    shown = tokenizer.decode(row, skip_special_tokens=False).replace("<GIST>", " G ").split()
    shown = " ".join(word for number, word in enumerate(shown) if word != "G" or shown[number - 1] != "G")
    assert shown == "Instruction: w1 w2 w3 G Input: w4 w4 w4 w4 w4 w4 Output: w5 w6 </s>"
    assert caplog.text.count(
        "2 of 2 records are longer than max_length=17: the end of the input is cut of 1, and 1 are left out"
    )
    collate(records)
    assert len(caplog.records) == 1, "said once"


def test_the_source_of_an_encoder_decoder_is_cut_in_the_same_way(t5_tokenizer: GistTokenizer) -> None:
    collate = GistCollator(t5_tokenizer, 1, max_length=6, max_target_length=3)
    batch = collate(
        [Record("w1 w2", "w3 w4 w5 w6", "w7 w8"), Record("w1", "w2", "w3 w4 w5"), Record("w1 " * 5, "w2", "")]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 64, 7, 8, 9]]
    assert batch["labels"].tolist() == [[11, 12, 2]]


def test_words_are_whole_where_an_input_is_cut() -> None:
    """A text without spaces is cut every 16 characters. Prompt, gist, template and answer take 7 ids."""
    characters = GistTokenizer(with_characters(), "plain")
    for text, length, expected in (("twelve words", 12, "twelve words"), ("twelve words", 11, "twelve")):
        collate = GistCollator(characters, 1, max_length=7 + length)
        assert [record.input for record in collate.fit([Record("a", text, "b")])] == [expected]
    collate = GistCollator(characters, 1, max_length=7 + 39)
    assert [record.input for record in collate.fit([Record("a", "東京" * 20, "b")])] == ["東京" * 16]


def with_characters() -> Any:
    """A tokenizer with an id per character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("input", ["w1 " * 50_000, "w1 " * 300 + "w1w1w1w1w1w1 " * 20_000], ids=["even", "uneven"])
def test_cutting_a_very_long_input_takes_few_steps(input: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step encodes a beginning of the input, so there must not be a step for each of its words."""
    tokenizer = GistTokenizer(with_characters() if "w1w1" in input else tiny.word_tokenizer(), "plain")
    record, calls = Record("w3", input, "w2"), []
    (fitted,) = GistCollator(tokenizer, 2, max_length=512).fit([record])
    encode = GistTokenizer.encode_continuations
    monkeypatch.setattr(GistTokenizer, "encode_continuations", lambda *given: calls.append(given) or encode(*given))
    batch = GistCollator(tokenizer, 2, max_length=512)([record])
    assert 512 - 3 < batch["input_ids"].shape[1] <= 512
    assert record.input.startswith(fitted.input)
    assert len(calls) < 3 * 16, "a logarithm of the number of words"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_gist_tokens": 0}, GistTokenError, "num_gist_tokens must be at least 1, got 0"),
        ({"num_gist_tokens": (3, 2)}, GistError, r"must be a range \(low, high\), got \(3, 2\)"),
        ({"conditions": "gits"}, GistError, "conditions must be names of gist, positive, negative.*'gits'"),
        ({"conditions": {"gist": 0}}, GistError, "conditions must be names of"),
        (
            {"max_length": 4, "num_gist_tokens": 2},
            GistError,
            "max_length must be at least 5 to hold 2 gist tokens, got 4",
        ),
        ({"max_target_length": 0}, GistError, "max_target_length must be at least 1"),
    ],
)
def test_collator_errors(tokenizer: GistTokenizer, arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        GistCollator(tokenizer, **arguments)


def test_collator_wants_a_gist_tokenizer() -> None:
    with pytest.raises(GistError, match=r"tokenizer must be a GistTokenizer, got .*; wrap it"):
        GistCollator(tiny.word_tokenizer())  # pyright: ignore[reportArgumentType]


def test_the_error_for_a_missing_output_names_the_record(tokenizer: GistTokenizer) -> None:
    with pytest.raises(RecordError, match="record 1 of the batch has no 'output'"):
        GistCollator(tokenizer)([RECORDS[0], {"instruction": "w1", "input": "w2"}])


# -- prompts in parts --------------------------------------------------------------------------------------------------

PARTED = [Record("w1 w2|w3", "w4", "w5"), Record("w6 w7", "", "w8")]


def written(ids: list[int]) -> str:
    word = {number: f"w{number - 4}" for number in range(4, 64)} | {0: "_", 2: "$", 64: "G"}
    return " ".join(word[token] for token in ids)


def test_a_chained_batch_by_eye(tokenizer: GistTokenizer) -> None:
    """Each gist token of the first part occurs twice, G and its copy c; a row of one part looks as without parts."""
    batch = GistCollator(tokenizer, 2, part_separator="|")(PARTED)
    assert [written(row) for row in batch["input_ids"].tolist()] == [
        "w1 w2 G G G G w3 G G w4 w5 $",
        "_ _ _ _ _ _ w6 w7 G G w8 $",
    ]
    assert batch["position_ids"].tolist() == [
        [-2, -1, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6],
        [0, 0, 0, 0, 0, 0, -2, -1, 0, 1, 2, 3],
    ]
    assert batch["labels"].tolist() == [[-100] * 10 + [9, 2], [-100] * 10 + [12, 2]]
    keys = Visibility.from_attention_mask(batch["attention_mask"])
    assert keys.draw("a b G c G c d G G e f $".split(), row=0).splitlines() == [
        "  a b G c G c d G G e f $",
        "a 1 . . . . . . . . . . .",
        "b 1 1 . . . . . . . . . .",
        "G 1 1 1 . . . . . . . . .",
        "c 1 1 1 . . . . . . . . .",
        "G 1 1 1 . 1 . . . . . . .",
        "c 1 1 1 . 1 . . . . . . .",
        "d . . . . . . 1 . . . . .",
        "G . . . . . . 1 1 . . . .",
        "G . . . . . . 1 1 1 . . .",
        "e . . . 1 . 1 . 1 1 1 . .",
        "f . . . 1 . 1 . 1 1 1 1 .",
        "$ . . . 1 . 1 . 1 1 1 1 1",
    ]
    alone = GistCollator(tokenizer, 2)([PARTED[1]])
    plain = Visibility.from_attention_mask(alone["attention_mask"])
    assert torch.equal(keys.last_keys(6).to_dense()[1], plain.to_dense()[0])


def test_the_controls_of_a_chained_row(tokenizer: GistTokenizer) -> None:
    """Positive: one text with every gist, in which no row sees a copy. Negative: nothing of any part."""
    record = Record("w1|w2", "w3", "")
    shown = {}
    for condition in ("positive", "negative"):
        batch = GistCollator(tokenizer, 1, conditions=condition, part_separator="|")([record])
        assert written(batch["input_ids"][0].tolist()) == "w1 G G w2 G w3 $"
        drawn = Visibility.from_attention_mask(batch["attention_mask"]).draw("a G c b G d $".split())
        shown[condition] = [drawn.splitlines()[-2:], batch["position_ids"][0].tolist()[-2:]]
    assert shown == {
        "positive": [["d 1 1 . 1 1 1 .", "$ 1 1 . 1 1 1 1"], [4, 5]],
        "negative": [["d . . . . . 1 .", "$ . . . . . 1 1"], [0, 1]],
    }


def test_each_part_samples_its_k(tokenizer: GistTokenizer) -> None:
    batch = GistCollator(tokenizer, (1, 3), part_separator="|")([Record("w1|w2|w3", "w4", "")] * 200)
    counts = []
    for row in batch["input_ids"].tolist():
        spans = "".join("G" if token == 64 else "." for token in row).strip(".").split(".")
        assert [len(span) % 2 for span in spans[:2]] == [0, 0]
        counts.append((len(spans[0]) // 2, len(spans[1]) // 2, len(spans[2])))
    assert len(set(counts)) == 27


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_every_part_is_what_compress_runs(template: str) -> None:
    """This includes the template's text and the start ids."""
    tokenizer = GistTokenizer(tiny.word_tokenizer(), template)
    batch = GistCollator(tokenizer, 1, part_separator=" ## ")([Record("w1 w2 ## w3 ## w4", "w5", "w6")])
    heads = [encoding.input_ids for encoding in tokenizer.encode_prompts(["w1 w2", "w3", "w4"], 1)]
    whole = tokenizer.encode("w4", "w5", "w6", num_gist_tokens=1).input_ids
    assert batch["input_ids"][0].tolist() == heads[0] + [64] + heads[1] + [64] + whole
    assert whole[: len(heads[2])] == heads[2]


def test_what_is_cut_of_a_chained_row(tokenizer: GistTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """The text after the gists, never a part."""
    record = Record("w1 w2 w3|w6 w7|w9", "w10 w11", "w12 w13")
    collate = GistCollator(tokenizer, 1, max_length=15, part_separator="|")
    rows = [written(row) for row in collate([record, Record("w1|w2|w3|w4|w5", "w6 w7", "w8")])["input_ids"].tolist()]
    assert rows == ["w1 w2 w3 G G w6 w7 G G w9 G w10 w12 w13 $"]
    assert "the end of the input is cut of 1, and 1 are left out" in caplog.text


@pytest.mark.parametrize("instruction", ["|w1", "w1|", "w1| |w2", "|"])
def test_a_part_without_text_is_refused(tokenizer: GistTokenizer, instruction: str) -> None:
    with pytest.raises(RecordError, match=r"record 0 of the batch has an empty part.*part_separator='\|'"):
        GistCollator(tokenizer, part_separator="|")([Record(instruction, "", "w1")])


def test_a_chained_row_without_a_continuation_is_refused(tokenizer: GistTokenizer) -> None:
    """The completion would start at the last part's gist, which sees no other part."""
    with pytest.raises(RecordError, match=r"record 1 of the batch has several parts and no text after their gists"):
        GistCollator(tokenizer, part_separator="|")([PARTED[1], Record("w1|w2", "", "w3")])


def test_errors_of_part_separator(tokenizer: GistTokenizer, t5_tokenizer: GistTokenizer) -> None:
    with pytest.raises(GistError, match="part_separator is empty; give a text"):
        GistCollator(tokenizer, part_separator="")
    with pytest.raises(GistError, match="part_separator is ' # ', but gists of an encoder-decoder cannot be chained"):
        GistCollator(t5_tokenizer, part_separator=" # ")


# -- long prompts in chunks --------------------------------------------------------------------------------------------


def test_a_chunked_batch_by_eye(tokenizer: GistTokenizer) -> None:
    """Five ids in chunks of at most two; a prompt that fits into one chunk looks as without chunks."""
    record = Record("w1 w2 w3 w4 w5", "w6", "w7")
    batch = GistCollator(tokenizer, 2, chunk_length=2)([record, Record("w8 w9", "w10", "w11")])
    assert [written(row) for row in batch["input_ids"].tolist()] == [
        "w1 w2 G G w3 w4 G G w5 G G w6 w7 $",
        "_ _ _ _ _ _ _ w8 w9 G G w10 w11 $",
    ]
    assert batch["position_ids"].tolist() == [
        [-2, -1, 0, 1, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8],
        [0, 0, 0, 0, 0, 0, 0, -2, -1, 0, 1, 2, 3, 4],
    ]
    assert batch["labels"].tolist() == [[-100] * 12 + [11, 2], [-100] * 12 + [15, 2]]
    keys = Visibility.from_attention_mask(batch["attention_mask"])
    assert keys.draw("a b G G c d G G e G G f h $".split(), row=0).splitlines() == [
        "  a b G G c d G G e G G f h $",
        "a 1 . . . . . . . . . . . . .",
        "b 1 1 . . . . . . . . . . . .",
        "G 1 1 1 . . . . . . . . . . .",
        "G 1 1 1 1 . . . . . . . . . .",
        "c . . 1 1 1 . . . . . . . . .",
        "d . . 1 1 1 1 . . . . . . . .",
        "G . . 1 1 1 1 1 . . . . . . .",
        "G . . 1 1 1 1 1 1 . . . . . .",
        "e . . 1 1 . . 1 1 1 . . . . .",
        "G . . 1 1 . . 1 1 1 1 . . . .",
        "G . . 1 1 . . 1 1 1 1 1 . . .",
        "f . . 1 1 . . 1 1 . 1 1 1 . .",
        "h . . 1 1 . . 1 1 . 1 1 1 1 .",
        "$ . . 1 1 . . 1 1 . 1 1 1 1 1",
    ]


def test_rows_of_one_chunk_look_as_without_chunks(tokenizer: GistTokenizer) -> None:
    settings = {"conditions": {"gist": 1, "positive": 1, "negative": 1}}
    records = RECORDS * 10
    torch.manual_seed(3)
    plain = GistCollator(tokenizer, (1, 4), **settings)(records)
    torch.manual_seed(3)
    chunked = GistCollator(tokenizer, (1, 4), **settings, chunk_length=5)(records)
    assert plain.keys() == chunked.keys()
    assert all(torch.equal(plain[name], chunked[name]) for name in plain)


def test_a_row_samples_one_k_for_all_its_chunks(tokenizer: GistTokenizer) -> None:
    batch = GistCollator(tokenizer, (1, 3), chunk_length=2)([Record("w1 w2 w3 w4 w5", "w6", "w7")] * 60)
    rows = [[token for token in row if token] for row in batch["input_ids"].tolist()]
    counts = [tokenizer.locate(row, is_chunked=True).num_gist_tokens for row in rows]
    assert sorted(set(counts)) == [3, 6, 9]


def test_what_is_cut_of_a_chunked_row(tokenizer: GistTokenizer) -> None:
    """The text after the gists, never a chunk."""
    record = Record("w1 w2 w3 w4 w5 w6 w7", "w8 w9 w10", "w11 w12 w13 w14")
    collate = GistCollator(tokenizer, 2, max_length=20, chunk_length=3)
    (row,) = collate([record, replace(record, output=record.output * 3)])["input_ids"].tolist()
    assert written(row) == "w1 w2 w3 G G w4 w5 G G w6 w7 G G w8 w9 w11 w12 w13 w14 $"


def test_chunks_and_parts_exclude_each_other(tokenizer: GistTokenizer) -> None:
    with pytest.raises(
        GistError, match=r"^part_separator \('\|'\) and chunk_length \(5\) cannot be combined: a part sees"
    ):
        GistCollator(tokenizer, part_separator="|", chunk_length=5)


# -- what the teacher sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"chunk_length": 2}, {"part_separator": " w2 "}], ids=["one", "chunks", "parts"]
)
def test_a_teacher_has_the_same_rows_with_the_prompt_in_view(tokenizer: GistTokenizer, options: dict) -> None:
    settings = {"num_gist_tokens": 2, "with_teacher": True, **options}
    conditions = {"gist": 1, "negative": 1, "positive": 1}
    batch = GistCollator(tokenizer, conditions=conditions, **settings)(RECORDS * 8)
    positive = GistCollator(tokenizer, conditions="positive", **settings)(RECORDS * 8)
    assert torch.equal(batch["input_ids"], positive["input_ids"])
    for name in ("attention_mask", "position_ids"):
        assert not torch.equal(batch[name], positive[name])
        for one in (batch, positive):
            assert one[f"teacher_{name}"].dtype == positive[name].dtype
            assert torch.equal(one[f"teacher_{name}"], positive[name])
    plain = GistCollator(tokenizer, 2, **options)(RECORDS)
    assert plain.keys() == {"input_ids", "attention_mask", "position_ids", "labels"}


def test_the_teacher_of_an_encoder_decoder(t5_tokenizer: GistTokenizer) -> None:
    batch = GistCollator(t5_tokenizer, 2, conditions="negative", with_teacher=True)(RECORDS)
    positive = GistCollator(t5_tokenizer, 2, conditions="positive")(RECORDS)
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "teacher_attention_mask"}
    assert torch.equal(batch["teacher_attention_mask"], positive["attention_mask"])
    assert not torch.equal(batch["attention_mask"], positive["attention_mask"])


# -- which columns depend on the prompt alone --------------------------------------------------------------------------

CONDITIONED = {"gist": 1, "positive": 1, "negative": 1}


def assert_marked_rows_see_marked_keys_alone(batch: dict[str, torch.Tensor]) -> None:
    is_prompt = batch["is_prompt"]
    assert is_prompt.dtype == torch.bool
    assert is_prompt.shape == batch["input_ids"].shape
    for name in ("attention_mask", "teacher_attention_mask"):
        sees = Visibility.from_attention_mask(batch[name]).to_dense()  # (B, N, N)
        assert not (sees & is_prompt[:, :, None] & ~is_prompt[:, None]).any(), name
        assert torch.equal((sees & is_prompt[:, :, None]).any(-1), is_prompt), f"{name}: padding is marked"


def marked(batch: dict[str, torch.Tensor]) -> list[str]:
    rows = zip(batch["input_ids"], batch["is_prompt"], strict=True)
    return [written(ids[is_prompt].tolist()) for ids, is_prompt in rows]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, ["w1 w2 w3", "w10 w11 w12 w13 w14"]),
        ({"chunk_length": 2}, ["w1 w2", "w10 w11"]),
        ({"part_separator": " w2 "}, ["w1", "w10 w11 w12 w13 w14"]),
    ],
    ids=["one", "chunks", "parts"],
)
@pytest.mark.parametrize("conditions", [*CONDITIONED, CONDITIONED], ids=[*CONDITIONED, "drawn"])
def test_columns_of_the_prompt_see_no_other(
    tokenizer: GistTokenizer, options: dict, shown: list[str], conditions: Any
) -> None:
    """In a prompt of parts or chunks, later ones see gists (parts do so at least for the teacher)."""
    collate = GistCollator(tokenizer, (1, 3), conditions=conditions, with_teacher=True, **options)
    torch.manual_seed(0)
    plain = collate(RECORDS * 4)
    collate.with_prompt_columns = True
    torch.manual_seed(0)
    batch = collate(RECORDS * 4)
    assert batch.keys() == {*plain, "is_prompt"}
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    assert marked(batch) == shown * 4
    assert_marked_rows_see_marked_keys_alone(batch)


def test_an_encoder_has_no_columns_of_the_prompt_alone(t5_tokenizer: GistTokenizer) -> None:
    with pytest.raises(GistError, match="with_prompt_columns is for decoders: in an encoder, a prompt sees its gist"):
        GistCollator(t5_tokenizer, with_prompt_columns=True)


# -- the letter task ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "edit", "style", "answer"),
    [
        ("keep the order", "change nothing else", "answer plainly", "a b c d e"),
        ("reverse the letters", "drop the last letter", "write capitals", "E D C B"),
        ("move the first letter to the end", "write the last letter twice", "end with a bang", "b c d e a a !"),
        (
            "move the last letter to the front",
            "replace each letter by the one before",
            "begin with a star",
            "* d h a b c",
        ),
        ("swap the first two letters", "replace each letter by the next", "end with a dash", "c b d e f -"),
    ],
)
def test_answers_by_eye(order: str, edit: str, style: str, answer: str) -> None:
    assert " ".join(Instruction(order, edit, style).answer(list("abcde"))) == answer


def test_held_out_combinations_are_never_trained_on() -> None:
    task = LetterTask(seed=3)
    assert len(task.seen) + len(task.unseen) == len(ORDERS) * len(EDITS) * len(STYLES) == 125
    assert not set(task.seen) & set(task.unseen)
    pairs = [(held.order, held.edit) for held in task.unseen] + [(held.edit, held.style) for held in task.unseen]
    pairs += [(held.order, held.style) for held in task.unseen]
    assert len(set(pairs)) == len(pairs) == 3 * 16  # no two parts are held out together more than once
    texts = {instruction.text() for instruction in task.unseen}
    assert not texts & {record.instruction for record in task.records("seen", 5000, 0)}
    assert task.records("seen", 10, 0) == task.records("seen", 10, 0) != task.records("seen", 10, 1)


def test_every_word_of_the_task_is_in_its_tokenizer() -> None:
    tokenizer = task_tokenizer()
    for record in [*LetterTask().records("seen", 500, 0), *LetterTask().records("unseen", 100, 0)]:
        ids = tokenizer.encode(record.instruction, record.input, record.output, num_gist_tokens=2).input_ids
        assert tokenizer.tokenizer.unk_token_id not in ids
        assert tokenizer.decode(tokenizer.encode_completions([record.input], [record.output])[0]) == record.output


def test_task_errors() -> None:
    with pytest.raises(GistError, match=r"num_unseen must be in 1\.\.25, got 26"):
        LetterTask(num_unseen=26)
    with pytest.raises(GistError, match="split must be seen or unseen, got 'test'"):
        LetterTask().records("test", 1, 0)
    assert replace(LetterTask(), seed=1).unseen != LetterTask().unseen


# -- codes -------------------------------------------------------------------------------------------------------------


def test_a_table_of_codes_by_eye() -> None:
    table = CodeTable(("birch-7", "coral-2", "amber-7"), "backwards", "end with done")
    assert table.names == ["birch", "coral", "amber"]
    assert table.text() == "table : birch-7 ; coral-2 ; amber-7 . answer backwards and end with done ."
    assert table.answer(["coral", "birch", "birch"]) == "birch birch-7 birch birch-7 coral coral-2 done".split()
    assert table.edited() == CodeTable(("birch-0", "coral-3", "amber-0"), "backwards", "end with done")
    plain = CodeTable(table.codes, "in order", "stop there")
    assert plain.answer(["coral", "birch", "birch"]) == "coral coral-2 birch birch-7 birch birch-7".split()


def test_queries_of_training_and_evaluation_are_apart() -> None:
    task = CodeTask(num_names=6, length=2, seed=3)
    everything = 6**2
    train = {record.input for record in task.records("train", 10, 0)} | {
        record.input for record in task.records("train", 10, 1)
    }
    held_out = {record.input for record in task.records("eval", 10, 0)}
    assert not train & held_out
    assert len(train | held_out) <= everything
    assert {record.instruction for record in task.records("train", 5, 0)} == {task.table.text()}
    names = {name for record in task.records("train", 15, 0) for name in record.input.split()}
    assert names == set(task.table.names)
    for record in task.records("eval", 10, 5):
        assert record.output.split() == task.table.answer(record.input.split())
    with pytest.raises(GistError, match=r"count must be in 1\.\.\d+, the number of eval queries, got 36"):
        task.records("eval", everything, 0)
    with pytest.raises(GistError, match="split must be train, eval or unasked, got 'seen'"):
        task.records("seen", 1, 0)
    with pytest.raises(GistError, match=r"num_names must be in 1\.\.24, got 25"):
        CodeTask(num_names=25)
    with pytest.raises(GistError, match=r"num_unasked must be in 0\.\.5, got 6"):
        CodeTask(num_names=6, num_unasked=6)


def test_some_names_occur_only_in_the_table() -> None:
    task = CodeTask(num_names=6, length=2, seed=3, num_unasked=2)
    assert len(task.unasked) == 2
    assert task.table == CodeTask(num_names=6, length=2, seed=3).table
    asked = [record.input.split() for split in ("train", "eval") for record in task.records(split, 6, 0)]
    assert task.unasked.isdisjoint(name for query in asked for name in query)
    for record in task.records("unasked", 20, 0):
        assert task.unasked & {*record.input.split()}
        assert record.output.split() == task.table.answer(record.input.split())


def test_lookups_are_in_other_tables_and_have_no_unknown_word() -> None:
    task, tokenizer = CodeTask(seed=1), code_tokenizer()
    records = task.lookups(5, 3, 0)
    assert len({record.instruction for record in records}) == 5
    assert task.table.text() not in {record.instruction for record in records}
    assert task.lookups(5, 3, 0) == records
    inner: Any = tokenizer.tokenizer
    for record in [*records, *task.records("train", 20, 0)]:
        encoding = tokenizer.encode(record.instruction, record.input, record.output)
        assert inner.unk_token_id not in encoding.input_ids
