"""Adapter versions in host memory: one packed copy of each, ready to send to the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from sloraj.batch import PackedAdapter
from sloraj.errors import CapacityError, InternalError


@dataclasses.dataclass(slots=True, eq=False)
class AdapterVersion:
    """One content-hashed adapter. Lives from its first load until no name and no lease holds it."""

    packed: PackedAdapter
    tag: int  # owner tag of its pages; a version dropped and loaded again gets a new one
    num_holds: int = 0  # registrations, current or draining
    num_leases: int = 0  # requests
    num_pinned: int = 0  # registrations that asked for `pinned`
    num_loads: int = 0  # times that its pages were sent to the device
    use_weight: float = 0.0  # uses, each decayed to `use_moment`
    use_moment: float = 0.0  # of the last use, on the clock of the retention policy
    last_used_s: float = 0.0

    @property
    def version_id(self) -> str:
        return self.packed.version_id

    @property
    def num_pages(self) -> int:
        return self.packed.num_pages


class HostStore:
    """Versions by id, within `max_bytes` (None: no limit)."""

    def __init__(self, max_bytes: int | None, next_tag: Callable[[], int]) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._next_tag = next_tag
        self._versions: dict[str, AdapterVersion] = {}

    def __len__(self) -> int:
        return len(self._versions)

    def __iter__(self) -> Iterator[AdapterVersion]:
        return iter(self._versions.values())

    def get(self, version_id: str) -> AdapterVersion:
        return self._versions[version_id]

    def add(self, packed: PackedAdapter) -> AdapterVersion:
        """The version of this content: the one already here, or a new one.

        Raises CapacityError if a new one would pass the limit.
        """
        known = self._versions.get(packed.version_id)
        if known is not None:
            return known
        if self.max_bytes is not None and self.num_bytes + packed.num_bytes > self.max_bytes:
            raise CapacityError(
                f"host_adapter_bytes: the adapter takes {packed.num_bytes} bytes of host memory, "
                f"{self.num_bytes} of {self.max_bytes} are in use; unload an adapter, or raise "
                "--host-adapter-bytes"
            )
        version = AdapterVersion(packed, self._next_tag())
        self._versions[packed.version_id] = version
        self.num_bytes += packed.num_bytes
        return version

    def drop(self, version: AdapterVersion) -> None:
        del self._versions[version.version_id]
        self.num_bytes -= version.packed.num_bytes

    def check_integrity(self) -> None:
        """Raise InternalError unless the byte count and the tags add up."""
        held = sum(version.packed.num_bytes for version in self)
        if held != self.num_bytes:
            raise InternalError(f"host store: {held} bytes held, {self.num_bytes} counted")
        if len({version.tag for version in self}) != len(self):
            raise InternalError("host store: two versions share a tag")
