"""Reports on finished runs: prices, tokens, tables, errors, timed requests, and the command."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gisting import GistError, GistTokenizer, Record
from gisting.data.plain import plain_sources
from gisting.eval.metrics import bleu, exact_match
from gisting.internalize.comparison import Times, num_rows_read, shared_prefix
from gisting.internalize.prices import Prices, load_prices
from gisting.internalize.report import make_report
from gisting.internalize.requests import PromptFormat
from gisting.internalize.schedule import Schedule
from gisting.internalize.shorteners import Rewrites
from gisting.internalize.stages import internalize
from gisting.measure import requests
from gisting.measure.requests import serving
from gisting.train.finetune import published_arguments
from tests import garbage, tiny

PROMPT = "w50 w51 w52 w53 w54 w55"
RECORDS = [Record("-", f"w{number} w{number + 10}", f"w{number + 30}") for number in range(8)]
PRICES = Prices("USD", 2.0, 0.5, 10.0, 20.0)


def run_to(folder: Path, name: str = "llama", **changes: Any) -> None:
    """Run one internalisation of a few steps."""
    model, tokenizer = tiny.patched(name)
    settings: dict[str, Any] = {
        "schedule": Schedule((1.0, 0.5, 0.0)),
        "shortener": Rewrites({0.5: "w50 w52 w54"}),
        "eval_records": RECORDS[:4],
        "max_new_tokens": 2,
        "metrics": {"exact_match": exact_match},
    }
    steps = changes.pop("max_steps", 3)
    prompt = changes.pop("prompt", PROMPT)
    records = changes.pop("records", RECORDS)
    arguments = published_arguments(
        folder, batch_size=4, per_device_batch_size=4, max_steps=steps, save_strategy="no", disable_tqdm=True
    )
    internalize(model, tokenizer, prompt, records, arguments, **{**settings, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a staged run, one that ends in a gist, and every control."""
    folder = tmp_path_factory.mktemp("runs")
    with garbage.frozen():
        run_to(folder / "staged")
        run_to(folder / "tailed", tail="gist", num_gist_tokens=3)
        for control in ("bare", "full", "full-run-bare"):
            run_to(folder / control, control=control)
        run_to(folder / "shortened", control="shortened", control_share=0.5)
    return folder


# -- prices ------------------------------------------------------------------------------------------------------------


def test_a_request_by_eye() -> None:
    # 600,000 not cached at 2, 400,000 cached at 0.5, 100,000 of the answer at 10.
    assert PRICES.request(1_000_000, 400_000, 100_000) == pytest.approx(1.2 + 0.2 + 1.0)
    assert PRICES.training(3_000_000) == pytest.approx(60)
    assert Prices("USD", 1, 1, 1).training(5) is None
    dearer = replace(PRICES, finetuned_factor=1.5)
    assert dearer.request(1_000_000, 400_000, 100_000) == pytest.approx(2.4)
    assert dearer.request(1_000_000, 400_000, 100_000, is_finetuned=True) == pytest.approx(3.6)


COUNTS = st.integers(0, 10**7)
MONEY = st.floats(0, 1000)


@given(MONEY, MONEY, MONEY, COUNTS, COUNTS, COUNTS)
def test_costs_add_up(price: float, cached_price: float, output_price: float, new: int, cached: int, out: int) -> None:
    prices = Prices("USD", price, cached_price, output_price)
    whole = prices.request(new + cached, cached, out)
    parts = [prices.request(new, 0, 0), prices.request(cached, cached, 0), prices.request(0, 0, out)]
    assert whole == pytest.approx(sum(parts))
    assert whole >= 0
    uncached = prices.request(new + cached, 0, out)
    slack = 1e-9 * max(whole, uncached)
    assert (uncached >= whole - slack) if cached_price <= price else (uncached <= whole + slack)


@pytest.mark.parametrize(("tokens", "cached", "output"), [(5, 6, 0), (5, -1, 0), (5, 0, -1), (-5, -5, 0)])
def test_wrong_requests_are_refused(tokens: float, cached: float, output: float) -> None:
    with pytest.raises(GistError, match="tokens must be at least cached_tokens, and no number may be negative"):
        PRICES.request(tokens, cached, output)


TABLE = {"currency": "USD", "input_per_million": 2, "cached_input_per_million": 0.5, "output_per_million": 10}


@pytest.mark.parametrize(
    "text",
    [
        "currency: USD\ninput_per_million: 2\ncached_input_per_million: 5e-1\noutput_per_million: 1e1\n",
        json.dumps(TABLE),
        json.dumps(TABLE, indent="\t"),
    ],
    ids=["yaml", "json", "json with tabs"],
)
def test_a_price_table_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "prices").write_text(text, encoding="utf-8")
    assert load_prices(tmp_path / "prices") == Prices("USD", 2.0, 0.5, 10.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({**TABLE, "input": 1}), r"there is no price 'input'; did you mean input_per_million\?"),
        (json.dumps({**TABLE, "discount": 1}), "there is no price 'discount'; a price table has currency, input_per"),
        (json.dumps({**TABLE, "output_per_million": -1}), "output_per_million must be a price .*, got -1"),
        (json.dumps({**TABLE, "output_per_million": None}), "output_per_million must be a price .*, got None"),
        (json.dumps({**TABLE, "output_per_million": True}), "output_per_million must be a price .*, got True"),
        (json.dumps({**TABLE, "output_per_million": "nan"}), "output_per_million must be a price .*, got nan"),
        (json.dumps({**TABLE, "output_per_million": math.inf}), "output_per_million must be a price .*, got inf"),
        (json.dumps({**TABLE, "output_per_million": "cheap"}), "output_per_million must be a price .*, got 'cheap'"),
        (json.dumps({**TABLE, "currency": 3}), "currency must be text such as USD, got 3"),
        ("currency: USD\noutput_per_million: 1\n", "input_per_million, cached_input_per_million must be there"),
        ("currency: USD\ncurrency: EUR\n", "currency is given twice; remove one"),
        ('{"currency": "USD", "currency": "EUR"}', "currency is given twice; remove one"),
        ("- 1\n", "must hold prices, one 'name: number' a line"),
        ("", "must hold prices, one 'name: number' a line"),
        ("a: [", "is neither YAML nor JSON"),
        ("{", "is neither YAML nor JSON"),
    ],
)
def test_wrong_price_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GistError, match=f"prices.yaml.*{message}"):
        load_prices(path)


def test_a_missing_price_table(tmp_path: Path) -> None:
    with pytest.raises(GistError, match=r"there is no price table .*none.yaml; write one with currency, input_per"):
        load_prices(tmp_path / "none.yaml")
    with pytest.raises(GistError, match="cannot be read"):
        load_prices(tmp_path)


# -- counting ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(0, 60), st.integers(1, 9))
def test_rows_that_training_reads(num_records: int, num_steps: int, batch_size: int) -> None:
    """Compare with a loop like Trainer's."""
    read, epoch = 0, []
    for _ in range(num_steps):
        epoch = epoch or [1] * num_records
        read += len(epoch[:batch_size])
        epoch = epoch[batch_size:]
    assert num_rows_read(num_records, num_steps, batch_size) == read


def test_what_a_prefix_cache_can_hold(tokenizer: GistTokenizer) -> None:
    prompt_format = PromptFormat(gap=" ", separator=" ")
    prompts = [prompt_format.prompt(PROMPT, [RECORDS[1]]), prompt_format.prompt(PROMPT, [RECORDS[2]]), PROMPT]
    sources = plain_sources(tokenizer, prompts, ["w1", "w2", "w3"])
    count = shared_prefix(tokenizer, PROMPT, sources)
    words = tokenizer.decode(sources[0][:count]).split()
    assert words[: len(PROMPT.split())] == PROMPT.split()
    assert all(source[:count] == sources[0][:count] for source in sources)
    assert shared_prefix(tokenizer, PROMPT, [sources[0], sources[1][:1] + sources[1][2:]]) < count
    # The last id of a request is not cached, because its logits are needed.
    assert shared_prefix(tokenizer, PROMPT, [sources[0][:3], sources[0]]) == 2
    assert shared_prefix(tokenizer, PROMPT, [[9, 9], sources[0]]) == 0
    assert shared_prefix(tokenizer, PROMPT, [[], sources[0]]) == 0


# -- the report --------------------------------------------------------------------------------------------------------


def test_runs_in_comparison(runs: Path) -> None:
    names = ("staged", "tailed", "bare", "full", "full-run-bare", "shortened")
    report = make_report([runs / name for name in names], PRICES)
    tokenizer = GistTokenizer.from_pretrained(runs / "staged")
    bare = len(plain_sources(tokenizer, [""], ["w1 w11"])[0])
    full = len(plain_sources(tokenizer, [PROMPT], ["w1 w11"])[0])
    continuation = len(tokenizer.encode_continuations(["w1 w11"])[0])
    rows = {row.name: row for row in report.rows[:-1]}
    assert {name: (row.trained, row.run_on, row.tokens, row.cached_tokens) for name, row in rows.items()} == {
        "staged": ("in 3 stages", "bare query", bare, 0),
        "tailed": ("in 3 stages", "3 gist tokens", 3 + continuation, 3),
        "bare": ("bare query", "bare query", bare, 0),
        "full": ("full prompt", "full prompt", full, 0),
        "full-run-bare": ("full prompt", "bare query", bare, 0),
        "shortened": ("shortened prompt", "shortened prompt", full - 3, 0),
    }
    cached = report.rows[-1]
    assert (cached.run_on, cached.name) == ("full prompt with a prefix cache", "full")
    assert (cached.tokens, cached.score) == (full, rows["full"].score)
    # All requests have the same words before the query.
    assert cached.cached_tokens == full - continuation
    for row in report.rows:
        assert row.output_tokens == 2, "an answer of one word, and the end"
        assert row.saved == pytest.approx(1 - row.tokens / full)
        uncached = row.tokens - row.cached_tokens
        assert row.cost == pytest.approx((2 * uncached + 0.5 * row.cached_tokens + 10 * 2) / 1e6)
    # One step per stage with four records: the whole prompt, three words less, and none.
    assert rows["staged"].training_tokens == 4 * ((full + 2) + (full - 3 + 2) + (bare + 2))
    assert rows["tailed"].training_tokens == 4 * ((full + 2) + (full - 3 + 2) + (full + 3 + 2))
    assert rows["bare"].training_tokens == 12 * (bare + 2)
    staged = rows["staged"]
    assert staged.training_cost == pytest.approx(20 * staged.training_tokens / 1e6)
    gain = 2 * (full - bare) / 1e6
    assert staged.pays_after_full_prompt == pytest.approx(staged.training_cost / gain)
    assert rows["full"].pays_after_full_prompt is None
    # A factor for finetuned models applies to the run, not to the base model that it is compared with.
    dearer = make_report([runs / "staged"], replace(PRICES, finetuned_factor=1.1))
    own, without, with_cache = dearer.rows
    assert own.cost == pytest.approx(1.1 * staged.cost)
    assert (without.cost, with_cache.cost) == pytest.approx((rows["full"].cost, cached.cost))
    assert own.pays_after_full_prompt == pytest.approx(staged.training_cost / (rows["full"].cost - own.cost))
    stages = [(row.run, row.stage, row.reads, round(row.kept, 2), row.tokens) for row in report.stages]
    assert stages == [
        ("staged", 1, "prompt", 1.0, full),
        ("staged", 2, "prompt", 0.5, full - 3),
        ("staged", 3, "no-prompt", 0.0, bare),
        ("tailed", 1, "prompt", 1.0, full),
        ("tailed", 2, "prompt", 0.5, full - 3),
        ("tailed", 3, "gist, k = 3", 1.0, 3 + continuation),
    ]
    assert report.shorter.keys() == {"shortened prompt of shortened"}
    assert report.notes == ()


def test_a_score_has_the_interval_of_its_answers(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "full-run-bare", tmp_path / "run")
    answers, result = tmp_path / "run" / "stage-1" / "answers.jsonl", tmp_path / "run" / "internalized.json"
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    for line in lines[:3]:
        line["no-prompt"], line["prompt"] = line["output"], "never"
    lines[3]["no-prompt"] = "never"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    state = json.loads(result.read_text(encoding="utf-8"))
    state["stages"][-1]["metrics"]["no-prompt"]["exact_match"] = 0.75
    result.write_text(json.dumps(state), encoding="utf-8")
    row = make_report([tmp_path / "run"]).rows[0]
    assert row.score_low is not None
    assert row.score_high is not None
    assert row.score_low < row.score == 0.75 < row.score_high == 1
    # A caller's own metric of this name has no such interval.
    state["stages"][-1]["metrics"]["no-prompt"]["exact_match"] = 0.8
    result.write_text(json.dumps(state), encoding="utf-8")
    row = make_report([tmp_path / "run"]).rows[0]
    assert (row.score, row.score_low, row.score_high) == (0.8, None, None)


def test_without_the_control_the_full_prompt_has_no_score(runs: Path) -> None:
    report = make_report([runs / "staged"])
    assert [(row.name, row.run_on, row.score is None) for row in report.rows] == [
        ("staged", "bare query", False),
        ("-", "full prompt", True),
        ("-", "full prompt with a prefix cache", True),
    ]
    assert all(row.cost is None and row.training_tokens is None for row in report.rows)
    assert report.request_cells()[0] == ("run", "trained", "run on", "tokens", "cached", "saved", "exact_match")


def test_the_full_prompt_is_the_same_in_any_order_and_named(runs: Path, tmp_path: Path) -> None:
    with garbage.frozen():
        run_to(tmp_path / "examples", max_examples=2)
    here, there = (make_report([tmp_path / "examples", runs / "staged"][::step]) for step in (1, -1))
    assert here.full == there.full
    note = "The full prompt is that of examples, with its examples; a run with --control full would settle it."
    assert note in here.notes
    assert note in there.notes
    assert not any("full prompt" in note for note in make_report([runs / "staged", runs / "full"]).notes)


def test_with_free_caching_training_never_pays(runs: Path) -> None:
    report = make_report([runs / "staged"], Prices("USD", 2.0, 0.0, 1.0, 5.0))
    row, cached = report.rows[0], report.rows[-1]
    assert cached.cost is not None
    assert row.cost is not None
    assert row.cost >= cached.cost, "with a cache, everything before the query is free"
    assert row.pays_after_prefix_cache == math.inf
    assert report.items()[0]["pays_after_prefix_cache"] is None
    assert report.request_cells()[1][-1] == "never"
    json.dumps(report.items(), allow_nan=False)


def test_a_mean_over_requests_with_examples(runs: Path, tmp_path: Path) -> None:
    with garbage.frozen():
        run_to(tmp_path / "full", control="full", schedule=Schedule((1.0, 0.0)), max_examples=2)
    report = make_report([runs / "staged", tmp_path / "full"])
    assert report.rows[1].saved == 0, "the full prompt is the prompt of the control full"
    report = make_report([tmp_path / "full"])
    tokenizer = GistTokenizer.from_pretrained(tmp_path / "full")
    sources = plain_sources(tokenizer, [one.instruction for one in report.full], [one.input for one in report.full])
    assert report.rows[0].tokens == sum(map(len, sources)) / 4
    assert 0 < report.rows[-1].cached_tokens < min(map(len, sources)) - 3, "examples are not cached"


def test_an_encoder_decoder_has_no_prefix_cache(tmp_path: Path) -> None:
    with garbage.frozen():
        run_to(tmp_path / "t5", "t5", control="full")
    report = make_report([tmp_path / "t5"], PRICES)
    assert [row.run_on for row in report.rows] == ["full prompt"]
    assert report.notes == ("An encoder reads prompt and query together, so there is no prefix cache to compare with.",)


def test_the_tables_by_eye(runs: Path) -> None:
    report = make_report([runs / "staged", runs / "full"], PRICES)
    times = Times({"bare query": (5.0, 4.0, 6.5), "prefix cache": (7.25, 7.0, 7.5)}, "on paper")
    text = report.timed(times).markdown().splitlines()
    staged, full = report.rows[0], report.rows[1]
    assert text[2].split(" | ")[6:10] == ["exact_match", "USD for 1,000", "ms", "training, USD"]
    assert text[4].startswith(f"| staged | in 3 stages | bare query | {staged.tokens:.1f} | - | ")
    assert text[4].split(" | ")[8] == "5.0 (4.0–6.5)"
    assert text[5].split(" | ")[8] == "-", "not measured"
    assert text[6].split(" | ")[2:5] == [
        "full prompt with a prefix cache",
        f"{full.tokens:.1f}",
        f"{report.rows[2].cached_tokens:.1f}",
    ]
    assert "## By stage" in text
    assert "| staged | 2 | prompt | 50 % | 0.0 |" in "\n".join(text)
    prices = (
        "Prices for a million tokens, USD: 2 input, 0.5 cached input, 10 output, 20 training; tokens of a finetuned"
    )
    assert f"{prices} model cost 1 times as much." in "\n".join(text)
    assert "ms: time of a request with its answer, on paper." in text


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"control": "bare", "max_steps": 5}, "max_steps (3 and 5)"),
        pytest.param({"control": "full", "max_examples": 2}, "max_examples (0 and 2)", marks=pytest.mark.slow),
        pytest.param({"control": "full", "records": RECORDS[1:]}, "records", marks=pytest.mark.slow),
        ({"control": "bare", "max_examples": 2}, None),
    ],
    ids=["steps", "examples", "records", "the bare query has no examples"],
)
def test_settings_that_should_be_alike_are_noted(
    runs: Path, tmp_path: Path, changes: dict[str, Any], note: str | None
) -> None:
    with garbage.frozen():
        run_to(tmp_path / "other", **changes)
    found = make_report([runs / "staged", tmp_path / "other"]).notes
    assert found == (() if note is None else (f"staged and other were trained differently: they differ in {note}.",))


def test_seeds_may_differ(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "bare", tmp_path / "other")
    path = tmp_path / "other" / "internalized.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["settings"]["arguments"]["seed"] += 1
    path.write_text(json.dumps(state), encoding="utf-8")
    assert make_report([runs / "staged", tmp_path / "other"]).notes == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "w50 w51"}, "staged and other cannot be compared, because they differ in prompt; compare runs"),
        (
            {"eval_records": RECORDS[:3]},
            "staged and other cannot be compared, because they differ in evaluation records;",
        ),
        ({"eval_records": None}, "other was trained without evaluation records, so it has no score"),
        ({"metrics": {"bleu": bleu}}, r"metric must be one by which all runs were scored \(staged: exact_match; other"),
    ],
    ids=["prompt", "evaluation records", "no evaluation", "metric"],
)
def test_runs_that_cannot_be_compared(runs: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with garbage.frozen():
        run_to(tmp_path / "other", control="bare", **changes)
    with pytest.raises(GistError, match=message):
        make_report([runs / "staged", tmp_path / "other"])


def test_another_tokenizer_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "bare", tmp_path / "other")
    path = tmp_path / "other" / "internalized.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["settings"]["tokenizer"] = "0" * 12
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(GistError, match="they differ in tokenizer; compare"):
        make_report([runs / "staged", tmp_path / "other"])


def remove(path: Path) -> None:
    path.unlink()


def retell(path: Path) -> None:
    about = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**about, "prompt": "w1"}), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("stage-1/eval.jsonl", remove, "stage-1/eval.jsonl is missing or empty"),
        ("stage-1/data.jsonl", remove, "stage-1/data.jsonl is missing or empty"),
        ("stage-1/answers.jsonl", remove, "stage-1/answers.jsonl cannot be read"),
        ("stage-1/stage.json", remove, "stage-1/stage.json cannot be read"),
        ("stage-1/stage.json", retell, "stage-1/stage.json has another prompt than the one the run"),
        ("internalized.json", remove, "run has no internalized.json, so it is not a finished internalisation"),
    ],
)
def test_an_incomplete_directory(
    runs: Path, tmp_path: Path, file: str, spoil: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(runs / "full", tmp_path / "run")
    spoil(tmp_path / "run" / file)
    with pytest.raises(GistError, match=message):
        make_report([tmp_path / "run"], PRICES)


def test_runs_without_a_comparison(runs: Path) -> None:
    with pytest.raises(GistError, match="directories is empty; pass at least one"):
        make_report([])
    with pytest.raises(GistError, match=r"directories has .*bare/?.* twice; pass each once"):
        make_report([runs / "bare", runs / "staged" / ".." / "bare"])
    with pytest.raises(GistError, match=r"no run read the full prompt.*; pass the staged run, or the control full"):
        make_report([runs / "bare", runs / "shortened"])


def test_a_prompt_read_through_a_gist_is_no_full_prompt(tmp_path: Path) -> None:
    with garbage.frozen():
        run_to(tmp_path / "gists", tail="gist", num_gist_stages=3)
    with pytest.raises(GistError, match="no run read the full prompt"):
        make_report([tmp_path / "gists"])


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "staged", tmp_path / "staged")
    report = make_report([runs / "staged", tmp_path / "staged"])
    assert [row.name for row in report.rows[:2]] == [str(runs / "staged"), str(tmp_path / "staged")]


# -- requests timed ----------------------------------------------------------------------------------------------------


def asked(tokenizer: GistTokenizer) -> list[Record]:
    """Make full prompts with examples, and queries of one to three words."""
    prompt_format = PromptFormat(gap=" ", separator=" ")
    return [
        Record(prompt_format.prompt(PROMPT, RECORDS[number : number + 2]), " ".join(["w7"] * (1 + number % 3)), "w1")
        for number in range(6)
    ]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("llama", "mistral-window") else pytest.mark.slow)
        for name in tiny.DECODERS
    ],
)
def test_every_decoder_is_served_three_ways(name: str) -> None:
    model, tokenizer = tiny.patched(name)
    rows = serving(model, tokenizer, asked(tokenizer), PROMPT, batch_size=1, repeats=1, warmup=0)
    assert [row.mode for row in rows] == ["full prompt", "prefix cache", "bare query"]
    assert all(row.requests_per_s > 0 for row in rows)


def test_batches_go_round() -> None:
    model, tokenizer = tiny.patched("llama")
    records = asked(tokenizer)
    shorter = {"shortened": [Record("w50 w51", one.input, one.output) for one in records]}
    rows = serving(
        model, tokenizer, records, PROMPT, batch_size=4, shorter=shorter, repeats=3, warmup=1, num_answer_tokens=2
    )
    full, cached, bare, short = rows
    inputs = [one.input for one in records[:4]]
    sources = plain_sources(tokenizer, [one.instruction for one in records[:4]], inputs)
    # Two of the six are left over.
    assert full.num_new_tokens == round(sum(map(len, sources)) / 4, 1)
    assert cached.num_new_tokens == pytest.approx(full.num_new_tokens - cached.num_cached_tokens, abs=0.1)
    assert cached.num_cached_tokens >= len(PROMPT.split())
    assert bare.num_new_tokens < short.num_new_tokens < full.num_new_tokens
    assert short.mode == "shortened"
    assert {row.num_repeats for row in rows} == {3}


def test_a_wrong_cache_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.patched("llama")
    records = asked(tokenizer)
    original = requests.cache_view

    def spoilt(cache: Any, batch_size: int) -> Any:
        found = original(cache, batch_size)
        keys = found.layers[0].keys.clone()  # the cache holds views
        keys[:, :, 2] += 0.5
        found.layers[0].keys = keys
        return found

    monkeypatch.setattr(requests, "cache_view", spoilt)
    with pytest.raises(GistError, match=r"prefix cache differs from its uncached run by .*; no time is reported"):
        serving(model, tokenizer, records, PROMPT, batch_size=2, repeats=1, warmup=0)


class Said:
    """Stands for the output of generate: ids, after one id of the prompt, and logits of each step."""

    def __init__(self, ids: list[list[int]], logits: list[Any]) -> None:
        self.sequences = torch.tensor([[0, *row] for row in ids])
        self.logits = [torch.tensor(step) for step in logits]


def test_answers_may_part_where_two_tokens_are_as_likely() -> None:
    tie, other = [[1.0, 1.0], [3.0, 0.0]], [[9.0, 0.0], [3.0, 0.0]]
    check = partial(requests._check_answers, dtype=torch.float32)
    check(Said([[0, 1], [0, 0]], [tie, other]), Said([[1, 1], [0, 0]], [tie, tie]))  # row 0 parted at the tie
    with pytest.raises(GistError, match="differs"):
        check(Said([[0, 1], [0, 0]], [tie, other]), Said([[0, 1], [0, 0]], [tie, tie]))  # row 0 goes on, and differs
    with pytest.raises(GistError, match="differs"):
        check(Said([[0], [0]], [tie]), Said([[0], [0]], [other]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "there must be at least batch_size=7 records, got 6; lower batch_size"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"num_answer_tokens": 0}, "num_answer_tokens must be at least 1, got 0"),
        ({"shorter": {"a": RECORDS}}, r"shorter\['a'\] must have the queries of records, in the same order"),
        ({"records": [Record("", "w1", "w2")]}, "records share no token that could be cached"),
    ],
)
def test_what_cannot_be_served(changes: dict[str, Any], message: str) -> None:
    model, tokenizer = tiny.patched("llama")
    settings: dict[str, Any] = {"records": asked(tokenizer), "prompt": PROMPT, "batch_size": 1, **changes}
    with pytest.raises(GistError, match=message):
        serving(model, tokenizer, **settings)


def test_an_encoder_decoder_is_not_served() -> None:
    model, tokenizer = tiny.patched("t5")
    with pytest.raises(GistError, match="serving measures decoders"):
        serving(model, tokenizer, RECORDS, PROMPT, batch_size=1)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    prices, page = tmp_path / "prices.json", tmp_path / "pages" / "report.md"
    prices.write_text(json.dumps({**TABLE, "training_per_million": 20}), encoding="utf-8")
    names = [runs / "staged", runs / "shortened"]
    done = run("report", *names, "--prices", prices, "--output", page)
    assert done.code == 0, done.err
    assert page.read_text(encoding="utf-8") == make_report(names, load_prices(prices)).markdown()
    assert f"written to {page}" in done.err.replace("\n", "")
    for word in ("staged", "by stage", "prefix cache", "50 %"):
        assert word in " ".join(done.out.split())
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.out
    headers = ("run on", "tokens", "cached", "saved", "exact_match", "USD for 1,000", "training, USD", "pays after")
    assert all(header in done.out for header in headers), "headers of a wide table are whole at 80 columns"
    done = run("report", *names, "--json", "--time", "--repeats", "2", "--prices", prices)
    assert done.code == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [one["kind"] for one in found] == ["requests"] * 4 + ["stage"] * 3
    assert all(one["time_ms"] > 0 and one["time_ms_low"] <= one["time_ms"] <= one["time_ms_high"] for one in found[:4])
    assert found[0]["prices"]["currency"] == "USD"


def test_the_command_times_no_encoder_decoder(run, tmp_path: Path) -> None:
    with garbage.frozen():
        run_to(tmp_path / "t5", "t5", control="full")
    done = run("report", tmp_path / "t5", "--time")
    assert done.code == 0, done.err
    assert "Times are left out, because only decoders" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["staged", "nothing"], "nothing has no internalized.json, so it is not a finished internalisation"),
        (["staged", "--prices", "none.yaml"], "there is no price table none.yaml"),
        (["staged", "--metric", "bleurt"], "metric must be one by which all runs were scored"),
        (
            ["staged", "--time", "--batch-size", "5"],
            "there must be at least batch_size=5 records, got 4; lower batch_size",
        ),
    ],
)
def test_the_commands_errors_are_one_line(
    run, runs: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(runs)
    done = run("report", *words)
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err
