"""A fleet of replicas behind a router, simulated window by window.

In a window, arrivals are routed one by one in order, on the loads reported at its beginning and
what was sent since; then every replica lets its own time pass up to the window's end. Replicas do
not touch each other in between, so that their order does not matter.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.outcome import Outcome
from bench.simulator.device_model import DeviceModel
from bench.simulator.engine import AdapterSizes, EngineDescription
from bench.simulator.host_tier import HostTier, fill
from bench.simulator.replica import Replica
from bench.simulator.routers import FleetView, Router
from bench.trace import Request

WINDOW_S = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
    """What all runs of one comparison have in common."""

    engine: EngineDescription
    model: DeviceModel
    tier: HostTier
    num_replicas: int
    popularity: np.ndarray  # f64 [adapters]
    ranks: np.ndarray  # int64 [adapters]
    seed: int = 42

    def sizes(self) -> AdapterSizes:
        return AdapterSizes(self.engine.model, self.engine.layout)

    def bytes_by_rank(self) -> dict[int, int]:
        made = self.sizes()
        return {int(r): made.packed("", int(r)).num_bytes for r in np.unique(self.ranks)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FleetResult:
    replicas: list[Replica]
    outcomes: list[Outcome]  # by trace; those that have not ended have the error "open"
    end_s: float
    wall_s: float


def run_fleet(
    fleet: Fleet, router: Router, trace: Sequence[Request], end_s: float,
    on_window: Callable[[float], None] = lambda now_s: None,
) -> FleetResult:  # fmt: skip
    """Route and serve the trace until `end_s`, from hosts as the router would have filled them."""
    started = time.perf_counter()
    sizes = fleet.sizes()
    ranks = fleet.ranks
    replicas = [
        Replica(
            fleet.engine, fleet.model, lambda adapter: int(ranks[adapter]), tier=fleet.tier,
            sizes=sizes,
        )
        for _ in range(fleet.num_replicas)
    ]  # fmt: skip
    _fill_hosts(fleet, router, replicas)
    view = FleetView(
        loads=np.zeros(fleet.num_replicas), hosts=[replica.host for replica in replicas],
        rng=random.Random(fleet.seed),
    )  # fmt: skip
    place, window_end_s = 0, 0.0
    while window_end_s < end_s:
        window_end_s = min(window_end_s + WINDOW_S, end_s)
        while place < len(trace) and trace[place].arrival_s < window_end_s:
            request = trace[place]
            assert request.adapter is not None
            chosen = router.choose(request.adapter, view)
            replicas[chosen].send(place, request)
            view.loads[chosen] += 1
            place += 1
        for i, replica in enumerate(replicas):
            replica.run_until(window_end_s)
            view.loads[i] = replica.num_open
        on_window(window_end_s)
    return FleetResult(
        replicas=replicas, outcomes=_outcomes(trace[:place], replicas, end_s), end_s=end_s,
        wall_s=time.perf_counter() - started,
    )  # fmt: skip


def _outcomes(trace: Sequence[Request], replicas: list[Replica], end_s: float) -> list[Outcome]:
    found: dict[int, Outcome] = {}
    for replica in replicas:
        found |= replica.ended
        for outcome in replica.still_open():
            found[outcome.index] = outcome
    return [found[i] for i in range(len(trace))]


def _fill_hosts(fleet: Fleet, router: Router, replicas: list[Replica]) -> None:
    bytes_of = fleet.bytes_by_rank()
    sizes = np.array([bytes_of[int(rank)] for rank in fleet.ranks], np.float64)
    rng = np.random.RandomState(fleet.seed)
    shares: np.ndarray | None = None
    for number, replica in enumerate(replicas):
        adapters = router.initial(number)
        if adapters is None:
            if shares is None:
                shares = cached_share(fleet.popularity, sizes, fleet.tier.capacity_bytes)
            held = np.flatnonzero(rng.random_sample(len(shares)) < shares)
            adapters = held[::-1].tolist()  # the most popular last
        fill(replica.host, ((a, int(sizes[a])) for a in adapters))


def cached_share(popularity: np.ndarray, sizes: np.ndarray, capacity: float) -> np.ndarray:
    """How often each item lies in a least-recently-used cache, f64 [items] (Che's approximation).

    An item is there if it was asked for in the last T requests; T is such that what is there fills
    the cache on average.
    """
    if sizes.sum() <= capacity:
        return np.ones(len(sizes))
    low, high = 0.0, 1.0
    while _filled(popularity, sizes, high) < capacity:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        is_low = _filled(popularity, sizes, middle) < capacity
        low, high = (middle, high) if is_low else (low, middle)
    return -np.expm1(-popularity * low)


def _filled(popularity: np.ndarray, sizes: np.ndarray, requests: float) -> float:
    return float((-np.expm1(-popularity * requests) * sizes).sum())


def measure(result: FleetResult, *, from_s: float, to_s: float) -> dict[str, Any]:
    """Of the requests that arrived in [from_s, to_s); rates over that time. A request without a
    first token at the end of the simulation counts as one that never got it.
    """
    measured = [o for o in result.outcomes if from_s <= o.arrival_s < to_s]
    firsts = np.array(
        [np.inf if o.first_token_s is None else o.first_token_s - o.arrival_s for o in measured]
    )
    ended = [o for o in result.outcomes if o.error is None and from_s <= o.ended_s < to_s]
    busy = np.array([r.core.stats()["runner"]["device_busy_s"] for r in result.replicas])
    stats = [replica.core.stats() for replica in result.replicas]
    fetches = sum(replica.num_fetches for replica in result.replicas)
    p50, p90, p99 = np.percentile(firsts, (50, 90, 99), method="higher")
    opens = np.array([replica.num_open for replica in result.replicas])
    return {
        "num_requests": len(measured),
        "offered_per_s": len(measured) / (to_s - from_s),
        "requests_per_s": len(ended) / (to_s - from_s),
        "first_token_p50_s": _finite(p50),
        "first_token_p90_s": _finite(p90),
        "first_token_p99_s": _finite(p99),
        "attainment_6s": float((firsts < 6.0).mean()),
        "attainment_1s": float((firsts < 1.0).mean()),
        "never_share": float(np.isinf(firsts).mean()),
        "busy_mean": float(busy.mean() / result.end_s),
        "busy_max": float(busy.max() / result.end_s),
        "open_max_over_mean": float(opens.max() / max(opens.mean(), 1e-9)),
        "host_miss_share": fetches / max(len(result.outcomes), 1),
        "fetched_bytes_per_s": sum(r.fetched_bytes for r in result.replicas) / result.end_s,
        "adapters_per_host": float(np.mean([len(r.host) for r in result.replicas])),
        "host_bytes_mean": float(np.mean([r.host.num_bytes for r in result.replicas])),
        "host_bytes_max": max(r.host.num_bytes for r in result.replicas),
        "installs_per_request": sum(s["adapter_installs"] for s in stats)
        / max(len(result.outcomes), 1),
        "installed_bytes_per_s": sum(s["runner"]["install_bytes"] for s in stats) / result.end_s,
        "steps": sum(s["steps"] for s in stats),
        "wall_s": result.wall_s,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if np.isfinite(value) else None
