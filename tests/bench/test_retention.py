"""The retention policies against each other, on traces of uses, and against oracles."""

from __future__ import annotations

import pytest

from bench.retention import (
    POLICIES,
    draw_trace,
    furthest_next_use_first,
    least_recently_used,
    num_pages_of,
    replay,
)


@pytest.mark.parametrize("num_pages", [40, 150])
def test_the_engines_lru_is_lru(num_pages: int) -> None:
    trace = draw_trace(3000, 100, zipf=0.9, seed=1)
    assert replay(trace, "lru", num_pages, num_running=1) == least_recently_used(trace, num_pages)


@pytest.mark.parametrize("num_shifts", [0, 3])
@pytest.mark.parametrize("popularity", [{"zipf": 0.9}, {"zipf": 1.1}, {"alpha": 0.3}])
@pytest.mark.parametrize("num_pages", [400, 900])
def test_expected_cost_reloads_less_than_recency_and_recency_less_than_the_paper(
    popularity: dict[str, float], num_shifts: int, num_pages: int
) -> None:
    trace = draw_trace(10_000, 400, num_shifts=num_shifts, **popularity)  # type: ignore[arg-type]
    uses, size = {}, {}
    for policy in ("cost", "lru", "paper"):
        uses[policy], size[policy] = replay(trace, policy, num_pages)
    assert size["cost"] < 0.98 * size["lru"] < size["lru"] < 0.98 * size["paper"]
    assert uses["cost"] < 0.95 * uses["lru"] < uses["lru"] < 0.95 * uses["paper"]


@pytest.mark.parametrize("policy", POLICIES)
def test_none_beats_the_one_that_knows_the_future(policy: str) -> None:
    trace = draw_trace(5000, 200, zipf=1.0)
    assert replay(trace, policy, 300, num_running=1) > furthest_next_use_first(trace, 300)


def test_what_fits_whole_is_loaded_once() -> None:
    trace = draw_trace(4000, 50, zipf=0.5)
    num_pages = sum(map(num_pages_of, range(50)))
    assert replay(trace, "cost", num_pages) == (0.0, 0.0)  # after the warm-up
