"""Know whether a model is patched, and for which tokenizer.

Place in the flow: below ``patch``, which writes this state, and below everything that needs a patched model. What a
model was patched for is in ``model.config.gist``; what ``unpatch`` needs is on the model itself. Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gisting.errors import GistError
from gisting.models.registry import Family, family_of
from gisting.tokens import GistTokenizer

__all__ = ["PATCH_FORMAT", "Undo", "check_recorded", "end_with", "guarded_stack", "is_patched", "require_patched"]

#: The format of ``config.gist``. It goes up when this version can no longer read what earlier ones wrote.
PATCH_FORMAT = 1


@dataclass
class Undo:
    """What ``unpatch`` needs in addition to the config.

    It is on the model as ``_gist_undo`` and is copied with it.

    Args:
        attention: the attention implementation of every sub-model before it was patched, by the sub-model's name.
        replaced_rows: the embedding rows that the gist token's rows replaced, ``(d_model,)`` each and a scalar for a
            bias, in the model's dtype; None if rows were added instead.
        ends: ``generation_config.eos_token_id`` before the model was patched.
    """

    attention: dict[str, str] = field(default_factory=dict)
    replaced_rows: list[Tensor] | None = None
    ends: int | list[int] | None = None


def is_patched(model: nn.Module) -> bool:
    """Return whether ``model`` is patched now. A checkpoint that was saved patched must be patched again.

    Args:
        model: any module.
    """
    return getattr(model, "_gist_undo", None) is not None


def require_patched(model: PreTrainedModel, tokenizer: GistTokenizer) -> Family:
    """Return the family of ``model``, which must be patched for ``tokenizer``.

    Args:
        model: the model.
        tokenizer: the tokenizer it must be patched for.

    Raises:
        GistError: the model is not patched, or was patched for another tokenizer.
    """
    if not isinstance(tokenizer, GistTokenizer):
        raise GistError(
            f"tokenizer must be a GistTokenizer, got {type(tokenizer).__name__}; wrap it: GistTokenizer(tokenizer)"
        )
    if not is_patched(model):
        raise GistError(f"model ({type(model).__name__}) is not patched; call gisting.patch(model, tokenizer) first")
    check_recorded(model.config.gist, tokenizer)
    return family_of(model.config)


def check_recorded(recorded: dict[str, Any], tokenizer: GistTokenizer) -> None:
    """Check that ``config.gist`` can be read and names ``tokenizer``.

    Args:
        recorded: the value of ``config.gist``.
        tokenizer: the tokenizer that the model is used with.

    Raises:
        GistError: it has another format, or names another tokenizer.
    """
    if recorded.get("format") != PATCH_FORMAT:
        raise GistError(
            f"model.config.gist has format {recorded.get('format')}, this version reads {PATCH_FORMAT}; upgrade "
            "gisting: pip install -U gist-tokens"
        )
    if recorded["tokenizer"] != tokenizer.fingerprint:
        raise GistError(
            f"model was patched for tokenizer {recorded['tokenizer']} (template {recorded['template']}, gist token "
            f"id {recorded['gist_token_id']}), got {tokenizer.fingerprint} (template {tokenizer.template.name}, gist "
            f"token id {tokenizer.gist_token_id}); load the tokenizer that was saved with it: "
            "GistTokenizer.from_pretrained(directory)"
        )


def end_with(config: Any, tokenizer: GistTokenizer) -> None:
    """Let answers end at the tokenizer's end of sequence, with which every taught answer ends, in place.

    The two differ in many chat models that were made of a base model, whose generation settings still name the base
    model's end. Ends that ``config`` already has stay.

    Args:
        config: a ``GenerationConfig``, or None for a model that has none.
        tokenizer: the tokenizer whose end of sequence to add. One without an end of sequence adds nothing.
    """
    try:
        end = tokenizer.eos_token_id
    except GistError:
        return
    if config is None:
        return
    own = config.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else [int(one) for one in own]
    if end not in ends:
        config.eos_token_id = [*ends, end] if ends else end


def guarded_stack(model: PreTrainedModel) -> Any:
    """Return the stack of ``model`` that reads the prompt's ids, the one that ``patch`` guards.

    It is the stack inside the model with the head, because adapters call that stack's ``forward`` directly.

    Args:
        model: a decoder or an encoder-decoder.
    """
    return model.get_encoder() if family_of(model.config).is_encoder_decoder else model.base_model
