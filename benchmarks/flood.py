"""Measure how long small requests wait while other clients send long texts: to stock vLLM, and to vLLM with gists.

Two servers with the same checkpoint run one after the other. ``stock`` is vLLM without any option of ours; ``gist`` is
what ``gisting serve`` starts, and all requests to it name a gist. One client sends small requests, one after another:
first alone, then while a separate process sends long texts from many clients, each at most one text a second. The
texts are longer than the model can read, so that both servers refuse them; until then they may make others wait.

The clients run on the same machine as the server and take their share of its processor.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import OutputOption, Rows, say, where
from benchmarks.vllm import make_setup, vllm_version
from gisting.errors import GistError
from gisting.generation import compress
from gisting.markdown import markdown_table
from gisting.models.hub import save_pretrained
from gisting.models.load import load
from gisting.serving.command import serve_command
from gisting.store import GistStore

__all__ = ["FloodRow", "flood_table", "main"]

_GIST = "0"  # the name of the gist, as make_setup gives it
_OURS = ("--kv-transfer-config", "--logits-processors", "--middleware")
_STARTS_WITHIN_S = 300
_SMALL = "Name three things that one can do there."
_LONG = "Tell me about the days of the week, please. "


@dataclass(frozen=True)
class FloodRow:
    """Small requests to one server. Times are in milliseconds, from sending to the answer of one token.

    ``long_answers`` counts the answers to long texts by their HTTP status; it is empty while there are none.
    """

    server: str
    label: str
    num_clients: int
    long_mib: float
    seconds: float
    num_requests: int
    p50_ms: float
    p99_ms: float
    slowest_ms: float
    long_answers: dict[str, int]
    vllm: str


def flood_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown."""
    lines = []
    for row in rows:
        answers = ", ".join(f"{number} x {status}" for status, number in row["long_answers"].items())
        lines.append(
            [
                f"{row['server']}{', ' + row['label'] if row['label'] else ''}",
                f"{row['num_clients']} clients, {row['long_mib']:g} MiB each" if row["num_clients"] else "none",
                *(f"{row[name]:,.0f}" for name in ("p50_ms", "p99_ms", "slowest_ms", "num_requests")),
                answers or "-",
            ]
        )
    columns = ("server", "long texts", "p50, ms", "p99, ms", "slowest, ms", "small requests", "answers to long texts")
    text = f"Small requests, one after another, each for one token; {where(rows[0], 'vllm', 'torch')}."
    return "\n".join([*markdown_table(columns, lines), "", text])


def _words(server: str, model: Path, store: Path, port: int, max_length: int) -> list[str]:
    others = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model", "--enforce-eager"]
    words = serve_command(model, store, others=[*others, "--max-model-len", str(max_length)])
    if server == "gist":
        return words
    for option in _OURS:
        place = words.index(option)
        del words[place : place + 2]
    return words


@contextmanager
def _running(words: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """Run a server; give its address when it answers."""
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + _STARTS_WITHIN_S
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise GistError(f"vLLM did not start: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _post(address: str, body: bytes) -> int:
    """Send a completion and return the HTTP status; 0 if the connection failed."""
    asked = urllib.request.Request(f"{address}/v1/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=300) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        error.read()
        return error.code
    except OSError:
        return 0


def _body(text: str, has_gist: bool) -> bytes:
    body: dict[str, Any] = {"model": "model", "prompt": text, "max_tokens": 1, "temperature": 0}
    return json.dumps(body | ({"kv_transfer_params": {"gist": _GIST}} if has_gist else {})).encode()


def _flood(address: str, body: bytes, num_clients: int) -> None:
    """Send long texts until a line comes in; then print how many answers there were of each status."""
    found: Counter[str] = Counter()
    is_over, lock = threading.Event(), threading.Lock()

    def client() -> None:
        while not is_over.is_set():
            begin = time.monotonic()
            status = _post(address, body)
            with lock:
                found["no answer" if status == 0 else str(status)] += 1
            is_over.wait(max(0.0, 1 - (time.monotonic() - begin)))

    for _ in range(num_clients):
        threading.Thread(target=client, daemon=True).start()
    sys.stdin.readline()
    is_over.set()
    with lock:
        print(json.dumps(found), flush=True)
    os._exit(0)


def _small_requests(address: str, body: bytes, seconds: float) -> list[float]:
    """Send small requests for some time; return how long each took, in milliseconds."""
    taken, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        status = _post(address, body)
        taken.append(1000 * (time.perf_counter() - begin))
        if status != 200:
            raise GistError(f"a small request was answered with {status}, expected 200")
        time.sleep(0.05)
    return taken


def _measure(server: str, address: str, label: str, clients: int, mib: float, seconds: float, folder: Path) -> FloodRow:
    has_gist = server == "gist"
    small, found = _body(_SMALL, has_gist), {}
    flood = None
    if clients:
        long = folder / "long"
        long.write_bytes(_body(_LONG * round(mib * 2**20 / len(_LONG)), has_gist))
        words = [sys.executable, "-m", "benchmarks.flood", address, str(long), str(clients)]
        flood = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(3)
    try:
        taken = _small_requests(address, small, seconds)
        if flood is not None:
            out, _ = flood.communicate("\n", timeout=60)
            found = dict(sorted(json.loads(out).items()))
    finally:
        if flood is not None:
            flood.kill()
            flood.wait()
    return FloodRow(
        server=server,
        label=label,
        num_clients=clients,
        long_mib=mib if clients else 0,
        seconds=seconds,
        num_requests=len(taken),
        p50_ms=statistics.median(taken),
        p99_ms=float(torch.tensor(taken).quantile(0.99)),
        slowest_ms=max(taken),
        long_answers=found,
        vllm=vllm_version(),
    )


def main(
    output: OutputOption = None,
    model: Annotated[
        str | None, typer.Option(help="A chat model: a directory, or a repository on the Hugging Face hub.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients that send long texts.")] = 16,
    mib: Annotated[float, typer.Option(help="Size of a long text in MiB.")] = 4,
    seconds: Annotated[float, typer.Option(help="Seconds of small requests, for each row.")] = 30,
    max_length: Annotated[int, typer.Option(min=64, help="The longest sequence that the servers take.")] = 2048,
    label: Annotated[str, typer.Option(help="Said in the rows, such as a version of gisting.")] = "",
    smoke: Annotated[bool, typer.Option("--smoke", help="Serve a random tiny model; measures nothing.")] = False,
) -> None:
    """Small requests to vLLM while other clients send long texts: stock, and with gists.

    Example: python -m benchmarks flood --model ./SmolLM2-135M-Instruct --output docs/results/flood.jsonl
    """
    if (model is None) != smoke:
        raise GistError("give either --model or --smoke")
    rows = Rows("flood", output)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        if model is None:
            make_setup(folder, prompt_length=8, num_prompts=1, num_layers=2, hidden_size=128, num_new_tokens=2)
        else:
            loaded, tokenizer = load(model, "chat")
            save_pretrained(loaded, tokenizer, folder / "model")
            with GistStore(folder / "store") as store:
                store.put(_GIST, compress(loaded, tokenizer, ["You answer in one short sentence."], 8))
            del loaded
        for server in ("stock", "gist"):
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                port: int = found.getsockname()[1]
            words = _words(server, folder / "model", folder / "store", port, max_length)
            with _running(words, port, folder / f"{server}.log") as address:
                _small_requests(address, _body(_SMALL, server == "gist"), min(seconds, 5))
                for number in (0, clients):
                    row = _measure(server, address, label, number, mib, seconds, folder)
                    rows.add([row])
                    say(f"{server}, {number} clients: p50 {row.p50_ms:.0f} ms, p99 {row.p99_ms:.0f} ms")
    rows.show(flood_table)


if __name__ == "__main__":
    # python -m benchmarks.flood ADDRESS BODY CLIENTS: in a process of its own, so that it does not hold up the timing.
    _flood(sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3]))
