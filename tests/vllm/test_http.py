"""``vllm serve`` on the loopback interface, used through the ``openai`` client as a user would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gisting import GistStore
from gisting.serving.command import serve_command
from gisting.serving.requests import chat_ids, request
from tests import tiny
from tests.vllm.conftest import PROMPTS, Served, make
from tests.vllm.tied import Tied

KEY = "a key of the server"
STARTS_WITHIN_S = 240


class Server:
    """A server process with its address and its log."""

    def __init__(self, served: Served, store: Path, log: Path) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port: int = found.getsockname()[1]
        others = ["--host", "127.0.0.1", "--port", str(self.port), "--api-key", KEY, "--served-model-name", "tiny"]
        others += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--block-size", "32"]
        words = serve_command(served.path, store, others=others)
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        self.log = log
        with log.open("ab") as file:
            self._tied = Tied(words, stdout=file, stderr=file, env=environment)

    def wait(self) -> None:
        end = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < end:
            assert self._tied.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).read()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start: {self.log.read_text()[-4000:]}")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        self._tied.kill(how)

    @property
    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0)

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:gist_") and "_total{" in line]
        names = [name.split("{")[0].removeprefix("vllm:gist_").removesuffix("_total") for name, _ in found]
        return {name: float(value) for name, (_, value) in zip(names, found, strict=True)}


@contextmanager
def running(served: Served, store: Path, log: Path) -> Iterator[Server]:
    server = Server(served, store, log)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def store(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("http")
    with GistStore(folder / "store") as made, GistStore(served.store) as kept:
        for name in PROMPTS:
            made.put(name, kept[name])
        made.put("another model's", GistStore(make(folder / "other", seed=2).store)["eight"])
    return folder / "store"


@pytest.fixture(scope="module")
def server(served: Served, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(served, store, tmp_path_factory.mktemp("server") / "log") as found:
        yield found


SETTINGS: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def body(gist: str | None = None, **more: Any) -> dict[str, Any]:
    extra = {} if gist is None else {"kv_transfer_params": {"gist": gist}}
    return {"ignore_eos": True, "return_token_ids": True, **extra, **more}


def complete(server: Server, prompt: Any, gist: str | None = None, **more: Any) -> list[list[int]]:
    made = server.client.completions.create(**SETTINGS, prompt=prompt, extra_body=body(gist, **more))
    return [choice.token_ids for choice in made.choices]


def continuation(served: Served, text: str) -> list[int]:
    return served.tokenizer.encode_continuations([text])[0]


def test_completions_of_text(served: Served, server: Server) -> None:
    texts = [tiny.words(9, seed=1), tiny.words(30, seed=2)]
    for name in PROMPTS:
        wanted = [served.answer(continuation(served, text), name, 12) for text in texts]
        assert complete(server, texts[0], name) == wanted[:1]
        assert complete(server, texts, name) == wanted


def test_completions_of_ids(served: Served, server: Server) -> None:
    ids = continuation(served, tiny.words(9, seed=1))
    wanted = served.answer(ids, "eight", 12)
    placed = request("eight", token_ids=ids, tokenizer=served.tokenizer, num_gist_tokens=8)
    assert complete(server, ids, "eight") == [wanted]
    assert complete(server, [ids, placed.prompt_token_ids], "eight") == [wanted, wanted]
    made = server.client.completions.create(**SETTINGS, **{**placed.completion(), "extra_body": body("eight")})
    assert made.choices[0].token_ids == wanted
    assert made.usage.prompt_tokens == 8 + len(ids)


def test_requests_without_a_gist_are_unaffected(served: Served, server: Server) -> None:
    ids = continuation(served, tiny.words(9, seed=1))
    assert complete(server, ids) == [served.answer(ids, None, 12)]
    assert complete(server, ids, kv_transfer_params={}) == [served.answer(ids, None, 12)]


MESSAGES = [
    {"role": "user", "content": "w1 w2 w3"},
    {"role": "assistant", "content": "w4 w5"},
    {"role": "user", "content": [{"type": "text", "text": "w6 w7"}]},
]


@pytest.mark.parametrize("messages", [MESSAGES[:1], MESSAGES], ids=["one turn", "two turns"])
def test_chat(served: Served, server: Server, messages: list[dict[str, Any]]) -> None:
    wanted = served.answer(chat_ids(served.tokenizer, messages), "three", 12)
    made = server.client.chat.completions.create(**SETTINGS, messages=messages, extra_body=body("three"))
    assert made.choices[0].token_ids == wanted
    assert made.choices[0].message.content.split() == served.tokenizer.decode(wanted).split()
    placed = request("three", messages=messages, tokenizer=served.tokenizer, num_gist_tokens=3).chat()
    params = placed["extra_body"]["kv_transfer_params"]
    made = server.client.chat.completions.create(
        **SETTINGS, messages=messages, extra_body={**body(), "kv_transfer_params": params}
    )
    assert made.choices[0].token_ids == wanted


def streamed(chunks: Any) -> list[int]:
    parts = [getattr(choice, "token_ids", None) or [] for chunk in chunks for choice in chunk.choices]
    assert len(parts) > 1
    return [token for part in parts for token in part]


def test_streaming(served: Served, server: Server) -> None:
    wanted = served.answer(continuation(served, "w1 w2 w3"), "long", 12)
    chunks = server.client.completions.create(**SETTINGS, prompt="w1 w2 w3", stream=True, extra_body=body("long"))
    assert streamed(chunks) == wanted
    messages = MESSAGES[:1]
    chunks = server.client.chat.completions.create(**SETTINGS, messages=messages, stream=True, extra_body=body("long"))
    assert streamed(chunks) == wanted


def test_the_literal_is_text(served: Served, server: Server) -> None:
    gist = served.tokenizer.gist_token_id
    text = "w1 <GIST> w2"
    made = server.client.completions.create(**SETTINGS, prompt=text, extra_body=body("three"))
    assert made.choices[0].prompt_token_ids == [gist] * 3 + continuation(served, text)
    assert made.choices[0].prompt_token_ids.count(gist) == 3
    made = server.client.completions.create(**SETTINGS, prompt=text, extra_body=body())
    assert gist not in made.choices[0].prompt_token_ids
    made = server.client.chat.completions.create(
        **SETTINGS, messages=[{"role": "user", "content": text}], extra_body=body()
    )
    assert gist not in made.prompt_token_ids


@pytest.mark.parametrize(
    ("status", "message", "more"),
    [
        (404, "gist 'unknown' is not in the store of this server", {"gist": "unknown"}),
        (400, "was made for llama/", {"gist": "another model's"}),
        (400, "must be the name of a gist, got 7", {"gist": 7}),
        (400, "must hold only 'gist', got do_remote_prefill", {"gist": "eight", "do_remote_prefill": True}),
        (400, "prompt has 2 gist tokens in front, but the gist has 8", {"gist": "eight", "prompt": [64, 64, 5]}),
        (400, "has a gist token (64) at 1", {"gist": "eight", "prompt": [5, 64]}),
        (400, "has nothing after the gist", {"gist": "eight", "prompt": [64] * 8}),
        (400, "echo does not work with a gist", {"gist": "eight", "echo": True}),
        (400, "prompt_logprobs does not work with a gist", {"gist": "eight", "prompt_logprobs": 0}),
        (400, "use_beam_search does not work with a gist", {"gist": "eight", "use_beam_search": True}),
        (400, "prompt must be a text", {"gist": "eight", "prompt": {"a": 1}}),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_completions_that_are_refused(server: Server, status: int, message: str, more: dict[str, Any]) -> None:
    import openai

    more = dict(more)
    params = {name: more.pop(name) for name in ("gist", "do_remote_prefill") if name in more}
    given = {"prompt": "w1", **SETTINGS, "kv_transfer_params": params, **more}
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.post("/completions", body=given, cast_to=object)
    assert caught.value.status_code == status
    assert message in caught.value.response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("message", "more"),
    [
        ("which the gist replaces", {"messages": [{"role": "system", "content": "w1"}, *MESSAGES]}),
        ("must be from the user", {"messages": MESSAGES[1:]}),
        ("must end with one from the user", {"messages": MESSAGES[:2]}),
        ("messages must be a list", {"messages": []}),
        ("must be text", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("tools cannot come with a gist: tools are laid", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("chat_template does not work with a gist", {"chat_template": "x"}),
        ("add_generation_prompt does not work", {"add_generation_prompt": False}),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_chats_that_are_refused(server: Server, message: str, more: dict[str, Any]) -> None:
    import openai

    given = {"messages": MESSAGES, **SETTINGS, "kv_transfer_params": {"gist": "eight"}, **more}
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.post("/chat/completions", body=given, cast_to=object)


def test_other_routes_take_no_gist(server: Server) -> None:
    import openai

    given = {"model": "tiny", "input": "w1", "kv_transfer_params": {"gist": "eight"}}
    with pytest.raises(openai.BadRequestError, match=r"/v1/responses does not take gists"):
        server.client.post("/responses", body=given, cast_to=object)


def test_the_store_is_not_revealed_before_authentication(server: Server) -> None:
    import openai

    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="another", max_retries=0)
    for gist in ("unknown", "eight"):
        with pytest.raises(openai.AuthenticationError) as caught:
            stranger.completions.create(**SETTINGS, prompt="w1", extra_body=body(gist))
        assert gist not in json.dumps(caught.value.response.json())


@pytest.mark.parametrize("route", ["/completions", "/chat/completions"])
def test_parameters_in_another_place_are_refused(served: Served, server: Server, route: str) -> None:
    import openai

    given = {**SETTINGS, "vllm_xargs": {"kv_transfer_params": "x"}}
    given |= {"prompt": "w1"} if route == "/completions" else {"messages": MESSAGES[:1]}
    with pytest.raises(openai.BadRequestError, match="vllm_xargs holds kv_transfer_params"):
        server.client.post(route, body=given, cast_to=object)
    assert complete(server, "w1", "eight") == [served.answer(continuation(served, "w1"), "eight", 12)]


def test_a_body_is_not_read_before_authentication(server: Server) -> None:
    # The answer comes although the body is never sent.
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as stranger:
        stranger.sendall(head.encode())
        assert stranger.recv(100).startswith(b"HTTP/1.1 401")


def test_a_server_ends_with_the_tests(tmp_path: Path) -> None:
    lines = ["import os, sys", "from tests.vllm.tied import Tied"]
    lines += ["tied = Tied(['sleep', '300'])", "print(tied.process.pid, flush=True)", "os.kill(os.getpid(), 9)"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 30
    while runs(int(done.stdout)):
        assert time.monotonic() < end, "it is still running"
        time.sleep(0.1)


def runs(pid: int) -> bool:
    """Whether there is a process of this id that is not a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_gist_tokens_without_a_gist_fail(server: Server) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="has gist tokens"):
        complete(server, [64, 64, 5])
    complete(server, [6, 5])


def test_many_at_once(served: Served, server: Server) -> None:
    names = [*PROMPTS, None] * 4
    texts = [tiny.words(3 + number, seed=number) for number in range(len(names))]
    wanted = [[served.answer(continuation(served, text), name, 12)] for name, text in zip(names, texts, strict=True)]
    with ThreadPoolExecutor(16) as pool:
        prompts = [text if name else continuation(served, text) for name, text in zip(names, texts, strict=True)]
        found = [*pool.map(lambda given: complete(server, *given), zip(prompts, names, strict=True))]
    assert found == wanted


def test_counters(served: Served, server: Server) -> None:
    before = server.metrics()
    complete(server, "w1 w2 w3 w4", "eight")
    complete(server, "w1 w2 w3 w5", "eight")
    end = time.monotonic() + 20
    while (after := server.metrics())["requests"] < before["requests"] + 2 and time.monotonic() < end:
        time.sleep(0.2)
    gained = {name: after[name] - before[name] for name in after}
    assert gained["requests"] == 2
    assert gained["hits"] + gained["loads"] == 2
    assert gained["bytes"] == 2 * 8 * 2 * 3 * 2 * 32 * 4


def test_names_may_come_and_go(served: Served, server: Server, store: Path) -> None:
    import openai

    with GistStore(store) as changing:
        changing.put("new", changing["eight"])
        wanted = [served.answer(continuation(served, "w1"), "eight", 12)]
        assert complete(server, "w1", "new") == wanted
        changing.remove("new")
        with pytest.raises(openai.NotFoundError):
            complete(server, "w1", "new")


@pytest.mark.slow
def test_a_killed_server_can_be_started_again(served: Served, store: Path, tmp_path: Path) -> None:
    wanted = [[served.answer(continuation(served, "w1 w2"), name, 12)] for name in PROMPTS]
    for _ in range(2):
        with running(served, store, tmp_path / "log") as server:
            assert [complete(server, "w1 w2", name) for name in PROMPTS] == wanted
            server.kill()


@pytest.mark.slow
def test_the_example_runs(served: Served, server: Server, store: Path) -> None:
    words = [served.path, "--store", store, "--url", f"http://127.0.0.1:{server.port}/v1", "--api-key", KEY]
    example = Path(__file__).parents[2] / "examples" / "06_vllm_openai_client.py"
    for more in (["--only-compress"], []):
        found = subprocess.run(
            [sys.executable, example, *words, "--served-model-name", "tiny", *more],
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["shout", "first", "chat", "stream", "a mistake"]
    assert lines[3].removeprefix("chat: ") == lines[4].removeprefix("stream: ")
    assert "gist 'unknown' is not in the store" in lines[5]


def test_the_page_runs(
    served: Served, server: Server, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.repository import fences_in

    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
    asking, offline = [fence.text for fence in fences_in(page) if fence.language == "python"]
    with GistStore(store) as changing:
        changing.put("reverse", changing["eight"])
    asking = asking.replace(":8000", f":{server.port}").replace('"none"', repr(KEY)).replace('"demo"', '"tiny"')
    exec(compile(asking, "docs/vllm.md, asking", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
    offline = offline.replace('"runs/demo"', repr(str(served.path))).replace('"gists"', repr(str(store)))
    offline = offline.replace(
        "    logits_processors", '    dtype="float32",\n    enforce_eager=True,\n    logits_processors'
    )
    names: dict[str, Any] = {}
    exec(compile(offline, "docs/vllm.md, offline", "exec"), names)
    assert list(names["outputs"][0].outputs[0].token_ids) == served.answer(
        continuation(served, "a b c d e"), "eight", 8
    )
