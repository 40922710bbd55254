"""The loop over stages: what each stage reads, that the bare query is enough after the last one, and that a killed run
continues to the same bits.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

import gisting
from gisting import GistError, GistTokenizer, Record
from gisting.data.plain import PlainCollator
from gisting.errors import RecordError
from gisting.eval.metrics import exact_match
from gisting.internalize.plan import CONTROLS, Plan, Stage, make_plan, num_steps, split_steps, warmup_of
from gisting.internalize.requests import PromptFormat, make_requests
from gisting.internalize.result import PromptWarning, check_prompt, load_internalized
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import Rewrites
from gisting.internalize.stages import internalize
from gisting.models.adapters import adapter_of
from gisting.models.load import trained_num_gist_tokens
from gisting.train.finetune import published_arguments
from gisting.train.methods import Method
from gisting.train.objective import ObjectiveTrainer
from tests import garbage, tiny

PROMPT = "w50 w51 w52 w53 w54 w55"
# The prompt is unrelated: what must be learned is in the answers.
RECORDS = [Record("ignored", f"w{number} w{number + 10}", f"w{number + 30} w{number + 31}") for number in range(8)]
HALF = Schedule((1.0, 0.5, 0.0))
SHORTER = Rewrites({0.5: "w50 w52 w54"})


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with garbage.frozen():
        yield


def fresh(name: str = "llama", **changes: Any) -> tuple[Any, GistTokenizer]:
    model, tokenizer = tiny.patched(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.div_(5)
    return model, tokenizer


def arguments(output: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "per_device_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return published_arguments(output, **{**settings, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Kill(Exception):
    """Stands for the end of a killed process."""


class KillAt(TrainerCallback):
    """Kill a run at a step of its n-th training."""

    def __init__(self, stage: int, step: int) -> None:
        self.stage, self.step, self.seen = stage, step, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.seen == self.stage and state.global_step == self.step:
            raise Kill


# -- plans -------------------------------------------------------------------------------------------------------------


def test_stages_of_a_schedule_and_of_the_controls() -> None:
    linear = Schedule.linear(4)
    shown = [
        (round(stage.share, 2), stage.num_examples, stage.num_gist_tokens, stage.condition)
        for stage in make_plan(linear, 3, tail="gist", num_gist_tokens=2).stages
    ]
    assert shown == [
        (1.0, 3, None, "prompt"),
        (0.67, 2, None, "prompt"),
        (0.33, 1, None, "prompt"),
        (1.0, 0, 2, "gist"),
    ]
    assert make_plan(linear, 3).condition == "no-prompt"
    assert make_plan(linear, 3).stages[-1] == Stage(0.0, 0)
    two = make_plan(linear, 3, tail="gist", num_gist_stages=2)
    assert [stage.condition for stage in two.stages] == ["prompt", "prompt", "gist", "gist"]
    assert two.condition == "gist"
    assert {
        name: make_plan(linear, 4, control=name, control_share=0.5 if name == "shortened" else None)
        for name in CONTROLS
    } == {
        "bare": Plan((Stage(0.0, 0),), "no-prompt"),
        "full": Plan((Stage(1.0, 4),), "prompt"),
        "full-run-bare": Plan((Stage(1.0, 4),), "no-prompt"),
        "shortened": Plan((Stage(0.5, 2),), "prompt"),
    }
    assert split_steps(11, 4) == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail": "end"}, "tail must be one of none, gist, got 'end'"),
        ({"control": "fool"}, "control must be one of bare, full, full-run-bare, shortened, or None"),
        ({"control": "full", "tail": "gist"}, "control 'full' has no stage for tail='gist'"),
        ({"control": "shortened"}, "control_share goes with control='shortened', got None"),
        ({"control_share": 0.5}, "control_share goes with control='shortened', got 0.5 with None"),
        ({"control": "shortened", "control_share": 1.0}, "control_share must be above 0 and below 1, got 1"),
        ({"tail": "gist", "num_gist_tokens": 0}, "num_gist_tokens must be at least 1, got 0"),
        ({"tail": "gist", "num_gist_stages": 5}, "num_gist_stages must be 1 to 4, the number of stages, got 5"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GistError, match=message):
        make_plan(Schedule.linear(4), **changes)


def test_fewer_steps_than_stages() -> None:
    with pytest.raises(GistError, match="max_steps must be at least 4, one for each stage, got 3; use more steps or"):
        split_steps(3, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 3.0}, 9),  # batches of 4, 4 and 2
        ({"num_train_epochs": 0.5}, 2),
        ({"num_train_epochs": 3.0, "dataloader_drop_last": True}, 6),
        ({"num_train_epochs": 3.0, "batch_size": 8}, 6),  # two batches a step, and one
    ],
)
def test_steps_are_those_that_trainer_counts(tmp_path: Path, changes: dict[str, Any], expected: int) -> None:
    settings = arguments(tmp_path, **{"max_steps": -1, **changes})
    assert num_steps(settings, 10) == expected
    model, tokenizer = fresh()
    trainer = ObjectiveTrainer(
        model=model, args=settings, train_dataset=[RECORDS[0]] * 10, data_collator=PlainCollator(tokenizer)
    )
    trainer.train()
    assert trainer.state.global_step == expected


def test_warm_up_leaves_at_least_one_step(tmp_path: Path) -> None:
    for share, count, expected in ((0.03, 1, 0), (0.03, 100, 3), (0.5, 3, 1), (2, 3, 2), (0, 1, 0)):
        assert warmup_of(arguments(tmp_path, warmup_steps=share), count) == expected
    with pytest.raises(GistError, match="warmup_steps must be less than the 3 steps of a stage, got 3; lower it"):
        warmup_of(arguments(tmp_path, warmup_steps=3), 3)


def test_stages_of_one_step_train(tmp_path: Path) -> None:
    """Guard against Trainer's rounding up, which would make a single step all warm-up, at a learning rate of 0."""
    model, tokenizer = fresh()
    before = state(model)
    settings = arguments(tmp_path, max_steps=3, warmup_steps=0.03, lr_scheduler_type="cosine")
    internalize(model, tokenizer, PROMPT, RECORDS, settings, schedule=HALF, shortener=SHORTER)
    assert not same(before, state(model))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_prompt_by_eye() -> None:
    prompt_format = PromptFormat("{output} <- {input}", separator="; ", gap=" | ")
    examples = [Record("", "a {output}", "b"), Record("", "c", "d {input}")]
    assert prompt_format.prompt("rules", examples) == "rules | b <- a {output}; d {input} <- c"
    assert prompt_format.prompt("", examples[:1]) == "b <- a {output}"
    assert (prompt_format.prompt("t", []), prompt_format.prompt("", [])) == ("t", "")
    with pytest.raises(
        GistError, match=r"example must contain \{input\} and \{output\} exactly once each, got '\{input\}'"
    ):
        PromptFormat("{input}")


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("max_length", [40, 17, 16, 13])
def test_examples_are_dropped_and_nothing_is_cut(name: str, max_length: int) -> None:
    """Check for each length that a request has the prompt, as many of the most similar examples as fit, and the query,
    and that the collator accepts it.
    """
    tokenizer = tiny.tokenizer(name)
    examples = [[Record("", "w1", "w2"), Record("", "w3", "w4 w5"), Record("", "w6", "w7")], []]
    found = make_requests(
        tokenizer,
        RECORDS[:2],
        PROMPT,
        examples,
        PromptFormat(),
        max_length=max_length,
        max_target_length=3,
    )
    written = ["w1 -> w2", "w3 -> w4 w5", "w6 -> w7"]
    room = max_length - 6 - 2 - (0 if name == "t5" else 3)
    number = max(count for count in range(4) if sum([3, 4, 3][3 - count :]) <= room)
    assert found.records[0].instruction == "\n\n".join(filter(None, [PROMPT, "\n".join(written[3 - number :])]))
    assert found.num_examples == [number, 0]
    assert found.prompt_tokens == [6 + sum([3, 4, 3][3 - number :]), 6]
    assert found.query_tokens == [2, 2]
    PlainCollator(tokenizer, max_length, max_target_length=3)(found.records)


def test_what_cannot_fit_is_named() -> None:
    tokenizer = tiny.tokenizer()
    settings: dict[str, Any] = {"prompt_format": PromptFormat(), "max_length": 10, "max_target_length": 2}
    message = r"record 2 \('w1 w11'\) has 11 ids with the prompt and without examples, more than max_length=10"
    with pytest.raises(RecordError, match=message):
        make_requests(tokenizer, [Record("", "w1", "w2"), RECORDS[1]], PROMPT, [[], RECORDS[3:5]], **settings)
    settings["max_length"] = 12
    found = make_requests(tokenizer, RECORDS[1:2], PROMPT, [[]], **settings, num_gist_tokens=1)
    assert (found.prompt_tokens, found.query_tokens) == ([1], [2])
    with pytest.raises(RecordError, match="has 13 ids"):
        make_requests(tokenizer, RECORDS[1:2], PROMPT, [[]], **settings, num_gist_tokens=2)
    with pytest.raises(RecordError, match="record 1 has no input; the input is the query"):
        make_requests(tokenizer, [Record("", " ", "w2")], PROMPT, [[]], **settings)
    with pytest.raises(
        RecordError, match=r"record 1 \('w0 w10'\) has an answer of 3 ids, more than max_target_length=2"
    ):
        make_requests(tiny.tokenizer("t5"), RECORDS, "", [[]] * 8, **settings)


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_the_bare_query_is_enough_after_the_last_stage(tmp_path: Path, name: str) -> None:
    model, tokenizer = fresh(name)
    steps = 75 if name == "t5" else 45
    result = internalize(
        model,
        tokenizer,
        PROMPT,
        RECORDS,
        arguments(tmp_path, max_steps=steps),
        schedule=HALF,
        shortener=SHORTER,
        max_examples=2,
        eval_records=RECORDS,
        max_new_tokens=4,
    )
    assert result.metrics == {"exact_match": 1.0}
    assert [stage.condition for stage in result.stages] == ["prompt", "prompt", "no-prompt"]
    assert [stage.realised_share for stage in result.stages] == [1.0, 0.5, 0.0]
    assert [stage.num_examples for stage in result.stages] == [2, 1, 0]
    assert [stage.mean_examples for stage in result.stages] == [2, 1, 0]
    # An example of "w1 w11 -> w31 w32" is five words.
    assert [stage.prompt_tokens for stage in result.stages] == [6 + 10, 3 + 5, 0]
    assert {stage.query_tokens for stage in result.stages} == {2.0}
    assert [set(stage.metrics) for stage in result.stages] == [{"no-prompt", "prompt"}] * 2 + [{"no-prompt"}]
    assert load_internalized(tmp_path) == result
    loaded, again = gisting.load(tmp_path)
    assert same(state(loaded), state(model))
    (row,) = (again.tokenizer(RECORDS[3].input, return_tensors="pt")["input_ids"],)  # pyright: ignore[reportIndexIssue]
    said = loaded.generate(row, max_new_tokens=3, do_sample=False)[0].tolist()  # pyright: ignore[reportCallIssue]
    assert again.decode(said).endswith(RECORDS[3].output)
    assert not list(tmp_path.glob("stage-*/model"))


def test_what_a_stage_trains_on_can_be_read(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    internalize(
        model,
        tokenizer,
        PROMPT,
        RECORDS,
        arguments(tmp_path),
        schedule=HALF,
        shortener=SHORTER,
        max_examples=2,
        eval_records=[Record("ignored", "w7 w20", "w1")],
        max_new_tokens=2,
    )
    first, second, third = (lines(tmp_path / f"stage-{number}" / "data.jsonl") for number in (1, 2, 3))
    for rows, prompt, number in ((first, PROMPT, 2), (second, "w50 w52 w54", 1)):
        assert [(row["input"], row["output"]) for row in rows] == [(one.input, one.output) for one in RECORDS]
        for row in rows:
            head, _, examples = row["instruction"].partition("\n\n")
            assert head == prompt
            assert len(examples.splitlines()) == number
            assert f"{row['input']} -> " not in examples, "never the record itself"
    assert third == [{"instruction": "", "input": one.input, "output": one.output} for one in RECORDS]
    (asked,) = lines(tmp_path / "stage-2" / "eval.jsonl")
    assert asked["instruction"] == "w50 w52 w54\n\nw7 w17 -> w37 w38", "the most similar of the training records"
    (said,) = lines(tmp_path / "stage-1" / "answers.jsonl")
    assert set(said) == {"input", "output", "no-prompt", "prompt"}
    about = json.loads((tmp_path / "stage-2" / "stage.json").read_text(encoding="utf-8"))
    assert (about["share"], about["realised_share"], about["prompt"]) == (0.5, 0.5, "w50 w52 w54")


def test_only_answers_are_learned(tmp_path: Path) -> None:
    """Compare the loss of each stage with the loss of the answers after its prompts."""
    model, tokenizer = fresh()
    still = arguments(tmp_path, learning_rate=0.0, max_steps=3, batch_size=8, per_device_batch_size=8)
    result = internalize(model, tokenizer, PROMPT, RECORDS, still, schedule=HALF, shortener=SHORTER)
    for stage, text in zip(result.stages, (PROMPT, "w50 w52 w54", ""), strict=True):
        batch = PlainCollator(tokenizer, 64)([Record(text, one.input, one.output) for one in RECORDS])
        with torch.no_grad():
            assert stage.train_loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_epochs_are_split_and_each_stage_has_its_own_order(tmp_path: Path) -> None:
    seen: list[tuple[str, int, list[str]]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            loader = kwargs["train_dataloader"]
            first = [tokenizer.decode(row[-5:-3].tolist()) for batch in loader for row in batch["input_ids"]]
            seen.append((Path(str(args.output_dir)).name, state.max_steps, first))

    model, tokenizer = fresh()
    settings = {"max_steps": -1, "num_train_epochs": 6.0}
    internalize(
        model,
        tokenizer,
        PROMPT,
        RECORDS,
        arguments(tmp_path, **settings),
        schedule=HALF,
        shortener=SHORTER,
        callbacks=[Watch()],
    )
    assert [(name, steps) for name, steps, _ in seen] == [("stage-1", 4), ("stage-2", 4), ("stage-3", 4)]
    orders = [order for _, _, order in seen]
    assert all(sorted(order) == sorted(one.input for one in RECORDS) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    control, _ = fresh()
    internalize(
        control,
        tokenizer,
        PROMPT,
        RECORDS,
        arguments(tmp_path / "full", **settings),
        control="full",
        callbacks=[Watch()],
    )
    assert seen[-1][:2] == ("stage-1", 12), "as many steps in total"
    odd, _ = fresh()
    few = {"max_steps": -1, "num_train_epochs": 2.0, "per_device_batch_size": 8, "batch_size": 8}
    with pytest.raises(GistError, match="max_steps must be at least 3, one for each stage, got 2; use more steps or"):
        internalize(odd, tokenizer, PROMPT, RECORDS, arguments(tmp_path / "few", **few), schedule=HALF)
    assert not (tmp_path / "few").exists()


def test_no_example_is_chosen_by_an_unknown_answer(tmp_path: Path) -> None:
    """In training, a record with the same answer is not used as an example; for a held-out request it may be, because
    in use the answer is unknown.
    """
    answer = "w41 w42 w43 w44 w45"
    pool = [
        Record("", "w1 w2 w3", answer),
        Record("", "w1 w5 w6", "w46 w47 w48 w49 w40"),
        Record("", "w1 w2 w9", answer),
    ]
    model, tokenizer = fresh()
    internalize(
        model,
        tokenizer,
        PROMPT,
        pool,
        arguments(tmp_path, max_steps=2),
        schedule=Schedule((1.0, 0.0)),
        max_examples=1,
        eval_records=[Record("", "w1 w2 w8", answer)],
        max_new_tokens=2,
    )
    (asked,) = lines(tmp_path / "stage-1" / "eval.jsonl")
    assert asked["instruction"].endswith(f"w1 w2 w9 -> {answer}") or asked["instruction"].endswith(f"w3 -> {answer}")
    assert asked["output"] == answer
    for row in lines(tmp_path / "stage-1" / "data.jsonl"):
        assert (row["output"] == answer) != row["instruction"].endswith(answer)


def test_a_gist_as_long_as_the_prompt_is_refused(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    with pytest.raises(GistError, match="num_gist_tokens must be less than the prompt's 6 tokens, got 6"):
        internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path), tail="gist", num_gist_tokens=6)


def test_answers_without_a_gist_need_no_trained_k(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = fresh()
    model.config.gist = {**model.config.gist, "num_gist_tokens": [2, 2]}
    settings: dict[str, Any] = {"schedule": HALF, "shortener": SHORTER, "tail": "gist", "num_gist_tokens": 2}
    settings |= {"eval_records": RECORDS[:2], "max_new_tokens": 2}
    internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path), **settings)
    assert "num_gist_tokens" not in caplog.text


def test_a_shortened_control_that_shortens_nothing_is_refused(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    with pytest.raises(GistError, match="a shortener that keeps the whole prompt is control 'full'; use rewrites"):
        internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path), control="shortened", control_share=0.5)


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    gisting.save_pretrained(model, tokenizer, tmp_path)
    with pytest.raises(GistError, match="holds a checkpoint, which would be overwritten; use another directory"):
        internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path), schedule=HALF, shortener=SHORTER)
    assert not list(tmp_path.glob("stage-*"))


# -- killed and resumed ------------------------------------------------------------------------------------------------


def settings_of(folder: Path, method: str) -> dict[str, Any]:
    return {
        # Both after two steps of three.
        "arguments": arguments(
            folder, max_steps=9, save_strategy="epoch" if method == "lora" else "steps", save_steps=2
        ),
        "schedule": HALF,
        "shortener": SHORTER,
        "max_examples": 1,
        "eval_records": RECORDS[:2],
        "max_new_tokens": 2,
        "weights": Method(method, rank=4, dropout=0.1) if method == "lora" else method,
        "tail": "gist" if method == "lora" else "none",
    }


@cache
def whole(method: str) -> tuple[dict[str, Any], Any]:
    """Return the weights and the result of an uninterrupted run."""
    with TemporaryDirectory() as folder:
        model, tokenizer = fresh(attention_dropout=0.1)
        set_seed(3)  # the state of the caller's random numbers must not matter
        result = internalize(model, tokenizer, PROMPT, RECORDS, **settings_of(Path(folder), method))
        return state(model), result


PLACES = ("first step", "inside", "in the last", "between", "writing", "evaluating", "saving")
QUICK = {("full", "inside"), ("full", "writing"), ("lora", "between")}


@pytest.mark.parametrize(
    ("method", "where"),
    [
        pytest.param(method, where, marks=() if (method, where) in QUICK else pytest.mark.slow)
        for method in ("full", "lora")
        for where in PLACES
    ],
)
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, method: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, reference = whole(method)

    def at_stage(number: int):
        def kill(result):
            if result.number == number:
                raise Kill

        return kill

    calls: list[int] = []

    def dying(predictions, references):
        calls.append(1)
        if len(calls) == 3:  # the second stage's bare query
            raise Kill
        return exact_match(predictions, references)

    settings = settings_of(tmp_path, method)
    kills: dict[str, dict[str, Any]] = {
        "first step": {"callbacks": [KillAt(1, 1)]},
        "inside": {"callbacks": [KillAt(2, 3)]},
        "in the last": {"callbacks": [KillAt(3, 3)]},
        "between": {"on_stage": at_stage(1)},
        "evaluating": {"metrics": {"exact_match": dying}},
        "saving": {"on_stage": at_stage(3)},
    }
    save, saved = GistTokenizer.save_pretrained, []

    def dying_save(self, directory):
        saved.append(1)
        if len(saved) == 2:  # after the second stage's weights
            raise Kill
        save(self, directory)

    model, tokenizer = fresh(attention_dropout=0.1)
    if where == "writing":
        monkeypatch.setattr(GistTokenizer, "save_pretrained", dying_save)
    with pytest.raises(Kill):
        internalize(model, tokenizer, PROMPT, RECORDS, **{**settings, **kills.get(where, {})})
    assert not (tmp_path / "internalized.json").exists()
    if where == "evaluating":
        training = tmp_path / "stage-2" / "model" / "training.json"
        took = 1000 + json.loads(training.read_text(encoding="utf-8"))["train_seconds"]
        training.write_text(json.dumps({"train_loss": reference.stages[1].train_loss, "train_seconds": took}))
    again, tokenizer = fresh(attention_dropout=0.1)
    torch.manual_seed(99)
    steps: list[str] = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(Path(str(args.output_dir)).name)

    monkeypatch.undo()
    monkeypatch.setattr(Rewrites, "shorten", lambda self, prompt, share: pytest.fail("shortened again"))
    result = internalize(again, tokenizer, PROMPT, RECORDS, **settings, resume=True, callbacks=[Count()])
    assert same(state(again), expected)
    resumed = {"inside": 1, "writing": 1, "in the last": 2}.get(where)
    for number, (stage, other) in enumerate(zip(result.stages, reference.stages, strict=True)):
        assert stage.train_loss == other.train_loss or (number == resumed and stage.train_loss > 0)
    assert [stage.metrics for stage in result.stages] == [stage.metrics for stage in reference.stages]
    if where == "evaluating":
        assert result.stages[1].seconds > took, "the seconds of the training count, though it was not repeated"
    trained = {"first step": 9, "inside": 4, "in the last": 1, "between": 6, "writing": 4, "evaluating": 3, "saving": 0}
    assert len(steps) == trained[where], "finished steps are not repeated"
    loaded, _ = gisting.load(tmp_path) if method == "full" else (again, None)
    assert same(state(loaded), expected)


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    seen: list[int] = []
    settings: dict[str, Any] = {
        "schedule": HALF,
        "shortener": SHORTER,
        "on_stage": lambda one: seen.append(one.number),
        "tail": "gist",
        "num_gist_tokens": 3,
    }
    first = internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path), **settings)
    again, _ = fresh()
    found = internalize(
        again, tokenizer, PROMPT, RECORDS, arguments(tmp_path), **settings, resume=True, callbacks=[KillAt(1, 1)]
    )
    assert found == first
    assert same(state(again), state(model))
    assert trained_num_gist_tokens(again) == (3, 3)
    assert seen == [1, 2, 3, 1, 2, 3]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path, max_steps=3), schedule=HALF, shortener=SHORTER)
    for changes, message in (
        ({"schedule": Schedule((1.0, 0.0))}, r"schedule was \[1.0, 0.5, 0.0\], is \[1.0, 0.0\]"),
        ({"arguments": arguments(tmp_path, max_steps=3, learning_rate=0.5)}, "learning_rate was 0.01, is 0.5"),
        ({"prompt": "w1"}, "prompt_sha256 was"),
        ({"records": RECORDS[:3]}, "records was"),
        ({"max_length": 100}, "max_length was 512, is 100"),
        ({"weights": "lora"}, "name was full, is lora"),
        ({"metrics": {"mine": exact_match}}, r"metrics was \['exact_match'\], is \['mine'\]"),
        ({"max_new_tokens": 1}, "max_new_tokens was 128, is 1"),
    ):
        again, _ = fresh()
        settings: dict[str, Any] = {
            "prompt": PROMPT,
            "records": RECORDS,
            "arguments": arguments(tmp_path, max_steps=3),
            "schedule": HALF,
            "shortener": SHORTER,
            **changes,
        }
        with pytest.raises(GistError, match=f"was started with other settings: .*{message}"):
            internalize(again, tokenizer, **settings, resume=True)
    with pytest.raises(GistError, match="was started with other settings: model was llama/"):
        internalize(
            model,
            tokenizer,
            PROMPT,
            RECORDS,
            arguments(tmp_path, max_steps=3),
            schedule=HALF,
            shortener=SHORTER,
            resume=True,
        )
    with pytest.raises(GistError, match="already holds an internalisation; continue it with resume=True"):
        internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path))
    with pytest.raises(GistError, match="holds nothing to resume; start without resume"):
        internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path / "none"), resume=True)


def in_format_1(folder: Path) -> None:
    """Rewrite the files of a run as version 0.1 wrote them."""
    old_names = {"prompt_sha256": "template_sha256", "shortener": "compressor", "prompt_format": "layout"}

    def renamed(settings: dict[str, Any]) -> dict[str, Any]:
        old = {old_names.get(name, name): value for name, value in settings.items()}
        return {**old, "control": "compressed"} if old["control"] == "shortened" else old

    for path, change in (
        (folder / "settings.json", renamed),
        *((path, lambda about: {**about, "template": about.pop("prompt")}) for path in folder.glob("*/stage.json")),
        (
            folder / "internalized.json",
            lambda about: {
                **{old_names.get(name, name): value for name, value in about.items()},
                "format": 1,
                "settings": renamed(about["settings"]),
            },
        ),
    ):
        if path.exists():
            path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def test_a_run_of_format_1_is_resumed_and_read(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"shortener": SHORTER, "control": "shortened", "control_share": 0.5}
    model, tokenizer = fresh()
    whole = internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path / "whole"), **settings)
    in_format_1(tmp_path / "whole")
    assert "template_sha256" in (tmp_path / "whole" / "internalized.json").read_text(encoding="utf-8")
    assert load_internalized(tmp_path / "whole") == whole
    assert check_prompt(tmp_path / "whole", PROMPT)
    killed, _ = fresh()
    with pytest.raises(Kill):
        internalize(
            killed, tokenizer, PROMPT, RECORDS, arguments(tmp_path / "half"), **settings, callbacks=[KillAt(1, 2)]
        )
    in_format_1(tmp_path / "half")
    again, _ = fresh()
    resumed = internalize(again, tokenizer, PROMPT, RECORDS, arguments(tmp_path / "half"), **settings, resume=True)
    assert resumed.settings == whole.settings
    assert same(state(again), state(model))


def test_old_arguments_still_work(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", DeprecationWarning)
        result = internalize(
            model,
            tokenizer,
            records=RECORDS,
            arguments=arguments(tmp_path),
            template=PROMPT,  # pyright: ignore[reportCallIssue]
            compressor=SHORTER,  # pyright: ignore[reportCallIssue]
            layout=PromptFormat(),  # pyright: ignore[reportCallIssue]
            control="compressed",
            control_share=0.5,
        )
    found = " ".join(str(one.message) for one in warned)
    for words in ("use prompt", "use shortener", "use prompt_format", "use 'shortened'"):
        assert words in found
    with pytest.warns(DeprecationWarning, match="use prompt_sha256"):
        assert result.template_sha256 == result.prompt_sha256
    assert result.settings["control"] == "shortened"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("compressors.TemplateCompressor", "shorteners.Shortener"),
        ("compressors.NoCompression", "shorteners.NoShortening"),
        ("compressors.compress_template", "shorteners.shorten"),
        ("examples.ExamplePool", "examples.ExamplePool"),
        ("layout.PromptLayout", "requests.PromptFormat"),
        ("layout.lay_out", "requests.make_requests"),
        ("report.make_report", "report.make_report"),
        ("report.shared_prefix", "comparison.shared_prefix"),
        ("result.TemplateWarning", "result.PromptWarning"),
        ("result.check_template", "result.check_prompt"),
        ("stages.internalize", "stages.internalize"),
    ],
)
def test_old_places_still_work(old: str, new: str) -> None:
    module, name = f"gisting.train.internalize.{old}".rsplit(".", 1)
    new_module, new_name = f"gisting.internalize.{new}".rsplit(".", 1)
    import_module("gisting.train.internalize")
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} will be removed .*; use {new_module}.{new_name}"):
        found = getattr(import_module(module), name)
    assert found is getattr(import_module(new_module), new_name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(import_module(module), "nothing")  # noqa: B009


def test_every_old_place_leads_somewhere() -> None:
    """Compare with the names that version 0.1 promised."""
    import_module("gisting.train.internalize")
    old = {
        "compressors": "LLMLingua2 NoCompression Rewrites SelfInformation TemplateCompressor compress_template "
        "realised_share",
        "layout": "PromptLayout Requests lay_out",
        "plan": "CONTROLS TAILS Plan Stage make_plan num_steps split_steps warmup_of",
        "prices": "Prices load_prices",
        "report": "BARE_QUERY FULL_PROMPT PREFIX_CACHE Report RequestRow StageRow Times make_report num_rows_read "
        "shared_prefix",
        "result": "RESULT_NAME Internalized StageResult TemplateWarning check_template load_internalized template_hash",
        "schedule": "SCHEDULES Schedule",
    }
    for module, names in old.items():
        for name in names.split():
            with pytest.warns(DeprecationWarning, match="will be removed in the next release; use gisting.internalize"):
                assert getattr(import_module(f"gisting.train.internalize.{module}"), name) is not None


# -- the finished model ------------------------------------------------------------------------------------------------


def test_a_tail_of_gists(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    result = internalize(
        model,
        tokenizer,
        PROMPT,
        RECORDS,
        arguments(tmp_path, max_steps=60),
        schedule=HALF,
        shortener=SHORTER,
        eval_records=RECORDS,
        max_new_tokens=4,
        tail="gist",
        num_gist_tokens=2,
    )
    last = result.stages[-1]
    assert (result.condition, last.condition, last.num_gist_tokens) == ("gist", "gist", 2)
    assert (last.share, last.prompt_tokens, last.query_tokens, result.tokens) == (1.0, 2.0, 2.0, 4.0)
    assert result.metrics == {"exact_match": 1.0}
    assert set(last.metrics) == {"no-prompt", "gist"}
    loaded, tokenizer = gisting.load(tmp_path)
    assert trained_num_gist_tokens(loaded) == (2, 2)
    cache = gisting.compress(loaded, tokenizer, [PROMPT], 2)
    queries = [record.input for record in RECORDS]
    answers = gisting.generate(loaded, tokenizer, queries, cache=cache, max_new_tokens=4, do_sample=False)
    assert answers == [record.output for record in RECORDS]
    with pytest.warns(PromptWarning, match="compress this prompt again"):
        assert not check_prompt(tmp_path, PROMPT + " w1")


def test_only_the_adapter_is_saved(tmp_path: Path) -> None:
    base, tokenizer = fresh()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, tokenizer = gisting.load(tmp_path / "base")
    result = internalize(
        model,
        tokenizer,
        PROMPT,
        RECORDS,
        arguments(tmp_path / "out"),
        schedule=HALF,
        shortener=SHORTER,
        weights=Method("lora", rank=4),
    )
    assert result.num_trainable_parameters < result.num_parameters / 2
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded, _ = gisting.load(tmp_path / "out")
    assert adapter_of(loaded) is not None
    assert same(state(loaded), state(model))
    with pytest.raises(GistError, match="holds a whole checkpoint"):
        internalize(base, tokenizer, PROMPT, RECORDS, arguments(tmp_path / "base"), weights="lora")


def test_mixed_precision_is_not_wrapped_again_by_each_stage(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    wrapped: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            wrapped.append("forward" in vars(model))

    settings: dict[str, Any] = {"schedule": HALF, "shortener": SHORTER, "callbacks": [Watch()]}
    internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path, bf16=True), **settings)
    assert wrapped == [True] * 6
    assert "forward" not in vars(model)


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_are_one_stage_of_all_steps(tmp_path: Path, control: str) -> None:
    model, tokenizer = fresh()
    result = internalize(
        model,
        tokenizer,
        PROMPT,
        RECORDS,
        arguments(tmp_path),
        shortener=SHORTER,
        max_examples=2,
        eval_records=RECORDS[:4],
        max_new_tokens=2,
        metrics={"number": lambda predictions, references: len(predictions)},
        control=control,
        control_share=0.5 if control == "shortened" else None,
    )
    (stage,) = result.stages
    tokens = {"bare": (0, 2), "full": (16, 18), "full-run-bare": (16, 2), "shortened": (3 + 5, 10)}
    assert (stage.prompt_tokens, result.tokens) == tokens[control]
    assert result.condition == ("prompt" if control in ("full", "shortened") else "no-prompt")
    assert result.metrics == {"number": 4.0}
    assert result.settings["control"] == control


def test_another_prompt_is_warned_about(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path), control="bare")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_prompt(tmp_path, PROMPT)
    with pytest.warns(PromptWarning, match=r"trained on the prompt \w{12}, this prompt is \w{12}; .*; train it again"):
        assert not check_prompt(tmp_path, PROMPT + " ")
    with pytest.raises(GistError, match=r"has no internalized.json, so it is not a finished internalisation"):
        check_prompt(tmp_path / "stage-1", PROMPT)
    path = tmp_path / "internalized.json"
    whole = path.read_text(encoding="utf-8")
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "is not the result of an internalisation"),
        (whole.replace('"format": 2', '"format": 3'), "has format 3, this version reads 2"),
        (whole.replace('"train_loss"', '"loss"'), "is incomplete"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(GistError, match=message):
            load_internalized(tmp_path)


def test_errors(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    for changes, message in (
        ({"prompt": " "}, "prompt is empty"),
        ({"records": []}, "records is empty"),
        ({"eval_records": []}, "eval_records is empty"),
        ({"weights": "gist-lora"}, "weights must be one of full, lora, got 'gist-lora'"),
        ({"arguments": arguments(tmp_path, max_steps=3)}, "max_steps must be at least 4, one for each stage, got 3"),
        ({"arguments": arguments(tmp_path, eval_strategy="epoch")}, "eval_strategy must be 'no'"),
        (
            {"arguments": arguments(tmp_path, train_sampling_strategy="group_by_length")},
            "train_sampling_strategy must not be group_by_length or batch_rebalance",
        ),
        ({"shortener": SHORTER}, "there is no rewrite for the share 0.66"),
        ({"template": PROMPT}, "prompt was given twice, once under its old name template"),
        ({"max_length": 10}, r"record 1 \('w0 w10'\) has 11 ids"),
    ):
        settings: dict[str, Any] = {
            "prompt": PROMPT,
            "records": RECORDS,
            "arguments": arguments(tmp_path),
            **changes,
        }
        with pytest.raises(GistError, match=message):
            internalize(model, tokenizer, **settings)
        assert not (tmp_path / "settings.json").exists(), "nothing was started"
    with pytest.raises(GistError, match=r"is not patched; call gisting.patch"):
        internalize(gisting.unpatch(model), tokenizer, PROMPT, RECORDS, arguments(tmp_path))


# -- edited prompts ----------------------------------------------------------------------------------------------------

VERSIONS = ["w51 w50 w52 w53 w54 w55", "w50 w51 w52 w53 w54 w56"]
EDITS = [Record(VERSIONS[row % 2], f"w{row} w{row + 10}", f"w{row + 20}") for row in range(6)]


def test_edited_prompts_are_read_by_the_stages_of_a_gist(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    settings = {"schedule": HALF, "shortener": SHORTER, "tail": "gist", "num_gist_tokens": 2, "edits": EDITS}
    result = internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path, max_steps=3), **settings)
    first, second, third = (lines(tmp_path / f"stage-{number}" / "data.jsonl") for number in (1, 2, 3))
    assert {row["instruction"] for row in first} == {PROMPT}
    assert {row["instruction"] for row in second} == {"w50 w52 w54"}
    assert [row["instruction"] for row in third[:8]] == [PROMPT] * 8
    written = {(row["instruction"], row["input"], row["output"]) for row in third[8:]}
    assert written == {(one.instruction, one.input, one.output) for one in EDITS}
    assert [stage.num_records for stage in result.stages] == [8, 8, 14]
    assert result.stages[2].prompt_tokens == 2


def test_a_gist_learns_which_version_it_is_of(tmp_path: Path) -> None:
    """One query, and an answer that only the version decides."""
    answers = {f"w{50 + number} w60": f"w{30 + number}" for number in range(4)}
    edits = [Record(prompt, "w1", answer) for prompt, answer in answers.items()]
    model, tokenizer = fresh()
    settings: dict[str, Any] = {"schedule": Schedule((1.0, 0.0)), "tail": "gist", "edits": edits, "max_length": 64}
    internalize(
        model,
        tokenizer,
        "w59 w60",
        [Record("", "w1", "w39")],
        arguments(tmp_path, max_steps=240, batch_size=5, per_device_batch_size=5),
        **settings,
    )
    said = gisting.generate(model, tokenizer, ["w1"] * 4, prompts=[*answers], num_gist_tokens=1, max_new_tokens=1)
    assert said == [*answers.values()]


@pytest.mark.parametrize(
    ("edits", "changes", "message"),
    [
        (EDITS, {"tail": "none"}, "edits are read by the stages of tail 'gist', got tail 'none'"),
        ([], {}, "edits is empty; pass at least one record with an edited prompt, or None"),
        ([Record("", "w1", "w2")], {}, "record 1 of edits has no instruction; it is the edited prompt"),
        ([Record("w1 " * 40, "w1", "w2")], {"max_length": 30}, "has 4. ids with the prompt"),
    ],
)
def test_edits_that_are_refused(tmp_path: Path, edits: Any, changes: dict[str, Any], message: str) -> None:
    model, tokenizer = fresh()
    settings = {"schedule": HALF, "shortener": SHORTER, "tail": "gist", **changes, "edits": edits}
    with pytest.raises(GistError, match=message):
        internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path), **settings)
    assert not (tmp_path / "settings.json").exists()


def test_a_run_with_other_edits_is_not_resumed(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    settings: dict[str, Any] = {"schedule": HALF, "shortener": SHORTER, "tail": "gist"}
    internalize(model, tokenizer, PROMPT, RECORDS, arguments(tmp_path, max_steps=3), **settings, edits=EDITS)
    other = [Record(VERSIONS[0], one.input, one.output) for one in EDITS]
    again, _ = fresh()
    settings["resume"] = True
    for edits in (None, other):
        with pytest.raises(GistError, match="edits was"):
            internalize(again, tokenizer, PROMPT, RECORDS, arguments(tmp_path, max_steps=3), **settings, edits=edits)
