"""transformers' ``pipeline("text-generation")`` behind compressed prompts.

Place in the flow: generation -> **pipeline**. A text-generation pipeline whose calls take ``cache=``; everything else
is the stock pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, TextGenerationPipeline

from gisting._compat import pipeline_settings
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.generation import generate
from gisting.models.patch import require_patched
from gisting.tokens import GistTokenizer

__all__ = ["GistTextGenerationPipeline"]

# What the stock pipeline does to texts and answers, and why it is not done where a cache is given.
_STOCK_ONLY = {
    "return_full_text": "its prompt is no text any more",
    "return_text": "answers are texts",
    "return_tensors": "answers are texts; call gisting.generate or model.generate",
    "return_type": "answers are texts",
    "clean_up_tokenization_spaces": "answers are decoded by the GistTokenizer",
    "prefix": "texts are laid out by the template of the GistTokenizer",
    "stop_sequence": "give stop_strings",
    "batch_size": "texts of one call are one batch; call with fewer",
    "num_workers": "no loader stands in front of the model",
}


class GistTextGenerationPipeline(TextGenerationPipeline):
    """A text-generation pipeline that answers texts behind compressed prompts.

    Made by ``pipeline("text-generation", model=model, tokenizer=tokenizer,
    pipeline_class=GistTextGenerationPipeline)`` or directly. Without ``cache`` a call is the stock pipeline's, on
    ordinary text.

    Args:
        model: a patched decoder.
        tokenizer: the :class:`GistTokenizer` that it was patched for.
        **kwargs: as for the stock pipeline.

    Raises:
        GistError: the model is not patched for this tokenizer, or is an encoder-decoder.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: GistTokenizer, **kwargs: Any) -> None:
        if require_patched(model, tokenizer).is_encoder_decoder:
            raise GistError(
                f"text-generation is for decoders, {model.config.model_type} is an encoder-decoder; call "
                "gisting.generate"
            )
        # Only what changes an answer: a stock call's batch size may stand beside calls with a cache.
        own = _STOCK_ONLY.keys() - {"batch_size", "num_workers"}
        self._stock_only = {name: value for name, value in kwargs.items() if name in own}
        super().__init__(model=model, tokenizer=tokenizer.tokenizer, **kwargs)
        self.gist_tokenizer = tokenizer

    def __call__(self, text_inputs: Any, *, cache: GistCache | None = None, **kwargs: Any) -> Any:
        """Answer one text or several, in the stock pipeline's form.

        Args:
            text_inputs: a text, or a list of texts.
            cache: the compressed prompts, one for all texts or one each; None for the stock pipeline.
            **kwargs: settings for :func:`gisting.generate`, on top of those that the pipeline was made with and of the
                stock pipeline's defaults (which sample).

        Returns:
            For one text a list of ``{"generated_text": answer}``, one for each returned sequence; for several a list of
            such lists.

        Raises:
            GistError: an input is a chat or no text; something is asked for, here or where the pipeline was made, that
                the stock pipeline does to texts (``return_full_text``, ``prefix``, ...); or as
                :func:`gisting.generate`.
        """
        if cache is None:
            return super().__call__(text_inputs, **kwargs)
        is_one = isinstance(text_inputs, str)
        texts: Sequence[str] = [text_inputs] if is_one else text_inputs
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise GistError(
                "text_inputs must be a text or a list of texts where a cache is given; the chat around them is the "
                "template of the GistTokenizer"
            )
        # The call's word counts, as with the stock pipeline.
        for name, value in {**self._stock_only, **kwargs}.items():
            if name in _STOCK_ONLY and not (value is None or value is False):
                raise GistError(f"{name} must be left out where a cache is given: {_STOCK_ONLY[name]}")
        kwargs = {name: value for name, value in kwargs.items() if name not in _STOCK_ONLY}
        settings = pipeline_settings(self, {**self._forward_params, **kwargs})
        answers = generate(self.model, self.gist_tokenizer, texts, cache=cache, **settings)
        each = len(answers) // max(1, len(texts))
        results = [
            [{"generated_text": answer} for answer in answers[row * each : (row + 1) * each]]
            for row in range(len(texts))
        ]
        return results[0] if is_one else results
