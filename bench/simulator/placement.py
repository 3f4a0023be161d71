"""Adapters placed on replicas by what is expected of them, before any request comes.

An adapter's demand is its share of requests times what a request costs with its rank. It gets as
many copies as keep each copy below a part of a replica's fair share; copies go, largest demand
first, to the replica with the least. `by_rank` gives each rank replicas of its own, as LoRAServe
(arXiv:2511.22880) does for engines in which a batch is as slow as its largest rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np

from bench.simulator.routers import FleetView

SHARE = 0.25  # of a replica's fair share: the most demand that one copy may stand for


class Placement:
    """A router to the less loaded of two copies."""

    def __init__(
        self,
        num_replicas: int,
        popularity: np.ndarray,
        ranks: np.ndarray,
        cost_of_rank: dict[int, float],
        *,
        by_rank: bool,
    ) -> None:
        """popularity: f64 [adapters], adding up to 1. ranks: int [adapters]."""
        costs = np.array([cost_of_rank[rank] for rank in sorted(cost_of_rank)])
        demand = popularity * costs[np.searchsorted(sorted(cost_of_rank), ranks)]
        demand /= demand.sum()
        self.copies: list[list[int]] = [[] for _ in range(len(demand))]
        self._held: list[list[int]] = [[] for _ in range(num_replicas)]
        self.loads = np.zeros(num_replicas)  # demand placed
        if by_rank:
            groups = [np.flatnonzero(ranks == rank) for rank in sorted(cost_of_rank)]
        else:
            groups = [np.arange(len(demand))]
        sizes = split(num_replicas, [float(demand[group].sum()) for group in groups])
        first = 0
        for group, size in zip(groups, sizes, strict=True):
            self._place(group, demand, range(first, first + size), 1 / num_replicas)
            first += size

    def _place(
        self, group: np.ndarray, demand: np.ndarray, replicas: range, fair_share: float
    ) -> None:
        heap = [(0.0, replica) for replica in replicas]
        order = group[np.argsort(-demand[group], kind="stable")]
        for adapter, wanted in zip(order.tolist(), demand[order].tolist(), strict=True):
            num = min(len(replicas), max(1, int(np.ceil(wanted / (SHARE * fair_share)))))
            taken = [heapq.heappop(heap) for _ in range(num)]
            for load, replica in taken:
                self.copies[adapter].append(replica)
                self._held[replica].append(adapter)
                self.loads[replica] += wanted / num
                heapq.heappush(heap, (load + wanted / num, replica))

    def choose(self, adapter: int, view: FleetView) -> int:
        copies, rng = self.copies[adapter], view.rng
        if len(copies) == 1:
            return copies[0]
        one, other = rng.sample(copies, 2)
        return one if view.loads[one] <= view.loads[other] else other

    def initial(self, replica: int) -> Iterable[int] | None:
        return reversed(self._held[replica])  # they were placed by falling demand


def split(whole: int, parts: list[float]) -> list[int]:
    """`whole` in integers, in proportion to `parts`, each at least 1 (largest remainders)."""
    if whole < len(parts):
        raise ValueError(
            f"replicas: got {whole}, allowed: at least {len(parts)}, one for each rank"
        )
    exact = [part / sum(parts) * (whole - len(parts)) for part in parts]
    sizes = [1 + int(value) for value in exact]
    by_rest = sorted(range(len(parts)), key=lambda i: int(exact[i]) - exact[i])
    for i in by_rest[: whole - sum(sizes)]:
        sizes[i] += 1
    return sizes
