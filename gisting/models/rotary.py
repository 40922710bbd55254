"""How a model rotates its keys, read from the loaded model.

Place in the flow: attention -> **models** -> cache, which keeps it so that gists can be chained without the model. The
frequencies are those in the loaded model, however its config defines them; config and ``Family`` declare which layers
rotate, and how numbers are paired.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from gisting.models.registry import family_of, is_length_dependent
from gisting.rotary import Rotary

__all__ = ["rotary_of"]


def rotary_of(model: PreTrainedModel) -> Rotary | None:
    """Return the rotation of every layer's keys of ``model``.

    Return None for an encoder-decoder, whose keys are not rotated, and for a model that does not keep its frequencies
    where transformers' own models do. If the frequencies depend on the length (dynamic NTK, longrope), return those
    below the length at which they change: only there is a cache exact, and longer ones are refused.

    Raises:
        UnsupportedModelError: the model's family is not supported.
    """
    config: Any = model.config
    family = family_of(config)
    if family.is_encoder_decoder:
        return None
    embedding: Any = getattr(model.base_model, "rotary_emb", None)
    name = "original_inv_freq" if is_length_dependent(config) else "inv_freq"
    layer_types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    # One set for all layers, or one per type of layer (Gemma 3).
    prefixes = [""] if hasattr(embedding, name) else sorted({f"{layer_type}_" for layer_type in layer_types})
    if not all(hasattr(embedding, prefix + name) for prefix in prefixes):
        return None
    sets = [tuple(getattr(embedding, prefix + name).float().tolist()) for prefix in prefixes]
    # 1 for each layer that rotates (SmolLM 3).
    is_rotated = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    if family.rotates_windows_only:
        is_rotated = [
            config.sliding_window is not None and layer_type == "sliding_attention" for layer_type in layer_types
        ]
    layers = [
        prefixes.index(f"{layer_type}_" if prefixes[0] else "") if is_rotating else None
        for layer_type, is_rotating in zip(layer_types, is_rotated, strict=True)
    ]
    return Rotary(tuple(sets), tuple(layers), family.is_interleaved)
