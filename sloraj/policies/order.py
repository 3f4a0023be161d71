"""What an order of new sequences is, and the plain one: first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from sloraj.request import Sequence


class Order(Protocol):
    """Sequences that wait for their first admission. Owned, and told of everything, by
    `WaitingQueue`.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no particular order."""

    def add(self, sequence: Sequence) -> None:
        """A new one has come."""

    def remove(self, sequence: Sequence) -> None:
        """One goes without having been admitted."""

    def start_pass(self) -> None:
        """The scheduler begins to admit for one step."""

    def first(self, *, is_tight: bool = False) -> Sequence | None:
        """Who is to be admitted next; None if none waits, or none that may have what is left where
        that is tight.
        """

    def pass_over(self) -> bool:
        """What `first` said does not fit: whether it now says another in this pass."""

    def in_order(
        self, resumed: Iterable[Sequence], *, is_tight: bool = False
    ) -> Iterator[Sequence]:
        """All of them as they would be admitted after the paused ones `resumed`, were there room
        for all; lazily, changing nothing. Nothing else may be called meanwhile. Where what is left
        is tight, who may not have it comes last.
        """

    def admit(self, sequence: Sequence, loaded_bytes: int) -> None:
        """`first` was admitted, and `loaded_bytes` of its adapter are sent to the device for it."""

    def sampled(self, sequences: Iterable[Sequence]) -> None:
        """A step that samples a token of each of these running sequences is enqueued."""

    def pause(self, sequence: Sequence) -> None:
        """A running sequence was preempted."""

    def resume(self, sequence: Sequence) -> None:
        """It runs again."""

    def finish(self, sequence: Sequence, *, was_running: bool) -> None:
        """A sequence that was admitted has ended, however that came about, running or paused."""

    def num_waiting_of(self, tenant: str) -> int:
        """How many of a tenant's sequences are in here, if tenants have accounts; else 0."""

    def stats(self) -> dict[str, Any]:
        """Counters and gauges by name: at most a few dozen, whatever the traffic."""

    def check_integrity(self) -> None:
        """Raise InternalError unless what is kept adds up."""


class FirstComeFirstServed:
    """Implements `Order`."""

    def __init__(self) -> None:
        self._sequences: deque[Sequence] = deque()  # oldest first

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        self._sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)

    def start_pass(self) -> None:
        """All passes are alike."""

    def first(self, *, is_tight: bool = False) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    def pass_over(self) -> bool:
        return False

    def in_order(
        self, resumed: Iterable[Sequence], *, is_tight: bool = False
    ) -> Iterator[Sequence]:
        return iter(self._sequences)

    def admit(self, sequence: Sequence, loaded_bytes: int) -> None:
        head = self._sequences.popleft()
        assert head is sequence

    def sampled(self, sequences: Iterable[Sequence]) -> None:
        """Nothing is charged."""

    def pause(self, sequence: Sequence) -> None:
        """Nothing is remembered."""

    def resume(self, sequence: Sequence) -> None:
        """Nothing is remembered."""

    def finish(self, sequence: Sequence, *, was_running: bool) -> None:
        """Nothing is remembered."""

    def num_waiting_of(self, tenant: str) -> int:
        return 0

    def stats(self) -> dict[str, Any]:
        return {}

    def check_integrity(self) -> None:
        """A deque has nothing to disagree with."""
