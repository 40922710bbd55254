"""Templates: how prompt, gist, input and output become one text.

Place in the flow: **text** -> tokens. Does not depend on token ids.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gisting.errors import GistError

__all__ = ["TEMPLATES", "Template"]


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

    def answered(self, input: str, output: str) -> tuple[str, str]:
        """Return the text of :meth:`continuation_text`, and the same text with the answer ``output``."""
        before = self.continuation_text(input)
        return before, before + self.completion_text(output)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as files hold them."""
        return asdict(self)


#: The published templates (Gisting, appendix A, and its code) and a plain one. The template ``"chat"`` is read from the
#: tokenizer instead.
TEMPLATES: dict[str, Template] = {
    "alpaca": Template("alpaca", "Instruction: {prompt}\n", "\nInput: {input}\nOutput:", "\nOutput:", " {output}"),
    "alpaca-t5": Template("alpaca-t5", "Instruction: {prompt}\n", "\nInput: {input}", "", "{output}"),
    "plain": Template("plain", "{prompt}\n", "\n{input}\n", "\n", "{output}"),
}
