"""Load a checkpoint by name: model and tokenizer, patched for each other.

Place in the flow: a name -> **load** -> everything that runs a model. Reads checkpoints, adapters and the published
checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from gisting.errors import GistError
from gisting.models import adapters
from gisting.models.patch import patch
from gisting.models.published import ALPACA_STRIPPED, published
from gisting.models.registry import family_of, read_config
from gisting.models.weight_difference import looks_like_difference, refusal
from gisting.source import SOURCE_ARGUMENTS
from gisting.tokens import GistTokenizer, Template, read_tokenizer

__all__ = ["load", "trained_chunk_length", "trained_num_gist_tokens"]


def load(
    name_or_path: str | Path, template: str | Template | None = None, **model_kwargs: Any
) -> tuple[PreTrainedModel, GistTokenizer]:
    """Load a model and its tokenizer and patch them.

    A checkpoint that was saved patched has its gist tokenizer with it. A checkpoint of the published code has the gist
    token in its tokenizer, and keeps it. Any other gets a new gist token, which it must learn by training. A directory
    with an adapter (:mod:`gisting.models.adapters`) names its base model, which is loaded and frozen.

    Args:
        name_or_path: a directory, or a repository on the Hugging Face hub.
        template: as for :class:`GistTokenizer`; None for the one that the checkpoint was saved with, for the one that
            a published decoder was trained with (:data:`~gisting.models.published.ALPACA_STRIPPED`), or for the
            family's Alpaca template.
        **model_kwargs: for the model's ``from_pretrained``: ``dtype``, ``device_map``, ...; those that say where files
            come from (``revision``, ``token``, ...) are used for config and tokenizer as well.

    Returns:
        The patched model, in eval mode, and its tokenizer.

    Raises:
        UnsupportedModelError: the model cannot be gisted correctly.
        GistError: there is no such checkpoint, one of its files is damaged, it is a weight difference, or it was saved
            with another template.
    """  # noqa: DOC501
    known = published(name_or_path)
    if known is not None and known.is_difference:
        raise refusal(name_or_path)
    source = {key: value for key, value in model_kwargs.items() if key in SOURCE_ARGUMENTS}
    try:
        config = read_config(name_or_path, **source)
    except GistError:
        about = adapters.read_about(name_or_path, **source)
        if about is not None:
            return _load_with_adapter(name_or_path, about["base"], template, source, model_kwargs)
        raise
    family_of(config)  # before the weights are fetched
    if (getattr(config, "gist", None) or {}).get("adapter") is not None:
        raise GistError(
            f"{name_or_path} is a training checkpoint of an adapter, which holds neither the base model nor a finished "
            "adapter; resume from it, or load the directory that training writes when it ends"
        )
    if getattr(config, "gist", None) is not None and template is None:
        tokenizer = GistTokenizer.from_pretrained(name_or_path, **source)
    else:
        wrapped = read_tokenizer(name_or_path, **source)
        tokenizer = GistTokenizer(wrapped, template, is_encoder_decoder=bool(config.is_encoder_decoder))
        if template is None and tokenizer.has_own_gist_token and not tokenizer.is_encoder_decoder:
            tokenizer = GistTokenizer(wrapped, ALPACA_STRIPPED)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        model = auto.from_pretrained(name_or_path, **model_kwargs)
    except SafetensorError as error:
        raise GistError(f"{name_or_path}: a weight file is damaged ({error}); fetch the checkpoint again") from error
    if tokenizer.has_own_gist_token and looks_like_difference(model):
        raise refusal(name_or_path)
    patch(model, tokenizer)
    if known is not None:
        model.config.gist.update(known.about_gists)
    return model.eval(), tokenizer


def _load_with_adapter(
    name_or_path: str | Path,
    base: str,
    template: str | Template | None,
    source: dict[str, Any],
    model_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, GistTokenizer]:
    if template is not None:
        raise GistError("template must be None for an adapter, because the adapter was trained with the saved template")
    if not base:
        raise GistError(
            f"{name_or_path} does not name its base model, which had no name when the adapter was trained; load and "
            "patch the base model yourself, then call gisting.models.adapters.load(model, directory)"
        )
    tokenizer = GistTokenizer.from_pretrained(name_or_path, **source)
    auto = AutoModelForSeq2SeqLM if tokenizer.is_encoder_decoder else AutoModelForCausalLM
    # The revision is the adapter's; the base model's repository has other revisions.
    model_kwargs = {key: value for key, value in model_kwargs.items() if key not in ("revision", "subfolder")}
    try:
        model = auto.from_pretrained(base, **model_kwargs)
    except (OSError, ValueError) as error:
        raise GistError(f"{name_or_path} needs its base model {base}, which cannot be loaded ({error})") from error
    patch(model, tokenizer)
    adapters.load(model, name_or_path, **source)
    return model.eval(), tokenizer


def trained_num_gist_tokens(model: PreTrainedModel) -> tuple[int, int] | None:
    """Return the range of k that a model was trained with, as its config says, or None if it was not trained to gist.

    Args:
        model: any model.
    """
    found = (getattr(model.config, "gist", None) or {}).get("num_gist_tokens")
    return None if found is None else (found[0], found[1])


def trained_chunk_length(model: PreTrainedModel) -> int | None:
    """Return the chunk length that a model was trained with, as its config says, or None if its prompts were not cut.

    Args:
        model: any model.
    """
    return (getattr(model.config, "gist", None) or {}).get("chunk_length")
