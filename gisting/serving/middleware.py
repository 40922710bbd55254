"""Prepare requests with a gist for an OpenAI-compatible server, and answer those that cannot be served.

Place in the flow: HTTP -> **middleware** -> the server. The middleware is an ASGI application around another one. It
reads the body of a JSON request when the server asks for it, which is after authentication; lets
:mod:`gisting.serving.requests` put in the ids and the placeholders of the gist tokens; and answers 400 or 404 itself.
The body of a request that names no gist passes through unchanged, byte for byte. Depends on ASGI, but imports no
server.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gisting.errors import GistError
from gisting.serving.gists import GistRefusedError, Served, StoredGists, read_gist_tokenizer
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
#: The limit for a JSON body, which is read completely before the server sees it.
MAX_BODY_BYTES = 64 * 2**20
_logger = logging.getLogger("vllm.gisting")


class GistMiddleware:
    """The middleware that ``vllm serve --middleware gisting.serving.vllm.GistMiddleware`` puts around the server.

    Args:
        app: the server.
        gists: the gists that requests may name; None to load those of the server's configuration when it starts.
        tokenizer: the checkpoint's tokenizer; None to load it likewise.
    """

    def __init__(self, app: _App, gists: StoredGists | None = None, tokenizer: GistTokenizer | None = None) -> None:
        self._app = app
        self._ready: asyncio.Future[tuple[StoredGists, GistTokenizer]] | None = None
        self._given = None if gists is None or tokenizer is None else (gists, tokenizer)
        self._has_failed = False
        # A thread, so that a long text does not hold up other requests' streams; one, because tokenizers are not
        # thread-safe.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gisting")

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

        async def receive_ready() -> MutableMapping[str, Any]:
            # The server asks for the body after authentication, so nothing is read of requests that it rejects.
            nonlocal is_read, refused
            if is_read:
                return await receive()
            is_read = True
            try:
                body = await _whole(receive)
                if body is None:
                    return {"type": "http.disconnect"}
                body = await self._prepare(scope, path, body)
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
        if refused is not None and not has_answered:
            await _answer(refused, send)

    async def _prepare(self, scope: _Scope, path: str, body: bytes) -> bytes:
        # One of these shows in every spelling of the name and in every other encoding; gist tokens come only in a list.
        marks = (b"kv_transfer_params", b"\\u", b"\0", b"\xfe\xff", b"\xff\xfe", b"\xef\xbb\xbf")
        is_plain = not any(mark in body for mark in marks)
        if is_plain and (b"[" not in body or ROUTES.get(path) is not completion_with_ids):
            return body
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return body  # the server reports what is wrong with it
        if not isinstance(parsed, dict):
            return body
        check_extra(parsed)
        params = parsed.get("kv_transfer_params")
        if not isinstance(params, dict) or "gist" not in params:
            if path in ROUTES and (tokenizer := await self._tokenizer(scope, parsed)) is not None:
                check_without_gist(parsed, tokenizer.gist_token_id)
            return body
        route = ROUTES.get(path)
        if route is None:
            raise GistRefusedError(f"{path} does not take gists; send the request to {' or '.join(ROUTES)}", status=400)
        gists, tokenizer = await self._gists_and_tokenizer(scope)
        made = await asyncio.get_running_loop().run_in_executor(self._thread, route, parsed, gists, tokenizer)
        return body if made is None else json.dumps(made).encode()

    async def _tokenizer(self, scope: _Scope, body: dict[str, Any]) -> GistTokenizer | None:
        """Return the checkpoint's tokenizer if a request that names no gist has ids to check, and None otherwise."""
        params = body.get("kv_transfer_params")
        ids = params.get("prompt_token_ids") if isinstance(params, dict) else None
        if not isinstance(body.get("prompt"), list) and ids is None:
            return None
        if self._given is None and self._has_failed:
            return None  # a request that names a gist tries again; the engine checks this one
        try:
            return (await self._gists_and_tokenizer(scope))[1]
        except Exception:
            _logger.warning("ids are checked for gist tokens in the engine, not here", exc_info=True)
            return None

    async def _gists_and_tokenizer(self, scope: _Scope) -> tuple[StoredGists, GistTokenizer]:
        if self._given is None:
            try:
                self._given = await asyncio.shield(self._start_loading(scope))
            except Exception:
                self._ready, self._has_failed = None, True  # the next request with a gist tries again
                raise
        return self._given

    def _start_loading(self, scope: _Scope) -> asyncio.Future[tuple[StoredGists, GistTokenizer]]:
        """Load what the server's configuration names, once, outside the event loop."""
        if self._ready is None:
            config = getattr(scope["app"].state, "vllm_config", None)
            self._ready = asyncio.get_running_loop().run_in_executor(self._thread, _of_config, config)
        return self._ready


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


def _of_config(config: Any) -> tuple[StoredGists, GistTokenizer]:
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
    return StoredGists(extra["store"], served), tokenizer


def _is_json(scope: _Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return any(b"json" in kind.lower() for kind in kinds)


def _without_length(scope: _Scope) -> _Scope:
    """Drop the length from the scope of a request whose body may change."""
    lengths = (b"content-length", b"transfer-encoding")
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name.lower() not in lengths]}
