"""Texts are encoded and batches made ahead: with the same bits, without tokenizer in a step, in workers."""

from __future__ import annotations

import logging
import os
import pickle
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

import gisting.train.finetune
from gisting import GistCollator, GistError, GistTokenizer, Record
from gisting.data import collate as collating
from gisting.data.packing import GistPackingCollator, group_by_instruction
from gisting.errors import RecordError
from gisting.internalize.schedule import Schedule
from gisting.internalize.stages import internalize
from gisting.train.finetune import finetune, published_arguments
from gisting.train.repeat import RepeatableDraws, check_workers, without_parallel_tokenizers
from tests import tiny
from tests.test_recipes import trained

RECORDS = [
    Record(
        f"{tiny.words(3 + n % 5, n // 3)} w9 {tiny.words(2, n // 3)}",
        tiny.words(n % 4, 40 + n),
        tiny.words(1 + n % 6, 70 + n),
    )
    for n in range(24)
]
DRAWN = {"gist": 2, "positive": 1, "negative": 1}


def padded(**settings: Any) -> GistCollator:
    return GistCollator(GistTokenizer(tiny.word_tokenizer()), (1, 4), conditions=DRAWN, **settings)


def packed(**settings: Any) -> GistCollator:
    return GistPackingCollator(GistTokenizer(tiny.word_tokenizer()), (1, 4), conditions=DRAWN, **settings)


def digest(batches: Iterable[dict[str, Tensor]]) -> int:
    found = 0
    for batch in batches:
        for name in sorted(batch):
            found = zlib.crc32(f"{name}{batch[name].tolist()}".encode(), found)
    return found


@pytest.fixture
def num_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts in each call of a tokenizer."""
    calls: list[int] = []
    whole = GistTokenizer.encode_texts

    def counted(self: GistTokenizer, texts: Any) -> list[list[int]]:
        calls.append(len(texts))
        return whole(self, texts)

    monkeypatch.setattr(GistTokenizer, "encode_texts", counted)
    return calls


# -- the collators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_ahead", [False, True], ids=["as-they-come", "ahead"])
@pytest.mark.parametrize(
    ("make", "settings", "expected"),
    [
        (padded, {"max_length": 40, "with_teacher": True}, 1962730421),
        (padded, {"max_length": 40, "chunk_length": 3}, 1025432861),
        (padded, {"part_separator": " w9 "}, 1436052507),
        (
            packed,
            {"max_length": 40, "pack_length": 80, "chunk_length": 3, "reconstruct": True, "with_teacher": True},
            1822906481,
        ),
    ],
    ids=["padded", "chunks", "parts", "packed"],
)
def test_a_seed_gives_the_same_batches_in_every_version(
    make: Callable[..., GistCollator],
    settings: dict[str, Any],
    expected: int,
    is_ahead: bool,
    num_encoded: list[int],
) -> None:
    """The digests are from before texts were encoded ahead: a run that began then ends the same."""
    collator = make(**settings)
    if is_ahead:
        collator.encode_ahead([RECORDS[0], RECORDS[:12], *(vars(record) for record in RECORDS[12:])])
        num_encoded.clear()
    draws = RepeatableDraws(collator, 3)
    assert digest(draws(RECORDS[start : start + 8]) for start in range(0, 24, 8)) == expected
    assert bool(num_encoded) is not is_ahead


def test_a_text_is_encoded_once_however_often_it_comes(num_encoded: list[int]) -> None:
    collator = padded()
    collator.encode_ahead([Record("w1", f"w{number % 2}", "w3") for number in range(10)])
    assert num_encoded == [1, 2, 2]  # the prompt; continuations of two inputs, without and with the answer
    collator.encode_ahead([Record("w1", "w0", "w3"), Record("w1", "w5", "w3")])
    assert num_encoded[3:] == [1, 1]
    collator([Record("w1", "w5", "w3"), Record("w2", "w5", "w3")])
    assert num_encoded[5:] == [1], "what is not kept is encoded as it comes"
    collator([Record("w2", "w5", "w3")])
    assert num_encoded[6:] == [1], "and not kept"


def test_many_texts_are_encoded_in_several_calls(num_encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collating, "_AHEAD", 3)
    padded().encode_ahead([Record(f"w{number}", "w1", "w3") for number in range(7)])
    assert num_encoded[:3] == [3, 3, 1]


def test_a_bad_record_is_named_before_training() -> None:
    with pytest.raises(RecordError, match=r"^record 2 has no 'output'"):
        padded().encode_ahead([RECORDS[:2], {"instruction": "w1"}])
    with pytest.raises(RecordError, match=r"^record 1 of the batch: 'input' must be a string, got list"):
        padded()([RECORDS[0], Record("w1", ["w2"], "w3")])  # pyright: ignore[reportArgumentType]


def test_conditions_are_computed_for_the_rows_that_drew_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[int]] = {}
    for name, whole in list(collating.CONDITIONS.items()):

        def counted(is_gist: Tensor, *others: Any, name: str = name, whole: Any = whole) -> Any:
            rows.setdefault(name, []).append(len(is_gist))
            return whole(is_gist, *others)

        monkeypatch.setitem(collating.CONDITIONS, name, counted)
    collator = padded()
    monkeypatch.setattr(collator, "_draw_conditions", lambda number: torch.tensor([2, 0, 2, 2]))
    collator(RECORDS[:4])
    assert rows == {"gist": [1], "negative": [3]}


def test_a_pickled_collator_keeps_its_ids(num_encoded: list[int]) -> None:
    """Processes that are not forked get a pickled collator."""
    collator = packed()
    collator.encode_ahead(RECORDS)
    num_encoded.clear()
    draws = RepeatableDraws(pickle.loads(pickle.dumps(collator)), 3)  # noqa: S301
    assert digest([draws(RECORDS)]) == digest([RepeatableDraws(packed(), 3)(RECORDS)])
    assert not num_encoded[3:]


# -- draws -------------------------------------------------------------------------------------------------------------


def test_draws_leave_the_generators_of_accelerators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on a GPU draws from the GPU's generator, which must not depend on how batches are made."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(5)
    assert seeded == [5]
    RepeatableDraws(padded(), 3)(RECORDS)
    assert seeded == [5]


def test_workers_must_not_outlive_an_epoch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with pytest.raises(GistError, match="dataloader_persistent_workers must be False, got True: workers that outlive"):
        trained(tmp_path, RECORDS, **settings)
    check_workers(TrainingArguments(str(tmp_path), use_cpu=True, dataloader_persistent_workers=False))


# -- a run -------------------------------------------------------------------------------------------------------------


class _AtTheFirstStep(TrainerCallback):
    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.act()


@pytest.mark.parametrize("pack_length", [pytest.param(None, marks=pytest.mark.slow, id="padded"), 64])
def test_no_text_is_encoded_in_a_step(tmp_path: Path, pack_length: int | None, num_encoded: list[int]) -> None:
    """Three epochs, with an evaluation after each; texts are only encoded before the first step."""
    model, tokenizer = tiny.patched("llama")
    arguments = published_arguments(
        tmp_path, batch_size=4, num_train_epochs=3.0, save_strategy="no", eval_strategy="epoch", disable_tqdm=True
    )
    seen: list[int] = []
    finetune(
        model,
        tokenizer,
        RECORDS,
        arguments,
        num_gist_tokens=(1, 3),
        max_length=48,
        pack_length=pack_length,
        eval_records=[Record("w40 w41", "w42", "w43")],
        callbacks=[_AtTheFirstStep(lambda: seen.append(len(num_encoded)))],
    )
    prompts = len(group_by_instruction(RECORDS, len(RECORDS)))
    assert num_encoded == [prompts, 24, 24, 1, 1, 1]
    assert seen == [6]


@pytest.mark.slow
def test_no_text_is_encoded_in_a_step_of_a_stage_with_gists(tmp_path: Path, num_encoded: list[int]) -> None:
    model, tokenizer = tiny.patched("llama")
    settings: dict[str, Any] = {"num_train_epochs": 4.0, "save_strategy": "no", "disable_tqdm": True}
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(len(num_encoded))

        def on_train_end(self, args, state, control, **kwargs):
            seen.append(len(num_encoded))

    internalize(
        model,
        tokenizer,
        "w50 w51 w52",
        RECORDS[1:4],
        published_arguments(tmp_path, batch_size=2, **settings),
        schedule=Schedule((1.0, 0.0)),
        tail="gist",
        callbacks=[Watch()],
    )
    assert seen[-1] == seen[-2]


@pytest.mark.parametrize("pack_length", [pytest.param(None, marks=pytest.mark.slow, id="padded"), 48])
def test_workers_give_the_weights_of_a_run_without(tmp_path: Path, pack_length: int | None) -> None:
    """To the bit, into a third epoch, with dropout."""
    runs = [
        trained(
            tmp_path,
            RECORDS[:12],
            pack_length=pack_length,
            max_steps=8,
            dataloader_num_workers=number,
        )
        for number in (0, 2)
    ]
    assert runs[0].losses == runs[1].losses
    assert runs[0].widths == runs[1].widths
    assert all(torch.equal(tensor, runs[1].weights[name]) for name, tensor in runs[0].weights.items())


def test_a_stream_is_read_in_the_process_that_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise, each of two workers would read the whole stream."""

    class Stream(torch.utils.data.IterableDataset[Record]):
        def __iter__(self):
            assert torch.utils.data.get_worker_info() is None
            return iter(RECORDS)

    expected = trained(tmp_path, Stream()).losses
    assert not caplog.records
    assert trained(tmp_path, Stream(), dataloader_num_workers=2).losses == expected
    assert "a stream is read in this process, not by the 2 workers of dataloader_num_workers" in caplog.text


def test_how_many_records_were_encoded_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gisting")
    trained(tmp_path, RECORDS, max_steps=1)
    assert "the texts of 24 records are encoded" in caplog.text


@pytest.mark.parametrize(
    ("num_workers", "own", "expected"),
    [(1, None, "false"), (1, "true", "true"), pytest.param(0, None, None, marks=pytest.mark.slow)],
)
def test_tokenizers_have_no_threads_while_workers_are_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, own: str | None, expected: str | None
) -> None:
    """Unless this variable is set, tokenizers up to 0.22 warn in every process that is forked after threads were
    used.
    """
    monkeypatch.delenv(name := "TOKENIZERS_PARALLELISM", raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    seen: list[str | None] = []
    watch = _AtTheFirstStep(lambda: seen.append(os.environ.get(name)))
    model, tokenizer = tiny.patched("llama")
    settings: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "save_strategy": "no", "disable_tqdm": True}
    arguments = published_arguments(tmp_path, dataloader_num_workers=num_workers, **settings)
    finetune(model, tokenizer, RECORDS, arguments, callbacks=[watch])
    assert seen == [expected]
    assert os.environ.get(name) == own


def test_threads_of_tokenizers_are_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name := "TOKENIZERS_PARALLELISM", raising=False)
    with pytest.raises(ZeroDivisionError), without_parallel_tokenizers(True):
        1 / 0  # noqa: B018
    assert name not in os.environ


@pytest.mark.parametrize(
    ("has_gpu", "cores", "processes", "changes", "expected"),
    [
        (True, 16, None, {}, 4),
        (True, 3, None, {}, 2),
        (True, 1, None, {}, 0),
        (True, 16, "8", {}, 1),
        (True, 16, None, {"use_cpu": True}, 0),
        (True, 16, None, {"dataloader_num_workers": 1}, 1),
        (False, 16, None, {}, 0),
    ],
)
def test_workers_by_default(
    monkeypatch: pytest.MonkeyPatch,
    has_gpu: bool,
    cores: int,
    processes: str | None,
    changes: dict[str, Any],
    expected: int,
) -> None:
    """Up to four on a GPU, if there are enough cores in addition to the launched processes' own."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(has_gpu))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    found: dict[str, Any] = {}
    monkeypatch.setattr(gisting.train.arguments, "TrainingArguments", lambda **settings: found.update(settings))
    published_arguments("unused", **changes)
    assert found["dataloader_num_workers"] == expected
