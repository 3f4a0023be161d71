"""What operators and load balancers ask: /health, /ready, /ping, /version, /metrics. No key
needed.
"""

from __future__ import annotations

import logging

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving import models
from serving.state import server_state
from sloraj import __version__
from sloraj.errors import EngineUnavailable, SlorajError

log = logging.getLogger("serving")

SCRAPE_TIMEOUT_S = 2.0


async def health(request: Request) -> Response:
    """200 while the engine's loop turns, draining included; 503 with the reason otherwise."""
    host = server_state(request).host
    state = host.health()
    reason = host.unhealthy_reason()
    body = {
        "status": "ok" if reason is None else "unhealthy",
        "engine": state.state,
        "reason": reason,
        "heartbeat_age_s": round(state.heartbeat_age_s, 3),
        "running_requests": host.num_generations,
    }
    return JSONResponse(body, status_code=200 if reason is None else 503)


async def ready(request: Request) -> Response:
    """200 while new requests are welcome; 503 while starting, draining or dead."""
    reason = server_state(request).host.unready_reason()
    body = {"status": "ready" if reason is None else "not ready", "reason": reason}
    headers = None if reason is None else {"retry-after": "1"}
    return JSONResponse(body, status_code=200 if reason is None else 503, headers=headers)


async def version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def metrics(request: Request) -> Response:
    """Answers whatever state the engine is in: the last numbers it gave, and its state."""
    server = server_state(request)
    snapshot = server.metrics.engine
    snapshot.health = server.host.health()
    try:
        bridge = server.host.bridge()
        snapshot.info = bridge.engine.info
        snapshot.stats = await bridge.wait(bridge.engine.stats, SCRAPE_TIMEOUT_S)
        snapshot.adapters = await models.list_adapters(bridge)
    except EngineUnavailable:
        snapshot.stats, snapshot.adapters = {}, []
    except SlorajError as exc:
        log.warning("metrics: the engine did not answer: %s", exc)
    return Response(server.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})
