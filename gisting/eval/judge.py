"""Which of two answers is better, by a model behind an OpenAI-compatible URL.

Place in the flow: results -> **judge** -> judgements in the results. Asks for one chat completion for each record
(temperature 0) and reads a verdict from it; which answer is shown first is drawn from the seed and the texts, and
undone. Replies are kept on disk, so that a run that was cut off goes on where it stopped and a rerun asks nothing.
Knows nothing of gists: two lists of texts.
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

__all__ = ["PROMPT", "Judge"]

#: What the judge is asked. Both answers are shown without saying where they come from.
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
# What a server that is busy, or in trouble for a moment, says.
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}


@dataclass(frozen=True)
class Judge:
    """A judge.

    Args:
        url: where the API begins, such as ``http://localhost:8000/v1``; ``/chat/completions`` is added.
        model: the model to ask there.
        cache_dir: where replies are kept, one file each, named by a hash of URL and request. The key is in none.
        api_key: sent as a bearer token; None for a server that asks for none.
        seed: of the order in which two answers are shown.
        num_workers: questions asked at once.
        timeout_s: how long to wait for a reply.
        max_attempts: how often a question is asked where the server is busy or does not answer.
        backoff_s: wait before the second attempt; doubled each time, unless the server says how long.

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
                f"url must begin with http:// or https://, such as http://localhost:8000/v1, got {self.url!r}"
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
        """Judge two answers to each record.

        Args:
            records: N tasks with their references.
            first: N answers.
            second: N answers of another model or condition.
            progress: called with 1 for each record, from several threads.

        Returns:
            For each record 1 where the first answer is better, 0 where the second is, 0.5 for a tie, None where the
            reply holds no verdict. Answers that are equal are a tie, and nobody is asked.

        Raises:
            GistError: the numbers differ, the server refuses, or it does not answer at any attempt. Replies up to there
                are kept.
        """
        if not len(records) == len(first) == len(second):
            raise GistError(
                f"first and second must be as many as records, {len(records)}, got {len(first)} and {len(second)}"
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
            # After an error, what has not been asked yet is not asked.
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
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["reply"]
        reply = self._ask(json.dumps(body).encode())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"request": body, "reply": reply}, ensure_ascii=False).encode())
        return reply

    def _ask(self, body: bytes) -> str:
        url = f"{self.url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        wait, trouble = self.backoff_s, ""
        for attempt in range(self.max_attempts):
            if attempt:
                time.sleep(wait)
                wait = self.backoff_s * 2**attempt
            try:
                request = urllib.request.Request(url, body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    answer = response.read()
            except urllib.error.HTTPError as error:
                with error:
                    trouble = f"HTTP {error.code} {error.read(300).decode(errors='replace').strip()}"
                if error.code not in _AGAIN:
                    raise GistError(
                        f"the judge at {url} refuses: {trouble}; look at URL, model ({self.model}) and key"
                    ) from error
                told = error.headers.get("Retry-After", "")
                wait = float(told) if told.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                return _content(answer, url)
        raise GistError(
            f"the judge at {url} did not answer in {self.max_attempts} attempts, at last {trouble}; the replies so far "
            f"are kept in {self.cache_dir}: run again to go on"
        )


def question(record: Record, a: str, b: str) -> str:
    """What the judge is asked about two answers in this order."""
    texts = {"instruction": record.instruction, "input": record.input, "reference": record.output, "a": a, "b": b}
    # In one pass: what stands in braces in a text is text.
    return re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], PROMPT)


def verdict_of(reply: str) -> str | None:
    """``"a"``, ``"b"`` or ``"tie"``: the last verdict of a reply, or a reply that is nothing else; None without one."""
    found = _VERDICT.findall(reply)
    word = found[-1].lower() if found else reply.strip().strip(".*\"'").lower()
    return word if word in ("a", "b", "tie") else None


def _content(answer: bytes, url: str) -> str:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        start = answer[:300].decode(errors="replace")
        raise GistError(f"{url} gave no chat completion but {start!r}; is it an OpenAI-compatible API?") from error
    return content or ""  # null where a model says nothing
