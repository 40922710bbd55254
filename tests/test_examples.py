"""Run every example as its docstring says.

By default trainings take a few steps, which shows that an example runs and prints what it should; with ``slow``, enough
steps to show that the model learned.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gisting.models.fingerprint import fingerprint
from tests import garbage, tiny

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("system", "user", "assistant", "user", "assistant")


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run an example as a script in ``tmp_path`` and return what it prints.

    It runs in this process, because importing torch and transformers takes longer than most examples.
    """

    def run(name: str, *arguments: str | Path) -> str:
        path = ROOT / "examples" / name
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capsys.readouterr()
        with garbage.frozen():
            runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f'"{path.name}"' in source


def test_the_page_names_every_example() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"^\| \[`([\w.]+)`\]", page, re.MULTILINE)) == names


def test_compress_and_generate(demo_checkpoint: Path, tmp_path: Path, run_example: Callable[..., str]) -> None:
    out = run_example("01_compress_and_generate.py", demo_checkpoint).splitlines()
    assert out[0].startswith("GistCache(3 prompts, k=[2, 2, 2]")
    # Stock generate gives the same answer as gisting.generate for the same prompt and input.
    assert eval(out[1])[0].startswith(out[3].strip())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("steps", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_finetune_a_pretrained_checkpoint(
    shared: Path, tmp_path: Path, steps: int, run_example: Callable[..., str]
) -> None:
    """A pretrained checkpoint learns to gist, and patching does not change its ordinary text."""
    checkpoint = shared / "models" / "stories260K"
    words = ("--steps", str(steps), "--output", tmp_path / "out", "--eval-records", "200" if steps > 5 else "10")
    out = run_example("02_finetune_a_checkpoint.py", checkpoint, *words)
    assert "ordinary text is as before patch: True" in out
    share = {
        name: float(value) for name, value in re.findall(r"^(gist|positive|negative)\s+([\d.]+) % exact", out, re.M)
    }
    assert share.keys() == {"gist", "positive", "negative"}
    assert out.count("(from 2 cached gist tokens)") == 2
    if steps == 300:
        assert share["gist"] >= 90
        assert share["positive"] >= 90
        assert share["negative"] <= 50
        assert "What color is it?  ->  green" in out
        assert "Tell me where.  ->  garden" in out


def test_gist_only_lora(shared: Path, tmp_path: Path, run_example: Callable[..., str]) -> None:
    """After two short trainings, the base model answers from the adapter's gists, and ordinary text is unchanged."""
    checkpoint = shared / "models" / "stories260K"
    out = run_example("03_gist_only_lora.py", checkpoint, "--steps", "5", "--output", tmp_path / "out")
    assert "ordinary text has the bits of the base model: True" in out
    assert len(re.findall(r"^\w+ saw a \w+\.  Say the \w+\.  ->  ", out, re.M)) == 4
    assert (tmp_path / "out" / "adapter" / "gist_adapter.safetensors").is_file()


# TRL 1.16 sets an argument by a name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
def test_trl_trains_with_the_collator_alone(
    demo_checkpoint: Path, tmp_path: Path, run_example: Callable[..., str]
) -> None:
    pytest.importorskip("trl", reason="needs trl, which is not a dependency: pip install trl")
    out = run_example("04_trl_sft_trainer.py", demo_checkpoint)
    first, last = map(float, re.findall(r"^loss ([\d.]+) -> ([\d.]+)$", out, re.M)[0])
    assert last < first / 2


@pytest.mark.parametrize("steps", [36, pytest.param(300, marks=pytest.mark.slow)])
def test_internalize_a_prompt(tmp_path: Path, steps: int, run_example: Callable[..., str]) -> None:
    """The staged run answers the bare query as well as its control answers the full prompt, with far fewer tokens."""
    words = ("--steps", str(steps), "--output", tmp_path / "runs")
    out = run_example("05_internalize_a_prompt.py", *words)
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if re.match(r"\| (in-stages|full) \| ", line)]
    staged, full, cached = rows[:3]
    assert [row[2] for row in rows[:2]] == ["bare query", "full prompt"]
    assert "prefix cache" in cached[2]
    if steps == 300:
        assert float(staged[6].split()[0]) >= 90
        assert float(full[6].split()[0]) >= 90
    assert float(staged[3]) < 0.1 * float(full[3])
    assert float(staged[7]) < float(cached[7]) < float(full[7]), "money for 1,000 requests"
    assert [row[3] for row in rows[3:]] == ["100 %", "38 %", "0 %"], "the template that each stage keeps"
    assert (tmp_path / "runs" / "report.md").read_text(encoding="utf-8") in out


def test_vllm_client_compresses_its_prompts(
    demo_checkpoint: Path, tmp_path: Path, run_example: Callable[..., str]
) -> None:
    """The requests to a server are tested in tests/vllm, which has a server."""
    store = tmp_path / "store"
    out = run_example("06_vllm_openai_client.py", demo_checkpoint, "--store", store, "--only-compress")
    assert out == f"{store} holds first, shout\n"


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """Save a tiny chat model, whose table has spare rows, as those of most published models have."""
    words = tiny.word_tokenizer()
    words.chat_template = (
        "{% for message in messages %}{{ 'w3' if message['role'] == 'assistant' else 'w1' }} "
        "{{ message['content'] }} w2 {% endfor %}"
        "{% if add_generation_prompt %}w3 {% endif %}"
    )
    words.save_pretrained(tmp_path / "chat")
    model = tiny.model("llama", vocab_size=80, tie_word_embeddings=False)
    with torch.no_grad():
        for rows in (slice(4), slice(64, None)):
            model.get_output_embeddings().weight[rows] = 0  # every answer is of words
    model.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_one_store_serves_the_untouched_base_model(
    chat_model: Path, tmp_path: Path, run_example: Callable[..., str]
) -> None:
    """From conversations to the base model in gisting, in stock ``generate`` and in vLLM's command line."""
    before = {file.name: file.read_bytes() for file in chat_model.iterdir()}
    said = ("w4 w5 w6", "w7", "w8 w9", "w3", "w2")
    lines = [
        {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(ROLES, (f"w{n} {said[0]}", *said[1:]), strict=True)
            ]
        }
        for n in (1, 2)
    ]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines * 2), encoding="utf-8")
    words = ("--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", "--steps", "2")
    out = run_example("07_untouched_base_model.py", chat_model, *words)
    stock = fingerprint(AutoModelForCausalLM.from_pretrained(chat_model))
    for name in ("prompt-1", "prompt-2"):
        assert f"{name}: 4 gist tokens of {stock}\n" in out
        assert re.search(rf"^{name}: w3 -> '(w\d+ ?){{12}}', as with gisting.generate: True$", out, re.M)
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["vllm", "serve", str(chat_model)]
    settings = json.loads(command[command.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
    assert stock in settings["fingerprint"]
    assert settings["tokenizer"] == str(tmp_path / "out" / "adapter")
    assert {file.name: file.read_bytes() for file in chat_model.iterdir()} == before
