"""A replica's adapters in host memory: bounded, fetched when missing, the oldest use goes first.

The engine registers every adapter it is to serve; a host that could hold a million does not exist.
So an adapter that a replica's host lacks is fetched when a request names it, registered with the
engine, and unregistered when others need its bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostTier:
    """What a host has and how it gets what it lacks. One link, first come, first served."""

    capacity_bytes: float = 256e9
    fetch_latency_s: float = 0.05  # to the first byte, beside other fetches
    fetch_bytes_per_s: float = 3e9  # of a 25 Gbit/s network, or a local disk
    load_s: float = 0.04  # reading, checking, packing: one core of the host, beside other loads

    @classmethod
    def unlimited(cls) -> HostTier:
        """Every adapter is there at once."""
        return cls(
            capacity_bytes=float("inf"), fetch_latency_s=0.0, fetch_bytes_per_s=float("inf"),
            load_s=0.0,
        )  # fmt: skip


class HostCache:
    """Which adapters lie in the host's memory, and their bytes; the one used last comes last."""

    def __init__(self, capacity_bytes: float) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self._bytes: dict[int, int] = {}

    def __contains__(self, adapter: int) -> bool:
        return adapter in self._bytes

    def __len__(self) -> int:
        return len(self._bytes)

    def use(self, adapter: int, num_bytes: int) -> bool:
        """Note a use; whether it was there. If not, it is now, and the cache may be over-full."""
        was_there = self._bytes.pop(adapter, None) is not None
        self._bytes[adapter] = num_bytes
        if not was_there:
            self.num_bytes += num_bytes
        return was_there

    def make_room(self, is_held: Callable[[int], bool] = lambda adapter: False) -> list[int]:
        """Drop the least recently used ones that nobody holds until all fits; which ones went."""
        gone: list[int] = []
        if self.num_bytes <= self.capacity_bytes:
            return gone
        for adapter in list(self._bytes):
            if not is_held(adapter):
                self.num_bytes -= self._bytes.pop(adapter)
                gone.append(adapter)
                if self.num_bytes <= self.capacity_bytes:
                    break
        return gone


def fill(cache: HostCache, adapters: Iterable[tuple[int, int]]) -> None:
    """Put (adapter, bytes) in, as far as they fit; the last one counts as used last."""
    for adapter, num_bytes in adapters:
        cache.use(adapter, num_bytes)
        cache.make_room()
