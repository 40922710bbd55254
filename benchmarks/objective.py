"""Measure seconds and memory of a training step of a real size on the CPU, gist-lora with distillation, in three ways.

How much is saved depends on how much of a batch is prompts, so there are two workloads: a short instruction shared by
eight completions, where almost nothing is saved, and a system prompt with two questions, where most is.

    every token      student and teacher run the whole batch, with logits at every token: what a plain loop would do
    targets          logits only where there is something to predict
    prompts once     in addition, the prompts' keys and values computed once, without gradients: what ``finetune`` does

All three take their steps on the same batches and the same adapter, alternating in one process. Memory is the most that
torch's allocator gave out in one step, beyond the weights. No time is reported unless all ways have the same loss and
gradients.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from benchmarks.cells import spread_cell
from benchmarks.command import OutputOption, Rows, where
from benchmarks.models import SMOLLM2, letters
from gisting.data.collate import IGNORED
from gisting.data.packing import GistPackingCollator
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.markdown import markdown_table
from gisting.measure.memory import peak_of_allocator
from gisting.measure.models import random_llama
from gisting.measure.rows import spread
from gisting.models.adapters import Adapter, attach
from gisting.models.mode import evaluating
from gisting.train.batches import StepBatches
from gisting.train.objective import Objective, ObjectiveTrainer, truncated_kl

__all__ = ["WAYS", "WORKLOADS", "ObjectiveRow", "Sizes", "main", "measure", "objective_table"]

#: Ways to compute a step, from the plainest to what ``finetune`` does.
WAYS = ("every token", "targets", "prompts once")
NUM_GIST_TOKENS = 4
_OBJECTIVE = Objective(distillation=1.0)


@dataclass(frozen=True)
class ObjectiveRow:
    """One way to compute a step. Times are in seconds per step, median and quartiles."""

    workload: str
    way: str
    num_parameters: int
    vocabulary: int
    num_tokens: int
    num_prompt_tokens: int
    num_targets: int
    step_s: float
    step_s_low: float
    step_s_high: float
    peak_bytes: int
    num_repeats: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, by default SmolLM2-135M's, and of a step; prompt, question and answer in tokens."""

    model: Mapping[str, Any] = field(default_factory=lambda: SMOLLM2)
    prompts: int = 3
    completions: int = 2
    prompt: int = 256
    question: int = 30
    answer: int = 20


#: The workloads: steps of about 1,000 tokens.
WORKLOADS: dict[str, dict[str, int]] = {
    "short instructions": {"prompts": 2, "completions": 8, "prompt": 20, "question": 40, "answer": 20},
    "system prompts": {"prompts": 3, "completions": 2, "prompt": 256, "question": 30, "answer": 20},
}


def measure(workload: str, sizes: Sizes, *, repeats: int = 5) -> list[ObjectiveRow]:
    """Time whole steps: collating, both passes, the backward pass and the optimiser.

    Args:
        workload: its name, for the rows.
        sizes: sizes of the model and of a step.
        repeats: timed rounds after an untimed one; each way takes one step per round.

    Raises:
        GistError: the ways differ in loss or gradients.
    """
    bench = _Bench(sizes)
    bench.gate()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(repeats + 1):
        for way in WAYS:
            start = time.perf_counter()
            bench.step(way, number)
            if number:
                times[way].append(time.perf_counter() - start)
    batch = bench.collators["every token"](bench.records(0))
    first, end = batch["attention_mask"][:, 0].unbind(1)
    prompt = bench.collators["prompts once"](bench.records(0))["prompt_attention_mask"][:, 0]
    rows = []
    for way in WAYS:
        low, median, high = spread(times[way])
        rows.append(
            ObjectiveRow(
                workload=workload,
                way=way,
                num_parameters=sum(parameter.numel() for parameter in bench.model.parameters()),
                vocabulary=bench.model.config.vocab_size,
                num_tokens=int((end > first).sum()),
                num_prompt_tokens=int((prompt[:, 1] > prompt[:, 0]).sum()),
                num_targets=int((batch["labels"] != IGNORED).sum()),
                step_s=median,
                step_s_low=low,
                step_s_high=high,
                peak_bytes=peak_of_allocator(torch.device("cpu"), lambda way=way: bench.step(way, 0)),
                num_repeats=repeats,
            )
        )
    return rows


def objective_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown."""
    lines, plainest = [], rows[0]
    for row in rows:
        plainest = row if row["way"] == WAYS[0] else plainest
        lines.append(
            [
                row["workload"],
                f"{row['num_prompt_tokens']:,} of {row['num_tokens']:,}",
                f"{row['num_targets']:,}",
                row["way"],
                spread_cell(row, "step_s", 2),
                f"{plainest['step_s'] / row['step_s']:.2f}x",
                f"{row['peak_bytes'] / 2**30:.2f}",
            ]
        )
    columns = ["workload", "prompt tokens", "targets", "computed", "s per step", "speed-up", "peak memory, GiB"]
    first = rows[0]
    text = markdown_table(columns, lines)
    text += [
        "",
        f"`gist-lora` with distillation, {first['num_parameters'] / 1e6:.0f} million random parameters in float32, "
        f"vocabulary {first['vocabulary']:,}; medians of {first['num_repeats']} alternating steps, quartiles in "
        f"brackets; memory is what a step takes beyond the weights ({where(first)}).",
    ]
    return "\n".join(text)


class _Bench:
    """A model with an adapter, and batches for it."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        model, self.tokenizer = random_llama(**sizes.model)
        self.model: Any = model
        attach(self.model, Adapter("gist-lora"))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:  # a fresh adapter changes nothing, so gradients would be compared at zero
                    parameter.normal_(std=0.02)
        self.model.train()
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=1e-4)
        self._folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(self._folder.name, report_to="none", use_cpu=True)
        self.trainer = ObjectiveTrainer(model=self.model, args=arguments, objective=_OBJECTIVE)
        whole = sizes.prompt + NUM_GIST_TOKENS + sizes.completions * (sizes.question + sizes.answer) + 32
        plain, marked = (
            GistPackingCollator(
                self.tokenizer,
                NUM_GIST_TOKENS,
                max_length=whole,
                pack_length=2 * whole,
                with_teacher=True,
                with_prompt_columns=is_marked,
            )
            for is_marked in (False, True)
        )
        self.collators: dict[str, Callable[[list[Record]], dict[str, Any]]] = {
            "every token": plain,
            "targets": StepBatches(plain, self.tokenizer),
            "prompts once": StepBatches(marked, self.tokenizer, has_frozen_base=True),
        }

    def records(self, number: int) -> list[Record]:
        """Draw the records of a step: random letters, because only their number counts."""
        chance, found = random.Random(number), []
        for _ in range(self.sizes.prompts):
            prompt = letters(chance, self.sizes.prompt)
            found += [
                Record(prompt, letters(chance, self.sizes.question), letters(chance, self.sizes.answer))
                for _ in range(self.sizes.completions)
            ]
        return found

    def loss(self, way: str, number: int) -> Tensor:
        batch = self.collators[way](self.records(number))
        return self._every_token(batch) if way == "every token" else self.trainer.compute_loss(self.model, batch)

    def step(self, way: str, number: int) -> None:
        self.loss(way, number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gate(self) -> None:
        """Check that all ways have the same loss and the same gradients."""
        losses, gradients = [], []
        for way in WAYS:
            loss = self.loss(way, 0)
            loss.backward()
            losses.append(loss.item())
            gradients.append([one.grad.clone() for one in self.model.parameters() if one.grad is not None])
            self.optimizer.zero_grad()
        first, *others = gradients
        largest = max(float(one.abs().max()) for one in first)
        apart = max(float((a - b).abs().max()) for other in others for a, b in zip(first, other, strict=True))
        if max(losses) - min(losses) > 1e-5 * losses[0] or apart > 1e-4 * largest:
            raise GistError(f"the ways differ: losses {losses}, gradients by {apart:.1e}; no time is reported")

    def _every_token(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"][:, 1:]
        own = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        seen = {name: batch.get(f"teacher_{name}", value) for name, value in own.items()}
        with torch.no_grad(), evaluating(self.model):
            teacher = self.model(**seen, use_cache=False).logits[:, :-1][labels != IGNORED]
        logits = self.model(**own, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        student = logits[labels != IGNORED]
        return loss + _OBJECTIVE.distillation * truncated_kl(student, teacher, _OBJECTIVE.top_k).mean()


def main(
    output: OutputOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each way.")] = 5,
    sizes: Annotated[str, typer.Option(help="Other sizes of model and step, as JSON.")] = "{}",
) -> None:
    """A training step with and without needless logits and prompts.

    Example: OMP_PROC_BIND=true python -m benchmarks objective --output docs/results/objective.jsonl
    """
    rows = Rows("objective", output, "cpu")
    for workload, changes in WORKLOADS.items():
        rows.add(measure(workload, Sizes(**{**changes, **json.loads(sizes)}), repeats=repeats))
    rows.show(objective_table)
