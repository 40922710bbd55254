"""The stage loop: what each stage reads, that the bare query is enough in the end, and that a killed run goes on to the
same bits.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

import gisting
from gisting import GistError, GistTokenizer, Record
from gisting.data.plain import PlainCollator
from gisting.errors import RecordError
from gisting.eval.metrics import exact_match
from gisting.internalize.compressors import Rewrites
from gisting.internalize.layout import PromptLayout, lay_out
from gisting.internalize.plan import CONTROLS, Plan, Stage, make_plan, num_steps, split_steps, warmup_of
from gisting.internalize.result import TemplateWarning, check_template, load_internalized
from gisting.internalize.schedule import Schedule
from gisting.internalize.stages import internalize
from gisting.models.adapters import adapter_of
from gisting.models.load import trained_num_gist_tokens
from gisting.train.finetune import published_arguments
from gisting.train.methods import Method
from gisting.train.objective import ObjectiveTrainer
from tests import garbage, tiny

TEMPLATE = "w50 w51 w52 w53 w54 w55"
# The template says nothing of it: what is to be learned is in the answers, and so in the weights.
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
    """What a killed process looks like from inside."""


class KillAt(TrainerCallback):
    """At a step of the training that comes so many-th."""

    def __init__(self, stage: int, step: int) -> None:
        self.stage, self.step, self.seen = stage, step, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.seen == self.stage and state.global_step == self.step:
            raise Kill


# -- which stages there are --------------------------------------------------------------------------------------------


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
        name: make_plan(linear, 4, control=name, control_share=0.5 if name == "compressed" else None)
        for name in CONTROLS
    } == {
        "bare": Plan((Stage(0.0, 0),), "no-prompt"),
        "full": Plan((Stage(1.0, 4),), "prompt"),
        "full-run-bare": Plan((Stage(1.0, 4),), "no-prompt"),
        "compressed": Plan((Stage(0.5, 2),), "prompt"),
    }
    assert split_steps(11, 4) == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail": "end"}, "tail must be one of none, gist, got 'end'"),
        ({"control": "fool"}, "control must be one of bare, full, full-run-bare, compressed, or None"),
        ({"control": "full", "tail": "gist"}, "control is 'full', which has no stage for tail='gist'"),
        ({"control": "compressed"}, "control_share goes with control='compressed', got None"),
        ({"control_share": 0.5}, "control_share goes with control='compressed', got 0.5 with None"),
        ({"control": "compressed", "control_share": 1.0}, "control_share must be above 0 and below 1, got 1"),
        ({"tail": "gist", "num_gist_tokens": 0}, "num_gist_tokens must be at least 1, got 0"),
        ({"tail": "gist", "num_gist_stages": 5}, "num_gist_stages must be 1 to 4, the number of stages, got 5"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GistError, match=message):
        make_plan(Schedule.linear(4), **changes)


def test_fewer_steps_than_stages() -> None:
    with pytest.raises(GistError, match="max_steps must be at least 4, one for each stage, got 3; give more steps or"):
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


def test_warm_up_leaves_a_step_to_learn_in(tmp_path: Path) -> None:
    for share, count, expected in ((0.03, 1, 0), (0.03, 100, 3), (0.5, 3, 1), (2, 3, 2), (0, 1, 0)):
        assert warmup_of(arguments(tmp_path, warmup_steps=share), count) == expected
    with pytest.raises(GistError, match="warmup_steps must be less than the steps of a stage, 3, got 3; lower it"):
        warmup_of(arguments(tmp_path, warmup_steps=3), 3)


def test_stages_of_one_step_train(tmp_path: Path) -> None:
    """Trainer's share of one step, rounded up, was all of it, at a learning rate of 0."""
    model, tokenizer = fresh()
    before = state(model)
    settings = arguments(tmp_path, max_steps=3, warmup_steps=0.03, lr_scheduler_type="cosine")
    internalize(model, tokenizer, TEMPLATE, RECORDS, settings, schedule=HALF, compressor=SHORTER)
    assert not same(before, state(model))


# -- what a request holds ----------------------------------------------------------------------------------------------


def test_a_prompt_by_eye() -> None:
    layout = PromptLayout("{output} <- {input}", separator="; ", gap=" | ")
    examples = [Record("", "a {output}", "b"), Record("", "c", "d {input}")]
    assert layout.prompt("template", examples) == "template | b <- a {output}; d {input} <- c"
    assert (layout.prompt("", examples[:1]), layout.prompt("t", []), layout.prompt("", [])) == (
        "b <- a {output}",
        "t",
        "",
    )
    with pytest.raises(
        GistError, match=r"example must hold \{input\} and \{output\} exactly once each, got '\{input\}'"
    ):
        PromptLayout("{input}")


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("max_length", [40, 17, 16, 13])
def test_examples_are_dropped_and_nothing_is_cut(name: str, max_length: int) -> None:
    """Whatever the length, a request is template, the most similar examples that fit, and query; it fits the collator
    and, but for one example more, it would not.
    """
    tokenizer = tiny.tokenizer(name)
    examples = [[Record("", "w1", "w2"), Record("", "w3", "w4 w5"), Record("", "w6", "w7")], []]
    found = lay_out(
        tokenizer,
        RECORDS[:2],
        TEMPLATE,
        examples,
        PromptLayout(),
        max_length=max_length,
        max_target_length=3,
    )
    written = ["w1 -> w2", "w3 -> w4 w5", "w6 -> w7"]
    room = max_length - 6 - 2 - (0 if name == "t5" else 3)
    number = max(count for count in range(4) if sum([3, 4, 3][3 - count :]) <= room)
    assert found.records[0].instruction == "\n\n".join(filter(None, [TEMPLATE, "\n".join(written[3 - number :])]))
    assert found.num_examples == [number, 0]
    assert found.prompt_tokens == [6 + sum([3, 4, 3][3 - number :]), 6]
    assert found.query_tokens == [2, 2]
    PlainCollator(tokenizer, max_length, max_target_length=3)(found.records)


def test_what_cannot_fit_is_named() -> None:
    tokenizer = tiny.tokenizer()
    settings: dict[str, Any] = {"layout": PromptLayout(), "max_length": 10, "max_target_length": 2}
    message = r"record 2 \('w1 w11'\) has 11 ids with the template and without examples, more than max_length=10"
    with pytest.raises(RecordError, match=message):
        lay_out(tokenizer, [Record("", "w1", "w2"), RECORDS[1]], TEMPLATE, [[], RECORDS[3:5]], **settings)
    settings["max_length"] = 12
    found = lay_out(tokenizer, RECORDS[1:2], TEMPLATE, [[]], **settings, num_gist_tokens=1)
    assert (found.prompt_tokens, found.query_tokens) == ([1], [2])
    with pytest.raises(RecordError, match="has 13 ids"):
        lay_out(tokenizer, RECORDS[1:2], TEMPLATE, [[]], **settings, num_gist_tokens=2)
    with pytest.raises(RecordError, match="record 1 has no input; it is the query"):
        lay_out(tokenizer, [Record("", " ", "w2")], TEMPLATE, [[]], **settings)
    with pytest.raises(
        RecordError, match=r"record 1 \('w0 w10'\) has an answer of 3 ids, more than max_target_length=2"
    ):
        lay_out(tiny.tokenizer("t5"), RECORDS, "", [[]] * 8, **settings)


# -- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_bare_query_is_enough_in_the_end(tmp_path: Path, name: str) -> None:
    model, tokenizer = fresh(name)
    steps = 75 if name == "t5" else 45
    result = internalize(
        model,
        tokenizer,
        TEMPLATE,
        RECORDS,
        arguments(tmp_path, max_steps=steps),
        schedule=HALF,
        compressor=SHORTER,
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
        TEMPLATE,
        RECORDS,
        arguments(tmp_path),
        schedule=HALF,
        compressor=SHORTER,
        max_examples=2,
        eval_records=[Record("ignored", "w7 w20", "w1")],
        max_new_tokens=2,
    )
    first, second, third = (lines(tmp_path / f"stage-{number}" / "data.jsonl") for number in (1, 2, 3))
    for rows, template, number in ((first, TEMPLATE, 2), (second, "w50 w52 w54", 1)):
        assert [(row["input"], row["output"]) for row in rows] == [(one.input, one.output) for one in RECORDS]
        for row in rows:
            head, _, examples = row["instruction"].partition("\n\n")
            assert head == template
            assert len(examples.splitlines()) == number
            assert f"{row['input']} -> " not in examples, "never the instance itself"
    assert third == [{"instruction": "", "input": one.input, "output": one.output} for one in RECORDS]
    (asked,) = lines(tmp_path / "stage-2" / "eval.jsonl")
    assert asked["instruction"] == "w50 w52 w54\n\nw7 w17 -> w37 w38", "the most similar of the training records"
    (said,) = lines(tmp_path / "stage-1" / "answers.jsonl")
    assert set(said) == {"input", "output", "no-prompt", "prompt"}
    about = json.loads((tmp_path / "stage-2" / "stage.json").read_text(encoding="utf-8"))
    assert (about["share"], about["realised_share"], about["template"]) == (0.5, 0.5, "w50 w52 w54")


def test_only_answers_are_learned(tmp_path: Path) -> None:
    """The loss of a stage is that of the answers behind its prompts."""
    model, tokenizer = fresh()
    still = arguments(tmp_path, learning_rate=0.0, max_steps=3, batch_size=8, per_device_batch_size=8)
    result = internalize(model, tokenizer, TEMPLATE, RECORDS, still, schedule=HALF, compressor=SHORTER)
    for stage, text in zip(result.stages, (TEMPLATE, "w50 w52 w54", ""), strict=True):
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
        TEMPLATE,
        RECORDS,
        arguments(tmp_path, **settings),
        schedule=HALF,
        compressor=SHORTER,
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
        TEMPLATE,
        RECORDS,
        arguments(tmp_path / "full", **settings),
        control="full",
        callbacks=[Watch()],
    )
    assert seen[-1][:2] == ("stage-1", 12), "as many steps in all"
    odd, _ = fresh()
    few = {"max_steps": -1, "num_train_epochs": 2.0, "per_device_batch_size": 8, "batch_size": 8}
    with pytest.raises(GistError, match="max_steps must be at least 3, one for each stage, got 2; give more steps or"):
        internalize(odd, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path / "few", **few), schedule=HALF)
    assert not (tmp_path / "few").exists()


def test_no_example_is_chosen_by_an_answer_that_nobody_knows(tmp_path: Path) -> None:
    """In training the record with the same answer is no example; of a held-out request it may be, for who asks does not
    know its answer.
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
        TEMPLATE,
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


def test_a_compressed_control_that_compresses_nothing_is_refused(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    with pytest.raises(GistError, match="a compressor that leaves the template whole is control 'full'; give rewrites"):
        internalize(model, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path), control="compressed", control_share=0.5)


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    gisting.save_pretrained(model, tokenizer, tmp_path)
    with pytest.raises(GistError, match="holds a checkpoint, which would be lost; give another directory"):
        internalize(model, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path), schedule=HALF, compressor=SHORTER)
    assert not list(tmp_path.glob("stage-*"))


# -- killed and resumed ------------------------------------------------------------------------------------------------


def settings_of(folder: Path, method: str) -> dict[str, Any]:
    return {
        # Both after two steps of three.
        "arguments": arguments(
            folder, max_steps=9, save_strategy="epoch" if method == "lora" else "steps", save_steps=2
        ),
        "schedule": HALF,
        "compressor": SHORTER,
        "max_examples": 1,
        "eval_records": RECORDS[:2],
        "max_new_tokens": 2,
        "method": Method(method, rank=4, dropout=0.1) if method == "lora" else method,
        "tail": "gist" if method == "lora" else "none",
    }


@pytest.fixture(scope="module", params=["full", "lora"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Any]:
    """The method, and what an uninterrupted run ends with."""
    folder = tmp_path_factory.mktemp("whole")
    model, tokenizer = fresh(attention_dropout=0.1)
    set_seed(3)  # where a run begins in the caller's random numbers does not matter
    result = internalize(model, tokenizer, TEMPLATE, RECORDS, **settings_of(folder, request.param))
    return request.param, state(model), result


@pytest.mark.parametrize("where", ["first step", "inside", "in the last", "between", "writing", "evaluating", "saving"])
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, whole: tuple[str, dict[str, Any], Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, expected, reference = whole

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
        if len(saved) == 2:  # behind the second stage's weights
            raise Kill
        save(self, directory)

    model, tokenizer = fresh(attention_dropout=0.1)
    if where == "writing":
        monkeypatch.setattr(GistTokenizer, "save_pretrained", dying_save)
    with pytest.raises(Kill):
        internalize(model, tokenizer, TEMPLATE, RECORDS, **{**settings, **kills.get(where, {})})
    assert not (tmp_path / "internalized.json").exists()
    again, tokenizer = fresh(attention_dropout=0.1)
    torch.manual_seed(99)
    steps: list[str] = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(Path(str(args.output_dir)).name)

    monkeypatch.undo()
    # What was compressed and retrieved once is not compressed again.
    monkeypatch.setattr(Rewrites, "compress", lambda self, template, share: pytest.fail("compressed again"))
    result = internalize(again, tokenizer, TEMPLATE, RECORDS, **settings, resume=True, callbacks=[Count()])
    assert same(state(again), expected)
    resumed = {"inside": 1, "writing": 1, "in the last": 2}.get(where)
    for number, (stage, other) in enumerate(zip(result.stages, reference.stages, strict=True)):
        assert stage.train_loss == other.train_loss or (number == resumed and stage.train_loss > 0)
    assert [stage.metrics for stage in result.stages] == [stage.metrics for stage in reference.stages]
    trained = {"first step": 9, "inside": 4, "in the last": 1, "between": 6, "writing": 4, "evaluating": 3, "saving": 0}
    assert len(steps) == trained[where], "what was done is not done again"
    loaded, _ = gisting.load(tmp_path) if method == "full" else (again, None)
    assert same(state(loaded), expected)


def test_a_finished_run_is_read_and_not_run_again(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    seen: list[int] = []
    settings: dict[str, Any] = {
        "schedule": HALF,
        "compressor": SHORTER,
        "on_stage": lambda one: seen.append(one.number),
        "tail": "gist",
        "num_gist_tokens": 3,
    }
    first = internalize(model, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path), **settings)
    again, _ = fresh()
    found = internalize(
        again, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path), **settings, resume=True, callbacks=[KillAt(1, 1)]
    )
    assert found == first
    assert same(state(again), state(model))
    assert trained_num_gist_tokens(again) == (3, 3)
    assert seen == [1, 2, 3, 1, 2, 3]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    internalize(
        model, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path, max_steps=3), schedule=HALF, compressor=SHORTER
    )
    for changes, message in (
        ({"schedule": Schedule((1.0, 0.0))}, r"schedule was \[1.0, 0.5, 0.0\], is \[1.0, 0.0\]"),
        ({"arguments": arguments(tmp_path, max_steps=3, learning_rate=0.5)}, "learning_rate was 0.01, is 0.5"),
        ({"template": "w1"}, "template_sha256 was"),
        ({"records": RECORDS[:3]}, "records was"),
        ({"max_length": 100}, "max_length was 512, is 100"),
        ({"method": "lora"}, "name was full, is lora"),
        ({"metrics": {"mine": exact_match}}, r"metrics was \['exact_match'\], is \['mine'\]"),
        ({"max_new_tokens": 1}, "max_new_tokens was 128, is 1"),
    ):
        again, _ = fresh()
        settings: dict[str, Any] = {
            "template": TEMPLATE,
            "records": RECORDS,
            "arguments": arguments(tmp_path, max_steps=3),
            "schedule": HALF,
            "compressor": SHORTER,
            **changes,
        }
        with pytest.raises(GistError, match=f"was begun with other settings: .*{message}"):
            internalize(again, tokenizer, **settings, resume=True)
    with pytest.raises(GistError, match="was begun with other settings: model was llama/"):
        internalize(
            model,
            tokenizer,
            TEMPLATE,
            RECORDS,
            arguments(tmp_path, max_steps=3),
            schedule=HALF,
            compressor=SHORTER,
            resume=True,
        )
    with pytest.raises(GistError, match="holds an internalisation already; go on with resume=True"):
        internalize(model, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path))
    with pytest.raises(GistError, match="holds nothing to resume from; start without resume"):
        internalize(model, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path / "none"), resume=True)


# -- what is left in the end -------------------------------------------------------------------------------------------


def test_a_tail_of_gists(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    result = internalize(
        model,
        tokenizer,
        TEMPLATE,
        RECORDS,
        arguments(tmp_path, max_steps=60),
        schedule=HALF,
        compressor=SHORTER,
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
    cache = gisting.compress(loaded, tokenizer, [TEMPLATE], 2)
    queries = [record.input for record in RECORDS]
    answers = gisting.generate(loaded, tokenizer, queries, cache=cache, max_new_tokens=4, do_sample=False)
    assert answers == [record.output for record in RECORDS]
    with pytest.warns(TemplateWarning, match="compress it anew"):
        assert not check_template(tmp_path, TEMPLATE + " w1")


def test_an_adapter_is_all_that_is_saved(tmp_path: Path) -> None:
    base, tokenizer = fresh()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, tokenizer = gisting.load(tmp_path / "base")
    result = internalize(
        model,
        tokenizer,
        TEMPLATE,
        RECORDS,
        arguments(tmp_path / "out"),
        schedule=HALF,
        compressor=SHORTER,
        method=Method("lora", rank=4),
    )
    assert result.num_trainable_parameters < result.num_parameters / 2
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded, _ = gisting.load(tmp_path / "out")
    assert adapter_of(loaded) is not None
    assert same(state(loaded), state(model))
    with pytest.raises(GistError, match="holds a whole checkpoint"):
        internalize(base, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path / "base"), method="lora")


def test_mixed_precision_is_not_wrapped_again_by_each_stage(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    wrapped: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            wrapped.append("forward" in vars(model))

    settings: dict[str, Any] = {"schedule": HALF, "compressor": SHORTER, "callbacks": [Watch()]}
    internalize(model, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path, bf16=True), **settings)
    assert wrapped == [True] * 6
    assert "forward" not in vars(model)


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_are_one_stage_of_all_steps(tmp_path: Path, control: str) -> None:
    model, tokenizer = fresh()
    result = internalize(
        model,
        tokenizer,
        TEMPLATE,
        RECORDS,
        arguments(tmp_path),
        compressor=SHORTER,
        max_examples=2,
        eval_records=RECORDS[:4],
        max_new_tokens=2,
        metrics={"number": lambda predictions, references: len(predictions)},
        control=control,
        control_share=0.5 if control == "compressed" else None,
    )
    (stage,) = result.stages
    tokens = {"bare": (0, 2), "full": (16, 18), "full-run-bare": (16, 2), "compressed": (3 + 5, 10)}
    assert (stage.prompt_tokens, result.tokens) == tokens[control]
    assert result.condition == ("prompt" if control in ("full", "compressed") else "no-prompt")
    assert result.metrics == {"number": 4.0}
    assert result.settings["control"] == control


def test_another_template_is_warned_of(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    internalize(model, tokenizer, TEMPLATE, RECORDS, arguments(tmp_path), control="bare")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_template(tmp_path, TEMPLATE)
    with pytest.warns(
        TemplateWarning, match=r"was trained on the template \w{12}, this one is \w{12}; .* train it anew"
    ):
        assert not check_template(tmp_path, TEMPLATE + " ")
    with pytest.raises(GistError, match=r"has no internalized.json, so it is no finished internalisation"):
        check_template(tmp_path / "stage-1", TEMPLATE)
    path = tmp_path / "internalized.json"
    whole = path.read_text(encoding="utf-8")
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "is no result of an internalisation"),
        (whole.replace('"format": 1', '"format": 2'), "has format 2, this version reads 1"),
        (whole.replace('"train_loss"', '"loss"'), "is not complete"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(GistError, match=message):
            load_internalized(tmp_path)


def test_errors(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    for changes, message in (
        ({"template": " "}, "template is empty"),
        ({"records": []}, "records is empty"),
        ({"eval_records": []}, "eval_records is empty"),
        ({"method": "gist-lora"}, "method must be one of full, lora, got 'gist-lora'"),
        ({"arguments": arguments(tmp_path, max_steps=3)}, "max_steps must be at least 4, one for each stage, got 3"),
        ({"arguments": arguments(tmp_path, eval_strategy="epoch")}, "eval_strategy must be 'no'"),
        ({"compressor": SHORTER}, "there is no rewrite for the share 0.66"),
        ({"max_length": 10}, r"record 1 \('w0 w10'\) has 11 ids"),
    ):
        settings: dict[str, Any] = {
            "template": TEMPLATE,
            "records": RECORDS,
            "arguments": arguments(tmp_path),
            **changes,
        }
        with pytest.raises(GistError, match=message):
            internalize(model, tokenizer, **settings)
        assert not (tmp_path / "settings.json").exists(), "nothing is begun"
    with pytest.raises(GistError, match=r"is not patched; call gisting.patch"):
        internalize(gisting.unpatch(model), tokenizer, TEMPLATE, RECORDS, arguments(tmp_path))
