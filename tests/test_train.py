"""Finetuning on stock Trainer: it learns, resumes, checkpoints, and its files are recognised."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

import gisting
from gisting import GistCollator, GistError, GistTokenizer, Record
from gisting._compat import activation_checkpointing
from gisting.models.load import trained_num_gist_tokens
from gisting.train.finetune import PUBLISHED, finetune, published_arguments
from tests import tiny

# The instruction decides what to answer; the input does not say.
RECORDS = [Record(f"w{number} w{number + 1}", "w50 w51", f"w{number + 20}") for number in range(0, 16, 2)]


def few(names: Iterable[str], *default: str) -> list[Any]:
    """Make test parameters: names that are not among ``default`` only run with the slow tests."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


def arguments(output: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "per_device_batch_size": 8,
        "max_steps": 60,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return published_arguments(output, **{**settings, **changes})


def fresh(name: str) -> tuple[Any, GistTokenizer]:
    tokenizer = GistTokenizer(tiny.word_tokenizer(), "plain", is_encoder_decoder=name in tiny.ENCODER_DECODERS)
    set_seed(0)
    model = tiny.model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    return gisting.patch(model, tokenizer), tokenizer


def test_stock_trainer_with_nothing_but_the_collator(tmp_path: Path) -> None:
    model, tokenizer = fresh("llama")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=RECORDS,  # pyright: ignore[reportArgumentType]
        data_collator=GistCollator(tokenizer, 2),
    )
    before = trainer.evaluate(RECORDS)["eval_loss"]  # pyright: ignore[reportArgumentType]
    trainer.train()
    assert trainer.evaluate(RECORDS)["eval_loss"] < before / 10  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", few(["llama", "gemma3_text", "t5", "umt5"], "llama", "gemma3_text", "t5"))
def test_it_learns_through_the_gist_alone(tmp_path: Path, name: str) -> None:
    """The answer is only in the prompt, so a model that answers from the cache has read it through the gist."""
    model, tokenizer = fresh(name)
    steps = 200 if name in tiny.ENCODER_DECODERS else 80
    finetune(model, tokenizer, RECORDS, arguments(tmp_path, max_steps=steps), num_gist_tokens=2)
    cache = gisting.compress(model, tokenizer, [record.instruction for record in RECORDS], 2)
    answers = gisting.generate(
        model, tokenizer, ["w50 w51"] * len(RECORDS), cache=cache, max_new_tokens=3, do_sample=False
    )
    assert answers == [record.output for record in RECORDS]
    control = gisting.generate(
        model,
        tokenizer,
        ["w50 w51"] * len(RECORDS),
        prompts=[record.instruction for record in RECORDS],
        num_gist_tokens=2,
        condition="negative",
        max_new_tokens=3,
        do_sample=False,
    )
    assert len(set(control)) == 1  # without the prompt, one answer for all


def test_the_saved_checkpoint_is_whole(tmp_path: Path) -> None:
    model, tokenizer = fresh("qwen3")
    finetune(model, tokenizer, RECORDS, arguments(tmp_path, max_steps=5), num_gist_tokens=(1, 3))
    assert (tmp_path / "model.safetensors").is_file()
    loaded, again = gisting.load(tmp_path)
    assert trained_num_gist_tokens(loaded) == (1, 3)
    assert again.fingerprint == tokenizer.fingerprint
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded.generation_config.suppress_tokens == [tokenizer.gist_token_id]


def test_resume_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Twenty steps equal ten, a stop and ten more, to the bit of every weight."""
    whole, tokenizer = fresh("llama")
    finetune(whole, tokenizer, RECORDS, arguments(tmp_path / "whole", max_steps=20), num_gist_tokens=2)

    class Stop(gisting.train.finetune.TrainerCallback):  # pyright: ignore[reportAttributeAccessIssue]
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 10

    halves, tokenizer = fresh("llama")
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    finetune(halves, tokenizer, RECORDS, arguments(tmp_path / "b", **settings), num_gist_tokens=2, callbacks=[Stop()])
    resumed, tokenizer = fresh("llama")
    finetune(resumed, tokenizer, RECORDS, arguments(tmp_path / "b", **settings), num_gist_tokens=2, resume=True)
    expected = whole.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in resumed.state_dict().items())
    assert not all(torch.equal(expected[name], tensor) for name, tensor in halves.state_dict().items())


def test_checkpointing_and_accumulation_give_the_gradients_of_one_pass(tmp_path: Path) -> None:
    plain, tokenizer = fresh("llama")
    start = copy.deepcopy(plain.state_dict())
    finetune(plain, tokenizer, RECORDS, arguments(tmp_path, max_steps=3), num_gist_tokens=2)
    other, _ = fresh("llama")
    other.load_state_dict(start)
    changes = {"max_steps": 3, "per_device_batch_size": 2, **activation_checkpointing(True)}
    finetune(other, tokenizer, RECORDS, arguments(tmp_path, **changes), num_gist_tokens=2)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_mask_that_is_ignored_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test the tests above: with the plain causal mask, the model does not learn to answer from the gist."""
    from gisting.visibility import CONDITIONS, positive

    model, tokenizer = fresh("llama")
    with monkeypatch.context() as patch:
        patch.setitem(CONDITIONS, "gist", positive)
        finetune(model, tokenizer, RECORDS, arguments(tmp_path, max_steps=80), num_gist_tokens=2)
    cache = gisting.compress(model, tokenizer, [record.instruction for record in RECORDS], 2)
    answers = gisting.generate(
        model, tokenizer, ["w50 w51"] * len(RECORDS), cache=cache, max_new_tokens=3, do_sample=False
    )
    assert answers != [record.output for record in RECORDS]


def test_instructions_in_parts_are_trained_as_chained_gists(tmp_path: Path) -> None:
    model, tokenizer = fresh("llama")
    with pytest.raises(GistError, match="part_separator"):
        finetune(model, tokenizer, [Record("w1", "w2", "w3")], arguments(tmp_path), part_separator="")
    records = [Record("w1 | w2", "w7", "w3"), Record("w4", "w5", "w6")]
    batch = GistCollator(tokenizer, 2, part_separator=" | ")(records)
    expected = float(model(**batch).loss.detach())
    metrics = finetune(
        model,
        tokenizer,
        records,
        arguments(tmp_path, batch_size=2, per_device_batch_size=2, max_steps=1, learning_rate=0.0),
        num_gist_tokens=2,
        part_separator=" | ",
    )
    assert metrics["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(float(model(**GistCollator(tokenizer, 2)(records)).loss.detach()), rel=1e-6)


def test_published_hyper_parameters() -> None:
    decoder = published_arguments("unused")
    assert (decoder.num_train_epochs, decoder.learning_rate, decoder.weight_decay) == (3.0, 2e-5, 0.0)
    assert decoder.per_device_train_batch_size * decoder.gradient_accumulation_steps == 128
    assert decoder.lr_scheduler_type == "cosine"
    assert decoder.get_warmup_steps(3000) == 90
    t5 = published_arguments("unused", is_encoder_decoder=True)
    assert (t5.max_steps, t5.learning_rate, t5.lr_scheduler_type) == (16_000, 5e-5, "constant")
    assert t5.per_device_train_batch_size * t5.gradient_accumulation_steps == 16
    assert published_arguments("unused", is_encoder_decoder=True, num_train_epochs=1.0).max_steps == -1
    assert set(PUBLISHED) == {"decoder", "encoder-decoder"}


@pytest.mark.parametrize(
    ("launched", "visible", "use_cpu", "accumulation"),
    [(None, 0, False, 8), (None, 8, False, 1), ("4", 8, False, 2), ("2", 0, False, 4), (None, 8, True, 8)],
)
def test_the_batch_is_that_of_all_devices(
    monkeypatch: pytest.MonkeyPatch, launched: str | None, visible: int, use_cpu: bool, accumulation: int
) -> None:
    """A step has 128 rows, 16 at a time on each device; with a launcher, there are as many devices as processes."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if launched is not None:
        monkeypatch.setenv("WORLD_SIZE", launched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    found: dict[str, Any] = {}
    monkeypatch.setattr(gisting.train.arguments, "TrainingArguments", lambda **settings: found.update(settings))
    published_arguments("unused", **({"use_cpu": True} if use_cpu else {}))
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (16, accumulation)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_inside_peft_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    """Its checkpoint would have peft's names, which nothing reads back."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = fresh("llama")
    inside: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(GistError, match=r"^model has adapters of peft \(in \d+ modules, .*q_proj among them\)"):
        finetune(inside.base_model.model, tokenizer, RECORDS, arguments(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_training_errors(tmp_path: Path) -> None:
    model, tokenizer = fresh("llama")
    with pytest.raises(GistError, match="records is empty"):
        finetune(model, tokenizer, [], arguments(tmp_path))
    with pytest.raises(GistError, match=r"is not patched; call gisting.patch"):
        finetune(gisting.unpatch(model), tokenizer, RECORDS, arguments(tmp_path))
    with pytest.raises(GistError, match="batch_size must be a multiple of per_device_batch_size, got 10 and 4"):
        published_arguments("unused", batch_size=10, per_device_batch_size=4)
