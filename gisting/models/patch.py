"""Switch a transformers model over to gist attention, and back.

Place in the flow: before everything that runs a model. ``patch`` gives the gist token its embedding, sets the
attention function on every sub-stack, puts a guard before the stack that reads ids, and hooks T5's kind of relative
bias (arXiv 1910.10683); ``unpatch`` undoes all of it. What the model was patched for is in ``model.config.gist``, so a
saved checkpoint is recognised when it is loaded and patched again.
"""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gisting._compat import cache_argument, require_transformers
from gisting.device import assert_on_device
from gisting.errors import GistError, GistTokenError, UnsupportedModelError
from gisting.models import relative_bias
from gisting.models.adapters import adapter_of, detach
from gisting.models.check import prove
from gisting.models.hooks import remove_hooks
from gisting.models.registry import (
    attention_name,
    family_of,
    is_length_dependent,
    position_limit,
    register_attention,
)
from gisting.models.stacks import attention_of, set_attention
from gisting.models.state import (
    PATCH_FORMAT,
    Undo,
    check_recorded,
    end_with,
    guarded_stack,
    is_patched,
    require_patched,
)
from gisting.models.weights import input_weight, keep_form, row_tensors
from gisting.tokens import GistTokenizer
from gisting.visibility import is_interval_mask

__all__ = ["PATCH_FORMAT", "guarded_stack", "is_patched", "patch", "require_patched", "unpatch"]

# Both are asserted on a device as well, so each has at most ``MAX_MESSAGE_BYTES``.
_UNMASKED = (
    "input_ids hold gist tokens, but attention_mask does not say what they hide; generate with gisting.generate, or "
    "with cache.as_past_key_values() and exactly the cache's gist tokens in front; train with the mask of GistCollator "
    "or of a Visibility"
)
_TOO_LONG = (
    "position_ids span more positions than the model's rotary frequencies cover unchanged; shorten the prompt or the "
    "input"
)
Model = TypeVar("Model", bound=PreTrainedModel)


def patch(model: Model, tokenizer: GistTokenizer, *, check: bool = True) -> Model:
    """Make ``model`` understand gist tokens and interval masks, in place. :func:`unpatch` undoes it.

    The gist token gets an input embedding row (and an output row, if untied) at the mean of the rows before it; the
    vocabulary grows by one if it has no spare row. If the tokenizer itself has the gist token, its row was trained and
    is kept. Attention goes through ``interval_attention`` whenever ``attention_mask`` is a
    ``Visibility.as_attention_mask()``, and otherwise through the implementation that the model used before, so text
    without gist tokens gives exactly the same bits. Gist tokens are suppressed in ``generation_config``, so they are
    never generated, and the tokenizer's end of sequence is one of the ends there, so an answer ends where it was taught
    to end.

    Any model is accepted in which gists are exact, which :func:`~gisting.models.check.check_model` tries with a few
    forward passes. The proof is kept in ``config.gist``: a saved checkpoint is checked again only with other versions
    of torch, transformers or gisting, or if its config was changed. A model on the meta device or sharded over several
    processes cannot be run here, and is accepted without.

    A model that was patched, saved and loaded is recognised by ``config.gist`` and keeps its rows.

    Args:
        model: a causal or encoder-decoder language model.
        tokenizer: the tokenizer that the model is used with.
        check: whether to try the model first. False accepts it with a warning; then gists may be wrong, and cannot be
            chained.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModelError: gists would be wrong in the model; the message says which comparison failed, with the
            error, its bound and the likely reason.
        GistError: an argument has the wrong type, or the model was patched for another tokenizer.
    """
    require_transformers()
    if not isinstance(model, PreTrainedModel):
        raise GistError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if not isinstance(tokenizer, GistTokenizer):
        raise GistError(
            f"tokenizer must be a GistTokenizer, got {type(tokenizer).__name__}; wrap it: GistTokenizer(tokenizer)"
        )
    family = family_of(model.config)
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language model head; load it with AutoModelForCausalLM or "
            "AutoModelForSeq2SeqLM"
        )
    if family.is_encoder_decoder != tokenizer.is_encoder_decoder:
        kind = "an encoder-decoder" if family.is_encoder_decoder else "a decoder"
        raise GistError(
            f"{type(model).__name__} is {kind}, but the tokenizer is not for one; make it with GistTokenizer(..., "
            f"is_encoder_decoder={family.is_encoder_decoder})"
        )
    recorded = getattr(model.config, "gist", None)
    if recorded is not None:
        check_recorded(recorded, tokenizer)
        if is_patched(model):
            return model
    attention = attention_of(model)
    gist_attention = {name: attention_name(base) for name, base in attention.items()}
    if getattr(model.config, "attn_logit_softcapping", None) is not None and "sdpa" in attention.values():
        # Until about 5.18 transformers ran such a model on sdpa and ignored the softcap.
        raise UnsupportedModelError(
            f"{model.config.model_type} has a softcap, which attn_implementation='sdpa' ignores; load the model "
            "with attn_implementation='eager'"
        )
    if family.is_encoder_decoder and not any(
        getattr(part, "is_causal", False) for part in model.get_decoder().modules()
    ):
        # UMT5 before transformers 5.18, where stock training lets the decoder look ahead.
        raise UnsupportedModelError(
            f"this version of transformers does not mark the decoder of {model.config.model_type} as causal; upgrade "
            "it: pip install 'transformers>=5.18'"
        )
    keep_form(model)
    if check:
        proof = prove(model)
    else:
        proof = None
        warnings.warn(
            f"{model.config.model_type} is patched without a check, so its gists may be wrong; "
            "gisting.check_model(model) tries it",
            stacklevel=2,
        )

    undo = Undo(attention=attention, ends=getattr(model.generation_config, "eos_token_id", None))
    model._gist_undo = undo  # pyright: ignore[reportArgumentType]
    try:
        register_attention()
        if recorded is None:
            model.config.gist = {
                "format": PATCH_FORMAT,
                "gist_token_id": tokenizer.gist_token_id,
                "num_embeddings": input_weight(model).shape[0],
                "tokenizer": tokenizer.fingerprint,
                "template": tokenizer.template.name,
            }
            _add_rows(model, tokenizer, undo)
        if proof is not None:
            model.config.gist["checked"] = proof
        set_attention(model, gist_attention)
        _suppress(model, tokenizer.gist_token_id)
        end_with(model.generation_config, tokenizer)
        guarded_stack(model).register_forward_pre_hook(
            functools.partial(_guard, gist_token_id=tokenizer.gist_token_id), with_kwargs=True
        )
        if not family.is_encoder_decoder:
            _check_ids_before_cached_gists(model, tokenizer.gist_token_id)
        relative_bias.install(model)
    except BaseException:
        _restore(model, forget=recorded is None)
        raise
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`: restore weights, attention, generation settings and config exactly.

    Embedding rows that training has changed stay changed. The gist token's row is removed.

    Args:
        model: a patched model.

    Returns:
        ``model`` itself.

    Raises:
        GistError: the model is not patched.
    """
    if not is_patched(model):
        raise GistError("model is not patched; there is nothing to undo")
    _restore(model, forget=True)
    return model


def _guard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, gist_token_id: int) -> None:
    """Refuse gist tokens without a mask that says what they hide, because they would silently be read unmasked."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    config = module.config
    if is_interval_mask(mask):
        _check_interval_call(config, kwargs, mask)
        return
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or kwargs.get("gist_states") is not None:
        return
    if torch.compiler.is_compiling() or (ids.shape[1] == 1 and ids.device.type != "cpu"):
        # Reading the answer back would wait for the accelerator at every token.
        assert_on_device((ids != gist_token_id).all(), _UNMASKED)
    elif (ids == gist_token_id).any():
        raise GistTokenError(_UNMASKED)


def _check_ids_before_cached_gists(model: Any, gist_token_id: int) -> None:
    """Make stock ``generate`` check that the ids in place of a cached gist are gist tokens.

    Stock ``generate`` drops as many leading ids as a given cache has columns, without looking at them: a text without
    gist tokens in front would lose its first words. Assisted decoding fails to drop them, so they are dropped here. The
    only place that sees ids and cache together is ``prepare_inputs_for_generation``, so the model gets its own version
    of it, as an attribute.
    """
    inner = type(model).prepare_inputs_for_generation

    @functools.wraps(inner)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        held: Tensor | None = getattr(kwargs.get(cache_argument()), "gist_mask", None)
        if held is not None and kwargs.get("is_first_iteration"):
            in_front = input_ids[:, : held.shape[1]]
            # Once for each beam or sample, because generate repeats the ids.
            held = held.to(in_front.device).repeat_interleave(max(1, len(in_front) // len(held)), dim=0).bool()
            is_gist = held.shape == in_front.shape and bool((in_front[held] == gist_token_id).all())
            is_dropped = kwargs.get("next_sequence_length") is not None
            if is_gist and not is_dropped:
                kwargs["next_sequence_length"] = input_ids.shape[1] - held.shape[1]
            elif is_dropped and not is_gist:
                raise GistTokenError(
                    f"past_key_values holds {held.shape[1]} gist slots, but input_ids do not begin with as many gist "
                    f"tokens (id {gist_token_id}; any id where a slot is empty), so generate would drop that many ids "
                    "of the text; put them in front, or call gisting.generate(..., cache=cache)"
                )
        return inner(self, input_ids, **kwargs)

    model.prepare_inputs_for_generation = types.MethodType(prepare_inputs_for_generation, model)


def _check_interval_call(config: Any, kwargs: dict[str, Any], mask: Any) -> None:
    if kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise GistError(
            "output_router_logits needs a two-dimensional attention_mask, but an interval mask has four dimensions; "
            "set model.config.output_router_logits = False"
        )
    if not is_length_dependent(config):
        return
    limit, num_keys, positions = position_limit(config), mask.shape[-1], kwargs.get("position_ids")
    if limit is None:
        return
    span = num_keys if positions is None else (positions.amax(-1) - positions.amin(-1)).amax() + 1
    # A Visibility has no more positions than keys. If the keys fit, the assertion only concerns positions that came
    # from elsewhere, so it does not wait for the accelerator.
    if isinstance(span, Tensor) and (
        torch.compiler.is_compiling() or (span.device.type != "cpu" and num_keys <= limit)
    ):
        assert_on_device(span <= limit, _TOO_LONG)
    elif span > limit:
        raise GistError(
            f"position_ids span {int(span)} positions, but the rotary frequencies of {config.model_type} change beyond "
            f"{limit}; shorten the prompt or the input"
        )


def _add_rows(model: PreTrainedModel, tokenizer: GistTokenizer, undo: Undo) -> None:
    gist_token_id = tokenizer.gist_token_id
    if gist_token_id >= input_weight(model).shape[0]:
        _resize(model, gist_token_id + 1)
    elif tokenizer.has_own_gist_token:
        # The checkpoint was trained with this token, as the published ones were, so its row must stay.
        return
    else:
        undo.replaced_rows = [tensor[gist_token_id].clone() for tensor in row_tensors(model)]
    with torch.no_grad():
        for tensor in row_tensors(model):
            tensor[gist_token_id] = tensor[:gist_token_id].float().mean(0).to(tensor.dtype)


def _resize(model: PreTrainedModel, num_rows: int) -> None:
    """Change the number of embedding rows, and keep an untied output matrix untied.

    T5's config says that input and output are tied even if a checkpoint carries both (FLAN-T5), and resizing ties
    whatever the config says is tied.
    """
    head: Any = model.get_output_embeddings()
    own = None if head.weight is input_weight(model) else head.weight.detach().clone()
    requires_grad = head.weight.requires_grad
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    head = model.get_output_embeddings()
    if own is None or head.weight is not input_weight(model):
        return
    weight = own.new_zeros(num_rows, own.shape[1])
    kept = min(num_rows, own.shape[0])
    weight[:kept] = own[:kept]
    head.weight = nn.Parameter(weight, requires_grad=requires_grad)


def _suppress(model: PreTrainedModel, gist_token_id: int) -> None:
    config = model.generation_config
    if config is None:
        return
    kept = [token for token in config.suppress_tokens or [] if token != gist_token_id]
    config.suppress_tokens = [*kept, gist_token_id]


def _restore(model: PreTrainedModel, *, forget: bool) -> None:
    if adapter_of(model) is not None:
        detach(model)
    undo: Undo = model._gist_undo  # pyright: ignore[reportAssignmentType]
    for module in model.modules():
        remove_hooks(module, (_guard,))
    vars(model).pop("prepare_inputs_for_generation", None)
    relative_bias.uninstall(model)
    set_attention(model, undo.attention)
    recorded = getattr(model.config, "gist", None)
    if recorded is not None and model.generation_config is not None:
        kept = [token for token in model.generation_config.suppress_tokens or [] if token != recorded["gist_token_id"]]
        model.generation_config.suppress_tokens = kept or None
        model.generation_config.eos_token_id = undo.ends
    if forget and recorded is not None:
        if input_weight(model).shape[0] > recorded["num_embeddings"]:
            _resize(model, recorded["num_embeddings"])
        elif undo.replaced_rows is not None:
            with torch.no_grad():
                for tensor, row in zip(row_tensors(model), undo.replaced_rows, strict=True):
                    tensor[recorded["gist_token_id"]] = row
        delattr(model.config, "gist")
    del model._gist_undo
