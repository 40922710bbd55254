"""Long prompts in chunks: compressing them in one run equals running them chunk by chunk, reading the cache equals
reading the training sequence, and prompts for which this would not hold are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import gisting
from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.data.collate import GistCollator
from gisting.data.packing import GistPackingCollator
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.generation import compression
from gisting.models.adapters import Adapter, attach, gist_rows
from gisting.models.patch import patch
from gisting.tokens import GistEncoding, GistTokenizer, Template
from gisting.train.finetune import finetune
from tests import tiny
from tests.test_train import arguments

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox"]
few_families = pytest.mark.parametrize("name", FAMILIES)
# Number of prompt ids, and k. In chunks of at most 7 ids, the prompts have 4, 1, 2 and 3 chunks.
ROWS = ((25, 2), (7, 3), (8, 1), (16, 4))
PROMPTS = [tiny.words(count, count) for count, _ in ROWS]
COUNTS = [k for _, k in ROWS]
LENGTH = 7


WORDS = Template("words", "{prompt}", "{input}", "w9", "{output}")  # a prompt has one id per word


def built(
    name: str = "llama", window: int = 64, template: str | Template = "plain", **changes: Any
) -> tuple[PreTrainedModel, GistTokenizer]:
    """Make a patched model whose sliding window, if it has one, has the given width."""
    tokenizer = GistTokenizer(tiny.word_tokenizer(), template)
    return patch(tiny.model(name, **windowed(name, window), **changes), tokenizer), tokenizer


def windowed(name: str, window: int) -> dict[str, int]:
    return {"sliding_window": window} if tiny.DECODERS[name].get("sliding_window") else {}


def layers_of(past: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return ((layer.keys, layer.values) for layer in past.layers)


@torch.no_grad()
def one_by_one(stock: PreTrainedModel, encoding: GistEncoding, gist_token_id: int) -> list[tuple[Tensor, Tensor]]:
    """The states of a prompt's gists when an unpatched model reads chunk after chunk at the positions of the rule, each
    after an ordinary cache of the gists before it.
    """
    k = encoding.gist_spans[0][1] - encoding.gist_start
    held: list[tuple[Tensor, Tensor]] = []
    for number, chunk in enumerate(encoding.chunks):
        past = DynamicCache()
        for layer, (keys, values) in enumerate(held):
            past.update(keys, values, layer)
        ids = torch.tensor([chunk + [gist_token_id] * k])
        position_ids = torch.arange(ids.shape[1])[None] - len(chunk) + number * k
        mask = torch.ones(1, number * k + ids.shape[1], dtype=torch.long)
        stock.base_model(
            ids, attention_mask=mask, position_ids=position_ids, **{cache_argument(): past}, use_cache=True
        )
        keep = [*range(number * k), *range(number * k + len(chunk), number * k + len(chunk) + k)]
        held = [(keys[:, :, keep], values[:, :, keep]) for keys, values in layers_of(past)]
    return held


def error_of(cache: GistCache, row: int, expected: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference between a row's states and the expected ones."""
    found = cache[row]
    pairs = zip([*zip(found.keys, found.values, strict=True)], expected, strict=True)
    return max((a - b).abs().max().item() for have, want in pairs for a, b in zip(have, want, strict=True))


def distance(one: GistCache, other: GistCache) -> float:
    assert one.num_gist_tokens == other.num_gist_tokens
    pairs = zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


# -- states ------------------------------------------------------------------------------------------------------------


@few_families
def test_in_one_run_are_the_states_of_chunk_by_chunk(name: str) -> None:
    """A ragged batch of prompts, with different numbers of chunks and different k."""
    model, tokenizer = built(name)
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS, chunk_length=LENGTH)
    assert cache.num_gist_tokens == [4 * 2, 1 * 3, 2 * 1, 3 * 4]
    stock = tiny.stock_twin(name, model, **windowed(name, 64))
    for row, encoding in enumerate(tokenizer.encode_prompts(PROMPTS, COUNTS, LENGTH)):
        assert error_of(cache, row, one_by_one(stock, encoding, tokenizer.gist_token_id)) < 1e-5


@few_families
def test_a_batch_is_its_rows(name: str) -> None:
    model, tokenizer = built(name)
    wanted = [
        gisting.compress(model, tokenizer, [prompt], k, chunk_length=LENGTH)
        for prompt, k in zip(PROMPTS, COUNTS, strict=True)
    ]
    for batch_size in (2, 32):
        found = gisting.compress(model, tokenizer, PROMPTS, COUNTS, chunk_length=LENGTH, batch_size=batch_size)
        assert distance(found, GistCache.cat(wanted)) < 1e-5
    for tensor in (*found.keys, *found.values):
        assert not tensor[1, :, : 12 - 3].any(), "nothing of a prompt in slots without a token"


@pytest.mark.parametrize("condition", ["gist", "positive", "negative"])
def test_prompts_of_one_chunk_give_the_same_bits_as_without(condition: str) -> None:
    model, tokenizer = built()
    plain = gisting.compress(model, tokenizer, PROMPTS, COUNTS, condition=condition)
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS, condition=condition, chunk_length=25)
    assert cache.num_gist_tokens == plain.num_gist_tokens
    for have, want in zip((*cache.keys, *cache.values), (*plain.keys, *plain.values), strict=True):
        assert torch.equal(have, want)


# -- what is read is what was trained ----------------------------------------------------------------------------------


@few_families
def test_behind_the_cache_are_the_logits_of_the_training_layout(name: str) -> None:
    model, tokenizer = built(name)
    record = Record(PROMPTS[0], tiny.words(3, 50), tiny.words(4, 51))
    batch = GistCollator(tokenizer, 2, chunk_length=LENGTH)([record, Record(PROMPTS[3], "w1", "w2")])
    (encoding,) = tokenizer.encode_batch(
        [record.instruction], [record.input], [record.output], num_gist_tokens=2, chunk_length=LENGTH
    )
    assert batch["input_ids"][0].tolist() == encoding.input_ids
    rest = torch.tensor([encoding.input_ids[encoding.gist_end :]])
    cache = gisting.compress(model, tokenizer, [record.instruction], 2, chunk_length=LENGTH)
    with torch.no_grad():
        trained = model(**batch).logits[:1, encoding.gist_end :]
        used = model(rest, **{cache_argument(): cache.as_past_key_values()}).logits
    torch.testing.assert_close(used, trained, rtol=0, atol=1e-5 * trained.abs().max().item())


@pytest.mark.parametrize("condition", ["gist", "positive", "negative"])
def test_generate_from_prompts_is_generate_from_their_cache(condition: str) -> None:
    model, tokenizer = built()
    inputs = ["w1 w2", "w7", "w3", "w4 w5 w6"]
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS, condition=condition, chunk_length=LENGTH)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    answers = gisting.generate(
        model, tokenizer, inputs, prompts=PROMPTS, num_gist_tokens=COUNTS, condition=condition, chunk_length=LENGTH,
        **settings,
    )  # fmt: skip
    assert answers == gisting.generate(model, tokenizer, inputs, cache=cache, **settings)
    # One prompt for all inputs.
    answers = gisting.generate(
        model, tokenizer, inputs, prompts=PROMPTS[:1], num_gist_tokens=2, condition=condition, chunk_length=LENGTH,
        **settings,
    )  # fmt: skip
    assert answers == gisting.generate(model, tokenizer, inputs, cache=cache[0], **settings)


def test_a_chunked_cache_is_saved_and_chained_like_any(tmp_path: Path) -> None:
    model, tokenizer = built()
    cache = gisting.compress(model, tokenizer, PROMPTS, COUNTS, chunk_length=LENGTH)
    cache.save(tmp_path / "chunks.safetensors")
    assert distance(GistCache.load(tmp_path / "chunks.safetensors"), cache) == 0
    assert GistCache.chain([cache[0], cache[3]]).num_gist_tokens == [8 + 12]


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "k", "chunk_length", "taken"),
    [
        pytest.param(252, 2, 126, None, id="each chunk with its gist takes all"),
        pytest.param(252, 3, 126, 129, id="a chunk with its gist takes one more"),
        pytest.param(400, 8, 25, None, id="all gists take all"),
        pytest.param(401, 8, 25, 136, id="a gist too many"),
    ],
)
def test_positions_of_a_long_prompt(words: int, k: int, chunk_length: int, taken: int | None) -> None:
    """llama has 128 positions; a longer prompt is allowed if no row sees further than that."""
    model, tokenizer = built(template=WORDS)
    if taken is None:
        cache = gisting.compress(model, tokenizer, [tiny.words(words, 1)], k, chunk_length=chunk_length)
        assert cache.num_gist_tokens == [k * -(-words // chunk_length)]
        return
    with pytest.raises(GistError, match=f"^prompt 1 with its gist takes {taken} positions, llama has 128; shorten it"):
        gisting.compress(model, tokenizer, ["w1", tiny.words(words, 1)], k, chunk_length=chunk_length)


def test_the_controls_take_all_positions_of_a_long_prompt() -> None:
    model, tokenizer = built(template=WORDS)
    for condition in ("positive", "negative"):
        with pytest.raises(GistError, match=r"^prompt 0 with its gist takes 136 positions, llama has 128"):
            gisting.compress(model, tokenizer, [tiny.words(132, 1)], 1, condition=condition, chunk_length=33)


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_where_frequencies_depend_on_the_length_all_positions_count(name: str) -> None:
    """Positions count from the first chunk's start to the last gist, whatever the other rows of a batch are."""
    model, tokenizer = built(name, template=WORDS, max_position_embeddings=64)
    long = tiny.words(118, 1)
    batch = gisting.compress(model, tokenizer, [long, "w1 w2"], [2, 60], chunk_length=60)
    assert batch.num_gist_tokens == [4, 60]
    alone = gisting.compress(model, tokenizer, [long], 2, chunk_length=60)
    assert distance(batch[0], alone) < 1e-5
    with pytest.raises(GistError, match=r"^prompt 0 with its gist takes 65 positions, \w+ has 64; shorten it$"):
        gisting.compress(model, tokenizer, [tiny.words(121, 1)], 2, chunk_length=61)


# -- windows -----------------------------------------------------------------------------------------------------------

# Three chunks of 5 ids with a gist of 2: from the first gist to what follows the last there are 2 + 2 * 7 + 1 columns.
REACH = 17


@pytest.mark.parametrize("name", ["mistral-window", "gemma3_text", "cohere2"])
def test_within_a_window_chunks_are_exact(name: str) -> None:
    model, tokenizer = built(name, REACH, WORDS)
    stock = tiny.stock_twin(name, model, sliding_window=REACH)
    (encoding,) = tokenizer.encode_prompts([tiny.words(15, 1)], 2, 5)
    cache = gisting.compress(model, tokenizer, [tiny.words(15, 1), "w1"], 2, chunk_length=5)
    assert error_of(cache, 0, one_by_one(stock, encoding, tokenizer.gist_token_id)) < 1e-5


def test_beyond_a_window_chunks_are_refused_for_they_would_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    window = 10
    model, tokenizer = built("mistral-window", window, WORDS)
    prompt = tiny.words(15, 1)
    with pytest.raises(
        GistError,
        match=r"^prompt 1 has 3 chunks and spans 17 columns from its first gist to what follows its last, more "
        r"than the sliding window of mistral, 10: .*; raise chunk_length so that the prompt is one chunk, or shorten",
    ):
        gisting.compress(model, tokenizer, ["w1", prompt], 2, chunk_length=5)
    # A single chunk may reach any distance, and a control has no hidden chunks.
    assert gisting.compress(model, tokenizer, [prompt], 10, chunk_length=15).num_gist_tokens == [10]
    gisting.compress(model, tokenizer, [prompt], 2, condition="positive", chunk_length=5)

    monkeypatch.setattr(compression, "_check_window", lambda *_: None)
    cache = gisting.compress(model, tokenizer, [prompt], 2, chunk_length=5)
    stock = tiny.stock_twin("mistral-window", model, sliding_window=window)
    (encoding,) = tokenizer.encode_prompts([prompt], 2, 5)
    assert error_of(cache, 0, one_by_one(stock, encoding, tokenizer.gist_token_id)) > 1e-2


def test_a_window_that_is_one_too_small_is_refused() -> None:
    model, tokenizer = built("mistral-window", REACH - 1, WORDS)
    with pytest.raises(GistError, match=r"spans 17 columns .* more than the sliding window of mistral, 16"):
        gisting.compress(model, tokenizer, [tiny.words(15, 1)], 2, chunk_length=5)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_rows_of_an_adapter_are_for_the_places_in_each_gist() -> None:
    """Two rows are enough for any number of chunks with k = 2: each is used at the same place of every gist."""
    model, tokenizer = built(template=WORDS)
    attach(model, Adapter("embeddings", num_rows=2))
    gist_rows(model).copy_(torch.randn(2, 32) * 5)
    prompt = tiny.words(12, 1)
    cache = gisting.compress(model, tokenizer, [prompt], 2, chunk_length=4)
    # The first layer reads the row itself, at any position.
    values = cache.values[0][0].transpose(0, 1)
    assert len(values) == 6
    for place in range(6):
        torch.testing.assert_close(values[place], values[place % 2])
    assert (values[0] - values[1]).abs().max() > 0.1
    with pytest.raises(GistError, match="num_gist_tokens must be at most 2, got 3"):
        gisting.compress(model, tokenizer, [prompt], 3, chunk_length=4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_encoder_decoders_are_refused_wherever_a_length_is_given() -> None:
    model, tokenizer = tiny.patched("t5")
    message = "^chunk_length is 50, but prompts of an encoder-decoder cannot be cut into chunks: its relative distances"
    for call in (
        lambda: gisting.compress(model, tokenizer, ["w1"], chunk_length=50),
        lambda: gisting.generate(model, tokenizer, ["w2"], prompts=["w1"], chunk_length=50),
        lambda: gisting.generate(model, tokenizer, ["w2"], prompts=["w1"], condition="positive", chunk_length=50),
        lambda: tokenizer.encode("w1", chunk_length=50),
        lambda: tokenizer.encode_prompts(["w1"], 1, 50),
        lambda: GistCollator(tokenizer, chunk_length=50),
    ):
        with pytest.raises(GistError, match=message):
            call()


@pytest.mark.parametrize(
    ("chunk_length", "message"),
    [
        (0, "^chunk_length must be at least 1, got 0; give None for a single gist$"),
        (-3, "^chunk_length must be at least 1, got -3"),
        (True, "^chunk_length must be a whole number or None, got True$"),
        (2.0, r"^chunk_length must be a whole number or None, got 2\.0$"),
    ],
)
def test_a_length_that_cannot_be(chunk_length: Any, message: str) -> None:
    model, tokenizer = built()
    for call in (
        lambda: gisting.compress(model, tokenizer, ["w1"], chunk_length=chunk_length),
        lambda: gisting.generate(model, tokenizer, ["w2"], prompts=["w1"], chunk_length=chunk_length),
        lambda: tokenizer.encode_batch(["w1"], [""], chunk_length=chunk_length),
        lambda: GistCollator(tokenizer, chunk_length=chunk_length),
        lambda: GistPackingCollator(tokenizer, chunk_length=chunk_length),
    ):
        with pytest.raises(GistError, match=message):
            call()


def test_a_length_beside_a_cache_is_refused() -> None:
    model, tokenizer = built()
    cache = gisting.compress(model, tokenizer, ["w1"])
    with pytest.raises(GistError, match=r"^chunk_length \(5\) is for prompts, but cache .*; give it to compress$"):
        gisting.generate(model, tokenizer, ["w2"], cache=cache, chunk_length=5)


def test_training_in_chunks_is_refused_beyond_a_sliding_window(tmp_path: Path) -> None:
    """A window counts columns, including those of hidden chunks."""
    model, tokenizer = tiny.patched("mistral-window")
    records = [Record(tiny.words(3, 1), "w1", "w2")]
    settings: dict[str, Any] = {"max_length": tiny.WINDOW + 1, "chunk_length": 4}
    with pytest.raises(GistError, match=r"^max_length must be at most 8, the sliding window of mistral, got 9"):
        finetune(model, tokenizer, records, arguments(tmp_path), **settings)
    finetune(model, tokenizer, records, arguments(tmp_path, max_steps=1), **{**settings, "max_length": tiny.WINDOW})


def test_a_checkpoint_in_chunks_is_evaluated_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library does so when asked, the command line because the checkpoint says so."""
    from typer.testing import CliRunner

    from gisting.cli import app
    from gisting.data.records import save_records
    from gisting.eval.conditions import evaluate
    from gisting.eval.results import Evaluation
    from gisting.models.load import trained_chunk_length

    model, tokenizer = built()
    records = [Record(prompt, "w1 w2", "w3") for prompt in PROMPTS]
    finetune(
        model, tokenizer, records, arguments(tmp_path / "out", max_steps=1), num_gist_tokens=2, chunk_length=LENGTH
    )
    save_records(records, tmp_path / "data.jsonl")
    spans: list[int] = []
    stock = compression.compress_encodings

    def spying(model: Any, tokenizer: Any, encodings: list[GistEncoding], *rest: Any) -> GistCache:
        spans.extend(len(encoding.gist_spans) for encoding in encodings)
        return stock(model, tokenizer, encodings, *rest)

    monkeypatch.setattr("gisting.eval.conditions.compress_encodings", spying)
    settings: dict[str, Any] = {"conditions": ["gist"], "max_new_tokens": 2, "with_rouge": False}
    (result,) = evaluate(model, tokenizer, records, 2, chunk_length=LENGTH, with_perplexity=True, **settings)
    expected = [len(encoding.gist_spans) for encoding in tokenizer.encode_prompts(PROMPTS, 2, LENGTH)]
    assert spans == expected
    assert max(spans) > 1
    (plain,) = evaluate(model, tokenizer, records, 2, with_perplexity=True, **settings)
    assert result.scores["nll"] != plain.scores["nll"]
    assert trained_chunk_length(gisting.load(tmp_path / "out")[0]) == LENGTH
    spans.clear()
    command = ["eval", str(tmp_path / "out"), "--data", str(tmp_path / "data.jsonl"), "--condition", "gist"]
    done = CliRunner().invoke(app, [*command, "--max-new-tokens", "2", "--output", str(tmp_path / "e.json")])
    assert done.exit_code == 0, done.output
    assert spans == expected
    assert Evaluation.load(tmp_path / "e.json").settings["chunk_length"] == LENGTH
