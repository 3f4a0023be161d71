"""Server-sent events as this protocol's clients read them: `data: <one line>`, a blank line, LF
only.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.bridge import ClientGone, TooSlowReader
from serving.errors import error_body

log = logging.getLogger("serving")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def encode_json(value: Any) -> bytes:
    """One line of JSON in UTF-8; refuses NaN, which is not JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    return b"data: " + encode_json(value) + b"\n\n"


class EventStream(Response):
    """Sends the byte chunks of `events`, each as it comes, and calls `on_close` however that ends.

    A write that takes longer than `send_timeout_s` means a reader that does not read: the
    response is left unfinished, at which the server closes the connection.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        headers: dict[str, str],
        send_timeout_s: float,
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(
            None, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._events = events
        self._send_timeout_s = send_timeout_s
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Message) -> None:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)

        try:
            await send_soon(
                {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            )
            async for chunk in self._events:
                await send_soon({"type": "http.response.body", "body": chunk, "more_body": True})
            await send_soon({"type": "http.response.body", "body": b"", "more_body": False})
        except (TimeoutError, TooSlowReader):
            log.warning("a client did not read its stream; closed it")
        except ClientGone:
            pass  # nobody is left to be told
        except Exception as exc:  # the status is out: all that is left is to say so and to end well
            log.exception("a stream failed")
            body = event(error_body(exc)) + DONE
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            self._on_close()
