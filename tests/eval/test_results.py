"""Results files, reports made from them, and `gisting eval` from end to end."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gisting import GistError, Record
from gisting.cli.evaluate import print_conditions
from gisting.eval.conditions import DEFAULT_CONDITIONS, ConditionResult
from gisting.eval.judge import Judge
from gisting.eval.report import gap_kept, markdown, write_report
from gisting.eval.results import Evaluation, Judgement, Split, evaluate_splits
from gisting.measure.rows import environment
from tests import shell, tiny
from tests.repository import fences_in

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    model, tokenizer = tiny.patched("llama")
    splits = {
        name: [Record(tiny.words(3 + n % 2, n + seed), tiny.words(2, 40 + n), tiny.words(2, 70 + n)) for n in range(6)]
        for name, seed in (("seen", 0), ("unseen", 100))
    }
    return evaluate_splits(
        model, tokenizer, splits, [1, 2], name="tiny|llama", environment=environment(), max_new_tokens=3, batch_size=4
    )


def by_hand(gist: list[float], positive: list[float], negative: list[float]) -> Split:
    """A split with k = 1 in which only exact match was scored."""
    named = {"gist": gist, "positive": positive, "negative": negative}
    lengths = {name: [1.0] * len(gist) for name in ("tokens", "reference_tokens")}
    results = [
        ConditionResult(name, 1, [""] * len(gist), {"exact_match": scores, **lengths}) for name, scores in named.items()
    ]
    return Split("unseen", [Record("i", "", "o")] * len(gist), [20] * len(gist), results)


def test_what_is_evaluated(evaluation: Evaluation) -> None:
    assert [split.name for split in evaluation.splits] == ["seen", "unseen"]
    split = evaluation.split("unseen")
    assert (split.counts, split.conditions) == ([1, 2], ["gist", "positive", "negative"])
    assert split.prompt_tokens == [3, 4, 3, 4, 3, 4]
    assert evaluation.model["fingerprint"].startswith("llama/")
    assert evaluation.model["template"] == "plain"
    assert evaluation.model["num_gist_tokens"] is None
    assert evaluation.settings == {"max_new_tokens": 3, "batch_size": 4}
    assert {"torch", "transformers", "gisting", "commit", "device"} <= evaluation.environment.keys()
    rows = [[record.instruction, record.input, record.output, record.source] for record in split.records]
    assert split.data_hash == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert split.data_hash != evaluation.split("seen").data_hash


def test_a_file_restores_everything(evaluation: Evaluation, tmp_path: Path) -> None:
    judged = replace(evaluation, judgements=[Judgement("seen", 1, "gist", "positive", "j", [1.0, None, 0.5] * 2)])
    judged.save(tmp_path / "new" / "results.json")
    assert Evaluation.load(tmp_path / "new" / "results.json") == judged
    state = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    first = state["splits"][0]["results"][0]
    assert first["exact_match"] == judged.splits[0].results[0].exact_match  # for readers without this library


def _edit(path: Path, change: Any) -> None:
    state = json.loads(path.read_text(encoding="utf-8"))
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(format=2), "has format 2, this version reads 1; upgrade gisting"),
        (lambda state: state.update(kind="x"), "is not a results file; give a file written by `gisting eval --output`"),
        (lambda state: state.pop("model"), r"is not a complete results file \(KeyError: 'model'\)"),
        (
            lambda state: state["splits"][0]["records"][0].update(output="other"),
            "split 'seen' contains other records than were evaluated",
        ),
        (
            lambda state: state["splits"][1]["results"][2]["predictions"].pop(),
            "split 'unseen', condition 'negative' must have one prediction and one value of each",
        ),
        (lambda state: state["splits"][0]["records"][0].update(more=1), r"is not a complete results file \(TypeError"),
    ],
)
def test_a_damaged_file_is_refused(evaluation: Evaluation, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "results.json"
    evaluation.save(path)
    _edit(path, change)
    with pytest.raises(GistError, match=message):
        Evaluation.load(path)


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x", encoding="utf-8")
    with pytest.raises(GistError, match="a is not a results file: it is not JSON"):
        Evaluation.load(tmp_path / "a")


def test_unknown_splits_and_results(evaluation: Evaluation) -> None:
    with pytest.raises(GistError, match="split must be one of seen, unseen, got 'human'"):
        evaluation.split("human")
    with pytest.raises(
        GistError,
        match=r"'seen' has no result for condition 'gist' with k = 5; it has gist, positive, negative with k = 1, 2",
    ):
        evaluation.splits[0].result("gist", 5)
    with pytest.raises(GistError, match="splits is empty"):
        evaluate_splits(*tiny.patched("llama"), {}, name="", environment={})


# -- judgements --------------------------------------------------------------------------------------------------------


def test_judged(evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each split and k is judged, with the answers of the two conditions."""
    calls = []

    def compare(self: Judge, records, first, second, *, progress=None) -> list[float | None]:
        calls.append((records, first, second))
        return [1.0] * len(records)

    monkeypatch.setattr(Judge, "compare", compare)
    judged = evaluation.judged(Judge("http://x", "j", tmp_path))
    assert [(one.split, one.num_gist_tokens) for one in judged.judgements] == [
        ("seen", 1),
        ("seen", 2),
        ("unseen", 1),
        ("unseen", 2),
    ]
    unseen = evaluation.split("unseen")
    assert calls[3] == (
        unseen.records,
        unseen.result("gist", 2).predictions,
        unseen.result("positive", 2).predictions,
    )
    assert evaluation.judgements == []


def test_win_rate_by_hand() -> None:
    judgement = Judgement("unseen", 1, "gist", "positive", "j", [1.0, 1.0, 0.5, 0.0, None, None])
    rate = judgement.win_rate()
    assert rate is not None
    assert rate.value == 2.5 / 4
    assert (judgement.num_ties, judgement.num_unparsable) == (1, 2)
    assert Judgement("unseen", 1, "gist", "positive", "j", [None]).win_rate() is None


# -- report ------------------------------------------------------------------------------------------------------------


def test_gap_kept_by_hand() -> None:
    split = by_hand([1, 1, 1, 0] * 25, [1, 1, 1, 1] * 25, [0, 0, 1, 0] * 25)
    kept = gap_kept(split, 1, "exact_match")
    assert kept is not None
    assert kept.value == pytest.approx(2 / 3)
    assert gap_kept(split, 1, "rouge_l") is None
    assert gap_kept(replace(split, results=split.results[:2]), 1, "exact_match") is None
    assert gap_kept(split, 1, "exact_match", against="swapped") is None
    scores = {**split.results[0].scores, "exact_match": [0.5] * 100}
    split.results.append(ConditionResult("swapped", 1, [""] * 100, scores))
    against = gap_kept(split, 1, "exact_match", against="swapped")
    assert against is not None
    assert against.value == pytest.approx((0.75 - 0.5) / (1 - 0.5))


def test_a_table_by_eye() -> None:
    about = {"name": "m", "fingerprint": "f", "tokenizer": "t", "template": "plain", "num_gist_tokens": [1, 8]}
    split = by_hand([0.75] * 100, [1] * 100, [0] * 100)
    judgement = Judgement("unseen", 1, "gist", "positive", "a|b", [0.5] * 99 + [None])
    text = markdown([Evaluation(about, {"max_new_tokens": 3}, {"torch": "2"}, [split], [judgement])], num_resamples=200)
    tail = text[text.index("## m") :].replace(split.data_hash[:16], "HASH")
    assert tail == (
        """## m

- model `f`, tokenizer `t`, template plain, trained with k = 1 to 8
- max_new_tokens = 3
- torch 2
- unseen: 100 records, prompts of 20.0 tokens on average, SHA-256 `HASH`

| split | k | condition | records | exact match | tokens | tokens / reference | gap kept |
|---|---|---|---|---|---|---|---|
| unseen | 1 | gist | 100 | 75.0 [75.0, 75.0] | 1 [1, 1] | 1 [1, 1] | 75.0 [75.0, 75.0] |
| unseen | 1 | positive | 100 | 100.0 [100.0, 100.0] | 1 [1, 1] | 1 [1, 1] |  |
| unseen | 1 | negative | 100 | 0.0 [0.0, 0.0] | 1 [1, 1] | 1 [1, 1] |  |

| split | k | first | second | win rate of the first | ties | unparsable | judge |
|---|---|---|---|---|---|---|---|
| unseen | 1 | gist | positive | 50.0 [50.0, 50.0] | 99 | 1 | a\\|b |
"""
    )


def test_a_report_from_files_alone(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.save(tmp_path / "a.json")
    loaded = [Evaluation.load(tmp_path / "a.json"), by_name(evaluation, "other")]
    files = write_report(loaded, tmp_path / "report", num_resamples=20)
    assert [path.name for path in files] == ["report.md", "quality_by_k.png", "quality_by_compression.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[1:])
    text = files[0].read_text(encoding="utf-8")
    for part in ("## tiny|llama", "## other", "ROUGE-1", "perplexity", "not trained for gisting", "(quality_by_k.png)"):
        assert part in text
    assert text.count("| unseen | 2 | gist |") == 2


def by_name(evaluation: Evaluation, name: str) -> Evaluation:
    return replace(evaluation, model={**evaluation.model, "name": name})


def test_report_errors(evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GistError, match="evaluations is empty; give at least one results file"):
        write_report([], tmp_path)
    with pytest.raises(GistError, match=r"must be one that all results have \(exact_match, .*\), got 'perplexity'"):
        write_report([evaluation], tmp_path, metric="perplexity")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GistError, match=r"need matplotlib; run: pip install 'gist-tokens\[eval\]'"):
        write_report([evaluation], tmp_path, num_resamples=20)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gisting_eval(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Run `gisting eval` next to a checkpoint in `model`: exit code, standard output, standard error."""
    shutil.copytree(demo_checkpoint, tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    return partial(shell.call, monkeypatch, capsys, "eval")


DATA = ("model", "--data", "model/unseen.jsonl", "--limit", "4", "--max-new-tokens", "3")


def test_eval_from_end_to_end(gisting_eval, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two splits, several k, a baseline and a judge; then a report from the file, without the model."""

    def compare(self: Judge, records, first, second, *, progress=None) -> list[float | None]:
        assert (self.url, self.model, self.api_key) == ("http://judge/v1", "j", "not-a-key")
        return [1.0, 0.5, 0.0, None]

    monkeypatch.setattr(Judge, "compare", compare)
    monkeypatch.setenv("GISTING_JUDGE_KEY", "not-a-key")
    code, out, err = gisting_eval(
        *DATA,
        *("--data", "again=model/unseen.jsonl", "-k", "1:2,4", "--output", "r.json"),
        *(word for name in ("gist", "positive", "truncated") for word in ("--condition", name)),
        *("--judge-url", "http://judge/v1", "--judge-model", "j"),
    )
    assert code == 0, err
    assert "truncated" in out
    assert "again, k = 4: gist wins over positive in 50.0 %" in out
    assert "1 ties, 1 unparsable; j" in out
    assert "not-a-key" not in Path("r.json").read_text(encoding="utf-8")
    found = Evaluation.load("r.json")
    assert [split.name for split in found.splits] == ["unseen", "again"]
    assert found.splits[0].counts == [1, 2, 4]
    assert found.splits[0].conditions == ["gist", "positive", "truncated"]
    assert "perplexity" in found.splits[0].results[0].metrics
    assert found.model["name"] == "model"
    shutil.rmtree("model")
    code, out, err = gisting_eval("--results", "r.json", "--report", "report", "--metric", "exact_match")
    assert code == 0, err
    assert "saved report/report.md" in err
    assert Path("report/quality_by_k.png").is_file()


def test_eval_json_has_a_line_for_each_result(gisting_eval) -> None:
    code, out, err = gisting_eval(*DATA, "-k", "1,2", "--no-perplexity", "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["split"], row["num_gist_tokens"], row["condition"]) for row in rows] == [
        ("unseen", k, condition) for k in (1, 2) for condition in DEFAULT_CONDITIONS
    ]
    assert "perplexity" not in rows[0]
    assert [set(row.get("gap_kept", ())) for row in rows[:2]] == [{"negative", "swapped"}, set()]


def test_eval_of_one_instruction_leaves_swapped_out_and_says_so(gisting_eval) -> None:
    Path("one.jsonl").write_text("".join(Path("model/unseen.jsonl").read_text().splitlines(keepends=True)[:1]) * 2)
    words = ("model", "--data", "one.jsonl", "--max-new-tokens", "3")
    code, out, err = gisting_eval(*words, "--json")
    assert code == 0, err
    assert [json.loads(line)["condition"] for line in out.splitlines()] == ["gist", "positive", "prompt", "negative"]
    assert "all records of a split have the same instruction" in err
    code, _, err = gisting_eval(*words, "--condition", "swapped")
    assert code == 1
    assert "condition 'swapped' takes the gist of another record's instruction, but all 2 records have the same" in err


@pytest.mark.slow
def test_the_page_as_written(gisting_eval) -> None:
    """The commands and the Python code in docs/evaluation.md run."""
    Path("runs").mkdir()
    shutil.move("model", "runs/demo")
    page = fences_in((ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8"))
    commands = [line for fence in page if fence.language == "bash" for line in fence.text.splitlines()]
    assert len(commands) == 2
    for line in commands:
        code, _, err = gisting_eval(*shlex.split(line)[2:])
        assert code == 0, err
    names: dict[str, Any] = {}
    for fence in page:
        if fence.language == "python":
            exec(compile(fence.text, "docs/evaluation.md", "exec"), names)
    assert names["exact"].low <= names["exact"].value <= names["exact"].high
    assert Path("runs/report/report.md").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a model and --data FILE, or --results FILE"),
        (("model",), "give a model and --data FILE, or --results FILE"),
        (("model", "--results", "r.json"), "give either a model with --data, or --results"),
        (("--results", "a", "--results", "b", "--output", "c"), "--output writes one evaluation"),
        ((*DATA, "--data", "x/unseen.jsonl"), "two --data files are called 'unseen'; rename one: --data NAME"),
        ((*DATA, "-k", "many"), "must be a number, several as in 1,2,4, or a range such as 1:4, got 'many'"),
        ((*DATA, "-k", "4:1"), "num_gist_tokens must be a number of at least 1, or several different ones, got []"),
        ((*DATA, "--judge-url", "http://x"), "a judge needs both --judge-url and --judge-model"),
        (("--results", "model/config.json"), "model/config.json is not a results file"),
        (("--results", "none.json"), "none.json"),
    ],
)
def test_eval_errors_are_one_line(gisting_eval, words: tuple[str, ...], message: str) -> None:
    code, _, err = gisting_eval(*words)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_the_printed_table_by_eye(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At 80 columns: gap kept in the gist's line, headers without escapes, and the first answers in full or cut."""
    monkeypatch.setenv("COLUMNS", "80")
    scores = {"gist": [1.0, 1.0, 0.0, 1.0], "positive": [1.0] * 4, "negative": [0.0] * 4, "swapped": [0.5, 0.5, 0, 0.5]}
    results = [
        ConditionResult(
            condition,
            12,
            [f"{condition} [/INST] \x1b[31m {number}" for number in range(4)],
            {"exact_match": exact, "rouge_l": exact, "nll": [9.0] * 4, "nll_tokens": [4.0] * 4},
        )
        for condition, exact in scores.items()
    ]
    records = [Record("reverse " * 40, f"in {number}", f"out {number}") for number in range(4)]
    print_conditions("unseen", results, records)
    shown = capsys.readouterr().out
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "unseen: 4 records" in lines[0]
    for header in ("k", "condition", "exact match [95 %]", "ROUGE-L", "perplexity", "gap kept", "swapped"):
        assert header in lines[1]
    gist, positive = (lines[row].split() for row in (3, 4))
    assert (gist[:2], gist[-4:]) == (["12", "gist"], ["75.0", "%", "60.0", "%"])
    assert (positive[1], positive[-1]) == ("positive", "9.488")
    assert "negative) in ROUGE-L; left empty" in " ".join(lines)
    assert "Swapped: the same with the gist of another prompt" in " ".join(lines)
    assert lines.count("record 1, k = 12") == lines.count("record 2, k = 12") == 1
    assert "record 3, k = 12" not in lines
    assert "input        in 0" in lines
    assert "reference    out 1" in lines
    assert "gist         gist [/INST] \\x1b[31m 0" in lines
    assert shown.count("...") == 2, "long instructions are cut"
    print_conditions("unseen", results[:1], records, samples=0)
    alone = capsys.readouterr().out
    assert "Gap kept" not in alone
    assert "record 1" not in alone
