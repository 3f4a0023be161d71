"""Which adapter a request's `model` means."""

from __future__ import annotations

import bisect
import dataclasses
import difflib

from serving.adapter_schemas import is_adapter_name
from serving.bridge import Bridge
from serving.errors import shown
from sloraj.errors import AdapterNotFound, SlorajError
from sloraj.frontend_api import AdapterInfo, ModelInfo

LIST_TIMEOUT_S = 5.0
MAX_COMPARED = 200  # names that a wrong one is compared with: some 10 ms of a thread


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """`name` is echoed to the client; `adapter_id` None is the base model."""

    name: str
    adapter_id: str | None


def resolve(model: str | None, info: ModelInfo) -> Target:
    """Nothing or the base id: the base. `adapter` or `base:adapter`: the adapter, which may not
    exist.

    Raises AdapterNotFound for what cannot be an adapter's name.
    """
    if model is None or model == info.model_id:
        return Target(info.model_id, None)
    prefix = f"{info.model_id}:"
    name = model.removeprefix(prefix)
    if not is_adapter_name(name):
        raise AdapterNotFound(f"model {shown(model)} does not exist", param="model")
    return Target(model, name)


async def list_adapters(bridge: Bridge) -> list[AdapterInfo]:
    return await bridge.wait(bridge.engine.list_adapters, LIST_TIMEOUT_S)


async def not_found(bridge: Bridge, model: str, *, param: str = "model") -> AdapterNotFound:
    """The error for an unknown model, with the names closest to it and how many there are."""
    base_id = bridge.engine.info.model_id
    try:
        names = [adapter.adapter_id for adapter in await list_adapters(bridge)]
    except SlorajError:
        return AdapterNotFound(f"model {shown(model)} does not exist", param=param)

    def nearest() -> list[str]:
        known = sorted([base_id, *names])
        start = max(0, bisect.bisect(known, model) - MAX_COMPARED // 2)
        neighbours = known[start : start + MAX_COMPARED]
        return difflib.get_close_matches(model[:256], neighbours, n=3, cutoff=0.5)

    close = await bridge.call(nearest)
    hint = f"did you mean {', '.join(repr(name) for name in close)}? " if close else ""
    return AdapterNotFound(
        f"model {shown(model)} does not exist. {hint}The base model {base_id!r} and {len(names)} "
        "adapters are served; GET /v1/models lists them",
        param=param,
    )
