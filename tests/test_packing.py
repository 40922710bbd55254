"""Packing: the content of rows, and loss and gradients equal to those of the padded batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainingArguments

from gisting import GistCollator, GistError, GistTokenizer, Record, Visibility
from gisting._compat import cache_argument
from gisting.data.packing import GistPackingCollator, group_by_instruction, pack
from gisting.errors import RecordError
from gisting.tokens import Template
from gisting.train.finetune import finetune
from tests import tiny
from tests.test_data import CONDITIONED, assert_marked_rows_see_marked_keys_alone, marked
from tests.test_train import few

TEMPLATE = Template("words", "{prompt}", "{input}", "w9", "{output}")


def tokenizer_of(template: Template | str = TEMPLATE) -> GistTokenizer:
    return GistTokenizer(tiny.word_tokenizer(), template)


def some(count: int, per_instruction: int = 4) -> list[Record]:
    return [
        Record(
            tiny.words(3 + number // per_instruction, number // per_instruction),
            tiny.words(1 + number % 3, 50 + number),
            tiny.words(1 + number % 4, 90 + number),
        )
        for number in range(count)
    ]


# -- the layout --------------------------------------------------------------------------------------------------------


def test_a_row_by_eye() -> None:
    """Two completions that share a prompt, and another record, in one row: ids, positions, labels and mask."""
    tokenizer = tokenizer_of()
    records = [Record("w1 w2", "w3", "w4"), Record("w5", "w6", "w7 w8"), Record("w1 w2", "w10", "w11")]
    batch = GistPackingCollator(tokenizer, 2, max_length=12, pack_length=20)(records)
    names = {0: "_", 2: "/", tokenizer.gist_token_id: "G"} | {number + 4: f"w{number}" for number in range(60)}
    assert " ".join(names[token] for token in batch["input_ids"][0].tolist()) == (
        "w1 w2 G G w3 w4 / w10 w11 / w5 G G w6 w7 w8 /"
    )
    assert batch["position_ids"].tolist() == [[-2, -1, 0, 1, 2, 3, 4, 2, 3, 4, -1, 0, 1, 2, 3, 4, 5]]
    shown = "".join("x" if label != -100 else "." for label in batch["labels"][0].tolist())
    assert shown == ".....xx.xx....xxx"
    visibility = Visibility.from_attention_mask(batch["attention_mask"])
    assert [line.split(" ", 1)[1].strip() for line in visibility.draw(list("abGGcd/ef/gHHhij/")).splitlines()[1:]] == [
        "1 . . . . . . . . . . . . . . . .",
        "1 1 . . . . . . . . . . . . . . .",
        "1 1 1 . . . . . . . . . . . . . .",
        "1 1 1 1 . . . . . . . . . . . . .",
        ". . 1 1 1 . . . . . . . . . . . .",
        ". . 1 1 1 1 . . . . . . . . . . .",
        ". . 1 1 1 1 1 . . . . . . . . . .",
        ". . 1 1 . . . 1 . . . . . . . . .",
        ". . 1 1 . . . 1 1 . . . . . . . .",
        ". . 1 1 . . . 1 1 1 . . . . . . .",
        ". . . . . . . . . . 1 . . . . . .",
        ". . . . . . . . . . 1 1 . . . . .",
        ". . . . . . . . . . 1 1 1 . . . .",
        ". . . . . . . . . . . 1 1 1 . . .",
        ". . . . . . . . . . . 1 1 1 1 . .",
        ". . . . . . . . . . . 1 1 1 1 1 .",
        ". . . . . . . . . . . 1 1 1 1 1 1",
    ]


def test_groups_keep_their_order_and_size() -> None:
    records = [Record(text, str(number), "o") for number, text in enumerate("abacaabc")]
    groups = group_by_instruction(records, 3)
    assert [[record.instruction + record.input for record in group] for group in groups] == [
        ["a0", "a2", "a4"],
        ["a5"],
        ["b1", "b6"],
        ["c3", "c7"],
    ]
    with pytest.raises(GistError, match="max_per_group must be at least 1, got 0"):
        group_by_instruction(records, 0)


@given(st.lists(st.integers(1, 20), max_size=40))
def test_bins_hold_everything_once_and_are_not_overfull(lengths: list[int]) -> None:
    bins = pack(lengths, 20)
    assert sorted(item for chosen in bins for item in chosen) == list(range(len(lengths)))
    sizes = [sum(lengths[item] for item in chosen) for chosen in bins]
    assert all(0 < size <= 20 for size in sizes)
    # No two bins would have fitted into one.
    assert all(one + other > 20 for number, one in enumerate(sizes) for other in sizes[:number])


def test_groups_and_single_records_may_come_in_one_batch() -> None:
    tokenizer, records = tokenizer_of(), some(8)
    collator = GistPackingCollator(tokenizer, 2, max_length=64)
    flat, nested = collator(records), collator([records[:4], *records[4:]])
    assert all(torch.equal(flat[name], nested[name]) for name in flat)


def test_a_group_that_does_not_fit_is_split() -> None:
    records = [Record("w1 w2 w3 w4", f"w{number}", "w5 w6 w7") for number in range(6)]
    batch = GistPackingCollator(tokenizer_of(), 1, max_length=10, pack_length=16)(records)
    # Prompt and gist take 5 ids and a completion 5: two per row of 16.
    assert batch["input_ids"].shape == (3, 15)
    assert int((batch["labels"] != -100).sum()) == 6 * 4


def test_a_record_with_a_long_input_shares_its_prompt() -> None:
    prompt = "w1 w2 w3 w4"
    records = [Record(prompt, "w5", "w6"), Record(prompt, "w8 w9 w10", "w11"), Record("w1 " * 7, "w5", "w6")]
    tokenizer = tokenizer_of()
    (ids,) = GistPackingCollator(tokenizer, 1, max_length=8, pack_length=30)(records)["input_ids"].tolist()
    names = {2: "/", tokenizer.gist_token_id: "G"} | {number + 4: f"w{number}" for number in range(60)}
    assert " ".join(names[token] for token in ids) == "w1 w2 w3 w4 G w5 w6 / w8 w11 /"


def test_a_completion_that_the_gist_itself_predicts_has_its_own_copy() -> None:
    """Without text between gist and completion, the gist would only predict the first completion after it."""
    tokenizer = tokenizer_of(Template("bare", "{prompt}", "{input}", "", "{output}"))
    records = [Record("w1 w2", "", "w3"), Record("w1 w2", "", "w4"), Record("w1 w2", "w5", "w6")]
    batch = GistPackingCollator(tokenizer, 1, max_length=32)(records)
    assert int((batch["input_ids"] == tokenizer.gist_token_id).sum()) == 3
    assert_same_loss("llama", tokenizer, records)


def test_an_instruction_draws_one_k_and_one_condition() -> None:
    tokenizer = tokenizer_of()
    records = [Record(f"w{number}", f"w{inner}", "w50") for number in range(20) for inner in range(3)]
    conditions = {"gist": 1, "positive": 1, "negative": 1}
    batch = GistPackingCollator(tokenizer, (1, 4), conditions=conditions, max_length=32)(records)
    counts, kinds = set(), set()
    visibility = Visibility.from_attention_mask(batch["attention_mask"])
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for start in [place for place in range(len(ids)) if 4 <= ids[place] < 24 and ids[place + 1] == 64]:
            k = next(count for count in range(1, 6) if ids[start + 1 + count] != 64)
            counts.add(k)
            sees = [int(visibility.end[row, place]) > start + k + 1 for place in (start, start + 1)]
            kinds.add(tuple(sees))
    assert counts == {1, 2, 3, 4}
    assert kinds == {(False, True), (True, True), (False, False)}


# -- the same as padded ------------------------------------------------------------------------------------------------


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    loss = model(**batch).loss
    return float(loss.detach()), list(torch.autograd.grad(loss, [*model.parameters()], allow_unused=True))


def assert_same_loss(name: str, tokenizer: GistTokenizer, records: list[Record], **settings: Any) -> None:
    from gisting import patch

    model = patch(tiny.model(name), tokenizer)
    padded = GistCollator(tokenizer, 2, max_length=48, **settings)(records)
    packed = GistPackingCollator(tokenizer, 2, max_length=48, **settings)(records)
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    loss, wanted = gradients(model, padded)
    found_loss, found = gradients(model, packed)
    assert found_loss == pytest.approx(loss, abs=1e-6)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) is (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("condition", ["gist", "positive", "negative"])
@pytest.mark.parametrize("name", few("llama mistral qwen2 qwen3 gemma phi3 olmo2 gpt_neox".split(), "llama", "mistral"))
def test_loss_and_gradients_are_those_of_the_padded_batch(name: str, condition: str) -> None:
    assert_same_loss(name, tokenizer_of(), some(11), conditions=condition)


def test_a_branch_that_saw_its_neighbour_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from gisting.data import packing

    whole = packing.CONDITIONS["gist"]

    def without_branches(
        is_gist: Tensor, padding: Tensor, documents: Tensor | None = None, branches: Any = None
    ) -> Any:
        return whole(is_gist, padding, documents=documents)

    monkeypatch.setitem(packing.CONDITIONS, "gist", without_branches)
    with pytest.raises(AssertionError):
        assert_same_loss("llama", tokenizer_of(), some(11))


@pytest.mark.parametrize("condition", ["gist", "positive", "negative"])
@pytest.mark.parametrize("name", few(["llama", "qwen3", "gpt_neox"], "llama"))
def test_loss_and_gradients_of_chunks_are_those_of_the_padded_batch(name: str, condition: str) -> None:
    assert_same_loss(name, tokenizer_of(), some(11), conditions=condition, chunk_length=2)


# -- prompts that are predicted from their gists -----------------------------------------------------------------------


def test_a_row_with_reconstruction_by_eye() -> None:
    """The prompt w1 w2 after its gist, and w5 w6 w7 after the gists of its two chunks."""
    tokenizer = tokenizer_of()
    records = [Record("w1 w2", "w3", "w4"), Record("w5 w6 w7", "w8", ""), Record("w1 w2", "w10", "w11")]
    batch = GistPackingCollator(tokenizer, 1, max_length=20, pack_length=40, chunk_length=2, reconstruct=True)(records)
    names = {0: "_", 2: "/", tokenizer.gist_token_id: "G"} | {number + 4: f"w{number}" for number in range(60)}
    assert " ".join(names[token] for token in batch["input_ids"][0].tolist()) == (
        "w1 w2 G w3 w4 / w10 w11 / w1 w2 w5 w6 G w7 G w8 / w5 w6 w7"
    )
    assert batch["position_ids"].tolist() == [
        [-2, -1, 0, 1, 2, 3, 1, 2, 3, 1, 2, -2, -1, 0, 0, 1, 2, 3, 2, 3, 4],
    ]
    assert batch["reconstruction_labels"].dtype == torch.int64
    shown = ["".join("x" if label != -100 else "." for label in batch[name][0].tolist()) for name in LABELS]
    assert shown == [
        "....xx.xx........x...",
        "..........x........xx",
    ]
    learned = batch["reconstruction_labels"] != -100
    assert torch.equal(batch["reconstruction_labels"][learned], batch["input_ids"][learned])
    visibility = Visibility.from_attention_mask(batch["attention_mask"])
    rows = [line.split(" ", 1)[1].strip() for line in visibility.draw(list("abGcd/ef/ABghHiIj/XYZ")).splitlines()[1:]]
    assert rows[9:11] + rows[18:] == [
        ". . 1 . . . . . . 1 . . . . . . . . . . .",
        ". . 1 . . . . . . 1 1 . . . . . . . . . .",
        ". . . . . . . . . . . . . 1 . 1 . . 1 . .",
        ". . . . . . . . . . . . . 1 . 1 . . 1 1 .",
        ". . . . . . . . . . . . . 1 . 1 . . 1 1 1",
    ]
    # The other columns are unchanged.
    assert rows[6:9] == [
        ". . 1 . . . 1 . . . . . . . . . . . . . .",
        ". . 1 . . . 1 1 . . . . . . . . . . . . .",
        ". . 1 . . . 1 1 1 . . . . . . . . . . . .",
    ]


LABELS = ("labels", "reconstruction_labels")


def mean_loss(model: Any, batch: dict[str, Tensor], name: str) -> float:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        return float(model(**inputs, labels=batch[name]).loss)


@pytest.mark.parametrize("chunk_length", [None, 2], ids=["one-gist", "chunks"])
@pytest.mark.parametrize("name", few(["llama", "gemma"], "llama"))
def test_reconstruction_is_the_prompt_after_its_cache_and_leaves_the_answers_unchanged(
    name: str, chunk_length: int | None
) -> None:
    import gisting

    tokenizer = tokenizer_of(Template("bare", "{prompt}", "{input}", "", "{output}"))
    model = gisting.patch(tiny.model(name), tokenizer)
    # Some records have no continuation, so the gist itself predicts their first answer token.
    records = [*some(9), Record(tiny.words(4, 1), "", "w3 w4"), Record("w50 w51 w52", "", "w5")]
    settings = {"num_gist_tokens": 2, "max_length": 48, "pack_length": 64, "chunk_length": chunk_length}
    plain = GistPackingCollator(tokenizer, **settings)(records)
    batch = GistPackingCollator(tokenizer, **settings, reconstruct=True)(records)
    assert mean_loss(model, batch, "labels") == pytest.approx(mean_loss(model, plain, "labels"), abs=1e-6)

    # One for each document: three for the instructions, and one for each record without continuation.
    prompts = [*dict.fromkeys(record.instruction for record in records[:9]), *[one.instruction for one in records[9:]]]
    sums, number = 0.0, 0
    for prompt in prompts:
        cache = gisting.compress(model, tokenizer, [prompt], 2, chunk_length=chunk_length)
        ids = torch.tensor(tokenizer.encode_texts([prompt]))
        with torch.no_grad():
            logits = model(ids, **{cache_argument(): cache.as_past_key_values()}).logits[0, :-1]
        sums += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        number += ids.shape[1] - 1
    assert int((batch["reconstruction_labels"] != -100).sum()) == number
    assert mean_loss(model, batch, "reconstruction_labels") == pytest.approx(sums / number, abs=1e-4)


def test_only_gists_are_reconstructed_from() -> None:
    tokenizer = tokenizer_of()
    for condition, count in (("gist", 2 * 2), ("positive", 0), ("negative", 0)):
        batch = GistPackingCollator(tokenizer, 1, conditions=condition, max_length=32, reconstruct=True)(
            [Record("w1 w2 w3", "w4", "w5"), Record("w6 w7 w8", "w4", "w5")]
        )
        assert int((batch["reconstruction_labels"] != -100).sum()) == count
        assert batch["reconstruction_labels"].shape == batch["labels"].shape
    # Each document of the batch drew its own condition.
    torch.manual_seed(0)
    records = [Record(f"w{number} w50 w51", "w52", "w53") for number in range(40)]
    batch = GistPackingCollator(
        tokenizer, 1, conditions={"negative": 1, "gist": 1}, max_length=16, reconstruct=True, with_teacher=True
    )(records)
    visibility = Visibility.from_attention_mask(batch["attention_mask"])
    is_gist = batch["input_ids"] == tokenizer.gist_token_id
    # A gist that other rows see comes before a prompt that is predicted.
    is_seen = is_gist & (visibility.end > torch.arange(is_gist.shape[1]) + 1)
    learned = batch["reconstruction_labels"] != -100
    assert 0 < int(is_seen.sum()) < 40
    assert int(learned.sum()) == 2 * int(is_seen.sum())
    assert torch.equal(learned.any(1), is_seen.any(1))


def test_start_ids_are_not_predicted() -> None:
    from tokenizers.processors import TemplateProcessing

    inner = tiny.word_tokenizer()
    inner.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = GistTokenizer(inner, TEMPLATE)
    batch = GistPackingCollator(tokenizer, 1, max_length=32, reconstruct=True)(
        [Record("w1 w2 w3", "w4", "w5"), Record("w6", "w4", "w5")]
    )
    # A prompt of one id has nothing to predict.
    assert batch["input_ids"][0].tolist() == [1, 5, 6, 7, 64, 8, 9, 2, 5, 6, 7, 1, 10, 64, 8, 9, 2]
    labels = batch["reconstruction_labels"][0].tolist()
    assert labels == [-100] * 9 + [6, 7] + [-100] * 6


def test_a_branch_that_does_not_fit_is_left_out() -> None:
    """Prompt, gist, continuation and completion take 8 ids, and the repeated prompt 4."""
    record = Record("w1 w2 w3 w4", "w5", "w6")
    counts = {}
    for pack_length in (12, 11):
        batch = GistPackingCollator(tokenizer_of(), 1, max_length=8, pack_length=pack_length, reconstruct=True)(
            [record]
        )
        counts[pack_length] = (batch["input_ids"].shape[1], int((batch["reconstruction_labels"] != -100).sum()))
    assert counts == {12: (12, 3), 11: (8, 0)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=12),
    st.integers(8, 30),
    st.integers(0, 20),
    st.sampled_from([None, 1, 3]),
)
def test_rows_are_never_longer_than_pack_length(
    rows: list[tuple[int, int, int]], max_length: int, more: int, chunk_length: int | None
) -> None:
    records = [Record(tiny.words(4 * p, p), tiny.words(i, 40), tiny.words(o, 50)) for p, i, o in rows]
    collate = GistPackingCollator(
        tokenizer_of(),
        2,
        max_length=max_length,
        pack_length=max_length + more,
        chunk_length=chunk_length,
        reconstruct=True,
    )
    if not collate.fit(records):
        with pytest.raises(RecordError, match=rf"^none of {len(rows)} records fits max_length={max_length}: "):
            collate(records)
        return
    batch = collate(records)
    assert batch["input_ids"].shape[1] <= max_length + more
    assert not ((batch["labels"] != -100) & (batch["reconstruction_labels"] != -100)).any()
    plain = GistPackingCollator(
        tokenizer_of(), 2, max_length=max_length, pack_length=max_length + more, chunk_length=chunk_length
    )(records)
    assert int((batch["labels"] != -100).sum()) == int((plain["labels"] != -100).sum())
    assert "reconstruction_labels" not in plain


@pytest.mark.parametrize("chunk_length", [None, 2], ids=["one-gist", "chunks"])
def test_a_teacher_of_packed_rows_sees_the_prompts(chunk_length: int | None) -> None:
    collate = {
        condition: GistPackingCollator(
            tokenizer_of(), 2, conditions=condition, max_length=48, chunk_length=chunk_length, with_teacher=True
        )
        for condition in ("gist", "positive")
    }
    batch, positive = collate["gist"](some(9)), collate["positive"](some(9))
    assert torch.equal(batch["input_ids"], positive["input_ids"])
    for name in ("attention_mask", "position_ids"):
        assert torch.equal(batch[f"teacher_{name}"], positive[name])
        assert not torch.equal(batch[name], positive[name])


@pytest.mark.parametrize("chunk_length", [None, 2], ids=["one-gist", "chunks"])
@pytest.mark.parametrize("conditions", [*CONDITIONED, CONDITIONED], ids=[*CONDITIONED, "drawn"])
def test_prompt_columns_see_no_other_columns(conditions: Any, chunk_length: int | None) -> None:
    """Every copy of a prompt is marked, or its first chunk, but not a prompt that is to be predicted."""
    collate = GistPackingCollator(
        tokenizer_of(),
        (1, 3),
        conditions=conditions,
        max_length=24,
        pack_length=40,
        chunk_length=chunk_length,
        with_teacher=True,
        with_prompt_columns=True,
        reconstruct=True,
    )
    torch.manual_seed(0)
    batch = collate(some(11))
    assert_marked_rows_see_marked_keys_alone(batch)
    starts = [tiny.words(3 + number, number) for number in range(3)]
    first = [" ".join(text.split()[:chunk_length]) for text in starts]
    # Documents are sorted by length, so they are not in the order of the records.
    assert sorted(" ".join(marked(batch)).split()) == sorted(" ".join(first).split())
    assert len(batch["input_ids"]) > 1


# -- training, and what is refused -------------------------------------------------------------------------------------


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    from gisting.train.finetune import published_arguments

    settings = {"batch_size": 2, "max_steps": 1, "learning_rate": 0.0, "save_strategy": "no", "disable_tqdm": True}
    return published_arguments(folder, **{**settings, **changes})


def test_finetune_packs_groups(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    records = some(8)
    expected = float(model(**GistCollator(tokenizer, 2)(records)).loss.detach())
    metrics = finetune(model, tokenizer, records, arguments(tmp_path), num_gist_tokens=2, max_length=64, pack_length=64)
    assert metrics["train_loss"] == pytest.approx(expected, rel=1e-6), "two groups of four are the whole batch"


def test_finetune_refuses_what_cannot_be_packed(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("mistral-window")
    with pytest.raises(GistError, match=r"^pack_length must be at most 8, the sliding window of mistral, got 64"):
        finetune(model, tokenizer, some(4), arguments(tmp_path), max_length=64, pack_length=64)
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match="pack_length and part_separator cannot be combined"):
        finetune(model, tokenizer, some(4), arguments(tmp_path), max_length=64, pack_length=64, part_separator="|")


def test_errors(t5_tokenizer: GistTokenizer) -> None:
    with pytest.raises(GistError, match="tokenizer is for an encoder-decoder"):
        GistPackingCollator(t5_tokenizer)
    with pytest.raises(GistError, match="pack_length must be at least max_length, 512, got 100"):
        GistPackingCollator(tokenizer_of(), pack_length=100)
    with pytest.raises(RecordError, match="record 1 of the batch has no 'output'"):
        GistPackingCollator(tokenizer_of())([some(1), [{"instruction": "w1"}]])
