"""Service and its differences, against looking at every moment, and against a scheduler known to
be fair and one known not to be.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fairness import (
    Cost,
    backlog,
    jain,
    max_difference,
    services,
    window_differences,
    windows,
)
from bench.outcome import Outcome
from tests.bench.outcomes import OUTCOMES, outcome

LAW = settings(max_examples=60, deadline=None, derandomize=True)
UNEVEN = Cost(prompt=1.0, output=2.0, weights={"a": 2.0})


def amounts(outcomes: list[Outcome], tenant: str, cost: Cost) -> list[tuple[float, float]]:
    """Every piece of a tenant's service, with its moment."""
    found = []
    for one in outcomes:
        if one.tenant == tenant and one.first_token_s is not None:
            weight = cost.weights.get(tenant, 1.0)
            found.append((one.first_token_s, one.num_prompt_tokens * cost.prompt / weight))
            found += [(float(t), cost.output / weight) for t in one.token_moments]
    return found


def is_waiting(outcomes: list[Outcome], tenant: str, now: float) -> bool:
    return any(
        one.arrival_s <= now < (one.ended_s if one.first_token_s is None else one.first_token_s)
        for one in outcomes
        if one.tenant == tenant
    )


@given(OUTCOMES)
@LAW
def test_all_work_is_some_tenants_service_and_in_some_window(outcomes: list[Outcome]) -> None:
    total = sum(
        one.num_prompt_tokens + 2 * one.num_output_tokens
        for one in outcomes
        if one.first_token_s is not None
    )
    served = services(outcomes)
    assert sum(float(s.total[-1]) for s in served.values() if len(s.total)) == total
    for window_s in (0.5, 3.0, 1000.0):
        assert sum(w.sum() for w in windows(outcomes, window_s).values()) == total


@given(OUTCOMES, st.integers(1, 40).map(lambda eighths: eighths / 8))
@LAW
def test_windows_hold_what_came_in_them(outcomes: list[Outcome], window_s: float) -> None:
    for tenant, got in windows(outcomes, window_s, UNEVEN).items():
        expected = np.zeros(len(got))
        for moment, amount in amounts(outcomes, tenant, UNEVEN):
            expected[int(moment // window_s)] += amount
        assert got == pytest.approx(expected)


@given(OUTCOMES)
@LAW
def test_a_tenant_is_backlogged_when_a_request_of_it_waits(outcomes: list[Outcome]) -> None:
    for tenant, stretches in backlog(outcomes).items():
        assert all(a[1] < b[0] for a, b in itertools.pairwise(stretches))
        for now in np.arange(0, 40, 1 / 8):
            inside = any(begin <= now < end for begin, end in stretches)
            assert inside == is_waiting(outcomes, tenant, float(now))


@given(OUTCOMES)
@LAW
def test_the_difference_is_the_largest_that_trying_every_interval_finds(
    outcomes: list[Outcome],
) -> None:
    """By brute force: all intervals of common backlog whose ends are at or just before events."""
    clock = np.arange(0, 48, 1 / 16)  # events are at eighths: every other moment is between two
    largest = 0.0
    for one, other in itertools.combinations(sorted({o.tenant for o in outcomes}), 2):
        lead = np.zeros(len(clock))
        for sign, tenant in ((1, one), (-1, other)):
            for moment, amount in amounts(outcomes, tenant, UNEVEN):
                lead[clock >= moment - 1e-9] += sign * amount
        both = [
            all(is_waiting(outcomes, tenant, float(now)) for tenant in (one, other))
            for now in clock
        ]
        for begin, end in stretches_of(both):
            values = lead[max(begin - 1, 0) : end]
            largest = max(largest, values.max() - values.min())
    assert max_difference(outcomes, UNEVEN) == pytest.approx(largest)


def stretches_of(flags: list[bool]) -> list[tuple[int, int]]:
    found, begin = [], None
    for index, flag in enumerate([*flags, False]):
        if flag and begin is None:
            begin = index
        elif not flag and begin is not None:
            found.append((begin, index))
            begin = None
    return found


def serve_all(trace: list[tuple[float, str]], is_fair: bool) -> list[Outcome]:
    """One request at a time, one second each: FIFO, or the tenant that got least first."""
    waiting = [(at, tenant, index) for index, (at, tenant) in enumerate(trace)]
    got: dict[str, float] = dict.fromkeys((tenant for _, tenant in trace), 0.0)
    now, done = 0.0, []
    while waiting:
        here = [w for w in waiting if w[0] <= now] or [min(waiting)]
        chosen = min(here, key=lambda w: (got[w[1]], w)) if is_fair else min(here)
        waiting.remove(chosen)
        at, tenant, index = chosen
        now = max(now, at) + 1.0
        got[tenant] += 10 + 2
        done.append(outcome(index, at, now - at, tenant=tenant, prompt=10, tokens=1))
    return done


def test_a_flood_is_unfair_under_fifo_and_bounded_under_least_service_first() -> None:
    flood = [(0.0, "flood") for _ in range(100)] + [(0.5, "quiet") for _ in range(20)]
    fair, fifo = serve_all(flood, True), serve_all(flood, False)
    one_request = 10 + 2
    assert max_difference(fair) <= 2 * one_request  # VTC's bound with a batch of one
    assert max_difference(fifo) > 90 * one_request
    assert window_differences(fair, 10.0).max() <= 2 * one_request
    assert window_differences(fifo, 10.0).max() == 10 * one_request


def test_tenants_never_backlogged_together_are_not_compared() -> None:
    apart = [outcome(0, 0.0, 1.0, tenant="a"), outcome(1, 5.0, 1.0, tenant="b")]
    assert max_difference(apart) == 0
    assert not window_differences(apart, 1.0).any()
    assert max_difference([outcome(0, tenant="a"), outcome(1, tenant="a")]) == 0


def test_weights_and_factors_scale_service() -> None:
    one = [outcome(0, tenant="a", prompt=10, tokens=5)]
    assert services(one)["a"].total[-1] == 20
    assert services(one, UNEVEN)["a"].total[-1] == 10
    assert services(one, Cost(factor=lambda o: 3.0))["a"].total[-1] == 60


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=20))
@LAW
def test_jains_index_is_one_for_equals_and_a_share_for_one(values: list[float]) -> None:
    assert 1 / len(values) - 1e-12 <= jain(values) <= 1 + 1e-12
    assert jain([values[0]] * len(values)) == pytest.approx(1)
    assert jain([values[0], *[0.0] * (len(values) - 1)]) == pytest.approx(1 / len(values))


def test_jains_index_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one amount above 0"):
        jain([0.0])
