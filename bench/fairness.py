"""How evenly tenants were served, from outcomes: the measures of VTC (arXiv:2401.00588).

Service is work done for a tenant: each prompt token counts `Cost.prompt` when the prompt has been
read (at the first token), each output token `Cost.output` when it comes. A tenant is backlogged
while a request of its own waits: has arrived and has no token yet. VTC promises that the service
of two tenants differs by no more than a constant over any stretch in which both are backlogged,
however much one of them sends: `max_difference` is that difference, exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bench.outcome import Outcome


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a token counts. VTC's: prompts 1, outputs 2, and every tenant weighs the same."""

    prompt: float = 1.0
    output: float = 2.0
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by tenant; else 1
    factor: Callable[[Outcome], float] = lambda _: 1.0  # such as one that rises with the rank


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """A tenant's service so far: `total[i]` from `moments[i]` on, 0 before; f64, both rising."""

    moments: np.ndarray
    total: np.ndarray

    def by(self, at_s: np.ndarray | float, side: str = "right") -> np.ndarray:
        """Service up to and with each moment, or without it if `side` is "left"."""
        padded = np.concatenate([[0.0], self.total])
        return np.asarray(padded[np.searchsorted(self.moments, at_s, side=side)])  # type: ignore[call-overload]


def services(outcomes: Sequence[Outcome], cost: Cost = Cost()) -> dict[str, Service]:
    """Each tenant's service over time. Work for requests that failed later counts: it was done."""
    found = {}
    for tenant, theirs in _by_tenant(outcomes).items():
        moments, amounts = [np.empty(0)], [np.empty(0)]
        for outcome in theirs:
            each = cost.factor(outcome) / cost.weights.get(tenant, 1.0)
            if outcome.first_token_s is not None:
                moments.append(np.array([outcome.first_token_s]))
                amounts.append(np.array([outcome.num_prompt_tokens * cost.prompt * each]))
            tokens = outcome.token_moments
            moments.append(tokens)
            amounts.append(np.full(len(tokens), cost.output * each))
        when = np.concatenate(moments)
        order = np.argsort(when, kind="stable")
        found[tenant] = Service(when[order], np.cumsum(np.concatenate(amounts)[order]))
    return found


def windows(
    outcomes: Sequence[Outcome], window_s: float, cost: Cost = Cost()
) -> dict[str, np.ndarray]:  # fmt: skip
    """Service of each tenant in each window [i * window_s, (i + 1) * window_s), f64 [windows]."""
    num = int(np.floor(max(outcome.ended_s for outcome in outcomes) / window_s)) + 1
    edges = np.arange(num + 1) * window_s
    return {
        tenant: np.diff(service.by(edges, side="left"))
        for tenant, service in services(outcomes, cost).items()
    }


def backlog(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[float, float]]]:
    """For each tenant the stretches [from, to) in which it is backlogged, apart and in order."""
    found = {}
    for tenant, theirs in _by_tenant(outcomes).items():
        waits = sorted(
            (o.arrival_s, o.ended_s if o.first_token_s is None else o.first_token_s) for o in theirs
        )
        stretches: list[tuple[float, float]] = []
        for begin, end in waits:
            if stretches and begin <= stretches[-1][1]:
                stretches[-1] = (stretches[-1][0], max(end, stretches[-1][1]))
            elif end > begin:
                stretches.append((begin, end))
        found[tenant] = stretches
    return found


def max_difference(outcomes: Sequence[Outcome], cost: Cost = Cost()) -> float:
    """The largest |W_f - W_g| of any two tenants' services over any part of a stretch in which both
    are backlogged throughout; 0 if no two ever are.
    """
    served, waiting = services(outcomes, cost), backlog(outcomes)
    largest = 0.0
    for one, other in itertools.combinations(served, 2):
        moments = np.union1d(served[one].moments, served[other].moments)
        lead = served[one].by(moments) - served[other].by(moments)
        for begin, end in _overlaps(waiting[one], waiting[other]):
            before = served[one].by(begin, "left") - served[other].by(begin, "left")
            inside = lead[(moments >= begin) & (moments < end)]
            values = np.append(inside, before)
            largest = max(largest, float(values.max() - values.min()))
    return largest


def window_differences(
    outcomes: Sequence[Outcome], window_s: float, cost: Cost = Cost()
) -> np.ndarray:  # fmt: skip
    """In each window the most minus the least service among tenants backlogged all through it, 0
    where they are fewer than two: f64 [windows].
    """
    served, waiting = windows(outcomes, window_s, cost), backlog(outcomes)
    num = len(next(iter(served.values())))
    differences = np.zeros(num)
    for index in range(num):
        begin, end = index * window_s, (index + 1) * window_s
        got = [
            amounts[index]
            for tenant, amounts in served.items()
            if any(start <= begin and end <= stop for start, stop in waiting[tenant])
        ]
        if len(got) > 1:
            differences[index] = max(got) - min(got)
    return differences


def jain(amounts: Sequence[float]) -> float:
    """Jain's index: 1 if all got the same, 1/n if one of n got everything."""
    values = np.asarray(amounts, dtype=np.float64)
    if not values.size or not values.any():
        raise ValueError(f"got {amounts!r}, allowed: at least one amount above 0")
    return float(values.sum() ** 2 / (values.size * (values**2).sum()))


def _by_tenant(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.tenant, []).append(outcome)
    return found


def _overlaps(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    both, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        begin, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if begin < end:
            both.append((begin, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return both
