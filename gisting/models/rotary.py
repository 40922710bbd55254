"""How a model rotates its keys, read from the loaded model.

Place in the flow: attention -> **models** -> cache, which keeps it so that gists can be chained without the model. The
frequencies are those in the loaded model, however its config defines them; which layers rotate, and how numbers are
paired, ``check`` finds by trying.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from gisting.models.registry import is_length_dependent
from gisting.rotary import Rotary

__all__ = ["layer_frequencies", "rotary_of"]


def layer_frequencies(model: PreTrainedModel) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]] | None:
    """Return the distinct sets of inverse frequencies of a decoder, and the number of each layer's set.

    If they depend on the length (dynamic NTK, longrope), they are those below the length at which they change: only
    there is a cache exact, and longer ones are refused. Return None for a model that does not keep them where
    transformers' own models do, and for latent attention (DeepSeek): there a cache holds what keys are computed from.

    Args:
        model: a decoder.
    """
    config: Any = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        return None
    embedding: Any = getattr(model.base_model, "rotary_emb", None)
    name = "original_inv_freq" if is_length_dependent(config) else "inv_freq"
    layer_types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    # One set for all layers, or one per type of layer (Gemma 3).
    prefixes = [""] if hasattr(embedding, name) else sorted({f"{layer_type}_" for layer_type in layer_types})
    if not all(hasattr(embedding, prefix + name) for prefix in prefixes):
        return None
    sets = tuple(tuple(getattr(embedding, prefix + name).float().tolist()) for prefix in prefixes)
    return sets, tuple(prefixes.index(f"{layer_type}_" if prefixes[0] else "") for layer_type in layer_types)


def rotary_of(model: PreTrainedModel) -> Rotary | None:
    """Return the rotation of every layer's keys of ``model``.

    Which layers rotate and how numbers are paired was found when the model was checked (``gisting.check_model``).
    Return None for an encoder-decoder, whose keys are not rotated, and if it is not known.
    """
    found = ((getattr(model.config, "gist", None) or {}).get("checked") or {}).get("rotary")
    frequencies = None if found is None else layer_frequencies(model)
    if found is None or frequencies is None:
        return None
    sets, numbers = frequencies
    layers = tuple(number if rotates else None for number, rotates in zip(numbers, found["layers"], strict=True))
    return Rotary(sets, layers, found["is_interleaved"])
