"""Trained parts that act at gist tokens alone: rows of embedding of their own, and LoRA whose update stays there.

Place in the flow: ``adapters`` installs these hooks on a patched model whose own weights are frozen. What they act on
comes with the call: where ``attention_mask`` is an interval mask, a hook before the stack that reads ids works out
which tokens are gist tokens, and which token of its gist each one is. Without an interval mask there are none (the
guard of ``patch`` refuses them), so ordinary text, and every decoding step from a cached gist, runs the frozen model
and nothing else: the same bits at the same cost, whatever adapter made the cache. Knows no peft and no files.

Places travel in a context variable, so that threads can share a model, and as a keyword that the stack hands to its
layers: activation checkpointing calls a layer again long after the stack has returned, with the keywords of the call
that it repeats.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gisting.errors import GistError
from gisting.models.hooks import remove_hooks
from gisting.visibility import is_interval_mask

__all__ = ["GistOnlyLora", "gist_places", "gists_at", "install", "uninstall"]

_KEYWORD = "gist_places"


class _Call(NamedTuple):
    places: Tensor  # (B, T)
    index: Tensor | None  # (G,), where the places are 0 and more; None where only the device knows how many there are
    rows: Tensor | None  # (num_rows, d_model)


_call: ContextVar[_Call | None] = ContextVar("gist_call", default=None)
_given_index: ContextVar[Tensor | None] = ContextVar("gist_index", default=None)


@contextmanager
def gists_at(index: Tensor | None) -> Iterator[None]:
    """A block in which models with gist-only LoRA are told where the gist tokens of their input stand, so that its two
    matrices are applied to those alone. An accelerator cannot be asked without waiting for it, so there they are
    otherwise applied to every token, and what is not a gist token's is dropped.

    Args:
        index: int64 ``(G,)``: numbers of the gist tokens counted through the batch (``row * T + column``), on the
            device of the model; None to leave it to the model.
    """
    before = _given_index.set(index)
    try:
        yield
    finally:
        _given_index.reset(before)


def gist_places(input_ids: Tensor, position_ids: Tensor | None, gist_token_id: int) -> Tensor:
    """Which token of its gist each id is, and -1 for all that are none::

        ids        a  b  G  G  G  c        G1 g1 G2 g2      chained: copies stand between, at the same position
        positions -2 -1  0  1  2  3         0  0  1  1
        places    -1 -1  0  1  2 -1         0  0  1  1

    Args:
        input_ids: int64 ``(B, T)``.
        position_ids: int64 ``(B, T)`` or ``(1, T)``; None where they count up by one (encoders).
        gist_token_id: the id of all gist tokens.

    Returns:
        int64 ``(B, T)``. A copy that a control turns into padding may be counted one too far.
    """
    is_gist = input_ids == gist_token_id
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    positions = index if position_ids is None else position_ids.expand_as(input_ids)
    is_start = is_gist & ~nn.functional.pad(is_gist[:, :-1], (1, 0), value=False)
    start = torch.where(is_start, index, 0).cummax(1).values
    return torch.where(is_gist, positions - positions.gather(1, start), -1)


class GistOnlyLora:
    """LoRA (arXiv 2106.09685) whose update is added at gist tokens and nowhere else.

    A variant in peft's sense: it stands in ``LoraLayer.lora_variant`` and is asked for the output of a layer. It
    selects rather than multiplies by a mask, so other tokens keep the frozen layer's bits, and a NaN there stays there.
    Made of static methods alone, so that it is copied and pickled with its model.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result + B A x * scaling`` where there is a gist token, ``result`` elsewhere.

        Args:
            module: peft's layer.
            active_adapter: whose A and B.
            x: ``(..., d_in)``, floating point, what the layer reads; a vector for each token.
            result: ``(..., d_out)``, floating point, what the frozen layer gives.

        Returns:
            ``(..., d_out)`` in the dtype of ``result``.

        Raises:
            GistError: ``x`` has not a vector for each token of the batch.
        """
        call = _call.get()
        if call is None:
            return result
        if call.places.numel() != x.shape[:-1].numel():
            raise GistError(
                f"a layer with gist-only LoRA was given {tuple(x.shape)}, not a vector for each of the "
                f"{tuple(call.places.shape)} tokens, so it cannot tell which are gist tokens; leave it out of the "
                "targets"
            )
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if call.index is not None:
            x = x.flatten(0, -2).index_select(0, call.index)
        update = up(down(module.lora_dropout[active_adapter](x.to(down.weight.dtype)))) * module.scaling[active_adapter]
        update = update.to(result.dtype)
        if call.index is not None:
            return result.flatten(0, -2).index_add(0, call.index, update).view_as(result)
        return torch.where((call.places >= 0).view(*x.shape[:-1], 1), result + update, result)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused: a merged weight would act on every token. Arguments as peft gives them.

        Raises:
            GistError: always.
        """
        raise GistError(
            "gist-only LoRA cannot be merged, for a merged weight acts on every token; keep it beside the model"
        )

    merge_unsafe = unmerge = merge_safe


def install(model: Any, stack: Any, rows: nn.Parameter | None, *, has_lora: bool) -> None:
    """Let ``rows`` stand in for the embedding of gist tokens, and ``GistOnlyLora`` know where they are.

    Args:
        model: a patched model.
        stack: its stack that reads ids, as :func:`gisting.models.patch.guarded_stack` gives it.
        rows: ``(num_rows, d_model)``: one for all gist tokens, or one for each place in a gist. None for the table's.
        has_lora: whether layers of the stack hold a ``GistOnlyLora``.
    """
    stack.register_parameter("gist_rows", rows)
    announce = functools.partial(_announce, gist_token_id=model.config.gist["gist_token_id"], has_lora=has_lora)
    stack.register_forward_pre_hook(announce, with_kwargs=True)
    stack.register_forward_hook(functools.partial(_withdraw))
    stack.get_input_embeddings().register_forward_hook(functools.partial(_give_rows))
    for module in _holders(stack) if has_lora else ():
        module.register_forward_pre_hook(functools.partial(_receive), with_kwargs=True)


def uninstall(model: nn.Module) -> None:
    """Leave nothing of :func:`install` on ``model``, nor on a copy of it."""
    for module in model.modules():
        module._parameters.pop("gist_rows", None)
        remove_hooks(module, _HOOKS)


def _holders(stack: Any) -> Iterator[nn.Module]:
    """What lies between the layers of the stack and what peft has wrapped: attention, MLP, and what holds those.

    The layers themselves are left out: transformers checkpoints their ``forward``, so their hooks are not run again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in stack.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for module in layer.modules():
                is_wrapped = hasattr(module, "lora_variant")
                if module is not layer and not is_wrapped and any(hasattr(m, "lora_variant") for m in module.modules()):
                    yield module


def _announce(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, gist_token_id: int, has_lora: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    ids = kwargs.get("input_ids", args[0] if args else None)
    # An encoder that reads placeholders, whose states come from a cache, has an ordinary mask.
    if not is_interval_mask(mask) or not isinstance(ids, Tensor):
        _call.set(None)
        return args, kwargs
    places = gist_places(ids, kwargs.get("position_ids"), gist_token_id)
    index = _given_index.get()
    if index is None and ids.device.type == "cpu" and not torch.compiler.is_compiling():
        index = (places.flatten() >= 0).nonzero()[:, 0]
    _call.set(_Call(places, index, module.gist_rows))
    return args, {**kwargs, _KEYWORD: (places, index)} if has_lora else kwargs


def _withdraw(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _call.set(None)


def _receive(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Take the places out of the keywords, of which no attention function knows. In every layer attention comes first,
    so what stands behind it finds them in the context.
    """
    if _KEYWORD not in kwargs:
        return None
    kwargs = dict(kwargs)
    places, index = kwargs.pop(_KEYWORD)
    _call.set(_Call(places, index, None))
    return args, kwargs


def _give_rows(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    call = _call.get()
    if call is None or call.rows is None:
        return output
    rows = call.rows.to(module.weight.dtype)
    scale = getattr(module, "embed_scale", None)
    if scale is not None:  # Gemma: the embedding scales what it looks up.
        rows = rows * scale.to(rows.dtype)
    places = call.places.clamp(0, rows.shape[0] - 1)
    return torch.where((call.places >= 0)[..., None], rows[places].to(output.dtype), output)


_HOOKS = (_announce, _withdraw, _receive, _give_rows)
