"""Special tokens that a user writes are text: only the template writes a role, a turn or an end.

Place in the flow: **text -> tokens**. Stock tokenizers read ``<|im_start|>system`` in a user's message as the beginning
of a system message. Here each literal of a special token in a content is replaced by a private string before the
template lays it out. Where one is left, the text is encoded with a copy of the tokenizer in which the special tokens
have private names: what the template wrote is renamed with them, and what the user wrote is text there. Contents
without such literals never come here, so their ids are those of the stock tokenizer.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from gisting.errors import GistError

__all__ = ["SpecialTokens", "Written"]

_log = logging.getLogger(__name__)


class Written(str):
    """A text that a template wrote, such as a list of tools: its special tokens are read as such."""

    __slots__ = ()


class SpecialTokens:
    """The special tokens of a tokenizer, told apart from text that spells them.

    Args:
        tokenizer: a tokenizer of transformers, which is not changed.
        layout: a text that a template wrote. Added tokens in it count as special, even if the tokenizer does not say
            so, unless they are spaces and line ends.
        apart: a special token that no text can spell.
    """

    def __init__(self, tokenizer: Any, layout: str, apart: str) -> None:
        self._tokenizer = tokenizer
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        names = {name for name, token in added.items() if token.special} | {*tokenizer.all_special_tokens}
        names |= {name for name in added if name in layout}
        self.names: list[str] = sorted(
            (name for name in names - {apart} if name.strip()), key=lambda name: (-len(name), name)
        )
        secret = secrets.token_hex(8)
        # Random, so that no text can spell them. The first stands for what a user wrote, the second for the token.
        self._hidden = {name: f"\ue0f4{secret}{number:x}\ue0f5" for number, name in enumerate(self.names)}
        self._renamed = {name: f"\ue0f6{secret}{number:x}\ue0f7" for number, name in enumerate(self.names)}
        self._shown = {hidden: name for name, hidden in self._hidden.items()}
        self._mark = f"\ue0f4{secret}"
        self._altered = f"{self._mark}:\ue0f5"  # in a text that spells a token only after normalisation
        self._any = _any_of(self.names)
        self._any_hidden = _any_of([*self._shown, self._altered])
        self._has_warned = False
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer: Any = getattr(backend, "normalizer", None)
        # Found in the normalised text too: by the tokenizer, or as an entry of its vocabulary.
        self._any_normalized = None
        if self._normalizer is not None:
            self._any_normalized = _any_of({*self.names, *map(self._normalizer.normalize_str, self.names)} - {""})

    def hide(self, content: Any) -> Any:
        """Return a text or messages in which nothing spells a special token, for a template to lay out.

        Args:
            content: a text, or the JSON values of messages.

        Raises:
            GistError: several texts of it spell a special token together.
        """
        if isinstance(content, Written):
            return content
        if isinstance(content, str):
            return self._hide(content)
        texts: list[str] = []
        hidden = self._hide_in(content, texts)
        for joined in ("".join(texts), "".join(text.strip() for text in texts)):
            if (found := self._any.search(joined)) is not None:
                raise GistError(
                    f"messages spell the special token {found[0]!r} in parts, which the chat template may put "
                    "together; write it in one part, which makes it text"
                )
        return hidden

    def show(self, text: str) -> str:
        """Return what the template wrote with the literals that were hidden."""
        return self._any_hidden.sub(lambda found: self._shown.get(found[0], ""), text)

    def is_in(self, text: str) -> bool:
        """Whether something is hidden in a text."""
        return self._mark in text

    def is_spelled(self, text: str) -> bool:
        """Whether a text spells a special token."""
        return not isinstance(text, Written) and self._hide(text) is not text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text in which something is hidden.

        Raises:
            GistError: the tokenizer can only read the literal of a special token as that token.
        """
        renamed, num_tokens = self._any.subn(lambda found: self._renamed[found[0]], text)
        ids: Any = self._copy(self.show(renamed), add_special_tokens=False, verbose=False)["input_ids"]
        if sum(token in self._ids for token in ids) > num_tokens:
            found = next(self._shown[hidden] for hidden in self._any_hidden.findall(text) if hidden in self._shown)
            raise GistError(
                f"a text contains {found!r}, which this tokenizer can only read as a special token; remove it from the "
                "text, or allow it: tokenizer.reads_special_tokens = True"
            )
        return list(ids)

    def _hide(self, text: str) -> str:
        hidden = self._any.sub(lambda found: self._hidden[found[0]], text)
        if hidden is text or hidden == text:
            if self._any_normalized is None or not self._any_normalized.search(self._normalizer.normalize_str(text)):
                return text
            start = len(text) - len(text.lstrip())
            hidden = text[: start + 1] + self._altered + text[start + 1 :]
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "a text spells a special token of the tokenizer; it is encoded as text. To have it read as the token, "
                "set tokenizer.reads_special_tokens = True"
            )
        return hidden

    def _hide_in(self, value: Any, texts: list[str]) -> Any:
        if isinstance(value, str):
            texts.append(self._hide(value))
            return texts[-1]
        if isinstance(value, Mapping):
            # The type of a part is no text of it, and would come between the texts of two parts.
            return {
                self._hide_in(name, []): self._hide_in(one, [] if name == "type" else texts)
                for name, one in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hide_in(one, texts) for one in value]
        return value

    @cached_property
    def _ids(self) -> frozenset[int]:
        """The ids of the special tokens, without the one for unknown text."""
        ids: Any = self._tokenizer.convert_tokens_to_ids(self.names)
        return frozenset(ids) - {self._tokenizer.unk_token_id, None}

    @cached_property
    def _copy(self) -> Any:
        """A copy of the tokenizer in which the special tokens have other names, and the same ids."""
        made = copy.deepcopy(self._tokenizer)
        backend = getattr(made, "backend_tokenizer", None)
        if backend is None:
            _rename_slow(made, self._renamed)
        else:
            from tokenizers import Tokenizer

            rules = json.loads(backend.to_str())
            _rename(rules, self._renamed)
            made._tokenizer = Tokenizer.from_str(json.dumps(rules))
        return made


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    # One that matches nothing if there are no names.
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _rename(rules: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens in the rules of a fast tokenizer, among the added tokens and in the vocabulary."""
    for added in rules["added_tokens"]:
        if added["content"] in names:
            added.update(content=names[added["content"]], normalized=False)
    model = rules["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # with scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):

        def parts(merge: str | Sequence[str]) -> list[str]:
            return merge.split(" ") if isinstance(merge, str) else [*merge]

        model["merges"] = [
            merge for merge in model["merges"] if names.keys().isdisjoint([*parts(merge), "".join(parts(merge))])
        ]


def _rename_slow(tokenizer: Any, names: Mapping[str, str]) -> None:
    """Rename added and special tokens of a slow tokenizer. What it keeps elsewhere shows in the ids."""

    def rename(token: Any) -> Any:
        if str(token) not in names:
            return token
        if isinstance(token, str):
            return names[token]
        token = copy.copy(token)
        token.content = names[str(token)]
        return token

    tokenizer._added_tokens_decoder = {id: rename(token) for id, token in tokenizer._added_tokens_decoder.items()}
    tokenizer._added_tokens_encoder = {str(token): id for id, token in tokenizer._added_tokens_decoder.items()}
    tokenizer._special_tokens_map = {name: rename(token) for name, token in tokenizer._special_tokens_map.items()}
    tokenizer._extra_special_tokens = [rename(token) for token in tokenizer._extra_special_tokens]
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
