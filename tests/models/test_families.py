"""Tests that every family must pass, on a tiny random model of it:

- the patched model with a gist mask equals the stock model with a dense mask, in logits and gradients;
- generating from a cached gist equals generating from the full text;
- ordinary input gives the same bits as before ``patch``, and ``unpatch`` leaves no trace;
- a cached gist is an ordinary cache of length k, from which a stock, unpatched model can continue.

A new family needs one row in ``tiny.py``. All families but three are ``slow``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import gisting
from gisting._compat import cache_argument
from gisting.errors import UnsupportedModelError
from gisting.models import decoder, encoder_decoder, registry
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS, ENCODER_CONDITIONS, FOREVER, Visibility, gist
from tests import tiny

# The rows of a ragged batch: numbers of prompt tokens, gist tokens and input tokens.
#             prompt  k  input
ROWS: tuple = ((5, 3, 7), (19, 1, 2), (1, 4, 13), (11, 2, 1))
PROMPTS = [tiny.words(prompt, 1) for prompt, _, _ in ROWS]
COUNTS = [k for _, k, _ in ROWS]
INPUTS = [tiny.words(count, 2) for _, _, count in ROWS]
NEW_TOKENS = 10


def few_by_default(names: Iterable[str], default: Collection[str] = ("llama", "gemma3_text", "t5")) -> list[Any]:
    """Make parameters of ``names``, slow but for the default ones. Gemma 3 has layers with and without a sliding
    window, each with its own rotary frequencies.
    """
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


every_decoder = pytest.mark.parametrize("name", few_by_default(tiny.DECODERS))
every_encoder_decoder = pytest.mark.parametrize("name", few_by_default(tiny.ENCODER_DECODERS))
every_family = pytest.mark.parametrize("name", few_by_default([*tiny.DECODERS, *tiny.ENCODER_DECODERS]))


# -- (a) a gist mask is a dense mask -----------------------------------------------------------------------------------


class Result(NamedTuple):
    """Logits at rows with a token, and the gradient of every parameter."""

    logits: Tensor
    gradients: dict[str, Tensor]


def result_of(model: PreTrainedModel, logits: Tensor, is_token: Tensor) -> Result:
    """Weight every logit at random in the loss, so that no gradient is small by symmetry."""
    logits = logits[is_token]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits.dtype)
    model.zero_grad()
    (logits * weights).sum().backward()
    gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}
    return Result(logits.detach(), gradients)


def error_of(found: Tensor, truth: Tensor) -> float:
    """Largest difference, in units of the largest number."""
    return ((found.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def assert_as_good_as(found: Result, plain: Result, truth: Result) -> None:
    """Allow at most twice the error of the stock model in the same dtype, both against float64; the stock model itself
    must be right.

    Two roundings (2^-23) are allowed, because the stock model may happen to be exact. The weights are five times the
    usual size, and T5 does not scale its scores: its gradients are off by up to 3e-3 in float32, but a wrong mask is
    off by 1e-1 and more.
    """
    assert found.gradients.keys() == plain.gradients.keys() == truth.gradients.keys()
    plain_error, found_error = error_of(plain.logits, truth.logits), error_of(found.logits, truth.logits)
    assert plain_error < 1e-3
    assert found_error <= 2 * plain_error + 2**-22
    plain_worst = max(error_of(plain.gradients[name], truth.gradients[name]) for name in truth.gradients)
    found_errors = {name: error_of(found.gradients[name], truth.gradients[name]) for name in truth.gradients}
    assert plain_worst < 1e-2
    assert max(found_errors.values()) <= 2 * plain_worst + 2**-22, found_errors


def seen_by_someone(dense: Tensor, is_token: Tensor) -> Tensor:
    """Let a row of padding see itself: in a stock model a row that sees nothing is NaN. No other row sees it, so
    nothing else changes.
    """
    return dense | torch.diag_embed(~is_token)


def stock_mask(model: PreTrainedModel, dense: Tensor) -> Any:
    """A dense mask in the form that the stock model takes, with mixed layers or without.

    transformers passes a 4-D mask to all layers, whether they have a window or not; what a window hides is removed
    here, by its definition.
    """
    config, num_keys = model.config, dense.shape[-1]
    if config._attn_implementation == "eager":

        def form(mask: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)[:, None]
    else:

        def form(mask: Tensor) -> Tensor:
            return mask[:, None]

    if getattr(config, "sliding_window", None) is None:
        return form(dense)
    age = torch.arange(num_keys)[:, None] - torch.arange(num_keys)[None]
    windowed = dense & (age < config.sliding_window)
    if "full_attention" not in (getattr(config, "layer_types", None) or ()):
        return form(windowed)
    return {"full_attention": form(dense), "sliding_attention": form(windowed)}


def decoder_batch(tokenizer: GistTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    encodings = tokenizer.encode_batch(PROMPTS, INPUTS, num_gist_tokens=COUNTS)
    ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id, left=True)
    return ids, is_token, ids == tokenizer.gist_token_id


@every_decoder
@pytest.mark.parametrize("condition", CONDITIONS)
def test_interval_mask_is_dense_mask(name: str, condition: str) -> None:
    model, tokenizer = tiny.patched(name)
    ids, is_token, is_gist = decoder_batch(tokenizer)
    visibility = CONDITIONS[condition](is_gist, is_token)
    assert visibility.position_ids is not None
    found = result_of(
        model,
        model(ids, attention_mask=visibility.as_attention_mask(), position_ids=visibility.position_ids).logits,
        is_token,
    )
    stock = tiny.stock_twin(name, model)
    dense = seen_by_someone(visibility.to_dense(), is_token)
    results = []
    for dtype in (torch.float32, torch.float64):
        stock = stock.to(dtype)
        if dtype == torch.float64:
            stock.set_experts_implementation("eager")  # torch has no grouped matrix product in float64.
        mask = stock_mask(stock, dense)
        logits = stock(ids, attention_mask=mask, position_ids=visibility.position_ids).logits
        results.append(result_of(stock, logits, is_token))
    assert_as_good_as(found, *results)

    # The published scheme counts positions from the first token of the text, ours from the gist. Rotary frequencies
    # are float32 in any model, so the same distance at another place rounds differently: half a unit in the last place
    # of an angle of up to 32 radians, 2^-20, for each of two tokens and three layers, 6e-6 in total (measured: 6e-7).
    counted = (is_token.long().cumsum(-1) - 1).clamp(min=0)
    stock = stock.float()
    with torch.no_grad():
        published = stock(ids, attention_mask=stock_mask(stock, dense), position_ids=counted).logits[is_token]
    assert error_of(found.logits, published.double()) < 6e-6


@every_encoder_decoder
@pytest.mark.parametrize("condition", ENCODER_CONDITIONS)
@pytest.mark.parametrize("left", [True, False], ids=["pad-left", "pad-right"])
def test_interval_mask_is_dense_mask_in_encoder(name: str, condition: str, left: bool) -> None:
    model, tokenizer = tiny.patched(name)
    encodings = tokenizer.encode_batch(PROMPTS, INPUTS, num_gist_tokens=COUNTS)
    ids, is_token = pad_rows([encoding.input_ids for encoding in encodings], tokenizer.pad_token_id, left=left)
    visibility = ENCODER_CONDITIONS[condition](ids == tokenizer.gist_token_id, is_token)
    targets = torch.randint(4, 60, (len(ROWS), 6))
    all_targets = torch.ones_like(targets, dtype=torch.bool)
    found = result_of(
        model,
        model(ids, attention_mask=visibility.as_attention_mask(), decoder_input_ids=targets).logits,
        all_targets,
    )
    dense = seen_by_someone(visibility.to_dense(), is_token)[:, None]
    stock = tiny.stock_twin(name, model)
    results = []
    for dtype in (torch.float32, torch.float64):
        stock = stock.to(dtype)
        states = stock.get_encoder()(ids, attention_mask=dense)
        logits = stock(
            encoder_outputs=states, attention_mask=visibility.survivors().long(), decoder_input_ids=targets
        ).logits
        results.append(result_of(stock, logits, all_targets))
    assert_as_good_as(found, *results)


# -- (b) cached is uncached --------------------------------------------------------------------------------------------


def uncached_answers(model: PreTrainedModel, tokenizer: GistTokenizer) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield each row's logits of the first new token and all greedy tokens, from the full text without a cache."""
    for encoding in tokenizer.encode_batch(PROMPTS, INPUTS, num_gist_tokens=COUNTS):
        ids, first, answer = torch.tensor([encoding.input_ids]), None, []
        for _ in range(NEW_TOKENS):
            visibility = gist(ids == tokenizer.gist_token_id)
            logits = model(
                ids, attention_mask=visibility.as_attention_mask(), position_ids=visibility.position_ids
            ).logits[0, -1]
            first = logits if first is None else first
            answer.append(logits[: tokenizer.gist_token_id].argmax().item())
            if answer[-1] == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([answer[-1:]])], dim=1)
        assert first is not None
        yield first, answer


def greedy(model: PreTrainedModel, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The first logits ``(B, V)`` and the new tokens ``(B, N)`` of stock generate."""
    out = model.generate(
        **arguments, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.logits[0], out.sequences


@every_decoder
@torch.no_grad()
def test_cached_is_uncached(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS)
    texts = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    continuations = tokenizer.encode_continuations(INPUTS)
    for row, (logits, answer) in enumerate(uncached_answers(model, tokenizer)):
        arguments, given = decoder.prepare_generation(model, tokenizer, cache[row], [continuations[row]])
        cached_logits, tokens = greedy(model, arguments)
        # The same sums and angles round differently, as in the comparison above.
        assert error_of(cached_logits[0], logits.double()) < 6e-6
        assert tokens[0, given:].tolist() == answer
        assert texts[row] == tokenizer.decode(answer)
    assert len(set(texts)) > 1, "answers that do not depend on the prompt would prove nothing"


@every_encoder_decoder
@torch.no_grad()
def test_cached_is_uncached_in_encoder(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS)
    texts = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    continuations = tokenizer.encode_continuations(INPUTS)
    encodings = tokenizer.encode_batch(PROMPTS, INPUTS, num_gist_tokens=COUNTS)
    for row, encoding in enumerate(encodings):
        full = encoder_decoder.prepare_full_generation(model, tokenizer, [encoding], "gist")
        logits, tokens = greedy(model, full)
        cached_logits, cached_tokens = greedy(
            model, encoder_decoder.prepare_generation(model, tokenizer, cache[row], [continuations[row]])[0]
        )
        # T5 does not scale its scores, so it is less exact: float32 is 1e-5 from float64 (measured here: 5e-6).
        assert error_of(cached_logits[0], logits[0].double()) < 2e-5
        assert cached_tokens.tolist() == tokens.tolist()
        assert texts[row] == tokenizer.decode(tokens[0].tolist())
    assert len(set(texts)) > 1, "answers that do not depend on the prompt would prove nothing"


# -- (c) ordinary input, (d) unpatch -----------------------------------------------------------------------------------


class Ordinary(NamedTuple):
    """What a model computes from text without gist tokens."""

    padded: Tensor
    bare: Tensor
    tokens: Tensor
    beams: Tensor


@torch.no_grad()
def ordinary(model: PreTrainedModel, name: str, vocabulary: int) -> Ordinary:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, 60, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    targets = {}
    if name in tiny.ENCODER_DECODERS:
        targets["decoder_input_ids"] = torch.randint(4, 60, (2, 6), generator=generator)
    return Ordinary(
        model(ids, attention_mask=mask, **targets).logits[..., :vocabulary],
        model(ids, **targets).logits[..., :vocabulary],
        model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False),
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=3),
    )


def assert_bits(found: Ordinary, wanted: Ordinary) -> None:
    for field, have, want in zip(Ordinary._fields, found, wanted, strict=True):
        assert torch.equal(have, want), field


@every_family
def test_ordinary_input_is_unchanged_and_unpatch_leaves_nothing(name: str) -> None:
    model = tiny.model(name)
    vocabulary = len(tiny.VOCABULARY)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    config, generation_config = copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict()
    stacks = {path: stack for path, stack in model.named_modules() if isinstance(stack, PreTrainedModel)}
    attention = {path: stack.config._attn_implementation for path, stack in stacks.items()}
    assert not any(module._forward_pre_hooks for module in model.modules())
    before = ordinary(model, name, vocabulary)

    gisting.patch(model, tiny.tokenizer(name))
    assert all(stack.config._attn_implementation.startswith("gist") for stack in stacks.values())
    assert_bits(ordinary(model, name, vocabulary), before)

    gisting.unpatch(model)
    assert_bits(ordinary(model, name, vocabulary), before)
    assert model.state_dict().keys() == weights.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation_config
    assert {path: stack.config._attn_implementation for path, stack in stacks.items()} == attention
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model, "_gist_undo")


# -- (e) an ordinary cache of length k ---------------------------------------------------------------------------------


@every_decoder
def test_stock_generate_continues_from_a_gist(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    stock = tiny.stock_twin(name, model)
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS)
    texts = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    for row, (k, rest) in enumerate(zip(COUNTS, tokenizer.encode_continuations(INPUTS), strict=True)):
        ids = torch.tensor([[tokenizer.gist_token_id] * k + rest])
        for which in (model, stock):
            tokens = which.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{cache_argument(): cache[row].as_past_key_values()},
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            assert tokenizer.decode(tokens[0, ids.shape[1] :].tolist()) == texts[row]


@every_decoder
def test_stock_generate_continues_from_a_ragged_batch(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    if registry.sliding_windows(model.config) is not None:
        pytest.skip("a sliding window counts columns, padding included; gisting.generate runs such rows by length")
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS)
    texts = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    rest, is_token = pad_rows(tokenizer.encode_continuations(INPUTS), tokenizer.pad_token_id, left=True)
    held = torch.where(cache.attention_mask.bool(), tokenizer.gist_token_id, tokenizer.pad_token_id)
    ids = torch.cat([held, rest], dim=1)
    for which in (model, tiny.stock_twin(name, model)):
        tokens = which.generate(
            ids,
            attention_mask=torch.cat([cache.attention_mask, is_token.long()], dim=1),
            **{cache_argument(): cache.as_past_key_values()},
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        assert [tokenizer.decode(row) for row in tokens[:, ids.shape[1] :].tolist()] == texts


@every_encoder_decoder
def test_stock_generate_continues_from_cached_encoder_states(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS)
    texts = gisting.generate(model, tokenizer, INPUTS, cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    arguments, _ = encoder_decoder.prepare_generation(model, tokenizer, cache, tokenizer.encode_continuations(INPUTS))
    for which in (model, tiny.stock_twin(name, model)):
        tokens = which.generate(**copy.deepcopy(arguments), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert [tokenizer.decode(row) for row in tokens.tolist()] == texts


# -- tests of the tests ------------------------------------------------------------------------------------------------


def _ignore_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make attention read nothing of a gist mask but which keys are padding."""

    def causal_only(attention_mask: Tensor) -> Visibility:
        first, end = attention_mask[:, 0, 0], attention_mask[:, 0, 1]
        return Visibility(first, torch.where(end > first, FOREVER, end))

    monkeypatch.setattr(Visibility, "from_attention_mask", staticmethod(causal_only))


def _count_positions_from_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions as the published code counts them, which an ordinary cache of length k cannot continue."""

    def unanchored(is_gist: Tensor, padding: Tensor | None = None) -> Visibility:
        right = gist(is_gist, padding)
        return Visibility(right.first, right.end, torch.arange(right.num_keys).expand_as(right.first))

    monkeypatch.setitem(CONDITIONS, "gist", unanchored)


def _drop_the_last_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the decoder read the placeholders' states instead of the gist's."""
    right = encoder_decoder.prepare_generation

    def wrong(model: PreTrainedModel, tokenizer: GistTokenizer, cache: Any, *args: Any, **kwargs: Any) -> Any:
        cache = dataclasses.replace(cache, last_hidden=torch.zeros_like(cache.last_hidden))
        return right(model, tokenizer, cache, *args, **kwargs)

    monkeypatch.setattr(encoder_decoder, "prepare_generation", wrong)


@pytest.mark.parametrize(
    ("plant", "test", "arguments"),
    [
        pytest.param(_ignore_the_mask, test_interval_mask_is_dense_mask, ("llama", "gist"), id="mask-ignored"),
        pytest.param(
            _ignore_the_mask, test_interval_mask_is_dense_mask, ("gemma2", "negative"), id="mask-ignored-softcap"
        ),
        pytest.param(
            _ignore_the_mask, test_interval_mask_is_dense_mask_in_encoder, ("t5", "gist", True), id="mask-ignored-t5"
        ),
        pytest.param(_count_positions_from_the_text, test_cached_is_uncached, ("llama",), id="not-anchored"),
        pytest.param(
            _count_positions_from_the_text, test_cached_is_uncached, ("gemma3_text",), id="not-anchored-window"
        ),
        pytest.param(_drop_the_last_hidden_states, test_cached_is_uncached_in_encoder, ("t5",), id="states-dropped"),
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    test: Callable[..., None],
    arguments: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    # If patch tries the model first, its check finds the bug.
    with pytest.raises((AssertionError, UnsupportedModelError)):
        test(*arguments)
