"""Counted costs: against the published tables row by row, against what real models of all families compute and keep,
and through the command.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    EncoderDecoderCache,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

import gisting
from gisting import GistError
from gisting._compat import cache_argument
from gisting.errors import UnsupportedModelError
from gisting.eval import cost
from gisting.eval.cost import FlopCounts, RequestCost, cache_bytes, count_flops, forward_flops, request_costs
from tests import tiny

PUBLISHED: dict[str, PreTrainedConfig] = {
    "llama-7b": LlamaConfig(
        vocab_size=32_001,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
    ),
    "flan-t5-xxl": T5Config(
        vocab_size=32_128,
        d_model=4096,
        d_kv=64,
        d_ff=10_240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
}


def families(*names: str) -> list[Any]:
    """Test parameters: a decoder, one with sliding windows and T5 by default, the other names if slow tests run."""
    default = ("llama", "gemma2", "t5")
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Counted:
    flops = 0


@contextmanager
def counted() -> Iterator[Counted]:
    found = Counted()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        yield found
    found.flops = counter.get_total_flops()


def plain_model(name: str) -> PreTrainedModel:
    """A model whose products are all matrix products of torch: with eager attention and a loop over experts."""
    model = tiny.model(name)
    model.set_attn_implementation("eager")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


def held_bytes(past: Any) -> int:
    """The number of bytes in a cache of transformers."""
    is_pair = isinstance(past, EncoderDecoderCache)
    caches: list[Any] = [past.self_attention_cache, past.cross_attention_cache] if is_pair else [past]
    # generate creates as many layers as the encoder has.
    layers = [layer for cache in caches for layer in cache.layers if layer.is_initialized]
    return sum(state.numel() * state.element_size() for layer in layers for state in (layer.keys, layer.values))


# -- as published ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-7b", pytest.param("flan-t5-xxl", marks=pytest.mark.slow)])
def test_flops_are_the_published_ones(shared: Path, name: str) -> None:
    """Every row of both tables within 0.05 %, from a configuration, and hence the 40 % that gists save on average."""
    with (shared / "data" / f"published_flops_{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    counts = count_flops(PUBLISHED[name])
    found: dict[str, list[int]] = {"standard": [], "gist": []}
    published: dict[str, list[int]] = {"standard": [], "gist": []}
    for row in rows:
        if row["model"] == "standard":
            flops = counts.forward(int(row["num_prompt_tokens"]))
        else:
            flops = counts.forward(int(row["num_input_tokens"]), int(row["effective_num_gist_tokens"]))
        assert flops == pytest.approx(int(row["flops"]), rel=5e-4), row
        found[row["model"]].append(flops)
        published[row["model"]].append(int(row["flops"]))
    assert len(found["standard"]) == len(found["gist"]) == 252
    saved, published_saved = (100 * (1 - sum(of["gist"]) / sum(of["standard"])) for of in (found, published))
    assert round(saved) == round(published_saved) == 40
    assert saved == pytest.approx(published_saved, abs=0.02)


# -- as a model computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families(*tiny.DECODERS))
def test_a_decoder_computes_what_is_counted(name: str) -> None:
    """On both sides of the window of 8, after states that the model computed."""
    model = plain_model(name)
    counts = count_flops(model.config)
    ids = torch.arange(24)[None] + 4
    for num_cached, num_tokens in ((0, 12), (6, 3), (7, 1), (20, 3)):
        with torch.no_grad():
            past = model(ids[:, :num_cached], use_cache=True)[cache_argument()] if num_cached else None
        with counted() as real:
            model(ids[:, num_cached : num_cached + num_tokens], **{cache_argument(): past}, use_cache=True)
        assert counts.forward(num_tokens, num_cached) == real.flops, (num_tokens, num_cached)


@pytest.mark.parametrize("name", families(*tiny.ENCODER_DECODERS))
def test_an_encoder_decoder_computes_what_is_counted(name: str) -> None:
    model = plain_model(name)
    counts = count_flops(model.config)
    start = torch.zeros(1, 1, dtype=torch.long)
    for num_tokens in (1, 2, 13):
        ids = torch.arange(num_tokens)[None] + 4
        with counted() as encoder:
            model.get_encoder()(ids)
        with counted() as whole:
            model(input_ids=ids, decoder_input_ids=start, use_cache=True)
        assert counts.prefill(num_tokens) == encoder.flops
        assert counts.forward(num_tokens) == whole.flops
        # After k cached slots, each row has one more query and value product per slot, in 3 layers of 4 heads of size
        # 8, and the decoder reads k more states.
        with counted() as decoder:
            states = torch.zeros(1, num_tokens + 2, 32)
            model(encoder_outputs=(states,), decoder_input_ids=start, use_cache=True)
        assert counts.forward(num_tokens, 2) == encoder.flops + 2 * 2 * 3 * 4 * 8 * num_tokens * 2 + decoder.flops


@pytest.mark.parametrize("name", families("llama", "mistral-window", "gemma2", "gpt_neox", "qwen3_moe", "t5", "umt5"))
def test_an_answer_costs_and_holds_what_stock_generate_does(name: str) -> None:
    """The first pass and all steps of ``model.generate``, and the bytes of its cache. All steps are computed from a few
    counted passes, so costs must be linear between them, except at a window.
    """
    model: Any = plain_model(name)
    is_encoder_decoder = model.config.is_encoder_decoder
    prompt, rest, answer = 5, 3, 9
    settings = GenerationConfig(
        max_new_tokens=answer,
        min_new_tokens=answer,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        return_dict_in_generate=True,
    )
    rows = request_costs(model.config, prompt, rest, 2, output_tokens=answer, dtype=torch.float32)
    # An unpatched encoder-decoder cannot run the row with a gist cache.
    for row in rows[:1] if is_encoder_decoder else rows:
        ids = torch.arange(row.num_cached_tokens + row.num_new_tokens)[None] + 4
        past = {}
        if row.num_cached_tokens:
            with torch.no_grad():
                past = {cache_argument(): model(ids[:, : row.num_cached_tokens], use_cache=True)[cache_argument()]}
            assert row.prompt_bytes == held_bytes(past[cache_argument()])
        with counted() as real:
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, **past
            )
        assert made.sequences.shape[1] == answer + (1 if is_encoder_decoder else ids.shape[1])
        # generate computes logits at the last token only: 32 numbers by 64 words.
        logits = 0 if is_encoder_decoder else 2 * 32 * 64 * (row.num_new_tokens - 1)
        assert row.answer_flops == real.flops + logits, row.mode
        assert row.batch_bytes == held_bytes(made[cache_argument()]), row.mode


@pytest.mark.parametrize("name", families(*tiny.DECODERS, *tiny.ENCODER_DECODERS))
def test_bytes_are_those_of_a_gist_cache(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    cache = gisting.compress(model, tokenizer, ["w1 w2 w3"], 5)
    assert cache_bytes(model.config, 5) == cache.num_bytes
    assert cache_bytes(model.config, 5, torch.bfloat16) == cache.num_bytes // 2


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "gemma3_text", "llama"])
@pytest.mark.parametrize("length", [6, 7, 8, 20])
def test_a_prefix_cache_drops_what_left_the_window(name: str, length: int) -> None:
    model = tiny.model(name)
    with torch.no_grad():
        past = model(torch.arange(length)[None] + 4, use_cache=True)[cache_argument()]
    assert cache_bytes(model.config, length, is_windowed=True) == held_bytes(past)
    assert cache_bytes(model.config, length) == 2 * 3 * 2 * 8 * length * 4


def test_bytes_by_eye() -> None:
    """LLaMA-7B in bfloat16: 2 x 32 layers x 4096 numbers x 2 bytes. FLAN-T5-XXL: 24 layers, and 4096 hidden numbers."""
    assert cache_bytes(PUBLISHED["llama-7b"], 1, torch.bfloat16) == 2 * 32 * 4096 * 2
    assert cache_bytes(PUBLISHED["flan-t5-xxl"], 3, torch.bfloat16) == 3 * (2 * 24 + 1) * 4096 * 2
    assert cache_bytes(PUBLISHED["llama-7b"], 0) == 0


def test_a_config_is_not_changed() -> None:
    """The config of a bfloat16 checkpoint, one with frequencies that depend on the length, and a patched model's."""
    for config in (
        tiny.model("llama-dynamic").config,
        tiny.patched("gemma2")[0].config,
        AutoConfig.for_model("llama", **tiny._COMMON, dtype="bfloat16"),
    ):
        before, attention = config.to_dict(), config._attn_implementation
        assert count_flops(config).forward(3) > 0
        assert (config.to_dict(), config._attn_implementation) == (before, attention)


# -- properties --------------------------------------------------------------------------------------------------------

COUNTS = {
    "llama": FlopCounts(0, 50_176, 384),
    "gemma2": FlopCounts(0, 50_176, 128, 256, 8),
}
lengths = st.integers(1, 60)


def test_counts_by_eye() -> None:
    """3 layers of 32 hidden numbers, 4 query and 2 key heads of 8, 48 intermediate numbers; 64 words."""
    layer = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    assert COUNTS["llama"] == FlopCounts(0, 3 * layer + 2 * 32 * 64, 3 * 4 * 32)
    for name, counts in COUNTS.items():
        assert count_flops(tiny.model(name).config) == counts


@pytest.mark.parametrize("name", COUNTS)
@given(num_tokens=lengths, num_cached=lengths, num_steps=st.integers(0, 30))
def test_steps_add_up_and_longer_costs_more(name: str, num_tokens: int, num_cached: int, num_steps: int) -> None:
    counts = COUNTS[name]
    assert counts.steps(num_cached, num_steps) == sum(counts.forward(1, num_cached + step) for step in range(num_steps))
    assert counts.forward(num_tokens, num_cached) <= counts.forward(num_tokens, num_cached + 1)
    assert counts.forward(num_tokens, num_cached) < counts.forward(num_tokens + 1, num_cached)
    assert counts.forward(num_tokens, num_cached) < counts.forward(num_tokens + num_cached)


def test_rows_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gemma2", "t5"):
        config = tiny.model(name).config
        counts = count_flops(config)
        with monkeypatch.context() as patched:
            patched.setattr(cost, "count_flops", lambda config, counts=counts: counts)  # once is enough
            check_rows(name, config, counts)


def check_rows(name: str, config: PreTrainedConfig, counts: FlopCounts) -> None:
    rows = {row.mode: row for row in request_costs(config, 40, 6, 2, output_tokens=5, batch_size=3)}
    assert list(rows) == ["no cache", *([] if name == "t5" else ["prefix cache"]), "gist cache"]
    costs = [row.answer_flops for row in rows.values()]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    none, gist = rows["no cache"], rows["gist cache"]
    assert (none.num_cached_tokens, none.num_new_tokens, none.fill_flops, none.prompt_bytes) == (0, 46, 0, 0)
    assert (gist.num_cached_tokens, gist.num_new_tokens) == (2, 6)
    if name == "gemma2":  # Two of three layers hold 7 of 40 tokens: 2 heads of 8, keys and values, 2 bytes.
        assert rows["prefix cache"].prompt_bytes == (7 + 40 + 7) * 2 * 8 * 2 * 2
    assert gist.fill_flops == counts.prefill(42)
    assert gist.first_token_flops == counts.forward(6, 2) == forward_flops(config, 6, 2)
    assert none.prompts_per_gb is None
    assert gist.prompts_per_gb == 10**9 // gist.prompt_bytes
    assert gist.storage_bytes(1000) == 1000 * gist.prompt_bytes
    assert gist.pflops_per_day(10**6) == pytest.approx(gist.answer_flops / 1e9)
    assert gist.saved(none) == pytest.approx(1 - gist.answer_flops / none.answer_flops)
    assert gist.saved_to_first_token(none) == pytest.approx(1 - gist.first_token_flops / none.first_token_flops)
    assert 0 < gist.saved(none) < gist.saved_to_first_token(none)
    # Independent of it: the length of a prompt that is a gist, and one of three requests.
    (*_, other) = request_costs(config, 400, 6, 2)
    assert other.answer_flops == other.first_token_flops == gist.first_token_flops
    assert other.prompt_bytes == gist.prompt_bytes
    (*_, single) = request_costs(config, 400, 6, 2, output_tokens=5)
    assert (3 * single.batch_bytes, single.answer_flops) == (gist.batch_bytes, gist.answer_flops)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    config = tiny.model("llama").config
    with pytest.raises(GistError, match="num_tokens must be a whole number of at least 1, got 0"):
        forward_flops(config, 0)
    with pytest.raises(GistError, match="num_cached must be a whole number of at least 0, got -1"):
        count_flops(config).forward(1, -1)
    with pytest.raises(GistError, match="num_tokens must be a whole number of at least 0, got True"):
        cache_bytes(config, True)
    for name in ("prompt_tokens", "input_tokens", "num_gist_tokens", "output_tokens", "batch_size"):
        with pytest.raises(GistError, match=f"{name} must be a whole number of at least 1, got 0"):
            request_costs(config, **{"prompt_tokens": 1, "input_tokens": 1, name: 0})  # pyright: ignore[reportArgumentType]
    for count in (count_flops, partial(cache_bytes, num_tokens=1)):
        with pytest.raises(UnsupportedModelError, match="mamba cannot be gisted: its config names no attention heads"):
            count(AutoConfig.for_model("mamba"))
    row = RequestCost("gist cache", 1, 1, 1, 1, "float32", 1, 1, 1, 1, 1)
    with pytest.raises(GistError, match=r"num_prompts must be a whole number of at least 0, got 0\.5"):
        row.storage_bytes(0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GistError, match="requests_per_day must be a whole number of at least 0, got -1"):
        row.pflops_per_day(-1)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_gives_a_published_row(run, shared: Path, tmp_path: Path) -> None:
    """The example in its help: row 0 of LLaMA-7B."""
    help_text = " ".join(run("cost", "--help").out.split())
    words = "--prompt-tokens 24 --input-tokens 34 -k 1"
    assert f"Examples: gisting cost huggyllama/llama-7b {words}" in help_text
    PUBLISHED["llama-7b"].save_pretrained(tmp_path)
    done = run("cost", tmp_path / "config.json", *words.split(), "--json")
    assert done.code == 0
    rows = {row["mode"]: row for row in map(json.loads, done.out.splitlines())}
    with (shared / "data" / "published_flops_llama-7b.csv").open(encoding="utf-8") as file:
        standard, gist, *_ = csv.DictReader(file)
    assert (int(standard["num_prompt_tokens"]), int(gist["num_input_tokens"])) == (24 + 34, 34)
    for published, mode in ((standard, "no cache"), (gist, "gist cache")):
        assert rows[mode]["first_token_flops"] == pytest.approx(int(published["flops"]), rel=5e-4)


def test_the_table_and_the_rows(run, tmp_path: Path) -> None:
    config = tiny.model("llama").config
    config.save_pretrained(tmp_path)
    words = ["cost", tmp_path, "--prompt-tokens", "90", "--input-tokens", "6", "-k", "2", "--output-tokens", "5"]
    words += ["--batch-size", "3", "--requests-per-day", "1000000", "--prompts", "2000", "--dtype", "float32"]
    expected = request_costs(config, 90, 6, 2, output_tokens=5, batch_size=3, dtype=torch.float32)
    done = run(*words, "--json")
    assert (done.code, done.err) == (0, "")
    rows = [json.loads(line) for line in done.out.splitlines()]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["model_type"] == "llama"
        assert (row["prompt_tokens"], row["input_tokens"], row["num_gist_tokens"]) == (90, 6, 2)
        assert {key: row[key] for key in vars(wanted)} == vars(wanted)
        assert row["pflops_per_day"] == wanted.pflops_per_day(1_000_000)
        assert row["storage_bytes"] == wanted.storage_bytes(2000)
        assert row["prompts_per_gb"] == wanted.prompts_per_gb
    assert rows[2]["saved"] == {row.mode: expected[2].saved(row) for row in expected[:2]}
    done = run(*words)
    # 384 bytes per token: 90 of the prompt, 2 of the gist; 6 + 4 more for each of three requests.
    lines = {tuple(line.replace("│", "|").split("|")[1].split()): line for line in done.out.splitlines() if "│" in line}
    for label, cells in (
        ("cached tokens", ["0", "90", "2"]),
        ("new tokens", ["96", "6", "6"]),
        ("kept per prompt", ["-", "34.56 kB", "768 B"]),
        ("prompts per GB", ["-", "28,935", "1,302,083"]),
        ("kept for 2,000 prompts", ["-", "69.12 MB", "1.54 MB"]),
        ("in use, 3 at once", ["115.20 kB", "115.20 kB", "13.82 kB"]),
        ("PFLOPs for 1,000,000 requests", [f"{row.answer_flops / 1e9:.5g}" for row in expected]),
        ("GFLOPs to the first token", [f"{row.first_token_flops / 1e9:.5g}" for row in expected]),
    ):
        assert [cell.strip() for cell in lines[tuple(label.split())].split("│")[2:-1]] == cells
    share = f"{100 * expected[2].saved_to_first_token(expected[0]):.1f} % compared with no cache"
    assert share in " ".join(done.out.split())


def test_an_encoder_decoder_has_no_prefix_cache(run, tmp_path: Path) -> None:
    tiny.model("t5").config.save_pretrained(tmp_path)
    done = run("cost", tmp_path, "--prompt-tokens", "9", "--input-tokens", "6")
    assert done.code == 0
    assert "prefix cache" not in done.out.splitlines()[1]
    assert "No prefix cache: an encoder reads in both directions" in " ".join(done.out.split())


def test_an_adapter_costs_what_its_base_does(run, tmp_path: Path) -> None:
    tiny.model("llama").config.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    about = {"format": 1, "base": str(tmp_path / "base")}
    (tmp_path / "adapter" / "gist_adapter.json").write_text(json.dumps(about), encoding="utf-8")
    base, adapter = (
        run("cost", tmp_path / name, "--prompt-tokens", "9", "--input-tokens", "6").out for name in ("base", "adapter")
    )
    assert base == adapter != ""


def test_what_the_command_refuses(run, tmp_path: Path) -> None:
    lengths = ("--prompt-tokens", "9", "--input-tokens", "6")
    done = run("cost", tmp_path, *lengths)
    assert done.code == 1
    assert done.err.startswith(f"error: {tmp_path} has no configuration that transformers can read; give a config.json")
    AutoConfig.for_model("mamba").save_pretrained(tmp_path)
    done = run("cost", tmp_path, *lengths)
    assert (done.code, done.out) == (1, "")
    assert "mamba cannot be gisted" in done.err
    tiny.model("llama").config.save_pretrained(tmp_path)
    done = run("cost", tmp_path, *lengths, "--dtype", "int3")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: dtype must be one of float32, bfloat16, float16, got 'int3'\n"
    done = run("cost", tmp_path, "--prompt-tokens", "120", "--input-tokens", "6", "--output-tokens", "3")
    assert done.code == 0
    assert done.err == "note: prompt, input and answer have 129 tokens, but the model has only 128 positions\n"
