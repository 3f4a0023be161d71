"""The clock of a run: the machine's, or a simulated one that only moves when it is told to."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds from some start. An `EngineCore` that is replayed on a clock must read the same."""

    def now(self) -> float:
        """The moment, in seconds."""

    def sleep_until(self, at_s: float) -> None:
        """Let time pass until `at_s`; returns at once if that is over."""


class MonotonicClock:
    """The machine's; what `EngineCore` reads by default."""

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, at_s: float) -> None:
        time.sleep(max(0.0, at_s - time.monotonic()))


class SimulatedClock:
    """Stands still but for `sleep_until`: whoever simulates work sleeps until its end."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now(self) -> float:
        return self._now_s

    def sleep_until(self, at_s: float) -> None:
        self._now_s = max(self._now_s, at_s)
