"""Read a model's input embedding as a plain tensor, whose dtype and device represent the model's, and change the dtype.

Place in the flow: below everything that needs the dtype or device of a model, its tables with a row for each token, or
to know whether its weights are quantised.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gisting.errors import GistError

__all__ = ["input_weight", "is_quantised", "keep_form", "row_tensors", "to_dtype"]


def input_weight(model: PreTrainedModel) -> Tensor:
    """Return the input embedding of ``model``, ``(vocabulary, d_model)``, in its own dtype.

    Args:
        model: any model.
    """
    return cast(Tensor, model.get_input_embeddings().weight)


def row_tensors(model: PreTrainedModel) -> list[Tensor]:
    """Return the tensors with a row for each token: input embedding, untied output weight, and output bias.

    Args:
        model: a model with a language model head.
    """
    tensors = [input_weight(model)]
    head: Any = model.get_output_embeddings()
    if head.weight is not tensors[0]:
        tensors.append(head.weight)
    if getattr(head, "bias", None) is not None:
        tensors.append(head.bias)
    return [tensor.detach() for tensor in tensors]


def to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of a model's floating-point parameters, in place; gradients are dropped.

    Buffers stay as they are: rotary frequencies lose precision in 16 bits. Sharded parameters (``DTensor``) are changed
    in every process.

    Args:
        model: any model.
        dtype: the new dtype.
    """
    model.zero_grad(set_to_none=True)
    # Unlike an assignment to ``parameter.data``, this also reaches the shards of FSDP2.
    model._apply(
        lambda tensor: tensor.to(dtype) if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor
    )


def is_quantised(model: PreTrainedModel) -> bool:
    """Return whether some weights of ``model`` are quantised, so that its layers may compute in 16 bits or fewer.

    Args:
        model: any model.
    """
    return getattr(model.config, "quantization_config", None) is not None


def keep_form(model: PreTrainedModel) -> None:
    """Have quantised weights keep the form they were loaded in, in place.

    In a forward pass without gradients on a CPU, bitsandbytes rewrites 4-bit weights for its own kernel: their scales
    are rounded, no gradient passes any more, and what ``state_dict`` then makes of them is not what was loaded. It is
    told not to; the weights are then expanded for each use, as in training.

    What transformers unpacked when it read a GGUF file is not quantised any more, though its config says so; that entry
    is removed, so that the model can be trained and saved like any other.

    Args:
        model: any model.

    Raises:
        GistError: the weights were already rewritten.
    """
    if not is_quantised(model):
        return
    for name, module in model.named_modules():
        if not hasattr(module, _REWRITES):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise GistError(
                f"the 4-bit weights of {name} were rewritten by bitsandbytes when the model ran on the CPU, with other "
                "scales than they were loaded with; load the model again and call gisting.patch or gisting.fingerprint "
                "before it runs"
            )
        setattr(module, _REWRITES, False)
    # Of weights that were read in 4 bits, transformers keeps a conversion that it cannot turn round when it saves them.
    about: Any = model
    kept = getattr(about, "_weight_conversions", None) or ()
    if any(type(step).__name__ == "Bnb4bitDeserialize" for one in kept for step in getattr(one, "operations", ())):
        about._weight_conversions = None
    method = getattr(getattr(about, "hf_quantizer", None), "quantization_config", None)
    if getattr(method, "quant_method", None) == "gguf" and all(
        tensor.is_floating_point() for tensor in model.state_dict().values()
    ):
        about.hf_quantizer, about.is_quantized = None, False
        del about.config.quantization_config


# The attribute of bitsandbytes' layers which says that they may rewrite their weights.
_REWRITES = "support_avx512bf16_for_cpu"
