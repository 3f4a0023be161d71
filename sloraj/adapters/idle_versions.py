"""The versions that no running sequence uses, by what they are worth."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator

from sloraj.adapters.retention import KeepValue


class IdleVersions:
    """A set of version ids, each with a value and its pages. Every operation costs O(log n)."""

    def __init__(self) -> None:
        self._values: dict[str, KeepValue] = {}
        self._pages: dict[str, int] = {}
        self._heap: list[tuple[KeepValue, str]] = []  # also entries that are out of date
        self.num_pages = 0

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, version_id: object) -> bool:
        return version_id in self._values

    def add(self, version_id: str, value: KeepValue, num_pages: int) -> None:
        """One becomes idle, or is valued anew."""
        self.discard(version_id)
        self._values[version_id] = value
        self._pages[version_id] = num_pages
        self.num_pages += num_pages
        heapq.heappush(self._heap, (value, version_id))
        if len(self._heap) > 2 * len(self._values) + 64:
            self._heap = [(value, version_id) for version_id, value in self._values.items()]
            heapq.heapify(self._heap)

    def discard(self, version_id: str) -> None:
        if self._values.pop(version_id, None) is not None:
            self.num_pages -= self._pages.pop(version_id)

    def least(self) -> str:
        """The one that is worth least. Only where there is one."""
        while self._values.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def num_pages_beside(self, keep: Collection[str]) -> int:
        """Pages of all but `keep`."""
        return self.num_pages - sum([self._pages.get(version_id, 0) for version_id in keep])

    def going(self, num_pages: int, keep: Collection[str]) -> list[str] | None:
        """Those worth least that together hold `num_pages` pages, at least one and none of `keep`;
        None if there are not such.
        """
        if self.num_pages_beside(keep) < num_pages:
            return None
        going: list[str] = []
        popped: list[tuple[KeepValue, str]] = []
        while self._heap and (num_pages > 0 or not going):
            value, version_id = heapq.heappop(self._heap)
            if self._values.get(version_id) != value or (popped and popped[-1][1] == version_id):
                continue  # out of date
            popped.append((value, version_id))
            if version_id not in keep:
                going.append(version_id)
                num_pages -= self._pages[version_id]
        for entry in popped:
            heapq.heappush(self._heap, entry)
        return going if going and num_pages <= 0 else None
