"""What a point offers, and what is measured of it; whatever serves it, engine or baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.outcome import Outcome
from bench.points import Point
from bench.slo import stripped_throughput, summarise
from bench.trace import Request
from bench.workloads import Workload, flooded, generate

AT_ONCE_RATE = 1e4  # requests a second that the trace of a saturated point is drawn with


def point_trace(point: Point, base_rate: float | None) -> list[Request]:
    """The requests of a point. base_rate: the base's saturated requests/s, for points of a load.

    At saturation the lengths and adapters are those that any rate would draw, all at moment 0.
    Raises ValueError: a load, and no rate to take it of.
    """
    if point.load is not None and base_rate is None:
        raise ValueError(f"{point.key}: got a load, allowed: with the base's rate measured before")
    offered = point.rate
    if point.num_requests is not None:
        offered = AT_ONCE_RATE
    elif point.load is not None and base_rate is not None:
        offered = point.load * base_rate
    assert offered is not None
    duration_s = point.duration_s
    if point.num_requests is not None:
        duration_s = point.num_requests / offered + 1e-9
    workload = Workload(
        rate=offered, duration_s=duration_s, num_adapters=point.num_adapters, alpha=point.alpha,
        cv=point.cv, input_range=point.input_range, output_range=point.output_range,
        num_tenants=point.num_tenants, seed=point.seed,
    )  # fmt: skip
    trace = generate(workload) if point.flood is None else flooded(workload, point.flood)
    if point.num_requests is None:
        return trace
    return [dataclasses.replace(request, arrival_s=0.0) for request in trace]


def measures(outcomes: Sequence[Outcome], offered_rate: float | None) -> dict[str, Any]:
    """The summary of `bench.slo`, and throughput without the ends of the run.

    offered_rate: requests/s; None if all came at once.
    """
    strip = None if offered_rate is None else stripped_throughput(outcomes, offered_rate)
    finished = any(outcome.is_finished for outcome in outcomes)
    return {
        "offered_rate": offered_rate,
        "summary": summarise(outcomes) if finished else None,
        "stripped_requests_per_s": strip,
        "steady": steady(outcomes),
    }


def steady(outcomes: Sequence[Outcome], warm_share: float = 0.1) -> dict[str, float] | None:
    """Work a second while requests waited: from `warm_share` of the run to the last first token.

    A prompt counts when its first token comes. None if there was no such time.
    """
    firsts = [o.first_token_s for o in outcomes if o.first_token_s is not None]
    if len(firsts) < 2:
        return None
    end_s = max(firsts)
    begin_s = warm_share * end_s
    prompts = sum(
        o.num_prompt_tokens
        for o in outcomes
        if o.first_token_s is not None and begin_s < o.first_token_s <= end_s
    )
    tokens = sum(
        int(((moments > begin_s) & (moments <= end_s)).sum())
        for moments in (o.token_moments for o in outcomes)
    )
    seconds = end_s - begin_s
    each = float(np.mean([o.num_prompt_tokens + o.num_wanted_tokens for o in outcomes]))
    if seconds <= 0:
        return None
    return {
        "seconds": seconds,
        "tokens_per_s": (prompts + tokens) / seconds,
        "requests_per_s": (prompts + tokens) / seconds / each,
    }
