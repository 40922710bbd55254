"""What benchmarks and demo share that train on a built-in task: the model, how it learns, and how it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TrainingArguments

from gisting.data.records import Record
from gisting.eval.conditions import evaluate
from gisting.eval.statistics import Interval
from gisting.models.patch import patch
from gisting.tokens import GistTokenizer
from gisting.train.finetune import published_arguments

__all__ = ["ANSWERS_AT_ONCE", "BATCH_SIZE", "CONDITIONS", "SPLITS", "task_accuracy", "task_arguments", "task_model"]

BATCH_SIZE = 32
ANSWERS_AT_ONCE = 128
SPLITS = ("seen", "unseen")
CONDITIONS = ("positive", "gist", "negative")


def task_model(tokenizer: GistTokenizer, max_position_embeddings: int = 256, **sizes: int) -> PreTrainedModel:
    """The small LLaMA that learns a built-in task from nothing, patched, with fresh weights; ``sizes`` are those of its
    configuration that are to be others.
    """
    special: Any = tokenizer.tokenizer
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, **sizes}
    config = LlamaConfig(
        vocab_size=len(special),
        **shape,
        max_position_embeddings=max_position_embeddings,
        # The usual 0.02 is for wide models: this narrow one learns in half the steps from larger weights.
        initializer_range=0.06,
        pad_token_id=special.pad_token_id,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
    )
    return patch(AutoModelForCausalLM.from_config(config), tokenizer)


def task_arguments(output_dir: str | Path, steps: int, seed: int, batch_size: int = BATCH_SIZE) -> TrainingArguments:
    """How it learns: not by the published schedule, which tunes a pretrained model."""
    return published_arguments(
        output_dir,
        batch_size=batch_size,
        per_device_batch_size=batch_size,
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 4),
        weight_decay=0.05,
        adam_beta2=0.98,
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )


def task_accuracy(
    model: Any, tokenizer: GistTokenizer, splits: Mapping[str, list[Record]], num_gist_tokens: int, length: int
) -> dict[str, Interval]:
    """Exact match by ``split/condition``, with answers of at most ``length`` tokens."""
    model.eval()
    return {
        f"{split}/{result.condition}": result.interval("exact_match")
        for split, records in splits.items()
        for result in evaluate(
            model,
            tokenizer,
            records,
            num_gist_tokens,
            conditions=CONDITIONS,
            max_new_tokens=length,
            batch_size=ANSWERS_AT_ONCE,
            with_rouge=False,
        )
    }
