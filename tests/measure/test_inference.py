"""Requests that share one prompt, in four ways: rows, their gate, what is left out, memory, the command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import gisting
from gisting import GistError, GistTokenizer
from gisting.measure import inference, inference_results, memory
from gisting.measure.inference import GIST, MODES, NO_CACHE, PREFIX, STATIC, measure
from gisting.measure.latency import cache_view
from gisting.measure.models import random_llama
from gisting.measure.rows import read_rows
from tests import tiny
from tests.memory import held_mb, requires_peak

ROOT = Path(__file__).resolve().parents[2]
PER_TOKEN = 3 * 2 * 2 * 8 * 4  # layers, keys and values, key heads, head size, bytes


def measured(name: str = "llama", **changes: Any) -> dict[tuple[int, int, str], Any]:
    settings: dict[str, Any] = {
        "lengths": [20],
        "batches": [1, 3],
        "num_gist_tokens": 2,
        "input_tokens": 4,
        "answer_tokens": 5,
    }
    settings |= {"repeats": 3, **changes}
    cells = measure(*tiny.patched(name), **settings)
    return {(row.prompt_tokens, row.batch_size, row.mode): row for cell in cells for row in cell}


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_say_what_was_kept_and_how_long_it_took() -> None:
    rows = measured(lengths=[7, 20])
    assert list(rows) == [(length, batch, mode) for length in (7, 20) for batch in (1, 3) for mode in MODES]
    for (length, batch, mode), row in rows.items():
        whole = batch * (length + 4 + 5 - 1)
        kept, front = {NO_CACHE: (0, length), PREFIX: (length,) * 2, STATIC: (whole, length), GIST: (2, 2)}[mode]
        assert row.cache_bytes == kept * PER_TOKEN
        assert row.held_bytes == batch * (front + 4 + 5 - 1) * PER_TOKEN
        assert row.first_token_ms_low <= row.first_token_ms <= row.first_token_ms_high
        assert row.tokens_per_s_low <= row.tokens_per_s <= row.tokens_per_s_high
        assert (row.num_first_token_repeats, row.num_answer_repeats, row.not_run) == (3, 3, None)
        assert row.peak_bytes > row.held_bytes
        if mode in (NO_CACHE, STATIC):
            assert row.copied_first_token_ms is None
        else:
            assert row.copied_first_token_ms_low <= row.copied_first_token_ms <= row.copied_first_token_ms_high
    assert rows[20, 3, PREFIX].peak_bytes > rows[20, 3, GIST].peak_bytes + 3 * 18 * PER_TOKEN


def test_the_model_is_left_as_it_was() -> None:
    model, tokenizer = tiny.patched("llama")
    model.train()
    list(measure(model, tokenizer, lengths=[5], batches=[1], answer_tokens=1, repeats=1))
    assert model.training
    assert not torch.is_inference_mode_enabled()


def test_a_prompt_longer_than_the_window() -> None:
    rows = measured("mistral-window", batches=[2], answer_tokens=12)
    row = rows[20, 2, PREFIX]
    assert (row.cache_bytes, row.not_run) == ((tiny.WINDOW - 1) * PER_TOKEN, None)
    row = rows[20, 2, STATIC]
    assert (row.not_run, row.tokens_per_s) == ("a static cache with a sliding window cannot be rewound", None)


def test_slow_runs_are_few_and_spread_and_each_round_begins_with_another() -> None:
    ran: list[str] = []
    runs = {mode: partial(ran.append, mode) for mode in (NO_CACHE, PREFIX, GIST)}
    bench = inference._Bench(*tiny.patched("llama"), inference._Settings(4, 4, 4, 6, 12.0, 60.0, 10**9, ""))
    cell = inference._Cell.__new__(inference._Cell)
    cell.bench = bench
    times = cell._alternating(runs, {NO_CACHE: 100.0, PREFIX: 4.0, GIST: 0.1})
    assert {mode: len(found) for mode, found in times.items()} == {NO_CACHE: 3, PREFIX: 5, GIST: 6}
    n, p, _, g = MODES
    assert sorted(ran) == sorted([n] * 3 + [p] * 5 + [g] * 6)
    assert ran[-3:] == [g, n, p], "the last round is the one in which all run"
    assert n in ran[:6]
    assert n in ran[6:]


# -- the gate ----------------------------------------------------------------------------------------------------------


def shifted(found: Any) -> Any:
    for layer in found.layers:
        layer.keys = layer.keys + 0.1
    return found


def test_no_time_for_a_gist_that_is_not_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inference.prefix_states

    def wrong(*args: Any) -> Any:
        cache = real(*args)
        return cache._map(lambda tensor, dim: tensor + 0.1, cache.lengths)

    monkeypatch.setattr(inference, "prefix_states", wrong)
    with pytest.raises(GistError, match=r"^gist cache differs from its uncached run by .*; no time is reported"):
        measured()


def test_no_time_for_a_prefix_that_is_not_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "cache_view", lambda kept, rows: shifted(cache_view(kept, rows)))
    with pytest.raises(GistError, match=r"^prefix cache differs from its uncached run by"):
        measured()


def test_no_time_for_a_static_cache_that_is_not_rewound(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inference._Cell.past

    def never_back(self: Any, mode: str) -> Any:
        return self.static if mode == STATIC and self.static is not None else real(self, mode)

    monkeypatch.setattr(inference._Cell, "past", never_back)
    with pytest.raises(GistError, match=r"^static prefix cache, request 0 of 1 differs from its uncached run by"):
        measured()


def test_no_time_where_requests_of_a_batch_are_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inference._Cell.first_logits
    monkeypatch.setattr(inference._Cell, "first_logits", lambda self, mode: real(self, mode).roll(1, 0))
    with pytest.raises(GistError, match=r"^prefix cache, request 0 of 3 differs"):
        measured(batches=[3])


def test_no_time_where_another_token_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inference._Cell.answers

    def wrong(self: Any, mode: str, num_tokens: int, **more: Any) -> Any:
        found = real(self, mode, num_tokens, **more)
        if more:
            found.sequences[0, -1] = 5
            # The last of the chosen tokens changes no logits that are compared.
        return found

    monkeypatch.setattr(inference._Cell, "answers", wrong)
    with pytest.raises(GistError, match=r"^prefix cache, the logits of its greedy tokens, differs"):
        measured()


# -- what is left out --------------------------------------------------------------------------------------------------


def test_what_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Any, run: Callable[[], Any]) -> float:
        run()
        return 1.0

    monkeypatch.setattr(inference._Bench, "timed", slow)
    rows = measured(lengths=[20], batches=[1, 100], max_seconds=50.0)
    # Every run takes a second, so a step takes none; a hundred prompts with their inputs take more than a hundred.
    assert rows[20, 100, NO_CACHE].not_run == "the first token would take about 123 s"
    assert rows[20, 100, NO_CACHE].first_token_ms is rows[20, 100, NO_CACHE].tokens_per_s is None
    assert rows[20, 100, GIST].not_run is rows[20, 1, NO_CACHE].not_run is None
    rows = measured(lengths=[20, 90], batches=[1], max_seconds=1.5)
    assert {rows[90, 1, mode].not_run for mode in MODES} == {"reading the prompt once would take about 7 s"}


def test_a_long_prompt_is_not_left_out_for_what_few_tokens_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens in a second would be 2,000 in 35, but 512 are read in a second as well."""

    def slow(self: Any, run: Callable[[], Any]) -> float:
        run()
        return 1.0

    monkeypatch.setattr(inference._Bench, "timed", slow)
    model, tokenizer = random_llama(64, 1)
    for max_seconds, reason in ((25.0, None), (3.0, "reading the prompt once would take about 35 s")):
        settings = inference._Settings(2, 4, 4, 1, 1.0, max_seconds, 10**12, "")
        prompt, found = inference._Bench(model, tokenizer, settings).read_prompt(2000)
        assert (found, prompt is None) == (reason, reason is not None)


def test_answers_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ({PREFIX: 1.0, STATIC: 1.0, GIST: 1.0}, {PREFIX: 20.0, STATIC: 20.0, GIST: 1.0})
    monkeypatch.setattr(inference._Cell, "_gated", lambda self, rows: found)
    rows = measured(batches=[1], max_seconds=70.0)
    # Without a cache, the prompt is read once and followed by the steps of a prefix cache.
    assert rows[20, 1, PREFIX].not_run == rows[20, 1, STATIC].not_run == "the answers would take about 81 s"
    assert rows[20, 1, NO_CACHE].not_run == "the answers would take about 80 s"
    for mode in (NO_CACHE, PREFIX):
        assert rows[20, 1, mode].first_token_ms > 0
        assert rows[20, 1, mode].tokens_per_s is rows[20, 1, mode].peak_bytes is None
    assert rows[20, 1, GIST].tokens_per_s > 0


def test_what_would_need_too_much_memory_is_left_out() -> None:
    rows = measured(batches=[1, 256], max_bytes=5_000_000)
    assert rows[20, 256, PREFIX].not_run == "would need 6.4 MB, the limit is 5.0 MB"
    assert rows[20, 1, PREFIX].not_run is rows[20, 256, GIST].not_run is None
    assert rows[20, 256, PREFIX].copied_first_token_ms is rows[20, 256, PREFIX].peak_bytes is None


def test_what_has_no_positions_is_left_out() -> None:
    rows = measured(lengths=[119, 120], batches=[1])
    assert {rows[119, 1, mode].not_run for mode in MODES} == {None}
    assert {rows[120, 1, mode].not_run for mode in MODES} == {"the model's positions end at 128"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, r"lengths must be whole numbers of at least 1, got \[\]"),
        ({"batches": [1, 0]}, r"batches must be whole numbers of at least 1, got \[1, 0\]"),
        ({"repeats": 0}, "repeats must be whole numbers of at least 1, got 0"),
        ({"num_gist_tokens": 0}, "num_gist_tokens must be whole numbers"),
        ({"max_seconds": 0.0}, "seconds must be at least 0 and max_seconds greater than 0"),
    ],
)
def test_what_cannot_be_measured(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GistError, match=message):
        measured(**changes)


def test_decoders_only() -> None:
    with pytest.raises(GistError, match="inference measures decoders"):
        measured("t5")


def test_the_random_model() -> None:
    model, tokenizer = random_llama(64, 2)
    assert gisting.models.patch.is_patched(model)
    assert model.config.num_key_value_heads == 1
    assert tokenizer.gist_token_id < model.config.vocab_size
    with pytest.raises(GistError, match="hidden_size must be a multiple of 64, the size of a head, got 100"):
        random_llama(100)


# -- memory, quartiles, bars -------------------------------------------------------------------------------------------


def test_peak_bytes_are_what_is_out_at_once() -> None:
    def run() -> None:
        one = torch.empty(1000, 1000)
        two = one + 1
        del one
        three = torch.cat([two, two])
        del three
        torch.empty(10)

    assert memory.peak_of_allocator(torch.device("cpu"), run) == 12_000_000


@requires_peak
def test_what_was_freed_goes_back() -> None:
    blocks = [torch.ones(25_000) for _ in range(2_000)]  # 100 kB each, on the C library's heap
    del blocks[::2]
    before = held_mb("VmRSS")
    memory.give_back()
    assert held_mb("VmRSS") < before - 80
    assert len(blocks) == 1_000


def test_prompts_are_text_where_the_tokenizer_reads_it() -> None:
    """On random ids, rounding of a bfloat16 model with an untrained gist is larger than any gate can allow."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    stock = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    tokenizer = GistTokenizer(stock, "plain")
    model = gisting.patch(tiny.model("llama", vocab_size=len(tokenizer)), tokenizer)
    settings = inference._Settings(2, 4, 5, 1, 0.0, 9.0, 2**40, "m")
    drawn = inference._Bench(model, tokenizer, settings).draw(3, 40, 0)
    text = " ".join(" ".join(topics.values()).split())
    assert all(stock.decode(row) in text for row in drawn)
    assert len({tuple(row.tolist()) for row in drawn}) == 3, "every request has different ones"
    words = inference._Bench(*tiny.patched("llama"), settings)
    assert words.text is None, "this tokenizer knows no English"
    assert len(set(words.draw(1, 40, 0)[0].tolist())) > 10


# -- shown -------------------------------------------------------------------------------------------------------------


def row(mode: str, length: int, first_ms: float | None, rate: float | None, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"run": "a", "mode": mode, "prompt_tokens": length, "batch_size": 8, "input_tokens": 16}
    made |= {"answer_tokens": 32, "num_gist_tokens": 4, "model": "m", "num_parameters": 10**8, "dtype": "float32"}
    kept = {NO_CACHE: 0, PREFIX: length, STATIC: 8 * (length + 47), GIST: 4}[mode]
    made |= {"cache_bytes": 1000 * kept, "peak_bytes": 2_500_000}
    copied_ms = None if mode in (NO_CACHE, STATIC) else first_ms and 2 * first_ms
    for key, value in (("first_token_ms", first_ms), ("copied_first_token_ms", copied_ms), ("tokens_per_s", rate)):
        made |= {key: value, f"{key}_low": value and value - 1, f"{key}_high": value and value + 1}
    made |= {"num_first_token_repeats": 30, "num_answer_repeats": 2 if rate else 0, "not_run": None}
    return made | {"device": "d", "threads": 2, "torch": "t", "transformers": "f", **changes}


ROWS = [
    row(NO_CACHE, 2000, 2500, None, not_run="it would take about 70 s", peak_bytes=None),
    row(PREFIX, 2000, 100, 20),
    row(STATIC, 2000, 80, 70),
    row(GIST, 2000, 50, 210),
    row(NO_CACHE, 26, 60, 30),
    row(PREFIX, 26, 50, 41),
    row(STATIC, 26, 40, 40),
    row(GIST, 26, 50, 40),
]


def test_narrow_tables_by_eye() -> None:
    first, copied, rates, held = inference_results.narrow_tables(ROWS)
    assert first[2] == [
        ["26", "8", "no cache", "60.0 (59.0\N{EN DASH}61.0)", "1.20x"],
        ["", "", "prefix cache", "50.0 (49.0\N{EN DASH}51.0)", "1.00x"],
        ["", "", "static prefix cache", "40.0 (39.0\N{EN DASH}41.0)", "0.80x"],
        ["", "", "gist cache", "50.0 (49.0\N{EN DASH}51.0)", ""],
        ["2,000", "8", "no cache", "2,500 (2,499\N{EN DASH}2,501)", "50.0x"],
        ["", "", "prefix cache", "100.0 (99.0\N{EN DASH}101.0)", "2.00x"],
        ["", "", "static prefix cache", "80.0 (79.0\N{EN DASH}81.0)", "1.60x"],
        ["", "", "gist cache", "50.0 (49.0\N{EN DASH}51.0)", ""],
    ]
    assert [line[2] for line in copied[2]] == ["prefix cache", "gist cache"] * 2
    assert rates[2][4][3:] == ["not run: it would take about 70 s", "-"]
    assert held[2][1] == ["", "", "prefix cache", "26.0 kB", "6.5x", "2.5 MB"]


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    inference_results.plot(ROWS, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# -- the command -------------------------------------------------------------------------------------------------------

SMALL = "bench inference --hidden-size 64 --layers 1 --batches 2 --input-length 3 --new-tokens 2 --repeats 2"


def test_the_command(run, tmp_path: Path) -> None:
    done = run(*SMALL.split(), "--lengths", "9,5", "--output", tmp_path / "rows.jsonl", "--json")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(one["mode"], one["prompt_tokens"]) for one in rows] == [(mode, p) for p in (5, 9) for mode in MODES]
    written = read_rows(tmp_path / "rows.jsonl")
    assert [one["first_token_ms"] for one in written] == [one["first_token_ms"] for one in rows]
    assert {"device", "torch", "commit", "num_parameters"} <= written[0].keys()
    assert len({one["run"] for one in written}) == 1


def test_the_command_of_the_page_shows_tables(
    run, demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo_checkpoint)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (command,) = (line for line in page.splitlines() if line.startswith("gisting bench inference --model runs/demo"))
    done = run(*shlex.split(command)[1:], "--repeats", "2")
    assert done.code == 0, done.err
    assert all(title in done.out for title in ("Time to the first token in ms", "Tokens per second", "Memory"))
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.out, "no number is cut"
    assert max(map(len, done.out.splitlines())) <= 80
    words = ("answered with", "no cache", "prefix cache", "static prefix cache", "gist cache", "gist faster")
    assert all(word in done.out for word in words), "no word is broken"


def test_the_command_for_training_says_where_it_went(run) -> None:
    done = run("bench", "training", "--prompt-tokens", "20")
    assert (done.code, done.out) == (1, "")
    assert "run: python -m benchmarks training, with the same options" in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--lengths 5,x",
            "--lengths must be comma-separated whole numbers of at least 1, such as 26,512, got '5,x'",
        ),
        ("--batches 0", "--batches must be comma-separated whole numbers of at least 1"),
        ("--dtype int8", "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ("--device nowhere", "device 'nowhere' cannot be used"),
        ("--hidden-size 100", "hidden_size must be a multiple of 64"),
        ("--max-memory nan", "--max-memory must be a finite number above 0, got nan"),
        ("--max-memory -1", "--max-memory must be a finite number above 0, got -1.0"),
        ("--seconds inf", "--seconds must be a finite number above 0, got inf"),
        ("--max-seconds 0", "--max-seconds must be a finite number above 0, got 0.0"),
        ("--model runs/demo", "--hidden-size and --layers are for the random model; leave them out with --model"),
        ("--plot rows.jsonl", "--plot must have the suffix of an image, such as .png, got 'rows.jsonl'"),
        ("--plot nowhere/rows.png", "--plot: there is no directory nowhere; create it first"),
    ],
)
def test_what_the_command_refuses(run, words: str, message: str) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    done = run(*SMALL.split(), *words.split())
    assert (done.code, done.out) == (1, "")
    assert message in " ".join(done.err.split())
