"""Slots that learn: keys and values of k places in every layer, drawn towards what the full prompt gives.

Place in the flow: answers with the whole prompt in view, and a start -> **training** -> a gist. No weight of the model
changes. The slots are float32; the model runs in its own dtype, with gradients into the slots alone.
"""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.eval.divergence import Divergence, Teacher, lay_out, measure_divergence
from gisting.eval.kl import Likeliest, kl_loss
from gisting.models.architecture import architecture_of
from gisting.models.mode import evaluating
from gisting.models.registry import family_of
from gisting.storage import write_atomically
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Measured", "Schedule", "train_slots"]

_BETAS = (0.9, 0.95)
_SORTED_TOGETHER = 8  # batches whose answers are sorted by length


@dataclass(frozen=True)
class Schedule:
    """How slots are trained.

    Args:
        steps: the number of optimiser steps.
        batch_size: answers in a step.
        key_rate: Adam's learning rate for the keys, relative to the root mean square of each layer's keys at the start.
        value_rate: likewise for the values, and for the last hidden states of an encoder.
        warmup: steps in which the rates rise; afterwards they fall to a twentieth along a cosine.
        average: the share of the steps, at the end, over which the slots are averaged; 0 takes the last ones.
        evaluate_every: steps between two measurements on the held-out answers.
        patience: training stops after this many measurements in a row that did not lower the median divergence.
        seed: decides which answers come in which step.
    """

    steps: int
    batch_size: int
    key_rate: float
    value_rate: float
    warmup: int
    average: float
    evaluate_every: int
    patience: int
    seed: int

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates in ``step``, counted from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


@dataclass(frozen=True)
class Measured:
    """A measurement on held-out answers while slots are trained.

    Args:
        step: optimiser steps done.
        loss: the mean divergence from the full prompt in training since the last measurement, in nats a token; None
            before the first step.
        held_out: the divergence at each held-out answer.
    """

    step: int
    loss: float | None
    held_out: Divergence

    def to_row(self) -> dict[str, Any]:
        """Return the figures as a dictionary for JSON."""
        return {"step": self.step, "loss": self.loss, **self.held_out.summary()}


def train_slots(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    start: GistCache,
    teacher: Teacher,
    held_out: Teacher,
    schedule: Schedule,
    *,
    state_path: Path | None = None,
    report: Callable[[int, Measured | None], Any] | None = None,
) -> tuple[GistCache, list[Measured], float]:
    """Train the slots of one prompt.

    Args:
        model: a patched model, whose weights are frozen meanwhile.
        tokenizer: the tokenizer it was patched for.
        start: the slots to start from, in the model's dtype.
        teacher: answers to learn from, with the whole prompt in view.
        held_out: answers to measure with.
        schedule: how to train.
        state_path: where the state is kept at each measurement; training continues from it if it is there, and ends
            with the same bits as without a break.
        report: called with the number of steps done, and after a measurement with it.

    Returns:
        The slots; all measurements; and the seconds that it took, with those up to the state that it went on from. The
        first measurement is that of the start. If the last measurements, ``patience`` of
        them, did not lower the median divergence, the slots are those of the lowest; else those of the last step.

    Raises:
        GistError: the divergence is not finite.
    """
    begin = time.perf_counter()
    run = _Run(model, tokenizer, start, schedule)
    if state_path is not None and state_path.exists():
        run.restore(state_path)
        begin -= run.seconds
    architecture = architecture_of(family_of(model.config))
    inputs = [answer.input for answer in teacher.answers]
    _, befores = lay_out(model, tokenizer, teacher.prompt, inputs, start)
    lengths = [len(ids) + len(answer.token_ids) for ids, answer in zip(befores, teacher.answers, strict=True)]

    def measure(loss: float | None) -> None:
        found = measure_divergence(model, tokenizer, held_out, run.cache())
        run.note(Measured(run.step, loss, found))
        run.seconds = time.perf_counter() - begin
        if state_path is not None:
            run.save(state_path)
        if report is not None:
            report(run.step, run.history[-1])

    # On a CPU the backward pass of fused attention takes longer than that of the plain one (a tenth of SmolLM2's step).
    plain = sdpa_kernel(SDPBackend.MATH) if start.device.type == "cpu" else nullcontext()
    with evaluating(model), _frozen(model), plain:
        if not run.history:
            measure(None)
        while run.step < schedule.steps and not run.is_over:
            rows = _rows_of(run.step, lengths, schedule)
            logits = architecture.answer_logits(
                model,
                tokenizer,
                run.slots(),
                [befores[row] for row in rows],
                [teacher.answers[row].token_ids for row in rows],
            )
            run.learn(kl_loss(logits, _joined([teacher.likeliest[row] for row in rows], logits.device)).mean())
            if run.step % schedule.evaluate_every == 0 or run.step == schedule.steps:
                measure(run.taken_loss())
            elif report is not None:
                report(run.step, None)
    return run.result() if schedule.steps else start, run.history, run.seconds


@dataclass
class _Run:
    """The slots while they learn, and what goes with them."""

    model: Any
    tokenizer: GistTokenizer
    start: GistCache
    schedule: Schedule
    step: int = 0
    history: list[Measured] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        start = self.start
        states = [*start.keys, *start.values, *(() if start.last_hidden is None else [start.last_hidden])]
        # In one order in memory, however they were made: the same sums then have the same bits.
        states = [one.contiguous() for one in states]
        # Relative to their size, so that one rate fits layers and models of all scales.
        self.scales = [states_.float().pow(2).mean().sqrt().clamp(min=1e-6) for states_ in states]
        self.parameters = [
            (one.detach().float() / scale).requires_grad_() for one, scale in zip(states, self.scales, strict=True)
        ]
        keys = len(start.keys)
        self.rates = [self.schedule.key_rate, self.schedule.value_rate]
        groups = [{"params": self.parameters[:keys]}, {"params": self.parameters[keys:]}]
        self.optimiser = torch.optim.Adam(groups, lr=1.0, betas=_BETAS)
        self.averages = [torch.zeros_like(one) for one in self.parameters]
        self.num_averaged = 0
        self.best = [one.detach().clone() for one in self.parameters]

    def slots(self, parameters: Sequence[Tensor] | None = None) -> GistCache:
        """The slots as the model reads them, with gradients into the parameters."""
        dtype, count = self.start.dtype, len(self.start.keys)
        parts = [(one * scale).to(dtype) for one, scale in zip(parameters or self.parameters, self.scales, strict=True)]
        return replace(
            self.start,
            keys=tuple(parts[:count]),
            values=tuple(parts[count : 2 * count]),
            last_hidden=parts[-1] if len(parts) > 2 * count else None,
        )

    def cache(self) -> GistCache:
        """The slots as they would be returned now: the average, once it has begun."""
        with torch.no_grad():
            return self.slots(self._current())

    def _current(self) -> list[Tensor]:
        if self.num_averaged:
            return [total / self.num_averaged for total in self.averages]
        return [one.detach() for one in self.parameters]

    def learn(self, loss: Tensor) -> None:
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise GistError(f"the divergence is {self.losses[-1]} in step {self.step}; lower key_rate and value_rate")
        gradients = torch.autograd.grad(loss, self.parameters)
        for one, gradient in zip(self.parameters, gradients, strict=True):
            one.grad = gradient
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule.rate(self.step)
        self.optimiser.step()
        self.step += 1
        if self.step > self.schedule.steps * (1 - self.schedule.average):
            self.num_averaged += 1
            for total, one in zip(self.averages, self.parameters, strict=True):
                total += one.detach()

    def taken_loss(self) -> float:
        found = sum(self.losses) / len(self.losses)
        self.losses = []
        return found

    def note(self, measured: Measured) -> None:
        self.history.append(measured)
        if measured is min(self.history, key=lambda one: one.held_out.median):
            self.best = [one.clone() for one in self._current()]

    @property
    def is_over(self) -> bool:
        """Whether the last measurements, ``patience`` of them, did not lower the median."""
        medians = [one.held_out.median for one in self.history]
        return len(medians) - 1 - medians.index(min(medians)) >= self.schedule.patience

    def result(self) -> GistCache:
        with torch.no_grad():
            return self.slots(self.best) if self.is_over else self.cache()

    def save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "parameters": self.parameters,
            "optimiser": self.optimiser.state_dict(),
            "averages": self.averages,
            "num_averaged": self.num_averaged,
            "best": self.best,
            "history": [{"step": one.step, "loss": one.loss, "held_out": vars(one.held_out)} for one in self.history],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def restore(self, path: Path) -> None:
        try:
            # Not to the device: Adam counts its steps on the CPU, and load_state_dict moves the rest.
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch names no errors for a damaged file
            raise GistError(f"{path} cannot be read ({type(error).__name__}); remove it to train again") from error
        with torch.no_grad():
            for one, saved in zip(self.parameters, state["parameters"], strict=True):
                one.copy_(saved)
        self.optimiser.load_state_dict(state["optimiser"])
        device = self.start.device
        self.averages, self.best = ([one.to(device) for one in state[name]] for name in ("averages", "best"))
        self.step, self.num_averaged = state["step"], state["num_averaged"]
        self.seconds = state.get("seconds", 0.0)
        self.history = [Measured(one["step"], one["loss"], Divergence(**one["held_out"])) for one in state["history"]]


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Compute no gradients of the model's weights within the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _rows_of(step: int, lengths: Sequence[int], schedule: Schedule) -> list[int]:
    """The answers of a step, of nearly equal length, in a random order that depends on the seed alone."""
    size = min(schedule.batch_size, len(lengths))
    epoch, place = divmod(step, len(lengths) // size)
    draw = random.Random(f"{schedule.seed} {epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    window = size * _SORTED_TOGETHER
    order = [
        row
        for first in range(0, len(order), window)
        for row in sorted(order[first : first + window], key=lambda row: lengths[row])
    ]
    batches = [order[first : first + size] for first in range(0, len(order) - size + 1, size)]
    draw.shuffle(batches)
    return batches[place]


def _joined(parts: Sequence[Likeliest], device: torch.device) -> Likeliest:
    log_probs = torch.cat([part.log_probs for part in parts]).to(device)
    return Likeliest(log_probs, torch.cat([part.tokens for part in parts]).long().to(device))
