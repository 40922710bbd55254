"""How far the answers from a gist are from those of the full prompt, token by token.

Place in the flow: sampled answers and a model -> what the model says with the whole prompt in view -> **divergence** of
a gist, of the first tokens of the prompt, and of no prompt. Nothing is generated here: every answer is read once for
each of them (teacher forcing), so all are compared at the same tokens.

* The *teacher* is the model as it is, which reads prompt and input as ordinary text.
* A *source* is what an answer sees in place of the prompt: a ``GistCache``, the prompt's first tokens, or None, a
  well-formed conversation without the prompt (with whatever the chat template writes by default).
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gisting.cache import CacheOrigin, GistCache
from gisting.data.plain import plain_sources
from gisting.errors import GistError
from gisting.eval.kl import Likeliest, kl_from, likeliest
from gisting.generation.checks import check_count, check_origin, check_positions
from gisting.generation.compression import full_prompt_cache
from gisting.generation.sampling import SampledAnswer
from gisting.models.architecture import architecture_of
from gisting.models.mode import evaluating
from gisting.models.state import require_patched
from gisting.storage import write_atomically
from gisting.tokens import GistTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Divergence",
    "FirstTokens",
    "Source",
    "Teacher",
    "ask_teacher",
    "check_source",
    "is_loop",
    "lay_out",
    "measure_divergence",
]

# The caller never sees these states, and the fingerprint of a large model takes time.
_NOBODY = CacheOrigin("", "", "", "prompt")
# An answer that ends with three equal blocks, this many tokens together or more, is taken for a loop.
_SHORTEST_LOOP = 12
_TENSORS = ("log_probs", "tokens")


@dataclass(frozen=True)
class FirstTokens:
    """The first tokens of the prompt as they are, without the rest: the control of equal size.

    Args:
        num_tokens: k, counted from the beginning of the encoded prompt, with what the template writes before it.
    """

    num_tokens: int


#: What an answer sees in place of the prompt: a cache of one prompt, the prompt's first tokens, or no prompt.
Source = GistCache | FirstTokens | None


@dataclass(frozen=True)
class Teacher:
    """What the model says at each token of some answers with the whole prompt in view.

    Args:
        prompt: the prompt of all answers.
        answers: the answers.
        likeliest: for each answer of T tokens, the distributions that predict them, on the CPU.
    """

    prompt: str
    answers: list[SampledAnswer]
    likeliest: list[Likeliest]

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self.answers)

    def select(self, rows: Sequence[int]) -> Teacher:
        """Return the answers with these row numbers, in this order."""
        return Teacher(self.prompt, [self.answers[row] for row in rows], [self.likeliest[row] for row in rows])

    def save(self, path: str | Path) -> None:
        """Write the distributions to a safetensors file, completely or not at all. Prompt and answers are not in it.

        Args:
            path: the file.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors.torch import save

        tensors = {
            "log_probs": torch.cat([one.log_probs for one in self.likeliest]),
            "tokens": torch.cat([one.tokens for one in self.likeliest]).int(),
        }
        write_atomically(path, save(tensors, {"answers": _digest(self.answers)}))

    @classmethod
    def load(cls, path: str | Path, answers: Sequence[SampledAnswer]) -> Teacher:
        """Read what :meth:`save` wrote. The file is memory-mapped.

        Args:
            path: the file.
            answers: the answers that it is about.

        Raises:
            GistError: the file cannot be read, or is about other answers.
        """
        from safetensors import SafetensorError, safe_open

        answers = list(answers)
        prompt = _common_prompt(answers)
        try:
            with safe_open(str(path), framework="pt") as file:
                of, log_probs, tokens = (file.metadata() or {}).get("answers"), *map(file.get_tensor, _TENSORS)
        except (SafetensorError, OSError) as error:
            raise GistError(f"{path} cannot be read ({error}); remove it, and it is made again") from error
        if of != _digest(answers):
            raise GistError(f"{path} is about other answers; remove it, and it is made again")
        lengths = [len(answer.token_ids) for answer in answers]
        parts = zip(log_probs.split(lengths), tokens.split(lengths), strict=True)
        return cls(prompt, answers, [Likeliest(*part) for part in parts])


@dataclass(frozen=True)
class Divergence:
    """How far one source's distributions are from the teacher's, answer by answer.

    Args:
        kl: the mean KL divergence from the full prompt over the tokens of each answer, in nats a token.
        agreement: the share of each answer's tokens at which the likeliest token of the full prompt is the likeliest
            here too, or as likely as it, in 0..1.
        parts_at: the place, from 0, of the first token of each answer at which it is not; None if there is none.
        num_tokens: the number of tokens of each answer.
        is_loop: whether each answer repeats itself (:func:`is_loop`).
    """

    kl: list[float]
    agreement: list[float]
    parts_at: list[int | None]
    num_tokens: list[int]
    is_loop: list[bool]

    @property
    def mean(self) -> float:
        """The mean KL divergence over the answers, in nats a token."""
        return statistics.fmean(self.kl)

    @property
    def median(self) -> float:
        """The median KL divergence over the answers, in nats a token."""
        return statistics.median(self.kl)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and upper quartile of the KL divergence over the answers, in nats a token."""
        if len(self.kl) < 2:
            return self.kl[0], self.kl[0]
        lower, _, upper = statistics.quantiles(self.kl, n=4, method="inclusive")
        return lower, upper

    @property
    def mean_without_loops(self) -> float | None:
        """The mean over the answers that do not repeat themselves; None if all do."""
        kept = [kl for kl, is_loop in zip(self.kl, self.is_loop, strict=True) if not is_loop]
        return statistics.fmean(kept) if kept else None

    @property
    def mean_agreement(self) -> float:
        """The mean of ``agreement`` over the answers, in 0..1."""
        return statistics.fmean(self.agreement)

    @property
    def share_identical(self) -> float:
        """The share of answers whose every token is as likely the first choice as with the full prompt, in 0..1."""
        return sum(place is None for place in self.parts_at) / len(self.parts_at)

    def kept(self, control: Divergence) -> float:
        """Return the share of a control's median divergence that is gone: ``1 - median / control.median``.

        Args:
            control: the divergence of another source at the same answers, such as no prompt.

        Returns:
            1 for the full prompt, 0 for the control itself, less than 0 for what is worse. NaN if the control has no
            divergence.
        """
        return 1 - self.median / control.median if control.median else float("nan")

    def summary(self) -> dict[str, Any]:
        """Return the figures as a dictionary for JSON."""
        return {
            "kl_mean": self.mean,
            "kl_median": self.median,
            "kl_quartiles": list(self.quartiles),
            "kl_mean_without_loops": self.mean_without_loops,
            "agreement": self.mean_agreement,
            "identical": self.share_identical,
            "num_answers": len(self.kl),
            "num_loops": sum(self.is_loop),
        }


def ask_teacher(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    answers: Sequence[SampledAnswer],
    *,
    top_k: int = 64,
    batch_size: int = 16,
    progress: Callable[[int], Any] | None = None,
) -> Teacher:
    """Run the answers once with the whole prompt in view.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        answers: answers of any kind to inputs after one prompt, sampled or not.
        top_k: number of tokens whose probabilities are kept; all others count as one outcome.
        batch_size: how many answers to run at once. They are sorted by length first.
        progress: called with the number of answers done since the last call.

    Returns:
        The teacher.

    Raises:
        GistError: there are no answers, or they have different prompts; or prompt, input and answer together exceed the
            model's positions.
    """
    answers = list(answers)
    prompt = _common_prompt(answers)
    check_count("top_k", top_k)
    found: dict[int, Likeliest] = {}
    is_text = require_patched(model, tokenizer).is_encoder_decoder
    whole = None if is_text else full_prompt_cache(model, tokenizer, prompt, _NOBODY)
    inputs = [answer.input for answer in answers]
    befores = (
        plain_sources(tokenizer, [prompt] * len(answers), inputs) if is_text else tokenizer.encode_continuations(inputs)
    )
    for rows, logits in _runs(model, tokenizer, answers, whole, befores, batch_size):
        parts = logits.split([len(answers[row].token_ids) for row in rows])
        found |= {row: _to_cpu(likeliest(part, top_k)) for row, part in zip(rows, parts, strict=True)}
        if progress is not None:
            progress(len(rows))
    return Teacher(prompt, answers, [found[row] for row in range(len(answers))])


def measure_divergence(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    teacher: Teacher,
    source: Source,
    *,
    batch_size: int = 16,
    progress: Callable[[int], Any] | None = None,
) -> Divergence:
    """Measure how far the answers are from the teacher's when they see ``source`` in place of the prompt.

    Args:
        model: the model that the teacher was made with, or another of the same vocabulary.
        tokenizer: the tokenizer it was patched for.
        teacher: what :func:`ask_teacher` returned.
        source: a cache of one prompt; the prompt's first tokens; or None for no prompt.
        batch_size: how many answers to run at once. They are sorted by length first.
        progress: called with the number of answers done since the last call.

    Returns:
        The divergence at each answer, in the teacher's order.

    Raises:
        GistError: the cache has several prompts, holds a conversation or is of the condition ``"negative"``, the prompt
            has no more tokens than asked for, or an answer with what comes before it exceeds the model's positions.
        CacheMismatchError: the cache belongs to another model, tokenizer or template.
    """
    require_patched(model, tokenizer)
    if isinstance(source, GistCache):
        check_origin(model, tokenizer, source)
    prefix, befores = lay_out(model, tokenizer, teacher.prompt, [answer.input for answer in teacher.answers], source)
    kl, agrees = {}, {}
    for rows, logits in _runs(model, tokenizer, teacher.answers, prefix, befores, batch_size):
        parts = logits.split([len(teacher.answers[row].token_ids) for row in rows])
        for row, part in zip(rows, parts, strict=True):
            expected = Likeliest(*(tensor.to(part.device) for tensor in teacher.likeliest[row]))
            expected = expected._replace(tokens=expected.tokens.long())
            kl[row] = kl_from(part, expected).mean().item()
            # Not argmax, because in 16 bits several tokens are often the likeliest, and each function takes its own.
            agrees[row] = (part.gather(-1, expected.tokens[:, :1])[:, 0] >= part.amax(-1)).tolist()
        if progress is not None:
            progress(len(rows))
    order = range(len(teacher))
    return Divergence(
        [kl[row] for row in order],
        [statistics.fmean(agrees[row]) for row in order],
        [agrees[row].index(False) if False in agrees[row] else None for row in order],
        [len(answer.token_ids) for answer in teacher.answers],
        [is_loop(answer.token_ids) for answer in teacher.answers],
    )


def check_source(source: GistCache, name: str = "source") -> None:
    """Raise unless a cache can stand for a prompt.

    Args:
        source: the cache.
        name: what errors call it.

    Raises:
        GistError: it has several prompts, holds a conversation or is of the condition ``"negative"``.
    """
    if len(source) != 1:
        raise GistError(f"{name} must hold one prompt, got {len(source)}; select it: cache[0]")
    if source.has_answers or source.origin.condition == "negative":
        what = "a conversation" if source.has_answers else "no prompt"
        raise GistError(f"{name} must be a compressed prompt, got a cache of {what}; compress the prompt")


def lay_out(
    model: PreTrainedModel, tokenizer: GistTokenizer, prompt: str, inputs: Sequence[str], source: Source
) -> tuple[GistCache | None, list[list[int]]]:
    """Return what an answer sees under ``source``: the states of a prefix, and the ids after it for each input.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        prompt: the text whose first tokens are taken, if ``source`` is :class:`FirstTokens`.
        inputs: B texts.
        source: as for :func:`measure_divergence`.

    Returns:
        A cache of one prompt, or None if everything is in the ids; and B lists of ids.

    Raises:
        GistError: as :func:`measure_divergence`.
    """
    inputs = list(inputs)
    if source is None:
        return None, plain_sources(tokenizer, [""] * len(inputs), inputs)
    after = tokenizer.encode_continuations(inputs)
    if isinstance(source, GistCache):
        check_source(source)
        return source, after
    ids = tokenizer.encode_prompts([prompt], 1)[0].chunks[0]
    k = source.num_tokens
    check_count("num_tokens", k)
    if k >= len(ids):
        raise GistError(f"num_tokens must be less than the prompt's {len(ids)} tokens, got {k}")
    if tokenizer.is_encoder_decoder:
        return None, [[*ids[:k], *rest] for rest in after]
    whole = full_prompt_cache(model, tokenizer, prompt, _NOBODY)
    first = replace(
        whole,
        keys=tuple(keys[:, :, :k].clone() for keys in whole.keys),
        values=tuple(values[:, :, :k].clone() for values in whole.values),
        lengths=torch.tensor([k]),
    )
    return first, after


def is_loop(token_ids: Sequence[int]) -> bool:
    """Return whether an answer ends in a loop: the same block of ids three times in a row, 12 ids together or more.

    A last id that breaks the pattern, such as the end of sequence, is not looked at.

    Args:
        token_ids: the ids of the answer.
    """
    return any(
        _has_period(ids, period) for ids in (token_ids, token_ids[:-1]) for period in range(1, len(ids) // 3 + 1)
    )


def _has_period(ids: Sequence[int], period: int) -> bool:
    number = max(3 * period, _SHORTEST_LOOP)
    last = list(ids[-number:])
    return len(last) == number and last[period:] == last[:-period]


def _runs(
    model: Any,
    tokenizer: GistTokenizer,
    answers: Sequence[SampledAnswer],
    prefix: GistCache | None,
    befores: Sequence[Sequence[int]],
    batch_size: int,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run the answers by length, without gradients; yield row numbers and the logits at their answers' tokens."""
    check_count("batch_size", batch_size)
    held = 0 if prefix is None else prefix.num_slots
    for row, ids in enumerate(befores):
        if not ids:
            raise GistError(
                f"input {row} leaves no text before the answer; give it an input, or use a template with text there"
            )
    lengths = [held + len(ids) + len(answer.token_ids) for ids, answer in zip(befores, answers, strict=True)]
    check_positions(model, lengths, "input", "what comes before it and its answer")
    architecture = architecture_of(require_patched(model, tokenizer))
    order = sorted(range(len(answers)), key=lambda row: lengths[row])
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids = [answers[row].token_ids for row in rows]
            with torch.no_grad():
                logits = architecture.answer_logits(model, tokenizer, prefix, [befores[row] for row in rows], ids)
            yield rows, logits


def _to_cpu(found: Likeliest) -> Likeliest:
    return Likeliest(found.log_probs.cpu(), found.tokens.cpu().int())


def _common_prompt(answers: Sequence[SampledAnswer]) -> str:
    if not answers:
        raise GistError("answers is empty; give at least one answer")
    prompts = {answer.prompt for answer in answers}
    if len(prompts) > 1:
        raise GistError(
            f"answers must have one prompt, got {len(prompts)}; measure each prompt's answers by themselves"
        )
    return prompts.pop()


def _digest(answers: Sequence[SampledAnswer]) -> str:
    rows = [[answer.prompt, answer.input, list(answer.token_ids)] for answer in answers]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
