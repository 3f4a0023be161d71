"""What the points of a sweep are measured against: the base alone, saturated, on each pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.points import Point


def with_bases(points: Sequence[Point]) -> list[Point]:
    """The points, each once, with, before all others, the saturated base on each of their pools."""
    bases: dict[tuple[Any, ...], Point] = {}
    for point in points:
        bases.setdefault(base_name(point), base_of(point))
    return [*bases.values(), *{point.key: point for point in points}.values()]


def base_of(point: Point) -> Point:
    """The base model alone on the point's pool, saturated, with the same lengths."""
    return Point(
        figure="base", engine=point.engine, system="base", setting=point.setting,
        pool_gb=point.pool_gb, pool_pages=point.pool_pages, input_range=point.input_range,
        output_range=point.output_range, seed=point.seed, give_up_s=point.give_up_s,
        num_requests=point.base_requests,
    )  # fmt: skip


def base_name(point: Point) -> tuple[Any, ...]:
    """What two points have in common that are measured against one base."""
    is_base = point.figure == "base"
    num_requests = point.num_requests if is_base else point.base_requests
    return point.pool, point.input_range, point.output_range, point.seed, num_requests
