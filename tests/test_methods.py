"""The four methods: what is trained, what does not change by a bit, where an adapter acts, and its files."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from typer.testing import CliRunner

import gisting
from gisting import GistCollator, GistError, GistTokenizer, Record, doctor, visibility
from gisting._compat import cache_argument
from gisting.errors import CacheMismatchError
from gisting.models import adapters
from gisting.models.adapters import KINDS, Adapter, adapter_of, attach, detach, for_base_model, gist_rows
from gisting.models.fingerprint import fingerprint
from gisting.models.gist_lora import gist_places
from gisting.models.state import guarded_stack
from gisting.models.weights import input_weight
from gisting.train.finetune import finetune
from gisting.train.methods import METHODS, Method, count_parameters, prepare
from tests import tiny
from tests.test_train import RECORDS, arguments, few

RAGGED = [Record("w1 w2 w3", "w7 w8", "w3"), Record("w4 w5", "w5 w6 w1", "w6 w2")]
THREE = ["llama", "qwen3", "gemma3_text"]
# peft 0.21 reads a property of models by a name that transformers 5.23 deprecates.
peft_alone = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
GIST_ONLY = ["gist-lora", "embeddings"]


def adapted(name: str, kind: str, num_gist_tokens: int = 2) -> tuple[Any, GistTokenizer]:
    """A patched model with an adapter whose parameters are all random, so that none is zero."""
    model, tokenizer = tiny.patched(name)
    attach(model, Adapter(kind, num_gist_tokens if kind in GIST_ONLY else 1, rank=2))
    draw(model)
    return model, tokenizer


def draw(model: Any, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: Any, batch: Any = None) -> Tensor:
    """Logits of a batch, or of a text without gist tokens."""
    if batch is None:
        ids = torch.arange(4, 20).view(2, 8)
        batch = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    return model(**batch).logits


# -- where an adapter acts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", few([*tiny.DECODERS, *tiny.ENCODER_DECODERS], "llama", "gemma3_text", "t5"))
def test_every_family(name: str, kind: str) -> None:
    """A new adapter changes nothing. A trained one changes the logits after a gist, but of ordinary text not one bit,
    unless it is LoRA on everything. A removed one leaves no trace.
    """
    model, tokenizer = tiny.patched(name)
    batch = GistCollator(tokenizer, 2)(RAGGED)
    behind_gist, text, base = logits(model, batch), logits(model), fingerprint(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attach(model, Adapter(kind, 2 if kind == "embeddings" else 1, rank=2))
    assert torch.equal(logits(model, batch), behind_gist)
    draw(model)
    assert not torch.allclose(logits(model, batch), behind_gist, atol=1e-2)
    assert torch.equal(logits(model), text) is (kind != "lora")
    assert fingerprint(model) != base
    model(**batch).loss.backward()
    assert [
        key for key, parameter in model.named_parameters() if parameter.requires_grad != (parameter.grad is not None)
    ] == []
    detach(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert fingerprint(model) == base
    assert torch.equal(logits(model, batch), behind_gist)


def test_the_tokens_of_a_gist_have_rows_of_their_own_which_start_apart() -> None:
    """Tokens with one row under one LoRA would learn to hold the same, whatever their number."""
    model, tokenizer = tiny.patched("llama")
    prepare(model, "gist-lora", 3)
    rows, table = gist_rows(model), input_weight(model)
    assert torch.equal(rows[0], table[tokenizer.gist_token_id])
    assert torch.pdist(rows).min() > 0.1
    values = gisting.compress(model, tokenizer, ["w1 w2 w3"], 3).values[0][0, 0]
    assert torch.pdist(values).min() > 0.01
    with pytest.raises(GistError, match=r"^num_gist_tokens must be at most 3, got 4: the adapter has 3 rows"):
        gisting.compress(model, tokenizer, ["w1"], 4)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_gist_only_lora_is_read_back_with_its_rows(num_rows: int, tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    attach(model, Adapter("gist-lora", num_rows, rank=2))
    draw(model)
    adapters.save(model, tokenizer, tmp_path)
    twin, _ = tiny.patched("llama")
    adapters.load(twin, tmp_path)
    expected, found = (gisting.compress(one, tokenizer, ["w1 w2 w3"], 3) for one in (model, twin))
    assert gist_rows(twin).shape[0] == num_rows
    assert all(map(torch.equal, expected.values, found.values))


@pytest.mark.parametrize("kind", GIST_ONLY)
@pytest.mark.parametrize("name", few(THREE, "llama", "gemma3_text"))
def test_text_in_one_batch_with_gists_keeps_its_bits(name: str, kind: str) -> None:
    """A row without gist tokens and a prompt before its gist do not change; logits after the gist do."""
    model, tokenizer = tiny.patched(name)
    gist = tokenizer.gist_token_id
    ids = torch.tensor([[5, 6, 7, gist, gist, 8, 9], [10, 11, 12, 13, 14, 15, 16]])
    seen = visibility.gist(ids == gist)
    batch = {"input_ids": ids, "attention_mask": seen.as_attention_mask(), "position_ids": seen.position_ids}
    before = logits(model, batch)
    attach(model, Adapter(kind, 2 if kind == "embeddings" else 1, rank=2))
    draw(model)
    after = logits(model, batch)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :3], before[0, :3])
    assert not torch.isclose(after[0, 3:], before[0, 3:], atol=1e-3).all(-1).any()


@pytest.mark.parametrize("name", few([*THREE, "t5"], "llama", "t5"))
def test_gist_only_lora_is_the_masked_update_of_its_definition(name: str) -> None:
    """The oracle is the frozen model with hooks that add ``B A x`` times its scale at gist tokens, in every layer."""
    model, tokenizer = adapted(name, "gist-lora", 1)
    batch = GistCollator(tokenizer, 2)(RAGGED)
    found = logits(model, batch)
    stack = guarded_stack(model)
    updates = {
        key: (module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"])
        for key, module in model.named_modules()
        if hasattr(module, "lora_variant")
    }
    row, plain = gist_rows(model)[0], copy.deepcopy(model)
    detach(plain)
    assert len(updates) == (3 * 6 if name == "t5" else 3 * 7)
    assert all(key.startswith("encoder." if name == "t5" else "model.") for key in updates)
    is_gist = (batch["input_ids"] == tokenizer.gist_token_id)[..., None]
    for key, (down, up, scale) in updates.items():

        def add(
            _module: Any, args: Any, output: Tensor, down: Any = down, up: Any = up, scale: float = scale
        ) -> Tensor:
            return output + is_gist * (args[0] @ down.T @ up.T * scale)

        plain.get_submodule(key).register_forward_hook(add)
    with torch.no_grad():
        plain.get_input_embeddings().weight[tokenizer.gist_token_id] = row
        if plain.get_output_embeddings().weight is plain.get_input_embeddings().weight:
            found, expected = found[..., :-1], logits(plain, batch)[..., :-1]  # the hook does not change the output row
        else:
            expected = logits(plain, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert stack is guarded_stack(model)


@pytest.mark.parametrize("kind", GIST_ONLY)
def test_a_cached_gist_is_read_by_the_base_model(kind: str) -> None:
    """After a cache, the adapter does nothing: the base model continues from it with the same bits, so that many
    adapters can share one base model.
    """
    model, tokenizer = adapted("llama", kind)
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3", "w4 w5"], 2)
    rest = torch.tensor([[10, 11, 12], [13, 14, 15]])
    mask = torch.ones(2, 5, dtype=torch.long)

    def go_on(reader: Any) -> Tensor:
        return logits(reader, {"input_ids": rest, "attention_mask": mask, cache_argument(): cache.as_past_key_values()})

    expected = go_on(model)
    full = GistCollator(tokenizer, 2)([Record("w1 w2 w3", "w7", "w8")])
    assert not torch.equal(logits(model, full), logits(tiny.patched("llama")[0], full))
    assert torch.equal(go_on(tiny.patched("llama")[0]), expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("kind", GIST_ONLY)
def test_caches_of_several_adapters_are_answered_in_one_batch_of_the_base_model(name: str, kind: str) -> None:
    """Each row is answered as by the model with its adapter."""
    base, tokenizer = tiny.patched(name)
    stock = fingerprint(tiny.model(name))
    caches, expected = [], []
    for seed in range(2):
        model, _ = tiny.patched(name)
        attach(model, Adapter(kind, 2 if kind == "embeddings" else 1, rank=2))
        draw(model, seed)
        caches.append(gisting.compress(model, tokenizer, ["w1 w2 w3"], 2))
        assert caches[-1].origin.model == stock
        expected += gisting.generate(model, tokenizer, ["w7 w8"], cache=caches[-1], max_new_tokens=6, do_sample=False)
    assert not torch.equal(caches[0].keys[1], caches[1].keys[1])
    joined = gisting.GistCache.cat(caches)
    answers = gisting.generate(base, tokenizer, ["w7 w8"] * 2, cache=joined, max_new_tokens=6, do_sample=False)
    assert answers == expected
    assert base.get_input_embeddings().weight.requires_grad, "the base model is not touched"


def test_caches_of_earlier_versions_are_relabelled_for_the_base_model() -> None:
    """They name the model with its adapter, which alone accepts them."""
    model, tokenizer = adapted("llama", "gist-lora")
    made = gisting.compress(model, tokenizer, ["w1 w2 w3"], 2)
    old = replace(made, origin=replace(made.origin, model=fingerprint(model)))
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    base = tiny.patched("llama")[0]
    with pytest.raises(CacheMismatchError, match="cache was made for"):
        gisting.generate(base, tokenizer, ["w7"], cache=old)
    expected = gisting.generate(model, tokenizer, ["w7"], cache=old, **settings)
    assert gisting.generate(base, tokenizer, ["w7"], cache=for_base_model(model, old), **settings) == expected
    assert for_base_model(model, made).origin == made.origin
    with pytest.raises(CacheMismatchError, match=r"this model is .*; compress it again"):
        for_base_model(model, replace(old, origin=replace(old.origin, model="llama/0")))
    with pytest.raises(GistError, match="model has no adapter, so only the model itself can use its caches"):
        for_base_model(base, made)


def test_a_gist_of_lora_is_for_the_adapted_model_alone() -> None:
    model, tokenizer = adapted("llama", "lora")
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 2)
    with pytest.raises(CacheMismatchError, match="cache was made for"):
        gisting.generate(tiny.patched("llama")[0], tokenizer, ["w7"], cache=cache)
    assert cache.origin.model == fingerprint(model)


def test_an_untouched_stock_model_continues_a_gist_from_a_store_that_adapters_share(tmp_path: Path) -> None:
    """Each adapter finds its own entry of a text. Stock ``generate`` drops the placeholders without reading them."""
    prompt, settings = "w1 w2 w3", {"max_new_tokens": 6, "do_sample": False}
    stock = tiny.model("llama")
    before = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
    with gisting.GistStore(tmp_path) as store:
        for seed in (0, 1):
            model, tokenizer = tiny.patched("llama")
            attach(model, Adapter("gist-lora", rank=2))
            draw(model, seed)
            made = store.get_or_compress(model, tokenizer, [prompt], 2, names=[f"seed-{seed}"])
            assert len({entry.key for entry in store.list()}) == seed + 1, (
                "another adapter's gist is not taken for this one's"
            )
            assert torch.equal(store.get_or_compress(model, tokenizer, [prompt], 2).keys[1], made.keys[1])
            expected = gisting.generate(model, tokenizer, ["w7 w8"], cache=made, **settings)
            cache = store[f"seed-{seed}"]
            gisting.generation.check_origin(stock, tokenizer, cache)
            rest = tokenizer.encode_continuations(["w7 w8"])[0]
            ids = torch.tensor([[tokenizer.gist_token_id] * 2 + rest])
            out = stock.generate(ids, past_key_values=cache.as_past_key_values(), **settings)  # pyright: ignore
            assert tokenizer.decode(out[0, ids.shape[1] :].tolist()) == expected[0]
        base, tokenizer = tiny.patched("llama")
        store.get_or_compress(base, tokenizer, [prompt], 2, names=["own"])
        assert len({entry.key for entry in store.list()}) == 3, "nor for what the base model makes itself"
        with pytest.raises(CacheMismatchError):
            store.get(["own", "seed-0"])
        store.get(["seed-0", "seed-1"])
    assert all(torch.equal(tensor, before[key]) for key, tensor in stock.state_dict().items())


def test_places_in_a_gist() -> None:
    gist = 9
    ids = torch.tensor([[0, 1, 2, 9, 9, 9, 3], [9, 9, 1, 9, 9, 2, 9], [1, 9, 9, 9, 9, 2, 9]])
    positions = torch.tensor([[-3, -2, -1, 0, 1, 2, 3], [0, 1, -1, 0, 1, 2, 3], [-1, 0, 0, 1, 1, -1, 2]])
    assert gist_places(ids, positions, gist).tolist() == [
        [-1, -1, -1, 0, 1, 2, -1],
        [0, 1, -1, 0, 1, -1, 0],
        [-1, 0, 0, 1, 1, -1, 0],  # chained: each is followed by its copy
    ]
    assert gist_places(ids[:1], None, gist).tolist() == [[-1, -1, -1, 0, 1, 2, -1]]
    assert gist_places(ids[:1], positions[:1] + 7, gist).tolist() == [[-1, -1, -1, 0, 1, 2, -1]]


def test_chained_gists_in_training_are_those_of_the_cache() -> None:
    """With distinct rows; a copy has the row of its gist token."""
    model, tokenizer = adapted("llama", "embeddings")
    batch = GistCollator(tokenizer, 2, part_separator=" | ")([Record("w1 w2 | w3 w4", "w7 w8", "w5")])
    trained = logits(model, batch)
    parts = [gisting.compress(model, tokenizer, [part], 2) for part in ("w1 w2", "w3 w4")]
    chained = gisting.GistCache.chain(parts)
    rest = batch["input_ids"][:, -(int((batch["labels"] >= 0).sum()) + 2) :]
    read = logits(
        model,
        {
            "input_ids": rest,
            "attention_mask": torch.ones(1, 4 + rest.shape[1], dtype=torch.long),
            cache_argument(): chained.as_past_key_values(),
        },
    )
    torch.testing.assert_close(trained[:, -rest.shape[1] :], read, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", few([*THREE, "t5"], "llama", "t5"))
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_run_again_with_the_places_of_their_first_run(name: str, kind: str) -> None:
    """Two batches run forwards, then both backwards: a layer that is run again must not see the other batch."""
    model, tokenizer = adapted(name, kind)
    batches = [
        GistCollator(tokenizer, 2)(RAGGED),
        GistCollator(tokenizer, 1)([Record("w9", "w8 w7 w6", "w5"), *RAGGED]),
    ]

    def gradients() -> dict[str, Tensor]:
        model.train().zero_grad()
        torch.stack([model(**batch).loss for batch in batches]).sum().backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", few(KINDS, "embeddings"))
def test_under_torch_compile(kind: str) -> None:
    model, tokenizer = adapted("llama", kind)
    batch = GistCollator(tokenizer, 2)(RAGGED)
    expected, text = logits(model, batch), logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, batch), expected)
    torch.testing.assert_close(logits(compiled), text)


@pytest.mark.parametrize("name", few(THREE, "llama", "gemma3_text"))
def test_rows_are_plain_token_embeddings(name: str) -> None:
    """A stock model with k more rows in its table, k distinct ids and a dense causal mask gives the keys and values
    that ``compress`` caches.
    """
    model, tokenizer = adapted(name, "embeddings", num_gist_tokens=3)
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3 w4"], 3)
    rows = gist_rows(model)
    assert rows.shape == (3, 32)
    assert len(rows.unique(dim=0)) == 3

    stock: Any = tiny.model(name)
    first = stock.get_input_embeddings().weight.shape[0]
    stock.resize_token_embeddings(first + 3, mean_resizing=False)
    with torch.no_grad():
        stock.get_input_embeddings().weight[first:] = rows
        prompt = tokenizer.encode_prompts(["w1 w2 w3 w4"], 3)[0]
        ids = torch.tensor([[*prompt.input_ids[: prompt.gist_start], first, first + 1, first + 2]])
        positions = torch.arange(ids.shape[1])[None] - prompt.gist_start
        past = stock(input_ids=ids, position_ids=positions, use_cache=True)[cache_argument()]
    for layer, held in zip(past.layers, layers_of(cache), strict=True):
        torch.testing.assert_close(layer.keys[:, :, -3:], held.keys[:, :, -3:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values[:, :, -3:], held.values[:, :, -3:], rtol=1e-4, atol=1e-5)


# -- training ----------------------------------------------------------------------------------------------------------


def base_directory(name: str, folder: Path) -> Path:
    """Save a stock checkpoint whose weights are easy to train, and its tokenizer."""
    set_seed(0)
    model = tiny.model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    model.save_pretrained(folder)
    tiny.word_tokenizer().save_pretrained(folder)
    return folder


class Optimised(TrainerCallback):
    """Count the parameters of which the optimiser holds a first moment."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        assert optimizer is not None
        inner = getattr(optimizer, "optimizer", optimizer)
        self.num_moments = sum(held["exp_avg"].numel() for held in inner.state.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", few([*THREE, "t5"], "llama", "t5"))
def test_training_changes_the_adapter_and_nothing_else(tmp_path: Path, name: str, kind: str) -> None:
    base = base_directory(name, tmp_path / "base")
    model, tokenizer = gisting.load(base, "plain")
    frozen = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    text, seen = logits(model), Optimised()
    out = tmp_path / "adapter"
    steps = {"max_steps": 8, "batch_size": 8, "per_device_batch_size": 8}
    metrics = finetune(
        model, tokenizer, RECORDS, arguments(out, **steps), method=kind, num_gist_tokens=2, callbacks=[seen]
    )
    model.eval()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert metrics["num_trainable_parameters"] == seen.num_moments == trainable < metrics["num_parameters"]
    assert kind != "embeddings" or trainable == 2 * 32
    assert torch.equal(logits(model), text) is (kind != "lora")

    # What was trained was saved, as a file of peft without the base model.
    loaded, again = gisting.load(out)
    assert again.fingerprint == tokenizer.fingerprint
    assert fingerprint(loaded) == fingerprint(model)
    assert gisting.models.load.trained_num_gist_tokens(loaded) == (2, 2)  # pyright: ignore[reportAttributeAccessIssue]
    assert not (out / "config.json").exists()
    assert "adapter" in (out / "README.md").read_text() or kind == "embeddings"
    batch = GistCollator(tokenizer, 2)(RAGGED)
    assert torch.equal(logits(loaded, batch), logits(model, batch))

    trained = fingerprint(model)
    gisting.unpatch(model)
    assert not any("lora" in key or "gist" in key for key in model.state_dict())
    gisting.patch(model, tokenizer)
    assert all(torch.equal(tensor, frozen[key]) for key, tensor in model.state_dict().items())
    assert fingerprint(model) != trained


@pytest.mark.parametrize("kind", few(["gist-lora", "lora"], "gist-lora"))
def test_it_learns_through_the_gist_alone(tmp_path: Path, kind: str) -> None:
    """The answer is only in the prompt. The base model has learned the task with the prompt visible."""
    set_seed(0)
    model, tokenizer = gisting.load(base_directory("llama", tmp_path / "base"), "plain")
    finetune(model, tokenizer, RECORDS, arguments(tmp_path / "task", max_steps=80), conditions="positive")
    model, tokenizer = gisting.load(tmp_path / "task")
    settings = arguments(tmp_path / kind, max_steps=120, learning_rate=2e-2)
    finetune(model, tokenizer, RECORDS, settings, method=Method(kind, rank=8), num_gist_tokens=2)
    model, tokenizer = gisting.load(tmp_path / kind)
    cache = gisting.compress(model, tokenizer, [record.instruction for record in RECORDS], 2)
    answers = gisting.generate(
        model, tokenizer, ["w50 w51"] * len(RECORDS), cache=cache, max_new_tokens=3, do_sample=False
    )
    assert answers == [record.output for record in RECORDS]


@pytest.mark.parametrize("kind", few(KINDS, "gist-lora"))
def test_resume_ends_at_the_same_bits(tmp_path: Path, kind: str) -> None:
    """Checkpoints hold trained parameters but no frozen ones, and cannot be loaded as models."""
    base = base_directory("llama", tmp_path / "base")

    def run(name: str, *, resume: bool = False, callbacks: Any = ()) -> Any:
        model, tokenizer = gisting.load(base, "plain")
        settings = arguments(tmp_path / name, max_steps=8, save_strategy="steps", save_steps=4)
        extra = {"method": kind, "num_gist_tokens": 2, "resume": resume, "callbacks": callbacks}
        finetune(model, tokenizer, RECORDS, settings, **extra)
        return model

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    whole = fingerprint(run("whole"))
    assert fingerprint(run("halves", callbacks=[Stop()])) != whole
    checkpoint = tmp_path / "halves" / "checkpoint-4"
    assert (checkpoint / "model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    with pytest.raises(GistError, match="is a training checkpoint of an adapter"):
        gisting.load(checkpoint)
    assert fingerprint(run("halves", resume=True)) == whole


def test_training_goes_on_from_a_loaded_adapter(tmp_path: Path) -> None:
    model, tokenizer = gisting.load(base_directory("llama", tmp_path / "base"), "plain")
    settings = {"method": "gist-lora", "num_gist_tokens": 2}
    finetune(model, tokenizer, RECORDS, arguments(tmp_path / "a", max_steps=3), **settings)
    loaded, _ = gisting.load(tmp_path / "a")
    before = fingerprint(loaded)
    finetune(loaded, tokenizer, RECORDS, arguments(tmp_path / "b", max_steps=3), **settings)
    assert fingerprint(loaded) != before
    with pytest.raises(GistError, match=r"^method is 'full', but the model has an adapter of kind 'gist-lora'"):
        finetune(loaded, tokenizer, RECORDS, arguments(tmp_path / "c", max_steps=3))


def test_the_base_is_identified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gist of an adapter is checked against the base model, which is identified again only once it has changed."""
    from gisting.generation import checks

    calls = []
    identify = checks.base_fingerprint
    monkeypatch.setattr(checks, "base_fingerprint", lambda model: calls.append(model) or identify(model))
    model, tokenizer = adapted("llama", "gist-lora")
    cache = gisting.compress(model, tokenizer, ["w1 w2"], 2)
    base, _ = tiny.patched("llama")
    for _ in range(3):
        gisting.generate(model, tokenizer, ["w3"], cache=cache, max_new_tokens=2)
        gisting.generate(base, tokenizer, ["w3"], cache=cache, max_new_tokens=2)
    assert len(calls) == 2, "once for each model"
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    for _ in range(2):
        with pytest.raises(CacheMismatchError, match="cache was made for"):
            gisting.generate(base, tokenizer, ["w3"], cache=cache, max_new_tokens=2)
    assert len(calls) == 3


def test_rows_that_another_patch_replaces_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare row is not part of the patched model's fingerprint, and is part of its base's."""
    from gisting.generation import checks

    tokenizer = GistTokenizer(tiny.word_tokenizer(), "plain")
    model: Any = tiny.model("llama", vocab_size=len(tiny.VOCABULARY) + 4)
    found = []
    for _ in range(2):
        gisting.patch(model, tokenizer)
        assert model._gist_undo.replaced_rows is not None
        found.append((fingerprint(model), checks._base(model, fingerprint(model))))
        gisting.unpatch(model)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.gist_token_id].add_(1.0)
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


# -- files -------------------------------------------------------------------------------------------------------------


def layers_of(cache: gisting.GistCache) -> list[Any]:
    return list(cache.as_past_key_values().layers)


def trained(tmp_path: Path, kind: str, name: str = "llama") -> tuple[Any, GistTokenizer, Path]:
    model, tokenizer = gisting.load(base_directory(name, tmp_path / "base"), "plain")
    prepare(model, Method(kind, rank=2), 2)
    draw(model)
    gisting.models.hub.save_pretrained(model, tokenizer, tmp_path / "out")  # pyright: ignore[reportAttributeAccessIssue]
    return model, tokenizer, tmp_path / "out"


@peft_alone
@pytest.mark.parametrize("name", few(THREE, "llama"))
def test_plain_peft_reads_lora(tmp_path: Path, name: str) -> None:
    """On the stock base model with one more row, peft gives the same model, for text and after gists."""
    from peft import PeftModel

    model, tokenizer, out = trained(tmp_path, "lora", name)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    stock.resize_token_embeddings(tokenizer.gist_token_id + 1, mean_resizing=False)
    merged: Any = PeftModel.from_pretrained(stock, str(out)).merge_and_unload()
    merged.config.gist = {**model.config.gist, "num_gist_tokens": [2, 2]}
    del merged.config.gist["adapter"]
    gisting.patch(merged, tokenizer)
    batch = GistCollator(tokenizer, 2)(RAGGED)
    size = tokenizer.gist_token_id  # peft also changes the tied output row of the gist token, which is never generated
    for given in (None, batch):
        expected = logits(model, given)[..., :size]
        found = logits(merged, given)[..., :size]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@peft_alone
def test_plain_peft_reads_rows_as_trained_tokens(tmp_path: Path) -> None:
    from peft import PeftModel

    model, tokenizer, out = trained(tmp_path, "embeddings")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    stock.resize_token_embeddings(tokenizer.gist_token_id + 2, mean_resizing=False)
    merged: Any = PeftModel.from_pretrained(stock, str(out)).merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight[-2:], gist_rows(model))


@peft_alone
def test_plain_peft_does_not_read_gist_only_lora(tmp_path: Path) -> None:
    """It would apply it at all tokens, without a word, as it does with the same weights under its own names."""
    from peft import LoraConfig, PeftModel

    model, tokenizer, out = trained(tmp_path, "gist-lora")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = [tokenizer.gist_token_id, tokenizer.gist_token_id + 1]
    stock.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at"):
        PeftModel.from_pretrained(stock, str(out))
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(out)
    assert "plain peft would apply it at all tokens" in (out / "README.md").read_text()
    with pytest.raises(GistError, match="gist-only LoRA cannot be merged"):
        guarded_stack(model).layers[0].self_attn.q_proj.merge()

    shutil.copy(out / "gist_adapter.safetensors", out / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rows: Any = {"embed_tokens": ids}
    LoraConfig(r=2, lora_alpha=4, target_modules=targets, trainable_token_indices=rows).save_pretrained(str(out))
    everywhere = PeftModel.from_pretrained(stock, str(out))
    size = tokenizer.gist_token_id
    assert not torch.allclose(logits(everywhere)[..., :size], logits(model)[..., :size], atol=1e-3)


def test_gist_only_lora_of_earlier_versions_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files had peft's names. Saving it again removes them."""
    model, tokenizer, out = trained(tmp_path, "gist-lora")
    (out / "gist_adapter.safetensors").rename(out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    about = json.loads((out / "gist_adapter.json").read_text())
    (out / "gist_adapter.json").write_text(json.dumps({**about, "format": 1}))
    loaded, _ = gisting.load(out)
    assert fingerprint(loaded) == fingerprint(model)
    assert not [one for one in doctor.examine_path(out) if one.is_fault]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("gisting.models.adapters.save_file", fail)
        with pytest.raises(OSError, match="the disk is full"):
            gisting.save_pretrained(loaded, tokenizer, out)
    assert fingerprint(gisting.load(out)[0]) == fingerprint(model)
    gisting.save_pretrained(loaded, tokenizer, out)
    assert {path.name for path in out.glob("*adapter*")} == {"gist_adapter.json", "gist_adapter.safetensors"}
    assert fingerprint(gisting.load(out)[0]) == fingerprint(model)


def test_peft_switches_an_adapter_off_and_on(tmp_path: Path) -> None:
    tiny.skip_without_adapters_of_transformers()
    model, _, _ = trained(tmp_path, "lora")
    on, name = logits(model), fingerprint(model)
    model.disable_adapters()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    torch.testing.assert_close(logits(model)[..., :-1], logits(stock))
    assert fingerprint(model) != name
    model.enable_adapters()
    assert torch.equal(logits(model), on)
    assert fingerprint(model) == name


def test_the_command_line_takes_an_adapter(tmp_path: Path) -> None:
    from gisting.cli import app

    model, tokenizer, out = trained(tmp_path, "gist-lora")
    cache = tmp_path / "one.gist.safetensors"
    done = CliRunner().invoke(app, ["compress", str(out), "--prompt", "w1 w2", "--output", str(cache), "-k", "2"])
    assert done.exit_code == 0, done.output
    expected = gisting.compress(model, tokenizer, ["w1 w2"], 2)
    assert torch.equal(layers_of(gisting.GistCache.load(cache))[0].keys, layers_of(expected)[0].keys)


def test_sixteen_bits(tmp_path: Path) -> None:
    """The adapter of a model in bfloat16 is kept and trained in float32."""
    base = base_directory("gemma3_text", tmp_path / "base")
    model, tokenizer = gisting.load(base, "plain", dtype=torch.bfloat16)
    finetune(model, tokenizer, RECORDS, arguments(tmp_path / "out", max_steps=2), method="gist-lora", num_gist_tokens=2)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    loaded, _ = gisting.load(tmp_path / "out", dtype=torch.bfloat16)
    batch = GistCollator(tokenizer, 2)(RAGGED)
    assert logits(model, batch).dtype == torch.bfloat16
    assert torch.equal(logits(loaded, batch), logits(model.eval(), batch))


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_the_four_methods() -> None:
    assert METHODS == ("full", "lora", "gist-lora", "embeddings")
    model, _ = tiny.patched("llama")
    whole = prepare(model, "full", 2)
    assert whole.trainable == whole.total == count_parameters(model).total
    assert str(prepare(model, "embeddings", 2)) == f"64 of {whole.total + 64:,} parameters are trained (0.233 %)"
    assert adapter_of(model) == Adapter("embeddings", 2)


def test_errors(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match=r"^method must be one of full, lora, gist-lora, embeddings, got 'prefix'$"):
        finetune(model, tokenizer, RECORDS, arguments(tmp_path), method="prefix")
    with pytest.raises(GistError, match=r"^kind must be one of lora, gist-lora, embeddings, got 'full'$"):
        Adapter("full")
    with pytest.raises(GistError, match="num_rows must be 1 for lora, got 2"):
        Adapter("lora", 2)
    with pytest.raises(GistError, match=r"is not patched; call gisting\.patch"):
        attach(tiny.model("llama"), Adapter("lora"))
    with pytest.raises(GistError, match="there is nothing to remove"):
        detach(model)
    with pytest.raises(GistError, match="no adapter to save"):
        adapters.save(model, tokenizer, tmp_path)
    with pytest.raises(GistError, match=r"holds no gisting adapter: it has no gist_adapter.json"):
        adapters.load(model, tmp_path)
    attach(model, Adapter("embeddings", 2))
    with pytest.raises(GistError, match="model already has an adapter"):
        attach(model, Adapter("lora"))
    adapters.save(model, tokenizer, tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").unlink()
    with pytest.raises(GistError, match=r"has gist_adapter\.json but no adapter_model\.safetensors; fetch it again"):
        adapters.load(tiny.patched("llama")[0], tmp_path / "torn")
    with pytest.raises(
        GistError, match=r"^num_gist_tokens must be at most 2, got 3: the adapter has 2 rows, one for each"
    ):
        gisting.compress(model, tokenizer, ["w1"], 3)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GistError, match="holds a whole checkpoint, which would be loaded in place of the adapter"):
        finetune(model, tokenizer, RECORDS, arguments(tmp_path), method="embeddings", num_gist_tokens=2)


def test_an_adapter_of_an_earlier_version_beside_experts_is_refused(tmp_path: Path) -> None:
    """It has weights for dense layers that are no longer adapted."""
    model, tokenizer = tiny.patched("qwen3_moe")
    adapters.attach(model, Adapter("lora"))
    adapters.save(model, tokenizer, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    layer = "base_model.model.model.layers.0.mlp.down_proj"
    extra = {f"{layer}.lora_{name}.weight": torch.zeros(16, 16) for name in "AB"}
    save_file({**load_file(file), **extra}, file)
    adapters.detach(model)
    message = r"does not fit .*; made by an earlier version, which also adapted down_proj; train it again$"
    with pytest.raises(GistError, match=message):
        adapters.load(model, tmp_path)
    assert adapter_of(model) is None


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    _, _, out = trained(tmp_path, "gist-lora")
    other, _ = tiny.patched("llama", num_hidden_layers=2)
    with pytest.raises(
        GistError, match=r"does not fit LlamaForCausalLM: model.layers.2.* it was trained for the base model /.*base"
    ):
        adapters.load(other, out)
    assert adapter_of(other) is None
    assert not any("lora" in key for key in other.state_dict())
    about = json.loads((out / "gist_adapter.json").read_text())
    for change, message in (
        ({"format": 9}, "has format 9, this version reads 1 and 2"),
        ({"base": ""}, "does not name its base model"),
    ):
        (out / "gist_adapter.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(GistError, match=message):
            gisting.load(out)
    (out / "gist_adapter.json").write_text(json.dumps(about))
    with pytest.raises(GistError, match="template must be None for an adapter"):
        gisting.load(out, "plain")
