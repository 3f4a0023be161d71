"""One tenant sends 20 times as much as each other: what the others notice, under each order.

Without it the rows are 90 % taken. Time is counted in steps of the scheduler.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from sloraj.batch import ScheduledBatch
from sloraj.policies.cost import BaseBytes
from sloraj.policies.settings import QueueConfig
from tests.sloraj.core_driver import CoreDriver

NUM_TENANTS = 8
NUM_STEPS = 400
ROWS = 64
RATE = 0.38  # requests a step that each tenant sends: 90 % of what the rows can take
FLOOD = 20


def first_token_steps(flooding: bool, **queue: Any) -> list[int]:
    """Steps from arrival to first token, of those requests of the other tenants that had one."""
    driver = CoreDriver(
        num_pages=1600, page_size=4, max_num_seqs=ROWS, max_num_batched_tokens=512,
        max_adapter_slots=NUM_TENANTS, max_num_waiting=10**6, queue=QueueConfig(**queue),
        base_bytes=BaseBytes(weights=1600, row=800),
    )  # fmt: skip
    for number in range(1, NUM_TENANTS + 1):
        driver.loaded(f"a{number}", f"{number}:2")
    dice = random.Random(0)
    arrived: dict[str, int] = {}
    waits: list[int] = []
    step = 0

    def watch(batch: ScheduledBatch) -> None:
        for row in batch.rows:
            if row.samples and row.sequence.request_id in arrived:
                waits.append(1 + step - arrived.pop(row.sequence.request_id))

    driver.runner.before_execute = watch
    for step in range(NUM_STEPS):
        for number in range(1, NUM_TENANTS + 1):
            rate = RATE * (FLOOD if flooding and number == 1 else 1)
            for _ in range(np.random.default_rng([step, number]).poisson(rate)):
                prompt = [1] * dice.randint(4, 20)
                request_id = driver.generate(prompt, f"a{number}", max_tokens=dice.randint(8, 30))
                if number > 1:
                    arrived[request_id] = step
        driver.take_step()
    assert waits
    return waits


def p99(waits: list[int]) -> float:
    return float(np.percentile(waits, 99))


@pytest.mark.parametrize("clustering", [{}, {"cluster_adapters": 4, "cluster_max_lead": 200.0}])
def test_a_flood_leaves_others_p99_within_twice_that_without_it(clustering: dict[str, Any]) -> None:
    quiet = p99(first_token_steps(False, queue_order="vtc", **clustering))
    flooded = p99(first_token_steps(True, queue_order="vtc", **clustering))
    assert flooded <= 2 * quiet


def test_first_come_first_served_lets_all_wait_behind_the_flood() -> None:
    quiet = p99(first_token_steps(False))
    assert p99(first_token_steps(True)) > 20 * quiet
