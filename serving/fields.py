"""Reads the fields of a JSON object strictly, collecting what is wrong instead of stopping at the
first.

A boolean is not an integer, a string is not a number, null means "not given". Every problem
names the field, what came (shortened) and what is allowed; at most ten are told.
"""

from __future__ import annotations

import math
from typing import Any

from serving.errors import shown
from sloraj.errors import InvalidRequest

MAX_PROBLEMS = 10
INT64 = 2**63


class Fields:
    """One JSON object being read. `finish` raises InvalidRequest if anything was wrong."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self._problems: list[tuple[str, str]] = []
        self._num_untold = 0

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def refuse(self, name: str, allowed: str, got: Any = None) -> None:
        """Note a problem of field `name`; the value shown is the field's own unless `got` is
        given.
        """
        if len(self._problems) >= MAX_PROBLEMS:
            self._num_untold += 1
            return
        value = self.values.get(name) if got is None else got
        self._problems.append((name, f"{name}: got {shown(value)}, allowed: {allowed}"))

    def finish(self) -> None:
        if not self._problems:
            return
        message = "; ".join(problem for _, problem in self._problems)
        if self._num_untold:
            message += f"; and {self._num_untold} more"
        raise InvalidRequest(message, param=self._problems[0][0])

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
            return default
        return value

    def integer(
        self,
        name: str,
        default: int | None,
        low: int = -INT64,
        high: int = INT64 - 1,
        *,
        clamp: bool = False,
    ) -> int | None:
        """An integer of `low` to `high`; with `clamp`, anything above `high` counts as `high`."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, "an integer")
            return default
        if clamp:
            value = min(value, high)
        if not low <= value <= high:
            bounds = f"{low} and up" if high == INT64 - 1 and low > -INT64 else f"{low} to {high}"
            self.refuse(name, f"an integer of {bounds}")
            return default
        return value

    def number(
        self, name: str, default: float, low: float, high: float, *, above_low: bool = False
    ) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            self.refuse(name, "a finite number")
            return default
        if not low <= value <= high or (above_low and value == low):
            self.refuse(name, f"a number {'above' if above_low else 'of'} {low:g} to {high:g}")
            return default
        return float(value)

    def string(self, name: str, default: str | None = None) -> str | None:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(name, "a string")
            return default
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(name, "an object")
            return {}
        return value

    def string_list(self, name: str, limit: int) -> tuple[str, ...]:
        """A string or a list of at most `limit` strings, none of them empty."""
        value = self.values.get(name)
        if value is None:
            return ()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            self.refuse(name, "a string or a list of strings")
            return ()
        if len(items) > limit or not all(items):
            self.refuse(name, f"at most {limit} strings, none empty")
            return ()
        return tuple(items)

    def integer_list(self, name: str, limit: int, below: int) -> tuple[int, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > limit or not are_ids(value, below):
            self.refuse(name, f"a list of at most {limit} integers of 0 to {below - 1}")
            return ()
        return tuple(value)


def are_ids(values: list[Any], below: int) -> bool:
    """Whether all of `values` are integers (and not booleans) in [0, below)."""
    return all(type(value) is int and 0 <= value < below for value in values)
