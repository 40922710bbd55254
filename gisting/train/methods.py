"""Which parameters of a model are trained: all, or an adapter on a frozen model.

Place in the flow: ``finetune`` prepares a model here as its ``method`` says; what the adapters are, and how they are
saved, is in ``models/adapters.py``. Knows which parameters are trained and which of them a training checkpoint needs;
does not depend on data or losses.

=============== ======================================== ==================== ====================================
method          what is trained                          ordinary text        use it for
=============== ======================================== ==================== ====================================
``full``        every weight                             changes              the published recipe
``lora``        LoRA everywhere, the gist token's row    changes              large models on one device
``gist-lora``   LoRA at gist tokens, one embedding row   same bits as before  many adapters with one base model
                per token of a gist
``embeddings``  one embedding row per token of a gist    same bits as before  the fewest trained parameters
=============== ======================================== ==================== ====================================

LoRA is described by Hu and others (arXiv 2106.09685).

The last two cost nothing in serving: a cached gist consists of keys and values, and no gist token comes after it for
them to act on. So requests with any adapter, or with none, can share a batch of one base model
(``models.adapters.reader_fingerprint``). They teach the model to compress a prompt, but not to read the gist: the base
model must already be able to do the task with the prompt visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gisting.errors import GistError
from gisting.models.adapters import KINDS, Adapter, adapter_of, attach, check_num_gist_tokens

__all__ = ["METHODS", "Method", "TrainableCount", "checkpointing_what_learns", "count_parameters", "prepare"]

#: The names of the methods.
METHODS = ("full", *KINDS)


@dataclass(frozen=True)
class Method:
    """A training method with its settings.

    Args:
        name: one of :data:`METHODS`.
        rank: rank of LoRA's matrices.
        alpha: LoRA's scale times its rank; None for twice the rank.
        dropout: LoRA's dropout.

    Raises:
        GistError: the name is unknown.
    """

    name: str
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise GistError(f"method must be one of {', '.join(METHODS)}, got {self.name!r}")


@dataclass(frozen=True)
class TrainableCount:
    """The size of a model.

    Args:
        trainable: number of trained parameters.
        total: number of parameters.
    """

    trainable: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} of {self.total:,} parameters are trained ({100 * self.trainable / self.total:.3g} %)"
        )


def prepare(model: Any, method: str | Method, num_gist_tokens: int) -> TrainableCount:
    """Prepare a patched model for training, in place: for all methods but ``full``, freeze it and attach an adapter.

    If the model already has an adapter of this kind, that adapter is trained further.

    Args:
        model: a patched model.
        method: a name of :data:`METHODS`, or a :class:`Method`.
        num_gist_tokens: the largest k that is trained; for ``"gist-lora"`` and ``"embeddings"`` the number of rows.

    Returns:
        The number of trained parameters.

    Raises:
        GistError: the method is unknown, the model has an adapter of another kind, or its adapter is for fewer gist
            tokens.
    """
    wanted = Method(method) if isinstance(method, str) else method
    found = adapter_of(model)
    kind = "full" if found is None else found.kind
    if found is None and wanted.name != "full":
        rows = 1 if wanted.name == "lora" else num_gist_tokens
        attach(model, Adapter(wanted.name, rows, wanted.rank, wanted.alpha, wanted.dropout))
    elif kind != wanted.name:
        raise GistError(
            f"method is {wanted.name!r}, but the model has an adapter of kind {kind!r}; train that adapter, or remove "
            "it first: gisting.models.adapters.detach(model)"
        )
    check_num_gist_tokens(model, num_gist_tokens)
    return count_parameters(model)


def count_parameters(model: Any) -> TrainableCount:
    """Count the parameters of ``model``, and those that are trained; tied ones count once."""
    parameters = list(model.parameters())
    return TrainableCount(
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        sum(parameter.numel() for parameter in parameters),
    )


@contextmanager
def checkpointing_what_learns(model: Any) -> Iterator[None]:
    """Save checkpoints without frozen parameters while ``model`` is trained in this block.

    Frozen parameters are in the files of the base model. Trainer can resume from such checkpoints: parameters that they
    lack stay unchanged.
    """
    if adapter_of(model) is None:
        yield
        return
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ignored, was_peft = model._keys_to_ignore_on_save, model._hf_peft_config_loaded
    model._keys_to_ignore_on_save = set(model.state_dict()) - trained
    # Otherwise transformers writes peft's file, which lacks the rows and from which Trainer cannot resume.
    model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        model._keys_to_ignore_on_save, model._hf_peft_config_loaded = ignored, was_peft
