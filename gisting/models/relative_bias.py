"""The relative position bias of T5-like models as a table of distances, instead of a tensor as large as the scores.

Place in the flow: ``patch`` installs it on a model. T5's attention makes its bias ``(1, H, T, K)`` itself, before it
calls an attention function. Under an interval mask, a hook replaces it by ``(H, 2 W + 1)``, a number for each distance
``j - i`` of key and row (arXiv 1910.10683, section 2.1), which the attention function recognises by its two dimensions.
Under every other mask the model does what it does unpatched.
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
    """Return W of a T5 ``attention``, the half width of its table.

    It is the smallest distance from which all keys before a row share a bucket, and all keys after it share another.
    Return None if there is no such distance, so that no table can hold the bias: the maximal distance is below that of
    the exact buckets.
    """
    # Otherwise buckets are exact, then logarithmic, and constant from the maximal distance at the latest.
    rest = max(attention.relative_attention_max_distance, attention.relative_attention_num_buckets)
    buckets = _buckets(attention, torch.arange(-2 * rest, 2 * rest + 1, device="cpu")).tolist()
    before, after = buckets[2 * rest :: -1], buckets[2 * rest :]
    width = max(_start_of_last_run(before), _start_of_last_run(after))
    return width if width <= rest else None


def bias_table(attention: Any, width: int, device: torch.device) -> Tensor:
    """Return the bias of the distances ``-width .. width``, ``(H, 2 W + 1)`` in the dtype of the buckets' embedding.

    It is differentiable with respect to that embedding.

    Args:
        attention: a T5 attention with the embedding of the buckets.
        width: W.
        device: where the table goes.
    """
    # The model's own arithmetic for one row with equally many keys on either side. The class's method, because a hook
    # may have replaced the instance's. The ends apply to all larger distances, so they are read one further out, where
    # no device's logarithm is rounded back over the last boundary.
    reach = width + 1
    row = type(attention).compute_bias(attention, 1, 2 * reach + 1, device=device, past_seen_tokens=reach)[0, :, 0]
    return torch.cat([row[:, :1], row[:, 2:-2], row[:, -1:]], dim=1)


def install(model: nn.Module) -> None:
    """Hook every attention of ``model`` that declares a T5-like relative bias. :func:`uninstall` undoes this."""
    for attention in _attentions(model):
        names = tuple(inspect.signature(type(attention).forward).parameters)[1:]
        width = table_width(attention) if attention.has_relative_attention_bias else 0
        if width is None:
            continue
        if "position_bias" in names:
            hook = functools.partial(_give_table, names=names, width=width)
            attention.register_forward_pre_hook(hook, with_kwargs=True)
        elif attention.has_relative_attention_bias:
            # UMT5 takes no bias as an argument: each layer computes its own.
            hook = functools.partial(_compute_table, names=names, width=width)
            attention.register_forward_pre_hook(hook, with_kwargs=True)
            attention.register_forward_hook(functools.partial(_restore_compute_bias))


def uninstall(model: nn.Module) -> None:
    """Remove what :func:`install` put on ``model``, or on the model it was copied from."""
    for attention in _attentions(model):
        remove_hooks(attention, _HOOKS)
        attention.__dict__.pop("compute_bias", None)


def _attentions(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, "has_relative_attention_bias") and hasattr(module, "_relative_position_bucket"):
            yield module


def _buckets(attention: Any, distances: Tensor) -> Tensor:
    """The model's own buckets. T5's function takes the settings as arguments, UMT5's reads them from the module."""
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
    """Pass T5 a bias, which it uses and passes on to the layers above."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("position_bias") is not None or not is_interval_mask(_mask_of(given)):
        return None
    hidden = given["hidden_states"]
    if attention.has_relative_attention_bias:
        table = bias_table(attention, width, hidden.device)
    else:
        # With None it would make zeros of full size. One column is the same for all keys, so it changes no weight.
        table = hidden.new_zeros(attention.n_heads, 1)
    place = names.index("position_bias")
    if place < len(args):
        return (*args[:place], table, *args[place + 1 :]), kwargs
    return args, {**kwargs, "position_bias": table}


def _compute_table(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...], width: int
) -> None:
    """Make ``compute_bias`` return the table during this call."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if is_interval_mask(_mask_of(given)):
        attention.compute_bias = functools.partial(_table_for_any_length, attention, width)
    else:
        # Still there if the previous call raised an error.
        attention.__dict__.pop("compute_bias", None)


def _table_for_any_length(
    attention: Any, width: int, query_length: int, key_length: int, device: torch.device, past_seen_tokens: Any = 0
) -> Tensor:
    return bias_table(attention, width, device)


def _restore_compute_bias(attention: Any, args: tuple[Any, ...], output: Any) -> None:
    attention.__dict__.pop("compute_bias", None)


_HOOKS = (_give_table, _compute_table, _restore_compute_bias)


def _mask_of(given: dict[str, Any]) -> Any:
    """The attention mask, which T5 calls ``mask`` and UMT5 ``attention_mask``."""
    return given.get("mask", given.get("attention_mask"))
