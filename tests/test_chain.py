"""Chained gists: rotating gives what the model computes for prompts at their places.

The states are compared with two other ways to compute them, neither of which rotates a key: prompts run with shifted
positions, and the sequence with copies that training uses (``visibility.chained``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import gisting
from gisting._compat import cache_argument
from gisting.attention import interval_attention
from gisting.attention.pieces import attend_pieces, plan_pieces
from gisting.cache import GistCache
from gisting.data.collate import GistCollator
from gisting.data.records import Record
from gisting.errors import CacheMismatchError, GistError
from gisting.padding import pad_rows
from gisting.rotary import Rotary
from gisting.tokens import GistTokenizer
from gisting.visibility import Visibility, chained, gist
from tests import tiny
from tests.models.test_families import few_by_default

# The parts of three rows of chains: number of prompt words, and k.
PARTS = (
    ((5, 2), (11, 1), (1, 3)),
    ((3, 1), (2, 4), (17, 2)),
    ((9, 3), (4, 2), (6, 1)),
)
COUNTS = torch.tensor([[k for _, k in part] for part in PARTS])
OFFSETS = COUNTS.cumsum(0) - COUNTS
PROMPTS = [
    [tiny.words(length, 10 * part + row) for row, (length, _) in enumerate(rows)] for part, rows in enumerate(PARTS)
]
INPUTS = [tiny.words(count, 50 + count) for count in (4, 1, 7)]
OUTPUTS = [tiny.words(count, 60 + count) for count in (3, 5, 1)]

# Gemma 3 has windows and two rotations; Cohere 2 rotates interleaved pairs, in windowed layers only.
# Gists of latent attention are not chained.
CHAINED = [name for name in tiny.DECODERS if name != "deepseek_v3"]
every_decoder = pytest.mark.parametrize("name", few_by_default(CHAINED, ("llama", "gemma3_text", "cohere2")))


def build(name: str, window: int = 256, **changes: Any) -> tuple[PreTrainedModel, GistTokenizer]:
    """Make a patched model whose sliding window, if it has one, has the given width."""
    if tiny.DECODERS[name].get("sliding_window"):
        changes["sliding_window"] = window
    return tiny.patched(name, **changes)


def compressed(model: PreTrainedModel, tokenizer: GistTokenizer, num_parts: int = 3) -> list[GistCache]:
    return [gisting.compress(model, tokenizer, PROMPTS[part], COUNTS[part].tolist()) for part in range(num_parts)]


# -- states ------------------------------------------------------------------------------------------------------------


def recomputed(model: PreTrainedModel, tokenizer: GistTokenizer, part: int, row: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``(1, G, k, D)`` of a part's gist in every layer, as the model computes them in place."""
    encoding = tokenizer.encode_prompts([PROMPTS[part][row]], int(COUNTS[part, row]))[0]
    ids = torch.tensor([encoding.input_ids])
    visibility = gist(ids == tokenizer.gist_token_id)
    assert visibility.position_ids is not None
    past = DynamicCache()
    model.base_model(
        input_ids=ids,
        attention_mask=visibility.as_attention_mask(),
        position_ids=visibility.position_ids + OFFSETS[part, row],
        **{cache_argument(): past},
        use_cache=True,
    )
    layers: list[Any] = list(past.layers)
    return [(layer.keys[:, :, encoding.gist_start :], layer.values[:, :, encoding.gist_start :]) for layer in layers]


def error_of_chain(
    model: PreTrainedModel, tokenizer: GistTokenizer, num_parts: int, change: Callable[[Rotary], Rotary] | None = None
) -> float:
    """The largest difference between chained and recomputed states."""
    caches = compressed(model, tokenizer, num_parts)
    if change is not None:
        assert caches[0].rotary is not None
        caches = [replace(cache, rotary=change(caches[0].rotary)) for cache in caches]
    chain = GistCache.chain(caches)
    assert chain.num_gist_tokens == COUNTS[:num_parts].sum(0).tolist()
    worst = 0.0
    with torch.no_grad():
        for row in range(len(chain)):
            parts = [recomputed(model, tokenizer, part, row) for part in range(num_parts)]
            for layer, found in enumerate(zip(chain.keys, chain.values, strict=True)):
                for kind in (0, 1):
                    expected = torch.cat([states[layer][kind][0] for states in parts], dim=1)
                    held = found[kind][row, :, chain.num_slots - expected.shape[1] :]
                    worst = max(worst, (held - expected).abs().max().item())
    return worst


@every_decoder
@pytest.mark.parametrize("num_parts", [2, 3])
def test_chained_gists_are_recomputed_ones(name: str, num_parts: int) -> None:
    assert error_of_chain(*tiny.patched(name), num_parts) < 1e-5


YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "rope_parameters"),
    [
        pytest.param("llama", YARN, id="yarn, whose factor is in the keys"),
        pytest.param("phi3", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, id="a part of each head"),
        pytest.param(
            "gemma3_text",
            {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            id="two sets, one of them stretched",
        ),
    ],
)
def test_other_rotations(name: str, rope_parameters: dict[str, Any]) -> None:
    assert error_of_chain(*tiny.patched(name, rope_parameters=rope_parameters), 3) < 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("llama", lambda r: replace(r, layers=(None,) * 3), id="not rotated"),
        pytest.param("llama", lambda r: replace(r, layers=(0, 0, None)), id="a layer forgotten"),
        pytest.param(
            "llama",
            lambda r: replace(r, frequencies=tuple(tuple(-f for f in s) for s in r.frequencies)),
            id="backwards",
        ),
        pytest.param("llama", lambda r: replace(r, is_interleaved=True), id="wrong pairs"),
        pytest.param("cohere2", lambda r: replace(r, is_interleaved=False), id="wrong pairs of cohere2"),
        pytest.param("cohere2", lambda r: replace(r, layers=(0, 0, 0)), id="a layer without rotation rotated"),
        pytest.param("gemma3_text", lambda r: replace(r, layers=(0, 1, 0)), id="sets of frequencies exchanged"),
        pytest.param("gpt_neox", lambda r: replace(r, frequencies=(r.frequencies[0] * 2,)), id="too much of a head"),
    ],
)
def test_a_wrong_rotation_would_show(name: str, change: Callable[[Rotary], Rotary]) -> None:
    assert error_of_chain(*tiny.patched(name), 2, change) > 1e-2


# -- the one sequence that training sees -------------------------------------------------------------------------------


def training_batch(tokenizer: GistTokenizer) -> dict[str, Tensor]:
    """The three rows as the collator lays them out, one sequence each, but with the k of ``PARTS``."""
    collate = GistCollator(tokenizer, part_separator=" | ")
    records = [
        Record(" | ".join(part[row] for part in PROMPTS), INPUTS[row], OUTPUTS[row]) for row in range(len(INPUTS))
    ]
    # The collator draws k for the last parts first.
    draws = [COUNTS[-1], torch.tensor([int(k) for row in range(3) for k in COUNTS[:-1, row]])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *args: draws.pop(0))
        return collate(records)


def rest_of(tokenizer: GistTokenizer) -> tuple[Tensor, Tensor]:
    """Inputs and outputs padded on the left, as in the training batch."""
    continuations = tokenizer.encode_continuations(INPUTS)
    completions = tokenizer.encode_completions(INPUTS, OUTPUTS)
    rows = [head + tail for head, tail in zip(continuations, completions, strict=True)]
    return pad_rows(rows, tokenizer.pad_token_id, left=True)


def cached_logits(model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, past: Any = None) -> Tensor:
    """Logits ``(B, N, vocabulary)`` of the rest after a cache, with stock attention masks."""
    ids, is_token = rest_of(tokenizer)
    mask = torch.cat([cache.attention_mask, is_token.long()], dim=1)
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, cache.num_slots :],
        **{cache_argument(): cache.as_past_key_values() if past is None else past},
    ).logits


@every_decoder
def test_the_rest_reads_chained_caches_as_it_reads_the_training_sequence(name: str) -> None:
    model, tokenizer = build(name)
    with torch.no_grad():
        _, is_token = rest_of(tokenizer)
        found = cached_logits(model, tokenizer, GistCache.chain(compressed(model, tokenizer)))[is_token]
        expected = model(**{**training_batch(tokenizer), "labels": None}).logits[:, -is_token.shape[1] :][is_token]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "cohere2"])
def test_loss_and_gradients_of_a_training_batch_are_those_of_chained_gists(name: str) -> None:
    """Compare with running every part alone, in place and with gradients, and the rest after their states."""
    model, tokenizer = build(name)
    batch = training_batch(tokenizer)
    loss = model(**batch).loss
    loss.backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    num_rest = rest_of(tokenizer)[0].shape[1]
    labels = batch["labels"][:, -num_rest:]
    without = cached_logits(model, tokenizer, GistCache.chain(compressed(model, tokenizer)))
    assert abs(loss_of(without, labels) - loss) < 1e-5 * loss

    model.zero_grad()
    chain = GistCache.chain(compressed(model, tokenizer))
    past = DynamicCache()
    rows = [[recomputed(model, tokenizer, part, row) for part in range(3)] for row in range(3)]
    for layer in range(len(chain.keys)):
        for_kind = []
        for kind in (0, 1):
            each = [torch.cat([states[layer][kind] for states in row], dim=2) for row in rows]
            widths = [chain.num_slots - states.shape[2] for states in each]
            for_kind.append(
                torch.cat([torch.nn.functional.pad(s, (0, 0, width, 0)) for s, width in zip(each, widths, strict=True)])
            )
        past.update(*for_kind, layer)
    other = loss_of(cached_logits(model, tokenizer, chain, past), labels)
    other.backward()
    assert abs(other - loss) < 1e-5 * loss
    for key, value in model.named_parameters():
        if value.grad is not None:
            assert (value.grad - gradients[key]).abs().max() < 1e-4 * gradients[key].abs().max().clamp(min=1e-2), key


def test_gradients_reach_the_words_of_every_part() -> None:
    model, tokenizer = build("llama-untied")
    model(**training_batch(tokenizer)).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert isinstance(gradient, Tensor)
    is_learnt = gradient.abs().amax(-1) > 0
    seen = {token for texts in PROMPTS for text in texts for token in tokenizer.encode_prompts([text], 1)[0].input_ids}
    assert is_learnt[sorted(seen)].all()


def test_a_part_is_not_seen_by_another() -> None:
    """Changing a word of the first part does not change the states of another part's gist, but changes the rest."""
    model, tokenizer = tiny.patched("llama")
    batch = {**training_batch(tokenizer), "labels": None}
    row = 0
    ids = batch["input_ids"][row]
    start = int((ids != tokenizer.pad_token_id).int().argmax())
    end_of_first = start + PARTS[0][0][0] + 2 * PARTS[0][0][1]
    num_rest = rest_of(tokenizer)[1][row].sum()
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True).hidden_states[-1][row]
        ids[start] = 4 if ids[start] != 4 else 5
        after = model(**batch, output_hidden_states=True).hidden_states[-1][row]
    assert torch.equal(before[end_of_first:-num_rest], after[end_of_first:-num_rest])
    assert (before[-num_rest:] - after[-num_rest:]).abs().amin(0).max() > 1e-4


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "gemma2", "gemma3_text", "cohere2"])
def test_sliding_windows_count_the_columns_of_the_training_sequence(name: str) -> None:
    """They are equal while the whole sequence fits into the window. Beyond it, a cached gist is still within reach, but
    the gist in the training sequence is not.
    """
    model, tokenizer = tiny.patched(name)
    errors = {}
    for length in (1, 6):
        prompts = [tiny.words(length, 1), tiny.words(length, 2)]
        record = Record(" | ".join(prompts), "w1", "w2")
        batch = GistCollator(tokenizer, 1, part_separator=" | ")([record])
        chain = GistCache.chain([gisting.compress(model, tokenizer, [prompt]) for prompt in prompts])
        with torch.no_grad():
            expected = model(**{**batch, "labels": None}).logits[0, -3:]
            found = model(
                input_ids=batch["input_ids"][:, -3:],
                attention_mask=torch.ones(1, 5, dtype=torch.long),
                position_ids=torch.tensor([[2, 3, 4]]),
                **{cache_argument(): chain.as_past_key_values()},
            ).logits[0]
        errors[batch["input_ids"].shape[1]] = (found - expected).abs().max().item()
    assert tiny.WINDOW == 8
    assert list(errors) == [8, 18]
    assert errors[8] < 1e-4 < 1e-2 < errors[18]


def chained_intervals() -> Visibility:
    """Two sequences of 45 tokens: three parts after padding, and two parts with nothing after them."""
    lines = ["_ _ _" + " a" * 7 + " G C" * 3 + " b" * 5 + " G C" * 2 + " c" * 6 + " G" * 4 + " r" * 10]
    lines += [" a" * 13 + " G C" * 6 + " b" * 17 + " G" * 3]
    parts = [[0] * 3 + [1] * 13 + [2] * 9 + [3] * 10 + [0] * 10, [1] * 25 + [2] * 20]
    tokens = [line.split() for line in lines]
    return chained(
        torch.tensor([[token in "GC" for token in row] for row in tokens]),
        torch.tensor([[token == "C" for token in row] for row in tokens]),
        torch.tensor(parts),
        torch.tensor([[token != "_" for token in row] for row in tokens]),
    )


@pytest.mark.parametrize("impl", ["sdpa", "pieces", "flex"])
def test_every_attention_takes_keys_that_are_seen_later(impl: str) -> None:
    """Compare outputs, and gradients where supported (FlexAttention has none on the CPU)."""
    visibility = chained_intervals()
    q, k, v = (torch.randn(2, 2, 45, 16, requires_grad=impl != "flex") for _ in range(3))
    results = []
    for how in ("reference", impl):
        if how == "pieces":  # what sdpa uses on the CPU for longer sequences
            out = attend_pieces(q, k, v, plan_pieces(visibility, 45), 0.25)
        else:
            out = interval_attention(q, k, v, visibility, impl=how)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        gradients = torch.autograd.grad((out * weights).sum(), (q, k, v)) if q.requires_grad else ()
        results.append((out, *gradients))
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's NumPy
def test_the_kernels_take_keys_that_are_seen_later() -> None:
    pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")
    from tests.kernels.conftest import MIXED, check, make

    check(make(45, batch=2, heads=1), chained_intervals(), MIXED)


def test_training_on_chains() -> None:
    """A model learns to answer from two separately compressed gists, and does so from chained caches."""
    model, tokenizer = tiny.patched("llama")
    words = [f"w{number}" for number in range(6)]
    records = [Record(f"{a} | {b}", "w50", f"{a} {b}") for a in words for b in words]
    collate = GistCollator(tokenizer, 1, part_separator=" | ")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(**collate(records)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    alone = gisting.compress(model, tokenizer, words)
    firsts, seconds = [0, 3, 5, 2], [4, 3, 1, 0]
    cache = GistCache.chain([alone.select(firsts), alone.select(seconds)])
    answers = gisting.generate(model, tokenizer, ["w50"] * 4, cache=cache, max_new_tokens=3, do_sample=False)
    assert answers == [f"w{a} w{b}" for a, b in zip(firsts, seconds, strict=True)]


# -- caches ------------------------------------------------------------------------------------------------------------


def assert_close(found: GistCache, expected: GistCache) -> None:
    assert found.num_gist_tokens == expected.num_gist_tokens
    assert found.origin == expected.origin
    assert found.rotary == expected.rotary
    held = expected.attention_mask.bool()[:, None, :, None]
    for mine, yours in zip((*found.keys, *found.values), (*expected.keys, *expected.values), strict=True):
        assert mine.shape == yours.shape
        assert ((mine - yours) * held).abs().max() < 1e-5


def test_chaining_is_associative() -> None:
    a, b, c = compressed(*tiny.patched("qwen3"))
    whole = GistCache.chain([a, b, c])
    assert whole.rotary == a.rotary is not None
    assert_close(GistCache.chain([GistCache.chain([a, b]), c]), whole)
    assert_close(GistCache.chain([a, GistCache.chain([b, c])]), whole)


def test_a_row_of_a_chain_is_the_chain_of_its_rows() -> None:
    caches = compressed(*tiny.patched("llama"))
    whole = GistCache.chain(caches)
    assert whole.num_slots == max(whole.num_gist_tokens) == 7
    for row in range(3):
        assert_close(whole[row], GistCache.chain([cache[row] for cache in caches]))


def test_one_prompt_stands_before_or_behind_every_row() -> None:
    a, b, _ = compressed(*tiny.patched("llama"))
    assert_close(GistCache.chain([a[1], b]), GistCache.chain([a.select([1, 1, 1]), b]))
    assert_close(GistCache.chain([a, b[2]]), GistCache.chain([a, b.select([2, 2, 2])]))


def test_a_chain_of_one_is_the_cache() -> None:
    cache = compressed(*tiny.patched("llama"), 1)[0]
    assert GistCache.chain([cache]) is cache


def test_parts_stay_as_they_are() -> None:
    caches = compressed(*tiny.patched("llama"))
    before = [cache.to("cpu", torch.float64) for cache in caches]
    GistCache.chain(caches)
    for cache, copy in zip(caches, before, strict=True):
        assert all(torch.equal(mine.double(), yours) for mine, yours in zip(cache.keys, copy.keys, strict=True))


def test_half_precision_is_rounded_once_more() -> None:
    caches = compressed(*tiny.patched("llama"))
    exact = GistCache.chain(caches)
    half = GistCache.chain([cache.to(dtype=torch.bfloat16) for cache in caches])
    assert half.dtype == torch.bfloat16
    for mine, yours in zip(half.keys, exact.keys, strict=True):
        assert (mine - yours).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * yours.abs().max()


def test_select_and_cat_keep_the_rotation() -> None:
    a, b, _ = compressed(*tiny.patched("llama"))
    assert a.rotary is not None
    assert a.select([2, 0]).rotary == a[1].rotary == GistCache.cat([a, b]).rotary == a.rotary
    # A file of format 1 does not say; another cache of the same model does.
    assert GistCache.cat([replace(a, rotary=None), b]).rotary == a.rotary
    assert_close(GistCache.chain([replace(a, rotary=None), b]), GistCache.chain([a, b]))


def test_what_is_loaded_chains_as_what_was_saved(tmp_path: Path) -> None:
    caches = compressed(*tiny.patched("gemma3_text"))
    for number, cache in enumerate(caches):
        cache.save(tmp_path / f"{number}.safetensors")
    loaded = [GistCache.load(tmp_path / f"{number}.safetensors") for number in range(3)]
    assert_close(GistCache.chain(loaded), GistCache.chain(caches))


def test_what_cannot_be_chained_is_refused() -> None:
    model, tokenizer = tiny.patched("llama")
    a, b, _ = compressed(model, tokenizer)
    positive = gisting.compress(model, tokenizer, ["w1"], condition="positive")
    with pytest.raises(GistError, match="caches is empty; give at least one"):
        GistCache.chain([])
    with pytest.raises(GistError, match=r"must be of condition 'gist' to be chained, got 'positive'.*joined prompts"):
        GistCache.chain([positive, positive])
    with pytest.raises(GistError, match=r"do not say how their keys are rotated.*compress the prompts again"):
        GistCache.chain([replace(a, rotary=None), replace(b, rotary=None)])
    with pytest.raises(GistError, match=r"must have one prompt or 3, like the largest, got \[3, 2\]"):
        GistCache.chain([a, b.select([0, 1])])
    other = gisting.compress(*tiny.patched("qwen3"), ["w1"])
    with pytest.raises(CacheMismatchError, match=r"different origins, .*llama/.*qwen3/.*compress them again"):
        GistCache.chain([a, other])
    with pytest.raises(CacheMismatchError, match=r"float32 on cpu and torch\.bfloat16.*with \.to\(\)"):
        GistCache.chain([a, b.to(dtype=torch.bfloat16)])
    assert a.rotary is not None
    turned = replace(b, rotary=replace(a.rotary, is_interleaved=True))
    for join in (GistCache.chain, GistCache.cat):
        with pytest.raises(CacheMismatchError, match="their keys are rotated differently; compress them again"):
            join([a, turned])


def test_encoder_states_are_refused() -> None:
    cache = gisting.compress(*tiny.patched("t5"), ["w1 w2"])
    with pytest.raises(GistError, match=r"caches hold encoder states, which cannot be chained.*joined prompts"):
        GistCache.chain([cache, cache])
