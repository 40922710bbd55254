"""transformers' ``pipeline("text-generation")`` with compressed prompts.

Place in the flow: generation -> **pipeline**. A text-generation pipeline whose calls take ``cache=``; everything else
is the stock pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, TextGenerationPipeline

from gisting._compat import pipeline_settings
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.generation import generate
from gisting.models.state import require_patched
from gisting.tokens import GistTokenizer

__all__ = ["GistTextGenerationPipeline"]

# What the stock pipeline does to texts and answers, and why it is refused with a cache.
_STOCK_ONLY = {
    "return_full_text": "the compressed prompt is not text",
    "return_text": "answers are always texts",
    "return_tensors": "answers are always texts; call gisting.generate or model.generate",
    "return_type": "answers are always texts",
    "clean_up_tokenization_spaces": "the GistTokenizer decodes the answers",
    "prefix": "the template of the GistTokenizer lays out the texts",
    "stop_sequence": "give stop_strings",
    "batch_size": "the texts of one call are one batch; call with fewer",
    "num_workers": "no data loader is used",
}


class GistTextGenerationPipeline(TextGenerationPipeline):
    """A text-generation pipeline that answers texts after compressed prompts.

    Make it with ``pipeline("text-generation", model=model, tokenizer=tokenizer,
    pipeline_class=GistTextGenerationPipeline)``, or directly. A call without ``cache`` is a call of the stock pipeline,
    on ordinary text.

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
                f"text-generation works for decoders only, and {model.config.model_type} is an encoder-decoder; call "
                "gisting.generate"
            )
        # Only what changes an answer: a batch size for stock calls does not rule out calls with a cache.
        own = _STOCK_ONLY.keys() - {"batch_size", "num_workers"}
        self._stock_only = {name: value for name, value in kwargs.items() if name in own}
        super().__init__(model=model, tokenizer=tokenizer.tokenizer, **kwargs)
        self.gist_tokenizer = tokenizer

    def __call__(self, text_inputs: Any, *, cache: GistCache | None = None, **kwargs: Any) -> Any:
        """Answer one text or several, in the stock pipeline's form.

        Args:
            text_inputs: a text, or a list of texts. Under the template ``"chat"`` also a chat, or a list of chats: the
                messages after the system message, which the gist replaces.
            cache: the compressed prompts, one for all texts or one each; None for the stock pipeline.
            **kwargs: settings for :func:`gisting.generate`, in addition to the settings that the pipeline was made with
                and the stock pipeline's defaults (which sample).

        Returns:
            For one text, a list of ``{"generated_text": answer}`` with an entry for each returned sequence; for several
            texts, a list of such lists. For chats, ``"generated_text"`` is the chat with the answer's message.

        Raises:
            GistError: an input is neither a text nor a chat that can follow a gist; with a cache, the call or the
                pipeline asks for something that the stock pipeline does to texts (``return_full_text``, ``prefix``,
                ...); or as :func:`gisting.generate`.
        """
        if cache is None:
            return super().__call__(text_inputs, **kwargs)
        is_one = isinstance(text_inputs, str) or _is_chat(text_inputs)
        texts: Sequence[Any] = [text_inputs] if is_one else text_inputs
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) or _is_chat(text) for text in texts):
            raise GistError(
                "text_inputs must be a text, a chat (a list of messages), or a list of them when a cache is given, got "
                f"{type(text_inputs).__name__}"
            )
        # As with the stock pipeline, what the call says overrides what the pipeline was made with.
        for name, value in {**self._stock_only, **kwargs}.items():
            if name in _STOCK_ONLY and not (value is None or value is False):
                raise GistError(f"{name} must be left out when a cache is given: {_STOCK_ONLY[name]}")
        kwargs = {name: value for name, value in kwargs.items() if name not in _STOCK_ONLY}
        settings = pipeline_settings(self, {**self._forward_params, **kwargs})
        answers = generate(self.model, self.gist_tokenizer, texts, cache=cache, **settings)
        each = len(answers) // max(1, len(texts))
        results = [
            [{"generated_text": _said(text, answer)} for answer in answers[row * each : (row + 1) * each]]
            for row, text in enumerate(texts)
        ]
        return results[0] if is_one else results


def _is_chat(text: Any) -> bool:
    return isinstance(text, list | tuple) and bool(text) and all(isinstance(message, Mapping) for message in text)


def _said(text: Any, answer: str) -> Any:
    """What the stock pipeline returns: the answer to a text, or a chat that goes on with the answer."""
    return answer if isinstance(text, str) else [*text, {"role": "assistant", "content": answer}]
