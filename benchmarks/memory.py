"""Add up the memory that LoRA training on a quantised base takes, from a model's sizes alone.

Place in the flow: sizes -> **memory** -> rows and a table. No weights are made. What is counted: the base model, the
adapter with its gradients and optimizer, and what a step keeps when activations are recomputed
(``gradient_checkpointing``). Not counted: the CUDA context (about 0.5 GB) and what the allocator holds back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from benchmarks.check import SIZES
from benchmarks.command import OutputOption, Rows, numbers
from gisting.markdown import markdown_table

__all__ = ["MemoryRow", "count", "main", "memory_table"]

#: Bytes of scales for each weight. 4 bits, quantised twice: 8 bits for 64 weights and 32 bits for 256 of these; 8 bits:
#: 32 bits for each row, which is next to nothing.
SCALES = {4: 1 / 64 + 4 / (64 * 256), 8: 0.0, 16: 0.0}


@dataclass(frozen=True)
class MemoryRow:
    """Bytes by what they hold. ``bits`` are those of a weight of a linear layer; embeddings and head have 16."""

    model: str
    bits: int
    rank: int
    tokens: int
    layers: int
    embeddings: int
    adapter: int
    activations: int
    logits: int
    total: int


def count(config: PreTrainedConfig, name: str, bits: int, rank: int, tokens: int) -> MemoryRow:
    """Add up the bytes of one training step with LoRA on every linear layer except the head.

    Args:
        config: of a decoder.
        name: what to call it in the row.
        bits: of each weight of a linear layer: 4 (nf4, quantised twice), 8 or 16.
        rank: of LoRA.
        tokens: that one pass reads, padding included; every one of them predicts a token at most.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head, layers = model.get_output_embeddings(), text.num_hidden_layers
    linear = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    quantised = sum(one.weight.numel() for one in linear)
    rest = sum(one.numel() for one in model.parameters()) - quantised
    ins, outs = sum(one.in_features for one in linear), sum(one.out_features for one in linear)
    # Float32: weights, gradients and Adam's two moments.
    adapter = rank * (ins + outs) * 4 * 4
    # What enters each layer, in 16 bits. Of one layer at a time: what its parts return and its gradients in 16 bits,
    # what LoRA reads in float32, and the largest weight, expanded to 16 bits.
    kept = layers * tokens * text.hidden_size * 2
    at_once = tokens * (outs * 2 * 2 + ins * 4) // layers
    expanded = 0 if bits == 16 else max(one.weight.numel() for one in linear) * 2
    # In 16 bits and float32, and the gradients of both.
    logits = tokens * text.vocab_size * (2 + 4) * 2
    parts = {
        "layers": int(quantised * (bits / 8 + SCALES[bits])),
        "embeddings": rest * 2,
        "adapter": adapter,
        "activations": kept + at_once + expanded,
        "logits": logits,
    }
    return MemoryRow(model=name, bits=bits, rank=rank, tokens=tokens, **parts, total=sum(parts.values()))


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Make the table, in GB, as Markdown."""
    parts = ("layers", "embeddings", "adapter", "activations", "logits", "total")
    cells = [
        (row["model"], row["bits"], row["rank"], f"{row['tokens']:,}", *(f"{row[part] / 1e9:.1f}" for part in parts))
        for row in rows
    ]
    return "\n".join(markdown_table(("model", "bits", "rank", "tokens at once", *parts), cells))


def main(
    output: OutputOption = None,
    bits: Annotated[str, typer.Option(help="Bits of a weight, separated by commas: 4, 8, 16.")] = "4,8,16",
    tokens: Annotated[str, typer.Option(help="Tokens that one pass reads, separated by commas.")] = "2048,4096",
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA.")] = 16,
) -> None:
    """Add up the memory that LoRA training of an 8B model takes, by bits of a weight.

    The rows of the page: python -m benchmarks memory --output docs/results/memory.jsonl
    """
    rows = Rows("memory", output, "cpu")
    for number in numbers("--bits", bits):
        if number not in SCALES:
            raise typer.BadParameter(f"--bits must be 4, 8 or 16, got {number}")
        for length in numbers("--tokens", tokens):
            rows.add([count(LlamaConfig(**SIZES["8b"]), "8B", number, rank, length)])
    rows.show(memory_table)
