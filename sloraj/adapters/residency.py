"""Which adapter versions are on the device, in which slot and pages, and which of them may go.

A version is pinned by every running sequence that uses it. Without pins it is idle: it stays, at no
cost, until its slot or pages are wanted. What goes first is the `RetentionPolicy`'s to say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Protocol

from sloraj.adapters.host_store import AdapterVersion
from sloraj.batch import AdapterInstall
from sloraj.errors import InternalError
from sloraj.pages import PagePool

KeepValue = tuple[float, ...]


class RetentionPolicy(Protocol):
    """Orders idle versions. Sees uses as they happen and values a version when it becomes idle."""

    def record_use(self, version: AdapterVersion, now_s: float) -> None:
        """Note that a sequence took the version."""

    def keep_value(self, version: AdapterVersion) -> KeepValue:
        """Worth of keeping it, a page freed; the lowest goes first.

        The order of two idle versions must not change with time, so that it is computed once.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class ExpectedReloadCost:
    """Bytes to send again x rate of use / pages it frees; the least recently used on a tie.

    The use rate decays by e every `decay_s` seconds. Two rates that decay alike keep their order,
    so the logarithm of the rate at the last use, plus that moment over `decay_s`, orders them for
    good.
    """

    decay_s: float = 300.0

    def record_use(self, version: AdapterVersion, now_s: float) -> None:
        elapsed = now_s - version.last_used_s
        version.use_weight = version.use_weight * math.exp(-elapsed / self.decay_s) + 1.0
        version.last_used_s = now_s

    def keep_value(self, version: AdapterVersion) -> KeepValue:
        bytes_per_page = version.packed.num_bytes / max(version.num_pages, 1)
        rate = math.log(max(version.use_weight, 1e-30)) + version.last_used_s / self.decay_s
        # Pinned versions go last, not never: the oldest sequence must always be able to run.
        pinned = float(version.num_pinned > 0)
        return (pinned, math.log(max(bytes_per_page, 1e-30)) + rate, version.last_used_s)


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
        self._idle: dict[str, KeepValue] = {}
        self.num_idle_pages = 0
        self.num_pages = 0  # of all residents
        self.num_installs = 0
        self.num_evictions = 0

    @property
    def num_residents(self) -> int:
        return len(self._residents)

    def is_resident(self, version_id: str) -> bool:
        return version_id in self._residents

    def num_pins(self, version_id: str) -> int:
        resident = self._residents.get(version_id)
        return 0 if resident is None else resident.num_pins

    def missing_pages(self, version: AdapterVersion) -> int:
        """Pages that `acquire` would have to allocate."""
        return 0 if version.version_id in self._residents else version.num_pages

    def fits(self, version: AdapterVersion | None, num_other_pages: int) -> bool:
        """Whether the version can be acquired, and `num_other_pages` allocated beside it, now."""
        resident = None if version is None else self._residents.get(version.version_id)
        is_missing = version is not None and resident is None
        if is_missing and not (self._free_slots or self._idle):
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
        if resident is None or not resident.is_prefetched:
            self._policy.record_use(version, self._clock())
        install = None
        if resident is None:
            resident = self._place(version)
            install = _install(resident)
        elif resident.num_pins == 0:
            self._leave_idle(resident)
        resident.num_pins += 1
        resident.is_prefetched = False
        return resident.slot, install

    def release(self, version_id: str) -> None:
        """Drop one pin. The version stays resident; without pins it is idle."""
        resident = self._residents[version_id]
        if resident.num_pins < 1:
            raise InternalError(f"adapter version {version_id}: released more often than acquired")
        resident.num_pins -= 1
        if resident.num_pins == 0:
            self._become_idle(resident)

    def prefetch(
        self, version: AdapterVersion, num_other_pages: int, keep: Collection[str]
    ) -> AdapterInstall | None:
        """Place a version that will soon be acquired, without a pin: the install.

        None, and nothing changes, if it is resident, or if it and `num_other_pages` beside it do
        not fit without evicting a version that `keep` names.
        """
        if version.version_id in self._residents:
            return None
        missing = version.num_pages - self._num_free_for_versions
        if self._num_reserved is None:
            missing += num_other_pages
        if missing > 0 or not self._free_slots:
            going = self._least_valued(missing, keep)
            if going is None:
                return None
            for version_id in going:
                self._evict(version_id)
        self._policy.record_use(version, self._clock())
        resident = self._place(version)
        resident.is_prefetched = True
        self._become_idle(resident)
        return _install(resident)

    def evict_for(self, num_pages: int) -> bool:
        """Evict idle versions until `num_pages` pages are free for tokens; if in vain, none, and
        False.
        """
        if self._num_reserved is not None:
            return num_pages <= self._num_free_for_others
        return self._evict_until_free(num_pages)

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

    def _evict_until_free(self, num_pages: int) -> bool:
        if self._num_free_for_versions + self.num_idle_pages < num_pages:
            return False
        while self._num_free_for_versions < num_pages:
            self._evict_least_valued()
        return True

    def revalue(self, version: AdapterVersion) -> None:
        """Value an idle version anew after its `num_pinned` changed."""
        if version.version_id in self._idle:
            self._idle[version.version_id] = self._policy.keep_value(version)

    def drop(self, version: AdapterVersion) -> None:
        """Free a version that no sequence uses, if it is resident."""
        resident = self._residents.get(version.version_id)
        if resident is not None:
            if resident.num_pins:
                raise InternalError(f"adapter version {version.version_id}: dropped while in use")
            self._remove(resident)

    def _place(self, version: AdapterVersion) -> _Resident:
        if not self._free_slots:
            self._evict_least_valued()
        if not self._evict_until_free(version.num_pages):
            raise InternalError(f"adapter version {version.version_id}: acquired without room")
        pages = self._pool.allocate(version.num_pages, version.tag)
        assert pages is not None
        resident = _Resident(version, self._free_slots.pop(), pages)
        self._residents[version.version_id] = resident
        self.num_pages += len(pages)
        self.num_installs += 1
        return resident

    def _least_valued(self, num_pages: int, keep: Collection[str]) -> list[str] | None:
        """Idle versions, at least one, that hold `num_pages` pages; None if there are not such."""
        going: list[str] = []
        for version_id in sorted(self._idle, key=self._idle.__getitem__):
            if version_id not in keep:
                going.append(version_id)
                num_pages -= len(self._residents[version_id].pages)
                if num_pages <= 0:
                    return going
        return None

    def _evict_least_valued(self) -> None:
        self._evict(min(self._idle, key=self._idle.__getitem__))

    def _evict(self, version_id: str) -> None:
        self._remove(self._residents[version_id])
        self.num_evictions += 1

    def _become_idle(self, resident: _Resident) -> None:
        version = resident.version
        self._idle[version.version_id] = self._policy.keep_value(version)
        self.num_idle_pages += len(resident.pages)

    def _leave_idle(self, resident: _Resident) -> None:
        del self._idle[resident.version.version_id]
        self.num_idle_pages -= len(resident.pages)

    def _remove(self, resident: _Resident) -> None:
        self._leave_idle(resident)
        del self._residents[resident.version.version_id]
        self._pool.free(resident.pages, resident.version.tag)
        self.num_pages -= len(resident.pages)
        self._free_slots.append(resident.slot)

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
