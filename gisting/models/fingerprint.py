"""Whose states these are: a short name for the weights and configuration of a loaded model."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gisting.models.weights import input_weight

__all__ = ["fingerprint"]

_SAMPLES = 1024
# What a config holds beside the architecture: none of it changes a hidden state.
_IGNORED = {"architectures", "dtype", "gist", "torch_dtype", "transformers_version", "use_cache"}


def fingerprint(model: PreTrainedModel) -> str:
    """``model_type/`` and twelve hex digits of a SHA-256 over the configuration and a sample of every weight tensor.

    The sample: name and shape of each parameter, and of its values, as float32, up to 1,024 at equal distances, the
    last 1,024, and the whole embedding row of the gist token. Any training step, merged adapter or replaced tensor
    shows; an edit of single elements between the sampled ones would not.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED and key[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    samples: list[Tensor] = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            flat = parameter.detach().reshape(-1)
            stride = max(1, flat.numel() // _SAMPLES)
            samples += [flat[::stride][:_SAMPLES].float(), flat[-_SAMPLES:].float()]
        gist = getattr(model.config, "gist", None)
        if gist is not None:
            samples.append(input_weight(model)[gist["gist_token_id"]].detach().float())
        # One transfer: tensors may lie on an accelerator, and on several.
        device = samples[0].device if samples else torch.device("cpu")
        sampled = torch.cat([sample.to(device) for sample in samples]).cpu()
    digest.update(sampled.numpy().tobytes())
    return f"{model.config.model_type}/{digest.hexdigest()[:12]}"
