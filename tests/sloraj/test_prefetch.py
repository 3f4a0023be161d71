"""Laws of sending adapters ahead: it hides the bus, and it takes nothing from anyone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sloraj.batch import ScheduledBatch
from sloraj.policies.settings import QueueConfig
from tests.sloraj.core_driver import CoreDriver
from tests.sloraj.timed_driver import Arrival, TimedDriver, true_cost_s

UNBOUNDED = 10_000  # install pages a step

POOLS: dict[str, dict[str, Any]] = {
    "pages for all": {"num_pages": 400, "max_adapter_slots": 40, "max_num_seqs": 4},
    "few pages": {"num_pages": 60, "max_adapter_slots": 40, "max_num_seqs": 8},
    "few slots": {"num_pages": 200, "max_adapter_slots": 3, "max_num_seqs": 4},
    "hardly any": {"num_pages": 34, "max_adapter_slots": 2, "max_num_seqs": 4},
}


def driver_with_adapters(num: int, **changes: Any) -> CoreDriver:
    driver = CoreDriver(**changes)
    for content in range(1, num + 1):
        driver.loaded(f"a{content}", f"{content}:{content % 5 + 1}")
    driver.runner.keep_batches = True
    return driver


def admissions(batches: list[ScheduledBatch]) -> list[list[str]]:
    """The requests admitted by each step, in order."""
    return [[r.sequence.request_id for r in b.rows if r.is_reset] for b in batches]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("retention", ["cost", "lru", "paper"])
@pytest.mark.parametrize("order", ["fcfs", "vtc"])
def test_it_changes_no_admission_by_a_step(pool: str, retention: str, order: str) -> None:
    """What is sent ahead is idle: for tokens and other adapters its pages are as good as free."""
    found = []
    for is_on in (False, True):
        driver = driver_with_adapters(
            20, prefetch=is_on, retention=retention, install_pages_per_step=UNBOUNDED,
            queue=QueueConfig(queue_order=order, adapter_load_cost=0), **POOLS[pool],
        )  # fmt: skip
        choose = random.Random(pool)
        for _ in range(150):
            for _ in range(choose.choice([0, 0, 1, 3])):
                driver.generate(
                    [choose.randrange(50) for _ in range(choose.randint(1, 20))],
                    choose.choice([None, *[f"a{choose.randint(1, 20)}"] * 5]),
                    max_tokens=choose.randint(1, 25),
                )
            driver.step()
        driver.run()
        driver.expect_clean()
        found.append((admissions(driver.runner.batches), driver.core.stats()["preemptions"]))
        assert (driver.core.stats()["adapters"]["prefetched"] > 0) == is_on
    assert found[0] == found[1]


@pytest.mark.parametrize("pool", POOLS)
def test_what_is_sent_ahead_is_mostly_used_and_all_of_it_accounted_for(pool: str) -> None:
    driver = driver_with_adapters(20, **POOLS[pool])
    choose = random.Random(pool)
    for _ in range(300):
        if choose.random() < 0.5:
            driver.generate(
                [1] * choose.randint(1, 20), f"a{choose.randint(1, 20)}",
                max_tokens=choose.randint(1, 25),
            )  # fmt: skip
        driver.step()
    driver.run()
    counts = driver.core.stats()["adapters"]
    assert counts["prefetched"] == counts["prefetched_used"] + counts["prefetched_wasted"]
    assert counts["prefetched_wasted"] <= 0.2 * counts["prefetched"]
    if "slots" not in pool and pool != "hardly any":  # there those that run take every slot
        assert counts["prefetched"] > 10


def test_no_step_sends_more_than_its_bound_but_one_adapter_always_may_go() -> None:
    driver = driver_with_adapters(20, num_pages=300, max_adapter_slots=40, max_num_seqs=2,
                                  install_pages_per_step=6)  # fmt: skip
    for n in range(40):
        driver.generate([1, 2], f"a{n % 20 + 1}", max_tokens=3)
    driver.run()
    for batch, before in zip(driver.runner.batches[1:], driver.runner.batches, strict=False):
        own = batch.installs[len(before.sends) :]
        moved = [install.packed.num_pages for install in (*own, *batch.sends)]
        assert sum(moved) <= 6 or len(moved) == 1
    assert driver.core.stats()["adapters"]["prefetched"] > 10


def test_pages_that_running_sequences_will_grow_into_are_left_to_them() -> None:
    def batches(num_output: int) -> list[ScheduledBatch]:
        # 22 pages: 9 of one adapter, 2 for two prompts, 2 that may be next; 9 for the other one.
        driver = CoreDriver(num_pages=23, page_size=4, max_num_seqs=2)
        driver.runner.keep_batches = True
        for content in (1, 2):
            driver.loaded(f"a{content}", f"{content}:9")
        for _ in range(2):
            driver.generate([1] * 3, "a1", max_tokens=num_output)
        driver.generate([1] * 3, "a2", max_tokens=3)
        driver.run()
        return driver.runner.batches

    assert batches(num_output=2)[0].sends  # they end on the pages that they have
    long = batches(num_output=12)
    assert not any(batch.sends for batch in long[:6])  # more pages are still to come


def test_it_follows_the_order_in_which_requests_will_be_admitted() -> None:
    driver = CoreDriver(max_num_seqs=1, num_pages=100, install_pages_per_step=2,
                        max_adapter_slots=9, queue=QueueConfig(queue_order="priority"))  # fmt: skip
    driver.runner.keep_batches = True
    for content in (1, 2, 3, 4):
        driver.loaded(f"a{content}", f"{content}:2")
    driver.generate([1], max_tokens=30)
    driver.step()
    for content, priority in ((1, 5), (2, 0), (3, -5), (4, 1)):
        driver.generate([1], f"a{content}", max_tokens=2, priority=priority)
    driver.run()
    sent = [send.packed.version_id for batch in driver.runner.batches for send in batch.sends]
    assert sent == ["v3", "v2", "v4", "v1"]


def test_the_nearer_request_may_take_the_place_of_what_a_later_one_waits_for() -> None:
    driver = CoreDriver(max_num_seqs=1, num_pages=100, max_adapter_slots=2,
                        queue=QueueConfig(queue_order="priority"))  # fmt: skip
    for content in (1, 2, 3):
        driver.loaded(f"a{content}", f"{content}:2")
    driver.generate([1], "a1", max_tokens=40)
    driver.step()
    driver.generate([1], "a2", max_tokens=2, priority=5)
    driver.step()
    residency = driver.core._residency
    assert residency.is_resident("v2")
    driver.generate([1], "a3", max_tokens=2, priority=0)
    driver.step()
    assert residency.is_resident("v3") and not residency.is_resident("v2")
    driver.generate([1], "a2", max_tokens=2, priority=9)
    driver.step()
    assert residency.is_resident("v3")  # and not the other way round
    driver.run()
    assert residency.counts.prefetched_wasted == 1


def test_cold_adapters_come_sooner_because_their_bytes_cross_beside_other_steps() -> None:
    def cost_s(batch: ScheduledBatch) -> float:
        """Only what was not sent by the step before waits for the bus: 5 ms a page."""
        own = batch.installs[num_sent[0] :]
        num_sent[0] = len(batch.sends)
        return true_cost_s(batch) + 5e-3 * sum(install.packed.num_pages for install in own)

    choose = random.Random(1)
    arrivals = [
        Arrival(n / 40, choose.randint(20, 200), choose.randint(20, 60), f"a{n % 50 + 1}")
        for n in range(400)
    ]
    firsts = {}
    for is_on in (False, True):
        num_sent = [0]
        driver = TimedDriver(cost_s, prefetch=is_on, max_num_seqs=16, max_adapter_slots=40)
        for content in range(1, 51):
            driver.load(f"a{content}", f"{content}:{choose.randint(2, 16)}")
        driver.take_step()
        ids = driver.play([Arrival(driver.now_s + a.at_s, *_rest(a)) for a in arrivals])
        firsts[is_on] = sorted(driver.first_token_after_s[r] for r in ids)[len(ids) // 2]
    assert firsts[True] < 0.7 * firsts[False], firsts


def _rest(arrival: Arrival) -> tuple[int, int, str | None]:
    return arrival.num_prompt, arrival.num_output, arrival.adapter_id
