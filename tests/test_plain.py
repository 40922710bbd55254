"""Ordinary text without gist tokens: its layout, the loss of a stock model, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from gisting import GistCollator, GistError, GistTokenizer, Record
from gisting.data.plain import PlainCollator, plain_sources
from gisting.errors import RecordError
from tests import tiny

WORDS = st.lists(st.sampled_from([f"w{number}" for number in range(60)]), max_size=6).map(" ".join)


def with_start() -> GistTokenizer:
    """A tokenizer that puts <s> before a text."""
    inner = tiny.word_tokenizer(("Instruction:", "Input:", "Output:"))
    inner.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return GistTokenizer(inner, "alpaca")


def test_the_layout_of_a_decoder() -> None:
    tokenizer = with_start()
    batch = PlainCollator(tokenizer, 32)([Record("w1 w2", "w3", "w4 w5"), Record("", "w3", "w6")])
    shown = [tokenizer.tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]
    assert [" ".join(row) for row in shown] == [
        "<s> Instruction: w1 w2 Input: w3 Output: w4 w5 </s>",
        "<pad> <pad> <pad> <pad> <s> Input: w3 Output: w6 </s>",
    ]
    assert batch["attention_mask"].tolist() == [[1] * 10, [0] * 4 + [1] * 6]
    assert batch["position_ids"].tolist() == [[*range(10)], [0, 0, 0, 0, *range(6)]]
    learned = [[token for token in row if token != -100] for row in batch["labels"].tolist()]
    assert [tokenizer.decode(row, skip_special_tokens=False) for row in learned] == ["w4 w5 </s>", "w6 </s>"]


def test_the_layout_of_an_encoder_decoder(t5_tokenizer: GistTokenizer) -> None:
    batch = PlainCollator(t5_tokenizer, 32)(
        [Record("w1 w2", "w3", "w4"), Record("", "w3", "w5 w6"), Record("", "", "w7")]
    )
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    shown = [t5_tokenizer.decode(row, skip_special_tokens=False) for row in batch["input_ids"].tolist()]
    assert shown == ["w1 w2 w3", "w3 <pad> <pad>", "</s> <pad> <pad>"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 2, -100], [9, 10, 2], [11, 2, -100]]


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5))
def test_it_is_the_text_around_the_gist(rows: list[tuple[str, str, str]]) -> None:
    """With a prompt, the ids are those of ``GistCollator`` without the gist tokens; each row is the same alone and in a
    batch.
    """
    tokenizer = with_start()
    records = [Record(*row) for row in rows]
    together = PlainCollator(tokenizer, 64)(records)
    for number, record in enumerate(records):
        ids = together["input_ids"][number][together["attention_mask"][number].bool()].tolist()
        alone = PlainCollator(tokenizer, 64)([record])
        assert ids == alone["input_ids"][0].tolist()
        if record.instruction:
            gist = GistCollator(tokenizer, 2, max_length=64)([record])["input_ids"][0].tolist()
            assert ids == [token for token in gist if token != tokenizer.gist_token_id]


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "t5"])
@pytest.mark.parametrize("is_patched", [True, False])
def test_the_loss_is_that_of_a_stock_model(name: str, is_patched: bool) -> None:
    patched, tokenizer = tiny.patched(name)
    stock: Any = tiny.stock_twin(name, patched)
    records = [Record(tiny.words(5, 1), tiny.words(2, 2), tiny.words(3, 3)), Record("", "w1", "w2")]
    batch = PlainCollator(tokenizer, 64)(records)
    model: Any = patched if is_patched else stock
    words: Any = tokenizer.tokenizer
    total, number = 0.0, 0
    with torch.no_grad():
        found = model(**batch).loss.item()
        for record in records:
            source = torch.tensor([words(f"{record.instruction} {record.input}")["input_ids"]])
            target = torch.tensor([[*words(record.output)["input_ids"], tokenizer.eos_token_id]])
            if name == "t5":
                loss = stock(input_ids=source, labels=target).loss
            else:
                labels = torch.cat([torch.full_like(source, -100), target], 1)
                loss = stock(input_ids=torch.cat([source, target], 1), labels=labels).loss
            total, number = total + loss.item() * target.shape[1], number + target.shape[1]
    assert found == pytest.approx(total / number, rel=1e-5)


def test_what_does_not_fit_is_refused(tokenizer: GistTokenizer, t5_tokenizer: GistTokenizer) -> None:
    fits, long = Record("w1", "w2", "w3"), Record("w1 w2 w3", "w4", "w5 w6")
    assert PlainCollator(tokenizer, 7)([long, fits])["input_ids"].shape == (2, 7)
    message = r"record 1 of the batch \('w4'\) has 7 ids, more than max_length=6; raise max_length or"
    with pytest.raises(RecordError, match=message):
        PlainCollator(tokenizer, 6)([fits, long])
    assert PlainCollator(t5_tokenizer, 4, max_target_length=3)([long])["labels"].shape == (1, 3)
    with pytest.raises(RecordError, match=r"has a target of 3 ids, more than max_target_length=2"):
        PlainCollator(t5_tokenizer, 4, max_target_length=2)([long])
    with pytest.raises(RecordError, match=r"record 0 of the batch \(''\) has no text for the model to continue"):
        PlainCollator(tokenizer, 6)([Record("", "", "w1")])
    with pytest.raises(GistError, match="max_length must be at least 1, got 0"):
        PlainCollator(tokenizer, 0)
    with pytest.raises(GistError, match=r"inputs must have one text per prompt \(1\), got 2"):
        plain_sources(tokenizer, ["w1"], ["w2", "w3"])
