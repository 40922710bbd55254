"""A model with random weights, for measurements of time and memory, which do not depend on the values.

Place in the flow: sizes -> **models** -> a patched decoder. Independent of what is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from gisting.data.tasks import task_tokenizer
from gisting.errors import GistError
from gisting.models.patch import patch
from gisting.tokens import GistTokenizer

__all__ = ["random_llama"]

_HEAD_SIZE = 64


def random_llama(
    hidden_size: int = 640,
    num_layers: int = 12,
    *,
    num_heads: int | None = None,
    num_key_heads: int | None = None,
    intermediate_size: int | None = None,
    vocabulary: int = 32_000,
    is_tied: bool = False,
    tokenizer: GistTokenizer | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, GistTokenizer]:
    """Make a patched LLaMA with random weights and a tokenizer for it; by default about 100 million parameters.

    Args:
        hidden_size: width of the model.
        num_layers: depth of the model.
        num_heads: query heads; by default one for every 64 of ``hidden_size``.
        num_key_heads: key heads; by default as many as query heads.
        intermediate_size: width of the MLP; by default 8/3 of ``hidden_size``, rounded up to a multiple of 64.
        vocabulary: tokens of the vocabulary.
        is_tied: whether input and output embeddings are one matrix.
        tokenizer: by default the built-in task's, whose ids must fit in ``vocabulary``.
        device: device of the model.
        dtype: dtype of the weights.

    Returns:
        The model and its tokenizer.

    Raises:
        GistError: a size is out of range.
    """
    if num_heads is None:
        if hidden_size < _HEAD_SIZE or hidden_size % _HEAD_SIZE:
            raise GistError(f"hidden_size must be a multiple of {_HEAD_SIZE}, the size of a head, got {hidden_size}")
        num_heads = hidden_size // _HEAD_SIZE
    if num_layers < 1:
        raise GistError(f"num_layers must be at least 1, got {num_layers}")
    tokenizer = task_tokenizer() if tokenizer is None else tokenizer
    special: Any = tokenizer.tokenizer
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or -(-hidden_size * 8 // (3 * 64)) * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=is_tied,
        pad_token_id=special.pad_token_id,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return patch(model.to(device), tokenizer), tokenizer
