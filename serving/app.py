"""Puts the server together: `create_app(engine, config)` gives a Starlette app that owns the
engine's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import (
    routes_adapters,
    routes_generate,
    routes_health,
    routes_models,
    routes_tokenize,
)
from serving.adapter_paths import AdapterRoots
from serving.auth import Auth
from serving.chat_template import ChatTemplates
from serving.config import ServerConfig
from serving.errors import (
    BadRequest,
    MethodNotAllowed,
    ProtocolError,
    RouteNotFound,
    error_response,
    shown,
)
from serving.faults import Faults
from serving.host import EngineFactory, EngineHost
from serving.limits import Limits, RequestId
from serving.metrics import Metrics
from serving.state import ServerState
from sloraj.errors import SlorajError
from sloraj.frontend_api import FrontendApi

ROUTES = (
    ("POST", "/v1/completions", routes_generate.completions),
    ("POST", "/v1/chat/completions", routes_generate.chat_completions),
    ("GET", "/v1/models", routes_models.list_models),
    ("GET", "/v1/models/{model_id:path}", routes_models.retrieve_model),
    ("POST", "/v1/load_lora_adapter", routes_adapters.load_adapter),
    ("POST", "/v1/unload_lora_adapter", routes_adapters.unload_adapter),
    ("POST", "/load_lora_adapter", routes_adapters.load_adapter_flat),
    ("POST", "/unload_lora_adapter", routes_adapters.unload_adapter_flat),
    ("POST", "/tokenize", routes_tokenize.tokenize),
    ("POST", "/detokenize", routes_tokenize.detokenize),
    ("GET", "/health", routes_health.health),
    ("GET", "/ready", routes_health.ready),
    ("GET", "/version", routes_health.version),
    ("GET", "/metrics", routes_health.metrics),
)


class _Measure:
    """Counts every HTTP request by the route it took, outermost so that refusals count too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start_s = 500, time.monotonic()

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            handler = getattr(scope.get("route"), "path", "other")
            self._metrics.http(handler, scope["method"], status, time.monotonic() - start_s)


async def _on_known_error(request: Request, exc: Exception) -> Response:
    return error_response(exc)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    """What the router itself refuses, in our shape."""
    assert isinstance(exc, HTTPException)
    path = shown(request.scope["path"])
    if exc.status_code == 404:
        return error_response(RouteNotFound(f"no endpoint at {path}"))
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "")
        return error_response(
            MethodNotAllowed(
                f"method: got {shown(request.method)} at {path}, allowed: {allowed}",
                headers={"allow": allowed},
            )
        )
    return error_response(BadRequest(str(exc.detail)))


def create_app(
    engine: FrontendApi | EngineFactory,
    config: ServerConfig | None = None,
    *,
    default_roots: Sequence[str] = (),
    max_adapter_slots: int | None = None,
) -> Starlette:
    """An ASGI app serving `engine`, or what `engine()` makes on a thread while the app already
    answers.

    `default_roots`: where adapters may be loaded from when the config names no roots.
    `max_adapter_slots` is what routers are told to be the room for adapters on the device.
    The app's lifespan starts and stops the engine. Raises ConfigError.
    """
    config = config or ServerConfig()
    server = ServerState(
        config=config,
        host=EngineHost(engine, config),
        metrics=Metrics(vllm_names=config.vllm_metrics, max_adapter_slots=max_adapter_slots),
        templates=ChatTemplates(config.chat_template, config.chat_template_timeout_s),
        roots=AdapterRoots(config.adapter_root or default_roots),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.host.start()
        try:
            yield
        finally:
            server.templates.stop()
            await asyncio.to_thread(server.host.stop)

    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=[method]) for method, path, endpoint in ROUTES),
            Route("/ping", routes_health.health, methods=["GET", "POST"]),
        ],
        middleware=[
            Middleware(_Measure, metrics=server.metrics),
            Middleware(RequestId),
            Middleware(Faults),
            Middleware(Auth, config=config),
            Middleware(Limits, config=config),
        ],
        exception_handlers={
            SlorajError: _on_known_error,
            ProtocolError: _on_known_error,
            HTTPException: _on_http_exception,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app
