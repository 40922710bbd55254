"""Split-off prompts: the same mask in two parts, and the same loss and gradients from two passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from gisting import GistCollator, GistError, Record
from gisting._compat import activation_checkpointing
from gisting.data.packing import GistPackingCollator
from gisting.data.split import split_prompts
from gisting.models.adapters import Adapter, attach
from gisting.models.gist_lora import gists_at
from gisting.models.head import logits_at
from gisting.train.batches import StepBatches, find_targets
from gisting.train.finetune import _has_frozen_prompts, finetune
from gisting.train.objective import Objective, ObjectiveTrainer, truncated_kl
from gisting.visibility import CONDITIONS, Visibility
from tests import tiny
from tests.test_train import arguments, few

RECORDS = [
    Record("w1 w2 w3 w4", "w7 w8", "w3"),
    Record("w4 w5", "w5 w6 w1", "w6 w2 w9 w10"),
    Record("w11 w12 w13", "w14", "w15 w16"),
    Record("w4 w5", "w20", "w21 w22 w23"),
    Record("w30 w31 w32 w33 w34 w35", "w36 w37 w38", "w39"),
]
MIXED = {"gist": 2.0, "positive": 1.0, "negative": 1.0}
# Families whose positions count tokens; batches of the others are not split.
FAMILIES = "llama llama-untied qwen3 gemma phi3 olmo2 granite smollm3 gpt_neox mixtral qwen3_moe".split()


# -- the mask ----------------------------------------------------------------------------------------------------------


def test_by_eye() -> None:
    """The drawing in the module's docstring."""
    is_gist = torch.tensor([[c in "GH" for c in "abGcdeHf"]])
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])
    masks = {name: CONDITIONS[name](is_gist, documents=documents) for name in ("gist", "positive")}
    batch = {
        "input_ids": torch.arange(8)[None],
        "position_ids": masks["gist"].position_ids,
        "labels": torch.tensor([[-100, -100, -100, 3, -100, -100, -100, 7]]),
        "attention_mask": masks["gist"].as_attention_mask(),
        "teacher_attention_mask": masks["positive"].as_attention_mask(),
        "is_prompt": torch.tensor([[c in "abde" for c in "abGcdeHf"]]),
    }
    parts = split_prompts(batch, 0)  # pyright: ignore[reportArgumentType]
    assert parts["prompt_input_ids"].tolist() == [[0, 1, 4, 5]]
    assert parts["prompt_position_ids"].tolist() == [[-2, -1, -2, -1]]
    assert rows(parts["prompt_attention_mask"], 4) == ["1...", "11..", "..1.", "..11"]
    assert parts["input_ids"].tolist() == [[2, 3, 6, 7]]
    assert parts["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert parts["labels"].tolist() == [[-100, 3, -100, 7]]
    #                                                  abde Gc Hf
    assert rows(parts["attention_mask"], 4) == ["11..1...", "....11..", "..11..1.", "......11"]
    assert rows(parts["teacher_attention_mask"], 4) == ["11..1...", "11..11..", "..11..1.", "..11..11"]


def rows(mask: Tensor, number: int) -> list[str]:
    dense = Visibility.from_attention_mask(mask).to_dense(number)[0]
    return ["".join(".1"[bit] for bit in line) for line in dense.long().tolist()]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=1, max_size=6),
    is_packed=st.booleans(),
    seed=st.integers(0, 1000),
    k=st.integers(1, 4),
)
def test_both_parts_are_the_mask_itself(
    lengths: list[tuple[int, int, int]], is_packed: bool, seed: int, k: int
) -> None:
    """Compare every pair of tokens with the dense mask."""
    records = [
        Record(tiny.words(a, seed + n), tiny.words(b, seed - n), tiny.words(c, n))
        for n, (a, b, c) in enumerate(lengths)
    ]
    torch.manual_seed(seed)
    settings = {"conditions": MIXED, "with_teacher": True, "with_prompt_columns": True}
    collator: Any = GistPackingCollator if is_packed else GistCollator
    tokenizer = tiny.tokenizer()
    batch = collator(tokenizer, (1, k), max_length=40, **settings)(records)
    # Every token of a row gets a different id.
    width = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.arange(1, width + 1).repeat(len(batch["input_ids"]), 1)
    parts = split_prompts(batch, 0)
    first, end = batch["attention_mask"][:, 0].unbind(1)
    for row in range(len(batch["input_ids"])):
        prompt, rest = (parts[name][row].tolist() for name in ("prompt_input_ids", "input_ids"))
        found = sorted(name for name in prompt + rest if name)
        assert found == [n + 1 for n in range(width) if end[row, n] > first[row, n]]
        for name in ("attention_mask", "teacher_attention_mask"):
            whole = Visibility.from_attention_mask(batch[name]).to_dense()[row]
            seen = Visibility.from_attention_mask(parts[name]).to_dense(len(rest))[row]
            assert_same(seen, whole, rest, prompt + rest)
            own = Visibility.from_attention_mask(parts["prompt_attention_mask"]).to_dense()[row]
            assert_same(own, whole, prompt, prompt)


def assert_same(seen: Tensor, whole: Tensor, row_names: list[int], key_names: list[int]) -> None:
    for number, row in enumerate(row_names):
        keys = {key for key, bit in zip(key_names, seen[number].tolist(), strict=True) if bit}
        expected = {key + 1 for key, bit in enumerate(whole[row - 1].tolist()) if bit} if row else set()
        assert keys == expected


def test_errors() -> None:
    batch = GistCollator(tiny.tokenizer(), 2)(RECORDS)
    with pytest.raises(GistError, match="with_prompt_columns=True"):
        split_prompts(batch, 0)


# -- targets -----------------------------------------------------------------------------------------------------------


def test_what_a_step_is_told() -> None:
    tokenizer = tiny.tokenizer()
    batch = StepBatches(GistCollator(tokenizer, 2), tokenizer)([Record("w1 w2", "w3", "w4")])
    # About <s> w1 w2 G G w3 w4 </s>: a prompt ends with its gist, and the rest follows.
    is_gist = (batch["input_ids"] == tokenizer.gist_token_id)[0].tolist()
    assert batch["gist_index"].tolist() == [place for place, is_one in enumerate(is_gist) if is_one]
    seen = Visibility.from_attention_mask(batch["attention_mask"]).to_dense()[0].sum(0)
    assert batch["attention_mask_segment"] == pytest.approx(seen.float().mean().item())
    assert batch["target_ids"].tolist() == batch["input_ids"][0, -len(batch["target_ids"]) :].tolist()
    assert batch["target_places"].tolist() == [
        place for place in range(len(is_gist) - 1) if batch["labels"][0, place + 1] != -100
    ]


def test_targets_by_eye() -> None:
    labels = torch.tensor([[-100, 5, 6, -100], [7, -100, -100, 8]])
    shifted = find_targets(labels, is_shifted=True)
    assert shifted.places.tolist() == [0, 1, 6]
    assert shifted.ids.tolist() == [5, 6, 8]
    own = find_targets(labels, is_shifted=False)
    assert own.places.tolist() == [1, 2, 4, 7]
    assert own.ids.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("name", few([*tiny.DECODERS, *tiny.ENCODER_DECODERS], "llama", "gemma2", "t5"))
def test_logits_at_some_tokens_are_those_of_all(name: str) -> None:
    """Including softcaps and scales of a family's logits."""
    model, tokenizer = tiny.patched(name)
    batch = GistCollator(tokenizer, 2)(RECORDS)
    targets = find_targets(batch["labels"], is_shifted=not tokenizer.is_encoder_decoder)
    whole = model(**batch).logits.flatten(0, 1)
    with logits_at(model, targets.places):
        few = model(**batch | {"labels": None}, **decoder_inputs(model, batch)).logits
    torch.testing.assert_close(few[0], whole[targets.places], rtol=1e-5, atol=1e-5)
    assert model(**batch).logits.shape[:2] == batch["labels"].shape


def decoder_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if not model.config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}


# -- the loss ----------------------------------------------------------------------------------------------------------


def by_hand(model: Any, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    """Compute the loss from the logits of all tokens, in one pass for the student and one for the teacher."""
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    own |= decoder_inputs(model, batch)
    shift = not model.config.is_encoder_decoder

    def at(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return logits[labels != -100], labels[labels != -100]

    logits = model(**own).logits
    student, ids = at(logits, batch["labels"])
    loss = cross_entropy(student, ids)
    if objective.distillation:
        seen = {name: batch[f"teacher_{name}"] for name in own if f"teacher_{name}" in batch}
        model.eval()
        with torch.no_grad():
            teacher, _ = at(model(**own | seen).logits, batch["labels"])
        model.train()
        loss = loss + objective.distillation * truncated_kl(student, teacher, objective.top_k).mean()
    if objective.reconstruction:
        loss = loss + objective.reconstruction * cross_entropy(*at(logits, batch["reconstruction_labels"]))
    return loss


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


OBJECTIVES = {
    "plain": Objective(),
    "distilled": Objective(distillation=0.7, top_k=8),
    "reconstructed": Objective(distillation=0.7, top_k=8, reconstruction=0.5),
}


def batches(tokenizer: Any, objective: Objective, is_packed: bool, *, is_split: bool) -> tuple[Any, Any]:
    """Return the batch of a plain collator, and the batch that a step reads."""
    settings: dict[str, Any] = {"conditions": MIXED, "with_teacher": True}
    if is_packed:
        settings |= {"reconstruct": objective.reconstruction > 0, "pack_length": 40}
    kind: Any = GistPackingCollator if is_packed else GistCollator

    def seeded(collator: Callable[[Any], Any]) -> Any:
        torch.manual_seed(5)
        return collator(RECORDS)

    ready = kind(tokenizer, (1, 3), max_length=40, with_prompt_columns=is_split, **settings)
    plain = kind(tokenizer, (1, 3), max_length=40, **settings)
    return seeded(plain), seeded(StepBatches(ready, tokenizer, has_frozen_base=is_split))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("is_packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["gist-lora", "embeddings"])
@pytest.mark.parametrize("name", few(FAMILIES, "llama"))
def test_prompts_computed_once_give_the_same_loss_and_gradients(
    name: str, kind: str, is_packed: bool, objective: str, tmp_path: Path
) -> None:
    if objective == "reconstructed" and not is_packed:
        pytest.skip("a prompt is reconstructed in packed rows alone")
    model, tokenizer = tiny.patched(name)
    if name not in ("mixtral", "qwen3_moe"):  # torch has no grouped matrix products in float64
        model.double()
    attach(model, Adapter(kind, num_rows=3 if kind == "embeddings" else 1, rank=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.train()
    wanted = OBJECTIVES[objective]
    plain, ready = batches(tokenizer, wanted, is_packed, is_split=True)
    assert ready["input_ids"].shape[1] < plain["input_ids"].shape[1]
    expected = by_hand(model, plain, wanted)
    trainer = ObjectiveTrainer(model=model, args=arguments(tmp_path), objective=wanted)
    found = trainer.compute_loss(model, ready)
    # The model is in float64, the loss of a step in float32.
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)
    theirs, ours = gradients(model, expected), gradients(model, found)
    assert theirs.keys() == ours.keys() == {n for n, one in model.named_parameters() if one.requires_grad}
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=0, atol=bound(gradient, model), msg=parameter)


def bound(gradient: Tensor, model: Any) -> float:
    """A millionth of the gradient's largest element if the model is in float64, a little more in float32."""
    is_wide = next(model.parameters()).dtype == torch.float64
    return (1e-6 if is_wide else 1e-5) * max(float(gradient.abs().max()), 1.0)


@pytest.mark.parametrize("objective", ["plain", "distilled"])
@pytest.mark.parametrize("name", few(["llama", "gemma2", "cohere2", "t5", "umt5"], "llama", "gemma2", "t5"))
def test_logits_where_labels_are_give_the_same_loss_and_gradients(name: str, objective: str, tmp_path: Path) -> None:
    model, tokenizer = tiny.patched(name)
    model.double().train()
    wanted = OBJECTIVES[objective]
    plain, ready = batches(tokenizer, wanted, False, is_split=False)
    expected = by_hand(model, plain, wanted)
    trainer = ObjectiveTrainer(model=model, args=arguments(tmp_path), objective=wanted)
    for batch in (ready, plain):
        found = trainer.compute_loss(model, dict(batch))
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)
        theirs, ours = gradients(model, by_hand(model, plain, wanted)), gradients(model, found)
        assert theirs.keys() == ours.keys()
        for parameter, gradient in theirs.items():
            torch.testing.assert_close(ours[parameter], gradient, rtol=0, atol=bound(gradient, model), msg=parameter)


@pytest.mark.parametrize("is_averaged", [True, False])
def test_replicas_of_data_parallel_share_one_number(is_averaged: bool, tmp_path: Path) -> None:
    """torch's DataParallel returns the logits of the whole batch; Trainer gives a number for each replica."""
    model, tokenizer = tiny.patched("llama")
    batch = GistCollator(tokenizer, 2, with_teacher=True)(RECORDS)
    wanted = OBJECTIVES["distilled"]
    changes = {"average_tokens_across_devices": is_averaged}
    trainer = ObjectiveTrainer(model=model.train(), args=arguments(tmp_path, **changes), objective=wanted)
    expected = by_hand(model, batch, wanted)
    trainer.args._n_gpu = 2
    number = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    assert isinstance(number, Tensor)
    assert number.shape == (2, 1)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch), num_items_in_batch=number), expected)
    assert all(value.dim() == 0 for value in trainer._sums.values())


def test_label_smoothing_is_that_of_stock_trainer(tmp_path: Path) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    for name in ("llama", "t5"):
        model, tokenizer = tiny.patched(name)
        batch = GistCollator(tokenizer, 2)(RECORDS)
        trainer = ObjectiveTrainer(model=model, args=arguments(tmp_path, label_smoothing_factor=0.2))
        smoother = LabelSmoother(epsilon=0.2)
        expected = smoother(model(**batch), batch["labels"], shift_labels=name == "llama")
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


def with_gist_lora() -> tuple[Any, Any]:
    """A model whose adapter changes something, and its tokenizer."""
    model, tokenizer = tiny.patched("llama")
    attach(model, Adapter("gist-lora", rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.5
    return model, tokenizer


def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    """Such as a teacher that does not see the prompt, or LoRA at the wrong tokens."""
    model, tokenizer = with_gist_lora()
    model.train()
    wanted = OBJECTIVES["distilled"]
    plain, ready = batches(tokenizer, wanted, True, is_split=True)
    expected = by_hand(model, plain, wanted)
    trainer = ObjectiveTrainer(model=model, args=arguments(tmp_path), objective=wanted)
    for fault in (
        {"teacher_attention_mask": ready["attention_mask"]},
        {"gist_index": ready["gist_index"] + 1},
        {"prompt_input_ids": ready["prompt_input_ids"] + 1},
        {"prompt_position_ids": ready["prompt_position_ids"] - 1},
    ):
        found = trainer.compute_loss(model, ready | fault)
        assert (found - expected).abs() > 1e-4, fault.keys()


# -- when it is done ---------------------------------------------------------------------------------------------------


def run(name: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[set[str]]:
    """Return the keys of the batches from which a run of two steps computes its loss."""
    seen: list[set[str]] = []
    inner = ObjectiveTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(set(inputs))
        return inner(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", compute_loss)
    model, tokenizer = tiny.patched(name, **settings.pop("changes", {}))
    own: dict[str, Any] = activation_checkpointing(settings.pop("checkpointing", False))
    own["neftune_noise_alpha"] = settings.pop("neftune_noise_alpha", None)
    finetune(
        model, tokenizer, RECORDS, arguments(folder, max_steps=2, **own), method=kind, num_gist_tokens=2, **settings
    )
    return seen


@pytest.mark.parametrize(
    ("name", "kind", "settings", "is_split"),
    [
        ("llama", "gist-lora", {}, True),
        ("llama", "embeddings", {"pack_length": 512}, True),
        ("llama", "full", {}, False),
        pytest.param("llama", "lora", {}, False, marks=pytest.mark.slow),
        ("llama", "gist-lora", {"chunk_length": 3}, False),
        pytest.param("llama", "gist-lora", {"part_separator": " w2 "}, False, marks=pytest.mark.slow),
        pytest.param("llama", "gist-lora", {"checkpointing": True}, False, marks=pytest.mark.slow),
        pytest.param("llama", "gist-lora", {"changes": {"attention_dropout": 0.1}}, False, marks=pytest.mark.slow),
        pytest.param("llama", "gist-lora", {"neftune_noise_alpha": 5.0}, False, marks=pytest.mark.slow),
        pytest.param("llama-dynamic", "gist-lora", {}, False, marks=pytest.mark.slow),
        ("mistral-window", "gist-lora", {}, False),
        ("t5", "gist-lora", {}, False),
    ],
    ids=str,
)
def test_prompts_are_split_off_where_nothing_that_acts_on_them_is_trained(
    name: str, kind: str, settings: dict[str, Any], is_split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run(name, kind, tmp_path, monkeypatch, objective=Objective(distillation=1.0), **settings)
    assert len(seen) == 2
    assert all(("prompt_input_ids" in keys) == is_split for keys in seen)
    assert all("target_places" in keys for keys in seen)


def split_batch(tokenizer: Any, **settings: Any) -> Any:
    collator = GistCollator(tokenizer, 2, with_prompt_columns=True, **settings)
    return StepBatches(collator, tokenizer, has_frozen_base=True)(RECORDS)


def test_split_off_prompts_are_never_ignored_silently(tmp_path: Path) -> None:
    """In a custom loop: with a model that is trained whole, or with layers that drop or ignore the cache."""
    model, tokenizer = tiny.patched("llama")
    batch = split_batch(tokenizer)
    trainer = ObjectiveTrainer(model=model.train(), args=arguments(tmp_path))
    with pytest.raises(GistError, match="make StepBatches without has_frozen_base"):
        trainer.compute_loss(model, dict(batch))
    attach(model, Adapter("gist-lora", rank=2))
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "labels")}
    with pytest.raises(GistError, match="are in a cache that the layer did not get"):
        model(**plain)
    trainer.compute_loss(model, dict(batch))
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    with pytest.raises(GistError, match="train without activation checkpointing"):
        trainer.compute_loss(model, dict(batch))


def test_the_batch_must_hold_what_the_objective_needs(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    batch = GistCollator(tokenizer, 2)(RECORDS)
    trainer = ObjectiveTrainer(
        model=model.train(), args=arguments(tmp_path), objective=Objective(distillation=1.0, reconstruction=1.0)
    )
    with pytest.raises(GistError, match=r"no teacher_attention_mask; make the collator with with_teacher=True"):
        trainer.compute_loss(model, dict(batch))
    with pytest.raises(GistError, match=r"no reconstruction_labels; .* with reconstruct=True"):
        trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    del batch["labels"]
    with pytest.raises(GistError, match="inputs have no labels"):
        trainer.compute_loss(model, dict(batch))
    with pytest.raises(GistError, match="batch has no labels"):
        StepBatches(lambda records: dict(batch), tokenizer)(RECORDS)
    with pytest.raises(GistError, match="has_frozen_base is for decoders"):
        StepBatches(GistCollator(tiny.tokenizer("t5"), 2), tiny.tokenizer("t5"), has_frozen_base=True)


def test_dropout_of_the_adapter_does_not_matter() -> None:
    model, tokenizer = tiny.patched("llama")
    attach(model, Adapter("gist-lora", rank=2, dropout=0.5))
    collator = GistCollator(tokenizer, 2)
    assert _has_frozen_prompts(model, collator, arguments(Path("unused")))


def test_gist_lora_at_given_tokens_is_that_of_every_token() -> None:
    """Applying the matrices only at gist tokens gives the same bits as applying them everywhere and masking."""
    model, tokenizer = with_gist_lora()
    batch = {key: value for key, value in GistCollator(tokenizer, 2)(RECORDS).items() if key != "labels"}
    index = (batch["input_ids"].flatten() == tokenizer.gist_token_id).nonzero()[:, 0]
    with gists_at(index):
        given = model(**batch).logits
    found = model(**batch).logits
    assert given.equal(found)
    with gists_at(index[:0]):
        assert not model(**batch).logits.equal(found)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_run_has_the_same_loss(tmp_path: Path) -> None:
    """With the hook before the head and the targets' indices. (For adapters, see tests/test_methods.py.)"""
    losses = []
    for is_compiled in (False, True):
        model, tokenizer = tiny.patched("llama", num_hidden_layers=1)
        settings: dict[str, Any] = {"torch_compile_backend": "aot_eager"} if is_compiled else {}
        own = arguments(tmp_path / str(is_compiled), max_steps=3, torch_compile=is_compiled, **settings)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        measured = finetune(model, tokenizer, RECORDS, own, num_gist_tokens=2, pack_length=512)
        losses.append(measured["train_loss"])
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
