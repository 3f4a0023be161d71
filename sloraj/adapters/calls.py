"""Answers to the messages about adapters: load, unload, list. One open load or unload per name."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sloraj.adapters.loader import AdapterLoader, LoadDone
from sloraj.adapters.registry import AdapterRegistry, Registration
from sloraj.adapters.residency import Residency
from sloraj.errors import InternalError, SlorajError
from sloraj.messages import ListAdapters, LoadAdapter, Reply, UnloadAdapter


class AdapterCalls:
    """Keeps the calls that cannot be answered at once, and hands every answer to `reply`."""

    def __init__(
        self,
        registry: AdapterRegistry,
        residency: Residency,
        loader: AdapterLoader,
        reply: Callable[[Reply], None],
    ) -> None:
        self._registry = registry
        self._residency = residency
        self._loader = loader
        self._reply = reply
        self._loads: dict[str, int] = {}  # adapter_id -> call_id
        self._unloads: dict[str, int] = {}

    @property
    def num_open(self) -> int:
        return len(self._loads) + len(self._unloads)

    def load(self, message: LoadAdapter) -> None:
        """Start reading; the answer follows `finish_load`."""
        try:
            self._registry.begin_load(message.adapter_id, replace=message.replace)
        except SlorajError as error:
            self._reply(Reply(call_id=message.call_id, error=error.to_wire()))
            return
        self._loads[message.adapter_id] = message.call_id
        self._loader.start(message)

    def finish_load(self, done: LoadDone) -> None:
        """Register what a worker read, or give the name back, and answer."""
        message = done.message
        call_id = self._loads.pop(message.adapter_id)
        try:
            if done.packed is None:
                self._registry.cancel_load(message.adapter_id)
                raise done.error or InternalError("a load ended without a result")
            registration = self._registry.finish_load(
                message.adapter_id,
                message.path,
                done.packed,
                is_pinned=message.pinned,
                loaded_at=time.time(),
            )
        except SlorajError as error:
            self._reply(Reply(call_id=call_id, error=error.to_wire()))
        else:
            self._reply(Reply(call_id=call_id, value=self._info(registration)))

    def unload(self, message: UnloadAdapter) -> None:
        """Unregister; `answer_unloaded` answers once all is freed."""
        try:
            self._registry.begin_unload(message.adapter_id)
        except SlorajError as error:
            self._reply(Reply(call_id=message.call_id, error=error.to_wire()))
        else:
            self._unloads[message.adapter_id] = message.call_id

    def list_adapters(self, message: ListAdapters) -> None:
        in_order = sorted(self._registry, key=lambda registration: registration.adapter_id)
        infos = [self._info(registration) for registration in in_order]
        self._reply(Reply(call_id=message.call_id, value=infos))

    def answer_unloaded(self) -> None:
        for adapter_id in self._registry.take_unloaded():
            self._reply(Reply(call_id=self._unloads.pop(adapter_id)))

    def close(self, error: SlorajError) -> None:
        """Start no further load, and answer every open call with `error`."""
        self._loader.close()
        for call_id in (*self._loads.values(), *self._unloads.values()):
            self._reply(Reply(call_id=call_id, error=error.to_wire()))
        self._loads.clear()
        self._unloads.clear()

    def _info(self, registration: Registration) -> dict[str, Any]:
        """The fields of `frontend_api.AdapterInfo`."""
        version = registration.version
        on_device = self._residency.is_resident(version.version_id)
        return {
            "adapter_id": registration.adapter_id,
            "path": registration.path,
            "version": version.version_id,
            "rank": version.packed.max_rank,
            "num_pages": version.num_pages,
            "num_bytes": version.packed.num_bytes,
            "state": "on_device" if on_device else "on_host",
            "pinned": registration.is_pinned,
            "num_leases": version.num_leases,
            "loaded_at": registration.loaded_at,
        }
