"""Pure ASGI middleware that asks for an API key: deny by default, on the raw path.

The path is `scope["path"]` as the router sees it, never one rebuilt from the Host header.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.config import ServerConfig
from serving.errors import Forbidden, ProtocolError, Unauthenticated, error_response
from serving.limits import header

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics"})
ADMIN_PATHS = frozenset(
    {
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/load_lora_adapter",
        "/unload_lora_adapter",
    }
)


class Auth:
    """Lets the open paths through, asks for a key on all others, and for the admin key to load and
    unload.

    With only `api_key` set it opens everything; with only `admin_api_key` set, all but loading
    is open.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._user_key = config.api_key
        self._admin_key = config.admin_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._check(scope)
            except ProtocolError as exc:
                await error_response(exc)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        is_admin_path = scope["path"] in ADMIN_PATHS
        wanted = [key for key in (self._user_key, self._admin_key) if key is not None]
        if not wanted or (self._user_key is None and not is_admin_path):
            return
        given = header(scope, b"authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # every key is compared, whatever came, so that the time taken tells nothing
        matches = [hmac.compare_digest(token.encode(), key.encode()) for key in wanted]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthenticated(
                "authorization: expected one header 'Bearer <api key>' with a valid key",
                headers={"www-authenticate": "Bearer"},
            )
        if is_admin_path and self._admin_key is not None and not matches[-1]:
            raise Forbidden("authorization: this endpoint needs the admin key")
