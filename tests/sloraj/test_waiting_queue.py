"""Laws of the waiting queue under every order: it does what the model by brute force does."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from sloraj.policies.cost import BaseBytes
from sloraj.policies.settings import ORDERS, QueueConfig
from sloraj.policies.waiting import WaitingQueue, make_queue
from sloraj.request import Sequence
from tests.sloraj.queue_model import QueueModel, new_sequence

BASE_BYTES = 1024  # with costs that are multiples of powers of two, sums are exact in any order
TENANTS = ("a", "b", "c", "d", "e", "f")
VERSIONS = (None, "v1", "v2", "v3", "v4", "v5", "v6")
CLUSTERS: dict[str, dict[str, Any]] = {
    "unclustered": {},
    "clustered": {"cluster_adapters": 2, "cluster_max_overtakes": 12, "cluster_max_lead": 24.0},
    "clustered, patience in seconds": {"cluster_adapters": 1, "cluster_max_wait_s": 300.0},
}


class Twins:
    """A queue and its model, to which the same happens."""

    def __init__(self, settings: QueueConfig, seed: int) -> None:
        self.random = random.Random(seed)
        self.model = QueueModel(settings, BASE_BYTES)
        self.queue: WaitingQueue = make_queue(
            settings,
            BaseBytes(weights=BASE_BYTES, row=BASE_BYTES),
            lambda: self.model.now_s,
            self.model.loaded_bytes,
        )
        self.tags = itertools.count(1)

    def operate(self) -> None:
        self.model.now_s += self.random.choice([0.0, 1.0, 5.0])
        roll = self.random.random()
        if roll < 0.40 and len(self.queue) < 40:
            self.add()
        elif roll < 0.65:
            self.admit()
        elif roll < 0.80:
            self.sample()
        elif roll < 0.88:
            self.finish()
        elif roll < 0.94:
            self.remove()
        else:
            self.preempt()
        self.compare()

    def add(self) -> None:
        tenants, versions = TENANTS, VERSIONS
        if self.random.random() < 0.5:  # some come more often than others
            tenants, versions = TENANTS[:2], VERSIONS[:3]
        version_id = self.random.choice(versions)
        is_ordered = self.model.settings.queue_order != "fcfs"
        sequence = new_sequence(
            next(self.tags),
            tenant=self.random.choice([*tenants, f"once {self.model.now_s}"]),
            version_id=version_id,
            priority=self.random.choice([0, 0, 0, -2, 1, 3]) if is_ordered else 0,
            arrival_s=self.model.now_s,
            num_prompt=self.random.randint(1, 12),
            adapter_bytes=0 if version_id is None else 128 * int(version_id[1:]),
        )
        self.model.add(sequence)
        self.queue.add(sequence)

    def admit(self) -> None:
        sequence = self.model.first()
        assert self.queue.first() is sequence
        if sequence is not None:
            loaded_bytes = self.model.loaded_bytes(sequence)
            self.model.admit(sequence)
            self.queue.admit(sequence, loaded_bytes)

    def sample(self) -> None:
        running = [s for s in self.model.running if self.random.random() < 0.7]
        for sequence in running:
            self.model.sample(sequence)
        self.queue.sampled(running)

    def finish(self) -> None:
        while len(self.model.running) > self.random.randrange(4):
            sequence = self.random.choice(self.model.running)
            self.model.running.remove(sequence)
            self.queue.finish(sequence)
            if self.random.random() < 0.3:
                self.model.on_device.discard(sequence.version_id or "")

    def remove(self) -> None:
        waiting = [*self.model.preempted, *self.model.new]
        if waiting:
            sequence = self.random.choice(waiting)
            self.model.remove(sequence)
            self.queue.remove(sequence)

    def preempt(self) -> None:
        if self.model.running:
            self.queue.put_back(self.model.preempt())

    def compare(self) -> None:
        assert len(self.queue) == len(self.model.new) + len(self.model.preempted)
        assert set(self.queue) == {*self.model.new, *self.model.preempted}
        if self.random.random() < 0.2:
            limit = self.random.choice([0, 1, 3, 100])
            assert list(self.queue.in_order(limit)) == self.model.order()[:limit]
        assert self.queue.first() is self.model.first()
        self.queue.check_integrity(self.model.running)


def every_settings() -> Iterator[tuple[str, QueueConfig]]:
    kinds = [(order, 0.0) for order in ORDERS] + [("vtc", 48.0)]
    for (order, tolerance), (name, cluster) in itertools.product(kinds, CLUSTERS.items()):
        settings = QueueConfig(
            queue_order=order,
            priority_ageing_s=4.0,
            tenant_weights=(("a", 2.0), ("f", 0.5)) if order == "vtc" else (),
            adapter_load_cost=32.0,
            tenant_tolerance=tolerance,
            **cluster,
        )
        yield f"{order}, {name}, tolerance {tolerance}", settings


@pytest.mark.parametrize("settings", [pytest.param(s, id=n) for n, s in every_settings()])
def test_every_order_is_the_model_by_brute_force(settings: QueueConfig) -> None:
    twins = Twins(settings, seed=1)
    for _ in range(2500):
        twins.operate()
    stats = twins.queue.stats()
    assert stats["admissions"] > 500
    assert (stats.get("overtakes", 0) > 50) == (
        settings.queue_order != "fcfs" or settings.cluster_adapters is not None
    )
    if settings.cluster_adapters is not None:
        assert stats["clustered_admissions"] > 20
        assert stats["wait_bound_admissions"] > 10


def test_a_walk_that_is_left_early_changes_nothing() -> None:
    settings = QueueConfig(queue_order="vtc", cluster_adapters=1)
    twins = Twins(settings, seed=2)
    for _ in range(30):
        twins.add()
    for _ in range(40):
        walk = twins.queue.in_order(100)
        for _ in range(twins.random.randrange(8)):
            next(walk, None)
        twins.operate()


def sequences(*priorities: int, gap_s: float = 1.0) -> list[Sequence]:
    return [
        new_sequence(tag, priority=priority, arrival_s=tag * gap_s)
        for tag, priority in enumerate(priorities)
    ]


def drain(queue: WaitingQueue) -> list[Sequence]:
    drained = []
    while (sequence := queue.first()) is not None:
        queue.admit(sequence, 0)
        drained.append(sequence)
    return drained


def queue_of(settings: QueueConfig) -> WaitingQueue:
    return make_queue(settings, BaseBytes(), lambda: 0.0, lambda sequence: 0)


def test_what_is_tight_is_kept_from_a_tenant_that_runs_too_many() -> None:
    queue = queue_of(QueueConfig(queue_order="vtc"))
    tags = itertools.count()

    def come(tenant: str) -> Sequence:
        sequence = new_sequence(next(tags), tenant=tenant, num_prompt=10)
        queue.add(sequence)
        return sequence

    flood = [come("flood") for _ in range(9)]
    for _ in range(6):  # alone it may have everything
        head = queue.first(is_tight=True)
        assert head is not None and head.tenant == "flood"
        queue.admit(head, 0)
    other = come("other")
    queue.admit(other, 0)
    assert queue.first() is flood[6]
    assert queue.first(is_tight=True) is None  # nobody waits but who runs six of seven
    assert list(queue.in_order(9, is_tight=True)) == flood[6:]  # when there is room again
    another = come("other")
    assert queue.first(is_tight=True) is another
    assert next(queue.in_order(9)) is flood[6]
    assert list(queue.in_order(9, is_tight=True)) == [another, *flood[6:]]
    queue.admit(another, 0)
    for sequence in flood[:5]:
        queue.finish(sequence)
    assert queue.first(is_tight=True) is flood[6]  # one of three is no more than an equal part
    assert list(queue.in_order(9, is_tight=True)) == flood[6:]
    queue.check_integrity([flood[5], other, another])


def test_room_is_kept_only_while_others_are_not_ahead_by_more_than_the_lead() -> None:
    queue = queue_of(QueueConfig(queue_order="vtc", cluster_max_lead=50.0))
    served = [new_sequence(tag, tenant="many", num_prompt=1) for tag in range(8)]
    for sequence in served:
        queue.add(sequence)
    dear = new_sequence(8, tenant="dear", num_prompt=100)
    for sequence in (dear, new_sequence(9, tenant="dear", num_prompt=100)):
        queue.add(sequence)
    for sequence in served[:6]:
        assert queue.first() is not None
        queue.admit(sequence, 0)
    queue.admit(dear, 0)  # it has been served 100, the others' tenant 6 in all
    assert queue.first(is_tight=True) is served[6]
    assert next(queue.in_order(9, is_tight=True)) is served[6]


@pytest.mark.parametrize(("tolerance", "order"), [(0.0, [0, 2, 1]), (1e6, [0, 1, 2])])
def test_within_the_tolerance_who_came_first_is_served_first(
    tolerance: float, order: list[int]
) -> None:
    queue = queue_of(QueueConfig(queue_order="vtc", tenant_tolerance=tolerance))
    waiting = [
        new_sequence(tag, tenant=tenant, arrival_s=float(tag), num_prompt=10)
        for tag, tenant in enumerate(["one", "one", "other"])
    ]
    for sequence in waiting:
        queue.add(sequence)
    assert drain(queue) == [waiting[place] for place in order]


def test_the_lower_priority_value_is_served_first_and_equals_by_arrival() -> None:
    queue = queue_of(QueueConfig(queue_order="priority", priority_ageing_s=100.0))
    a, b, c, d, e = sequences(0, 5, -1, 0, -1)
    for sequence in (a, b, c, d, e):
        queue.add(sequence)
    assert drain(queue) == [c, e, a, d, b]


@pytest.mark.parametrize("ageing_s", [0.5, 3.0])
def test_nobody_is_overtaken_by_one_that_comes_later_than_the_levels_between_them(
    ageing_s: float,
) -> None:
    queue = queue_of(QueueConfig(queue_order="priority", priority_ageing_s=ageing_s))
    dice = random.Random(3)
    waiting = sequences(*(dice.randint(-5, 5) for _ in range(300)), gap_s=0.25)
    for sequence in waiting:
        queue.add(sequence)
    order = drain(queue)
    assert order != waiting
    for place, sequence in enumerate(order):
        for other in order[:place]:
            levels = sequence.priority - other.priority
            assert other.arrival_s - sequence.arrival_s <= levels * ageing_s
