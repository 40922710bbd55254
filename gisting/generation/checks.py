"""Checks that the arguments of compressing and generating fit each other and the model.

Place in the flow: before anything in ``gisting.generation`` runs a model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import TYPE_CHECKING, Any

from gisting.cache import GistCache
from gisting.errors import CacheMismatchError, GistError
from gisting.models.adapters import checkpoint_name
from gisting.models.fingerprint import base_fingerprint, fingerprint
from gisting.models.load import trained_num_gist_tokens
from gisting.models.registry import position_limit
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "check_condition",
    "check_count",
    "check_finite",
    "check_num_rows",
    "check_origin",
    "check_positions",
    "chosen_k",
    "listed",
]


_log = logging.getLogger(__name__)
# The numbers of gist tokens, other than the trained ones, that were reported for a model.
_reported: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
# For a model, the fingerprint and the replaced rows for which its base fingerprint was computed, which takes as long as
# the fingerprint itself.
_bases: weakref.WeakKeyDictionary[Any, tuple[str, Any, str]] = weakref.WeakKeyDictionary()


def chosen_k(model: PreTrainedModel, num_gist_tokens: int | Sequence[int] | None) -> int | Sequence[int]:
    """Return how many gist tokens to use: as many as asked for, or else the most that ``model`` was trained with.

    A number that the model was not trained with is used, and reported once for each model.

    Args:
        model: a patched model.
        num_gist_tokens: what the caller asked for, or None.

    Returns:
        ``num_gist_tokens``; without it the largest that the model was trained with, or 1 for a model whose config does
        not say.

    Raises:
        GistError: it is no whole number, and no list of them.
    """
    trained = trained_num_gist_tokens(model)
    if num_gist_tokens is None:
        return 1 if trained is None else trained[1]
    given: Any = num_gist_tokens
    is_one = isinstance(given, Integral)
    wanted = [given] if is_one else listed("num_gist_tokens", given, "whole numbers")
    if any(isinstance(k, bool) or not isinstance(k, Integral) for k in wanted):
        raise GistError(f"num_gist_tokens must be a whole number, or a list of them, got {given!r:.100}")
    wanted = [int(k) for k in wanted]
    if trained is not None:
        reported = _reported.setdefault(model, set())
        others = {k for k in wanted if not trained[0] <= k <= trained[1]} - reported
        if others:
            reported |= others
            _log.warning(
                "num_gist_tokens is %s, but the model was trained with %s, so its answers may be much worse; leave "
                "num_gist_tokens out to use as many as in training",
                ", ".join(map(str, sorted(others))),
                trained[0] if trained[0] == trained[1] else f"{trained[0]} to {trained[1]}",
            )
    return wanted[0] if is_one else wanted


def listed(name: str, values: Iterable[Any], of_what: str = "texts") -> list[Any]:
    """Return what the argument ``name`` holds as a list: a list, a tuple, an array, a column, a generator.

    Args:
        name: the argument's name, for the message.
        values: its value.
        of_what: what it should hold, for the message.

    Raises:
        GistError: it is one text, or nothing that holds several values.
    """
    if isinstance(values, str | bytes):
        raise GistError(f"{name} must be a list of {of_what}, got one text; put it in a list")
    if isinstance(values, Mapping | Set) or not isinstance(values, Iterable):
        raise GistError(f"{name} must be a list of {of_what}, got {type(values).__name__}")
    return list(values)


def check_origin(model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache) -> None:
    """Raise unless ``cache`` was made by this ``model`` and ``tokenizer`` and has the model's dtype and device.

    Raises:
        CacheMismatchError: something differs; the message names both sides.
    """
    origin = cache.origin
    what = f"cache {origin.name}" if origin.name else "cache"
    if origin.tokenizer != tokenizer.fingerprint:
        raise CacheMismatchError(
            f"{what} was made with tokenizer {origin.tokenizer} (template {origin.template}), this one is "
            f"{tokenizer.fingerprint} (template {tokenizer.template.name}); compress the prompt again"
            + ("" if origin.template == tokenizer.template.name else f", or load with template={origin.template!r}")
        )
    weight = input_weight(model)
    if cache.dtype != weight.dtype:
        raise CacheMismatchError(
            f"cache has dtype {cache.dtype}, the model {weight.dtype}; compress the prompt again, or cast: "
            f"cache.to(dtype={weight.dtype})"
        )
    if cache.device != weight.device:
        raise CacheMismatchError(
            f"cache is on {cache.device}, the model on {weight.device}; move it: cache.to({str(weight.device)!r})"
        )
    found = fingerprint(model)
    # A gist of an adapter that acts at gist tokens only is for the stock model, with which this one may share all else.
    if origin.model != found and origin.model != _base(model, found):
        name = checkpoint_name(model)
        raise CacheMismatchError(
            f"{what} was made {origin.maker}, this model is {f'{name} ({found})' if name else found}; compress the "
            "prompt again"
        )


def _base(model: PreTrainedModel, found: str) -> str:
    """Return the base fingerprint of ``model``, whose own is ``found``, and remember it for as long as that stays so.

    Beside what ``found`` covers, it depends on the rows that ``patch`` replaced, which another ``patch`` keeps again.
    """
    replaced = getattr(getattr(model, "_gist_undo", None), "replaced_rows", None)
    known = _bases.get(model)
    if known is None or known[0] != found or known[1] is not replaced:
        _bases[model] = known = (found, replaced, base_fingerprint(model))
    return known[2]


def check_condition(condition: str) -> None:
    """Raise unless ``condition`` has a mask.

    Raises:
        GistError: it does not.
    """
    if condition not in CONDITIONS:
        raise GistError(f"condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")


def check_count(name: str, value: Any) -> None:
    """Raise unless the argument ``name`` has a ``value`` that is a whole number of at least 1.

    Raises:
        GistError: it does not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise GistError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise GistError(f"{name} must be at least 1, got {value}")


def check_finite(cache: GistCache) -> None:
    """Raise unless the states of compressed prompts are numbers.

    Raises:
        GistError: they hold NaN or infinity.
    """
    if not cache.is_finite():
        raise GistError(
            f"the states of {'a prompt' if len(cache) > 1 else 'the prompt'} hold NaN or infinity: the model overflows "
            f"in {str(cache.dtype).removeprefix('torch.')}, or its weights do; load it in bfloat16 or float32"
        )


def check_num_rows(name: str, num_rows: int, num_inputs: int) -> None:
    """Raise unless the argument ``name`` has one row, or ``num_rows`` equals ``num_inputs``.

    Raises:
        CacheMismatchError: the numbers differ.
    """
    if num_rows not in (1, num_inputs):
        raise CacheMismatchError(f"{name} must be one for all {num_inputs} inputs or one each, got {num_rows}")


def check_positions(model: PreTrainedModel, lengths: Sequence[int], what: str, with_what: str) -> None:
    """Raise if a row takes more positions than the model has.

    Args:
        model: the model to run.
        lengths: the number of positions of each row.
        what: what a row is, for the message.
        with_what: what else is counted, for the message.

    Raises:
        GistError: a row is too long.
    """
    limit = position_limit(model.config)
    for row, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise GistError(
                f"{what} {row} with {with_what} takes {length} positions, {model.config.model_type} has {limit}; "
                "shorten it"
            )
