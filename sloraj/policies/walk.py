"""The order of a ranking, read ahead without changing it."""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools

from sloraj.policies.ranking import Account, Entry, Item, Ranking
from sloraj.request import Sequence


@dataclasses.dataclass(slots=True, eq=False)
class _Position:
    account: Account
    items: list[Item]
    place: int = 0
    is_own: bool = False  # `items` is not the ranking's own list


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
        self._next = ranking.start_walk()  # the first line not yet taken from the ranking

    def add(self, account: Account, items: list[Item]) -> None:
        """More sequences of an account, as if they were in the ranking."""
        position = self._positions.get(account)
        if position is None:
            position = _Position(account, self._ranking.items_of(account))
            self._positions[account] = position
        if not position.is_own:
            position.items, position.place = position.items[position.place :], 0
            position.is_own = True
        for item in items:
            bisect.insort(position.items, item, lo=position.place)
        head = position.items[position.place]
        entry = (self._level(account), head[1], next(self._numbers), position)
        heapq.heappush(self._frontier, entry)

    def peek(self) -> Item | None:
        """The first that is not taken."""
        frontier, taken = self._frontier, self._taken
        while True:
            ahead = self._next
            if ahead is not None and (not frontier or _is_before(ahead, frontier[0])):
                self._next = self._ranking.next_entry()
                self._pull(ahead)
                continue
            if not frontier:
                return None
            level, tag, number, position = frontier[0]
            items, place = position.items, position.place
            while place < len(items) and items[place][2] in taken:
                place += 1
            position.place = place
            if place == len(items):
                heapq.heappop(frontier)
                continue
            item = items[place]
            now = self._level(position.account)
            if now == level and item[1] == tag:
                return item
            heapq.heapreplace(frontier, (now, item[1], number, position))

    def _pull(self, entry: Entry) -> None:
        """Take over a line; where it stands is set right when it comes to the top."""
        level, tag, _, line = entry
        if line.account not in self._positions:
            position = _Position(line.account, line.items)
            self._positions[line.account] = position
            heapq.heappush(self._frontier, (level, tag, next(self._numbers), position))

    def _level(self, account: Account) -> float:
        return account.level_of(self._counters.get(account, account.counter))


def _is_before(entry: Entry, other: tuple[float, int, int, _Position]) -> bool:
    return entry[0] < other[0] or (entry[0] == other[0] and entry[1] < other[1])
