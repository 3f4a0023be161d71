"""Doing again what takes time only as often as there is time for it."""

from __future__ import annotations

from collections.abc import Callable


class Sparingly:
    """Work that may take `share` of the time, whatever it costs each time.

        if sparingly.begin():
            ...
            sparingly.end()

    On a simulated clock work takes no time, so it is always due.
    """

    def __init__(self, clock: Callable[[], float], share: float) -> None:
        self._clock = clock
        self._share = share
        self._begun_s = self._due_s = 0.0

    def begin(self) -> bool:
        """Whether it is due; then it begins now."""
        self._begun_s = self._clock()
        return self._begun_s >= self._due_s

    def end(self) -> None:
        self._due_s = self._begun_s + (self._clock() - self._begun_s) / self._share
