"""Templates: how prompt, gist, input and output become one text.

Place in the flow: **text** -> tokens. Does not depend on token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gisting.errors import GistError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATES", "Template", "resolve_template"]


@dataclass(frozen=True)
class Template:
    """How prompt, gist, input and output become one text.

    The sequence is ``prompt``, k gist tokens, ``continuation`` (or ``continuation_without_input`` if the input is
    empty), then ``completion``. An encoder-decoder reads the first three and writes the last.

    Args:
        name: what files and messages call the template.
        prompt: contains ``{prompt}`` once.
        continuation: contains ``{input}`` once.
        continuation_without_input: fixed text, which may be empty for an encoder-decoder.
        completion: contains ``{output}`` once.
        add_special_tokens: whether the sequence starts with what the tokenizer puts before a text (such as ``<s>``);
            False if the prompt text already spells it, as chat templates do.

    Raises:
        GistError: a placeholder is missing or repeated.
    """

    name: str
    prompt: str
    continuation: str
    continuation_without_input: str
    completion: str
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        for field, placeholder in (("prompt", "{prompt}"), ("continuation", "{input}"), ("completion", "{output}")):
            text = getattr(self, field)
            if text.count(placeholder) != 1:
                raise GistError(
                    f"template {self.name!r}: {field} must contain {placeholder} exactly once, got {text!r}"
                )

    def prompt_text(self, prompt: str) -> str:
        """Return the text before the gist for ``prompt``."""
        return self.prompt.replace("{prompt}", prompt)

    def continuation_text(self, input: str) -> str:
        """Return the text after the gist, with ``input``, up to where the answer begins."""
        return self.continuation.replace("{input}", input) if input else self.continuation_without_input

    def completion_text(self, output: str) -> str:
        """Return the text of the answer ``output``."""
        return self.completion.replace("{output}", output)


#: The published templates (Gisting, appendix A, and its code) and a plain one. The template ``"chat"`` is read from the
#: tokenizer instead.
TEMPLATES: dict[str, Template] = {
    "alpaca": Template("alpaca", "Instruction: {prompt}\n", "\nInput: {input}\nOutput:", "\nOutput:", " {output}"),
    "alpaca-t5": Template("alpaca-t5", "Instruction: {prompt}\n", "\nInput: {input}", "", "{output}"),
    "plain": Template("plain", "{prompt}\n", "\n{input}\n", "\n", "{output}"),
}


def resolve_template(
    template: str | Template | None, tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool
) -> Template:
    """Return the template that a caller asked for.

    Args:
        template: a name of ``TEMPLATES``, ``"chat"``, a template, or None for the default.
        tokenizer: the tokenizer whose chat template ``"chat"`` means.
        is_encoder_decoder: whether the default is that of T5-like models.

    Raises:
        GistError: the name is unknown, or the chat template cannot be used.
    """
    if template is None:
        template = "alpaca-t5" if is_encoder_decoder else "alpaca"
    if isinstance(template, Template):
        return template
    if template == "chat":
        return _chat_template(tokenizer)
    if template not in TEMPLATES:
        raise GistError(f"template must be one of {', '.join([*TEMPLATES, 'chat'])} or a Template, got {template!r}")
    return TEMPLATES[template]


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The tokenizer's chat template as fixed text around prompt and input.

    The prompt is the system message, or precedes the input.

    Raises:
        GistError: there is no chat template, or it does not write both once and in order.
    """
    if not tokenizer.chat_template:
        raise GistError(
            f"template='chat' needs a tokenizer with a chat template, {type(tokenizer).__name__} has none; use one "
            f"of {', '.join(TEMPLATES)} or a Template"
        )
    from jinja2 import TemplateError

    prompt, input = "\ue0f0prompt\ue0f1", "\ue0f2input\ue0f3"
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": input}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        # Gemma and others refuse a system message.
        messages = [{"role": "user", "content": f"{prompt}\n\n{input}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, found, after = str(text).partition(prompt)
    if not found or after.count(input) != 1 or prompt in after:
        raise GistError(
            "the tokenizer's chat template does not write prompt and input once each, in this order; use a Template"
        )
    return Template(
        name="chat",
        prompt=before + "{prompt}",
        continuation=after.replace(input, "{input}"),
        continuation_without_input=after.replace(input, ""),
        completion="{output}",
        add_special_tokens=False,
    )
