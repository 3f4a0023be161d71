"""Pure ASGI middleware for what nobody foresaw: the client gets a 500 in our shape, the log the
rest.
"""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import error_response

log = logging.getLogger("serving")


class Faults:
    """Answers an exception that nothing else has answered, unless a response has begun already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception as exc:
            if scope["type"] != "http" or has_begun:
                raise
            log.exception("request %s failed", scope.get("sloraj.request_id"))
            await error_response(exc)(scope, receive, send)
