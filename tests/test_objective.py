"""The additional losses: their values, what they achieve, and how batches are weighted."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import TrainerCallback
from typer.testing import CliRunner

from gisting import GistCollator, GistError, Record
from gisting.data.packing import GistPackingCollator
from gisting.train.finetune import finetune
from gisting.train.objective import Objective, ObjectiveTrainer, truncated_kl
from tests import tiny
from tests.test_train import RECORDS, arguments, few, fresh

RAGGED = [
    Record("w1 w2 w3 w4", "w7 w8", "w3"),
    Record("w4 w5", "w5 w6 w1", "w6 w2 w9 w10"),
    Record("w11 w12 w13", "w14", "w15 w16"),
    Record("w4 w5", "w20", "w21 w22 w23"),
]


# -- the divergence ----------------------------------------------------------------------------------------------------


def test_the_divergence_by_eye() -> None:
    """Teacher 1/2, 1/4, 1/8, 1/8; student 1/4 each."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    student = torch.zeros(1, 4)
    whole = 0.5 * math.log(2) + 0.25 * math.log(1) + 2 * 0.125 * math.log(0.5)
    one_and_rest = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    two_and_rest = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.25 / 0.5)
    for top_k, expected in ((1, one_and_rest), (2, two_and_rest), (3, whole), (4, whole), (99, whole)):
        assert truncated_kl(student, teacher + 7, top_k).item() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(vocabulary=st.integers(2, 50), top_k=st.integers(1, 60), seed=st.integers(0, 1000), scale=st.floats(0.1, 20))
def test_the_divergence_is_at_most_the_whole_and_exact_for_small_vocabularies(
    vocabulary: int, top_k: int, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, 3, vocabulary, generator=generator)).requires_grad_()
    found = truncated_kl(student, teacher, top_k)
    whole = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert (found >= -1e-5).all()
    assert (found <= whole * (1 + 1e-5) + 1e-4).all()
    assert (truncated_kl(teacher, teacher, top_k).abs() < 1e-5).all()
    if top_k >= vocabulary - 1:
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_only_the_student_gets_gradients() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 40, requires_grad=True) for _ in range(2))
    truncated_kl(student, teacher, 40).sum().backward()
    assert teacher.grad is None
    # The gradient of the full divergence is the student's distribution minus the teacher's.
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.detach().softmax(-1))
    student.grad = None
    truncated_kl(student, teacher, 3).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad.abs().sum(-1) > 0).all()


def test_forbidden_tokens_give_no_nan() -> None:
    teacher = torch.tensor([[1.0, 2.0, float("-inf"), float("-inf")]])
    for top_k in (1, 2, 3, 4):
        for other in ([1.0, 2.0, float("-inf"), float("-inf")], [2.0, 1.0, float("-inf"), 0.5]):
            student = torch.tensor([other], requires_grad=True)
            found = truncated_kl(student, teacher, top_k)
            found.sum().backward()
            assert found.isfinite().all()
            assert student.grad is not None
            assert student.grad.isfinite().all()
    assert truncated_kl(teacher, teacher, 3).item() == pytest.approx(0)


# -- the loss of a batch -----------------------------------------------------------------------------------------------


def trainer_of(model: Any, objective: Objective, output: Path) -> ObjectiveTrainer:
    return ObjectiveTrainer(model=model, args=arguments(output), objective=objective)


def at_labels(logits: Tensor, labels: Tensor, is_encoder_decoder: bool) -> tuple[Tensor, Tensor]:
    if not is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100], labels[labels != -100]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
def test_the_teacher_is_the_positive_control_of_the_same_rows(name: str, tmp_path: Path) -> None:
    """The loss is computed by hand from the batches of two collators."""
    model, tokenizer = tiny.patched(name)
    batch = GistCollator(tokenizer, 2, with_teacher=True)(RAGGED)
    control = GistCollator(tokenizer, 2, conditions="positive")(RAGGED)
    model.train()
    with torch.no_grad():
        student, labels = at_labels(model(**control_of(batch)).logits, batch["labels"], tokenizer.is_encoder_decoder)
        teacher, _ = at_labels(model(**control).logits, batch["labels"], tokenizer.is_encoder_decoder)
    expected = cross_entropy(student, labels) + 0.5 * truncated_kl(student, teacher, 8).mean()
    trainer = trainer_of(model, Objective(distillation=0.5, top_k=8), tmp_path)
    found = trainer.compute_loss(model, batch)
    torch.testing.assert_close(found.detach(), expected)
    assert truncated_kl(student, teacher, 8).mean() > 1e-3  # the control differs
    trainer.compute_loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, batch).detach(), cross_entropy(student, labels))


def control_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove from a batch what it holds only for the objective."""
    return {
        name: value for name, value in batch.items() if not name.startswith("teacher_") and "reconstruction" not in name
    }


def test_a_row_that_sees_its_prompt_is_not_drawn_anywhere(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    batch = GistCollator(tokenizer, 2, conditions="positive", with_teacher=True)(RAGGED)
    model.train()
    plain, drawn = copy.deepcopy(model), model
    trainer_of(plain, Objective(), tmp_path).compute_loss(plain, dict(batch)).backward()
    trainer_of(drawn, Objective(distillation=3.0), tmp_path).compute_loss(drawn, dict(batch)).backward()
    for one, other in zip(plain.parameters(), drawn.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_teacher_does_not_drop_out(tmp_path: Path) -> None:
    """The teacher runs in evaluation mode, and then every module is back in training mode."""
    model, tokenizer = tiny.patched("t5")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    seen: list[bool] = []
    model.get_encoder().register_forward_pre_hook(lambda module, args: seen.append(module.training))
    model.train()
    batch = GistCollator(tokenizer, 2, with_teacher=True)(RAGGED)
    trainer_of(model, Objective(distillation=1.0), tmp_path).compute_loss(model, batch)
    assert seen == [False, True]
    assert all(module.training for module in model.modules())


def test_reconstruction_predicts_the_prompt_after_its_gist(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    packed = GistPackingCollator(tokenizer, 2, max_length=32, pack_length=64, reconstruct=True)(RAGGED)
    model.train()
    with torch.no_grad():
        logits = model(**control_of(packed)).logits
        answers = cross_entropy(*at_labels(logits, packed["labels"], False))
        prompts = cross_entropy(*at_labels(logits, packed["reconstruction_labels"], False))
    trainer = trainer_of(model, Objective(reconstruction=0.25), tmp_path)
    torch.testing.assert_close(trainer.compute_loss(model, packed).detach(), answers + 0.25 * prompts)


# -- a whole run -------------------------------------------------------------------------------------------------------


class Logged(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs += [logs] if logs and "loss" in logs else []


@pytest.mark.parametrize("name", few(["llama", "t5"], "t5"))
def test_accumulation_changes_nothing(name: str, tmp_path: Path) -> None:
    """Completions differ in length, so a mean of the batches' means would be another loss. With SGD, because Adam
    ignores the size of gradients.
    """
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.3}
    states, logs = [], []
    for rows in (4, 1):
        model, tokenizer = fresh(name)
        logged = Logged()
        finetune(
            model,
            tokenizer,
            RAGGED,
            arguments(tmp_path, batch_size=4, per_device_batch_size=rows, max_steps=3, logging_steps=1, **sgd),
            num_gist_tokens=2,
            objective=Objective(distillation=2.0),
            callbacks=[logged],
        )
        states.append(model.state_dict())
        logs.append(logged.logs)
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(one["lm_loss"] + 2 * one["distillation_loss"], abs=1e-5)
        for part in ("loss", "lm_loss", "distillation_loss"):
            assert other[part] == pytest.approx(one[part], abs=1e-5)


def test_an_epoch_that_ends_in_a_short_step_changes_nothing(tmp_path: Path) -> None:
    """There are three groups, two at a time, so a step has one or two forward passes. Prompts differ in length, so
    reconstruction weights them by their tokens.
    """
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.3}
    logs = []
    for rows in (4, 1):
        model, tokenizer = fresh("llama")
        logged = Logged()
        finetune(
            model,
            tokenizer,
            [*RAGGED, Record(tiny.words(9, 1), "w3", "w4"), Record("w9 w8", "w3 w1", "w4 w40 w41")],
            arguments(tmp_path, batch_size=4, per_device_batch_size=rows, max_steps=4, logging_steps=2, **sgd),
            num_gist_tokens=2,
            max_length=32,
            pack_length=64,
            objective=Objective(distillation=1.0, reconstruction=0.5),
            callbacks=[logged],
        )
        logs.append(logged.logs)
    for one, other in zip(*logs, strict=True):
        for log in (one, other):
            parts = log["lm_loss"] + log["distillation_loss"] + 0.5 * log["reconstruction_loss"]
            assert log["loss"] == pytest.approx(parts, abs=1e-5)
        for part in ("loss", "lm_loss", "distillation_loss", "reconstruction_loss"):
            assert other[part] == pytest.approx(one[part], abs=1e-5)


def test_packed_rows_distil_and_reconstruct_the_same(tmp_path: Path) -> None:
    """In a packed run with both losses, distillation equals that of the padded run, and the prompt is learned."""
    found = {}
    for pack_length in (None, 64):
        model, tokenizer = fresh("llama")
        logged = Logged()
        objective = Objective(distillation=1.0, reconstruction=0.0 if pack_length is None else 0.5)
        finetune(
            model,
            tokenizer,
            RECORDS,
            arguments(tmp_path, max_steps=1 if pack_length is None else 25, logging_steps=1),
            num_gist_tokens=2,
            max_length=32,
            pack_length=pack_length,
            objective=objective,
            callbacks=[logged],
        )
        found[pack_length] = logged.logs
    first = [found[length][0] for length in (None, 64)]
    for part in ("lm_loss", "distillation_loss"):
        assert first[1][part] == pytest.approx(first[0][part], abs=1e-5)
    packed = found[64]
    assert packed[0]["loss"] == pytest.approx(
        packed[0]["lm_loss"] + packed[0]["distillation_loss"] + 0.5 * packed[0]["reconstruction_loss"], abs=1e-5
    )
    assert packed[-1]["reconstruction_loss"] < packed[0]["reconstruction_loss"] / 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distillation": -1}, "distillation must be a weight of at least 0, got -1"),
        ({"reconstruction": float("inf")}, "reconstruction must be a weight"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_wrong_weights_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(GistError, match=words):
        Objective(**settings)


def test_reconstruction_needs_packed_rows(tmp_path: Path) -> None:
    model, tokenizer = fresh("llama")
    with pytest.raises(GistError, match="give pack_length"):
        finetune(model, tokenizer, RECORDS, arguments(tmp_path), objective=Objective(reconstruction=0.1))


def test_the_command_line_takes_the_weights(tmp_path: Path) -> None:
    from gisting.cli import app
    from gisting.data.records import save_records
    from gisting.train.recipe import load_recipe

    model, tokenizer = tiny.patched("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_records(RECORDS, tmp_path / "records.jsonl")
    command = ["train", str(tmp_path / "model"), "--data", str(tmp_path / "records.jsonl"), "--max-steps", "2"]
    command += ["--batch-size", "4", "--max-length", "32", "--pack-length", "64", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--distillation", "0.5", "--reconstruction", "0.1"])
    assert done.exit_code == 0, done.output
    written = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (written.distillation, written.reconstruction) == (0.5, 0.1)
