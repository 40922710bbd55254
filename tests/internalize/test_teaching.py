"""On-policy distillation and self-study: what is learned, from whom, and that a killed run ends with the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

import gisting
from gisting import GistError
from gisting.data.plain import plain_sources
from gisting.eval.divergence import ask_teacher, measure_divergence
from gisting.generation.sampling import sample_answers, sample_bare_answers
from gisting.internalize import teaching
from gisting.internalize.comparison import compare
from gisting.internalize.result import load_internalized
from gisting.internalize.schedule import Schedule
from gisting.internalize.settings import InternalizeSettings
from gisting.internalize.shorteners import NoShortening
from gisting.internalize.stages import internalize
from gisting.models.adapters import adapter_of, without_adapter
from gisting.train.methods import Method, prepare
from tests import garbage, tiny
from tests.internalize.test_stages import PROMPT, RECORDS, Kill, KillAt, arguments, fresh, lines, same, state

QUERIES = [record.input for record in RECORDS]


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with garbage.frozen():
        yield


def taught(folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    return {
        "arguments": arguments(folder, **{"max_steps": 6, "learning_rate": 3e-3, **changes.pop("arguments", {})}),
        "method": method,
        "num_questions": 0 if method == "on-policy" else 10,
        "max_new_tokens": 4,
        **changes,
    }


def divergence(model: Any, tokenizer: Any, teacher: Any) -> float:
    return measure_divergence(model, tokenizer, teacher, None).mean


# -- what is learned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("method", ["on-policy", "self-study"])
def test_the_bare_query_is_answered_as_with_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, weights: str, method: str
) -> None:
    model, tokenizer = tiny.patched(name)
    if name == "t5":
        # A random T5 ends most answers at once, so it writes hardly any question.
        questions = [tiny.words(3, seed=number) for number in range(10)]
        monkeypatch.setattr(teaching, "write_questions", lambda *_, **__: questions)
    pairs = [(PROMPT, query) for query in QUERIES * 2]
    teacher = ask_teacher(model, tokenizer, sample_answers(model, tokenizer, pairs, max_new_tokens=4, seed=9))
    before = divergence(model, tokenizer, teacher)
    settings = taught(tmp_path, method, arguments={"max_steps": 40, "learning_rate": 1e-2}, weights=weights)
    result = internalize(model, tokenizer, PROMPT, RECORDS, eval_records=RECORDS[:2], **settings)
    after = divergence(model, tokenizer, teacher)
    assert after < before / 2, (before, after)
    (stage,) = result.stages
    assert (result.condition, stage.condition, stage.share, stage.prompt_tokens) == ("no-prompt", "no-prompt", 0, 0)
    assert stage.num_records == len(RECORDS) + (10 if method == "self-study" else 0)
    assert set(stage.metrics) == {"no-prompt"}
    loaded, _ = gisting.load(tmp_path) if weights == "full" else (model, None)
    assert same(state(loaded), state(model))
    assert (adapter_of(model) is not None) == (weights == "lora")


def test_the_loss_is_the_divergence_of_the_students_own_answers(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    still = {"max_steps": 1, "learning_rate": 0.0, "batch_size": 8, "per_device_batch_size": 4}
    result = internalize(model, tokenizer, PROMPT, RECORDS, **taught(tmp_path, "on-policy", arguments=still))
    own = [
        gisting.generation.sampling.SampledAnswer(PROMPT, one.input, one.output, one.token_ids)
        for one in sample_bare_answers(model, tokenizer, QUERIES, max_new_tokens=4, seed=42)
    ]
    found = measure_divergence(model, tokenizer, ask_teacher(model, tokenizer, own), None)
    total = sum(kl * number for kl, number in zip(found.kl, found.num_tokens, strict=True))
    assert result.stages[0].train_loss == pytest.approx(total / sum(found.num_tokens), rel=1e-4)
    assert result.stages[0].train_loss > 1e-3


def test_the_loss_of_self_study_is_the_divergence_of_the_teachers_answers(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    still = {"max_steps": 1, "learning_rate": 0.0, "batch_size": 18, "per_device_batch_size": 6}
    result = internalize(model, tokenizer, PROMPT, RECORDS, **taught(tmp_path, "self-study", arguments=still))
    asked = [line["input"] for line in lines(tmp_path / "stage-1" / "data.jsonl")]
    assert asked[:8] == QUERIES
    said = sample_answers(model, tokenizer, [(PROMPT, text) for text in asked], max_new_tokens=4, seed=42)
    assert [one.output for one in said] == [line["output"] for line in lines(tmp_path / "stage-1" / "data.jsonl")]
    found = measure_divergence(model, tokenizer, ask_teacher(model, tokenizer, said), None)
    total = sum(kl * number for kl, number in zip(found.kl, found.num_tokens, strict=True))
    assert result.stages[0].train_loss == pytest.approx(total / sum(found.num_tokens), rel=1e-4)


def test_the_teacher_is_the_model_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask it for the same answers at every step: what it says never changes, though the student does."""
    for weights in ("full", "lora"):
        model, tokenizer = tiny.patched("llama")
        fixed = sample_bare_answers(model, tokenizer, QUERIES[:4], max_new_tokens=4)
        seen: list[torch.Tensor] = []
        right = teaching.ask_teacher

        def ask(asked: Any, *rest: Any, right: Any = right, seen: Any = seen, **more: Any) -> Any:
            found = right(asked, *rest, **more)
            seen.append(torch.cat([one.log_probs for one in found.likeliest]))
            return found

        monkeypatch.setattr(teaching, "ask_teacher", ask)
        monkeypatch.setattr(teaching, "sample_bare_answers", lambda *_, fixed=fixed, **more: fixed)
        before = state(model)
        settings = taught(tmp_path / weights, "on-policy", weights=weights, arguments={"max_steps": 3})
        internalize(model, tokenizer, PROMPT, RECORDS, **settings)
        assert len(seen) == 3
        assert all(torch.equal(one, seen[0]) for one in seen)
        if weights == "full":
            assert not same(state(model), before)
        monkeypatch.undo()


def test_every_step_has_answers_of_its_own_by_the_student_of_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny.patched("llama")
    seen: list[tuple[int, int, float]] = []
    right = sample_bare_answers

    def sample(student: Any, *rest: Any, **more: Any) -> Any:
        assert student is model
        seen.append((more["seed"], len(rest[1]), sum(one.sum().item() for one in student.parameters())))
        return right(student, *rest, **more)

    monkeypatch.setattr(teaching, "sample_bare_answers", sample)
    steps = {"max_steps": 3, "batch_size": 4, "per_device_batch_size": 2, "seed": 7}
    internalize(model, tokenizer, PROMPT, RECORDS, **taught(tmp_path, "on-policy", arguments=steps))
    assert [(seed, number) for seed, number, _ in seen] == [(7, 4), (8, 4), (9, 4)], "both batches of a step at once"
    assert len({weights for _, _, weights in seen}) == 3


def test_an_adapter_is_switched_off_in_a_block() -> None:
    model, tokenizer = tiny.patched("llama")
    ids = torch.tensor(plain_sources(tokenizer, [PROMPT], ["w1 w2"]))
    with pytest.raises(GistError, match="no gisting adapter that could be switched off"), without_adapter(model):
        pass
    with torch.no_grad():
        base = model(ids).logits
    prepare(model, Method("lora", rank=4), 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        adapted = model(ids).logits
        with without_adapter(model):
            assert torch.equal(model(ids).logits, base)
        assert not torch.equal(adapted, base)
        assert torch.equal(model(ids).logits, adapted)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == learning


def test_an_adapter_that_was_frozen_is_frozen_after_the_block() -> None:
    model, _ = tiny.patched("llama")
    prepare(model, Method("lora", rank=4), 1)
    model.requires_grad_(False)
    with without_adapter(model):
        pass
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_an_adapter_that_is_trained_further_is_the_teacher(tmp_path: Path) -> None:
    """The model before training has the adapter; without it, it would be another model."""
    model, tokenizer = tiny.patched("llama")
    prepare(model, Method("lora", rank=4), 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    still = {"max_steps": 1, "learning_rate": 0.0, "batch_size": 8, "per_device_batch_size": 8}
    settings = taught(tmp_path, "on-policy", arguments=still, weights=Method("lora", rank=4))
    result = internalize(model, tokenizer, PROMPT, RECORDS, **settings)
    said = sample_bare_answers(model, tokenizer, QUERIES, max_new_tokens=4, seed=42)
    own = [gisting.generation.sampling.SampledAnswer(PROMPT, one.input, one.output, one.token_ids) for one in said]
    found = measure_divergence(model, tokenizer, ask_teacher(model, tokenizer, own), None)
    total = sum(kl * number for kl, number in zip(found.kl, found.num_tokens, strict=True))
    assert result.stages[0].train_loss == pytest.approx(total / sum(found.num_tokens), rel=1e-4)


# -- who asks ----------------------------------------------------------------------------------------------------------


def test_the_model_asks_where_nobody_else_does(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    for method in ("on-policy", "self-study"):
        settings = taught(tmp_path / method, method, num_questions=20, arguments={"max_steps": 1})
        internalize(model if method == "on-policy" else tiny.patched("llama")[0], tokenizer, PROMPT, [], **settings)
    written = [line["input"] for line in lines(tmp_path / "on-policy" / "study" / "questions.jsonl")]
    assert 8 <= len(written) <= 20
    for method in ("on-policy", "self-study"):
        rows = lines(tmp_path / method / "stage-1" / "data.jsonl")
        assert [row["input"] for row in rows] == [written[place % len(written)] for place in range(20)]
        assert all(row["instruction"] == "" for row in rows)


@pytest.mark.parametrize(
    ("method", "given", "expected"), [("on-policy", 8, 0), ("on-policy", 0, 256), ("self-study", 8, 256)]
)
def test_how_many_questions_there_are_by_default(method: str, given: int, expected: int) -> None:
    settings = InternalizeSettings(method=method)
    assert teaching.num_questions_of(settings, given) == expected
    assert teaching.num_questions_of(InternalizeSettings(), given) == 0


# -- killed and resumed ------------------------------------------------------------------------------------------------


def run_of(folder: Path, method: str, weights: str) -> dict[str, Any]:
    return taught(
        folder,
        method,
        arguments={"save_strategy": "steps", "save_steps": 2},
        weights=Method(weights, rank=4, dropout=0.1) if weights == "lora" else weights,
        eval_records=RECORDS[:2],
    )


@cache
def whole(method: str, weights: str) -> tuple[dict[str, Any], Any]:
    """Return the weights and the result of an uninterrupted run."""
    with TemporaryDirectory() as folder:
        model, tokenizer = fresh(attention_dropout=0.1)
        set_seed(3)
        result = internalize(model, tokenizer, PROMPT, RECORDS, **run_of(Path(folder), method, weights))
        return state(model), result


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("method", ["on-policy", "self-study"])
@pytest.mark.parametrize("where", ["inside", "writing", "teacher"])
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, method: str, weights: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "teacher" and method == "on-policy":
        pytest.skip("nothing is asked before training")
    expected, reference = whole(method, weights)
    settings = run_of(tmp_path, method, weights)
    if where == "writing":
        monkeypatch.setattr(teaching.Directory, "claim", dying(teaching.Directory.claim))
    if where == "teacher":
        monkeypatch.setattr(teaching, "ask_teacher", dying(None))
    model, tokenizer = fresh(attention_dropout=0.1)
    with pytest.raises(Kill):
        internalize(model, tokenizer, PROMPT, RECORDS, **settings, callbacks=[KillAt(1, 3)])
    monkeypatch.undo()
    again, tokenizer = fresh(attention_dropout=0.1)
    torch.manual_seed(99)
    steps: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    is_started = (tmp_path / "settings.json").exists()
    assert is_started == (where == "inside")
    if where == "teacher":
        monkeypatch.setattr(teaching, "sample_answers", lambda *_, **more: pytest.fail("answered again"))
    result = internalize(again, tokenizer, PROMPT, RECORDS, **settings, resume=is_started, callbacks=[Count()])
    assert same(state(again), expected)
    assert [stage.metrics for stage in result.stages] == [stage.metrics for stage in reference.stages]
    assert steps == ([3, 4, 5, 6] if is_started else [1, 2, 3, 4, 5, 6])


def dying(function: Callable[..., Any] | None) -> Callable[..., Any]:
    def die(*args: Any, **more: Any) -> Any:
        if function is not None:
            function(*args, **more)
        raise Kill

    return die


def test_the_seed_decides(tmp_path: Path) -> None:
    for method in ("on-policy", "self-study"):
        found = []
        for number, seed in enumerate((1, 1, 2)):
            model, tokenizer = fresh()
            settings = taught(tmp_path / f"{method}-{number}", method, arguments={"max_steps": 2, "seed": seed})
            internalize(model, tokenizer, PROMPT, RECORDS, **settings)
            found.append(state(model))
        assert same(found[0], found[1])
        assert not same(found[0], found[2])


def test_the_files_of_another_study_are_refused(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    settings = taught(tmp_path, "self-study")
    internalize(model, tokenizer, PROMPT, RECORDS, **settings)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "internalized.json").unlink()
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    (tmp_path / "config.json").unlink()
    model, tokenizer = fresh()
    with pytest.raises(GistError, match=r"was made with other settings \(temperature was 1.0, is 0.5\)"):
        internalize(model, tokenizer, PROMPT, RECORDS, **settings, temperature=0.5)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "offline"}, "method must be one of stages, on-policy, self-study, got 'offline'"),
        ({"control": "full"}, "method on-policy has no stages, so control must be left out; or use method stages"),
        ({"tail": "gist", "max_examples": 2}, "has no stages, so tail and max_examples must be left out"),
        ({"schedule": Schedule((1.0, 0.0))}, "has no stages, so a schedule or shortener must be left out"),
        ({"method": "stages"}, "num_questions goes with method on-policy or self-study, got 3 with stages"),
        ({"records": [], "num_questions": 0}, "records is empty; pass at least one"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
    ],
)
def test_what_does_not_fit_the_method_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model, tokenizer = fresh()
    settings = {"records": RECORDS, **taught(tmp_path, "on-policy", num_questions=3), **changes}
    with pytest.raises(GistError, match=message):
        internalize(model, tokenizer, PROMPT, **settings)
    assert not list(tmp_path.glob("*")), "nothing was started"


@pytest.mark.parametrize("devices", [{"world_size": 2, "n_gpu": 1}, {"world_size": 1, "n_gpu": 2}])
def test_several_devices_are_refused(devices: dict[str, int]) -> None:
    given: Any = SimpleNamespace(**devices)
    for method in ("on-policy", "self-study"):
        with pytest.raises(GistError, match=f"method {method} is trained by a single process on one device"):
            teaching.check_teaching(InternalizeSettings(method=method), given, has_stages=False)
    teaching.check_teaching(InternalizeSettings(), given, has_stages=True)


def test_what_is_trained_was_called_method(tmp_path: Path) -> None:
    """Old keywords, recipes and results mean what they meant."""
    model, tokenizer = fresh()
    with pytest.warns(DeprecationWarning, match="method as what is trained will be removed .* use weights"):
        internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path / "run"), method="lora", control="bare")
    assert adapter_of(model) is not None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: lora\n", encoding="utf-8")
    with pytest.warns(DeprecationWarning, match="method lora is now called weights lora"):
        found = InternalizeSettings.load(recipe)
    assert (found.method, found.weights) == ("stages", "lora")
    path = tmp_path / "run" / "internalized.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    old = {name: value for name, value in written["settings"].items() if name not in ("num_questions", "temperature")}
    old["method"] = old.pop("weights")
    path.write_text(json.dumps({**written, "settings": old}), encoding="utf-8")
    settings = load_internalized(tmp_path / "run").settings
    assert settings["method"] == "stages"
    assert settings["weights"]["name"] == "lora"


# -- one report --------------------------------------------------------------------------------------------------------


def test_one_report_over_all_methods(tmp_path: Path) -> None:
    from gisting.internalize.report import make_report
    from tests.internalize.test_report import PRICES, run_to

    for name, settings in (
        ("staged", {}),
        ("followed", {"method": "on-policy"}),
        ("studied", {"method": "self-study", "num_questions": 8}),
    ):
        plain = {} if name == "staged" else {"schedule": Schedule.linear(), "shortener": NoShortening()}
        run_to(tmp_path / name, prompt=PROMPT, **settings, **plain)
    every = [tmp_path / name for name in ("staged", "followed", "studied")]
    rows = {row.name: row for row in compare(every, PRICES).rows}
    assert [rows[name].trained for name in ("staged", "followed", "studied")] == [
        "in 3 stages",
        "on-policy",
        "self-study",
    ]
    assert rows["followed"].tokens == rows["studied"].tokens == rows["staged"].tokens
    # A step has four queries of 2 tokens and answers of 1 token with its end; what is sampled has 2 tokens at most.
    assert rows["followed"].training_tokens == 3 * 4 * (2 + 2)
    read = [
        len(f"{one['input']} {one['output']}".split()) + 1 for one in lines(tmp_path / "studied/stage-1/data.jsonl")
    ]
    assert rows["studied"].training_tokens == pytest.approx(3 * 4 * sum(read) / len(read))
    text = make_report(every, PRICES).markdown()
    assert "The cost of training followed and studied lacks what was sampled to learn from" in text
    alone = compare(every[1:])
    assert alone.prompt == PROMPT
    assert [row.instruction for row in alone.full] == [PROMPT] * 4
    assert not alone.stages
    assert alone.rows[-1].run_on == "full prompt with a prefix cache"
