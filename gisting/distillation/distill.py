"""Distil one prompt into k slots, for any model, without training its weights.

Place in the flow: a prompt and inputs -> answers with the whole prompt in view -> slots that learn to give the same
next-token distributions -> an ordinary ``GistCache``. The model needs no training to gist beforehand, because nothing
but the slots is trained (prefix tuning, arXiv 2101.00190, with context distillation, arXiv 2112.00861, as its loss).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gisting.cache import CacheOrigin, GistCache
from gisting.distillation.directory import Directory, text_hash
from gisting.distillation.questions import write_questions
from gisting.distillation.slots import Measured, Schedule, train_slots
from gisting.distillation.starts import choose_start, make_start
from gisting.errors import GistError
from gisting.eval.divergence import Divergence, FirstTokens, Teacher, ask_teacher, measure_divergence
from gisting.generation.checks import check_count, listed
from gisting.generation.sampling import sample_answers
from gisting.models.adapters import checkpoint_name, reader_fingerprint
from gisting.models.state import require_patched
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Distilled", "Progress", "check_k", "distill"]

_NUM_HELD_OUT = 20
_FEWEST_ANSWERS = 200
_SELF_STUDY = 96  # questions that the model writes


@dataclass(frozen=True)
class Progress:
    """What a distillation is doing.

    Args:
        phase: ``"questions"``, ``"answers"``, ``"teacher"``, ``"start"`` or ``"training"``.
        done: how much of it is done: questions, answers, answers, starts (there is one) or steps.
        total: how much there is.
        measured: in training, a measurement on the held-out answers that has just been made.
    """

    phase: str
    done: int
    total: int
    measured: Measured | None = None


@dataclass(frozen=True)
class Distilled:
    """What :func:`distill` made.

    Args:
        cache: the gist, one prompt of k slots in the model's dtype. Its ``about`` says how it was made
            (``"distilled"``) and how good it was found to be (``"quality"``).
        start: the slots before training.
        history: the measurements on held-out answers during training; the first is that of the start.
        held_out: the divergence from the full prompt at each held-out answer, of ``"gist"``, of ``"first"`` (the first
            k tokens of the prompt as they are) and of ``"none"`` (no prompt).
        teacher: what the model says at the held-out answers with the whole prompt in view, to measure other sources.
        num_prompt_tokens: the number of the prompt's tokens.
        seconds: time spent in each phase, by its name. Training has that of earlier runs too, up to the state from
            which it went on; other phases have nothing for what was found in the directory.
    """

    cache: GistCache
    start: GistCache
    history: list[Measured]
    held_out: dict[str, Divergence]
    teacher: Teacher
    num_prompt_tokens: int
    seconds: dict[str, float]

    @property
    def kept(self) -> float:
        """The share of the median divergence without a prompt that is gone, in held-out answers: 1 is all of it."""
        return self.held_out["gist"].kept(self.held_out["none"])

    def to_row(self) -> dict[str, Any]:
        """Return everything but the states as a dictionary for JSON."""
        return {
            "num_gist_tokens": self.cache.num_slots,
            "num_prompt_tokens": self.num_prompt_tokens,
            "kept": self.kept,
            **(self.cache.about[0] or {})["distilled"],
            "held_out": {name: one.summary() for name, one in self.held_out.items()},
            "history": [one.to_row() for one in self.history],
            "seconds": self.seconds,
        }


def distill(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    prompt: str,
    inputs: Sequence[str] | None = None,
    num_gist_tokens: int = 16,
    *,
    start: str | None = None,
    held_out: Sequence[str] | None = None,
    num_answers: int | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.8,
    top_k: int = 64,
    steps: int = 75,
    batch_size: int = 8,
    key_rate: float = 0.005,
    value_rate: float = 0.015,
    average: float = 0.2,
    evaluate_every: int = 25,
    patience: int = 3,
    seed: int = 0,
    directory: str | Path | None = None,
    progress: Callable[[Progress], Any] | None = None,
) -> Distilled:
    """Press one prompt into k slots by gradient descent on the slots alone.

    The model answers the inputs with the whole prompt in view; the slots, the keys and values of k tokens in every
    layer, learn to give the same next-token distributions at the tokens of these answers. The model's weights do not
    change, so it need not have been trained to gist. Answers, and what the model said at them, are made once for all k.

    Args:
        model: a patched model, trained to gist or not, on any device, in any floating dtype, quantised or not, by
            itself or inside a ``PeftModel`` with LoRA. 16 bits are quicker; the slots are float32 while they learn.
        tokenizer: the tokenizer it was patched for.
        prompt: the text.
        inputs: what users say, at least two different texts; None to let the model write questions about the prompt and
            ordinary ones.
        num_gist_tokens: k, less than the number of the prompt's tokens.
        start: what the slots start from, one of ``STARTS``: ``"first"``, ``"attended"``, ``"matched"`` or ``"gist"``.
            None for ``"matched"``, or ``"first"`` for an encoder-decoder and for a decoder whose attention cannot be
            matched. ``"gist"`` is the gist that a model which was trained to gist makes.
        held_out: inputs to measure with, which are not learned from; None to keep a fifth of the inputs for this, at
            most 20.
        num_answers: answers to learn from. If there are fewer inputs they are repeated, each time with another answer;
            if there are more, a random choice is answered. None for as many as there are inputs, and at least 200.
        max_new_tokens: the largest number of tokens in a sampled answer.
        temperature: for sampling answers.
        top_k: tokens whose probabilities are compared one by one; all others count as one outcome.
        steps: the largest number of optimiser steps; 0 to take the slots as they start.
        batch_size: answers in a step.
        key_rate: Adam's learning rate for the keys, relative to their size in each layer.
        value_rate: likewise for the values, and for the last hidden states of an encoder.
        average: the share of the steps, at the end, over which the slots are averaged.
        evaluate_every: steps between two measurements on held-out answers.
        patience: training stops after this many measurements in a row that did not lower the median divergence, with
            the slots of the lowest.
        seed: decides which inputs are held out, what is sampled, and the order of the answers.
        directory: where answers, what the model said at them and the state of the training are kept. With the same
            arguments a run that was stopped goes on from them, and ends with the same bits.
        progress: called as the work goes on.

    Returns:
        The gist, and how it compares with the full prompt on held-out inputs.

    Raises:
        GistError: the model is not patched; the prompt or ``inputs`` is empty, or ``held_out`` holds all of them; k is
            not in 1 to the prompt's length; a text with its answer exceeds the model's positions; a setting is out of
            range; or the directory was made with other settings.
    """
    # peft's wrapper; its adapter is in the layers of the model inside.
    inside: Any = getattr(model, "get_base_model", None)
    model = model if inside is None else inside()
    require_patched(model, tokenizer)
    num_prompt_tokens = _num_prompt_tokens(tokenizer, prompt, num_gist_tokens)
    schedule = _schedule(steps, batch_size, key_rate, value_rate, average, evaluate_every, patience, seed)
    inputs = None if inputs is None else _texts("inputs", inputs, 2 if held_out is None else 1)
    held_out = None if held_out is None else _texts("held_out", held_out, 1)
    # Before the directory is claimed, so that a run which is refused here leaves it to the next one.
    split = None if inputs is None else _split(inputs, held_out, seed)
    if num_answers is not None:
        check_count("num_answers", num_answers)

    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    origin = CacheOrigin(
        reader_fingerprint(model),
        tokenizer.fingerprint,
        tokenizer.template.name,
        "gist",
        checkpoint_name(model),
    )
    start = choose_start(model, tokenizer, prompt, start, origin)
    folder = Directory(None if directory is None else Path(directory))
    folder.claim(
        {
            **origin.identity(),
            "dtype": str(input_weight(model).dtype).removeprefix("torch."),
            "prompt": text_hash(prompt),
            "inputs": None if inputs is None else text_hash(*inputs),
            "held_out": None if held_out is None else text_hash(*held_out),
            "num_answers": num_answers,
            "top_k": top_k,
            **sampling,
        }
    )
    clock = _Clock(progress)
    if split is None:
        split = _split(_self_study(model, tokenizer, prompt, folder, clock, seed), held_out, seed)
    learned, measured = split
    number = max(len(learned), _FEWEST_ANSWERS) if num_answers is None else num_answers
    pairs = [(prompt, input) for input in measured]
    if number < len(learned):
        learned = random.Random(f"{seed} order").sample(learned, number)
    pairs += [(prompt, learned[row % len(learned)]) for row in range(number)]

    answers = folder.read_answers(pairs)
    if answers is None:
        with clock.phase("answers", len(pairs)) as advance:
            answers = sample_answers(model, tokenizer, pairs, batch_size=64, progress=advance, **sampling)
        folder.write_answers(answers, len(measured))
    teacher = folder.read_teacher(answers)
    if teacher is None:
        with clock.phase("teacher", len(answers)) as advance:
            teacher = ask_teacher(model, tokenizer, answers, top_k=top_k, progress=advance)
        teacher = folder.write_teacher(teacher)
    held, taught = teacher.select(range(len(measured))), teacher.select(range(len(measured), len(answers)))

    # Without steps there is no state to keep, and a run with steps may follow in the same directory.
    part = folder.claim(vars(schedule), f"k-{num_gist_tokens}-{start}") if steps else None
    with clock.phase("start", 1) as advance:
        advance(0)
        kept = None if part is None else part / "start.safetensors"
        if kept is not None and kept.exists():  # With other threads, a fit is not the same to the bit.
            # Selecting copies the states out of the file, where they are aligned in another way.
            slots = GistCache.load(kept, input_weight(model).device).select([0])
        else:
            slots = make_start(model, tokenizer, taught, num_gist_tokens, start, origin)
            if kept is not None:
                slots.save(kept)
        advance(1)
    with clock.phase("training", steps):
        cache, history, seconds = train_slots(
            model,
            tokenizer,
            slots,
            taught,
            held,
            schedule,
            state_path=None if part is None else part / "state.pt",
            report=lambda done, found: clock.tell("training", done, steps, found),
        )
    clock.seconds["training"] = seconds
    found = {
        "gist": measure_divergence(model, tokenizer, held, cache),
        "first": measure_divergence(model, tokenizer, held, FirstTokens(num_gist_tokens)),
        "none": measure_divergence(model, tokenizer, held, None),
    }
    about = {
        "num_prompt_tokens": num_prompt_tokens,
        "inputs": len(learned),
        "self_study": inputs is None,
        "answers": number,
        "steps": history[-1].step,
        "start": start,
        "seed": seed,
        "held_out_inputs": len(measured),
    }
    quality = {
        "kept_against_no_prompt": found["gist"].kept(found["none"]),
        **found["gist"].summary(),
        "control": "no prompt",
        "control_kl_median": found["none"].median,
    }
    quality = {name: _rounded(value) for name, value in quality.items()}
    cache = cache.with_about(distilled=about, quality=quality)
    return Distilled(cache, slots, history, found, held, num_prompt_tokens, clock.seconds)


def _num_prompt_tokens(tokenizer: GistTokenizer, prompt: str, num_gist_tokens: int) -> int:
    if not isinstance(prompt, str):
        raise GistError(f"prompt must be one text, got {type(prompt).__name__}")
    number = tokenizer.encode_prompts([prompt], 1)[0].num_prompt_tokens
    check_k(num_gist_tokens, number)
    return number


def check_k(num_gist_tokens: int, num_prompt_tokens: int) -> None:
    """Raise unless a gist is shorter than its prompt.

    Args:
        num_gist_tokens: k.
        num_prompt_tokens: the number of the prompt's tokens.

    Raises:
        GistError: k is no number of tokens, or not less than the prompt's.
    """
    check_count("num_gist_tokens", num_gist_tokens)
    if num_gist_tokens >= num_prompt_tokens:
        raise GistError(
            f"num_gist_tokens must be less than the prompt's {num_prompt_tokens} tokens, got {num_gist_tokens}; "
            "take fewer, or keep the prompt"
        )


def _texts(name: str, texts: Sequence[str], fewest: int) -> list[str]:
    found = listed(name, texts)
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise GistError(f"{name}[{row}] must be a text, got {type(text).__name__}")
    if len(set(found)) < fewest:
        raise GistError(
            f"{name} must hold at least {fewest} different texts, got {len(set(found))}"
            + ("; leave it out to let the model write questions" if name == "inputs" else "")
        )
    return found


def _schedule(
    steps: int,
    batch_size: int,
    key_rate: float,
    value_rate: float,
    average: float,
    evaluate_every: int,
    patience: int,
    seed: int,
) -> Schedule:
    if steps != 0:
        check_count("steps", steps)
    counts = {"batch_size": batch_size, "evaluate_every": evaluate_every, "patience": patience}
    for name, count in counts.items():
        check_count(name, count)
    for name, rate in (("key_rate", key_rate), ("value_rate", value_rate)):
        if not 0 <= rate <= 1:
            raise GistError(f"{name} must be in 0..1, got {rate!r}")
    if not 0 <= average <= 1:
        raise GistError(f"average must be a share in 0..1, got {average!r}")
    return Schedule(
        steps, batch_size, key_rate, value_rate, min(10, steps // 10), average, evaluate_every, patience, seed
    )


def _self_study(
    model: PreTrainedModel, tokenizer: GistTokenizer, prompt: str, folder: Directory, clock: _Clock, seed: int
) -> list[str]:
    questions = folder.read_questions()
    if questions is None:
        with clock.phase("questions", 2 * _SELF_STUDY) as advance:
            questions = write_questions(model, tokenizer, prompt, _SELF_STUDY, seed=seed, progress=advance)
        folder.write_questions(questions)
    return questions


def _split(inputs: Sequence[str], held_out: Sequence[str] | None, seed: int) -> tuple[list[str], list[str]]:
    """Inputs to learn from, and different inputs to measure with; the same text is never in both."""
    if held_out is not None:
        measured = list(dict.fromkeys(held_out))
        learned = [input for input in inputs if input not in measured]
        if not learned:
            raise GistError(
                "held_out holds every one of the inputs, so none is left to learn from; leave some of them out"
            )
        return learned, measured
    distinct = list(dict.fromkeys(inputs))
    random.Random(seed).shuffle(distinct)
    number = max(1, min(_NUM_HELD_OUT, len(distinct) // 5))
    measured = set(distinct[:number])
    return [input for input in inputs if input not in measured], distinct[:number]


def _rounded(value: Any) -> Any:
    """A number, or numbers in a list, with four decimals; None for what is no number, as JSON has it."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None


class _Clock:
    """Says what is done, and takes the time of each phase."""

    def __init__(self, progress: Callable[[Progress], Any] | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    def tell(self, phase: str, done: int, total: int, measured: Measured | None = None) -> None:
        if self.progress is not None:
            self.progress(Progress(phase, done, total, measured))

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        begin, done = time.perf_counter(), 0

        def advance(number: int) -> None:
            nonlocal done
            done += number
            self.tell(name, done, total)

        yield advance
        self.seconds[name] = time.perf_counter() - begin
