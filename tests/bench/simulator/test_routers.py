"""Where requests go: laws of each policy, on views made by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulator.fleet import zipf
from bench.simulator.host_tier import HostCache
from bench.simulator.placement import Placement, split
from bench.simulator.routers import (
    BOUND,
    MISS_COST,
    AdapterAware,
    BoundedHash,
    FleetView,
    HashAffinity,
    HashRing,
    LeastLoaded,
    Random,
    RoundRobin,
)

NUM_ADAPTERS = 5000


def view(loads: list[float]) -> FleetView:
    return FleetView(
        loads=np.array(loads, float), hosts=[HostCache(1e9) for _ in loads], rng=random.Random(1)
    )


def test_a_replica_more_moves_few_adapters_and_only_to_itself() -> None:
    before, after = HashRing(20, NUM_ADAPTERS).homes, HashRing(21, NUM_ADAPTERS).homes
    moved = before != after
    assert set(after[moved]) == {20}
    assert 0 < moved.mean() < 2 / 21


def test_the_ring_spreads_adapters_and_names_each_once() -> None:
    ring = HashRing(20, NUM_ADAPTERS)
    groups = [ring.adapters_of(replica) for replica in range(20)]
    assert sorted(a for group in groups for a in group) == list(range(NUM_ADAPTERS))
    assert all(group == sorted(group, reverse=True) for group in groups)
    assert max(map(len, groups)) < 2 * NUM_ADAPTERS / 20


def test_an_adapter_always_has_the_same_home() -> None:
    router = HashAffinity(HashRing(7, NUM_ADAPTERS))
    assert {router.choose(17, view([float(i)] * 7)) for i in range(5)} == {
        router.choose(17, view([0] * 7))
    }


@settings(max_examples=30, deadline=None)
@given(adapters=st.lists(st.integers(0, 3), min_size=20, max_size=200))
def test_bounded_hashing_keeps_every_load_below_the_bound(adapters: list[int]) -> None:
    router, seen = BoundedHash(HashRing(10, NUM_ADAPTERS)), view([0.0] * 10)
    for adapter in adapters:
        chosen = router.choose(adapter, seen)
        seen.loads[chosen] += 1
        assert seen.loads[chosen] <= math.ceil(BOUND * seen.loads.mean())


def test_bounded_hashing_is_hashing_while_nobody_is_over_the_bound() -> None:
    ring = HashRing(10, NUM_ADAPTERS)
    for adapter in range(200):
        idle = view([0.0] * 10)
        assert BoundedHash(ring).choose(adapter, idle) == HashAffinity(ring).choose(adapter, idle)


def test_the_least_loaded_is_chosen_and_ties_are_shared_out() -> None:
    router, seen = LeastLoaded(), view([3, 1, 2, 1])
    assert {router.choose(0, seen) for _ in range(50)} == {1, 3}


def test_turns_go_round_and_chance_reaches_all() -> None:
    turns, chance, seen = RoundRobin(), Random(), view([9, 0, 0])
    assert [turns.choose(0, seen) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    assert {chance.choose(0, seen) for _ in range(100)} == {0, 1, 2}


def test_a_holder_wins_until_its_load_outweighs_a_fetch() -> None:
    ring = HashRing(8, NUM_ADAPTERS)
    home = int(ring.homes[5])
    for load, is_home in ((MISS_COST - 1, True), (MISS_COST + 1, False)):
        router, seen = AdapterAware(ring), view([0.0] * 8)
        seen.hosts[home].use(5, 10)
        seen.loads[home] = load
        chosen = {AdapterAware(ring).choose(5, seen) for _ in range(40)} - {home}
        assert bool(chosen) is not is_home
        assert router.choose(5, seen) in range(8)


def test_a_hot_adapter_spreads_and_one_that_was_dropped_is_forgotten() -> None:
    router, seen = AdapterAware(HashRing(8, NUM_ADAPTERS)), view([0.0] * 8)
    for _ in range(400):
        chosen = router.choose(5, seen)
        seen.hosts[chosen].use(5, 10)
        seen.loads[chosen] += 1
    assert seen.loads.min() > 0.5 * seen.loads.max()
    cold = view([0.0] * 8)
    for _ in range(200):
        router.choose(5, cold)
    assert len(router._holders[5]) < 8


@settings(max_examples=20, deadline=None)
@given(
    num_replicas=st.integers(4, 40),
    exponent=st.sampled_from((0.0, 0.8, 1.2)),
    by_rank=st.booleans(),
)
def test_placement_gives_every_adapter_copies_and_shares_the_demand(
    num_replicas: int, exponent: float, by_rank: bool
) -> None:
    ranks = np.array([64, 32, 16, 8])[np.random.RandomState(3).randint(4, size=2000)]
    placed = Placement(
        num_replicas, zipf(2000, exponent), ranks, {8: 1.0, 16: 1.1, 32: 1.3, 64: 1.6},
        by_rank=by_rank,
    )  # fmt: skip
    assert all(len(copies) == len(set(copies)) >= 1 for copies in placed.copies)
    assert placed.loads.sum() == pytest.approx(1.0)
    held = [list(placed.initial(replica) or ()) for replica in range(num_replicas)]
    assert sum(map(len, held)) == sum(map(len, placed.copies))
    if by_rank:
        assert all(len({int(ranks[a]) for a in group}) == 1 for group in held)
    else:
        assert placed.loads.max() < 1.3 / num_replicas
    counts = np.array([len(copies) for copies in placed.copies])
    assert counts[0] == counts[ranks == ranks[0]].max()  # of a rank, the most popular has the most


def test_a_copy_with_less_load_is_chosen() -> None:
    placed = Placement(2, np.array([0.9, 0.1]), np.array([8, 8]), {8: 1.0}, by_rank=False)
    assert sorted(placed.copies[0]) == [0, 1]
    assert {placed.choose(0, view([5, 1])) for _ in range(20)} == {1}


@given(whole=st.integers(3, 1000), parts=st.lists(st.floats(0.01, 1), min_size=1, max_size=3))
def test_a_split_adds_up_and_leaves_nobody_out(whole: int, parts: list[float]) -> None:
    sizes = split(whole, parts)
    assert sum(sizes) == whole and min(sizes) >= 1
    for size, part in zip(sizes, parts, strict=True):
        assert abs(size - (1 + part / sum(parts) * (whole - len(parts)))) <= 1


def test_fewer_replicas_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="one for each rank"):
        split(1, [0.5, 0.5])
