"""The command and the Python code of docs/how_to_distill.md, on a tiny model in place of the real one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from gisting import GistCache
from tests import tiny
from tests.test_docs import fences, run_all


def test_the_page_of_distilling(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("llama", max_position_embeddings=512), tiny.word_tokenizer()
    model.save_pretrained(tmp_path / "SmolLM2-135M-Instruct")
    tokenizer.save_pretrained(tmp_path / "SmolLM2-135M-Instruct")
    prompt, questions = tiny.words(20, 1), [f"w{number} w{number + 1}" for number in range(20, 30)]
    (tmp_path / "system.txt").write_text(prompt)
    (tmp_path / "questions.txt").write_text("\n".join(questions))
    monkeypatch.chdir(tmp_path)
    (command,) = fences("how_to_distill.md", "console")
    quick = "--num-answers 8 --max-new-tokens 4 --steps 2".split()
    done = run(*shlex.split(command)[1:], *quick)
    assert done.code == 0, done.err
    names = run_all("how_to_distill.md", {"prompt": prompt, "questions": questions})
    assert names["cache"].num_gist_tokens == [16]
    assert GistCache.load("support.gist.safetensors").num_gist_tokens == [16]
    assert names["found"].kept == names["found"].kept
