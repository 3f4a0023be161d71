"""Laws of adapter clustering with the real scheduler: what it buys, and what it may cost others."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sloraj.batch import ScheduledBatch
from sloraj.policies.cost import BaseBytes
from sloraj.policies.settings import QueueConfig
from sloraj.request import Sequence
from tests.sloraj.core_driver import CoreDriver

NUM_ADAPTERS = 12
ROWS = 6


class Watched:
    """A driver with many adapters, and what its steps held: admissions in order, with their time,
    and the number of distinct adapters of each step.
    """

    def __init__(self, seed: int = 0, *, num_pages: int = 200, **queue: Any) -> None:
        self.random = random.Random(seed)
        self.driver = CoreDriver(
            num_pages=num_pages,
            max_num_seqs=ROWS,
            max_adapter_slots=NUM_ADAPTERS,
            max_num_batched_tokens=64,
            queue=QueueConfig(**queue),
            base_bytes=BaseBytes(weights=1600, row=800),
        )
        self.admitted: list[tuple[float, Sequence]] = []
        self.num_distinct: list[int] = []
        for content in range(1, NUM_ADAPTERS + 1):
            self.driver.loaded(f"a{content}", f"{content}:2")
        self.driver.runner.before_execute = self._watch

    def _watch(self, batch: ScheduledBatch) -> None:
        new = [r.sequence for r in batch.rows if r.is_reset and not r.sequence.num_preemptions]
        for sequence in sorted(new, key=lambda sequence: sequence.admission):
            self.admitted.append((self.driver.now_s, sequence))
        self.num_distinct.append(len({row.sequence.version_id for row in batch.rows} - {None}))

    def send(self, content: int | None = None, **fields: Any) -> str:
        if content is None:
            content = self.random.randint(0, NUM_ADAPTERS)
        name = f"a{content}" if content else None
        fields = {"max_tokens": self.random.randint(1, 8), **fields}
        return self.driver.generate([1, 2, 3], name, **fields)

    def flood(self, num_steps: int, backlog: int = 30) -> None:
        """Random requests, `backlog` of which always wait; then all of them end."""
        for _ in range(num_steps):
            for _ in range(backlog + ROWS - self.driver.core.stats()["num_requests"]):
                self.send()
            self.driver.step()
        self.driver.run()

    @property
    def queue(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.driver.core.stats()["queue"]
        return stats


def overtakes(admitted: list[tuple[float, Sequence]]) -> list[int]:
    """How many that came later were admitted before each."""
    tags = [sequence.tag for _, sequence in admitted]
    return [sum(other > tag for other in tags[:place]) for place, tag in enumerate(tags)]


@pytest.mark.parametrize("max_overtakes", [1, 7, 40])
def test_nobody_is_overtaken_more_often_than_the_bound(max_overtakes: int) -> None:
    watched = Watched(cluster_adapters=2, cluster_max_overtakes=max_overtakes)
    watched.flood(400)
    most = max(overtakes(watched.admitted))
    assert max_overtakes / 2 <= most <= max_overtakes
    assert watched.queue["wait_bound_admissions"] > 0


@pytest.mark.parametrize("max_wait_s", [0.05, 0.2])
def test_nobody_is_overtaken_after_waiting_for_the_bound(max_wait_s: float) -> None:
    watched = Watched(
        cluster_adapters=2, cluster_max_overtakes=10**6, cluster_max_wait_s=max_wait_s
    )
    watched.flood(400, backlog=10)
    num_overtakes = 0
    for place, (now_s, sequence) in enumerate(watched.admitted):
        older = [s for _, s in watched.admitted[place + 1 :] if s.tag < sequence.tag]
        num_overtakes += bool(older)
        assert all(now_s - other.arrival_s < max_wait_s for other in older)
    assert num_overtakes == watched.queue["clustered_admissions"] > 20


def test_fewer_distinct_adapters_run_at_once() -> None:
    means = []
    for queue in ({}, {"cluster_adapters": 3, "cluster_max_overtakes": 300}):
        watched = Watched(seed=5, **queue)
        watched.flood(500, backlog=60)
        means.append(sum(watched.num_distinct) / len(watched.num_distinct))
    plain, clustered = means
    assert clustered < 0.8 * plain


def test_the_cap_is_soft_so_no_row_stays_empty() -> None:
    watched = Watched(cluster_adapters=1)
    for content in range(1, ROWS + 1):
        watched.send(content, max_tokens=20)
    watched.driver.step()
    assert watched.driver.core.stats()["num_running"] == ROWS


def test_below_the_cap_all_go_in_turn() -> None:
    watched = Watched(cluster_adapters=NUM_ADAPTERS + 1)
    watched.flood(200)
    assert not any(overtakes(watched.admitted))


def test_what_does_not_fit_leaves_the_pass_to_whose_turn_it_is() -> None:
    watched = Watched(num_pages=16, cluster_adapters=1)  # 15 pages
    running = watched.send(1, max_tokens=20)
    watched.driver.step()
    in_turn = watched.send(2, max_tokens=2)
    clustered = watched.driver.generate([1] * 45, "a1", max_tokens=2)
    for _ in range(4):
        watched.driver.step()
    admitted = [sequence.request_id for _, sequence in watched.admitted]
    assert admitted == [running, in_turn]
    watched.driver.run()
    watched.driver.expect(clustered, [1] * 45, 1, max_tokens=2)


def test_clustering_lets_a_tenant_get_ahead_by_no_more_than_the_lead() -> None:
    """The most that one admission can add, with what all rows can sample, bounds VTC alone."""
    for max_lead in (0.0, 60.0):
        watched = Watched(
            queue_order="vtc", cluster_adapters=1, cluster_max_overtakes=10**6,
            cluster_max_lead=max_lead,
        )  # fmt: skip
        spreads = []
        for _ in range(600):
            for number in range(40 - watched.driver.core.stats()["num_requests"]):
                content = 3 if number % 2 else watched.random.randint(4, NUM_ADAPTERS)
                watched.send(content, tenant="home" if content == 3 else "rover")
            watched.driver.step()
            spreads.append(watched.queue["counter_spread"])
        admission = 3 * (1 + 16 / 1600) + 20_000 * 16 / 1600
        outputs = ROWS * 8 * 2 * (1 + 16 / 800)
        assert max(spreads) <= admission + outputs + max_lead
        assert watched.queue["clustered_admissions"] > 20
