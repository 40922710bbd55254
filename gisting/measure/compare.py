"""Answers side by side: from the gist, from the full prompt, and without a prompt.

Place in the flow: a patched model, a cached prompt and its text -> **compare** -> answers with what they cost. The two
controls are ordinary text for the model as it is, so without gist tokens. Decoding is greedy. Looks at single answers;
scores over many records are made by :mod:`gisting.eval`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from gisting.cache import GistCache
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.eval.conditions import evaluate
from gisting.eval.cost import cache_bytes
from gisting.generation import generate
from gisting.models.patch import require_patched
from gisting.models.weights import input_weight
from gisting.tokens import GistTokenizer

__all__ = ["Answer", "Comparison", "answer_from_gist", "check_prompt", "compare"]


@dataclass(frozen=True)
class Answer:
    """One answer, and what it took.

    Args:
        condition: ``"gist"``, ``"prompt"`` or ``"no-prompt"``.
        text: the answer.
        token_ids: its ids, including the end of sequence if it has one.
        num_read_tokens: tokens that the model read before the answer; a cached gist is not read again.
        kept_bytes: states to keep between requests: those of the gist, those of the full prompt in a prefix cache, or
            none.
        first_token_ms: time from the start of the first forward pass to the first token.
        total_ms: time from the same start to the end of the answer.
    """

    condition: str
    text: str
    token_ids: list[int]
    num_read_tokens: int
    kept_bytes: int
    first_token_ms: float
    total_ms: float


@dataclass(frozen=True)
class Comparison:
    """The answers to one input, with the gist, with the full prompt, and without a prompt."""

    input: str
    gist: Answer
    prompt: Answer
    no_prompt: Answer

    @property
    def num_equal_tokens(self) -> int:
        """The number of places at which gist and full prompt have the same token."""
        return sum(a == b for a, b in zip(self.gist.token_ids, self.prompt.token_ids, strict=False))

    @property
    def agreement(self) -> float:
        """The share of places at which gist and full prompt have the same token, of the longer answer, in 0..1."""
        longest = max(len(self.gist.token_ids), len(self.prompt.token_ids))
        return self.num_equal_tokens / longest if longest else 1.0

    @property
    def parts_at(self) -> int | None:
        """The place, from 0, of the first token in which gist and full prompt differ; None if they are equal."""
        ours, theirs = self.gist.token_ids, self.prompt.token_ids
        if ours == theirs:
            return None
        different = (place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        return next(different, min(len(ours), len(theirs)))

    def to_row(self) -> dict[str, Any]:
        """Return everything as a dictionary for JSON."""
        return {**asdict(self), "agreement": self.agreement, "parts_at": self.parts_at}


def compare(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    inputs: Sequence[str],
    *,
    prompt: str,
    cache: GistCache,
    max_new_tokens: int = 128,
) -> list[Comparison]:
    """Answer each input from the gist, from the full prompt and without a prompt, one by one.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        inputs: the texts to answer.
        prompt: the text of the compressed prompt, for the full prompt's answers.
        cache: the compressed prompt.
        max_new_tokens: maximum length of an answer.

    Returns:
        A comparison for each input.

    Raises:
        GistError: the cache holds several prompts, there are no inputs, the prompt is empty, or as
            :func:`gisting.generate`.
        CacheMismatchError: the cache does not belong to the model.
    """
    require_patched(model, tokenizer)
    if len(cache) != 1:
        raise GistError(f"cache must hold one prompt, got {len(cache)}; select it: cache[0]")
    if isinstance(inputs, str) or not inputs:
        raise GistError('inputs must be a list of at least one text, "" if the prompt needs no input')
    num_prompt_tokens = tokenizer.encode_prompts([prompt], 1)[0].num_prompt_tokens
    prefix_bytes = cache_bytes(model.config, num_prompt_tokens, input_weight(model).dtype, is_windowed=True)

    def from_gist(text: str, **settings: Any) -> str:
        return generate(model, tokenizer, [text], cache=cache, do_sample=False, num_beams=1, **settings)[0]

    def from_text(condition: str) -> Callable[..., str]:
        def answer(text: str, **settings: Any) -> str:
            record = Record(prompt, text, "")
            (found,) = evaluate(
                model, tokenizer, [record], conditions=[condition], with_rouge=False, batch_size=1, **settings
            )
            return found.predictions[0]

        return answer

    ways = {
        "gist": (from_gist, cache.num_bytes),
        "prompt": (from_text("prompt"), prefix_bytes),
        "no-prompt": (from_text("no-prompt"), 0),
    }
    for answer, _ in ways.values():  # The first run of each is slower than those after it.
        answer(inputs[0], max_new_tokens=1)
    found = []
    for text in inputs:
        answers = {}
        for condition, (answer, kept_bytes) in ways.items():
            with _Watch(model) as watch:
                said = answer(text, max_new_tokens=max_new_tokens, streamer=watch)
            answers[condition] = watch.answer(condition, said, kept_bytes)
        found.append(Comparison(text, answers["gist"], answers["prompt"], answers["no-prompt"]))
    return found


def answer_from_gist(
    model: PreTrainedModel, tokenizer: GistTokenizer, text: str, cache: GistCache, *, max_new_tokens: int = 128
) -> Answer:
    """Answer one input from a compressed prompt, greedily, and say what it took.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        text: the input.
        cache: one compressed prompt.
        max_new_tokens: maximum length of the answer.

    Returns:
        The answer, of condition ``"gist"``.

    Raises:
        CacheMismatchError: the cache does not belong to the model.
    """
    with _Watch(model) as watch:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "streamer": watch}
        said = generate(model, tokenizer, [text], cache=cache, do_sample=False, num_beams=1, **settings)[0]
    return watch.answer("gist", said, cache.num_bytes)


class _Watch:
    """A streamer that notes ids and times of one answer, and what was read before it.

    The clock starts when the first ids are embedded: what comes before, such as identifying the model, is not the
    model's work.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.embedding: Any = model.get_input_embeddings()
        self.start: float | None = None
        self.num_read = 0
        self.puts = 0
        self.ids: list[int] = []
        self.first = self.last = 0.0

    def __enter__(self) -> _Watch:
        self.hook = self.embedding.register_forward_pre_hook(self._read)
        return self

    def __exit__(self, *raised: object) -> None:
        self.hook.remove()

    def _read(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.start is None:
            self.start, self.num_read = time.perf_counter(), inputs[0].numel()

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts > 1:  # The first are the ids before the answer.
            self.ids += value.flatten().tolist()
            self.last = time.perf_counter()
            self.first = self.first or self.last

    def end(self) -> None:
        pass

    def answer(self, condition: str, text: str, kept_bytes: int) -> Answer:
        start = self.start or 0.0
        first_ms, total_ms = 1000 * (self.first - start), 1000 * (self.last - start)
        return Answer(condition, text, self.ids, self.num_read, kept_bytes, first_ms, total_ms)


def check_prompt(tokenizer: GistTokenizer, prompt: str, num_prompt_tokens: int | None, name: str) -> None:
    """Raise unless a text can be the one that an entry of a store was compressed from.

    A store keeps no texts, so only the numbers of tokens are compared.

    Args:
        tokenizer: the tokenizer of the model.
        prompt: the text.
        num_prompt_tokens: tokens of the compressed prompt, or None if the store does not know.
        name: the entry's name, for the message.

    Raises:
        GistError: the text has another number of tokens.
    """
    given = tokenizer.encode_prompts([prompt], 1)[0].num_prompt_tokens
    if num_prompt_tokens not in (None, given):
        raise GistError(
            f"{name!r} was compressed from a prompt of {num_prompt_tokens} tokens, the prompt given has {given}; give "
            "the text that was compressed"
        )
