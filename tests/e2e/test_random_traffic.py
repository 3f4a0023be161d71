"""Laws that hold under any order of operations, with the real runner and owner tags on the device:
every answer is that of the adapter version its request was admitted with, no row reads a page that
is not its own, and nothing is left behind.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from sloraj.errors import AdapterBusy, AdapterExists, AdapterNotFound
from tests.e2e.engine_driver import ADAPTERS, EngineDriver
from tests.e2e.test_same_tokens import random_params, random_prompt

Start = Callable[..., EngineDriver]
NUM_OPERATIONS = 4000
NAMES = ("a", "b", "c", "d", "e")
GEOMETRIES: dict[str, dict[str, Any]] = {
    "room for all": {},
    "few pages": {"num_pages": 40},
    "few pages and tokens": {"num_pages": 34, "max_num_batched_tokens": 12, "max_num_seqs": 6},
    "two slots": {"num_pages": 120, "max_adapter_slots": 2},
}


class _Traffic:
    """Random operations on a driver, and what must come of each request."""

    def __init__(self, driver: EngineDriver, seed: int) -> None:
        self.random = random.Random(seed)
        self.driver = driver
        self.loaded: dict[str, tuple[int, str]] = {}  # name -> content and version
        self.open: dict[str, tuple[int, str] | None] = {}  # request -> what it was admitted with
        self.unloads: list[int] = []
        self.num_checked = self.num_reloads = self.num_cancelled = 0

    def operate(self) -> None:
        roll = self.random.random()
        if roll < 0.60:
            self.step()
        elif roll < 0.82:
            self.request()
        elif roll < 0.88:
            self.cancel()
        elif roll < 0.96:
            self.load()
        else:
            self.unload()

    def step(self) -> None:
        self.driver.step()
        for request_id in [r for r in self.open if self.driver.is_finished(r)]:
            admitted = self.open.pop(request_id)
            self.driver.check(request_id, *(admitted or (None, None)))
            self.num_checked += 1

    def request(self) -> None:
        if len(self.open) >= 20:
            return
        name = self.random.choice([None, *self.loaded])
        params = random_params(self.random)
        request_id = self.driver.generate(random_prompt(self.random, 30), name, **params)
        self.open[request_id] = None if name is None else self.loaded[name]

    def cancel(self) -> None:
        if self.open:
            request_id = self.random.choice(list(self.open))
            del self.open[request_id]  # the step that takes the message may finish it
            self.driver.abort(request_id)
            self.step()
            self.num_cancelled += 1

    def load(self) -> None:
        """A new name, or other weights under a name that is taken."""
        name, content = self.random.choice(NAMES), self.random.randrange(len(ADAPTERS))
        replace = self.random.random() < 0.8
        call_id = self.driver.load(
            name, self.driver.engine.adapters[content].path, replace=replace,
            pinned=self.random.random() < 0.1,
        )  # fmt: skip
        self.step()
        reply = self.driver.replies[call_id]
        if isinstance(reply, dict):
            self.num_reloads += name in self.loaded and self.loaded[name][0] != content
            self.loaded[name] = (content, reply["version"])
        elif isinstance(reply, AdapterExists):
            assert name in self.loaded and not replace
        else:
            assert isinstance(reply, AdapterBusy) and name not in self.loaded  # it still unloads

    def unload(self) -> None:
        name = self.random.choice(NAMES)
        call_id = self.driver.unload(name)
        self.step()
        if name in self.loaded:
            del self.loaded[name]
            self.unloads.append(call_id)
        else:
            assert isinstance(self.driver.replies[call_id], AdapterNotFound)

    def finish(self) -> None:
        self.unloads += [self.driver.unload(name) for name in self.loaded]
        while not self.driver.core.is_idle or self.open:
            self.step()


@pytest.mark.row(45)
@pytest.mark.row(50)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_random_operations_change_no_answer_and_leave_nothing(geometry: str, start: Start) -> None:
    driver = start(**GEOMETRIES[geometry])
    traffic = _Traffic(driver, list(GEOMETRIES).index(geometry))
    oracle = driver.engine.oracle
    num_tokens, num_near_ties = oracle.num_tokens, oracle.num_near_ties
    num_operations = NUM_OPERATIONS // len(GEOMETRIES)
    for number in range(num_operations):
        traffic.operate()
        if number % 5 == 0:
            driver.core.check_integrity()
    traffic.finish()
    assert not driver.failures
    assert all(driver.replies[call_id] is None for call_id in traffic.unloads)
    driver.check_freed()
    stats = driver.core.stats()
    assert stats["num_pages_free"] == stats["num_pages"]
    assert stats["num_adapter_versions"] == stats["num_adapters"] == 0
    # The traffic reached what it is meant to reach.
    assert traffic.num_checked > num_operations / 10
    assert min(traffic.num_reloads, traffic.num_cancelled, len(traffic.unloads)) > 5
    assert (stats["preemptions"] > 0) == geometry.startswith("few pages")
    assert (stats["adapter_evictions"] > 0) == (geometry != "room for all")
    assert oracle.num_near_ties - num_near_ties < (oracle.num_tokens - num_tokens) / 50
