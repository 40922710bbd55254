"""``check_gist``: good gists pass, and bad ones do not, on random models with known answers."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gisting
from gisting import GistError, storage
from gisting.cache import GistCache, kept_share
from gisting.errors import CacheMismatchError
from gisting.eval import check as check_module
from gisting.eval.check import (
    CheckedSpan,
    GistCheck,
    GistChecker,
    check_gist,
    counts_to_try,
    smallest_gist,
)
from gisting.eval.divergence import Divergence, measure_divergence
from gisting.eval.spans import Span
from gisting.generation.compression import full_prompt_cache, whole_prompt
from tests import tiny

PROMPT, OTHER = tiny.words(12, 1), tiny.words(10, 2)
INPUTS = [tiny.words(1 + number % 3, 40 + number) for number in range(6)]
FEW: dict[str, Any] = {"max_new_tokens": 5, "batch_size": 4}


def whole(made: tuple[Any, Any], prompt: str = PROMPT) -> GistCache:
    """The states of the whole prompt as if they were its gist, which no gist can be better than."""
    like = gisting.compress(*made, [prompt], 2)
    return replace(full_prompt_cache(*made, prompt, like.origin), origin=like.origin)


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    return tiny.patched("llama")


@pytest.fixture(scope="module")
def checker(made: tuple[Any, Any]) -> GistChecker:
    return GistChecker(*made, PROMPT, INPUTS, **FEW)


# -- what is caught ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_swapped_is_a_gist_only_where_the_model_makes_some(name: str) -> None:
    """The whole of another prompt in view, for a model that was not trained to gist; else the gist it makes of it."""
    model, tokenizer = tiny.patched(name)
    checker = GistChecker(model, tokenizer, PROMPT, INPUTS, **FEW)
    cache = gisting.compress(model, tokenizer, [PROMPT], 3)
    states = whole_prompt(model, tokenizer, OTHER, cache.origin)
    assert states.num_gist_tokens == [10]

    def measured(source: GistCache) -> Divergence:
        return measure_divergence(model, tokenizer, checker.sampled, source, batch_size=4)

    assert checker.check(cache, OTHER).controls["swapped"] == measured(states)
    model.config.gist = {**model.config.gist, "num_gist_tokens": [1, 4]}
    found = checker.check(cache, OTHER).controls["swapped"]
    assert found == measured(gisting.compress(model, tokenizer, [OTHER], 3)) != measured(states)


def test_the_best_gist_keeps_everything(made: tuple[Any, Any], checker: GistChecker) -> None:
    found = checker.check(whole(made), whole(made, OTHER))
    assert found.kept == pytest.approx(1, abs=1e-3)
    assert found.greedy.share_identical == 1
    assert found.gist.mean_agreement == 1
    assert found.parts_at is None
    assert (found.num_prompt_tokens, found.num_gist_tokens) == (12, 12)
    assert "first tokens" not in found.controls, "all tokens are no control"


@pytest.mark.parametrize(
    "bad",
    [
        lambda made: gisting.compress(*made, [PROMPT], 3),
        lambda made: whole(made, OTHER),
        lambda made: gisting.compress(*made, [OTHER], 3),
    ],
    ids=["untrained", "swapped", "untrained and swapped"],
)
def test_a_bad_gist_keeps_little(made: tuple[Any, Any], checker: GistChecker, bad: Any) -> None:
    found = checker.check(bad(made), whole(made, OTHER))
    assert found.kept is not None
    assert found.kept < 0.9
    assert found.greedy.share_identical < 1
    assert found.parts_at is not None


def test_what_is_kept_is_against_the_control_that_is_nearer(made: tuple[Any, Any], checker: GistChecker) -> None:
    """A gist that is only the style of any gist keeps nothing of its prompt, whatever no prompt would give."""
    cache = gisting.compress(*made, [PROMPT], 3)
    found = checker.check(cache, cache)
    assert found.kept_against("swapped") == 0
    assert found.kept == min(0, found.kept_against("no prompt") or 0)
    shares = {name: 1 - found.gist.median / control.median for name, control in found.controls.items()}
    assert {name: found.kept_against(name) for name in found.controls} == pytest.approx(shares)
    assert list(shares) == ["no prompt", "first tokens", "swapped"]


def test_another_template_or_model_is_refused_before_anything_is_sampled(
    made: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "sample_answers", None)
    tokens = tiny.tokenizer("llama", "alpaca")
    cache = gisting.compress(gisting.patch(tiny.model("llama"), tokens), tokens, [PROMPT], 3)
    with pytest.raises(CacheMismatchError, match="template"):
        check_gist(*made, cache, PROMPT, INPUTS, **FEW)
    own = gisting.compress(*made, [PROMPT], 3)
    with pytest.raises(CacheMismatchError, match=r"swapped: cache.*template"):
        check_gist(*made, own, PROMPT, INPUTS, swapped=cache, **FEW)
    with pytest.raises(CacheMismatchError, match=r"swapped: cache has dtype torch\.bfloat16"):
        check_gist(*made, own, PROMPT, INPUTS, swapped=own.to(dtype=torch.bfloat16), **FEW)
    two = gisting.compress(*made, [PROMPT, OTHER], 3)
    for caches, name in (((two, None), "cache"), ((own, two), "swapped")):
        with pytest.raises(GistError, match=rf"{name} must hold one prompt, got 2"):
            check_gist(*made, caches[0], PROMPT, INPUTS, swapped=caches[1], **FEW)
    none = gisting.compress(*made, [PROMPT], 1, condition="negative")
    with pytest.raises(GistError, match="swapped must be a compressed prompt, got a cache of no prompt"):
        check_gist(*made, own, PROMPT, INPUTS, swapped=none, **FEW)


@pytest.mark.parametrize("name", ["t5", "qwen2-window"])
def test_other_models(name: str) -> None:
    made = tiny.patched(name)
    cache = gisting.compress(*made, [PROMPT], 3)
    found = check_gist(*made, cache, PROMPT, INPUTS, swapped=OTHER, **FEW)
    assert list(found.controls) == ["no prompt", "first tokens", "swapped"]
    assert found.kept is not None
    assert found.kept < 0.5


def test_the_same_seed_gives_the_same_and_every_step_is_counted(made: tuple[Any, Any]) -> None:
    cache, steps = gisting.compress(*made, [PROMPT], 3), []
    one = check_gist(*made, cache, PROMPT, INPUTS, swapped=OTHER, progress=steps.append, **FEW)
    assert sum(steps) == GistChecker.num_steps(PROMPT, INPUTS, 1) == 9 * len(INPUTS)
    assert check_gist(*made, cache, PROMPT, INPUTS, swapped=OTHER, **FEW) == one
    assert check_gist(*made, cache, PROMPT, INPUTS, swapped=OTHER, seed=1, **FEW).gist.kl != one.gist.kl


# -- spans and figures by hand -----------------------------------------------------------------------------------------


def divergence(*kl: float) -> Divergence:
    places = [None if value < 0.1 else 2 for value in kl]
    return Divergence(list(kl), [1.0 - value / 10 for value in kl], places, [4] * len(kl), [False] * len(kl))


def by_hand() -> GistCheck:
    spans = [
        CheckedSpan("9:30", "?", "It opens at 9:30.", "At 9:30!"),
        CheckedSpan("Bristol", "?", "In Bristol.", "In Bath."),
        CheckedSpan("£4.50", "?", "I do not know.", "I do not know."),
    ]
    controls = {
        "no prompt": divergence(0.4, 0.4),
        "first tokens": divergence(0.1, 0.1),
        "swapped": divergence(0.2, 0.2),
    }
    return GistCheck(20, 4, divergence(0.05, 0.15), controls, divergence(0.05, 0.15), spans, {"seed": 0})


def test_figures_by_hand() -> None:
    found = by_hand()
    assert [found.kept_against(name) for name in found.controls] == pytest.approx([0.75, 0.0, 0.5])
    assert found.kept_against("nobody") is None
    assert found.kept == pytest.approx(0.5)
    assert [span.text for span in found.known] == ["9:30", "Bristol"]
    assert [span.text for span in found.lost] == ["Bristol"]
    assert found.parts_at == 2
    quality = found.quality()
    assert quality == {
        "kept": 0.5,
        "kept_against_no_prompt": 0.75,
        "kept_against_first_tokens": 0.0,
        "kept_against_swapped": 0.5,
        "kl_median": 0.1,
        "kl_mean": 0.1,
        "agreement": 0.99,
        "identical": 0.5,
        "num_inputs": 2,
        "num_spans": 2,
        "num_lost_spans": 1,
        "seed": 0,
    }
    assert "Bristol" not in json.dumps(quality), "nothing of the prompt is kept with the gist"
    assert json.loads(json.dumps(found.to_row()))["spans"][1]["is_lost"] is True


def test_a_prompt_without_effect_has_nothing_to_keep() -> None:
    found = replace(by_hand(), gist=divergence(0.0, 0.0), controls={"no prompt": divergence(0.0, 1e-6)})
    assert found.kept_against("no prompt") is None
    assert found.kept is None
    assert found.quality()["kept"] is None


def test_spans_are_asked_for(made: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "find_spans", lambda prompt: [Span("w1", "w5 w6"), Span("w2", "w7")])
    cache = whole(made)
    found = check_gist(*made, cache, PROMPT, INPUTS, swapped=OTHER, **FEW)
    expected = gisting.generate(*made, ["w5 w6", "w7"], cache=cache, max_new_tokens=5, do_sample=False)
    assert [span.gist_answer for span in found.spans] == expected
    assert [span.prompt_answer for span in found.spans] == expected, "this gist is the whole prompt"
    assert len(found.gist.kl) == len(INPUTS), "with inputs of the user's, the questions are for the spans alone"
    assert found.lost == []


# -- the smallest that holds -------------------------------------------------------------------------------------------


def test_the_smallest_k_that_keeps_enough(made: tuple[Any, Any], checker: GistChecker) -> None:
    tried: list[int] = []

    def make(k: int) -> GistCache:
        tried.append(k)
        return whole(made) if k >= 8 else gisting.compress(*made, [PROMPT], k)

    cache, checks = smallest_gist(make, lambda cache: checker.check(cache, OTHER), 0.9, (2, 4, 8, 16))
    assert tried == [2, 4, 8]
    assert [check.num_gist_tokens for check in checks] == [2, 4, 12]
    assert cache is not None
    assert torch.equal(cache.keys[0], whole(made).keys[0])
    assert kept_share(cache.about[0]) == pytest.approx(1, abs=1e-3)
    nothing, checks = smallest_gist(make, lambda cache: checker.check(cache, OTHER), 0.9, (2, 4))
    assert nothing is None
    assert len(checks) == 2


@pytest.mark.parametrize(
    ("trained", "tokens", "counts"),
    [
        (None, 100, [4, 8, 16, 32]),
        (None, 17, [4, 8, 16]),
        (None, 4, []),
        ((1, 8), 100, [4, 8]),
        ((1, 2), 100, [2]),
        ((6, 6), 100, [6]),
    ],
)
def test_counts_to_try(monkeypatch: pytest.MonkeyPatch, trained: Any, tokens: int, counts: list[int]) -> None:
    monkeypatch.setattr(check_module, "trained_num_gist_tokens", lambda model: trained)
    assert counts_to_try(tiny.model("llama"), tokens) == counts


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "inputs", "message"),
    [
        ("", INPUTS, "prompt must be the text that was compressed, got ''"),
        (None, INPUTS, "prompt must be the text that was compressed, got None"),
        (PROMPT, [], r"inputs must be at least four texts, got \[\]; 20 or more"),
        (PROMPT, ["w1", "w2", "w3"], "inputs must be at least four texts"),
        (PROMPT, ["w1", "w2", "w3", 4], "inputs must be at least four texts"),
    ],
)
def test_bad_texts_are_refused(made: tuple[Any, Any], prompt: Any, inputs: Any, message: str) -> None:
    with pytest.raises(GistError, match=message):
        check_gist(*made, gisting.compress(*made, [PROMPT], 2), prompt, inputs, **FEW)


def test_several_prompts_are_refused(made: tuple[Any, Any], checker: GistChecker) -> None:
    two = gisting.compress(*made, [PROMPT, OTHER], 2)
    with pytest.raises(GistError, match=r"cache must hold one prompt, got 2; select it: cache\[0\]"):
        checker.check(two)
    with pytest.raises(GistError, match="swapped must hold one prompt, got 2"):
        checker.check(two[0], two)


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan"), "0.9", True])
def test_a_share_is_a_share(share: Any) -> None:
    with pytest.raises(GistError, match=r"at_least must be a share above 0 and up to 1, such as 0\.9, got"):
        smallest_gist(lambda k: None, lambda cache: None, share)  # type: ignore[arg-type, return-value]


# -- the commands ------------------------------------------------------------------------------------------------------


INPUT_LINES = "a b c d e\nf g h a b\nc a b f\nh g e d\n"
CHECK = ("check", "runs/demo", "--max-new-tokens", "4", "--prompt", "please answer plainly and keep the order")


@pytest.fixture
def checked(run: Any, workplace: Path) -> Any:
    """A cache file and a store with a gist each, and a file of inputs."""
    Path("inputs.txt").write_text(INPUT_LINES)
    assert run("compress", "runs/demo", "--prompt", CHECK[-1], "--output", "one.st", "--storage", "int8").code == 0
    assert run("compress", "runs/demo", "--prompt", CHECK[-1], "--store", "gists", "--name", "plainly").code == 0
    assert (
        run("compress", "runs/demo", "--prompt", "write capitals", "--store", "gists", "--name", "capitals").code == 0
    )
    return run


def test_check_of_a_file_writes_what_it_found(checked: Any) -> None:
    before = GistCache.load("one.st")
    done = checked(*CHECK, "--cache", "one.st", "--inputs", "inputs.txt")
    assert done.code == 0, done.err
    shown = " ".join(done.out.split())
    for part in ("no prompt", "first 2 tokens", "swapped", "4 inputs", "Greedy answers:", "of what the prompt does"):
        assert part in shown
    assert max(map(len, done.out.splitlines())) <= 80
    assert "saved in one.st" in done.err
    after = GistCache.load("one.st")
    (about,) = after.about
    assert about is not None
    assert about["quality"]["num_inputs"] == 4
    assert storage.inspect("one.st")["storage"] == "int8"
    assert all(map(torch.equal, after.keys, before.keys))
    assert "kept" in checked("inspect", "one.st").out


def test_check_of_a_name_in_a_store(checked: Any) -> None:
    words = (*CHECK, "--store", "gists", "--name", "plainly", "--inputs", "inputs.txt")
    done = checked(*words, "--swapped-name", "capitals", "--json", "--no-save")
    assert done.code == 0, done.err
    row = json.loads(done.out)
    assert set(row["controls"]) == {"no prompt", "first tokens", "swapped"}
    assert row["saved_in"] is None
    with gisting.GistStore("gists") as store:
        assert "quality" not in (store.about("plainly") or {})
        assert checked(*words, "--swapped-name", "capitals").code == 0
        quality = (store.about("plainly") or {})["quality"]
        assert quality["kept_against_swapped"] == pytest.approx(row["kept_against"]["swapped"], rel=1e-3)
        assert store.entry("plainly").is_keyed_by_text
        assert store.verify() == []


def test_figures_are_not_kept_with_a_gist_that_came_later(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: GistChecker, cache: GistCache, swapped: Any) -> GistCheck:
        with gisting.GistStore("gists") as store:
            store.put("capitals", store["plainly"])
        return by_hand()

    monkeypatch.setattr(GistChecker, "check", check)
    words = (*CHECK[:-1], "write capitals", "--store", "gists", "--name", "capitals", "--inputs", "inputs.txt")
    done = checked(*words, "--json")
    assert done.code == 1
    assert json.loads(done.out)["saved_in"] is None, "the figures are printed all the same"
    assert "'capitals' was replaced or noted about after it was read" in done.err
    with gisting.GistStore("gists") as store:
        assert "quality" not in (store.about("capitals") or {})


def test_check_is_an_exit_code(checked: Any) -> None:
    """The demo checkpoint of the tests has hardly learned, so its gists keep little; the whole prompt keeps all."""
    words = (*CHECK, "--cache", "one.st", "--inputs", "inputs.txt", "--at-least")
    failed = checked(*words, "0.99")
    assert failed.code == 1
    assert "of what the prompt does, less than 0.99; take more gist tokens or the whole prompt" in failed.err
    assert checked(*words, "2").code == 1
    assert (GistCache.load("one.st").about[0] or {})["quality"]["kept"] < 0.99, "kept although it failed"
    made = gisting.load("runs/demo")
    whole(made, CHECK[-1]).save("whole.st")
    good = checked(*CHECK, "--cache", "whole.st", "--inputs", "inputs.txt", "--at-least", "0.99")
    assert good.code == 0, good.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cache", "one.st", "--template", "alpaca"), "template"),
        (("--cache", "one.st", "--inputs", "few.txt"), "inputs must be at least four texts"),
        (("--store", "gists", "--name", "capitals"), "'capitals' was compressed from a prompt of 3 tokens"),
        (("--cache", "one.st", "--swapped-name", "x"), "--swapped-name needs --store"),
        (("--cache", "one.st", "--swapped-cache", "a", "--swapped-prompt-file", "b"), "give one of --swapped-cache"),
        (("--cache", "one.st", "--at-least", "90"), "at_least must be a share above 0 and up to 1"),
        ((), "give either --cache FILE or --store DIR with --name NAME"),
    ],
)
def test_check_refuses_in_one_line(checked: Any, words: tuple[str, ...], message: str) -> None:
    Path("few.txt").write_text("a b\n")
    done = checked(*CHECK, *words)
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cache", "two.st"), "cache must hold one prompt, got 2"),
        (("--cache", "one.st", "--swapped-cache", "two.st"), "swapped must hold one prompt, got 2"),
        (("--cache", "one.st", "--swapped-cache", "half.st"), "swapped: cache has dtype torch.bfloat16"),
    ],
)
def test_check_refuses_caches_before_anything_is_sampled(
    checked: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    two = GistCache.cat([GistCache.load("one.st")] * 2)
    two.save("two.st")
    two[0].to(dtype=torch.bfloat16).save("half.st")
    monkeypatch.setattr(check_module, "sample_answers", None)
    done = checked(*CHECK, *words)
    assert done.code == 1
    assert message in done.err


def test_inputs_are_read_as_distil_reads_them(checked: Any) -> None:
    """Blank and repeated lines are no inputs; JSONL is taken."""
    lines = ["a b c", "d e", "f g h", "h g"]
    Path("blank.txt").write_text("\n\n".join([*lines, lines[0]]) + "\n\n")
    Path("rows.jsonl").write_text("".join(json.dumps({"input": line, "output": "x"}) + "\n" for line in lines))
    rows = []
    for name in ("blank.txt", "rows.jsonl"):
        done = checked(*CHECK, "--cache", "one.st", "--no-save", "--json", "--inputs", name)
        assert done.code == 0, done.err
        rows.append(json.loads(done.out))
    assert rows[0] == rows[1]
    assert rows[0]["gist"]["num_answers"] == 4
    words = ("compress", "runs/demo", "--prompt", "write capitals", "--output", "x.st", "--at-least", "0.01")
    done = checked(*words, "--inputs", "empty.jsonl")
    assert "empty.jsonl" in done.err


def test_the_bars_count_every_answer(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[list[int]] = []

    @contextmanager
    def bar(name: str, total: int) -> Any:
        bars.append([total, 0])

        def advance(count: int) -> None:
            bars[-1][1] += count

        yield advance

    monkeypatch.setattr("gisting.cli.check.progress_bar", bar)
    monkeypatch.setattr("gisting.cli.caches.progress_bar", bar)
    monkeypatch.setattr(check_module, "counts_to_try", lambda model, num_tokens: [1, 2])
    monkeypatch.setattr(check_module, "find_spans", lambda prompt: [Span("a", "b c"), Span("d", "e")])
    assert checked(*CHECK, "--cache", "one.st", "--inputs", "inputs.txt").code == 0
    words = ("compress", "runs/demo", "--prompt", "write capitals", "--inputs", "inputs.txt", "--at-least", "1")
    assert checked(*words, "--output", "two.st").code == 1
    assert bars[0] == [4 * 4 + 2 + 5 * 4 + 2] * 2
    assert bars[1] == [4 * 4 + 2 + 2 * (4 * 4 + 2) + 4] * 2, "no prompt is measured once for all k"


def test_a_prompt_without_effect_is_told_in_a_sentence(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GistCheck, "kept_against", lambda found, control: None)
    failed = checked(*CHECK, "--cache", "one.st", "--inputs", "inputs.txt", "--at-least", "0.9")
    assert failed.code == 1
    expected = (
        "error: these inputs show no effect of the prompt, so nothing can be kept of it; give inputs whose answers "
        "depend on the prompt"
    )
    assert expected in " ".join(failed.err.split())


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_figures_that_cannot_be_saved_are_printed(
    checked: Any, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(GistCache, "save", full)
    done = checked(*CHECK, "--cache", "one.st", "--inputs", "inputs.txt", *more)
    assert done.code == 1
    assert "no space left" in done.err
    assert "saved in" not in done.err
    assert json.loads(done.out)["saved_in"] is None if more else "of what the prompt does" in done.out


def test_compress_at_least(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "counts_to_try", lambda model, num_tokens: [1, 2, 3])
    kept = {1: 0.1, 2: 0.5, 3: 0.95}

    def check(self: GistChecker, cache: GistCache) -> GistCheck:
        gist = divergence(*[1 - kept[cache.num_gist_tokens[0]]] * 2)
        return replace(by_hand(), gist=gist, controls={"no prompt": divergence(1.0, 1.0)})

    monkeypatch.setattr(GistChecker, "check", check)
    words = ("compress", "runs/demo", "--prompt", "write capitals", "--inputs", "inputs.txt", "--at-least")
    done = checked(*words, "0.5", "--output", "two.st")
    assert done.code == 0, done.err
    assert "'write capitals' keeps 0.10 with k = 1, 0.50 with k = 2" in done.out
    loaded = GistCache.load("two.st")
    assert loaded.num_gist_tokens == [2]
    assert kept_share(loaded.about[0]) == 0.5
    done = checked(*words, "0.9", "--store", "gists", "--name", "capitals")
    assert done.code == 0, done.err
    with gisting.GistStore("gists") as store:
        assert store.entry("capitals").num_gist_tokens == 3
        assert kept_share(store.about("capitals")) == 0.95
    failed = checked(*words, "0.99", "--output", "none.st")
    assert failed.code == 1
    assert "keep the whole prompt: no gist of 'write capitals' keeps 0.99 of what it does" in failed.err
    assert "0.95 with k = 3" in failed.err
    assert not Path("none.st").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--inputs", "inputs.txt"), "--inputs is for --at-least"),
        (("--at-least", "0.9", "-k", "2"), "--at-least finds the number of gist tokens; give no other"),
        (("--at-least", "1.5"), "at_least must be a share"),
    ],
)
def test_compress_at_least_refuses(checked: Any, words: tuple[str, ...], message: str) -> None:
    done = checked("compress", "runs/demo", "--prompt", "write capitals", "--output", "x.st", *words)
    assert done.code == 1
    assert message in done.err
    unnamed = checked("compress", "runs/demo", "--prompt", "a", "--store", "gists", "--at-least", "0.9")
    assert "with --at-least, each prompt in a store needs a name" in unnamed.err
