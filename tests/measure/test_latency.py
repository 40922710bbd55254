"""Time to the first token: what a row holds, the gate, and caches passed without a copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache

import gisting
from gisting import GistError, GistTokenizer
from gisting._compat import cache_argument
from gisting.measure import latency
from gisting.measure.latency import cache_view, first_token
from tests import tiny


@pytest.fixture
def model(tokenizer: GistTokenizer):
    return gisting.patch(tiny.model("llama"), tokenizer)


def test_latency_rows(model, tokenizer: GistTokenizer) -> None:
    rows = first_token(model.train(), tokenizer, tiny.words(20, 1), "w1 w2", 3, repeats=3, warmup=1)
    assert [(row.mode, row.num_cached_tokens, row.num_new_tokens) for row in rows] == [
        ("no cache", 0, 22),
        ("prefix cache", 20, 2),
        ("gist cache", 3, 2),
    ]
    assert [row.cache_bytes for row in rows] == [0, 20 * 384, 3 * 384]
    assert rows[0].flops > rows[1].flops > rows[2].flops
    assert all(row.latency_ms_low <= row.latency_ms <= row.latency_ms_high for row in rows)
    assert model.training


def test_no_time_is_reported_for_a_wrong_answer(
    model, tokenizer: GistTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args, **kwargs):
        cache = gisting.compress(*args, **kwargs)
        return cache._map(lambda tensor, dim: tensor + 0.1, cache.lengths)

    monkeypatch.setattr(latency, "compress", wrong)
    with pytest.raises(GistError, match=r"gist cache differs from its uncached run by .*; no time is reported"):
        first_token(model, tokenizer, tiny.words(20, 1), "w1 w2", 3, repeats=1)


def test_latency_is_for_decoders(t5_tokenizer: GistTokenizer) -> None:
    model = gisting.patch(tiny.model("t5"), t5_tokenizer)
    with pytest.raises(GistError, match="first_token measures decoders"):
        first_token(model, t5_tokenizer, "w1", "w2")


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3_text"])
@torch.inference_mode()
def test_a_view_copies_nothing_and_changes_nothing(name: str) -> None:
    model, _ = tiny.patched(name)
    ids = torch.arange(4, 24)[None]
    kept = model(ids, use_cache=True)[cache_argument()]
    before = copy.deepcopy(kept)
    fresh = cache_view(kept, 3)
    for ours, theirs in zip(fresh.layers, kept.layers, strict=True):
        assert ours.keys.data_ptr() == theirs.keys.data_ptr()
        assert ours.keys.shape[0] == 3
    model(ids[:, :3].expand(3, -1), **{cache_argument(): fresh}, use_cache=True)
    assert (fresh.get_seq_length(), kept.get_seq_length()) == (23, 20)
    for ours, theirs in zip(kept.layers, before.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@torch.inference_mode()
def test_what_writes_in_place_is_copied() -> None:
    model, _ = tiny.patched("llama")
    kept: Any = StaticCache(model.config, 16)
    ids = torch.arange(4, 12)[None]
    model(ids, **{cache_argument(): kept}, use_cache=True)
    before = kept.layers[0].keys.clone()
    model(ids[:, :2], **{cache_argument(): cache_view(kept)}, use_cache=True)
    assert torch.equal(kept.layers[0].keys, before)


def test_latency_beyond_a_sliding_window() -> None:
    """The kept states are the last ones of the window; in a cache without a window they would count as the whole."""
    rows = first_token(*tiny.patched("mistral-window"), tiny.words(20, 1), "w1 w2", 3, repeats=1, warmup=0)
    assert [row.num_cached_tokens for row in rows] == [0, 20, 3]
