"""What a config says about gisting its model, and the attention function that reads intervals.

Place in the flow: visibility -> attention -> **models** -> cache. The only module that writes to transformers'
registries. Dispatch is on what a config declares (``is_encoder_decoder``, ``layer_types``, ``rope_parameters``), never
on a class or a list of names; whether gists are exact in a model, ``check`` tries.
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
    "EncoderStates",
    "Family",
    "attention_name",
    "base_name",
    "family_of",
    "is_length_dependent",
    "position_limit",
    "read_config",
    "register_as",
    "register_attention",
    "sliding_windows",
]


@dataclass(frozen=True)
class Family:
    """What a config declares about its model. Whether gists are exact in it, ``gisting.check_model`` tries.

    Args:
        model_type: as the config declares it.
        is_encoder_decoder: whether it has an encoder, whose states hold the compressed prompt.
    """

    model_type: str
    is_encoder_decoder: bool = False


# What the dozen tokens of a check cannot show, and no entry of a config says.
_REFUSED = {"longt5": "its encoder attends in local blocks, not through a mask"}

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
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
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


def family_of(config: PreTrainedConfig) -> Family:
    """Return what a ``config`` declares, after refusing what rules a model out and a check of few tokens cannot show.

    Raises:
        UnsupportedModelError: the model cannot be gisted; the message says why.
    """
    model_type = config.model_type
    if model_type in _REFUSED:
        raise UnsupportedModelError(f"{model_type} cannot be gisted: {_REFUSED[model_type]}")
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        raise UnsupportedModelError(
            f"{model_type} cannot be gisted: its config names no attention heads, and only attention can read a gist"
        )
    if getattr(text, "vocab_size_per_layer_input", None):
        raise UnsupportedModelError(
            f"{model_type} cannot be gisted: it has embeddings for every layer, with no row for a gist token"
        )
    unknown = set(getattr(text, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown:
        raise UnsupportedModelError(
            f"{model_type} has layers of type {', '.join(sorted(unknown))}; gisting supports "
            f"{', '.join(sorted(_KNOWN_LAYERS))}"
        )
    if getattr(text, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            f"{model_type} with use_bidirectional_attention cannot be gisted: its tokens see later ones, so a prompt "
            "has no prefix states"
        )
    if getattr(text, "attn_temperature_tuning", None):
        raise UnsupportedModelError(
            f"{model_type} with attn_temperature_tuning cannot be gisted: it scales attention by how many tokens come "
            "before, which a gist makes fewer, at lengths that a short check does not reach"
        )
    rotary = _rotary_types(text) - _STATIC_ROPE - _LENGTH_DEPENDENT_ROPE
    if rotary:
        raise UnsupportedModelError(
            f"{model_type} has rotary positions of type {', '.join(sorted(rotary))}; gisting supports "
            f"{', '.join(sorted(_STATIC_ROPE | _LENGTH_DEPENDENT_ROPE))}"
        )
    return Family(model_type, bool(config.is_encoder_decoder))


def is_length_dependent(config: PreTrainedConfig) -> bool:
    """Return whether the rotary frequencies of a ``config`` change with the length of the batch.

    Those of dynamic NTK and longrope do.
    """
    return bool(_rotary_types(config.get_text_config()) & _LENGTH_DEPENDENT_ROPE)


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return how many positions ``config`` allows a sequence to span.

    None means relative positions without a limit (T5). If the rotary frequencies depend on the length, the limit is the
    length from which they do: up to it, a cached gist and the full text are rotated alike.
    """
    if getattr(config, "is_encoder_decoder", False):
        return None
    config = config.get_text_config()
    limits = [limit for limit in (getattr(config, "max_position_embeddings", None),) if limit]
    for parameters in _rotary_parameters(config):
        original = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE and original:
            limits.append(int(original))
    return min(limits, default=None)


def sliding_windows(config: PreTrainedConfig) -> int | None:
    """Return the smallest attention window of any layer of a ``config``, or None if every layer sees everything."""
    config = config.get_text_config()
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


def base_name(name: str) -> str:
    """Return the ``base`` for which :func:`attention_name` returns ``name``; any other name is returned as it is."""
    return next((base for base in _BASES if name == attention_name(base)), name)


def register_attention() -> None:
    """Register the attention functions, each with its mask function, without which padding would be lost.

    Calling it again changes nothing.
    """
    for base, (forward, mask) in _BASES.items():
        name = attention_name(base)
        AttentionInterface.register(name, functools.partial(_attention_forward, base_forward=forward))
        AttentionMaskInterface.register(name, mask)


def register_as(name: str, forward: _Forward, *, like: str) -> None:
    """Register an attention function under ``name``, with the masks of the attention ``like``, ``sdpa`` or ``eager``.

    Calling it again changes nothing.
    """
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, _BASES[like][1])


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
        sinks=kwargs.get("s_aux"),
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
