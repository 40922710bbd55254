"""Checks that the arguments of compressing and generating fit each other and the model.

Place in the flow: before anything in ``gisting.generation`` runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from gisting.cache import GistCache
from gisting.errors import CacheMismatchError, GistError
from gisting.models.fingerprint import fingerprint
from gisting.models.registry import position_limit
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_condition", "check_count", "check_num_rows", "check_origin", "check_positions"]


def check_origin(model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache) -> None:
    """Raise unless ``cache`` was made by this ``model`` and ``tokenizer`` and has the model's dtype and device.

    Raises:
        CacheMismatchError: something differs; the message names both sides.
    """
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
    origin = cache.origin
    if origin.tokenizer != tokenizer.fingerprint:
        raise CacheMismatchError(
            f"cache was made with tokenizer {origin.tokenizer} (template {origin.template}), this one is "
            f"{tokenizer.fingerprint} (template {tokenizer.template.name}); compress the prompt again"
        )
    found = fingerprint(model)
    if origin.model != found:
        raise CacheMismatchError(f"cache was made for {origin.model}, this model is {found}; compress the prompt again")


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
