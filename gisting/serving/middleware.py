"""Prepare requests with a gist for an OpenAI-compatible server, and answer those that cannot be served.

Place in the flow: HTTP -> **middleware** -> the server. The middleware is an ASGI application around another one. It
reads the body of a JSON request when the server asks for it, which is after authentication; lets
:mod:`gisting.serving.requests` put in the ids and the placeholders of the gist tokens; and answers 400 or 404 itself.
The body of a request that names no gist passes through unchanged, byte for byte. Nothing is parsed or tokenised that
:mod:`gisting.serving.limits` refuses, long bodies do not delay short ones, and the work for a client that has hung up
is dropped. Depends on ASGI, but imports no server.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from gisting.errors import GistError
from gisting.serving.gists import GistRefusedError, Served, StoredGists, read_gist_tokenizer
from gisting.serving.limits import MAX_BODY_BYTES, MAX_CHECKED_BYTES, Limits
from gisting.serving.requests import ROUTES, check_extra, check_without_gist, completion_with_ids
from gisting.tokens import GistTokenizer

__all__ = ["GistMiddleware"]

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    500: "InternalServerError",
}
# Every spelling of the name, and every encoding other than UTF-8, shows one of these. Writers of JSON never escape
# letters, so a body with escapes is not held to be one.
_NAME = b"kv_transfer_params"
_ESCAPED = [b"\\u00" + code.encode() for letter in sorted({*_NAME}) for code in {f"{letter:02x}", f"{letter:02X}"}]
_ENCODINGS = (b"\0", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf")
# Bodies up to this size are prepared by other threads than longer ones, so that they need not wait for these.
_SHORT_BYTES = 64 * 2**10
_NUM_THREADS = 2
_logger = logging.getLogger("vllm.gisting")


class _Known(NamedTuple):
    """What requests are prepared with."""

    gists: StoredGists
    tokenizer: GistTokenizer
    limits: Limits


class GistMiddleware:
    """The middleware that ``vllm serve --middleware gisting.serving.vllm.GistMiddleware`` puts around the server.

    Args:
        app: the server.
        gists: the gists that requests may name; None to load those of the server's configuration when it starts.
        tokenizer: the checkpoint's tokenizer; None to load it likewise.
        max_tokens: the model's length, if gists and tokenizer are given; None sets no limit.
    """

    def __init__(
        self,
        app: _App,
        gists: StoredGists | None = None,
        tokenizer: GistTokenizer | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._app = app
        self._ready: asyncio.Future[_Known] | None = None
        self._given: _Known | None = None
        if gists is not None and tokenizer is not None:
            self._given = _Known(gists, tokenizer, Limits.of(tokenizer, max_tokens))
        self._has_failed = False
        # Threads, so that a long text does not hold up other requests' streams.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="gisting-load")
        self._short = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="gisting-short")
        self._long = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="gisting-long")
        # Each with a tokenizer of its own, because tokenizers are not thread-safe.
        self._own = threading.local()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            self._start_loading(scope)
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        refused: GistRefusedError | None = None
        is_read = has_answered = False
        next_message: asyncio.Future[MutableMapping[str, Any]] | None = None

        async def receive_ready() -> MutableMapping[str, Any]:
            # The server asks for the body after authentication, so nothing is read of requests that it rejects.
            nonlocal is_read, refused, next_message
            if is_read:
                waiting, next_message = next_message, None
                return await (receive() if waiting is None else waiting)
            is_read = True
            try:
                body = await _whole(receive)
                if body is None:
                    return {"type": "http.disconnect"}
                # What comes after the body is that the client hangs up.
                next_message = asyncio.ensure_future(receive())
                body = await _unless(next_message, self._prepare(scope, path, body))
                if body is None:
                    return {"type": "http.disconnect"}
            except GistRefusedError as error:
                refused = error
            except (GistError, OSError) as error:  # the fault of this server's store or checkpoint
                refused = GistRefusedError(str(error), status=500)
            except Exception as error:
                _logger.exception("a request with a gist could not be prepared")
                refused = GistRefusedError(f"the gist could not be put in: {type(error).__name__}: {error}", status=500)
            else:
                return {"type": "http.request", "body": body, "more_body": False}
            return {"type": "http.disconnect"}  # the server drops the request; the answer is sent below

        async def send_unless_refused(event: MutableMapping[str, Any]) -> None:
            nonlocal has_answered
            if refused is None:
                has_answered = True
                await send(event)

        try:
            await self._app(_without_length(scope) if path in ROUTES else scope, receive_ready, send_unless_refused)
        except Exception:
            if refused is None:
                raise
        finally:
            if next_message is not None:
                next_message.cancel()
        if refused is not None and not has_answered:
            await _answer(refused, send)

    async def _prepare(self, scope: _Scope, path: str, body: bytes) -> bytes:
        route = ROUTES.get(path)
        is_marked = _is_marked(body)
        # Gist tokens come only in a list.
        if not is_marked and (b"[" not in body or route is not completion_with_ids or len(body) > MAX_CHECKED_BYTES):
            return body
        if is_marked:
            known = await self._known_or_none(scope)
            (Limits() if known is None else known.limits).check_bytes(body)
        pool = self._short if len(body) <= _SHORT_BYTES else self._long
        loop = asyncio.get_running_loop()
        parsed = await loop.run_in_executor(pool, _parsed, body)
        if parsed is None:
            return body  # the server reports what is wrong with it
        check_extra(parsed)
        params = parsed.get("kv_transfer_params")
        if not isinstance(params, dict) or "gist" not in params:
            has_ids = isinstance(parsed.get("prompt"), list)
            has_ids = has_ids or (isinstance(params, dict) and params.get("prompt_token_ids") is not None)
            if route is not None and has_ids and (known := await self._known_or_none(scope)) is not None:
                await loop.run_in_executor(pool, check_without_gist, parsed, known.tokenizer.gist_token_id)
            return body
        if route is None:
            raise GistRefusedError(f"{path} does not take gists; send the request to {' or '.join(ROUTES)}", status=400)
        known = await self._known(scope)

        def make() -> bytes:
            known.limits.check(parsed)
            made = route(parsed, known.gists, self._own_tokenizer(known.tokenizer))
            return body if made is None else json.dumps(made).encode()

        return await loop.run_in_executor(pool, make)

    def _own_tokenizer(self, tokenizer: GistTokenizer) -> GistTokenizer:
        """Return this thread's copy of a tokenizer."""
        if getattr(self._own, "of", None) is not tokenizer:
            self._own.of, self._own.copy = tokenizer, copy.deepcopy(tokenizer)
        return self._own.copy

    async def _known_or_none(self, scope: _Scope) -> _Known | None:
        """Return what is known, or None if it cannot be loaded, for requests that may have nothing to do with gists."""
        if self._given is None and self._has_failed:
            return None  # a request that names a gist tries again; the engine checks this one
        try:
            return await self._known(scope)
        except Exception:
            _logger.warning("ids are checked for gist tokens in the engine, not here", exc_info=True)
            return None

    async def _known(self, scope: _Scope) -> _Known:
        if self._given is not None:
            return self._given
        try:
            loaded = await asyncio.shield(self._start_loading(scope))
        except Exception:
            self._ready, self._has_failed = None, True  # the next request with a gist tries again
            raise
        self._given = loaded
        return loaded

    def _start_loading(self, scope: _Scope) -> asyncio.Future[_Known]:
        """Load what the server's configuration names, once, outside the event loop."""
        if self._ready is None:
            config = getattr(scope["app"].state, "vllm_config", None)
            self._ready = asyncio.get_running_loop().run_in_executor(self._loader, _of_config, config)
        return self._ready


async def _unless(event: asyncio.Future[MutableMapping[str, Any]], work: Coroutine[Any, Any, bytes]) -> bytes | None:
    """Return the result of ``work``, or None if ``event`` comes first; what has not begun by then is not done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, event}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _is_marked(body: bytes) -> bool:
    """Whether a body may name a gist: False for no body that does."""
    return (
        _NAME in body
        or (b"\\u00" in body and any(letter in body for letter in _ESCAPED))
        or any(mark in body[:4] for mark in _ENCODINGS)  # the bytes by which json tells encodings apart
    )


def _parsed(body: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


async def _whole(receive: _Receive) -> bytes | None:
    """Read the body, or return None if the client has disconnected.

    Raises:
        GistRefusedError: it is larger than :data:`MAX_BODY_BYTES`.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise GistRefusedError(f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB; send less", status=413)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _answer(error: GistRefusedError, send: _Send) -> None:
    """Send an error in the format of the OpenAI-compatible routes."""
    given = {"message": str(error), "type": _TYPES[error.status], "param": "kv_transfer_params", "code": error.status}
    content = json.dumps({"error": given}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _of_config(config: Any) -> _Known:
    """Load the store and tokenizer of a server from vLLM's configuration."""
    transfer: Any = getattr(config, "kv_transfer_config", None)
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    if "store" not in extra or transfer.kv_connector != "GistConnector":
        raise GistRefusedError("this server has no gist store; start it with `gisting serve MODEL --store DIR`")
    model = config.model_config
    tokenizer = read_gist_tokenizer(model.model, extra, revision=model.revision)
    served = Served.of_checkpoint(
        model.model,
        model.dtype,
        revision=model.revision,
        fingerprint=extra.get("fingerprint"),
        tokenizer=tokenizer,
    )
    limits = Limits.of(tokenizer, getattr(model, "max_model_len", None))
    return _Known(StoredGists(extra["store"], served), tokenizer, limits)


def _is_json(scope: _Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return any(b"json" in kind.lower() for kind in kinds)


def _without_length(scope: _Scope) -> _Scope:
    """Drop the length from the scope of a request whose body may change."""
    lengths = (b"content-length", b"transfer-encoding")
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name.lower() not in lengths]}
