"""Sequences of ids, with where their parts are, and prompts in chunks.

Place in the flow: text -> **tokens** -> visibility. Does not depend on tokenizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gisting.errors import GistTokenError

__all__ = ["GistEncoding", "cut_into_chunks", "located", "num_chunks"]


@dataclass(frozen=True)
class GistEncoding:
    """One sequence of ids, and where its parts are.

    ``input_ids[:gist_start]`` is the prompt, ``[gist_start:gist_end]`` the gist, ``[gist_end:completion_start]`` the
    continuation and ``[completion_start:]`` the completion (for an encoder-decoder the target, which collators
    separate). A long prompt in chunks has a gist span after each chunk: then ``[:gist_start]`` is the first chunk, and
    ``[gist_start:gist_end]`` holds the later chunks as well as all gists::

        a b G G c d G G e f $        gist_start 2, gist_end 8, gist_spans (2, 4) (6, 8), completion_start 10

    Args:
        input_ids: all ids.
        gist_start: the place of the first gist token.
        gist_end: the place after the last gist token.
        completion_start: where the completion begins.
        gist_spans: ``(start, end)`` of each gist span in order; if left out, there is one.
    """

    input_ids: list[int]
    gist_start: int
    gist_end: int
    completion_start: int
    gist_spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.gist_spans:
            object.__setattr__(self, "gist_spans", ((self.gist_start, self.gist_end),))

    @property
    def num_gist_tokens(self) -> int:
        """The number of gist tokens: k, or k times the number of chunks."""
        return sum(end - start for start, end in self.gist_spans)

    @property
    def num_prompt_tokens(self) -> int:
        """The number of the prompt's ids, without gist tokens."""
        return self.gist_end - self.num_gist_tokens

    @property
    def chunks(self) -> list[list[int]]:
        """The prompt's ids, without gist tokens: what comes before each gist span."""
        starts = [0, *(end for _, end in self.gist_spans)]
        return [self.input_ids[begin:start] for begin, (start, _) in zip(starts, self.gist_spans, strict=False)]


def cut_into_chunks(ids: Sequence[int], chunk_length: int | None) -> list[list[int]]:
    """Cut a long prompt into the fewest chunks of nearly equal length: sizes differ by at most 1, longer ones first.

    Args:
        ids: L ids, in order.
        chunk_length: the largest number of ids in a chunk, at least 1; None for one chunk of any length.

    Returns:
        ``ceil(L / chunk_length)`` chunks, at least one.
    """
    number = num_chunks(len(ids), chunk_length)
    size, num_longer = divmod(len(ids), number)
    ends = [size * count + min(count, num_longer) for count in range(number + 1)]
    return [list(ids[start:end]) for start, end in itertools.pairwise(ends)]


def num_chunks(length: int, chunk_length: int | None) -> int:
    """Return how many chunks :func:`cut_into_chunks` makes of ``length`` ids."""
    return 1 if chunk_length is None else max(1, -(-length // chunk_length))


def located(ids: list[int], gist_token_id: int, *, is_chunked: bool = False) -> GistEncoding:
    """Find the gist in ids, as :meth:`gisting.GistTokenizer.locate` does.

    Args:
        ids: prompt, gist and what follows.
        gist_token_id: the id of the gist token.
        is_chunked: whether the prompt may be in chunks, each with its gist.

    Raises:
        GistTokenError: there is no gist token, gist tokens are apart, or chunks have different numbers of them.
    """
    places = [place for place, token in enumerate(ids) if token == gist_token_id]
    if not places:
        raise GistTokenError(
            f"input_ids contain no gist token (id {gist_token_id}); put num_gist_tokens >= 1 of them between "
            "prompt and input, as GistTokenizer.encode does"
        )
    start, end = places[0], places[-1] + 1
    if end - start != len(places) and not is_chunked:
        raise GistTokenError(
            f"input_ids contain {len(places)} gist tokens between {start} and {end} with other ids in between; the "
            "gist tokens of a prompt must be consecutive (for a prompt in chunks: locate(..., is_chunked=True))"
        )
    starts = [place for place in places if place == start or ids[place - 1] != gist_token_id]
    ends = [place + 1 for place in places if place + 1 == end or ids[place + 1] != gist_token_id]
    spans = tuple(zip(starts, ends, strict=True))
    counts = [last - first for first, last in spans]
    if len(set(counts)) > 1:
        raise GistTokenError(
            f"input_ids contain gists of {', '.join(map(str, counts))} tokens; a prompt must have the same number "
            "after each chunk"
        )
    return GistEncoding(ids, start, end, len(ids), spans)
