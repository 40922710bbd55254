"""Slots matched to attention: against stock attention, exact solutions, planted slots, and what cannot be followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gisting
from gisting import GistError
from gisting._compat import cache_argument
from gisting.distillation import matching
from gisting.distillation.matching import _fit, _least_squares, _Queries, match_attention
from gisting.distillation.starts import make_start
from gisting.eval.divergence import Teacher, ask_teacher, measure_divergence
from gisting.generation.compression import whole_prompt
from gisting.generation.sampling import sample_answers
from gisting.models.prefix import PrefixStates
from tests import tiny

PROMPT = tiny.words(14, 5)
INPUTS = [tiny.words(1 + number % 4, 40 + number) for number in range(6)]
# A sliding window that the prompt exceeds, a softcap, layers without rotation, interleaved rotation, sinks.
FAMILIES = ["llama", "gpt_oss", *tiny.slow_but(["qwen2-window", "gemma2", "smollm3", "cohere2", "gpt_neox"], "gemma2")]


def given(name: str) -> tuple[Any, Any, Teacher, Any]:
    model, tokenizer = tiny.patched(name)
    answers = sample_answers(model, tokenizer, [(PROMPT, input) for input in INPUTS], max_new_tokens=5)
    origin = gisting.compress(model, tokenizer, [PROMPT], 1).origin
    return model, tokenizer, ask_teacher(model, tokenizer, answers), whole_prompt(model, tokenizer, PROMPT, origin)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_that_is_matched_is_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass whose layers get the outputs with the whole prompt gives what the model gives itself, at every token."""
    model, tokenizer, teacher, whole = given(name)
    seen: dict[str, Any] = {}
    stack = model.base_model
    own = type(stack).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen["ids"] = kwargs["input_ids"]
        seen["out"] = own(self, *args, **kwargs)
        return seen["out"]

    with monkeypatch.context() as patched:
        patched.setattr(type(stack), "forward", watched)
        match_attention(model, tokenizer, teacher, whole, 4, None)
    past = PrefixStates()
    for layer, (keys, values) in enumerate(zip(whole.keys, whole.values, strict=True)):
        past.update(*(one.expand(len(INPUTS), -1, -1, -1) for one in (keys, values)), layer)
    with torch.no_grad():
        expected = stack(input_ids=seen["ids"], **{cache_argument(): past}, use_cache=True).last_hidden_state
    is_token = seen["ids"] != tokenizer.pad_token_id
    assert is_token.sum() > 30
    assert not is_token.all()
    torch.testing.assert_close(seen["out"].last_hidden_state[is_token], expected[is_token], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", *tiny.slow_but(["smollm3", "gpt_neox"])])
def test_as_many_slots_as_tokens_are_the_prompt(name: str) -> None:
    """Nothing is missing then, so solving for the values leaves them as they are."""
    model, tokenizer, teacher, whole = given(name)
    found = match_attention(model, tokenizer, teacher, whole, whole.num_slots, 0)
    for ours, theirs in zip((*found[0], *found[1]), (*whole.keys, *whole.values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_matched_slots_are_nearer_than_the_tokens_that_they_start_from(name: str) -> None:
    """In the distributions at the answers, which the fit never looks at."""
    model, tokenizer, teacher, whole = given(name)
    kl = {}
    for start in ("first", "attended", "matched"):
        cache = make_start(model, tokenizer, teacher, 4, start, whole.origin)
        assert cache.num_gist_tokens == [4]
        assert cache.is_finite()
        kl[start] = measure_divergence(model, tokenizer, teacher, cache).mean
    assert kl["matched"] < 0.6 * min(kl["attended"], kl["first"])


def problem(groups: int = 2, queries: int = 400, size: int = 8, softcap: float | None = None, slots: int = 3) -> Any:
    """Queries whose outputs come from known slots and a rest of known mass."""
    torch.manual_seed(3)
    keys, values = torch.randn(groups, slots, size), torch.randn(groups, slots, size)
    asked = torch.randn(groups, queries, size)
    mass, rest = torch.randn(groups, queries), torch.randn(groups, queries, size)
    found = _Queries(asked, softcap, mass, rest, torch.zeros_like(rest))
    weights, of_rest = found.weights(keys)
    return found._replace(target=weights @ values + of_rest * rest), keys, values


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_weights_are_a_softmax_over_slots_and_rest(softcap: float | None) -> None:
    found, keys, _ = problem(softcap=softcap)
    scores = found.queries @ keys.transpose(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    expected = torch.cat([scores, found.rest_mass[..., None]], -1).softmax(-1)
    weights, rest = found.weights(keys)
    torch.testing.assert_close(torch.cat([weights, rest], -1), expected)


def test_values_are_those_of_least_squares() -> None:
    """Against torch's solver of the same problem, with values that cannot fit everywhere."""
    found, keys, values = problem()
    found = found._replace(target=found.target + torch.randn_like(found.target))
    weights, rest = found.weights(keys)
    expected = torch.linalg.lstsq(weights, found.target - rest * found.rest).solution
    solved = _least_squares(found, keys, values + torch.randn_like(values))
    torch.testing.assert_close(solved, expected, atol=0.02, rtol=0.02)  # up to the ridge


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_planted_slots_are_found_from_near_them(softcap: float | None) -> None:
    found, keys, values = problem(softcap=softcap)
    start = keys + 0.5 * torch.randn_like(keys)
    fitted = _fit(found, start, torch.randn_like(values), 400)
    weights, rest = found.weights(fitted[0])
    error = (weights @ fitted[1] + rest * found.rest - found.target).pow(2).mean()
    plain = _least_squares(found, start, values)
    weights, rest = found.weights(start)
    assert error < 0.01 * (weights @ plain + rest * found.rest - found.target).pow(2).mean()
    torch.testing.assert_close(fitted[0], keys, atol=0.1, rtol=0.1)


def test_parts_hold_every_query_once() -> None:
    found, _, _ = problem(queries=10)
    parts = found.parts(4)
    assert [part.queries.shape[1] for part in parts] == [4, 3, 3]
    assert torch.equal(parts[1].target, found.target[:, 1::3])
    assert torch.equal(parts[2].rest_mass, found.rest_mass[:, 2::3])
    (whole,) = found.parts(10)
    assert all(torch.equal(one, other) for one, other in zip(whole, found, strict=True) if other is not None)


def test_the_same_answers_give_the_same_bits() -> None:
    model, tokenizer, teacher, whole = given("llama")
    one, two = (match_attention(model, tokenizer, teacher, whole, 4, 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True))


def test_of_many_answers_some_of_all_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs may be in an order, such as those about the prompt first."""
    model, tokenizer, teacher, whole = given("llama")
    seen: list[int] = []
    pad = matching.pad_rows
    monkeypatch.setattr(
        matching, "pad_rows", lambda rows, *more, **how: seen.append(len(rows)) or pad(rows, *more, **how)
    )
    monkeypatch.setattr(matching, "_NUM_ANSWERS", 3)
    some = match_attention(model, tokenizer, teacher, whole, 4, 0)
    first = match_attention(model, tokenizer, teacher.select(range(3)), whole, 4, 0)
    assert seen == [3, 3]
    assert not torch.equal(some[1][0], first[1][0])


def test_a_model_that_cannot_be_followed_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that attention does not read as they are cached are refused, and so are layers that were not seen."""
    model, tokenizer, teacher, whole = given("llama")

    class Shifted(PrefixStates):
        def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(keys + 1, values, *args, **kwargs)

    monkeypatch.setattr(matching, "PrefixStates", Shifted)
    with pytest.raises(GistError, match=r"cannot follow the attention of LlamaAttention .* use start='first'"):
        match_attention(model, tokenizer, teacher, whole, 4, 5)
    assert model.config._attn_implementation == "gist"
    monkeypatch.undo()
    monkeypatch.setattr(matching, "_attention", lambda module, query, *_, **__: (query.transpose(1, 2), None))
    with pytest.raises(GistError, match=r"cannot follow the attention of llama \(0 of 3 layers were seen"):
        match_attention(model, tokenizer, teacher, whole, 4, 5)
    monkeypatch.undo()
    assert len(match_attention(model, tokenizer, teacher, whole, 4, 5)[0]) == 3
