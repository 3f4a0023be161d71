"""Pure ASGI middleware that bounds what a client may send before any endpoint sees it.

`RequestId` names the request, `Limits` reads the whole body within size and time and hands it on
in one piece. Errors are answered here, in the one shape of `serving.errors`.
"""

from __future__ import annotations

import asyncio
import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import ServerConfig
from serving.errors import (
    BadRequest,
    BodyTimeout,
    BodyTooLarge,
    HeadersTooLarge,
    ProtocolError,
    UnsupportedMediaType,
    error_response,
    shown,
)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def header(scope: Scope, name: bytes) -> list[str]:
    """Every value of a header, as text."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


class RequestId:
    """Gives every request an id of our own making and every answer an `X-Request-Id`.

    A well-formed id that the client sent is what is echoed; it never becomes the engine's key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = uuid.uuid4().hex
        given = header(scope, b"x-request-id")
        echoed = given[0] if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else own
        scope["sloraj.request_id"] = own

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = echoed
            await send(message)

        await self._app(scope, receive, send_named)


class _ClientGone(Exception):
    pass


class Limits:
    """Refuses too many or too long headers (431), other bodies than JSON (415), and bodies that are
    too large (413, declared or chunked) or too slow (408).
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
            body = await self._read(scope, receive)
            self._check_type(scope, body)
        except _ClientGone:
            return
        except ProtocolError as exc:
            exc.headers.setdefault("connection", "close")  # what is left of the body stays unread
            await error_response(exc)(scope, receive, send)
            return
        is_replayed = False

        async def replay() -> Message:
            nonlocal is_replayed
            if is_replayed:
                return await receive()
            is_replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_headers(self, scope: Scope) -> None:
        count, limit = len(scope["headers"]), self._config.max_headers
        if count > limit:
            raise HeadersTooLarge(f"headers: got {count}, allowed: at most {limit}")
        size, limit = (
            sum(len(k) + len(v) for k, v in scope["headers"]),
            self._config.max_header_bytes,
        )
        if size > limit:
            raise HeadersTooLarge(f"headers: got {size} bytes, allowed: at most {limit}")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._config.max_body_bytes
        too_large = f"body: allowed: at most {limit} bytes"
        for declared in header(scope, b"content-length"):
            if not (declared.isascii() and declared.isdigit()):
                raise BadRequest(
                    f"content-length: got {shown(declared)}, allowed: a number of bytes"
                )
            if len(declared) > 18 or int(declared) > limit:
                raise BodyTooLarge(f"{too_large}; content-length says {shown(declared)}")
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise BodyTooLarge(too_large)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as exc:
            raise BodyTimeout(
                f"body: {len(body)} bytes came within "
                f"{self._config.body_timeout_s:g} s, then no end"
            ) from exc

    def _check_type(self, scope: Scope, body: bytes) -> None:
        if not body or scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        given = header(scope, b"content-type")
        kind = given[0].partition(";")[0].strip().lower() if given else ""
        if len(given) > 1 or kind != "application/json":
            raise UnsupportedMediaType(
                f"content-type: got {shown(kind) if given else 'none'}, allowed: application/json"
            )
