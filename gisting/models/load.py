"""Load a checkpoint by name: model and tokenizer, patched for each other.

Place in the flow: a name -> **load** -> everything that runs a model. Reads checkpoints, adapters and the published
checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from gisting.errors import GistError
from gisting.models import adapters
from gisting.models.patch import patch
from gisting.models.published import ALPACA_STRIPPED, published
from gisting.models.registry import family_of, read_config
from gisting.models.weight_difference import looks_like_difference, refusal
from gisting.source import SOURCE_ARGUMENTS, find_file, local
from gisting.tokens import GistTokenizer, Template, read_tokenizer

__all__ = [
    "describe_missing",
    "load",
    "load_tokenizer",
    "saved_dtype",
    "trained_chunk_length",
    "trained_num_gist_tokens",
]


_PEFT = "adapter_config.json"


def load(
    name_or_path: str | Path, template: str | Template | None = None, **model_kwargs: Any
) -> tuple[PreTrainedModel, GistTokenizer]:
    """Load a model and its tokenizer and patch them.

    A checkpoint that was saved patched has its gist tokenizer with it. A checkpoint of the published code has the gist
    token in its tokenizer, and keeps it. Any other gets a new gist token, which it must learn by training. A directory
    with an adapter (:mod:`gisting.models.adapters`) names its base model, which is loaded and frozen. What peft saved
    of a model that was patched before ``get_peft_model`` (as ``SFTTrainer(peft_config=...)`` does) is merged into its
    base model, which it names; the template is in the ``gist.json`` of either, or must be given.

    Args:
        name_or_path: a directory, or a repository on the Hugging Face hub.
        template: as for :class:`GistTokenizer`; None for the one that the checkpoint was saved with, for the one that
            a published decoder was trained with (:data:`~gisting.models.published.ALPACA_STRIPPED`), or for what
            :class:`GistTokenizer` takes: the chat template of a decoder's tokenizer, else Alpaca.
        **model_kwargs: for the model's ``from_pretrained``: ``dtype``, ``device_map``, ...; those that say where files
            come from (``revision``, ``token``, ...) are used for config and tokenizer as well.

    Returns:
        The patched model, in eval mode, and its tokenizer.

    Raises:
        UnsupportedModelError: the model cannot be gisted correctly.
        GistError: there is no such checkpoint, one of its files is damaged, some of its weights are in no file, it is
            a weight difference, or it was saved with another template.
    """  # noqa: DOC501
    name_or_path = local(name_or_path)
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
        found = find_file(name_or_path, _PEFT, **source)
        if found is not None:
            return _load_merged(name_or_path, found, template, source, model_kwargs)
        raise
    family_of(config)  # before the weights are fetched
    if (getattr(config, "gist", None) or {}).get("adapter") is not None:
        raise GistError(
            f"{name_or_path} is a training checkpoint of an adapter, which holds neither the base model nor a finished "
            "adapter; resume from it, or load the directory that training writes when it ends"
        )
    tokenizer = _tokenizer_for(config, name_or_path, template, source)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _read_weights(auto, name_or_path, model_kwargs)
    if tokenizer.has_own_gist_token and looks_like_difference(model):
        raise refusal(name_or_path)
    patch(model, tokenizer)
    if known is not None:
        model.config.gist.update(known.about_gists)
    return model.eval(), tokenizer


def load_tokenizer(name_or_path: str | Path, template: str | Template | None = None, **source: Any) -> GistTokenizer:
    """Load the tokenizer that :func:`load` returns, without the weights.

    Args:
        name_or_path: as for :func:`load`.
        template: as for :func:`load`.
        **source: where files come from: ``revision``, ``token``, ...

    Raises:
        GistError: there is no such checkpoint, or one of its files is damaged.
    """
    name_or_path = local(name_or_path)
    if find_file(name_or_path, "gist.json", **source) is not None and template is None:
        return GistTokenizer.from_pretrained(name_or_path, **source)
    return _tokenizer_for(read_config(name_or_path, **source), name_or_path, template, source)


def _tokenizer_for(
    config: Any, name_or_path: str | Path, template: str | Template | None, source: dict[str, Any]
) -> GistTokenizer:
    if getattr(config, "gist", None) is not None and template is None:
        return GistTokenizer.from_pretrained(name_or_path, **source)
    wrapped = read_tokenizer(name_or_path, **source)
    tokenizer = GistTokenizer(wrapped, template, is_encoder_decoder=bool(config.is_encoder_decoder))
    if template is None and tokenizer.has_own_gist_token and not tokenizer.is_encoder_decoder:
        return GistTokenizer(wrapped, ALPACA_STRIPPED)
    return tokenizer


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
        model = _read_weights(auto, base, model_kwargs)
    except (OSError, ValueError) as error:
        raise GistError(f"{name_or_path} needs its base model {base}, which cannot be loaded ({error})") from error
    patch(model, tokenizer)
    adapters.load(model, name_or_path, **source)
    return model.eval(), tokenizer


def _load_merged(
    name_or_path: str | Path,
    about: str,
    template: str | Template | None,
    source: dict[str, Any],
    model_kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, GistTokenizer]:
    """Load what peft saved of a patched model that was trained inside a ``PeftModel``, merged into its base model."""
    from peft import PeftModel

    try:
        base = json.loads(Path(about).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (LookupError, TypeError, ValueError) as error:
        raise GistError(f"{about} is damaged ({error}); get the adapter again") from error
    if not base:
        raise GistError(f"{name_or_path} does not name its base model; set base_model_name_or_path in {about}")
    base_kwargs = {key: value for key, value in model_kwargs.items() if key not in ("revision", "subfolder")}
    base_source = {key: value for key, value in source.items() if key not in ("revision", "subfolder")}
    if template is None:
        for place, how in ((name_or_path, source), (base, base_source)):
            if find_file(place, "gist.json", **how) is not None:
                tokenizer = GistTokenizer.from_pretrained(place, **how)
                break
        else:
            raise GistError(
                f"{name_or_path} is an adapter of peft, and neither it nor its base model {base} says with which "
                f"template it was trained; give it: gisting.load({str(name_or_path)!r}, template=...), or save the "
                "tokenizer next to it: tokenizer.save_pretrained(directory)"
            )
    else:
        config = read_config(base, **base_source)
        wrapped = read_tokenizer(base, **base_source)
        tokenizer = GistTokenizer(wrapped, template, is_encoder_decoder=bool(config.is_encoder_decoder))
    auto = AutoModelForSeq2SeqLM if tokenizer.is_encoder_decoder else AutoModelForCausalLM
    try:
        model = _read_weights(auto, base, base_kwargs)
    except (OSError, ValueError) as error:
        raise GistError(f"{name_or_path} needs its base model {base}, which cannot be loaded ({error})") from error
    patch(model, tokenizer)
    merged: Any = PeftModel.from_pretrained(model, str(name_or_path), **source)
    return merged.merge_and_unload().eval(), tokenizer


def _read_weights(auto: Any, name_or_path: str | Path, model_kwargs: dict[str, Any]) -> Any:
    """Load a model, and refuse files that lack some of its weights, which transformers fills with random numbers."""
    try:
        model, about = auto.from_pretrained(name_or_path, **{**model_kwargs, "output_loading_info": True})
    except (
        *(SafetensorError, UnpicklingError, EOFError),
        *(AttributeError, LookupError, TypeError, RuntimeError),  # RuntimeError: of RecursionError too
    ) as error:
        is_archive = isinstance(error, RecursionError) or "PytorchStreamReader" in str(error)
        if isinstance(error, RuntimeError) and not is_archive:
            raise  # out of memory, or weights of other shapes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise GistError(
            f"{name_or_path}: a weight file or its index is damaged ({reason:.300}); fetch the checkpoint again"
        ) from error
    fault = describe_missing(about)
    if fault is not None:
        raise GistError(f"{name_or_path}: {fault}")
    return model


def describe_missing(about: Mapping[str, Any]) -> str | None:
    """Describe the weights that a checkpoint lacks, and what to do, or return None if it lacks none.

    Args:
        about: what ``from_pretrained(output_loading_info=True)`` says about the weights.
    """
    missing = sorted(map(str, about["missing_keys"]))
    if not missing:
        return None
    is_adapted = any(".base_layer." in str(name) for name in about["unexpected_keys"])
    advice = (
        "the model was saved with peft's adapters in it: load it as it was when it was trained, merge them with "
        "PeftModel.merge_and_unload() and save the result"
        if is_adapted
        else "save or fetch the checkpoint again"
    )
    return (
        f"{len(missing)} of the model's weights are in none of its files, {missing[0]} among them, and would be "
        f"random; {advice}"
    )


def saved_dtype(name_or_path: str | Path) -> str | None:
    """Return the dtype of a checkpoint's weights as its config names it, such as ``"bfloat16"``.

    None if it names none, and for an adapter.

    Args:
        name_or_path: a directory, or a repository on the hub.
    """
    try:
        found = read_config(local(name_or_path)).dtype
    except GistError:
        return None
    return None if found is None else str(found).removeprefix("torch.")


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
