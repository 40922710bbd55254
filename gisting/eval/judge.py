"""Let a model behind an OpenAI-compatible URL decide which of two answers is better.

Place in the flow: results -> **judge** -> judgements in the results. Requests one chat completion per record
(temperature 0) and reads a verdict from it. Which answer is shown first is random, determined by the seed and the
texts, and is accounted for in the result. Replies are kept on disk, so that an interrupted run continues where it
stopped and a repeated run sends no requests. Works on two lists of texts, independently of gists.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gisting.data.records import Record
from gisting.errors import GistError
from gisting.storage import write_atomically
from gisting.tokens.text import plain

__all__ = ["PROMPT", "Judge"]

#: The prompt of the judge. It does not say where the answers come from.
PROMPT = """\
You are shown a task and two answers to it. Decide which answer is better: follow the instruction as it is written, \
and judge what is right, complete and to the point, not how long it is or which answer comes first.

<instruction>
{instruction}
</instruction>
<input>
{input}
</input>
<reference>
{reference}
</reference>
<answer_a>
{a}
</answer_a>
<answer_b>
{b}
</answer_b>

The reference is one good answer; another may be as good. Say in one sentence why, then end with a line that is one of
Verdict: A
Verdict: B
Verdict: tie"""

_VERDICT = re.compile(r"verdict\W*(a|b|tie)\b\W*$", re.IGNORECASE | re.MULTILINE)
# HTTP statuses of a server that is busy or has a temporary problem.
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# A reply is a sentence or two. The API is someone else's.
_MAX_REPLY_BYTES = 2**20
# The longest wait that a server may ask for; after it the next attempt is made all the same.
_MAX_WAIT_S = 300.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would take the key to another host and turn the request into one without a body."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible API that compares answers.

    Args:
        url: the base URL of the API, such as ``http://localhost:8000/v1``; ``/chat/completions`` is appended.
        model: the name of the model there.
        cache_dir: directory where replies are kept, in one file each, named by a hash of the URL and the request. The
            API key is not stored.
        api_key: sent as a bearer token; None if the server needs none.
        seed: determines the order in which two answers are shown.
        num_workers: number of concurrent requests.
        timeout_s: seconds to wait for a reply.
        max_attempts: maximum number of attempts per request while the server is busy or does not answer.
        backoff_s: seconds to wait before the second attempt; doubled after each attempt, unless the server says how
            long to wait (at most 300 seconds).

    Raises:
        GistError: an argument is out of range.
    """

    url: str
    model: str
    cache_dir: str | Path
    api_key: str | None = field(default=None, repr=False)
    seed: int = 0
    num_workers: int = 4
    timeout_s: float = 120.0
    max_attempts: int = 6
    backoff_s: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise GistError(
                f"url must start with http:// or https://, such as http://localhost:8000/v1, got {self.url!r}"
            )
        for name in ("num_workers", "max_attempts"):
            if getattr(self, name) < 1:
                raise GistError(f"{name} must be at least 1, got {getattr(self, name)}")

    def compare(
        self,
        records: Sequence[Record],
        first: Sequence[str],
        second: Sequence[str],
        *,
        progress: Callable[[int], Any] | None = None,
    ) -> list[float | None]:
        """Compare two answers to each record.

        Args:
            records: N tasks with their references.
            first: N answers.
            second: N answers of another model or condition.
            progress: called with 1 for each record, from several threads.

        Returns:
            For each record, 1 if the first answer is better, 0 if the second is, 0.5 for a tie, and None if the reply
            has no verdict. Equal answers are a tie without a request.

        Raises:
            GistError: the numbers of answers and records differ, the server refuses a request, or it answers none of
                the attempts, redirects to another URL, or sends more than 1 MiB. The replies received so far are kept.
        """
        if not len(records) == len(first) == len(second):
            raise GistError(
                f"first and second must have one answer per record ({len(records)}), got {len(first)} and {len(second)}"
            )

        def one(number: int) -> float | None:
            score = self._score(records[number], first[number], second[number])
            if progress is not None:
                progress(1)
            return score

        pool = ThreadPoolExecutor(self.num_workers)
        try:
            return list(pool.map(one, range(len(records))))
        finally:
            # After an error, requests that are still waiting are not sent.
            pool.shutdown(cancel_futures=True)

    def _score(self, record: Record, first: str, second: str) -> float | None:
        if first.strip() == second.strip():
            return 0.5
        texts = json.dumps([self.seed, record.instruction, record.input, first, second])
        is_swapped = hashlib.sha256(texts.encode()).digest()[0] % 2 == 1
        a, b = (second, first) if is_swapped else (first, second)
        verdict = verdict_of(self._reply(question(record, a, b)))
        if verdict is None or verdict == "tie":
            return None if verdict is None else 0.5
        return float((verdict == "a") != is_swapped)

    def _reply(self, text: str) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
        name = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        path = Path(self.cache_dir) / name[:2] / f"{name}.json"
        if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8"))["reply"]):
            return kept
        reply = self._ask(json.dumps(body).encode())
        if not reply:
            return reply  # said nothing, which may be different the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"request": body, "reply": reply}, ensure_ascii=False).encode())
        return reply

    def _ask(self, body: bytes) -> str:
        url = f"{self.url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        opener = urllib.request.build_opener(_NoRedirects)
        wait, trouble = self.backoff_s, ""
        for attempt in range(self.max_attempts):
            if attempt:
                time.sleep(wait)
                wait = self.backoff_s * 2**attempt
            try:
                request = urllib.request.Request(url, body, headers)
                with opener.open(request, timeout=self.timeout_s) as response:
                    answer = response.read(_MAX_REPLY_BYTES + 1)
            except urllib.error.HTTPError as error:
                with error:
                    trouble = f"HTTP {error.code} {plain(error.read(300).decode(errors='replace').strip())}"
                if 300 <= error.code < 400:
                    place = plain(error.headers.get("Location", "")[:300])
                    raise GistError(
                        f"the judge at {url} redirects to {place or 'another place'}, which is not followed, because "
                        "the key would go there; give the final URL, if you trust it"
                    ) from error
                if error.code not in _AGAIN:
                    raise GistError(
                        f"the judge at {url} refuses the request: {trouble}; check URL, model ({self.model}) and key"
                    ) from error
                retry_after = error.headers.get("Retry-After", "")
                wait = min(float(retry_after), _MAX_WAIT_S) if retry_after.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if len(answer) > _MAX_REPLY_BYTES:
                    raise GistError(f"{url} sent more than {_MAX_REPLY_BYTES} bytes as one reply; is it a judge's API?")
                return _content(answer, url)
        raise GistError(
            f"the judge at {url} did not answer in {self.max_attempts} attempts, the last of which gave {trouble}; the "
            f"replies so far are kept in {self.cache_dir}: run again to continue"
        )


def question(record: Record, a: str, b: str) -> str:
    """Fill ``PROMPT`` with a record and two answers, in the order in which they are shown."""
    texts = {"instruction": record.instruction, "input": str(record.input), "reference": record.output, "a": a, "b": b}
    # In one pass, so that braces within a text are left alone.
    return re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], PROMPT)


def verdict_of(reply: str) -> str | None:
    """Find the last verdict in a reply, which may also be the whole reply: ``"a"``, ``"b"``, ``"tie"`` or None."""
    found = _VERDICT.findall(reply)
    word = found[-1].lower() if found else reply.strip().strip(".*\"'").lower()
    return word if word in ("a", "b", "tie") else None


def _content(answer: bytes, url: str) -> str:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
        if not isinstance(content, str | None):
            raise TypeError("content must be a text")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        start = answer[:300].decode(errors="replace")
        raise GistError(f"{url} returned no chat completion but {start!r}; is it an OpenAI-compatible API?") from error
    return content or ""  # null if the model says nothing
