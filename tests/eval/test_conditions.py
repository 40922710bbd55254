"""Conditions of an evaluation: baselines without gist tokens, losses of references and several k, compared with stock
models and with one record at a time.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig

import gisting
from gisting import GistError, GistTokenizer, Record
from gisting.eval import conditions
from gisting.eval.conditions import EVAL_CONDITIONS, METRICS, ConditionResult, evaluate
from tests import tiny


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def records(count: int = 4) -> list[Record]:
    return [
        Record(tiny.words(3 + n, n), tiny.words(1 + n % 3, 40 + n), tiny.words(1 + n % 4, 70 + n)) for n in range(count)
    ]


def run(name: str, counts: int | list[int] = 2, **settings) -> list[ConditionResult]:
    model, tokenizer = tiny.patched(name)
    settings = {"conditions": EVAL_CONDITIONS, "max_new_tokens": 4, "with_rouge": False, **settings}
    return evaluate(model, tokenizer, records(), counts, **settings)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", *slow("qwen2-window", "gpt_neox", "umt5")])
def test_batches_change_nothing(name: str) -> None:
    """Padding on either side is invisible; float32 sums may differ in their last bits."""
    together = run(name, batch_size=3, with_perplexity=True)
    for one, alone in zip(together, run(name, batch_size=1, with_perplexity=True), strict=True):
        assert one.predictions == alone.predictions
        assert one.scores["nll"] == pytest.approx(alone.scores["nll"], rel=1e-4)
        assert one.scores["nll_tokens"] == [1.0 + 1 + n % 4 for n in range(4)]  # the words, and the end


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "t5"])
@pytest.mark.parametrize(("condition", "num_words"), [("truncated", 2), ("no-prompt", 0), ("prompt", None)])
def test_a_baseline_is_what_a_stock_model_does(name: str, condition: str, num_words: int | None) -> None:
    """Answers and losses equal those of an unpatched model that is given the baseline's text."""
    model, tokenizer = tiny.patched(name)
    stock: Any = tiny.stock_twin(name, model)
    (found,) = evaluate(
        model,
        tokenizer,
        records(),
        2,
        conditions=[condition],
        max_new_tokens=4,
        with_rouge=False,
        with_perplexity=True,
    )
    words: Any = tokenizer.tokenizer
    for number, record in enumerate(records()):
        text = " ".join([*record.instruction.split()[:num_words], record.input])
        ids = torch.tensor([words(text)["input_ids"]])
        target = torch.tensor([[*words(record.output)["input_ids"], tokenizer.eos_token_id]])
        said = stock.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=4,
            do_sample=False,
            suppress_tokens=[tokenizer.gist_token_id],
        )[0].tolist()
        said = said if name == "t5" else said[ids.shape[1] :]
        assert found.predictions[number] == tokenizer.decode(said).strip()
        with torch.no_grad():
            if name == "t5":
                loss = stock(input_ids=ids, labels=target).loss
            else:
                whole = torch.cat([ids, target], dim=1)
                labels = torch.cat([torch.full_like(ids, -100), target], dim=1)
                loss = stock(input_ids=whole, labels=labels).loss
        assert found.scores["nll"][number] == pytest.approx(loss.item() * target.shape[1], rel=1e-4)


def test_every_baseline_starts_with_the_start_ids() -> None:
    """The start ids occur once; the template's words before the prompt only with the whole prompt."""
    from tokenizers.processors import TemplateProcessing

    inner = tiny.word_tokenizer(("Instruction:", "Input:", "Output:"))
    inner.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = GistTokenizer(inner, "alpaca")
    model = gisting.patch(tiny.model("llama", vocab_size=70), tokenizer)
    given: list[str] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(tokenizer.decode(kwargs["input_ids"][0], skip_special_tokens=False)),
        with_kwargs=True,
    )
    for condition, start in (
        ("truncated", "<s> w1 w2"),
        ("no-prompt", "<s>"),
        ("prompt", "<s> Instruction: w1 w2 w3"),
    ):
        given.clear()
        one = [Record("w1 w2 w3", "w4", "w5")]
        evaluate(model, tokenizer, one, 2, conditions=[condition], max_new_tokens=1, with_rouge=False)
        assert given == [f"{start} Input: w4 Output:"]


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("condition", ["gist", "positive", "negative", "swapped"])
def test_the_loss_is_that_of_the_cached_run(name: str, condition: str) -> None:
    """Teacher forcing over the whole text agrees with answers from caches: as a reference, the greedy answer is more
    likely than another text.
    """
    model, tokenizer = tiny.patched(name)
    asked = records()
    settings = {"conditions": [condition], "with_rouge": False}
    (said,) = evaluate(model, tokenizer, asked, 2, max_new_tokens=3, **settings)
    own = [Record(a.instruction, a.input, text) for a, text in zip(asked, said.predictions, strict=True)]
    (found,) = evaluate(model, tokenizer, own, 2, max_new_tokens=3, with_perplexity=True, **settings)
    assert found.exact_match == 1.0
    other = [Record(a.instruction, a.input, tiny.words(3, 99)) for a in asked]
    (worse,) = evaluate(model, tokenizer, other, 2, max_new_tokens=3, with_perplexity=True, **settings)
    assert found.interval("perplexity").value < worse.interval("perplexity").value


def test_the_loss_of_a_gist_is_that_of_the_collator() -> None:
    """The mean over all tokens is the loss that training minimises."""
    from gisting.data.collate import GistCollator

    model, tokenizer = tiny.patched("llama")
    (found,) = evaluate(
        model, tokenizer, records(), 2, conditions=["gist"], max_new_tokens=1, with_rouge=False, with_perplexity=True
    )
    with torch.no_grad():
        loss = model(**GistCollator(tokenizer, 2)(records())).loss.item()
    assert math.log(found.interval("perplexity").value) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_swapped_is_the_gist_of_the_next_other_instruction(name: str) -> None:
    """Repeated instructions are skipped; the last ones take the first."""
    model, tokenizer = tiny.patched(name)
    texts = ["w1 w2 w3", "w1 w2 w3", "w4 w5", "w6", "w1 w2 w3"]
    others = ["w4 w5", "w4 w5", "w6", "w1 w2 w3", "w4 w5"]
    asked = [Record(text, tiny.words(2, 40 + n), tiny.words(2, 70 + n)) for n, text in enumerate(texts)]
    settings: dict[str, Any] = {"max_new_tokens": 4, "with_rouge": False, "with_perplexity": True}
    (found,) = evaluate(model, tokenizer, asked, 2, conditions=["swapped"], batch_size=2, **settings)
    moved = [Record(text, one.input, one.output) for text, one in zip(others, asked, strict=True)]
    (wanted,) = evaluate(model, tokenizer, moved, 2, conditions=["gist"], batch_size=2, **settings)
    assert found.predictions == wanted.predictions
    assert found.scores["nll"] == wanted.scores["nll"]
    inputs = [one.input for one in asked]
    assert found.predictions == gisting.generate(
        model, tokenizer, inputs, prompts=others, num_gist_tokens=2, max_new_tokens=4, do_sample=False
    )


def test_gist_and_swapped_share_what_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.patched("llama")
    compressed: list[int] = []
    inner = conditions.compress_encodings
    monkeypatch.setattr(conditions, "compress_encodings", lambda *args: compressed.append(len(args[2])) or inner(*args))
    evaluate(model, tokenizer, records(4), 2, conditions=["gist", "swapped"], max_new_tokens=1, with_rouge=False)
    assert compressed == [4]


def test_one_instruction_cannot_be_swapped() -> None:
    model, tokenizer = tiny.patched("llama")
    same = [Record("w1", f"w{n}", "w3") for n in range(3)]
    for asked in (same, same[:1]):
        with pytest.raises(GistError, match=f"all {len(asked)} records have the same; leave it out, or use"):
            evaluate(model, tokenizer, asked, 1, conditions=["gist", "swapped"], with_rouge=False)
    assert conditions.default_conditions(same) == ("gist", "positive", "prompt", "negative")
    assert conditions.default_conditions(records()) == conditions.DEFAULT_CONDITIONS
    assert "swapped" not in conditions.default_conditions(records(), same)


class _Reads(TorchFunctionMode):
    """Counts reads from tensors, each of which would wait for an accelerator."""

    names = ("item", "tolist", "__int__", "__float__", "__bool__", "__index__")

    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("condition", ["gist", "prompt"])
def test_losses_are_read_once_a_batch(name: str, condition: str) -> None:
    model, tokenizer = tiny.patched(name)
    run = conditions._Run(model, tokenizer, condition, 2, None, conditions._Gists(model, tokenizer, 2, None))
    counts = []
    for some in (records(2), records(7)):
        with _Reads() as reads:
            run.losses(some)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_every_k_is_what_it_is_alone(name: str) -> None:
    """This includes negative, no-prompt and prompt, which are run once for all k."""
    done: list[int] = []
    both = run(name, [1, 3], with_perplexity=True, progress=done.append)
    assert [(one.num_gist_tokens, one.condition) for one in both] == [(k, c) for k in (1, 3) for c in EVAL_CONDITIONS]
    assert sum(done) == 4 * len(EVAL_CONDITIONS) * 2
    alone = [*run(name, 1, with_perplexity=True), *run(name, 3, with_perplexity=True)]
    for one, other in zip(both, alone, strict=True):
        assert one.predictions == other.predictions
        assert one.scores["nll"] == pytest.approx(other.scores["nll"], rel=1e-5)
    assert both[0].scores["nll"] != both[len(EVAL_CONDITIONS)].scores["nll"]


def test_the_caller_keeps_its_random_numbers() -> None:
    """An evaluation during training takes no numbers from the training's random stream."""
    model, tokenizer = tiny.patched("llama")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    settings = {"conditions": EVAL_CONDITIONS, "max_new_tokens": 2, "with_rouge": False, "with_perplexity": True}
    evaluate(model, tokenizer, records(), **settings)
    assert torch.equal(torch.rand(1), expected)


def test_an_encoder_without_input_reads_the_end() -> None:
    model, tokenizer = tiny.patched("t5")
    asked = [Record("w1 w2", "", "w3"), Record("w4", "w5 w6", "w6")]
    (found,) = evaluate(
        model, tokenizer, asked, conditions=["no-prompt"], max_new_tokens=3, with_rouge=False, with_perplexity=True
    )
    words: Any = tokenizer.tokenizer
    with torch.no_grad():
        target = torch.tensor([[*words("w3")["input_ids"], tokenizer.eos_token_id]])
        loss = tiny.stock_twin("t5", model)(input_ids=torch.tensor([[tokenizer.eos_token_id]]), labels=target).loss
    assert found.scores["nll"][0] == pytest.approx(2 * loss.item(), rel=1e-4)


@pytest.mark.parametrize("condition", ["gist", "no-prompt"])
def test_no_answer_holds_a_gist_token(condition: str) -> None:
    """Not even with a ``generation_config`` that suppresses another token."""
    model, tokenizer = tiny.patched("llama")

    def prefer(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([tokenizer.gist_token_id]), 1e4)

    head: Any = model.get_output_embeddings()
    head.register_forward_hook(prefer)
    (found,) = evaluate(
        model,
        tokenizer,
        records(),
        conditions=[condition],
        max_new_tokens=3,
        with_rouge=False,
        generation_config=GenerationConfig(eos_token_id=2, pad_token_id=0, suppress_tokens=[5]),
    )
    assert [len(text.split()) for text in found.predictions] == [3] * 4


def test_metrics_by_hand() -> None:
    scores = {
        "exact_match": [1.0, 0.0],
        "tokens": [2.0, 6.0],
        "reference_tokens": [4.0, 4.0],
        "characters": [1.0, 2.0],
        "reference_characters": [3.0, 3.0],
        "nll": [2.0, 12.0],
        "nll_tokens": [1.0, 3.0],
    }
    result = ConditionResult("gist", 1, ["a", "b"], scores)
    expected = {
        "exact_match": 0.5,
        "perplexity": math.exp(14 / 4),
        "record_perplexity": math.exp((2 + 4) / 2),
        "tokens": 4.0,
        "tokens_ratio": 1.0,
        "characters": 1.5,
        "characters_ratio": 0.5,
    }
    assert result.summary() == {
        "condition": "gist",
        "num_gist_tokens": 1,
        "num_records": 2,
        **{name: pytest.approx(value) for name, value in expected.items()},
    }
    assert result.metrics == [name for name in METRICS if name in expected]
    assert result.rouge_l is None
    found = result.interval("exact_match")
    assert (found.low, found.high) == (0.0, 1.0)
    with pytest.raises(GistError, match=r"metric must be one of those scored \(exact_match, .*\), got 'rouge_l'"):
        result.interval("rouge_l")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conditions": ["gits"]},
            "condition must be one of gist, positive, negative, swapped, truncated, no-prompt, prompt, got 'gits'",
        ),
        ({"conditions": []}, "no-prompt, prompt, got 'none'"),
        ({"counts": 0}, r"num_gist_tokens must be a number of at least 1, or several different ones, got \[0\]"),
        ({"counts": [1, 1]}, r"got \[1, 1\]"),
        ({"counts": []}, r"got \[\]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    with pytest.raises(GistError, match=message):
        run("llama", **changes)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_without_an_instruction_the_prompt_is_the_bare_query(name: str) -> None:
    """Compares answers and losses; a batch may contain both kinds of record."""
    model, tokenizer = tiny.patched(name)
    asked = [
        Record("" if n % 2 else record.instruction, record.input, record.output) for n, record in enumerate(records())
    ]
    settings: dict[str, Any] = {"max_new_tokens": 4, "with_rouge": False, "with_perplexity": True}
    shown, bare = evaluate(model, tokenizer, asked, conditions=["prompt", "no-prompt"], **settings)
    same = [a == pytest.approx(b, rel=1e-4) for a, b in zip(shown.scores["nll"], bare.scores["nll"], strict=True)]
    assert same == [bool(n % 2) for n in range(4)]
    assert shown.predictions[1::2] == bare.predictions[1::2]


def test_nothing_to_continue() -> None:
    model, tokenizer = tiny.patched("llama")
    with pytest.raises(GistError, match="condition 'no-prompt' leaves no text for the model to continue in a record"):
        evaluate(model, tokenizer, [Record("w1", "", "w2")], conditions=["no-prompt"], with_rouge=False)
