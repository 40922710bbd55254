"""Divergences of answers from those of the full prompt, compared with stock models, one answer at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

import gisting
from gisting import GistError
from gisting.errors import CacheMismatchError
from gisting.eval import divergence
from gisting.eval.divergence import (
    Divergence,
    FirstTokens,
    Source,
    Teacher,
    ask_teacher,
    is_loop,
    measure_divergence,
)
from gisting.eval.kl import kl_from, kl_loss, likeliest, truncated_kl
from gisting.generation.compression import full_prompt_cache
from gisting.generation.sampling import SampledAnswer
from tests import tiny

PROMPT = tiny.words(9, 1)
FAMILIES = ["llama", "qwen2-window", "t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "umt5"))]
WHOLE = 1000  # more tokens than the vocabulary has, so that the divergence is the whole one


def answers(count: int = 5) -> list[SampledAnswer]:
    """Answers of 1 to 3 words, which end with the end of sequence, to inputs of 1 to 4 words."""
    found = []
    for number in range(count):
        text = tiny.words(1 + number % 3, 70 + number)
        ids: Any = tiny.word_tokenizer()(text)["input_ids"]
        found.append(SampledAnswer(PROMPT, tiny.words(1 + number % 4, 40 + number), text, [*ids, 2]))
    return found


def stock_logits(name: str, stock: Any, text: str, answer: SampledAnswer) -> torch.Tensor:
    """What an unpatched model says at the tokens of one answer after ``text``."""
    words: Any = tiny.word_tokenizer()
    before = words(text)["input_ids"]
    with torch.no_grad():
        if name in tiny.ENCODER_DECODERS:
            return stock(torch.tensor([before]), labels=torch.tensor([answer.token_ids])).logits[0]
        return stock(torch.tensor([before + answer.token_ids])).logits[0, len(before) - 1 : -1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("source", [None, FirstTokens(3)], ids=["no prompt", "first tokens"])
def test_equals_that_of_a_stock_model_on_the_same_texts(name: str, source: Source) -> None:
    """The tokens of every answer, in batches by length, against one text at a time."""
    model, tokenizer = tiny.patched(name)
    stock = tiny.stock_twin(name, model)
    teacher = ask_teacher(model, tokenizer, answers(), top_k=WHOLE, batch_size=2)
    found = measure_divergence(model, tokenizer, teacher, source, batch_size=3)
    shown = "" if source is None else " ".join(PROMPT.split()[:3])
    for number, answer in enumerate(answers()):
        full = stock_logits(name, stock, f"{PROMPT} {answer.input}", answer)
        less = stock_logits(name, stock, f"{shown} {answer.input}", answer)
        expected = kl_div(less.log_softmax(-1), full.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        agrees = (full.argmax(-1) == less.argmax(-1)).tolist()
        assert found.kl[number] == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-5)
        assert found.kl[number] > 1e-3  # the control differs
        assert found.agreement[number] == pytest.approx(sum(agrees) / len(agrees))
        assert found.parts_at[number] == (agrees.index(False) if False in agrees else None)
    assert found.num_tokens == [2, 3, 4, 2, 3]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gist_is_read_as_generation_reads_it(name: str) -> None:
    """Greedy answers from the gist have its own first choice at every token; another gist has not."""
    model, tokenizer = tiny.patched(name)
    inputs = [answer.input for answer in answers()]
    cache = gisting.compress(model, tokenizer, [PROMPT, tiny.words(8, 5)], 3)
    texts = gisting.generate(model, tokenizer, inputs, cache=cache[0], max_new_tokens=5)
    said: Any = [tiny.word_tokenizer()(text)["input_ids"] for text in texts]
    pairs = zip(inputs, said, strict=True)
    given = [SampledAnswer(PROMPT, input, "", ids) for input, ids in pairs if ids]
    assert given
    own = [torch.nn.functional.one_hot(torch.tensor(answer.token_ids), len(tokenizer)) * 50.0 for answer in given]
    teacher = Teacher(PROMPT, given, [likeliest(logits, 4) for logits in own])
    assert measure_divergence(model, tokenizer, teacher, cache[0]).mean_agreement == 1
    assert measure_divergence(model, tokenizer, teacher, cache[1]).mean_agreement < 1


def test_the_full_prompt_has_no_divergence() -> None:
    """Under the condition positive a cache has the prompt's own states, with the gist's after them."""
    model, tokenizer = tiny.patched("llama")
    teacher = ask_teacher(model, tokenizer, answers())
    prompt = full_prompt_cache(model, tokenizer, PROMPT, gisting.compress(model, tokenizer, [PROMPT], 1).origin)
    found = measure_divergence(model, tokenizer, teacher, prompt)
    assert max(found.kl) < 1e-5
    assert found.share_identical == found.mean_agreement == 1
    assert found.parts_at == [None] * 5
    none = measure_divergence(model, tokenizer, teacher, None)
    assert found.kept(none) == pytest.approx(1, abs=1e-3)
    assert none.kept(none) == 0


def test_ties_are_not_disagreements(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits many logits are equal, and topk and argmax take different ones of them for the first."""
    runs = divergence._runs

    def tied(*arguments: Any) -> Any:
        yield from ((rows, logits.mul(2).round().bfloat16()) for rows, logits in runs(*arguments))

    monkeypatch.setattr(divergence, "_runs", tied)
    model, tokenizer = tiny.patched("llama")
    teacher = ask_teacher(model, tokenizer, answers(60))
    tops = torch.cat([one.log_probs for one in teacher.likeliest])
    assert (tops[:, 0] == tops[:, 1]).sum() > 20
    prompt = full_prompt_cache(model, tokenizer, PROMPT, gisting.compress(model, tokenizer, [PROMPT], 1).origin)
    found = measure_divergence(model, tokenizer, teacher, prompt)
    assert found.mean_agreement == found.share_identical == 1
    assert measure_divergence(model, tokenizer, teacher, None).mean_agreement < 1


def test_the_teacher_survives_a_file(tmp_path: Path) -> None:
    model, tokenizer = tiny.patched("llama")
    teacher = ask_teacher(model, tokenizer, answers(), top_k=4)
    teacher.save(tmp_path / "teacher.safetensors")
    again = Teacher.load(tmp_path / "teacher.safetensors", answers())
    before = measure_divergence(model, tokenizer, teacher, None)
    assert measure_divergence(model, tokenizer, again, None) == before
    other = [dataclasses.replace(answers()[0], input="w1"), *answers()[1:]]
    with pytest.raises(GistError, match="is about other answers; remove it"):
        Teacher.load(tmp_path / "teacher.safetensors", other)
    (tmp_path / "teacher.safetensors").write_bytes(b"torn")
    with pytest.raises(GistError, match="cannot be read"):
        Teacher.load(tmp_path / "teacher.safetensors", answers())


def test_kept_tokens_give_what_all_logits_give() -> None:
    """A stored teacher compares like the whole logits."""
    student, teacher = torch.randn(2, 7, 50) * 3
    assert torch.equal(kl_from(student, likeliest(teacher, 5)), truncated_kl(student, teacher, 5))


@pytest.mark.parametrize("top_k", [1, 5, 49, 50])
def test_the_training_loss_is_the_same_with_the_same_gradient(top_k: int) -> None:
    student = (torch.randn(7, 50) * 3).requires_grad_()
    teacher = likeliest(torch.randn(7, 50) * 3, top_k)
    weights = torch.rand(7)
    expected, found = kl_from(student, teacher), kl_loss(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted, given = (torch.autograd.grad((one * weights).sum(), student)[0] for one in (expected, found))
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-6)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3] * 4, True),
        ([9, 8, *[1, 2, 3] * 4, 1], True),
        ([7] * 12, True),
        ([7] * 11, False),
        ([*[1, 2] * 6, 5], True),  # cut off by the end of sequence
        ([*[1, 2] * 6, 5, 6], False),
        ([1, 2, 3, 4, 5, 6] * 2, False),
        (list(range(40)), False),
        ([5], False),
    ],
)
def test_loops(ids: list[int], expected: bool) -> None:
    assert is_loop(ids) is expected


def test_figures_by_eye() -> None:
    """A loop carries the mean; median and quartiles are those of the others."""
    found = Divergence(
        [0.1, 0.2, 0.3, 4.0, 0.2], [1, 0.5, 0, 1, 1], [None, 1, 0, None, None], [2] * 5, [False] * 3 + [True, False]
    )
    assert found.median == 0.2
    assert found.quartiles == (0.2, 0.3)
    assert found.mean == pytest.approx(0.96)
    assert found.mean_without_loops == pytest.approx(0.2)
    assert found.mean_agreement == pytest.approx(0.7)
    assert found.share_identical == pytest.approx(0.6)
    assert found.summary()["num_loops"] == 1


def test_bad_input_is_refused() -> None:
    model, tokenizer = tiny.patched("llama")
    teacher = ask_teacher(model, tokenizer, answers())
    with pytest.raises(GistError, match="answers is empty"):
        ask_teacher(model, tokenizer, [])
    with pytest.raises(GistError, match="answers must have one prompt, got 2"):
        ask_teacher(model, tokenizer, [*answers(), SampledAnswer("w1", "w2", "w3", [7])])
    with pytest.raises(GistError, match="num_tokens must be less than the prompt's 9 tokens, got 9"):
        measure_divergence(model, tokenizer, teacher, FirstTokens(9))
    caches = gisting.compress(model, tokenizer, [PROMPT, "w1 w2"], 2)
    with pytest.raises(GistError, match="source must hold one prompt, got 2"):
        measure_divergence(model, tokenizer, teacher, caches)
    negative = gisting.compress(model, tokenizer, [PROMPT], 2, condition="negative")
    with pytest.raises(GistError, match="got a cache of no prompt"):
        measure_divergence(model, tokenizer, teacher, negative)
    other, others_tokenizer = tiny.patched("llama", "alpaca")
    wrong = gisting.compress(other, others_tokenizer, [PROMPT], 2)
    with pytest.raises(CacheMismatchError, match="template"):
        measure_divergence(model, tokenizer, teacher, wrong)
    long = SampledAnswer(PROMPT, tiny.words(100, 3), "", [5] * 30)
    with pytest.raises(GistError, match="input 0 with what comes before it and its answer takes 139 positions"):
        ask_teacher(model, tokenizer, [long])
