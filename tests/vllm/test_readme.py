"""README.md's lines about serving, word for word, with real vLLM: the demo, compress, serve, and a request."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gisting.demo import run_demo
from tests.vllm.tied import Tied

README = Path(__file__).parents[2] / "README.md"
STARTS_WITHIN_S = 240
ADDRESS = "http://127.0.0.1:8000"  # vLLM's own port, because README's line names none


def line_of_readme(pattern: str) -> str:
    """Return the one command of README.md that a pattern describes."""
    (found,) = re.findall(pattern, README.read_text(encoding="utf-8"), re.MULTILINE)
    return found


def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    asked = urllib.request.Request(ADDRESS + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_lines_about_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as found:
        if found.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something else listens on port 8000, which README's line uses")
    monkeypatch.chdir(tmp_path)
    run_demo("runs/demo", steps=1, eval_records=2)
    # `gisting` is this interpreter's, with this checkout.
    shim = tmp_path / "bin" / "gisting"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gisting "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    compress = line_of_readme(r"^gisting compress .*--name reverse --store gists$")
    subprocess.run(["bash", "-c", compress], env=environment, check=True)
    log = tmp_path / "log"
    with log.open("wb") as file:
        words = ["bash", "-c", "exec " + line_of_readme(r"`(gisting serve [^`]*)`")]
        server = Tied(words, stdout=file, stderr=file, env=environment)
    try:
        end = time.monotonic() + STARTS_WITHIN_S
        while True:
            assert server.process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{ADDRESS}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        body = {"model": "runs/demo", "max_tokens": 4, "temperature": 0, "kv_transfer_params": {"gist": "reverse"}}
        made = post("/v1/completions", {**body, "prompt": "a b c d e", "return_token_ids": True})
        assert len(made["choices"][0]["token_ids"]) >= 1
        made = post("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "a b c d e"}]})
        assert made["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.kill()
