"""The middleware around a stand-in server: what it passes on, and what it answers itself."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gisting.models.hub import save_pretrained
from gisting.serving import middleware as module
from gisting.serving.gists import Served, StoredGists
from gisting.serving.middleware import GistMiddleware
from gisting.store import GistStore
from gisting.tokens import GistTokenizer
from tests import tiny

G = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its store, which tests must not change."""
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = tiny.patched("llama")
    save_pretrained(model, tokenizer, folder / "model")
    with GistStore(folder / "store") as store:
        store.get_or_compress(model, tokenizer, ["w1 w2 w3"], 3, names=["three"])
    return folder


class App:
    """A server that records its requests and rejects a wrong key. As in FastAPI, a missing body is a bad request."""

    def __init__(self, config: Any = None) -> None:
        self.state = SimpleNamespace(vllm_config=config)
        self.asked: list[tuple[dict[str, Any], bytes]] = []
        self.disconnects = 0
        self.raises = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        status, content = 200, b"fine"
        if dict(scope["headers"]).get(b"authorization") == b"wrong":
            status, content = 401, b"denied"
        elif (message := await receive())["type"] == "http.request":
            self.asked.append((scope, message["body"]))
        else:
            self.disconnects += 1
            if self.raises:
                raise RuntimeError("the client has gone")
            status, content = 400, b"error parsing the body"
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": content})


def ask(
    app: App,
    middleware: GistMiddleware,
    body: Any,
    path: str = "/v1/completions",
    *,
    kind: bytes = b"application/json",
    key: bytes = b"right",
    pieces: int = 3,
) -> tuple[int, Any]:
    """Return the status and body of the answer to one request, whose body is sent in pieces."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    step = max(1, -(-len(data) // pieces))
    parts = [data[start : start + step] for start in range(0, len(data), step)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        for number, part in enumerate(parts)
    ]
    headers = [(b"Content-Type", kind), (b"content-length", str(len(data)).encode()), (b"authorization", key)]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": app}
    sent: list[Any] = []

    async def receive() -> Any:
        assert key == b"right", "nothing is read before authentication"
        return messages.pop(0) if messages else await asyncio.Event().wait()  # the client waits for its answer

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware(scope, receive, send))
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(content)["error"] if content.startswith(b"{") else content


def made(folder: Path) -> tuple[App, GistMiddleware]:
    tokenizer = GistTokenizer.from_pretrained(folder / "model")
    (entry,) = GistStore(folder / "store").list()
    app = App()
    served = Served((entry.model,), entry.tokenizer, "plain", G)
    return app, GistMiddleware(app, StoredGists(folder / "store", served), tokenizer)


def test_a_request_with_a_gist_is_prepared(folder: Path) -> None:
    app, middleware = made(folder)
    given = {"prompt": "w1 w2", "kv_transfer_params": {"gist": "three"}, "other": [1, None]}
    assert ask(app, middleware, given) == (200, b"fine")
    ((scope, body),) = app.asked
    rest = GistTokenizer.from_pretrained(folder / "model").encode_continuations(["w1 w2"])[0]
    assert json.loads(body) == {**given, "prompt": [G, G, G, *rest]}
    assert b"content-length" not in dict(scope["headers"]), "it was the length of the original body"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "w1",  "kv_transfer_params": {}}',
        b'{"prompt": "w1",  "kv_transfer_params": null}',
        b'{"prompt": "kv_transfer_params gist"}',
        b'{"kv_transfer_params": {"gist": ',
        b'["kv_transfer_params"]',
        b"",
        b"\xff kv_transfer_params",
    ],
)
def test_all_others_pass_unchanged(folder: Path, body: bytes) -> None:
    app, middleware = made(folder)
    assert ask(app, middleware, body) == (200, b"fine")
    assert app.asked[0][1] == body


def test_other_content_types_pass_unread(folder: Path) -> None:
    app, middleware = made(folder)
    body = b'{"kv_transfer_params": {"gist": "unknown"}}'
    assert ask(app, middleware, body, kind=b"multipart/form-data", pieces=1) == (200, b"fine")
    assert app.asked[0][1] == body


@pytest.mark.parametrize(
    ("status", "kind", "message", "path", "params"),
    [
        (404, "NotFoundError", "gist 'unknown' is not in the store", "/v1/completions", {"gist": "unknown"}),
        (400, "BadRequestError", "must be the name of a gist", "/v1/completions", {"gist": 1}),
        (400, "BadRequestError", "/v1/responses does not take gists", "/v1/responses", {"gist": "three"}),
        (400, "BadRequestError", "does not take gists", "/elsewhere/v1/completions", {"gist": "unknown"}),
    ],
)
@pytest.mark.parametrize("raises", [False, True], ids=["answers", "raises"])
def test_refusals(folder: Path, status: int, kind: str, message: str, path: str, params: Any, raises: bool) -> None:
    app, middleware = made(folder)
    app.raises = raises
    found, error = ask(app, middleware, {"prompt": "w1", "kv_transfer_params": params}, path)
    assert (found, error["type"], error["code"]) == (status, kind, status)
    assert message in error["message"]
    assert (app.asked, app.disconnects) == ([], 1)  # the server authenticates the client, and sees nothing else


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [G, 1]},
        {"prompt": [[1], [2, G]]},
        {"prompt": [1], "kv_transfer_params": {"prompt_token_ids": [1, G]}},
    ],
)
def test_gist_tokens_without_a_gist_are_refused(folder: Path, body: Any) -> None:
    app, middleware = made(folder)
    status, error = ask(app, middleware, body)
    assert (status, "has gist tokens (64) but names no gist" in error["message"]) == (400, True)
    for fine in ({"prompt": [1, 640]}, {"prompt": "64"}, {"max_tokens": 64}, {"prompt": None, "seed": G}):
        assert ask(app, middleware, fine) == (200, b"fine")


def test_the_first_request_is_checked_for_gist_tokens(folder: Path) -> None:
    app = App(configuration(folder))
    status, error = ask(app, GistMiddleware(app), {"prompt": [G, 1]})
    assert (status, "has gist tokens (64) but names no gist" in error["message"]) == (400, True)
    # A server without gists has no gist tokens, and one whose store is gone still answers requests without a gist.
    for other in (App(), App(configuration(folder, store=str(folder / "gone")))):
        middleware = GistMiddleware(other)
        for _ in range(2):
            assert ask(other, middleware, {"prompt": [G, 1]}) == (200, b"fine")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("value", ["x", ["a"], 5])
def test_parameters_in_another_place_are_refused(folder: Path, path: str, value: Any) -> None:
    app, middleware = made(folder)
    status, error = ask(app, middleware, {"prompt": "w1", "vllm_xargs": {"kv_transfer_params": value}}, path)
    assert (status, "vllm_xargs holds kv_transfer_params" in error["message"]) == (400, True)
    assert ask(app, middleware, {"prompt": "w1", "vllm_xargs": {"other": value}}, path) == (200, b"fine")


UNKNOWN = json.dumps({"prompt": "w1", "kv_transfer_params": {"gist": "unknown"}})


@pytest.mark.parametrize(
    "body",
    [UNKNOWN.replace("kv_t", "kv\\u005ft").encode(), UNKNOWN.encode("utf-16"), UNKNOWN.encode("utf-32-le")],
    ids=["escaped", "utf-16", "utf-32"],
)
def test_a_name_is_found_however_it_is_written(folder: Path, body: bytes) -> None:
    app, middleware = made(folder)
    assert ask(app, middleware, body)[0] == 404


def test_texts_without_a_gist_may_have_any_character(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only at the start of a body do these bytes say how it is encoded; elsewhere no limit of ours applies."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the body was measured")

    monkeypatch.setattr("gisting.serving.limits.Limits.check_bytes", refuse)
    app, middleware = made(folder)
    body = json.dumps({"messages": [{"role": "user", "content": "a\ufeffb"}]}, ensure_ascii=False).encode()
    assert ask(app, middleware, body, "/v1/chat/completions") == (200, b"fine")


@pytest.mark.parametrize("ids", ["[6.4e1, 1]", "[64.0, 1]", "[1, 640e-1]"])
def test_gist_tokens_are_found_however_they_are_written(folder: Path, ids: str) -> None:
    app, middleware = made(folder)
    assert ask(app, middleware, f'{{"prompt": {ids}}}'.encode())[0] == 400


def test_half_of_a_surrogate_pair_is_refused(folder: Path) -> None:
    app, middleware = made(folder)
    for path, body in (
        ("/v1/completions", {"prompt": "w1 \ud800"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
    ):
        status, error = ask(app, middleware, {**body, "kv_transfer_params": {"gist": "three"}}, path)
        assert (status, "the text cannot follow a gist" in error["message"]) == (400, True)


def test_an_unexpected_error_is_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, middleware = made(folder)
    body = {"prompt": "w1", "kv_transfer_params": {"gist": "three"}}

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("of nothing")

    with monkeypatch.context() as patched:
        patched.setattr(StoredGists, "find", fail)
        status, error = ask(app, middleware, body)
    assert (status, "ZeroDivisionError: of nothing" in error["message"]) == (500, True)
    assert ask(app, middleware, body) == (200, b"fine")


def test_loading_that_failed_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(configuration(folder))
    middleware = GistMiddleware(app)
    body = {"prompt": "w1", "kv_transfer_params": {"gist": "three"}}

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Served, "of_checkpoint", fail)
        assert ask(app, middleware, body)[0] == 500
    assert ask(app, middleware, body) == (200, b"fine")


def test_bodies_have_a_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 2**20)
    app, middleware = made(folder)
    assert ask(app, middleware, b'{"a": "' + b"x" * (2**20 - 9) + b'"}', pieces=50) == (200, b"fine")
    status, error = ask(app, middleware, b'{"a": "' + b"x" * 2**20 + b'"}', pieces=50)
    assert (status, error["message"]) == (413, "the body is larger than 1 MiB; send less")
    assert len(app.asked) == 1


def test_the_store_is_not_revealed_before_authentication(folder: Path) -> None:
    app, middleware = made(folder)
    body = {"prompt": "w1", "kv_transfer_params": {"gist": "unknown"}}
    assert ask(app, middleware, body, key=b"wrong") == (401, b"denied")


def configuration(folder: Path, **changes: Any) -> Any:
    extra = {"store": str(folder / "store"), **changes}
    import torch

    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector="GistConnector", kv_connector_extra_config=extra),
        model_config=SimpleNamespace(model=str(folder / "model"), revision=None, dtype=torch.float32),
    )


def test_store_and_checkpoint_come_from_the_configuration(folder: Path) -> None:
    app = App(configuration(folder))
    middleware = GistMiddleware(app)
    body = {"prompt": "w1", "kv_transfer_params": {"gist": "three"}}
    assert ask(app, middleware, body) == (200, b"fine")
    assert json.loads(app.asked[0][1])["prompt"][:3] == [G] * 3


def test_a_server_without_gists_says_so() -> None:
    app = App()
    status, error = ask(app, GistMiddleware(app), {"prompt": "w1", "kv_transfer_params": {"gist": "three"}})
    assert (status, "has no gist store" in error["message"]) == (400, True)


def test_a_missing_store_is_the_servers_fault(folder: Path, tmp_path: Path) -> None:
    app = App(configuration(folder, store=str(tmp_path / "gone")))
    middleware = GistMiddleware(app)
    body = {"prompt": "w1", "kv_transfer_params": {"gist": "three"}}
    status, error = ask(app, middleware, body)
    assert (status, error["type"], "is not a store" in error["message"]) == (500, "InternalServerError", True)
    shutil.copytree(folder / "store", tmp_path / "gone")
    assert ask(app, middleware, body) == (200, b"fine")  # the next request tries again


def test_a_client_that_disconnects(folder: Path) -> None:
    app, middleware = made(folder)
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "app": app}

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    asyncio.run(middleware(scope, receive, send))
    assert (app.asked, app.disconnects) == ([], 1)


SHORT = {"prompt": "w1 w2", "kv_transfer_params": {"gist": "three"}}


def limited(folder: Path, max_tokens: int = 16) -> tuple[App, GistMiddleware]:
    """A model of 16 tokens, each at most 7 characters long (``<unk>``, a space): 112 characters."""
    app = App()
    tokenizer = GistTokenizer.from_pretrained(folder / "model")
    return app, GistMiddleware(app, StoredGists(folder / "store"), tokenizer, max_tokens)


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("completions", {"prompt": "x" * 5000}, "prompt has 5000 characters, more than"),
        ("completions", {"prompt": ["w1", "x" * 5000]}, r"prompt\[1\] has 5000 characters"),
        ("completions", {"prompt": [1] * 17}, "prompt has 17 ids, more than the model's length of 16"),
        ("completions", {"prompt": [[1], [1] * 17]}, r"prompt\[1\] has 17 ids"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 5000}]}, "messages has 5004 characters"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 2500}] * 2}]},
            "messages has 50",
        ),
    ],
)
def test_texts_that_cannot_fit_are_not_tokenised(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, more: Any, message: str
) -> None:
    _, middleware = limited(folder)
    monkeypatch.setattr(GistTokenizer, "encode_texts", lambda *_: pytest.fail("it was tokenised"))
    status, error = ask(App(), middleware, {**SHORT, **more}, f"/v1/{path}")
    assert status == 400
    assert re.search(message, error["message"])


def test_what_can_fit_is_tokenised(folder: Path) -> None:
    app, middleware = limited(folder)
    assert ask(app, middleware, {**SHORT, "prompt": "w1 " * 15}) == (200, b"fine")
    assert ask(app, middleware, {**SHORT, "prompt": ["w1 " * 15] * 50}) == (200, b"fine")


@pytest.mark.parametrize(
    ("max_tokens", "body", "message"),
    [
        (16, {**SHORT, "prompt": "x" * (2 * 2**20)}, "the body has 20"),
        (2**20, {**SHORT, "prompt": [[1] * 1000] * 1100}, "the body holds more than 1048576 items"),
    ],
    ids=["bytes", "items"],
)
def test_large_bodies_are_not_parsed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int, body: Any, message: str
) -> None:
    app, middleware = limited(folder, max_tokens)
    data = json.dumps(body).encode()
    monkeypatch.setattr(module, "_parsed", lambda *_: pytest.fail("it was parsed"))
    status, error = ask(app, middleware, data)
    assert (status, error["message"].startswith(message)) == (413, True)
    # Without a gist the same goes on to the server, and so does a long text with escapes.
    for fine in (
        data.replace(b"kv_transfer_params", b"others"),
        json.dumps({"prompt": "\u00e9" * 2**20}).encode(),
        json.dumps({"prompt": [G] * 2**20}).encode(),
    ):
        assert ask(app, middleware, fine) == (200, b"fine")
        assert app.asked[-1][1] == fine


def both(folder: Path, long: Any, short: Any, *, hangs_up: bool = False) -> tuple[list[str], App]:
    """Send long requests, then a short one; return which are answered, in order."""
    app, middleware = made(folder)
    done: list[str] = []

    async def one(name: str, body: Any) -> None:
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            if name == "long" and hangs_up:
                return {"type": "http.disconnect"}
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                done.append(name)

        headers = [(b"content-type", b"application/json")]
        await middleware(
            {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}, receive, send
        )

    async def run() -> None:
        await one("first", SHORT)  # makes the threads
        waiting = [asyncio.ensure_future(one("long", long)) for _ in range(6)]
        await asyncio.sleep(0.05)
        await one("short", short)
        await asyncio.gather(*waiting)

    asyncio.run(run())
    return done[1:], app


def slowly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let tokenising a long text take 0.3 s, and count such calls."""
    stock, calls = GistTokenizer.encode_continuations, []

    def encode(self: GistTokenizer, inputs: Any) -> Any:
        if len(inputs[0]) > 100:
            calls.append(len(inputs[0]))
            time.sleep(0.3)
        return stock(self, inputs)

    monkeypatch.setattr(GistTokenizer, "encode_continuations", encode)
    return calls


def test_a_short_request_does_not_wait_for_long_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = slowly(monkeypatch)
    done, _ = both(folder, {**SHORT, "prompt": "w1 " * 30000}, SHORT)
    assert done == ["short"] + ["long"] * 6
    assert len(calls) == 6


def test_work_for_clients_that_hung_up_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = slowly(monkeypatch)
    done, app = both(folder, {**SHORT, "prompt": "w1 " * 30000}, SHORT, hangs_up=True)
    assert app.disconnects == 6
    assert len(calls) <= 2, "only what had begun"
    assert len(app.asked) == 2
    assert done.count("short") == 1


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v2/chat"),
        *("/inference/v1/generate", "/cohere/v2/embed", "/v1/completions/", "//v1/completions", "/V1/completions"),
    ],
)
def test_no_body_is_read_before_the_key_is_checked(folder: Path, path: str) -> None:
    app, middleware = made(folder)
    for body in (SHORT, {"prompt": [G]}, {"vllm_xargs": {"kv_transfer_params": 1}}):
        assert ask(app, middleware, body, path, key=b"wrong") == (401, b"denied")
