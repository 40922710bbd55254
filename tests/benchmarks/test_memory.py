"""The arithmetic of memory, against the bytes of real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from benchmarks.__main__ import run
from benchmarks.memory import count
from gisting.measure.rows import read_rows
from gisting.models.adapters import Adapter, attach
from tests import tiny


def held(tensors: Any) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def test_bytes_of_a_model_in_16_bits_and_of_its_adapter() -> None:
    model: Any = tiny.model("llama")
    model.to(torch.bfloat16)
    row = count(model.config, "tiny", 16, 4, 100)
    assert row.layers + row.embeddings == held(model.parameters())
    assert row.total == row.layers + row.embeddings + row.adapter + row.activations + row.logits
    tiny_patched, _ = tiny.patched("llama")
    attach(tiny_patched, Adapter("lora", rank=4))
    trained = [one for name, one in tiny_patched.named_parameters() if "lora_" in name]
    assert row.adapter == 4 * held(trained)


@pytest.mark.filterwarnings("ignore")
def test_bytes_of_a_model_in_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    tiny.model("llama", **sizes).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.bfloat16)
    row = count(LlamaConfig.from_pretrained(tmp_path), "small", 4, 4, 100)
    # The state dict also has two tables of values and a description for each layer.
    state = {name: one for name, one in model.state_dict().items() if not name.endswith(("quant_map", "__nf4"))}
    assert row.layers + row.embeddings == pytest.approx(held(state.values()), rel=0.02)


def test_an_8b_model_in_4_bits_fits_a_card_of_16_gb_and_in_16_bits_does_not(tmp_path: Path) -> None:
    assert run(["memory", "--tokens", "2048", "--output", str(tmp_path / "rows.jsonl")]) == 0
    four, eight, sixteen = read_rows(tmp_path / "rows.jsonl")
    assert four["total"] < 14e9 < eight["total"] < sixteen["total"]
    assert sixteen["layers"] + sixteen["embeddings"] == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert run(["memory", "--bits", "5"]) == 2
