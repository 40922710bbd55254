"""The supported model families, which models are refused and why, and the attention function that reads intervals.

Place in the flow: visibility -> attention -> **models** -> cache. The only module that writes to transformers'
registries. A family is a row of ``FAMILIES``; dispatch is on what a config declares (``model_type``, ``layer_types``,
``rope_parameters``), never on a class.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from gisting.attention import interval_attention
from gisting.attention.memo import remembered_on
from gisting.attention.relative import dense_bias
from gisting.errors import GistError, UnsupportedModelError
from gisting.source import explain, local
from gisting.visibility import Visibility, is_interval_mask

__all__ = [
    "FAMILIES",
    "EncoderStates",
    "Family",
    "attention_name",
    "family_of",
    "is_length_dependent",
    "position_limit",
    "read_config",
    "register_attention",
    "register_family",
    "sliding_windows",
]


@dataclass(frozen=True)
class Family:
    """A model type for which the tests prove that gists are exact.

    The gist mask equals a dense mask, cached equals uncached, ordinary input is unchanged, and chained gists equal
    gists computed in place.

    Args:
        model_type: as the config declares it.
        is_encoder_decoder: whether it has an encoder, whose states hold the compressed prompt.
        is_interleaved: whether the two numbers rotated together are neighbours (``Rotary.is_interleaved``).
        rotates_windows_only: whether only layers with a sliding window rotate their keys.
    """

    model_type: str
    is_encoder_decoder: bool = False
    is_interleaved: bool = False
    rotates_windows_only: bool = False


#: The supported families by model type.
FAMILIES: dict[str, Family] = {
    name: Family(name)
    for name in (
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    )
}
FAMILIES["cohere2"] = Family("cohere2", is_interleaved=True, rotates_windows_only=True)
FAMILIES |= {name: Family(name, is_encoder_decoder=True) for name in ("mt5", "t5", "umt5")}

_ABSOLUTE = "its absolute position embeddings would move with the length of the prompt that was compressed away"
_RECURRENT = "its recurrent layers carry the prompt in a state that no attention mask can hide"
_ALIBI = "its position bias counts from the start of the sequence"
_REFUSED = (
    dict.fromkeys(
        ("bart", "biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "marian", "mbart", "opt", "pegasus", "xglm"),
        _ABSOLUTE,
    )
    | dict.fromkeys(
        (
            "bamba",
            "falcon_h1",
            "falcon_mamba",
            "granitemoehybrid",
            "jamba",
            "kimi_linear",
            "lfm2",
            "mamba",
            "mamba2",
            "qwen3_5_text",
            "qwen3_next",
            "recurrent_gemma",
            "rwkv",
            "xlstm",
            "zamba",
            "zamba2",
        ),
        _RECURRENT,
    )
    | dict.fromkeys(("bloom", "mpt"), _ALIBI)
    | {
        "longt5": "its encoder attends in local blocks, not through a mask",
        "gpt_oss": "its attention has sinks, which interval attention does not support",
        "llama4_text": "its chunked attention counts from the start of the sequence",
    }
)

# Rotary types with fixed frequencies. Those of "dynamic" and "longrope" change with the largest position in the batch;
# both are exact below the length at which they change, and refused beyond it (``position_limit``).
_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def read_config(name_or_path: str | Path, **source: Any) -> PreTrainedConfig:
    """Read the configuration of a checkpoint, without its weights.

    Args:
        name_or_path: a directory, or a repository on the Hugging Face hub.
        **source: as for ``from_pretrained``: ``revision``, ``token`` and so on.

    Raises:
        GistError: there is none, or what it says about gists is damaged.
    """
    fault = None if source.get("subfolder") else explain(name_or_path)
    if fault is not None:
        raise GistError(f"{name_or_path} is not a checkpoint: {fault}")
    try:
        config = AutoConfig.from_pretrained(local(name_or_path), **source)
    except (LookupError, OSError, TypeError, ValueError) as error:
        raise GistError(
            f"{name_or_path} is not a checkpoint: no such directory with a readable config.json, and the hub did not "
            f"return one ({error})"
        ) from error
    gist = getattr(config, "gist", None)
    if gist is not None and not _is_record(gist):
        raise GistError(f"{name_or_path}: 'gist' in its config.json is damaged; download the checkpoint again")
    return config


def _is_record(gist: object) -> bool:
    """Whether ``gist`` has the entries of ``config.gist`` that every reader needs."""
    if not isinstance(gist, dict) or type(gist.get("gist_token_id")) is not int:
        return False
    trained = gist.get("num_gist_tokens")
    return trained is None or (isinstance(trained, list | tuple) and [type(k) for k in trained] == [int, int])


def register_family(family: Family) -> None:
    """Add ``family`` to ``FAMILIES``.

    First run the tests that every family must pass: ``tests/models/test_families.py``, and ``tests/test_chain.py`` for
    its rotation.
    """
    FAMILIES[family.model_type] = family


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model, by what its ``config`` declares.

    Raises:
        UnsupportedModelError: the model cannot be gisted, or no test proves that it can; the message says why.
    """
    model_type = config.model_type
    if model_type in _REFUSED:
        raise UnsupportedModelError(f"{model_type} cannot be gisted: {_REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{model_type} is not among the supported families ({', '.join(sorted(FAMILIES))}); run the tests of "
            f"families on it and add it: gisting.models.registry.register_family(Family({model_type!r}))"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown:
        raise UnsupportedModelError(
            f"{model_type} has layers of type {', '.join(sorted(unknown))}; gisting supports "
            f"{', '.join(sorted(_KNOWN_LAYERS))}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            f"{model_type} with use_bidirectional_attention cannot be gisted: its tokens see later ones, so a prompt "
            "has no prefix states"
        )
    rotary = _rotary_types(config) - _STATIC_ROPE - _LENGTH_DEPENDENT_ROPE
    if rotary:
        raise UnsupportedModelError(
            f"{model_type} has rotary positions of type {', '.join(sorted(rotary))}; gisting supports "
            f"{', '.join(sorted(_STATIC_ROPE | _LENGTH_DEPENDENT_ROPE))}"
        )
    return FAMILIES[model_type]


def is_length_dependent(config: PreTrainedConfig) -> bool:
    """Return whether the rotary frequencies of a ``config`` change with the length of the batch.

    Those of dynamic NTK and longrope do.
    """
    return bool(_rotary_types(config) & _LENGTH_DEPENDENT_ROPE)


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return how many positions ``config`` allows a sequence to span.

    None means relative positions without a limit (T5). If the rotary frequencies depend on the length, the limit is the
    length from which they do: up to it, a cached gist and the full text are rotated alike.
    """
    if getattr(config, "is_encoder_decoder", False):
        return None
    limits = [config.max_position_embeddings]
    for parameters in _rotary_parameters(config):
        original = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE and original:
            limits.append(int(original))
    return min(limits)


def sliding_windows(config: PreTrainedConfig) -> int | None:
    """Return the smallest attention window of any layer of a ``config``, or None if every layer sees everything."""
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or (layer_types is not None and "sliding_attention" not in layer_types):
        return None
    return window


def _rotary_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """One dictionary, or one for each type of layer (Gemma 3)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _rotary_types(config: PreTrainedConfig) -> set[str]:
    return {parameters.get("rope_type") or "default" for parameters in _rotary_parameters(config)}


# -- the attention function --------------------------------------------------------------------------------------------


class EncoderStates(Protocol):
    """Keys and values of the first slots of every encoder layer, recorded or replayed."""

    def exchange(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return what attention reads instead of ``key`` and ``value`` in encoder layer ``layer``.

        All are ``(B, H, N, D)``, in the dtype of the layer.
        """
        ...


def attention_name(base: str) -> str:
    """Return the name of the attention that reads intervals and passes every other mask to ``base``.

    Raises:
        GistError: nothing is registered for ``base``.
    """
    if base not in _BASES:
        raise GistError(
            f"attn_implementation {base!r} cannot be patched, only {', '.join(_BASES)}; load the model with "
            "attn_implementation='sdpa'"
        )
    return "gist" if base == "sdpa" else f"gist_{base}"


def register_attention() -> None:
    """Register the attention functions, each with its mask function, without which padding would be lost.

    Calling it again changes nothing.
    """
    for base, (forward, mask) in _BASES.items():
        name = attention_name(base)
        AttentionInterface.register(name, functools.partial(_attention_forward, base_forward=forward))
        AttentionMaskInterface.register(name, mask)


def _eager_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention, which has this name in every modelling file of transformers."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


_Forward = Callable[..., tuple[Tensor, "Tensor | None"]]
_BASES: dict[str, tuple[_Forward, Callable[..., Tensor | None]]] = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (_eager_forward, eager_mask),
}


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    base_forward: _Forward,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    gist_states: EncoderStates | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: ``(B, H, T, D)`` in, ``(B, T, H, D)`` out."""
    is_cross = getattr(module, "is_decoder", False) and not module.is_causal
    if gist_states is not None and not getattr(module, "is_decoder", False):
        key, value = gist_states.exchange(module.layer_idx, key, value)  # pyright: ignore[reportArgumentType]
    relative_bias = position_bias if position_bias is not None and position_bias.dim() == 2 else None
    if attention_mask is None or not is_interval_mask(attention_mask):
        if relative_bias is not None:
            # Tables are for interval masks; another thread that runs the same UMT5 may have requested this one.
            position_bias = dense_bias(relative_bias, query.shape[2], key.shape[2])
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        return base_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if is_cross and not getattr(module, "has_relative_attention_bias", True):
        position_bias = relative_bias = None  # T5-like models give their cross-attention zeros.
    out = interval_attention(
        query,
        key,
        value,
        _visibility(attention_mask, key.shape[2], kwargs.get("sliding_window"), is_cross=is_cross),
        bias=position_bias if relative_bias is None else None,
        relative_bias=relative_bias,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        dropout=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


def _visibility(attention_mask: Tensor, num_keys: int, sliding_window: int | None, *, is_cross: bool) -> Visibility:
    """Return the part of an interval mask that a layer sees.

    All layers of a kind get the same tensors, so that what is derived from them is computed once for a batch.
    """

    def build() -> Visibility:
        visibility = Visibility.from_attention_mask(attention_mask)
        if is_cross:
            visibility = visibility.for_cross_attention()
        elif visibility.num_keys > num_keys:
            if sliding_window is None:
                raise GistError(
                    f"attention_mask is for {visibility.num_keys} keys, but attention has {num_keys}: the first keys "
                    "are in a cache that the layer did not get; pass it with the batch, and train without activation "
                    "checkpointing, which drops it"
                )
            # A sliding layer's cache has dropped its oldest keys.
            visibility = visibility.last_keys(num_keys)
        if sliding_window is not None:
            visibility = visibility.windowed(sliding_window)
        # Cloned: a view of the mask that is remembered on the mask would keep both alive forever.
        return Visibility(visibility.first.clone(), visibility.end.clone())

    return remembered_on((attention_mask,), (is_cross, num_keys, sliding_window), build)
