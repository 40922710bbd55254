"""The command line: every command on a small checkpoint, every error in one line with exit code 1, and the README's
commands.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gisting
from gisting import GistError
from gisting.demo.base_model import HUB_NAME
from gisting.models.adapters import Adapter, attach
from tests import garbage, tiny
from tests.repository import fences_in

ROOT = Path(__file__).resolve().parents[1]


# -- the demo ----------------------------------------------------------------------------------------------------------


def test_what_the_demo_shows_and_leaves(demo_checkpoint: Path) -> None:
    text = (demo_checkpoint.parent / "demo.txt").read_text(encoding="utf-8")
    for line in (
        "1. The task",
        "2. Training",
        "3. Accuracy",
        "4. A fresh instruction",
        "5. What a request costs",
        "6. Saved",
    ):
        assert line in text
    for word in ("positive", "gist", "negative", "no cache", "prefix cache", "gist cache", "cache bytes", "MFLOPs"):
        assert word in text
    row = json.loads((demo_checkpoint.parent / "demo.json").read_text(encoding="utf-8"))
    assert set(row["accuracy"]) == {f"{s}/{c}" for s in ("seen", "unseen") for c in ("gist", "positive", "negative")}
    assert [latency["mode"] for latency in row["latency"]] == ["no cache", "prefix cache", "gist cache"]
    assert row["fresh_total"] == 5
    assert {path.name for path in demo_checkpoint.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "gist.json",
        "gists",
        "unseen.jsonl",
    }


def test_the_demo_is_printed_with_its_headings(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gisting.demo import letters

    def stop(*args: object) -> None:
        raise GistError("far enough")

    monkeypatch.setattr(letters, "_train", stop)
    result = run("demo", "--from-scratch", "--output", tmp_path)
    assert "far enough" in result.err
    assert "1. The task: follow" in result.out


@pytest.mark.parametrize(("steps", "fall"), [(20, 0.85), pytest.param(80, 0.5, marks=pytest.mark.slow)])
def test_the_demo_learns(tmp_path: Path, steps: int, fall: float) -> None:
    """The loss falls in the first steps of the demo's training as it does on the way to the committed accuracies."""
    from gisting.data.collate import GistCollator
    from gisting.data.tasks import LetterTask, task_tokenizer
    from gisting.demo import task_model
    from gisting.train.finetune import finetune, published_arguments

    tokenizer = task_tokenizer()
    model = task_model(tokenizer)
    arguments = published_arguments(
        tmp_path,
        batch_size=64,
        per_device_batch_size=64,
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=steps // 4,
        save_strategy="no",
        disable_tqdm=True,
    )
    batch = GistCollator(tokenizer, 2)(LetterTask().records("seen", 64, 9))
    before = float(model(**batch).loss.detach())
    finetune(model, tokenizer, LetterTask().records("seen", steps * 64, 0), arguments, num_gist_tokens=2)
    assert float(model(**batch).loss.detach()) < fall * before


def test_the_commands_that_the_demo_suggests_run(run, workplace: Path, demo_checkpoint: Path) -> None:
    text = (demo_checkpoint.parent / "demo.txt").read_text(encoding="utf-8")
    suggested = [line.strip() for line in text.splitlines() if line.strip().startswith("gisting ")]
    assert len(suggested) == 3
    for line in suggested:
        words = shlex.split(line.replace(str(demo_checkpoint), "runs/demo"))
        result = run(*words[1:], *(["--max-new-tokens", "8"] if words[1] in ("generate", "eval") else []))
        assert result.code == 0, result.err


# -- the commands ------------------------------------------------------------------------------------------------------


def test_compress_then_generate(run, workplace: Path) -> None:
    made = run(
        "compress",
        "runs/demo",
        "--prompt",
        "please reverse the letters",
        "--prompt",
        "end with a bang",
        "--output",
        "two.st",
    )
    assert made.code == 0, made.err
    assert "saved in two.st" in made.out
    answered = run(
        "generate",
        "runs/demo",
        "--cache",
        "two.st",
        "--input",
        "a b",
        "--input",
        "c d",
        "--json",
        "--max-new-tokens",
        "6",
    )
    rows = [json.loads(line) for line in answered.out.splitlines()]
    model, tokenizer = gisting.load("runs/demo")
    cache = gisting.compress(model, tokenizer, ["please reverse the letters", "end with a bang"], 2)
    expected = gisting.generate(model, tokenizer, ["a b", "c d"], cache=cache, max_new_tokens=6, do_sample=False)
    assert [row["output"] for row in rows] == expected
    assert [row["input"] for row in rows] == ["a b", "c d"]


def test_files_for_prompts_and_inputs(run, workplace: Path) -> None:
    Path("p.txt").write_text("answer plainly", encoding="utf-8")
    Path("i.txt").write_bytes("\ufeffa b\u2028b a\r\nc d\r\n".encode())
    assert run("compress", "runs/demo", "--prompt-file", "p.txt", "-k", "3", "--output", "one.st").code == 0
    assert gisting.GistCache.load("one.st").num_gist_tokens == [3]
    result = run("generate", "runs/demo", "--cache", "one.st", "--input-file", "i.txt", "--max-new-tokens", "4")
    assert result.code == 0
    assert len(result.out.splitlines()) == 2
    Path("i.jsonl").write_text("{}", encoding="utf-8")
    result = run("generate", "runs/demo", "--cache", "one.st", "--input-file", "i.jsonl")
    assert result.code != 0
    assert "i.jsonl has the name of a data file, not of a text with one input per line" in result.err


def test_columns_have_other_names(run, workplace: Path) -> None:
    Path("q.csv").write_text('question,answer,task\na b,b a,"please reverse the letters , answer plainly"\n', "utf-8")
    columns = "instruction=task,input=question,output=answer"
    words = ("--condition", "gist", "--max-new-tokens", "4", "--json")
    result = run("eval", "runs/demo", "--data", "q.csv", "--columns", columns, *words)
    assert result.code == 0, result.err
    (row,) = (json.loads(line) for line in result.out.splitlines())
    assert (row["split"], row["num_records"]) == ("q", 1)
    result = run("eval", "runs/demo", "--data", "q.csv", "--columns", "task")
    assert result.code != 0
    assert "columns must be names such as instruction=question,output=answer, got 'task'" in result.err


def test_a_long_prompt_in_chunks(run, workplace: Path) -> None:
    prompt = "please reverse the letters , drop the last letter and write capitals"
    words = ("compress", "runs/demo", "--prompt", prompt, "--chunk-length", "5")
    result = run(*words, "--output", "one.st")
    assert result.code == 0, result.err
    _, tokenizer = gisting.load("runs/demo")
    (encoding,) = tokenizer.encode_prompts([prompt], 2, 5)
    assert gisting.GistCache.load("one.st").num_gist_tokens == [encoding.num_gist_tokens]
    assert encoding.num_gist_tokens > 2
    assert f"│ {encoding.num_prompt_tokens} " in result.out
    assert run(*words, "--name", "long", "--store", "gists").code == 0
    (row,) = (json.loads(line) for line in run("store", "list", "gists", "--json").out.splitlines())
    assert (row["num_gist_tokens"], row["num_prompt_tokens"]) == (encoding.num_gist_tokens, encoding.num_prompt_tokens)


def test_sampling_is_reproducible(run, workplace: Path) -> None:
    run("compress", "runs/demo", "--prompt", "answer plainly", "--output", "one.st")
    words = ("generate", "runs/demo", "--cache", "one.st", "--input", "a b", "--sample", "--max-new-tokens", "8")
    first, again, other = run(*words, "--seed", "1"), run(*words, "--seed", "1"), run(*words, "--seed", "2")
    assert first.out == again.out != other.out


def test_eval_json(run, workplace: Path) -> None:
    result = run(
        "eval", "runs/demo", "--data", "runs/demo/unseen.jsonl", "--limit", "4", "--max-new-tokens", "4", "--json"
    )
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["condition"] for row in rows] == ["gist", "positive", "prompt", "negative", "swapped"]
    assert all(row["num_records"] == 4 and len(row["predictions"]) == 4 for row in rows)


def test_train_resume_and_evaluate(run, workplace: Path) -> None:
    words = (
        *("train", "runs/demo", "--data", "runs/demo/unseen.jsonl", "--output", "runs/more", "-k", "1:2"),
        *("--condition", "gist=3", "--condition", "positive", "--batch-size", "16", "--save-steps", "2"),
        *("--max-new-tokens", "3", "--eval", "runs/demo/unseen.jsonl", "--gradient-checkpointing"),
        *("--logging-steps", "1"),
    )
    result = run(*words, "--max-steps", "2")
    assert result.code == 0, result.err
    assert "saved in runs/more" in result.out
    assert "negative" in result.out
    assert "record 2, k = 2" in result.out
    result = run(*words, "--max-steps", "4", "--resume")
    assert result.code == 0, result.err
    assert "step 4 of 4: loss " in result.err
    assert "{'" not in result.out + result.err, "no dictionaries of Trainer"
    assert json.loads(Path("runs/more/config.json").read_text(encoding="utf-8"))["gist"]["num_gist_tokens"] == [1, 2]
    assert Path("runs/more/checkpoint-4").is_dir()


def test_show_draws_the_mask(run) -> None:
    assert run("show", "a b", "c", "-k", "1").out.splitlines() == [
        "      a   b <G>   c",
        "  a   1   .   .   .",
        "  b   1   1   .   .",
        "<G>   1   1   1   .",
        "  c   .   .   1   1",
        "positions -2 -1 0 1",
    ]


def test_show_writes_a_png(run, tmp_path: Path) -> None:
    result = run("show", "a b", "c", "--encoder", "--window", "2", "--png", tmp_path / "mask.png")
    assert result.code == 0, result.err
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_that_is_not_trained_is_noted(run, tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "plain")
    tiny.word_tokenizer().save_pretrained(tmp_path / "plain")
    result = run(
        "compress", tmp_path / "plain", "--prompt", "w1 w2", "--template", "plain", "--output", tmp_path / "c.st"
    )
    assert result.code == 0, result.err
    assert "has not been trained to gist" in result.err


def test_a_base_model_answers_from_the_gists_of_its_adapter(run, tmp_path: Path) -> None:
    """It was never patched: the template is the gist's, and nothing is said about training."""
    tiny.model("llama", vocab_size=80).save_pretrained(tmp_path / "base")
    tiny.word_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = gisting.load(tmp_path / "base", "plain")
    attach(model, Adapter("gist-lora", rank=2))
    gisting.save_pretrained(model, tokenizer, tmp_path / "adapter")
    store = tmp_path / "store"
    made = run("compress", tmp_path / "adapter", "--prompt", "w1 w2", "-k", "2", "--name", "rules", "--store", store)
    assert made.code == 0, made.err
    words = ("--store", store, "--name", "rules", "--input", "w3 w4", "--max-new-tokens", "4")
    answered = run("generate", tmp_path / "base", *words)
    assert (answered.code, answered.err) == (0, "")
    assert answered.out == run("generate", tmp_path / "adapter", *words).out
    tiny.model("llama", vocab_size=96).save_pretrained(tmp_path / "other")
    tiny.word_tokenizer().save_pretrained(tmp_path / "other")
    refused = run("generate", tmp_path / "other", *words).err
    name, other = f"{tmp_path.name}/adapter", f"{tmp_path.name}/other"
    day = r"\d{4}-\d\d-\d\d"
    assert re.search(
        rf"cache 'rules' of {day} was made by {name} for llama/\w+, this model is {other} \(llama/\w+\)", refused
    )


def test_a_store_from_making_to_removing(run, workplace: Path) -> None:
    Path("prompts.jsonl").write_text(
        '{"prompt": "answer plainly", "name": "plainly"}\n{"prompt": "end with a bang", "num_gist_tokens": 3}\n',
        encoding="utf-8",
    )
    words = shlex.split("compress runs/demo --prompts prompts.jsonl --prompt 'write capitals' --name capitals")
    made = run(*words, "--store", "gists", "--storage", "int8")
    assert made.code == 0, made.err
    assert "3 prompts in gists, 3 of them new; 3 entries in total" in made.out
    again = run("compress", "runs/demo", "--prompts", "prompts.jsonl", "--store", "gists")
    assert "2 prompts in gists, 0 of them new; 3 entries in total" in again.out

    rows = [json.loads(line) for line in run("store", "list", "gists", "--json").out.splitlines()]
    assert [(row["name"], row["num_gist_tokens"], row["storage"]) for row in rows] == [
        ("capitals", 2, "int8"),
        ("plainly", 2, "int8"),
        (None, 3, "int8"),
    ]
    assert {row["checkpoint"] for row in rows} == {"runs/demo"}
    shown = run("store", "list", "gists").out
    assert "capitals" in shown
    assert f"{rows[0]['created'][:10]} " in shown
    assert "runs/demo" in shown
    assert rows[2]["key"][:12] in shown

    words = shlex.split("generate runs/demo --store gists --input 'a b' --input 'c d' --max-new-tokens 4 --json")
    answered = run(*words, "--name", "capitals", "--name", rows[2]["key"])
    assert answered.code == 0, answered.err
    model, tokenizer = gisting.load("runs/demo")
    cache = gisting.GistStore("gists").get(["capitals", rows[2]["key"]])
    expected = gisting.generate(model, tokenizer, ["a b", "c d"], cache=cache, max_new_tokens=4, do_sample=False)
    assert [json.loads(line)["output"] for line in answered.out.splitlines()] == expected

    assert "3 entries, all intact" in run("store", "verify", "gists").out
    (file,) = Path("gists", "objects").glob(f"*/{rows[0]['key']}*")
    file.write_bytes(file.read_bytes()[:-1])
    damaged = run("store", "verify", "gists")
    assert damaged.code == 1
    assert "torn: " in damaged.out
    assert "gists has 1 faults" in damaged.err

    assert run("store", "remove", "gists", "capitals", rows[2]["key"][:12]).code == 0
    lost = run("store", "gc", "gists", "--keep-model", "llama/typo")
    assert "keep_models must be a list of models in the store" in lost.err
    assert run("store", "gc", "gists", "--drop-unnamed", "--keep-model", rows[0]["model"]).code == 0
    assert [json.loads(line)["name"] for line in run("store", "list", "gists", "--json").out.splitlines()] == [
        "plainly"
    ]


def test_texts_are_printed_as_they_are(run, workplace: Path) -> None:
    words = ("compress", "runs/demo", "--prompt", "reverse [/INST] the \x1b[31m letters", "--store", "gists")
    made = run(*words, "--name", "[bold]x")
    assert made.code == 0, made.err
    assert r"reverse [/INST] the \x1b[31m letters" in made.out
    assert "[bold]x" in run("store", "list", "gists").out


def test_looking_for_a_store_makes_none(run, workplace: Path) -> None:
    Path("empty").mkdir()
    for command in ("list", "verify", "gc"):
        assert "there is no store in empty" in run("store", command, "empty").err
    assert list(Path("empty").iterdir()) == []


def test_inspect_shows_what_a_file_holds(run, workplace: Path) -> None:
    run("compress", "runs/demo", "--prompt", "answer plainly", "--output", "one.st", "--storage", "float8_e4m3")
    shown = run("inspect", "one.st")
    assert shown.code == 0, shown.err
    for word in ("float8_e4m3", "letters", "runs/demo", "llama/", "intact: "):
        assert word in shown.out
    found = json.loads(run("inspect", "one.st", "--json").out)
    assert found["manifest"]["lengths"] == [2]
    Path("one.st").write_bytes(Path("one.st").read_bytes().replace(b"llama/", b"lloma/"))
    assert "one.st is altered" in run("inspect", "one.st").err


def test_what_was_measured_of_a_gist_is_shown(run, workplace: Path) -> None:
    run("compress", "runs/demo", "--prompt", "answer plainly", "--output", "one.st")
    run("compress", "runs/demo", "--prompt", "answer plainly", "--store", "gists", "--name", "plainly")
    run("compress", "runs/demo", "--prompt", "answer", "--store", "gists", "--name", "short")
    assert "kept" not in run("store", "list", "gists").out
    facts = {"kept": 0.912, "kl_mean": 0.01234, "lost": ["a[b]"]}
    gisting.GistCache.load("one.st").with_about(quality=facts).save("one.st")
    shown = run("inspect", "one.st").out
    assert 'kept0.912,klmean0.01234,lost["a[b]"]' in re.sub(r"[\s│]", "", shown)
    store = gisting.GistStore("gists")
    store.note("plainly", quality=facts)
    (plainly, short) = [line for line in run("store", "list", "gists").out.splitlines() if " 20" in line]
    assert plainly.rstrip().endswith("91 %")
    assert "%" not in short
    rows = [json.loads(line) for line in run("store", "list", "gists", "--json").out.splitlines()]
    digests = [hashlib.sha256(text).hexdigest() for text in (b"answer plainly", b"answer")]
    assert [row["about"] for row in rows] == [
        {"prompt_sha256": digests[0], "quality": facts},
        {"prompt_sha256": digests[1]},
    ]
    store.save_pretrained("saved")
    assert "| kept, plainly | 0.912 |" in Path("saved/README.md").read_text()


def test_version(run) -> None:
    assert run("--version").out.strip() == gisting.__version__
    as_module = [sys.executable, "-m", "gisting", "--version"]
    assert subprocess.run(as_module, capture_output=True, text=True, check=True).stdout.strip() == gisting.__version__


# -- internalize -------------------------------------------------------------------------------------------------------


@pytest.fixture
def queries(workplace: Path) -> Iterator[list[str]]:
    """Make the files of a small internalisation; return its words without the output."""
    Path("prompt.txt").write_text("please reverse the letters and answer plainly\n", encoding="utf-8")
    rows = [{"input": f"{a} {b}", "output": f"{b} {a}"} for a in "abcd" for b in "efgh"]
    for name, part in (("train", rows[:12]), ("held-out", rows[12:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    words = "runs/demo --prompt-file prompt.txt --data train.jsonl --max-steps 4 --batch-size 4 --max-new-tokens 3"
    with garbage.frozen():
        yield ["internalize", *words.split()]


def test_internalize_shows_every_stage_and_says_how_to_run_it(run, queries: list[str]) -> None:
    result = run(*queries, "--eval", "held-out.jsonl", "--examples", "3", "--output", "runs/in")
    assert result.code == 0, result.err
    assert "saved in runs/in; run it on the bare query: " in result.out
    for cell in ("prompt", "no-prompt", "67 %", "33 %", "exact_match", "as read"):
        assert cell in result.out
    found = json.loads(Path("runs/in/internalized.json").read_text(encoding="utf-8"))
    assert [stage["num_examples"] for stage in found["stages"]] == [3, 2, 1, 0]
    assert found["prompt_sha256"] == hashlib.sha256(b"please reverse the letters and answer plainly").hexdigest()
    gisting.load("runs/in")
    for prompt, warned in (("please reverse the letters and answer plainly", False), ("answer plainly", True)):
        done = run("compress", "runs/in", "--prompt", prompt, "--output", "in.gist.safetensors", "-k", "1")
        assert done.code == 0
        assert ("'answer plainly' is not the prompt that runs/in was trained on" in done.err) is warned
    again = run(*queries, "--eval", "held-out.jsonl", "--examples", "3", "--output", "runs/in")
    assert "already holds an internalisation" in again.err
    done = run("internalize", "--recipe", "runs/in/recipe.yaml", "--resume", "--json")
    assert done.code == 0, "what was done can be read"
    assert json.loads(done.out)["prompt_sha256"] == found["prompt_sha256"]


def test_internalize_by_recipe_and_options(run, queries: list[str]) -> None:
    recipe = Path("recipe.yaml")
    recipe.write_text(
        "model: runs/demo\nprompt_file: prompt.txt\ndata: train.jsonl\neval: held-out.jsonl\noutput: runs/none\n"
        "schedule: 1,0.5,0\nrewrites: rewrites.json\nmax_steps: 3\nbatch_size: 4\nlearning_rate: 1e-3\ntail: gist\n"
        "num_gist_tokens: 2\nmax_new_tokens: 3\n",
        encoding="utf-8",
    )
    Path("rewrites.json").write_text('{"0.5": "reverse the letters"}', encoding="utf-8")
    result = run("internalize", "--recipe", recipe, "--output", "runs/gist", "--metric", "rouge_l")
    assert result.code == 0, result.err
    assert "run it on the gist of the prompt: " in result.out
    assert "gist, k = 2" in result.out
    found = json.loads(Path("runs/gist/internalized.json").read_text(encoding="utf-8"))
    assert (found["settings"]["shortener"], found["settings"]["arguments"]["learning_rate"]) == ("rewrites", 1e-3)
    assert set(found["stages"][0]["metrics"]["prompt"]) == {"rouge_l"}
    recipe.write_text("epoch: 3\n", encoding="utf-8")
    result = run("internalize", "--recipe", recipe, "--output", "runs/x")
    assert (result.code, "there is no setting 'epoch'; did you mean epochs?" in result.err) == (1, True)
    recipe.write_text("max_steps: many\n", encoding="utf-8")
    assert run("internalize", "--recipe", recipe, "--output", "runs/x").code == 1


def test_internalize_recipes_are_read(run, queries: list[str]) -> None:
    """Run every file in recipes/internalize for a few steps."""
    for path in sorted((ROOT / "recipes" / "internalize").glob("*.yaml")):
        words = [*queries[2:], "--eval", "held-out.jsonl", "--output", f"runs/{path.stem}"]
        words += ["--per-device-batch-size", "4", "--shortener", "none"]
        result = run("internalize", "--recipe", path, *words)
        assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedule steep", "schedule must be one of linear, exponential, inverse, or shares such as 1,0.6,0.3,0"),
        ("--schedule 1,0.5", "the last share must be exactly 0"),
        ("--shortener zip", "shortener must be one of none, self-information, llmlingua2, rewrites, got 'zip'"),
        ("--shortener rewrites", "--shortener rewrites goes with --rewrites FILE"),
        ("--rewrites train.jsonl", "train.jsonl is not JSON"),
        ("--rewrites list.json", "list.json must map shares to texts"),
        ("--metric bleurt", "metric must be one of exact_match, bleu, rouge_l, got 'bleurt'"),
        ("--control shortened", "--control shortened needs --share, the kept share of the prompt, such as --share 0.5"),
        ("--control shortened --share 0.5", "a shortener that keeps the whole prompt is control 'full'"),
        ("--control fool", "control must be one of bare, full, full-run-bare, shortened"),
        ("--prompt-file none.txt", "none.txt"),
        ("--template prompt.txt", "is another setting, prompt_file: --prompt-file FILE), got 'prompt.txt'"),
        ("--recipe prompt.txt", "prompt.txt must hold one 'name: value' per line"),
        ("--resume", "holds nothing to resume; start without resume"),
    ],
)
def test_internalize_errors_are_one_line(run, queries: list[str], words: str, message: str) -> None:
    Path("list.json").write_text("[1]", encoding="utf-8")
    result = run(*queries, "--output", "runs/x", *words.split())
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compress runs/demo --output x", "give a prompt: --prompt TEXT, --prompt-file FILE or --prompts FILE"),
        ("compress runs/demo --prompt a", "give either --output FILE or --store DIR"),
        (
            "compress runs/demo --prompt a --output x --store s",
            "give either --output FILE or --store DIR",
        ),
        ("compress runs/demo --prompt a --output x --name n", "names are for a store"),
        (
            "compress runs/demo --prompt a --prompt b --store s --name n",
            "--name must be given once for each",
        ),
        ("compress runs/demo --prompt a --store s --name a/b", "'a/b'"),
        ("compress runs/demo --prompt a --output x --storage int4", "storage must be"),
        ("compress runs/demo --prompts none.jsonl --store s", "none.jsonl"),
        ("generate runs/demo", "give either --cache FILE or --store DIR with --name NAME"),
        ("generate runs/demo --store s", "--store needs --name NAME"),
        ("generate runs/demo --store s --name a", "there is no store in s; make one: gisting compress"),
        ("generate runs/demo --cache c --name a", "--name needs --store"),
        ("store list runs/demo", "there is no store in runs/demo"),
        ("compress runs/demo --prompt a --store runs/demo", "runs/demo is not a store and not empty"),
        ("compress runs/demo --prompt-file runs/demo/model.safetensors --output x", "is not UTF-8 text"),
        ("store verify nothing", "there is no store in nothing"),
        ("inspect none.st", "none.st"),
        ("inspect runs/demo/model.safetensors", "holds no gist cache"),
        ("compress runs/demo --prompt '' --output x", "prompt 0 is empty"),
        ("compress runs/demo --prompt a -k 0 --output x", "num_gist_tokens must be at least 1, got 0"),
        (
            "compress runs/demo --prompt a --dtype int8 --output x",
            "dtype must be auto, float32, bfloat16 or float16, got 'int8'",
        ),
        ("compress runs/demo --prompt a --template alpaca --output x", "model was patched for tokenizer"),
        ("compress runs/demo --prompt-file none.txt --output x", "none.txt"),
        ("compress runs/nothing --prompt a --output x", "runs/nothing"),
        ("generate runs/demo --cache none.st", "none.st does not exist; make it with `gisting compress`"),
        ("generate runs/demo --cache runs/demo/model.safetensors", "holds no gist cache"),
        ("eval runs/demo --data none.jsonl", "none.jsonl"),
        ("eval runs/demo --data runs/demo/config.json", "config.json must contain a list of objects"),
        (
            "eval runs/demo --data runs/demo/unseen.jsonl --condition gits",
            "condition must be one of gist, positive, negative",
        ),
        (
            "train runs/demo --data runs/demo/unseen.jsonl --output o -k many",
            "must be a number or a range such as 1:10",
        ),
        (
            "train runs/demo --data runs/demo/unseen.jsonl --output o --condition gist=x",
            "must be a name or name=weight",
        ),
        ("compress runs/demo --prompt a --device nowhere --output x", "device 'nowhere' cannot be used"),
        (
            "train runs/demo --data runs/demo/unseen.jsonl --output o --batch-size 16 --resume",
            "o holds no checkpoint to resume from",
        ),
        ("show a b --condition gits", "condition must be one of gist, positive, negative, got 'gits'"),
    ],
)
def test_an_error_is_one_line(run, workplace: Path, words: str, message: str) -> None:
    result = run(*shlex.split(words))
    assert result.code == 1
    assert message in result.err
    assert re.search(r"^error: ", result.err, flags=re.MULTILINE)
    assert "Traceback" not in result.err


def test_wrong_usage_is_exit_code_2(run) -> None:
    assert run("compress").code == 2
    assert run("store", "remove", "gists").code == 2


# -- the README as written ---------------------------------------------------------------------------------------------


# So that distilling a tiny model takes no minute; what is learned is tested elsewhere.
QUICKLY = {"distill": "--steps 2 --num-answers 8", "try": "--steps 2", "check": "--max-new-tokens 8"}


def readme(language: str) -> list[str]:
    fences = fences_in((ROOT / "README.md").read_text(encoding="utf-8"))
    return [fence.text for fence in fences if fence.language == language]


@pytest.fixture
def readers_files(workplace: Path) -> None:
    """Write the files that a reader of the README has."""
    words = (
        "You are the guide of a small museum by the sea. Answer in one short and friendly sentence, and never shout."
    )
    Path("my-prompt.txt").write_text(words, encoding="utf-8")
    for name, rooms in (("questions.txt", range(6)), ("other-questions.txt", range(6, 12))):
        Path(name).write_text("\n".join(f"What is in room {room}?" for room in rooms), encoding="utf-8")


@pytest.mark.usefixtures("readers_files")
def test_the_readmes_commands_run_in_their_order(run, workplace: Path, chat_checkpoint: Path) -> None:
    lines = [line for text in readme("bash") for line in text.splitlines() if line.startswith("gisting ")]
    assert len(lines) >= 5
    for line in lines:
        few = QUICKLY.get(line.split()[1], "")
        result = run(*shlex.split(f"{line.replace(HUB_NAME, str(chat_checkpoint))} {few}")[1:])
        assert result.code == 0, f"{line}\n{result.err}"


@pytest.mark.usefixtures("readers_files")
def test_the_readmes_python_runs_as_pasted(workplace: Path, chat_checkpoint: Path) -> None:
    """Each with its own globals, in one new process, because importing torch takes longer than the rest."""
    fences = [text.replace(HUB_NAME, str(chat_checkpoint)) for text in readme("python")]
    quick = [text.replace("splitlines(), 16)", "splitlines(), 16, steps=2, num_answers=8)") for text in fences]
    assert sum(one != other for one, other in zip(fences, quick, strict=True)) == 1
    fences = quick
    assert len(fences) >= 2
    Path("fences.json").write_text(json.dumps(fences), encoding="utf-8")
    code = "import json\nfor text in json.load(open('fences.json')): exec(text, {'__name__': '__main__'})"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


# -- data --------------------------------------------------------------------------------------------------------------


def test_alpaca_plus_from_local_sources(run, tmp_path: Path) -> None:
    from tests.test_alpaca_plus import ALPACA, HUMAN, SELF_INSTRUCT

    words = ["data", "alpaca-plus", "--output", tmp_path / "made"]
    for option, items in (("--alpaca", ALPACA), ("--self-instruct", SELF_INSTRUCT), ("--human", HUMAN)):
        path = tmp_path / f"{option[2:]}.json"
        path.write_text(json.dumps(items), encoding="utf-8")
        words += [option, path]
    result = run(*words)
    assert result.code == 1
    assert "validation_human 2 (published 252)" in result.err
    assert not (tmp_path / "made").exists(), "nothing is written before the sizes are right"
    result = run(*words, "--any-size", "--json")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert {row["split"]: row["num_records"] for row in rows}["validation_seen"] == 3
    assert all(Path(row["file"]).is_file() for row in rows)
    assert len(gisting.load_records(tmp_path / "made" / "alpaca_plus_validation_seen.json")) == 3


@pytest.mark.parametrize(
    ("words", "headers"),
    [
        ("compress runs/demo --prompt 'write capitals' --output one.st", "prompt tokens bytes"),
        ("inspect runs/demo/gists/instruction.gist.safetensors", "model tokenizer sha256"),
        ("store list gists", "name, tokens storage"),
        ("cost runs/demo --prompt-tokens 20000 --input-tokens 4", "cached tokens prompts per GB"),
        ("eval runs/demo --data few.jsonl --max-new-tokens 2", "condition ROUGE-L perplexity reference"),
        ("doctor", "versions torch"),
    ],
)
def test_tables_read_at_80_columns(
    run, workplace: Path, monkeypatch: pytest.MonkeyPatch, words: str, headers: str
) -> None:
    """Nothing is cut, and no word of a header is broken."""
    monkeypatch.setenv("COLUMNS", "80")
    run("compress", "runs/demo", "--prompt", "write capitals", "--store", "gists", "--name", "capitals " * 12 + "end")
    records = Path("runs/demo/unseen.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(records[:2]), encoding="utf-8")
    done = run(*shlex.split(words))
    assert done.code == 0, done.err
    table = [line for line in done.out.splitlines() if line[:1] in "│┃┏┌"] or done.out.splitlines()
    assert table
    assert max(map(len, table)) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.out
    assert all(word in done.out for word in headers.split())
