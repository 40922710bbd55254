"""Train one model through all stages of prompt internalisation, each on its own data, with stock ``Trainer``.

Place in the flow: plan, shortener, examples and requests -> **stages** -> a checkpoint that answers the bare query. The
method is PromptIntern's (arXiv 2407.02211); its public code contains neither schedule nor stage loop, which SKIntern
(arXiv 2409.13183) describes in full. The output directory then contains::

    settings.json          the settings of the run; a resumed run must have the same
    stage-1/stage.json     requested and realised shares, counts, tokens, the prompt's text
    stage-1/data.jsonl     the training records, for people to read (eval.jsonl: the evaluation requests)
    stage-1/answers.jsonl  the answers to them
    stage-1/result.json    the scores; present when the stage is finished
    internalized.json      all results, next to the finished checkpoint
    study/                 for methods without stages, what was written and sampled (``teaching``)

The data of all stages are made before the first one is trained, so that a request that does not fit, or a missing
rewrite, is found before hours of training, and so that a model that shortens its own prompt does it with its original
weights. Each stage has its own learning rate schedule, optimiser and seed (for the order of the data), because its data
differ from the previous stage's. With one schedule for all, the last stage, the bare query, would get what is left of a
decayed rate.

Several processes (``torchrun``) train each stage together and share its evaluation requests. The first one makes the
data and writes everything; the directory must be one that all of them can read.
"""

# Over 600 lines because all methods share the settings, the directory and how a run is resumed.

from __future__ import annotations

import copy
import itertools
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from gisting._deprecated import renamed_arguments
from gisting.data.collate import GistCollator
from gisting.data.plain import PlainCollator
from gisting.data.records import Record, to_record
from gisting.distillation.distill import check_k
from gisting.errors import GistError, RecordError
from gisting.eval.conditions import evaluate
from gisting.eval.metrics import exact_match
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
from gisting.internalize.plan import Plan, Stage, make_plan, num_steps, split_steps, warmup_of
from gisting.internalize.requests import PromptFormat, Requests, make_requests
from gisting.internalize.result import (
    RESULT_NAME,
    Internalized,
    StageResult,
    load_internalized,
    prompt_hash,
    write_json,
)
from gisting.internalize.schedule import Schedule
from gisting.internalize.settings import WEIGHTS, StageSettings
from gisting.internalize.shorteners import NoShortening, Shortener, realised_share, shorten
from gisting.internalize.teaching import TaughtTrainer, Teaching, check_teaching, num_questions_of
from gisting.models import adapters
from gisting.models.fingerprint import fingerprint
from gisting.models.state import require_patched
from gisting.settings import keywords_for, takes_keywords_of
from gisting.tokens import GistTokenizer
from gisting.train.arguments import BY_LENGTH
from gisting.train.batches import step_batches
from gisting.train.methods import Method, checkpointing_what_learns, prepare
from gisting.train.objective import ObjectiveTrainer
from gisting.train.repeat import RepeatableDraws, checkpoint_to_resume, without_parallel_tokenizers

__all__ = ["internalize"]

# A stage's result and its weights, which are kept until the next stage is finished.
_RESULT, _MODEL = "result.json", "model"
# Attributes that accelerate sets on a model.
_WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")
# The training arguments that determine the weights.
_DECISIVE = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "train_sampling_strategy"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha", "dataloader_drop_last"),
)


@renamed_arguments(template="prompt", compressor="shortener", layout="prompt_format")
@takes_keywords_of(StageSettings)
def internalize(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prompt: str,
    records: Sequence[Record],
    arguments: TrainingArguments,
    *,
    schedule: Schedule = Schedule.linear(),  # noqa: B008
    shortener: Shortener = NoShortening(),  # noqa: B008
    pool: ExamplePool | None = None,
    edits: Sequence[Record] | None = None,
    prompt_format: PromptFormat = PromptFormat(),  # noqa: B008
    eval_records: Sequence[Record] | None = None,
    metrics: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] | None = None,
    weights: str | Method = "full",
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_stage: Callable[[StageResult], Any] | None = None,
    **settings: Any,
) -> Internalized:
    """Train a patched model through stages in which the prompt shrinks to nothing, and save it with its tokenizer.

    Args:
        model: a patched model; trained in place.
        tokenizer: the tokenizer it was patched for; its template, the same in all stages, formats query and answer.
        prompt: the text with which every request would begin.
        records: queries (``input``) and answers (``output``); their instructions are ignored. On-policy and self-study
            read the queries alone, and need none if the model writes questions.
        arguments: arguments of stock ``Trainer`` for all stages together: ``max_steps``, or the steps of
            ``num_train_epochs`` in one stage, are split over the stages as evenly as whole numbers allow. The learning
            rate schedule and the warm-up apply to each stage; a warm-up that is a share of the steps is rounded down to
            whole steps. The results are written to ``output_dir``.
        schedule: the kept share of the prompt in each stage.
        shortener: shortens the prompt to a share of it; called once for each stage, before any training.
        pool: the pool of examples; None for ``records``.
        edits: records for the stages that read a gist, in addition to ``records``: each with another version of the
            prompt as its instruction, and the answer that this version asks for. The gist then carries what differs
            between versions, so that a new version needs no training. None for one version.
        prompt_format: how prompt and examples become one text.
        eval_records: queries that are answered after each stage, bare and as the stage's own requests. Examples for
            them are chosen by the query alone, as in use.
        metrics: scores of answers by name: functions of predictions and references; None for exact match.
        weights: what is trained, ``"full"`` or ``"lora"`` (:mod:`gisting.train.methods`); for the latter, only the
            adapter is saved.
        resume: continue a killed run where it stopped, between stages or within one; ``model`` must be the model that
            it started with. The final weights equal those of an uninterrupted run.
        callbacks: callbacks for ``Trainer``, the same in all stages; with any, its own printing of logs is disabled.
        on_stage: called with the result of each stage, including those that were finished before.
        **settings: settings of :class:`gisting.internalize.settings.StageSettings`: ``method``, ``"stages"`` or one of
            the methods of :mod:`gisting.internalize.teaching`, ``"on-policy"`` and ``"self-study"``, which train the
            bare query in a single stage, with ``num_questions`` that the model writes and the ``temperature`` of the
            answers; ``max_examples``, the number of
            examples in a full prompt, which falls with the share; ``tail`` with ``num_gist_tokens`` and
            ``num_gist_stages``, for stages that read the whole prompt through a gist; ``control`` with
            ``control_share``, for a control instead of the schedule (:mod:`gisting.internalize.plan`); ``max_length``
            and ``max_target_length``, to which requests are fitted by dropping examples; ``max_new_tokens`` of answers.

    Returns:
        The results, stage by stage, as they are in the output directory.

    Raises:
        GistError: an argument is out of range, a gist would be as long as the prompt, edits are given without a gist to
            read them, the output directory holds another run, or there is nothing to resume.
        RecordError: a record has no query, or does not fit without examples.
        OSError: a file cannot be written.
    """
    require_patched(model, tokenizer)
    if isinstance(method := settings.get("method"), Method) or method in WEIGHTS:
        warnings.warn(
            "internalize: method as what is trained will be removed in the next release; use weights",
            DeprecationWarning,
            stacklevel=3,
        )
        weights = settings.pop("method")
    chosen = StageSettings(**settings)
    way = Method(weights) if isinstance(weights, str) else weights
    rows = _queries(records)
    asked = None if eval_records is None else _queries(eval_records)
    num_questions = num_questions_of(chosen, len(rows))
    versions = _versions(edits, chosen)
    _check(prompt, rows, asked, way, arguments, num_questions)
    check_teaching(
        chosen, arguments, has_stages=schedule != Schedule.linear() or not isinstance(shortener, NoShortening)
    )
    if chosen.method == "stages":
        plan = make_plan(schedule, **keywords_for(make_plan, chosen))
    else:
        plan = make_plan(schedule, control="bare")
    if any(stage.num_gist_tokens for stage in plan.stages):
        check_k(chosen.num_gist_tokens, tokenizer.encode_prompts([prompt], 1)[0].num_prompt_tokens)
    if chosen.control == "shortened" and isinstance(shortener, NoShortening):
        raise GistError(
            "control 'shortened' with a shortener that keeps the whole prompt is control 'full'; use rewrites or "
            "another shortener"
        )
    metrics = {"exact_match": exact_match} if metrics is None else dict(metrics)
    steps = split_steps(num_steps(arguments, len(rows) + num_questions), len(plan.stages))
    for count in steps:
        warmup_of(arguments, count)  # raises before any work is done
    about = {
        "model": fingerprint(model),
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_template": tokenizer.template.name,
        "prompt_sha256": prompt_hash(prompt),
        "method": chosen.method,
        "num_questions": None if chosen.method == "stages" else num_questions,
        "temperature": None if chosen.method == "stages" else chosen.temperature,
        "schedule": None if chosen.control or chosen.method != "stages" else list(schedule.shares),
        "shortener": shortener.name,
        "max_examples": chosen.max_examples,
        "pool": None if pool is None else [records_hash(pool.records), pool.near_duplicate, pool.min_answer_words],
        "prompt_format": asdict(prompt_format),
        "tail": chosen.tail,
        "num_gist_tokens": chosen.num_gist_tokens if chosen.tail == "gist" else None,
        "stages": [asdict(stage) for stage in plan.stages],
        "steps": list(steps),
        "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "control": chosen.control,
        "max_length": chosen.max_length,
        "max_target_length": chosen.max_target_length if tokenizer.is_encoder_decoder else None,
        "weights": asdict(way),
        "records": records_hash(rows),
        "edits": None if edits is None else records_hash(versions, with_instructions=True),
        "eval_records": None if asked is None else records_hash(asked),
        "metrics": sorted(metrics),
        "max_new_tokens": chosen.max_new_tokens,
        "arguments": {name: _plain(getattr(arguments, name)) for name in _DECISIVE if hasattr(arguments, name)},
    }
    output = Path(str(arguments.output_dir))
    is_adapter = way.name != "full" or adapters.adapter_of(model) is not None
    if arguments.process_index == 0 or resume:  # to the others, files that the first one makes would look like a run
        check_directory(output, about, resume, is_adapter=is_adapter)
    if (output / RESULT_NAME).exists():
        done = load_internalized(output)
        restore_model(model, output)
        for result in done.stages if on_stage is not None else ():
            on_stage(result)  # pyright: ignore[reportOptionalCall]
        return done
    if chosen.method != "stages":
        model.to(arguments.device)  # pyright: ignore[reportArgumentType]  # as Trainer does, which comes after sampling
    if pool is None and not resume and any(stage.num_examples for stage in plan.stages):
        pool = ExamplePool(rows)
    run = _Run(
        model=model,
        tokenizer=tokenizer,
        prompt=prompt,
        records=rows,
        eval_records=asked,
        arguments=arguments,
        plan=plan,
        steps=steps,
        shortener=shortener,
        pool=pool,
        prompt_format=prompt_format,
        metrics=metrics,
        settings=chosen,
        callbacks=tuple(callbacks),
        output=output,
        edits=versions,
        teaching=None
        if chosen.method == "stages"
        else Teaching(
            model=model,
            tokenizer=tokenizer,
            prompt=prompt,
            method=chosen.method,
            num_questions=num_questions,
            queries=[row.input for row in rows],
            max_new_tokens=chosen.max_new_tokens,
            temperature=chosen.temperature,
            seed=arguments.seed,
            directory=output,
            has_new_adapter=way.name == "lora" and adapters.adapter_of(model) is None,
        ),
    )
    numbers = range(1, len(plan.stages) + 1)
    if run.is_first and not resume:
        for number in numbers:
            run.build(number)
        write_json(output / SETTINGS_NAME, about)
    run.wait()
    results = []
    last_trained = 0  # the stage whose weights are in memory
    for number in numbers:
        result = _read_result(run.directory(number))
        if result is None:
            if last_trained != number - 1:
                restore_model(model, run.directory(number - 1) / _MODEL)
            set_seed(arguments.seed)  # Trainer does this only later, after a new adapter is initialised
            prepare(model, way, chosen.num_gist_tokens)
            result = run.stage(number)
            last_trained = number
            if run.is_first:
                shutil.rmtree(run.directory(number - 1) / _MODEL, ignore_errors=True)
        results.append(result)
        if on_stage is not None:
            on_stage(result)
    if last_trained != len(plan.stages):
        restore_model(model, run.directory(len(plan.stages)) / _MODEL)
    count = prepare(model, way, chosen.num_gist_tokens)
    if run.is_first:
        save_model(model, tokenizer, output)
    done = Internalized(
        tuple(results),
        plan.condition,
        about["prompt_sha256"],
        about,
        count.trainable,
        count.total,
        sum(result.seconds for result in results),
    )
    run.wait()  # another process may still be reading the weights of a stage
    if run.is_first:
        done.save(output)
        for number in numbers:
            shutil.rmtree(run.directory(number) / _MODEL, ignore_errors=True)
    return done


@dataclass(frozen=True)
class _Run:
    """The parts of a run that all stages share."""

    model: Any
    tokenizer: GistTokenizer
    prompt: str
    records: list[Record]
    eval_records: list[Record] | None
    arguments: TrainingArguments
    plan: Plan
    steps: tuple[int, ...]
    shortener: Shortener
    pool: ExamplePool | None
    prompt_format: PromptFormat
    metrics: dict[str, Callable[[Sequence[str], Sequence[str]], float]]
    settings: StageSettings
    callbacks: tuple[TrainerCallback, ...]
    output: Path
    edits: list[Record]
    teaching: Teaching | None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.arguments.process_index == 0

    def wait(self) -> None:
        """Wait until all processes are here, so that what the first one has written is there."""
        if self.arguments.world_size > 1:
            torch.distributed.barrier()

    def directory(self, number: int) -> Path:
        return self.output / f"stage-{number}"

    def build(self, number: int) -> None:
        """Write the data of a stage."""
        stage, directory = self.plan.stages[number - 1], self.directory(number)
        text = shorten(self.shortener, self.prompt, stage.share)
        records = self.records if self.teaching is None else self.teaching.prepare()
        training = self._requests(stage, text, records, records)
        if stage.num_gist_tokens is not None:
            for version, own in itertools.groupby(self.edits, key=lambda record: record.instruction):
                own = [*own]
                more = vars(self._requests(stage, version, own, own))
                training = Requests(**{name: rows + more[name] for name, rows in vars(training).items()})
        about = {
            "number": number,
            "condition": stage.condition,
            "share": stage.share,
            "realised_share": realised_share(self.tokenizer, self.prompt, text),
            "num_examples": stage.num_examples,
            "mean_examples": _mean(training.num_examples),
            "num_gist_tokens": stage.num_gist_tokens,
            "prompt_tokens": _mean(training.prompt_tokens),
            "query_tokens": _mean(training.query_tokens),
            "num_records": len(training.records),
            "prompt": text,
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_records(directory / DATA_NAME, training.records)
        if self.eval_records is not None:
            # In use the answer is unknown, so examples must not be chosen by it.
            unanswered = [replace(record, output="") for record in self.eval_records]
            write_records(directory / EVAL_NAME, self._requests(stage, text, self.eval_records, unanswered).records)
        write_json(directory / STAGE_NAME, about)

    def stage(self, number: int) -> StageResult:
        """Train and evaluate; steps that a killed run has finished are not repeated."""
        stage, directory = self.plan.stages[number - 1], self.directory(number)
        if (directory / _MODEL).exists():
            restore_model(self.model, directory / _MODEL)
        else:
            start = time.perf_counter()
            loss = self._train(number, stage, read_records(directory / DATA_NAME))
            if self.is_first:
                training = {"train_loss": loss, "train_seconds": time.perf_counter() - start}
                save_model(self.model, self.tokenizer, directory / _MODEL, training)
            self.wait()
        about = {**_read_json(directory / STAGE_NAME), **_read_json(directory / _MODEL / TRAINING_NAME)}
        train_seconds = about.pop("train_seconds", 0.0)  # earlier versions did not keep them
        asking = read_records(directory / EVAL_NAME)
        for text in ("prompt", "template"):  # the latter in runs of format 1
            about.pop(text, None)
        start = time.perf_counter()
        metrics = {} if asking is None else self._evaluate(stage, asking, directory)
        result = StageResult(**about, metrics=metrics, seconds=train_seconds + time.perf_counter() - start)
        if self.is_first:
            write_json(directory / _RESULT, asdict(result))
            for checkpoint in directory.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        self.wait()
        return result

    def _requests(self, stage: Stage, text: str, records: list[Record], known: list[Record]) -> Requests:
        """Make the requests of records; examples are chosen for ``known``, the same records without unknown answers."""
        examples: Sequence[Sequence[Record]] = [[] for _ in records]
        if stage.num_examples and self.pool is not None:
            examples = self.pool.retrieve_many(known, stage.num_examples)
        return make_requests(
            self.tokenizer,
            records,
            text,
            examples,
            self.prompt_format,
            max_length=self.settings.max_length,
            max_target_length=self.settings.max_target_length,
            num_gist_tokens=stage.num_gist_tokens,
        )

    def _train(self, number: int, stage: Stage, records: Any) -> float:
        """Train a stage, from its last checkpoint if there is one, and return Trainer's loss."""
        arguments = self._arguments(number)
        if self.teaching is not None:
            with self.teaching.lessons([record.input for record in records]) as lessons:
                return self._fit(
                    number,
                    TaughtTrainer(
                        model=self.model,
                        args=arguments,
                        train_dataset=range(len(records)),
                        callbacks=[*self.callbacks, _NoLastCheckpoint()],
                        tokenizer=self.tokenizer,
                        lessons=lessons,
                    ),
                )
        lengths = {name: getattr(self.settings, name) for name in ("max_length", "max_target_length")}
        if stage.num_gist_tokens is None:
            collator = PlainCollator(self.tokenizer, **lengths)
        else:
            k = stage.num_gist_tokens
            collator = GistCollator(self.tokenizer, k, **lengths)
            collator.encode_ahead(records)
            self.model.config.gist = {**self.model.config.gist, "num_gist_tokens": [k, k]}
        batches = step_batches(collator, self.tokenizer, arguments)
        trainer = ObjectiveTrainer(
            model=self.model,
            args=arguments,
            train_dataset=records,
            data_collator=RepeatableDraws(batches, arguments.seed),
            callbacks=[*self.callbacks, _NoLastCheckpoint()],
        )
        return self._fit(number, trainer)

    def _fit(self, number: int, trainer: ObjectiveTrainer) -> float:
        """Train with a stage's ``trainer``, from its last checkpoint if there is one, and return Trainer's loss."""
        if self.callbacks:
            trainer.remove_callback(PrinterCallback)  # With callbacks of the caller's own, they report progress.
        try:
            checkpoint = checkpoint_to_resume(self.directory(number), True)
        except GistError:  # the stage has not started, or was killed before its first complete checkpoint
            checkpoint = None
        quiet = without_parallel_tokenizers(trainer.args.dataloader_num_workers > 0)
        with checkpointing_what_learns(self.model), _own_forward(self.model), quiet:
            return trainer.train(resume_from_checkpoint=checkpoint).training_loss

    def _arguments(self, number: int) -> TrainingArguments:
        """Make the arguments of one stage, with its part of the steps and its own seed and directory."""
        own = copy.copy(self.arguments)
        own.output_dir = str(self.directory(number))
        own.max_steps = self.steps[number - 1]
        own.warmup_steps = warmup_of(self.arguments, own.max_steps)
        own.seed += number
        own.data_seed = None if own.data_seed is None else own.data_seed + number
        if own.ddp_find_unused_parameters is None and adapters.adapter_of(self.model) is not None:
            own.ddp_find_unused_parameters = True  # the adapter's gist token, in a stage that reads none
        return own

    def _evaluate(self, stage: Stage, records: list[Record], directory: Path) -> dict[str, dict[str, float]]:
        """Score the answers to the bare query and to the stage's own requests, and write them to a file.

        Each process answers its share of the requests.
        """
        conditions = list(dict.fromkeys(("no-prompt", stage.condition)))
        first, step = self.arguments.process_index, self.arguments.world_size
        answers: dict[str, list[str]] = {condition: [] for condition in conditions}
        if own := records[first::step]:
            results = evaluate(
                self.model,
                self.tokenizer,
                own,
                stage.num_gist_tokens,
                conditions=conditions,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.arguments.per_device_eval_batch_size,
                with_rouge=False,
            )
            answers = {result.condition: result.predictions for result in results}
        if step > 1:
            shares: list[Any] = [None] * step
            torch.distributed.all_gather_object(shares, answers)
            answers = {
                condition: [shares[row % step][condition][row // step] for row in range(len(records))]
                for condition in conditions
            }
        lines = [
            {"input": one.input, "output": one.output, **{name: found[row] for name, found in answers.items()}}
            for row, one in enumerate(records)
        ]
        if self.is_first:
            write_lines(directory / ANSWERS_NAME, lines)
        references = [record.output for record in records]
        return {
            condition: {name: float(score(found, references)) for name, score in self.metrics.items()}
            for condition, found in answers.items()
        }


class _NoLastCheckpoint(TrainerCallback):
    """Save no checkpoint after the last step, because the weights themselves are saved then.

    Resumed from such a checkpoint, Trainer would train one more step before it noticed that none was left.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_save = False

    on_epoch_end = on_step_end


def _queries(records: Iterable[Record | Mapping[str, Any]]) -> list[Record]:
    rows = [to_record(record, f"record {number}") for number, record in enumerate(records, start=1)]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.input, str):
            raise RecordError(
                f"record {number} is a conversation, but internalisation takes queries and their answers; give "
                "conversations of one question"
            )
    return rows


def _versions(edits: Sequence[Record] | None, settings: StageSettings) -> list[Record]:
    """The records with an edited prompt, those of one version together."""
    if edits is None:
        return []
    if settings.tail != "gist":
        raise GistError(
            f"edits are read by the stages of tail 'gist', got tail {settings.tail!r}; choose it: --tail gist"
        )
    rows = _queries(edits)
    if not rows:
        raise GistError("edits is empty; pass at least one record with an edited prompt, or None")
    if empty := [number for number, row in enumerate(rows, start=1) if not row.instruction.strip()]:
        raise RecordError(f"record {empty[0]} of edits has no instruction; it is the edited prompt")
    return sorted(rows, key=lambda record: record.instruction)


def _check(
    prompt: str,
    records: list[Record],
    eval_records: list[Record] | None,
    weights: Method,
    arguments: TrainingArguments,
    num_questions: int,
) -> None:
    if not prompt.strip():
        raise GistError("prompt is empty, so there is nothing to internalise; pass its text")
    if not records and not num_questions:
        raise GistError("records is empty; pass at least one")
    if eval_records is not None and not eval_records:
        raise GistError("eval_records is empty; pass at least one, or None")
    if weights.name not in WEIGHTS:
        raise GistError(
            f"weights must be one of {', '.join(WEIGHTS)}, got {weights.name!r}, which has no effect without gist "
            "tokens"
        )
    if arguments.fsdp or arguments.deepspeed:
        raise GistError(
            "stages are trained by processes that hold the whole model each (torchrun); run without fsdp and deepspeed"
        )
    if arguments.train_sampling_strategy in BY_LENGTH:
        raise GistError(
            f"train_sampling_strategy must not be {' or '.join(BY_LENGTH)}: stages do not know the lengths of their "
            "records; leave it out"
        )
    if str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no":
        raise GistError("eval_strategy must be 'no', because eval_records are answered after each stage")


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Restore the model's own ``forward``, which accelerate wraps for mixed precision, after a stage.

    Each stage then starts and ends with the model's own ``forward``, as it would in a separate process.
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
