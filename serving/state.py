"""What every endpoint shares, made once per app and found at `request.app.state.server`."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from starlette.requests import Request

from serving.adapter_paths import AdapterRoots
from serving.chat_template import ChatTemplates
from serving.config import ServerConfig
from serving.host import EngineHost
from serving.metrics import Metrics
from serving.strict_json import parse_object

BIG_BODY_BYTES = 64 * 1024  # larger ones are parsed off the event loop


@dataclasses.dataclass(slots=True, kw_only=True)
class ServerState:
    config: ServerConfig
    host: EngineHost
    metrics: Metrics
    templates: ChatTemplates
    roots: AdapterRoots


def server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def request_id(request: Request) -> str:
    """The id that `serving.limits.RequestId` gave to this request."""
    given: str = request.scope["sloraj.request_id"]
    return given


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises BadRequest."""
    body = await request.body()
    if len(body) > BIG_BODY_BYTES:
        return await asyncio.to_thread(parse_object, body)
    return parse_object(body)
