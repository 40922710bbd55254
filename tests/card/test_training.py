"""A training step on a GPU gives the CPU's loss and gradients for every method and objective, and the host does not
wait for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from gisting import GistCollator, Record
from gisting.data.packing import GistPackingCollator
from gisting.errors import GistError
from gisting.models.mode import evaluating
from gisting.train.batches import StepBatches
from gisting.train.finetune import finetune, published_arguments
from gisting.train.methods import METHODS, prepare
from gisting.train.objective import Objective, ObjectiveTrainer
from gisting.visibility import Visibility, gist
from tests import tiny
from tests.card.both import CPU, Place, assert_all_near, assert_near, gradients

pytestmark = [
    pytest.mark.card,
    # peft 0.21 reads a property under a name that transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
RECORDS = [
    Record("w1 w2 w3 w4", "w7 w8", "w3"),
    Record("w1 w2 w3 w4", "w5 w6 w1", "w6 w2 w9 w10"),
    Record("w11 w12 w13", "w14", "w15 w16"),
    Record("w4 w5", "", "w21 w22 w23"),
]


def batch_of(tokenizer: Any, *, is_packed: bool = False) -> dict[str, Tensor]:
    make = GistPackingCollator(tokenizer, 2, max_length=40) if is_packed else GistCollator(tokenizer, 2)
    return make(RECORDS)


def backward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [
        *((name, False) for name in ("llama", "gemma2", "qwen2-window", "gpt_neox", "t5", "umt5")),
        *((name, True) for name in ("llama", "gemma2")),
    ],
)
def test_loss_and_gradients(name: str, is_packed: bool, place: Place) -> None:
    model, tokenizer = tiny.patched(name)
    there = copy.deepcopy(model).to(place.device)  # pyright: ignore[reportArgumentType]
    batch = batch_of(tokenizer, is_packed=is_packed)
    found, wanted = backward(there, place.put(batch)), backward(model, batch)
    assert_near(found, wanted, "loss")
    assert_all_near(gradients(there), gradients(model))


def test_other_dtypes(place: Place) -> None:
    """The kernels do not support float64: there a GPU runs torch's own attention with a dense mask."""
    model, tokenizer = tiny.patched("llama")
    model.double()
    there = copy.deepcopy(model).to(place.device)  # pyright: ignore[reportArgumentType]
    batch = batch_of(tokenizer)
    assert_near(backward(there, place.put(batch)), backward(model, batch), "loss")
    assert_all_near(gradients(there), gradients(model))


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_length_dependent_positions(name: str, place: Place) -> None:
    """Below the length at which the frequencies change, results agree; beyond it both devices raise."""
    model, tokenizer = tiny.patched(name)
    there: Any = copy.deepcopy(model).to(place.device)  # pyright: ignore[reportArgumentType]
    batch = batch_of(tokenizer)
    assert_near(backward(there, place.put(batch)), backward(model, batch), "loss")
    long = GistCollator(tokenizer, 2)([Record(tiny.words(140, 1), "w1", "w2")])
    with pytest.raises(GistError, match="the rotary frequencies"):
        backward(there, place.put(long))


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_a_step_does_not_wait(is_packed: bool, place: Place) -> None:
    """The step is tested after the kernels are compiled and the optimiser has its state."""
    model, tokenizer = tiny.patched("llama")
    there: Any = model.to(place.device)  # pyright: ignore[reportArgumentType]
    stepper = torch.optim.AdamW(there.parameters(), lr=1e-4, foreach=True)
    batch = batch_of(tokenizer, is_packed=is_packed)

    def step(given: dict[str, Tensor]) -> None:
        backward(there, given)
        torch.nn.utils.clip_grad_norm_(there.parameters(), 1.0)
        stepper.step()

    step(place.put(batch))
    again = place.put(batch)
    with place.not_waiting():
        step(again)


@pytest.mark.parametrize("method", METHODS)
def test_the_trainers_step_does_not_wait(method: str, place: Place, tmp_path: Path) -> None:
    """Loss and gradients of a distilled step, with prompts split off where the base is frozen."""
    model, tokenizer = tiny.patched("llama")
    prepare(model, method, 2)
    arguments = published_arguments(tmp_path, use_cpu=not place.is_card, bf16=False)
    there: Any = model.to(place.device).train()  # pyright: ignore[reportArgumentType]
    trainer = ObjectiveTrainer(model=there, args=arguments, objective=Objective(distillation=1.0))
    is_frozen = method in ("gist-lora", "embeddings")
    collator = GistPackingCollator(tokenizer, 2, max_length=40, with_teacher=True, with_prompt_columns=is_frozen)
    batch = StepBatches(collator, tokenizer, has_frozen_base=is_frozen)(RECORDS)
    number = torch.tensor(len(batch["target_ids"]), device=place.device)

    def step(given: dict[str, Any]) -> None:
        trainer.compute_loss(there, given, num_items_in_batch=number).backward()

    step(place.put(batch))
    again = place.put(batch)
    with place.not_waiting():
        step(again)


def train(place: torch.device, output: Path, name: str, records: list[Record] = RECORDS, **settings: Any) -> Any:
    """A few steps of ``finetune``, and the model."""
    set_seed(0)
    model, tokenizer = tiny.patched(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)  # weights of a normal size
    arguments = published_arguments(
        output, batch_size=4, per_device_batch_size=4, max_steps=3, learning_rate=1e-3, save_strategy="no",
        disable_tqdm=True, logging_steps=1, bf16=False, use_cpu=place.type == "cpu", seed=3,
    )  # fmt: skip
    measured = finetune(model, tokenizer, records, arguments, num_gist_tokens=2, **settings)
    return measured, model


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, place: Place, tmp_path: Path) -> None:
    found, there = train(place.device, tmp_path / "there", "llama", method=method)
    wanted, here = train(CPU, tmp_path / "here", "llama", method=method)
    assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-3)
    learns = {name for name, parameter in here.named_parameters() if parameter.requires_grad}
    assert {parameter.device.type for parameter in there.parameters()} == {place.device.type}
    trained = [{name: p for name, p in model.named_parameters() if name in learns} for model in (there, here)]
    # Adam's first steps have the same size for any gradient, even for one near zero: two of 1e-3 in either direction.
    assert_all_near(trained[0], trained[1], bound=0.05)


OBJECTIVES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "distillation": (Objective(distillation=1.0, top_k=8), {}),
    "distillation-packed": (Objective(distillation=1.0, top_k=8), {"pack_length": 40, "max_length": 40}),
    "reconstruction": (Objective(reconstruction=0.5), {"pack_length": 40, "max_length": 40}),
}


@pytest.mark.parametrize("method", ["full", "gist-lora"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective: str, method: str, place: Place, tmp_path: Path) -> None:
    wanted_objective, settings = OBJECTIVES[objective]
    runs = [
        train(device, tmp_path / name, "llama", method=method, objective=wanted_objective, **settings)[0]
        for device, name in ((place.device, "there"), (CPU, "here"))
    ]
    assert runs[0]["train_loss"] == pytest.approx(runs[1]["train_loss"], rel=1e-3)


def test_distillation_of_an_encoder_decoder(place: Place, tmp_path: Path) -> None:
    objective = Objective(distillation=1.0, top_k=8)
    runs = [
        train(device, tmp_path / device.type, "t5", objective=objective)[0]["train_loss"]
        for device in {place.device, CPU}
    ]
    assert max(runs) == pytest.approx(min(runs), rel=1e-3)


def test_the_published_precision(place: Place, tmp_path: Path) -> None:
    """bfloat16 by autocast where a GPU supports it, and pinned memory."""
    arguments = published_arguments(tmp_path)
    assert arguments.dataloader_pin_memory is torch.cuda.is_available()
    assert arguments.use_cpu is not torch.cuda.is_available()
    if place.is_card:
        assert arguments.bf16 is torch.cuda.is_bf16_supported()


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_autocast(name: str, place: Place) -> None:
    """Weights in float32, attention in bfloat16: eight bits, with a dozen roundings per layer."""
    model, tokenizer = tiny.patched(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    there = copy.deepcopy(model).to(place.device)  # pyright: ignore[reportArgumentType]
    batch = batch_of(tokenizer)
    with torch.autocast(place.device.type, torch.bfloat16):
        found = backward(there, place.put(batch))
    assert_near(found, backward(model, batch), "loss", 36 * 2**-8)
    assert_all_near(gradients(there), gradients(model), 36 * 2**-8)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_compiled(name: str, place: Place) -> None:
    """The whole model, with mask and kernels, is one graph, forward and backward."""
    model, tokenizer = tiny.patched(name)
    there = copy.deepcopy(model).to(place.device)  # pyright: ignore[reportArgumentType]
    batch = batch_of(tokenizer)
    torch._dynamo.reset()
    compiled = torch.compile(there, backend="inductor" if place.is_card else "aot_eager", fullgraph=True)
    found = backward(compiled, place.put(batch))
    torch._dynamo.reset()
    assert_near(found, backward(model, batch), "loss")
    assert_all_near(gradients(there), gradients(model))


def seen_by(is_gist_at: list[int], place: Place) -> Visibility:
    is_gist = torch.zeros(1, 12, dtype=torch.bool)
    is_gist[:, is_gist_at] = True
    return gist(is_gist).to(place.device)


MODES: dict[str, Callable[[], Any]] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients(mode: str, place: Place) -> None:
    """The plan of a batch is made again for another batch, also where plans are not kept at all."""
    model, _ = tiny.patched("llama")
    there: Any = copy.deepcopy(model).to(place.device)  # pyright: ignore[reportArgumentType]
    ids = torch.arange(4, 16)[None]
    for spans in ([3, 4], [7], [3, 4]):
        seen = seen_by(spans, place)
        with evaluating(there), MODES[mode]():
            call = {"attention_mask": seen.as_attention_mask(), "position_ids": seen.position_ids}
            found = there(input_ids=ids.to(place.device), **call).logits
        with torch.no_grad():
            wanted = model(input_ids=ids, **{name: tensor.cpu() for name, tensor in call.items()}).logits
        assert_near(found, wanted, str(spans))


def test_a_captured_graph_plans_what_it_is_given(place: Place) -> None:
    """A CUDA graph is replayed on new contents of the same memory, so nothing may be kept from its capture."""
    place.only_on_a_card("captures a CUDA graph")
    from gisting import interval_attention

    q, k, v = (torch.randn(1, 2, 12, 16, device=place.device) for _ in range(3))
    seen, other = seen_by([3, 4], place), seen_by([7], place)
    given = Visibility(seen.first.clone(), seen.end.clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        interval_attention(q, k, v, given)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = interval_attention(q, k, v, given)
    for mask in (other, seen):
        given.first.copy_(mask.first)
        given.end.copy_(mask.end)
        graph.replay()
        with torch.no_grad():
            assert_near(out, interval_attention(q, k, v, mask), "replayed")
