"""Make tiny random models of every family, and a tokenizer for them, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gisting.models.patch import patch
from gisting.tokens import GistTokenizer

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
WINDOW = 8


def word_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one id per word: w0 ... w59 and four special tokens."""
    words = {word: number for number, word in enumerate([*VOCABULARY, *extra])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def skip_without_adapters_of_transformers() -> None:
    """Skip if peft is too old for transformers' own ``add_adapter``, ``disable_adapters`` and the like."""
    import peft
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"adapters in this transformers need peft {MIN_PEFT_VERSION}, found {peft.__version__}")


def words(count: int, seed: int) -> str:
    """Make a text of ``count`` words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{number}" for number in torch.randint(0, 60, (count,), generator=generator).tolist())


_COMMON = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_T5 = {
    "vocab_size": len(VOCABULARY),
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_ROPE = {"rope_theta": 10000.0}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "llama-linear": {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 2.0}},
    "llama-dynamic": {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 2.0}},
    "llama-llama3": {
        "rope_parameters": {
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    "qwen3": {},
    "gemma": {},
    "gemma2": {**_MIXED, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 8},
    "phi3": {},
    "phi3-longrope": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 2.5, 3.0, 4.0],
            "original_max_position_embeddings": 64,
        },
    },
    "olmo2": {},
    "granite": {"attention_multiplier": 0.25, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2},
    "cohere2": {**_MIXED},
    "gpt_neox": {"rotary_pct": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    # Attention sinks.
    "gpt_oss": {
        **_MIXED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    # Latent attention: keys of 8 numbers, values of 6.
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
    },
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5-v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def slow_but(names: Iterable[str], *quick: str) -> list[Any]:
    """Make parameters of names: all run with ``slow``, and by default only the quick ones."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def model(name: str, **changes: Any) -> PreTrainedModel:
    """Make a random float32 model of a family, in eval mode, with weights so large that attention is far from uniform.

    The test is skipped if this transformers does not support the family.
    """
    model_type = name.split("-")[0]
    if model_type == "umt5" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("UMT5 needs transformers 5.18: before, its decoder was not marked as causal, and patch refuses it")
    if name in ENCODER_DECODERS:
        settings, build = {**_T5, **ENCODER_DECODERS[name]}, AutoModelForSeq2SeqLM.from_config
    else:
        settings, build = {**_COMMON, **DECODERS[name]}, AutoModelForCausalLM.from_config
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(1)
    # Older transformers would run Gemma 2 on sdpa, which ignores its softcap; newer ones choose eager themselves.
    built = build(config, attn_implementation="eager") if name == "gemma2" else build(config)
    if name in ENCODER_DECODERS and settings.get("tie_word_embeddings") is False:
        _untie(built)
    return scaled(built)


def _untie(model: PreTrainedModel) -> None:
    """Give the model an untied head, like a loaded checkpoint that has one (T5 v1.1, FLAN-T5, mT5, UMT5).

    transformers 5 sets ``config.tie_word_embeddings`` to true for all T5 models, and unties them if the file has a
    head.
    """
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    model.all_tied_weights_keys.pop("lm_head.weight", None)


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def as_build(name: str) -> Callable[[], PreTrainedModel]:
    return lambda: model(name)


def tokenizer(name: str = "llama", template: str = "plain") -> GistTokenizer:
    """Make a gist tokenizer for a family."""
    return GistTokenizer(word_tokenizer(), template, is_encoder_decoder=name in ENCODER_DECODERS)


def patched(name: str, template: str = "plain", **changes: Any) -> tuple[PreTrainedModel, GistTokenizer]:
    """Make a random model of a family and a tokenizer, patched for each other."""
    tokens = tokenizer(name, template)
    return patch(model(name, **changes), tokens), tokens


def stock_twin(name: str, patched_model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """Make an unpatched model with the weights of a patched one, with one embedding row more than ``model(name)``."""
    twin = model(name, vocab_size=patched_model.get_input_embeddings().weight.shape[0], **changes)
    twin.load_state_dict(patched_model.state_dict())
    return twin
