"""What of a model is trained: everything, or an adapter beside a frozen model.

Place in the flow: ``finetune`` asks here for what its ``method`` says; what the adapters are, and how they are saved,
is in ``models/adapters.py``. Knows how much of a model learns and what of it a training checkpoint needs; knows no data
and no loss.

=============== ======================================== ==================== ====================================
method          what learns                              ordinary text        use it for
=============== ======================================== ==================== ====================================
``full``        every weight                             changes              the published recipe
``lora``        LoRA everywhere, the gist token's row    changes              large models on one device
``gist-lora``   LoRA at gist tokens, the gist token's    same bits as before  many adapters beside one base model
                row
``embeddings``  a row for each place in a gist           same bits as before  the least to train; plain token rows
=============== ======================================== ==================== ====================================

LoRA is that of Hu and others (arXiv 2106.09685).

The last two serve at the base model's cost: a cached gist is keys and values, and behind it there is no gist token for
them to act on, so requests of any adapter, and of none, can share a batch of one base model
(``models.adapters.for_base_model``). They teach how a prompt is pressed, and cannot teach the model that reads the gist
anything: that one must know the task with the prompt in view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gisting.errors import GistError
from gisting.models.adapters import KINDS, Adapter, adapter_of, attach, check_num_gist_tokens

__all__ = ["METHODS", "Method", "TrainableCount", "checkpointing_what_learns", "count_parameters", "prepare"]

#: The four ways to train.
METHODS = ("full", *KINDS)


@dataclass(frozen=True)
class Method:
    """A way to train, where its name alone does not say enough.

    Args:
        name: one of :data:`METHODS`.
        rank: of LoRA.
        alpha: LoRA's scale times its rank; None for twice the rank.
        dropout: of LoRA.

    Raises:
        GistError: there is no such method.
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
    """Numbers of a model.

    Args:
        trainable: numbers that learn.
        total: all numbers.
    """

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters learn ({100 * self.trainable / self.total:.3g} %)"


def prepare(model: Any, method: str | Method, num_gist_tokens: int) -> TrainableCount:
    """Make a patched model learn as ``method`` says, in place: for all but ``full``, freeze it and attach an adapter.

    A model that has an adapter of this kind goes on with it.

    Args:
        model: a patched model.
        method: a name of :data:`METHODS`, or a :class:`Method`.
        num_gist_tokens: the largest k that is trained; for ``"embeddings"`` the number of rows.

    Returns:
        How much learns.

    Raises:
        GistError: there is no such method, the model has another adapter, or its adapter is for fewer gist tokens.
    """
    wanted = Method(method) if isinstance(method, str) else method
    found = adapter_of(model)
    kind = "full" if found is None else found.kind
    if found is None and wanted.name != "full":
        rows = num_gist_tokens if wanted.name == "embeddings" else 1
        attach(model, Adapter(wanted.name, rows, wanted.rank, wanted.alpha, wanted.dropout))
    elif kind != wanted.name:
        raise GistError(
            f"method is {wanted.name!r}, but the model has an adapter of kind {kind!r}; train that one on, or take it "
            "off first: gisting.models.adapters.detach(model)"
        )
    check_num_gist_tokens(model, num_gist_tokens)
    return count_parameters(model)


def count_parameters(model: Any) -> TrainableCount:
    """How many numbers of ``model`` learn, and how many it has; tied ones count once."""
    parameters = list(model.parameters())
    return TrainableCount(
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        sum(parameter.numel() for parameter in parameters),
    )


@contextmanager
def checkpointing_what_learns(model: Any) -> Iterator[None]:
    """While ``model`` is trained in this block, save checkpoints without what is frozen, which the base model's files
    hold.

    Trainer resumes from them: what they lack stays as it is.
    """
    if adapter_of(model) is None:
        yield
        return
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ignored, was_peft = model._keys_to_ignore_on_save, model._hf_peft_config_loaded
    model._keys_to_ignore_on_save = set(model.state_dict()) - learns
    # transformers would write peft's file, without the rows and in a form that Trainer does not resume from.
    model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        model._keys_to_ignore_on_save, model._hf_peft_config_loaded = ignored, was_peft
