"""What a request costs, counted from a configuration alone: FLOPs of the forward pass and bytes of the cache. No
weights are made.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from gisting.errors import GistError

__all__ = ["cache_bytes", "forward_flops"]


def forward_flops(config: PreTrainedConfig, num_tokens: int, num_cached: int = 0) -> int:
    """FLOPs of one forward pass of a decoder over ``num_tokens`` behind ``num_cached`` cached ones, batch 1.

    Matrix products alone, two FLOPs for a multiplication with its addition, logits at every token, as torch's flop
    counter and the published tables count them. The model is built on the meta device.

    Args:
        config: configuration of a causal language model.
        num_tokens: tokens that are run, at least 1.
        num_cached: tokens whose keys and values are there already.

    Raises:
        GistError: a number is out of range, or the configuration is of an encoder-decoder.
    """
    if num_tokens < 1 or num_cached < 0:
        raise GistError(f"num_tokens must be at least 1 and num_cached at least 0, got {num_tokens} and {num_cached}")
    if config.is_encoder_decoder:
        raise GistError(f"forward_flops counts decoders; {config.model_type} is an encoder-decoder")
    with torch.device("meta"):
        # Eager attention counts every product; the fused operators are counted by formulas that differ between
        # versions.
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        cache = DynamicCache()
        if num_cached:
            states = torch.zeros(1, _key_heads(config), num_cached, _head_size(config))
            for layer in range(config.num_hidden_layers):
                cache.update(states, states, layer)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    return counter.get_total_flops()


def cache_bytes(config: PreTrainedConfig, num_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the keys and values of ``num_tokens`` in all layers of a decoder, batch 1."""
    element = torch.empty((), dtype=dtype).element_size()
    return 2 * config.num_hidden_layers * _key_heads(config) * _head_size(config) * num_tokens * element


def _key_heads(config: PreTrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
