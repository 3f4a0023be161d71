"""The order of a ranking, read ahead without changing it."""

from __future__ import annotations

import dataclasses
import heapq
import itertools

from sloraj.policies.ranking import Account, Item, Ranking
from sloraj.request import Sequence


@dataclasses.dataclass(slots=True, eq=False)
class _Position:
    account: Account
    items: list[Item]
    place: int = 0


class Walk:
    """Takes sequences off a ranking in order, in thought only.

    `counters` holds what accounts would have been charged to, `taken` the sequences that would be
    gone; the caller fills both, and may share them between two walks.
    """

    def __init__(
        self, ranking: Ranking, counters: dict[Account, float], taken: set[Sequence]
    ) -> None:
        self._ranking = ranking
        self._counters = counters
        self._taken = taken
        self._positions: dict[Account, _Position] = {}
        self._frontier: list[tuple[float, int, int, _Position]] = []
        self._numbers = itertools.count()
        ranking.start_walk()

    def add(self, account: Account, items: list[Item]) -> None:
        """More sequences of an account, as if they were in the ranking."""
        position = self._positions.get(account)
        old = self._ranking.items_of(account) if position is None else position.items
        place = 0 if position is None else position.place
        self._enter(_Position(account, sorted([*old[place:], *items])))

    def peek(self) -> Item | None:
        """The first that is not taken."""
        while True:
            self._approach()
            if not self._frontier:
                return None
            counter, tag, number, position = self._frontier[0]
            if self._positions[position.account] is not position or not self._advance(position):
                heapq.heappop(self._frontier)
                continue
            item = position.items[position.place]
            now = self._counters.get(position.account, position.account.counter)
            if now == counter and item[1] == tag:
                return item
            heapq.heapreplace(self._frontier, (now, item[1], number, position))

    def _approach(self) -> None:
        """Take from the ranking the lines that may be ahead of all taken so far."""
        while (entry := self._ranking.first_entry()) is not None and (
            not self._frontier or entry < self._frontier[0][:2]
        ):
            line = self._ranking.take_first()
            assert line is not None
            if line.account not in self._positions:
                self._enter(_Position(line.account, line.items))

    def _enter(self, position: _Position) -> None:
        self._positions[position.account] = position
        if self._advance(position):
            counter = self._counters.get(position.account, position.account.counter)
            entry = (counter, position.items[position.place][1], next(self._numbers), position)
            heapq.heappush(self._frontier, entry)

    def _advance(self, position: _Position) -> bool:
        """Step over what is taken; False at the end."""
        items, place = position.items, position.place
        while place < len(items) and items[place][2] in self._taken:
            place += 1
        position.place = place
        return place < len(items)
