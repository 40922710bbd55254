"""How a model rotates its keys, read off the loaded model.

Place in the flow: attention -> **models** -> cache, which keeps it, so that gists can be chained without the model. The
frequencies are those that the model computes with, whatever its config came to; which layers turn, and how numbers are
paired, is what config and ``Family`` declare.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from gisting.models.registry import family_of, is_length_dependent
from gisting.rotary import Rotary

__all__ = ["rotary_of"]


def rotary_of(model: PreTrainedModel) -> Rotary | None:
    """The rotation of every layer's keys of ``model``; None for an encoder-decoder, whose keys are not rotated, and for
    a model that does not hold its frequencies where transformers' own models do.

    Where the frequencies depend on the length (dynamic NTK, longrope), those below the length at which they change: a
    cache is exact there alone, and refused beyond.

    Raises:
        UnsupportedModelError: the model is of no family that the tests prove.
    """
    config: Any = model.config
    family = family_of(config)
    if family.is_encoder_decoder:
        return None
    embedding: Any = getattr(model.base_model, "rotary_emb", None)
    name = "original_inv_freq" if is_length_dependent(config) else "inv_freq"
    layer_types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    # One set for all layers, or one for each type of layer (Gemma 3).
    prefixes = [""] if hasattr(embedding, name) else sorted({f"{layer_type}_" for layer_type in layer_types})
    if not all(hasattr(embedding, prefix + name) for prefix in prefixes):
        return None
    sets = [tuple(getattr(embedding, prefix + name).float().tolist()) for prefix in prefixes]
    # A one for each layer that turns (SmolLM 3).
    turns = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    if family.rotates_windows_only:
        turns = [config.sliding_window is not None and layer_type == "sliding_attention" for layer_type in layer_types]
    layers = [
        prefixes.index(f"{layer_type}_" if prefixes[0] else "") if is_turning else None
        for layer_type, is_turning in zip(layer_types, turns, strict=True)
    ]
    return Rotary(tuple(sets), tuple(layers), family.is_interleaved)
