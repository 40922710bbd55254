"""The relative position bias of T5's kind as a table of distances, in place of a tensor as large as the scores.

Place in the flow: ``patch`` installs it on a model. Such an attention makes its bias ``(1, H, T, K)`` itself, before
any attention function is asked. Under an interval mask a hook puts ``(H, 2 W + 1)`` in its place, a number for each
distance ``j - i`` of key and row (arXiv 1910.10683, section 2.1), which the attention function knows by its two
dimensions. Under every other mask the model does what it always did. Knows no text and no kernel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gisting.models.hooks import remove_hooks
from gisting.visibility import is_interval_mask

__all__ = ["bias_table", "install", "table_width", "uninstall"]


def table_width(attention: Any) -> int | None:
    """W of a T5 ``attention``, the smallest distance from which all keys before a row share a bucket, and all keys
    behind it another.

    None where they never come to rest, so that no table holds them: the maximal distance is below that of the exact
    buckets.
    """
    # Otherwise buckets are exact, then logarithmic, and rest from the maximal distance on at the latest.
    rest = max(attention.relative_attention_max_distance, attention.relative_attention_num_buckets)
    buckets = _buckets(attention, torch.arange(-2 * rest, 2 * rest + 1, device="cpu")).tolist()
    before, behind = buckets[2 * rest :: -1], buckets[2 * rest :]
    width = max(_start_of_last_run(before), _start_of_last_run(behind))
    return width if width <= rest else None


def bias_table(attention: Any, width: int, device: torch.device) -> Tensor:
    """The bias of the distances ``-width .. width``, ``(H, 2 W + 1)`` in the dtype of the buckets' embedding.
    Differentiable to that embedding.

    Args:
        attention: of T5, with the embedding of the buckets.
        width: W.
        device: where the table goes.
    """
    # The model's own arithmetic for one row with as many keys on either side; the class's, for a hook may have hidden
    # it. The ends stand for all beyond, so they are read one further out, where no device's logarithm is rounded back
    # over the last boundary.
    reach = width + 1
    row = type(attention).compute_bias(attention, 1, 2 * reach + 1, device=device, past_seen_tokens=reach)[0, :, 0]
    return torch.cat([row[:, :1], row[:, 2:-2], row[:, -1:]], dim=1)


def install(model: nn.Module) -> None:
    """Hook every attention of ``model`` that declares a relative bias of T5's kind. Undone by :func:`uninstall`."""
    for attention in _attentions(model):
        names = tuple(inspect.signature(type(attention).forward).parameters)[1:]
        width = table_width(attention) if attention.has_relative_attention_bias else 0
        if width is None:
            continue
        if "position_bias" in names:
            hook = functools.partial(_give_table, names=names, width=width)
            attention.register_forward_pre_hook(hook, with_kwargs=True)
        elif attention.has_relative_attention_bias:
            # UMT5 takes no bias from outside: each layer has its own.
            hook = functools.partial(_compute_table, names=names, width=width)
            attention.register_forward_pre_hook(hook, with_kwargs=True)
            attention.register_forward_hook(functools.partial(_compute_bias_again))


def uninstall(model: nn.Module) -> None:
    """Leave nothing of :func:`install` on ``model``, nor on a copy of it."""
    for attention in _attentions(model):
        remove_hooks(attention, _HOOKS)
        attention.__dict__.pop("compute_bias", None)


def _attentions(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, "has_relative_attention_bias") and hasattr(module, "_relative_position_bucket"):
            yield module


def _buckets(attention: Any, distances: Tensor) -> Tensor:
    """The model's own buckets; T5 is told its settings, UMT5 knows them."""
    bucket = attention._relative_position_bucket
    if "bidirectional" not in inspect.signature(bucket).parameters:
        return bucket(distances)
    return bucket(
        distances,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )


def _start_of_last_run(values: list[int]) -> int:
    start = len(values) - 1
    while start > 0 and values[start - 1] == values[-1]:
        start -= 1
    return start


# -- hooks -------------------------------------------------------------------------------------------------------------


def _give_table(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...], width: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """T5 uses a bias that it is given, and hands it on to the layers above."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("position_bias") is not None or not is_interval_mask(_mask_of(given)):
        return None
    hidden = given["hidden_states"]
    if attention.has_relative_attention_bias:
        table = bias_table(attention, width, hidden.device)
    else:
        # None would make it write zeros of full size. One column is the same for all keys, so it changes no weight.
        table = hidden.new_zeros(attention.n_heads, 1)
    place = names.index("position_bias")
    if place < len(args):
        return (*args[:place], table, *args[place + 1 :]), kwargs
    return args, {**kwargs, "position_bias": table}


def _compute_table(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...], width: int
) -> None:
    """For the time of this call ``compute_bias`` gives the table."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if is_interval_mask(_mask_of(given)):
        attention.compute_bias = functools.partial(_table_for_any_length, attention, width)
    else:
        # Still there if the call before this one ended in an error.
        attention.__dict__.pop("compute_bias", None)


def _table_for_any_length(
    attention: Any, width: int, query_length: int, key_length: int, device: torch.device, past_seen_tokens: Any = 0
) -> Tensor:
    return bias_table(attention, width, device)


def _compute_bias_again(attention: Any, args: tuple[Any, ...], output: Any) -> None:
    attention.__dict__.pop("compute_bias", None)


_HOOKS = (_give_table, _compute_table, _compute_bias_again)


def _mask_of(given: dict[str, Any]) -> Any:
    """T5 calls it ``mask``, UMT5 ``attention_mask``."""
    return given.get("mask", given.get("attention_mask"))
