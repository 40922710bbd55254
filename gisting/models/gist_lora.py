"""Apply trained parts at gist tokens only: separate embedding rows, and a LoRA whose update is added nowhere else.

Place in the flow: ``adapters`` installs these hooks on a patched model whose own weights are frozen. If
``attention_mask`` is an interval mask, a hook before the stack that reads ids finds the gist tokens, and which of its
gist's tokens each one is. Without an interval mask there are none (the guard of ``patch`` refuses them), so ordinary
text, and every decoding step from a cached gist, runs only the frozen model: the same bits at the same cost, whichever
adapter made the cache. Independent of peft and of files.

Places are passed in a context variable, so that threads can share a model, and as a keyword argument from the stack to
its layers, because activation checkpointing calls a layer again long after the stack has returned, with the keyword
arguments of the original call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gisting.errors import GistError
from gisting.models.hooks import remove_hooks
from gisting.visibility import is_interval_mask

__all__ = ["GistOnlyLora", "gist_places", "gists_at", "install", "uninstall"]

_KEYWORD = "gist_places"


class _Call(NamedTuple):
    places: Tensor  # (B, T)
    index: Tensor | None  # (G,), where places >= 0; None if only the device knows how many there are
    rows: Tensor | None  # (num_rows, d_model)


_call: ContextVar[_Call | None] = ContextVar("gist_call", default=None)
_given_index: ContextVar[Tensor | None] = ContextVar("gist_index", default=None)


@contextmanager
def gists_at(index: Tensor | None) -> Iterator[None]:
    """Tell models with gist-only LoRA, within the block, where the gist tokens of their input are.

    LoRA's two matrices are then applied to those tokens only. Otherwise, on an accelerator, they are applied to every
    token and the results for other tokens are dropped, because looking for gist tokens would wait for the device.

    Args:
        index: int64 ``(G,)``: indices of the gist tokens in the flattened batch (``row * T + column``), on the device
            of the model; None to let the model find them.
    """
    before = _given_index.set(index)
    try:
        yield
    finally:
        _given_index.reset(before)


def gist_places(input_ids: Tensor, position_ids: Tensor | None, gist_token_id: int) -> Tensor:
    """Find which of its gist's tokens each id is; -1 for ids that are not gist tokens.

    On the right, gists are chained: each token has a copy (g1, g2) at the same position::

        ids        a  b  G  G  G  c        G1 g1 G2 g2
        positions -2 -1  0  1  2  3         0  0  1  1
        places    -1 -1  0  1  2 -1         0  0  1  1

    Args:
        input_ids: int64 ``(B, T)``.
        position_ids: int64 ``(B, T)`` or ``(1, T)``; None if they count up by one (encoders).
        gist_token_id: the id of all gist tokens.

    Returns:
        int64 ``(B, T)``. A copy that a control turns into padding may be one too high.
    """
    is_gist = input_ids == gist_token_id
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    positions = index if position_ids is None else position_ids.expand_as(input_ids)
    is_start = is_gist & ~nn.functional.pad(is_gist[:, :-1], (1, 0), value=False)
    start = torch.where(is_start, index, 0).cummax(1).values
    return torch.where(is_gist, positions - positions.gather(1, start), -1)


class GistOnlyLora:
    """LoRA (arXiv 2106.09685) whose update is added at gist tokens and nowhere else.

    This is a variant in peft's sense: peft finds it in ``LoraLayer.lora_variant`` and calls it for the output of a
    layer. It selects instead of multiplying by a mask, so other tokens keep the frozen layer's bits, and a NaN at one
    token does not spread. It only has static methods, so it is copied and pickled with its model.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Compute ``result + B A x * scaling`` at gist tokens and ``result`` elsewhere.

        Args:
            module: peft's layer.
            active_adapter: the name of the adapter whose A and B are used.
            x: ``(..., d_in)``, floating point, the input of the layer; a vector for each token.
            result: ``(..., d_out)``, floating point, the output of the frozen layer.

        Returns:
            ``(..., d_out)`` in the dtype of ``result``.

        Raises:
            GistError: ``x`` does not have one vector for each token of the batch.
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
        """Refuse to merge, because a merged weight would act on every token. Arguments as for ``peft``'s own variants.

        Raises:
            GistError: always.
        """
        raise GistError(
            "gist-only LoRA cannot be merged, because a merged weight acts on every token; keep the adapter unmerged"
        )

    merge_unsafe = unmerge = merge_safe


def install(model: Any, stack: Any, rows: nn.Parameter | None, *, has_lora: bool) -> None:
    """Use ``rows`` as the embeddings of gist tokens, and tell ``GistOnlyLora`` where the gist tokens are.

    Args:
        model: a patched model.
        stack: its stack that reads ids, from :func:`gisting.models.state.guarded_stack`.
        rows: ``(num_rows, d_model)``: one for all gist tokens, or one for each token of a gist. None to use the
            model's embedding table.
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
    """Remove everything that :func:`install` put on ``model``, or that a copy of such a model has.

    Args:
        model: any module.
    """
    for module in model.modules():
        module._parameters.pop("gist_rows", None)
        remove_hooks(module, _HOOKS)


def _holders(stack: Any) -> Iterator[nn.Module]:
    """Yield the modules between the layers of the stack and those that peft has wrapped: attention, MLP and the like.

    The layers themselves are left out, because activation checkpointing repeats their ``forward`` without their hooks.
    """
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
    # An encoder that reads placeholders whose states come from a cache has an ordinary mask.
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
    """Move the places from the keyword arguments, which attention functions do not take, to the context variable.

    Attention comes first in every layer, so the modules after it find the places there.
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
    if scale is not None:  # Gemma's embedding scales the rows that it looks up.
        rows = rows * scale.to(rows.dtype)
    places = call.places.clamp(0, rows.shape[0] - 1)
    return torch.where((call.places >= 0)[..., None], rows[places].to(output.dtype), output)


_HOOKS = (_announce, _withdraw, _receive, _give_rows)
