"""The teacher of an adapter at gist tokens is the untouched model with the prompt as ordinary text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gisting.data.collate import GistCollator
from gisting.data.packing import GistPackingCollator
from gisting.data.plain import plain_batch, plain_sources
from gisting.data.records import Record
from gisting.eval.kl import truncated_kl
from gisting.models.adapters import Adapter, attach
from gisting.train.arguments import published_arguments
from gisting.train.batches import StepBatches
from gisting.train.finetune import finetune
from gisting.train.objective import Objective, ObjectiveTrainer
from tests import tiny

RECORDS = [
    Record(tiny.words(9, 1), tiny.words(3, 2), tiny.words(4, 3)),
    Record(tiny.words(9, 1), tiny.words(5, 4), tiny.words(2, 5)),
    Record(tiny.words(4, 6), tiny.words(2, 7), tiny.words(3, 8)),
    Record(tiny.words(6, 9), tiny.words(2, 7), tiny.words(5, 8)),
]


def with_adapter(name: str) -> tuple[Any, Any]:
    """A model whose gist tokens do something."""
    model, tokenizer = tiny.patched(name)
    attach(model, Adapter("gist-lora", rank=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, tokenizer


def plain_logits(model: Any, tokenizer: Any, records: list[Record]) -> torch.Tensor:
    """Logits at the answers with each prompt as ordinary text, without gist tokens; ``(T, V)`` in their order."""
    found = []
    for record in records:
        source = plain_sources(tokenizer, [record.instruction], [record.input])
        answer = tokenizer.encode_completions([record.input], [record.output])
        batch = plain_batch(tokenizer, source, answer)
        with torch.no_grad():
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        found.append(logits[0, -len(answer[0]) - 1 : -1])
    return torch.cat(found)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("conditions", ["gist", "positive", "negative"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_teacher_is_the_stock_model_with_the_whole_text(
    name: str, conditions: str, is_packed: bool, is_split: bool, tmp_path: Path
) -> None:
    model, tokenizer = with_adapter(name)
    made: Any = GistPackingCollator if is_packed else GistCollator
    more = {"pack_length": 100} if is_packed else {}
    settings = {"max_length": 48, "with_teacher": True, "teacher_sees_gist": False, "with_prompt_columns": is_split}
    collator = made(tokenizer, (2, 4), conditions=conditions, **settings, **more)
    batch = StepBatches(collator, tokenizer, has_frozen_base=is_split)(RECORDS)
    seen = []

    class Trainer(ObjectiveTrainer):
        def _logits(self, *args: Any) -> torch.Tensor:
            seen.append(super()._logits(*args))
            return seen[-1]

    arguments = published_arguments(tmp_path, batch_size=4, per_device_batch_size=4)
    trainer = Trainer(model=model, args=arguments, objective=Objective(language_model=0.0, distillation=1.0, top_k=64))
    loss = trainer.compute_loss(model.train(), dict(batch))
    teacher, student = seen[-2:]
    torch.testing.assert_close(loss.detach(), truncated_kl(student, teacher, 64).mean())
    # Rows may be in another order when they are packed, so logits are compared token by token.
    ids = batch["target_ids"].tolist()
    for record in RECORDS:
        answer = tokenizer.encode_completions([record.input], [record.output])[0]
        expected = plain_logits(model, tokenizer, [record])
        places = [at for at in range(len(ids)) if ids[at : at + len(answer)] == answer]
        assert any(torch.allclose(teacher[at : at + len(answer)], expected, rtol=1e-4, atol=1e-4) for at in places), (
            record
        )


@pytest.mark.parametrize(
    "settings",
    [{}, {"chunk_length": 5}, {"part_separator": " w7 "}, {"pack_length": 80, "chunk_length": 5}],
)
def test_no_token_of_the_teacher_depends_on_a_gist(settings: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the layout: the teacher's loss does not change with the adapter."""
    model, tokenizer = with_adapter("llama")
    made: Any = GistPackingCollator if "pack_length" in settings else GistCollator
    batch = made(tokenizer, 2, max_length=48, with_teacher=True, teacher_sees_gist=False, **settings)(RECORDS)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["teacher_attention_mask"]}
    inputs["position_ids"] = batch["teacher_position_ids"]
    is_answer = batch["labels"] != -100
    with torch.no_grad():
        before = model(**inputs).logits[is_answer]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        torch.testing.assert_close(model(**inputs).logits[is_answer], before, rtol=0, atol=0)


def test_an_encoder_shows_its_teacher_no_gist() -> None:
    model, tokenizer = with_adapter("t5")
    batch = GistCollator(tokenizer, 2, with_teacher=True, teacher_sees_gist=False)(RECORDS)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["teacher_attention_mask"]}
    inputs["labels"] = batch["labels"]
    with torch.no_grad():
        before = model(**inputs).loss
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        torch.testing.assert_close(model(**inputs).loss, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "sees"), [("full", True), ("lora", True), ("gist-lora", False), ("embeddings", False)]
)
def test_what_the_teacher_sees_depends_on_what_is_trained(
    method: str, sees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    right = GistCollator.__call__
    monkeypatch.setattr(GistCollator, "__call__", lambda self, rows: made.append(self) or right(self, rows))
    model, tokenizer = tiny.patched("llama")
    arguments = published_arguments(tmp_path, batch_size=4, per_device_batch_size=4, max_steps=1)
    objective = Objective(distillation=1.0)
    finetune(model, tokenizer, RECORDS, arguments, method=method, objective=objective, num_gist_tokens=(2, 2))
    assert made
    assert {one.teacher_sees_gist for one in made} == {sees}
