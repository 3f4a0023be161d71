"""GET /v1/models and /v1/models/{id}: the base model first, then every adapter."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving import models
from serving.sse import encode_json
from serving.state import server_state
from sloraj.frontend_api import AdapterInfo, ModelInfo


def _base_card(info: ModelInfo, created: int) -> dict[str, Any]:
    return {
        "id": info.model_id,
        "object": "model",
        "created": created,
        "owned_by": "sloraj",
        "root": info.model_path,
        "parent": None,
        "max_model_len": info.max_model_len,
        "permission": [],
    }


def _adapter_card(adapter: AdapterInfo, info: ModelInfo) -> dict[str, Any]:
    return {
        "id": adapter.adapter_id,
        "object": "model",
        "created": int(adapter.loaded_at),
        "owned_by": "sloraj",
        "root": adapter.path,
        "parent": info.model_id,
        "max_model_len": info.max_model_len,
        "permission": [],
        "version": adapter.version,
        "rank": adapter.rank,
        "state": adapter.state,
        "pinned": adapter.pinned,
    }


async def list_models(request: Request) -> Response:
    server = server_state(request)
    bridge = server.host.bridge()
    info = bridge.engine.info
    cards = [_base_card(info, server.host.created)]
    cards += [_adapter_card(adapter, info) for adapter in await models.list_adapters(bridge)]
    return Response(encode_json({"object": "list", "data": cards}), media_type="application/json")


async def retrieve_model(request: Request) -> Response:
    """Raises AdapterNotFound for unknown ids."""
    server = server_state(request)
    bridge = server.host.bridge()
    info = bridge.engine.info
    target = models.resolve(request.path_params["model_id"], info)
    if target.adapter_id is None:
        return JSONResponse(_base_card(info, server.host.created))
    for adapter in await models.list_adapters(bridge):
        if adapter.adapter_id == target.adapter_id:
            return JSONResponse({**_adapter_card(adapter, info), "id": target.name})
    raise await models.not_found(bridge, target.name)
