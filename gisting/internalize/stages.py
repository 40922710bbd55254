"""Prompt internalisation: one model through all stages, each on data of its own, on stock ``Trainer``.

Place in the flow: plan, layout, compressor and examples -> **stages** -> a checkpoint that answers the bare query. The
method is PromptIntern's (arXiv 2407.02211); its public code holds neither schedule nor stage loop, SKIntern
(arXiv 2409.13183) spells them out. What a stage leaves, under the output directory::

    stage-1/stage.json     shares asked for and realised, counts, tokens, the template's text
    stage-1/data.jsonl     what it trains on, for a person to read (eval.jsonl: what it is asked afterwards)
    settings.json          what was asked for; a resumed run must ask for the same
    stage-1/answers.jsonl  what it said
    stage-1/result.json    that it is finished, and how well
    internalized.json      all of it, beside the finished checkpoint

The data of all stages are made before the first is trained, so that a request that does not fit, or a text that nobody
wrote, is known before hours have gone, and a template that the model itself shortens is shortened by the model as it
was. Each stage has a learning rate schedule, an optimiser and a seed (for its order) of its own: its data are others
than those of the stage before, and the last, the bare query, would otherwise get what is left of a decayed rate.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from gisting.data.collate import GistCollator
from gisting.data.plain import PlainCollator
from gisting.data.records import Record, to_record
from gisting.errors import GistError
from gisting.eval.conditions import evaluate
from gisting.eval.metrics import exact_match
from gisting.internalize.compressors import (
    NoCompression,
    TemplateCompressor,
    compress_template,
    realised_share,
)
from gisting.internalize.directory import (
    ANSWERS_NAME,
    DATA_NAME,
    EVAL_NAME,
    SETTINGS_NAME,
    STAGE_NAME,
    TRAINING_NAME,
    check_directory,
    read_records,
    records_hash,
    restore_model,
    save_model,
    write_lines,
    write_records,
)
from gisting.internalize.examples import ExamplePool
from gisting.internalize.layout import PromptLayout, Requests, lay_out
from gisting.internalize.plan import Plan, Stage, make_plan, num_steps, split_steps, warmup_of
from gisting.internalize.result import (
    RESULT_NAME,
    Internalized,
    StageResult,
    load_internalized,
    template_hash,
    write_json,
)
from gisting.internalize.schedule import Schedule
from gisting.models import adapters
from gisting.models.fingerprint import fingerprint
from gisting.models.patch import require_patched
from gisting.tokens import GistTokenizer
from gisting.train.batches import step_batches
from gisting.train.methods import Method, checkpointing_what_learns, prepare
from gisting.train.objective import ObjectiveTrainer
from gisting.train.repeat import RepeatableDraws, checkpoint_to_resume, without_parallel_tokenizers

__all__ = ["internalize"]

_METHODS = ("full", "lora")
# The files of a stage, and its weights, which are kept until the next one is finished.
_RESULT, _MODEL = "result.json", "model"
# What accelerate leaves on a model that it has prepared.
_WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")
# What of the arguments decides the weights.
_DECISIVE = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "train_sampling_strategy"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "dataloader_drop_last"),
)


def internalize(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    template: str,
    records: Sequence[Record],
    arguments: TrainingArguments,
    *,
    schedule: Schedule = Schedule.linear(),  # noqa: B008
    compressor: TemplateCompressor = NoCompression(),  # noqa: B008
    max_examples: int = 0,
    pool: ExamplePool | None = None,
    layout: PromptLayout = PromptLayout(),  # noqa: B008
    eval_records: Sequence[Record] | None = None,
    metrics: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] | None = None,
    max_new_tokens: int = 128,
    method: str | Method = "full",
    max_length: int = 512,
    max_target_length: int = 256,
    tail: str = "none",
    num_gist_tokens: int = 1,
    num_gist_stages: int = 1,
    control: str | None = None,
    control_share: float | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_stage: Callable[[StageResult], Any] | None = None,
) -> Internalized:
    """Train a patched model through stages in which the prompt shrinks to nothing, and save it with its tokenizer.

    Args:
        model: a patched model; trained in place.
        tokenizer: the tokenizer it was patched for; its template lays out query and answer, the same in all stages.
        template: the text that every request would begin with.
        records: queries (``input``) and answers (``output``); their instructions are ignored.
        arguments: of stock ``Trainer``, for all stages together: ``max_steps``, or the steps that ``num_train_epochs``
            are in one stage, are split over them as evenly as whole numbers allow. Learning rate schedule and warm-up
            are those of each stage; of a warm-up that is a share of the steps, whole steps are taken, rounded down. The
            results go to ``output_dir``.
        schedule: the kept share of the template in each stage.
        compressor: what shortens the template to a share; asked once a stage, before it is trained.
        max_examples: examples in a full prompt; those of a stage fall with its share.
        pool: where examples come from; None for ``records``.
        layout: how template and examples become one prompt.
        eval_records: queries that are answered after each stage, bare and with the stage's own prompt, whose examples
            are found by the query alone, as in use.
        metrics: how answers are scored, by name: functions of predictions and references; None for exact match.
        max_new_tokens: length of such an answer.
        method: what learns, ``"full"`` or ``"lora"`` (:mod:`gisting.train.methods`), of which the adapter alone is
            saved.
        max_length: ids of prompt, query and answer at most; of an encoder-decoder without the answer. Examples are
            dropped until a request fits; template and query are never cut.
        max_target_length: ids of the answer of an encoder-decoder at most.
        tail: ``"none"``: in the end there is nothing but the query; ``"gist"``: the last stages read the whole template
            (without examples) through k gist tokens.
        num_gist_tokens: k.
        num_gist_stages: how many stages, counted from the last, read a gist.
        control: in place of the schedule, one stage of all epochs: ``"bare"``, ``"full"``, ``"full-run-bare"`` or
            ``"compressed"`` (:mod:`gisting.internalize.plan`).
        control_share: share of the template of ``"compressed"``.
        resume: go on where a killed run stopped, between stages or within one; ``model`` is the one it began with. It
            ends with the weights of an uninterrupted run.
        callbacks: for ``Trainer``, the same in all stages; with any, its own printing of logs is left out.
        on_stage: called with each stage's result, of finished ones too.

    Returns:
        What it came to, stage by stage; the same as is in the output directory.

    Raises:
        GistError: an argument is out of range, the output directory holds another run's results, or there is nothing to
            resume from.
        RecordError: a record has no query, or does not fit without examples.
        OSError: something cannot be written.
    """
    require_patched(model, tokenizer)
    way = Method(method) if isinstance(method, str) else method
    rows = [to_record(record) for record in records]
    asked = None if eval_records is None else [to_record(record) for record in eval_records]
    _check(template, rows, asked, way, arguments)
    plan = make_plan(
        schedule,
        max_examples,
        tail=tail,
        num_gist_tokens=num_gist_tokens,
        num_gist_stages=num_gist_stages,
        control=control,
        control_share=control_share,
    )
    if control == "compressed" and isinstance(compressor, NoCompression):
        raise GistError(
            "control 'compressed' with a compressor that leaves the template whole is control 'full'; give rewrites or "
            "another compressor"
        )
    metrics = {"exact_match": exact_match} if metrics is None else dict(metrics)
    steps = split_steps(num_steps(arguments, len(rows)), len(plan.stages))
    for count in steps:
        warmup_of(arguments, count)  # refuses before anything is done
    settings = {
        "model": fingerprint(model),
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_template": tokenizer.template.name,
        "template_sha256": template_hash(template),
        "schedule": None if control else list(schedule.shares),
        "compressor": compressor.name,
        "max_examples": max_examples,
        "pool": None if pool is None else [records_hash(pool.records), pool.near_duplicate, pool.min_answer_words],
        "layout": asdict(layout),
        "tail": tail,
        "num_gist_tokens": num_gist_tokens if tail == "gist" else None,
        "stages": [asdict(stage) for stage in plan.stages],
        "steps": list(steps),
        "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps,
        "control": control,
        "max_length": max_length,
        "max_target_length": max_target_length if tokenizer.is_encoder_decoder else None,
        "method": asdict(way),
        "records": records_hash(rows),
        "eval_records": None if asked is None else records_hash(asked),
        "metrics": sorted(metrics),
        "max_new_tokens": max_new_tokens,
        "arguments": {name: _plain(getattr(arguments, name)) for name in _DECISIVE if hasattr(arguments, name)},
    }
    output = Path(str(arguments.output_dir))
    is_adapter = way.name != "full" or adapters.adapter_of(model) is not None
    check_directory(output, settings, resume, is_adapter=is_adapter)
    if (output / RESULT_NAME).exists():
        done = load_internalized(output)
        restore_model(model, output)
        for result in done.stages if on_stage is not None else ():
            on_stage(result)  # pyright: ignore[reportOptionalCall]
        return done
    if pool is None and not resume and any(stage.num_examples for stage in plan.stages):
        pool = ExamplePool(rows)
    run = _Run(
        model=model,
        tokenizer=tokenizer,
        template=template,
        records=rows,
        eval_records=asked,
        arguments=arguments,
        plan=plan,
        steps=steps,
        compressor=compressor,
        pool=pool,
        layout=layout,
        metrics=metrics,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        max_target_length=max_target_length,
        callbacks=tuple(callbacks),
        output=output,
    )
    numbers = range(1, len(plan.stages) + 1)
    if not resume:
        for number in numbers:
            run.build(number)
        write_json(output / SETTINGS_NAME, settings)
    results = []
    last_trained = 0  # which stage's weights are in memory
    for number in numbers:
        result = _read_result(run.directory(number))
        if result is None:
            if last_trained != number - 1:
                restore_model(model, run.directory(number - 1) / _MODEL)
            set_seed(arguments.seed)  # as Trainer does: a fresh adapter is drawn, and Trainer is not made yet
            prepare(model, way, num_gist_tokens)
            result = run.stage(number)
            last_trained = number
            shutil.rmtree(run.directory(number - 1) / _MODEL, ignore_errors=True)
        results.append(result)
        if on_stage is not None:
            on_stage(result)
    if last_trained != len(plan.stages):
        restore_model(model, run.directory(len(plan.stages)) / _MODEL)
    count = prepare(model, way, num_gist_tokens)
    save_model(model, tokenizer, output)
    done = Internalized(
        tuple(results),
        plan.condition,
        settings["template_sha256"],
        settings,
        count.trainable,
        count.total,
        sum(result.seconds for result in results),
    )
    done.save(output)
    for number in numbers:
        shutil.rmtree(run.directory(number) / _MODEL, ignore_errors=True)
    return done


@dataclass(frozen=True)
class _Run:
    """What all stages have in common."""

    model: Any
    tokenizer: GistTokenizer
    template: str
    records: list[Record]
    eval_records: list[Record] | None
    arguments: TrainingArguments
    plan: Plan
    steps: tuple[int, ...]
    compressor: TemplateCompressor
    pool: ExamplePool | None
    layout: PromptLayout
    metrics: dict[str, Callable[[Sequence[str], Sequence[str]], float]]
    max_new_tokens: int
    max_length: int
    max_target_length: int
    callbacks: tuple[TrainerCallback, ...]
    output: Path

    def directory(self, number: int) -> Path:
        return self.output / f"stage-{number}"

    def build(self, number: int) -> None:
        """Make a stage's data."""
        stage, directory = self.plan.stages[number - 1], self.directory(number)
        text = compress_template(self.compressor, self.template, stage.share)
        training = self._requests(stage, text, self.records, self.records)
        about = {
            "number": number,
            "condition": stage.condition,
            "share": stage.share,
            "realised_share": realised_share(self.tokenizer, self.template, text),
            "num_examples": stage.num_examples,
            "mean_examples": _mean(training.num_examples),
            "num_gist_tokens": stage.num_gist_tokens,
            "prompt_tokens": _mean(training.prompt_tokens),
            "query_tokens": _mean(training.query_tokens),
            "num_records": len(training.records),
            "template": text,
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_records(directory / DATA_NAME, training.records)
        if self.eval_records is not None:
            # Nobody who asks knows the answer, so no example is chosen by it.
            unanswered = [replace(record, output="") for record in self.eval_records]
            write_records(directory / EVAL_NAME, self._requests(stage, text, self.eval_records, unanswered).records)
        write_json(directory / STAGE_NAME, about)

    def stage(self, number: int) -> StageResult:
        """Train and evaluate; what a killed run has done of it is not done again."""
        start = time.perf_counter()
        stage, directory = self.plan.stages[number - 1], self.directory(number)
        if (directory / _MODEL).exists():
            restore_model(self.model, directory / _MODEL)
        else:
            loss = self._train(number, stage, read_records(directory / DATA_NAME))
            save_model(self.model, self.tokenizer, directory / _MODEL, {"train_loss": loss})
        about = {**_read_json(directory / STAGE_NAME), **_read_json(directory / _MODEL / TRAINING_NAME)}
        asking = read_records(directory / EVAL_NAME)
        result = StageResult(
            **{name: value for name, value in about.items() if name != "template"},
            metrics={} if asking is None else self._evaluate(stage, asking, directory),
            seconds=time.perf_counter() - start,
        )
        write_json(directory / _RESULT, asdict(result))
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return result

    def _requests(self, stage: Stage, text: str, records: list[Record], known: list[Record]) -> Requests:
        """The requests of records, with examples for what is known of each."""
        examples: Sequence[Sequence[Record]] = [[] for _ in records]
        if stage.num_examples and self.pool is not None:
            examples = self.pool.retrieve_many(known, stage.num_examples)
        return lay_out(
            self.tokenizer,
            records,
            text,
            examples,
            self.layout,
            max_length=self.max_length,
            max_target_length=self.max_target_length,
            num_gist_tokens=stage.num_gist_tokens,
        )

    def _train(self, number: int, stage: Stage, records: Any) -> float:
        """Train a stage, from its last checkpoint where there is one; the loss as Trainer gives it."""
        if stage.num_gist_tokens is None:
            collator = PlainCollator(self.tokenizer, self.max_length, max_target_length=self.max_target_length)
        else:
            k = stage.num_gist_tokens
            collator = GistCollator(
                self.tokenizer, k, max_length=self.max_length, max_target_length=self.max_target_length
            )
            collator.encode_ahead(records)
            self.model.config.gist = {**self.model.config.gist, "num_gist_tokens": [k, k]}
        arguments = self._arguments(number)
        batches = step_batches(collator, self.tokenizer, arguments)
        trainer = ObjectiveTrainer(
            model=self.model,
            args=arguments,
            train_dataset=records,
            data_collator=RepeatableDraws(batches, arguments.seed),
            callbacks=[*self.callbacks, _NoLastCheckpoint()],
        )
        if self.callbacks:
            trainer.remove_callback(PrinterCallback)  # With callbacks of the caller's own, they report progress.
        try:
            checkpoint = checkpoint_to_resume(self.directory(number), True)
        except GistError:  # the stage begins, or was killed before its first whole checkpoint
            checkpoint = None
        quiet = without_parallel_tokenizers(arguments.dataloader_num_workers > 0)
        with checkpointing_what_learns(self.model), _own_forward(self.model), quiet:
            return trainer.train(resume_from_checkpoint=checkpoint).training_loss

    def _arguments(self, number: int) -> TrainingArguments:
        """Those of one stage: its part of the steps, a seed and a directory of its own."""
        own = copy.copy(self.arguments)
        own.output_dir = str(self.directory(number))
        own.max_steps = self.steps[number - 1]
        own.warmup_steps = warmup_of(self.arguments, own.max_steps)
        own.seed += number
        own.data_seed = None if own.data_seed is None else own.data_seed + number
        return own

    def _evaluate(self, stage: Stage, records: list[Record], directory: Path) -> dict[str, dict[str, float]]:
        """Score the answers to the bare query and to the stage's own prompt, and write them down."""
        results = evaluate(
            self.model,
            self.tokenizer,
            records,
            stage.num_gist_tokens or 1,
            conditions=list(dict.fromkeys(("no-prompt", stage.condition))),
            max_new_tokens=self.max_new_tokens,
            batch_size=self.arguments.per_device_eval_batch_size,
            with_rouge=False,
        )
        references = [record.output for record in records]
        lines: list[dict[str, Any]] = [{"input": one.input, "output": one.output} for one in records]
        for result in results:
            for line, prediction in zip(lines, result.predictions, strict=True):
                line[result.condition] = prediction
        write_lines(directory / ANSWERS_NAME, lines)
        return {
            result.condition: {
                name: float(score(result.predictions, references)) for name, score in self.metrics.items()
            }
            for result in results
        }


class _NoLastCheckpoint(TrainerCallback):
    """Behind the last step the weights themselves are saved. Resumed from a checkpoint of it, Trainer would train one
    step more before it saw that there was none left.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_save = False

    on_epoch_end = on_step_end


def _check(
    template: str,
    records: list[Record],
    eval_records: list[Record] | None,
    method: Method,
    arguments: TrainingArguments,
) -> None:
    if not template.strip():
        raise GistError("template is empty; there is nothing to internalise, give its text")
    if not records:
        raise GistError("records is empty; give at least one")
    if eval_records is not None and not eval_records:
        raise GistError("eval_records is empty; give at least one, or None")
    if method.name not in _METHODS:
        raise GistError(
            f"method must be one of {', '.join(_METHODS)}, got {method.name!r}, which changes nothing where there "
            "are no gist tokens"
        )
    if arguments.world_size > 1 or arguments.fsdp or arguments.deepspeed:
        raise GistError("stages are trained by one process; leave out torchrun, accelerate launch, fsdp and deepspeed")
    if str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no":
        raise GistError("eval_strategy must be 'no': eval_records are answered after each stage")


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """accelerate prepares a model once and wraps its ``forward`` for mixed precision; here each stage begins and ends
    with the model's own, as a stage in a process of its own would.
    """
    attributes = vars(model)
    before = {name: attributes[name] for name in _WRAPPED if name in attributes}
    try:
        yield
    finally:
        for name in _WRAPPED:
            attributes.pop(name, None)
        attributes.update(before)


def _read_result(directory: Path) -> StageResult | None:
    return StageResult(**_read_json(directory / _RESULT)) if (directory / _RESULT).exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(getattr(value, "value", value))
