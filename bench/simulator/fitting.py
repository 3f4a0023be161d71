"""Fits a `DeviceModel` to recorded runs: least squares with coefficients that are never negative.

Three parts are fitted apart, each to the moments that show it:

- execute: what `Runner.execute` took. If the device was busy all the while, that is a bound: the
  host may have waited in it for room in the device's queue.
- between: from the return of a `collect` to the next `execute`, while the engine had work.
- device: from the end of one step to the end of the next. Where `collect` had to wait, its return
  is the end. Where it had not, the step ended at some earlier moment: again a bound. A step that
  found the device idle began before `execute` returned; by how much is fitted from these steps
  (`head_start_s`), once the others have shown what steps take. A step that installs what was not
  sent ahead may have waited for it: a bound too.

A bound counts only while the fit is above it.

Every observation weighs as 1 / the median duration of its bucket, so that large and small steps
count by their share, and noise does not choose its own weight. Durations of more than 20 times that
median are left out and counted (a machine that stalls is no property of a step).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from bench.simulator.cost import Cost, device_columns, execute_columns, host_columns
from bench.simulator.device_model import DeviceModel
from bench.simulator.features import StepFeatures
from bench.simulator.run_file import RecordedRun, TracedStep

WAITED_S = 100e-6  # a collect that returns faster than this found its step ended
STALL = 20.0  # times the median of the bucket
BOUND_ROUNDS = 8
FEWEST = 50  # steps in a row that show the device by themselves
BUS_BYTES_PER_S, BUS_LATENCY_S = 53e9, 20e-6  # beside decoding (docs/performance.md)
Columns = Callable[[StepFeatures], Iterable[tuple[str, float]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """A duration, or what it is at most."""

    features: StepFeatures
    seconds: float
    is_bound: bool = False
    is_from_idle: bool = False  # counted from the return of `execute`, not from the step before


def fit(runs: Sequence[RecordedRun]) -> DeviceModel:
    """Raises ValueError if the runs are of different engines' geometries, or show no step."""
    geometries = {run.engine.geometry for run in runs}
    if len(geometries) != 1:
        raise ValueError(f"runs: of {sorted(geometries)}, allowed: runs of one geometry")
    found = [observed for run in runs for observed in observe(run.steps)]

    def of(name: str) -> list[Observation]:
        return [observed[name] for observed in found if name in observed]

    execute, execute_errors = fit_cost(of("execute"), execute_columns)
    between, between_errors = fit_cost(of("between"), host_columns)
    device, head_start_s, device_errors = fit_device(of("device"), execute)
    heads = [run.head for run in runs]
    return DeviceModel(
        device=device, execute=execute, between=between, head_start_s=head_start_s,
        bus_bytes_per_s=BUS_BYTES_PER_S, bus_latency_s=BUS_LATENCY_S,
        origin={
            "geometry": geometries.pop(),
            "device": " and ".join(sorted({head["device"] for head in heads})),
            "commit": " and ".join(sorted({head["commit"] for head in heads})),
            "runs": [run.name for run in runs],
            "errors": {
                "device": device_errors, "execute": execute_errors, "between": between_errors,
            },
        },
    )  # fmt: skip


def fit_device(
    observed: Sequence[Observation], execute: Cost
) -> tuple[Cost, float, dict[str, Any]]:
    """The device's cost, and the head start of steps that found it idle, seconds."""
    busy = [o for o in observed if not o.is_from_idle]
    idle = [o for o in observed if o.is_from_idle and not o.is_bound]
    head_start_s = 0.0
    if len(busy) >= FEWEST and idle:
        cost, _ = fit_cost(busy, device_columns)
        seen = {o.features.bucket for o in busy if not o.is_bound}
        early = [
            min(cost.seconds(o.features) - o.seconds, execute.seconds(o.features))
            for o in idle
            if o.features.bucket in seen
        ]
        head_start_s = max(float(np.median(early)), 0.0) if early else 0.0
    moved = [dataclasses.replace(o, seconds=o.seconds + head_start_s) for o in idle]
    cost, errors = fit_cost([*busy, *moved], device_columns)
    return cost, head_start_s, errors


def observe(steps: Sequence[TracedStep]) -> Iterator[dict[str, Observation]]:
    """What each step shows of "execute", "between" and "device"."""
    before: TracedStep | None = None  # the step before this one
    for step in steps:
        features = step.features
        is_chained = before is not None and step.is_ahead and _has_waited(before)
        found = {"execute": Observation(features, step.enqueued_s - step.started_s, is_chained)}
        begun_s = step.enqueued_s
        if before is not None and is_chained:
            begun_s = max(begun_s, before.read_s)
        end_s = step.read_s if _has_waited(step) else step.asked_s
        if end_s >= begun_s:
            is_bound = not _has_waited(step) or features.num_late > 0
            found["device"] = Observation(features, end_s - begun_s, is_bound, not is_chained)
        yield found
        before = step
    for step, between_s in between(steps):
        yield {"between": Observation(step.features, between_s)}


def _has_waited(step: TracedStep) -> bool:
    return step.read_s - step.asked_s > WAITED_S


def between(steps: Sequence[TracedStep]) -> Iterator[tuple[TracedStep, float]]:
    """Each step that was scheduled as soon as another had been read, and how long that took."""
    for earlier, _, step in zip(steps, steps[1:], steps[2:], strict=False):
        # Step N + 2 is enqueued after N has been read, if N + 1 was enqueued before it.
        if step.is_ahead and earlier.read_s <= step.started_s:
            yield step, step.started_s - earlier.read_s


def fit_cost(observed: Sequence[Observation], columns: Columns) -> tuple[Cost, dict[str, Any]]:
    """The cost, and how far it is from what it was fitted to. Raises ValueError of nothing."""
    kept, num_stalls = _without_stalls(observed)
    if not kept:
        raise ValueError("no step shows the durations to fit")
    names: dict[str, int] = {}
    rows = [
        {names.setdefault(name, len(names)): value for name, value in columns(o.features) if value}
        for o in kept
    ]
    matrix = np.zeros((len(kept), len(names)))
    for i, row in enumerate(rows):
        matrix[i, list(row)] = list(row.values())
    seconds = np.array([o.seconds for o in kept])
    is_bound = np.array([o.is_bound for o in kept])
    scale = matrix.max(axis=0)
    weights = 1 / np.sqrt(_typical(kept))
    coefficients = np.zeros(len(names))
    counts = ~is_bound if (~is_bound).any() else np.ones(len(kept), bool)
    for _ in range(BOUND_ROUNDS):
        solved, _ = nnls(
            matrix[counts] / scale * weights[counts, None], seconds[counts] * weights[counts]
        )
        coefficients = solved / scale
        too_high = is_bound & (matrix @ coefficients > seconds)
        wanted = ~is_bound | too_high
        if (wanted == counts).all() or not wanted.any():
            break
        counts = wanted
    predicted = matrix @ coefficients
    exact = ~is_bound if (~is_bound).any() else np.ones(len(kept), bool)
    errors = {
        "num_observed": int(exact.sum()),
        "num_bounds": int(is_bound.sum()),
        "num_stalls": num_stalls,
        "total_s": float(seconds[exact].sum()),
        "predicted_over_observed": float(predicted[exact].sum() / max(seconds[exact].sum(), 1e-12)),
        "median_relative_error": float(
            np.median(np.abs(predicted[exact] / np.maximum(seconds[exact], 1e-9) - 1))
        ),
    }
    used = {name: float(coefficients[i]) for name, i in names.items() if coefficients[i] > 0}
    return Cost(used), errors


def _typical(observed: Sequence[Observation]) -> np.ndarray:
    """The median duration in each observation's bucket, seconds, f64 [observed], above 0."""
    by_bucket: dict[str, list[float]] = collections.defaultdict(list)
    for o in observed:
        by_bucket[o.features.bucket].append(o.seconds)
    medians = {name: max(float(np.median(found)), 1e-7) for name, found in by_bucket.items()}
    return np.array([medians[o.features.bucket] for o in observed])


def _without_stalls(observed: Sequence[Observation]) -> tuple[list[Observation], int]:
    if not observed:
        return [], 0
    limits = STALL * _typical(observed)
    kept = [o for o, limit in zip(observed, limits, strict=True) if o.seconds <= limit]
    return kept, len(observed) - len(kept)
