"""What a request with a gist may cost before anything is known about it: bytes, items, characters, ids.

Place in the flow: HTTP -> **limits** -> requests. A text is measured before it is tokenised and a body before it is
parsed, because both take time and memory in proportion, in the process that answers everyone. A text that is longer
than the model's length times its longest token cannot fit, unless the tokenizer drops characters, as some do that
collapse spaces; so no other text that a model could read is refused here. Does not depend on vLLM or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gisting.serving.gists import GistRefusedError
from gisting.tokens import GistTokenizer

__all__ = ["MAX_BODY_BYTES", "MAX_CHECKED_BYTES", "Limits"]

#: The limit for a JSON body, which is read completely before the server sees it.
MAX_BODY_BYTES = 64 * 2**20
#: A body that names no gist is searched for gist tokens up to this size; the engine checks all of them.
MAX_CHECKED_BYTES = 2 * 2**20
# Numbers and texts in a body. While JSON is parsed nothing else runs in the process, 50 ms for a million numbers.
_MAX_ITEMS = 2**20
# Everything in a body that is not its texts.
_OTHER_BYTES = 2**20
# "\u00e9" for one character.
_BYTES_PER_CHARACTER = 6


@dataclass(frozen=True)
class Limits:
    """The limits of one server.

    Args:
        max_tokens: the model's length; None if it is not known, which leaves only the limit for bodies.
        max_characters: the characters that this many tokens can hold.
    """

    max_tokens: int | None = None
    max_characters: int | None = None

    @classmethod
    def of(cls, tokenizer: GistTokenizer, max_tokens: int | None) -> Limits:
        """Make the limits of a model.

        Args:
            tokenizer: its tokenizer.
            max_tokens: its length, or None.
        """
        if max_tokens is None:
            return cls()
        longest = max(map(len, tokenizer.tokenizer.get_vocab()), default=1)
        return cls(max_tokens, max_tokens * (longest + 1))  # and a space that belongs to no token

    @property
    def max_bytes(self) -> int:
        """How many bytes the body of a request with a gist may have."""
        if self.max_characters is None:
            return MAX_BODY_BYTES
        return min(MAX_BODY_BYTES, _OTHER_BYTES + _BYTES_PER_CHARACTER * self.max_characters)

    def check_bytes(self, body: bytes) -> None:
        """Refuse a body that would take long to parse.

        Raises:
            GistRefusedError: it has too many bytes or items (413).
        """
        if len(body) > self.max_bytes:
            raise GistRefusedError(
                f"the body has {len(body)} bytes, more than {self.max_bytes}, which is the most for a request with a "
                "gist to this model; send less",
                status=413,
            )
        # Strings may hold commas too, but not as many.
        if body.count(b",") > _MAX_ITEMS:
            raise GistRefusedError(
                f"the body holds more than {_MAX_ITEMS} items; send fewer prompts in one request", status=413
            )

    def check(self, body: Mapping[str, Any]) -> None:
        """Refuse a parsed body with a text or a list of ids that cannot fit into the model.

        Raises:
            GistRefusedError: it has one (400).
        """
        prompt, params = body.get("prompt"), body.get("kv_transfer_params")
        is_batch = isinstance(prompt, list) and any(isinstance(one, str | list) for one in prompt[:1])
        for number, one in enumerate(prompt if isinstance(prompt, list) and is_batch else [prompt]):
            self._check_one(f"prompt[{number}]" if is_batch else "prompt", one)
        if isinstance(params, Mapping):
            self._check_one("kv_transfer_params['prompt_token_ids']", params.get("prompt_token_ids"))
        if body.get("messages") is not None:
            self._check_characters("messages", _num_characters(body["messages"]))

    def _check_one(self, name: str, value: Any) -> None:
        if isinstance(value, str):
            self._check_characters(name, len(value))
        elif isinstance(value, list) and self.max_tokens is not None and len(value) > self.max_tokens:
            raise GistRefusedError(
                f"{name} has {len(value)} ids, more than the model's length of {self.max_tokens}; send fewer"
            )

    def _check_characters(self, name: str, found: int) -> None:
        if self.max_characters is not None and found > self.max_characters:
            raise GistRefusedError(
                f"{name} has {found} characters, more than {self.max_characters}, the most that the model's length of "
                f"{self.max_tokens} tokens can hold; send less"
            )


def _num_characters(value: Any) -> int:
    """Count the characters of all texts in JSON values."""
    found, todo = 0, [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            found += len(one)
        elif isinstance(one, Mapping):
            todo.extend(one.values())
        elif isinstance(one, list):
            todo.extend(one)
    return found
