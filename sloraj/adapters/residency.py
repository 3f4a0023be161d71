"""Which adapter versions are on the device, in which slot and pages, and which of them may go.

A version is pinned by every running sequence that uses it. Without pins it is idle: it stays, at no
cost, until its slot or pages are wanted. What goes first is the `RetentionPolicy`'s to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from sloraj.adapters.host_store import AdapterVersion
from sloraj.adapters.idle_versions import IdleVersions
from sloraj.adapters.retention import ExpectedReloadCost, KeepValue, RetentionPolicy
from sloraj.batch import AdapterInstall
from sloraj.errors import InternalError
from sloraj.pages import PagePool

# Why an idle version went: pages for tokens; a slot or pages for an adapter that is wanted now, or
# one sent ahead; the policy keeps none that is idle.
TOKENS, ADAPTER, PREFETCH, POLICY = "tokens", "adapter", "prefetch", "policy"


@dataclasses.dataclass(slots=True)
class ResidencyCounts:
    """What sequences found, and what was moved for them, since the start."""

    hits: int = 0  # acquired, and already used on the device
    misses: int = 0  # acquired, and to be sent first
    prefetched: int = 0  # sent ahead
    prefetched_used: int = 0  # of those, acquired before they went; counted neither hit nor miss
    prefetched_wasted: int = 0  # of those, gone before they were acquired
    loaded_bytes: int = 0  # sent to the device, ahead or not
    reloaded_bytes: int = 0  # of those, of versions that had been there before
    evictions: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys((TOKENS, ADAPTER, PREFETCH, POLICY), 0)
    )


@dataclasses.dataclass(slots=True, eq=False)
class _Resident:
    version: AdapterVersion
    slot: int
    pages: list[int]
    num_pins: int = 0
    is_prefetched: bool = False  # its first use is on record, and has not come yet


def _install(resident: _Resident) -> AdapterInstall:
    version = resident.version
    return AdapterInstall(resident.slot, version.tag, tuple(resident.pages), version.packed)


class Residency:
    """Slots 1 .. num_slots and the adapters' part of the pool. Slot 0 is the base model."""

    def __init__(
        self,
        pool: PagePool,
        num_slots: int,
        clock: Callable[[], float],
        policy: RetentionPolicy | None = None,
        num_reserved_pages: int | None = None,
    ) -> None:
        """num_reserved_pages: of the pool, for versions alone, and no other page for them: a fixed
        split, as engines have it whose adapters and KV do not share memory. None: they share.
        """
        self._pool = pool
        self._num_reserved = num_reserved_pages
        self._clock = clock
        self._policy = ExpectedReloadCost() if policy is None else policy
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots, 0, -1))
        self._residents: dict[str, _Resident] = {}
        self._slot_bytes = [0] * (num_slots + 1)
        self._idle = IdleVersions()
        self._wanted: dict[str, int] = {}  # waiting sequences by version; no version has 0
        self.counts = ResidencyCounts()
        self.num_pages = 0  # of all residents
        self.num_installs = 0

    @property
    def num_residents(self) -> int:
        return len(self._residents)

    @property
    def num_idle_pages(self) -> int:
        return self._idle.num_pages

    @property
    def num_evictions(self) -> int:
        return sum(self.counts.evictions.values())

    @property
    def wanted(self) -> dict[str, int]:
        """Waiting sequences by version."""
        return dict(self._wanted)

    @property
    def has_slot(self) -> bool:
        """Whether a version that is not here could have one."""
        return bool(self._free_slots or self._idle)

    def slot_bytes(self, slot: int) -> int:
        """Size of the adapter in a slot; 0 for slot 0, the base model."""
        return self._slot_bytes[slot]

    def stats(self) -> dict[str, Any]:
        return dataclasses.asdict(self.counts)

    def want(self, version_id: str | None) -> None:
        """A sequence waits for this version (None: for none)."""
        if version_id is not None:
            num_before = self._wanted.get(version_id, 0)
            self._wanted[version_id] = num_before + 1
            if not num_before:
                self._value_anew(version_id)

    def unwant(self, version_id: str | None) -> None:
        """It waits no more: it was admitted, or has gone."""
        if version_id is not None:
            self._wanted[version_id] -= 1
            if not self._wanted[version_id]:
                del self._wanted[version_id]
                self._value_anew(version_id)

    def _value_anew(self, version_id: str) -> None:
        if version_id in self._idle:
            self._become_idle(self._residents[version_id])

    def is_resident(self, version_id: str) -> bool:
        return version_id in self._residents

    def num_pins(self, version_id: str) -> int:
        resident = self._residents.get(version_id)
        return 0 if resident is None else resident.num_pins

    def missing_pages(self, version: AdapterVersion) -> int:
        """Pages that `acquire` would have to allocate."""
        return 0 if version.version_id in self._residents else version.num_pages

    def unused_bytes(self, version: AdapterVersion) -> int:
        """Bytes sent to the device, or to be sent, of which the next `acquire` is the first use."""
        resident = self._residents.get(version.version_id)
        return version.packed.num_bytes if resident is None or resident.is_prefetched else 0

    def fits(self, version: AdapterVersion | None, num_other_pages: int) -> bool:
        """Whether the version can be acquired, and `num_other_pages` allocated beside it, now."""
        resident = None if version is None else self._residents.get(version.version_id)
        is_missing = version is not None and resident is None
        if is_missing and not self.has_slot:
            return False
        num_pages = version.num_pages if version is not None and is_missing else 0
        if self._num_reserved is not None:
            has_room = num_pages <= self._num_free_for_versions + self.num_idle_pages
            return has_room and num_other_pages <= self._num_free_for_others
        obtainable = self._pool.num_free + self.num_idle_pages
        if resident is None:
            return num_pages + num_other_pages <= obtainable
        own_idle = len(resident.pages) if resident.num_pins == 0 else 0
        return num_other_pages <= obtainable - own_idle

    def acquire(self, version: AdapterVersion) -> tuple[int, AdapterInstall | None]:
        """Pin a version for one sequence: its slot, and the install if it was not resident.

        Only after `fits`. Evicts idle versions for the slot and the pages.
        """
        resident = self._residents.get(version.version_id)
        install = None
        if resident is None:
            self._policy.record_use(version, self._clock())
            self.counts.misses += 1
            resident = self._place(version, ADAPTER)
            install = _install(resident)
        else:
            if resident.is_prefetched:
                self.counts.prefetched_used += 1
            else:
                self._policy.record_use(version, self._clock())
                self.counts.hits += 1
            self._idle.discard(version.version_id)
        resident.num_pins += 1
        resident.is_prefetched = False
        return resident.slot, install

    def release(self, version_id: str) -> None:
        """Drop one pin. Without pins the version is idle: it stays, if the policy keeps such."""
        resident = self._residents[version_id]
        if resident.num_pins < 1:
            raise InternalError(f"adapter version {version_id}: released more often than acquired")
        resident.num_pins -= 1
        if resident.num_pins == 0:
            self._become_idle(resident)
            if not self._policy.keeps_idle:
                self._evict_unused()

    def _evict_unused(self) -> None:
        """S-LoRA's rule: only what was sent ahead outlives the last sequence that uses it, and
        nothing the last one of all. (What was loaded as `pinned` stays here, too.)
        """
        is_in_use = len(self._idle) < len(self._residents)
        for version_id in list(self._idle):
            resident = self._residents[version_id]
            is_awaited = is_in_use and resident.is_prefetched and version_id in self._wanted
            if not is_awaited and not resident.version.num_pinned:
                self._evict(version_id, POLICY)

    def prefetch(
        self, version: AdapterVersion, num_other_pages: int, keep: Collection[str]
    ) -> AdapterInstall | None:
        """Place a version that will soon be acquired, without a pin: the install.

        None, and nothing changes, if it is resident, or if it and `num_other_pages` beside it do
        not fit without evicting a version that `keep` names.
        """
        if version.version_id in self._residents:
            return None
        obtainable = self._num_free_for_versions + self._idle.num_pages_beside(keep)
        num_other_pages = num_other_pages if self._num_reserved is None else 0
        if version.num_pages + num_other_pages > obtainable:
            return None
        missing = version.num_pages - self._num_free_for_versions
        if missing > 0 or not self._free_slots:
            going = self._idle.going(missing, keep)
            if going is None:
                return None
            for version_id in going:
                self._evict(version_id, PREFETCH)
        self._policy.record_use(version, self._clock())
        resident = self._place(version, PREFETCH)
        resident.is_prefetched = True
        self.counts.prefetched += 1
        self._become_idle(resident)
        return _install(resident)

    def evict_for(self, num_pages: int) -> bool:
        """Evict idle versions until `num_pages` pages are free for tokens; if in vain, none, and
        False.
        """
        if self._num_reserved is not None:
            return num_pages <= self._num_free_for_others
        return self._evict_until_free(num_pages, TOKENS)

    @property
    def num_obtainable_pages(self) -> int:
        """Pages that tokens could have now, were all idle versions evicted for them."""
        idle = self.num_idle_pages if self._num_reserved is None else 0
        return self._num_free_for_others + idle

    @property
    def _num_free_for_versions(self) -> int:
        if self._num_reserved is None:
            return self._pool.num_free
        return self._num_reserved - self.num_pages

    @property
    def _num_free_for_others(self) -> int:
        if self._num_reserved is None:
            return self._pool.num_free
        return self._pool.num_free - self._num_free_for_versions

    def _evict_until_free(self, num_pages: int, cause: str) -> bool:
        if self._num_free_for_versions + self.num_idle_pages < num_pages:
            return False
        while self._num_free_for_versions < num_pages:
            self._evict(self._idle.least(), cause)
        return True

    def revalue(self, version: AdapterVersion) -> None:
        """Value an idle version anew after its `num_pinned` changed."""
        self._value_anew(version.version_id)

    def drop(self, version: AdapterVersion) -> None:
        """Free a version that no sequence uses, if it is resident."""
        resident = self._residents.get(version.version_id)
        if resident is not None:
            if resident.num_pins:
                raise InternalError(f"adapter version {version.version_id}: dropped while in use")
            self._remove(resident)

    def _place(self, version: AdapterVersion, cause: str) -> _Resident:
        if not self._free_slots:
            self._evict(self._idle.least(), cause)
        if not self._evict_until_free(version.num_pages, cause):
            raise InternalError(f"adapter version {version.version_id}: acquired without room")
        pages = self._pool.allocate(version.num_pages, version.tag)
        assert pages is not None
        resident = _Resident(version, self._free_slots.pop(), pages)
        self._residents[version.version_id] = resident
        self._slot_bytes[resident.slot] = version.packed.num_bytes
        self.num_pages += len(pages)
        self.num_installs += 1
        self.counts.loaded_bytes += version.packed.num_bytes
        self.counts.reloaded_bytes += version.packed.num_bytes if version.num_loads else 0
        version.num_loads += 1
        return resident

    def _evict(self, version_id: str, cause: str) -> None:
        self._remove(self._residents[version_id])
        self.counts.evictions[cause] += 1

    def _become_idle(self, resident: _Resident) -> None:
        """Or be valued anew. Pinned versions go last, not never: the oldest sequence must always be
        able to run. Before them go what was sent ahead and is still awaited, and what the queue
        wants.
        """
        version = resident.version
        is_wanted = version.version_id in self._wanted
        value: KeepValue = (
            float(version.num_pinned > 0),
            float(is_wanted and resident.is_prefetched),
            float(is_wanted and self._policy.heeds_queue),
            *self._policy.keep_value(version),
        )
        self._idle.add(version.version_id, value, len(resident.pages))

    def _remove(self, resident: _Resident) -> None:
        self._idle.discard(resident.version.version_id)
        del self._residents[resident.version.version_id]
        self._pool.free(resident.pages, resident.version.tag)
        self.num_pages -= len(resident.pages)
        self._free_slots.append(resident.slot)
        self._slot_bytes[resident.slot] = 0
        self.counts.prefetched_wasted += resident.is_prefetched

    def check_integrity(self) -> None:
        """Raise InternalError unless slots, pages and pins add up."""
        residents = self._residents.values()
        slots = self._free_slots + [resident.slot for resident in residents]
        if sorted(slots) != list(range(1, self._num_slots + 1)):
            raise InternalError(f"adapter slots: {sorted(slots)} are not 1 to {self._num_slots}")
        for resident in residents:
            tags = {self._pool.owner_of(page) for page in resident.pages}
            if not tags <= {resident.version.tag}:
                raise InternalError(f"slot {resident.slot}: its pages are owned by {tags}")
        if {r.version.version_id for r in residents if r.num_pins == 0} != set(self._idle):
            raise InternalError("the idle versions are not those without pins")
        if self.num_pages != sum(len(r.pages) for r in residents):
            raise InternalError(f"{self.num_pages} adapter pages counted, others held")
        if self._num_free_for_versions < 0 or self._num_free_for_others < 0:
            raise InternalError(
                f"{self.num_pages} adapter pages, {self._num_reserved} are reserved"
            )
        idle_pages = sum(len(self._residents[v].pages) for v in self._idle)
        if self.num_idle_pages != idle_pages:
            raise InternalError(f"{self.num_idle_pages} idle pages counted, {idle_pages} held")
