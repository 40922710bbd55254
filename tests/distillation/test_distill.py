"""One prompt pressed into slots of tiny models: what learns, what is served, what resumes, and what is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gisting
from gisting import GistCache, GistError
from gisting.cache import kept_share
from gisting.distillation import Distilled, Progress, distill, slots
from gisting.distillation.starts import STARTS, make_start
from gisting.eval.check import check_gist
from gisting.eval.divergence import ask_teacher
from gisting.generation.compression import full_prompt_cache
from gisting.generation.sampling import sample_answers
from gisting.models.adapters import Adapter, attach
from gisting.models.fingerprint import base_fingerprint
from tests import tiny

distill_module = importlib.import_module("gisting.distillation.distill")  # the package has a function of this name
PROMPT = " ".join(f"w{number}" for number in range(3, 15))
INPUTS = [tiny.words(1 + number % 4, 40 + number) for number in range(10)]
QUICK = {"num_answers": 16, "max_new_tokens": 6, "steps": 24, "batch_size": 8, "evaluate_every": 8}
QUICK |= {"key_rate": 0.01, "value_rate": 0.05}
FAMILIES = ["llama", "t5", *tiny.slow_but(["qwen2-window", "gemma2", "smollm3", "cohere2", "gpt_neox", "umt5"])]


def made(name: str = "llama", k: int = 4, **settings: Any) -> tuple[Distilled, Any, Any]:
    model, tokenizer = tiny.patched(name)
    settings = {"inputs": INPUTS, **QUICK, **settings}
    return distill(model, tokenizer, PROMPT, num_gist_tokens=k, **settings), model, tokenizer


def same(a: GistCache, b: GistCache) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_divergence_falls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the start's, below the prompt's first tokens, and below no prompt. Random models do not generalise, so it
    is measured with other answers to the inputs that were learned.
    """
    monkeypatch.setattr(distill_module, "_split", lambda inputs, held_out, seed: (inputs, inputs))
    found, _, _ = made(name, steps=60, evaluate_every=20, patience=9, start="first")
    gist = found.held_out["gist"]
    assert gist.mean < 0.7 * found.history[0].held_out.mean
    assert gist.mean < 0.7 * found.held_out["first"].mean
    assert gist.mean < 0.7 * found.held_out["none"].mean
    assert found.history[-1].loss < found.history[1].loss
    assert found.cache.num_gist_tokens == [4]
    assert found.num_prompt_tokens == 12


@pytest.mark.parametrize("name", FAMILIES)
def test_every_state_learns_and_no_weight_does(name: str) -> None:
    """Each layer's keys and values differ from the start's; the model is as it was."""
    model, tokenizer = tiny.patched(name)
    model.get_output_embeddings().weight.requires_grad_(False)
    before = {key: (one.clone(), one.requires_grad) for key, one in model.named_parameters()}
    one, many = (distill(model, tokenizer, PROMPT, INPUTS, 3, **{**QUICK, "steps": steps}).cache for steps in (1, 4))
    for layer, (first, then) in enumerate(zip((*one.keys, *one.values), (*many.keys, *many.values), strict=True)):
        assert (first != then).any(dim=-1).all(), f"tensor {layer} has slots that do not learn"
    if name in tiny.ENCODER_DECODERS:
        assert one.last_hidden is not None
        assert many.last_hidden is not None
        assert (one.last_hidden != many.last_hidden).any(dim=-1).all()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key][0])
        assert parameter.requires_grad is before[key][1]
        assert parameter.grad is None
    assert not model.training


# -- served as every gist is -------------------------------------------------------------------------------------------


def test_every_way_of_serving_gives_the_same_tokens(tmp_path: Path) -> None:
    found, model, tokenizer = made(k=5)
    settings: Any = {"max_new_tokens": 6, "do_sample": False}
    expected = gisting.generate(model, tokenizer, INPUTS, cache=found.cache, **settings)
    assert len(set(expected)) > 1
    assert expected != gisting.generate(
        model, tokenizer, INPUTS, cache=gisting.compress(model, tokenizer, [PROMPT], 5), **settings
    )

    found.cache.save(tmp_path / "own.gist.safetensors")
    again = GistCache.load(tmp_path / "own.gist.safetensors")
    assert same(again, found.cache)
    assert again.origin == gisting.compress(model, tokenizer, [PROMPT], 1).origin
    assert gisting.generate(model, tokenizer, INPUTS, cache=again, **settings) == expected

    stock = tiny.stock_twin("llama", model)
    for input, answer in zip(INPUTS, expected, strict=True):
        ids = torch.tensor([[tokenizer.gist_token_id] * 5 + tokenizer.encode_continuations([input])[0]])
        said: Any = stock.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=again.as_past_key_values(),
            suppress_tokens=[tokenizer.gist_token_id],
            **settings,
        )
        assert tokenizer.decode(said[0, ids.shape[1] :].tolist()).strip() == answer

    mixed = GistCache.cat([gisting.compress(model, tokenizer, ["w1 w2 w3"], 2), again]).select([1] * len(INPUTS))
    assert gisting.generate(model, tokenizer, INPUTS, cache=mixed, **settings) == expected


def test_stores_and_storages_keep_it(tmp_path: Path) -> None:
    """Its states, what is known about it, and its answers, also in 8 bits."""
    found, model, tokenizer = made(k=5)
    settings: Any = {"max_new_tokens": 6, "do_sample": False}
    expected = gisting.generate(model, tokenizer, INPUTS, cache=found.cache, **settings)
    for storage in (None, "int8", "float8_e4m3"):
        store = gisting.GistStore(tmp_path / str(storage), storage=storage)
        store.put("own", found.cache)
        kept = store.get("own")
        said = gisting.generate(model, tokenizer, INPUTS, cache=kept, **settings)
        same_tokens = sum(
            a == b for one, other in zip(said, expected, strict=True) for a, b in zip(one, other, strict=False)
        )
        assert said == expected if storage is None else same_tokens > 0.8 * sum(map(len, expected))
        about = kept.about[0]
        assert about is not None
        assert about["distilled"] == {
            "num_prompt_tokens": 12,
            "inputs": 8,
            "self_study": False,
            "answers": 16,
            "steps": 24,
            "start": "matched",
            "seed": 0,
            "held_out_inputs": 2,
        }
        assert about["quality"]["kept_against_no_prompt"] == pytest.approx(found.kept, abs=1e-4)
        assert kept_share(about) is None, "which `gisting check` measures, against the gist of another prompt too"


def test_it_is_not_chained() -> None:
    """It learned to be read at the beginning, by itself."""
    found, model, tokenizer = made()
    with pytest.raises(GistError, match=r"caches hold a distilled gist.*distil the joined prompts"):
        GistCache.chain([gisting.compress(model, tokenizer, ["w1 w2"], 2), found.cache])
    assert GistCache.chain([found.cache]) is found.cache


@pytest.mark.parametrize("kind", ["lora", "gist-lora"])
def test_a_model_with_an_adapter(kind: str) -> None:
    """The adapter is frozen meanwhile. A gist-only adapter plays no part, so the gist is the base model's."""
    model, tokenizer = tiny.patched("llama")
    base = base_fingerprint(model)
    attach(model, Adapter(kind, rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = distill(model, tokenizer, PROMPT, INPUTS, 4, **QUICK)
    assert found.held_out["gist"].mean < found.history[0].held_out.mean
    assert (found.cache.origin.model == base) is (kind == "gist-lora")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained != set()
    assert gisting.generate(model, tokenizer, ["w1"], cache=found.cache, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft reads
def test_a_model_in_peft() -> None:
    """The wrapper and the model inside give the same gist, which is that of the model with its LoRA."""
    peft = pytest.importorskip("peft")
    model, tokenizer = tiny.patched("llama")
    plain = distill(model, tokenizer, PROMPT, INPUTS, 4, **QUICK)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    before = [parameter.requires_grad for parameter in wrapped.parameters()]
    found = distill(wrapped, tokenizer, PROMPT, INPUTS, 4, **QUICK)
    assert found.held_out["gist"].mean < found.history[0].held_out.mean
    assert same(found.cache, distill(model, tokenizer, PROMPT, INPUTS, 4, **QUICK).cache)
    assert found.cache.origin.model != plain.cache.origin.model
    assert [parameter.requires_grad for parameter in wrapped.parameters()] == before


class Int8Linear(torch.nn.Module):
    """A layer as quantisers make them: whole numbers and a scale for each row; no gradient for either."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale)


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_quantised_model(with_lora: bool) -> None:
    """Gradients reach the slots through layers that have none themselves, and through LoRA on top of them (QLoRA)."""
    model, tokenizer = tiny.model("llama"), tiny.patched("llama")[1]
    for module in list(model.model.layers.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.Linear):
                setattr(module, name, Int8Linear(layer))
    gisting.patch(model, tokenizer)
    if with_lora:
        for layer in model.model.layers:
            layer.mlp.down_proj = WithLora(layer.mlp.down_proj)
    many = distill(model, tokenizer, PROMPT, INPUTS, 4, **QUICK)
    assert many.held_out["gist"].mean < many.history[0].held_out.mean
    one = distill(model, tokenizer, PROMPT, INPUTS, 4, **{**QUICK, "steps": 1}).cache
    for first, then in zip((*one.keys, *one.values), (*many.cache.keys, *many.cache.values), strict=True):
        assert (first != then).any(dim=-1).all(), "slots that do not learn"
    assert gisting.generate(model, tokenizer, ["w1"], cache=many.cache, max_new_tokens=2)


class WithLora(torch.nn.Module):
    """A frozen layer with trained low-rank matrices beside it."""

    def __init__(self, base: Int8Linear) -> None:
        super().__init__()
        self.base = base
        rows, columns = base.weight.shape
        self.down, self.up = (torch.nn.Parameter(torch.randn(size) / 8) for size in ((columns, 2), (2, rows)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + hidden @ self.down @ self.up


def test_a_trained_model_starts_from_its_own_gist_if_it_is_told_to() -> None:
    model, tokenizer = tiny.patched("llama")
    model.config.gist = {**model.config.gist, "num_gist_tokens": [1, 4]}
    for start, expected in (("gist", "gist"), (None, "matched")):
        about = distill(model, tokenizer, PROMPT, INPUTS, 4, start=start, **QUICK).cache.about[0]
        assert about is not None
        assert about["distilled"]["start"] == expected


def test_keys_that_cannot_be_moved_start_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default. A start that moves keys is refused, with the reason, if it is asked for."""
    monkeypatch.setattr("gisting.generation.compression.rotary_of", lambda model: None)
    about = made()[0].cache.about[0]
    assert about is not None
    assert about["distilled"]["start"] == "first"
    for start in ("attended", "matched"):
        with pytest.raises(GistError, match="move keys, but how llama rotates them is not known; use start='first'"):
            made(start=start)


def test_more_tokens_than_an_adapter_has_rows() -> None:
    model, tokenizer = tiny.patched("llama")
    attach(model, Adapter("gist-lora", 2, rank=2))
    model.config.gist = {**model.config.gist, "num_gist_tokens": [1, 2]}
    with pytest.raises(GistError, match="num_gist_tokens must be at most 2, got 4"):
        distill(model, tokenizer, PROMPT, INPUTS, 4, start="gist", **QUICK)
    for k in (2, 4):
        cache = distill(model, tokenizer, PROMPT, INPUTS, k, **QUICK).cache
        checked = check_gist(model, tokenizer, cache, PROMPT, INPUTS, swapped=tiny.words(9, 3), max_new_tokens=4)
        assert checked.num_gist_tokens == k, "the other prompt has as many tokens as the adapter can make"


# -- runs that stop ----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """What a killed process is here."""


@pytest.mark.parametrize("phase", ["answers", "teacher", "training"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_stopped_run_goes_on_to_the_same_bits(name: str, phase: str, tmp_path: Path) -> None:
    """Wherever it is stopped; and what has been sampled is not sampled again."""

    def stop(progress: Progress) -> None:
        if progress.phase == phase and progress.done >= (17 if phase == "training" else 1):
            raise Stopped

    whole, _, _ = made(name, directory=tmp_path / "whole")
    with pytest.raises(Stopped):
        made(name, directory=tmp_path / "parts", progress=stop)
    phases: list[str] = []
    parts, _, _ = made(name, directory=tmp_path / "parts", progress=lambda found: phases.append(found.phase))
    assert same(whole.cache, parts.cache)
    assert whole.history == parts.history
    assert whole.held_out == parts.held_out
    assert ("answers" in phases) == (phase == "answers")
    memory, _, _ = made(name)
    assert same(whole.cache, memory.cache)


def test_seconds_of_training_are_those_of_all_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(slots.time, "perf_counter", tick)

    def stop(progress: Progress) -> None:
        nonlocal now
        if progress.phase == "training":
            now += 100  # a step
            if progress.done == 17:
                raise Stopped

    with pytest.raises(Stopped):
        made(directory=tmp_path, progress=stop)
    parts, _, _ = made(directory=tmp_path, progress=lambda found: None)
    assert 1600 < parts.seconds["training"] < 1700, "up to the measurement at step 16"
    again, _, _ = made(directory=tmp_path)
    assert again.seconds["training"] == pytest.approx(parts.seconds["training"], abs=20)


def test_another_k_takes_the_same_answers(tmp_path: Path) -> None:
    made(directory=tmp_path)
    phases: set[str] = set()
    other, _, _ = made(k=2, directory=tmp_path, progress=lambda found: phases.add(found.phase))
    assert phases == {"start", "training"}
    assert same(other.cache, made(k=2)[0].cache)


def test_a_person_can_read_the_answers(tmp_path: Path) -> None:
    made(directory=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["use"] for line in lines] == ["held-out"] * 2 + ["training"] * 16
    assert {line["input"] for line in lines} == set(INPUTS)
    assert all(set(line["output"].split()) <= set(tiny.VOCABULARY) for line in lines)


def test_the_seed_decides() -> None:
    first, again, other = (made(seed=seed)[0] for seed in (0, 0, 1))
    assert same(first.cache, again.cache)
    assert not same(first.cache, other.cache)


def test_training_that_does_not_help_stops_at_the_best() -> None:
    """With a rate that destroys the slots, those of the start are returned."""
    found, _, _ = made(key_rate=1.0, value_rate=1.0, patience=1, evaluate_every=4, average=0)
    assert [one.step for one in found.history] == [0, 4]
    start = made(steps=1, key_rate=0.0, value_rate=0.0)[0].cache
    assert all(torch.allclose(a, b) for a, b in zip(found.cache.values, start.values, strict=True))
    last, _, _ = made(key_rate=1.0, value_rate=1.0, patience=1, evaluate_every=4, average=0, steps=4)
    assert [one.step for one in last.history] == [0, 4], "the last step is where patience ends"
    assert same(last.cache, found.cache)
    assert last.held_out["gist"].median == pytest.approx(last.history[0].held_out.median, rel=1e-4)


def test_held_out_inputs_are_not_learned(tmp_path: Path) -> None:
    """Nor measured twice."""
    made(held_out=[*INPUTS[:3], INPUTS[1], "w1 w2"], directory=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    used = {use: [line["input"] for line in lines if line["use"] == use] for use in ("held-out", "training")}
    assert used["held-out"] == [*INPUTS[:3], "w1 w2"]
    assert set(used["training"]) == set(INPUTS[3:])
    with pytest.raises(GistError, match=r"held_out holds every one of the inputs.*leave some of them out"):
        made(held_out=[*INPUTS, "w1"])


def test_fewer_answers_than_inputs_are_spread_over_the_inputs(tmp_path: Path) -> None:
    """A random few, not the first of a file that may be sorted."""
    inputs = [tiny.words(3, number) for number in range(100)]
    found, _, _ = made(num_answers=10, steps=1, directory=tmp_path, inputs=inputs)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    places = [inputs.index(line["input"]) for line in lines if line["use"] == "training"]
    assert len(set(places)) == len(places) == 10
    assert max(places) > 50
    assert found.to_row()["inputs"] == 10


def test_answers_of_other_inputs_are_named(tmp_path: Path) -> None:
    """Such as those of a version that took other inputs with the same settings."""
    made(directory=tmp_path)
    path = tmp_path / "answers.jsonl"
    path.write_text(path.read_text().replace(f'"input": "{INPUTS[4]}"', '"input": "w1"'))
    with pytest.raises(GistError, match=r"holds answers to other inputs; remove it"):
        made(directory=tmp_path)


# -- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", sorted({*STARTS} - {"matched"}))
def test_starts_are_states_of_the_prompt(start: str) -> None:
    """Keys are moved by k - N positions, so that they are as far from the text after them as in the prompt."""
    model, tokenizer = tiny.patched("llama")
    if start == "gist":
        model.config.gist = {**model.config.gist, "num_gist_tokens": [11, 11]}
    found = distill(
        model, tokenizer, PROMPT, INPUTS, 12 - 1, start=start, **{**QUICK, "steps": 1, "key_rate": 0, "value_rate": 0}
    )
    about = found.cache.about[0]
    assert about is not None
    assert about["distilled"]["start"] == start
    if start == "gist":
        assert torch.allclose(found.cache.values[1], gisting.compress(model, tokenizer, [PROMPT], 11).values[1])
        return
    whole = full_prompt_cache(model, tokenizer, PROMPT, found.cache.origin)
    for layer in range(3):
        for head in range(2):
            held, all_of_them = found.cache.values[layer][0, head], whole.values[layer][0, head]
            places = [int((all_of_them - one).abs().sum(-1).argmin()) for one in held]
            assert places == (list(range(11)) if start == "first" else sorted(set(places)))
            assert len(places) == 11
            rotary = whole.rotary
            assert rotary is not None
            by = torch.tensor([0 if start == "first" else 11 - 12])
            moved = rotary.rotate(layer, whole.keys[layer][:, head : head + 1, places], by)
            assert torch.allclose(found.cache.keys[layer][0, head], moved[0, 0], atol=1e-4)


def test_attended_takes_what_the_answers_look_at() -> None:
    """Against the weights that a stock model returns for whole texts: the sum over the rows after the prompt."""
    model, tokenizer = tiny.patched("llama")
    answers = sample_answers(model, tokenizer, [(PROMPT, input) for input in INPUTS], max_new_tokens=4)
    origin = gisting.compress(model, tokenizer, [PROMPT], 1).origin
    found = make_start(model, tokenizer, ask_teacher(model, tokenizer, answers), 4, "attended", origin)
    assert model.config._attn_implementation == "gist"
    stock: Any = tiny.stock_twin("llama", model)
    stock.set_attn_implementation("eager")
    received = torch.zeros(3, 2, 12)
    for answer in answers:
        after = tokenizer.encode_continuations([answer.input])[0] + answer.token_ids
        ids = torch.tensor([tokenizer.encode_prompts([PROMPT], 1)[0].chunks[0] + after])
        with torch.no_grad():
            for layer, weights in enumerate(stock(ids, output_attentions=True).attentions):
                received[layer] += weights[0, :, 12:, :12].sum(1).reshape(2, 2, 12).sum(1)
    whole = full_prompt_cache(model, tokenizer, PROMPT, origin)
    chosen = received.topk(4).indices.sort().values
    for layer in range(3):
        expected = whole.values[layer].take_along_dim(chosen[layer][None, :, :, None], dim=2)
        assert torch.equal(found.values[layer], expected)
    assert len({tuple(row) for row in chosen.flatten(0, 1).tolist()}) > 1


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "inputs must hold at least 2 different texts, got 0; leave it out to let the model write"),
        ({"inputs": ["w1", "w1"]}, "inputs must hold at least 2 different texts, got 1"),
        ({"inputs": "w1"}, "inputs must be a list of texts, got one text"),
        ({"inputs": ["w1", 2]}, r"inputs\[1\] must be a text, got int"),
        ({"inputs": ["w1", "w2", tiny.words(120, 1)]}, "takes 138 positions, llama has 128"),
        ({"held_out": []}, "held_out must hold at least 1 different texts, got 0"),
        ({"held_out": INPUTS}, "held_out holds every one of the inputs, so none is left to learn from"),
        ({"prompt": " "}, "prompt 0 is empty"),
        ({"prompt": ["w1"]}, "prompt must be one text, got list"),
        ({"num_gist_tokens": 0}, "num_gist_tokens must be at least 1, got 0"),
        ({"num_gist_tokens": 12}, "num_gist_tokens must be less than the prompt's 12 tokens, got 12"),
        ({"num_gist_tokens": 2.5}, "num_gist_tokens must be a whole number, got 2.5"),
        ({"start": "last"}, "start must be one of first, attended, matched, gist, got 'last'"),
        ({"start": "gist"}, "start 'gist' needs a model that was trained to gist; take 'matched' or 'first'"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"key_rate": -1.0}, "key_rate must be in 0..1, got -1.0"),
        ({"average": 2}, "average must be a share in 0..1, got 2"),
        ({"num_answers": 0}, "num_answers must be at least 1"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """And what was refused before the first answer leaves a directory that another run can take."""
    model, tokenizer = tiny.patched("llama")
    arguments = {"prompt": PROMPT, "inputs": INPUTS, "num_gist_tokens": 4, **QUICK, **changes}
    with pytest.raises(GistError, match=message):
        distill(model, tokenizer, **arguments, directory=tmp_path / "run")
    assert (tmp_path / "run").exists() == ("positions" in message)


def test_numbers_that_are_none_stop_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(student: torch.Tensor, teacher: Any) -> torch.Tensor:
        return student.sum(-1) * float("nan")

    monkeypatch.setattr(slots, "kl_loss", broken)
    with pytest.raises(GistError, match="the divergence is nan in step 0; lower key_rate and value_rate"):
        made()


def test_no_steps_take_the_start_as_it_is(tmp_path: Path) -> None:
    """And training may follow in the same directory, from the same slots."""
    found, _, _ = made(steps=0, directory=tmp_path)
    assert same(found.cache, found.start)
    assert [one.step for one in found.history] == [0]
    assert found.history[0].held_out.kl == pytest.approx(found.held_out["gist"].kl, rel=1e-4)
    about = found.cache.about[0]
    assert about is not None
    assert about["distilled"]["steps"] == 0
    again, _, _ = made(steps=0, directory=tmp_path)
    assert same(again.cache, found.cache)
    assert set(again.seconds) == {"start", "training"}, "the answers are kept"
    trained, _, _ = made(directory=tmp_path)
    assert "answers" not in trained.seconds
    assert same(trained.start, found.start)
    assert not same(trained.cache, found.cache)


def test_what_a_model_cannot_do_is_refused() -> None:
    model, tokenizer = tiny.patched("t5")
    for start in ("attended", "matched"):
        with pytest.raises(GistError, match=f"start='{start}' is for decoders: "):
            distill(model, tokenizer, PROMPT, INPUTS, 4, start=start, **QUICK)
    with pytest.raises(GistError, match="not patched"):
        distill(tiny.model("llama"), tiny.tokenizer("llama"), PROMPT, INPUTS, 4, **QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": PROMPT + " w1"}, "was made with other settings .prompt was [0-9a-f]+, is [0-9a-f]+.; use those"),
        ({"inputs": INPUTS[1:]}, "inputs was"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"steps": 8}, "k-4-matched was made with other settings .steps was 24, is 8"),
        ({"model": "mistral"}, "model was llama/[0-9a-f]+, is mistral/"),
    ],
)
def test_a_directory_of_another_run_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"prompt": PROMPT, "inputs": INPUTS, "num_gist_tokens": 4, **QUICK, "directory": tmp_path}
    distill(*tiny.patched("llama"), **arguments)
    changes = dict(changes)
    other = tiny.patched(changes.pop("model", "llama"))
    with pytest.raises(GistError, match=message):
        distill(*other, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("file", "message"), [("answers.jsonl", "cannot be read"), ("k-4-matched/state.pt", "remove it to train again")]
)
def test_damaged_files_are_named(file: str, message: str, tmp_path: Path) -> None:
    made(directory=tmp_path)
    (tmp_path / file).write_bytes(b"{torn")
    with pytest.raises(GistError, match=rf"{file} {message}|{file}.*{message}"):
        made(directory=tmp_path)
