"""The records of sweeps (`bench.sweep`) as runs: to fit a model on some and to predict others.

A record has no steps, but the moments of every request's first and last token. Where all requests
came at once, batches do not depend on time: scheduling the same requests again gives the features
of the very steps that were measured, and which of them a moment is the end of.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from bench.clock import SimulatedClock
from bench.columns import from_columns
from bench.point_setup import core_config
from bench.points import Point
from bench.records import read_records
from bench.settings import MODULES, SETTINGS
from bench.simulator.cost import Cost, device_columns
from bench.simulator.device_model import constant
from bench.simulator.engine import EngineDescription, register, simulated_core
from bench.simulator.features import StepFeatures
from bench.simulator.geometry import describe_geometry
from bench.simulator.run_file import RecordedRun
from bench.simulator.validation import replay
from bench.step_trace import StepTrace
from sloraj.config import EngineConfig

STEP_S = 0.01  # of the schedule made again; every step takes as long
SPEC_FIELDS = (
    "max_num_seqs", "max_num_batched_tokens", "max_rank", "max_adapter_slots", "max_model_len",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """Successive steps, and how long they took together."""

    columns: dict[str, float]  # of `device_columns`, added up
    seconds: float
    weight: float = 1.0  # as so many observations


def one_step(features: StepFeatures, seconds: float, weight: float) -> Interval:
    """A step that was timed by itself."""
    return Interval(_added([device_columns(features)]), seconds, weight)


def read_runs(path: Path) -> Iterator[RecordedRun]:
    """What a simulator can do of a sweep's file: not other kernels, padded ranks or merged weights.

    Raises RecordError: the file cannot be read.
    """
    head, records = read_records(path)
    for record in records:
        point = Point.of(record["point"])
        if record.get("summary") and can_simulate(point):
            yield RecordedRun(
                name=f"{path.name}: {run_name(point)}", head=head | {"steps": record["steps"]},
                engine=point_engine(point, record["pool"]["pages"]),
                adapter_ranks=adapter_ranks(point), steps=[],
                outcomes=from_columns(record["requests"]), point=point,
            )  # fmt: skip


def can_simulate(point: Point) -> bool:
    """Whether a simulated engine computes what the point's does."""
    spec = point.engine
    is_plain = spec.kernels is None and spec.merged_rank is None
    return is_plain and point.modules == MODULES and not point.pad_ranks


def adapter_ranks(point: Point) -> list[int]:
    """Of the adapters that are registered."""
    return [SETTINGS[point.setting].adapter_rank(i) for i in range(point.num_adapters)]


def run_name(point: Point) -> str:
    """For people: the line and the place of a point in its figure."""
    words = [point.system, point.setting, f"n={point.num_adapters}", point.pool]
    for name in ("load", "flood"):
        value = getattr(point, name)
        words += [f"{name}={value:g}"] if value is not None else []
    return " ".join(words)


def point_engine(point: Point, num_pages: int) -> EngineDescription:
    """The engine that the point's core sees."""
    spec = point.engine
    sizes = {name: getattr(spec, name) for name in SPEC_FIELDS}
    found = describe_geometry(spec.geometry, pool_bytes=0.0, **sizes)
    engine = EngineConfig(model=spec.geometry)
    scheduler = core_config(found.scheduler, engine, point, num_pages)
    return dataclasses.replace(found, scheduler=scheduler)


def intervals(run: RecordedRun) -> list[Interval]:
    """The steps between any two moments that the run's requests saw, all of them at once.

    Raises ValueError if the requests came one after the other, or if scheduling again gives other
    steps than were measured.
    """
    if any(outcome.arrival_s for outcome in run.outcomes):
        raise ValueError(f"{run.name}: got arrivals, allowed: a run whose requests came at once")
    clock = SimulatedClock()
    core = simulated_core(run.engine, constant(STEP_S), clock)
    register(core, run.adapter_ranks)
    trace = StepTrace(core, run.engine, clock.now)
    again = replay(core, run, clock).outcomes
    trace.close()
    steps = [step.features for step in trace.steps()]
    measured = run.head["steps"]["steps"]
    if len(steps) != measured:
        raise ValueError(
            f"{run.name}: got {len(steps)} steps again, allowed: the {measured} measured"
        )
    ends: dict[int, list[float]] = collections.defaultdict(list)
    for simulated, real in zip(again, run.outcomes, strict=True):
        for name in ("first_token_s", "last_token_s"):
            at, seen = getattr(simulated, name), getattr(real, name)
            if at is not None and seen is not None:
                ends[round(at / STEP_S)].append(seen)
    moments = [(step, float(np.median(seen))) for step, seen in sorted(ends.items())]
    return [
        Interval(_added(map(device_columns, steps[begin:end])), max(to_s - from_s, 0.0))
        for (begin, from_s), (end, to_s) in itertools.pairwise(moments)
    ]


def _added(all_columns: Iterable[Iterable[tuple[str, float]]]) -> dict[str, float]:
    total: dict[str, float] = collections.defaultdict(float)
    for columns in all_columns:
        for name, value in columns:
            total[name] += value
    return {name: value for name, value in total.items() if value}


def fit_intervals(found: Sequence[Interval]) -> tuple[Cost, dict[str, Any]]:
    """Least squares with coefficients of 0 and up, each interval by its share, and its errors."""
    names = sorted({name for interval in found for name in interval.columns})
    matrix = np.array([[one.columns.get(name, 0.0) for name in names] for one in found])
    seconds = np.array([interval.seconds for interval in found])
    counted = np.array([one.weight for one in found])
    scale, weights = matrix.max(axis=0), np.sqrt(counted / np.maximum(seconds, 1e-4))
    solved, _ = nnls(matrix / scale * weights[:, None], seconds * weights, maxiter=100 * len(names))
    coefficients = solved / scale
    predicted = matrix @ coefficients
    errors = {
        "num_observed": len(found),
        "total_s": float(seconds.sum()),
        "predicted_over_observed": float(predicted.sum() / seconds.sum()),
        "median_relative_error": float(
            np.median(np.abs(predicted / np.maximum(seconds, 1e-4) - 1))
        ),
    }
    used = zip(names, coefficients, strict=True)
    return Cost({name: float(value) for name, value in used if value > 0}), errors
