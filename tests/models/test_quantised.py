"""Quantised bases: the check, fingerprints, training, caches and files, for every quantiser that runs on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import gisting
from gisting import GistCollator, Record
from gisting.data.records import save_records
from gisting.errors import GistError, UnsupportedModelError
from gisting.models import registry
from gisting.models.adapters import Adapter, attach, detach
from gisting.models.fingerprint import base_fingerprint, fingerprint
from gisting.train.finetune import finetune, published_arguments
from gisting.train.recipe import load_recipe, train_recipe
from tests import tiny
from tests.repository import fences_in

RECORDS = [Record("w1 w2 w3", "w7 w8", "w3"), Record("w4 w5", "w5 w6 w1", "w6 w2")]
# Multiples of the blocks in which weights are quantised.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
# The packages warn about each other and about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


def _torchao(name: str, **settings: Any) -> TorchAoConfig:
    import torchao.quantization as kinds  # pyright: ignore[reportMissingImports]

    is_all = settings.pop("is_all", False)
    return TorchAoConfig(getattr(kinds, name)(**settings), include_input_output_embeddings=is_all)


def _four_bits(**settings: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)


#: The package of each quantiser, and its settings.
QUANTISERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bitsandbytes 8 bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", lambda: _four_bits(bnb_4bit_quant_type="nf4")),
    "bitsandbytes nf4 twice": (
        "bitsandbytes",
        lambda: _four_bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes fp4": ("bitsandbytes", lambda: _four_bits(bnb_4bit_quant_type="fp4")),
    "torchao int8": ("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao intx": ("torchao", lambda: _torchao("IntxWeightOnlyConfig")),
    "torchao float8": ("torchao", lambda: _torchao("Float8WeightOnlyConfig")),
    "quanto int8": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
    "quanto int4": ("optimum.quanto", lambda: QuantoConfig(weights="int4")),
}


def _settings(name: str) -> Any:
    package, settings = QUANTISERS[name]
    _need(package)
    return settings()


def _need(package: str) -> None:
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.model("llama", **SIZES).save_pretrained(folder)
    tiny.tokenizer().tokenizer.save_pretrained(folder)
    return folder


def load(checkpoint: Path, settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=settings, dtype=torch.float32)


@torch.no_grad()
def run(model: Any) -> Any:
    return model(torch.arange(4, 20).view(2, 8)).logits


@pytest.mark.parametrize("name", QUANTISERS)
def test_fingerprint_before_and_after_a_forward_pass(name: str, checkpoint: Path) -> None:
    model = load(checkpoint, _settings(name))
    before = fingerprint(model)
    first = run(model)
    assert fingerprint(model) == before
    assert torch.equal(run(model), first), "a model that was fingerprinted says the same"
    assert fingerprint(load(checkpoint, _settings(name))) == before
    assert gisting.check_model(model).passed, gisting.check_model(model)
    gisting.patch(model, tiny.tokenizer())
    assert base_fingerprint(model) == before
    gisting.unpatch(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", ["lora", "gist-lora"])
@pytest.mark.parametrize("name", QUANTISERS)
def test_train_compress_save_reload_and_generate(name: str, kind: str, checkpoint: Path, tmp_path: Path) -> None:
    settings = _settings(name)
    model, tokenizer = gisting.load(checkpoint, template="plain", quantization_config=settings, dtype=torch.float32)
    base = base_fingerprint(model)
    attach(model, Adapter(kind, rank=4))
    batch = GistCollator(tokenizer, 2)(RECORDS)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert base_fingerprint(model) == base or kind == "lora"

    model.eval()
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3 w4 w5"], 2)
    answers = gisting.generate(model, tokenizer, ["w7 w8"], cache=cache, max_new_tokens=5)
    full = gisting.generate(
        model, tokenizer, ["w7 w8"], prompts=["w1 w2 w3 w4 w5"], num_gist_tokens=2, max_new_tokens=5
    )
    assert answers == full
    gisting.save_pretrained(model, tokenizer, tmp_path / "adapter")
    cache.save(tmp_path / "prompt.safetensors")
    again, tokenizer = gisting.load(tmp_path / "adapter", quantization_config=_settings(name), dtype=torch.float32)
    kept = gisting.GistCache.load(tmp_path / "prompt.safetensors")
    assert gisting.generate(again, tokenizer, ["w7 w8"], cache=kept, max_new_tokens=5) == answers
    if kind == "gist-lora":  # its gists are the base model's
        detach(again)
        assert gisting.generate(again, tokenizer, ["w7 w8"], cache=kept, max_new_tokens=5) == answers


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_quantised_checkpoint_is_saved_and_read(name: str, checkpoint: Path, tmp_path: Path) -> None:
    settings = _settings(name)
    model, tokenizer = gisting.load(checkpoint, template="plain", quantization_config=settings, dtype=torch.float32)
    said = run(model)
    if name.startswith("quanto"):
        message = "^transformers cannot save weights quantised with quanto; train an adapter"
        with pytest.raises(GistError, match=message):
            gisting.save_pretrained(model, tokenizer, tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        return
    gisting.save_pretrained(model, tokenizer, tmp_path / "saved")
    again, _ = gisting.load(tmp_path / "saved")
    assert fingerprint(again) == fingerprint(model)
    torch.testing.assert_close(run(again), said, rtol=1e-5, atol=1e-5)


def test_weights_that_were_rewritten_are_refused(checkpoint: Path) -> None:
    """bitsandbytes' own kernel for the CPU rounds the scales, and what it saves later is something else."""
    model = load(checkpoint, _settings("bitsandbytes nf4"))
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    message = r"^the 4-bit weights of model\.layers\.0\.mlp\.up_proj were rewritten by bitsandbytes .*; load the model "
    for call in (fingerprint, gisting.check_model, lambda one: gisting.patch(one, tiny.tokenizer())):
        with pytest.raises(GistError, match=message):
            call(model)


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao int8"])
def test_a_fault_is_found_in_a_quantised_model(name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are those of 16 bits, within which a mask that hides nothing is still found."""
    model = load(checkpoint, _settings(name))
    right = registry._attention_forward

    def blind(module: Any, q: Any, k: Any, v: Any, mask: Any, **more: Any) -> Any:
        if mask is not None and mask.dtype == torch.int32:
            mask = None
            more["is_causal"] = True
        return right(module, q, k, v, mask, **more)

    monkeypatch.setattr(registry, "_attention_forward", blind)
    found = gisting.check_model(model).failed
    assert found is not None
    assert found.name == "mask"


def test_activations_without_gradients_are_refused(checkpoint: Path) -> None:
    _need("torchao")
    model = load(checkpoint, _torchao("Int8DynamicActivationInt8WeightConfig"))
    found = gisting.check_model(model).failed
    assert found is not None
    assert (found.name, found.problem) == ("gradient", "no gradient reaches the states of the gist in layer 0")


def test_quantised_embeddings_are_refused(checkpoint: Path) -> None:
    _need("torchao")
    model = load(checkpoint, _torchao("Int8WeightOnlyConfig", is_all=True))
    message = "^llama cannot be gisted: its embeddings or its head are quantised, so no row can be added"
    with pytest.raises(UnsupportedModelError, match=message):
        gisting.patch(model, tiny.tokenizer())


@pytest.mark.parametrize("method", ["lora", "gist-lora"])
def test_the_page_and_its_recipe(
    method: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model in the place of the 8B one."""
    _need("bitsandbytes")
    root = Path(__file__).resolve().parents[2]
    recipe = load_recipe(root / "recipes" / "lora-8b-4bit-1x16gb.yaml")
    page = (root / "docs" / "how_to_quantised.md").read_text(encoding="utf-8")
    (code,) = (fence.text for fence in fences_in(page) if fence.language == "python")
    assert recipe.model is not None
    assert f'save_pretrained("{recipe.model}")' in code
    monkeypatch.chdir(tmp_path)
    save_records(RECORDS, tmp_path / "records.jsonl")
    exec(compile(code.replace("meta-llama/Llama-3.1-8B", str(checkpoint)), "how_to_quantised.md", "exec"), {})
    changed = recipe.updated(
        data="records.jsonl",
        eval=[],
        method=method,
        max_steps=2,
        batch_size=4,
        num_workers=0,
        bf16=False,
        template="plain",
    )
    train_recipe(changed, "runs/out")
    model, tokenizer = gisting.load("runs/out")
    assert model.config.quantization_config.load_in_4bit
    assert (tmp_path / "runs" / "out" / "adapter_model.safetensors").exists() is (method == "lora")
    assert not list((tmp_path / "runs" / "out").glob("model*.safetensors"))
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 3)
    assert gisting.generate(model, tokenizer, ["w4"], cache=cache, max_new_tokens=3)


def test_what_was_unpacked_from_gguf_is_trained_and_saved_as_any_other(checkpoint: Path, tmp_path: Path) -> None:
    _write_gguf(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    tokenizer = tiny.tokenizer()
    before = fingerprint(model)
    run(model)
    assert fingerprint(model) == before
    assert gisting.check_model(model).passed
    gisting.patch(model, tokenizer)
    assert base_fingerprint(model) == before
    finetune(
        model, tokenizer, RECORDS, published_arguments(tmp_path / "run", batch_size=2, max_steps=2), num_gist_tokens=2
    )
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 2)
    answers = gisting.generate(model, tokenizer, ["w4"], cache=cache, max_new_tokens=3)
    gisting.save_pretrained(model, tokenizer, tmp_path / "saved")
    again, tokenizer = gisting.load(tmp_path / "saved", dtype=torch.float32)
    assert fingerprint(again) == fingerprint(model)
    assert gisting.generate(again, tokenizer, ["w4"], cache=cache, max_new_tokens=3) == answers


def _write_gguf(model: Any, path: Path) -> None:
    """Write a LLaMA as llama.cpp does, with matrices in 8 bits."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        values = tensor.float().numpy()
        if values.ndim == 2 and name.startswith("blk"):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
