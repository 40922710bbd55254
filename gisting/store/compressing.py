"""Turn prompts into entries: make a prompt's key, and compress the prompts that are missing.

Place in the flow: generation -> **compressing** -> store. The key of a prompt is a hash of everything that its states
depend on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gisting.cache import GistCache
from gisting.errors import GistError, StoreError
from gisting.generation import compress
from gisting.models.adapters import reader_fingerprint
from gisting.models.fingerprint import fingerprint
from gisting.models.weights import input_weight
from gisting.store.index import NewEntry, check_name, prompt_digest, text_key
from gisting.store.writing import write_caches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gisting.tokens import GistTokenizer

__all__ = ["Compressed", "Compressor", "check_names", "check_prompts", "write"]


class Compressed(NamedTuple):
    """A compressed prompt with its key."""

    key: str
    cache: GistCache
    num_prompt_tokens: int


@dataclass(frozen=True)
class Compressor:
    """A model with its tokenizer, and how it compresses.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        condition: as for :func:`gisting.compress`.
        batch_size: how many prompts to run at once.
        chunk_length: as for :func:`gisting.compress`.
    """

    model: PreTrainedModel
    tokenizer: GistTokenizer
    condition: str
    batch_size: int
    chunk_length: int | None

    def keys(self, prompts: Sequence[str], counts: Sequence[int]) -> list[str]:
        """Return the key of each prompt with its k: a hash of the text and of all that its states depend on."""
        own, reader = fingerprint(self.model), reader_fingerprint(self.model)
        owner: list[str | int] = [
            # The adapter counts, although the entry is the base model's, which would compress otherwise.
            own if reader == own else f"{own} for {reader}",
            self.tokenizer.fingerprint,
            self.condition,
            str(input_weight(self.model).dtype),
        ]
        # Last, and only if it is set: entries from before chunks existed keep their keys.
        owner += [] if self.chunk_length is None else [self.chunk_length]
        keys = []
        for prompt, k in zip(prompts, counts, strict=True):
            # Likewise: earlier versions read these prompts with special tokens in them, and others did not change.
            more = ["special tokens as text"] if self.tokenizer.spells_special_tokens(prompt) else []
            keys.append(text_key([self.tokenizer.template.prompt_text(prompt), k, *owner, *more]))
        return keys

    def compress(self, wanted: Mapping[str, tuple[str, int]]) -> list[Compressed]:
        """Compress prompts.

        Args:
            wanted: prompt and k by key.
        """
        prompts, counts = [prompt for prompt, _ in wanted.values()], [k for _, k in wanted.values()]
        cache = compress(
            self.model,
            self.tokenizer,
            prompts,
            counts,
            condition=self.condition,
            batch_size=self.batch_size,
            chunk_length=self.chunk_length,
        ).to("cpu")
        lengths = [encoding.num_prompt_tokens for encoding in self.tokenizer.encode_prompts(prompts, counts)]
        made = [one.with_about(prompt_sha256=prompt_digest(text)) for one, text in zip([*cache], prompts, strict=True)]
        return [Compressed(*each) for each in zip(wanted, made, lengths, strict=True)]


def write(
    folder: Path, compressed: Sequence[Compressed], damaged: Collection[str], storage: str | None
) -> list[NewEntry]:
    """Write the files of compressed prompts.

    Args:
        folder: a writer's directory.
        compressed: what to write.
        damaged: the keys whose present file must be replaced.
        storage: how to store the numbers; None keeps every bit.

    Returns:
        The entries, in the same order.
    """
    written = write_caches(folder, [each.cache for each in compressed], storage)
    return [
        NewEntry(
            replace(new.entry, key=each.key, is_keyed_by_text=True, num_prompt_tokens=each.num_prompt_tokens),
            new.file,
            is_forced=each.key in damaged,
        )
        for each, new in zip(compressed, written, strict=True)
    ]


def check_prompts(prompts: Sequence[str], num_gist_tokens: int | Sequence[int]) -> list[int]:
    """Return the k of each prompt.

    Raises:
        GistError: the arguments are not prompts and numbers of gist tokens.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise GistError("prompts must be a non-empty list of texts")
    counts = [num_gist_tokens] * len(prompts) if isinstance(num_gist_tokens, int) else list(num_gist_tokens)
    if len(counts) != len(prompts):
        raise GistError(
            f"num_gist_tokens must be one number for all {len(prompts)} prompts or one for each, got {len(counts)}"
        )
    if any(isinstance(k, bool) or not isinstance(k, int) for k in counts):
        raise GistError(f"num_gist_tokens must be whole numbers, got {num_gist_tokens!r:.100}")
    return counts


def check_names(names: Sequence[str | None] | None, keys: Sequence[str]) -> dict[str, str]:
    """Return the key of each name, leaving out prompts without one.

    Raises:
        StoreError: a name is not valid or is given to two prompts, or there are not as many names as keys.
    """
    if names is None:
        return {}
    if isinstance(names, str) or len(names) != len(keys):
        raise StoreError(
            f"names must be a list of {len(keys)} items, a name or None for each prompt, got {names!r:.100}"
        )
    key_of_name: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        if name is not None and key_of_name.setdefault(check_name(name), key) != key:
            raise StoreError(f"names gives {name!r} to two prompts; give each prompt a different name")
    return key_of_name
