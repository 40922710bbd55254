"""A judge on a local server: order, ties, replies without a verdict, failing servers, replies kept on disk."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gisting import GistError, Record
from gisting.eval.judge import Judge, question, verdict_of

Answer = tuple[int, dict[str, str], bytes]


class Server:
    """A chat completion API. ``answer`` takes the body of a request and returns status, headers and body."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer: Callable[[dict[str, Any]], Answer] = lambda body: said("Verdict: tie")
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append({"path": self.path, **body})
                    outer.keys.append(self.headers.get("Authorization"))
                    status, headers, data = outer.answer(body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def said(text: str | None) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def answers_of(body: dict[str, Any]) -> tuple[str, str]:
    text = body["messages"][0]["content"]
    a, b = (re.search(rf"<{name}>\n(.*)\n</{name}>", text, re.DOTALL) for name in ("answer_a", "answer_b"))
    assert a is not None
    assert b is not None
    return a[1], b[1]


def longest_wins(body: dict[str, Any]) -> Answer:
    a, b = answers_of(body)
    word = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return said(f"It is longer.\n\nVerdict: {word}")


def judge_of(server: Server, cache: Path, **settings: Any) -> Judge:
    return Judge(server.url, "m", cache, backoff_s=0.01, **settings)


RECORDS = [Record(f"i{number}", f"x{number}", "r") for number in range(24)]


def test_the_order_is_random_and_accounted_for(server: Server, tmp_path: Path) -> None:
    server.answer = longest_wins
    first = ["long"] * 8 + ["s"] * 8 + ["even"] * 8
    second = ["s"] * 8 + ["long"] * 8 + ["odds"] * 8
    done: list[int] = []
    scores = judge_of(server, tmp_path).compare(RECORDS, first, second, progress=done.append)
    assert scores == [1.0] * 8 + [0.0] * 8 + [0.5] * 8
    assert len(done) == 24
    shown = [answers_of(body)[0] == "long" for body in server.requests if "odds" not in answers_of(body)]
    assert 2 <= sum(shown) <= 14
    assert {(body["model"], body["temperature"], body["path"]) for body in server.requests} == {
        ("m", 0, "/v1/chat/completions")
    }


def test_a_judge_that_prefers_a_position_favours_neither(server: Server, tmp_path: Path) -> None:
    """The purpose of the random order."""
    server.answer = lambda body: said("Verdict: A")
    records = [Record(f"i{number}", "", "r") for number in range(100)]
    scores = judge_of(server, tmp_path).compare(records, ["a"] * 100, ["b"] * 100)
    wins = sum(score == 1.0 for score in scores)
    assert 35 <= wins <= 65
    assert wins + scores.count(0.0) == 100
    again = judge_of(server, tmp_path, seed=1).compare(records, ["a"] * 100, ["b"] * 100)
    assert again != scores


def test_a_rerun_sends_no_requests(server: Server, tmp_path: Path) -> None:
    server.answer = longest_wins
    arguments = (RECORDS, ["long"] * 24, ["s"] * 24)
    scores = judge_of(server, tmp_path).compare(*arguments)
    assert len(server.requests) == 24
    server.answer = lambda body: (500, {}, b"")
    assert judge_of(server, tmp_path, max_attempts=1).compare(*arguments) == scores
    assert len(server.requests) == 24
    for changes in ({"model": "other"}, {"url": server.url + "/"}):
        with pytest.raises(GistError, match="did not answer in 1 attempts"):
            Judge(**{"url": server.url, "model": "m", "cache_dir": tmp_path, "max_attempts": 1, **changes}).compare(
                RECORDS[:1], ["long"], ["s"]
            )


def test_the_key_is_sent_but_not_stored(server: Server, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path, api_key="not-a-key")
    judge.compare(RECORDS[:2], ["a", "b"], ["c", "d"])
    assert server.keys == ["Bearer not-a-key"] * 2
    kept = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json")]
    assert len(kept) == 2
    assert not any("not-a-key" in text for text in [*kept, repr(judge)])


def test_equal_answers_are_a_tie_without_a_request(server: Server, tmp_path: Path) -> None:
    assert judge_of(server, tmp_path).compare(RECORDS[:1], ["same "], ["same"]) == [0.5]
    assert server.requests == []


@pytest.mark.parametrize("reply", ["I cannot say.", "", None, "Both A and B are good."])
def test_a_reply_without_verdict_is_none(server: Server, tmp_path: Path, reply: str | None) -> None:
    server.answer = lambda body: said(reply)
    assert judge_of(server, tmp_path).compare(RECORDS[:1], ["a"], ["b"]) == [None]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Because.\nVerdict: A", "a"),
        ("**Verdict: B**", "b"),
        ("verdict:  TIE.", "tie"),
        ("Verdict: A\nNo, I was wrong.\nVerdict: B\n", "b"),
        ("Verdict: A or B", None),
        ("Verdict: Answer", None),
        (" b. ", "b"),
        ("A is better", None),
    ],
)
def test_verdicts(reply: str, verdict: str | None) -> None:
    assert verdict_of(reply) == verdict


def test_braces_in_a_text_are_left_alone() -> None:
    text = question(Record("{input}", "{a}", "{x}"), "{b}", "b")
    assert "<instruction>\n{input}\n</instruction>\n<input>\n{a}\n</input>\n<reference>\n{x}\n" in text
    assert "<answer_a>\n{b}\n</answer_a>" in text


@pytest.mark.parametrize("trouble", [(429, {"Retry-After": "0"}, b"busy"), (503, {}, b"")], ids=["429", "503"])
def test_a_failing_server_is_asked_again(server: Server, tmp_path: Path, trouble: Answer) -> None:
    answers = iter([trouble, trouble, said("Verdict: tie")])
    server.answer = lambda body: next(answers)
    assert judge_of(server, tmp_path).compare(RECORDS[:1], ["a"], ["b"]) == [0.5]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html>", b"{}", b'{"choices": []}', b'{"choices": null}', b"[" * 10**5),
        json.dumps({"choices": [{"message": {"content": ["Verdict: A"]}}]}).encode(),
    ],
)
def test_replies_that_are_not_chat_completions(server: Server, tmp_path: Path, body: bytes) -> None:
    server.answer = lambda _: (200, {}, body)
    with pytest.raises(GistError, match=r"returned no chat completion but '.*'; is it an OpenAI-compatible API\?"):
        judge_of(server, tmp_path).compare(RECORDS[:1], ["a"], ["b"])


def test_a_server_that_keeps_failing(server: Server, tmp_path: Path) -> None:
    server.answer = lambda body: (503, {}, b"try later")
    with pytest.raises(GistError, match=r"in 3 attempts, the last of which gave HTTP 503 try later; .* run again"):
        judge_of(server, tmp_path, max_attempts=3).compare(RECORDS[:1], ["a"], ["b"])
    assert len(server.requests) == 3


def test_a_server_that_refuses_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    server.answer = lambda body: (401, {}, b"no key")
    with pytest.raises(GistError, match=r"refuses the request: HTTP 401 no key; check URL, model \(m\) and key"):
        judge_of(server, tmp_path, num_workers=1).compare(RECORDS, ["a"] * 24, ["b"] * 24)
    assert len(server.requests) < 12  # the refused one, and those already sent when it was refused


def test_no_server(tmp_path: Path) -> None:
    judge = Judge("http://127.0.0.1:9/v1", "m", tmp_path, max_attempts=2, backoff_s=0.01)
    with pytest.raises(GistError, match="did not answer in 2 attempts, the last of which gave URLError"):
        judge.compare(RECORDS[:1], ["a"], ["b"])


def test_judge_errors(tmp_path: Path) -> None:
    with pytest.raises(GistError, match=r"url must start with http:// or https://, .*, got 'localhost'"):
        Judge("localhost", "m", tmp_path)
    with pytest.raises(GistError, match="num_workers must be at least 1, got 0"):
        Judge("http://localhost", "m", tmp_path, num_workers=0)
    with pytest.raises(GistError, match=r"first and second must have one answer per record \(1\), got 1 and 2"):
        Judge("http://localhost", "m", tmp_path).compare(RECORDS[:1], ["a"], ["b", "c"])


def test_a_reply_without_a_text_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.answer = lambda body: said(None)
    assert judge_of(server, tmp_path).compare(RECORDS[:1], ["a"], ["b"]) == [None]
    (kept,) = [*tmp_path.rglob("*.json")] or [None]
    assert kept is None
    server.answer = lambda body: said("Verdict: tie")
    assert judge_of(server, tmp_path).compare(RECORDS[:1], ["a"], ["b"]) == [0.5]
    # An earlier version kept it.
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text(json.dumps({"reply": ""}), encoding="utf-8")
    assert judge_of(server, tmp_path).compare(RECORDS[:1], ["a"], ["b"]) == [0.5]


def test_a_long_reply_is_not_read_whole(server: Server, tmp_path: Path) -> None:
    server.answer = lambda body: (200, {}, b" " * (2 * 2**20))
    with pytest.raises(GistError, match="sent more than 1048576 bytes as one reply"):
        judge_of(server, tmp_path).compare(RECORDS[:1], ["a"], ["b"])


def test_a_long_wait_is_cut(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("gisting.eval.judge.time.sleep", waits.append)
    answers = iter([(429, {"Retry-After": "31536000"}, b""), (429, {"Retry-After": "7"}, b""), said("Verdict: tie")])
    server.answer = lambda body: next(answers)
    assert judge_of(server, tmp_path).compare(RECORDS[:1], ["a"], ["b"]) == [0.5]
    assert waits == [300.0, 7.0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_goes_to_no_other_place(server: Server, tmp_path: Path, status: int) -> None:
    place = f"{server.url.replace('127.0.0.1', 'localhost')}/else\x1b[31m"
    server.answer = lambda body: (status, {"Location": place}, b"")
    with pytest.raises(GistError, match=r"redirects to http://localhost:\d+/v1/else\\x1b\[31m, which is not followed"):
        judge_of(server, tmp_path, api_key="not-a-key").compare(RECORDS[:1], ["a"], ["b"])
    assert len(server.requests) == 1
