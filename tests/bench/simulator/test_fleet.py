"""A fleet loses nothing, depends on its seed alone, and begins with hosts as they would be."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import pytest

from bench.simulator import fleet as command
from bench.simulator import fleet_run
from bench.simulator.fleet import make_trace, routers, zipf
from bench.simulator.fleet_run import Fleet, cached_share, measure, run_fleet
from bench.simulator.host_tier import HostCache, HostTier, fill
from bench.simulator.replica import Replica
from bench.simulator.routers import Random, RoundRobin
from bench.trace import Request
from tests.bench.simulator.engines import description, device

RANKS = np.array([4, 8, 16])
TIER = HostTier(
    capacity_bytes=2e6, fetch_latency_s=0.01, fetch_bytes_per_s=5e7, load_s=0.004
)  # fmt: skip


def small_fleet(num_replicas: int = 4, tier: HostTier = TIER) -> Fleet:
    return Fleet(
        engine=description(num_pages=400, max_model_len=128), model=device(), tier=tier,
        num_replicas=num_replicas, popularity=zipf(60, 1.0), ranks=RANKS[np.arange(60) % 3],
        seed=7,
    )  # fmt: skip


@pytest.mark.parametrize("policy", list(routers(small_fleet())))
def test_every_request_ends_once_or_is_still_open(policy: str) -> None:
    fleet = small_fleet()
    trace = make_trace(fleet, 60.0, 3.0, (4, 40), (2, 40))
    result = run_fleet(fleet, routers(fleet)[policy](), trace, 3.0)
    assert [o.index for o in result.outcomes] == list(range(len(trace)))
    num_open = sum(o.error == "open" for o in result.outcomes)
    assert num_open == sum(replica.num_open for replica in result.replicas)
    ended = [o for o in result.outcomes if o.error is None]
    assert len(ended) + num_open == len(trace) and len(ended) > 0.5 * len(trace)
    for outcome in ended:
        assert outcome.first_token_s is not None
        assert outcome.arrival_s < outcome.first_token_s <= outcome.ended_s
    for replica in result.replicas:
        replica.core.check_integrity()
        held = [a for a in replica._uses.elements()]
        assert replica.host.num_bytes <= TIER.capacity_bytes or held


@pytest.mark.parametrize("policy", ["random", "adapter-aware", "placement"])
def test_a_fleet_is_the_same_every_time(policy: str) -> None:
    fleet = small_fleet()
    trace = make_trace(fleet, 60.0, 2.0, (4, 40), (2, 40))
    first, second = (run_fleet(fleet, routers(fleet)[policy](), trace, 2.0) for _ in range(2))
    assert first.outcomes == second.outcomes


def test_windows_do_not_matter_where_loads_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = small_fleet()
    trace = make_trace(fleet, 60.0, 2.0, (4, 40), (2, 40))
    first = run_fleet(fleet, RoundRobin(), trace, 2.0)
    monkeypatch.setattr(fleet_run, "WINDOW_S", 0.013)
    second = run_fleet(fleet, RoundRobin(), trace, 2.0)
    ended = [(a, b) for a, b in zip(first.outcomes, second.outcomes, strict=True) if not a.error]
    assert ended and all(a == b for a, b in ended)


def test_a_fleet_of_one_is_a_replica() -> None:
    fleet = small_fleet(1, HostTier.unlimited())
    trace = make_trace(fleet, 20.0, 2.0, (4, 40), (2, 40))
    result = run_fleet(fleet, Random(), trace, 50.0)
    alone = Replica(
        fleet.engine, fleet.model, lambda a: int(fleet.ranks[a]), tier=HostTier.unlimited()
    )
    for index, request in enumerate(trace):
        alone.send(index, request)
    alone.run_until(50.0)
    assert result.outcomes == [alone.ended[i] for i in range(len(trace))]


def test_a_missing_adapter_comes_over_the_link_one_after_another() -> None:
    replica = Replica(description(), device(), lambda a: 8, tier=TIER)
    num_bytes = replica.bytes_of(0)
    for index in range(3):
        replica.send(
            index,
            Request(arrival_s=1.0, adapter=index, tenant="", num_prompt_tokens=4,
                    num_output_tokens=1),
        )  # fmt: skip
    replica.run_until(100.0)
    for index in range(3):
        there_s = 1.0 + TIER.fetch_latency_s + (index + 1) * num_bytes / 5e7 + TIER.load_s
        first_s = replica.ended[index].first_token_s
        assert first_s is not None and there_s < first_s < there_s + 0.05
    assert (replica.num_fetches, replica.fetched_bytes) == (3, 3 * num_bytes)


def test_an_adapter_in_the_host_is_served_without_a_fetch() -> None:
    replica = Replica(description(), device(), lambda a: 8, tier=TIER)
    fill(replica.host, [(3, replica.bytes_of(3))])
    replica.send(
        0, Request(arrival_s=1.0, adapter=3, tenant="", num_prompt_tokens=4, num_output_tokens=1)
    )
    replica.run_until(100.0)
    first_s = replica.ended[0].first_token_s
    assert replica.num_fetches == 0 and first_s is not None and first_s < 1.02


def test_a_cache_drops_the_oldest_use_that_nobody_holds() -> None:
    cache = HostCache(30)
    for adapter in (1, 2, 3):
        assert not cache.use(adapter, 10)
    assert cache.use(1, 10)
    cache.use(4, 10)
    assert cache.make_room(lambda adapter: adapter == 2) == [3]
    assert [adapter in cache for adapter in (1, 2, 3, 4)] == [True, True, False, True]
    assert cache.num_bytes == 30


def test_the_share_of_time_in_the_cache_is_that_of_a_long_run() -> None:
    """The approximation against the cache itself, under independent requests."""
    popularity, sizes = zipf(300, 0.9), np.array([1, 2, 4])[np.arange(300) % 3] * 10
    share = cached_share(popularity, sizes.astype(float), 1500.0)
    assert (share * sizes).sum() == pytest.approx(1500.0, rel=1e-6)
    rng, cache, seen = np.random.RandomState(1), HostCache(1500), collections.Counter[int]()
    drawn = rng.choice(300, 40_000, p=popularity).tolist()
    for adapter in drawn[:5000]:
        cache.use(adapter, int(sizes[adapter]))
        cache.make_room()
    for adapter in drawn[5000:]:
        seen[adapter in cache] += 1
        cache.use(adapter, int(sizes[adapter]))
        cache.make_room()
    assert seen[True] / 35_000 == pytest.approx(float((popularity * share).sum()), abs=0.02)


def test_a_request_without_a_first_token_counts_as_late(tmp_path: Path) -> None:
    fleet = small_fleet(1)
    trace = make_trace(fleet, 400.0, 2.0, (30, 40), (30, 40))  # far more than it can serve
    found = measure(run_fleet(fleet, Random(), trace, 2.0), from_s=0.5, to_s=1.5)
    assert found["never_share"] > 0.5
    assert found["first_token_p99_s"] is None
    assert found["attainment_6s"] <= 1 - found["never_share"]


def test_a_quick_comparison_resumes_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.json"
    found = device().as_dict() | {"geometry": "tiny"}
    model.write_text(json.dumps(found))
    common = ["fleet", "--model", str(model), "--quick", "--replicas", "6", "--pool-gb", "0.05",
              "--commit", "x", "--out", str(tmp_path / "fleet.jsonl"), "--policies"]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*common, "random"])
    command.main()
    monkeypatch.setattr("sys.argv", [*common, "random", "placement"])
    command.main()
    out = capsys.readouterr().out
    assert out.count("| random |") == 2 and out.count("| placement |") == 1
    assert len((tmp_path / "fleet.jsonl").read_text().splitlines()) == 3
