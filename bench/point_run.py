"""Runs one point of a sweep on a started engine, and makes its record."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.ceiling import retention_ceiling
from bench.clock import MonotonicClock
from bench.columns import to_columns
from bench.measures import measures, point_trace
from bench.point_setup import generate_fields
from bench.points import Point
from bench.replay import Replay
from bench.sweep_engine import SweepEngine
from bench.trace import digest, rate


def run_point(
    engine: SweepEngine,
    point: Point,
    base_rate: float | None,
    on_ended: Callable[[int, int], None] = lambda num_ended, total: None,
) -> dict[str, Any]:
    """The record of a point, its requests included."""
    trace = point_trace(point, base_rate)
    started = time.perf_counter()
    core = engine.core(point)
    registered_s = time.perf_counter() - started
    result = Replay(
        core, trace, MonotonicClock(), vocab_size=engine.model.vocab_size, seed=point.seed,
        model=engine.model, fields=lambda index, request: generate_fields(point, index, request),
        give_up_s=point.give_up_s, on_step=lambda ended: on_ended(ended, len(trace)),
    ).run()  # fmt: skip
    core.check_integrity()
    num_pages = engine.num_pages(point)
    return {
        "key": point.key,
        "point": point.record(),
        "engine": {k: engine.info[k] for k in ("kernels", "dtype", "max_rank", "max_model_len")},
        "pool": {
            "pages": num_pages,
            "bytes": num_pages * engine.page_bytes,
            "device_pages": engine.info["num_pages"],
        },
        "trace_digest": digest(trace),
        "base_rate": base_rate,
        "registered_s": registered_s,
        **measures(result.outcomes, None if point.is_saturated else rate(trace)),
        "ceiling": retention_ceiling(engine.model, result.work),
        "counters": result.counters,
        "steps": result.steps,
        "requests": to_columns(result.outcomes),
    }
