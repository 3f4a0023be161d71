"""Which replica of a fleet a request goes to: the policies that are compared.

A router sees, of each replica, how many requests it has open (as of the last report, and those sent
since) and which adapters lie in its host's memory. `initial` is what its hosts would hold after
running for long.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from bench.simulator.host_tier import HostCache

POINTS = 64  # of each replica on the ring of hashes
BOUND = 1.25  # a replica takes no more than this times the mean load, while another does
MISS_COST = 4.0  # open requests that a fetch is worth


@dataclasses.dataclass(slots=True, kw_only=True)
class FleetView:
    """What routers may know."""

    loads: np.ndarray  # f64 [replicas]: open requests
    hosts: Sequence[HostCache]
    rng: random.Random

    @property
    def num_replicas(self) -> int:
        return len(self.hosts)


class Router(Protocol):
    """Stateful; one for each run."""

    def choose(self, adapter: int, view: FleetView) -> int:
        """The replica for a request to this adapter."""

    def initial(self, replica: int) -> Iterable[int] | None:
        """Adapters in the replica's host at the start, the most valuable last; None: those that a
        least-recently-used cache would hold if it had seen every adapter as often as any replica.
        """


class Random:
    def choose(self, adapter: int, view: FleetView) -> int:
        return view.rng.randrange(view.num_replicas)

    def initial(self, replica: int) -> Iterable[int] | None:
        return None


class RoundRobin:
    def __init__(self) -> None:
        self._turns = itertools.count()

    def choose(self, adapter: int, view: FleetView) -> int:
        return next(self._turns) % view.num_replicas

    def initial(self, replica: int) -> Iterable[int] | None:
        return None


class LeastLoaded:
    """One of those with the fewest open requests."""

    def choose(self, adapter: int, view: FleetView) -> int:
        least = np.flatnonzero(view.loads == view.loads.min())
        return int(least[view.rng.randrange(len(least))])

    def initial(self, replica: int) -> Iterable[int] | None:
        return None


def mixed_bits(values: np.ndarray) -> np.ndarray:
    """A hash of integers, u64: the finaliser of SplitMix64."""
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


class HashRing:
    """Consistent hashing: an adapter belongs to the replica whose point comes next on the ring, so
    that a replica that joins or leaves moves few adapters.
    """

    def __init__(self, num_replicas: int, num_adapters: int) -> None:
        points = mixed_bits(np.arange(num_replicas * POINTS) + (1 << 40))
        order = np.argsort(points)
        self.owners = (order // POINTS).astype(np.int64)
        places = np.searchsorted(points[order], mixed_bits(np.arange(num_adapters)))
        self.places = places % len(points)
        self.homes = self.owners[self.places]  # int64 [adapters]
        by_home = np.argsort(self.homes, kind="stable")
        bounds = np.searchsorted(self.homes[by_home], np.arange(num_replicas + 1))
        self._by_home, self._bounds = by_home, bounds

    def adapters_of(self, replica: int) -> list[int]:
        """The least popular first."""
        low, high = self._bounds[replica], self._bounds[replica + 1]
        found: list[int] = self._by_home[low:high][::-1].tolist()
        return found


class HashAffinity:
    """Every adapter on one replica."""

    def __init__(self, ring: HashRing) -> None:
        self._ring = ring

    def choose(self, adapter: int, view: FleetView) -> int:
        return int(self._ring.homes[adapter])

    def initial(self, replica: int) -> Iterable[int] | None:
        return self._ring.adapters_of(replica)


class BoundedHash(HashAffinity):
    """The next replica on the ring that would then have no more than `BOUND` times the mean load,
    rounded up (Mirrokni, Thorup, Zadimoghaddam: consistent hashing with bounded loads).
    """

    def choose(self, adapter: int, view: FleetView) -> int:
        owners, place = self._ring.owners, int(self._ring.places[adapter])
        limit = math.ceil(BOUND * (float(view.loads.sum()) + 1) / view.num_replicas)
        on_the_ring = (int(owners[(place + step) % len(owners)]) for step in range(len(owners)))
        return next(replica for replica in on_the_ring if view.loads[replica] < limit)


class AdapterAware:
    """Power of two choices, among replicas that hold the adapter: two of them, and one that may
    not, compete by open requests; a fetch counts as `MISS_COST` of them. So an adapter spreads as
    far as its load does.
    """

    def __init__(self, ring: HashRing) -> None:
        self._ring = ring
        self._holders: dict[int, list[int]] = {}

    def choose(self, adapter: int, view: FleetView) -> int:
        rng, hosts = view.rng, view.hosts
        holders = self._holders.setdefault(adapter, [int(self._ring.homes[adapter])])
        candidates = {rng.choice(holders), rng.choice(holders), rng.randrange(view.num_replicas)}

        def cost(replica: int) -> tuple[float, float]:
            miss = 0.0 if adapter in hosts[replica] else MISS_COST
            return float(view.loads[replica]) + miss, rng.random()

        chosen = min(sorted(candidates), key=cost)
        for replica in candidates:  # what a host has dropped is found out when it is looked at
            if replica != chosen and len(holders) > 1 and adapter not in hosts[replica]:
                self._forget(holders, replica)
        if chosen not in holders:
            holders.append(chosen)
        return chosen

    def _forget(self, holders: list[int], replica: int) -> None:
        if replica in holders:
            holders.remove(replica)

    def initial(self, replica: int) -> Iterable[int] | None:
        return self._ring.adapters_of(replica)
