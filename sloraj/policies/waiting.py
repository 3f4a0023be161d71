"""The sequences that wait, whatever the order.

Those that were preempted come first, in the order of their admission; then the new ones, in the
order that an `Order` gives them. So running and preempted sequences together are always in the
order of admission, and the scheduler's promise of progress does not depend on the order of the new
ones: the one admitted longest ago keeps what it has, and finishes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sloraj.errors import InternalError
from sloraj.policies.cost import BaseBytes, ServiceCost
from sloraj.policies.order import FirstComeFirstServed, Order
from sloraj.policies.ranked import LoadedBytes, RankedOrder
from sloraj.policies.settings import QueueConfig
from sloraj.request import Sequence


class WaitingQueue:
    """Owned by the scheduler, which tells it all that happens to a sequence."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._preempted: deque[Sequence] = deque()  # the one admitted longest ago first
        self._num_admitted = 0  # sequences, each counted once

    def __len__(self) -> int:
        return len(self._preempted) + len(self._order)

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no particular order."""
        return itertools.chain(self._preempted, self._order)

    def add(self, sequence: Sequence) -> None:
        """A new one has come."""
        self._order.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """One is dropped while it waits."""
        if sequence.admission:
            self._preempted.remove(sequence)
            self._order.finish(sequence, was_running=False)
        else:
            self._order.remove(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """The running sequence that was admitted last gives way: nobody's turn is before its."""
        self._preempted.appendleft(sequence)
        self._order.pause(sequence)

    def start_pass(self) -> None:
        """The scheduler begins to admit for one step."""
        self._order.start_pass()

    def first(self, *, is_tight: bool = False) -> Sequence | None:
        """Who is to be admitted next; None if none waits, or none that may have what is left where
        that is tight.
        """
        return self._preempted[0] if self._preempted else self._order.first(is_tight=is_tight)

    def pass_over(self) -> bool:
        """What `first` said cannot run yet: whether it now says another in this pass."""
        return not self._preempted and self._order.pass_over()

    def in_order(self, limit: int, *, is_tight: bool = False) -> Iterator[Sequence]:
        """At most `limit` sequences as they would be admitted, were there room for all; where what
        is left is tight, those last that may not have it.

        Lazily; the queue must not be changed meanwhile.
        """
        new = self._order.in_order(self._preempted, is_tight=is_tight)
        return itertools.islice(itertools.chain(self._preempted, new), limit)

    def admit(self, sequence: Sequence, loaded_bytes: int) -> None:
        """`first` runs now; `loaded_bytes` of its adapter are sent to the device for it."""
        if sequence.admission:  # what it was charged for was lost through no doing of its own
            head = self._preempted.popleft()
            assert head is sequence
            self._order.resume(sequence)
        else:
            self._num_admitted += 1
            sequence.admission = self._num_admitted
            self._order.admit(sequence, loaded_bytes)

    def sampled(self, sequences: Iterable[Sequence]) -> None:
        """A step that samples a token of each of these running sequences is enqueued."""
        self._order.sampled(sequences)

    def finish(self, sequence: Sequence) -> None:
        """A running sequence has ended, however that came about."""
        self._order.finish(sequence, was_running=True)

    def num_waiting_of(self, tenant: str) -> int:
        """How many new sequences of a tenant wait, if tenants have accounts; else 0."""
        return self._order.num_waiting_of(tenant)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return {"admissions": self._num_admitted, **self._order.stats()}

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raise InternalError unless running and preempted sequences are in the order of their
        admission, and the others were never admitted.
        """
        admissions = [s.admission for s in (*running, *self._preempted)]
        if admissions != sorted(set(admissions)) or 0 in admissions:
            raise InternalError(f"admissions {admissions} of running and preempted do not grow")
        if any(s.admission for s in self._order):
            raise InternalError("a sequence that was admitted waits as a new one")
        if any(s.pages or s.row is not None for s in self):
            raise InternalError("a waiting sequence owns pages or a row")
        self._order.check_integrity()


def make_queue(
    settings: QueueConfig,
    base: BaseBytes,
    clock: Callable[[], float],
    loaded_bytes: LoadedBytes,
) -> WaitingQueue:
    """The queue that the settings ask for. `loaded_bytes` says what a sequence would bring to the
    device, if it were admitted now.
    """
    if settings.queue_order == "fcfs" and settings.cluster_adapters is None:
        return WaitingQueue(FirstComeFirstServed())
    return WaitingQueue(RankedOrder(settings, ServiceCost(settings, base), clock, loaded_bytes))
