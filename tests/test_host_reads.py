"""The host does not wait for the device in a training step, nor in a decoding step.

This is tested without a card, on torch's "meta" device. To the library it is a device other than the CPU, and it holds
no numbers, so reading one fails: ``item``, ``bool`` of a tensor, ``nonzero``, and indexing with a bool mask. Copies
from the CPU also wait, and are counted. ``tests/card`` has the same steps on a card, with torch's sync debug mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

import gisting_kernels
from gisting import GistCollator, Record
from gisting._compat import cache_argument
from gisting.attention import api
from gisting.cache import CacheOrigin, GistCache
from gisting.data.packing import GistPackingCollator
from gisting.models import decoder
from gisting.models import patch as patch_module
from gisting.train.batches import StepBatches
from gisting.train.methods import METHODS, prepare
from gisting.train.objective import Objective, ObjectiveTrainer
from gisting_kernels import op
from tests import tiny
from tests.slow import slow
from tests.test_train import arguments

RECORDS = [
    Record("w1 w2 w3", "w4 w5", "w6 w7"),
    Record("w1 w2 w3", "w8", "w9"),
    Record("w5 w6 w7 w8", "", "w1 w2"),
]
# peft 0.21 reads a model's property by a name that transformers 5.23 deprecates.
peft_alone = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Watch(TorchDispatchMode):
    """Count what makes the host wait: numbers that are read, and tensors that are copied between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "::item")):
            self.reads.append(name)
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        if "copy" in name and len(devices) > 1:
            self.copies.append(name)
        return out


class Made(TorchFunctionMode):
    """Count tensors on a device that are made from Python numbers, on the CPU, and then copied."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and out.device.type != "cpu":
            self.count += 1
        return out


@contextmanager
def waiting_for_nothing() -> Iterator[None]:
    """Assert that the block reads no tensor on "meta", and makes none from numbers or from a tensor on the CPU."""
    with Watch() as watch, Made() as made:
        yield
    assert watch.copies == []
    assert made.count == 0


@pytest.fixture(params=[slow("sdpa"), "kernels"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With "kernels", attention reaches the fake operators of ``gisting_kernels``, which return only shapes."""
    if request.param == "kernels":
        monkeypatch.setattr(api, "choose_implementation", lambda *args, **kwargs: ("triton", "a test asks for it"))
        monkeypatch.setattr(gisting_kernels, "why_not", lambda *args, **kwargs: None)
        monkeypatch.setattr(op, "why_not", lambda *args, **kwargs: None)
    return request.param


def train_step(model: Any, batch: dict[str, Tensor]) -> None:
    """Train one step like stock Trainer, which sets ``use_cache`` to False.

    With a cache, a sliding layer would copy from the CPU.
    """
    stepper = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    given = {name: tensor.to("meta") for name, tensor in batch.items()}
    with waiting_for_nothing():
        model(**given, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()


@pytest.mark.parametrize(
    "name", ["llama", slow("qwen2-window"), "gemma2", slow("gpt_neox"), slow("cohere2"), "t5", slow("umt5")]
)
def test_a_training_step(name: str, implementation: str) -> None:
    model, tokenizer = tiny.patched(name)
    batch = GistCollator(tokenizer, 2)(RECORDS)
    train_step(model.to("meta").train(), batch)


@peft_alone
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_of_packed_rows_by_every_method(method: str, implementation: str) -> None:
    model, tokenizer = tiny.patched("llama")
    prepare(model, method, 2)
    batch = GistPackingCollator(tokenizer, 2, max_length=40)(RECORDS)
    train_step(model.to("meta").train(), batch)


@peft_alone
@pytest.mark.parametrize(
    "objective", [Objective(), Objective(distillation=1.0, reconstruction=0.5)], ids=["plain", "all"]
)
@pytest.mark.parametrize("method", METHODS)
def test_the_trainers_step(method: str, objective: Objective, implementation: str, tmp_path: Path) -> None:
    """Compute logits at the targets, with prompts in separate rows, and rows long enough to measure their segments."""
    model, tokenizer = tiny.patched("llama", max_position_embeddings=1024)
    prepare(model, method, 2)
    model.train()
    trainer: Any = ObjectiveTrainer(model=model, args=arguments(tmp_path), objective=objective)
    settings: dict[str, Any] = {"with_teacher": objective.distillation > 0, "reconstruct": objective.reconstruction > 0}
    is_frozen = method in ("gist-lora", "embeddings")
    collator = GistPackingCollator(tokenizer, 2, max_length=600, with_prompt_columns=is_frozen, **settings)
    records = [*RECORDS, Record(tiny.words(200, 1), tiny.words(200, 2), tiny.words(50, 3))]
    batch = StepBatches(collator, tokenizer, has_frozen_base=is_frozen)(records)
    assert batch["attention_mask"].shape[-1] > 384
    model.to("meta")
    given = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}
    number = torch.ones((), device="meta")
    trainer._num_prompt_labels = number
    with waiting_for_nothing():
        trainer.compute_loss(model, given, num_items_in_batch=number).backward()


def test_a_trainers_step_on_a_plain_batch_reads_its_labels(tmp_path: Path) -> None:
    """This is why StepBatches exists."""
    model, tokenizer = tiny.patched("llama")
    trainer = ObjectiveTrainer(model=model, args=arguments(tmp_path))
    batch = {name: tensor.to("meta") for name, tensor in GistCollator(tokenizer, 2)(RECORDS).items()}
    model.to("meta").train()
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.compute_loss(model, batch)


def decode_step(model: Any, past: Any, token: int = 5) -> int:
    """Run the forward pass of one token after five cached ones, and count the copies to the device."""
    for layer in range(model.config.num_hidden_layers):
        past.update(*(torch.zeros(2, 2, 5, 8, device="meta") for _ in "kv"), layer)
    ids, position_ids = torch.full((2, 1), token, device="meta"), torch.full((2, 1), 5, device="meta")
    with torch.no_grad(), Watch() as watch, Made() as made:
        model(input_ids=ids, position_ids=position_ids, **{cache_argument(): past}, use_cache=True)
    return len(watch.copies) + made.count


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_decoding_step(name: str, cache: str) -> None:
    """It reads nothing, and copies no more than a stock model, which copies some numbers in some versions."""
    model, _ = tiny.patched(name)
    counts = []
    for which in (tiny.stock_twin(name, model), model):
        past = DynamicCache() if cache == "dynamic" else StaticCache(which.config, 16)
        counts.append(decode_step(which.to("meta"), past))
    assert counts[1] == counts[0]
    assert counts[0] == 0 or name == "gemma2"


def test_a_gist_token_in_a_decoding_step_is_asserted_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device asserts what is refused on the CPU."""
    asserted: list[tuple[Tensor, str]] = []
    monkeypatch.setattr(patch_module, "assert_on_device", lambda *given: asserted.append(given))
    model, _ = tiny.patched("llama")
    decode_step(model.to("meta"), DynamicCache())
    ((condition, message),) = asserted
    assert (condition.device.type, condition.dtype, condition.numel()) == ("meta", torch.bool, 1)
    assert message.startswith("input_ids hold gist tokens")


def test_positions_are_not_read_where_the_keys_fit() -> None:
    """With frequencies that depend on the length, the guard does not wait if no batch of this size can be too long."""
    model, _ = tiny.patched("llama-dynamic")
    limit = model.config.max_position_embeddings

    def check(num_keys: int) -> None:
        mask = torch.zeros(1, 1, 2, num_keys, dtype=torch.int32, device="meta")
        kwargs = {"attention_mask": mask, "position_ids": torch.zeros(1, num_keys, dtype=torch.long, device="meta")}
        patch_module._guard(model.base_model, (), kwargs, gist_token_id=64)

    check(limit)
    with pytest.raises(RuntimeError, match="meta"):
        check(limit + 1)


def test_positions_are_checked_under_compile() -> None:
    model, _ = tiny.patched("llama-dynamic")
    limit = model.config.max_position_embeddings
    mask = torch.zeros(1, 1, 2, 4, dtype=torch.int32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def check(positions: Tensor) -> Tensor:
        patch_module._check_interval_call(model.config, {"position_ids": positions}, mask)
        return positions + 1

    assert check(torch.tensor([[0, 1, 2, limit - 1]])).shape == (1, 4)
    with pytest.raises(RuntimeError, match="more positions than the model's rotary frequencies cover"):
        check(torch.tensor([[0, 1, 2, limit]]))


@pytest.mark.parametrize(
    "change", [lambda cache: cache.select([1, 0, 1]), lambda cache: cache.blanked()], ids=["select", "blanked"]
)
def test_a_change_of_a_cache_copies_its_numbers_once(change: Callable[[GistCache], GistCache]) -> None:
    """It does not copy them for every layer; the host waits for each copy from the CPU."""
    states = tuple(torch.zeros(2, 2, 3, 4, device="meta") for _ in range(5))
    cache = GistCache(states, states, torch.tensor([3, 1]), CacheOrigin("m", "t", "plain", "gist"))
    with Watch() as watch:
        changed = change(cache)
    assert changed.device.type == "meta"
    assert len(watch.copies) == 1


def test_compressing_copies_no_number_for_each_layer() -> None:
    """It copies ids, mask, positions and the columns of the gist."""
    model, tokenizer = tiny.patched("llama")
    encodings = tokenizer.encode_prompts(["w1 w2 w3", "w4"], 2)
    rotary = decoder.rotary_of(model)
    model.to("meta")
    with Watch() as watch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "rotary_of", lambda model: rotary)  # reads the frequencies, once per cache
        decoder.prefix_states(model, tokenizer, encodings, CacheOrigin("m", "t", "plain", "gist"))
    assert len(watch.copies) == 4


def test_ordinary_text_is_read_once(implementation: str) -> None:
    """Without an interval mask, the guard looks for gist tokens once per forward pass of several tokens."""
    model, _ = tiny.patched("llama")
    ids, reads = torch.full((2, 7), 5), []
    for which in (model, tiny.stock_twin("llama", model)):
        with Watch() as watch, torch.no_grad():
            which(input_ids=ids)
        reads.append(len(watch.reads))
    assert reads[0] == reads[1] + 1


@pytest.mark.parametrize(
    "planted",
    [
        lambda hidden: hidden.sum().item(),
        lambda hidden: bool(hidden.any()),
        lambda hidden: hidden[hidden > 0],
        lambda hidden: (hidden > 0).nonzero(),
        lambda hidden: hidden.cpu(),
        lambda hidden: hidden + torch.zeros(()).to(hidden.device),
        lambda hidden: hidden + torch.tensor([1.0] * 32, device=hidden.device),
        lambda hidden: hidden.tolist(),
    ],
    ids=["item", "bool", "mask", "nonzero", "to-host", "to-device", "of-numbers", "tolist"],
)
def test_a_planted_wait_is_found(planted: Callable[[Tensor], Any]) -> None:
    model, tokenizer = tiny.patched("llama")
    batch = GistCollator(tokenizer, 2)(RECORDS)

    def hook(module: Any, args: Any) -> None:
        planted(args[0])

    model.base_model.layers[1].register_forward_pre_hook(hook)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        train_step(model.to("meta").train(), batch)
