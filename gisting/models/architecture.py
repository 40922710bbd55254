"""What generation needs from a kind of model, and which kind a family is.

Place in the flow: models -> **generation**. Decoders and encoder-decoders differ in where a prompt's states are and how
stock ``generate`` continues from them. The modules ``decoder`` and ``encoder_decoder`` each implement
:class:`Architecture`; :func:`architecture_of` is the only place that chooses between them. What only one kind has (an
assistant model, a cache after the answers, an encoder's full text) generation takes from that kind's module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from gisting.cache import CacheOrigin, GistCache
from gisting.models import decoder, encoder_decoder
from gisting.models.registry import Family
from gisting.tokens import GistEncoding, GistTokenizer

__all__ = ["Architecture", "architecture_of"]


class Architecture(Protocol):
    """How prompts are compressed and inputs are answered on one kind of model."""

    def has_prefix_states(self, condition: str) -> bool:
        """Return whether a prompt run under ``condition`` leaves states that a cache can hold."""
        ...

    def prefix_states(
        self, model: PreTrainedModel, tokenizer: GistTokenizer, encodings: Sequence[GistEncoding], origin: CacheOrigin
    ) -> GistCache:
        """Run a ragged batch of prompts and keep the states that survive.

        Args:
            model: a patched model of this kind.
            tokenizer: the tokenizer it was patched for.
            encodings: B prompts with their gists, and nothing after them.
            origin: what the states will belong to; its condition is the mask to use.

        Returns:
            A cache of B prompts on the model's device.
        """
        ...

    def check_settings(self, model: PreTrainedModel, config: Any, assistant_model: PreTrainedModel | None) -> None:
        """Raise if this kind of model cannot generate with these settings.

        Args:
            model: the model that will generate.
            config: a ``GenerationConfig`` with all settings filled in.
            assistant_model: the model that drafts, or None.

        Raises:
            GistError: it cannot; the message says why.
        """
        ...

    def take_cache_settings(self, model: PreTrainedModel, config: Any, implementation: str) -> dict[str, Any]:
        """Move the cache settings out of ``config``, except those that stock ``generate`` must read itself.

        Args:
            model: the model that will generate.
            config: a ``GenerationConfig``, which is changed.
            implementation: which transformers cache to use.

        Returns:
            Arguments for ``GistCache.as_past_key_values``.

        Raises:
            GistError: this kind of model cannot use that cache.
        """
        ...

    def check_can_converse(self, model: PreTrainedModel) -> None:
        """Raise if ``model`` cannot keep the states of an answer for the next turn.

        Raises:
            GistError: it cannot; the message says why.
        """
        ...

    def group_rows(
        self,
        model: PreTrainedModel,
        cache: GistCache,
        continuations: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        takes_padding: bool,
    ) -> list[list[int]]:
        """Decide which rows can run in one batch.

        Args:
            model: the model that will generate.
            cache: B compressed prompts.
            continuations: the ids that follow each gist.
            new_tokens: the largest number of new tokens.
            takes_padding: whether padding may precede an input.

        Returns:
            Row numbers, grouped by batch.

        Raises:
            GistError: a row leaves the model nothing to continue.
        """
        ...

    def prepare_generation(
        self,
        model: PreTrainedModel,
        tokenizer: GistTokenizer,
        cache: GistCache,
        continuations: Sequence[Sequence[int]],
        num_copies: int = 1,
        **past_settings: Any,
    ) -> tuple[dict[str, Any], int]:
        """Make the arguments with which stock ``generate`` answers a ragged batch.

        Args:
            model: a patched model of this kind.
            tokenizer: the tokenizer it was patched for.
            cache: B compressed prompts.
            continuations: the ids that follow each gist.
            num_copies: beams or samples per row.
            **past_settings: what :meth:`take_cache_settings` returned.

        Returns:
            The arguments, and how many columns of the result come before the answer.
        """
        ...

    def answer_logits(
        self,
        model: PreTrainedModel,
        tokenizer: GistTokenizer,
        prefix: GistCache | None,
        befores: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
    ) -> Tensor:
        """Run answers after what comes before them, in one pass.

        Gradients flow into the states of the prefix, unless they are switched off.

        Args:
            model: a patched model of this kind.
            tokenizer: the tokenizer it was patched for.
            prefix: states of one prompt that precede every row, or None.
            befores: B lists of ids, at least one id each, up to where the answer begins.
            answers: B lists of ids, at least one id each.

        Returns:
            The logits ``(T, V)`` that predict each of the answers' T tokens, one answer after the other.
        """
        ...


def architecture_of(family: Family) -> Architecture:
    """Return the module that implements :class:`Architecture` for models of ``family``."""
    return encoder_decoder if family.is_encoder_decoder else decoder
