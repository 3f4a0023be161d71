"""Loading and unloading adapters at run time, in vLLM's form under /v1 and in SGLang's without."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving import models
from serving.adapter_schemas import parse_load, parse_unload
from serving.bridge import Bridge
from serving.errors import describe, error_headers, shown
from serving.state import read_object, server_state
from sloraj.errors import AdapterNotFound, SlorajError
from sloraj.frontend_api import AdapterInfo


async def _load(request: Request) -> tuple[Bridge, AdapterInfo]:
    server = server_state(request)
    bridge = server.host.bridge_for_new_work()
    asked = parse_load(await read_object(request), bridge.engine.info.model_id)
    path = await bridge.call(lambda: server.roots.resolve(asked.path))
    info = await bridge.wait(
        lambda: bridge.engine.load_adapter(
            asked.adapter_id, path, replace=asked.replace, pinned=asked.pinned
        )
    )
    return bridge, info


async def _unload(request: Request) -> tuple[Bridge, str]:
    bridge = server_state(request).host.bridge()
    adapter_id = parse_unload(await read_object(request))
    unknown = AdapterNotFound(f"adapter {shown(adapter_id)} is not loaded", param="lora_name")
    if adapter_id == bridge.engine.info.model_id:
        raise unknown
    try:
        await bridge.wait(lambda: bridge.engine.unload_adapter(adapter_id))
    except AdapterNotFound as exc:
        raise unknown from exc
    return bridge, adapter_id


async def load_adapter(request: Request) -> Response:
    _, info = await _load(request)
    return JSONResponse(
        {
            "status": "success",
            "message": f"adapter {info.adapter_id!r} is loaded",
            "lora_name": info.adapter_id,
            "version": info.version,
            "rank": info.rank,
            "num_bytes": info.num_bytes,
        }
    )


async def unload_adapter(request: Request) -> Response:
    _, adapter_id = await _unload(request)
    return JSONResponse({"status": "success", "message": f"adapter {adapter_id!r} is unloaded"})


async def load_adapter_flat(request: Request) -> Response:
    try:
        bridge, _ = await _load(request)
    except SlorajError as exc:
        return await _flat_refusal(request, exc)
    return await _flat(bridge)


async def unload_adapter_flat(request: Request) -> Response:
    try:
        bridge, _ = await _unload(request)
    except SlorajError as exc:
        return await _flat_refusal(request, exc)
    return await _flat(bridge)


async def _flat(bridge: Bridge, error: SlorajError | None = None) -> Response:
    loaded = {info.adapter_id: info.path for info in await models.list_adapters(bridge)}
    answer = {
        "success": error is None,
        "error_message": error.message if error else "",
        "loaded_adapters": loaded,
    }
    if error is None:
        return JSONResponse(answer)
    return JSONResponse(answer, status_code=describe(error).status, headers=error_headers(error))


async def _flat_refusal(request: Request, error: SlorajError) -> Response:
    """Refused because of what was asked: the flat form. For want of an engine: the common form."""
    if describe(error).status >= 500:
        raise error
    return await _flat(server_state(request).host.bridge(), error)
