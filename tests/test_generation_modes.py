"""Ways of generating: the table of docs/generation.md holds, and so does what its cells cannot show."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
    TextIteratorStreamer,
    pipeline,
)
from transformers.utils.import_utils import is_optimum_quanto_available

import gisting
from gisting import cache as cache_module
from gisting._compat import cache_argument, num_constraint_numbers
from gisting.cache import GistCache
from gisting.errors import CacheMismatchError, GistError, GistTokenError
from gisting.generation import answers, converse, streaming
from gisting.models import decoder
from gisting.pipeline import GistTextGenerationPipeline
from gisting.tokens import GistTokenizer
from gisting.visibility import CONDITIONS
from tests import generation_modes as modes
from tests import tiny
from tests.generation_modes import COUNTS, INPUTS, LENGTH, NEXT, PROMPTS, Case
from tests.models.test_families import few_by_default

GREEDY: dict[str, Any] = {"max_new_tokens": LENGTH, "do_sample": False}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("llama")


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case_of() -> Callable[[str], Case]:
    """One case for all modes of a family."""
    return functools.cache(Case)


def test_the_documented_table_is_complete() -> None:
    documented = modes.documented()
    assert list(documented) == [(mode, family) for mode in modes.MODES for family in modes.FAMILIES]
    assert "differs" not in documented.values()


def _compiles(mode: str) -> Any:
    return pytest.param(mode, marks=pytest.mark.slow) if mode == "static cache, compiled" else mode


@pytest.mark.parametrize("mode", [*map(_compiles, modes.MODES)])
@pytest.mark.parametrize("name", few_by_default(modes.FAMILIES, ("llama", "mistral-window", "t5")))
def test_a_documented_outcome_holds(name: str, mode: str, case_of: Callable[[str], Case]) -> None:
    found, documented = modes.outcome(mode, case_of(name)), modes.documented()[mode, name]
    assert found == documented, "docs/generation.md is out of date; run python -m tests.generation_modes"


def _forget_the_gist(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoder.prefix_states

    def forget(*args: Any) -> GistCache:
        cache = right(*args)
        return dataclasses.replace(cache, values=tuple(torch.zeros_like(values) for values in cache.values))

    monkeypatch.setattr(decoder, "prefix_states", forget)


def _mix_up_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoder.prepare_generation

    def mix_up(model: Any, tokenizer: Any, cache: GistCache, rests: Any, copies: int = 1, **settings: Any) -> Any:
        arguments, given = right(model, tokenizer, cache, rests, copies, **settings)
        rows = [row for _ in range(copies) for row in range(len(cache))]
        return {**arguments, cache_argument(): cache.select(rows).as_past_key_values(**settings)}, given

    monkeypatch.setattr(decoder, "prepare_generation", mix_up)


def _shift_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoder.continued

    def shift(*args: Any) -> GistCache:
        cache = right(*args)
        return dataclasses.replace(cache, keys=tuple(keys.roll(1, dims=2) for keys in cache.keys))

    monkeypatch.setattr(decoder, "continued", shift)


def _forget_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "up_to_end", lambda answer, *_: answer[:1])


def _stream_what_is_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming.AnswerStreamer, "put", lambda self, value: self.streamer.put(value))


@pytest.mark.parametrize(
    ("mode", "plant"),
    [
        ("greedy", _forget_the_gist),
        ("sampling", _forget_the_gist),
        ("static cache", _forget_the_gist),
        ("prompt look-up", _forget_the_gist),
        ("stock `generate`", _forget_the_gist),
        ("beam search", _mix_up_copies),
        ("two turns", _shift_what_was_said),
        ("two turns", _forget_what_was_said),
        ("two turns, sampled", _shift_what_was_said),
        ("streaming", _stream_what_is_in_front),
        ("quantised cache (fp8)", lambda patch: patch.setattr(cache_module, "_FP8_HEADROOM", 4096)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.strip("_"),
)
def test_a_planted_bug_shows(mode: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: Any) -> None:
    assert modes.outcome(mode, Case("llama")) == "equal"
    plant(monkeypatch)
    assert modes.outcome(mode, Case("llama")) != "equal"


# -- transformers' caches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral-window"])
@pytest.mark.parametrize("k", [1, 7, 8, 20])
def test_layers_of_the_models_kind_go_on_from_k_gists(name: str, k: int, implementation: str) -> None:
    """Sliding layers hold 8 or 7 keys: fewer than the gist, as many, or more; and the input fills them or does not."""
    model, tokenizer = tiny.patched(name)
    stock: Any = model
    cache = gisting.compress(model, tokenizer, PROMPTS[:1], k)
    for text in ("w1", tiny.words(6, 3), tiny.words(15, 3)):
        rest = tokenizer.encode_continuations([text])[0]
        ids = torch.tensor([[tokenizer.gist_token_id] * k + rest])
        past = cache.as_past_key_values(implementation, config=model.config, max_cache_len=ids.shape[1] + LENGTH)
        assert any(past.is_sliding) == (name != "llama")
        tokens = stock.generate(ids, **{cache_argument(): past}, **GREEDY)
        encoding = tokenizer.encode(PROMPTS[0], text, num_gist_tokens=k).input_ids
        said = tokens[0, ids.shape[1] :].tolist()
        assert said[: said.index(2) + 1 if 2 in said else None] == modes.plain(model, tokenizer, [encoding])[0]


CACHE_CALLS: list[tuple[dict[str, Any], str]] = [
    (
        {"cache_implementation": "paged"},
        "^cache_implementation must be one of dynamic, static, offloaded, offloaded_static, quantized, got 'paged'$",
    ),
    (
        {"cache_implementation": "offloaded"},
        "^cache_implementation='offloaded' waits on CUDA streams, the cache is on cpu; use 'dynamic' or 'static'$",
    ),
    ({"cache_implementation": "offloaded_static", "config": True}, "^cache_implementation='offloaded_static' waits on"),
    (
        {"cache_implementation": "static", "max_cache_len": 9},
        "^cache_implementation='static' is made for the layers of one model; give config=model.config$",
    ),
    ({"cache_implementation": "quantized"}, "^cache_implementation='quantized' is made for the layers of one model"),
    (
        {"cache_implementation": "static", "config": True},
        "^cache_implementation='static' needs max_cache_len, the sum of the cache's 3 slots, .* tokens, got None$",
    ),
    ({"cache_implementation": "static", "config": True, "max_cache_len": 2}, "needs max_cache_len, .* got 2$"),
    (
        {"cache_implementation": "quantized", "config": True, "cache_config": {"backend": "no"}},
        "^cache_implementation='quantized', cache_config={'backend': 'no'} is refused by transformers: Unknown quant",
    ),
    (
        {"cache_implementation": "quantized", "config": True, "cache_config": {"backend": "fp8", "bits": 3}},
        "is refused by transformers: .*unexpected keyword argument 'bits'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), CACHE_CALLS)
def test_caches_that_cannot_be_made(case: Case, arguments: dict[str, Any], message: str) -> None:
    if "config" in arguments:
        arguments = {**arguments, "config": case.model.config}
    with pytest.raises(GistError, match=message):
        case.cache.as_past_key_values(**arguments)


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("llama", {"cache_implementation": "paged"}, GistError, "^cache_implementation must be one of dynamic, static"),
        ("t5", {"cache_implementation": "quantized"}, GistError, "^cache_implementation must be 'dynamic' or 'static'"),
        ("t5", {"prefill_chunk_size": 2}, GistError, "^prefill_chunk_size works for decoders only: for t5, transfor"),
        ("llama", {"use_cache": False}, GistError, "^use_cache must be True: without a cache, nothing holds the gist$"),
        ("llama", {"assistant_early_exit": 1}, GistError, "^assistant_early_exit drafts with parts of the model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_generate_refuses_ways(name: str, settings: dict[str, Any], error: type[GistError], message: str) -> None:
    with pytest.raises(error, match=message):
        Case(name).generate(**settings)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}], ids=str)
def test_padding_is_no_token_that_was_seen(settings: dict[str, Any]) -> None:
    """Padding often has the id of the end of sequence, which a short row could otherwise not produce."""
    words = tiny.word_tokenizer()
    words.pad_token = "w5"
    tokenizer = GistTokenizer(words, "plain")
    model = gisting.patch(tiny.model("llama"), tokenizer)
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS)

    def scores(inputs: list[str], cache: GistCache) -> Tensor:
        kept: list[Tensor] = []
        processors = LogitsProcessorList([_Keep(kept)])
        call: dict[str, Any] = {**GREEDY, **settings, "logits_processor": processors, "max_new_tokens": 1}
        gisting.generate(model, tokenizer, inputs, cache=cache, **call)
        return kept[0]

    together = scores(INPUTS, cache)
    for row, text in enumerate(INPUTS):
        torch.testing.assert_close(together[row], scores([text], cache[row])[0], atol=1e-4, rtol=1e-4)


class _AddTo(LogitsProcessor):
    def __init__(self, token: int, amount: float) -> None:
        self.token, self.amount = token, amount

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, self.token] += self.amount
        return scores


class _Keep(LogitsProcessor):
    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.kept.append(scores.clone())
        return scores


def test_what_the_model_ships_counts_as_what_is_given() -> None:
    """Instruction-tuned checkpoints have such settings in their generation_config."""
    case, given = Case("llama"), Case("llama")
    case.model.generation_config.repetition_penalty = 1.5
    assert case.generate() == given.generate(repetition_penalty=1.5) != given.generate()
    case.model.generation_config.encoder_repetition_penalty = 1.5
    with pytest.raises(GistError, match=r"^encoder_repetition_penalty looks at the prompt's tokens"):
        case.generate()
    assert case.generate(encoder_repetition_penalty=1.0) == given.generate(repetition_penalty=1.5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": True},
        {"num_beams": 2},
        {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2},
    ],
    ids=["greedy", "look-up", "assisted", "beams", "samples"],
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
def test_a_constraint_is_asked_for_the_row_that_it_is(name: str, settings: dict[str, Any]) -> None:
    """It gets the number that the row has in one batch of stock generate, and only the ids of input and answer."""
    case = Case(name)
    settings = dict(settings)
    if "assistant_model" in settings:
        if name == "t5":
            pytest.skip("refused")
        settings["assistant_model"] = case.assistant
    copies = settings.get("num_return_sequences", 1)
    each = num_constraint_numbers(settings.get("num_beams", 1), copies)
    rests = [] if name == "t5" else case.tokenizer.encode_continuations(INPUTS)

    def constraint(number: int, ids: Tensor) -> list[int]:
        if rests:
            rest = rests[number // each]
            assert ids[: len(rest)].tolist() == rest
        return modes.allowed(number, ids)

    answers = case.generate(prefix_allowed_tokens_fn=constraint, **settings)
    for index, answer in enumerate(answers):
        number = index // (copies // each)
        first = 1 if name == "t5" else len(rests[number // each])
        numbers = [int(word[1:]) + 4 for word in answer.split()]
        assert numbers
        assert all(token % 3 == (number + first + place) % 3 for place, token in enumerate(numbers))


@pytest.mark.parametrize(
    ("name", "more"),
    [("gemma3_text", {}), ("llama", {"prompt_lookup_num_tokens": 3}), ("t5", {"prompt_lookup_num_tokens": 3})],
)
@pytest.mark.parametrize("what", ["logits_processor", "negative_prompt_ids"])
def test_what_is_for_one_batch_is_not_given_to_its_parts(name: str, more: dict[str, Any], what: str) -> None:
    value: Any = LogitsProcessorList([_AddTo(5, 1.0)]) if what == "logits_processor" else torch.tensor([[5]] * 3)
    case = Case(name)
    with pytest.raises(GistError, match=f"^{what} is for the rows of one batch, but these rows run in 3 .* at a time$"):
        case.generate(**{what: value}, **more)


def test_settings_may_stand_in_a_generation_config(case: Case) -> None:
    config = copy.deepcopy(case.model.generation_config)
    config.update(cache_implementation="static", max_cache_len=60, **GREEDY)
    assert gisting.generate(
        case.model, case.tokenizer, INPUTS, cache=case.cache, generation_config=config
    ) == case.texts(case.greedy)
    assert config.cache_implementation == "static", "the caller's is left as it is"


def test_fp8_keeps_logits_within_a_twentieth(case: Case) -> None:
    """Three bits of mantissa round by at most 1/16; for logits, 1 to 3 % were measured."""
    ids = torch.tensor(case.tokenizer.encode_continuations([tiny.words(12, 2)]))

    def logits(**settings: Any) -> Tensor:
        past = case.cache[0].as_past_key_values(**settings)
        steps = []
        for column in range(ids.shape[1]):
            position = torch.tensor([[past.get_seq_length()]])
            steps.append(
                case.model(ids[:, column : column + 1], position_ids=position, **{cache_argument(): past}).logits
            )
        return torch.cat(steps, dim=1)

    exact = logits()
    config = {"cache_config": {"backend": "fp8"}, "config": case.model.config}
    error = (logits(cache_implementation="quantized", **config) - exact).abs().max() / exact.abs().max()
    assert 1e-4 < error < 0.05


def test_a_backend_that_is_not_installed_is_named(case: Case) -> None:
    if is_optimum_quanto_available():
        pytest.skip("optimum-quanto is installed")
    with pytest.raises(ImportError, match="pip install optimum-quanto"):
        case.generate(cache_implementation="quantized")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading waits on CUDA streams")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_offloaded_on_cuda(implementation: str, settings: dict[str, Any]) -> None:
    for name in ("llama", "gemma3_text"):
        model, tokenizer = tiny.patched(name)
        model.to("cuda")  # pyright: ignore[reportArgumentType]
        cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS)
        call = {"cache": cache, **GREEDY, **settings, "disable_compile": True}
        found = gisting.generate(model, tokenizer, INPUTS, cache_implementation=implementation, **call)
        assert found == gisting.generate(model, tokenizer, INPUTS, **call)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_once_for_calls_of_one_batch_size() -> None:
    """Inductor compiles one graph without breaks, guard included. If max_cache_len covers them, other texts, lengths
    and k need no new graph.
    """
    model, tokenizer = tiny.patched("llama", num_hidden_layers=2)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    try:
        for seed, counts in enumerate(([2, 1], [2, 1], [1, 5])):
            inputs = [tiny.words(4 + seed, seed), tiny.words(2, seed + 10)]
            call: dict[str, Any] = {"cache": gisting.compress(model, tokenizer, PROMPTS[:2], counts), **GREEDY}
            static = {"cache_implementation": "static", "max_cache_len": 40, "compile_config": modes.compile_config()}
            found = gisting.generate(model, tokenizer, inputs, **static, **call)
            assert found == gisting.generate(model, tokenizer, inputs, **call)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
    finally:
        torch._dynamo.reset()


# -- assisted ----------------------------------------------------------------------------------------------------------


def forward_passes(model: PreTrainedModel, call: Callable[[], Any]) -> int:
    """Count how often the model runs in a call."""
    passes: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        call()
    finally:
        hook.remove()
    return len(passes)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral-window"])
def test_a_twin_with_the_same_gists_is_always_right(name: str) -> None:
    """With them, its drafts are the answer, so few passes verify them; without gists it cannot know the answer."""
    case = Case(name)
    twin = copy.deepcopy(case.model)
    twin.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    assert len(case.greedy[0]) == LENGTH
    alone = forward_passes(case.model, lambda: case.generate(INPUTS[:1], case.cache[0]))
    settings: dict[str, Any] = {"assistant_model": twin, "max_new_tokens": LENGTH}

    def with_cache(cache: GistCache | None) -> int:
        return forward_passes(
            case.model, lambda: case.generate(INPUTS[:1], case.cache[0], assistant_cache=cache, **settings)
        )

    assert alone == LENGTH
    assert with_cache(case.cache[0]) == 2  # 5 drafts and one of its own, then the rest
    assert with_cache(gisting.compress(twin, case.tokenizer, PROMPTS[:1], COUNTS[0])) == 2
    assert with_cache(None) > 2


def test_sampling_with_drafts_at_a_temperature_that_makes_it_greedy(case: Case) -> None:
    """Drafts change which random numbers are drawn, so only settings that leave no choice can be compared."""
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1e-4}
    drafts: list[dict[str, Any]] = [{"prompt_lookup_num_tokens": 3}, {"assistant_model": case.assistant}]
    for draft in drafts:
        assert case.generate(**settings, **draft) == case.texts(case.greedy)


ASSISTED: list[tuple[Callable[[Case], dict[str, Any]], type[GistError], str]] = [
    (
        lambda case: {"assistant_model": tiny.model("llama")},
        GistError,
        r"^assistant_model does not fit: model \(LlamaForCausalLM\) is not patched",
    ),
    (
        lambda case: {"assistant_model": gisting.patch(tiny.model("llama"), tiny.tokenizer(template="alpaca"))},
        GistError,
        "^assistant_model does not fit: model was patched for tokenizer",
    ),
    (
        lambda case: {"assistant_model": tiny.patched("llama", vocab_size=70)[0]},
        GistError,
        "^assistant_model has 70 embedding rows, the model 65; they must be equal, because .* row by row$",
    ),
    (lambda case: {"assistant_cache": case.cache}, GistError, "^assistant_cache is given without assistant_model"),
    (
        lambda case: {"assistant_model": case.assistant, "assistant_cache": case.cache},
        CacheMismatchError,
        "^cache was made for llama/.* this model is llama/",
    ),
    (
        lambda case: {
            "assistant_model": case.assistant,
            "assistant_cache": gisting.compress(case.assistant, case.tokenizer, PROMPTS[:2]),
        },
        CacheMismatchError,
        "^assistant_cache must be one for all 3 inputs or one each, got 2$",
    ),
    (
        lambda case: {"assistant_model": case.assistant, "assistant_tokenizer": tiny.word_tokenizer()},
        GistError,
        "^assistant_tokenizer is not supported",
    ),
    (
        lambda case: {"prompt_lookup_num_tokens": 3, "num_beams": 2},
        GistError,
        "^assisted decoding gives one answer to an input: num_beams=1 and num_return_sequences=1, got 2 and 1$",
    ),
    (
        lambda case: {"prompt_lookup_num_tokens": 3, "do_sample": True, "num_return_sequences": 2},
        GistError,
        "got 1 and 2$",
    ),
    (
        lambda case: {"prompt_lookup_num_tokens": 3, "cache_implementation": "static"},
        GistError,
        "^assisted decoding discards .* which only cache_implementation='dynamic' supports, got 'static'$",
    ),
]


@pytest.mark.parametrize(
    ("settings", "error", "message"), ASSISTED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_assistance_that_cannot_be(case: Case, settings: Any, error: type[GistError], message: str) -> None:
    with pytest.raises(error, match=message):
        case.generate(**settings(case))


# -- streaming ---------------------------------------------------------------------------------------------------------


class Recorder:
    """A streamer that keeps what generate puts into it."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.parts.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "look-up"])
def test_a_streamer_gets_the_ids_of_the_answer_alone(name: str, settings: dict[str, Any]) -> None:
    case, streamer = Case(name), Recorder()
    case.generate(INPUTS[:1], case.cache[0], streamer=streamer, **settings)
    assert streamer.parts[0].shape == (1, 0), "what a streamer with skip_prompt skips"
    ids = [token for part in streamer.parts for token in part.reshape(-1).tolist()]
    assert ids == case.greedy[0][1 if name == "t5" else 0 :]  # T5's answers begin with its start token.
    assert streamer.ended == 1


@pytest.mark.parametrize(
    ("inputs", "settings", "numbers"),
    [
        (INPUTS, {}, "3, 1 and 1"),
        (INPUTS[:1], {"num_beams": 2}, "1, 2 and 1"),
        (INPUTS[:1], {"do_sample": True, "num_return_sequences": 2}, "1, 1 and 2"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_streamer_takes_one_answer(name: str, inputs: list[str], settings: dict[str, Any], numbers: str) -> None:
    case = Case(name)
    with pytest.raises(GistError, match=f"^streamer takes one answer: one input, num_beams=1 .* got {numbers}$"):
        case.generate(
            inputs,
            case.cache.select(range(len(inputs))),
            streamer=Recorder(),
            **settings,
        )


@pytest.mark.parametrize("function", [gisting.generate, converse], ids=["generate", "converse"])
@pytest.mark.parametrize(
    "change", [{"cache": "cast"}, {"max_new_tokens": 0}, {"num_beams": 2}, {"no_such": 1}], ids=str
)
def test_with_an_error_the_stream_ends(case: Case, function: Any, change: dict[str, Any]) -> None:
    """Otherwise another thread that reads from it would wait for ever."""
    streamer = TextIteratorStreamer(case.tokenizer.tokenizer, timeout=20)
    cache = case.cache[0].to(dtype=torch.bfloat16) if "cache" in change else case.cache[0]
    settings = {**GREEDY, **change, "cache": cache, "streamer": streamer}
    errors: list[Exception] = []

    def run() -> None:
        try:
            function(case.model, case.tokenizer, INPUTS[:1], **settings)
        except (GistError, ValueError) as error:
            errors.append(error)

    thread = Thread(target=run)
    thread.start()
    assert "".join(streamer) == ""
    thread.join()
    assert len(errors) == 1


def test_a_stream_ends_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamer ends once, even if an error follows its end."""

    def fail(*_: Any) -> None:
        raise GistError("planted")

    streamer = Recorder()
    monkeypatch.setattr(decoder, "continued", fail)
    with pytest.raises(GistError, match="planted"):
        converse(case.model, case.tokenizer, INPUTS[:1], cache=case.cache[0], streamer=streamer, **GREEDY)
    assert streamer.ended == 1


# -- turns -------------------------------------------------------------------------------------------------------------

DECODERS = [name for name in modes.FAMILIES if name not in tiny.ENCODER_DECODERS]
THIRD = [tiny.words(3, 17), tiny.words(7, 18), tiny.words(2, 19)]


def full_logits(model: PreTrainedModel, tokenizer: GistTokenizer, ids: list[int]) -> Tensor:
    """Return the logits of every token of a full text, under the gist mask."""
    row: Any = torch.tensor([ids])
    visibility = CONDITIONS["gist"](row == tokenizer.gist_token_id, torch.ones_like(row, dtype=torch.bool))
    mask = visibility.as_attention_mask()
    with torch.no_grad():
        return model(row, attention_mask=mask, position_ids=visibility.position_ids).logits[0]


@pytest.mark.parametrize("name", DECODERS)
def test_three_turns_are_one_text(name: str) -> None:
    """With ragged inputs, a different k in each row, and answers of different lengths, greedy tokens equal tokens from
    the full text, and logits from the last cache are within 1e-4 of the full run's.
    """
    case = Case(name)
    model, tokenizer = case.model, case.tokenizer
    # An end of sequence that some answers reach: the third token of the first answer.
    end = case.greedy[0][2]
    settings = {**GREEDY, "eos_token_id": end}
    rows, cache = case.rows, case.cache
    ended = set()
    for inputs in (INPUTS, NEXT, THIRD):
        if inputs is not INPUTS:
            rests = tokenizer.encode_continuations(inputs)
            rows = [row + rest for row, rest in zip(rows, rests, strict=True)]
        turn = converse(model, tokenizer, inputs, cache=cache, **settings)
        said = case.plain(rows, **settings)
        ended |= {len(answer) for answer in said}
        assert turn.texts == case.texts(said)
        rows = [row + answer for row, answer in zip(rows, said, strict=True)]
        starts = [tokenizer.locate(row).gist_start for row in rows]
        assert turn.cache.num_gist_tokens == [len(row) - start for row, start in zip(rows, starts, strict=True)]
        assert turn.cache.origin == case.cache.origin
        cache = turn.cache
    assert len(ended) > 1, "some answers end before others"

    rest = tokenizer.encode_continuations([tiny.words(6, 30)])[0]
    for number, row in enumerate(rows):
        one = cache[number]
        positions = torch.arange(one.num_slots, one.num_slots + len(rest))[None]
        with torch.no_grad():
            found = model(
                torch.tensor([rest]), position_ids=positions, **{cache_argument(): one.as_past_key_values()}
            ).logits[0]
        wanted = full_logits(model, tokenizer, row + rest)[-len(rest) :]
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_turns_cache_is_a_cache_like_any_other(case: Case, tmp_path: Path) -> None:
    first = converse(case.model, case.tokenizer, INPUTS, cache=case.cache, **GREEDY)
    before = [tensor.clone() for tensor in first.cache.keys]
    wanted = case.generate(NEXT, first.cache)
    first.cache.save(tmp_path / "turn")
    assert case.generate(NEXT, GistCache.load(tmp_path / "turn")) == wanted
    assert case.generate([NEXT[2], NEXT[0]], first.cache.select([2, 0])) == [wanted[2], wanted[0]]
    joined = GistCache.cat([first.cache[1], case.cache[0]])
    assert case.generate([NEXT[1], INPUTS[0]], joined) == [wanted[1], case.texts(case.greedy)[0]]
    assert case.generate(NEXT, first.cache, cache_implementation="static") == wanted
    assert case.generate(NEXT, first.cache, prompt_lookup_num_tokens=2) == wanted
    assert all(torch.equal(a, b) for a, b in zip(first.cache.keys, before, strict=True))
    for tensor in (*first.cache.keys, *first.cache.values):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), "keeps nothing else alive"
        empty = first.cache.attention_mask == 0
        assert empty.any()
        assert not tensor.movedim(2, 1)[empty].any(), "slots without a token hold no other row's states"


def test_one_cache_for_many_inputs_in_a_turn(case: Case) -> None:
    turn = converse(case.model, case.tokenizer, INPUTS, cache=case.cache[0], **GREEDY)
    assert len(turn.cache) == 3
    assert turn.texts == case.generate(cache=case.cache[0])


@pytest.mark.parametrize("condition", ["positive", "negative"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_turns_behind_the_controls(name: str, condition: str) -> None:
    """Conversations can start from the whole prompt, and from nothing."""
    case = Case(name)
    cache = gisting.compress(case.model, case.tokenizer, PROMPTS, COUNTS, condition=condition)
    first = converse(case.model, case.tokenizer, INPUTS, cache=cache, **GREEDY)
    second = converse(case.model, case.tokenizer, NEXT, cache=first.cache, **GREEDY)
    stock: Any = tiny.stock_twin(name, case.model)
    rests = [case.tokenizer.encode_continuations(texts) for texts in (INPUTS, NEXT)]
    for row in range(3):
        ids = (case.rows[row] if condition == "positive" else rests[0][row]).copy()
        for turn, rest in ((first, rests[1][row]), (second, [])):
            given = torch.tensor([ids])
            said = stock.generate(given, attention_mask=torch.ones_like(given), suppress_tokens=[64], **GREEDY)
            said = said[0, len(ids) :].tolist()
            assert turn.texts[row] == case.texts([said])[0]
            ids += said + rest


def test_drafts_and_stopping_criteria_in_a_turn(case: Case) -> None:
    """A row that stops at a text has no end of sequence: it runs in its own batch, and its padding is not kept."""
    wanted = converse(case.model, case.tokenizer, INPUTS, cache=case.cache, **GREEDY)
    drafted = converse(case.model, case.tokenizer, INPUTS, cache=case.cache, assistant_model=case.assistant, **GREEDY)
    assert drafted.texts == wanted.texts
    assert drafted.cache.num_gist_tokens == wanted.cache.num_gist_tokens
    assert max((a - b).abs().max().item() for a, b in zip(drafted.cache.keys, wanted.cache.keys, strict=True)) < 1e-4

    class AtTheSecond(StoppingCriteria):
        """Stops a row after the second token of the first row's answer."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids[:, -1] == case.greedy[0][1]

    settings = {**GREEDY, "stopping_criteria": StoppingCriteriaList([AtTheSecond()])}
    turn = converse(case.model, case.tokenizer, INPUTS, cache=case.cache, **settings)
    assert turn.texts[0] == case.texts([case.greedy[0][:2]])[0]
    for row, text in enumerate(INPUTS):
        alone = converse(case.model, case.tokenizer, [text], cache=case.cache[row], **settings)
        assert turn.texts[row] == alone.texts[0]
        assert turn.cache[row].num_gist_tokens == alone.cache.num_gist_tokens
    rest = case.tokenizer.encode_continuations(INPUTS)[0]
    assert turn.cache.num_gist_tokens[0] == COUNTS[0] + len(rest) + 2


def test_stop_strings_come_with_their_tokenizer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock generate takes it by a name that is already used."""
    seen: list[Any] = []

    class Seen(Exception):
        pass

    def look(**arguments: Any) -> None:
        seen.append(arguments["tokenizer"])
        raise Seen

    monkeypatch.setattr(case.model, "generate", look)
    with pytest.raises(Seen):
        case.generate(stop_strings=["w1"])
    assert seen == [case.tokenizer.tokenizer]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "^converse takes num_beams=1, got 2: beam search does not keep the states"),
        (
            {"cache_implementation": "static"},
            "^converse takes cache_implementation='dynamic', got 'static', which does not keep every state",
        ),
        (
            {"do_sample": True, "num_return_sequences": 2, "stop_strings": ["w1"]},
            r"^converse takes no stopping criteria \(stop_strings, .*\) with num_return_sequences > 1; repeat",
        ),
        (
            {"do_sample": True, "num_return_sequences": 2, "stopping_criteria": StoppingCriteriaList([max])},
            "^converse takes no stopping criteria",
        ),
        ({"max_new_tokens": 0}, "^max_new_tokens must be at least 1, got 0$"),
        ({"max_new_tokens": 126}, "^input 0 with its cached prefix and 126 new tokens takes 130 positions, llama has"),
        ({"assistant_cache": True}, "^assistant_cache is given without assistant_model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_converse_refuses(case: Case, settings: dict[str, Any], message: str) -> None:
    if "assistant_cache" in settings:
        settings = {"assistant_cache": case.cache}
    with pytest.raises(GistError, match=message):
        converse(case.model, case.tokenizer, INPUTS, cache=case.cache, **{**GREEDY, **settings})


def test_a_conversation_ends_at_the_last_position(case: Case) -> None:
    """Everything in a cache counts, whichever turn it is from."""
    cache = case.cache
    while max(cache.num_gist_tokens) + 9 + LENGTH <= 128:
        cache = converse(case.model, case.tokenizer, INPUTS, cache=cache, **GREEDY).cache
    assert len(cache.keys[0][0, 0]) > 100
    with pytest.raises(GistError, match=r"^input 1 with its cached prefix and 8 new tokens takes 1[23]\d positions"):
        converse(case.model, case.tokenizer, INPUTS, cache=cache, **GREEDY)


def test_converse_checks_whose_the_cache_is(case: Case) -> None:
    other = dataclasses.replace(case.cache, origin=dataclasses.replace(case.cache.origin, model="llama/0"))
    with pytest.raises(CacheMismatchError, match=r"^cache was made for llama/0, this model is"):
        converse(case.model, case.tokenizer, INPUTS, cache=other)


# -- the pipeline ------------------------------------------------------------------------------------------------------


stock_pipeline: Any = pipeline


def pipe_of(case: Case, **settings: Any) -> Any:
    return GistTextGenerationPipeline(case.model, case.tokenizer, **settings)


def test_a_pipelines_results_have_the_stock_form(case: Case) -> None:
    pipe, wanted = pipe_of(case, do_sample=False, max_new_tokens=LENGTH), case.texts(case.greedy)
    assert pipe(INPUTS[0], cache=case.cache[0]) == [{"generated_text": wanted[0]}]
    assert pipe(INPUTS, cache=case.cache, max_new_tokens=2) == [
        [{"generated_text": text}] for text in case.texts([row[:2] for row in case.greedy])
    ]
    beams = pipe(INPUTS[:2], cache=case.cache.select([0, 1]), num_beams=3, num_return_sequences=2)
    flat = case.generate(INPUTS[:2], case.cache.select([0, 1]), num_beams=3, num_return_sequences=2)
    assert [[one["generated_text"] for one in result] for result in beams] == [flat[:2], flat[2:]]
    assert pipe(INPUTS[0], cache=case.cache[0], return_full_text=False) == [{"generated_text": wanted[0]}]


def test_without_a_cache_a_pipeline_is_the_stock_one(case: Case) -> None:
    """On the patched model, our class and the stock class give the same results as on an unpatched model."""
    settings = {"do_sample": False, "max_new_tokens": LENGTH}
    tokenizer: Any = case.tokenizer.tokenizer
    wanted = stock_pipeline("text-generation", model=tiny.stock_twin("llama", case.model), tokenizer=tokenizer)(
        INPUTS, **settings
    )
    stock = stock_pipeline("text-generation", model=case.model, tokenizer=tokenizer)
    assert type(stock) is TextGenerationPipeline
    assert stock(INPUTS, **settings) == wanted
    assert pipe_of(case)(INPUTS, **settings) == wanted


def test_what_a_pipeline_refuses(case: Case) -> None:
    pipe = pipe_of(case)
    with pytest.raises(
        GistError, match=r"^text_inputs must be a text, a chat \(a list of messages\), or a list of them"
    ):
        pipe([7], cache=case.cache)
    with pytest.raises(GistError, match=r"^inputs\[0\] is a list of messages, which only the template 'chat' lays out"):
        pipe([{"role": "user", "content": "w1"}], cache=case.cache[0])
    with pytest.raises(GistError, match=r"^inputs is empty"):
        pipe([], cache=case.cache)
    for name, value in (
        *(("return_full_text", True), ("return_tensors", True), ("clean_up_tokenization_spaces", True)),
        *(("prefix", "w1"), ("stop_sequence", "w1"), ("batch_size", 2)),
    ):
        with pytest.raises(GistError, match=rf"^{name} must be left out when a cache is given: \w"):
            pipe("w1", cache=case.cache[0], **{name: value})
        if name != "batch_size":
            with pytest.raises(GistError, match=rf"^{name} must be left out when a cache is given: \w"):
                pipe_of(case, **{name: value})("w1", cache=case.cache[0])
    with pytest.raises(GistError, match=r"is not patched; call gisting.patch"):
        GistTextGenerationPipeline(tiny.model("llama"), case.tokenizer)
    with pytest.raises(GistError, match=r"^text-generation works for decoders only, and t5 is an encoder-decoder"):
        GistTextGenerationPipeline(*tiny.patched("t5"))


def test_a_stock_pipeline_does_not_drop_the_first_words(case: Case) -> None:
    """Stock generate drops as many ids as the given cache has columns, whatever they are."""
    stock = stock_pipeline("text-generation", model=case.model, tokenizer=case.tokenizer.tokenizer)
    with pytest.raises(GistTokenError, match=r"^past_key_values holds 2 gist slots, but input_ids do not begin with"):
        stock(INPUTS[1], **{cache_argument(): case.cache[0].as_past_key_values()}, **GREEDY)


# -- gist tokens in front ----------------------------------------------------------------------------------------------

GIST = 64


@pytest.mark.parametrize(
    "ids",
    [[[5, 6, 7, 8]], [[GIST, 6, 7, 8]], [[6, GIST, 7, 8]], [[GIST]], [[5]]],
    ids=["none", "too-few", "not-in-front", "cut-off", "short"],
)
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_other_ids_than_a_caches_gist_tokens(case: Case, ids: list[list[int]], settings: dict[str, Any]) -> None:
    settings = dict(settings)
    kind = settings.pop("cache_implementation", "dynamic")
    past = case.cache[0].as_past_key_values(kind, config=case.model.config, max_cache_len=20)
    if "num_beams" in settings:
        past.batch_repeat_interleave(2)
    with pytest.raises(GistError, match="gist tokens"):
        case.model.generate(torch.tensor(ids), **{cache_argument(): past}, **GREEDY, **settings)


def test_ragged_batches_beams_and_bare_rests_pass(case: Case) -> None:
    """An empty slot may have any id; if the mask is longer than the ids, nothing is dropped."""
    tokenizer, model = case.tokenizer, case.model
    arguments, given = decoder.prepare_generation(model, tokenizer, case.cache, tokenizer.encode_continuations(INPUTS))
    arguments["input_ids"][:, : case.cache.num_slots][case.cache.attention_mask == 0] = 7
    tokens = model.generate(**arguments, pad_token_id=0, **GREEDY)
    assert case.texts(tokens[:, given:].tolist()) == case.texts(case.greedy)

    rest = tokenizer.encode_continuations(INPUTS)[1]
    mask = torch.ones(1, COUNTS[1] + len(rest), dtype=torch.long)
    past = case.cache[1].as_past_key_values()
    tokens = model.generate(torch.tensor([rest]), attention_mask=mask, **{cache_argument(): past}, **GREEDY)
    assert case.texts(tokens[:, len(rest) :].tolist()) == case.texts(case.greedy[1:2])


def _pickled(model: PreTrainedModel) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 (our own bytes)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_copies_of_a_patched_model_look_at_their_own_calls(copied: Callable[[Any], Any]) -> None:
    case = Case("llama")
    twin = copied(case.model)
    assert twin.prepare_inputs_for_generation.__self__ is twin
    ids = torch.tensor([[GIST] * COUNTS[0] + case.tokenizer.encode_continuations(INPUTS)[0]])
    tokens = twin.generate(ids, **{cache_argument(): case.cache[0].as_past_key_values()}, **GREEDY)
    assert case.texts(tokens[:, ids.shape[1] :].tolist()) == case.texts(case.greedy[:1])


def test_unpatch_takes_the_check_away() -> None:
    model, _ = tiny.patched("llama")
    assert "prepare_inputs_for_generation" in vars(model)
    gisting.unpatch(model)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_a_callers_suppress_tokens_drop_the_patchs_in_stock_generate(case: Case) -> None:
    """docs/generation.md warns of this: stock generate uses the last list it gets. gisting.generate joins the lists."""
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model.get_output_embeddings().weight[GIST] = 100 * model.get_output_embeddings().weight[case.greedy[0][0]]
    ids = torch.tensor([[GIST] * COUNTS[0] + case.tokenizer.encode_continuations(INPUTS)[0]])

    def first(**settings: Any) -> int:
        past = {cache_argument(): case.cache[0].as_past_key_values()}
        return model.generate(ids, **past, max_new_tokens=1, do_sample=False, **settings)[0, -1].item()

    assert first() != GIST
    assert first(suppress_tokens=[4, GIST]) != GIST
    assert first(suppress_tokens=[4]) == GIST
