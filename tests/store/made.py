"""Random caches of one prompt for the tests of the store, each identified by a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from gisting.cache import CacheOrigin, GistCache

ORIGIN = CacheOrigin("llama/0123456789ab", "ba9876543210", "plain", "gist")


def made(seed: int, k: int = 2, *, origin: CacheOrigin = ORIGIN, dtype: torch.dtype = torch.float32) -> GistCache:
    """Make three layers with two key heads of size 4; the same seed gives the same states."""
    generator = torch.Generator().manual_seed(seed)

    def states() -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, 2, k, 4, generator=generator).to(dtype) for _ in range(3))

    return GistCache(states(), states(), torch.tensor([k]), origin)


def is_same(found: GistCache, wanted: GistCache) -> bool:
    """Whether two caches are equal to the bit and belong to the same model."""
    return (
        found.num_gist_tokens == wanted.num_gist_tokens
        and found.origin == wanted.origin
        and found.dtype == wanted.dtype
        and all(torch.equal(one, other) for one, other in zip(_tensors(found), _tensors(wanted), strict=True))
    )


def _tensors(cache: GistCache) -> list[Tensor]:
    return [*cache.keys, *cache.values, *([] if cache.last_hidden is None else [cache.last_hidden])]
