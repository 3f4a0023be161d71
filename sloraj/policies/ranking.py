"""Sequences in the order of their accounts' levels, which may rise at any moment.

Every account has a line, sorted by score and then by arrival. The lines stand in a heap under
(level, arrival of the head); an account that is charged does not move: its entry is then too low,
and is set right when it comes to the top. So a charge costs nothing here, and every other operation
O(log n), amortised over the charges.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math

from sloraj.errors import InternalError
from sloraj.request import Sequence

Item = tuple[float, int, Sequence]  # score, tag (tags grow with arrival), the sequence
Entry = tuple[float, int, int, "Line"]  # level, tag of the head, a number without ties, line


@dataclasses.dataclass(slots=True, eq=False)
class Account:
    """What a tenant has been served, over its weight: `counter` only rises.

    Accounts are ranked by the level of their counters: those that differ by less than `tolerance`
    may stand on one, where whoever came first is first.
    """

    tenant: str
    weight: float = 1.0
    tolerance: float = 0.0
    counter: float = 0.0
    num_waiting: int = 0  # for the first admission
    num_admitted: int = 0  # and not finished

    @property
    def level(self) -> float:
        return self.level_of(self.counter)

    def level_of(self, counter: float) -> float:
        """The least counter that counts as this one."""
        if not self.tolerance:
            return counter
        return math.floor(counter / self.tolerance) * self.tolerance


@dataclasses.dataclass(slots=True, eq=False)
class Line:
    """One account's sequences, and its valid entry in the heap; all others are void."""

    account: Account
    items: list[Item] = dataclasses.field(default_factory=list)
    entry: Entry | None = None


class Ranking:
    """Sequences of many accounts. The caller keeps account and score of each."""

    def __init__(self) -> None:
        self._lines: dict[Account, Line] = {}
        self._entries: list[Entry] = []
        self._walked: list[Entry] = []  # taken off the heap by the last walk
        self._numbers = itertools.count()

    def __contains__(self, account: Account) -> bool:
        return account in self._lines

    @property
    def accounts(self) -> list[Account]:
        return list(self._lines)

    def items_of(self, account: Account) -> list[Item]:
        """The account's sequences in order. Not to be changed."""
        line = self._lines.get(account)
        return [] if line is None else line.items

    def add(self, account: Account, score: float, sequence: Sequence) -> None:
        self._restore()
        line = self._lines.get(account)
        if line is None:
            line = self._lines[account] = Line(account)
        bisect.insort(line.items, (score, sequence.tag, sequence))
        self._rank(line)

    def remove(self, account: Account, score: float, sequence: Sequence) -> None:
        self._restore()
        line = self._lines[account]
        place = bisect.bisect_left(line.items, (score, sequence.tag))
        if place == len(line.items) or line.items[place][2] is not sequence:
            raise InternalError(f"sequence {sequence.tag} is not in its account's line")
        del line.items[place]
        if line.items:
            self._rank(line)
        else:
            del self._lines[account]
            line.entry = None

    def first(self) -> Item | None:
        self._restore()
        line = self._top()
        return None if line is None else line.items[0]

    def first_account(self) -> Account | None:
        self._restore()
        line = self._top()
        return None if line is None else line.account

    def start_walk(self) -> Entry | None:
        """A walk begins: the entry of the first line."""
        self._restore()
        return None if self._top() is None else self._entries[0]

    def next_entry(self) -> Entry | None:
        """The walk goes on: the entry of the line after the one it had."""
        self._walked.append(heapq.heappop(self._entries))
        return None if self._top() is None else self._entries[0]

    def _rank(self, line: Line) -> None:
        """Enter a line, or enter it anew if it moves up: what moves down is found out in time."""
        level, tag = line.account.level, line.items[0][1]
        old = line.entry
        if old is None or level < old[0] or (level == old[0] and tag < old[1]):
            line.entry = (level, tag, next(self._numbers), line)
            heapq.heappush(self._entries, line.entry)
            if len(self._entries) > 64 + 2 * len(self._lines):
                self._entries = [line.entry for line in self._lines.values() if line.entry]
                heapq.heapify(self._entries)

    def _top(self) -> Line | None:
        """The first line, its entry set right."""
        entries = self._entries
        while entries:
            entry = entries[0]
            line = entry[3]
            if entry is not line.entry:
                heapq.heappop(entries)
                continue
            level, tag = line.account.level, line.items[0][1]
            if level == entry[0] and tag == entry[1]:
                return line
            line.entry = (level, tag, entry[2], line)
            heapq.heapreplace(entries, line.entry)
        return None

    def _restore(self) -> None:
        if self._walked:
            for entry in self._walked:
                heapq.heappush(self._entries, entry)
            self._walked.clear()

    def check_integrity(self) -> None:
        """Raise InternalError unless every line is sorted and stands where it should, or above."""
        self._restore()
        entries = {id(entry) for entry in self._entries}
        for account, line in self._lines.items():
            keys = [(score, tag) for score, tag, _ in line.items]
            if not keys or keys != sorted(set(keys)):
                raise InternalError(f"tenant {account.tenant!r}: its line is empty or not sorted")
            if line.entry is None or id(line.entry) not in entries:
                raise InternalError(f"tenant {account.tenant!r}: its line is not in the heap")
            if line.entry[:2] > (account.level, keys[0][1]):
                raise InternalError(f"tenant {account.tenant!r}: its line stands too low")
