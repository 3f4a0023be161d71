"""Adapter names: which version each stands for, and who still holds which version.

    load ──> Registration (name -> version) ──> replaced or unloaded: drains ──> last lease: gone
                  │ lease, one a request                                               │
                  └── a request keeps the registration it started on                   │
    a version with no registration is freed: device slot and pages, then host memory <─┘

A name goes the moment it is unloaded, so new requests are refused, while the reply waits until
every registration of that name has drained. Two names with the same content share one version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sloraj.adapters.host_store import AdapterVersion, HostStore
from sloraj.adapters.residency import Residency
from sloraj.batch import PackedAdapter
from sloraj.errors import (
    AdapterBusy,
    AdapterExists,
    AdapterLoadError,
    AdapterNotFound,
    CapacityError,
    InternalError,
)


@dataclasses.dataclass(slots=True, eq=False)
class Registration:
    """One name's hold on one version, from its load until its last lease ends."""

    adapter_id: str
    path: str
    version: AdapterVersion
    is_pinned: bool
    loaded_at: float  # unix seconds
    num_leases: int = 0


class AdapterRegistry:
    """Names, registrations and leases. Frees versions in the host store and on the device."""

    def __init__(
        self, host_store: HostStore, residency: Residency, *, max_rank: int, num_usable_pages: int
    ) -> None:
        self._host_store = host_store
        self._residency = residency
        self._max_rank = max_rank
        self._num_usable_pages = num_usable_pages
        self._current: dict[str, Registration] = {}
        self._draining: dict[str, list[Registration]] = {}
        self._loading: set[str] = set()
        self._unloading: set[str] = set()
        self._unloaded: list[str] = []

    def __len__(self) -> int:
        return len(self._current)

    def __iter__(self) -> Iterator[Registration]:
        return iter(self._current.values())

    @property
    def num_draining(self) -> int:
        """Registrations that no new request can reach and that running ones still hold."""
        return sum(map(len, self._draining.values()))

    # --- load ---

    def begin_load(self, adapter_id: str, *, replace: bool) -> None:
        """Take a name for a load. Raises AdapterBusy or AdapterExists, and takes nothing then."""
        self._require_not_busy(adapter_id)
        if adapter_id in self._current and not replace:
            raise AdapterExists(
                f"adapter {adapter_id!r} is already loaded; unload it first, or ask to replace it",
                param="lora_name",
            )
        self._loading.add(adapter_id)

    def cancel_load(self, adapter_id: str) -> None:
        """Give the name back: its files could not be used."""
        self._loading.remove(adapter_id)

    def finish_load(
        self,
        adapter_id: str,
        path: str,
        packed: PackedAdapter,
        *,
        is_pinned: bool,
        loaded_at: float,
    ) -> Registration:
        """Register what was read. A version that was replaced drains; its requests keep it.

        Raises AdapterLoadError or CapacityError if it cannot be served; the name is then as before.
        """
        self.cancel_load(adapter_id)
        self._require_servable(adapter_id, packed)
        version = self._host_store.add(packed)
        registration = Registration(adapter_id, path, version, is_pinned, loaded_at)
        version.num_holds += 1
        version.num_pinned += is_pinned
        self._residency.revalue(version)
        replaced = self._current.pop(adapter_id, None)
        self._current[adapter_id] = registration
        if replaced is not None:
            self._drain(replaced)
        return registration

    # --- unload ---

    def begin_unload(self, adapter_id: str) -> None:
        """Unregister a name; `take_unloaded` names it once all that it held is freed.

        Raises AdapterNotFound (also on the second of two unloads) or AdapterBusy (while it loads).
        """
        if adapter_id in self._loading:
            self._require_not_busy(adapter_id)
        registration = self._current.pop(adapter_id, None)
        if registration is None:
            raise AdapterNotFound(f"adapter {adapter_id!r} is not loaded", param="lora_name")
        self._unloading.add(adapter_id)
        self._drain(registration)

    def take_unloaded(self) -> list[str]:
        """Names whose unload has come to its end since the last call."""
        names, self._unloaded = self._unloaded, []
        return names

    # --- leases ---

    def acquire(self, adapter_id: str) -> Registration:
        """A lease for one request on what the name stands for now. Raises AdapterNotFound."""
        registration = self._current.get(adapter_id)
        if registration is None:
            raise AdapterNotFound(f"no model or adapter is named {adapter_id!r}", param="model")
        registration.num_leases += 1
        registration.version.num_leases += 1
        return registration

    def release(self, registration: Registration) -> None:
        """End a lease. The last one on a draining registration frees it."""
        if registration.num_leases < 1:
            raise InternalError(f"adapter {registration.adapter_id!r}: a lease ended twice")
        registration.num_leases -= 1
        registration.version.num_leases -= 1
        draining = self._draining.get(registration.adapter_id, [])
        if registration.num_leases == 0 and registration in draining:
            self._remove(registration)

    # --- internals ---

    def _require_not_busy(self, adapter_id: str) -> None:
        for names, verb in ((self._loading, "load"), (self._unloading, "unload")):
            if adapter_id in names:
                raise AdapterBusy(
                    f"adapter {adapter_id!r}: another {verb} of that name is under way",
                    param="lora_name",
                )

    def _require_servable(self, adapter_id: str, packed: PackedAdapter) -> None:
        if packed.max_rank > self._max_rank:
            raise AdapterLoadError(
                f"rank {packed.max_rank} exceeds max_rank {self._max_rank} (adapter "
                f"{adapter_id!r}); raise --max-rank",
                param="lora_path",
            )
        if packed.num_pages + 1 > self._num_usable_pages:  # 1: a page for the tokens
            raise CapacityError(
                f"adapter {adapter_id!r} takes {packed.num_pages} pages, the pool has "
                f"{self._num_usable_pages}, one of them for tokens; raise --pool-bytes"
            )

    def _drain(self, registration: Registration) -> None:
        self._draining.setdefault(registration.adapter_id, []).append(registration)
        if registration.num_leases == 0:
            self._remove(registration)

    def _remove(self, registration: Registration) -> None:
        name, version = registration.adapter_id, registration.version
        self._draining[name].remove(registration)
        version.num_holds -= 1
        version.num_pinned -= registration.is_pinned
        if version.num_holds == 0:
            self._residency.drop(version)
            self._host_store.drop(version)
        else:
            self._residency.revalue(version)
        if not self._draining[name]:
            del self._draining[name]
            if name in self._unloading:
                self._unloading.remove(name)
                self._unloaded.append(name)

    def check_integrity(self) -> None:
        """Raise InternalError unless holds and leases add up, version by version."""
        holds = dict.fromkeys((version.version_id for version in self._host_store), 0)
        leases = dict(holds)
        draining = [r for group in self._draining.values() for r in group]
        for registration in [*self, *draining]:
            holds[registration.version.version_id] += 1
            leases[registration.version.version_id] += registration.num_leases
        for version in self._host_store:
            counted = (holds[version.version_id], leases[version.version_id])
            if counted != (version.num_holds, version.num_leases) or version.num_holds < 1:
                raise InternalError(
                    f"adapter version {version.version_id}: {counted} holds and leases, "
                    f"{(version.num_holds, version.num_leases)} counted"
                )
        if any(registration.num_leases == 0 for registration in draining):
            raise InternalError("a registration drains without a lease")
