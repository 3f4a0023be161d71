"""A recorded run, predicted: the same trace through the same engine on a simulated clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.clock import SimulatedClock
from bench.outcome import Outcome
from bench.point_setup import generate_fields
from bench.replay import Replay, ReplayResult
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import register, simulated_core
from bench.simulator.run_file import RecordedRun
from bench.slo import attainment, throughput
from bench.summary import target
from bench.trace import Request
from sloraj.core import EngineCore

NUMBER = "C5"  # of the targets of the reproduction of the paper
THROUGHPUT_ERROR, FIRST_TOKEN_ERROR = 0.05, 0.10
SPREAD = 0.02  # machines of one kind differ by more


def predict(run: RecordedRun, model: DeviceModel) -> ReplayResult:
    """The run's trace through a simulated engine, from an empty pool."""
    clock = SimulatedClock()
    core = simulated_core(run.engine, model, clock)
    register(core, run.adapter_ranks)
    return replay(core, run, clock)


def replay(core: EngineCore, run: RecordedRun, clock: SimulatedClock) -> ReplayResult:
    """The run's requests, whose tokens nothing depends on."""
    point = run.point

    def same(index: int, request: Request) -> list[int]:
        return [0] * request.num_prompt_tokens

    def fields(index: int, request: Request) -> dict[str, Any]:
        if point is None:
            return {"tenant": request.tenant}
        return generate_fields(point, index, request)

    return Replay(
        core, run.trace, clock, vocab_size=run.engine.scheduler.vocab_size, prompt=same,
        model=run.engine.model, fields=fields, give_up_s=None if point is None else point.give_up_s,
    ).run()  # fmt: skip


def compare(run: RecordedRun, model: DeviceModel) -> dict[str, Any]:
    """Measured and predicted measures of one run, and the relative errors that are judged."""
    measured, predicted = measures(run.outcomes), measures(predict(run, model).outcomes)

    def error(name: str) -> float:
        return float(abs(predicted[name] / measured[name] - 1))

    return {
        "run": run.name,
        "num_requests": len(run.outcomes),
        "measured": measured,
        "predicted": predicted,
        "throughput_error": error("requests_per_s"),
        "first_token_error": error("first_token_p50_s"),
    }


def compare_nearby(run: RecordedRun, model: DeviceModel) -> dict[str, Any]:
    """`compare`, and as "first_token_between" the median first token from a slightly faster to a
    slightly slower device. Near saturation that is a wide range: a queue grows with one and not
    with the other.
    """
    found = compare(run, model)
    firsts = [found["predicted"]["first_token_p50_s"]]
    for factor in (1 - SPREAD, 1 + SPREAD):
        outcomes = predict(run, model.scaled(factor)).outcomes
        firsts.append(measures(outcomes)["first_token_p50_s"])
    return found | {"first_token_between": [min(firsts), max(firsts)]}


def measures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    firsts = [o.first_token_after_s for o in outcomes if o.first_token_after_s is not None]
    gaps = [o.per_token_s for o in outcomes if o.per_token_s is not None]
    return {
        "requests_per_s": throughput(outcomes),
        "first_token_p50_s": float(np.median(firsts)),
        "first_token_p99_s": float(np.percentile(firsts, 99)),
        "per_token_p50_s": float(np.median(gaps)) if gaps else 0.0,
        "attainment_6s": attainment(outcomes, 6.0),
        "attainment_1s": attainment(outcomes, 1.0),
    }


def targets(compared: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two entries of the summary for each run."""
    return [
        target(
            NUMBER, f"simulator, {what} of {found['run']}, which it was not fitted on",
            measured=found[key], limit=limit, unit="relative error",
        )
        for found in compared
        for what, key, limit in (
            ("throughput", "throughput_error", THROUGHPUT_ERROR),
            ("median first token", "first_token_error", FIRST_TOKEN_ERROR),
        )
    ]  # fmt: skip


def table(compared: Sequence[dict[str, Any]]) -> str:
    """Of `compare_nearby`, for people to read, as Markdown."""
    lines = [
        "| run | requests/s measured | simulated | error | median first token, s | simulated | "
        f"error | {SPREAD:.0%} faster to slower |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in compared:
        m, p = found["measured"], found["predicted"]
        lowest, highest = found["first_token_between"]
        lines.append(
            f"| {found['run']} | {m['requests_per_s']:.2f} | {p['requests_per_s']:.2f} | "
            f"{found['throughput_error']:.1%} | {m['first_token_p50_s']:.4f} | "
            f"{p['first_token_p50_s']:.4f} | {found['first_token_error']:.1%} | "
            f"{lowest:.4f} to {highest:.4f} |"
        )
    return "\n".join(lines)
