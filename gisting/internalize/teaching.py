"""Teach a prompt by distillation: the model with the prompt in view teaches itself without it, token by token.

Place in the flow: a prompt, queries -> **teaching** -> a checkpoint that answers the bare query. Stages teach what the
answers of the records say, and nothing else; here the teacher is the model as it was before training, which reads the
whole prompt. What is learned is the KL divergence from the teacher at every token of an answer (context distillation,
arXiv 2112.00861). The methods differ in who writes queries and answers:

* *on-policy* (arXiv 2602.12275): the student answers the bare query, so it is corrected where it goes wrong itself. The
  answers of a step are sampled with the weights of that step.
* *self-study* (arXiv 2506.06266): the teacher answers, once, before training.

The queries are the records', or those that the model writes itself about each part of its prompt, or both. The files
are those of :class:`gisting.distillation.directory.Directory`, in ``OUTPUT/study``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainingArguments

from gisting.data.plain import plain_batch, plain_sources
from gisting.data.records import Record
from gisting.distillation.directory import Directory, text_hash
from gisting.distillation.questions import write_questions
from gisting.errors import GistError
from gisting.eval.divergence import Teacher, ask_teacher
from gisting.eval.kl import Likeliest, kl_loss
from gisting.generation.sampling import SampledAnswer, sample_answers, sample_bare_answers
from gisting.internalize.directory import STAGE_NAME, STUDY_NAME
from gisting.internalize.result import write_json
from gisting.internalize.settings import StageSettings
from gisting.models.adapters import without_adapter
from gisting.models.fingerprint import fingerprint
from gisting.tokens import GistTokenizer
from gisting.train.batches import find_targets
from gisting.train.objective import ObjectiveTrainer

__all__ = ["Lesson", "Lessons", "TaughtTrainer", "Teaching", "check_teaching", "num_questions_of"]

# Answers that are sampled, or read by the teacher, together.
_AT_ONCE = 64
_NUM_QUESTIONS = 256
# The teacher's likeliest tokens that are compared one by one; all others count as one outcome.
_TOP_K = 64


@dataclass(frozen=True)
class Lesson:
    """An answer to a bare query, with what the teacher says at its tokens.

    Args:
        answer: the answer.
        teacher: the teacher's distributions that predict its tokens.
    """

    answer: SampledAnswer
    teacher: Likeliest


@dataclass(frozen=True)
class Teaching:
    """How one run teaches its prompt.

    Args:
        model: the model that is trained, patched.
        tokenizer: the tokenizer it was patched for.
        prompt: the prompt.
        method: ``"on-policy"`` or ``"self-study"``.
        num_questions: how many questions the model writes, in addition to the queries of the records; 0 for none.
        queries: the queries of the records.
        max_new_tokens: the largest number of tokens in a sampled answer.
        temperature: for sampling answers.
        seed: decides what is written and sampled.
        directory: the output directory of the run.
        has_new_adapter: whether all that is trained is an adapter that the model does not have yet. The model without
            it is then the on-policy teacher; otherwise that is a copy, which takes as much memory as the model.
    """

    model: Any
    tokenizer: GistTokenizer
    prompt: str
    method: str
    num_questions: int
    queries: Sequence[Any]
    max_new_tokens: int
    temperature: float
    seed: int
    directory: Path
    has_new_adapter: bool

    def prepare(self) -> list[Record]:
        """Write the questions and, in self-study, answer them, with the model as it is before training.

        What a killed run with the same settings has written is not written again.

        Returns:
            The queries of the training; in self-study with their answers, on-policy with empty ones.

        Raises:
            GistError: the directory belongs to other settings, the model wrote too few questions, or prompt, query and
                answer together exceed the model's positions.
        """
        self._folder.claim(
            {
                "model": fingerprint(self.model),
                "tokenizer": self.tokenizer.fingerprint,
                "template": self.tokenizer.template.name,
                "prompt": text_hash(self.prompt),
                "queries": text_hash(*self.queries),
                "num_questions": self.num_questions,
                "max_new_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "seed": self.seed,
            }
        )
        write_json(self.directory / STUDY_NAME / STAGE_NAME, {"prompt": self.prompt})
        asked = [*self.queries, *self._questions()]
        if self.method == "on-policy":
            return [Record("", query, "") for query in asked]
        pairs = [(self.prompt, query) for query in asked]
        answers = self._folder.read_answers(pairs)
        if answers is None:
            answers = sample_answers(self.model, self.tokenizer, pairs, batch_size=_AT_ONCE, **self.sampling(self.seed))
            self._folder.write_answers(answers, 0)
        if self._folder.read_teacher(answers) is None:
            self._folder.write_teacher(self.ask(self.model, answers))
        return [Record("", answer.input, answer.output) for answer in answers]

    @contextmanager
    def lessons(self, queries: Sequence[str]) -> Iterator[Lessons]:
        """Yield what gives the rows of a step their answers. The model must not be trained yet.

        Args:
            queries: the queries that :meth:`prepare` returned.

        Raises:
            GistError: the files of the self-study are missing or damaged.
        """
        if self.method == "self-study":
            answers = self._folder.read_answers([(self.prompt, query) for query in queries])
            teacher = None if answers is None else self._folder.read_teacher(answers)
            if teacher is None:
                raise GistError(f"{self._folder.path} lacks the answers of the self-study; start in another directory")
            yield _SelfStudy(teacher)
        elif self.has_new_adapter:
            yield _OnPolicy(self, queries, lambda: without_adapter(self.model))
        else:
            kept = copy.deepcopy(self.model).requires_grad_(False)
            yield _OnPolicy(self, queries, lambda: nullcontext(kept))

    def ask(self, model: Any, answers: Sequence[SampledAnswer]) -> Teacher:
        """Have ``model`` read ``answers`` with the whole prompt in view."""
        return ask_teacher(model, self.tokenizer, answers, top_k=_TOP_K, batch_size=_AT_ONCE)

    def sampling(self, seed: int) -> dict[str, Any]:
        """Return the settings with which answers are sampled."""
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": seed}

    @property
    def _folder(self) -> Directory:
        return Directory(self.directory / STUDY_NAME)

    def _questions(self) -> list[str]:
        """As many questions as are wanted: those that the model wrote, in turn."""
        if not self.num_questions:
            return []
        written = self._folder.read_questions()
        if written is None:
            written = write_questions(
                self.model, self.tokenizer, self.prompt, self.num_questions, seed=self.seed, batch_size=_AT_ONCE
            )
            self._folder.write_questions(written)
        return [*itertools.islice(itertools.cycle(written), self.num_questions)]


class Lessons(Protocol):
    """Gives the rows of a step their answers."""

    def of(self, rows: Sequence[int], step: int) -> list[Lesson]:
        """Return a lesson for each of the rows that are trained on in a step.

        Args:
            rows: numbers of queries.
            step: the number of the optimiser step, from 0.
        """
        ...


@dataclass(frozen=True)
class _SelfStudy:
    teacher: Teacher

    def of(self, rows: Sequence[int], step: int) -> list[Lesson]:
        return [Lesson(self.teacher.answers[row], self.teacher.likeliest[row]) for row in rows]


@dataclass(frozen=True)
class _OnPolicy:
    teaching: Teaching
    queries: Sequence[str]
    teacher: Callable[[], AbstractContextManager[Any]]

    def of(self, rows: Sequence[int], step: int) -> list[Lesson]:
        own = self.teaching
        # Other answers in every step, and the same ones in a run that was resumed.
        sampling = {**own.sampling(own.seed + step), "batch_size": _AT_ONCE}
        said = sample_bare_answers(own.model, own.tokenizer, [self.queries[row] for row in rows], **sampling)
        with self.teacher() as teacher:
            found = own.ask(teacher, [replace(answer, prompt=own.prompt) for answer in said])
        return [*map(Lesson, found.answers, found.likeliest)]


class TaughtTrainer(ObjectiveTrainer):
    """Stock ``Trainer`` whose rows get their answers, and the teacher's distributions, at the beginning of a step.

    The data set holds numbers of rows; the loss is the mean KL divergence from the teacher over all tokens of the
    answers of an optimiser step, in nats.

    Args:
        *args: as for ``Trainer``.
        tokenizer: the model's tokenizer.
        lessons: gives the rows their answers.
        **kwargs: as for ``Trainer``.
    """

    def __init__(self, *args: Any, tokenizer: GistTokenizer, lessons: Lessons, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=_rows, **kwargs)
        self.gist_tokenizer, self.lessons = tokenizer, lessons

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As ``Trainer.get_batch_samples``, with answers for all rows of the step, which are sampled together."""
        parts = [batch["rows"].tolist() for batch in itertools.islice(epoch_iterator, num_batches)]
        lessons = iter(
            self.lessons.of([row for part in parts for row in part], self.state.global_step) if parts else ()
        )
        batches = [self._batch([next(lessons) for _ in part]) for part in parts]
        return super().get_batch_samples(iter(batches), len(batches), device)

    def compute_loss(self, model: Any, inputs: Any, return_outputs=False, num_items_in_batch: Any = None) -> Any:
        """As ``Trainer.compute_loss``; the logits in ``outputs`` are those of the answers, ``(T, V)``."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        places, number = inputs.pop("target_places"), len(inputs["teacher_tokens"])
        teacher = Likeliest(inputs.pop("teacher_log_probs"), inputs.pop("teacher_tokens"))
        if self._is_encoder_decoder:
            own: Any = self.model
            inputs["decoder_input_ids"] = own.prepare_decoder_input_ids_from_labels(labels)
        logits = self._logits(model, inputs, places, None)
        loss = self._mean(kl_loss(logits, teacher).sum(), number, self._whole_number(num_items_in_batch))
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _batch(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        answers = [lesson.answer for lesson in lessons]
        sources = plain_sources(self.gist_tokenizer, [""] * len(answers), [answer.input for answer in answers])
        batch = plain_batch(self.gist_tokenizer, sources, [answer.token_ids for answer in answers])
        places, _ = find_targets(batch["labels"], is_shifted=not self._is_encoder_decoder)
        return batch | {
            "target_places": places,
            "teacher_log_probs": torch.cat([lesson.teacher.log_probs for lesson in lessons]),
            "teacher_tokens": torch.cat([lesson.teacher.tokens for lesson in lessons]).long(),
        }


def num_questions_of(settings: StageSettings, num_records: int) -> int:
    """Return how many questions the model writes itself.

    Args:
        settings: the settings of the run.
        num_records: the number of records that it is given.
    """
    if settings.num_questions is not None or settings.method == "stages":
        return settings.num_questions or 0
    return 0 if settings.method == "on-policy" and num_records else _NUM_QUESTIONS


def check_teaching(settings: StageSettings, arguments: TrainingArguments, *, has_stages: bool) -> None:
    """Raise unless the settings fit their method.

    Args:
        settings: the settings of the run.
        arguments: the trainer's arguments.
        has_stages: whether a schedule or a shortener is given.

    Raises:
        GistError: a setting is of another method, or training would take several devices.
    """
    if settings.method == "stages":
        if settings.num_questions:
            raise GistError(
                f"num_questions goes with method on-policy or self-study, got {settings.num_questions} with stages; "
                "leave it out, or choose one of them"
            )
        return
    given = {
        "control": settings.control is not None,
        "tail": settings.tail != "none",
        "max_examples": settings.max_examples > 0,
        "a schedule or shortener": has_stages,
    }
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise GistError(
            f"method {settings.method} has no stages, so {' and '.join(wrong)} must be left out; or use method stages"
        )
    if arguments.world_size > 1 or arguments.n_gpu > 1:
        raise GistError(f"method {settings.method} is trained by a single process on one device; make one visible")


def _rows(items: Sequence[int]) -> dict[str, Tensor]:
    return {"rows": torch.tensor(items)}
