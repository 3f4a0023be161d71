"""The records of the sweeps as a report wants them: by figure, each with its base beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench.points import Point
from bench.shards import SHARDS
from bench.sweep_bases import base_name

SYSTEMS = tuple(dict.fromkeys(point.system for points in SHARDS.values() for point in points))


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured point."""

    record: dict[str, Any]
    base: dict[str, Any] | None  # of the same file and pool, saturated

    @property
    def point(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["point"]
        return found

    def __getattr__(self, name: str) -> Any:
        """Fields of the point: `row.setting`, `row.num_adapters`."""
        try:
            return self.record["point"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def is_measured(self) -> bool:
        return self.record.get("summary") is not None

    @property
    def requests_per_s(self) -> float:
        """Finished requests, drain included."""
        return float(self.record["summary"]["requests_per_s"])

    @property
    def steady_per_s(self) -> float | None:
        found = self.record.get("steady")
        return None if found is None else float(found["requests_per_s"])

    @property
    def retention(self) -> float | None:
        """Of the base's throughput: drain in both where both had the same number of requests, else
        while both were saturated.
        """
        if self.base is None or self.base.get("summary") is None:
            return None
        mine, theirs = self.record["summary"], self.base["summary"]
        if mine["num_requests"] == theirs["num_requests"]:
            return self.requests_per_s / float(theirs["requests_per_s"])
        steady = self.base.get("steady")
        if self.steady_per_s is None or steady is None:
            return None
        return self.steady_per_s / float(steady["requests_per_s"])

    @property
    def ceiling(self) -> float | None:
        return self.record.get("ceiling")

    @property
    def first_token_s(self) -> dict[str, float]:
        found: dict[str, float] = self.record["summary"]["first_token_s"] or {}
        return found

    def slo(self, seconds: str, measure: str = "attainment") -> float:
        """seconds: "6s" or "1s"."""
        return float(self.record["summary"]["slo"][seconds][measure])


def rows_of(records: Iterable[dict[str, Any]]) -> list[Row]:
    """All points but the bases, each with the base that its file measured on its pool."""
    records = list(records)
    bases = {
        _base_key(record): record
        for record in records
        if record["point"]["figure"] == "base" and record.get("summary") is not None
    }
    return [
        Row(record, bases.get(_base_key(record)))
        for record in records
        if record["point"]["figure"] != "base"
    ]


def _base_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record.get("file"), *base_name(Point.of(record["point"]))


def pick(rows: Sequence[Row], figure: str, **wanted: Any) -> list[Row]:
    """The measured rows of a figure whose points have these values; by number of adapters, and in
    the order in which the grid names the systems.
    """
    found = [
        row
        for row in rows
        if row.is_measured
        and row.figure == figure
        and all(row.point[name] == value for name, value in wanted.items())
    ]
    return sorted(
        found,
        key=lambda row: (row.setting, row.num_adapters, row.pool_gb or math.inf, place_of(row)),
    )


def place_of(row: Row) -> int:
    """Of the row's system among those of the grid, in the order in which it names them."""
    return [*SYSTEMS, row.system].index(row.system)


def missing(records: Iterable[dict[str, Any]], figure: str) -> list[str]:
    """Keys of the grid's points of a figure that no record has, and of those that failed."""
    done = {record["key"]: record for record in records}
    found = []
    for points in SHARDS.values():
        for point in points:
            if point.figure == figure:
                record = done.get(point.key)
                if record is None:
                    found.append(point.key)
                elif record.get("summary") is None:
                    found.append(f"{point.key}: {record.get('error', 'nothing finished')}")
    return found
