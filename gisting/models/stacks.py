"""The sub-models of a model, and which attention each of them runs.

Place in the flow: below ``check``, which changes it for a few forward passes, and ``patch``, which changes it to stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PreTrainedModel

__all__ = ["attention_of", "set_attention", "stacks"]


def stacks(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield every sub-model with its name, because each may have its own config.

    T5's encoder and decoder hold copies of the model's config, which no setter reaches.

    Args:
        model: any model.
    """
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield name, module


def attention_of(model: PreTrainedModel) -> dict[str, str]:
    """Return the attention implementation of every sub-model of ``model``, by the sub-model's name."""
    return {name: str(stack.config._attn_implementation) for name, stack in stacks(model)}


def set_attention(model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Set the attention implementation of every sub-model, in place.

    Args:
        model: any model.
        names: what :func:`attention_of` returns, or other names for the same sub-models.
    """
    for name, stack in stacks(model):
        if stack.config._attn_implementation != names[name]:
            stack.set_attn_implementation(names[name])
