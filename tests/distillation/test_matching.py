"""Slots matched to attention: against stock attention, exact solutions, planted slots, and what cannot be followed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import gisting
from gisting import GistError
from gisting._compat import cache_argument
from gisting.distillation import matching, starts
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


def given(name: str) -> tuple[Any, Any, Teacher, Any, list[list[int]]]:
    model, tokenizer = tiny.patched(name)
    answers = sample_answers(model, tokenizer, [(PROMPT, input) for input in INPUTS], max_new_tokens=5)
    origin = gisting.compress(model, tokenizer, [PROMPT], 1).origin
    whole = whole_prompt(model, tokenizer, PROMPT, origin)
    befores = tokenizer.encode_continuations(INPUTS)
    rows = [[*before, *answer.token_ids] for before, answer in zip(befores, answers, strict=True)]
    return model, tokenizer, ask_teacher(model, tokenizer, answers), whole, rows


def hidden_after(model: Any, keys: Any, values: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states of texts, each after these states."""
    past = PrefixStates()
    for layer, states in enumerate(zip(keys, values, strict=True)):
        one, two = (part.expand(len(ids), -1, -1, -1) for part in states)
        past.update(one, two, layer)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        return model.base_model(input_ids=ids, **{cache_argument(): past}, use_cache=True).last_hidden_state


def watched(model: Any, monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Run ``call``; return what it returns, the ids that it gave the model, and the hidden states that came out."""
    seen: dict[str, Any] = {}
    stack = type(model.base_model)
    own = stack.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen["ids"], seen["out"] = kwargs["input_ids"], own(self, *args, **kwargs)
        return seen["out"]

    with monkeypatch.context() as patched:
        patched.setattr(stack, "forward", forward)
        found = call()
    return found, seen["ids"], seen["out"].last_hidden_state


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_that_is_matched_is_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass whose layers get the outputs with the whole prompt gives what the model gives itself, at every token."""
    model, _, _, whole, rows = given(name)
    _, ids, out = watched(model, monkeypatch, lambda: match_attention(model, rows, whole, 4, None))
    is_token = torch.tensor([[column < len(row) for column in range(ids.shape[1])] for row in rows])
    assert not is_token.all()
    expected = hidden_after(model, whole.keys, whole.values, ids)
    torch.testing.assert_close(out[is_token], expected[is_token], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_later_layers_read_what_the_slots_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass with fitted slots gives what the model gives when it is served with them, also beyond a sliding window."""
    model, _, _, whole, rows = given(name)
    assert max(map(len, rows)) > tiny.WINDOW - 4
    found, ids, out = watched(model, monkeypatch, lambda: match_attention(model, rows, whole, 4, 8))
    is_token = torch.tensor([[column < len(row) for column in range(ids.shape[1])] for row in rows])
    expected = hidden_after(model, *found, ids)
    torch.testing.assert_close(out[is_token], expected[is_token], atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", *tiny.slow_but(["smollm3", "gpt_neox"])])
def test_as_many_slots_as_tokens_are_the_prompt(name: str) -> None:
    """Nothing is missing then, so solving for the values leaves them as they are."""
    model, _, _, whole, rows = given(name)
    found = match_attention(model, rows, whole, whole.num_slots, 0)
    for ours, theirs in zip((*found[0], *found[1]), (*whole.keys, *whole.values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_matched_slots_are_nearer_than_the_tokens_that_they_start_from(name: str) -> None:
    """In the distributions at the answers, which the fit never looks at."""
    model, tokenizer, teacher, whole, _ = given(name)
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
    found = _Queries(asked, softcap, None, mass, rest, torch.zeros_like(rest))
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


def test_what_a_window_hides_gets_no_weight() -> None:
    """Not even where it hides all slots, and gradients stay numbers."""
    found, keys, _ = problem(queries=3)
    found = found._replace(hidden=torch.tensor([[False, False, False], [True, False, False], [True, True, True]]))
    keys.requires_grad_()
    weights, rest = found.weights(keys)
    assert (weights == 0).tolist() == [[row.tolist() for row in found.hidden]] * 2
    torch.testing.assert_close(weights.sum(-1) + rest[..., 0], torch.ones(2, 3))
    assert rest[0, 2] == 1
    (gradient,) = torch.autograd.grad(weights.pow(2).sum(), keys)
    assert gradient.isfinite().all()


def test_parts_hold_every_query_once() -> None:
    """At random: every third query would be that of the same query head, if three share a key head."""
    found, _, _ = problem(queries=12)
    found = found._replace(rest_mass=torch.arange(12.0).expand(2, -1), hidden=torch.arange(12)[:, None] % 2 == 0)
    parts = found.parts(5)
    held = [part.rest_mass[0].int().tolist() for part in parts]
    assert [len(one) for one in held] == [4, 4, 4]
    assert sorted(place for one in held for place in one) == list(range(12))
    assert all(len({place % 3 for place in one}) > 1 for one in held)
    for part, places in zip(parts, held, strict=True):
        assert torch.equal(part.queries, found.queries[:, places])
        assert torch.equal(part.target, found.target[:, places])
        assert part.hidden is not None
        assert part.hidden[:, 0].tolist() == [place % 2 == 0 for place in places]
    assert len(found.parts(12)) == 1


def test_the_same_texts_give_the_same_bits() -> None:
    model, _, _, whole, rows = given("llama")
    one, two = (match_attention(model, rows, whole, 4, 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True))


def test_of_many_answers_some_of_all_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs may be in an order, such as those about the prompt first; and after long prompts there are fewer."""
    model, tokenizer, teacher, whole, rows = given("llama")
    seen: list[list[list[int]]] = []
    own = starts.match_attention
    monkeypatch.setattr(
        starts, "match_attention", lambda model, rows, *more: seen.append(rows) or own(model, rows, *more)
    )
    monkeypatch.setattr(starts, "_FEWEST_ANSWERS", 2)
    monkeypatch.setattr(starts, "_NUM_ANSWERS", 3)
    make_start(model, tokenizer, teacher, 4, "matched", whole.origin)
    assert len(seen[0]) == 3
    assert seen[0] != rows[:3]
    assert all(row in rows for row in seen[0])
    monkeypatch.setattr(starts, "_MOST_TOKENS", 2 * (whole.num_slots + max(map(len, rows))))
    make_start(model, tokenizer, teacher, 4, "matched", whole.origin)
    assert len(seen[1]) == 2


def test_numbers_that_are_none_are_named() -> None:
    model, tokenizer, teacher, whole, _ = given("llama")
    with torch.no_grad():
        model.base_model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    for start in ("first", "attended", "matched"):
        with pytest.raises(
            GistError, match="the states of the prompt hold NaN or infinity: the model overflows in float32"
        ):
            make_start(model, tokenizer, teacher, 4, start, whole.origin)


def test_another_thread_runs_the_same_model_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _, whole, rows = given("llama")
    ids = torch.tensor([rows[0]])
    expected = hidden_after(model, whole.keys, whole.values, ids)
    found: list[torch.Tensor] = []
    own = matching._fit

    def fit(*args: Any) -> Any:
        if not found:
            thread = threading.Thread(target=lambda: found.append(hidden_after(model, whole.keys, whole.values, ids)))
            thread.start()
            thread.join()
        return own(*args)

    monkeypatch.setattr(matching, "_fit", fit)
    match_attention(model, rows, whole, 4, 5)
    torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=1e-4)


def test_a_model_that_cannot_be_followed_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that attention does not read as they are cached are refused, and so are layers that were not seen."""
    model, _, _, whole, rows = given("llama")

    class Shifted(PrefixStates):
        def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(keys + 1, values, *args, **kwargs)

    monkeypatch.setattr(matching, "PrefixStates", Shifted)
    with pytest.raises(GistError, match=r"cannot follow the attention of LlamaAttention .* use start='first'"):
        match_attention(model, rows, whole, 4, 5)
    assert model.config._attn_implementation == "gist"
    monkeypatch.undo()
    monkeypatch.setattr(matching, "_attention", lambda module, query, *_, **__: (query.transpose(1, 2), None))
    with pytest.raises(GistError, match=r"cannot follow the attention of llama \(0 of 3 layers were seen"):
        match_attention(model, rows, whole, 4, 5)
    monkeypatch.undo()
    assert len(match_attention(model, rows, whole, 4, 5)[0]) == 3
