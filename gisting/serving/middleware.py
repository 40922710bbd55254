"""Requests with a gist made ready in front of an OpenAI-compatible server, and refused in words where they cannot be.

Place in the flow: HTTP -> **middleware** -> the server. An ASGI application around another one: it reads the bodies of
JSON requests, has :mod:`gisting.serving.requests` put ids and the places of the gist tokens in, and answers 400 or 404
itself. A request that names no gist passes as it came, byte for byte. Knows ASGI; imports no server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gisting.errors import GistError
from gisting.serving.gists import GistRefusedError, Served, StoredGists
from gisting.serving.requests import ROUTES, check_without_gist
from gisting.tokens import GistTokenizer

__all__ = ["GistMiddleware"]

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

_TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}
_DENIED = (401, 403)


class GistMiddleware:
    """What ``vllm serve --middleware gisting.serving.vllm.GistMiddleware`` puts around the server.

    Args:
        app: the server.
        gists: which gists there are; None to read what the server's configuration names when the server starts.
        tokenizer: the checkpoint's, or None likewise.
    """

    def __init__(self, app: _App, gists: StoredGists | None = None, tokenizer: GistTokenizer | None = None) -> None:
        self._app = app
        self._ready: asyncio.Future[tuple[StoredGists, GistTokenizer]] | None = None
        self._given = None if gists is None or tokenizer is None else (gists, tokenizer)
        # One thread: tokenizers are not made for several, and a long text must not hold up the others' streams.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gisting")

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            self._begin_to_load(scope)
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        try:
            made = await self._made_ready(scope, body)
        except GistRefusedError as error:
            await self._refuse(scope, receive, send, error.status, str(error))
            return
        except (GistError, OSError) as error:  # the store or checkpoint of this server, not the request
            await self._refuse(scope, receive, send, 500, str(error))
            return
        await self._app(_resized(scope, made), _again(made, receive), send)

    async def _made_ready(self, scope: _Scope, body: bytes) -> bytes:
        gist_token_id = None if self._given is None else self._given[1].gist_token_id
        if b"kv_transfer_params" not in body and str(gist_token_id).encode() not in body:
            return body
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return body  # the server says what is wrong with it
        if not isinstance(parsed, dict):
            return body
        params = parsed.get("kv_transfer_params")
        if not isinstance(params, dict) or "gist" not in params:
            if gist_token_id is not None:
                check_without_gist(parsed, gist_token_id)
            return body
        route = next((route for path, route in ROUTES.items() if scope["path"].endswith(path)), None)
        if route is None:
            raise GistRefusedError(
                f"{scope['path']} takes no gist; send the request to {' or '.join(ROUTES)}", status=400
            )
        gists, tokenizer = await self._gists_and_tokenizer(scope)
        made = await asyncio.get_running_loop().run_in_executor(self._thread, route, parsed, gists, tokenizer)
        return body if made is None else json.dumps(made).encode()

    async def _gists_and_tokenizer(self, scope: _Scope) -> tuple[StoredGists, GistTokenizer]:
        if self._given is None:
            try:
                self._given = await asyncio.shield(self._begin_to_load(scope))
            except (GistError, OSError):
                self._ready = None  # the next request tries again
                raise
        return self._given

    def _begin_to_load(self, scope: _Scope) -> asyncio.Future[tuple[StoredGists, GistTokenizer]]:
        """What the server's configuration names, read beside the event loop, once."""
        if self._ready is None:
            config = getattr(scope["app"].state, "vllm_config", None)
            self._ready = asyncio.get_running_loop().run_in_executor(self._thread, _of_config, config)
        return self._ready

    async def _refuse(self, scope: _Scope, receive: _Receive, send: _Send, status: int, message: str) -> None:
        """Answer with an error; but who may not use the server hears that from the server, and nothing of its store."""
        denied: list[MutableMapping[str, Any]] = []
        found = 0

        async def overhear(event: MutableMapping[str, Any]) -> None:
            nonlocal found
            if event["type"] == "http.response.start":
                found = event["status"]
            if found in _DENIED:
                denied.append(event)

        # Without any field the server has nothing to do but to look at who asks.
        await self._app(_resized(scope, b"{}"), _again(b"{}", receive), overhear)
        if denied:
            for event in denied:
                await send(event)
            return
        error = {"message": message, "type": _TYPES[status], "param": "kv_transfer_params", "code": status}
        content = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def _of_config(config: Any) -> tuple[StoredGists, GistTokenizer]:
    """Store and tokenizer of a server, from vLLM's configuration."""
    transfer: Any = getattr(config, "kv_transfer_config", None)
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    if "store" not in extra or transfer.kv_connector != "GistConnector":
        raise GistRefusedError("this server has no store of gists; start it with `gisting serve MODEL --store DIR`")
    model = config.model_config
    tokenizer = GistTokenizer.from_pretrained(model.model, revision=model.revision)
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


def _resized(scope: _Scope, body: bytes) -> _Scope:
    """The scope of a request with this body."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name.lower() not in (b"content-length", b"transfer-encoding")
    ]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _again(body: bytes, receive: _Receive) -> _Receive:
    """What receives this body, and then what comes from the client: that it has gone."""
    is_sent = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
